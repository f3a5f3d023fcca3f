"""A call of a million tokens: its time, its memory, and its error on some queries.

    python benchmarks/million.py [--library numpy] [--n 1048576] [--queries N] [--dtype float32]
        [--implementation chunked] [--out FILE]

One head of width 64.  Memory is that of the call beyond inputs and outputs: the allocator's on a
GPU, else the resident set's, which is to be measured in a process of its own.  The error is that of
`out` and `lse` on 16 queries against float64.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from machine import about, write

from chunkattn import attention
from chunkattn.cli._memory import start
from chunkattn.cli._types import at_least

WIDTH, SAMPLES = 64, 16


def arrays(library, x, dtype):
    """Return a NumPy array as one of `library` in `dtype`."""
    if library == "numpy":
        return x.astype(dtype)
    if library == "cupy":
        import cupy

        return cupy.asarray(x, dtype=dtype)
    if library.startswith("torch"):
        import torch

        device = "cuda" if library == "torch-cuda" else "cpu"
        return torch.asarray(x, device=device).to(getattr(torch, dtype))
    import jax

    device = jax.devices("cuda" if library == "jax-cuda" else "cpu")[0]
    return jax.device_put(jax.numpy.asarray(x, dtype), device)


def numbers(library, x):
    """Return an array of `library` in float64, once it is there."""
    if library == "cupy":
        return x.get().astype(np.float64)
    if library.startswith("torch"):
        return x.double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def expected(query, key, value):
    """Return textbook attention of a few queries, and its lse, in float64."""
    scores = query @ key.T / np.sqrt(WIDTH)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights @ value / total, (top + np.log(total))[:, 0]


def report(given):
    """Yield the lines of the report."""
    command = "python benchmarks/million.py"
    yield f"# A million tokens in one call\n\n{about(command, given)}\n"
    rng = np.random.default_rng(0)
    lengths = (given.queries or given.n, given.n, given.n)
    tokens = [
        arrays(given.library, rng.standard_normal((n, WIDTH), dtype=np.float32), given.dtype)
        for n in lengths
    ]
    call = {"implementation": given.implementation, "return_lse": True}
    attention(*(x[:512] for x in tokens), **call)  # loads what a first call loads
    meter = start(tokens[0])
    begin = perf_counter()
    out, lse = attention(*tokens, **call, progress=given.progress)
    numbers(given.library, lse[:1])  # waits
    seconds, rise = perf_counter() - begin, meter.rise() - out.nbytes - lse.nbytes
    chosen = np.linspace(0, lengths[0] - 1, SAMPLES).astype(int).tolist()
    query, key, value = (numbers(given.library, x) for x in tokens)
    found = [
        np.stack([numbers(given.library, x[i : i + 1])[0] for i in chosen]) for x in (out, lse)
    ]
    errors = [
        np.abs(x - y).max() for x, y in zip(found, expected(query[chosen], key, value), strict=True)
    ]
    operations = 4 * lengths[0] * given.n * WIDTH
    yield (
        "| queries | keys | seconds | TFLOP/s | extra memory, MiB | error of out | of lse |\n"
        "|--:|--:|--:|--:|--:|--:|--:|\n"
        f"| {lengths[0]:,} | {given.n:,} | {seconds:.2f} | {operations / seconds / 1e12:.2f} "
        f"| {rise / 2**20:.1f} ({meter.measure}) | {errors[0]:.1e} | {errors[1]:.1e} |"
    )


def main():
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    libraries = ("numpy", "torch", "jax", "cupy", "torch-cuda", "jax-cuda")
    parser.add_argument("--library", choices=libraries, default="numpy")
    parser.add_argument(
        "--n", type=partial(at_least, 1), default=2**20, help="keys (default: 1048576)"
    )
    parser.add_argument("--queries", type=partial(at_least, 1), help="(default: as many as keys)")
    dtypes = ("float16", "bfloat16", "float32", "float64")
    parser.add_argument("--dtype", choices=dtypes, default="float32")
    parser.add_argument("--implementation", default="chunked")
    parser.add_argument("--progress", action="store_true", default=None, help="show a bar")
    parser.add_argument("--out", type=Path, help="write the report here")
    given = parser.parse_args()
    write(report(given), given.out)


if __name__ == "__main__":
    sys.exit(main())
