"""Masks that know which keys a range of queries can see, so that whole tiles are skipped.

A mask is small and immutable.  `attention` asks it two things about a range of queries (the keys
that any of them may see, and the keys that all of them see) and, for the tiles in between, which
pairs are allowed.  Nothing of size ``n_q × n_k`` is ever built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._tiles import Rows, Tile

Array = Any
Range = tuple[Any, Any]  # (first, one past the last) key position; None where unbounded

UNBOUNDED: Range = (None, None)


@dataclass(frozen=True)
class Mask:
    """Which pairs of a query and a key may attend: the base class of all masks.

    A subclass is a frozen dataclass that defines `tile`, and `key_range` where it can tell more
    than nothing.  `full_range` spares the fully visible tiles the call of `tile`.
    """

    #: True where the mask speaks of positions in a sequence, whose alignment must then be known
    aligned = False
    #: False where the mask indexes arrays of one call, which a stream of keys has none of
    positional = True

    def key_range(self, rows: Rows) -> Range:
        """Return the range of key positions outside of which no query of `rows` sees a key."""
        return UNBOUNDED

    def full_range(self, rows: Rows) -> Range | None:
        """Return a range of key positions that every query of `rows` sees; None: none known."""
        return None

    def tile(self, tile: Tile) -> Array | None:
        """Return the allowed pairs of `tile` as a boolean array that broadcasts against it.

        None means that all are allowed.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Causal(Mask):
    """Allow the keys whose position is at most the query's: ``kv_idx <= q_idx``."""

    aligned = True

    def key_range(self, rows: Rows) -> Range:
        """Up to the position of the last query."""
        return None, rows.last + 1

    def full_range(self, rows: Rows) -> Range:
        """Up to the position of the first query."""
        return None, rows.first + 1

    def tile(self, tile: Tile) -> Array:
        """Compare positions."""
        return tile.kv_idx <= tile.q_idx


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """Allow the pairs where a boolean array that broadcasts to ``(…, h, n_q, n_k)`` is True."""

    allowed: Array

    positional = False

    def tile(self, tile: Tile) -> Array:
        """Slice the array."""
        return tile.slice(self.allowed)
