"""CuPy: NumPy's in-place verbs on one stream, whole batches at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import cupy as cp

from ._sizes import OF_GPU, Footprint, TileSizes
from .generic import Array
from .numpy import InPlace


class Adapter(InPlace):
    """CuPy."""

    library = cp
    name = "cupy"

    _exp_difference = cp.ElementwiseKernel("T x, T y", "T z", "z = exp(x - y)", "exp_difference")

    @property
    def floats(self) -> dict[str, Any]:
        """CuPy's floating dtypes; it has no bfloat16."""
        return {name: cp.dtype(name) for name in ("float16", "float32", "float64")}

    def device(self, x: Array) -> Any:
        """Return the number of the device that holds `x`."""
        return x.device.id

    def tile_sizes(self, like: Array, backward: bool = False) -> TileSizes:
        """Return the sizes for GPUs."""
        return OF_GPU

    def footprint(self, like: Array) -> Footprint:
        """Return what CuPy holds of its own; its products copy what is transposed, or cut out."""
        found = super().footprint(like)
        return found._replace(buffers=3_072, positions=0, objects=0, ordered=1)

    def on_device_of(self, x: Array) -> AbstractContextManager[Any]:
        """Make that device the current one, on which CuPy computes."""
        device: AbstractContextManager[Any] = x.device
        return device

    def exp_difference(self, x: Array, y: Array) -> Array:
        """Overwrite `x` with ``exp(x - y)``, in one pass over memory."""
        return self._exp_difference(x, y, x)

    def run(self, algorithm: Any, spec: Any, arrays: dict[str, Any]) -> tuple[Array, ...]:
        """Call the algorithm on the device that holds the arrays."""
        with self.on_device_of(next(_arrays(arrays))):
            return tuple(algorithm(self, spec, arrays))

    def differentiable(
        self, operation: Any, spec: Any, data: dict[str, Any], inputs: dict[str, Array]
    ) -> dict[str, Array]:
        """Call the operation on the device that holds the arrays."""
        with self.on_device_of(next(_arrays(inputs))):
            return super().differentiable(operation, spec, data, inputs)


def _arrays(x: Any) -> Iterator[Array]:
    """Yield the arrays in a nest of dicts and tuples."""
    if isinstance(x, dict | tuple):
        for y in x.values() if isinstance(x, dict) else x:
            yield from _arrays(y)
    elif isinstance(x, cp.ndarray):
        yield x
