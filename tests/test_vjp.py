"""`attention_vjp` and `attention_jvp` against the Jacobian of textbook attention."""

from __future__ import annotations

from time import sleep

import numpy as np
import pytest
from array_api_compat import array_namespace
from derivatives import Call
from hypothesis import given, settings
from test_properties import calls
from test_sinks_dropout import kept

from chunkattn import ScoreMod, attention_jvp, attention_vjp, masks
from chunkattn._adapters import adapter_of

COMPILED_QUICKLY = True

B, H, H_K, N_Q, N_K = 2, 4, 2, 13, 17
Q, K, V = (B, H, N_Q, 6), (B, H_K, N_K, 6), (B, H_K, N_K, 5)
CHUNKS = {"query_chunk_size": 5, "key_chunk_size": 6}


def shaped(query, key, value):
    return {"shapes": (query, key, value)} | CHUNKS


def bias_of(*shape):
    return lambda rng: {"bias": rng.standard_normal(shape)} | CHUNKS


def half_hidden(rng):
    """Return a bias that is -inf for half of the pairs and for whole queries."""
    bias = np.where(rng.random((N_Q, N_K)) < 0.5, -np.inf, rng.standard_normal((N_Q, N_K)))
    bias[[2, 9]] = -np.inf
    return {"bias": bias}


def packed(rng):
    """Return a mask of three kinds, its data, and the pairs that it allows."""
    lengths, ids = np.asarray([15, 9]), [np.sort(rng.integers(0, 3, (B, n))) for n in (N_Q, N_K)]
    distance = np.arange(N_K) - np.arange(N_Q)[:, None] - 2
    allowed = (distance >= -9) & (distance <= 3) & (ids[0][:, :, None] == ids[1][:, None])
    allowed = (allowed & (np.arange(N_K) < lengths[:, None, None]))[:, None]

    def make(lengths, *ids):
        return masks.Window(9, 3), masks.Lengths(key=lengths), masks.Segments(*ids)

    return {"make": make, "data": [lengths, *ids], "known": {"mask": allowed}, "query_offset": 2}


def staircase(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx + h


def dropped(q_0, seed):
    known = kept(B, H, range(q_0, q_0 + N_Q), range(3, 3 + N_K), 0.3, seed)
    keywords = {"dropout": 0.3, "dropout_seed": seed, "query_offset": q_0, "key_offset": 3}
    return keywords | {"known": {"kept": known}}


def real(x, score):
    return array_namespace(score).astype(x, score.dtype)


# It depends on all its arguments, and its derivative on more than one.
MODIFIED = ScoreMod(
    lambda s, b, h, q_idx, kv_idx: s * s / real(h + 2, s) + real(kv_idx - q_idx - b, s) / 8,
    lambda s, b, h, q_idx, kv_idx: 2 * s / real(h + 2, s),
)


def everything(rng):
    further = {"softcap": 2.0, "causal": True, "sinks": rng.standard_normal(H)}
    return dropped(4, 5) | half_hidden(rng) | further | {"score_mod": MODIFIED} | CHUNKS


# The shapes and keywords of a call, from a generator of random numbers.
CASES = {
    "plain": lambda rng: {"shapes": (Q, (B, H, N_K, 6), (B, H, N_K, 5))},
    "grouped heads": lambda rng: CHUNKS,
    "one key head, nhd": lambda rng: (
        shaped((B, N_Q, H, 6), (B, N_K, 1, 6), (B, N_K, 1, 5)) | {"layout": "nhd", "scale": -0.7}
    ),
    "without heads, standard": lambda rng: (
        shaped((N_Q, 6), (N_K, 6), (N_K, 6)) | {"implementation": "standard"}
    ),
    "batch that broadcasts": lambda rng: shaped(
        (3, 1, H, N_Q, 6), (2, H_K, N_K, 6), (1, 2, H_K, N_K, 5)
    ),
    "causal": lambda rng: {"causal": True, "query_offset": N_K - N_Q} | CHUNKS,
    "causal by batch, blind rows": lambda rng: (
        {"causal": True, "query_offset": np.asarray([9, -5]), "key_offset": 2} | CHUNKS
    ),
    "Window, Lengths, Segments": lambda rng: packed(rng) | CHUNKS,
    "boolean array": lambda rng: {"mask": rng.random((B, 1, N_Q, N_K)) < 0.3} | CHUNKS,
    "mask_mod": lambda rng: {"mask": staircase} | CHUNKS,
    "bias of pairs": bias_of(N_Q, N_K),
    "bias of heads and keys": bias_of(H, 1, N_K),
    "bias of batch and queries": bias_of(B, 1, N_Q, 1),
    "bias of keys": bias_of(1, 1, 1, N_K),
    "bias of -inf": lambda rng: half_hidden(rng) | CHUNKS,
    "softcap": lambda rng: {"softcap": 1.5} | CHUNKS,
    "sinks, blind rows": lambda rng: (
        {"sinks": np.asarray([1.0, -np.inf, 0.0, -3.0]), "causal": True, "query_offset": -6}
        | CHUNKS
    ),
    "dropout": lambda rng: dropped(0, 2**40 + 17) | CHUNKS,
    "ScoreMod": lambda rng: {"score_mod": MODIFIED} | CHUNKS,
    "all at once": everything,
    "no queries": lambda rng: shaped((B, H, 0, 6), K, V),
    "no keys": lambda rng: (
        shaped(Q, (B, H_K, 0, 6), (B, H_K, 0, 5)) | {"sinks": rng.standard_normal(H)}
    ),
    "compute_dtype": lambda rng: {"compute_dtype": "float64"} | CHUNKS,
}


@pytest.fixture
def call(check, rng):
    """Make a `Call` of this library."""
    return lambda *tokens, **kwargs: Call(check, rng, *tokens, **kwargs)


@pytest.fixture
def case(request, call, rng):
    """A case by its name."""
    kwargs = CASES[request.param](rng)
    shapes = kwargs.pop("shapes", (Q, K, V))
    return call(*map(rng.standard_normal, shapes), **kwargs)


@pytest.mark.feature("attention_vjp")
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_vjp(case):
    case.vjp()


@pytest.mark.feature("attention_jvp")
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_jvp(case):
    case.jvp()


@pytest.fixture
def tokens(rng):
    return [rng.standard_normal(shape) for shape in (Q, K, V)]


def each_dtype(lib, call, tokens):
    for dtype in lib.dtypes:
        if dtype != lib.default:
            yield call(*tokens, dtype=dtype, causal=True, query_offset=N_K - N_Q, **CHUNKS)


@pytest.mark.feature("attention_vjp")
def test_vjp_dtypes(lib, call, tokens):
    for one in each_dtype(lib, call, tokens):
        one.vjp()


@pytest.mark.feature("attention_jvp")
def test_jvp_dtypes(lib, call, tokens):
    for one in each_dtype(lib, call, tokens):
        one.jvp()


def slowly(self, x, value, corner):
    """Add as `accumulate` does, and leave another thread time to spoil it."""
    place = tuple(slice(i, i + n) for i, n in zip(corner, value.shape, strict=True))
    total = x[place] + value
    sleep(5e-4)
    x[place] = total
    return x


@pytest.mark.parametrize(
    "case",
    ["grouped heads", "batch that broadcasts", "bias of heads and keys", "all at once"],
    indirect=True,
)
def test_many_blocks(case, monkeypatch):
    """Batch entries and heads as tasks of their own, on threads, which may share their sums."""
    adapter = adapter_of(case.tokens[0], "query")
    sizes = adapter.tile_sizes(case.tokens[0])._replace(elements=60)
    if sizes.batch == "whole":  # on a GPU, or of several devices
        sizes = sizes._replace(batch="even")
    monkeypatch.setattr(type(adapter), "tile_sizes", lambda self, like, backward=False: sizes)
    monkeypatch.setattr("chunkattn._request_cache._KEPT", {})  # calls alike have other sizes there
    if adapter.name != "jax":  # which traces it, and has no threads of ours
        monkeypatch.setattr(type(adapter), "accumulate", slowly)
    monkeypatch.setattr("chunkattn.backends._threads.share", lambda: 2)
    case.vjp()
    case.jvp()


@pytest.mark.feature("attention_vjp")
def test_vjp_again(lib, call, tokens):
    """A vjp may be called again, for `out` alone and for `lse` alone; it is linear."""

    def several(query, key, value, d_out, d_lse):
        out, vjp = attention_vjp(query, key, value, **CHUNKS)
        bars = [(d_out, d_lse), (d_out,), (None, d_lse), (d_out, d_lse)]
        return out, [vjp(*some) for some in bars]

    one = call(*tokens)
    d_out, d_lse = one.bars[0], lib.asarray(lib.numpy(one.bars[1]))
    out, (both, of_out, of_lse, again) = one.run(several, d_out, d_lse)
    assert tuple(out.shape) == one.answer.out.shape
    one.compare_gradients(both, d_out, d_lse)
    one.compare_gradients(of_out, d_out)
    one.compare_gradients(of_lse, None, d_lse)
    for name, x in both.items():
        np.testing.assert_array_equal(lib.numpy(x), lib.numpy(again[name]))


@pytest.mark.feature("attention_jvp")
def test_jvp_in_part(call, tokens, rng):
    """What has no tangent does not move; without `return_lse` there is `out` alone."""

    def function(query, key, value, d_key, d_bias, *, bias):
        moves = [(None, d_key, None), (None, None, None)]
        keywords = {"bias": bias} | CHUNKS
        return [
            attention_jvp((query, key, value), moves[0], **keywords),
            attention_jvp([query, key, value], list(moves[1]), d_bias=d_bias, **keywords),
        ]

    one = call(*tokens, bias=rng.standard_normal(N_K))
    moves = {name: one.tangents[name] for name in ("key", "bias")}
    results = one.run(function, *moves.values(), **one.kwargs)
    for (name, tangent), (out, d_out) in zip(moves.items(), results, strict=True):
        assert tuple(out.shape) == one.answer.out.shape
        one.compare_tangents([d_out], {name: tangent})


@pytest.mark.feature("derivatives through any score_mod")
def test_score_mod_without_derivative(lib, call, tokens):
    """A library that differentiates functions does so with a plain score_mod."""
    if not adapter_of(lib.asarray(tokens[0]), "query").autodiff:
        pytest.skip("refused, as test_errors sees")
    known = {"score_mod": MODIFIED}
    one = call(*tokens, score_mod=MODIFIED.function, known=known, **CHUNKS)
    one.vjp()
    one.jvp()


def check_adjoint(one):
    """Compare with the Jacobian, and the two modes with each other: ``<g, J x> = <Jᵀ g, x>``."""
    gradients, tangents = one.vjp(), one.jvp()
    pairs = [(one.tangents[name], *found, 1) for name, found in gradients.items()]
    pairs += [(bar, *found, -1) for bar, found in zip(one.bars, tangents, strict=True)]
    difference = bound = 0.0
    for direction, x, error, sign in pairs:
        direction, x = one.lib.numpy(direction), one.lib.numpy(x)
        difference += sign * np.sum(direction * x)
        bound += np.linalg.norm(direction) * error
    assert abs(difference) <= bound


@pytest.mark.feature("any mixture of these")
@settings(max_examples=6)
@given(drawn=calls())
def test_any_call(call, drawn):
    query, key, value, kwargs = drawn
    check_adjoint(call(query, key, value, **kwargs))


@pytest.mark.slow
@settings(settings.get_profile("long"))
@given(drawn=calls())
def test_any_call_at_length(call, drawn):
    query, key, value, kwargs = drawn
    check_adjoint(call(query, key, value, **kwargs))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of array-api-strict
@pytest.mark.parametrize("extreme", [np.nan, np.inf])
def test_gradients_of_out_that_are_not_finite(lib, extreme):
    """They reach all that the query sees, also where its result is 0, and no other."""
    query, key = (lib.asarray(np.ones((2, 9, 4))) for _ in range(2))
    value = lib.asarray(np.zeros((2, 9, 4)))
    d_out = np.ones((2, 9, 4))
    d_out[:, 5] = extreme
    _, vjp = attention_vjp(query, key, value, causal=True)
    found = {name: lib.numpy(x) for name, x in vjp(lib.asarray(d_out)).items()}
    assert not np.isfinite(found["value"][:, :6]).any()
    assert np.isfinite(found["value"][:, 6:]).all()


def test_functions_that_overwrite_the_scores(rng):
    """A score_mod may work in place, and its derivative too."""
    q, k, v = rng.standard_normal((3, 7, 4))

    def square(s, *place):
        return np.multiply(s, s, out=s)

    def slope(s, *place):
        s *= 2
        return s

    plain = ScoreMod(lambda s, *place: s * s, lambda s, *place: 2 * s)
    for keywords in ({}, {"softcap": 1.5}):
        found = []
        for mod in (plain, ScoreMod(square, slope)):
            out, vjp = attention_vjp(q, k, v, score_mod=mod, **keywords)
            moved = attention_jvp((q, k, v), (k, v, q), score_mod=mod, **keywords)[1]
            found.append([out, moved, *vjp(q).values()])
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_gradients_of_results_of_any_range(rng):
    """They are taken in the compute dtype, and raise nothing that users ask NumPy to raise."""
    x = rng.standard_normal((3, 5, 4)).astype(np.float16)
    with np.errstate(all="raise"):
        out, vjp = attention_vjp(*x, bias=np.zeros((5, 5), np.float32))
        found, expected = (vjp(factor * np.ones(out.shape, np.float32)) for factor in (1e6, 1e-2))
        tiny = vjp(np.full(out.shape, 1e-9, np.float32))
    np.testing.assert_allclose(found["bias"], 1e8 * expected["bias"], rtol=1e-3, atol=1e-1)
    np.testing.assert_allclose(tiny["bias"], 1e-7 * expected["bias"], rtol=1e-3, atol=1e-16)
