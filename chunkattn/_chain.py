"""From queries and keys to the weights of a tile, and derivatives along that way and back.

The scores pass through softcap and score_mod (the chain proper), then bias and masks are added.
``before`` are the scores between softcap and score_mod; where there is neither, it is not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._callables import Modified
from ._scores import products, shown
from ._tiles import Tile

Array = Any


@dataclass
class Weights:
    """The softmax weights of a tile and what the chain needs of the scores they came from."""

    tile: Tile
    weights: Array  # (…, h, rows, keys)
    before: Array | None
    visible: Array | None  # None: every pair is

    def hidden_zero(self, x: Array) -> Array:
        """Return `x` with 0 for the pairs that may not attend; it may be overwritten."""
        return x if self.visible is None else self.tile.xp.hide(x, self.visible, 0.0)

    def clean(self, x: Array) -> Array:
        """Return `x` with 0 for NaN and inf where pairs may be hidden: their weights are 0.

        What stands in a visible pair is in the weights by then.
        """
        xp = self.tile.xp
        return x if self.visible is None else xp.where(xp.isfinite(x), x, xp.zeros_like(x))


def softmax(tile: Tile, lse: Array, workspace: Array | None = None) -> Weights:
    """Return the weights ``exp(s - lse)`` of a tile, for a finite `lse` of (…, h, rows, 1)."""
    xp, spec = tile.xp, tile.rows.problem.spec
    s = products(tile, workspace)
    before = None
    if spec.softcap is not None or spec.score_mod is not None:
        before = xp.astype(s, s.dtype)  # a copy: the scores are worked on in place
    if spec.score_mod is not None:
        s = Modified(tile)(s, *tile.rows.problem.captured.values())
    s = shown(tile, s)
    visible = s != -float("inf") if tile.hides else None
    found = Weights(tile, xp.exp_difference(s, lse), None, visible)
    found.weights = found.hidden_zero(found.weights)
    found.before = None if before is None else found.hidden_zero(before)
    return found


def push(at: Weights, moved: Tile) -> tuple[Array, Array]:
    """Return the tangents of the scores and of the scores before score_mod."""
    tile = at.tile
    xp, rows, problem = tile.xp, tile.rows, tile.rows.problem
    s = rows.ungrouped(
        xp.matmul(moved.rows.query, xp.matrix_transpose(tile.key))
        + xp.matmul(rows.query, xp.matrix_transpose(moved.key))
    )
    if problem.spec.softcap is not None:
        s *= _slope(at)
    before = s = at.hidden_zero(s)
    if problem.spec.score_mod is not None:
        tangents = (before, *captured_tangents(moved, tile))
        s = xp.pushforward(Modified(tile), primals(at), tangents)
    if moved.rows.problem.bias is not None:
        s = s + xp.cast(tile.slice(moved.rows.problem.bias), s.dtype)
    return at.hidden_zero(s), before


def primals(at: Weights) -> tuple[Array, ...]:
    """Return what score_mod is differentiated by; it may overwrite the scores."""
    assert at.before is not None
    scores = at.tile.xp.astype(at.before, at.before.dtype)
    return scores, *at.tile.rows.problem.captured.values()


def captured_tangents(moved: Tile, tile: Tile) -> tuple[Array, ...]:
    """Return the tangents of what score_mod captures, 0 where none is given."""
    held, tangents = tile.rows.problem.captured, moved.rows.problem.captured
    return tuple(
        tangents[name] if name in tangents else tile.xp.zeros_like(x) for name, x in held.items()
    )


def pull(at: Weights, gradient: Array) -> tuple[Array, tuple[Array, ...]]:
    """Return the gradients of the products and of what score_mod captures.

    `gradient` may be overwritten.
    """
    problem, captured = at.tile.rows.problem, ()
    if problem.spec.score_mod is not None:
        gradient, *captured = at.tile.xp.pullback(Modified(at.tile), primals(at), gradient)
    if problem.spec.softcap is not None:
        gradient *= _slope(at)
    if at.before is None:
        return gradient, ()
    return at.hidden_zero(gradient), tuple(captured)


def pull_tangent(
    at: Weights, moved: Tile, before: Array, gradient: Array, gradient_tangent: Array
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Return the gradient of the products, its tangent, and those of what score_mod captures."""
    xp, problem, captured = at.tile.xp, at.tile.rows.problem, ()
    if problem.spec.score_mod is not None:
        tangents = (before, *captured_tangents(moved, at.tile), gradient_tangent)
        mod = Modified(at.tile)

        def back(*args: Array) -> Any:
            return xp.pullback(mod, args[:-1], args[-1])

        point = (*primals(at), gradient)
        gradient_tangent, *captured = xp.pushforward(back, point, tangents)
        gradient = back(*primals(at), gradient)[0]
    softcap = problem.spec.softcap
    if softcap is not None and at.before is not None:
        slope, bend = _slope(at), at.before * before * (-2 / softcap**2)
        gradient, gradient_tangent = gradient * slope, gradient_tangent * slope + gradient * bend
    if at.before is None:
        return gradient, gradient_tangent, ()
    return at.hidden_zero(gradient), at.hidden_zero(gradient_tangent), tuple(captured)


def _slope(at: Weights) -> Array:
    """Return the derivative of the softcap, from its result: ``1 - (s / softcap)²``."""
    softcap = at.tile.rows.problem.spec.softcap
    assert softcap is not None
    assert at.before is not None
    slope = at.before / softcap
    slope *= slope
    slope -= 1
    slope *= -1
    return slope
