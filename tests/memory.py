"""What a call holds at a time beyond its inputs and its outputs, in bytes.

    python tests/memory.py LIBRARY WAY MODE N

prints by how much the peak of this process's resident set rises in one derivative of `gradients`
(float32, one head of width 64, N queries and keys) beyond its results.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager, nullcontext

import gradients
import libraries
import numpy as np
import pytest

from chunkattn.cli import _memory

WIDTH = 64


def tokens(lib, n_q, n_k=None, dtype=None):
    """Return query, key and value of one head."""
    rng = np.random.default_rng(2112_05682)
    lengths = (n_q, n_k or n_q, n_k or n_q)
    return tuple(
        lib.asarray(rng.standard_normal((n, WIDTH), dtype=np.float32), dtype) for n in lengths
    )


def extra_bytes(lib, function, *args, threads=1, **kwargs):
    """Measure one call on this library, with NumPy or PyTorch held to `threads` threads."""
    if lib.name.startswith("jax"):
        return _of_jax(function, args, kwargs)
    measures = {"torch": _memory.of_torch_cpu, "torch-cuda": _of_cuda, "cupy": _of_cupy}
    measure = measures.get(lib.name, of_numpy)
    limits = {of_numpy: blas_threads, _memory.of_torch_cpu: torch_threads}
    with limits.get(measure, nullcontext)(threads):
        function(*(x[:8, :] for x in args))  # what a first call loads is no part of it
        gc.collect()
        peak, results = measure(lambda: function(*args, **kwargs))
    return peak - nbytes(results)


def nbytes(results):
    """Return the size of a tuple or a dict of arrays."""
    arrays = results.values() if isinstance(results, dict) else results
    return sum(getattr(x, "_array", x).nbytes for x in arrays)


def blas_threads(count):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    return threadpoolctl.threadpool_limits(count, user_api="blas")


@contextmanager
def torch_threads(count):
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_numpy(call):
    tracemalloc.start()
    try:
        results = call()
        return tracemalloc.get_traced_memory()[1], results
    finally:
        tracemalloc.stop()


def _of_cupy(call):
    """Follow what is taken from the memory pool and given back."""
    import cupy

    class Held(cupy.cuda.MemoryHook):
        name = "Held"
        now = peak = 0

        def malloc_postprocess(self, *, mem_size, **_):
            self.now += mem_size
            self.peak = max(self.peak, self.now)

        def free_postprocess(self, *, mem_size, **_):
            self.now -= mem_size

    with Held() as held:
        results = call()
    return held.peak, results


def _of_cuda(call):
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    return torch.cuda.max_memory_allocated() - before, results


def _of_jax(function, args, kwargs):
    """Ask the compiler, which plans all memory ahead."""
    import jax

    arrays = {name: x for name, x in kwargs.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in kwargs.items() if name not in arrays}
    compiled = jax.jit(lambda args, arrays: function(*args, **arrays, **static))
    return compiled.lower(args, arrays).compile().memory_analysis().temp_size_in_bytes


def of_malloc(call):
    """Return what `_memory.of_malloc` does for a call of JAX."""
    found = _memory.of_malloc(call, lambda results: all(x.is_ready() for x in results))
    if found is None:
        pytest.skip("needs mallinfo2 of glibc 2.33 or later")
    return found


# Derivatives


def extra_bytes_of_derivative(lib, way, mode, n, threads=1):
    """Measure one derivative of `gradients`."""
    function = _flat(gradients.derivative(lib, way, mode))
    return extra_bytes(lib, function, *_flat_point(lib, n), threads=threads)


def _flat_point(lib, n):
    return *tokens(lib, n), *tokens(lib, n), tokens(lib, n)[0]


def _flat(function):
    return lambda *xs: function(gradients.Point(xs[:3], xs[3:6], xs[6]))


def of_process(library, way, mode, n, threads=1):
    """Measure one derivative by the resident set of a process of its own."""
    command = [sys.executable, __file__, library, way, mode, str(n)]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return int(done.stdout)


def main(name, way, mode, n):
    lib = libraries.library(name)
    function = _flat(gradients.derivative(lib, way, mode))
    point = _flat_point(lib, int(n))
    function(*(x[:64, :] for x in point))
    gc.collect()
    _memory.give_back()
    meter = _memory.start(point[0])
    results = function(*point)
    print(meter.rise() - nbytes(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
