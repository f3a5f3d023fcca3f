"""Derivatives: memory and rounding errors of the tiles beside those of textbook attention.

    python benchmarks/gradients.py [--n 16384] [--longest 65536] [--out FILE]

Three derivatives of one head of width 64: reverse mode (a forward and a backward pass), forward
mode, and second order (the gradient of a function of the gradient).  The textbook's are by the
library's own automatic differentiation, and on NumPy by their formulas.

What is measured, and how, is that of tests/memory.py and tests/test_gradient_accuracy.py, whose
needs are needed here too (pytest, ml_dtypes).
"""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from machine import about, run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import gradients as ways  # noqa: E402
import libraries  # noqa: E402
import memory  # noqa: E402
from test_gradient_accuracy import CASES, errors, rms  # noqa: E402

LIBRARIES = {
    "numpy": ("numpy", "numpy-bfloat16"),
    "torch": ("torch",),
    "jax": ("jax",),
}
SHORTEST = 4096
LENGTHS = (512, 2048)  # of the errors
ERROR_CASES = [case for case in CASES if "bias" not in case or len(CASES[case]) == 1]
ARRAYS = 16  # more n × n arrays than any textbook derivative holds at a time


def extra_bytes(name, way, mode, n):
    """Return what one derivative holds at a time beyond its inputs and its results."""
    threads = os.cpu_count()
    if name == "torch":
        return memory.of_process(name, way, mode, n, threads)
    return memory.extra_bytes_of_derivative(libraries.library(name), way, mode, n, threads=threads)


def textbook_bytes(name, mode, n):
    """Return what the textbook's derivative needs, and the length that it was measured at.

    Where memory is scarce that is a shorter one, from which its n² tells the rest.
    """
    measured = n
    while name != "jax" and 4 * ARRAYS * measured**2 > available():
        measured //= 2
    return extra_bytes(name, "textbook", mode, measured) * (n // measured) ** 2, measured


def available():
    """Return the bytes of memory that are free for use, where the system tells it."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return float("inf")
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def modes():
    """Yield each library and the modes that it has."""
    for name in LIBRARIES:
        for mode in ways.modes(libraries.library(name)):
            yield name, mode


def of_memory(arguments):
    """Yield the lines on memory."""
    n = arguments.n
    yield f"## Memory at n = {n:,}\n"
    yield (
        "One head, d = 64, float32; the most held at a time beyond the inputs and the results, in "
        "MiB.  NumPy by tracemalloc, PyTorch by the peak of the resident set of a process of its "
        "own, JAX by XLA's memory analysis under `jax.jit`.  One n × n matrix is "
        f"{4 * n * n / 2**20:,.0f} MiB.\n"
    )
    yield "| library | derivative | textbook | tiles | ratio |\n|---|---|--:|--:|--:|"
    for name, mode in modes():
        textbook, measured = textbook_bytes(name, mode, n)
        tiles = extra_bytes(name, "chunked", mode, n)
        told = f"{textbook / 2**20:,.0f}"
        if measured < n:
            told += f" (that of n = {measured:,}, times {(n // measured) ** 2})"
        yield f"| {name} | {mode} | {told} | {tiles / 2**20:,.2f} | {textbook / tiles:,.0f} |"
    lengths = [SHORTEST]
    while lengths[-1] < arguments.longest:
        lengths.append(2 * lengths[-1])
    yield "\n## Growth of the tiles' memory with n\n"
    yield (
        "As above, in MiB; the last column says by how many arrays as large as the query (n × 64) "
        "it grows.  The resident set of PyTorch's process differs by several MiB from run to run.\n"
    )
    yield f"| library | derivative | {' | '.join(f'{n:,}' for n in lengths)} | arrays |"
    yield f"|---|---|{'--:|' * len(lengths)}--:|"
    for name, mode in modes():
        sizes = [extra_bytes(name, "chunked", mode, n) for n in lengths]
        arrays = (sizes[-1] - sizes[0]) / (4 * memory.WIDTH * (lengths[-1] - lengths[0]))
        told = " | ".join(f"{size / 2**20:,.2f}" for size in sizes)
        yield f"| {name} | {mode} | {told} | {arrays:.2f} |"


class Ratios(NamedTuple):
    """The errors of the tiles over those of the textbook, of one derivative."""

    library: str
    dtype: str
    mode: str
    n: int
    case: str
    rms: dict[str, float]  # by result
    largest: float


def ratios():
    """Yield the `Ratios` of every library, dtype, length, case and derivative."""
    for name in (name for names in LIBRARIES.values() for name in names):
        lib = libraries.library(name)
        with lib.active():
            for dtype, n, case in product(lib.dtypes, LENGTHS, ERROR_CASES):
                found = list(errors(lib, dtype, case, heads=1, n=n))
                for mode in dict.fromkeys(mode for mode, *_ in found):
                    own = {result: error for other, result, error in found if other == mode}
                    by_result = {result: _ratio(rms, error) for result, error in own.items()}
                    largest = max(_ratio(largest_of, error) for error in own.values())
                    yield Ratios(name, dtype, mode, n, case, by_result, largest)


def _ratio(measure, error):
    return measure(error["chunked"]) / measure(error["textbook"])


def largest_of(error):
    """Return the largest error."""
    return float(np.abs(error).max())


def of_errors():
    """Yield the lines on rounding errors."""
    lengths = " and ".join(f"{n:,}" for n in LENGTHS)
    yield "\n## Rounding errors\n"
    yield (
        f"One head of width 64, {lengths} queries and keys, default chunk sizes: the error against "
        "wider arithmetic (float64; for float64 long double) on the same rounded inputs, relative "
        "to that of textbook attention in the same dtype (computed in float32 for half precision; "
        "under `jax.jit` on JAX).  “large scores” has queries four times as large.  “rms” is the "
        "ratio of the root-mean-square errors, “largest” that of the largest errors, which are one "
        "number's each.\n"
    )
    rows = list(ratios())
    yield "### Largest ratios of all cases\n"
    yield "| library | dtype | derivative | rms | of | largest |\n|---|---|---|--:|---|--:|"
    for kind in dict.fromkeys(row[:3] for row in rows):
        own = [row for row in rows if row[:3] == kind]
        top, of = max(
            (ratio, f"{result}, n = {row.n:,}, {row.case}")
            for row in own
            for result, ratio in row.rms.items()
        )
        yield f"| {' | '.join(kind)} | {top:.2f} | {of} | {max(row.largest for row in own):.2f} |"
    yield "\n### All cases\n"
    yield "| library | dtype | derivative | n | case | rms by result | largest |"
    yield "|---|---|---|--:|---|---|--:|"
    for row in rows:
        told = ", ".join(f"{result} {row.rms[result]:.2f}" for result in sorted(row.rms))
        kind = " | ".join(row[:3])
        yield f"| {kind} | {row.n:,} | {row.case} | {told} | {row.largest:.2f} |"


def report(arguments):
    """Yield the lines of the report."""
    yield f"# Derivatives\n\n{about('python benchmarks/gradients.py', arguments)}\n"
    yield from of_memory(arguments)
    yield from of_errors()


if __name__ == "__main__":
    run(__doc__, report, least={"longest": 4097}, n=16384, longest=65536)
