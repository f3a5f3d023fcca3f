"""Some of a call's scores: those of a chunk of its queries with a chunk of its keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ._cached import cached_property
from ._callables import allowed_by
from ._dropout import kept
from ._rows import Rows

Array = Any
Index = Any  # an int, or a traced integer


@dataclass(frozen=True)
class Tile:
    """The scores of `rows` with the keys ``start … start + size - 1``: (…, h, rows, keys)."""

    rows: Rows
    start: Index
    size: int
    masked: bool
    # What `is_seen` has looked at, by the mask's number, until `allowed` takes it.
    _known: dict[int, Array | None] = field(init=False, compare=False, default_factory=dict)

    @property
    def xp(self) -> Any:
        """The library's adapter."""
        return self.rows.xp

    def is_seen(self) -> Array | bool:
        """Whether each mask allows some pair, as far as that is looked up, for `when`."""
        xp, rows, seen = self.xp, self.rows, True
        if self.masked and xp.looks(rows.query):
            for i, mask in enumerate(rows.problem.masks):
                if mask.has_gaps(rows):
                    found = self._known[i] = allowed_by(mask, self)
                    if found is not None:
                        seen = seen & xp.any(xp.some(found))
        return seen

    def allowed(self) -> Iterator[Array]:
        """Yield what each mask allows, where it forbids some pair; the tile does not keep it."""
        if self.masked:
            for i, mask in enumerate(self.rows.problem.masks):
                found = self._known.pop(i) if i in self._known else allowed_by(mask, self)
                if found is not None:
                    yield found
                    found = None  # before the next one is made

    @cached_property
    def q_idx(self) -> Array:
        """Query positions, broadcasting against the tile."""
        return self.q_number + self.rows.offset

    @cached_property
    def q_number(self) -> Array:
        """Query indices (positions without the offset), broadcasting against the tile."""
        rows = self.rows
        index = self.xp.index(rows.query, rows.size)[:, None] + rows.start
        return rows.problem.aligned(index)

    @cached_property
    def kv_idx(self) -> Array:
        """Key positions, broadcasting against the tile."""
        rows = self.rows
        index = self.xp.index(rows.query, self.size) + (self.start + rows.key_offset)
        return rows.problem.aligned(index)

    @cached_property
    def b(self) -> Array:
        """Row-major numbers of the batch entries, broadcasting against the tile."""
        rows = self.rows
        batch = rows.problem.spec.batch
        index = self.xp.reshape(self.xp.index(rows.query, prod(batch)), batch)
        return rows.of_batch(index)[..., None, None, None]

    @cached_property
    def h(self) -> Array:
        """Query heads, broadcasting against the tile."""
        rows = self.rows
        index = rows.of_heads(self.xp.index(rows.query, rows.problem.spec.heads))
        return rows.problem.aligned(index[:, None, None])

    def slice(self, x: Array) -> Array:
        """Return the tile's part of an array that broadcasts to ``(…, h, n_q, n_k)``."""
        rows = self.rows
        cuts = (*rows.heads, (rows.start, rows.size), (self.start, self.size))
        return rows.part(rows.problem.aligned(x), cuts)

    @property
    def hides(self) -> bool:
        """Whether a query may not see some key of this tile."""
        problem = self.rows.problem
        return self.masked or problem.bias is not None or problem.spec.score_mod is not None

    @cached_property
    def kept(self) -> Array:
        """Which weights the dropout keeps: booleans (…, h, rows, keys)."""
        return kept(self, self.rows.problem.spec.dropout)

    def of(self, rows: Rows) -> Tile:
        """Return the same pairs for other rows."""
        return Tile(rows, self.start, self.size, self.masked)

    def _read(self, x: Array) -> Array:
        x = self.rows.part(x, (*self.rows.block, (self.start, self.size)))
        return self.xp.cast(x, self.rows.problem.spec.compute)

    @property
    def key(self) -> Array:
        """The tile's keys in the compute dtype: (…, h_k, size, d)."""
        return self._read(self.rows.problem.key)

    @property
    def value(self) -> Array:
        """The tile's values in the compute dtype: (…, h_k, size, d_v)."""
        return self._read(self.rows.problem.value)


def only_tile(rows: Rows) -> Tile | None:
    """Return the tile of these queries if there is but one, and no sinks beside it."""
    problem, spec = rows.problem, rows.problem.spec
    if not spec.one_tile or problem.sinks is not None:
        return None
    return Tile(rows, 0, spec.n_k, bool(problem.masks))
