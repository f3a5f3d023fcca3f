"""Attention by a kernel that adds an array to the scores, for masks and a bias: part by part.

That array is made for some queries at a time and the keys that these see, so that memory does not
grow with ``n_q × n_k``, and keys out of sight take no time.  A part has all keys that its queries
see: there are no summaries to merge.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from math import prod
from operator import and_
from typing import Any

from ._calculus import RESULTS
from ._partition import Parts, runs
from ._plain import FOLDED, Plain, like
from ._problem import Problem, heads_first, to_heads
from ._rows import Rows
from ._sums import Sums, add_part, add_rows
from ._tiles import Tile

Array = Any
Arrays = dict[str, Array]
Names = tuple[str, ...]


def forward(
    xp: Any, parts: Parts, kernel: Any, arrays: dict[str, Any], names: Names, *, blind: bool
) -> Arrays:
    """Return the results of these `names`, as `chunked` does, but for "low".

    Where a query sees nothing, `lse` is the kernel's, which is finite, unless `blind`.
    """
    problem = _unscaled(xp, parts, arrays)
    outputs = dict.fromkeys(names) if parts.at_once else problem.outputs(names)
    asked = tuple(name for name in RESULTS if name in names)
    for tile in _tiles(problem, parts):
        outputs = tile.rows.written(outputs, _results(tile, kernel, arrays["scale"], asked, blind))
    return problem.results(outputs)


def _results(tile: Tile, kernel: Any, scale: float, asked: Names, blind: bool) -> Arrays:
    """Return the results of the queries of one part."""
    rows, xp, call = tile.rows, tile.xp, _call(tile, scale)
    out, lse = kernel.forward(call, asked)
    found = dict.fromkeys(("out", "exact"), _of_rows(rows, out))
    if lse is not None:
        if blind:
            none = xp.new(lse, (), -float("inf"), lse.dtype)
            lse = xp.where(xp.max(call.added, axis=-1) == none, none, lse)
        found["lse"] = _of_rows(rows, lse)
    return found


def backward(xp: Any, parts: Parts, kernel: Any, arrays: dict[str, Any], wanted: Names) -> Arrays:
    """Return the gradients of query, key and value that are `wanted`, from that of `out`.

    `lse` is that of `forward`, where it is not `blind`.
    """
    problem = _unscaled(xp, parts, arrays)
    d_out = heads_first(xp, parts.spec, arrays["d_out"])
    results = (*to_heads(xp, parts.spec, arrays["out"], arrays["lse"]), d_out)
    tiles = _tiles(problem, parts)
    if parts.one:
        sums = _gradients(next(tiles), kernel, arrays["scale"], results)
    else:
        sums = {name: problem.zeros(name) for name in wanted}
        for tile in tiles:  # a part's gradients are gone before the next part's come
            sums = _added_to(sums, tile, _gradients(tile, kernel, arrays["scale"], results))
    return {name: problem.gradient(name, sums[name]) for name in wanted}


def _added_to(sums: Sums, tile: Tile, found: Arrays) -> Sums:
    """Return `sums` with the gradients of one part."""
    sums = add_rows(tile.rows, sums, "query", found["query"])
    for name in ("key", "value"):
        sums = add_part(tile, sums, name, found[name])
    return sums


def _unscaled(xp: Any, parts: Parts, arrays: dict[str, Any]) -> Problem:
    """Return the problem without a scale, which is a kernel's argument."""
    return Problem(xp, parts.spec, arrays | {"scale": None})


def _gradients(tile: Tile, kernel: Any, scale: float, results: tuple[Array, ...]) -> Arrays:
    """Return the gradients of one part, from its `out`, `lse` and the gradient of `out`."""
    rows, xp, call = tile.rows, tile.xp, _call(tile, scale)
    shape = tuple(call.query.shape[:-1])
    out, lse, d_out = (like(xp, rows.read(x), (*shape, x.shape[-1])) for x in results)
    query, key, value = kernel.backward(call, out, lse[..., 0], d_out)
    of_keys = (*(count for _, count in rows.block), tile.size)
    return {
        "query": _of_rows(rows, query),
        "key": like(xp, key, (*of_keys, key.shape[-1])),
        "value": like(xp, value, (*of_keys, value.shape[-1])),
    }


def _tiles(problem: Problem, parts: Parts) -> Iterator[Tile]:
    """Yield the parts."""
    for run in runs(problem, parts):
        rows = Rows(problem, run.block, run.row, run.size)
        yield Tile(rows, run.start, run.stop - run.start, True)


def _added(tile: Tile) -> Array:
    """Return what is added to the scores: the bias, and -inf where a mask forbids the pair."""
    xp, rows = tile.xp, tile.rows
    problem, compute = rows.problem, rows.problem.spec.compute
    masks = list(tile.allowed())
    added = xp.barrier(reduce(and_, masks), compute) if masks else None
    if problem.bias is not None:
        bias = xp.cast(tile.slice(problem.bias), compute)
        added = bias if added is None else added + bias
    if added is None:  # masks that forbid nothing
        added = xp.new(rows.query, (), 0.0, compute)
    return problem.aligned(added)


def _call(tile: Tile, scale: float) -> Plain:
    """Return a part in the terms of kernels.

    Few queries of the heads that share a head of keys are given as queries of one head, so that the
    keys are read once.  A plan goes by `Parts.folded`; here the axes of what is added count, which
    are fewer where a mask forbids nothing.
    """
    rows, xp, added = tile.rows, tile.xp, _added(tile)
    *batch, heads, n = rows.lead
    entries, group = prod(batch), rows.problem.spec.group
    key_heads = heads // group
    *lead, of_heads, q, k = added.shape
    if prod(lead) > 1:
        added = xp.broadcast_to(added, (*batch, of_heads, q, k))
        lead = [entries]
    if group > 1 and (n == 1 or (group * n <= FOLDED and (q == n or of_heads == 1))):
        if of_heads > 1:
            of_heads, q = key_heads, group * n
        elif q > 1:
            added = xp.broadcast_to(added, (*added.shape[:-3], group, n, k))
            q = group * n
        heads, n = key_heads, group * n
    query = like(xp, rows.query, (entries, heads, n, rows.query.shape[-1]))
    key, value = (like(xp, x, (entries, key_heads, *x.shape[-2:])) for x in (tile.key, tile.value))
    return Plain(query, key, value, False, scale, like(xp, added, (prod(lead), of_heads, q, k)))


def _of_rows(rows: Rows, x: Array) -> Array:
    """Return what a kernel found for each query as (…, h, size, width)."""
    return like(rows.xp, x, (*rows.lead, x.shape[-1] if x.ndim == 4 else 1))
