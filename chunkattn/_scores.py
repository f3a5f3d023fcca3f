"""The score of each pair, and the values that the weights gather: the inside of every tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ._callables import Modified
from ._tiles import Tile

Array = Any


def scores(tile: Tile, workspace: Array | None = None) -> Array:
    """Return the tile's scores (…, h, rows, keys), by the steps of the contract in their order."""
    s = products(tile, workspace)
    if tile.rows.problem.spec.score_mod is not None:
        s = Modified(tile)(s, *tile.rows.problem.captured.values())
    return shown(tile, s)


def products(tile: Tile, workspace: Array | None = None) -> Array:
    """Return the scaled products of queries and keys, capped where a softcap is asked for."""
    rows, xp, softcap = tile.rows, tile.xp, tile.rows.problem.spec.softcap
    s = rows.ungrouped(xp.matmul(rows.query, xp.matrix_transpose(tile.key), workspace))
    return s if softcap is None else xp.cap(s, softcap)


def shown(tile: Tile, s: Array) -> Array:
    """Return the scores with the bias added, and -inf where a mask forbids the pair."""
    problem, xp = tile.rows.problem, tile.xp
    if problem.bias is not None:
        s += xp.cast(tile.slice(problem.bias), s.dtype)
    for allowed in tile.allowed():
        s = xp.hide(s, allowed, -float("inf"))
        del allowed  # before the next one is made
    return s


def dropped(tile: Tile, x: Array) -> Array:
    """Return what the dropout leaves of weights, or of their gradient: a part, scaled up.

    `x` may be overwritten.
    """
    rate = tile.rows.problem.spec.dropout
    if not rate:
        return x
    x = tile.xp.hide(x, tile.kept, 0.0)
    x *= 1 / (1 - rate)
    return x


def gather(tile: Tile, weights: Array, value: Array) -> Array:
    """Return ``weights @ value`` of the tile, (…, h, rows, d_v), pair by pair.

    A NaN or inf in `value` reaches the queries that see it and no other, although ``0 · NaN`` is
    NaN in a product.
    """
    rows, xp = tile.rows, tile.xp
    weights = dropped(tile, weights)

    def product(weights: Array, value: Array) -> Array:
        return rows.ungrouped(xp.matmul(rows.grouped(weights), value))

    def plain() -> Array:
        return product(weights, value)

    def careful() -> Array:
        again = replace(tile)  # what a tile keeps would be traced within this branch
        seen = xp.cast(scores(again) != -float("inf"), weights.dtype)
        out = product(weights, xp.where(xp.isfinite(value), value, xp.zeros_like(value)))
        inf, width = float("inf"), value.shape[-1]
        kinds = [(xp.isnan(value), float("nan")), (value == inf, inf), (value == -inf, -inf)]
        found = xp.concat([xp.cast(kind, value.dtype) for kind, _ in kinds], axis=-1)
        hits = product(seen, found) > 0  # (…, h, rows, 3 · d_v)
        for i, (_, extreme) in enumerate(kinds):
            hit = xp.read(hits, -1, i * width, width)
            out += xp.where(hit, xp.new(out, (), extreme, out.dtype), xp.zeros_like(out))
        return out

    if not tile.hides:
        return plain()
    return xp.when(xp.nonfinite(value, value.dtype), careful, plain)


def gather_onto(tile: Tile, acc: Array, weights: Array, value: Array) -> Array:
    """Return ``acc + gather(tile, weights, value)``; `acc` may be overwritten."""
    if tile.hides:
        acc += gather(tile, weights, value)
        return acc
    rows = tile.rows
    weights = rows.grouped(dropped(tile, weights))
    return rows.ungrouped(rows.xp.add_product(rows.grouped(acc), weights, value))
