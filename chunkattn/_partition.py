"""How a call is cut into parts for a kernel that adds an array to the scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from ._array_masks import axes_of_pairs
from ._loops import seen
from ._mask import with_arrays
from ._plain import FOLDED
from ._problem import Problem
from ._request import Request
from ._rows import Span
from ._spec import Cut, Schedule, Spec, block_within
from .masks import Dense, Mask, Window

BYTES = 2**24  # of what is added to the scores of a part, and of its keys in the compute dtype
ROWS = 256  # queries whose keys are looked for together
FEW = 2**20  # scores for which that would take longer than it spares
RUNS, PAIRS = 2048, 8192  # keys of a part up to which it takes less time than tiles
SHORT = 32  # queries, counted likewise, up to which it does so for any number of keys
WASTE = 9 / 8  # neighbours are one part where that computes at most so many times their scores


@dataclass(frozen=True)
class Parts:
    """How a call is cut.

    Attributes
    ----------
    spec : Spec
        That of the call with the blocks for a kernel, and the queries that are looked for together.
    axes : str
        Those of what is added to the scores: batch, heads, queries, keys.
    arrays : int
        How many arrays of pairs that is for a block.
    folded : int
        How many heads a head has the queries of.
    copies : int
        How often what is added is copied for that.
    keys : int
        How many keys are seen by queries that are looked for together, as far as is known.
    rows : int
        How many queries a part has at most.
    one : bool
        Whether it is known that there is one part, with all keys.
    """

    spec: Spec
    axes: str
    arrays: int
    folded: int
    copies: int
    keys: int
    rows: int
    one: bool

    @property
    def at_once(self) -> bool:
        """Whether one part has all queries, though perhaps not all keys."""
        return self.spec.blocks == 1 and self.spec.schedule.query_chunk == self.spec.n_q


def parts_of(request: Request) -> Parts | None:
    """Return how a call is cut; None where the smallest part would be large."""
    spec = request.spec
    by_batch = bool(getattr(request.data["query_offset"], "shape", ()))
    masks = with_arrays(spec.masks, request.data)
    axes = _axes(request, masks, by_batch)
    few = _are_few(spec)
    asked = not few or spec.n_k > 2 * ROWS  # whether any mask is, which keys it shows
    height = spec.n_q if few else min(spec.n_q, ROWS)
    keys = _most_keys(masks, height, spec.n_k) if asked else spec.n_k
    folded, copies = _folded(spec, axes)
    limit = 8 * BYTES // request.xp.finfo(spec.compute).bits  # in numbers
    apart = by_batch or (bool(masks) and spec.heads * spec.n_q * spec.n_k > FEW)
    block = _block(request, axes, height * (1 + copies), limit, apart)
    if block is None:
        return None
    arrays = (prod(block[:-1]) if "b" in axes else 1) * (
        block[-1] * spec.group if "h" in axes else 1
    )
    whole = spec.n_q * spec.n_k
    pairs = limit // (arrays * (1 + copies)) if {"q", "k"} <= {*axes} else whole
    rows = max(height, pairs // spec.n_k)
    if keys < spec.n_k:  # so many are joined, with the keys of the last ones beside the first's
        joined = height * (1 + int((WASTE - 1) * keys) // height)
        rows = min(joined, max(height, pairs // min(spec.n_k, int(WASTE * keys))))
    one = block == spec.lead and (whole <= pairs if not masks else not asked)
    cut = replace(spec, schedule=Schedule(spec.n_q if one else height, ROWS, block))
    return Parts(cut, axes, arrays, folded, copies, keys, min(rows, spec.n_q), one)


def _block(
    request: Request, axes: str, rows: int, limit: int, apart: bool
) -> tuple[int, ...] | None:
    """Return how many entries and heads of keys `limit` numbers allow; None where not one.

    What is added takes `rows` for each, with copies, at least.
    Entries that are `apart`, as they may see other keys, are alone.
    """
    spec = request.spec
    room = limit
    if spec.dtype != spec.compute:
        room //= 2 * spec.n_k * max(request.inputs["query"].shape[-1], spec.d_v)
    least = prod(n for axis, n in (("q", rows), ("k", spec.n_k)) if axis in axes)
    if "h" in axes:
        room = min(room, limit // (spec.group * least))
    elif "b" in axes:
        room = min(room, limit // least * spec.key_heads)
    if not room or least > limit:
        return None
    *batch, heads = block_within(spec.lead, room)
    if apart and "b" in axes:
        batch = [1] * len(batch)
    return *batch, heads


def _are_few(spec: Spec) -> bool:
    """Whether so few scores are computed that no array is asked which keys it shows.

    To read the keys of a head takes as long as some queries.
    """
    rows = spec.heads * spec.n_q + 10 * spec.key_heads
    return prod(spec.batch) * rows * spec.n_k <= FEW


def _axes(request: Request, masks: tuple[Mask, ...], by_batch: bool) -> str:
    """Return the axes of what is added to the scores."""
    letters = "".join(mask.tile_axes for mask in masks)
    if by_batch and any(mask.aligned for mask in masks):
        letters += "b"
    if "bias" in request.inputs:
        letters += axes_of_pairs(request.inputs["bias"])
    return "".join(axis for axis in "bhqk" if axis in letters)


def _most_keys(masks: tuple[Mask, ...], height: int, n_k: int) -> int:
    """Return how many keys so many queries see at most, as far as that is known."""
    for mask in masks:
        if isinstance(mask, Window) and mask.left is not None and mask.right is not None:
            n_k = min(n_k, mask.left + height + mask.right)
    return n_k


def _folded(spec: Spec, axes: str) -> tuple[int, int]:
    """Return of how many heads the queries are one head's, and how often that copies what is added.

    So keys are read once for these heads.  Not where what is added would be copied for each query.
    """
    by_key = "h" in axes and "q" not in axes
    if spec.n_q > 1 and (spec.group * spec.n_q > FOLDED or by_key):
        return 1, 0
    copied = spec.group > 1 and spec.n_q > 1 and "q" in axes and "h" not in axes
    return spec.group, spec.group if copied else 0


def beats_tiles(request: Request, parts: Parts) -> bool:
    """Whether parts take less time than tiles, which leave masks out where all keys are seen.

    They do so for few queries, of which tiles make little; and for more keys where a mask or a bias
    is an array of pairs: tiles are masked too then.
    """
    spec = request.spec
    pairs = "bias" in request.inputs or any(isinstance(m, Dense) for m in spec.masks)
    return spec.group * spec.n_q <= SHORT or parts.keys <= (PAIRS if pairs else RUNS)


class Run(NamedTuple):
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
    def of(cls, span: Span, masks: tuple[Mask, ...]) -> Run:
        """Return the run of one span, with one key at least, which the `masks` hide."""
        start, stop = seen(span, masks)
        start = min(start, span.n_k - 1)
        stop = max(stop, start + 1)
        return cls(span.block, span.start, span.size, start, stop, span.size * (stop - start))

    @property
    def computed(self) -> int:
        """How many scores the kernel computes."""
        return self.size * (self.stop - self.start)

    def joined(self, other: Run) -> Run:
        """Return this run and the next one as one."""
        start, stop = min(self.start, other.start), max(self.stop, other.stop)
        pairs = self.pairs + other.pairs
        return Run(self.block, self.row, self.size + other.size, start, stop, pairs)


def runs(problem: Problem, parts: Parts) -> list[Run]:
    """Return all runs; neighbours are joined where that wastes little, up to a part's rows."""
    spec, masks = problem.spec, problem.masks
    found: list[Run] = []
    if parts.one:
        masks = ()
    elif _are_few(spec):
        masks = tuple(mask for mask in masks if mask.positional)
    height = spec.schedule.query_chunk
    for block in map(spec.block, range(spec.blocks)):
        for row in range(0, spec.n_q, height):
            run = Run.of(Span(problem, block, row, min(height, spec.n_q - row)), masks)
            if row:
                joined = found[-1].joined(run)
                if joined.size <= parts.rows and joined.computed <= WASTE * joined.pairs:
                    found[-1] = joined
                    continue
            found.append(run)
    return found
