"""`attn_implementation="chunkattn"` in Hugging Face transformers, against its "eager"."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest

from chunkattn.interop import register_transformers

torch = pytest.importorskip("torch")

PADDINGS = {"none": [], "left": [range(5), range(11)], "right": [range(13, 19), range(7, 19)]}

ENCODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large weights, so that the scores matter
    "pad_token_id": 0,
}
DECODER = ENCODER | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = {"sliding_window": 7}
SOFTCAP = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4}
DECODERS = {
    "Llama": {},
    "Mistral": WINDOW,
    "Gemma2": WINDOW | SOFTCAP | {"tie_word_embeddings": False},
    "GptOss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module", autouse=True)
def transformers():
    """The package, unable to reach the internet, and with the implementation registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        transformers = pytest.importorskip("transformers")
        register_transformers()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the models are tiny
        yield transformers
        torch.set_num_threads(threads)


@pytest.fixture
def exact(monkeypatch):
    """Let "eager" take its softmax in the dtype of the scores, so that float64 is exact."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim)
    )


@pytest.fixture
def small_masks_only(monkeypatch):
    """Refuse what builds a mask of n_q × n_k."""
    from transformers import masking_utils

    def refuse(*args, **kwargs):
        raise AssertionError("a mask of n_q × n_k")

    return lambda: monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)


def built(config, kind="AutoModelForCausalLM"):
    """Return a model of random weights in float64."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind).from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    for name, x in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(x, std=2)
    return model.double().eval()


def decoder(name):
    import transformers

    return built(getattr(transformers, f"{name}Config")(**DECODER | DECODERS[name]))


def drawn(padding="none", batch=3, length=19):
    """Return tokens, and which are no padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (batch, length), generator=generator)
    seen = torch.ones_like(ids)
    for row, padded in enumerate(PADDINGS[padding], 1):
        seen[row, list(padded)] = 0
    return ids * seen, seen


def both(model, function):
    """Return the function's results with "eager" and with "chunkattn"."""
    found = []
    for name in ("eager", "chunkattn"):
        model.set_attn_implementation(name)
        found.append(function())
    return found


def same(actual, expected, error=1e-11):
    """Compare up to an error, relative to the largest number where that is above 1."""
    actual, expected = actual.detach().numpy(), expected.detach().numpy()
    error *= max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=error)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens(name, padding, cache):
    """Past the window, which is shorter than the prompt."""
    model = decoder(name)
    ids, seen = drawn(padding)
    keywords = {"max_new_tokens": 12, "do_sample": False, "use_cache": cache != "none"}
    if cache == "static":
        keywords["cache_implementation"] = "static"

    def generate():
        return model.generate(
            ids,
            attention_mask=seen,
            output_logits=True,
            return_dict_in_generate=True,
            **keywords,
        )

    theirs, ours = both(model, generate)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.sequences[:, 19:].unique()) > 6  # not the same tokens again and again
    same(torch.stack(ours.logits), torch.stack(theirs.logits), 1e-6)  # in float32


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", DECODERS)
def test_gradients_of_training(name, padding, small_masks_only):
    """By all parameters; no mask of n_q × n_k is built."""
    model = decoder(name).train()
    ids, seen = drawn(padding)
    labels = ids.masked_fill(seen == 0, -100)
    labels[:, 1:][seen[:, :-1] == 0] = -100  # nothing is told from padding

    def gradients():
        if model.config._attn_implementation == "chunkattn":
            small_masks_only()
        model.zero_grad()
        model(ids, attention_mask=seen, labels=labels).loss.backward()
        return {n: x.grad for n, x in model.named_parameters() if x.grad is not None}

    theirs, ours = both(model, gradients)
    assert set(ours) == set(theirs)
    assert any(n.endswith("sinks") for n in ours) == (name == "GptOss")
    for n, x in theirs.items():
        same(ours[n], x)


@pytest.mark.usefixtures("exact")
def test_checkpointed_training_drops_the_same_weights():
    """The dropout follows PyTorch's generator, which a checkpoint restores."""
    model = decoder("Mistral").train()
    model.set_attn_implementation("chunkattn")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids, seen = drawn("left")

    def gradient(seed):
        torch.manual_seed(seed)
        model.zero_grad()
        model(ids, attention_mask=seen, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.v_proj.weight.grad

    first = gradient(3)
    assert torch.equal(gradient(3), first)
    assert not torch.allclose(gradient(4), first)
    older = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", older)()
    assert torch.equal(gradient(3), first)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_prompt_in_pieces(name, transformers, small_masks_only):
    """Several queries at once behind a cache."""
    model = decoder(name)
    ids, seen = drawn("left")
    known = signature(model.forward).parameters
    keyword = "cache" if "cache" in known else "past_key_values"  # its name before 5.24

    def logits():
        if model.config._attn_implementation == "chunkattn":
            small_masks_only()
        cache = transformers.DynamicCache(config=model.config)
        found = []
        for start, stop in ((0, 8), (8, 14), (14, 19)):
            piece = ids[:, start:stop]
            out = model(piece, attention_mask=seen[:, :stop], **{keyword: cache})
            found.append(out.logits)
        return torch.cat(found, dim=1) * seen[..., None]

    theirs, ours = both(model, logits)
    same(ours, theirs)


def other_masks():
    torch.manual_seed(2)
    pieces = torch.cat([torch.arange(8), torch.arange(11)])
    allowed = (torch.rand(3, 1, 19, 19) < 0.5) | torch.eye(19, dtype=torch.bool)
    return {
        "packed": {"position_ids": pieces[None].expand(3, -1)},
        "boolean": {"attention_mask": allowed},
        "floating": {"attention_mask": torch.randn(3, 1, 19, 19, dtype=torch.float64)},
    }


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["packed", "boolean", "floating"])
def test_other_masks(kind):
    """Packed sequences, and the caller's own masks: boolean ones as numbers for "eager"."""
    model = decoder("Llama")
    ids, _ = drawn()

    def logits():
        given = other_masks()[kind]
        if kind == "boolean" and model.config._attn_implementation == "eager":
            given["attention_mask"] = torch.where(given["attention_mask"], 0.0, -torch.inf).double()
        return model(ids, use_cache=False, **given).logits

    theirs, ours = both(model, logits)
    same(ours, theirs)
    assert not torch.allclose(ours, model(ids, use_cache=False).logits)


@pytest.mark.usefixtures("exact")
def test_chunks(transformers):
    """Llama 4 attends in chunks, which begin behind the padding."""
    config = transformers.Llama4TextConfig(
        **DECODER,
        intermediate_size_mlp=48,
        num_local_experts=2,
        attention_chunk_size=4,
        layer_types=["chunked_attention", "full_attention"],
    )
    model = built(config)
    ids, seen = drawn("left")
    theirs, ours = both(model, lambda: model(ids, attention_mask=seen).logits * seen[..., None])
    same(ours, theirs)


@pytest.mark.usefixtures("exact")
def test_encoder_with_windows(transformers, small_masks_only):
    """ModernBERT's windows are of both sides, in every other layer."""
    keywords = {"local_attention": 6, "global_attn_every_n_layers": 2}
    config = transformers.ModernBertConfig(**ENCODER, **keywords)
    model = built(config, "AutoModel")
    ids, seen = drawn("right")

    def states():
        if model.config._attn_implementation == "chunkattn":
            small_masks_only()
        return model(ids, attention_mask=seen).last_hidden_state * seen[..., None]

    theirs, ours = both(model, states)
    same(ours, theirs)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_encoder_and_decoder(name, transformers):
    """Cross attention to a padded encoder; T5 adds a bias by position."""
    sizes = {
        "T5": {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0},
        "Bart": {
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "init_std": 0.3,
        },
    }
    config = getattr(transformers, f"{name}Config")(
        vocab_size=97, d_model=32, pad_token_id=0, decoder_start_token_id=1, **sizes[name]
    )
    model = built(config, "AutoModelForSeq2SeqLM")
    ids, seen = drawn("right")

    def run():
        model.zero_grad()
        out = model(ids, attention_mask=seen, labels=ids[:, :9].masked_fill(seen[:, :9] == 0, -100))
        out.loss.backward()
        return out.loss, *(x.grad for x in model.parameters() if x.grad is not None)

    theirs, ours = both(model, run)
    for x, y in zip(ours, theirs, strict=True):
        same(x, y)
    keywords = {"attention_mask": seen, "max_new_tokens": 8, "do_sample": False}
    theirs, ours = both(model, lambda: model.generate(ids, **keywords))
    assert torch.equal(ours, theirs)
