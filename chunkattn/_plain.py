"""A call in the terms of the frameworks' own kernels."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from ._problem import heads_first
from ._spec import Spec

Array = Any

# Queries of all heads that share a head of keys, up to which they are one head's: where an array is
# added to the scores, and else.
FOLDED, FOLDED_ALONE = 64, 256


class Plain(NamedTuple):
    """A call that kernels know: arrays (b, h, n, d), perhaps fewer heads of key and value."""

    query: Array
    key: Array
    value: Array
    causal: bool  # with query 0 and key 0 at the same position
    scale: float
    added: Array | None = None  # to the scores: (b or 1, h or 1, n_q or 1, n_k or 1)


def plain(xp: Any, spec: Spec, inputs: dict[str, Array], causal: bool, scale: float) -> Plain:
    """Return a call in the terms of kernels."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    if not _is_plain(spec):
        query, key, value = (four(xp, spec, x) for x in (query, key, value))
    if is_folded(spec, causal):
        query = like(xp, query, (*key.shape[:2], spec.group * spec.n_q, query.shape[-1]))
    return Plain(query, key, value, causal, scale)


def is_folded(spec: Spec, causal: bool) -> bool:
    """Whether the few queries of a group of heads are given as those of one head.

    So keys are read once for these heads.
    """
    return spec.group > 1 and not causal and spec.group * spec.n_q <= FOLDED_ALONE


def _is_plain(spec: Spec) -> bool:
    return spec.layout == "hnd" and len(spec.batch) == 1


def four(xp: Any, spec: Spec, x: Array) -> Array:
    """Return an array with the caller's axes as (b, h, n, width)."""
    if _is_plain(spec):
        return x
    x = heads_first(xp, spec, x)
    return like(xp, x, (prod(spec.batch), *x.shape[-3:]))


def like(xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
    """Return `x` in this shape, itself where it has it."""
    return x if tuple(x.shape) == shape else xp.reshape(x, shape)
