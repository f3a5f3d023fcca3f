"""The adapter for any library of the array API standard, and the contract of every adapter.

An adapter stands in for its library's namespace in the algorithm: an attribute that it does
not define is the namespace's own (``xp.exp``, ``xp.sum``, …).  On top of that it has the verbs of
`Adapter`, here written with the standard alone (2021.12 and later); other adapters override what
their library does better.

Two tricks spare the algorithm a branch per library.  ``x *= y`` works in place where arrays are
mutable and makes a new array where they are not.  A loop index is an ``int`` or a traced scalar,
and the same arithmetic serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import e, log2
from typing import Any

import array_api_compat

from ._functions import Unlifted
from ._sizes import OF_CPU, Footprint, TileSizes

Array = Any
State = Any
Index = Any  # an int, or a traced integer array of no axes
Cut = tuple[Index, int]  # of an axis: where it starts, and how many entries

FLOATS = ("float16", "bfloat16", "float32", "float64")
LOG2_E = log2(e)
NO_COMPLEX = (
    "score_mod must not capture complex arrays whose gradient is asked for: let it capture their "
    "real and imaginary parts"
)
SMALL = 10.0  # of a score: sums of e**10 or e**-10 are far from overflow and underflow


def _place(value: Array, corner: Sequence[Index]) -> tuple[slice, ...]:
    """Return where `value` lies in an array in which it begins at a `corner`."""
    return tuple(slice(i, i + n) for i, n in zip(corner, value.shape, strict=True))


class Adapter:
    """The standard's own way to do each verb; ``namespace`` is the library's namespace."""

    #: True where the library differentiates functions
    autodiff = False

    def __init__(self, namespace: Any) -> None:
        self.namespace = namespace

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.namespace, name)
        setattr(self, name, found)  # for the next time
        return found

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.Adapter of {self.namespace.__name__}>"

    # The library, its dtypes and devices.

    @property
    def name(self) -> str:
        """The library's name as users know it."""
        return str(self.namespace.__name__)

    @property
    def index_dtype(self) -> Any:
        """The dtype of positions."""
        return self.int64

    @property
    def floats(self) -> dict[str, Any]:
        """The floating dtypes that this library has, of those that attention takes."""
        return {name: getattr(self, name) for name in FLOATS if hasattr(self.namespace, name)}

    def is_floating(self, dtype: Any) -> bool:
        """Whether `dtype` is one of real floating numbers; the standard has no others than these.

        Where a library has more, they count, though attention takes no arrays of them.
        """
        return dtype in self.floats.values()

    def is_integer(self, dtype: Any) -> bool:
        """Whether `dtype` is a signed or unsigned integer (not boolean)."""
        names = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
        return any(dtype == getattr(self.namespace, name, None) for name in names)

    def is_bool(self, dtype: Any) -> bool:
        """Whether `dtype` is the library's boolean."""
        return bool(dtype == self.bool)

    def check(self, x: Array, name: str) -> None:
        """Refuse an array of this library that attention would misread."""

    def traced(self, x: Any) -> bool:
        """Whether an array, or any in a nest of dicts and tuples, has values yet unknown."""
        return False

    def device(self, x: Array) -> Any:
        """Where `x` lives; None where that cannot be told."""
        return array_api_compat.device(x)

    def on_device_of(self, x: Array) -> AbstractContextManager[Any]:
        """Return a context in which arrays are computed on the device of `x`."""
        return nullcontext()

    def setting(self, arrays: Sequence[Array]) -> Any:
        """Return what a call depends on beside shapes, dtypes and keywords: the device, modes.

        Also what `no_kernel` and `kernel` look at, and what `traced` and `watched` tell of each
        array.  None where that cannot be told: such a call is checked anew each time.
        """
        return self.device(arrays[0])

    def tile_sizes(self, like: Array, backward: bool = False) -> TileSizes:
        """Return the sizes of tiles that suit the device of `like` in a pass; here for a CPU."""
        return OF_CPU

    # Arrays: made, read and written.

    def new(self, like: Array, shape: Sequence[int], fill: float, dtype: Any) -> Array:
        """Return an array of `shape` and `dtype` full of `fill`, on the device of `like`."""
        return self.full(tuple(shape), fill, dtype=dtype, device=self.device(like))

    def index(self, like: Array, size: int) -> Array:
        """Return the integers 0 … size-1 on the device of `like`."""
        return self.arange(size, dtype=self.index_dtype, device=self.device(like))

    def cast(self, x: Array, dtype: Any) -> Array:
        """Return `x` in `dtype`: `x` itself where it has it already."""
        return x if x.dtype == dtype else self.astype(x, dtype)

    def read(self, x: Array, axis: int, start: Index, size: int) -> Array:
        """Return the `size` entries from `start` on along `axis`, counted from the end (< 0)."""
        return self.cut(x, [*(None,) * (x.ndim + axis), (start, size)])

    def cut(self, x: Array, cuts: Sequence[Cut | None]) -> Array:
        """Return a part of `x`; the cuts are of its leading axes, None leaves one whole."""
        slices = (slice(None) if c is None else slice(c[0], c[0] + c[1]) for c in cuts)
        return x[(*slices, ...)]

    def write(self, x: Array, value: Array, corner: Sequence[Index]) -> Array:
        """Put `value` into `x`, where it begins at a `corner`; return `x` or its successor."""
        x[_place(value, corner)] = value
        return x

    def accumulate(self, x: Array, value: Array, corner: Sequence[Index]) -> Array:
        """Add `value` to what is in `x` at a `corner`; return `x` or its successor."""
        x[_place(value, corner)] += value
        return x

    def in_order(self, x: Array) -> Array:
        """Return `x` in memory in the order of its axes, where a library shows that order."""
        return x

    # The arithmetic of tiles.  What may overwrite its argument says so.

    def workspace(self, like: Array, size: int, dtype: Any) -> Array | None:
        """Return memory for `size` elements that `matmul` may write to, or None."""
        return None

    def matmul(self, a: Array, b: Array, workspace: Array | None = None) -> Array:
        """Return ``a @ b``, accumulated in its dtype; it may live in `workspace`."""
        return self.namespace.matmul(a, b)

    def add_product(self, x: Array, a: Array, b: Array) -> Array:
        """Return ``x + a @ b``; `x` may be overwritten."""
        x += self.matmul(a, b)
        return x

    def exp_difference(self, x: Array, y: Array) -> Array:
        """Return ``exp(x - y)``; `x` may be overwritten."""
        return self.exp(x - y)

    def cap(self, s: Array, softcap: float) -> Array:
        """Return ``softcap * tanh(s / softcap)``; `s` may be overwritten."""
        return self.tanh(s / softcap) * softcap

    def squeezes(self, like: Array) -> bool:
        """Whether products take longer with batch axes of length 1 than without them."""
        return False

    def seeks_bound(self, spec: Any) -> bool:
        """Whether scores of products alone are worth a look at the bound of all of them.

        It reads queries and keys once more, and decides by `when`.
        """
        return False

    def weigh(self, s: Array, top: Array) -> tuple[Array, Array, Array]:
        """Return ``(weights, total, top)`` of the rows of scores, which may be overwritten.

        The weights are ``exp(s - top)``, and `total` is their sum.  `top` becomes the larger of
        what it was and the largest score; or, as well, 0 where that score is no further from 0 than
        `SMALL`, and neither is the result.  Where nothing of it changes, it may be returned itself.
        It may have no axes, where it is one number for all rows.
        """
        top = self.maximum(top, self.max(s, axis=-1, keepdims=True))
        weights = self.exp_difference(s, top)
        return weights, self.sum(weights, axis=-1, keepdims=True, dtype=s.dtype), top

    def maximum(self, a: Array, b: Array) -> Array:
        """Return the larger of `a` and `b`, NaN where either is NaN."""
        return self.where((a > b) | (a != a), a, b)

    # Masks.

    def hide(self, x: Array, allowed: Array, fill: float) -> Array:
        """Return `x` with `fill` where not `allowed`; `x` may be overwritten."""
        return self.where(allowed, x, self.new(x, (), fill, x.dtype))

    def barrier(self, allowed: Array, dtype: Any) -> Array:
        """Return 0 where `allowed` and -inf elsewhere, in `dtype`."""
        zero, none = (self.new(allowed, (), x, dtype) for x in (0.0, -float("inf")))
        return self.where(allowed, zero, none)

    def ordered(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Return integers that are equal where those of `a` and `b` are, in any order of theirs."""
        return a, b

    def looks(self, like: Array) -> bool:
        """Whether it pays to look at values on the device of `like`, and to branch by `when`."""
        return False

    def some(self, x: Array) -> Array:
        """Return which entries along the last of several axes are true anywhere in the others.

        Where a library maps a function over an axis, it may be one of the others.
        """
        return self.any(x, axis=tuple(range(x.ndim - 1)))

    def every(self, x: Array) -> Array:
        """Return which entries along the last of several axes are true everywhere in the others."""
        return self.all(x, axis=tuple(range(x.ndim - 1)))

    # Loops and branches; their bounds and conditions may be traced.

    def as_index(self, x: Array) -> Index:
        """Return an integer array of no axes as something to bound a loop with."""
        return int(x)

    def smaller(self, a: Index, b: Index) -> Index:
        """Return the smaller of two loop bounds."""
        return min(a, b)

    def larger(self, a: Index, b: Index) -> Index:
        """Return the larger of two loop bounds."""
        return max(a, b)

    def nonfinite(self, x: Array, dtype: Any) -> Array:
        """Return whether a NaN or inf is in `x`, or its sum in `dtype` is too large, for `when`."""
        return ~self.isfinite(self.sum(x, dtype=dtype))

    def when(self, test: Array, then: Callable[[], Array], other: Callable[[], Array]) -> Array:
        """Return ``then()`` where `test` holds, else ``other()``.

        `then` must be right in either case: a library that cannot branch takes it always.
        """
        return then() if test else other()

    def pieces(self, n: int, size: int) -> list[tuple[int, int, int]]:
        """Return ``(size, first, count)`` of an axis's full chunks, then of the shorter last one.

        Each piece is traced once where a library traces.
        """
        full, rest = divmod(n, size)
        runs = [(size, 0, full), (rest, n - rest, 1)]
        return [(length, first, count) for length, first, count in runs if length * count]

    def query_pieces(self, n: int, size: int) -> list[tuple[int, int, int]]:
        """Return the pieces of the axis of queries, whose last chunk may begin earlier.

        A query that two chunks compute is written twice, with the same result.
        """
        return self.pieces(n, size)

    def fold(
        self, step: Callable[[State, Index], State], state: State, start: Index, stop: Index
    ) -> State:
        """Return the state after ``state = step(state, i)`` for `i` from `start` to `stop`."""
        for i in range(start, stop):
            state = step(state, i)
        return state

    def each(
        self,
        step: Callable[[State, Index], State],
        state: State,
        count: int,
        done: Callable[[], None] | None = None,
    ) -> State:
        """Fold over ``range(count)`` with steps that write to disjoint places, in any order.

        `done` is called after each step, for a progress report.
        """
        for i in range(count):
            state = step(state, i)
            if done is not None:
                done()
        return state

    def at_once(self, count: int) -> int:
        """Return how many of `count` steps of `each` run at a time, at most."""
        return min(count, 1)

    # What a call holds, and what modes around it ask for.

    def watched(self, arrays: Any) -> bool:
        """Whether derivatives by some of the arrays in a nest may be asked for."""
        return self.traced(arrays)

    def footprint(self, like: Array) -> Footprint:
        """Return what the library holds of its own, on the device of `like`."""
        return Footprint()

    def compiled_bytes(self, function: Any, operation: Any, spec: Any, *arrays: Any) -> int | None:
        """Return what ``function(self, operation, spec, *arrays)`` holds beside its results.

        None where the library does not plan that ahead.
        """
        return None

    def stand_in(
        self, function: Callable[..., Any], like: Array, specs: list[tuple[Any, Any]]
    ) -> Any:
        """Return what `function` gives for arrays of these shapes and dtypes, beside `like`.

        The arrays take no memory: all numbers of a column are one.
        """
        arrays = []
        for shape, dtype in specs:
            row = self.new(like, shape[-1:], 0.0, dtype)
            arrays.append(self.broadcast_to(row, shape))
        return function(*arrays)

    def promoted(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """Return query, key and value in the dtype that a surrounding mode asks for."""
        return tokens

    def random_seed(self, like: Array) -> Array | None:
        """Return an integer drawn from the default generator on the device of `like`.

        None where the library has none whose state users set as they set PyTorch's.
        """
        return None

    # The caller's functions.

    def lift(
        self,
        function: Callable[..., Array],
        example: Callable[..., tuple[Array, ...]],
        sizes: list[Any],
        arrays: list[Array],
    ) -> tuple[Callable[..., Array], tuple[Array, ...]]:
        """Return ``(lifted, captured)`` with ``lifted(captured, *args) == function(*args)``.

        `captured` are the arrays that `function` holds and derivatives may be asked of, or that
        are traced.  ``example(*size)`` are the arguments for a tile; `sizes` those of the tiles to
        come, `arrays` those of the call.
        """
        return Unlifted(function), ()

    def pushforward(
        self, function: Any, primals: tuple[Array, ...], tangents: tuple[Array, ...]
    ) -> Any:
        """Return the tangent of the result of a score_mod on a tile.

        `function` is called with `primals`, of which the first are the scores; what is not
        floating has no tangent.  A library that cannot differentiate takes ``function.derivative``.
        """
        return function.derivative(primals[0]) * tangents[0]

    def pullback(
        self, function: Any, primals: tuple[Array, ...], cotangent: Array
    ) -> tuple[Array | None, ...]:
        """Return the gradients of a score_mod's arguments; None for what is not floating."""
        return (cotangent * function.derivative(primals[0]),)

    # The library's own attention.

    def no_kernel(self, inputs: dict[str, Array]) -> str | None:
        """Return why no fused kernel takes any arrays where these are; None where one may."""
        return f"{self.name} has no attention of its own"

    def kernel(self, call: Any, adds: bool) -> tuple[Any, bool, str]:
        """Return the kernel for a call or None, whether it is better than tiles, and why.

        `call` has arrays `query`, `key`, `value` of shape (b, h, n, d), perhaps with fewer heads of
        key and value, the boolean `causal`, and the float `scale`.  With `adds` the kernel will be
        called for parts of it, in the compute dtype, that have an array `added` to the scores,
        of shape (b, h, n_q, n_k) or 1 in their place.  A kernel is hashable, has its name as
        `repr`, and has

        ``has_lse``
            whether it gives `lse` in the compute dtype
        ``needs_lse``
            whether `backward` takes `lse`
        ``trains``
            whether it has a `backward` for the call
        ``exact``
            whether `forward` gives `out` in the compute dtype where "exact" is among the names
        ``forward(call, names)``
            returns ``(out, lse)``, lse of shape (b, h, n_q), or None where not among the names
        ``backward(call, out, lse, d_out)``
            returns the gradients of query, key and value; `lse` is None unless ``needs_lse``
        ``coarse(lse)``
            with ``needs_lse``: whether gradients from it would be, for `when`
        ``doubtful(lse)``
            with ``has_lse``: whether some of it may be wrong, for `when`
        ``scratch(rows, keys, number, training)``
            returns what it takes for itself, for `plan`; not needed with `compiled_bytes`
        ``reorders(added, folded)``
            with `adds`: whether it copies what is added, likewise
        """
        raise NotImplementedError

    def where_kernel(self, kernel: Callable[[], Array], tiles: Callable[[], Array]) -> Array:
        """Return ``kernel()``, or ``tiles()`` where a program runs that has no such kernel."""
        return kernel()

    # Calls of algorithms.

    def run(
        self,
        algorithm: Callable[[Any, Any, dict[str, Any]], tuple[Array, ...]],
        spec: Any,
        arrays: dict[str, Any],
    ) -> tuple[Array, ...]:
        """Return ``algorithm(self, spec, arrays)``; `spec` is hashable, `arrays` hold the data.

        Nothing is overwritten, so that an autograd that watches the calls can follow.
        """
        return algorithm(self, spec, arrays)

    def differentiable(
        self, operation: Any, spec: Any, data: dict[str, Any], inputs: dict[str, Array]
    ) -> dict[str, Array]:
        """Return ``operation(self, spec, data, inputs)``, arrays by name.

        `operation` and `spec` are hashable; where `spec.calls_back`, or `operation.done` is given,
        functions of the caller run inside, which may hold anything.  A library with automatic
        differentiation calls the operation's rules at ``operation.point(apply, spec, data, inputs,
        outputs)``, a named tuple, where `apply` is a function like this one (without `self`):

        ``operation.tangent(at, tangents)``
            the outputs' tangents, given the tangents of some inputs; or the rule is None
        ``operation.cotangent(at, cotangents, wanted)``
            the gradients of the `wanted` inputs, given those of all outputs
        """
        found: dict[str, Array] = operation(self, spec, data, inputs)
        return found
