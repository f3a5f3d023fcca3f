"""Derivatives of attention: forward mode, reverse mode, and the tangent of reverse mode.

Each recomputes the tiles from the saved ``(out, lse)``, as in T. Dao et al., "FlashAttention",
https://arxiv.org/abs/2205.14135, appendix B, so that nothing of size ``n_q × n_k`` is kept.  With
``p = exp(s - lse)`` the weights of a tile, a dot for a tangent and a bar for a gradient:

=======  =========================================================================================
tangent  ``out' = Σ p s' v + Σ p v' - lse' out`` and ``lse' = Σ p s'``
reverse  ``s̄ = p (ōut vᵀ - δ)`` with ``δ = Σ ōut out - l̄se``, ``v̄ = Σ pᵀ ōut``; then ``q̄ = s̄ k``,
         ``k̄ = s̄ᵀ q`` through score_mod, softcap and scale, and the bias's own gradient is ``s̄``
second   the tangent of each line of the reverse mode
=======  =========================================================================================

A pair that may not attend has ``p = 0`` and ``s̄ = 0``; what stands behind it, NaN even, is zero in
the products too.
"""

from __future__ import annotations

from typing import Any

from ._chain import pull, pull_tangent, push, softmax
from ._loops import over_keys, over_queries
from ._problem import TANGENT, TOKENS, Problem, to_heads
from ._rows import Rows
from ._scores import dropped, gather_onto
from ._spec import Spec
from ._sums import Sums, add_bias, add_captured, add_keys, add_rows, totals
from ._tiles import Tile

Array = Any
Names = tuple[str, ...]

STILL = ("masks", "query_offset", "key_offset", "dropout_seed", "scale")


class Results:
    """What the forward pass gave, for chunk after chunk of queries."""

    def __init__(self, problem: Problem, arrays: dict[str, Any]) -> None:
        xp, spec, out = problem.xp, problem.spec, arrays["out"]
        self.out, self.lse = to_heads(xp, spec, out, arrays["lse"])
        _, self.low = to_heads(xp, spec, out, arrays["low"])

    def of(self, rows: Rows) -> tuple[Array, Array, Array]:
        """Return `out`, `lse` and a factor for these queries: (…, h, size, d_v or 1).

        `lse` is 0 where a query sees nothing, so that ``exp(-inf - lse)`` is 0.  All weights
        ``exp(s - lse)`` of a query are too large by one factor, by the rounding of `lse`; the
        derivatives are linear in them, and are multiplied by this factor in another place.
        """
        xp, out, lse = rows.xp, rows.read(self.out), rows.read(self.lse)
        lse = xp.where(lse == -float("inf"), xp.zeros_like(lse), lse)
        return out, lse, xp.exp(-rows.read(self.low))

    def are_blind(self, rows: Rows) -> Array:
        """Return which of these queries see no key, or none that counts: (…, h, size, 1)."""
        lse, sinks = rows.read(self.lse), rows.problem.sinks
        found: Array = lse <= (-float("inf") if sinks is None else per_head(rows, sinks, lse.dtype))
        return found


class Moved:
    """The tangents of a call's arrays, as a problem of the same shapes."""

    def __init__(self, problem: Problem, arrays: dict[str, Any]) -> None:
        tangents = {
            name.removesuffix(TANGENT): x for name, x in arrays.items() if name.endswith(TANGENT)
        }
        same = {name: x for name, x in arrays.items() if name in STILL}
        still = {
            name: problem.xp.zeros_like(arrays[name]) for name in TOKENS if name not in tangents
        }
        self.scale = tangents.pop("scale", None)
        self.problem = Problem(problem.xp, problem.spec, same | still | tangents)

    def rows(self, rows: Rows) -> Rows:
        """Return the tangents of a chunk of queries."""
        moved = rows.of(self.problem)
        if self.scale is not None:
            scale = rows.xp.cast(self.scale, self.problem.spec.compute)
            moved.query = moved.query + rows.grouped(rows.unscaled * scale)
        return moved


def per_head(rows: Rows, x: Array, dtype: Any) -> Array:
    """Return one number for each head as (…, h, 1, 1)."""
    return rows.problem.aligned(rows.xp.cast(rows.of_heads(x), dtype)[:, None, None])


def sink_weights(rows: Rows, lse: Array) -> Array:
    """Return the softmax weights of the sinks: (…, h, size, 1)."""
    sinks = per_head(rows, rows.problem.sinks, lse.dtype)
    return rows.xp.where(sinks == -float("inf"), rows.xp.zeros_like(lse), rows.xp.exp(sinks - lse))


def tangent(xp: Any, spec: Spec, arrays: dict[str, Any]) -> dict[str, Array]:
    """Return the tangents of ``(out, lse)``."""
    problem = Problem(xp, spec, arrays)
    moved = Moved(problem, arrays)
    results = Results(problem, arrays)

    def queries(rows: Rows, outputs: dict[str, Array]) -> dict[str, Array]:
        found = _tangent_of_rows(rows, moved, results.of(rows))
        return rows.written(outputs, dict(zip(("out", "lse"), found, strict=True)))

    return problem.results(over_queries(problem, queries, problem.outputs()))


def _tangent_of_rows(
    rows: Rows, moved: Moved, results: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """Return the tangents of the results of one chunk of queries, summed over the keys."""
    xp, [workspace], moved_rows = rows.xp, rows.workspaces(1), moved.rows(rows)
    out, lse, factor = results
    acc, mean = xp.zeros_like(out), xp.zeros_like(lse)
    if moved.problem.sinks is not None:
        sinks = per_head(rows, moved.problem.sinks, lse.dtype)
        mean = sink_weights(rows, lse) * sinks

    def step(tile: Tile, state: tuple[Array, Array]) -> tuple[Array, Array]:
        acc, mean = state
        moved_tile = tile.of(moved_rows)
        at = softmax(tile, lse, workspace)
        change = at.weights * push(at, moved_tile)[0]
        mean += xp.sum(change, axis=-1, keepdims=True, dtype=change.dtype)
        acc = gather_onto(tile, acc, change, tile.value)
        return gather_onto(tile, acc, at.weights, moved_tile.value), mean

    acc, mean = over_keys(rows, step, (acc, mean))
    mean = mean * factor
    return acc * factor - mean * out, mean


class Cotangents:
    """What the reverse mode takes from a chunk of queries.

    Attributes
    ----------
    out : array of shape (…, h_k, group · size, d_v)
        The gradient of the loss with respect to `out`.
    delta : array of shape (…, h, size, 1)
        ``Σ ōut out - l̄se``: what softmax's normalisation takes off each gradient.
    lse : array of shape (…, h, size, 1)
        `lse`, and NaN where ōut is not finite, so that the weights carry it on.
    """

    def __init__(self, rows: Rows, results: Results, cotangents: tuple[Array, Array]) -> None:
        xp = rows.xp
        out, lse, factor = results.of(rows)
        d_out, d_lse = (rows.once(rows.read(x) * factor) for x in cotangents)
        self.out = rows.grouped(d_out)
        nothing = (out == 0) & results.are_blind(rows)
        product = xp.where(nothing, xp.zeros_like(out), d_out * out)
        self.delta = rows.once(xp.sum(product, axis=-1, keepdims=True, dtype=out.dtype) - d_lse)
        well = xp.all(xp.isfinite(d_out) | nothing, axis=-1, keepdims=True)
        self.lse = xp.where(well, lse, xp.new(lse, (), float("nan"), lse.dtype))


def backward(xp: Any, spec: Spec, arrays: dict[str, Any], wanted: Names) -> Sums:
    """Return the gradients of the arrays that are `wanted`, in their own shapes and dtypes."""
    problem = Problem(xp, spec.backward, arrays)
    results = Results(problem, arrays)
    cotangents = to_heads(xp, spec, arrays["d_out"], arrays["d_lse"])

    def queries(rows: Rows, sums: Sums) -> Sums:
        return _backward_of_rows(rows, Cotangents(rows, results, cotangents), sums)

    return totals(problem, queries, wanted)


def _backward_of_rows(rows: Rows, bar: Cotangents, sums: Sums) -> Sums:
    """Return `sums` with the gradients that one chunk of queries brings."""
    xp, (first, second) = rows.xp, rows.workspaces(2)

    def step(tile: Tile, state: tuple[Array, Sums]) -> tuple[Array, Sums]:
        query, sums = state
        at = softmax(tile, bar.lse, first)
        value = xp.matrix_transpose(tile.value)
        gradient = dropped(tile, rows.ungrouped(xp.matmul(bar.out, value, second)))
        gradient -= bar.delta
        gradient *= at.weights
        gradient = at.hidden_zero(gradient)
        sums = add_bias(tile, sums, gradient)
        gradient, captured = pull(at, gradient)
        sums = add_captured(tile, sums, captured)
        scores = rows.grouped(gradient)
        query = rows.ungrouped(xp.add_product(rows.grouped(query), scores, at.clean(tile.key)))
        sums = add_keys(tile, sums, "key", scores, at.clean(rows.query))
        weights = rows.grouped(dropped(tile, at.weights))
        return query, add_keys(tile, sums, "value", weights, at.clean(bar.out))

    query, sums = over_keys(rows, step, (xp.zeros_like(rows.unscaled), sums))
    sums = add_rows(rows, sums, "query", query * rows.problem.scale)
    if "scale" in sums:
        sums = add_rows(rows, sums, "scale", query * rows.unscaled)
    if "sinks" in sums:
        sums = add_rows(rows, sums, "sinks", -sink_weights(rows, bar.lse) * bar.delta)
    return sums


def second(xp: Any, spec: Spec, arrays: dict[str, Any], wanted: Names) -> Sums:
    """Return the tangents of the gradients that `backward` gives."""
    problem = Problem(xp, spec, arrays)
    moved = Moved(problem, arrays)
    results = Results(problem, arrays)
    cotangents = to_heads(xp, spec, arrays["d_out"], arrays["d_lse"])
    given = (
        arrays[name + TANGENT] if name + TANGENT in arrays else xp.zeros_like(arrays[name])
        for name in ("d_out", "d_lse")
    )
    moved_cotangents = to_heads(xp, spec, *given)

    def queries(rows: Rows, sums: Sums) -> Sums:
        bar = Cotangents(rows, results, cotangents)
        return _second_of_rows(rows, moved, bar, results.of(rows), moved_cotangents, sums)

    return totals(problem, queries, wanted)


def _second_of_rows(
    rows: Rows,
    moved: Moved,
    bar: Cotangents,
    results: tuple[Array, Array, Array],
    moved_bar: tuple[Array, Array],
    sums: Sums,
) -> Sums:
    """Return `sums` with the tangents of the gradients that one chunk of queries brings."""
    xp, moved_rows = rows.xp, moved.rows(rows)
    out, _, factor = results
    d_out, d_lse = (rows.once(rows.read(x) * factor) for x in moved_bar)
    out_tangent, lse_tangent = _tangent_of_rows(rows, moved, results)
    known = rows.ungrouped(bar.out)
    delta = xp.sum(d_out * out + known * out_tangent, axis=-1, keepdims=True, dtype=out.dtype)
    delta = rows.once(delta - d_lse)
    d_out = rows.grouped(d_out)
    with_first = moved.scale is not None or "scale" in sums

    def step(tile: Tile, state: tuple[Array, Array, Sums]) -> tuple[Array, Array, Sums]:
        first, query, sums = state
        moved_tile = tile.of(moved_rows)
        at = softmax(tile, bar.lse)
        change, before = push(at, moved_tile)
        change = at.hidden_zero(at.weights * (change - lse_tangent))  # of the weights
        value, value_tangent = map(xp.matrix_transpose, (tile.value, moved_tile.value))
        pulled = dropped(tile, rows.ungrouped(xp.matmul(bar.out, value))) - bar.delta
        moving = xp.matmul(d_out, value) + xp.matmul(bar.out, value_tangent)
        moving = dropped(tile, rows.ungrouped(moving)) - delta
        gradient = at.hidden_zero(at.weights * pulled)
        moving = at.hidden_zero(change * pulled + at.weights * moving)
        sums = add_bias(tile, sums, moving)
        gradient, moving, captured = pull_tangent(at, moved_tile, before, gradient, moving)
        sums = add_captured(tile, sums, captured)
        scores, scores_tangent = rows.grouped(gradient), rows.grouped(moving)
        if with_first:
            first += rows.ungrouped(xp.matmul(scores, at.clean(tile.key)))
        query += rows.ungrouped(
            xp.matmul(scores_tangent, at.clean(tile.key))
            + xp.matmul(scores, at.clean(moved_tile.key))
        )
        sums = add_keys(tile, sums, "key", scores_tangent, at.clean(rows.query))
        sums = add_keys(tile, sums, "key", scores, at.clean(moved_rows.query))
        change = rows.grouped(dropped(tile, change))
        weights = rows.grouped(dropped(tile, at.weights))
        sums = add_keys(tile, sums, "value", change, at.clean(bar.out))
        return first, query, add_keys(tile, sums, "value", weights, at.clean(d_out))

    zeros = xp.zeros_like(rows.unscaled)
    first, query, sums = over_keys(rows, step, (zeros, xp.zeros_like(zeros), sums))
    scale = rows.problem.scale
    query_tangent = query * scale
    if moved.scale is not None:
        query_tangent = query_tangent + first * xp.cast(moved.scale, out.dtype)
    sums = add_rows(rows, sums, "query", query_tangent)
    if "scale" in sums:
        moved_query = moved_rows.unscaled
        sums = add_rows(rows, sums, "scale", query * rows.unscaled + first * moved_query)
    if "sinks" in sums:
        weights = sink_weights(rows, bar.lse)
        change = -lse_tangent
        if moved.problem.sinks is not None:
            change = change + per_head(rows, moved.problem.sinks, out.dtype)
        change = weights * change
        sums = add_rows(rows, sums, "sinks", -change * bar.delta - weights * delta)
    return sums
