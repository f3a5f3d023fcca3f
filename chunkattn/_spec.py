"""What a call asks for, apart from its data: hashable, so that a compilation can be kept for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import product
from math import prod
from typing import Any, NamedTuple

from ._cached import cached_property
from ._callables import Lifted
from ._shapes import Shapes
from .masks import Mask, Predicate

Array = Any
TileShape = tuple[tuple[int, ...], int, int]  # batch entries by axis and heads, rows, columns
Cut = tuple[Any, int]  # of an axis: its first entry, which may be traced, and how many


SMALLEST = 16  # queries or keys of a tile, where memory is limited
LEAST = 128  # queries of a chunk, where that is made smaller to give each thread one
SHARED = 2**14  # scores of a head of keys, from which several cores gain in its products


@dataclass(frozen=True)
class Schedule:
    """How the work is cut: into tiles of queries and keys, and blocks of batch entries and heads.

    `block` counts the batch entries and key heads that one task takes, axis by axis.  The backward
    pass, which has two tiles at a time, may be cut otherwise; None: it is not.
    """

    query_chunk: int
    key_chunk: int
    block: tuple[int, ...]
    backward: Schedule | None = None
    limited: bool = False  # whether the caller limits the memory

    def of_heads(self) -> Schedule:
        """Return that of a call without batch axes, for one whose batch axes have length 1."""
        backward = None if self.backward is None else self.backward.of_heads()
        return replace(self, block=self.block[-1:], backward=backward)

    def tiles(self, xp: Any, shapes: Shapes) -> list[TileShape]:
        """Return the shapes of a call's tiles, each once, where all blocks are equal."""
        *batch, heads = self.block
        rows = [size for size, _, _ in xp.query_pieces(shapes.n_q, self.query_chunk)]
        cols = [size for size, _, _ in xp.pieces(shapes.n_k, self.key_chunk)]
        found = list(product([(*batch, heads * shapes.group)], rows, cols))
        if self.backward is not None:
            found += self.backward.tiles(xp, shapes)
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Spec(Shapes):
    """The static part of a call; the arrays travel beside it in a dict by argument name."""

    layout: str
    dtype: Any
    compute: Any
    softcap: float | None
    score_mod: Lifted | None
    dropout: float
    masks: tuple[Mask, ...]  # without their arrays
    schedule: Schedule
    standard: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        return self._hash  # asked for by every call

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """The functions of the caller that run inside, as the library lifts them."""
        mods = () if self.score_mod is None else (self.score_mod.function,)
        return (*mods, *(m.mask_mod for m in self.masks if isinstance(m, Predicate)))

    @property
    def calls_back(self) -> bool:
        """Whether there are any, which may hold anything."""
        return bool(self.functions)

    @property
    def backward(self) -> Spec:
        """That of the backward pass."""
        return replace(self, schedule=self.schedule.backward or self.schedule)

    @cached_property
    def blocks(self) -> int:
        """How many blocks there are."""
        return prod(-(-n // size) for n, size in zip(self.lead, self.schedule.block, strict=True))

    @property
    def tasks(self) -> int:
        """How many tasks: blocks times query chunks."""
        if self.standard:
            return 1
        return self.blocks * -(-self.n_q // self.schedule.query_chunk)

    @property
    def one_tile(self) -> bool:
        """Whether a chunk of queries has all keys in one tile, which no mask spares.

        A mask may spare it where there are several chunks.
        """
        chunks = self.schedule
        alone = 0 < self.n_k <= chunks.key_chunk
        return alone and (not self.masks or self.n_q <= chunks.query_chunk)

    @property
    def whole(self) -> tuple[Cut, ...]:
        """The cuts of all batch entries and key heads."""
        return tuple((0, n) for n in self.lead)

    def block(self, number: Any) -> tuple[Cut, ...]:
        """Return the cuts of block `number`, which may be traced where blocks are equal."""
        if self.blocks == 1:
            return self.whole
        cuts = []
        for n, size in zip(reversed(self.lead), reversed(self.schedule.block), strict=True):
            number, place = divmod(number, -(-n // size))
            start = place * size
            cuts.append((start, size if n % size == 0 else min(size, n - start)))
        return tuple(reversed(cuts))


class Asked(NamedTuple):
    """What a call says of its tiles."""

    query_chunk: int | None = None
    key_chunk: int | None = None
    most: int | None = None  # scores of a tile, where chunks of `SMALLEST` allow it
    training: bool = False  # whether gradients follow

    @property
    def chunks_given(self) -> bool:
        """Whether the caller gives any chunk size."""
        return bool(self.query_chunk or self.key_chunk)


def schedule(
    xp: Any,
    query: Array,
    shapes: Shapes,
    asked: Asked,
    masks: tuple[Mask, ...],
    score_mod: Callable[..., Any] | None,
) -> Schedule:
    """Choose the chunks: those asked for, else the library's, shrunk until a tile fits its budget.

    A mask may ask for smaller tiles, so that less is computed outside of what it shows.  Functions
    of the caller make arrays of the size of a tile themselves, so that it is smaller with them.

    Few queries have more keys to a tile, or few keys more queries.  The query heads that share a
    head of keys are in one tile, which has as many fewer queries of each.

    Where a library's tiles span the whole batch, their size counts every batch entry.
    """
    limits = [limit for mask in masks if (limit := mask.tile_limit) is not None]
    others = [512] if score_mod is not None else []
    sizes, backward = xp.tile_sizes(query), xp.tile_sizes(query, backward=True)
    if asked.training:
        sizes, backward = sizes._replace(alone=0), backward._replace(alone=0)
    found = _schedule(sizes, shapes, asked, limits, others)
    limited = asked.most is not None
    if backward == sizes:
        return replace(found, limited=limited)
    of_backward = _schedule(backward, shapes, asked, limits, others)
    return replace(found, backward=of_backward, limited=limited)


def _schedule(
    sizes: Any, shapes: Shapes, asked: Asked, limits: list[int], others: list[int]
) -> Schedule:
    """Choose for one pass, by a library's `sizes`; the `limits` are of masks, and `others`."""
    limits = _of_masks(sizes, shapes, limits) + others
    rows, cols = _tile(sizes, shapes, limits)
    rows = max(1, min(shapes.n_q, asked.query_chunk or rows))
    cols = max(1, min(shapes.n_k, asked.key_chunk or cols))
    elements, lead = asked.most or sizes.elements, shapes.lead
    if not (limits or asked.most or asked.chunks_given):
        of_head = shapes.group * shapes.n_q * shapes.n_k
        if of_head >= SHARED and prod(lead) * of_head <= sizes.alone:
            elements = sizes.alone
    budget = elements // shapes.group
    whole = sizes.batch == "whole"
    if whole or asked.most:
        rows, cols = _shrunk(rows, cols, prod(lead) if whole else 1, budget, asked)
    # With a mask it counts more that tiles lie along the diagonal, unless one is traced for all.
    if not limits or sizes.batch != "parts":
        if asked.query_chunk is None:
            rows = _evened(shapes.n_q, rows)
        if asked.key_chunk is None and (limits or cols > sizes.cols):
            cols = _evened(shapes.n_k, cols)
    if whole:
        return Schedule(rows, cols, tuple(max(1, n) for n in lead))
    room = max(1, budget // (rows * cols))
    block = block_within(lead, room, sizes.batch == "even")
    if asked.query_chunk is None and not limits and elements != sizes.alone:
        blocks = prod(-(-n // size) for n, size in zip(lead, block, strict=True))
        rows = _balanced(shapes.n_q, rows, blocks, sizes.threads)
    return Schedule(rows, cols, block)


def _of_masks(sizes: Any, shapes: Shapes, limits: list[int]) -> list[int]:
    """Return the `limits` of masks with the one below which a tile need not shrink for them."""
    if not limits:
        return []
    if not sizes.shared:
        return [*limits, max(sizes.edge, shapes.n_k // 8)]  # of the keys, a small part
    few = shapes.heads * prod(shapes.batch) < 4
    return [*limits, 2 * sizes.edge if few else sizes.edge]


def _tile(sizes: Any, shapes: Shapes, limits: list[int]) -> tuple[int, int]:
    """Return the queries and keys of a tile that suit a library, were there any number of them."""
    rows, cols = sizes.rows, sizes.cols
    if sizes.shared:
        rows *= max(1, sizes.elements // (rows * cols * max(1, prod(shapes.lead))))
    group = 1 if sizes.batch == "whole" else shapes.group  # below, with all heads
    area, rows = rows * cols, max(1, rows // group)
    if limits:
        limit = max(sizes.least, min(limits))
        rows = min(rows, limit)
        return rows, min(limit, area // (rows * group))
    width = max(1, 2 * shapes.d_v)  # of what is read for a row or a column
    rows = max(rows, area // (group * max(shapes.n_k, width)))
    if shapes.n_q <= rows:
        return rows, max(cols, area // max(group * shapes.n_q, width))
    if group * rows * shapes.n_k <= area:  # all keys are in one tile
        return rows, cols
    rows = _in_chunks(shapes.n_q, (2 * shapes.n_q + rows) // (2 * rows))  # rather few chunks
    return rows, min(cols, max(16, area // (16 * group * rows) * 16))


def _in_chunks(n: int, count: int) -> int:
    """Return the size of `count` chunks of an axis that are about as large: a multiple of 16."""
    return -(-n // (16 * count)) * 16


def _evened(n: int, size: int) -> int:
    """Return a size for as many chunks of an axis as those of `size`, but about as large."""
    return min(size, _in_chunks(n, -(-n // size))) if n else size


def _balanced(n_q: int, rows: int, blocks: int, threads: int) -> int:
    """Return fewer queries for a chunk where so few tasks would leave threads without work.

    A task is a chunk of queries of a block; what the busiest thread has counts.
    """
    fewest = -(-n_q // rows)
    if threads == 1 or not n_q or blocks * fewest >= 4 * threads:
        return rows

    def busiest(chunks: int) -> int:
        return -(-blocks * chunks // threads) * -(-n_q // chunks)

    counts = range(fewest, max(fewest, n_q // LEAST) + 1)
    least = min(map(busiest, counts))
    count = next(n for n in counts if busiest(n) <= 1.05 * least)
    return rows if count == fewest else _in_chunks(n_q, count)


def _shrunk(rows: int, cols: int, entries: int, budget: int, asked: Asked) -> tuple[int, int]:
    """Return fewer queries or keys, of those not asked for, until `entries` tiles fit a budget."""
    floor = SMALLEST if asked.most else 64
    while entries * rows * cols > budget:
        fewer_rows = asked.query_chunk is None and rows > floor
        fewer_cols = asked.key_chunk is None and cols > floor
        if fewer_rows and (rows > cols or not fewer_cols):
            rows = -(-rows // 2)
        elif fewer_cols:
            cols = -(-cols // 2)
        else:
            break
    return rows, cols


def block_within(lead: tuple[int, ...], room: int, even: bool = False) -> tuple[int, ...]:
    """Return the largest block of at most `room` entries of these axes, the last ones first.

    With `even` it divides them.
    """
    block = []
    for n in reversed(lead):
        size = max(1, min(n, room))
        size = -(-n // -(-n // size)) if n else size  # of as many blocks, about as large
        while even and n % size:
            size -= 1
        block.append(size)
        room = room // size if size == n else 1
    return tuple(reversed(block))
