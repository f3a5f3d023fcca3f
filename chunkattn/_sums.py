"""The gradients of a call's arrays, summed up over the tiles in the arrays' own shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._loops import over_blocks
from ._problem import Problem
from ._rows import Rows
from ._spec import Cut
from ._tiles import Tile

Array = Any
Index = Any  # an int, or a traced integer
Sums = dict[str, Array]  # by the array's name; only those that are wanted


def totals(problem: Problem, step: Callable[[Rows, Sums], Sums], wanted: tuple[str, ...]) -> Sums:
    """Return the `wanted` gradients, to which ``step(rows, sums)`` adds for each query chunk."""
    sums = {name: problem.zeros(name) for name in wanted}
    sums = over_blocks(problem, step, sums, shared=any(map(problem.is_shared, sums.values())))
    return {name: problem.gradient(name, sums.pop(name)) for name in wanted}


def _add(
    rows: Rows,
    sums: Sums,
    name: str,
    value: Array,
    cuts: tuple[Cut, ...],
    row: Index,
    col: Index = 0,
) -> Sums:
    """Return `sums` with `value` added at a row and a column of a block, where it is wanted.

    The axes that the array has with length 1 are summed over.
    """
    total, xp = sums[name], rows.xp
    lengths = zip(total.shape, value.shape, strict=True)
    axes = tuple(i for i, (whole, part) in enumerate(lengths) if whole == 1 and part != 1)
    if axes:
        value = xp.sum(value, axis=axes, keepdims=True, dtype=value.dtype)
    return sums | {name: xp.accumulate(total, value, rows.corner(total, cuts, row, col))}


def add_rows(rows: Rows, sums: Sums, name: str, value: Array) -> Sums:
    """Add to the gradient of an array over the queries a `value` of (…, h, size, width)."""
    return _add(rows, sums, name, value, rows.heads, rows.start) if name in sums else sums


def add_keys(tile: Tile, sums: Sums, name: str, weights: Array, x: Array) -> Sums:
    """Add ``weightsᵀ @ x`` to the gradient of an array over the keys."""
    if name not in sums:
        return sums
    return add_part(tile, sums, name, tile.xp.matmul(tile.xp.matrix_transpose(weights), x))


def add_part(tile: Tile, sums: Sums, name: str, value: Array) -> Sums:
    """Add to the gradient of an array over the keys a `value` of (…, h_k, keys, width)."""
    if name not in sums:
        return sums
    return _add(tile.rows, sums, name, value, tile.rows.block, tile.start)


def add_bias(tile: Tile, sums: Sums, value: Array) -> Sums:
    """Add to the gradient of the bias a `value` of (…, h, rows, keys)."""
    rows = tile.rows
    if "bias" not in sums:
        return sums
    return _add(rows, sums, "bias", rows.once(value), rows.heads, rows.start, tile.start)


def add_captured(tile: Tile, sums: Sums, values: tuple[Array, ...]) -> Sums:
    """Add to the gradients of what score_mod captures."""
    named = zip(tile.rows.problem.captured, values, strict=True) if values else ()
    for name, value in named:
        if name in sums:
            sums = sums | {name: sums[name] + tile.xp.cast(value, sums[name].dtype)}
    return sums
