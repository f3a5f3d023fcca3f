"""CuPy: NumPy's in-place verbs on one stream, whole batches at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cupy as cp

from .generic import Array
from .numpy import InPlace


class Adapter(InPlace):
    """CuPy."""

    library = cp
    name = "cupy"
    chunk_sizes = (2048, 2048)
    tile_elements = 2**26

    @property
    def floats(self) -> dict[str, Any]:
        """CuPy's floating dtypes; it has no bfloat16."""
        return {name: cp.dtype(name) for name in ("float16", "float32", "float64")}

    def run(self, algorithm: Any, spec: Any, arrays: dict[str, Any]) -> tuple[Array, ...]:
        """Call the algorithm on the device that holds the arrays."""
        with next(x.device for x in _arrays(arrays)):
            return tuple(algorithm(self, spec, arrays))

    def differentiable(
        self, operation: Any, spec: Any, data: dict[str, Any], inputs: dict[str, Array]
    ) -> dict[str, Array]:
        """Call the operation on the device that holds the arrays."""
        with next(x.device for x in _arrays(inputs)):
            return super().differentiable(operation, spec, data, inputs)


def _arrays(x: Any) -> Iterator[Array]:
    """Yield the arrays in a nest of dicts and tuples."""
    if isinstance(x, dict | tuple):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _arrays(y)
    elif isinstance(x, cp.ndarray):
        yield x
