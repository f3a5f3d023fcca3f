"""Products of matrices in pieces so small that OpenBLAS reads them where they lie.

OpenBLAS copies both matrices of a product into the order in which its kernels read them.  That pays
where each number is used often; those of a tile are used as often as a head is wide.  For CPUs with
AVX-512 it has kernels that copy nothing, and takes them for products of at most 10⁶ multiplications
(``sgemm_small_kernel_permit_skylakex.c`` there, and the same for float64), but hardly where the
second matrix is transposed: its columns are put in order here, once for all rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

LIMIT = 1_000_000  # multiplications of a piece
COLS = 64  # of a piece, where columns are put in order
ROWS = (64, 32, 16, 8)


def fill(out: Array, a: Array, b: Array) -> bool:
    """Put ``a @ b`` into `out` piece by piece; return False where whole it takes as long.

    `out` is of shape (…, rows, cols), with the leading axes that those of `a` and `b` broadcast to.
    """
    rows, cols = out.shape[-2:]
    depth, transposed = a.shape[-1], b.strides[-1] != b.itemsize
    width = min(cols, COLS) if transposed else cols
    height = next((n for n in ROWS if n * width * depth <= LIMIT), None)
    if height is None or rows * cols * depth <= LIMIT:
        return False
    for right in _pieces(cols, width):
        matrices = _split(b[..., right], -1, width).swapaxes(-3, -2)  # (…, count, depth, width)
        matrices = (_ordered(matrices) if transposed else matrices)[..., None, :, :, :]
        for upper in _pieces(rows, height):
            to = _split(_split(out[..., upper, right], -1, width), -3, height).swapaxes(-3, -2)
            np.matmul(_split(a[..., upper, :], -2, height)[..., None, :, :], matrices, out=to)
    return True


def _pieces(length: int, size: int) -> list[slice]:
    """Return the part of an axis that pieces of this size fill, and the rest if there is one."""
    whole = length - length % size
    return [part for part in (slice(0, whole), slice(whole, length)) if part.start < part.stop]


def _split(x: Array, axis: int, size: int) -> Array:
    """Return a view with one axis (< 0) as two, of pieces and of what is in them."""
    length = x.shape[axis]
    size = min(size, length)
    end = x.shape[axis:][1:]
    return x.reshape(*x.shape[:axis], length // size, size, *end)


def _ordered(x: Array) -> Array:
    """Return a copy in the order of the axes."""
    copy = np.empty(x.shape, x.dtype)
    np.copyto(copy, x)
    return copy
