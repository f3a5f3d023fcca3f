"""Products of matrices in pieces so small that OpenBLAS reads them where they lie.

OpenBLAS copies both matrices of a product into the order in which its kernels read them.  That pays
where each number is used often; those of a tile are used as often as a head is wide, or as there
are queries.  For CPUs with AVX-512 it has kernels that copy nothing, and takes them for products of
at most 10⁶ multiplications; where the second matrix is transposed also of at most 1200 results
(``sgemm_small_kernel_permit_skylakex.c`` there, and much the same for float64).  For many rows such
a matrix is rather put in order here, once for all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

LIMIT = 1_000_000  # multiplications of a piece
ROWS = (64, 32, 16, 8)
COLS = 64  # of a piece whose columns are put in order
FEW = 16  # rows for which one thread takes less time by pieces than several do by whole products
MANY = 65  # rows from which it pays to put columns in order
TURNED, DEEP = 1_200, 32  # results of a piece whose columns are not, and the least depth for it
LONGEST, RUN = 768, 512  # depth from which sums are taken in runs, since BLAS's kernels round each


def fill(out: Array, a: Array, b: Array, several: bool) -> bool:
    """Put ``a @ b`` into `out` piece by piece; return False where whole it takes as long.

    `out` is of shape (…, rows, cols), with the leading axes that those of `a` and `b` broadcast to.
    `several` says whether BLAS has one thread, since there are several tasks.
    """
    rows, cols = out.shape[-2:]
    depth, step = a.shape[-1], b.strides
    if rows == 1 or not (several or rows <= FEW):  # one row is no product of matrices to BLAS
        return False
    if step[-1] != b.itemsize and step[-2] == b.itemsize and rows < MANY and depth >= DEEP:
        height = min(rows, FEW)
        width = 1 << (TURNED // height).bit_length() - 1
        small = rows * cols <= TURNED or height * width * depth > LIMIT
        return not small and _multiply(out, a, b, height, width)
    if rows * cols * depth <= LIMIT:
        return False
    if depth > LONGEST:
        return _sum_up(out, a, b, several)
    order = step[-1] != b.itemsize
    width = min(cols, COLS) if order else cols
    height = next((n for n in ROWS if n * width * depth <= LIMIT), 0)
    return height > 0 and _multiply(out, a, b, height, width, order)


def _multiply(out: Array, a: Array, b: Array, height: int, width: int, order: bool = False) -> bool:
    """Fill `out` by pieces of at most `height` rows and `width` columns, these put in `order`."""
    for right in _pieces(out.shape[-1], width):
        matrices = _split(b[..., right], -1, width).swapaxes(-3, -2)  # (…, count, depth, width)
        matrices = (_ordered(matrices) if order else matrices)[..., None, :, :, :]
        for upper in _pieces(out.shape[-2], height):
            to = _split(_split(out[..., upper, right], -1, width), -3, height).swapaxes(-3, -2)
            np.matmul(_split(a[..., upper, :], -2, height)[..., None, :, :], matrices, out=to)
    return True


def _sum_up(out: Array, a: Array, b: Array, several: bool) -> bool:
    """Fill `out` by the sum of products of less depth, each in pieces where that pays."""
    large = out.shape[-2] * out.shape[-1] * RUN > LIMIT
    into = out
    for begin in range(0, a.shape[-1], RUN):
        given = a[..., begin : begin + RUN], b[..., begin : begin + RUN, :]
        if not (large and fill(into, *given, several)):
            np.matmul(*given, out=into)
        if begin:
            out += into
        else:
            into = np.empty_like(out)
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
