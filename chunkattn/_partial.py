"""The summary of attention over some keys, and the merge of two.

A summary is ``(acc, total, top)``: ``Σ e^(s-top) v`` of shape (…, h, n_q, d_v), and
``Σ e^(s-top)`` and ``max s`` of shape (…, h, n_q, 1), all in the compute dtype.  No keys at all
have ``top`` at the lowest finite number, so that a score of -inf never meets another infinity.
"""

from __future__ import annotations

from typing import Any

Array = Any
Summary = tuple[Array, Array, Array]


def empty(xp: Any, like: Array, lead: tuple[int, ...], d_v: int, dtype: Any) -> Summary:
    """Return the summary of no keys for queries of shape `lead` = (…, h, n_q)."""
    lowest = float(xp.finfo(dtype).min)
    return (
        xp.new(like, (*lead, d_v), 0.0, dtype),
        xp.new(like, (*lead, 1), 0.0, dtype),
        xp.new(like, (*lead, 1), lowest, dtype),
    )


def of_sinks(xp: Any, sinks: Array, dtype: Any) -> tuple[Array, Array]:
    """Return ``(total, top)`` of one key for each head, with score `sinks` and no value.

    Both have shape (h, 1, 1).  A sink of -inf is none.
    """
    sinks = xp.cast(sinks, dtype)[:, None, None]
    lowest = xp.new(sinks, (), float(xp.finfo(dtype).min), dtype)
    return xp.cast(sinks != -float("inf"), dtype), xp.maximum(sinks, lowest)


def combine(xp: Any, one: Summary, two: Summary) -> Summary:
    """Return the summary over the keys of both."""
    top = xp.maximum(one[2], two[2])
    shrink_one, shrink_two = xp.exp(one[2] - top), xp.exp(two[2] - top)
    return (
        one[0] * shrink_one + two[0] * shrink_two,
        one[1] * shrink_one + two[1] * shrink_two,
        top,
    )


def finish(xp: Any, summary: Summary) -> tuple[Array, Array]:
    """Return ``(out, lse)``, lse of shape (…, h, n_q, 1); queries without a key get 0 and -inf."""
    acc, total, top = summary
    divisor = nonzero(xp, total)
    return acc / divisor, log_sum(xp, total, top, divisor)


def nonzero(xp: Any, total: Array) -> Array:
    """Return `total` with 1 in place of 0, to divide by."""
    return xp.where(total == 0, xp.ones_like(total), total)


def log_sum(xp: Any, total: Array, top: Array, divisor: Array) -> Array:
    """Return ``log(total) + top``, -inf where `total` is 0; `divisor` is ``nonzero(total)``."""
    nothing = xp.new(top, (), -float("inf"), top.dtype)
    return xp.where(total == 0, nothing, top + xp.log(divisor))


def rounding(xp: Any, summary: Summary, lse: Array) -> Array:
    """Return what `lse`, the rounded sum of ``log(total)`` and ``top``, lacks (Knuth's two-sum)."""
    _, total, top = summary
    log, finite = xp.log(nonzero(xp, total)), xp.isfinite(lse)
    lse = xp.where(finite, lse, xp.zeros_like(lse))
    part = lse - top
    low = (top - (lse - part)) + (log - part)
    return xp.where(finite, low, xp.zeros_like(low))


def unfinish(xp: Any, out: Array, lse: Array) -> Summary:
    """Return a summary whose `finish` is ``(out, lse)``, in the dtype of `lse`."""
    nothing = lse == -float("inf")
    lowest = xp.new(lse, (), float(xp.finfo(lse.dtype).min), lse.dtype)
    total = xp.cast(~nothing, lse.dtype)
    acc = xp.cast(out, lse.dtype)
    acc = xp.where(nothing, xp.zeros_like(acc), acc)
    return acc, total, xp.where(nothing, lowest, lse)
