"""`scaled_dot_product_attention` against PyTorch's, which answers on the CPU and in float64."""

from __future__ import annotations

import libraries
import numpy as np
import pytest
from drop_ins import allowed, arguments, floats, gradients, near, peer, refused, rounded, tokens_of

from chunkattn.interop import scaled_dot_product_attention

SDPA = pytest.mark.feature("drop-in: scaled_dot_product_attention")

Q, K = (2, 4, 6, 8), (2, 4, 9, 8)  # (batch, heads, n, d)
GQA = (2, 2, 9, 8)

SDPA_CASES = {
    "plain": ([Q, K, K], {}),
    "without heads": ([(6, 8), (9, 8), (9, 8)], {"attn_mask": allowed(6, 9)}),
    "three axes": ([Q[1:], K[1:], K[1:]], {"is_causal": True}),
    "five axes, batch broadcasts": (
        [(2, 1, 4, 6, 8), (1, 3, 4, 9, 8), (3, 4, 9, 8)],
        {"attn_mask": allowed(2, 1, 1, 6, 9)},
    ),
    "one key head": ([Q, (2, 1, 9, 8), (2, 1, 9, 8)], {}),
    "one query head": ([(2, 1, 6, 8), K, K], {"attn_mask": floats(4, 6, 9)}),
    "key and value differ in heads": ([Q, K, (2, 1, 9, 5)], {"attn_mask": allowed(4, 6, 9)}),
    "key without heads": ([Q, (9, 8), (4, 9, 8)], {"is_causal": True}),
    "GQA": ([Q, GQA, GQA], {"enable_gqa": True, "attn_mask": allowed(2, 4, 6, 9)}),
    "GQA, causal": ([Q, GQA, GQA], {"enable_gqa": True, "is_causal": True, "scale": 0.3}),
    "more queries, causal": ([K, Q, Q], {"is_causal": True}),
    "float mask": ([Q, K, K], {"attn_mask": floats(2, 1, 6, 9), "scale": -0.5}),
    "float mask of -inf": ([Q, K, K], {"attn_mask": np.where(allowed(2, 1, 6, 9), 0.5, -np.inf)}),
    "scale 0": ([Q, K, K], {"scale": 0.0}),
    "no keys": ([Q, (2, 4, 0, 8), (2, 4, 0, 8)], {}),
    "no query heads": ([(2, 0, 6, 8), (2, 1, 9, 8), (2, 1, 9, 8)], {}),
}


def sdpa(tokens, keywords):
    """PyTorch's own answer, in float64."""
    lib = libraries.library("torch")
    tokens = (lib.asarray(x, "float64") for x in tokens)
    return lib.numpy(peer("torch")(*tokens, **arguments(lib, keywords, "float64")))


def compare(lib, shapes, keywords, dtype=None):
    """Compare the drop-in with PyTorch."""
    tokens = tokens_of(shapes, lib, dtype)
    error = 1e-12 if dtype == "float64" else 5e-6
    own = arguments(lib, keywords, dtype)
    ours = lib.call(scaled_dot_product_attention, *(lib.asarray(x, dtype) for x in tokens), **own)
    near(lib, ours, sdpa(tokens, rounded(lib, keywords, dtype)), dtype, error)


@SDPA
@pytest.mark.parametrize("case", SDPA_CASES)
def test_pytorch(lib, case):
    compare(lib, *SDPA_CASES[case])


@SDPA
def test_pytorch_dtypes(lib):
    """The result has the dtype of the inputs, whichever it is."""
    for dtype in set(lib.dtypes) - {lib.default, "float64"}:
        compare(lib, [Q, K, K], {"is_causal": True}, dtype)


def test_pytorch_by_position():
    """The arguments stand in PyTorch's order."""
    lib = libraries.library("torch")
    tokens = tokens_of([Q, K, K], lib)
    ours = scaled_dot_product_attention(*map(lib.asarray, tokens), None, 0.0, True, 0.25, False)
    near(lib, ours, sdpa(tokens, {"is_causal": True, "scale": 0.25}))


LEADS = [
    ((), (), ()),
    ((4,), (4,), (4,)),
    ((4,), (1,), (1,)),
    ((1,), (4,), (4,)),
    ((4,), (), ()),
    ((), (4,), (1,)),
    ((2, 4), (2, 4), (2, 4)),
    ((2, 4), (2, 1), (2, 1)),
    ((2, 4), (1, 4), (2, 1)),
    ((2, 1), (2, 4), (1, 1)),
    ((2, 4), (4,), ()),
    ((1, 4), (2, 4), (2, 4)),
    ((2, 1, 4), (1, 3, 4), (2, 3, 1)),
    ((3, 1, 1), (4,), (2, 1)),
]
GROUPS = [
    ((4,), (2,), (2,)),
    ((2, 4), (2, 2), (2, 2)),
    ((2, 4), (2, 1), (2, 1)),
    ((2, 4), (2, 4), (2, 4)),
    ((1, 6), (2, 3), (2, 3)),
    ((2, 4), (2,), (2,)),
    ((2, 1, 4), (1, 3, 2), (3, 2)),
]


def masks_of(lead, n_q, n_k):
    """Return masks of every kind and broadcast shape, and None."""
    shapes = [(n_q, n_k), (1, n_k), (n_q, 1), (1, 1)]
    for cut in range(len(lead)):
        shapes += [(*lead[cut:], n_q, n_k), (*lead[cut:-1], 1, 1, n_k)]
    yield None
    for shape in shapes:
        yield allowed(*shape)
        yield floats(*shape)
        yield np.where(allowed(*shape), floats(*shape), -np.inf)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("lead", "grouped"), [(x, False) for x in LEADS] + [(x, True) for x in GROUPS]
)
def test_grid_of_pytorch(name, lead, grouped):
    """Every mask with every way to broadcast, and is_causal."""
    lib = libraries.library(name)
    scores = np.broadcast_shapes(*(x[:-1] if grouped else x for x in lead[:2]))
    scores += lead[0][-1:] if grouped else ()
    for n_q, n_k, d_v in [(5, 7, 3), (7, 5, 4), (1, 7, 4)]:
        shapes = [(*lead[0], n_q, 4), (*lead[1], n_k, 4), (*lead[2], n_k, d_v)]
        cases = [{"is_causal": True}]
        cases += [{"attn_mask": mask, "scale": 0.7} for mask in masks_of(scores, n_q, n_k)]
        for keywords in cases:
            compare(lib, shapes, keywords | {"enable_gqa": grouped}, "float64")


@SDPA
def test_pytorch_gradients(lib):
    """Where the library differentiates: as PyTorch, by a float mask too."""
    if not lib.differentiates:
        return
    cases = [
        ([Q, GQA, GQA], {"enable_gqa": True, "attn_mask": floats(4, 1, 9)}),
        ([(2, 1, 6, 8), K, K], {"attn_mask": np.where(allowed(6, 9), 0.5, -np.inf)}),
    ]
    for shapes, keywords in cases if lib.eager else cases[:1]:
        arrays = [floats(*shape, seed=i) for i, shape in enumerate(shapes)]
        arrays.append(keywords["attn_mask"])
        gqa = {"enable_gqa": keywords.get("enable_gqa", False)}
        grads = gradients(lib, scaled_dot_product_attention, arrays, gqa)
        theirs = gradients(libraries.library("torch"), peer("torch"), arrays, gqa)
        for ours, other in zip(grads, theirs, strict=True):
            np.testing.assert_allclose(ours, other, rtol=0, atol=1e-11)


@SDPA
def test_dropout(lib):
    """PyTorch's generator decides on PyTorch; elsewhere a seed has to be given to `attention`."""
    q, k = (lib.asarray(floats(*shape)) for shape in (Q, K))
    if not lib.name.startswith("torch"):
        with pytest.raises(ValueError, match=r"dropout_p must be 0 .*attention\(dropout="):
            scaled_dot_product_attention(q, k, k, dropout_p=0.5)
        return
    torch = lib.xp

    def call(rate=0.25, value=k):
        return scaled_dot_product_attention(q, k, value, dropout_p=rate)

    torch.manual_seed(7)
    first, second = call(), call()
    torch.manual_seed(7)
    assert torch.equal(call(), first)
    assert not torch.equal(second, first)
    state = torch.get_rng_state()
    assert torch.equal(call(0.0), call(0))
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    eye = torch.eye(9, device=lib.device).expand(2, 4, 9, 9)  # the weights themselves
    ratio = call(0.25, eye) / call(0.0, eye)
    kept = ratio > 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75))
    assert 0.6 < kept.float().mean() < 0.9


def test_dropout_is_recomputed_alike():
    """A checkpoint restores the generator, so that the same weights are dropped again."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def loss(q):
        return scaled_dot_product_attention(q, q, q, dropout_p=0.5).sin().sum()

    x = torch.asarray(floats(*Q))
    grads = []
    for call in (loss, lambda q: checkpoint(loss, q, use_reentrant=False)):
        torch.manual_seed(3)
        q = x.clone().requires_grad_()
        call(q).backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


SDPA_REFUSED = {
    "one axis": ([(8,), K, K], {}, ValueError, "query must have two axes or more"),
    "heads": ([Q, GQA, GQA], {}, ValueError, "enable_gqa=True"),
    "heads that do not divide": (
        [Q, (2, 3, 9, 8), (2, 3, 9, 8)],
        {"enable_gqa": True},
        ValueError,
        "must be a multiple",
    ),
    "fewer query heads": ([GQA, Q, Q], {"enable_gqa": True}, ValueError, "must be a multiple"),
    "batch": ([Q, (3, 4, 9, 8), (3, 4, 9, 8)], {}, ValueError, "must broadcast"),
    "width": ([Q, (2, 4, 9, 7), K], {}, ValueError, "same width"),
    "mask and is_causal": (
        [Q[2:], K[2:], K[2:]],
        {"attn_mask": allowed(6, 9), "is_causal": True},
        ValueError,
        "attn_mask must be None where is_causal",
    ),
    "integer mask": (
        [Q, K, K],
        {"attn_mask": np.ones((6, 9), np.int32)},
        TypeError,
        "attn_mask must be boolean .* or floating",
    ),
    "size of the mask": (
        [Q, K, K],
        {"attn_mask": allowed(6, 8)},
        ValueError,
        "attn_mask must broadcast to",
    ),
    "axes of the mask": (
        [Q, K, K],
        {"attn_mask": allowed(1, 2, 4, 6, 9)},
        ValueError,
        "attn_mask must broadcast to",
    ),
    "batch of the mask": (
        [(1, 4, 6, 8), K[1:], K[1:]],
        {"attn_mask": floats(2, 1, 6, 9)},
        ValueError,
        "attn_mask must broadcast to",
    ),
    "is_causal": ([Q, K, K], {"is_causal": 1}, TypeError, "is_causal must be True or False"),
    "dropout": ([Q, K, K], {"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\)"),
    "dropout of another kind": ([Q, K, K], {"dropout_p": "a"}, TypeError, "dropout_p must be a nu"),
    "scale": ([Q, K, K], {"scale": "a"}, TypeError, "scale must be a number"),
}


@SDPA
@pytest.mark.parametrize("case", SDPA_REFUSED)
def test_pytorch_refuses_too(lib, case):
    shapes, keywords, error, message = SDPA_REFUSED[case]
    with pytest.raises(error, match=message):
        refused(lib, scaled_dot_product_attention, shapes, keywords)
    torch = libraries.library("torch")
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        refused(torch, peer("torch"), shapes, keywords)
