"""Attention by a kernel that adds an array to the scores, for masks and a bias: part by part.

That array is made for some queries at a time and the keys that these see, so that memory does not
grow with ``n_q × n_k``, and keys out of sight take no time.  A part has all keys that its queries
see: there are no summaries to merge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import and_
from typing import Any, NamedTuple

from ._array_masks import axes_of_pairs
from ._calculus import RESULTS
from ._loops import seen
from ._plain import Plain, like
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
SHORT = 64  # queries of all heads that share a head of keys, up to which they are one head's
FEW = 2**20  # scores for which that would take longer than it spares
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
    folded : int
        How many heads a head has the queries of.
    copies : int
        How often what is added is copied for that.
    pairs : int
        The pairs of the largest part.
    keys : int
        How many keys `ROWS` queries see at most, as far as that is known.
    one : bool
        Whether it is known that there is one part.
    """

    spec: Spec
    axes: str
    arrays: int
    folded: int
    copies: int
    pairs: int
    keys: int
    one: bool


def parts_of(request: Request) -> Parts | None:
    """Return how a call is cut; None where the smallest part would be large."""
    spec, keys = request.spec, request.spec.n_k
    masks = with_arrays(spec.masks, request.data)
    axes = _axes(request, masks)
    whole = spec.n_q * keys
    few = _are_few(spec)
    height = spec.n_q if few else min(spec.n_q, ROWS)
    for mask in masks:
        if isinstance(mask, Window) and mask.left is not None and mask.right is not None:
            keys = min(keys, mask.left + height + mask.right)
    by_key = "h" in axes and "q" not in axes
    folds = spec.n_q == 1 or (spec.group * spec.n_q <= SHORT and not by_key)
    folded = spec.group if folds else 1
    copies = folded if folded > 1 and spec.n_q > 1 and "q" in axes and "h" not in axes else 0
    room = limit = 8 * BYTES // request.xp.finfo(spec.compute).bits  # in numbers
    if spec.dtype != spec.compute:
        room = limit // (2 * spec.n_k * max(request.inputs["query"].shape[-1], spec.d_v))
    least = prod(n for axis, n in (("q", height), ("k", spec.n_k)) if axis in axes)
    least *= 1 + copies
    if "h" in axes:
        room = min(room, limit // (spec.group * least))
    elif "b" in axes:
        room = min(room, limit // least * spec.key_heads)
    if not room or least > limit:
        return None
    block = block_within(spec.lead, room)
    arrays = spec.group * prod(block) if "h" in axes else prod(block[:-1]) if "b" in axes else 1
    pairs = limit // (arrays * (1 + copies)) if {"q", "k"} <= {*axes} else whole
    cut = replace(spec, schedule=Schedule(height, ROWS, block))
    one = few and spec.n_k <= 2 * ROWS if masks else whole <= pairs
    return Parts(cut, axes, arrays, folded, copies, pairs, keys, one and cut.blocks == 1)


def _are_few(spec: Spec) -> bool:
    """Whether so few scores are computed that masks are not asked which keys they show.

    Kernels take as long for one query as for some.
    """
    return prod(spec.batch) * spec.heads * max(spec.n_q, 16) * spec.n_k <= FEW


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

    They do so for few queries, of which tiles make little; and for more keys where a mask or a bias
    is an array of pairs: tiles are masked too then.
    """
    spec = request.spec
    pairs = "bias" in request.inputs or any(isinstance(m, Dense) for m in spec.masks)
    return spec.group * spec.n_q <= SHORT // 2 or parts.keys <= (PAIRS if pairs else RUNS)


def forward(
    xp: Any, parts: Parts, kernel: Any, arrays: dict[str, Any], names: Names, *, blind: bool
) -> Arrays:
    """Return the results of these `names`, as `chunked` does, but for "low".

    Where a query sees nothing, `lse` is the kernel's, which is finite, unless `blind`.
    """
    problem = _unscaled(xp, parts, arrays)
    outputs = problem.outputs(names, one=parts.one)
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
    def of(cls, span: Span, masks: tuple[Mask, ...]) -> _Run:
        """Return the run of one span, with one key at least, which the `masks` hide."""
        start, stop = seen(span, masks)
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


def _tiles(problem: Problem, parts: Parts) -> Iterator[Tile]:
    """Yield the parts."""
    for run in _runs(problem, parts):
        rows = Rows(problem, run.block, run.row, run.size)
        yield Tile(rows, run.start, run.stop - run.start, True)


def _runs(problem: Problem, parts: Parts) -> list[_Run]:
    """Return all runs; neighbours are joined where that wastes little, and is not too much."""
    spec, masks = problem.spec, problem.masks
    found: list[_Run] = []
    if parts.one:
        masks = ()
    elif _are_few(spec):
        masks = tuple(mask for mask in masks if mask.positional)
    height = spec.n_q if parts.one else spec.schedule.query_chunk
    for block in map(spec.block, range(spec.blocks)):
        for row in range(0, spec.n_q, height):
            run = _Run.of(Span(problem, block, row, min(height, spec.n_q - row)), masks)
            if row:
                joined = found[-1].joined(run)
                if joined.computed <= min(parts.pairs, WASTE * joined.pairs):
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


def _call(tile: Tile, scale: float) -> Plain:
    """Return a part in the terms of kernels.

    Few queries of the heads that share a head of keys are given as queries of one head, so that the
    keys are read once.
    """
    rows, xp, added = tile.rows, tile.xp, _added(tile)
    *batch, heads, n = rows.lead
    entries, group = prod(batch), rows.problem.spec.group
    key_heads = heads // group
    *lead, of_heads, q, k = added.shape
    if prod(lead) > 1:
        added = xp.broadcast_to(added, (*batch, of_heads, q, k))
        lead = [entries]
    if group > 1 and (n == 1 or (group * n <= SHORT and (q == n or of_heads == 1))):
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
