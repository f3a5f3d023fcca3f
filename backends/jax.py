"""JAX: loops and choices that trace, and one compiled call per shapes and keywords."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import generic, jax_lifted, jax_native, jax_primitive, jax_types
from ._functions import of_floating
from ._sizes import OF_CPU, OF_GPU, Footprint, TileSizes
from .generic import Array, Index, State

# Returns its argument; under vmap, where it holds anywhere in the batch, as one unbatched array: a
# `lax.cond` on an unbatched test stays a branch, where a batched one would compute both sides, and
# a loop with unbatched bounds cuts out slices, where one with batched bounds would gather them.
_anywhere = jax.custom_batching.custom_vmap(lambda test: test)
_anywhere.def_vmap(lambda size, batched, test: (_anywhere(jnp.any(test, axis=0)), False))


@functools.lru_cache
def _jitted(function: Callable[..., Any], adapter: Adapter, *static: int) -> Any:
    return jax.jit(functools.partial(function, adapter), static_argnums=static)


def _call(adapter: Adapter, operation: Any, spec: Any, *arrays: Any) -> Any:
    call = functools.partial(operation, adapter, spec)
    return jax_types.automatic(call, operation, spec)(*arrays)


def _is_reusable(operation: Any, spec: Any) -> bool:
    """Whether what is compiled for an operation may be kept.

    Functions of the caller are equal where their traces are, and pass what they capture; where that
    cannot be told, they may have changed by the next call, or hold arrays that should not outlive
    it.
    """
    reusable = all(getattr(function, "reusable", False) for function in spec.functions)
    return reusable and operation.done is None


@functools.lru_cache
def _planned(
    adapter: Adapter, function: Any, operation: Any, spec: Any, tree: Any, given: tuple[Any, ...]
) -> int:
    """Return the temporary memory of a compiled call of arrays with the `given` shapes."""
    leaves = [jax.ShapeDtypeStruct(*kind, weak_type=weak) for *kind, weak in given]
    arrays = jax.tree.unflatten(tree, leaves)
    compiled = jax.jit(functools.partial(function, adapter, operation, spec)).lower(*arrays)
    return int(compiled.compile().memory_analysis().temp_size_in_bytes)


def _are_ints(*bounds: Index) -> bool:
    return all(isinstance(bound, int) for bound in bounds)


class Adapter(generic.Adapter):
    """JAX, eager and under its transformations."""

    name = "jax"
    autodiff = True

    @property
    def index_dtype(self) -> Any:
        """JAX's default integer: int64 where that is enabled."""
        return jnp.dtype("int64" if jax.config.jax_enable_x64 else "int32")

    @property
    def floats(self) -> dict[str, Any]:
        """JAX's floating dtypes; float64 only where it is enabled."""
        found = {name: jnp.dtype(name) for name in generic.FLOATS}
        if not jax.config.jax_enable_x64:
            del found["float64"]
        return found

    def is_floating(self, dtype: Any) -> bool:
        """Whether `dtype` is floating, the ones of 8 bits included."""
        return jax_types.is_floating(dtype)

    def is_integer(self, dtype: Any) -> bool:
        """Whether `dtype` is an integer."""
        return bool(jnp.issubdtype(dtype, jnp.integer))

    def check(self, x: Array, name: str) -> None:
        """Refuse the symbolic lengths of `jax.export`: tiles have sizes."""
        if not all(isinstance(n, int) for n in x.shape):
            told = ", ".join(map(str, x.shape))
            raise ValueError(
                f"{name} must have axes of known length; got shape ({told}): a symbolic batch axis "
                "can be mapped over by jax.vmap, around attention"
            )

    def traced(self, x: Any) -> bool:
        """Whether an array, or any in a nest of dicts and tuples, is a tracer."""
        if isinstance(x, jax.Array):
            return isinstance(x, jax.core.Tracer)
        return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))

    def device(self, x: Array) -> Any:
        """Return the devices that `x` is committed to; None for a tracer or a free array."""
        if self.traced(x) or not x.committed:
            return None
        return frozenset(x.devices())

    def setting(self, arrays: Sequence[Array]) -> Any:
        """Return the platform, whether 64-bit numbers are on, the mesh, and which are tracers."""
        platform = self._platform(arrays[0])
        mesh = jax_types.explicit_mesh(arrays) if platform in jax_native.PLATFORMS else None
        return platform, jax.config.jax_enable_x64, mesh, *map(self.traced, arrays)

    def tile_sizes(self, like: Array, backward: bool = False) -> TileSizes:
        """Return the sizes for the device of `like`, of a tracer for JAX's default.

        A CPU's cores share a tile, and do so well for one head or few.  Where there are several
        devices, heads may be shared out to them, and a tile of one would be sent to all.
        """
        if self._platform(like) != "cpu":  # XLA holds one array of a tile
            return OF_GPU._replace(elements=2 * OF_GPU.elements, batch="whole")
        sizes = OF_CPU._replace(elements=2 * OF_CPU.elements, edge=512)
        if jax.device_count("cpu") > 1:
            return sizes._replace(batch="whole")
        rows, cols = (1024, 256) if backward else (2048, 512)
        return sizes._replace(rows=rows, cols=cols, batch="even")

    def seeks_bound(self, spec: Any) -> bool:
        """For long calls: one pass less over a tile, and the exponential within the product."""
        scores: int = prod((*spec.batch, spec.heads, spec.n_q, spec.n_k))
        return scores >= 2**24 and bool(min(spec.n_q, spec.n_k) >= 512)

    def squeezes(self, like: Array) -> bool:
        """On a CPU: XLA transposes tiles in memory there for a product with such an axis."""
        return self._platform(like) == "cpu"

    def _platform(self, x: Array) -> str:
        """Return where `x` lives, or a tracer probably."""
        platform: str = (
            jax.default_backend() if self.traced(x) else next(iter(x.devices())).platform
        )
        return platform

    def new(self, like: Array, shape: Any, fill: float, dtype: Any) -> Array:
        """Return an array of `shape` and `dtype` full of `fill`."""
        found = jnp.full(tuple(shape), fill, dtype=dtype)
        return jax_types.vary(found, jax_types.axes_of(like))

    def index(self, like: Array, size: int) -> Array:
        """Return the integers 0 … size-1."""
        return jnp.arange(size)

    def cut(self, x: Array, cuts: Sequence[generic.Cut | None]) -> Array:
        """Return a part of `x`."""
        if not cuts:
            return x
        parts = [(0, n) for n in x.shape]
        parts[: len(cuts)] = [cut or part for cut, part in zip(cuts, parts, strict=False)]
        starts, sizes = zip(*parts, strict=True)
        return lax.dynamic_slice(x, starts, sizes)

    def write(self, x: Array, value: Array, corner: Sequence[Index]) -> Array:
        """Return `x` with `value` in it."""
        return lax.dynamic_update_slice(x, value, corner)

    def accumulate(self, x: Array, value: Array, corner: Sequence[Index]) -> Array:
        """Return `x` with `value` added at a corner."""
        more = lax.dynamic_slice(x, corner, value.shape) + value
        return lax.dynamic_update_slice(x, more, corner)

    def matmul(self, a: Array, b: Array, workspace: Array | None = None) -> Array:
        """Return ``a @ b``, in full precision unless `jax.default_matmul_precision` is set."""
        chosen = jax.config.jax_default_matmul_precision
        precision = lax.Precision.HIGHEST if chosen is None else None
        return jnp.matmul(a, b, precision=precision)

    def looks(self, like: Array) -> bool:
        """Whether XLA computes on a CPU; on a GPU the host would wait to branch."""
        return self._platform(like) == "cpu"

    def some(self, x: Array) -> Array:
        """Look at the batch of a `vmap` at once; a constant is not worked out while compiling.

        XLA would take seconds for what takes a millisecond in the compiled program.
        """
        return _anywhere(super().some(lax.optimization_barrier(lax.stop_gradient(x))))

    def maximum(self, a: Array, b: Array) -> Array:
        """Return the larger of `a` and `b`, NaN where either is NaN."""
        return jnp.maximum(a, b)

    def as_index(self, x: Array) -> Index:
        """Return `x`, which may be traced, in the dtype of positions."""
        return x.astype(self.index_dtype)

    def smaller(self, a: Index, b: Index) -> Index:
        """Return the smaller bound, traced where either is."""
        return min(a, b) if _are_ints(a, b) else jnp.minimum(a, b)

    def larger(self, a: Index, b: Index) -> Index:
        """Return the larger bound, traced where either is."""
        return max(a, b) if _are_ints(a, b) else jnp.maximum(a, b)

    def when(self, test: Array, then: Callable[[], Array], other: Callable[[], Array]) -> Array:
        """Branch on a test that may be traced."""
        if isinstance(test, bool):
            return then() if test else other()
        return lax.cond(_anywhere(lax.stop_gradient(test)), then, other)

    def query_pieces(self, n: int, size: int) -> list[tuple[int, int, int]]:
        """Return one piece: a last chunk that begins earlier spares a second trace."""
        return [(size, 0, -(-n // size))] if n else []

    def fold(
        self, step: Callable[[State, Index], State], state: State, start: Index, stop: Index
    ) -> State:
        """Loop with bounds that may be traced; no step leaves no trace, and one step no loop."""
        if start is stop or (_are_ints(start, stop) and start >= stop):
            return state
        if _are_ints(start, stop) and start + 1 == stop:
            return step(state, start)
        if not _are_ints(start, stop):
            start, stop = (jnp.asarray(x, self.index_dtype) for x in (start, stop))
            start, stop, state = jax_types.vary(
                (start, stop, state), jax_types.axes_of(start, stop, state)
            )
        return lax.fori_loop(start, stop, lambda i, state: step(state, i), state)

    def each(
        self,
        step: Callable[[State, Index], State],
        state: State,
        count: int,
        done: Callable[[], None] | None = None,
    ) -> State:
        """Loop over the tasks in order, and call back after each."""

        def reported(state: State, i: Index) -> State:
            state = step(state, i)
            if done is not None:
                jax.debug.callback(lambda _: done(), jax.tree.leaves(state)[0].ravel()[0])
            return state

        return self.fold(reported, state, 0, count)

    def run(self, algorithm: Any, spec: Any, arrays: dict[str, Any]) -> tuple[Array, ...]:
        """Call the algorithm compiled; the compilation is kept for equal shapes and keywords."""
        return tuple(_jitted(algorithm, self, 0)(spec, arrays))

    def footprint(self, like: Array) -> Footprint:
        """Return what XLA's kernels take on a CPU: Eigen packs the operands of products."""
        if self._platform(like) != "cpu":
            return Footprint(buffers=0, positions=0, objects=0)
        return Footprint(packed=2, buffers=73_728, positions=0, objects=0)

    def compiled_bytes(self, function: Any, operation: Any, spec: Any, *arrays: Any) -> int | None:
        """Ask XLA, which plans all memory as it compiles."""
        leaves, tree = jax.tree.flatten(arrays)
        given = tuple(
            ((), jax.dtypes.result_type(x), True)
            if isinstance(x, bool | int | float)
            else (tuple(x.shape), x.dtype, False)
            for x in leaves
        )
        plan = _planned if _is_reusable(operation, spec) else _planned.__wrapped__
        return plan(self, function, operation, spec, tree, given)

    def stand_in(
        self, function: Callable[..., Any], like: Array, specs: list[tuple[Any, Any]]
    ) -> Any:
        """Call with tracers."""
        found = []

        def call(*arrays: Array) -> None:
            found.append(function(*arrays))

        jax.eval_shape(call, *(jax.ShapeDtypeStruct(*spec) for spec in specs))
        return found[0]

    def lift(
        self,
        function: Callable[..., Array],
        example: Callable[..., tuple[Array, ...]],
        sizes: list[Any],
        arrays: list[Array],
    ) -> tuple[Callable[..., Array], tuple[Array, ...]]:
        """Find the captured arrays by a trace for each size of a tile."""
        shapes = [jax.eval_shape(functools.partial(example, *size)) for size in sizes]
        return jax_lifted.lift(function, shapes, jax_types.axes_of(arrays))

    def pushforward(
        self, function: Any, primals: tuple[Array, ...], tangents: tuple[Array, ...]
    ) -> Any:
        """Differentiate by `jax.jvp`."""
        function, floating = of_floating(function, primals, self.is_floating)
        chosen = (tuple(xs[i] for i in floating) for xs in (primals, tangents))
        return jax.jvp(function, *chosen)[1]

    def pullback(
        self, function: Any, primals: tuple[Array, ...], cotangent: Array
    ) -> tuple[Array | None, ...]:
        """Differentiate by `jax.vjp`."""
        function, floating = of_floating(function, primals, self.is_floating)
        _, vjp = jax.vjp(function, *(primals[i] for i in floating))
        found = dict(zip(floating, vjp(cotangent), strict=True))
        return tuple(map(found.get, range(len(primals))))

    def no_kernel(self, inputs: dict[str, Array]) -> str | None:
        """Return why not: JAX has them on a GPU, and off meshes with explicit axes."""
        if (platform := self._platform(inputs["query"])) not in jax_native.PLATFORMS:
            return f"JAX has no attention kernel for the platform {platform}"
        if jax_types.explicit_mesh(inputs) is not None:
            return "JAX's kernel does not take arrays on a mesh with explicit axes"
        return None

    def kernel(self, call: Any, adds: bool) -> tuple[Any, bool, str]:
        """Return cuDNN's kernel where that is there."""
        if adds:
            return None, False, "JAX's kernel is given no bias, and no mask other than Causal"
        return jax_native.choose(call)

    def where_kernel(self, kernel: Callable[[], Array], tiles: Callable[[], Array]) -> Array:
        """Leave it to the compilation: a tracer does not tell where it will be."""
        return lax.platform_dependent(default=tiles, **{jax_native.LOWERED: kernel})

    def differentiable(
        self, operation: Any, spec: Any, data: dict[str, Any], inputs: dict[str, Array]
    ) -> dict[str, Array]:
        """Call the operation compiled, where arrays are traced as a primitive with its rules.

        The compilation is kept for equal shapes and keywords.
        """
        function = jax_primitive.apply if self.traced((data, inputs)) else _call
        if _is_reusable(operation, spec):
            compiled = functools.partial(_jitted(function, self, 0, 1), operation, spec)
        else:  # not as static arguments, which JAX keeps
            compiled = jax.jit(functools.partial(function, self, operation, spec))
        found: dict[str, Array] = compiled(data, inputs)
        if operation.done is not None:
            jax.block_until_ready(found)
            jax.effects_barrier()
        return found
