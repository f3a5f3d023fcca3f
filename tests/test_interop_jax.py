"""`dot_product_attention` against JAX's, which answers on the CPU and in float32."""

from __future__ import annotations

from inspect import signature
from itertools import product

import libraries
import numpy as np
import pytest
from drop_ins import allowed, arguments, floats, gradients, near, peer, refused, rounded, tokens_of

from chunkattn import attention
from chunkattn.interop import dot_product_attention, scaled_dot_product_attention

DPA = pytest.mark.feature("drop-in: dot_product_attention")

T, S = (2, 6, 4, 8), (2, 9, 4, 8)  # (B, T, N, H), (B, S, K, H)
GROUPED = (2, 9, 2, 8)

MASK = allowed(2, 1, 6, 9)
DPA_CASES = {
    "plain": ([T, S, S], {}),
    "grouped heads, bias, mask": (
        [T, GROUPED, GROUPED],
        {"bias": floats(1, 4, 6, 9), "mask": MASK, "scale": 0.3},
    ),
    "three axes, one key head": (
        [T[1:], (9, 1, 8), (9, 1, 8)],
        {"mask": allowed(4, 6, 9), "is_causal": True},
    ),
    "causal": ([T, S, S], {"is_causal": True, "bias": floats(9)}),
    "more queries, causal": ([S, T, T], {"is_causal": True}),
    "lengths": (
        [T, S, S],
        {"query_seq_lengths": np.int32([6, 4]), "key_value_seq_lengths": np.int32([7, 2])},
    ),
    "window": ([T, S, S], {"local_window_size": 1}),
    "a window of everything": ([T, S, S], {"local_window_size": (2**31 - 1, 0)}),
    "window, lengths, causal": (
        [T, GROUPED, GROUPED],
        {
            "local_window_size": (2, 1),
            "key_value_seq_lengths": np.int32([9, 4]),
            "is_causal": True,
            "implementation": "xla",
        },
    ),
}


def dpa(tokens, keywords):
    """JAX's own answer, in float32: the result and the residual."""
    lib = libraries.library("jax")
    tokens = (lib.asarray(x) for x in tokens)
    out, residual = peer("jax")(*tokens, **arguments(lib, keywords), return_residual=True)
    return lib.numpy(out), lib.numpy(residual)


def queries_that_see(shapes, keywords):
    """Return which queries see a key, (B, T, N) or (T, N), by the documentation of JAX."""
    (n_q, heads, _), n_k = shapes[0][-3:], shapes[1][-3]
    i, j = np.arange(n_q)[:, None], np.arange(n_k)
    batch = shapes[0][0] if len(shapes[0]) == 4 else 1
    seen = np.broadcast_to(keywords.get("mask", True), (batch, heads, n_q, n_k))
    if keywords.get("is_causal"):
        seen = seen & (j <= i)
    window = keywords.get("local_window_size")
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        seen = seen & (i - left <= j) & (j <= i + right)
    for name, places in (("query_seq_lengths", i), ("key_value_seq_lengths", j)):
        if name in keywords:
            seen = seen & (places < keywords[name][:, None, None, None])
    return np.swapaxes(seen.any(axis=-1), -1, -2).reshape(shapes[0][:-1])


def agree(lib, ours, theirs, seen, dtype=None):
    """Compare with JAX where a query sees a key, and with the contract elsewhere."""
    (out, residual), (their_out, their_residual) = ours, theirs
    near(lib, out, np.where(seen[..., None], their_out, 0), dtype)
    near(lib, residual, np.where(seen, their_residual, -np.inf), dtype)


def drop_in(lib, tokens, keywords, dtype=None):
    tokens = (lib.asarray(x, dtype) for x in tokens)
    own = arguments(lib, keywords, dtype)
    return lib.call(dot_product_attention, *tokens, **own, return_residual=True)


@DPA
@pytest.mark.parametrize("case", DPA_CASES)
def test_jax(lib, case):
    shapes, keywords = DPA_CASES[case]
    tokens = tokens_of(shapes, lib)
    theirs = dpa(tokens, rounded(lib, keywords))
    agree(lib, drop_in(lib, tokens, keywords), theirs, queries_that_see(shapes, keywords))


@DPA
def test_jax_dtypes(lib):
    """The residual has the dtype of the inputs, as the result has."""
    for dtype in {"float16", "float64"} & set(lib.dtypes):
        tokens = tokens_of([T, S, S], lib, dtype)
        ours = drop_in(lib, tokens, {}, dtype)
        agree(lib, ours, dpa(tokens, {}), np.ones(T[:-1], bool), dtype)


@pytest.mark.parametrize(
    ("batch", "key_heads", "n_q", "n_k"), [((2,), 2, 6, 9), ((2,), 1, 9, 6), ((), 4, 6, 9)]
)
def test_grid_of_jax(batch, key_heads, n_q, n_k):
    """Masks, biases, lengths, windows and is_causal in mixtures, for NumPy and PyTorch."""
    shapes = [(*batch, n_q, 4, 8), (*batch, n_k, key_heads, 8), (*batch, n_k, key_heads, 8)]
    lengths = [np.int32([5, 3]), np.int32([4, 6])]
    if not batch:
        lengths = [x[:1] for x in lengths]
    pairs = [(n_q, n_k), (1, 4, n_q, n_k), (*batch, 1, 1, n_k), (4, 1, n_k), (1, 1, n_q, 1)]
    options = [
        [{}, {"is_causal": True}],
        [{}, {"local_window_size": 2}, {"local_window_size": (1, 0)}],
        [{}, {"query_seq_lengths": lengths[0]}],
        [{}, {"key_value_seq_lengths": lengths[1]}],
    ]
    mixtures = [a | b | c | d for a, b, c, d in product(*options)]
    extras = [{"bias": floats(*p)} for p in pairs] + [{"mask": allowed(*p)} for p in pairs]
    own = [libraries.library(name) for name in ("numpy", "torch")]
    for i, extra in enumerate([{}, *extras]):
        for keywords in mixtures[i % 5 :: 5] if i else mixtures:
            keywords = keywords | extra
            tokens = tokens_of(shapes, own[0])
            theirs, seen = dpa(tokens, keywords), queries_that_see(shapes, keywords)
            for lib in own:
                agree(lib, drop_in(lib, tokens, keywords), theirs, seen)


@DPA
def test_jax_gradients(lib):
    """Where the library differentiates: as JAX, by a bias too."""
    if not lib.differentiates:
        return
    keywords = {"is_causal": True, "local_window_size": (3, 0)}
    arrays = [floats(*s, seed=i) for i, s in enumerate([T, GROUPED, GROUPED])]
    arrays.append(floats(1, 4, 1, 9))
    ours = gradients(lib, dot_product_attention, arrays, keywords, "float32")
    theirs = gradients(libraries.library("jax"), peer("jax"), arrays, keywords, "float32")
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@DPA
def test_jax_implementations(lib):
    """JAX's names, and those of `attention`."""
    q, k = (lib.asarray(floats(*shape)) for shape in (T, S))
    bound = 2e-6 + 2 * lib.eps(lib.default)
    expected = attention(q, k, k, layout="nhd", implementation="standard")
    for name in ("xla", "standard"):
        out = dot_product_attention(q, k, k, implementation=name)
        np.testing.assert_allclose(lib.numpy(out), lib.numpy(expected), rtol=bound, atol=bound)


def test_jax_signature():
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in signature(f).parameters.values()]
        for f in (dot_product_attention, peer("jax"))
    )
    assert ours == theirs


DPA_REFUSED = {
    "five axes": ([(1, *T), S, S], {}, ValueError, "must have the axes"),
    "batch": ([T, (3, 9, 4, 8), (3, 9, 4, 8)], {}, ValueError, "one batch size"),
    "batch of one": ([T, (1, 9, 4, 8), (1, 9, 4, 8)], {}, ValueError, "one batch size"),
    "heads": ([T, (2, 9, 3, 8), (2, 9, 3, 8)], {}, ValueError, "must be a multiple"),
    "width": ([T, (2, 9, 4, 7), S], {}, ValueError, "same width"),
    "length": ([T, S, (2, 8, 4, 8)], {}, ValueError, "same length"),
    "float mask": ([T, S, S], {"mask": floats(6, 9)}, TypeError, "mask must be a boolean array"),
    "five axes of bias": (
        [T, S, S],
        {"bias": floats(1, 2, 4, 6, 9)},
        ValueError,
        "bias must broadcast",
    ),
    "size of the mask": ([T, S, S], {"mask": allowed(6, 8)}, ValueError, "mask must broadcast"),
    "lengths of all": (
        [T, S, S],
        {"query_seq_lengths": np.int32([3])},
        ValueError,
        "query_seq_lengths must have shape",
    ),
    "lengths by position": (
        [T, S, S],
        {"key_value_seq_lengths": np.ones((2, 9), np.int32)},
        ValueError,
        "key_value_seq_lengths must have shape|key_value_seq_lengths must broadcast",
    ),
    "float lengths": (
        [T, S, S],
        {"query_seq_lengths": np.asarray([3.0, 4.0])},
        TypeError,
        "query_seq_lengths must be an integer array",
    ),
    "window of three": (
        [T, S, S],
        {"local_window_size": (1, 2, 3)},
        TypeError,
        "local_window_size must be an int or two",
    ),
    "implementation": (
        [T, S, S],
        {"implementation": "flash"},
        ValueError,
        "implementation must be one of 'xla', 'cudnn', 'auto'",
    ),
    "is_causal": ([T, S, S], {"is_causal": "a"}, TypeError, "is_causal must be True or False"),
    "window below 0": (
        [T, S, S],
        {"local_window_size": (1, -1)},
        ValueError,
        "local_window_size must not be negative",
    ),
    "cudnn": (
        [T, S, (2, 9, 4, 5)],
        {"implementation": "cudnn"},
        NotImplementedError,
        "native",
    ),
}
OURS_ALONE = ("is_causal", "window below 0")


@DPA
@pytest.mark.parametrize("case", DPA_REFUSED)
def test_jax_refuses_too(lib, case):
    shapes, keywords, error, message = DPA_REFUSED[case]
    with pytest.raises(error, match=message):
        refused(lib, dot_product_attention, shapes, keywords)
    if case not in OURS_ALONE:
        with pytest.raises((ValueError, TypeError, AssertionError, RuntimeError)):
            refused(libraries.library("jax"), peer("jax"), shapes, keywords)


def test_two_libraries():
    import torch

    q = torch.zeros(T)
    for function, name in [
        (scaled_dot_product_attention, "attn_mask"),
        (dot_product_attention, "bias"),
        (dot_product_attention, "mask"),
        (dot_product_attention, "query_seq_lengths"),
        (dot_product_attention, "key_value_seq_lengths"),
    ]:
        with pytest.raises(TypeError, match=f"query is a torch array and {name} is a numpy array"):
            function(q, q, q, **{name: np.ones(1)})
