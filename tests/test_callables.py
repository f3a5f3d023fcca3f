"""`score_mod` and `mask_mod` as they are written for FlexAttention, against FlexAttention."""

from __future__ import annotations

import warnings

import libraries
import numpy as np
import pytest
from array_api_compat import array_namespace

from chunkattn import attention, attention_vjp
from chunkattn._adapters import adapter_of
from chunkattn.interop import flex_attention

COMPILED_QUICKLY = True

B, H, H_K, N, D = 2, 4, 2, 40, 8
SIDE = 8  # of the picture whose N pixels the neighbourhood is of


def tables(rng):
    """Return what the functions below capture."""
    return {
        "slopes": 2.0 ** -np.arange(1, H + 1),
        "table": rng.standard_normal(2 * N),
        "by_head": rng.standard_normal((H, 2 * N)),
        "lengths": np.asarray([33, 17]),
        "document": np.sort(rng.integers(0, 4, N)),
        "bias": rng.standard_normal((B, H, N, N)),
    }


# Each takes the tables and returns (score_mod, mask_mod), as written for FlexAttention.
CASES = {
    "causal": lambda t: (None, lambda b, h, q, k: q >= k),
    "sliding window": lambda t: (None, lambda b, h, q, k: (q >= k) & (q - k <= 7)),
    "prefix LM": lambda t: (None, lambda b, h, q, k: (k < 11) | (q >= k)),
    "padding": lambda t: (None, lambda b, h, q, k: k < t["lengths"][b]),
    "documents": lambda t: (
        None,
        lambda b, h, q, k: (t["document"][q] == t["document"][k]) & (q >= k),
    ),
    "dilated": lambda t: (None, lambda b, h, q, k: (q - k) % 3 == 0),
    "2-D neighbourhood": lambda t: (
        None,
        lambda b, h, q, k: (abs(q // SIDE - k // SIDE) <= 1) & (abs(q % SIDE - k % SIDE) <= 2),
    ),
    "global and local": lambda t: (None, lambda b, h, q, k: (k < 2) | (q < 2) | (abs(q - k) < 5)),
    "window by head": lambda t: (None, lambda b, h, q, k: abs(q - k) <= 3 * (h + 1)),
    "ALiBi": lambda t: (lambda s, b, h, q, k: s + t["slopes"][h] * t["real"](k - q), None),
    "relative table": lambda t: (lambda s, b, h, q, k: s + t["table"][q - k + N], None),
    "relative table by head": lambda t: (
        lambda s, b, h, q, k: s + t["by_head"][h, q - k + N],
        None,
    ),
    "softcap": lambda t: (lambda s, b, h, q, k: 3.0 * t["tanh"](s / 3.0), None),
    "bias by index": lambda t: (lambda s, b, h, q, k: s + t["bias"][b, h, q, k], None),
    "causal in the score": lambda t: (
        lambda s, b, h, q, k: t["where"](q >= k, s, -float("inf")),
        None,
    ),
    "squared, for even heads": lambda t: (
        lambda s, b, h, q, k: t["where"](h % 2 == 0, s * s, s),
        None,
    ),
    "ALiBi, causal": lambda t: (
        lambda s, b, h, q, k: s + t["slopes"][h] * t["real"](k - q),
        lambda b, h, q, k: q >= k,
    ),
}


def flex(tokens, make, known):
    """Return FlexAttention's own answer, eager and in float64."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention as peer

    own = {name: torch.asarray(x) for name, x in known.items()}
    score_mod, mask_mod = make(
        own | {"where": torch.where, "tanh": torch.tanh, "real": lambda x: x}
    )

    def both(s, b, h, q, k):
        s = s if score_mod is None else score_mod(s, b, h, q, k)
        return s if mask_mod is None else torch.where(mask_mod(b, h, q, k), s, -torch.inf)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that eager FlexAttention is meant for debugging
        out, lse = peer(*tokens, score_mod=both, enable_gqa=True, return_lse=True)
    return out.numpy(), lse.numpy()


@pytest.mark.feature("mask_mod and score_mod callables")
@pytest.mark.parametrize("case", CASES)
def test_against_flex_attention(lib, rng, case):
    import torch

    shapes = [(B, H, N, D), (B, H_K, N, D), (B, H_K, N, D)]
    tokens = [lib.asarray(rng.standard_normal(shape)) for shape in shapes]
    known = tables(rng)
    own = {name: lib.table(x) for name, x in known.items()}
    own |= {"where": lib.where, "tanh": lib.xp.tanh, "real": lib.real}
    score_mod, mask_mod = CASES[case](own)
    known = {name: x.astype(np.float32) if x.dtype.kind == "f" else x for name, x in known.items()}
    peer = [torch.asarray(lib.numpy(x)) for x in tokens]
    out, lse = flex(peer, CASES[case], known)

    def call(query, key, value, rows, cols):
        return attention(
            query, key, value, score_mod=score_mod, mask=mask_mod, return_lse=True,
            query_chunk_size=rows, key_chunk_size=cols,
        )  # fmt: skip

    for rows, cols in [(None, None), (16, 12), (7, 64)]:
        ours = lib.call(call, *tokens, rows=rows, cols=cols)
        near(lib, ours, (out, lse))
    drop_in = lib.call(
        flex_attention, *tokens, score_mod=score_mod, mask_mod=mask_mod, enable_gqa=True,
        return_lse=True,
    )  # fmt: skip
    near(lib, drop_in, (out, lse))


def near(lib, ours, peers):
    (out, lse), (peer_out, peer_lse) = ours, peers
    assert lib.is_own(out)
    assert out.dtype == lib.dtype(lib.default)
    np.testing.assert_allclose(
        lib.numpy(out), peer_out, rtol=0, atol=2e-5 + 4 * lib.eps(lib.default)
    )
    np.testing.assert_allclose(lib.numpy(lse), peer_lse, rtol=0, atol=1e-4)


@pytest.mark.feature("mask_mod and score_mod callables")
def test_arguments(lib, rng):
    """Callables get integer arrays that broadcast against the tile, with positions and offsets."""
    seen = []

    def score_mod(score, b, h, q_idx, kv_idx):
        for x in (b, h, q_idx, kv_idx):
            assert len(x.shape) == len(score.shape)
            assert all(n in (1, m) for n, m in zip(x.shape, score.shape, strict=True))
        seen.append(score.shape)
        return score + array_namespace(score).astype(b + h + q_idx + kv_idx, score.dtype) * 0.01

    q = lib.asarray(rng.standard_normal((2, 3, 4, 10, 4)))
    k = lib.asarray(rng.standard_normal((2, 3, 2, 11, 4)))
    out = attention(
        q,
        k,
        k,
        score_mod=score_mod,
        query_offset=100,
        key_offset=50,
        query_chunk_size=6,
        key_chunk_size=4,
    )
    b, h = np.arange(6).reshape(2, 3, 1, 1, 1), np.arange(4).reshape(4, 1, 1)
    q_idx, kv_idx = np.arange(100, 110)[:, None], np.arange(50, 61)
    bias = lib.asarray(0.01 * (b + h + q_idx + kv_idx), "float32")
    expected = attention(q, k, k, bias=bias)
    bound = 1e-5 if lib.name != "numpy-bfloat16" else 0.05
    np.testing.assert_allclose(lib.numpy(out), lib.numpy(expected), rtol=0, atol=bound)
    # The pair is what PyTorch and JAX look at to find the arrays that a function captures.
    sizes = {(6, 4), (6, 3), (4, 4), (4, 3)} | ({(1, 1)} if lib.differentiates else set())
    assert {tuple(shape[-2:]) for shape in seen} <= sizes


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_an_offset_that_is_an_array(lib, rng, lead):
    """The axes of the batch may be none, and so may those of an offset."""
    q = lib.asarray(rng.standard_normal((*lead, 9, 4)))
    offset = lib.asarray(np.asarray(2))
    for keywords in (
        {"score_mod": lambda s, b, h, i, j: array_namespace(s).where(i >= j, s, 2 * s)},
        {"mask": lambda b, h, i, j: i >= j},
    ):
        out, expected = (
            lib.numpy(attention(q, q, q, query_offset=first, **keywords)) for first in (offset, 2)
        )
        np.testing.assert_array_equal(out, expected)


@pytest.mark.feature("mask_mod and score_mod callables")
def test_order(check, rng):
    """Softcap comes before score_mod, and that before bias and mask."""
    q, k, v = (rng.standard_normal((2, 9, 4)) for _ in range(3))

    def call(query, key, value, **kwargs):
        return attention(query, key, value, score_mod=lambda s, b, h, i, j: s * s, **kwargs)

    check(
        3 * q,
        k,
        v,
        function=call,
        softcap=2.0,
        bias=rng.standard_normal((9, 9)),
        mask=rng.random((9, 9)) < 0.7,
        key_chunk_size=4,
        known={"score_mod": lambda s, b, h, i, j: s * s},
    )


def test_what_a_callable_returns_is_left_alone(lib, rng):
    """The scores are computed on in place, but not in an array that the caller keeps."""
    q = lib.asarray(rng.standard_normal((2, 8, 4)))
    own = lib.asarray(rng.standard_normal((2, 8, 8)), "float32")
    before = lib.numpy(own).copy()
    bias = lib.asarray(rng.standard_normal((8, 8)))
    attention(q, q, q, score_mod=lambda s, b, h, i, j: own, bias=bias)
    np.testing.assert_array_equal(lib.numpy(own), before)


def test_callables_are_called_once_per_tile(lib, rng):
    q = lib.asarray(rng.standard_normal((2, 40, 4)))
    calls = []

    def mask_mod(b, h, q_idx, kv_idx):
        calls.append(1)
        return q_idx >= kv_idx

    attention(q, q, q, mask=mask_mod, query_chunk_size=10, key_chunk_size=20)
    traced = lib.name.startswith("jax")
    first = 1 if lib.differentiates else 0  # to find what the function captures
    assert len(calls) <= 2 + first if traced else len(calls) == 8 + first


def test_an_exception_of_a_callable_arrives_as_it_is(lib, rng):
    q = lib.asarray(rng.standard_normal((2, 40, 4)))
    error = KeyError("mine")

    def raises(*args):
        raise error

    for kwargs in ({"mask": raises}, {"score_mod": raises}):
        with pytest.raises(KeyError) as caught:
            attention(q, q, q, query_chunk_size=8, **kwargs)
        assert caught.value is error


def test_a_score_mod_that_needs_not_all_axes(lib, rng):
    """FlexAttention's are called for one pair, and may replace the score by a number."""
    q, k, v = (lib.asarray(rng.standard_normal((2, n, 4))) for n in (6, 9, 9))
    xp = array_namespace(q)
    distance = np.arange(9.0)[None] - np.arange(6.0)[:, None]
    functions = {
        lambda s, b, h, i, j: xp.astype(j - i, s.dtype): distance,
        lambda s, *place: xp.ones_like(s[..., :1]): np.ones((6, 9)),
    }
    for function, bias in functions.items():
        found = attention(q, k, v, score_mod=function, query_chunk_size=4, key_chunk_size=4)
        expected = attention(q, k, v, scale=0.0, bias=lib.asarray(bias))
        bound = 1e-5 if lib.name != "numpy-bfloat16" else 0.05
        np.testing.assert_allclose(*map(lib.numpy, (found, expected)), rtol=0, atol=bound)


def test_refused(lib, rng):
    q = lib.asarray(rng.standard_normal((2, 8, 4)))
    with pytest.raises(TypeError, match="score_mod must be callable; got 3"):
        attention(q, q, q, score_mod=3)
    with pytest.raises(ValueError, match="score_mod must return an array of a shape"):
        attention(q, q, q, score_mod=lambda s, b, h, i, j: s[..., :3])
    with pytest.raises(ValueError, match="score_mod must return an array of a shape"):
        attention(q, q, q, score_mod=lambda s, b, h, i, j: 1.0)
    four = q[None, ...]
    with pytest.raises(ValueError, match="query must have four axes"):
        flex_attention(q, q, q)
    with pytest.raises(TypeError, match="query must be an array"):
        flex_attention([1.0], four, four)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        flex_attention(four, four[:, :1, ...], four[:, :1, ...])


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_scores_are_real(name, rng):
    """A cast would leave out the imaginary parts, and a mask."""
    q = libraries.library(name).asarray(rng.standard_normal((2, 8, 4)))
    with pytest.raises(TypeError, match="the result of score_mod must be of real numbers; got"):
        attention(q, q, q, score_mod=lambda s, b, h, i, j: s * 1j)
    if name == "numpy":
        longer = attention(q, q, q, score_mod=lambda s, b, h, i, j: s.astype(np.longdouble))
        np.testing.assert_array_equal(longer, attention(q, q, q, score_mod=lambda s, *_: s))
        with pytest.raises(TypeError, match="the result of score_mod is a numpy"):
            attention(q, q, q, score_mod=lambda s, b, h, i, j: np.ma.masked_array(s, s > 0))


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_derivatives_of_the_textbook(name, rng):
    """They are those of tiles, of other sizes than the whole that the function was tried on."""
    lib = libraries.library(name)
    q, k, v = (lib.asarray(rng.standard_normal((2, n, 8))) for n in (600, 700, 700))
    gradients = [
        attention_vjp(
            q, k, v, score_mod=lambda s, b, h, i, j: 2 * s, mask=lambda b, h, i, j: i >= j,
            query_offset=100, implementation=implementation,
        )[1](q)["key"]
        for implementation in ("standard", "chunked")
    ]  # fmt: skip
    np.testing.assert_allclose(*map(lib.numpy, gradients), atol=1e-5)


def test_traced_captures(rng):
    """Under jit and vmap, callables may capture traced arrays."""
    import jax
    import jax.numpy as jnp

    q, k, v = (jnp.asarray(rng.standard_normal((3, 2, 20, 4))) for _ in range(3))
    slopes = jnp.asarray(rng.standard_normal((3, 2)))
    lengths = jnp.asarray([20, 5, 11])

    def one(q, k, v, slopes, length):
        return attention(
            q, k, v, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i),
            mask=lambda b, h, i, j: j < length, key_chunk_size=8,
        )  # fmt: skip

    out = jax.jit(jax.vmap(one))(q, k, v, slopes, lengths)
    again = jnp.stack([one(*x) for x in zip(q, k, v, slopes, lengths, strict=True)])
    np.testing.assert_allclose(out, again, atol=1e-12)


def test_traced_captures_of_blocks(rng, monkeypatch):
    """Tiles may have some of the batch entries and heads, and other sizes in the backward pass."""
    import jax

    lib = libraries.library("jax")  # which has float64 enabled
    shapes = (2, 4, 20, 4), (2, 2, 20, 4), (2, 4)
    q, k, slopes = (lib.asarray(rng.standard_normal(shape), "float64") for shape in shapes)
    offsets = lib.asarray([3, 5])

    def loss(q, k, slopes, offsets):
        return attention(
            q, k, k, query_offset=offsets,
            score_mod=lambda s, b, h, i, j: s + slopes[b, h] * (j - i),
            mask=lambda b, h, i, j: (slopes[b, h] > 0) | (j <= i),
        ).sum()  # fmt: skip

    gradients = jax.value_and_grad(loss, (0, 1, 2))
    whole = gradients(q, k, slopes, offsets)
    adapter = type(adapter_of(q, "query"))
    sizes = adapter_of(q, "query").tile_sizes(q)._replace(elements=128, batch="even")
    monkeypatch.setattr("chunkattn._request_cache._KEPT", {})  # calls alike have other sizes there
    monkeypatch.setattr(
        adapter,
        "tile_sizes",
        lambda self, like, backward=False: sizes._replace(rows=16 if backward else 8, cols=8),
    )
    for found in gradients(q, k, slopes, offsets), jax.jit(gradients)(q, k, slopes, offsets):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-10)
