"""What `plan` predicts against what is measured, over the grid of calls of the tests.

    python benchmarks/predicted.py [--libraries numpy,torch,jax] [--out FILE]

Predicted is `Plan.peak_bytes`; measured is the most that a call holds at a time beyond inputs and
outputs: by tracemalloc for NumPy, in one thread and in two; by the record of the allocator for
PyTorch, and by the memory pools of a GPU; for JAX the larger of XLA's memory analysis, which leaves
out what its kernels take, and of what glibc's malloc has given out.  Where several threads compute,
their fullest moments meet by chance: it is the most of ten calls on NumPy, and on JAX, where malloc
is looked at as often as can be until the results are there, that of the fullest but one of thirty.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from machine import about, run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import libraries
import memory
import plans

THREADS = {"numpy": (1, 2), "torch": (1, 2), "jax": (2,), "cupy": (1,), "torch-cuda": (1,)}


def rows(lib, threads) -> Iterator[tuple[str, str, int, int]]:
    """Yield for each call its name, what it does, and the bytes predicted and measured."""
    limits = {"numpy": memory.blas_threads, "torch": memory.torch_threads}
    for name in plans.cases(lib):
        for training in (False, True):
            case = plans.Case(lib, name, training)
            measured = case.measured(threads=threads)
            with limits.get(lib.name, nullcontext)(threads):
                predicted = case.plan().peak_bytes
            yield name, "forward and gradients" if training else "forward", predicted, measured


def report(given):
    """Yield the lines of the report."""
    yield f"# Memory predicted and measured\n\n{about('python benchmarks/predicted.py', given)}\n"
    yield f"{__doc__.partition('FILE]')[2].strip()}\n"
    yield "2,048 tokens (twice as long: 4,096; 8 heads: 1,024); tiles of 256 × 512 unless said.\n"
    for library in given.libraries.split(","):
        lib = libraries.library(library)
        for threads in THREADS[library]:
            yield f"\n## {library}, {threads} thread{'s' * (threads > 1)}\n"
            yield "| call | | predicted, kB | measured, kB | ratio |\n|:--|:--|--:|--:|--:|"
            ratios = []
            for name, what, predicted, measured in rows(lib, threads):
                ratios.append(predicted / max(measured, 1))  # some kernels take nothing
                sizes = f"{predicted / 1000:,.0f} | {measured / 1000:,.0f}"
                yield f"| {name} | {what} | {sizes} | {ratios[-1]:.2f} |"
            yield f"\nRatios from {min(ratios):.3f} to {max(ratios):.3f}."


if __name__ == "__main__":
    run(__doc__, report, tuple(THREADS), libraries="numpy,torch,jax")
