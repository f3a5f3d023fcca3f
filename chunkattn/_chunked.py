"""Chunked attention: a fold over chunks of keys, for each chunk of queries.

Rabe & Staats, "Self-attention Does Not Need O(n²) Memory", https://arxiv.org/abs/2112.05682.  The
paper's listing stacks one summary per chunk of keys; here the merged summary is carried instead,
so that the memory beside inputs and outputs does not depend on the sequence lengths at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ._loops import over_keys, over_queries
from ._partial import Summary, finish
from ._problem import Problem
from ._scores import gather, scores
from ._spec import Spec
from ._tiles import Rows, Tile

Array = Any


def chunked(
    xp: Any,
    spec: Spec,
    arrays: dict[str, Any],
    *,
    exact: bool = False,
    done: Callable[[], None] | None = None,
) -> tuple[Array, ...]:
    """Return ``(out, lse)``, and `out` in the compute dtype too where it is to be `exact`.

    `done` is called after each chunk of queries.
    """
    problem = Problem(xp, spec, arrays)
    outputs: tuple[Array, ...] = problem.outputs()
    if exact:
        outputs += (problem.new_out(spec.compute),)
    return problem.results(*over_queries(problem, _attend_queries, outputs, done))


def _attend_queries(rows: Rows, outputs: tuple[Array, ...]) -> tuple[Array, ...]:
    """Write the results of one chunk of queries into `outputs`."""
    xp = rows.xp
    step = partial(_attend_chunk, rows.workspace())
    out, lse = finish(xp, over_keys(rows, step, rows.nothing()))
    return tuple(
        xp.write(x, xp.cast(y, x.dtype), rows.heads, rows.start)
        for x, y in zip(outputs, (out, lse, out), strict=False)
    )


def _attend_chunk(workspace: Array | None, tile: Tile, summary: Summary) -> Summary:
    """Return the summary with one more chunk of keys in it."""
    acc, total, top = summary
    xp = tile.xp
    s = scores(tile, workspace)
    new = xp.maximum(top, xp.max(s, axis=-1, keepdims=True))
    s -= new
    weights, shrink = xp.exp_(s), xp.exp(top - new)
    total *= shrink
    total += xp.sum(weights, axis=-1, keepdims=True, dtype=weights.dtype)
    acc *= shrink
    acc += gather(tile, weights, tile.value)
    return acc, total, new
