"""Drop-ins: other libraries' attention functions, for arrays of every library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._attention import attention
from .masks import Predicate

Array = Any

__all__ = ["flex_attention"]


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
        Returns the scores to use.  It is called once per tile: `score` is the tile of scaled
        products, of shape (B, H, queries, keys), and the others are integer arrays that broadcast
        against it.
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
    for name, x in (("query", query), ("key", key), ("value", value)):
        if len(getattr(x, "shape", (1,) * 4)) != 4:
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
