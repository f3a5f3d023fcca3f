"""The two loops of every algorithm here: over chunks of queries, and over the keys they see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

from ._mask import Mask, Range
from ._problem import Problem
from ._rows import Rows, Span
from ._tiles import Tile

State = Any
Index = Any  # an int, or a traced integer


def over_queries(
    problem: Problem,
    step: Callable[[Rows, State], State],
    state: State,
    done: Callable[[], None] | None = None,
) -> State:
    """Return the state after ``state = step(rows, state)`` for every chunk of queries.

    The steps write to places of their own, and may run side by side; `done` is called after each.
    """
    spec = problem.spec
    pieces, count = _pieces(problem)

    def task(state: State, number: Index) -> State:
        block, chunk = (0, number) if spec.blocks == 1 else divmod(number, count)
        return step(_rows(problem, block, pieces, chunk), state)

    return problem.xp.each(task, state, spec.blocks * count, done)


def over_blocks(
    problem: Problem, step: Callable[[Rows, State], State], state: State, *, shared: bool
) -> State:
    """Return the state after ``state = step(rows, state)`` for every chunk of queries.

    The steps of one block of batch entries and heads run one after the other, since they write to
    the same places, and so do those of different blocks where these are `shared`.
    """
    xp, blocks = problem.xp, problem.spec.blocks
    pieces, count = _pieces(problem)

    def task(state: State, block: Index) -> State:
        def at(state: State, chunk: Index) -> State:
            return step(_rows(problem, block, pieces, chunk), state)

        return xp.fold(at, state, 0, count)

    return xp.fold(task, state, 0, blocks) if shared else xp.each(task, state, blocks)


def _pieces(problem: Problem) -> tuple[list[tuple[int, int, int]], int]:
    """Return the pieces of the axis of queries, and how many chunks they are."""
    pieces = problem.xp.query_pieces(problem.spec.n_q, problem.spec.schedule.query_chunk)
    return pieces, sum(count for _, _, count in pieces)


def _rows(problem: Problem, block: Index, pieces: list[tuple[int, int, int]], chunk: Index) -> Rows:
    """Return a chunk of the queries of a block, by its number.

    That may be traced, where the queries are one piece.
    """
    xp, spec = problem.xp, problem.spec
    (size, start, count), *rest = pieces
    if rest and chunk == count:
        [(size, start, _)] = rest
    else:
        start = start + chunk * size
    if rest or count * size <= spec.n_q:
        return Rows(problem, spec.block(block), start, size)
    begin = xp.smaller(start, spec.n_q - size)  # the last chunk begins earlier
    return Rows(problem, spec.block(block), begin, size, start - begin)


def over_keys(rows: Rows, step: Callable[[Tile, State], State], state: State) -> State:
    """Return the state after ``state = step(tile, state)`` for each chunk of keys that is seen."""
    xp, spec = rows.xp, rows.problem.spec

    def at(masked: bool, size: int, first: int, state: State, number: Index) -> State:
        tile = Tile(rows, first + number * size, size, masked)
        return xp.when(tile.is_seen(), partial(step, tile, state), lambda: state)

    for size, first, count in xp.pieces(spec.n_k, spec.schedule.key_chunk):
        for start, stop, masked in _spans(rows, size, first, count):
            state = xp.fold(partial(at, masked, size, first), state, start, stop)
    return state


def _spans(rows: Rows, size: int, first: int, count: int) -> list[tuple[Index, Index, bool]]:
    """Return which key chunks to visit, as ``(start, stop, masked)`` of chunk numbers.

    The `count` chunks of `size` keys begin at key `first`.  Chunks that no query sees are in
    no span, and those that every query sees whole are in one that is not masked.
    """
    xp, masks = rows.xp, rows.problem.masks
    if not masks:
        return [(0, count, False)]

    def chunk(position: Index, up: int, low: Index, high: Index) -> Index:
        number = (position - rows.key_offset - first + up) // size
        return xp.smaller(xp.larger(number, low), high)

    low, high = _common(xp, [mask.key_range(rows) for mask in masks])
    start = 0 if low is None else chunk(low, 0, 0, count)
    stop = count if high is None else chunk(high, size - 1, start, count)
    if count == 1:  # not worth telling apart
        return [(start, stop, True)]
    ranges = [full for mask in masks if (full := mask.full_range(rows)) is not None]
    if len(ranges) < len(masks):
        return [(start, stop, True)]
    low, high = _common(xp, ranges)
    whole = start if low is None else chunk(low, size - 1, start, stop)
    ragged = stop if high is None else chunk(high, 0, whole, stop)
    return [(start, whole, True), (whole, ragged, False), (ragged, stop, True)]


def seen(rows: Span, masks: tuple[Mask, ...]) -> tuple[Index, Index]:
    """Return the first key that `masks` may show some query of `rows`, and that after the last."""
    xp, n_k = rows.xp, rows.n_k
    low, high = _common(xp, [mask.key_range(rows) for mask in masks])
    start = 0 if low is None else xp.smaller(xp.larger(low - rows.key_offset, 0), n_k)
    stop = n_k if high is None else xp.smaller(xp.larger(high - rows.key_offset, start), n_k)
    return start, stop


def _common(xp: Any, ranges: list[Range]) -> Range:
    """Return the intersection of ranges whose ends may be None."""
    lows = [low for low, _ in ranges if low is not None]
    highs = [high for _, high in ranges if high is not None]
    return (
        reduce(xp.larger, lows) if lows else None,
        reduce(xp.smaller, highs) if highs else None,
    )
