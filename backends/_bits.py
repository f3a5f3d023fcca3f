"""Masking by the bits of numbers, which takes as long for any mask.

A masked assignment branches at every number.  Where a mask has no runs, as dropout's, the processor
guesses many of the branches wrong, and that takes longer than the exponential of the scores.
"""

from __future__ import annotations

from math import prod
from typing import Any

Array = Any

FEW = 2**15  # numbers for which an assignment takes less time


def hide(xp: Any, x: Array, allowed: Array, fill: float) -> Array:
    """Overwrite `x` with `fill` where not `allowed`, and return it; `xp` is an adapter.

    The mask is made of integers as wide as the numbers, for as many of them at a time as take no
    more than a byte for each number of `x`.
    """
    bits = x.view(getattr(xp, f"int{8 * x.itemsize}"))
    filled = xp.new(x, (), fill, x.dtype).view(bits.dtype)
    count = -(-x.itemsize * prod(allowed.shape) // prod(x.shape))
    axis = -2 if x.shape[-2] >= count else -1
    length = x.shape[axis]
    step = -(-length // count)
    broadcasts = allowed.ndim < -axis or allowed.shape[axis] == 1
    for start in range(0, length, step):
        piece = axis, start, min(step, length - start)
        told = allowed if broadcasts else xp.read(allowed, *piece)
        _overwrite(xp, xp.read(bits, *piece), told, filled)
    return x


def barrier(xp: Any, allowed: Array, dtype: Any) -> Array:
    """Return 0 where `allowed`, whose number has no bits, and -inf elsewhere."""
    told = xp.finfo(dtype)
    bits = xp.cast(allowed, xp.int64 if told.bits == 64 else xp.int32)
    bits -= 1  # all bits where it is hidden
    bits &= -int(1 / told.eps)  # the bits of -inf: those of sign and exponent
    return bits.view(dtype)


def _overwrite(xp: Any, bits: Array, allowed: Array, filled: Array) -> None:
    """Overwrite integers with one of them where not `allowed`."""
    ones = xp.cast(allowed, bits.dtype)
    if not filled:
        ones *= -1  # all bits where the pair is allowed, none elsewhere
        bits &= ones
        return
    ones -= 1  # all bits where it is hidden
    bits |= ones
    ones &= ~filled
    bits ^= ones
