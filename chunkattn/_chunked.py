"""Chunked attention: a fold over chunks of keys, for each chunk of queries.

Rabe & Staats, "Self-attention Does Not Need O(n²) Memory", https://arxiv.org/abs/2112.05682.  The
paper's listing stacks one summary per chunk of keys; here the merged summary is carried instead,
so that the memory beside inputs and outputs does not depend on the sequence lengths at all.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from ._partial import Summary, finish
from ._scores import gather, scores
from ._spec import Spec
from ._tiles import Problem, Rows, Tile

Array = Any
Index = Any  # an int, or a traced integer


def chunked(xp: Any, spec: Spec, arrays: dict[str, Any]) -> tuple[Array, ...]:
    """Return ``(out, lse)``, or the summary ``(acc, total, top)`` where the call is partial."""
    problem = Problem(xp, spec, arrays)
    outputs = problem.outputs()
    for size, first, count in xp.query_pieces(spec.n_q, spec.schedule.query_chunk):
        task = partial(_attend_queries, problem, size, first, count)
        outputs = xp.each(task, outputs, spec.blocks * count, spec.done)
    return problem.results(outputs)


def _attend_queries(
    problem: Problem, size: int, first: int, count: int, outputs: tuple[Array, ...], task: Index
) -> tuple[Array, ...]:
    """Write the results of one chunk of queries of one block into `outputs`."""
    xp, spec = problem.xp, problem.spec
    block, number = (0, task) if spec.blocks == 1 else divmod(task, count)
    start = xp.smaller(first + number * size, spec.n_q - size)
    rows = Rows(problem, spec.block(block), start, size)
    summary = _attend_keys(rows)
    results = summary if spec.partial else finish(xp, summary)
    return tuple(
        xp.write(x, xp.cast(y, x.dtype), rows.heads, rows.start)
        for x, y in zip(outputs, results, strict=True)
    )


def _attend_keys(rows: Rows) -> Summary:
    """Fold over the chunks of keys that these queries see."""
    xp, spec = rows.xp, rows.problem.spec
    summary = rows.nothing()
    workspace = xp.workspace(summary[0], prod(rows.lead) * spec.schedule.key_chunk, spec.compute)

    def step(masked: bool, size: int, first: int, summary: Summary, number: Index) -> Summary:
        tile = Tile(rows, first + number * size, size, masked)
        return _attend_chunk(tile, summary, workspace)

    for size, first, count in xp.pieces(spec.n_k, spec.schedule.key_chunk):
        for start, stop, masked in rows.spans(size, first, count):
            summary = xp.fold(partial(step, masked, size, first), summary, start, stop)
    return summary


def _attend_chunk(tile: Tile, summary: Summary, workspace: Array | None) -> Summary:
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
    acc += gather(tile, weights)
    return acc, total, new
