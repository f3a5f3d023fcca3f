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
from ._partial import Summary, finish, rounding
from ._problem import Problem
from ._scores import gather, scores
from ._spec import Spec
from ._tiles import Rows, Tile

Array = Any


def chunked(
    xp: Any,
    spec: Spec,
    arrays: dict[str, Any],
    names: tuple[str, ...],
    done: Callable[[], None] | None = None,
) -> dict[str, Array]:
    """Return the results of these `names` (see `Problem.outputs`).

    `done` is called after each chunk of queries.
    """
    problem = Problem(xp, spec, arrays)
    return problem.results(over_queries(problem, _attend_queries, problem.outputs(names), done))


def _attend_queries(rows: Rows, outputs: dict[str, Array]) -> dict[str, Array]:
    """Write the results of one chunk of queries into `outputs`."""
    xp = rows.xp
    step = partial(_attend_chunk, rows.workspace())
    summary = over_keys(rows, step, rows.nothing())
    out, lse = finish(xp, summary)
    results = {"out": out, "lse": lse, "exact": out}
    if "low" in outputs:
        results["low"] = rounding(xp, summary, lse)
    return rows.written(outputs, results)


def _attend_chunk(workspace: Array | None, tile: Tile, summary: Summary) -> Summary:
    """Return the summary with one more chunk of keys in it."""
    acc, total, top = summary
    xp = tile.xp
    s = scores(tile, workspace)
    new = xp.maximum(top, xp.max(s, axis=-1, keepdims=True))
    weights, shrink = xp.exp_difference(s, new), xp.exp(top - new)
    total *= shrink
    total += xp.sum(weights, axis=-1, keepdims=True, dtype=weights.dtype)
    acc *= shrink
    acc += gather(tile, weights, tile.value)
    return acc, total, new
