"""`jax.nn.dot_product_attention` for arrays of every library."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from ._adapters import common_adapter
from ._attention import attention
from ._checks import choice
from ._request import IMPLEMENTATIONS
from ._shapes import shapes_of
from .masks import Lengths, Window

Array = Any

# JAX's names to those of `attention`.
_IMPLEMENTATIONS = {"xla": "standard", "cudnn": "native"}


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Attention with the signature and the meaning of `jax.nn.dot_product_attention` [1]_.

    Axes: B batch, T queries, S keys, N heads of query, K of key and value, H width.

    Parameters
    ----------
    query : array of shape (B, T, N, H) or (T, N, H)
        Queries.
    key : array of shape (B, S, K, H) or (S, K, H)
        Keys.  N is a multiple of K: query head ``t`` reads key head ``t // (N // K)``.
    value : array of shape (B, S, K, H) or (S, K, H)
        Values.
    bias : floating array, optional
        Added to the scores; broadcasts to (B, N, T, S).
    mask : boolean array, optional
        Which pairs may attend (True = may); broadcasts to (B, N, T, S).
    scale : float, optional
        Default ``1 / sqrt(H)``.
    is_causal : bool, default False
        Whether query ``t`` sees only the keys ``s <= t``: aligned top left, whatever T and S are.
    query_seq_lengths : integer array of shape (B,), optional
        Valid queries of each batch entry; those past them get 0.
    key_value_seq_lengths : integer array of shape (B,), optional
        Valid keys of each batch entry; those past them are not seen.
    local_window_size : int or tuple (left, right), optional
        How many keys before and after its own position a query sees; an int is both.
    implementation : {None, "xla", "cudnn"}, optional
        None is "auto" of `chunkattn.attention`, "xla" is "standard" (with all scores at once) and
        "cudnn" is "native"; the names of `chunkattn.attention` are taken too.
    return_residual : bool, default False
        Whether to return ``(out, residual)``.

    Returns
    -------
    out : array of shape (B, T, N, H) or (T, N, H), as query
        0 for a query that sees no key.
    residual : array of shape (B, T, N) or (T, N)
        The logarithm of the softmax's denominator, in the dtype of `out`; -inf for a query that
        sees no key.  Only with `return_residual`.

    Raises
    ------
    TypeError
        If an argument is of a wrong kind or dtype, or the arrays are of two libraries.
    ValueError
        If shapes do not fit together, or a window is negative.
    NotImplementedError
        If `implementation` is "cudnn" and no kernel covers the request, such as one for the
        residual.

    Notes
    -----
    Differences from JAX: there, a query that sees no key attends to all of them alike, masked ones
    too, and the softmax of float64 inputs is in float32.  Here `residual` may be differentiated
    through, where JAX stops the gradient; lengths are of any integer dtype; and the width of
    `value` may differ from H.

    References
    ----------
    .. [1] https://docs.jax.dev/en/latest/_autosummary/jax.nn.dot_product_attention.html

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn.interop import dot_product_attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.standard_normal((2, 100, heads, 8)) for heads in (6, 2, 2))
    >>> out, residual = dot_product_attention(
    ...     q,
    ...     k,
    ...     v,
    ...     key_value_seq_lengths=np.asarray([100, 70]),
    ...     local_window_size=(15, 0),
    ...     return_residual=True,
    ... )
    >>> out.shape, residual.shape
    ((2, 100, 6, 8), (2, 100, 6))
    """
    tokens = {"query": query, "key": key, "value": value}
    lengths = {
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    optional = {"bias": bias, "mask": mask, **lengths}
    xp = common_adapter(
        [*tokens.items(), *((name, x) for name, x in optional.items() if x is not None)]
    )
    tokens = _batched(xp, tokens)
    shapes = shapes_of(tokens, "nhd")
    for name, x in lengths.items():
        if x is not None:
            shapes.check_integers(xp, name, x, shapes.batch, last=shapes.batch[0])
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal must be True or False; got {is_causal!r}")
    implementation = "auto" if implementation is None else implementation
    choice("implementation", implementation, (*_IMPLEMENTATIONS, *IMPLEMENTATIONS))
    masks: tuple[Any, ...] = () if mask is None else (mask,)
    if local_window_size is not None:
        masks += (_window(local_window_size),)
    if any(x is not None for x in lengths.values()):
        masks += (Lengths(query_seq_lengths, key_value_seq_lengths),)
    found = attention(
        **tokens,
        scale=scale,
        causal=is_causal,
        mask=masks,
        bias=bias,
        query_offset=0,
        layout="nhd",
        implementation=_IMPLEMENTATIONS.get(implementation, implementation),
        return_lse=return_residual,
    )
    out, lse = found if return_residual else (found, None)
    batched = len(query.shape) == 4
    out = out if batched else out[0, ...]
    if lse is None:
        return out
    residual = xp.matrix_transpose(xp.cast(lse, out.dtype))
    return out, residual if batched else residual[0, ...]


def _batched(xp: Any, tokens: dict[str, Array]) -> dict[str, Array]:
    """Return the tokens with four axes; refuse other numbers of axes and differing batches."""

    def told() -> str:  # not before it is needed: the compiler cannot tell lengths that are symbols
        return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tokens.items())

    if any(len(x.shape) not in (3, 4) for x in tokens.values()):
        raise ValueError(
            f"query, key and value must have the axes (B, T, N, H) or (T, N, H); got {told()}"
        )
    tokens = {
        name: xp.expand_dims(x, axis=0) if len(x.shape) == 3 else x for name, x in tokens.items()
    }
    if len({x.shape[0] for x in tokens.values()}) > 1:
        raise ValueError(f"query, key and value must have one batch size B; got {told()}")
    return tokens


def _window(size: Any) -> Window:
    """Return JAX's window as a mask."""
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or any(not isinstance(n, Integral) or isinstance(n, bool) for n in pair):
        raise TypeError(f"local_window_size must be an int or two (left, right); got {size!r}")
    if min(pair) < 0:
        raise ValueError(f"local_window_size must not be negative; got {size!r}")
    return Window(*(None if n >= 2**30 - 1 else int(n) for n in pair))  # no limit for positions
