"""`merge` and `OnlineAttention`: any split of the keys gives what one call gives."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import libraries
import numpy as np
import oracle
import pytest

from chunkattn import OnlineAttention, attention, merge

COMPILED_QUICKLY = True

SPLITS = [(), (8,), (0,), (29,), (1, 1, 2), (5, 17, 28), tuple(range(1, 29))]


@pytest.fixture
def tokens(rng):
    return (
        rng.standard_normal((2, 4, 19, 8)),
        rng.standard_normal((2, 2, 29, 8)),
        rng.standard_normal((1, 2, 29, 5)),
    )


def runs(split, n=29):
    """Return the slices between the cuts of a split."""
    edges = [0, *split, n]
    return [slice(a, b) for a, b in pairwise(edges)]


def convert(lib, tokens, layout="hnd"):
    own = [np.swapaxes(x, -2, -3) if layout == "nhd" else x for x in tokens]
    return [lib.asarray(x) for x in own]


def along(x, cut, layout):
    return x[..., cut, :] if layout == "hnd" else x[..., cut, :, :]


@pytest.mark.feature("merge")
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("split", SPLITS[:-1])
def test_merge(lib, check, tokens, split, layout):
    q, k, v = convert(lib, tokens, layout)
    answer = oracle.attend(*map(lib.numpy, (q, k, v)), layout=layout)
    partials = [
        lib.call(
            attention, q, along(k, cut, layout), along(v, cut, layout),
            layout=layout, return_lse=True,
        )
        for cut in runs(split)
    ]  # fmt: skip
    for order in (partials, partials[::-1]):
        out, lse = lib.call(merge, *order, layout=layout)
        compare(check, answer, out, lse, partials)


def compare(check, answer, out, lse, partials):
    """Compare a merge whose partials were each rounded to the dtype of the inputs."""
    lib = check.lib
    answer.largest_value *= 1 + len(partials)
    check.compare(answer, out, lse, lib.default, lib.compute)


@pytest.mark.feature("merge")
def test_merge_headless(lib, check, rng):
    q, k, v = (lib.asarray(rng.standard_normal((n, 4))) for n in (7, 11, 11))
    one = lib.call(attention, q, k[:3, :], v[:3, :], return_lse=True)
    two = lib.call(attention, q, k[3:, :], v[3:, :], return_lse=True)
    answer = oracle.attend(*map(lib.numpy, (q, k, v)))
    compare(check, answer, *lib.call(merge, one, two), [one, two])


def test_merge_of_every_dtype(lib, rng):
    """Like the merge of the same numbers in float64: half precision is rounded once, at the end."""
    for dtype in lib.dtypes:
        shapes = [((4, 7, 5), (4, 7))] * 3
        own = [tuple(lib.asarray(rng.normal(0, 9, x), dtype) for x in pair) for pair in shapes]
        wide = [tuple(lib.numpy(x).astype(np.float64) for x in pair) for pair in own]
        compute = "float64" if dtype == "float64" else "float32"
        bound = lib.eps(dtype) + 32 * lib.eps(compute)
        for x, given, right in zip(lib.call(merge, *own), own[0], merge(*wide), strict=True):
            assert x.dtype == given.dtype
            np.testing.assert_allclose(lib.numpy(x), right, rtol=bound, atol=bound, err_msg=dtype)


@pytest.mark.feature("merge")
def test_merge_identity(lib, tokens):
    """``(0, -inf)`` changes nothing, however often and wherever it stands."""
    q, k, v = convert(lib, tokens)
    whole = lib.call(attention, q, k, v, return_lse=True)
    nothing = lib.call(attention, q, k[..., :0, :], v[..., :0, :], return_lse=True)
    assert (lib.numpy(nothing[0]) == 0).all()
    assert (lib.numpy(nothing[1]) == -np.inf).all()
    for partials in ((whole, nothing), (nothing, whole), (nothing, whole, nothing)):
        for x, y in zip(lib.call(merge, *partials), whole, strict=True):
            np.testing.assert_array_equal(lib.numpy(x), lib.numpy(y))
    out, lse = lib.call(merge, nothing, nothing)
    assert (lib.numpy(out) == 0).all()
    assert (lib.numpy(lse) == -np.inf).all()


@pytest.mark.feature("merge")
def test_merge_is_associative(lib, tokens):
    q, k, v = convert(lib, tokens)
    a, b, c = (
        lib.call(attention, q, k[..., cut, :], v[..., cut, :], return_lse=True)
        for cut in runs((9, 20))
    )
    left = lib.call(merge, lib.call(merge, a, b), c)
    right = lib.call(merge, a, lib.call(merge, b, c))
    for x, y in zip(left, right, strict=True):
        atol = 8 * lib.eps(lib.default)
        np.testing.assert_allclose(
            lib.numpy(x), lib.numpy(y), rtol=8 * lib.eps("float32"), atol=atol
        )


@pytest.mark.feature("OnlineAttention")
@pytest.mark.parametrize("layout", ["hnd", "nhd"])
@pytest.mark.parametrize("split", SPLITS)
def test_online(lib, check, tokens, split, layout):
    q, k, v = convert(lib, tokens, layout)
    answer = oracle.attend(*map(lib.numpy, (q, k, v)), layout=layout, softcap=5.0, scale=0.5)

    def stream(q, k, v):
        online = OnlineAttention(q, layout=layout, softcap=5.0, scale=0.5, query_chunk_size=8)
        for cut in runs(split):
            online.update(along(k, cut, layout), along(v, cut, layout))
        return online.result(return_lse=True)

    out, lse = lib.call(stream, q, k, v)
    check.compare(answer, out, lse, lib.default, lib.compute)


@pytest.mark.feature("OnlineAttention")
@pytest.mark.parametrize("split", SPLITS[:-1])
def test_online_causal(lib, check, tokens, split):
    """Positions run on over the updates; keys in the future are not seen."""
    q, k, v = convert(lib, tokens)
    known = {"causal": True, "query_offset": 4, "key_offset": 3}
    answer = oracle.attend(*map(lib.numpy, (q, k, v)), **known)

    def stream(q, k, v):
        online = OnlineAttention(q, **known)
        for cut in runs(split):
            online.update(k[..., cut, :], v[..., cut, :])
        return online.result(return_lse=True)

    out, lse = lib.call(stream, q, k, v)
    check.compare(answer, out, lse, lib.default, lib.compute)


@pytest.mark.feature("OnlineAttention")
def test_online_offset_of_few_bits(lib, tokens):
    """Positions go on past what the array of the first one could hold."""
    q, k, v = convert(lib, tokens)
    first = lib.asarray(np.asarray(120, np.int8))
    results = []
    for offset in (120, first):
        online = OnlineAttention(q, causal=True, query_offset=130, key_offset=offset)
        for cut in runs((8,)):
            online.update(along(k, cut, "hnd"), along(v, cut, "hnd"))
        results.append(lib.numpy(online.result()))
    np.testing.assert_array_equal(*results)


@pytest.mark.feature("OnlineAttention")
def test_online_merge(lib, check, tokens):
    """Two streams over halves of the keys merge into one; the other is left as it was."""
    q, k, v = convert(lib, tokens)
    answer = oracle.attend(*map(lib.numpy, (q, k, v)))
    one, two = OnlineAttention(q), OnlineAttention(q)
    one.update(k[..., :9, :], v[..., :9, :])
    assert one.merge(two) is one
    two.update(k[..., 9:, :], v[..., 9:, :])
    before = lib.numpy(two.result())
    one.merge(two)
    np.testing.assert_array_equal(lib.numpy(two.result()), before)
    check.compare(answer, *one.result(return_lse=True), lib.default, lib.compute)
    empty = OnlineAttention(q).merge(one)
    np.testing.assert_array_equal(lib.numpy(empty.result()), lib.numpy(one.result()))


@pytest.mark.feature("OnlineAttention")
def test_online_goes_on(lib, tokens):
    """A result in between changes nothing, and more keys may come after it."""
    q, k, v = convert(lib, tokens)
    one, two = OnlineAttention(q), OnlineAttention(q)
    for cut in runs((4, 20)):
        one.update(k[..., cut, :], v[..., cut, :])
        two.update(k[..., cut, :], v[..., cut, :])
        one.result()
    np.testing.assert_array_equal(lib.numpy(one.result()), lib.numpy(two.result()))


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_online_copies(name, tokens, copied):
    lib = libraries.library(name)
    q, k, v = convert(lib, tokens)
    online = OnlineAttention(q).update(k, v)
    other = copied(online).update(k, 2 * v)
    expected = OnlineAttention(q).update(k, v).update(k, 2 * v).result()
    np.testing.assert_allclose(lib.numpy(other.result()), lib.numpy(expected), rtol=1e-6)
    np.testing.assert_array_equal(
        lib.numpy(online.result()), lib.numpy(OnlineAttention(q).update(k, v).result())
    )


@pytest.mark.feature("OnlineAttention")
def test_online_leaves_its_arguments(lib, tokens):
    """An offset that is an array is not counted on in place."""
    q, k, v = convert(lib, tokens)
    offset = lib.asarray(np.asarray(3))
    online = OnlineAttention(q, causal=True, query_offset=20, key_offset=offset)
    online.update(k, v).update(k, v)
    assert int(offset) == 3


@pytest.mark.feature("OnlineAttention")
def test_online_dtypes(lib, check, tokens):
    """Partial sums are kept in the compute dtype, so that halves do not lose digits on the way."""
    for dtype in lib.dtypes:
        q, k, v = (lib.asarray(x, dtype) for x in tokens)
        online = OnlineAttention(q)
        for i in range(29):
            online.update(k[..., i : i + 1, :], v[..., i : i + 1, :])
        answer = oracle.attend(*map(lib.numpy, (q, k, v)))
        compute = "float64" if dtype == "float64" else "float32"
        check.compare(answer, *online.result(return_lse=True), dtype, compute)
