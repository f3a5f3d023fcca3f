"""Derivatives by name, on every library: those without automatic differentiation too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ._adapters import common_adapter, is_array
from ._attention import bound, run
from ._calculus import Backward, Forward, Tangent, results
from ._callables import ScoreMod
from ._choice import prepared
from ._problem import TANGENT, TOKENS
from ._request import Request
from ._shapes import is_accepted

Array = Any


def attention_vjp(
    query: Array, key: Array, value: Array, **keywords: Any
) -> tuple[Any, Callable[..., dict[str, Array]]]:
    r"""Attention and its vector-Jacobian product: reverse-mode derivatives on every library.

    Parameters
    ----------
    query, key, value : array
        As in `attention`.
    **keywords
        Those of `attention`, with the same meaning.  "auto" is always the tiles, and "native" is
        refused.

    Returns
    -------
    out : array, or tuple of two arrays
        What `attention` returns: ``(out, lse)`` with ``return_lse=True``.  `vjp` computes with
        these arrays: as long as it is called, write to copies of them only.
    vjp : callable(d_out, d_lse=None)
        Takes the gradients of a loss with respect to `out` and `lse`: arrays of their shapes, or
        None for zero.  Returns those with respect to the inputs, as a dict of arrays by name, in
        the inputs' shapes and dtypes: "query", "key", "value" and, where they are given, "bias" and
        "sinks".  It may be called again.

    Raises
    ------
    TypeError, ValueError
        As `attention`; also where `score_mod` is not a `ScoreMod` and the library cannot
        differentiate a function itself, and by `vjp` for arrays that do not fit.
    NotImplementedError
        If `implementation` is "native".

    See Also
    --------
    attention_jvp : Forward mode.

    Notes
    -----
    With weights :math:`P = e^{s - lse}` the gradient of the scores is
    :math:`P \circ (\bar{out}\, v^T - \delta)`,
    :math:`\delta_i = \langle \bar{out}_i, out_i \rangle - \bar{lse}_i` [1]_.  Tiles of `P` are
    computed again from `out` and `lse`, so that memory beside the gradients does not grow with
    ``n_q × n_k``.

    A pair behind a mask adds nothing to any gradient, whatever stands there; a query that sees no
    key has zero gradients.

    References
    ----------
    .. [1] T. Dao et al., "FlashAttention", 2022, appendix B, https://arxiv.org/abs/2205.14135

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention_vjp
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 8))
    >>> out, vjp = attention_vjp(q, k, v, causal=True)
    >>> gradients = vjp(2 * out)  # of the loss Σ out²
    >>> {name: x.shape for name, x in gradients.items()}
    {'query': (100, 8), 'key': (100, 8), 'value': (100, 8)}
    """
    request, progress, return_lse = _request(query, key, value, keywords)
    found = run(request, progress, Forward().with_residuals(request.spec))
    out, lse = found["out"], found["lse"]
    wanted = tuple(name for name in (*TOKENS, "bias", "sinks") if name in request.inputs)

    def vjp(d_out: Array | None, d_lse: Array | None = None) -> dict[str, Array]:
        """Return the gradients with respect to the inputs, by name."""
        bars = {
            name: _like(name, x, primal, request.xp)
            for name, x, primal in (("d_out", d_out, out), ("d_lse", d_lse, lse))
        }
        return request.apply(Backward(wanted), results(found), bars)

    return ((out, lse) if return_lse else out), vjp


def attention_jvp(
    primals: Sequence[Array],
    tangents: Sequence[Array | None],
    *,
    d_bias: Array | None = None,
    d_sinks: Array | None = None,
    **keywords: Any,
) -> tuple[Any, Any]:
    r"""Attention and its Jacobian-vector product: forward-mode derivatives on every library.

    Parameters
    ----------
    primals : tuple of three arrays
        ``(query, key, value)``, as in `attention`.
    tangents : tuple of three arrays
        The directions in which they move: arrays of their shapes and dtypes, or None for zero.
    d_bias, d_sinks : array, optional
        The directions in which `bias` and `sinks` move; default zero.
    **keywords
        Those of `attention` but `memory_limit`, with the same meaning.  "auto" is always the tiles,
        and "native" is refused.

    Returns
    -------
    out : array, or tuple of two arrays
        What `attention` returns: ``(out, lse)`` with ``return_lse=True``.
    d_out : array, or tuple of two arrays
        The derivative of each in that direction, in its shape and dtype.

    Raises
    ------
    TypeError, ValueError
        As `attention`; also for tangents that do not fit, and where `score_mod` is not a `ScoreMod`
        and the library cannot differentiate a function itself.
    NotImplementedError
        If `implementation` is "native".

    See Also
    --------
    attention_vjp : Reverse mode.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention, attention_jvp
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 8))
    >>> out, d_out = attention_jvp((q, k, v), (q, None, None))
    >>> step = 1e-6
    >>> np.allclose((attention((1 + step) * q, k, v) - out) / step, d_out, atol=1e-4)
    True
    """
    for name, x in (("primals", primals), ("tangents", tangents)):
        if not isinstance(x, tuple | list) or len(x) != len(TOKENS):
            raise TypeError(f"{name} must be a tuple of three: query, key and value")
    if keywords.get("memory_limit") is not None:
        raise ValueError(
            "memory_limit does not cover forward mode; give query_chunk_size and key_chunk_size"
        )
    query, key, value = primals
    request, progress, return_lse = _request(query, key, value, keywords)
    moves = dict(zip(TOKENS, tangents, strict=True)) | {"bias": d_bias, "sinks": d_sinks}
    moved = {
        name + TANGENT: _like(f"d_{name}", x, request.inputs.get(name), request.xp, exact=True)
        for name, x in moves.items()
        if x is not None
    }
    found = run(request, progress, Forward().with_residuals(request.spec))
    change = request.apply(Tangent(), results(found), moved)
    if return_lse:
        return (found["out"], found["lse"]), (change["out"], change["lse"])
    return found["out"], change["out"]


def _request(
    query: Array, key: Array, value: Array, keywords: dict[str, Any]
) -> tuple[Request, Any, bool]:
    """Return the request of a call of `attention`, its `progress` and its `return_lse`."""
    given = bound(query, key, value, keywords)
    names = "progress", "return_lse", "memory_limit"
    progress, return_lse, limit = map(given.pop, names)
    if given["implementation"] == "native":
        raise NotImplementedError(
            "implementation='native': attention_vjp and attention_jvp compute by tiles"
        )
    if given["implementation"] == "auto":
        given["implementation"] = "chunked"
    request, _, _ = prepared((query, key, value), given, limit, training=True, return_lse=True)
    score_mod = given["score_mod"]
    if score_mod is not None and not request.xp.autodiff and not isinstance(score_mod, ScoreMod):
        raise TypeError(
            f"score_mod must be a ScoreMod(function, derivative) for derivatives of "
            f"{request.xp.name} arrays, whose library cannot differentiate a function; got "
            f"{score_mod!r:.80}"
        )
    return request, progress, return_lse


def _like(name: str, x: Any, primal: Array, xp: Any, exact: bool = False) -> Array:
    """Return `x`, or zeros for None, checked to have the shape of `primal`.

    Its dtype may be any floating one, unless it has to be `exact`.
    """
    if primal is None:
        raise ValueError(f"{name} is given without {name.removeprefix('d_')}")
    if x is None:
        with xp.on_device_of(primal):
            return xp.zeros_like(primal)
    if not is_array(x):
        raise TypeError(f"{name} must be an array; got {x!r:.80}")
    common_adapter([(name.removeprefix("d_"), primal), (name, x)])
    if not is_accepted(xp, x) or (exact and x.dtype != primal.dtype):
        wanted = primal.dtype if exact else f"one of {', '.join(xp.floats)}"
        raise TypeError(f"{name} must be {wanted}; got {x.dtype}")
    if tuple(x.shape) != tuple(primal.shape):
        raise ValueError(f"{name} must have shape {tuple(primal.shape)}; got {tuple(x.shape)}")
    return xp.cast(x, primal.dtype) if xp.autodiff else x  # which is cast tile by tile
