"""Some of a call's queries: a chunk of them, of one block of batch entries and heads."""

from __future__ import annotations

from math import prod
from typing import Any

from ._partial import Summary, empty, of_sinks
from ._problem import Problem
from ._spec import Cut

Array = Any
Index = Any  # an int, or a traced integer


class Span:
    """The queries ``start … start + size - 1`` of one block of batch entries and heads.

    Attributes
    ----------
    lead : tuple of int
        The shape (…, h, size) of these queries.
    heads : tuple of (int, int)
        The block's cuts, each a start and a size, of the batch axes and the axis of query heads.
    offset : int or array
        The position of query 0: an int, or integers that broadcast against the tile.
    key_offset, n_k : int
        The position of key 0, and the number of keys.
    """

    def __init__(self, problem: Problem, block: tuple[Cut, ...], start: Index, size: int) -> None:
        self.problem, self.block, self.start, self.size = problem, block, start, size
        self.xp, spec = problem.xp, problem.spec
        *batch, (key_head, count) = block
        self.heads = (*batch, (key_head * spec.group, count * spec.group))
        self.lead = (*(count for _, count in self.heads), size)
        self.offset, self.key_offset, self.n_k = problem.query_offset, problem.key_offset, spec.n_k
        if hasattr(self.offset, "shape"):
            self.offset = self.of_batch(self.offset)[..., None, None, None]

    def of_batch(self, x: Array, own: int = 0) -> Array:
        """Return this block's part of an array over the batch axes and `own` further axes."""
        batch = self.block[:-1]
        x = x[(None,) * (len(batch) + own - x.ndim) + (...,)]
        return self.part(x, batch)

    def of_heads(self, x: Array) -> Array:
        """Return this block's part of an array (h, …)."""
        return self.part(x, self.heads[-1:])

    def part(self, x: Array, cuts: tuple[Cut, ...]) -> Array:
        """Return a part of `x`, cut along its leading axes; those of length 1 broadcast and stay.

        It is one cut, so that no block is copied where a loop is traced.
        """
        lengths = zip(x.shape, cuts, strict=False)
        needed = [None if n == 1 or n == size else (start, size) for n, (start, size) in lengths]
        return self.xp.cut(x, needed) if any(needed) else x

    @property
    def first(self) -> Index:
        """The smallest position of these queries."""
        return self.start + self._offset_bound("min")

    @property
    def last(self) -> Index:
        """The largest position of these queries."""
        return self.start + self.size - 1 + self._offset_bound("max")

    def _offset_bound(self, extreme: str) -> Index:
        if not hasattr(self.offset, "shape"):
            return self.offset
        return self.xp.as_index(getattr(self.xp, extreme)(self.offset))


class Rows(Span):
    """A span with its queries.

    Attributes
    ----------
    query : array of shape (…, h_k, group · size, d)
        The queries times the scale, in the compute dtype; without a scale as `unscaled`.
    repeated : int
        How many of the queries an earlier chunk has had already.
    """

    def __init__(
        self,
        problem: Problem,
        block: tuple[Cut, ...],
        start: Index,
        size: int,
        repeated: Index = 0,
    ) -> None:
        super().__init__(problem, block, start, size)
        self.repeated = repeated
        self.query = self.unscaled
        if problem.scale is not None:
            self.query = self.grouped(self.query * problem.scale)

    @property
    def unscaled(self) -> Array:
        """The queries in the compute dtype: (…, h, size, d)."""
        query = self.read(self.problem.query)
        if tuple(query.shape[:-1]) != self.lead:  # so that scores have every batch axis
            query = self.xp.broadcast_to(query, (*self.lead, query.shape[-1]))
        return query

    def of(self, problem: Problem) -> Rows:
        """Return the same queries of another problem of the same shapes."""
        return Rows(problem, self.block, self.start, self.size, self.repeated)

    def read(self, x: Array) -> Array:
        """Return these queries' part of an array (…, h, n_q, width), in the compute dtype."""
        x = self.part(x, (*self.heads, (self.start, self.size)))
        return self.xp.cast(x, self.problem.spec.compute)

    def written(self, outputs: dict[str, Array], results: dict[str, Array]) -> dict[str, Array]:
        """Return `outputs` with the `results` of these queries in them, cast to their dtypes."""
        xp, spec = self.xp, self.problem.spec
        found = {}
        for name, x in outputs.items():
            result = xp.cast(results[name], spec.dtype if name == "out" else spec.compute)
            if x is not None:
                result = xp.write(x, result, self.corner(x, self.heads, self.start))
            found[name] = result
        return found

    def once(self, x: Array) -> Array:
        """Return `x` (…, size, width) with 0 for the queries that an earlier chunk has had."""
        if isinstance(self.repeated, int) and self.repeated == 0:
            return x
        new = self.xp.index(x, self.size)[:, None] >= self.repeated
        return self.xp.where(new, x, self.xp.zeros_like(x))

    def workspaces(self, count: int) -> list[Array | None]:
        """Return memory for the products of one tile, `count` times; None where none is wanted.

        It is asked for at once: of pieces, malloc gives more back to the system after each chunk.
        """
        spec = self.problem.spec
        size = prod(self.lead) * spec.schedule.key_chunk
        space = self.xp.workspace(self.query, count * size, spec.compute)
        return [None if space is None else space[i * size : (i + 1) * size] for i in range(count)]

    def corner(self, x: Array, cuts: tuple[Cut, ...], row: Index, col: Index = 0) -> list[Index]:
        """Return where in `x` the part begins that `cuts`, a row and a column tell."""
        starts = (*(start for start, _ in cuts), row, col)
        return [0 if n == 1 else start for n, start in zip(x.shape, starts, strict=True)]

    def nothing(self) -> Summary:
        """Return the summary before any key: empty, or with the sinks in it."""
        xp, spec, sinks = self.xp, self.problem.spec, self.problem.sinks
        acc, total, top = empty(xp, self.query, self.lead, spec.d_v, spec.compute)
        if self.problem.bounded:
            top = self.first_top()
        if sinks is None:
            return acc, total, top
        of_heads = of_sinks(xp, self.of_heads(sinks), spec.compute)
        sink_total, sink_top = map(self.problem.aligned, of_heads)
        return acc, total + sink_total, xp.maximum(top, sink_top)

    def first_top(self) -> Array:
        """Return the maximum before any key as one number; 0 where no maximum is looked for."""
        compute = self.problem.spec.compute
        top = 0.0 if self.problem.bounded else float(self.xp.finfo(compute).min)
        return self.xp.new(self.query, (), top, compute)

    def grouped(self, x: Array) -> Array:
        """Stack the rows of the query heads that share a key head: one product serves them."""
        group = self.problem.spec.group
        if group == 1:
            return x
        *batch, heads, rows, cols = x.shape
        return self.xp.reshape(x, (*batch, heads // group, group * rows, cols))

    def ungrouped(self, x: Array) -> Array:
        """Undo `grouped`."""
        group = self.problem.spec.group
        if group == 1:
            return x
        *batch, heads, rows, cols = x.shape
        return self.xp.reshape(x, (*batch, heads * group, rows // group, cols))
