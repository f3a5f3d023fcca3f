"""NumPy and CuPy in the benchmark: chunkattn, textbook attention, and the matrix product."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from .. import attention, attention_vjp
from . import _memory
from ._bench_case import Case
from ._bench_library import (
    Candidate,
    Gemm,
    Library,
    NotApplicableError,
    Way,
    nbytes,
    split,
    split_keys,
    textbook,
)

Array = Any
GRADIENTS = ("query", "key", "value")


class NumPy(Library):
    """NumPy, whose memory tracemalloc follows."""

    def __init__(self) -> None:
        self.xp: Any = import_module("numpy")

    def candidates(self, case: Case, implementations: tuple[str, ...]) -> Iterator[Candidate]:
        """Yield chunkattn and textbook attention."""
        arrays = self.arrays(case)
        count = 4 if case.backward else 3
        for name in implementations:
            make = _maker(self._way, self._ours, case, arrays, name)
            yield Candidate(name, make, True, count if name == "standard" else 0)
        make = _maker(self._way, self._textbook, case, arrays)
        yield Candidate("textbook", make, score_arrays=count)

    def gemm(self, dtype: str) -> Gemm:
        """Return a product of float32, or of float64 for float64."""
        a, b = (
            self.xp.ones((1024, 1024), "float64" if dtype == "float64" else "float32")
            for _ in range(2)
        )
        return Gemm(lambda: a @ b, 2.0 * 1024**3)

    def arrays(self, case: Case) -> dict[str, Array]:
        """Return the case's data in its dtype."""
        dtype = self.dtype(case.dtype)
        return {name: self.xp.asarray(x).astype(dtype) for name, x in case.numbers().items()}

    def dtype(self, name: str) -> Any:
        """Return the dtype of that name."""
        if name != "bfloat16":
            return self.xp.dtype(name)
        try:
            return self.xp.dtype(import_module("ml_dtypes").bfloat16)
        except ImportError as error:
            raise NotApplicableError("NumPy has bfloat16 by ml_dtypes alone") from error

    def wait(self, result: Any) -> Any:
        """Return the result once it is there."""
        return result

    def fetch(self, result: Any) -> list[Array]:
        """Return the arrays of a result as NumPy arrays."""
        return [x.astype("float64" if x.dtype == "float64" else "float32") for x in result]

    def extra_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return the peak of one call beyond its result."""
        tracemalloc.start()
        try:
            result = call()
            return tracemalloc.get_traced_memory()[1] - nbytes(result)
        finally:
            tracemalloc.stop()

    def _way(self, call: Callable[[], Any]) -> Way:
        return Way(call, self.fetch, lambda: self.extra_bytes(call), wait=self.wait)

    def _ours(
        self, case: Case, arrays: dict[str, Array], implementation: str
    ) -> Callable[[], list[Array]]:
        *tokens, d_out = arrays.values()
        keywords: dict[str, Any] = {"causal": case.causal, "implementation": implementation}
        if not case.backward:
            return lambda: [attention(*tokens, **keywords)]

        def call() -> list[Array]:
            _, vjp = attention_vjp(*tokens, **keywords)
            gradients = vjp(d_out)
            return [gradients[name] for name in GRADIENTS]

        return call

    def _textbook(self, case: Case, arrays: dict[str, Array]) -> Callable[[], list[Array]]:
        """Compute half precision in float32, as BLAS knows no other."""
        given = arrays["query"].dtype
        wide = self.xp.dtype("float64" if case.dtype == "float64" else "float32")
        visible = self.xp.tri(case.n_q, case.n_k, dtype=bool) if case.causal else None
        attend = textbook(self.xp, self._softmax, case)

        def call() -> list[Array]:
            *tokens, d_out = (x.astype(wide, copy=False) for x in arrays.values())
            if case.backward:
                results = self._gradients(case, tokens, d_out, visible)
            else:
                results = [attend(*tokens, visible)]
            return [x.astype(given, copy=False) for x in results]

        return call

    def _softmax(self, scores: Array) -> Array:
        weights = self.xp.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)

    def _gradients(
        self, case: Case, tokens: list[Array], d_out: Array, visible: Array | None
    ) -> list[Array]:
        """Return the gradients by their formulas, with all weights at once."""
        query, d_out = (split(x, case) for x in (tokens[0], d_out))
        key, value = (split_keys(x, case) for x in tokens[1:])
        scale = case.d**-0.5
        scores = query @ key.swapaxes(-1, -2) * scale
        if visible is not None:
            scores = self.xp.where(visible, scores, -self.xp.inf)
        weights = self._softmax(scores)
        out = weights @ value
        d_weights = d_out @ value.swapaxes(-1, -2)
        d_scores = weights * (d_weights - (d_out * out).sum(axis=-1, keepdims=True)) * scale
        found = d_scores @ key, d_scores.swapaxes(-1, -2) @ query, weights.swapaxes(-1, -2) @ d_out
        d_query, d_key, d_value = found
        if case.grouped:
            d_key, d_value = d_key.sum(axis=2), d_value.sum(axis=2)
        return [x.reshape(y.shape) for x, y in zip((d_query, d_key, d_value), tokens, strict=True)]


class CuPy(NumPy):
    """CuPy on its current device."""

    queues = True

    def __init__(self) -> None:
        self.xp = import_module("cupy")
        runtime = self.xp.cuda.runtime
        try:
            name = runtime.getDeviceProperties(self.xp.cuda.Device().id)["name"].decode()
        except runtime.CUDARuntimeError as error:
            raise ImportError(f"CuPy sees no GPU: {error}") from error
        self.device = f"cuda ({name})"

    def gemm(self, dtype: str) -> Gemm:
        """Return a product of a size that fills the device."""
        n = 8192
        wide = self.xp.dtype("float32" if dtype == "bfloat16" else dtype)
        a, b = (self.xp.ones((n, n), wide) for _ in range(2))
        return Gemm(lambda: a @ b, 2.0 * n**3, self.wait)

    def dtype(self, name: str) -> Any:
        """Return the dtype of that name."""
        if name == "bfloat16":
            raise NotApplicableError("CuPy has no bfloat16")
        return self.xp.dtype(name)

    def wait(self, result: Any) -> Any:
        """Return the result once it is there."""
        self.xp.cuda.get_current_stream().synchronize()
        return result

    def fetch(self, result: Any) -> list[Array]:
        """Return the arrays of a result as NumPy arrays."""
        return super().fetch([self.xp.asnumpy(x) for x in result])

    def extra_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return by how much the memory pool grows beyond the result."""
        meter = _memory.start(self.xp.ones(1))
        if meter is None or meter.measure != "allocator":
            return None
        result = self.wait(call())
        return max(0, meter.rise() - nbytes(result))

    def free_memory(self) -> int | None:
        """Return the device's free memory."""
        return int(self.xp.cuda.Device().mem_info[0])


def _maker(way: Callable[..., Way], bind: Callable[..., Any], *args: Any) -> Callable[[], Way]:
    return lambda: way(bind(*args))
