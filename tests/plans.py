"""A grid of calls, each with what `plan` predicts and what is measured."""

from __future__ import annotations

import gc
from functools import cached_property
from time import sleep

import libraries
import memory
import numpy as np

from chunkattn import attention, attention_vjp, masks, plan

TILES = {"query_chunk_size": 256, "key_chunk_size": 512}
SHAPES = {
    "one head": {},
    "twice as long": {"n": 4096},
    "d = 128": {"d": 128, "d_v": 128},
    "d_v = 16": {"d_v": 16},
    "8 heads": {"n": 1024, "h": 8},
    "8 heads, 2 of keys": {"n": 1024, "h": 8, "h_k": 2},
    "short": {"n": 320, "h": 8, "tiles": {}},
    "defaults": {"tiles": {}},
    "defaults, 8 heads": {"n": 1024, "h": 8, "tiles": {}},
    "auto": {"tiles": {}, "implementation": "auto"},
    "auto, 8 heads": {"n": 1024, "h": 8, "tiles": {}, "implementation": "auto"},
    "auto, 16 heads, bfloat16": {
        "n": 2048,
        "h": 16,
        "tiles": {},
        "implementation": "auto",
        "dtype": "bfloat16",
    },
    "16 heads, bfloat16": {"n": 2048, "h": 16, "tiles": {}, "dtype": "bfloat16"},
    "textbook": {"tiles": {}, "implementation": "standard"},
    "within 1.5 MB": {"tiles": {"memory_limit": "1.5MB"}},
    "float64": {"dtype": "float64"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
}
KEYWORDS = {
    "causal": lambda case: {"causal": True},
    "window": lambda case: {"mask": masks.Window(300, 0)},
    "lengths": lambda case: {
        "mask": masks.Lengths(key=case.array(np.asarray(case.n * 3 // 4 - 40)))
    },
    "segments": lambda case: {"mask": masks.Segments(case.array(np.arange(case.n) // 700))},
    "mask array": lambda case: {"mask": case.array(case.random(case.n, case.n) < 0.5)},
    "bias": lambda case: {"bias": case.array(case.random(case.n, case.n))},
    "softcap": lambda case: {"softcap": 20.0},
    "sinks": lambda case: {"sinks": case.array(np.ones(case.h, np.float32))},
    "dropout": lambda case: {"dropout": 0.1, "dropout_seed": 1},
    "causal, softcap, bias": lambda case: KEYWORDS["bias"](case) | {"causal": True, "softcap": 2.0},
}


def cases(lib):
    """Return the names of the calls that a library can make."""
    names = (*SHAPES, *KEYWORDS)
    return [x for x in names if SHAPES.get(x, {}).get("dtype", lib.default) in lib.dtypes]


class Case:
    """A call of the grid on a library, with `training` its gradients too."""

    def __init__(self, lib, name, training):
        self.lib, self.training = lib, training
        chosen = {"n": 2048, "h": 1, "d": 64, "d_v": 64, "dtype": lib.default, "tiles": TILES}
        chosen |= {"implementation": "chunked"} | SHAPES.get(name, {})
        self.n, self.h = chosen["n"], chosen["h"]
        self.rng = np.random.default_rng(0)
        h_k, dtype = chosen.get("h_k", self.h), chosen["dtype"]
        n_q, d, d_v = chosen.get("n_q", self.n), chosen["d"], chosen["d_v"]
        shapes = [(self.h, n_q, d), (h_k, self.n, d), (h_k, self.n, d_v)]
        self.tokens = [lib.asarray(self.random(*shape), dtype) for shape in shapes]
        self.d_out = lib.asarray(self.random(self.h, n_q, d_v), dtype)
        self.fixed = {"implementation": chosen["implementation"], **chosen["tiles"]}
        self.made = KEYWORDS.get(name, lambda case: {})
        self.extras, self.replay = [], None
        self.keywords = self.fixed | self.made(self)

    def array(self, x):
        """Return `x` as an array of a keyword, which a compiled call takes as an argument."""
        if self.replay is not None:
            return next(self.replay)
        self.extras.append(self.lib.asarray(x))
        return self.extras[-1]

    def random(self, *shape):
        return self.rng.standard_normal(shape, dtype=np.float32)

    def plan(self):
        return plan(*self.tokens, training=self.training, **self.keywords)

    def call(self, *arrays):
        """Return the results of a call of query, key, value, the gradient of `out`, and extras."""
        (*tokens, d_out), extras = arrays[:4], arrays[4:]
        keywords = self.keywords
        if extras:
            self.replay = iter(extras)
            keywords = self.fixed | self.made(self)
        if not self.training:
            return (attention(*tokens, **keywords),)
        if self.lib.name.startswith("torch"):
            import torch

            tokens = [x.detach().requires_grad_() for x in tokens]
            out = attention(*tokens, **keywords)
            return (out, *torch.autograd.grad(out, tokens, d_out))
        if self.lib.name.startswith("jax"):
            import jax

            floats = [x for x in extras if jax.numpy.issubdtype(x.dtype, np.floating)]

            def function(tokens, floats):
                if not floats:
                    return attention(*tokens, **keywords)
                self.replay = iter(floats)  # a case has no other extras beside these
                return attention(*tokens, **(self.fixed | self.made(self)))

            out, vjp = jax.vjp(function, tokens, floats)
            return (out, *jax.tree.leaves(vjp(d_out)))
        out, vjp = attention_vjp(*tokens, **keywords)
        gradients = vjp(d_out)
        return (out, *gradients.values())

    def measured(self, threads=1, enough=0):
        """Return the most that the call holds at a time beyond inputs and outputs.

        It is that of many calls where several threads compute: their fullest moments meet by
        chance, and on a busy machine are seen by chance.  Where that is not `enough`, it is
        measured again, up to ten times.
        """
        for _ in range(10):
            found = self._measured(threads)
            if found >= enough:
                break
        return found

    def _measured(self, threads):
        if self.lib.name.startswith("jax"):
            return max(self.planned(), self.allocated())
        arrays = (*self.tokens, self.d_out)
        return max(
            memory.extra_bytes(self.lib, self.call, *arrays, threads=threads)
            for _ in range(10 if self.lib.name == "numpy" and threads > 1 else 1)
        )

    @cached_property
    def compiled(self):
        """The call as compiled by JAX."""
        import jax

        return jax.jit(self.call).lower(*self.arrays).compile()

    @property
    def arrays(self):
        return (*self.tokens, self.d_out, *self.extras)

    def planned(self):
        """Return XLA's own analysis."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def allocated(self):
        """Return what a call allocates: by XLA's plan, and beside it by its kernels.

        Of thirty calls the fullest but one: malloc counts arena by arena, and what moves in the
        meantime may count twice.  A limited forward pass is called eagerly: under `jit` the limit
        counts gradients, too.
        """
        eager = "memory_limit" in self.keywords and not self.training
        function, arrays = (self.call, self.arrays[:4]) if eager else (self.compiled, self.arrays)
        memory.of_malloc(lambda: function(*arrays))
        gc.collect()
        found = []
        for _ in range(30):
            sleep(0.01)  # until the call before has given back all
            peak, results = memory.of_malloc(lambda: function(*arrays))
            found.append(peak - memory.nbytes(results))
            del results
        return sorted(found)[-2]


def on_jax(name, training, keywords=None):
    """Return a call's plan, what is measured, and XLA's own analysis.

    To be called in a process of its own: among the arenas and the threads that a suite leaves
    behind, malloc's readings are torn.
    """
    case = Case(libraries.library("jax"), name, training)
    case.keywords = keywords or case.keywords
    found = case.plan()
    return found, case.measured(enough=found.peak_bytes / 1.25), case.planned()
