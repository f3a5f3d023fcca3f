"""chunkattn in the attention layers of Hugging Face diffusers.

    model.set_attn_processor(ChunkattnProcessor())

puts it into every `diffusers.models.attention_processor.Attention` of a model: a UNet, a VAE, a
transformer of such layers.  Masks stay masks, and no array of all scores is made.
"""

from __future__ import annotations

import sys

import torch

from chunkattn import attention


class ChunkattnProcessor:
    """What diffusers calls in the place of its `AttnProcessor2_0`."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None
    ):
        """Return the layer's output, of the shape of its input."""
        x, picture = hidden_states, hidden_states.shape[2:]  # height and width, or the channels
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if len(picture) == 2:
            x = x.flatten(2).mT
        if attn.group_norm is not None:
            x = attn.group_norm(x.mT).mT
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            layer(y).unflatten(-1, (attn.heads, -1))
            for layer, y in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        query, key = (
            y if norm is None else norm(y) for norm, y in ((attn.norm_q, query), (attn.norm_k, key))
        )
        bias = None
        if attention_mask is not None:  # numbers to add, for each head of each batch entry
            batch, n_k = context.shape[:2]
            bias = attn.prepare_attention_mask(attention_mask, n_k, batch)
            bias = bias.unflatten(0, (batch, attn.heads))
        out = attention(query, key, value, bias=bias, layout="nhd").flatten(-2)
        for layer in attn.to_out:
            out = layer(out)
        if len(picture) == 2:
            out = out.mT.unflatten(-1, picture)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def small_unet(seed=0):
    """Return a UNet of random weights, with self-attention and cross-attention."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def main():
    """Compare with diffusers' own processor on a UNet of random weights."""
    unet = small_unet().eval()
    noisy, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 12)
    seen = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    with torch.no_grad():
        theirs = unet(noisy, 10, text, encoder_attention_mask=seen).sample
        unet.set_attn_processor(ChunkattnProcessor())
        ours = unet(noisy, 10, text, encoder_attention_mask=seen).sample
    difference = float((ours - theirs).abs().max())
    print(f"largest difference from diffusers' own: {difference:.1e}")
    return int(difference > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
