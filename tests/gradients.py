"""Derivatives of attention on each library, by this library's tiles and by the textbook.

A *way* is "chunked" or "textbook"; a *mode* is one of `MODES`:

- "reverse": ``(out, gradients)`` of ``<d_out, out>``
- "forward": ``(out, its tangent)`` in the direction of the moves
- "second": the gradients of ``<moves, gradients>``, which are the tangents of the gradients

NumPy and array-api-strict have no second order of their own; their textbook is written out, and
also serves as the reference in wider arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from array_api_compat import array_namespace, device

from chunkattn import attention, attention_jvp, attention_vjp

MODES = ("reverse", "forward", "second")
NAMES = ("query", "key", "value", "bias")


class Point(NamedTuple):
    """Where and in what direction to differentiate: query, key, value and perhaps bias."""

    inputs: tuple
    moves: tuple
    d_out: object


def modes(lib):
    """Return the modes that a library has."""
    return MODES if lib.name.startswith(("torch", "jax")) else MODES[:2]


def derivative(lib, way, mode, **kwargs):
    """Return a function of a `Point` that computes one derivative, as a dict of arrays by name.

    `way` is "textbook" or an `implementation` of `attention`.  The keyword `causal` serves all
    ways, other keywords those of `attention` alone.
    """
    library = next((name for name in BY_LIBRARY if lib.name.startswith(name)), None)
    if library is None:
        own = {"chunked": _by_name, "textbook": by_hand}[way]
        return partial(own, mode, **kwargs)
    function = textbook if way == "textbook" else partial(_attention, implementation=way)
    return partial(BY_LIBRARY[library], partial(function, **kwargs), mode)


def _attention(query, key, value, bias=None, **kwargs):
    return attention(query, key, value, bias=bias, **kwargs)


def _named(xs):
    return dict(zip(NAMES, xs, strict=False))


def _by_name(mode, point, **kwargs):
    tokens, bias = point.inputs[:3], dict(zip(("bias",), point.inputs[3:], strict=False))
    if mode == "reverse":
        out, vjp = attention_vjp(*tokens, **bias, **kwargs)
        return {"out": out, **vjp(point.d_out)}
    d_bias = dict(zip(("d_bias",), point.moves[3:], strict=False))
    out, moved = attention_jvp(tokens, point.moves[:3], **bias, **d_bias, **kwargs)
    return {"out": out, "tangent": moved}


def _torch(function, mode, point):
    import torch

    if mode == "forward":
        out, moved = torch.func.jvp(function, point.inputs, point.moves)
        return {"out": out, "tangent": moved}
    inputs = [x.detach().requires_grad_() for x in point.inputs]
    out = function(*inputs)
    if mode == "reverse":
        return {"out": out.detach(), **_named(torch.autograd.grad(out, inputs, point.d_out))}
    gradients = torch.autograd.grad(out, inputs, point.d_out, create_graph=True)
    del out
    return _named(torch.autograd.grad(gradients, inputs, point.moves))


def _jax(function, mode, point):
    import jax

    if mode == "forward":
        out, moved = jax.jvp(function, point.inputs, point.moves)
        return {"out": out, "tangent": moved}

    def gradients(*inputs):
        out, vjp = jax.vjp(function, *inputs)
        return vjp(point.d_out), out

    if mode == "reverse":
        found, out = gradients(*point.inputs)
        return {"out": out, **_named(found)}
    _, vjp, _ = jax.vjp(gradients, *point.inputs, has_aux=True)
    return _named(vjp(point.moves))


BY_LIBRARY = {"torch": _torch, "jax": _jax}


# The textbook


def compute_dtype(xp, dtype):
    """Return the dtype that inputs of `dtype` are computed in: float32, or theirs if wider."""
    narrow = str(dtype).rpartition(".")[2] in ("float16", "bfloat16", "float32")
    return xp.float32 if narrow else dtype


def softmax_of_scores(query, key, bias=None, *, causal=False):
    """Return the softmax of ``query @ keyᵀ / √d + bias``."""
    xp = array_namespace(query)
    scores = query @ xp.matrix_transpose(key) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if causal:
        q_idx, kv_idx = (xp.arange(x.shape[-2], device=device(x)) for x in (query, key))
        scores = xp.where(q_idx[:, None] >= kv_idx, scores, xp.full_like(scores, -float("inf")))
    if (softmax := _fused(scores)) is not None:
        return softmax
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True, dtype=weights.dtype)


def _fused(scores):
    """Return the softmax by the library's own function where it has one."""
    module = type(scores).__module__.partition(".")[0]
    if module == "torch":
        return scores.softmax(dim=-1)
    if module.startswith("jax"):
        import jax

        return jax.nn.softmax(scores, axis=-1)
    return None


def textbook(query, key, value, bias=None, *, causal=False):
    """Return textbook attention, computed in float32 for half precision."""
    xp, dtype = array_namespace(query), query.dtype
    wide = compute_dtype(xp, dtype)
    query, key, value = (xp.astype(x, wide, copy=False) for x in (query, key, value))
    return xp.astype(softmax_of_scores(query, key, bias, causal=causal) @ value, dtype, copy=False)


def by_hand(mode, point, *, causal=False):
    """Return the derivatives of textbook attention by their formulas.

    With weights P of the scores S, a dot for a tangent and a bar for a gradient:
    ``P' = P ∘ (S' - Σ P S')`` and ``S̄ = P ∘ (P̄ - Σ P P̄)``.
    """
    xp, dtype = array_namespace(*point.inputs), point.inputs[0].dtype
    wide = compute_dtype(xp, dtype)
    inputs, moves = (
        [xp.astype(x, wide, copy=False) for x in xs] for xs in (point.inputs, point.moves)
    )
    (query, key, value), scale = inputs[:3], inputs[0].shape[-1] ** -0.5
    d_out, swap = xp.astype(point.d_out, wide, copy=False), xp.matrix_transpose
    weights = softmax_of_scores(*inputs[:2], *inputs[3:], causal=causal)

    def mean(x):
        return xp.sum(x, axis=-1, keepdims=True, dtype=x.dtype)

    def pulled(x):  # S̄ of P̄ = x
        return weights * (x - mean(weights * x))

    def rounded(**found):
        return {name: xp.astype(x, dtype, copy=False) for name, x in found.items()}

    def with_bias(found, scores):
        sums = (_summed_to(scores, bias) for bias in point.inputs[3:])
        return found | dict(zip(("bias",), sums, strict=False))

    if mode == "reverse":
        scores = pulled(d_out @ swap(value))
        found = rounded(
            out=weights @ value,
            query=scores @ key * scale,
            key=swap(scores) @ query * scale,
            value=swap(weights) @ d_out,
        )
        return with_bias(found, scores)
    d_query, d_key, d_value = moves[:3]
    moved = (d_query @ swap(key) + query @ swap(d_key)) * scale
    for d_bias in moves[3:]:
        moved = moved + d_bias
    moved = pulled(moved)  # P': the Jacobian of softmax is symmetric
    if mode == "forward":
        return rounded(out=weights @ value, tangent=moved @ value + weights @ d_value)
    bar, bar_moved = d_out @ swap(value), d_out @ swap(d_value)
    scores = pulled(bar)
    scores_moved = moved * (bar - mean(weights * bar)) + weights * (
        bar_moved - mean(moved * bar + weights * bar_moved)
    )
    found = rounded(
        query=(scores_moved @ key + scores @ d_key) * scale,
        key=(swap(scores_moved) @ query + swap(scores) @ d_query) * scale,
        value=swap(moved) @ d_out,
    )
    return with_bias(found, scores_moved)


def _summed_to(x, like):
    """Return `x` summed over the axes along which `like` broadcasts, in the dtype of `like`."""
    xp = array_namespace(x)
    x = xp.sum(x, axis=tuple(range(x.ndim - like.ndim)), dtype=x.dtype)
    axes = tuple(i for i, n in enumerate(like.shape) if n == 1)
    return xp.astype(xp.sum(x, axis=axes, keepdims=True, dtype=x.dtype), like.dtype)
