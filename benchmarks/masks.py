"""What masks cost: time relative to full attention, and memory relative to the plain call.

    python benchmarks/masks.py [--n 8192] [--memory-n 16384] [--rounds 5] [--out FILE]

Times are taken in turns (full, causal, window, segments, full, …) in one run; the ratio is that of
the medians, with the range of the ratios round by round.  Calls with a boolean array of n/64, n/16,
n/8 and n/2 queries and keys are set beside PyTorch's `scaled_dot_product_attention` (SDPA) with the
same array.  Memory is what one call allocates beyond inputs and outputs: NumPy by tracemalloc, JAX
by XLA's memory analysis (temporaries).
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from functools import partial

import numpy as np
from machine import about, run

from chunkattn import attention, masks

TURN = 0.05
BARS = {"causal": 0.62, "window": 0.12, "segments": 0.15}


def library(name):
    """Return (asarray, compile, wait) of a library."""
    if name == "torch":
        import torch

        return torch.asarray, lambda f: f, lambda x: x
    if name == "jax":
        import jax

        return jax.numpy.asarray, jax.jit, lambda x: x.block_until_ready()
    return np.asarray, lambda f: f, lambda x: x


def causal(b, h, q_idx, kv_idx):
    """Allow what `masks.Causal` does."""
    return q_idx >= kv_idx


def window(b, h, q_idx, kv_idx):
    """Allow what ``masks.Window(256, 0)`` does."""
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 256)


def calls(name, n, heads=8, d=64):
    """Return the cases as functions without arguments."""
    asarray, compiled, wait = library(name)
    rng = np.random.default_rng(0)
    q, k, v = (asarray(rng.standard_normal((1, heads, n, d), dtype=np.float32)) for _ in range(3))
    ids = asarray(np.repeat(np.arange(16), n // 16)[None])
    functions = {
        "full": lambda q, k, v, ids: attention(q, k, v),
        "causal": lambda q, k, v, ids: attention(q, k, v, causal=True),
        "window": lambda q, k, v, ids: attention(q, k, v, mask=masks.Window(256, 0)),
        "segments": lambda q, k, v, ids: attention(q, k, v, mask=masks.Segments(ids)),
        "causal by a function": lambda q, k, v, ids: attention(q, k, v, mask=causal),
        "window by a function": lambda q, k, v, ids: attention(q, k, v, mask=window),
    }
    functions = {case: compiled(function) for case, function in functions.items()}
    return {case: lambda f=f: wait(f(q, k, v, ids)) for case, f in functions.items()}


def booleans(n):
    """Return boolean arrays by name."""
    return {
        "none": None,
        "causal": np.tri(n, dtype=bool),
        "three quarters of the keys": np.tile(np.arange(n) < n * 3 // 4 - n // 40, (n, 1)),
        "irregular, half": np.random.default_rng(0).random((n, n)) < 0.5,
    }


def boolean_calls(n, mask, heads=8, d=64):
    """Return calls with a boolean array as functions without arguments: each library's, SDPA.

    Of PyTorch's there are those of its tiles, too, and those with gradients.
    """
    import torch

    sdpa = torch.nn.functional.scaled_dot_product_attention
    rng = np.random.default_rng(0)
    tokens = [rng.standard_normal((1, heads, n, d), dtype=np.float32) for _ in range(3)]

    def of(name, function):
        asarray, compiled, wait = library(name)
        own = [None if x is None else asarray(x) for x in (*tokens, mask)]
        call = compiled(function)
        return lambda: wait(call(*own))

    def with_gradients(function):
        def call(*tokens_and_mask):
            *own, m = tokens_and_mask
            leaves = [x.requires_grad_() for x in own]
            return torch.autograd.grad(function(*leaves, m).sum(), leaves)

        return of("torch", call)

    def ours(q, k, v, m, **given):
        return attention(q, k, v, mask=m, **given)

    def theirs(q, k, v, m):
        return sdpa(q, k, v, attn_mask=m)

    forward = {name: of(name, ours) for name in ("numpy", "torch", "jax")}
    forward |= {"torch, tiles": of("torch", partial(ours, implementation="chunked"))}
    forward |= {"sdpa": of("torch", theirs)}
    return forward, {
        "torch, with gradients": with_gradients(ours),
        "sdpa": with_gradients(theirs),
    }


def in_turns(functions, rounds):
    """Return each function's times, without those of the first round, which warms up.

    Short calls are made again and again for `TURN` seconds, of which the median counts.
    """
    times = {case: [] for case in functions}
    for i in range(rounds + 1):
        for case, function in functions.items():
            time.sleep(0.1)  # PyTorch's threads spin for a while after a call
            turn = []
            while sum(turn) < TURN:
                start = time.perf_counter()
                function()
                turn.append(time.perf_counter() - start)
            if i:
                times[case].append(statistics.median(turn))
    return times


def ratios(times, to):
    """Return for each other case the ratio of medians to case `to`, and its range."""
    base = times.pop(to)
    for case, own in times.items():
        each = [a / b for a, b in zip(own, base, strict=True)]
        yield case, statistics.median(own) / statistics.median(base), min(each), max(each)


def memory_calls(asarray, xp):
    slopes = asarray(np.asarray([0.5], dtype=np.float32))
    return {
        "plain": {},
        "causal": {"causal": True},
        "mask_mod": {"mask": lambda b, h, q, k: (q >= k) & (q - k < 1000)},
        "ALiBi score_mod": {"score_mod": lambda s, b, h, q, k: s + slopes[h] * (k - q)},
        "bias by key": {"bias": asarray(np.zeros((1, 1), dtype=np.float32))},
    }


def numpy_memory(n, kwargs):
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, n, 64), dtype=np.float32)
    attention(q[:, :64], k[:, :64], v[:, :64], **kwargs)
    tracemalloc.start()
    out = attention(q, k, v, **kwargs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - out.nbytes - out.nbytes // 64  # out and lse


def jax_memory(n, kwargs):
    import jax

    x = jax.ShapeDtypeStruct((1, n, 64), np.float32)
    compiled = jax.jit(lambda q, k, v: attention(q, k, v, **kwargs)).lower(x, x, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def report(arguments):
    yield f"# What masks cost\n\n{about('python benchmarks/masks.py', arguments)}\n"
    yield f"## Time relative to full attention (1 × 8 × {arguments.n} × 64, float32)\n"
    yield "| library | case | ratio | range over rounds | bar |\n|---|---|---|---|---|"
    for name in ("numpy", "torch", "jax"):
        times = in_turns(calls(name, arguments.n), arguments.rounds)
        for case, ratio, low, high in ratios(times, "full"):
            yield f"| {name} | {case} | {ratio:.3f} | {low:.3f}–{high:.3f} | {BARS.get(case, '')} |"
    yield "\n## Boolean arrays, time relative to PyTorch's SDPA with the same\n"
    yield "| n | array | library | ratio | range over rounds |\n|---|---|---|---|---|"
    for n in (arguments.n // part for part in (64, 16, 8, 2)):
        for kind, mask in booleans(n).items():
            for functions in boolean_calls(n, mask):
                times = in_turns(functions, arguments.rounds)
                for name, ratio, low, high in ratios(times, "sdpa"):
                    yield f"| {n} | {kind} | {name} | {ratio:.2f} | {low:.2f}–{high:.2f} |"
    yield f"\n## Memory of one call (1 × {arguments.memory_n} × 64, float32), MiB\n"
    yield "| case | NumPy | JAX under jit |\n|---|---|---|"
    import jax.numpy as jnp

    own = memory_calls(np.asarray, np), memory_calls(jnp.asarray, jnp)
    for case in own[0]:
        a = numpy_memory(arguments.memory_n, own[0][case]) / 2**20
        b = jax_memory(arguments.memory_n, own[1][case]) / 2**20
        yield f"| {case} | {a:.2f} | {b:.2f} |"


if __name__ == "__main__":
    run(__doc__, report, n=8192, memory_n=16384, rounds=5)
