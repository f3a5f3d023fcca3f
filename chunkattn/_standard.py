"""Textbook attention: the whole score matrix, its softmax, one product.  The reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._chunked import chunked
from ._partial import log_sum, nonzero, rounding
from ._problem import Problem
from ._rows import Rows
from ._scores import gather, scores
from ._spec import Spec
from ._tiles import Tile

Array = Any


def standard(
    xp: Any,
    spec: Spec,
    arrays: dict[str, Any],
    names: tuple[str, ...],
    done: Callable[[], None] | None = None,
) -> dict[str, Array]:
    """Return what `chunked` does by way of all ``n_q × n_k`` scores at once."""
    if 0 in (*spec.lead, spec.n_q, spec.n_k):
        return chunked(xp, spec, arrays, names, done)
    problem = Problem(xp, spec, arrays)
    rows = Rows(problem, spec.whole, 0, spec.n_q)
    tile = Tile(rows, 0, spec.n_k, masked=bool(problem.masks))
    s = scores(tile)
    _, total, before = rows.nothing()
    top = xp.maximum(before, xp.max(s, axis=-1, keepdims=True))
    weights = xp.exp(s - top)
    total = total * xp.exp(before - top)
    total += xp.sum(weights, axis=-1, keepdims=True, dtype=weights.dtype)
    divisor = nonzero(xp, total)
    out = gather(tile, weights / divisor, tile.value)
    if done is not None:
        done()
    lse = log_sum(xp, total, top, divisor)
    found = {"out": xp.cast(out, spec.dtype), "lse": lse, "exact": out}
    if "low" in names:
        found["low"] = rounding(xp, (out, total, top), lse)
    return problem.results({name: found[name] for name in names})
