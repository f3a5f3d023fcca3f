"""Drop-ins: other libraries' attention functions, for arrays of every library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._adapters import common_adapter
from ._attention import attention
from ._interop_flax import flax_attention_fn
from ._interop_jax import dot_product_attention
from ._interop_keras import keras_multi_head_attention
from ._interop_torch import register_torch, replace_sdpa
from ._interop_transformers import register_transformers
from ._shapes import broadcast, is_accepted, shapes_of
from .masks import Predicate

Array = Any

__all__ = [
    "dot_product_attention",
    "flax_attention_fn",
    "flex_attention",
    "keras_multi_head_attention",
    "register_torch",
    "register_transformers",
    "replace_sdpa",
    "scaled_dot_product_attention",
]


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Attention with the signature and the meaning of PyTorch's function of this name [1]_.

    Parameters
    ----------
    query : array of shape (…, H, n_q, d), or (n_q, d)
        Queries.  All axes before the last two broadcast between query, key and value, the one of
        heads too.
    key : array of shape (…, H, n_k, d), or (n_k, d)
        Keys.
    value : array of shape (…, H, n_k, d_v), or (n_k, d_v)
        Values.
    attn_mask : array, optional
        Boolean: which pairs may attend (True = may).  Floating: added to the scores, and may be
        differentiated by.  It broadcasts to (…, H, n_q, n_k).  Those of PyTorch's
        `torch.nn.attention.bias`, which are causal, may be given too.
    dropout_p : float, default 0.0
        Probability with which a weight is dropped, in [0, 1).  It always acts where it is not 0;
        which weights, follows from PyTorch's generator (`torch.manual_seed`).  For arrays of
        PyTorch only.
    is_causal : bool, default False
        Whether query ``i`` sees only the keys ``j <= i``: aligned top left, whatever `n_q` and
        `n_k` are.  Not together with `attn_mask`.
    scale : float, optional
        Default ``1 / sqrt(d)``.
    enable_gqa : bool, default False
        Whether the heads of `query` may be a multiple of those of `key` and `value`: query head
        ``t`` then reads key head ``t // (H // H_k)``.

    Returns
    -------
    array of shape (…, H, n_q, d_v), or (n_q, d_v)
        0 for a query that sees no key, as in PyTorch (2.13).

    Raises
    ------
    TypeError
        If `attn_mask` is neither boolean nor floating, or as for `chunkattn.attention`.
    ValueError
        If shapes do not fit together, `attn_mask` meets `is_causal`, or dropout is asked for on
        another library, where `chunkattn.attention` takes a seed.

    Notes
    -----
    Differences from PyTorch: which weights are dropped for a state of the generator; a floating
    `attn_mask` is of any floating dtype, where PyTorch takes float32 and that of `query`.  What
    PyTorch's documentation rules out is refused, though some of its kernels let it pass: key and
    value of different numbers of heads with `enable_gqa`, and `attn_mask` with `is_causal`.

    References
    ----------
    .. [1] https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn.interop import scaled_dot_product_attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, heads, 100, 8)) for heads in (6, 2, 2))
    >>> scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).shape
    (2, 6, 100, 8)
    """
    tokens = {"query": query, "key": key, "value": value}
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False; got {is_causal!r}")
    lines = None if is_causal or not hasattr(attn_mask, "variant") else attn_mask
    if lines is not None:  # a causal mask of `torch.nn.attention.bias`
        is_causal, attn_mask = True, None
    given = tokens if attn_mask is None else {**tokens, "attn_mask": attn_mask}
    xp = common_adapter(list(given.items()))
    pairs = _pairs(tokens, enable_gqa)
    offset = 0 if lines is None else _offset_of(lines, pairs)
    bias = mask = None
    if attn_mask is not None:
        if is_causal:
            raise ValueError("attn_mask must be None where is_causal is True")
        if broadcast([tuple(attn_mask.shape), pairs]) != pairs:
            raise ValueError(
                f"attn_mask must broadcast to {pairs}; got shape {tuple(attn_mask.shape)}"
            )
        if xp.is_bool(attn_mask.dtype):
            mask = attn_mask
        elif is_accepted(xp, attn_mask):
            bias = attn_mask
        else:
            raise TypeError(
                "attn_mask must be boolean (True = may attend) or floating (added to the scores); "
                f"got {attn_mask.dtype}"
            )
    seed = _dropout_seed(xp, dropout_p, query)
    apart = not enable_gqa and not _heads_fit(tokens)
    if apart:  # the axis of heads is one more batch axis, with one head each
        tokens = {name: xp.expand_dims(x, axis=-3) for name, x in tokens.items()}
        bias, mask = (
            x if x is None or len(x.shape) < 2 else xp.expand_dims(x, axis=-3) for x in (bias, mask)
        )
    out = attention(
        **tokens,
        scale=scale,
        causal=is_causal,
        mask=mask,
        bias=bias,
        dropout=dropout_p,
        dropout_seed=seed,
        query_offset=offset,
    )
    return out[..., 0, :, :] if apart else out


def _offset_of(mask: Any, pairs: tuple[int, ...]) -> int:
    """Return the position of query 0 that a mask of `torch.nn.attention.bias` means."""
    lengths = mask.seq_len_q, mask.seq_len_kv
    if mask.variant.name == "UPPER_LEFT" or lengths[0] == lengths[1]:
        return 0
    if pairs[-2:] != lengths:
        raise ValueError(
            f"attn_mask is of {lengths[0]} queries and {lengths[1]} keys; got {pairs[-2]} and "
            f"{pairs[-1]}"
        )
    return int(lengths[1] - lengths[0])


def _pairs(tokens: dict[str, Array], enable_gqa: bool) -> tuple[int, ...]:
    """Return the shape of the scores; refuse shapes that do not broadcast."""
    for name, x in tokens.items():
        if len(x.shape) < 2:
            raise ValueError(f"{name} must have two axes or more, (…, n, d); got {tuple(x.shape)}")
    if enable_gqa:
        return shapes_of(tokens, "hnd").scores
    lead = broadcast([tuple(x.shape[:-2]) for x in tokens.values()])
    if lead is None:
        told = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tokens.items())
        raise ValueError(
            "query, key and value must broadcast in all axes before the last two (pass "
            f"enable_gqa=True where heads of query share those of key and value); got {told}"
        )
    return (*lead, tokens["query"].shape[-2], tokens["key"].shape[-2])


def _heads_fit(tokens: dict[str, Array]) -> bool:
    """Whether `attention` reads the heads as PyTorch does: none, equal, or one key head."""
    heads, key_heads, value_heads = (tuple(x.shape[-3:-2]) for x in tokens.values())
    shared = key_heads == (1,) and heads not in ((), (0,))
    return key_heads == value_heads and (key_heads == heads or shared)


def _dropout_seed(xp: Any, dropout_p: Any, query: Array) -> Any:
    """Return a seed of the library's own generator where there is dropout."""
    try:
        rate = float(dropout_p)
    except (TypeError, ValueError):
        raise TypeError(f"dropout_p must be a number; got {dropout_p!r}") from None
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_p must be in [0, 1); got {dropout_p!r}")
    seed = xp.random_seed(query) if rate else 0
    if seed is None:
        raise ValueError(
            f"dropout_p must be 0 for {xp.name} arrays, which have no generator like PyTorch's; "
            "chunkattn.attention(dropout=..., dropout_seed=...) takes a seed"
        )
    return seed


def flex_attention(
    query: Array,
    key: Array,
    value: Array,
    score_mod: Callable[..., Array] | None = None,
    mask_mod: Callable[..., Array] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Any:
    """Attention with scores and mask by function, as PyTorch's FlexAttention [1]_ defines them.

    Parameters
    ----------
    query : array of shape (B, H, n_q, d)
        Queries.
    key : array of shape (B, H_k, n_k, d)
        Keys.
    value : array of shape (B, H_k, n_k, d_v)
        Values.
    score_mod : callable(score, b, h, q_idx, kv_idx), optional
        Returns the scores to use.  It is called as that of `chunkattn.attention` is, once per tile
        and for some purposes again: `score` is the tile of scaled products, of shape (B, H,
        queries, keys), and the others are integer arrays that broadcast against it.
    mask_mod : callable(b, h, q_idx, kv_idx), optional
        Returns which pairs may attend, as booleans: what FlexAttention takes inside a block mask.
    scale : float, optional
        Default ``1 / sqrt(d)``.
    enable_gqa : bool, default False
        Whether `H` may be a multiple of `H_k`.
    return_lse : bool, default False
        Whether to return ``(out, lse)``; `lse` of shape (B, H, n_q), natural logarithm.

    Returns
    -------
    array, or tuple of two arrays
        As `chunkattn.attention`.

    Raises
    ------
    ValueError
        If there are not four axes, or `H` differs from `H_k` without `enable_gqa`.

    References
    ----------
    .. [1] https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn.interop import flex_attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 100, 8))
    >>> slopes = 2.0 ** -np.arange(1, 5)
    >>> def alibi(score, b, h, q_idx, kv_idx):
    ...     return score + slopes[h] * (kv_idx - q_idx)
    >>> def causal(b, h, q_idx, kv_idx):
    ...     return q_idx >= kv_idx
    >>> flex_attention(q, k, v, score_mod=alibi, mask_mod=causal).shape
    (2, 4, 100, 8)
    """
    tokens = {"query": query, "key": key, "value": value}
    common_adapter(tokens.items())
    for name, x in tokens.items():
        if len(x.shape) != 4:
            raise ValueError(f"{name} must have four axes, (B, H, n, d); got {tuple(x.shape)}")
    if not enable_gqa and query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"query has {query.shape[-3]} heads and key {key.shape[-3]}: pass enable_gqa=True "
            "where heads of query share those of key"
        )
    return attention(
        query,
        key,
        value,
        scale=scale,
        score_mod=score_mod,
        mask=None if mask_mod is None else Predicate(mask_mod),
        return_lse=return_lse,
    )
