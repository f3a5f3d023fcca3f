"""Chunked attention: a fold over chunks of keys, for each chunk of queries.

Rabe & Staats, "Self-attention Does Not Need O(n²) Memory", https://arxiv.org/abs/2112.05682.  The
paper's listing stacks one summary per chunk of keys; here the merged summary is carried instead,
so that the memory beside inputs and outputs does not depend on the sequence lengths at all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ._bounded import is_unbounded, may_be_bounded
from ._loops import over_keys, over_queries
from ._partial import Summary, log_sum, nonzero, rounding
from ._problem import Problem
from ._rows import Rows
from ._scores import gather, gather_onto, scores
from ._spec import Spec
from ._tiles import Tile, only_tile

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

    def results(problem: Problem) -> dict[str, Array]:
        return problem.results(over_queries(problem, _attend_queries, problem.outputs(names), done))

    def given(bounded: bool) -> dict[str, Array]:
        return results(Problem(xp, spec, arrays, bounded))

    problem = Problem(xp, spec, arrays)
    if not may_be_bounded(problem, names):
        return results(problem)
    either: dict[str, Array] = xp.when(
        is_unbounded(problem), partial(given, bounded=False), partial(given, bounded=True)
    )
    return either


def _attend_queries(rows: Rows, outputs: dict[str, Array]) -> dict[str, Array]:
    """Write the results of one chunk of queries into `outputs`."""
    xp = rows.xp
    [workspace], only = rows.workspaces(1), only_tile(rows)
    if only is None:
        summary = over_keys(rows, partial(_attend_chunk, workspace), rows.nothing())
    else:
        weights, total, top = _weigh(only, workspace, rows.first_top())
        summary = gather(only, weights, only.value), total, top
    out, total, top = summary
    divisor = nonzero(xp, total)
    out /= divisor
    results = {"out": out, "exact": out}
    if "lse" in outputs:
        results["lse"] = log_sum(xp, total, top, divisor)
    if "low" in outputs:
        results["low"] = rounding(xp, summary, results["lse"])
    return rows.written(outputs, results)


def _attend_chunk(workspace: Array | None, tile: Tile, summary: Summary) -> Summary:
    """Return the summary with one more chunk of keys in it."""
    xp, (acc, total, top) = tile.xp, summary
    weights, more, new = _weigh(tile, workspace, top)
    if new is not top:
        shrink = xp.exp(top - new)
        total *= shrink
        acc *= shrink
    total += more
    return gather_onto(tile, acc, weights, tile.value), total, new


def _weigh(tile: Tile, workspace: Array | None, top: Array) -> Summary:
    """Return the weights of a tile, their sums, and the maximum that they are relative to."""
    xp, s = tile.xp, scores(tile, workspace)
    if not tile.rows.problem.bounded:
        weighed: Summary = xp.weigh(s, top)
        return weighed
    weights = xp.exp(s)
    return weights, xp.sum(weights, axis=-1, keepdims=True, dtype=s.dtype), top
