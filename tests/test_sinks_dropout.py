"""Sinks, and dropout by a hash of positions."""

from __future__ import annotations

import libraries
import numpy as np
import pytest

from chunkattn import OnlineAttention, attention, merge
from chunkattn._dropout import seed_words, threefry

COMPILED_QUICKLY = True


@pytest.fixture
def tokens(rng):
    return (
        rng.standard_normal((2, 4, 19, 8)),
        rng.standard_normal((2, 2, 29, 8)),
        rng.standard_normal((2, 2, 29, 5)),
    )


@pytest.mark.feature("sinks")
@pytest.mark.parametrize("implementation", ["chunked", "standard"])
@pytest.mark.parametrize("size", [1.0, 50.0, -50.0])
def test_sinks(check, rng, tokens, implementation, size):
    sinks = size * rng.random(4)
    mask = rng.random((19, 29)) < 0.5
    mask[3] = False
    for cols in (None, 8):
        check(*tokens, sinks=sinks, implementation=implementation, key_chunk_size=cols)
        check(*tokens, sinks=sinks, mask=mask, implementation=implementation, key_chunk_size=cols)


@pytest.mark.feature("sinks")
def test_sinks_alone(lib, check, rng, tokens):
    """A query that sees no key gets 0, and the sink as its lse; a sink of -inf is none."""
    sinks = np.asarray([1.0, -np.inf, 0.0, -3.0])
    nobody = np.zeros((1, 1), dtype=bool)
    out, lse = check(*tokens, sinks=sinks, mask=nobody)
    assert (lib.numpy(out) == 0).all()
    np.testing.assert_array_equal(lib.numpy(lse)[0, :, 0], sinks)
    check(*tokens, sinks=sinks)
    q, k, v = tokens
    check(q, k[:, :, :0], v[:, :, :0], sinks=sinks)
    check(q[0, 0], k[0, 0], v[0, 0], sinks=sinks[:1])


@pytest.mark.feature("sinks")
def test_sinks_count_once(lib, check, tokens):
    """In a stream sinks count once, however many updates and merges; in a merge, in one part."""
    q, k, v = (lib.asarray(x) for x in tokens)
    sinks = lib.asarray(np.asarray([1.0, 2.0, 0.0, -3.0]))
    whole = lib.call(attention, q, k, v, sinks=sinks, return_lse=True)
    one, two = OnlineAttention(q, sinks=sinks), OnlineAttention(q, sinks=sinks)
    one.update(k[..., :7, :], v[..., :7, :])
    two.update(k[..., 7:20, :], v[..., 7:20, :]).update(k[..., 20:, :], v[..., 20:, :])
    halves = [
        attention(q, k[..., :7, :], v[..., :7, :], sinks=sinks, return_lse=True),
        attention(q, k[..., 7:, :], v[..., 7:, :], return_lse=True),
    ]
    for result in (one.merge(two).result(return_lse=True), merge(*halves)):
        for x, y in zip(result, whole, strict=True):
            np.testing.assert_allclose(
                lib.numpy(x), lib.numpy(y), rtol=1e-5, atol=1e-5 + 4 * lib.eps(lib.default)
            )


def kept(b, h, q_idx, kv_idx, rate, seed):
    """Return the weights that dropout keeps, from the hash's definition, one pair at a time."""
    out = np.empty((b, h, len(q_idx), len(kv_idx)), dtype=bool)
    lane = lambda *x: tuple(np.asarray([i], dtype=np.int32) for i in x)  # noqa: E731
    for i in np.ndindex(out.shape):
        key = threefry(seed_words(seed), lane(i[0], i[1]))
        k = int(kv_idx[i[3]])
        word = threefry(key, lane(q_idx[i[2]], k // 2))[k % 2]
        out[i] = (int(word[0]) % 2**32) >> 8 >= round(rate * 2**24)
    return out


@pytest.mark.feature("dropout, the same set on every library")
def test_dropout(check, rng):
    """The dropped set follows from seed, batch entry, head and positions, not from the tiles."""
    q, k, v = (rng.standard_normal((2, 2, n, 4)) for n in (9, 13, 13))
    for seed, q_0, k_0 in [(0, 0, 0), (2**40 + 17, 5, 3), (-3, 0, 100)]:
        known = kept(2, 2, range(q_0, q_0 + 9), range(k_0, k_0 + 13), 0.3, seed)
        for rows, cols in [(None, None), (4, 5), (2, 1)]:
            check(
                q, k, v, dropout=0.3, key_offset=k_0, query_offset=q_0,
                query_chunk_size=rows, key_chunk_size=cols,
                function=Dropped(seed), known={"kept": known},
            )  # fmt: skip


class Dropped:
    """`attention` with a seed, which the oracle does not take."""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, *args, **kwargs):
        return attention(*args, dropout_seed=self.seed, **kwargs)


@pytest.mark.feature("dropout, the same set on every library")
def test_dropout_in_pieces(lib, tokens):
    """A stream, and pieces by `key_offset`, drop what one call drops."""
    q, k, v = (lib.asarray(x) for x in tokens)
    known = {"dropout": 0.4, "dropout_seed": 7}
    whole = lib.numpy(lib.call(attention, q, k, v, **known))
    online = OnlineAttention(q, **known)
    online.update(k[..., :7, :], v[..., :7, :]).update(k[..., 7:, :], v[..., 7:, :])
    parts = merge(
        attention(q, k[..., :7, :], v[..., :7, :], return_lse=True, **known),
        attention(q, k[..., 7:, :], v[..., 7:, :], return_lse=True, key_offset=7, **known),
    )
    for x in (online.result(), parts[0]):
        np.testing.assert_allclose(
            lib.numpy(x), whole, rtol=0, atol=1e-5 + 8 * lib.eps(lib.default)
        )


@pytest.mark.feature("dropout, the same set on every library")
def test_seed_arrays(lib, tokens):
    """A seed may be an integer array without axes, which JAX may trace."""
    q, k, v = (lib.asarray(x) for x in tokens)
    for seed in (5, 2**31 + 3, -2, 2**31 - 1, 2**31 - 5):
        one = lib.call(attention, q, k, v, dropout=0.5, dropout_seed=seed)
        two = lib.call(attention, q, k, v, dropout=0.5, dropout_seed=lib.asarray(np.asarray(seed)))
        np.testing.assert_array_equal(lib.numpy(one), lib.numpy(two))


@pytest.mark.feature("dropout, the same set on every library")
@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])
def test_seeds_of_every_integer(lib, tokens, kind):
    """A seed is its value, whatever its dtype."""
    seed = 200 if kind.startswith("u") else -3
    own = [lib.asarray(x) for x in tokens]
    given = lib.asarray(np.asarray(seed, kind))
    results = [lib.call(attention, *own, dropout=0.5, dropout_seed=x) for x in (seed, given)]
    np.testing.assert_array_equal(*map(lib.numpy, results))


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_seeds_of_64_bits(name, tokens):
    lib = libraries.library(name)
    own = [lib.asarray(x) for x in tokens]
    given = lib.asarray(np.asarray(2**64 - 3, "uint64"))
    results = [attention(*own, dropout=0.5, dropout_seed=x) for x in (2**64 - 3, given)]
    np.testing.assert_array_equal(*map(lib.numpy, results))


def test_known_answers():
    """The hash gives the answers published with Random123 for threefry2x32, 20 rounds."""
    full = 0xFFFFFFFF
    for counter, key, answer in [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((full, full), (full, full), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ]:
        lanes = [
            tuple(np.asarray([x], np.uint32).view(np.int32) for x in pair)
            for pair in (key, counter)
        ]
        got = tuple(int(x.view(np.uint32)[0]) for x in threefry(*lanes))
        assert got == answer


def test_rate_and_independence():
    """The rate is as asked, alike on every axis, and neighbours are dropped independently."""
    n, rate = 512, 0.2
    q = np.zeros((2, 2, n, 1), dtype=np.float32)
    value = np.broadcast_to(np.eye(n, dtype=np.float32), (2, 2, n, n))
    out = attention(q, q, value, dropout=rate, dropout_seed=1)  # uniform weights: out shows the set
    np.testing.assert_allclose(np.unique(out), [0, 1 / n / (1 - rate)], rtol=1e-5)
    dropped = out == 0
    total = dropped.size
    sigma = np.sqrt(rate * (1 - rate))
    assert abs(dropped.mean() - rate) < 5 * sigma / np.sqrt(total)
    for axis in range(4):
        others = tuple(i for i in range(4) if i != axis)
        means = dropped.mean(axis=others)
        assert np.abs(means - rate).max() < 6 * sigma / np.sqrt(total / dropped.shape[axis])
    centred = dropped - rate
    for axis in range(4):  # neighbours along each axis
        near = np.take(centred, range(dropped.shape[axis] - 1), axis)
        far = np.take(centred, range(1, dropped.shape[axis]), axis)
        correlation = (near * far).mean() / sigma**2
        assert abs(correlation) < 5 / np.sqrt(near.size)
    other = attention(q, q, value, dropout=rate, dropout_seed=2) == 0
    assert abs((centred * (other - rate)).mean()) / sigma**2 < 5 / np.sqrt(total)


def test_mean_is_kept(rng):
    """Over many seeds the mean is the attention without dropout."""
    q, k, v = rng.standard_normal((3, 4, 16, 8))
    mean = np.mean(
        [attention(q, k, v, dropout=0.5, dropout_seed=seed) for seed in range(400)], axis=0
    )
    assert np.abs(mean - attention(q, k, v)).max() < 0.2


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), "0.5"])
def test_refused(lib, tokens, rate):
    q, k, v = (lib.asarray(x) for x in tokens)
    with pytest.raises((ValueError, TypeError), match="dropout"):
        attention(q, k, v, dropout=rate, dropout_seed=1)


def test_refused_arguments(lib, tokens):
    q, k, v = (lib.asarray(x) for x in tokens)
    with pytest.raises(ValueError, match="dropout_seed must be given"):
        attention(q, k, v, dropout=0.5)
    with pytest.raises(TypeError, match="dropout_seed must be an int"):
        attention(q, k, v, dropout=0.5, dropout_seed=0.5)
    with pytest.raises(ValueError, match=r"sinks must have shape \(4,\); got \(2,\)"):
        attention(q, k, v, sinks=lib.asarray(np.zeros(2)))
    with pytest.raises(TypeError, match="sinks must be one of"):
        attention(q, k, v, sinks=lib.asarray(np.zeros(4, dtype=int)))
    with pytest.raises(TypeError, match="sinks must be an array"):
        attention(q, k, v, sinks=[0.0] * 4)
