"""NumPy: products, exponentials and masks in place, tasks on a pool of threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np

from . import _bits, _threads, generic, numpy_pieces
from ._sizes import OF_CPU, Footprint, TileSizes
from .generic import LOG2_E, SMALL, Array, Index, State

_RUN = 128


class InPlace(generic.Adapter):
    """The verbs of libraries whose ufuncs take ``out``, on the ``library`` of the subclass."""

    library: Any

    def footprint(self, like: Array) -> Footprint:
        """Return what ufuncs that take ``out`` leave to hold."""
        return Footprint(weights=0, hashes=3)

    def is_floating(self, dtype: Any) -> bool:
        """Whether `dtype` is floating, `longdouble` included."""
        return dtype.kind == "f" or super().is_floating(dtype)

    def device(self, x: Array) -> Any:
        """Where `x` lives."""
        return x.device

    def new(self, like: Array, shape: Any, fill: float, dtype: Any) -> Array:
        """Return an array of `shape` and `dtype` full of `fill`."""
        return self.library.full(tuple(shape), fill, dtype=dtype)

    def index(self, like: Array, size: int) -> Array:
        """Return the integers 0 … size-1."""
        return self.library.arange(size, dtype=np.int64)

    def workspace(self, like: Array, size: int, dtype: Any) -> Array | None:
        """Return flat memory for `size` elements."""
        return self.library.empty(size, dtype=dtype)

    def matmul(self, a: Array, b: Array, workspace: Array | None = None) -> Array:
        """Return ``a @ b``, in `workspace` where there is one."""
        if workspace is None:
            return self.library.matmul(a, b)
        return self.library.matmul(a, b, out=self.space(workspace, a, b))

    @staticmethod
    def space(workspace: Array | None, a: Array, b: Array) -> Array:
        """Return memory for ``a @ b``, in `workspace` where there is one."""
        lead = a.shape[:-2]
        if lead != b.shape[:-2]:
            lead = np.broadcast_shapes(lead, b.shape[:-2])
        shape = (*lead, a.shape[-2], b.shape[-1])
        if workspace is None:
            return np.empty(shape, a.dtype)
        return workspace[: prod(shape)].reshape(shape)

    def matrix_transpose(self, x: Array) -> Array:
        """Return a view with the last two axes exchanged."""
        return x.swapaxes(-1, -2)

    def cap(self, s: Array, softcap: float) -> Array:
        """Overwrite `s` with ``softcap * tanh(s / softcap)``."""
        s /= softcap
        self.library.tanh(s, out=s)
        s *= softcap
        return s

    def hide(self, x: Array, allowed: Array, fill: float) -> Array:
        """Overwrite `x` with `fill` where not `allowed`."""
        self.library.copyto(x, fill, where=~allowed)
        return x

    def maximum(self, a: Array, b: Array) -> Array:
        """Return the larger of `a` and `b`, NaN where either is NaN."""
        return self.library.maximum(a, b)


class Adapter(InPlace):
    """NumPy; also arrays of ml_dtypes' bfloat16."""

    library = np
    name = "numpy"

    def __init__(self, namespace: Any) -> None:
        """Have malloc keep what calls free.

        glibc gives it back to the system, and the next call has to take it again, page by page.  It
        does so no longer for blocks that are smaller than one that was freed before.
        """
        super().__init__(namespace)
        np.empty(2**24, np.uint8)

    def exp_difference(self, x: Array, y: Array) -> Array:
        """Overwrite `x` with ``exp(x - y)``."""
        x -= y
        return _exp(x, x.min(initial=0))

    def hide(self, x: Array, allowed: Array, fill: float) -> Array:
        """Overwrite `x` with `fill` where not `allowed`."""
        if allowed.all():
            return x
        if x.size < _bits.FEW or _in_runs(allowed):
            return super().hide(x, allowed, fill)
        return _bits.hide(self, x, allowed, fill)

    def looks(self, like: Array) -> bool:
        """Return True: values are at hand."""
        return True

    def weigh(self, s: Array, top: Array) -> tuple[Array, Array, Array]:
        """Overwrite the scores with the weights.

        A maximum that is small may as well be 0, which need not be subtracted; to see that all are
        small takes less time than to find them.
        """
        lowest = s.min()
        if lowest >= -SMALL and top.max() <= SMALL and s.max() <= SMALL:
            top = np.zeros_like(top) if top.any() else top
        else:
            largest = s.max(axis=-1, keepdims=True)
            top = np.maximum(top, largest)
            top[(np.abs(largest) <= SMALL) & (top <= SMALL)] = 0
            if top.any():
                s -= top
                lowest = s.min()
        weights = _exp(s, lowest)
        return weights, _sums(weights), top

    def footprint(self, like: Array) -> Footprint:
        """Return what NumPy holds of its own, on this CPU."""
        found = super().footprint(like)._replace(bits=True)
        if not _pieces_are_fast():
            return found
        bounds = numpy_pieces.MANY, numpy_pieces.LIMIT
        return found._replace(ordered_from=bounds, runs_from=numpy_pieces.LONGEST)

    @property
    def floats(self) -> dict[str, Any]:
        """NumPy's dtypes, and bfloat16 once ml_dtypes is loaded."""
        found = {"float16": np.float16, "float32": np.float32, "float64": np.float64}
        ml_dtypes = sys.modules.get("ml_dtypes")
        if ml_dtypes is not None:
            found["bfloat16"] = ml_dtypes.bfloat16
        return {name: np.dtype(dtype) for name, dtype in found.items()}

    def check(self, x: Array, name: str) -> None:
        """Refuse masked arrays, whose mask would be lost, and matrices."""
        if isinstance(x, np.ma.MaskedArray | np.matrix):
            raise TypeError(
                f"{name} is a {type(x).__module__}.{type(x).__qualname__}, whose own rules "
                f"attention would ignore; pass a plain array (numpy.asarray({name}))"
            )

    def tile_sizes(self, like: Array, backward: bool = False) -> TileSizes:
        """Return the sizes for a CPU whose threads have tasks of their own, in calls not too small.

        BLAS has all of its threads for the products of a call that is one task.
        """
        return OF_CPU._replace(alone=2 * OF_CPU.elements, threads=_threads.most())

    def setting(self, arrays: Sequence[Array]) -> Any:
        """Return the device, and how many threads BLAS has."""
        return self.device(arrays[0]), _threads.most()

    def at_once(self, count: int) -> int:
        """Return how many threads there are for `count` tasks, where no other call takes any."""
        return min(count, _threads.most()) if count > 1 else count

    def each(
        self,
        step: Callable[[State, Index], State],
        state: State,
        count: int,
        done: Callable[[], None] | None = None,
    ) -> State:
        """Run the steps on as many threads as BLAS would use."""

        def one(state: State, i: Index) -> State:
            return _threads.as_one_of(count, step, state, i)

        def task(i: int) -> None:
            with np.errstate(all="ignore"):
                one(state, i)
            if done is not None:
                done()

        threads = min(count, _threads.share()) if count > 1 else count
        if threads < 2:
            return super().each(one, state, count, done)
        _threads.run_all(task, count, threads)
        return state

    def matmul(self, a: Array, b: Array, workspace: Array | None = None) -> Array:
        """Return ``a @ b``, in `workspace` where there is one; in a task, piece by piece.

        So are products of few rows everywhere, for which BLAS's threads gain less than pieces.
        """
        several = _threads.one_of_several()
        few = a.shape[-2] <= numpy_pieces.FEW
        if not ((several or few) and a.dtype.char in "fd" and _pieces_are_fast()):
            return super().matmul(a, b, workspace)
        out = self.space(workspace, a, b)
        return out if numpy_pieces.fill(out, a, b, several) else np.matmul(a, b, out=out)

    def run(self, algorithm: Any, spec: Any, arrays: dict[str, Any]) -> tuple[Array, ...]:
        """Call the algorithm on base-class arrays, and let inf and NaN pass without warnings."""
        with np.errstate(all="ignore"):
            return tuple(algorithm(self, spec, _plain(arrays)))

    def differentiable(
        self, operation: Any, spec: Any, data: dict[str, Any], inputs: dict[str, Array]
    ) -> dict[str, Array]:
        """Call the operation as `run` calls an algorithm."""
        with np.errstate(all="ignore"):
            return super().differentiable(operation, spec, _plain(data), _plain(inputs))


def _in_runs(mask: Array) -> bool:
    """Whether few values differ from the one before, as far as every 16th row tells."""
    rows = np.atleast_2d(mask)[..., ::16, :]
    return bool(8 * np.count_nonzero(rows[..., 1:] ^ rows[..., :-1]) < rows.size)


@cache
def _exp2_is_fast() -> bool:
    """Whether NumPy computes ``2**x`` by vectors on this CPU, as it does ``e**x`` on most."""
    introspect = getattr(np.lib, "introspect", None)  # since NumPy 2.0
    loops = introspect.opt_func_info(func_name="^exp2$").get("exp2", {}) if introspect else {}
    told = [loops.get(name, {}).get("current", "baseline") for name in ("ff", "dd")]
    return not any(name.startswith("baseline") for name in told)


@cache
def _pieces_are_fast() -> bool:
    """Whether NumPy's BLAS is an OpenBLAS with the kernels that `numpy_pieces` is for."""
    return _threads.architectures() == {"SkylakeX"}


@cache
def _lowest(dtype: Any) -> float:
    """Return the logarithm of the smallest normal number."""
    return float(np.log(np.finfo(dtype).smallest_normal))


def _exp(x: Array, lowest: float) -> Array:
    """Overwrite `x`, which has nothing below `lowest`, with its exponential.

    As a power of 2 where that takes less time: not where it underflows, for which NumPy's vectors
    take many times as long.
    """
    if not (_exp2_is_fast() and lowest > _lowest(x.dtype)):  # it may be NaN
        return np.exp(x, out=x)
    x *= LOG2_E
    return np.exp2(x, out=x)


def _sums(x: Array) -> Array:
    """Return the sums of rows, by BLAS where it can take runs as short as those of NumPy's sum.

    It takes less time than NumPy's, but sums up one run of any length, with a larger error.
    """
    cols = x.shape[-1]
    if cols % _RUN:
        return x.sum(axis=-1, keepdims=True)
    runs = x.reshape(-1, _RUN) @ np.ones(_RUN, x.dtype)
    return runs.reshape(*x.shape[:-1], cols // _RUN).sum(axis=-1, keepdims=True)


def _plain(x: Any) -> Any:
    """Return `x` with every array in it as NumPy's base class."""
    if type(x) is np.ndarray:
        return x
    if isinstance(x, dict):
        return {name: _plain(y) for name, y in x.items()}
    if isinstance(x, tuple):
        return tuple(map(_plain, x))
    return x.view(np.ndarray) if isinstance(x, np.ndarray) else x
