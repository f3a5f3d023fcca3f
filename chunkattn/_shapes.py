"""The sizes that query, key and value agree on, and what has to broadcast to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._adapters import is_array

Array = Any


@dataclass(frozen=True)
class Shapes:
    """The sizes that the shapes of query, key and value agree on."""

    batch: tuple[int, ...]
    heads: int
    key_heads: int
    n_q: int
    n_k: int
    d_v: int
    headless: bool  # the arrays are (n, d)

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.heads // self.key_heads if self.key_heads else 1

    @property
    def lead(self) -> tuple[int, ...]:
        """The batch axes and the key heads: what blocks are cut from."""
        return (*self.batch, self.key_heads)

    @property
    def scores(self) -> tuple[int, ...]:
        """The shape that bias and masks broadcast to, as the caller sees it."""
        pairs = (self.n_q, self.n_k)
        return pairs if self.headless else (*self.batch, self.heads, *pairs)

    def check_mask(self, xp: Any, name: str, x: Array) -> None:
        """Refuse a mask array that is not boolean or does not broadcast to the scores."""
        if not hasattr(x, "dtype") or not xp.is_bool(x.dtype):
            raise TypeError(
                f"{name} must be a boolean array (True = may attend); got "
                f"{getattr(x, 'dtype', type(x).__name__)} (a float array that is added to the "
                "scores is a bias)"
            )
        _check_broadcasts(name, x, self.scores)

    def check_integers(
        self, xp: Any, name: str, x: Array, shape: tuple[int, ...], last: int | None = None
    ) -> None:
        """Refuse an array that holds no integers, or does not broadcast to `shape`.

        Where `last` is given, the last axis must have that length.
        """
        if not xp.is_integer(x.dtype):
            raise TypeError(f"{name} must be an integer array; got {x.dtype}")
        if last is not None and (not x.shape or x.shape[-1] != last):
            raise ValueError(f"{name} must have shape (…, {last}); got {tuple(x.shape)}")
        _check_broadcasts(name, x, shape)


def shapes_of(tokens: dict[str, Array], layout: str) -> Shapes:
    """Return the sizes that query, key and value agree on; refuse what does not fit."""
    q, k, v = (tuple(x.shape) for x in tokens.values())
    ranks = {len(q), len(k), len(v)}

    def got() -> str:
        return "got " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in tokens.items())

    if min(ranks) < 2 or (2 in ranks and len(ranks) > 1):
        raise ValueError(
            "query, key and value must all be (n, d), or all have a head axis, "
            f"as (…, h, n, d) in layout 'hnd' and (…, n, h, d) in layout 'nhd'; {got()}"
        )
    headless = ranks == {2}
    n, h = (-2, -3) if layout == "hnd" else (-3, -2)
    if headless:
        q, k, v = (1, *q), (1, *k), (1, *v)
        n, h = -2, -3
    if q[-1] != k[-1]:
        raise ValueError(f"query and key must have the same width d (last axis); {got()}")
    if k[n] != v[n] or k[h] != v[h]:
        raise ValueError(
            f"key and value must have the same length n_k and the same number of heads; {got()}"
            f" in layout {layout!r}"
        )
    if q[h] != k[h] and (0 in (q[h], k[h]) or q[h] % k[h]):
        raise ValueError(
            f"the heads of query ({q[h]}) must be a multiple of those of key and value ({k[h]}); "
            f"{got()} in layout {layout!r}"
        )
    batch = broadcast([q[:-3], k[:-3], v[:-3]])
    if batch is None:
        raise ValueError(f"the batch axes of query, key and value do not broadcast; {got()}")
    return Shapes(batch, q[h], k[h], q[n], k[n], v[-1], headless)


def broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape that `shapes` broadcast to; None where they do not."""
    rank = max(map(len, shapes))
    found = [1] * rank
    for shape in shapes:  # one length after the other: PyTorch's compiler has symbols for some
        for axis, n in enumerate(shape, rank - len(shape)):
            if found[axis] == 1:
                found[axis] = n
            elif n not in (1, found[axis]):
                return None
    return tuple(found)


def is_accepted(xp: Any, x: Array) -> bool:
    """Whether `x` has one of the floating dtypes that attention takes."""
    return x.dtype in xp.floats.values()


def check_floats(
    xp: Any, name: str, x: Array | None, shape: tuple[int, ...], exact: bool = False
) -> None:
    """Refuse an `x` that is no floating array, or does not broadcast to (or have) `shape`."""
    if x is None:
        return
    if not is_array(x):
        raise TypeError(f"{name} must be an array; got {x!r}")
    if not is_accepted(xp, x):
        raise TypeError(f"{name} must be one of {', '.join(xp.floats)}; got {x.dtype}")
    if exact and tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(x.shape)}")
    _check_broadcasts(name, x, shape)


def _check_broadcasts(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if broadcast([tuple(x.shape), shape]) != shape:
        raise ValueError(f"{name} must broadcast to {shape}; got shape {tuple(x.shape)}")
