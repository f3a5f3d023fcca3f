"""NumPy's products in pieces: those of a whole product, where OpenBLAS has kernels for them."""

from __future__ import annotations

import tracemalloc
from importlib import import_module

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st

from chunkattn import attention, attention_vjp

pieces = import_module("chunkattn.backends.numpy_pieces")
adapter = import_module("chunkattn.backends.numpy")
threads = import_module("chunkattn.backends._threads")


@pytest.fixture
def taken(monkeypatch):
    """Take pieces on any CPU, and return the shapes (rows, depth, cols) that NumPy multiplies."""
    shapes, plain = set(), np.matmul

    def matmul(a, b, **kwargs):
        shapes.add((a.shape[-2], a.shape[-1], b.shape[-1]))
        return plain(a, b, **kwargs)

    monkeypatch.setattr(adapter, "_pieces_are_fast", lambda: True)
    monkeypatch.setattr(np, "matmul", matmul)
    return shapes


@given(
    sizes=st.tuples(st.integers(1, 1100), st.integers(1, 300), st.integers(1, 600)),
    dtype=st.sampled_from([np.float32, np.float64]),
    lead=st.sampled_from([((), ()), ((2,), (2,)), ((2, 3), (1, 3)), ((2,), (1,))]),
    turned=st.tuples(st.booleans(), st.booleans()),
    several=st.booleans(),
)
def test_pieces_make_the_product(sizes, dtype, lead, turned, several):
    assert_product(sizes, dtype, lead, turned, several)


@pytest.mark.parametrize(
    "call",
    [
        ((16, 64, 4096), np.float32, ((), ()), (False, True), False),
        ((200, 64, 4100), np.float32, ((2,), (1,)), (False, True), True),
        ((4096, 300, 7), np.float32, ((), ()), (True, False), True),
        ((3, 9000, 64), np.float32, ((2,), (2,)), (False, False), False),
        ((523, 1100, 96), np.float64, ((2,), (2,)), (True, False), True),
    ],
    ids=lambda call: "x".join(map(str, call[0])),
)
def test_products_are_taken_in_pieces(call):
    assert assert_product(*call)


def assert_product(sizes, dtype, lead, turned, several):
    """Compare what pieces make with the whole product; return whether there are pieces."""
    rng = np.random.default_rng(0)
    rows, depth, cols = sizes
    shapes = (*lead[0], rows, depth), (*lead[1], depth, cols)
    a, b = (rng.integers(-4, 5, shape).astype(dtype) for shape in shapes)  # sums are exact
    a, b = (
        np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) if turn else x
        for x, turn in zip((a, b), turned, strict=True)
    )
    expected = a @ b
    out = np.full(expected.shape, np.nan, dtype)
    filled = pieces.fill(out, a, b, several)
    if filled:
        np.testing.assert_array_equal(out, expected)
    return filled


@pytest.mark.parametrize(("rows", "depth", "cols"), [(4, 64, 4096), (16, 128, 1000), (2, 32, 900)])
def test_few_rows_are_taken_in_place(taken, rng, rows, depth, cols):
    """Even by one task: keys, transposed, in pieces of few results; values in pieces of depth."""
    query, keys = rng.standard_normal((rows, depth)), rng.standard_normal((cols, depth))
    weights = rng.standard_normal((rows, 100 * cols))
    values = rng.standard_normal((100 * cols, depth))
    xp = adapter.Adapter(np)
    np.testing.assert_allclose(xp.matmul(query, keys.T), query @ keys.T, atol=1e-12)
    assert {m for m, _, _ in taken} == {rows}
    assert all(m * n <= pieces.TURNED for m, _, n in taken)
    taken.clear()
    np.testing.assert_allclose(xp.matmul(weights, values), weights @ values, atol=1e-9)
    assert max(np.prod(shape) for shape in taken) <= pieces.LIMIT
    assert max(k for _, k, _ in taken) == pieces.RUN


def test_no_piece_is_too_large(taken, rng):
    """OpenBLAS would copy the matrices of each."""
    query, key, value = rng.standard_normal((3, 4, 700, 64), dtype=np.float32)
    out, vjp = attention_vjp(query, key, value)
    vjp(out)
    largest = max(np.prod(shape) for shape in taken)
    assert pieces.LIMIT / 4 < largest <= pieces.LIMIT


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize(("n_q", "n_k", "d"), [(700, 1000, 64), (1100, 523, 96), (333, 2000, 128)])
def test_attention_in_pieces(taken, rng, layout, n_q, n_k, d):
    """Ragged tiles, a group of heads, keys with strides: as the textbook has it."""
    shapes = (4, n_q, d), (2, n_k, d), (2, n_k, d + 5)
    arrays = [rng.standard_normal(shape) for shape in shapes]
    if layout == "nhd":
        arrays = [x.swapaxes(0, 1) for x in arrays]
    d_out = rng.standard_normal((n_q, 4, d + 5) if layout == "nhd" else (4, n_q, d + 5))
    found = {}
    for way in ("chunked", "standard"):
        out, vjp = attention_vjp(*arrays, layout=layout, implementation=way)
        found[way] = {"out": out, **vjp(d_out)}
    for name, expected in found["standard"].items():
        np.testing.assert_allclose(found["chunked"][name], expected, atol=1e-11, err_msg=name)
    assert any(rows in pieces.ROWS and depth == d for rows, depth, _ in taken)


def test_one_task_is_multiplied_whole(taken, rng):
    """BLAS has all of its threads for it."""
    attention(*rng.standard_normal((3, 1, 700, 64)), query_chunk_size=700)
    assert {rows for rows, _, _ in taken} == {700}


def test_bits_do_not_depend_on_threads(taken, rng):
    """Nor on the call that a call is made within: pieces are a matter of its own tasks."""
    tokens = rng.standard_normal((3, 3, 600, 64), dtype=np.float32)
    found, within = [], set()
    for count in (1, 2):
        with threadpoolctl.threadpool_limits(count, user_api="blas"):
            found.append(attention(*tokens))

    def mask_mod(b, h, q_idx, kv_idx):
        within.add(threads.one_of_several())
        found.append(attention(*tokens))
        return kv_idx >= 0

    for size in (10, 20):
        attention(*tokens[:, :1, :20], mask=mask_mod, query_chunk_size=size)
    assert within == {True, False}
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_a_failed_task_leaves_nothing_behind(taken, rng):
    def score_mod(score, b, h, q_idx, kv_idx):
        assert threads.one_of_several()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attention(*rng.standard_normal((3, 3, 600, 64)), score_mod=score_mod)
    assert not threads.one_of_several()


def test_other_blas_multiplies_whole(monkeypatch):
    """Only OpenBLAS, and only its kernels for AVX-512, gain by pieces."""
    for names, fast in (({"SkylakeX"}, True), ({"Haswell"}, False), ({"SkylakeX", ""}, False)):
        monkeypatch.setattr(threads, "architectures", lambda names=names: names)
        assert adapter._pieces_are_fast.__wrapped__() is fast


@pytest.mark.parametrize("training", [False, True])
def test_plan_knows_the_order_of_keys(monkeypatch, rng, training):
    """Few queries with many keys: the copy of the keys is as large as the scores."""
    from chunkattn import plan

    monkeypatch.setattr(adapter, "_pieces_are_fast", lambda: True)
    query = rng.standard_normal((2, 80, 64), dtype=np.float32)
    key, value = rng.standard_normal((2, 2, 8192, 64), dtype=np.float32)
    keywords = {"query_chunk_size": 80, "key_chunk_size": 8192}

    def call():
        if not training:
            return attention(query, key, value, **keywords)
        out, vjp = attention_vjp(query, key, value, **keywords)
        return out, vjp(out)

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        told = plan(query, key, value, training=training, **keywords)
        call()
        tracemalloc.start()
        results = call()
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert results is not None
    measured = peak - kept
    assert measured <= told.peak_bytes <= 1.25 * measured
    assert any("order" in term.name for term in told.terms)
