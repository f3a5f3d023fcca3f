"""Scores that are known to be small: their softmax without a maximum, and all others with one."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import libraries
import numpy as np
import pytest

from chunkattn import _chunked, attention, masks
from chunkattn._adapters import adapter_of

COMPILED_QUICKLY = True

tiled = partial(attention, implementation="chunked", query_chunk_size=8, key_chunk_size=16)


@contextmanager
def noted_maxima(lib):
    """Let every call ask for a bound; give a list that grows with each tile's maximum."""
    adapter = type(adapter_of(lib.asarray(np.zeros((1, 1))), "x"))
    plain, found = adapter.weigh, []

    def weigh(self, *args):
        if lib.name.startswith("jax"):
            import jax

            jax.debug.callback(lambda: found.append(1))
        else:
            found.append(1)
        return plain(self, *args)

    with pytest.MonkeyPatch.context() as patch, libraries.compilations_of_its_own(lib):
        patch.setattr(adapter, "weigh", weigh)
        patch.setattr(adapter, "seeks_bound", lambda self, spec: True)
        yield found


@pytest.fixture
def maxima(lib):
    with noted_maxima(lib) as found:
        yield found


@pytest.fixture
def looked(lib, check, maxima):
    """Compare a call with the oracle, and return whether it looked for maxima."""

    def looked(*tokens, **given):
        maxima.clear()
        check(*tokens, function=tiled, **given)
        if lib.name.startswith("jax"):
            import jax

            jax.effects_barrier()
        return bool(maxima)

    return looked


def tokens(rng, n_q=13, n_k=37):
    shapes = (2, 4, n_q, 8), (2, 2, n_k, 8), (2, 2, n_k, 6)
    return tuple(rng.standard_normal(shape) for shape in shapes)


GIVEN = {
    "plain": {},
    "one tile": {"query_chunk_size": 100, "key_chunk_size": 100},
    "causal": {"causal": True, "query_offset": -3},
    "window": {"mask": masks.Window(9, 2), "query_offset": 20},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": -0.2},
    "rows that see nothing": {"mask": np.arange(13)[:, None] % 3 > 0},
}


@pytest.mark.feature("small scores need no maximum")
@pytest.mark.parametrize("name", GIVEN)
def test_small_scores(looked, rng, name):
    steps = np.arange(37) - np.arange(20, 33)[:, None]
    known = {"mask": (steps >= -9) & (steps <= 2)} if name == "window" else None
    assert not looked(*tokens(rng), known=known, **GIVEN[name])


@pytest.mark.feature("small scores need no maximum")
def test_large_scores(looked, rng):
    """The bound is the longest query times the longest key times the scale."""
    query, key, value = tokens(rng)
    longest = [np.linalg.norm(x, axis=-1).max() for x in (query, key)]
    bound = np.prod(longest) / np.sqrt(8)
    for factor in (0.9, 1.1, 10):
        assert looked(query * factor * 24 / bound, key, value) is (factor > 1)
    assert looked(query, key, value, scale=-1000.0)


@pytest.mark.feature("small scores need no maximum")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_bound(looked, rng, bad):
    query, key, value = tokens(rng)
    key[0, 1, 30] = bad
    with np.errstate(invalid="ignore"):  # array-api-strict's NumPy would warn
        assert looked(query, key, value, causal=True, query_offset=20)
        key[0, 1, 30] = 0
        value[0, 1, 30] = bad
        assert not looked(query, key, value, causal=True, query_offset=20)


@pytest.mark.feature("small scores need no maximum")
def test_scores_with_more_in_them(looked, rng):
    arrays = tokens(rng)
    assert looked(*arrays, bias=1000 * rng.standard_normal((13, 37)))
    assert looked(*arrays, sinks=np.asarray([1000.0, 0, -1000, 1]))


def test_transformations_of_jax(rng, monkeypatch):
    """Under `jax.vmap` the bound is that of all entries; gradients ask for none."""
    jax = pytest.importorskip("jax")
    lib = libraries.library("jax")
    arrays = tuple(map(lib.asarray, tokens(rng)))
    with noted_maxima(lib) as maxima:
        for factor, large in ((1, False), (100, True)):
            query = arrays[0] * lib.asarray([1.0, factor])[:, None, None, None]
            expected = tiled(query, *arrays[1:])
            jax.effects_barrier()
            maxima.clear()
            found = jax.vmap(tiled)(query, *arrays[1:])
            jax.effects_barrier()
            assert bool(maxima) is large
            np.testing.assert_allclose(found, expected, atol=1e-6)
        monkeypatch.delattr(_chunked, "is_unbounded")
        jax.grad(lambda query: tiled(query, *arrays[1:]).sum())(arrays[0])
