"""Memory of one NumPy call: the textbook's attention against the chunked one.

    python benchmarks/memory.py [--longest 16384] [--out FILE]

One head of width 64 in float32.  What is counted is the most that a call holds at a time
(tracemalloc) beyond its inputs and its outputs (out and lse).
"""

from __future__ import annotations

import tracemalloc

import numpy as np
from machine import about, run

from chunkattn import attention

SHORTEST, WIDTH = 1024, 64


def extra_bytes(n, implementation):
    """Return what one call over `n` queries and keys holds at a time beyond inputs and outputs."""
    q, k, v = np.random.default_rng(0).standard_normal((3, n, WIDTH), dtype=np.float32)
    attention(q[:8], k[:8], v[:8])  # loads the adapter
    tracemalloc.start()
    results = attention(q, k, v, implementation=implementation, return_lse=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - sum(x.nbytes for x in results)


def report(arguments):
    """Yield the lines of the report."""
    yield f"# Memory of one call on NumPy\n\n{about('python benchmarks/memory.py', arguments)}\n"
    yield "One head, d = 64, float32; the most held at a time beyond inputs and outputs, in MiB.\n"
    yield "| n | one n × n matrix | standard | chunked | ratio |\n|--:|--:|--:|--:|--:|"
    n = SHORTEST
    while n <= arguments.longest:
        standard, chunked = (extra_bytes(n, name) for name in ("standard", "chunked"))
        sizes = " | ".join(f"{size / 2**20:,.2f}" for size in (4 * n * n, standard, chunked))
        yield f"| {n:,} | {sizes} | {standard / chunked:,.0f} |"
        n *= 2


if __name__ == "__main__":
    run(__doc__, report, least={"longest": SHORTEST}, longest=16384)
