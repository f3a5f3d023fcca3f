"""chunkattn as an attention implementation of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from ._adapters import common_adapter
from ._attention import attention
from .masks import Causal, Dense, Window

Array = Any


def register_transformers(name: str = "chunkattn") -> None:
    """Make ``attn_implementation=name`` work in Hugging Face transformers [1]_.

    It registers an attention function and the mask function that belongs to it, for all models
    that take their attention from transformers' `AttentionInterface`: encoders and decoders, with
    every kind of cache, in evaluation and in training, with grouped heads, sliding windows,
    softcap, sinks and position bias.

    Parameters
    ----------
    name : str, default "chunkattn"
        What to ask for: ``AutoModel.from_pretrained(..., attn_implementation=name)``, or
        ``model.set_attn_implementation(name)``.  A name that is taken already gets this meaning.

    Raises
    ------
    ImportError
        If transformers is not installed, or older than 5.4.
    TypeError
        If `name` is not a str.

    Notes
    -----
    Causal masks, sliding windows and padding stay linear in the length: they reach the attention
    function as masks of `chunkattn.masks`, and tiles that nobody sees are skipped.  All other
    masks (packed or chunked sequences, a model's or a user's own) are transformers' arrays of
    shape (batch, 1, n_q, n_k).

    Positions of padding that see no key give 0, as with "sdpa", where "eager" gives them a mean of
    all values.  No other position sees the difference; a loss should leave them out.  Weights are
    not returned: `output_attentions` needs "eager".  Dropout draws from PyTorch's generator
    (`torch.manual_seed`).

    References
    ----------
    .. [1] https://huggingface.co/docs/transformers/attention_interface

    Examples
    --------
    >>> from chunkattn.interop import register_transformers
    >>> register_transformers()  # doctest: +SKIP
    >>> model = AutoModel.from_pretrained(
    ...     "sentence-transformers/all-MiniLM-L6-v2", attn_implementation="chunkattn"
    ... )  # doctest: +SKIP
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str; got {name!r}")
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4):
        raise ImportError(
            f"transformers 5.4 or later is needed; this is {transformers.__version__}"
        )
    transformers.AttentionInterface.register(name, transformers_attention)
    transformers.AttentionMaskInterface.register(name, transformers_mask)


@dataclass(frozen=True)
class Visible:
    """What the mask function hands to the attention function, through the model.

    A model that wants to read its mask as a tensor forbids None for it (`allow_is_causal_skip`),
    and gets a tensor.

    Attributes
    ----------
    masks : tuple of Mask
        All must allow a pair.
    padding : boolean tensor of shape (batch, n_k), optional
        Which keys are no padding.
    query_offset, key_offset : int
        Positions of the first query and key.
    shape : tuple of int
        What the mask would have as a tensor: (batch, 1, n_q, n_k).
    """

    masks: tuple[Any, ...]
    padding: Array | None
    query_offset: int
    key_offset: int
    shape: tuple[int, int, int, int]
    ndim = 4

    def contiguous(self) -> Visible:
        """Return itself: `generate` asks this of the masks for a static cache."""
        return self

    def keywords(self, query: Array, key: Array) -> dict[str, Any]:
        """Return the arguments of `attention`."""
        if self.shape[2:] != (query.shape[2], key.shape[2]):
            raise ValueError(
                f"the mask is of {self.shape[2]} queries and {self.shape[3]} keys, but attention "
                f"is asked for {query.shape[2]} and {key.shape[2]}"
            )
        masks = self.masks
        if self.padding is not None:  # another device, where layers are spread over several
            masks += (Dense(self.padding.to(key.device)[:, None, None, :]),)
        return {
            "mask": masks,
            "query_offset": self.query_offset,
            "key_offset": self.key_offset,
        }


def transformers_attention(
    module: Any,
    query: Array,
    key: Array,
    value: Array,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Array | None = None,
    position_bias: Array | None = None,
    **rest: Any,
) -> tuple[Array, None]:
    """Return attention as (batch, n_q, h, d_v), and no weights: transformers' attention function.

    Parameters
    ----------
    module : torch.nn.Module
        The calling layer.
    query, key, value : tensors of shape (batch, h or h_k, n, d)
        What `attention` takes.
    attention_mask : Visible or tensor, optional
        A boolean tensor (True = may attend) or a floating one (added to the scores).  With None,
        the layer is causal or sees all.
    dropout, scaling, softcap : float, optional
        As in `attention`.
    is_causal : bool, optional
        What counts where there is no mask; default ``module.is_causal``.
    s_aux : tensor of shape (h,), optional
        Sinks.
    position_bias : tensor, optional
        Added to the scores.
    **rest
        What is meant for other implementations: a window, say, which is in the mask already.
    """
    if rest.get("sinks") is not None:
        raise NotImplementedError("sinks that differ by position are not supported; s_aux is")
    given: dict[str, Any] = {"query_offset": 0, "bias": position_bias}
    if isinstance(attention_mask, Visible):
        given |= attention_mask.keywords(query, key)
    elif attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # A single query is the last one: it sees all keys, and is no query 0 aligned top left.
        given["causal"] = bool(causal) and query.shape[2] > 1
    elif attention_mask.is_floating_point():
        given["bias"] = attention_mask if position_bias is None else attention_mask + position_bias
    else:
        given["mask"] = attention_mask
    xp = common_adapter([("query", query)])
    out = attention(
        query,
        key,
        value,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
        dropout_seed=xp.random_seed(query) if dropout else None,
        **given,
    )
    return out.transpose(1, 2).contiguous(), None


def transformers_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **rest: Any,
) -> Any:
    """Return the mask of a forward pass, small where it can be: transformers' mask function.

    Parameters
    ----------
    batch_size, q_length, kv_length : int
        Sizes of the mask.
    q_offset : int or integer tensor
        Position of query 0; a tensor from static caches.
    kv_offset : int
        Position of key 0.
    mask_function : callable(b, h, q_idx, kv_idx), optional
        The pattern; default causal.
    attention_mask : boolean tensor of shape (batch, positions), optional
        Which keys are no padding; those past its end are.
    local_size : int, optional
        The size of a window.
    allow_is_causal_skip, allow_is_bidirectional_skip : bool
        Whether the model copes with no tensor, but None, for a causal or bidirectional mask.
    **rest
        For `sdpa_mask`.

    Returns
    -------
    Visible or boolean tensor of shape (batch, 1, n_q, n_k)
    """
    from transformers import masking_utils

    if isinstance(attention_mask, Visible):  # prepared before the forward pass
        return attention_mask
    mask_function = mask_function or masking_utils.causal_mask_function
    masks = None
    if allow_is_causal_skip or allow_is_bidirectional_skip:
        masks = _masks_of(mask_function, local_size, masking_utils)
    if masks is None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **rest | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if padding.all():
            padding = None
    # A static cache goes on counting in its tensor: the number of now is wanted.
    shape = (batch_size, 1, q_length, kv_length)
    return Visible(masks, padding, int(q_offset), int(kv_offset), shape)


def _masks_of(function: Any, size: int | None, theirs: Any) -> tuple[Any, ...] | None:
    """Return the masks that stand for one of transformers' plain patterns; None: no such one."""
    if function is theirs.causal_mask_function:
        return (Causal(),)
    if function is theirs.bidirectional_mask_function:
        return ()
    if size and _alike(function, theirs.sliding_window_causal_mask_function(size)):
        return (Window(size - 1, 0),)
    if size and _alike(function, theirs.sliding_window_bidirectional_mask_function(size)):
        return (Window(size, size),)
    return None


def _alike(a: Any, b: Any) -> bool:
    """Whether two functions are of one definition and captured the same; or two ints, or tuples."""
    if isinstance(a, FunctionType) and isinstance(b, FunctionType):
        held = ([cell.cell_contents for cell in f.__closure__ or ()] for f in (a, b))
        return a is b or (a.__code__ is b.__code__ and _alike(*map(tuple, held)))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return isinstance(a, int) and isinstance(b, int) and a == b
