"""Functions of the caller that take part in a call, and the arrays that they capture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ._shapes import broadcast
from .masks import Mask, Predicate

if TYPE_CHECKING:
    from ._spec import TileShape
    from ._tiles import Tile

Array = Any


@dataclass(frozen=True)
class ScoreMod:
    """A `score_mod` with its derivative, for libraries that cannot find the derivative themselves.

    PyTorch and JAX differentiate `function` itself and do not call `derivative`.

    Parameters
    ----------
    function : callable(score, b, h, q_idx, kv_idx)
        The `score_mod` of `attention`; each score it returns depends on that one score alone.
    derivative : callable(score, b, h, q_idx, kv_idx)
        ∂function/∂score, element by element: an array that broadcasts against `score`, the same
        `score` that `function` gets.

    Raises
    ------
    TypeError
        If either is not callable.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import ScoreMod, attention_vjp
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 10, 4))
    >>> cube = ScoreMod(
    ...     lambda score, b, h, q_idx, kv_idx: score**3,
    ...     lambda score, b, h, q_idx, kv_idx: 3 * score**2,
    ... )
    >>> out, vjp = attention_vjp(q, k, v, score_mod=cube)
    >>> vjp(np.ones_like(out))["query"].shape
    (10, 4)
    """

    function: Callable[..., Array]
    derivative: Callable[..., Array]

    def __post_init__(self) -> None:
        for name in ("function", "derivative"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"ScoreMod: {name} must be callable; got {getattr(self, name)!r:.80}"
                )

    def __call__(self, *args: Array) -> Array:
        """Call the function."""
        return self.function(*args)


@dataclass(frozen=True)
class Lifted:
    """A caller's `score_mod` as ``function(captured, score, b, h, q_idx, kv_idx)``."""

    function: Callable[..., Array]
    derivative: Callable[..., Array] | None


@dataclass(frozen=True)
class LiftedPredicate(Predicate):
    """A mask whose function is ``mask_mod(captured, b, h, q_idx, kv_idx)``."""

    captured: tuple[Array, ...] | None = None

    def of(self, *place: Array) -> Array:
        """Call the function."""
        return self.mask_mod(self.captured or (), *place)


class Modified:
    """The `score_mod` of a tile as a function of the scores and of what it captures."""

    def __init__(self, tile: Tile) -> None:
        mod = tile.rows.problem.spec.score_mod
        assert mod is not None
        self.mod, self.xp = mod, tile.xp
        self.place = (tile.b, tile.h, tile.q_idx, tile.kv_idx)

    def __call__(self, s: Array, *captured: Array) -> Array:
        """Return the modified scores, in the dtype of `s`."""
        after = self.mod.function(captured, s, *self.place)
        self._check(after, s, "score_mod", "the result of score_mod")
        if after is s:
            return s
        if tuple(after.shape) != tuple(s.shape):
            after = self.xp.broadcast_to(after, s.shape)
        # A copy, since what follows is done in place, and the function may have returned an array
        # of its own.
        return self.xp.astype(after, s.dtype)

    def derivative(self, s: Array) -> Array:
        """Return the derivative that the caller gave, at `s`."""
        assert self.mod.derivative is not None  # attention_vjp and attention_jvp have seen to it
        slope = self.mod.derivative(s, *self.place)
        told = "score_mod: the derivative of a ScoreMod"
        self._check(slope, s, told, "score_mod: the result of the derivative of a ScoreMod")
        return self.xp.cast(slope, s.dtype)

    def _check(self, x: Any, s: Array, function: str, result: str) -> None:
        """Refuse what a function may not return for the scores `s`."""
        wanted, shape = tuple(s.shape), getattr(x, "shape", None)
        if shape is None or broadcast([tuple(shape), wanted]) != wanted:
            got = type(x).__name__ if shape is None else shape
            raise ValueError(
                f"{function} must return an array of a shape that broadcasts to {wanted}; got {got}"
            )
        _check_numbers(self.xp, x, result)


def _check_numbers(xp: Any, x: Array, name: str) -> None:
    """Refuse what a cast would take for real numbers, or would take the mask from."""
    xp.check(x, name)
    if not (xp.is_floating(x.dtype) or xp.is_integer(x.dtype) or xp.is_bool(x.dtype)):
        raise TypeError(f"{name} must be of real numbers; got {x.dtype}")


def allowed_by(mask: Mask, tile: Tile) -> Array | None:
    """Return what a mask allows of a tile, which may be the caller's code; None: all pairs."""
    found = mask.tile(tile)
    if found is None:
        return None
    told = "mask_mod" if isinstance(mask, Predicate) else f"{type(mask).__name__}.tile"
    if not hasattr(found, "dtype") or not tile.xp.is_bool(found.dtype):
        got = getattr(found, "dtype", type(found).__name__)
        raise TypeError(f"mask: {told} must return a boolean array; got {got}")
    shape = (*tile.rows.lead, tile.size)
    if broadcast([tuple(found.shape), shape]) != shape:
        raise ValueError(
            f"mask: {told} must return an array that broadcasts to {shape}; got "
            f"{tuple(found.shape)}"
        )
    return found


class Examples:
    """What the caller's functions are called with in a call, to find out what they capture.

    `sizes` are those of the tiles: batch entries by axis and heads, rows, and columns; `arrays` are
    all of the call.
    """

    def __init__(
        self,
        xp: Any,
        like: Array,
        data: dict[str, Any],
        sizes: list[TileShape],
        arrays: list[Array],
    ) -> None:
        self.xp, self.like, self.data, self.sizes, self.arrays = xp, like, data, sizes, arrays

    def place(self, lead: tuple[int, ...], rows: int, cols: int) -> tuple[Array, ...]:
        """Return batch entries, heads and positions of the first tile of this size."""
        xp, (*batch, heads) = self.xp, lead
        ones = (1,) * len(batch)
        query, key = (
            xp.cast(x, xp.index_dtype) if hasattr(x, "shape") else x
            for x in (self.data["query_offset"], self.data["key_offset"])
        )
        if hasattr(query, "shape"):
            query = query[(None,) * (len(batch) - len(query.shape)) + (...,)]
            lengths = zip(query.shape, batch, strict=True)
            query = xp.cut(query, [None if n == 1 else (0, size) for n, size in lengths])
            query = query[..., None, None, None]

        def index(n: int, shape: tuple[int, ...]) -> Array:
            return xp.reshape(xp.index(self.like, n), shape)

        return (
            index(prod(batch), (*batch, 1, 1, 1)),
            index(heads, (*ones, heads, 1, 1)),
            index(rows, (*ones, 1, rows, 1)) + query,
            index(cols, (*ones, 1, 1, cols)) + key,
        )

    def lift_mask(self, mask: Predicate) -> LiftedPredicate:
        """Return the mask with what its function captures as data."""
        return LiftedPredicate(*self.xp.lift(mask.mask_mod, self.place, self.sizes, self.arrays))

    def lift_score_mod(
        self, score_mod: Callable[..., Array], dtype: Any
    ) -> tuple[Lifted, tuple[Array, ...]]:
        """Return the function and what it captures."""

        def scored(lead: tuple[int, ...], rows: int, cols: int) -> tuple[Array, ...]:
            scores = self.xp.new(self.like, (*lead, rows, cols), 0.0, dtype)
            return scores, *self.place(lead, rows, cols)

        function, captured = self.xp.lift(score_mod, scored, self.sizes, self.arrays)
        derivative = score_mod.derivative if isinstance(score_mod, ScoreMod) else None
        return Lifted(function, derivative), captured
