"""What NumPy gains by products in pieces, which OpenBLAS multiplies where they lie.

    python benchmarks/pieces.py [--rounds 9] [--out FILE]

In float32, 8 heads: whole calls on all cores, with products in pieces and with whole ones in turns.
"decode" is one query for each head against n keys, of 2 heads.  The ratio is that of a round;
medians, with the quartiles in brackets.
"""

from __future__ import annotations

from importlib import import_module
from itertools import product
from statistics import median, quantiles
from time import perf_counter

import numpy as np
import threadpoolctl
from machine import about, run

from chunkattn import attention, attention_vjp

CASES = {
    "forward": (512, 1024, 2048, 4096),
    "causal": (1024, 4096),
    "forward+backward": (1024, 2048),
    "decode": (4096, 16384),
}


def seconds(mode, tokens):
    """Return how long one call takes."""
    begin = perf_counter()
    if mode == "forward+backward":
        out, vjp = attention_vjp(*tokens)
        vjp(out)
    else:
        attention(*tokens, causal=mode == "causal")
    return perf_counter() - begin


def compared(mode, n, d, rounds):
    """Return the seconds of whole products and of pieces, round by round."""
    adapter = import_module("chunkattn.backends.numpy")
    kept, rng = adapter._pieces_are_fast, np.random.default_rng(0)
    tokens = rng.standard_normal((3, 1, 8, n, d), dtype=np.float32)
    if mode == "decode":
        tokens = tokens[0, :, :, :1], *tokens[1:, :, :2]
    found = []
    try:
        for _ in range(rounds + 1):
            times = []
            for pieces in (False, True):
                adapter._pieces_are_fast = lambda pieces=pieces: pieces
                times.append(seconds(mode, tokens))
            found.append(times)
    finally:
        adapter._pieces_are_fast = kept
    return zip(*found[1:], strict=True)


def report(given):
    """Yield the lines of the report."""
    yield f"# Products in pieces on NumPy\n\n{about('python benchmarks/pieces.py', given)}"
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas":
            told = (library[name] for name in ("internal_api", "version", "architecture"))
            yield f"- BLAS: {' '.join(map(str, told))}, {library['num_threads']} threads"
    yield f"\n{__doc__.partition('FILE]')[2].strip()}\n"
    yield "| call | n | d | whole, ms | pieces, ms | pieces / whole |\n|:--|--:|--:|--:|--:|--:|"
    for mode, lengths in CASES.items():
        for n, d in product(lengths, (64, 128)):
            whole, pieces = compared(mode, n, d, given.rounds)
            low, middle, high = quantiles(p / w for p, w in zip(pieces, whole, strict=True))
            told = f"{median(whole) * 1e3:.3g} | {median(pieces) * 1e3:.3g}"
            yield f"| {mode} | {n:,} | {d} | {told} | {middle:.2f} [{low:.2f}, {high:.2f}] |"


if __name__ == "__main__":
    run(__doc__, report, least={"rounds": 2}, rounds=9)
