"""The paper's schedule as the benchmarks have it: right for every length, and with its memory."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import libraries
import numpy as np
import pytest
from memory import extra_bytes, tokens

from chunkattn import ArraySpec, plan

paper = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "paper.py"))
)
QUERY_CHUNK = 16
LENGTHS = {"even": (64, 64), "ragged": (37, 53), "short": (5, 9), "one key": (3, 1)}


@pytest.fixture(scope="module", params=["numpy", "jax"])
def schedule(request):
    """Return a library, the paper's schedule and the textbook's attention on it."""
    lib = libraries.library(request.param)
    functions = (getattr(paper, f"{way}_{request.param}") for way in ("attention", "textbook"))
    return lib, *functions


def arrays(rng, n_q, n_k, lead=()):
    """Return query, key and value in float32; large scores, so that the maxima matter."""
    query = 4 * rng.standard_normal((*lead, n_q, 8), dtype=np.float32)
    key = rng.standard_normal((n_k, 8), dtype=np.float32)
    return query, key, rng.standard_normal((n_k, 5), dtype=np.float32)


def textbook(query, key, value):
    """Return attention in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = query @ key.T / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ value / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("key_chunk_size", [None, 16])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_values(schedule, rng, lengths, key_chunk_size):
    lib, attention, standard = schedule
    given = arrays(rng, *lengths)
    own = [lib.asarray(x) for x in given]
    out = attention(*own, query_chunk_size=QUERY_CHUNK, key_chunk_size=key_chunk_size)
    for found in (out, standard(*own)):
        assert lib.is_own(found)
        assert found.dtype == lib.dtype("float32")
        np.testing.assert_allclose(lib.numpy(found), textbook(*given), rtol=0, atol=1e-5)


def test_leading_axes_broadcast(schedule, rng):
    lib, attention, _ = schedule
    given = arrays(rng, 37, 53, lead=(2, 3))
    out = attention(*map(lib.asarray, given), query_chunk_size=QUERY_CHUNK, key_chunk_size=16)
    np.testing.assert_allclose(lib.numpy(out), textbook(*given), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(64, 64), (37, 53)], ids=["even", "ragged"])
def test_gradients_in_jax(rng, lengths):
    jax = pytest.importorskip("jax")

    given = arrays(rng, *lengths)

    def gradients(function):
        return jax.jit(jax.grad(lambda x: (function(*x) ** 2).sum()))(given)

    short = partial(paper.attention_jax, query_chunk_size=QUERY_CHUNK, key_chunk_size=16)
    for found, expected in zip(gradients(short), gradients(paper.textbook_jax), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def predicted(n, key_chunk_size):
    """Return what `plan` says of the paper's schedule."""
    token = ArraySpec((n, 64))
    found = plan(token, token, token).compare([n])
    name = "paper, √n keys" if key_chunk_size is None else f"paper, {key_chunk_size} keys"
    return {name: sizes[0] for name, _, sizes in found.schedules}[name]


@pytest.mark.parametrize("key_chunk_size", [None, 4096])
def test_memory_is_that_of_the_formula(schedule, key_chunk_size):
    """One tile, and the stack: √n summaries, or one per 4096 keys."""
    lib, attention, _ = schedule

    def one_chunk_of_queries(*given):
        return (attention(*given, key_chunk_size=key_chunk_size),)

    for n in (4096, 65536):
        extra = extra_bytes(lib, one_chunk_of_queries, *tokens(lib, 1024, n))
        expected = predicted(n, key_chunk_size)
        assert 0.98 * expected < extra < 1.18 * expected, n


def test_formulas_grow_as_stated():
    """By a factor of 2 where n grows by 4, or by one summary for each further chunk of keys."""
    summary = 4 * paper.QUERIES * (64 + 2)
    for n in (4**i for i in range(5, 12)):
        root, fixed = ([predicted(m, keys) for m in (n, 4 * n)] for keys in (None, paper.KEYS))
        assert root[1] == 2 * root[0]
        if n >= paper.KEYS:
            assert fixed[1] - fixed[0] == summary * 3 * n // paper.KEYS
