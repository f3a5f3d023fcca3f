"""Masks that index arrays of one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._mask import Mask, Range

if TYPE_CHECKING:
    from ._rows import Rows, Span
    from ._shapes import Shapes
    from ._tiles import Tile

Array = Any


def _run(xp: Any, hit: Array) -> tuple[Array, Array, Array]:
    """Return along the last axis the first hit, what follows the last, and whether all between hit.

    Where there is no hit, the first two are equal.
    """
    hit = xp.astype(hit, xp.int8)
    start = xp.argmax(hit, axis=-1)
    stop = hit.shape[-1] - xp.argmax(xp.flip(hit, axis=-1), axis=-1)
    count = xp.sum(hit, axis=-1, dtype=start.dtype)
    stop = xp.where(count > 0, stop, start)
    return start, stop, count == stop - start


def _positions(rows: Span, start: Array, stop: Array) -> Range:
    """Return the positions of two key indices."""
    offset = rows.key_offset
    return rows.xp.as_index(start) + offset, rows.xp.as_index(stop) + offset


def axes_of_pairs(x: Array) -> str:
    """Return the axes of an array of pairs that do not broadcast: batch, heads, queries, keys."""
    *batch, heads, rows, cols = (1, 1, 1, *tuple(x.shape))
    lengths = zip("bhqk", (max((1, *batch)), heads, rows, cols), strict=True)
    return "".join(axis for axis, n in lengths if n != 1)


@dataclass(frozen=True)
class Segments(Mask):
    """Allow the pairs of equal ids: several documents packed into one sequence.

    Parameters
    ----------
    query : integer array of shape (…, n_q) over the batch axes
        The segment of each query.
    key : integer array of shape (…, n_k), optional
        The segment of each key; default: that of the query of the same index.

    Notes
    -----
    Ids may stand in any order.  Where each query chunk meets few ids and these stand together, as
    when they are sorted, the tiles of other segments are skipped.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention, masks
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 10, 4))
    >>> out = attention(q, k, v, mask=masks.Segments(np.asarray([0] * 6 + [1] * 4)))
    >>> np.allclose(out[6:], attention(q[6:], k[6:], v[6:]))
    True
    """

    query: Array
    key: Array | None = None

    positional = False
    tile_axes = "bqk"  # one for each batch entry
    tile_limit = 256  # documents are often short
    key_arrays = 5  # comparisons with the ids of the queries

    def __post_init__(self) -> None:
        for name in ("query", "key"):
            ids = getattr(self, name)
            if ids is not None and not hasattr(ids, "dtype"):
                raise TypeError(f"Segments: {name} must be an integer array; got {ids!r}")

    def check(self, xp: Any, shapes: Shapes) -> None:
        """Refuse ids that are not integers, one for each query and key."""
        if self.key is None and shapes.n_q != shapes.n_k:
            lengths = f"n_q = {shapes.n_q} and n_k = {shapes.n_k}"
            raise ValueError(f"Segments: key must be given where {lengths} differ")
        for name, ids, n in (("query", self.query, shapes.n_q), ("key", self._keys, shapes.n_k)):
            shapes.check_integers(xp, f"Segments: {name}", ids, (*shapes.batch, n), n)

    @property
    def _keys(self) -> Array:
        return self.query if self.key is None else self.key

    def key_range(self, rows: Span) -> Range:
        """From the first key to the last one whose id lies among the queries'."""
        xp = rows.xp
        start, stop, _ = self._runs(rows)
        return _positions(rows, xp.min(start), xp.max(stop))

    def full_range(self, rows: Rows) -> Range:
        """Return the run of keys with the queries' id, where there is one of each."""
        xp = rows.xp
        start, stop, whole = self._runs(rows)
        return _positions(rows, xp.max(start), xp.min(xp.where(whole, stop, start)))

    def has_gaps(self, rows: Rows) -> bool:
        """Return False: there are none where ids are sorted, and few where they are not."""
        return False

    def _runs(self, rows: Span) -> tuple[Array, Array, Array]:
        """Return by batch entry the key indices from first to last hit, and whether all in it hit.

        A key is hit where its id lies between the smallest and the largest of the queries'.
        """
        xp = rows.xp
        queries = xp.read(rows.of_batch(self.query, 1), -1, rows.start, rows.size)
        keys = rows.of_batch(self._keys, 1)
        queries, keys = xp.ordered(queries, keys)
        low = xp.min(queries, axis=-1, keepdims=True)
        high = xp.max(queries, axis=-1, keepdims=True)
        start, stop, one = _run(xp, (keys >= low) & (keys <= high))
        return start, stop, (low == high)[..., 0] & one

    def tile(self, tile: Tile) -> Array:
        """Compare ids."""
        rows, xp = tile.rows, tile.xp
        queries = xp.read(rows.of_batch(self.query, 1), -1, rows.start, rows.size)
        keys = xp.read(rows.of_batch(self._keys, 1), -1, tile.start, tile.size)
        return queries[..., None, :, None] == keys[..., None, None, :]


@dataclass(frozen=True)
class Dense(Mask):
    """Allow the pairs where a boolean array is True.

    Parameters
    ----------
    allowed : boolean array
        Broadcasts to ``(…, h, n_q, n_k)``; it is sliced tile by tile and never expanded.

    Notes
    -----
    The keys that a chunk of queries sees are looked up in the array, so that tiles before the first
    and behind the last of them are skipped; with NumPy, and PyTorch on a CPU, empty tiles between
    them, too.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention, masks
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 10, 4))
    >>> out = attention(q, k, v, mask=masks.Dense(np.eye(10, dtype=bool)))
    >>> np.allclose(out, v)
    True
    """

    allowed: Array

    positional = False
    tile_arrays = 0  # it is a view

    def __post_init__(self) -> None:
        if not hasattr(self.allowed, "dtype"):
            raise TypeError(f"Dense: allowed must be a boolean array; got {self.allowed!r:.80}")

    def check(self, xp: Any, shapes: Shapes) -> None:
        """Refuse an array that is not boolean or does not broadcast to the scores."""
        shapes.check_mask(xp, "mask", self.allowed)

    def key_range(self, rows: Span) -> Range:
        """From the first key that some query sees to the last one."""
        part = self._part(rows)
        if part is None:
            return None, None
        start, stop, _ = _run(rows.xp, rows.xp.some(part))
        return _positions(rows, start, stop)

    def full_range(self, rows: Rows) -> Range | None:
        """Return the run of keys that all queries see, where there is one.

        None where the array is traced: a loop more to compile takes longer than it spares.
        """
        part, xp = self._part(rows), rows.xp
        if part is None or xp.traced(part):
            return None
        start, stop, one = _run(xp, xp.every(part))
        return _positions(rows, start, xp.where(one, stop, start))

    def has_gaps(self, rows: Rows) -> bool:
        """Return whether the array is not traced: a loop that branches would take longer."""
        return not rows.xp.traced(self.allowed)

    def _part(self, rows: Span) -> Array | None:
        """Return what these queries see; None where there is one tile, or that tells no keys."""
        spec = rows.problem.spec
        if self.tile_axes[-1:] != "k" or spec.n_k <= spec.schedule.key_chunk:
            return None
        return rows.part(rows.problem.aligned(self.allowed), (*rows.heads, (rows.start, rows.size)))

    def tile(self, tile: Tile) -> Array:
        """Slice the array."""
        return tile.slice(self.allowed)

    @property
    def tile_axes(self) -> str:
        """Those that do not broadcast."""
        return axes_of_pairs(self.allowed)

    @property
    def key_arrays(self) -> int:
        """Which keys are seen."""
        return 5 if self.tile_axes[-1:] == "k" else 0
