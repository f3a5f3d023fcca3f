"""Masks that know which keys a range of queries can see, so that whole tiles are skipped.

A mask is small and immutable.  `chunkattn.attention` asks it two things about a range of queries
(the keys that any of them may see, and the keys that all of them see) and, for the tiles in
between, which pairs are allowed.  Nothing of size ``n_q × n_k`` is ever built.

Positions are counted as in `attention`: query ``i`` stands at ``i + query_offset``, key ``j`` at
``j + key_offset``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._array_masks import Dense, Segments
from ._checks import whole
from ._mask import Mask, Range

if TYPE_CHECKING:
    from ._rows import Rows, Span
    from ._shapes import Shapes
    from ._tiles import Tile

Array = Any

__all__ = ["Causal", "Dense", "Lengths", "Mask", "Predicate", "Segments", "Window"]


@dataclass(frozen=True)
class Causal(Mask):
    """Allow the keys whose position is at most the query's: ``kv_idx <= q_idx``.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention, masks
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 10, 4))
    >>> out = attention(q, k, v, mask=masks.Causal())
    >>> np.allclose(out[0], v[0])
    True
    """

    aligned = True
    tile_axes = "qk"  # those of positions
    tile_limit = 512  # half of a tile on the diagonal is not seen

    def key_range(self, rows: Span) -> Range:
        """Up to the position of the last query."""
        return None, rows.last + 1

    def full_range(self, rows: Rows) -> Range:
        """Up to the position of the first query."""
        return None, rows.first + 1

    def has_gaps(self, rows: Rows) -> bool:
        """Return False: a run of keys has none."""
        return False

    def tile(self, tile: Tile) -> Array:
        """Compare positions."""
        return tile.kv_idx <= tile.q_idx


@dataclass(frozen=True)
class Window(Mask):
    """Allow the keys around the query: ``-left <= kv_idx - q_idx <= right``.

    Parameters
    ----------
    left, right : int or None
        How many keys before and after the query's own position it sees; None: all of them.
        ``Window(127, 0)`` is a causal window of 128 keys.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention, masks
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 10, 4))
    >>> np.allclose(attention(q, k, v, mask=masks.Window(0, 0)), v)
    True
    """

    left: int | None
    right: int | None

    aligned = True
    tile_axes = "qk"  # those of positions

    @property
    def tile_arrays(self) -> int:
        """One for each end."""
        return 1 if None in (self.left, self.right) else 2

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            width = getattr(self, name)
            if width is None:
                continue
            if (number := whole(width)) is None:
                raise TypeError(f"Window: {name} must be an int or None; got {width!r}")
            if number < 0:
                raise ValueError(f"Window: {name} must not be negative; got {number}")
            object.__setattr__(self, name, number)  # of an array without axes, too

    def check(self, xp: Any, shapes: Shapes) -> None:
        """Refuse a width that carries positions out of the index dtype."""
        limit = int(xp.iinfo(xp.index_dtype).max) // 2
        for name, width in (("left", self.left), ("right", self.right)):
            if width is not None and width >= limit:
                raise ValueError(
                    f"Window: {name} must be below {limit}, half of {xp.index_dtype}, or None "
                    f"for no bound; got {width}"
                )

    def key_range(self, rows: Span) -> Range:
        """From the first query's left to the last query's right."""
        return (
            None if self.left is None else rows.first - self.left,
            None if self.right is None else rows.last + self.right + 1,
        )

    def full_range(self, rows: Rows) -> Range:
        """From the last query's left to the first query's right."""
        return (
            None if self.left is None else rows.last - self.left,
            None if self.right is None else rows.first + self.right + 1,
        )

    def has_gaps(self, rows: Rows) -> bool:
        """Return False: a run of keys has none."""
        return False

    def tile(self, tile: Tile) -> Array | None:
        """Compare key positions with those of the window's ends."""
        allowed = None
        if self.left is not None:
            allowed = tile.kv_idx >= tile.q_idx - self.left
        if self.right is not None:
            before_end = tile.kv_idx <= tile.q_idx + self.right
            if allowed is None:
                return before_end
            allowed &= before_end
        return allowed

    @property
    def tile_limit(self) -> int | None:
        """About the width of the window."""
        if self.left is None or self.right is None:
            return None if self.left is self.right else 512
        return min(512, max(128, self.left + self.right))


@dataclass(frozen=True)
class Lengths(Mask):
    """Allow the keys and queries within the valid length of each batch entry (padding).

    Parameters
    ----------
    query : integer array over the batch axes, optional
        Valid queries, counted by index; those past it see nothing and get 0.
    key : integer array over the batch axes, optional
        Valid keys, counted by position; those past it are not seen.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention, masks
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 1, 10, 4))
    >>> out = attention(q, k, v, mask=masks.Lengths(key=np.asarray([10, 7])))
    >>> np.allclose(out[1], attention(q[1], k[1, :, :7], v[1, :, :7]))
    True
    """

    query: Array | None = None
    key: Array | None = None

    def __post_init__(self) -> None:
        for name in ("query", "key"):
            lengths = getattr(self, name)
            if lengths is not None and not hasattr(lengths, "dtype"):
                raise TypeError(f"Lengths: {name} must be an integer array; got {lengths!r}")

    @property
    def tile_axes(self) -> str:
        """Those that there are lengths for."""
        return "b" + "q" * (self.query is not None) + "k" * (self.key is not None)

    def check(self, xp: Any, shapes: Shapes) -> None:
        """Refuse lengths that are not integers or do not broadcast to the batch."""
        for name, lengths in (("query", self.query), ("key", self.key)):
            if lengths is not None:
                shapes.check_integers(xp, f"Lengths: {name}", lengths, shapes.batch)

    def key_range(self, rows: Span) -> Range:
        """Up to the largest length; nothing where all queries are past theirs."""
        return self._range(rows, "max", rows.start)

    def full_range(self, rows: Rows) -> Range:
        """Up to the smallest length; nothing where any query is past its own."""
        return self._range(rows, "min", rows.start + rows.size - 1)

    def has_gaps(self, rows: Rows) -> bool:
        """Return False: a run of keys has none."""
        return False

    @staticmethod
    def _lengths(rows: Span, lengths: Array) -> Array:
        return rows.of_batch(rows.xp.cast(lengths, rows.xp.index_dtype))

    def _range(self, rows: Span, extreme: str, index: Any) -> Range:
        xp, stop = rows.xp, None
        if self.key is not None:
            stop = xp.as_index(getattr(xp, extreme)(self._lengths(rows, self.key)))
        if self.query is not None:
            valid = xp.as_index(getattr(xp, extreme)(self._lengths(rows, self.query)))
            seen = xp.smaller(xp.larger(valid - index, 0), 1)  # 1 where query `index` is valid
            end = rows.key_offset + seen * rows.n_k
            stop = end if stop is None else xp.smaller(stop, end)
        return None, stop

    def tile(self, tile: Tile) -> Array | None:
        """Compare key positions and query indices with the lengths."""
        rows, allowed = tile.rows, None
        if self.key is not None:
            allowed = tile.kv_idx < self._lengths(rows, self.key)[..., None, None, None]
        if self.query is not None:
            valid = tile.q_number < self._lengths(rows, self.query)[..., None, None, None]
            allowed = valid if allowed is None else allowed & valid
        return allowed


@dataclass(frozen=True)
class Predicate(Mask):
    """Allow the pairs for which a function says so.

    Parameters
    ----------
    mask_mod : callable(b, h, q_idx, kv_idx)
        FlexAttention's signature.  It is called as a `score_mod` of `attention` is, once per tile
        and for some purposes again, with integer arrays of the caller's library that broadcast
        against (…, h, queries, keys): the row-major number of the batch entry, the query head, and
        the positions of query and key.  It returns a boolean array that does so, too.

    Notes
    -----
    Each tile is evaluated; on a CPU, with NumPy, PyTorch and JAX, those without an allowed pair are
    computed no further.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 10, 4))
    >>> out = attention(q, k, v, mask=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    >>> np.allclose(out, attention(q, k, v, causal=True))
    True
    """

    mask_mod: Callable[[Array, Array, Array, Array], Array]

    tile_limit = 512  # the function's own arrays are as large as a tile, and often of 64 bits

    def __post_init__(self) -> None:
        if not callable(self.mask_mod):
            raise TypeError(f"Predicate: mask_mod must be callable; got {self.mask_mod!r}")

    def tile(self, tile: Tile) -> Array:
        """Call the function."""
        return self.of(tile.b, tile.h, tile.q_idx, tile.kv_idx)

    def of(self, *place: Array) -> Array:
        """Return what the function says of a batch entry, a head and two positions."""
        return self.mask_mod(*place)


# Those that are told by their class and their fields: without a function of the caller.
TOLD = frozenset({Causal, Dense, Lengths, Segments, Window})
