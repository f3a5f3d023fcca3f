"""The default sizes of tiles against a search over sizes.

    python benchmarks/sizes.py [--libraries numpy,torch,jax] [--n 4096] [--heads 8] [--dim 64]
        [--rounds 7] [--out FILE]

All sizes of a grid are timed in turns, in an order of chance, and the median of each one's ratio
to the default in the same round is printed: below 1 it is faster.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from statistics import median
from time import perf_counter

import numpy as np
from machine import about, run
from tqdm import tqdm

from chunkattn import attention, plan

GRID = (128, 256, 512, 1024, 2048)


def arrays(library, given):
    """Return query, key and value of a library."""
    rng = np.random.default_rng(0)
    shape = (given.heads, given.n, given.dim)
    tokens = [rng.standard_normal(shape, dtype=np.float32) for _ in range(3)]
    if library == "numpy":
        return tokens
    if library == "torch":
        import torch

        return [torch.asarray(x) for x in tokens]
    import jax

    return [jax.numpy.asarray(x) for x in tokens]


def way(library, **sizes):
    """Return a call that waits for its result."""
    call = partial(attention, implementation="chunked", **sizes)
    if library != "jax":
        return call
    import jax

    compiled = jax.jit(call)
    return lambda *tokens: compiled(*tokens).block_until_ready()


def ratios(library, given):
    """Return the median ratio to the default for each pair of sizes."""
    tokens = arrays(library, given)
    sizes = [
        {"query_chunk_size": rows, "key_chunk_size": cols} for rows, cols in product(GRID, GRID)
    ]
    ways = [way(library), *(way(library, **chosen) for chosen in sizes)]
    for one in ways:
        one(*tokens)  # compiles
    found = [[] for _ in sizes]
    rng = np.random.default_rng(1)
    for _ in tqdm(range(given.rounds), desc=library):
        seconds = [0.0] * len(ways)
        for place in rng.permutation(len(ways)):  # what ran before leaves its traces in the caches
            begun = perf_counter()
            ways[place](*tokens)
            seconds[place] = perf_counter() - begun
        for ratio, second in zip(found, seconds[1:], strict=True):
            ratio.append(second / seconds[0])
    return {tuple(chosen.values()): median(x) for chosen, x in zip(sizes, found, strict=True)}


def report(given):
    """Yield the lines of the report."""
    yield f"# Sizes of tiles\n\n{about('python benchmarks/sizes.py', given)}\n"
    yield "Time by queries (down) and keys (across) of a tile, as a ratio to that of the default.\n"
    for library in given.libraries.split(","):
        tokens = arrays(library, given)
        chosen = plan(*tokens, implementation="chunked")
        found = ratios(library, given)
        best = min(found, key=found.get)
        yield f"## {library}\n\n| | {' | '.join(f'{cols:,}' for cols in GRID)} |"
        yield f"|--:|{'--:|' * len(GRID)}"
        for rows in GRID:
            cells = " | ".join(f"{found[rows, cols]:.2f}" for cols in GRID)
            yield f"| {rows:,} | {cells} |"
        yield (
            f"\nThe default is {chosen.query_chunk_size:,} × {chosen.key_chunk_size:,}; "
            f"the best is {best[0]:,} × {best[1]:,}, {found[best]:.2f} of its time.\n"
        )


if __name__ == "__main__":
    known = ("numpy", "torch", "jax")
    run(__doc__, report, known, libraries=",".join(known), n=4096, heads=8, dim=64, rounds=7)
