"""The base class of all masks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import starmap
from typing import TYPE_CHECKING, Any

from ._adapters import is_array

if TYPE_CHECKING:
    from ._rows import Rows, Span
    from ._shapes import Shapes
    from ._tiles import Tile

Array = Any
Range = tuple[Any, Any]  # (first, one past the last) key position; None where unbounded


@dataclass(frozen=True)
class Mask:
    """Which pairs of a query and a key may attend: the base class of all masks.

    A mask of your own is a frozen dataclass that derives from this class and defines `tile`, and
    `key_range` where it can tell which keys are out of reach.  Fields that hold arrays are data
    (JAX may trace them); all other fields must be hashable.

    Attributes
    ----------
    aligned : bool
        Whether the mask compares the positions of queries with those of keys, so that
        `attention` must know how the two are aligned.  Default False.
    positional : bool
        Whether the mask speaks of positions alone; False where it indexes arrays of one call,
        which a stream does not have.  Default True.

    Examples
    --------
    Every key of the query's own block of 16:

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> from chunkattn import attention, masks
    >>> @dataclass(frozen=True)
    ... class Blocks(masks.Mask):
    ...     size: int
    ...
    ...     def key_range(self, rows):
    ...         first, last = rows.first // self.size, rows.last // self.size
    ...         return first * self.size, (last + 1) * self.size
    ...
    ...     def tile(self, tile):
    ...         return tile.q_idx // self.size == tile.kv_idx // self.size
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
    >>> attention(q, k, v, mask=Blocks(16)).shape
    (64, 8)
    """

    aligned = False
    positional = True

    def key_range(self, rows: Span) -> Range:
        """Return the range of key positions outside of which no query of `rows` sees a key.

        Parameters
        ----------
        rows : Span
            The queries: ``rows.first`` and ``rows.last`` are their smallest and largest position.

        Returns
        -------
        tuple
            ``(first, one past the last)``; None for an end that is not bounded (the default).
        """
        return None, None

    def full_range(self, rows: Rows) -> Range | None:
        """Return a range of key positions that every query of `rows` sees; None: none known.

        Tiles in this range are not masked at all.
        """
        return None

    def has_gaps(self, rows: Rows) -> bool:
        """Return whether tiles within `key_range` may be empty (the default).

        These are skipped, too, where it can be found out in time: on a CPU, with NumPy, PyTorch and
        JAX.
        """
        return True

    def tile(self, tile: Tile) -> Array | None:
        """Return which pairs of `tile` may attend.

        Parameters
        ----------
        tile : Tile
            ``tile.q_idx`` and ``tile.kv_idx`` are the positions of its queries and keys,
            ``tile.b`` and ``tile.h`` batch entries and heads, all integer arrays that broadcast
            against (…, h, queries, keys); ``tile.xp`` has the functions of the array library.

        Returns
        -------
        boolean array or None
            Broadcasts against the tile; None where all pairs are allowed.
        """
        raise NotImplementedError

    def check(self, xp: Any, shapes: Shapes) -> None:
        """Refuse arrays that do not fit a call of these shapes."""

    @property
    def tile_axes(self) -> str:
        """Which axes the result of `tile` has: batch, heads, queries, keys.

        Along the others all is the same, and is computed once.
        """
        return "bhqk"

    @property
    def tile_arrays(self) -> int:
        """How many arrays of the size of its result `tile` makes, for `plan`."""
        return 1

    @property
    def key_arrays(self) -> int:
        """How many bytes for each key of a batch entry `key_range` takes, for `plan`."""
        return 0

    @property
    def tile_limit(self) -> int | None:
        """The size from which a tile would cover much that is not seen; None: no such size."""
        return None


def each_of(mask: Any) -> tuple[Any, ...]:
    """Return what the argument `mask` holds, one by one."""
    return mask if isinstance(mask, tuple) else () if mask is None else (mask,)


def arrays_of(mask: Mask) -> dict[str, Array]:
    """Return the arrays that a mask holds, and the tuples of arrays, by field name."""
    values = ((field.name, getattr(mask, field.name)) for field in fields(mask))
    return {
        name: x
        for name, x in values
        if is_array(x) or (isinstance(x, tuple) and any(map(is_array, x)))
    }


def without_arrays(mask: Mask) -> Mask:
    """Return a mask with None in the place of its arrays: hashable, for a `Spec`."""
    return _with_fields(mask, dict.fromkeys(arrays_of(mask)))


def with_arrays(masks: tuple[Mask, ...], data: dict[str, Any]) -> tuple[Mask, ...]:
    """Return the masks of a `Spec` with their arrays, which are in the data of the call."""
    return tuple(starmap(_with_fields, zip(masks, data["masks"], strict=True)))


def _with_fields(mask: Mask, changed: dict[str, Any]) -> Mask:
    """Return a mask with other values of some fields, which its class is not asked about again."""
    if not changed:
        return mask
    found = object.__new__(type(mask))
    for name in (field.name for field in fields(mask)):
        object.__setattr__(found, name, changed[name] if name in changed else getattr(mask, name))
    return found
