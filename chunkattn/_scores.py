"""The score of each pair, and the values that the weights gather: the inside of every tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ._dropout import kept
from ._tiles import Tile

Array = Any


def scores(tile: Tile, workspace: Array | None = None) -> Array:
    """Return the tile's scores (…, h, rows, keys), by the steps of the contract in their order."""
    rows, problem, xp = tile.rows, tile.rows.problem, tile.xp
    s = rows.ungrouped(xp.matmul(rows.query, xp.matrix_transpose(tile.key), workspace))
    if problem.spec.softcap is not None:
        s = xp.tanh(s / problem.spec.softcap) * problem.spec.softcap
    if problem.spec.score_mod is not None:
        s = _modified(tile, problem.spec.score_mod, s)
    if problem.bias is not None:
        s += xp.cast(tile.slice(problem.bias), s.dtype)
    if tile.masked:
        for mask in problem.masks:
            allowed = mask.tile(tile)
            if allowed is not None:
                s = xp.hide(s, allowed)
    return s


def _modified(tile: Tile, score_mod: Callable[..., Any], s: Array) -> Array:
    """Return the scores after the caller's function, in the compute dtype again."""
    modified = score_mod(s, tile.b, tile.h, tile.q_idx, tile.kv_idx)
    if not hasattr(modified, "dtype") or tuple(modified.shape) != tuple(s.shape):
        got = getattr(modified, "shape", type(modified).__name__)
        raise ValueError(f"score_mod must return an array of shape {tuple(s.shape)}; got {got}")
    # A copy, since what follows is done in place, and the function may have returned an array of
    # its own.
    return s if modified is s else tile.xp.astype(modified, s.dtype)


def gather(tile: Tile, weights: Array) -> Array:
    """Return ``weights @ value`` of the tile, (…, h, rows, d_v), pair by pair.

    A NaN or inf in `value` reaches the queries that see it and no other, although ``0 · NaN`` is
    NaN in a product.
    """
    rows, xp, value, spec = tile.rows, tile.xp, tile.value, tile.rows.problem.spec
    if spec.dropout:
        weights = xp.where(kept(tile, spec.dropout), weights, xp.zeros_like(weights))
        weights /= 1 - spec.dropout

    def product(weights: Array, value: Array) -> Array:
        return rows.ungrouped(xp.matmul(rows.grouped(weights), value))

    def plain() -> Array:
        return product(weights, value)

    def careful() -> Array:
        seen = xp.cast(scores(replace(tile)) != -float("inf"), weights.dtype)
        out = product(weights, xp.where(xp.isfinite(value), value, xp.zeros_like(value)))
        inf = float("inf")
        kinds = [(xp.isnan(value), float("nan")), (value == inf, inf), (value == -inf, -inf)]
        found = xp.concat([xp.cast(kind, value.dtype) for kind, _ in kinds], axis=-1)
        hits = product(seen, found) > 0  # (…, h, rows, 3 · d_v)
        for i, (_, extreme) in enumerate(kinds):
            hit = xp.read(hits, -1, i * spec.d_v, spec.d_v)
            out += xp.where(hit, xp.new(out, (), extreme, out.dtype), xp.zeros_like(out))
        return out

    if not tile.masked and rows.problem.bias is None and spec.score_mod is None:
        return plain()
    return xp.when(~xp.isfinite(xp.sum(value, dtype=value.dtype)), careful, plain)
