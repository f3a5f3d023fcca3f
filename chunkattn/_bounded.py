"""Scores that are known to be small before any is computed: their softmax needs no maximum.

By the inequality of Cauchy and Schwarz no score is further from 0 than the longest query times the
longest key times the scale.  Where that is little, the weights may be the exponentials themselves:
one pass less over every tile.
"""

from __future__ import annotations

from typing import Any

from ._problem import Problem

Array = Any

# Of a score: sums of 2**24 numbers of e**24, or of e**-24, are far from overflow and underflow.
LARGEST = 24.0


def may_be_bounded(problem: Problem, names: tuple[str, ...]) -> bool:
    """Whether to ask `is_unbounded` before results of these `names` are computed.

    Not where scores have more in them than products; nor for derivatives, which want an `lse` with
    more digits than the logarithm of a large sum has.
    """
    more = (problem.bias, problem.sinks, problem.spec.score_mod)
    plain = "low" not in names and all(x is None for x in more)
    return plain and bool(problem.xp.seeks_bound(problem.spec))


def is_unbounded(problem: Problem) -> Array:
    """Return whether scores may be further than `LARGEST` from 0: a boolean without axes."""
    bound = problem.scale * _longest(problem, problem.query) * _longest(problem, problem.key)
    return ~(abs(bound) <= LARGEST)  # nor is NaN within it


def _longest(problem: Problem, x: Array) -> Array:
    """Return the largest norm of the rows of `x`."""
    xp = problem.xp
    x = xp.cast(x, problem.spec.compute)
    return xp.sqrt(xp.max(xp.sum(x * x, axis=-1)))
