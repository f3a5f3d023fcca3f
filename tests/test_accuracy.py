"""Rounding errors: chunked attention beside the textbook's, both against wider arithmetic."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import libraries
import numpy as np
import pytest
from array_api_compat import array_namespace

from chunkattn import attention, attention_vjp

# By number of queries and of keys: cases, which one call computes side by side as a batch.
CASES = {
    (128, 300): {
        "normal scores": {},
        "large scores": {"spread": 30.0},
        "values of mean 1000": {"mean": 1000.0},
    },
    (16, 4096): {
        "long rows": {},
        "long rows, large scores": {"spread": 30.0},
        "long rows, rising scores": {"rise": 8.0},
        "long rows, values of mean 1000": {"mean": 1000.0},
    },
}


def tokens(rng, n_q, n_k, *, spread=1.0, mean=0.0, rise=0.0):
    """Return query, key and value; with `rise`, the scores grow along the keys by twice that."""
    query = spread * rng.standard_normal((4, n_q, 64))
    key = rng.standard_normal((4, n_k, 64))
    value = mean + rng.standard_normal((4, n_k, 64))
    if rise:
        query[..., 0], key[..., 0] = 8.0, np.linspace(-rise, rise, n_k)
    return query, key, value


def textbook(query, key, value, compute):
    """Return softmax(query @ keyᵀ / √d) @ value, computed in the dtype `compute`."""
    xp, dtype = array_namespace(query), query.dtype
    query, key, value = (xp.astype(x, compute) for x in (query, key, value))
    scores = query @ xp.matrix_transpose(key) * query.shape[-1] ** -0.5
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True, dtype=compute)
    return xp.astype(weights @ value, dtype)


@cache
def rounded(lengths, dtype):
    """Return the cases' tokens as `dtype` holds them, and their attention in wider arithmetic."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(2112_05682)
    drawn = [tokens(rng, *lengths, **given) for given in CASES[lengths].values()]
    narrow = [np.stack(x).astype(dtype) for x in zip(*drawn, strict=True)]
    wide = np.longdouble if dtype == "float64" else np.float64
    return [x.astype(np.float64) for x in narrow], textbook(*(x.astype(wide) for x in narrow), wide)


def errors(lib, dtype, chosen=tuple(CASES), **chunks):
    """Return the largest error by the case's name and the way it is computed."""
    found = {}
    for lengths in chosen:
        narrow, exact = rounded(lengths, dtype)
        arrays = [lib.asarray(x, dtype) for x in narrow]
        compute = lib.dtype("float64" if dtype == "float64" else "float32")
        # JAX's own attention is compiled, so its textbook is too.
        call = (libraries.library("jax-jit") if lib.name.startswith("jax") else lib).call
        outs = {
            "chunked": lib.call(attention, *arrays, implementation="chunked", **chunks),
            "standard": lib.call(attention, *arrays, implementation="standard"),
            "textbook": call(lambda *arrays: textbook(*arrays, compute), *arrays),  # noqa: B023
        }
        for i, name in enumerate(CASES[lengths]):
            found[name] = {
                way: float(np.abs(lib.numpy(out)[i] - exact[i]).max()) for way, out in outs.items()
            }
    return found


def check(found, dtype, factor=2.0):
    for name, error in found.items():
        bound = factor * min(error["standard"], error["textbook"])
        assert error["chunked"] <= bound, f"{name} in {dtype}: {error}"


@pytest.mark.feature("error at most twice the textbook's")
def test_error_is_at_most_twice_the_textbooks(lib):
    for dtype in lib.dtypes:
        check(errors(lib, dtype), dtype)


def test_error_in_many_small_chunks(lib):
    """Each chunk rounds the sums once more: 256 chunks of 16 here, where BLAS has blocks of 300.

    The roundings are independent, so that the error grows with the root of their number.
    """
    factor = 2 * (300 / 16) ** 0.5
    for dtype in lib.dtypes:
        check(errors(lib, dtype, [(16, 4096)], key_chunk_size=16), dtype, factor)


@pytest.mark.parametrize("fast", [True, False])
def test_both_exponentials_of_numpy(monkeypatch, fast):
    """Which of them NumPy has vector instructions for depends on the machine."""
    adapter = import_module("chunkattn.backends.numpy")
    monkeypatch.setattr(adapter, "_exp2_is_fast", lambda: fast)
    for dtype in ("float32", "float64"):
        check(errors(libraries.library("numpy"), dtype), dtype)


def test_no_power_of_2_underflows_in_numpy(monkeypatch, rng):
    """NumPy's vectors take many times as long for zeros and subnormal numbers."""
    adapter = import_module("chunkattn.backends.numpy")
    monkeypatch.setattr(adapter, "_exp2_is_fast", lambda: True)
    plain, least = np.exp2, []

    def exp2(x, out):
        least.append((x.dtype, x.min()))
        return plain(x, out=out)

    monkeypatch.setattr(np, "exp2", exp2)
    for dtype in (np.float32, np.float64):
        query, key, value = rng.standard_normal((3, 2, 64, 16)).astype(dtype)
        away = -20.0 * abs(np.subtract.outer(np.arange(64), np.arange(64))).astype(dtype)
        for keywords in ({}, {"causal": True}, {"scale": 99.0}, {"bias": away}):
            chunks = {"query_chunk_size": 32, "key_chunk_size": 16}
            out, vjp = attention_vjp(query, key, value, **keywords, **chunks)
            vjp(out)
        assert least[-1][0] == dtype
    assert all(x >= np.finfo(dtype).minexp for dtype, x in least)
