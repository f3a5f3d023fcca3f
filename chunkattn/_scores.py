"""The score of each pair, and the values that the weights gather: the inside of every tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ._tiles import Tile

Array = Any


def scores(tile: Tile, workspace: Array | None = None) -> Array:
    """Return the tile's scores (…, h, rows, keys), by the steps of the contract in their order."""
    rows, problem, xp = tile.rows, tile.rows.problem, tile.xp
    s = rows.ungrouped(xp.matmul(rows.query, xp.matrix_transpose(tile.key), workspace))
    if problem.spec.softcap is not None:
        s = xp.tanh(s / problem.spec.softcap) * problem.spec.softcap
    if problem.bias is not None:
        s += xp.cast(tile.slice(problem.bias), s.dtype)
    if tile.masked:
        for mask in problem.masks:
            allowed = mask.tile(tile)
            if allowed is not None:
                s = xp.hide(s, allowed)
    return s


def gather(tile: Tile, weights: Array) -> Array:
    """Return ``weights @ value`` of the tile, (…, h, rows, d_v), pair by pair.

    A NaN or inf in `value` reaches the queries that see it and no other, although ``0 · NaN`` is
    NaN in a product.
    """
    rows, xp, value = tile.rows, tile.xp, tile.value

    def product(weights: Array, value: Array) -> Array:
        return rows.ungrouped(xp.matmul(rows.grouped(weights), value))

    def plain() -> Array:
        return product(weights, value)

    def careful() -> Array:
        seen = xp.cast(scores(replace(tile)) != -float("inf"), weights.dtype)
        out = product(weights, xp.where(xp.isfinite(value), value, xp.zeros_like(value)))
        inf = float("inf")
        for found, extreme in (
            (xp.isnan(value), float("nan")),
            (value == inf, inf),
            (value == -inf, -inf),
        ):
            hit = product(seen, xp.cast(found, value.dtype)) > 0
            out += xp.where(hit, xp.new(out, (), extreme, out.dtype), xp.zeros_like(out))
        return out

    if not tile.masked and rows.problem.bias is None:
        return plain()
    return xp.when(~xp.isfinite(xp.sum(value, dtype=value.dtype)), careful, plain)
