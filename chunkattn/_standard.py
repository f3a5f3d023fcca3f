"""Textbook attention: the whole score matrix, its softmax, one product.  The reference."""

from __future__ import annotations

from typing import Any

from ._chunked import chunked
from ._partial import empty, log_sum, nonzero
from ._scores import gather, scores
from ._spec import Spec
from ._tiles import Problem, Rows, Tile

Array = Any


def standard(xp: Any, spec: Spec, arrays: dict[str, Any]) -> tuple[Array, ...]:
    """Return ``(out, lse)`` by way of all ``n_q × n_k`` scores at once."""
    if spec.n_k == 0 or spec.tasks == 0:
        return chunked(xp, spec, arrays)
    problem = Problem(xp, spec, arrays)
    rows = Rows(problem, (slice(None),) * len(spec.lead), 0, spec.n_q)
    tile = Tile(rows, 0, spec.n_k, masked=bool(problem.masks))
    s = scores(tile)
    lowest = empty(xp, s, rows.lead, 0, spec.compute)[2]
    top = xp.maximum(lowest, xp.max(s, axis=-1, keepdims=True))
    weights = xp.exp(s - top)
    total = xp.sum(weights, axis=-1, keepdims=True, dtype=weights.dtype)
    out = gather(tile, weights / nonzero(xp, total))
    return problem.results((xp.cast(out, spec.dtype), log_sum(xp, total, top)))
