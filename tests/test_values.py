"""NaN, inf and queries that see nothing: pair by pair, and without a warning."""

from __future__ import annotations

import numpy as np
import pytest
from derivatives import pulled, pushed

from chunkattn import attention, attention_vjp
from chunkattn._adapters import adapter_of

COMPILED_QUICKLY = True

BAD = [np.nan, np.inf, -np.inf]
CHUNKS = [(None, None), (4, 4), (3, 100)]


@pytest.fixture(params=["chunked", "standard"])
def implementation(request):
    return request.param


@pytest.fixture
def quiet(lib):
    """Let array-api-strict's NumPy meet NaN and inf, which it would warn of; nobody else."""
    strict = lib.name.startswith("array-api-strict")
    with np.errstate(**({"invalid": "ignore", "over": "ignore"} if strict else {})):
        yield


def tokens(rng, heads=2, n_q=13, n_k=17):
    return (
        rng.standard_normal((2, heads, n_q, 6)),
        rng.standard_normal((2, heads, n_k, 6)),
        rng.standard_normal((2, heads, n_k, 3)),
    )


MASKS = {
    "pairs": (2, 3, 80, 96),
    "heads": (3, 1, 1),
    "positions": (80, 96),
    "keys": (96,),
    "keys of entries": (2, 1, 1, 96),
    "queries": (80, 1),
    "one query": (1, 8, 1, 5000),
    "three queries of one head": (1, 1, 3, 12000),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("axes", MASKS)
@pytest.mark.parametrize("fill", [-np.inf, 0.0])
def test_hide(lib, rng, axes, fill):
    """Many numbers at once, which some libraries mask otherwise than few."""
    mask = MASKS[axes]
    shape = np.broadcast_shapes(mask, (1, 1, 1, 1))
    x = rng.standard_normal(shape if shape[-1] > 96 else MASKS["pairs"])
    x[rng.random(x.shape) < 0.1] = np.nan
    x[rng.random(x.shape) < 0.1] = np.inf
    for dtype in lib.dtypes:
        own = lib.asarray(x, dtype)
        xp, given = adapter_of(own, "x"), lib.numpy(own)
        for rate in (0.5, 0.0, 1.0):
            allowed = rng.random(mask) >= rate
            found = xp.hide(own * 1, lib.asarray(allowed), fill)  # a copy, to write to
            np.testing.assert_array_equal(lib.numpy(found), np.where(allowed, given, fill))


@pytest.mark.feature("queries that see nothing give 0 and -inf")
@pytest.mark.parametrize(("rows", "cols"), CHUNKS)
def test_rows_that_see_nothing(lib, check, rng, implementation, rows, cols):
    q, k, v = tokens(rng)
    mask = rng.random((2, 1, 13, 17)) < 0.4
    mask[:, :, [0, 5, 12]] = False
    kwargs = {"query_chunk_size": rows, "key_chunk_size": cols, "implementation": implementation}
    out, lse = (lib.numpy(x) for x in check(q, k, v, mask=mask, **kwargs))
    assert (out[:, :, [0, 5, 12]] == 0).all()
    assert (lse[:, :, [0, 5, 12]] == -np.inf).all()
    check(q, k, v, mask=np.zeros((1, 1), dtype=bool), **kwargs)
    check(q, k, v, causal=True, query_offset=-6, **kwargs)


@pytest.mark.feature("a bias of -inf forbids a pair")
def test_bias_of_minus_inf(check, rng, implementation):
    q, k, v = tokens(rng)
    bias = np.where(rng.random((13, 17)) < 0.5, -np.inf, rng.standard_normal((13, 17)))
    bias[[2, 9]] = -np.inf
    for cols in (4, None):
        check(q, k, v, bias=bias, implementation=implementation, key_chunk_size=cols)


@pytest.mark.usefixtures("quiet")
@pytest.mark.feature("NaN and inf behind a mask never leak")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["key", "value"])
def test_hidden_keys(check, rng, implementation, bad, where):
    """Keys that nobody may see are not seen, whatever stands in them."""
    q, k, v = tokens(rng)
    mask = np.ones((17,), dtype=bool)
    mask[[0, 3, 16]] = False
    {"key": k, "value": v}[where][:, :, ~mask] = bad
    for rows, cols in CHUNKS:
        check(
            q, k, v, mask=mask, implementation=implementation,
            query_chunk_size=rows, key_chunk_size=cols,
        )  # fmt: skip
    bias = np.where(mask, 0.0, -np.inf)
    if where == "value":
        check(q, k, v, bias=bias, implementation=implementation, key_chunk_size=4)


@pytest.mark.usefixtures("quiet")
@pytest.mark.feature("visible NaN and inf reach those who see them, and no other")
@pytest.mark.parametrize("bad", BAD)
def test_visible_values(check, rng, implementation, bad):
    q, k, v = tokens(rng, n_q=17)
    v[0, 1, 5, 2] = bad
    for rows, cols in CHUNKS:
        kwargs = {"query_chunk_size": rows, "key_chunk_size": cols}
        check(q, k, v, causal=True, implementation=implementation, **kwargs)
    mask = rng.random((17, 17)) < 0.5
    check(q, k, v, mask=mask, implementation=implementation, query_chunk_size=5)
    v[0, 1, 7, 2] = -bad
    check(q, k, v, mask=mask, implementation=implementation, query_chunk_size=5)


@pytest.mark.usefixtures("quiet")
@pytest.mark.feature("visible NaN and inf reach those who see them, and no other")
def test_visible_keys_and_queries(check, rng, implementation):
    q, k, v = tokens(rng, n_q=17)
    q[0, 0, 4, 1] = np.nan
    k[1, 1, 6, 0] = np.nan
    for rows, cols in CHUNKS:
        kwargs = {"query_chunk_size": rows, "key_chunk_size": cols}
        check(q, k, v, causal=True, implementation=implementation, **kwargs)
        check(q, k, v, implementation=implementation, **kwargs)


@pytest.mark.usefixtures("quiet")
def test_hidden_query(check, rng, implementation):
    """A query that sees nothing gives 0, also where it is NaN itself."""
    q, k, v = tokens(rng)
    q[:, :, 3] = np.nan
    mask = np.ones((13, 1), dtype=bool)
    mask[3] = False
    check(q, k, v, mask=mask, implementation=implementation, key_chunk_size=4)


@pytest.mark.usefixtures("quiet")
def test_infinite_scores(lib, rng, implementation):
    """An infinite product is NaN as in textbook attention, for the query that has it."""
    q, k, v = tokens(rng)
    q[..., 0, :], k[..., 2, :] = 1e30, 1e30
    q, k, v = (
        lib.asarray(x, None if "float32" not in lib.dtypes else "float32") for x in (q, k, v)
    )
    out = lib.numpy(lib.call(attention, q, k, v, implementation=implementation, key_chunk_size=4))
    assert np.isnan(out[..., 0, :]).all()
    assert np.isfinite(out[..., 1:, :]).all()


@pytest.mark.parametrize("cols", [1, 2, None])
@pytest.mark.parametrize(
    "along", [(0, 9, 11, 90), (90, 11, 9, 0), (-90, -11, 0, -9), (-30, -40), (9.9, 10.1), (11, -11)]
)
def test_scores_that_change_their_size(check, along, cols):
    """What the exponentials are taken relative to may stay at 0 for some chunks, and then move."""
    key = np.asarray(along, dtype=float)[None, None, :, None]
    value = np.arange(len(along), dtype=float)[None, None, :, None]
    query = np.asarray([1.0, -1.0, 0.0])[None, None, :, None]
    check(query, key, value, scale=1.0, key_chunk_size=cols)
    check(query[:, :, :1], key, value, scale=1.0, key_chunk_size=cols)


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e15])
def test_scores_of_any_size(check, rng, implementation, size):
    """Neither a sum that overflows nor a weight that underflows makes NaN, nor a warning."""
    q, k, v = tokens(rng)
    dtype_scale = np.sqrt(size)
    if size > 1e4:  # one key wins outright; its lead must be beyond rounding
        k[:, :, :] = 0.0
        k[:, :, 7] = 1.0
        q = np.ones_like(q)
    elif size == 1e4:
        q, k = np.round(q), np.round(k)  # exact products
    check(dtype_scale * q, dtype_scale * k, v, implementation=implementation, key_chunk_size=4)


# Derivatives: of query, key and value, and of out and lse

CUT = {"query_chunk_size": 5, "key_chunk_size": 6}


class Directions:
    """Tokens with directions to differentiate in, by name; keys are shared by two heads."""

    def __init__(self, rng, batch):
        q, k, v = (batch, 4, 13, 6), (batch, 2, 17, 6), (batch, 2, 17, 5)
        out, lse = (batch, 4, 13, 5), (batch, 4, 13)
        shapes = {"q": q, "k": k, "v": v, "q_dot": q, "k_dot": k, "v_dot": v}
        shapes |= {"out_bar": out, "lse_bar": lse}
        self.arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def __getitem__(self, name):
        return self.arrays[name]

    def derivatives(self, lib, **kwargs):
        """Return the gradients and the tangents by name."""
        arrays = {name: lib.asarray(x) for name, x in self.arrays.items()}
        kwargs = {name: lib.asarray(x) for name, x in kwargs.items()} | CUT
        tokens = [arrays.pop(name) for name in "qkv"]
        bars = [arrays.pop(name) for name in ("out_bar", "lse_bar")]
        found = lib.call(pulled, *tokens, *bars, **kwargs)[1]
        found["out"], found["lse"] = lib.call(pushed, *tokens, *arrays.values(), **kwargs)[1]
        return {name: lib.numpy(x) for name, x in found.items()}


@pytest.mark.usefixtures("quiet")
@pytest.mark.feature("NaN and inf behind a mask never leak")
def test_hidden_from_derivatives(lib, rng):
    """What no query sees, and what belongs to a query that sees nothing, reaches no derivative."""
    seen = rng.random((13, 17)) < 0.5
    nobody, blind = [0, 3, 16], [2, 7, 12]
    seen[:, nobody], seen[blind] = False, False
    given = Directions(rng, 2)
    clean = given.derivatives(lib, mask=seen)
    for name in ("q", "q_dot", "out_bar"):
        given[name][:, :, blind] = np.asarray(BAD)[:, None]
    for name in ("k", "k_dot", "v", "v_dot"):
        given[name][:, :, nobody] = np.asarray(BAD)[:, None]
    given["lse_bar"][:, :, blind] = BAD
    dirty = given.derivatives(lib, mask=seen)
    for name, x in clean.items():
        np.testing.assert_array_equal(dirty[name], x)
        assert np.isfinite(x).all()
        places = nobody if name in ("key", "value") else blind
        assert (x[:, :, places] == 0).all()


# Where a visible NaN stands, and which derivatives it reaches.
REACHED = {
    "q": ("query", "key", "value", "out", "lse"),
    "k": ("query", "key", "value", "out", "lse"),
    "v": ("query", "key", "out"),
    "out_bar": ("query", "key", "value"),
    "lse_bar": ("query", "key"),
    "q_dot": ("out", "lse"),
    "k_dot": ("out", "lse"),
    "v_dot": ("out",),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.feature("visible NaN and inf reach those who see them, and no other")
def test_visible_in_derivatives(lib, rng):
    """A NaN reaches the queries that see it and the keys that these see; else no bit changes."""
    given = Directions(rng, len(REACHED))  # each batch entry has the NaN in another place
    seen = (rng.random((13, 17)) < 0.6) & (np.arange(13)[:, None] // 7 == np.arange(17) // 8)
    clean = given.derivatives(lib, mask=seen)
    for entry, name in enumerate(REACHED):
        given[name][entry, 1, 4] = np.nan
    dirty = given.derivatives(lib, mask=seen)
    for entry, (name, results) in enumerate(REACHED.items()):
        by_key = name[0] in "kv"
        heads, rows = ([2, 3], seen[:, 4]) if by_key else ([1], np.arange(13) == 4)
        for result, x in clean.items():
            hit = np.zeros(x.shape[1:3], dtype=bool)
            if result in results and result in ("key", "value"):
                hit[int(by_key)] = seen[rows].any(axis=0)
            elif result in results:
                hit[np.ix_(heads, rows)] = True
            np.testing.assert_array_equal(dirty[result][entry][~hit], x[entry][~hit])
            assert np.isnan(dirty[result][entry][hit]).all()


@pytest.mark.usefixtures("quiet")
@pytest.mark.feature("NaN and inf behind a mask never leak")
def test_hidden_from_the_gradient_of_sinks(lib, rng):
    """A query that sees no key has no `out` that a gradient could be asked of."""
    q, k, v = (lib.asarray(rng.standard_normal((1, 2, 5, 4))) for _ in range(3))
    allowed = np.ones((5, 5), dtype=bool)
    allowed[2] = False
    sinks, mask = lib.asarray(np.zeros(2)), lib.asarray(allowed)
    bar = rng.standard_normal((1, 2, 5, 4))

    def gradient(value):
        bar[:, :, 2] = value

        def call(q, k, v, sinks, mask, bar):
            return attention_vjp(q, k, v, sinks=sinks, mask=mask)[1](bar)["sinks"]

        return lib.numpy(lib.call(call, q, k, v, sinks, mask, lib.asarray(bar)))

    np.testing.assert_array_equal(gradient(np.nan), gradient(0.0))
