"""Masks that know their range, callables, and mixtures of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from chunkattn import OnlineAttention, attention, masks

COMPILED_QUICKLY = True

CHUNKS = [(None, None), (7, 5), (4, 16)]
B, H, N_Q, N_K = 2, 4, 19, 29


@pytest.fixture
def tokens(rng):
    return (
        rng.standard_normal((B, H, N_Q, 8)),
        rng.standard_normal((B, 2, N_K, 8)),
        rng.standard_normal((B, 2, N_K, 5)),
    )


def check_mask(check, tokens, make, data, allowed, **known):
    """Compare a mask with the boolean array that says the same, over chunk sizes."""
    lib = check.lib
    for rows, cols in CHUNKS:
        chunks = {"query_chunk_size": rows, "key_chunk_size": cols}

        def call(query, key, value, *, data, chunks=chunks, **kwargs):
            return attention(query, key, value, mask=make(*data), **chunks, **known, **kwargs)

        own = [lib.asarray(x) for x in data]
        check(*tokens, function=call, data=own, known={"mask": allowed})


def distances(query_offset=0, key_offset=0):
    return np.arange(N_K) + key_offset - np.arange(N_Q)[:, None] - query_offset


@pytest.mark.feature("Window")
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (4, 4), (None, 1), (2, None), (0, 0)])
@pytest.mark.parametrize("offset", [0, 10, -8])
def test_window(check, tokens, left, right, offset):
    d = distances(offset, 2)
    allowed = (d >= -(99 if left is None else left)) & (d <= (99 if right is None else right))
    make = lambda: masks.Window(left, right)  # noqa: E731
    check_mask(check, tokens, make, (), allowed, query_offset=offset, key_offset=2)


@pytest.mark.feature("Window")
def test_window_of_an_array(check, tokens):
    """A width is a number of Python once it is given as an array without axes."""
    d = distances(10)
    window = masks.Window(check.lib.asarray(np.asarray(3)), 0)
    assert window == masks.Window(3, 0)
    known = {"mask": (d >= -3) & (d <= 0)}
    check(*tokens, mask=(window, masks.Causal()), query_offset=10, known=known)


@pytest.mark.feature("Window")
def test_window_by_batch(check, tokens):
    """Offsets by batch entry move the window of each."""
    offset = np.asarray([3, 11])
    d = distances() - offset[:, None, None, None]

    check(
        *tokens,
        mask=(masks.Window(5, 0), masks.Causal()),
        query_offset=offset,
        query_chunk_size=4,
        key_chunk_size=4,
        known={"mask": (d >= -5) & (d <= 0)},
    )


@pytest.mark.feature("Lengths")
def test_lengths(check, tokens):
    keys, queries = np.asarray([12, 29]), np.asarray([19, 0])
    k = np.arange(N_K) < keys[:, None, None, None]
    q = np.arange(N_Q)[:, None] < queries[:, None, None, None]
    check_mask(check, tokens, lambda x: masks.Lengths(key=x), [keys], k)
    check_mask(check, tokens, lambda x: masks.Lengths(query=x), [queries], q)
    check_mask(check, tokens, masks.Lengths, [queries, keys], k & q)
    one = np.asarray(20)
    check_mask(check, tokens, lambda x: masks.Lengths(key=x), [one], np.arange(N_K) < 20)


@pytest.mark.feature("Lengths")
def test_lengths_count_positions(check, tokens):
    """Lengths of keys count positions, offset included; lengths of queries count indices."""
    allowed = (np.arange(N_K) + 6 < 20) & (np.arange(N_Q) < 15)[:, None]
    data = [np.asarray([15]), np.asarray([20])]
    check_mask(check, tokens, masks.Lengths, data, allowed, key_offset=6, query_offset=9)


@pytest.mark.feature("Lengths")
def test_calls_of_equal_shapes(check, rng, tokens):
    """They are checked once, whatever numbers are in the arrays of masks and offsets."""

    def call(query, key, value, *, data, **given):
        allowed, lengths, query_offset, key_offset = data
        several = (allowed, masks.Lengths(key=lengths))
        offsets = {"query_offset": query_offset, "key_offset": key_offset}
        return attention(query, key, value, mask=several, causal=True, **offsets, **given)

    for start in range(3):
        allowed, offset = rng.random((N_Q, N_K)) < 0.7, rng.integers(0, 20, B)
        lengths = rng.integers(1, N_K, B)
        within = np.arange(N_K) + start < lengths[:, None, None, None]
        causal = distances(key_offset=start) <= offset[:, None, None, None]
        data = [allowed, lengths, offset, np.asarray(start)]
        known = {"mask": allowed & within & causal}
        check(*tokens, function=call, data=list(map(check.lib.asarray, data)), known=known)


@pytest.mark.feature("Segments, sorted or not")
@pytest.mark.parametrize("kind", ["sorted", "shuffled", "shared", "disjoint"])
def test_segments(check, rng, tokens, kind):
    queries, keys = rng.integers(0, 5, (B, N_Q)), rng.integers(0, 5, (B, N_K))
    if kind == "sorted":
        queries, keys = np.sort(queries), np.sort(keys)
    elif kind == "shared":
        queries, keys = queries[0], keys[0]
    elif kind == "disjoint":
        keys = keys + 7
    allowed = (queries[..., :, None] == keys[..., None, :]).reshape(-1, 1, N_Q, N_K)
    check_mask(check, tokens, masks.Segments, [queries, keys], allowed)
    check_mask(
        check, tokens, masks.Segments, [queries, keys], allowed, query_offset=5, key_offset=3
    )


@pytest.mark.feature("Segments, sorted or not")
@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8"])
def test_segments_of_every_integer(check, rng, tokens, kind):
    queries, keys = (np.sort(rng.integers(0, 5, (B, n))).astype(kind) for n in (N_Q, N_K))
    allowed = (queries[..., :, None] == keys[..., None, :]).reshape(-1, 1, N_Q, N_K)
    check_mask(check, tokens, masks.Segments, [queries, keys], allowed)


def test_segments_of_two_dtypes():
    """The order of both is one, also past the signed integers of as many bits."""
    torch = pytest.importorskip("torch")
    q = torch.arange(24.0).reshape(1, 6, 4)
    ids = np.asarray([1, 1, 2, 2, 40_000, 40_000])
    keys = torch.as_tensor(ids.astype(np.int32))
    results = [
        attention(q, q, q, mask=masks.Segments(queries, keys), key_chunk_size=2, query_chunk_size=2)
        for queries in (keys, torch.as_tensor(ids.astype(np.uint16)))
    ]
    torch.testing.assert_close(*results)


@pytest.mark.feature("Segments, sorted or not")
def test_segments_of_one_sequence(check, rng, tokens):
    """Keys take the queries' ids; with a causal mask, packed documents."""
    _, k, v = tokens
    q = rng.standard_normal((B, H, N_K, 8))
    ids = np.sort(rng.integers(0, 4, (B, N_K)))
    causal = np.arange(N_K) <= np.arange(N_K)[:, None]
    allowed = (ids[:, None, :, None] == ids[:, None, None, :]) & causal
    check_mask(check, (q, k, v), lambda x: (masks.Segments(x), masks.Causal()), [ids], allowed)


BOOLEANS = {
    "run": lambda rng: np.abs(distances(4)) < 6,
    "runs": lambda rng: (np.abs(distances(4)) < 6) | (np.arange(N_K) == 0),
    "far apart": lambda rng: np.abs(distances(4)) > 8,
    "keys of entries": lambda rng: np.arange(N_K) < np.asarray([9, 22])[:, None, None, None],
    "none of some": lambda rng: np.arange(N_K) >= np.asarray([5, 90])[:, None, None, None],
    "heads": lambda rng: np.arange(N_K) >= np.asarray([0, 9, 20, 28])[:, None, None],
    "queries": lambda rng: np.arange(N_Q)[:, None] > 8,
    "one for all": lambda rng: np.asarray([True]),
    "irregular": lambda rng: rng.random((B, 1, N_Q, N_K)) < 0.1,
}


@pytest.mark.feature("mask array, of every broadcast shape")
@pytest.mark.parametrize("kind", BOOLEANS)
def test_booleans(check, rng, tokens, kind):
    """Arrays that leave tiles empty, at either end of the keys or between."""
    allowed = BOOLEANS[kind](rng)
    check_mask(check, tokens, masks.Dense, [allowed], allowed)
    if kind == "run":
        check_mask(check, tokens, masks.Dense, [allowed], allowed, query_offset=5, key_offset=3)
        both = allowed & (distances(2) <= 0)
        check_mask(check, tokens, lambda x: (x, masks.Causal()), [allowed], both, query_offset=2)


@pytest.mark.feature("mask_mod and score_mod callables")
def test_predicate(check, tokens):
    limits = np.asarray([9, 25])
    allowed = (np.arange(N_K) < limits[:, None, None, None]) & (distances() != 2)

    def make(low, high):
        return lambda b, h, q_idx, kv_idx: (
            (kv_idx < (1 - b) * low + b * high) & (kv_idx - q_idx != 2)
        )

    data = list(limits)
    check_mask(check, tokens, make, data, allowed)
    check_mask(check, tokens, lambda *x: masks.Predicate(make(*x)), data, allowed)


@dataclass(frozen=True)
class Dilated(masks.Mask):
    """Every `step`-th key back from the query: a mask that a user might write."""

    step: int
    reach: object

    aligned = True

    def key_range(self, rows):
        return None, rows.last + 1

    def tile(self, tile):
        back = tile.q_idx - tile.kv_idx
        return (back >= 0) & (back % self.step == 0) & (back < self.reach)


@pytest.mark.feature("masks of one's own")
def test_own_mask(check, tokens):
    back = -distances(5)
    allowed = (back >= 0) & (back % 3 == 0) & (back < 12)
    check_mask(
        check, tokens, lambda reach: Dilated(3, reach), [np.asarray(12)], allowed, query_offset=5
    )


@dataclass(frozen=True)
class Odd(masks.Causal):
    """Every other key back from the query."""

    def full_range(self, rows):
        return None

    def tile(self, tile):
        return super().tile(tile) & ((tile.q_idx - tile.kv_idx) % 2 == 0)


@pytest.mark.feature("masks of one's own")
def test_own_mask_that_derives_from_another(check, tokens):
    """Also where all keys are before the query, so that a causal mask would hide nothing."""
    for offset in (5, N_K + 3):
        back = -distances(offset)
        allowed = (back >= 0) & (back % 2 == 0)
        check_mask(check, tokens, Odd, [], allowed, query_offset=offset)


@dataclass(frozen=True)
class Table(masks.Mask):
    """A mask that checks its array, and has a field that no caller gives."""

    seen: object
    none: object = field(init=False, default=None)

    def __post_init__(self):
        if self.seen.ndim != 1:
            raise ValueError("one axis")

    def tile(self, tile):
        return tile.xp.read(self.seen, -1, tile.start, tile.size)[None, :]


@pytest.mark.feature("masks of one's own")
def test_own_mask_that_checks_its_array(check, rng, tokens):
    seen = rng.random(N_K) < 0.5
    check_mask(check, tokens, Table, [seen], seen)


def test_own_mask_of_a_function(rng):
    """It would be its function alone."""

    @dataclass(frozen=True)
    class Near(masks.Predicate):
        def tile(self, tile):
            return super().tile(tile) & (tile.kv_idx < 10)

    q = rng.standard_normal((5, 4))
    with pytest.raises(TypeError, match="Near must derive from Mask, not from Predicate"):
        attention(q, q, q, mask=Near(lambda b, h, q_idx, kv_idx: kv_idx > 0))


@dataclass(frozen=True)
class Given(masks.Mask):
    """A mask of an array of pairs, whatever is in it."""

    pairs: object

    def tile(self, tile):
        return tile.slice(self.pairs) if hasattr(self.pairs, "shape") else self.pairs


@pytest.mark.parametrize("pairs", [np.ones((40, 40), int), True])
def test_own_mask_must_be_boolean(rng, pairs):
    """It is no mask of bits, and is not written to."""
    x = rng.standard_normal((3, 1, 40, 8))
    with pytest.raises(TypeError, match=r"mask: Given\.tile must return a boolean array; got"):
        attention(*x, mask=Given(pairs))
    assert np.all(pairs)


def test_own_mask_must_broadcast(rng):
    with pytest.raises(ValueError, match=r"Given\.tile must return an array that broadcasts to"):
        attention(*rng.standard_normal((3, 1, 40, 8)), mask=Given((np.ones(3) > 0)[None]))


def test_own_mask_must_be_a_dataclass(rng):
    """Without fields of its own a mask equals every other one, and JAX would mix them up."""

    class Plain(masks.Mask):
        def tile(self, tile):
            return None

    q = rng.standard_normal((5, 4))
    with pytest.raises(TypeError, match="Plain must be a frozen dataclass"):
        attention(q, q, q, mask=Plain())


@pytest.mark.feature("tuple of masks")
def test_tuple(check, rng, tokens):
    dense, ids = rng.random((H, 1, N_K)) < 0.8, rng.integers(0, 2, (B, N_K))
    lengths = np.asarray([25, 20])
    d = distances(8)
    allowed = dense & (np.arange(N_K) < lengths[:, None, None, None])
    allowed = allowed & (ids[:, None, :N_Q, None] == ids[:, None, None, :]) & (d <= 4) & (d != 1)

    def make(dense, queries, keys, lengths):
        return (
            dense,
            masks.Segments(queries, keys),
            masks.Window(None, 4),
            masks.Lengths(key=lengths),
            lambda b, h, q_idx, kv_idx: kv_idx - q_idx != 1,
        )

    data = [dense, ids[:, :N_Q], ids, lengths]
    check_mask(check, tokens, make, data, allowed, query_offset=8)


@pytest.mark.feature("masks in streams")
def test_stream(check, tokens):
    """Masks by position run on over the updates of a stream."""
    lib = check.lib
    lengths = np.asarray([12, 25])
    d = distances(9)
    allowed = (d <= 0) & (d >= -6) & (np.arange(N_K) < lengths[:, None, None, None])

    def stream(query, key, value, *, return_lse):
        known = (masks.Window(6, 0), masks.Lengths(key=lib.asarray(lengths)))
        online = OnlineAttention(query, mask=known, query_offset=9)
        for cut in (slice(0, 10), slice(10, 11), slice(11, None)):
            online.update(key[..., cut, :], value[..., cut, :])
        return online.result(return_lse=return_lse)

    check(*tokens, function=stream, known={"mask": allowed})


def test_refused(lib, rng):
    q = lib.asarray(rng.standard_normal((B, 1, N_Q, 4)))
    ints, floats = lib.asarray(np.arange(N_Q)), lib.asarray(rng.standard_normal(N_Q))
    for error, message, mask in [
        (TypeError, "Segments: query must be an integer array", masks.Segments(floats)),
        (ValueError, r"Segments: query must have shape \(…, 19\)", masks.Segments(ints[:4])),
        (ValueError, r"Segments: key must have shape \(…, 19\)", masks.Segments(ints, ints[:4])),
        (TypeError, "Lengths: key must be an integer array", masks.Lengths(key=floats)),
        (ValueError, r"Lengths: key must broadcast to \(2,\)", masks.Lengths(key=ints)),
        (TypeError, "mask_mod must return a boolean array", lambda b, h, i, j: i - j),
        (
            ValueError,
            "mask_mod must return an array that broadcasts",
            lambda b, h, i, j: ints[:5] > 3,
        ),
        (TypeError, "mask must be a boolean array", masks.Dense(ints)),
    ]:
        with pytest.raises(error, match=message):
            attention(q, q, q, mask=mask)
    with pytest.raises(ValueError, match="stream"):
        OnlineAttention(q, mask=masks.Segments(ints)).update(q, q)
    few = q[..., :5, :]
    with pytest.raises(ValueError, match="query_offset must be given where the mask Window meets"):
        attention(q, few, few, mask=masks.Window(2, 2))
    with pytest.raises(ValueError, match="Segments: key must be given where n_q = 19 and n_k = 5"):
        attention(q, few, few, mask=masks.Segments(ints))


def test_classes_are_no_arrays():
    """NumPy's scalar classes look like arrays, and share their class with every other class."""

    @dataclass(frozen=True)
    class Odd(masks.Mask):
        kind: type = int

        def tile(self, tile):
            return tile.kv_idx % self.kind(2) == 1

    q = np.ones((4, 2))
    attention(q, q, q, compute_dtype=np.float64)
    assert attention(q, q, q, mask=Odd()).shape == (4, 2)
    with pytest.raises(TypeError, match="mask must be a mask, not the class Causal: call it first"):
        attention(q, q, q, mask=masks.Causal)
    with pytest.raises(TypeError, match="bias must be an array"):
        attention(q, q, q, bias=np.float32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.Window(-1, 0), ValueError, "left must not be negative; got -1"),
        (lambda: masks.Window(0, 1.5), TypeError, "right must be an int or None; got 1.5"),
        (lambda: masks.Window(True, 0), TypeError, "left must be an int or None; got True"),
        (lambda: masks.Segments([0, 1]), TypeError, "Segments: query must be an integer array"),
        (lambda: masks.Dense([[True]]), TypeError, "Dense: allowed must be a boolean array"),
        (lambda: masks.Lengths(key=3), TypeError, "Lengths: key must be an integer array; got 3"),
        (lambda: masks.Predicate(3), TypeError, "mask_mod must be callable; got 3"),
    ],
)
def test_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.feature("Window")
def test_too_wide_a_window(lib, tokens):
    """Positions would leave the index dtype."""
    q, k, v = map(lib.asarray, tokens)
    with pytest.raises(ValueError, match=r"right must be below .*, or None for no bound"):
        attention(q, k, v, mask=masks.Window(0, 2**63), query_offset=0)


def test_mask_and_bias_in_files(tmp_path, rng):
    """Memory-mapped arrays are read tile by tile: the call holds no more than without them."""
    import tracemalloc

    n = 2000
    q, k, v = rng.standard_normal((3, n, 8), dtype=np.float32)
    known = {"mask": rng.random((n, n)) < 0.9, "bias": rng.standard_normal((n, n), np.float32)}
    mapped = {}
    for name, x in known.items():
        np.save(tmp_path / name, x)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    # What a first call of many tasks loads is no part of the call.
    expected = attention(q, k, v, query_chunk_size=64, **known)

    def peak(**kwargs):
        tracemalloc.start()
        try:
            out = attention(q, k, v, query_chunk_size=64, key_chunk_size=64, **kwargs)
            return out, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    out, held = peak(**mapped)
    _, plain = peak()
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert held < plain + 2**18 < known["mask"].nbytes
