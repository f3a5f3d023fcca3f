"""JAX in the benchmark: everything compiled before it is timed, and waited for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from time import perf_counter, sleep
from typing import Any

from .. import attention
from . import _memory
from ._bench_case import Case
from ._bench_library import (
    Candidate,
    Gemm,
    Library,
    Way,
    causal_chunks,
    check_memory_efficient,
    memory_efficient,
    nbytes,
    textbook,
)

Array = Any
_MALLOC_CALLS, _MALLOC_SECONDS = 10, 0.5


class Jax(Library):
    """JAX on the CPU; its compiler plans all memory ahead, but for what its kernels take."""

    platform = "cpu"
    implementations: tuple[str, ...] = ("xla",)

    def __init__(self) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others use the GPU too
        import jax

        self.jax: Any = jax
        try:
            self.place = jax.devices(self.platform)[0]
        except RuntimeError as error:
            raise ImportError(f"JAX has no device: {error}") from error

    def active(self, dtype: str) -> AbstractContextManager[Any]:
        """Return JAX with float64, or for float32 without TF32: chunkattn's own precision."""
        stack = ExitStack()
        if dtype == "float64":
            stack.enter_context(self.jax.enable_x64(True))
        if dtype == "float32":
            stack.enter_context(self.jax.default_matmul_precision("highest"))
        return stack

    def candidates(self, case: Case, implementations: tuple[str, ...]) -> Iterator[Candidate]:
        """Yield chunkattn, textbook attention, jax.nn in its implementations, and others."""
        arrays = self.arrays(case)
        count = 5 if case.backward else 3
        for name in implementations:
            ours = partial(attention, causal=case.causal, implementation=name)
            held = count if name == "standard" else 0
            yield Candidate(name, partial(self._way, case, arrays, ours), True, held)
        yield Candidate("textbook", partial(self._textbook, case, arrays), score_arrays=count)
        for name in self.implementations:
            make = partial(self._nn, case, arrays, name)
            yield Candidate(f"jax.nn {name}", make, score_arrays=count if name == "xla" else 0)
        if package := memory_efficient():
            function = package.efficient_dot_product_attention_jax
            make = partial(self._memory_efficient, case, arrays, function)
            yield Candidate("memory-efficient", make)

    def gemm(self, dtype: str) -> Gemm:
        """Return NumPy's product: one limit for all libraries on the CPU."""
        from ._bench_numpy import NumPy

        return NumPy().gemm(dtype)

    def arrays(self, case: Case) -> dict[str, Array]:
        """Return the case's data in its dtype."""
        return {
            name: self.jax.device_put(self.jax.numpy.asarray(x, case.dtype), self.place)
            for name, x in case.numbers().items()
        }

    def _way(
        self,
        case: Case,
        arrays: dict[str, Array],
        attend: Callable[..., Array],
        nhd: bool = False,
    ) -> Way:
        jnp = self.jax.numpy
        given = [self.jax.block_until_ready(_turned(x) if nhd else x) for x in arrays.values()]

        def loss(query: Array, key: Array, value: Array, d_out: Array) -> Array:
            return jnp.sum(attend(query, key, value) * d_out, dtype=jnp.float32)

        if case.backward:
            function = self.jax.value_and_grad(loss, argnums=(0, 1, 2))
        else:
            function, given = attend, given[:3]
        jitted = self.jax.jit(function)
        compiled = jitted.lower(*given).compile()  # kept for the calls

        def fetch(result: Any) -> list[Array]:
            import numpy as np

            wide = "float64" if case.dtype == "float64" else "float32"
            found = result[1] if case.backward else [result]
            return [np.asarray((_turned(x) if nhd else x).astype(wide)) for x in found]

        def call() -> Any:
            return jitted(*given)

        def memory() -> int | None:
            return self.extra_bytes(call, _planned_bytes(compiled))

        return Way(call, fetch, memory, wait=self.jax.block_until_ready)

    def extra_bytes(self, call: Callable[[], Any], planned: int | None) -> int | None:
        """Return the compiler's plan, or what malloc tells where kernels take more beside it.

        That is of several calls the fullest but one: a short peak may be missed, and what moves
        while malloc counts may count twice.
        """
        leaves = self.jax.tree.leaves
        found: list[int] = []
        end = perf_counter() + _MALLOC_SECONDS
        while len(found) < _MALLOC_CALLS and (not found or perf_counter() < end):
            sleep(0.01)  # until the call before has given back all
            told = _memory.of_malloc(call, lambda x: all(y.is_ready() for y in leaves(x)))
            if told is None:
                return planned
            peak, result = told
            found.append(peak - nbytes(leaves(result)))
            del told, result
        return max(planned or 0, sorted(found)[-2:][0])

    def _visible(self, case: Case) -> Array | None:
        return self.jax.numpy.tri(case.n_q, case.n_k, dtype=bool) if case.causal else None

    def _textbook(self, case: Case, arrays: dict[str, Array]) -> Way:
        attend = textbook(self.jax.numpy, self.jax.nn.softmax, case)
        return self._way(case, arrays, lambda q, k, v: attend(q, k, v, self._visible(case)))

    def _nn(self, case: Case, arrays: dict[str, Array], implementation: str) -> Way:
        attend = partial(
            self.jax.nn.dot_product_attention,
            is_causal=case.causal,
            implementation=implementation,
        )
        return self._way(case, arrays, attend, nhd=True)

    def _memory_efficient(
        self, case: Case, arrays: dict[str, Array], function: Callable[..., Array]
    ) -> Way:
        check_memory_efficient(case)
        if case.causal:
            function = partial(function, mask_calc_fn=causal_chunks(self.jax.numpy.arange))
        return self._way(case, arrays, function, nhd=True)


class JaxCuda(Jax):
    """JAX on its first GPU."""

    platform = "gpu"
    queues = True
    implementations = ("xla", "cudnn")

    def __init__(self) -> None:
        super().__init__()
        self.device = f"cuda ({self.place.device_kind})"

    def gemm(self, dtype: str) -> Gemm:
        """Return a product in the dtype of a size that fills the device."""
        n = 8192
        a, b = (self.jax.device_put(self.jax.numpy.ones((n, n), dtype), self.place) for _ in "ab")
        product = self.jax.jit(self.jax.numpy.matmul)
        return Gemm(lambda: product(a, b), 2.0 * n**3, self.jax.block_until_ready)

    def extra_bytes(self, call: Callable[[], Any], planned: int | None) -> int | None:
        """Return the compiler's plan."""
        return planned

    def free_memory(self) -> int | None:
        """Return what the allocator may still take."""
        stats = self.place.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else limit - stats.get("bytes_in_use", 0)


def _turned(x: Array) -> Array:
    """Exchange the axes of heads and positions."""
    return x.swapaxes(1, 2)


def _planned_bytes(compiled: Any) -> int | None:
    """Return what the compiled program holds beyond its arguments and results."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
