"""Attention by a kernel that adds an array to the scores, for masks and a bias: part by part.

That array is made for some queries at a time and the keys that these see, so that memory does not
grow with ``n_q × n_k``, and keys out of sight take no time.  A part has all keys that its queries
see: there are no summaries to merge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import and_
from typing import Any, NamedTuple

from ._array_masks import axes_of_pairs
from ._calculus import RESULTS
from ._loops import seen
from ._plain import Plain
from ._problem import Problem, heads_first, to_heads, with_arrays
from ._request import Request
from ._spec import Cut, Schedule, Spec, block_within
from ._sums import Sums, add_part, add_rows
from ._tiles import Rows, Span, Tile
from .masks import Dense, Mask, Window

Array = Any
Arrays = dict[str, Array]
Names = tuple[str, ...]

BYTES = 2**24  # of what is added to the scores of a part, and of its keys in the compute dtype
ROWS = 256  # queries whose keys are looked for together
FEW = (2 * ROWS) ** 2  # pairs of a block for which that would take longer than it spares
RUNS, PAIRS = 2048, 8192  # keys of a part up to which it takes less time than tiles
WASTE = 9 / 8  # neighbours are one part where that computes at most so many times their scores


@dataclass(frozen=True)
class Parts:
    """How a call is cut.

    Attributes
    ----------
    spec : Spec
        That of the call with the blocks for a kernel.
    axes : str
        Those of what is added to the scores: batch, heads, queries, keys.
    arrays : int
        How many arrays of pairs that is for a block.
    pairs : int
        The pairs of the largest part.
    keys : int
        How many keys `ROWS` queries see at most, as far as that is known.
    """

    spec: Spec
    axes: str
    arrays: int
    pairs: int
    keys: int


def parts_of(request: Request) -> Parts | None:
    """Return how a call is cut; None where the smallest part would be large."""
    spec, keys = request.spec, request.spec.n_k
    masks = with_arrays(spec.masks, request.data)
    axes = _axes(request, masks)
    for mask in masks:
        if isinstance(mask, Window) and mask.left is not None and mask.right is not None:
            keys = min(keys, mask.left + ROWS + mask.right)
    room = limit = 8 * BYTES // request.xp.finfo(spec.compute).bits  # in numbers
    if spec.dtype != spec.compute:
        room = limit // (2 * spec.n_k * max(request.inputs["query"].shape[-1], spec.d_v))
    one = prod(n for axis, n in (("q", min(spec.n_q, ROWS)), ("k", spec.n_k)) if axis in axes)
    if "h" in axes:
        room = min(room, limit // (spec.group * one))
    elif "b" in axes:
        room = min(room, limit // one * spec.key_heads)
    if not room or one > limit:
        return None
    block = block_within(spec.lead, room)
    arrays = spec.group * prod(block) if "h" in axes else prod(block[:-1]) if "b" in axes else 1
    pairs = limit // arrays if {"q", "k"} <= {*axes} else spec.n_q * spec.n_k
    cut = replace(spec, schedule=Schedule(ROWS, ROWS, block))
    return Parts(cut, axes, arrays, pairs, keys)


def _axes(request: Request, masks: tuple[Mask, ...]) -> str:
    """Return the axes of what is added to the scores."""
    letters = "".join(mask.tile_axes for mask in masks)
    if hasattr(request.data["query_offset"], "shape") and any(mask.aligned for mask in masks):
        letters += "b"
    if "bias" in request.inputs:
        letters += axes_of_pairs(request.inputs["bias"])
    return "".join(axis for axis in "bhqk" if axis in letters)


def beats_tiles(request: Request, parts: Parts) -> bool:
    """Whether parts take less time than tiles, which leave masks out where all keys are seen.

    They do so for more keys where a mask or a bias is an array of pairs: tiles are masked too then.
    """
    pairs = "bias" in request.inputs or any(isinstance(m, Dense) for m in request.spec.masks)
    return parts.keys <= (PAIRS if pairs else RUNS)


def forward(xp: Any, parts: Parts, kernel: Any, arrays: dict[str, Any], names: Names) -> Arrays:
    """Return the results of these `names`, as `chunked` does, but for "low"."""
    problem = Problem(xp, parts.spec, arrays)
    runs = _runs(problem, parts.pairs)
    outputs = problem.outputs(names, one=len(runs) == 1)
    for run in runs:
        outputs = _attend(run.tile(problem), kernel, outputs)
    return problem.results(outputs)


def _attend(tile: Tile, kernel: Any, outputs: Arrays) -> Arrays:
    """Write the results of one part into `outputs`."""
    rows, xp, added = tile.rows, tile.xp, _added(tile)
    out, lse = kernel.forward(_call(tile, added), tuple(x for x in RESULTS if x in outputs))
    results = {"out": _of_rows(rows, out)}
    results["exact"] = results["out"]
    if lse is not None:  # the kernel has no -inf
        lse, none = _of_rows(rows, lse), -float("inf")
        blind = xp.max(added, axis=-1, keepdims=True) == none
        results["lse"] = xp.where(blind, xp.new(lse, (), none, lse.dtype), lse)
    return rows.written(outputs, results)


def backward(xp: Any, parts: Parts, kernel: Any, arrays: dict[str, Any], wanted: Names) -> Arrays:
    """Return the gradients of query, key and value that are `wanted`, from that of `out`."""
    problem = Problem(xp, parts.spec, arrays)
    out, lse = to_heads(xp, parts.spec, arrays["out"], arrays["lse"])
    d_out = heads_first(xp, parts.spec, arrays["d_out"])
    sums = {name: problem.zeros(name) for name in wanted}
    for run in _runs(problem, parts.pairs):
        sums = _differentiate(run.tile(problem), kernel, (out, lse, d_out), sums)
    return {name: problem.gradient(name, x) for name, x in sums.items()}


def _differentiate(tile: Tile, kernel: Any, results: tuple[Array, ...], sums: Sums) -> Sums:
    """Return `sums` with the gradients that one part brings."""
    rows, xp, call = tile.rows, tile.xp, _call(tile, _added(tile))
    out, lse, d_out = map(rows.read, results)
    lse = xp.where(lse == -float("inf"), xp.zeros_like(lse), lse)  # so that exp(-inf - lse) is 0
    shape = tuple(call.query.shape[:-1])
    out, d_out = (xp.reshape(x, (*shape, x.shape[-1])) for x in (out, d_out))
    query, key, value = kernel.backward(call, out, xp.reshape(lse, shape), d_out)
    sums = add_rows(rows, sums, "query", _of_rows(rows, query) * rows.problem.scale)
    return add_part(tile, add_part(tile, sums, "key", key), "value", value)


class _Run(NamedTuple):
    """Queries of a block that make a part: the first, how many, and the keys that they see.

    `pairs` counts the scores of the smallest runs in it.
    """

    block: tuple[Cut, ...]
    row: int
    size: int
    start: int
    stop: int
    pairs: int

    @classmethod
    def of(cls, span: Span) -> _Run:
        """Return the run of one span, with one key at least, which the masks hide."""
        start, stop = seen(span)
        start = min(start, span.n_k - 1)
        stop = max(stop, start + 1)
        return cls(span.block, span.start, span.size, start, stop, span.size * (stop - start))

    @property
    def computed(self) -> int:
        """How many scores the kernel computes."""
        return self.size * (self.stop - self.start)

    def joined(self, other: _Run) -> _Run:
        """Return this run and the next one as one."""
        start, stop = min(self.start, other.start), max(self.stop, other.stop)
        pairs = self.pairs + other.pairs
        return _Run(self.block, self.row, self.size + other.size, start, stop, pairs)

    def tile(self, problem: Problem) -> Tile:
        """Return the part."""
        rows = Rows(problem, self.block, self.row, self.size)
        return Tile(rows, self.start, self.stop - self.start, True)


def _runs(problem: Problem, most: int) -> list[_Run]:
    """Return all runs; neighbours are joined while they have at most so many pairs."""
    spec, found = problem.spec, []
    for block in map(spec.block, range(spec.blocks)):
        if spec.n_q * spec.n_k <= FEW:
            found.append(_Run(block, 0, spec.n_q, 0, spec.n_k, spec.n_q * spec.n_k))
            continue
        for row in range(0, spec.n_q, ROWS):
            run = _Run.of(Span(problem, block, row, min(ROWS, spec.n_q - row)))
            if row:
                joined = found[-1].joined(run)
                if joined.computed <= min(most, WASTE * joined.pairs):
                    found[-1] = joined
                    continue
            found.append(run)
    return found


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


def _call(tile: Tile, added: Array) -> Plain:
    """Return a part in the terms of kernels.

    Where there is one query, those of the heads that share a head of keys are as good as queries of
    one head.
    """
    rows, xp = tile.rows, tile.xp
    *batch, heads, n = rows.lead
    entries, key_heads = prod(batch), heads // rows.problem.spec.group
    if n == 1:
        heads, n = key_heads, heads // key_heads
    *lead, of_heads, q, k = added.shape
    if prod(lead) > 1:
        added = xp.broadcast_to(added, (*batch, of_heads, q, k))
        lead = [entries]
    if q == 1 and of_heads > heads:
        of_heads, q = heads, n
    query = xp.reshape(rows.query, (entries, heads, n, rows.query.shape[-1]))
    key, value = (
        xp.reshape(x, (entries, key_heads, *x.shape[-2:])) for x in (tile.key, tile.value)
    )
    return Plain(query, key, value, False, 1.0, xp.reshape(added, (prod(lead), of_heads, q, k)))


def _of_rows(rows: Rows, x: Array) -> Array:
    """Return what a kernel found for each query as (…, h, size, width)."""
    return rows.xp.reshape(x, (*rows.lead, x.shape[-1] if x.ndim == 4 else 1))
