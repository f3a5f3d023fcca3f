"""What decoding costs: few queries and many keys, relative to few lines of the same library.

    python benchmarks/decode.py [--rounds 7] [--out FILE]

In a growing cache each call sees one key more than the one before, as a model that writes does; a
step is the mean of 64.  With a mask, the cache has a fixed length; PyTorch's
`scaled_dot_product_attention` (SDPA) gets the same pairs as a boolean array, and few lines of code
as numbers that are added, which exist before.  Ways take turns in one run; the ratio is that of the
medians, with the range of the ratios round by round.
"""

from __future__ import annotations

import statistics
from functools import partial
from itertools import product

import numpy as np
from machine import about, run
from masks import in_turns, library, ratios

from chunkattn import attention
from chunkattn.masks import Lengths, Window

D, STEPS, KEYS, WINDOW = 64, 64, 4096, 1024
MASKS = "padding, an array", "padding, lengths", "window", "bias"
PEERS = "lines", "SDPA"


def numpy_lines(q, k, v, added=None):
    """Few lines of NumPy, which reads each key once for the heads that share it."""
    b, h, n, d = q.shape
    s = q.reshape(b, k.shape[1], -1, d) @ np.swapaxes(k, -1, -2) * d**-0.5
    if added is not None:
        s = (s.reshape(b, h, n, -1) + added).reshape(s.shape)
    weights = np.exp(s - s.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v).reshape(b, h, n, -1)


def torch_lines(q, k, v, added=None):
    """Few lines of PyTorch, likewise."""
    b, h, n, d = q.shape
    s = q.reshape(b, k.shape[1], -1, d) @ k.mT * d**-0.5
    if added is not None:
        s = (s.reshape(b, h, n, -1) + added).reshape(s.shape)
    return (s.softmax(-1) @ v).reshape(b, h, n, -1)


def sdpa(q, k, v, mask=None):
    """Return what PyTorch's own attention does."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=len(q[0]) != len(k[0]))


LINES = {"numpy": numpy_lines, "torch": torch_lines}


def tokens(name, batch, heads, n_q, n_k):
    """Return queries, keys and values of a library."""
    asarray, rng = library(name)[0], np.random.default_rng(0)
    shapes = (batch, heads[0], n_q, D), *2 * ((batch, heads[1], n_k, D),)
    return [asarray(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]


def growing(name, heads, n_k):
    """Return passes over a cache that grows from `n_k` keys on, as functions without arguments."""
    q, k, v = tokens(name, 1, heads, 1, n_k + STEPS)
    ways = {
        "plain": lambda q, k, v, n: attention(q, k, v),
        "causal": lambda q, k, v, n: attention(q, k, v, causal=True, query_offset=n - 1),
        "lines": lambda q, k, v, n: LINES[name](q, k, v),
    }
    if name == "torch":
        ways["SDPA"] = lambda q, k, v, n: sdpa(q, k, v)

    def steps(way):
        for n in range(n_k, n_k + STEPS):
            way(q, k[:, :, :n], v[:, :, :n], n)

    return {case: partial(steps, way) for case, way in ways.items()}


def masked(case, batch, heads, n_q):
    """Return calls of PyTorch with a mask as functions without arguments."""
    import torch

    q, k, v = tokens("torch", batch, heads, n_q, KEYS)
    last, distance = KEYS - 1 - torch.arange(batch) * 100, torch.arange(KEYS) - (KEYS - n_q)
    distance = distance - torch.arange(n_q)[:, None]
    padding = torch.arange(KEYS) <= last[:, None, None, None]
    window = (distance <= 0) & (distance > -WINDOW)
    bias = torch.randn(heads[0], n_q, KEYS)
    shown, given = {
        "padding, an array": (padding, {"mask": padding}),
        "padding, lengths": (padding, {"mask": Lengths(key=last + 1)}),
        "window": (window, {"mask": Window(WINDOW - 1, 0), "query_offset": KEYS - n_q}),
        "bias": (None, {"bias": bias}),
    }[case]
    added = bias[None] if shown is None else torch.where(shown, 0.0, -torch.inf)
    return {
        "auto": lambda: attention(q, k, v, **given),
        "tiles": lambda: attention(q, k, v, implementation="chunked", **given),
        "SDPA": lambda: sdpa(q, k, v, added if shown is None else shown),
        "lines": lambda: torch_lines(q, k, v, added),
    }


def compared(functions, rounds, names, steps=1):
    """Yield each name with the cells of a table: time in µs, ratios to the peers, and ranges."""
    times = in_turns(functions, rounds)
    for name in names:
        cells = [f"{1e6 * statistics.median(times[name]) / steps:.0f}"]
        for peer in PEERS:
            own = {name: times[name], peer: times.get(peer, [])}
            for _, ratio, low, high in ratios(own, peer) if own[peer] else [("", 0, 0, 0)]:
                cells.append(f"{ratio:.2f} ({low:.2f}–{high:.2f})" if ratio else "")
        yield name, " | ".join(cells)


def report(arguments):
    yield f"# What decoding costs\n\n{about('python benchmarks/decode.py', arguments)}\n"
    yield "## A growing cache (one query, d = 64, float32), µs for a step\n"
    yield "| library | heads | keys | call | time | of few lines | of SDPA |"
    yield "|---|---|---|---|---|---|---|"
    for name, heads, n_k in product(LINES, ((8, 8), (32, 8)), (128, 512, 2048, 8192)):
        functions = growing(name, heads, n_k)
        for case, cells in compared(functions, arguments.rounds, ("plain", "causal"), STEPS):
            yield f"| {name} | {heads[0]}:{heads[1]} | {n_k} | {case} | {cells} |"
    yield f"\n## PyTorch with masks ({KEYS} keys, a window of {WINDOW}, d = 64, float32), µs\n"
    yield "| batch | heads | queries | mask | way | time | of few lines | of SDPA |"
    yield "|---|---|---|---|---|---|---|---|"
    shapes = (1, (8, 8), 1), (1, (32, 8), 1), (4, (32, 8), 1), (4, (32, 8), 8)
    for (batch, heads, n_q), case in product(shapes, MASKS):
        functions = masked(case, batch, heads, n_q)
        for way, cells in compared(functions, arguments.rounds, ("auto", "tiles")):
            yield f"| {batch} | {heads[0]}:{heads[1]} | {n_q} | {case} | {way} | {cells} |"


if __name__ == "__main__":
    run(__doc__, report, rounds=7)
