"""Where the time of a forward pass goes: the steps of one tile, beside the machine's products.

    python benchmarks/floors.py [--libraries numpy,torch,jax] [--dim 64,128] [--rounds 15]
        [--out FILE]

In float32, nanoseconds for each score, of one core: NumPy's steps run on one thread, as each of its
tasks does; PyTorch's on all, which share a tile, and the figure is the time by the number of cores.
"product" is a large product of matrices with as many operations as the two of a tile: no attention
that computes both can take less.  "call" is a whole call of attention, 8 heads of 4,096 tokens, by
all its scores.  Medians of rounds, in which each step comes once.  JAX compiles a call as a whole:
its two products of every tile are timed in a program of their own, and a call also with queries so
long that it looks for maxima.

NumPy and PyTorch widen half precision tile by tile.  A call of 8 heads of 2,048 tokens is set
beside one in float32; "conversions" are those of all its tiles and of its result alone, in
milliseconds of all cores.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from importlib import import_module
from statistics import median
from time import perf_counter

import ml_dtypes  # noqa: F401  (gives NumPy bfloat16)
import numpy as np
import threadpoolctl
from chunkattn.backends import _threads
from machine import about, run

from chunkattn import attention, plan
from chunkattn._adapters import adapter_of

HEADS, LENGTH, LARGE = 8, 4096, 1024


class Steps:
    """One tile of the default size, and its steps."""

    def __init__(self, library, d):
        self.module, self.d = import_module(library), d
        self.rng = np.random.default_rng(0)
        self.xp = adapter_of(self.array(1), "array")
        rows, cols, self.scores, *_ = self.xp.tile_sizes(self.array(1))
        heads = self.scores // (rows * cols)
        self.query = self.array(heads, rows, d) * d**-0.5
        tokens = self.array(heads, LENGTH, d), self.array(heads, LENGTH, d)
        self.key, self.value = (x[:, :cols] for x in tokens)
        self.workspace = self.xp.workspace(self.query, self.scores, self.query.dtype)
        nothing = self.xp.new(self.query, (), -1e30, self.query.dtype)
        self.top = self.xp.weigh(self.products(), nothing)[2]
        self.large = self.array(LARGE, LARGE)

    def array(self, *shape):
        """Return normal numbers in float32."""
        return self.module.asarray(self.rng.standard_normal(shape, dtype=np.float32))

    def products(self):
        """Multiply queries and keys."""
        return self.xp.matmul(self.query, self.xp.matrix_transpose(self.key), self.workspace)

    def timed(self):
        """Return seconds of each step, for each score, where one tile follows another."""
        for _ in range(8):
            begin = perf_counter()
            s = self.products()
            after_products = perf_counter()
            weights, _, _ = self.xp.weigh(s, self.top)
            after_weights = perf_counter()
            self.xp.matmul(weights, self.value)
            end = perf_counter()
        return {
            "queries × keys": (after_products - begin) / self.scores,
            "weights and their sum": (after_weights - after_products) / self.scores,
            "weights × values": (end - after_weights) / self.scores,
            "all steps": (end - begin) / self.scores,
            "product": self.product(),
        }

    def product(self):
        """Return seconds of the operations of a score, in a large product."""
        for _ in range(2):
            begin = perf_counter()
            large = self.large @ self.large
            end = perf_counter()
        assert large.shape == (LARGE, LARGE)
        return (end - begin) / (2 * LARGE**3) * 4 * self.d

    def called(self):
        """Return seconds of a call, for each score."""
        tokens = [self.array(1, HEADS, LENGTH, self.d) for _ in range(3)]
        attention(*tokens, implementation="chunked")
        begin = perf_counter()
        attention(*tokens, implementation="chunked")
        return (perf_counter() - begin) / (HEADS * LENGTH**2)


class Compiled:
    """What can be told apart of JAX's compiled call: its products, and the choice in it."""

    def __init__(self, d):
        self.jax, self.d = import_module("jax"), d
        shape, numpy = (HEADS, LENGTH, d), self.jax.numpy
        rng = np.random.default_rng(0)
        draw = partial(rng.standard_normal, dtype=np.float32)
        tokens = [numpy.asarray(draw(shape)) for _ in range(3)]
        large = numpy.asarray(draw((LARGE, LARGE)))
        chosen = plan(*tokens, implementation="chunked")
        sizes = chosen.query_chunk_size, chosen.key_chunk_size
        call = self.jax.jit(partial(attention, implementation="chunked"))
        every = self.jax.jit(partial(self.products, *sizes))
        square = self.jax.jit(partial(numpy.matmul, precision="highest"))
        scores = HEADS * LENGTH**2
        self.ways = {
            "all products": (partial(every, *tokens), scores),
            "product": (partial(square, large, large), 2 * LARGE**3 / (4 * d)),
            "call": (partial(call, *tokens), scores),
            "call with maxima": (partial(call, 10 * tokens[0], *tokens[1:]), scores),
        }
        self.timed()  # compiles

    def products(self, rows, cols, query, key, value):
        """Return the sum of both products of every tile, without a softmax."""
        lax, numpy = self.jax.lax, self.jax.numpy

        def tile(i, j, total):
            q = lax.dynamic_slice_in_dim(query, i * rows, rows, 1)
            k, v = (lax.dynamic_slice_in_dim(x, j * cols, cols, 1) for x in (key, value))
            s = numpy.matmul(q, k.mT, precision="highest")
            return total + numpy.matmul(s, v, precision="highest")

        def chunk(i, out):
            total = lax.fori_loop(
                0, LENGTH // cols, partial(tile, i), numpy.zeros_like(query[:, :rows])
            )
            return lax.dynamic_update_slice_in_dim(out, total, i * rows, 1)

        return lax.fori_loop(0, LENGTH // rows, chunk, numpy.zeros_like(query))

    def timed(self):
        """Return seconds of each way, for each score."""
        found = {}
        for name, (way, scores) in self.ways.items():
            for _ in range(2):
                begin = perf_counter()
                way().block_until_ready()
                found[name] = (perf_counter() - begin) / scores
        return found


class Halves:
    """A call in half precision, one in float32, and the conversions of the first alone."""

    def __init__(self, library, dtype, d, number):
        module = import_module(library)
        array = module.asarray(np.zeros(1, np.float32))
        self.xp, self.number = adapter_of(array, "array"), number
        self.exact, self.dtype = array.dtype, self.xp.floats[dtype]
        rng = np.random.default_rng(0)
        shape = (1, HEADS, LENGTH // 2, d)
        draw = partial(rng.standard_normal, dtype=np.float32)
        self.wide = [module.asarray(draw(shape)) for _ in range(3)]
        self.half = [self.xp.cast(x, self.dtype) for x in self.wide]
        self.plan = plan(*self.half, implementation="chunked")

    def timed(self):
        """Return seconds of each."""
        found = {}
        for _ in range(2):
            for name, tokens in (("float32", self.wide), ("half", self.half)):
                begin = perf_counter()
                attention(*tokens, implementation="chunked")
                found[name] = perf_counter() - begin
            found["conversions"] = self.converted() / self.number
        return found

    def converted(self):
        """Return seconds of the conversions, of one core."""
        rows, cols = self.plan.query_chunk_size, self.plan.key_chunk_size
        query, key, value = self.half
        length, chunks = LENGTH // 2, -(-LENGTH // 2 // rows)
        begin = perf_counter()
        for head in range(HEADS):
            for start in range(0, length, rows):
                self.xp.cast(query[:, head, start : start + rows], self.exact)
                self.xp.cast(self.wide[0][:, head, start : start + rows], self.dtype)
            for start in range(0, length, cols):
                for x in chunks * (key, value):
                    self.xp.cast(x[:, head, start : start + cols], self.exact)
        return perf_counter() - begin


def cores():
    """Return how many threads NumPy's BLAS takes."""
    counts = [x["num_threads"] for x in threadpoolctl.threadpool_info() if x["user_api"] == "blas"]
    return max(counts, default=1)


def measured(library, d, number, count):
    """Return the median seconds of each step, for each score, of one core."""
    if library == "jax":
        compiled = Compiled(d)
        rounds = [compiled.timed() for _ in range(count)]
        return {name: median(x[name] for x in rounds) * number for name in rounds[0]}
    one = library == "numpy"
    steps = Steps(library, d)
    rounds, calls = [], []
    for _ in range(count):
        with threadpoolctl.threadpool_limits(1, user_api="blas") if one else nullcontext():
            rounds.append(_threads.as_one_of(2, steps.timed))  # as in a call
        calls.append(steps.called())
    share = 1 if one else number
    found = {name: median(x[name] for x in rounds) * share for name in rounds[0]}
    return found | {"call": median(calls) * number}


def halves(given):
    """Yield the lines of calls in half precision."""
    yield "\n## Half precision, milliseconds, d = 64\n"
    yield "| library | dtype | float32 | half | half - float32 | conversions |"
    yield "|:--|:--|--:|--:|--:|--:|"
    for library in given.libraries.split(","):
        if library == "jax":
            continue
        for dtype in ("float16", "bfloat16"):
            one = Halves(library, dtype, 64, cores() if library == "numpy" else 1)
            rounds = [one.timed() for _ in range(2 * given.rounds)]
            wide, half, alone = (1e3 * median(x[name] for x in rounds) for name in rounds[0])
            more = 1e3 * median(x["half"] - x["float32"] for x in rounds)
            cells = (f"{x:.1f}" for x in (wide, half, more, alone))
            yield f"| {library} | {dtype} | {' | '.join(cells)} |"


def report(given):
    """Yield the lines of the report."""
    yield f"# Where the time goes\n\n{about('python benchmarks/floors.py', given)}\n"
    yield f"{__doc__.partition('FILE]')[2].strip()}\n"
    for library in given.libraries.split(","):
        import_module(library)
        number = cores()
        for d in given.dim:
            found = measured(library, d, number, given.rounds)
            yield f"\n## {library}, d = {d}, {number} cores\n"
            yield "| step | ns | by the product |\n|:--|--:|--:|"
            for name, seconds in found.items():
                yield f"| {name} | {seconds * 1e9:.3f} | {seconds / found['product']:.2f} |"
    yield from halves(given)


if __name__ == "__main__":
    known = ("numpy", "torch", "jax")
    run(__doc__, report, known, libraries=",".join(known), dim=(64, 128), rounds=15)
