"""The two loops of every algorithm here: over chunks of queries, and over the keys they see."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ._problem import Problem
from ._tiles import Rows, Tile

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
    xp, spec = problem.xp, problem.spec
    for size, first, count in xp.query_pieces(spec.n_q, spec.schedule.query_chunk):

        def task(
            state: State, number: Index, size: int = size, first: int = first, count: int = count
        ) -> State:
            block, chunk = (0, number) if spec.blocks == 1 else divmod(number, count)
            return step(_rows(problem, block, size, first, count, chunk), state)

        state = xp.each(task, state, spec.blocks * count, done)
    return state


def over_blocks(
    problem: Problem, step: Callable[[Rows, State], State], state: State, *, shared: bool
) -> State:
    """Return the state after ``state = step(rows, state)`` for every chunk of queries.

    The steps of one block of batch entries and heads run one after the other, since they write to
    the same places, and so do those of different blocks where these are `shared`.
    """
    xp, spec = problem.xp, problem.spec

    def task(state: State, block: Index) -> State:
        for size, first, count in xp.query_pieces(spec.n_q, spec.schedule.query_chunk):

            def at(
                state: State, chunk: Index, size: int = size, first: int = first, count: int = count
            ) -> State:
                return step(_rows(problem, block, size, first, count, chunk), state)

            state = xp.fold(at, state, 0, count)
        return state

    return xp.fold(task, state, 0, spec.blocks) if shared else xp.each(task, state, spec.blocks)


def _rows(problem: Problem, block: Index, size: int, first: int, count: int, chunk: Index) -> Rows:
    """Return chunk number `chunk` of the `count` ones of `size` queries that begin at `first`."""
    xp, spec = problem.xp, problem.spec
    start = first + chunk * size
    if first + count * size <= spec.n_q:
        return Rows(problem, spec.block(block), start, size)
    begin = xp.smaller(start, spec.n_q - size)  # the last chunk begins earlier
    return Rows(problem, spec.block(block), begin, size, start - begin)


def over_keys(rows: Rows, step: Callable[[Tile, State], State], state: State) -> State:
    """Return the state after ``state = step(tile, state)`` for each chunk of keys that is seen."""
    xp, spec = rows.xp, rows.problem.spec

    def at(masked: bool, size: int, first: int, state: State, number: Index) -> State:
        return step(Tile(rows, first + number * size, size, masked), state)

    for size, first, count in xp.pieces(spec.n_k, spec.schedule.key_chunk):
        for start, stop, masked in rows.spans(size, first, count):
            state = xp.fold(partial(at, masked, size, first), state, start, stop)
    return state
