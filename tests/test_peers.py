"""The forward pass against what others wrote: PyTorch, FlexAttention, JAX and ONNX's reference.

A case is one request.  Each peer that can express it answers in its own words, on the CPU and in
the dtype at hand, and `attention` answers with the same call on NumPy, PyTorch and JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

import libraries
import numpy as np
import pytest
from conftest import chosen

from chunkattn import attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

OURS = ("numpy", "torch", "jax", *libraries.GPU)


def pytest_generate_tests(metafunc):
    names = [name for name in chosen(metafunc.config) if name in OURS]
    metafunc.parametrize("library", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def library(request):
    """A library to call `attention` with; JAX may compile quickly rather than well."""
    lib = libraries.library(request.param)
    with lib.active(), libraries.quick_compilation(lib):
        yield lib


@dataclass(frozen=True)
class Case:
    """One request: shapes and parameters as in `attention`, arrays by their shapes."""

    name: str
    n_q: int = 37
    n_k: int = 53
    heads: int = 4
    key_heads: int = 4
    d: int = 16
    d_v: int = 16
    batch: int = 2
    spread: float = 1.0  # of the query: large scores
    scale: float | None = None
    causal: bool = False
    offset: int | tuple[int, ...] = 0  # by batch entry where it is a tuple
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    infinite: bool = False  # -inf stands in the bias
    softcap: float | None = None
    layout: str = "hnd"
    chunks: tuple[int | None, int | None] = (None, 24)

    def __str__(self):
        return self.name

    @property
    def grouped(self):
        return self.heads != self.key_heads


CASES = [
    Case("square", n_q=53, chunks=(16, 8)),
    Case("more keys"),
    Case("fewer keys", n_q=53, n_k=37),
    Case("one query", n_q=1),
    Case("one key", n_k=1),
    Case("default chunks", batch=1, heads=1, key_heads=1, n_q=577, n_k=1031, chunks=(None, None)),
    Case("wide values", d_v=33),
    Case("grouped heads", heads=6, key_heads=2),
    Case("one key head", heads=6, key_heads=1),
    Case("layout nhd", heads=6, key_heads=2, layout="nhd"),
    Case("large scores", spread=30.0),
    Case("scale", scale=0.7),
    Case("scale 0", scale=0.0),
    Case("scale below 0", scale=-0.5),
    Case("causal", n_q=53, causal=True),
    Case("causal, top left", causal=True),
    Case("causal, top left, fewer keys", n_q=53, n_k=37, causal=True),
    Case("causal, bottom right", causal=True, offset=16),
    Case("causal, small chunks", causal=True, offset=16, chunks=(16, 8)),
    Case("causal, bottom right, fewer keys", n_q=53, n_k=37, causal=True, offset=-16),
    Case("causal, one query", n_q=1, causal=True, offset=52),
    Case("causal, offset by batch", causal=True, offset=(3, 16)),
    Case("mask", mask=(37, 53)),
    Case("mask of keys", mask=(2, 1, 1, 53)),
    Case("mask of all", mask=(2, 4, 37, 53)),
    Case("mask, causal", mask=(2, 1, 37, 53), causal=True, offset=16),
    Case("mask, grouped, nhd", mask=(2, 6, 37, 53), heads=6, key_heads=2, layout="nhd"),
    Case("bias", bias=(37, 53)),
    Case("bias as mask", bias=(2, 4, 37, 53), infinite=True),
    Case("bias, causal", bias=(4, 1, 53), causal=True, offset=16),
    Case("bias, mask", bias=(4, 37, 53), mask=(2, 1, 1, 53), scale=0.5),
    Case(
        "bias, mask, causal, grouped",
        heads=6,
        key_heads=2,
        bias=(6, 1, 53),
        mask=(2, 1, 37, 53),
        causal=True,
        offset=16,
    ),
    Case("softcap", softcap=2.0, spread=4.0),
    Case(
        "all at once",
        heads=6,
        key_heads=3,
        d_v=5,
        scale=0.4,
        causal=True,
        offset=16,
        mask=(2, 6, 37, 53),
        bias=(6, 37, 53),
        softcap=5.0,
        spread=3.0,
        chunks=(16, 8),
    ),
]


class Arrays:
    """A case's arrays in NumPy: floats in float64 that `dtype` can hold, tokens (b, h, n, d)."""

    def __init__(self, case, dtype):
        rng = np.random.default_rng(2112_05682)
        self.case, self.dtype = case, dtype
        self.query = self._round(
            case.spread * rng.standard_normal((case.batch, case.heads, case.n_q, case.d))
        )
        keys = (case.batch, case.key_heads, case.n_k)
        self.key = self._round(rng.standard_normal((*keys, case.d)))
        self.value = self._round(rng.standard_normal((*keys, case.d_v)))
        self.mask = self.bias = None
        if case.mask is not None:
            self.mask = rng.random(case.mask) < 0.6
            self.mask[..., case.mask[-2] // 2, :] &= case.mask[-2] == 1  # a query that sees nothing
        if case.bias is not None:
            self.bias = self._round(rng.standard_normal(case.bias))
            if case.infinite:
                self.bias[rng.random(case.bias) < 0.4] = -np.inf
                self.bias[..., 5, :] = -np.inf

    def _round(self, x):
        return x.astype(numpy_dtype(self.dtype)).astype(np.float64)

    @cached_property
    def shape(self):
        """The shape of the scores."""
        case = self.case
        return case.batch, case.heads, case.n_q, case.n_k

    @cached_property
    def allowed(self):
        """Which pairs mask and causality allow: (b, h, n_q, n_k)."""
        allowed = np.broadcast_to(True if self.mask is None else self.mask, self.shape)
        if self.case.causal:
            offset = np.reshape(self.case.offset, (-1, 1, 1, 1))
            allowed = allowed & (np.arange(self.case.n_k) <= self.positions + offset)
        return allowed

    @property
    def positions(self):
        return np.arange(self.case.n_q)[:, None]

    @cached_property
    def pairs(self):
        """Mask, causality and bias as others take them: None, allowed pairs, or what is added."""
        if self.bias is None:
            return None if self.mask is None and not self.case.causal else self.allowed
        return np.where(self.allowed, self.bias, -np.inf)

    @cached_property
    def seeing(self):
        """Which queries see a key: (b, h, n_q, 1)."""
        added = 0.0 if self.bias is None else self.bias
        return (self.allowed & (added > -np.inf)).any(axis=-1, keepdims=True)

    def bounds(self, dtype):
        """Return by how much two computations of out and of lse in `dtype` may differ.

        The one tolerance of this file.  A score of d products is off by a few eps of its size,
        its exponential by as much relatively, and a mean of values by as much of the largest.
        """
        key = np.repeat(self.key, self.case.heads // self.case.key_heads, axis=1)
        scale = self.case.d**-0.5 if self.case.scale is None else self.case.scale
        largest = np.abs(scale * self.query @ np.swapaxes(key, -1, -2)).max()
        relative = libraries.Library.eps(None, dtype) * (16 + 4 * largest)
        return relative * np.abs(self.value).max(), relative


def numpy_dtype(name):
    if name == "bfloat16":
        return pytest.importorskip("ml_dtypes").bfloat16
    return np.dtype(name)


@cache
def arrays_of(case, dtype):
    return Arrays(case, dtype)


def sdpa(x):
    """`torch.nn.functional.scaled_dot_product_attention`."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention.bias import causal_lower_right

    lib, case = libraries.library("torch"), x.case
    query, key, value = (lib.asarray(t, x.dtype) for t in (x.query, x.key, x.value))
    own = case.causal and x.mask is None and x.bias is None
    top_left = own and case.offset == 0
    if own and case.offset == case.n_k - case.n_q > 0:
        mask = causal_lower_right(case.n_q, case.n_k)
    elif top_left or x.pairs is None:
        mask = None
    else:
        mask = lib.asarray(x.pairs, x.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=top_left,
        scale=case.scale,
        enable_gqa=case.grouped,
    )
    return lib.numpy(out), None


def flex(x):
    """`torch.nn.attention.flex_attention.flex_attention`, not compiled."""
    module = pytest.importorskip("torch.nn.attention.flex_attention")
    lib, case = libraries.library("torch"), x.case
    query, key, value = (lib.asarray(t, x.dtype) for t in (x.query, x.key, x.value))
    bias = mask = None
    if x.bias is not None:
        bias = lib.asarray(np.broadcast_to(x.bias, x.shape), x.dtype)
    if x.mask is not None:
        mask = lib.asarray(np.broadcast_to(x.mask, x.shape))
    offset = lib.asarray(np.broadcast_to(case.offset, case.batch))

    def score_mod(score, b, h, q_idx, kv_idx):
        if case.softcap is not None:
            score = case.softcap * lib.xp.tanh(score / case.softcap)
        return score if bias is None else score + bias[b, h, q_idx, kv_idx]

    def mask_mod(b, h, q_idx, kv_idx):
        allowed = kv_idx <= q_idx + offset[b] if case.causal else kv_idx >= 0
        return allowed if mask is None else allowed & mask[b, h, q_idx, kv_idx]

    masked = case.causal or mask is not None
    block_mask = module.create_block_mask(mask_mod, *x.shape, device="cpu") if masked else None
    with lib.xp.compiler.set_stance("force_eager"):
        out, aux = module.flex_attention(
            query,
            key,
            value,
            score_mod=score_mod,
            block_mask=block_mask,
            scale=case.scale,
            enable_gqa=case.grouped,
            return_aux=module.AuxRequest(lse=True),
        )
    return lib.numpy(out), lib.numpy(aux.lse)  # the natural logarithm


def jax_nn(x):
    """`jax.nn.dot_product_attention`, whose queries that see nothing attend to everything."""
    jax = pytest.importorskip("jax")
    lib, case = libraries.library("jax"), x.case
    tokens = (lib.asarray(np.swapaxes(t, 1, 2), x.dtype) for t in (x.query, x.key, x.value))
    top_left = case.causal and case.offset == 0
    mask = x.mask if top_left else None if x.mask is None and not case.causal else x.allowed
    bias, mask = (
        None if t is None else lib.asarray(t[(None,) * (4 - t.ndim)], x.dtype)
        for t in (x.bias, mask)
    )
    function = partial(
        jax.nn.dot_product_attention, scale=case.scale, is_causal=top_left, return_residual=True
    )
    if x.dtype != "float16":  # which only works where it can try and fall back
        function = jax.jit(function)
    out, lse = function(*tokens, bias, mask)
    return np.swapaxes(lib.numpy(out), 1, 2), np.swapaxes(lib.numpy(lse), 1, 2)


def onnx_reference(x):
    """ONNX's operator `Attention` in its reference implementation.

    An offset is the length of its cache; by batch entry, it follows from the number of keys that
    are no padding.  In layout "nhd", the heads lie side by side in arrays of three axes.
    """
    case, dtype = x.case, numpy_dtype(x.dtype)
    feeds = {"Q": x.query, "K": x.key, "V": x.value}
    options = {"scale": case.scale, "softcap": case.softcap, "is_causal": int(case.causal)}
    opset = 23
    added = x.mask if x.bias is None else x.bias if x.mask is None else x.pairs
    if added is not None:
        feeds["attn_mask"] = np.broadcast_to(added, x.shape)
    if isinstance(case.offset, tuple):
        opset, feeds["nonpad_kv_seqlen"] = 24, np.asarray(case.offset) + case.n_q
    elif case.offset:
        for name in "KV":
            past = {"K": "past_key", "V": "past_value"}[name]
            feeds[past], feeds[name] = np.split(feeds[name], [case.offset], axis=2)
    if case.layout == "nhd":
        options |= {"q_num_heads": case.heads, "kv_num_heads": case.key_heads}
        for name in "QKV":
            flat = (case.batch, feeds[name].shape[2], -1)
            feeds[name] = np.swapaxes(feeds[name], 1, 2).reshape(flat)
    feeds = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in feeds.items()}
    out = _evaluate(feeds, {k: v for k, v in options.items() if v is not None}, opset)
    if case.layout == "nhd":
        out = np.swapaxes(out.reshape(case.batch, case.n_q, case.heads, -1), 1, 2)
    return out.astype(np.float64), None


def _evaluate(feeds, options, opset):
    """Run a model of one node."""
    helper = pytest.importorskip("onnx.helper")
    from onnx.reference import ReferenceEvaluator

    order = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
    inputs = [name if name in feeds else "" for name in order]
    outputs = ["Y", "present_key", "present_value"][: 3 if "past_key" in feeds else 1]
    node = helper.make_node("Attention", inputs, outputs, **options)
    kinds = {name: helper.np_dtype_to_tensor_dtype(t.dtype) for name, t in feeds.items()}
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [helper.make_tensor_value_info(name, kinds["Q"], None) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model).run(None, feeds)[0]


@dataclass(frozen=True)
class Peer:
    """Somebody else's attention, and what of a request it cannot say."""

    answer: Callable
    lacks: Callable = lambda case: False
    blind: bool = True  # it returns 0 for a query that sees nothing
    widest: str = "float64"  # what it computes float64 in

    def __str__(self):
        return self.answer.__name__


PEERS = [
    Peer(sdpa, lacks=lambda case: case.softcap is not None),
    Peer(flex),
    Peer(
        jax_nn,
        lacks=lambda case: case.softcap is not None or case.d_v != case.d,
        blind=False,
        widest="float32",
    ),
    Peer(
        onnx_reference,
        lacks=lambda case: (
            (case.scale is not None and case.scale < 0)
            or (isinstance(case.offset, int) and case.offset < 0)
        ),
        widest="float32",  # its scale
    ),
]


@cache
def theirs(peer, case, dtype):
    return peer.answer(arrays_of(case, dtype))


@pytest.fixture(scope="module")
def ours(library):
    """Call `attention` for a case; each call is made once."""

    @cache
    def answer(case, dtype):
        x = arrays_of(case, dtype)
        tokens = [x.query, x.key, x.value]
        if case.layout == "nhd":
            tokens = [np.swapaxes(t, 1, 2) for t in tokens]
        offset = case.offset
        out, lse = library.call(
            attention,
            *(library.asarray(t, dtype) for t in tokens),
            scale=case.scale,
            causal=case.causal,
            mask=None if x.mask is None else library.asarray(x.mask),
            bias=None if x.bias is None else library.asarray(x.bias, dtype),
            softcap=case.softcap,
            query_offset=library.asarray(np.asarray(offset))
            if isinstance(offset, tuple)
            else offset,
            layout=case.layout,
            query_chunk_size=case.chunks[0],
            key_chunk_size=case.chunks[1],
            implementation="chunked",
            return_lse=True,
        )
        out, lse = library.numpy(out), library.numpy(lse)
        return np.swapaxes(out, 1, 2) if case.layout == "nhd" else out, lse

    return answer


def compare(ours, peer, case, dtype):
    x = arrays_of(case, dtype)
    out_bound, lse_bound = x.bounds(peer.widest if dtype == "float64" else dtype)
    (out, lse), (peer_out, peer_lse) = ours(case, dtype), theirs(peer, case, dtype)
    compared = np.full_like(x.seeing, True) if peer.blind else x.seeing
    assert compared.any()
    assert out.shape == peer_out.shape
    np.testing.assert_allclose(
        np.where(compared, out, 0.0), np.where(compared, peer_out, 0.0), rtol=0, atol=out_bound
    )
    if peer_lse is not None:
        compared = compared[..., 0]
        np.testing.assert_allclose(
            np.where(compared, lse, 0.0), np.where(compared, peer_lse, 0.0), rtol=0, atol=lse_bound
        )


@pytest.mark.parametrize(
    ("peer", "case"),
    [(peer, case) for peer in PEERS for case in CASES if not peer.lacks(case)],
    ids=str,
)
def test_agreement(library, ours, peer, case):
    compare(ours, peer, case, library.default)


@pytest.mark.parametrize("peer", PEERS, ids=str)
def test_agreement_in_every_dtype(library, ours, peer):
    case = next(case for case in CASES if case.name == "bias, mask, causal, grouped")
    for dtype in library.dtypes:
        compare(ours, peer, case, dtype)


def test_multihead_attention_module(library, rng):
    torch = pytest.importorskip("torch")
    module = torch.nn.MultiheadAttention(24, 4, batch_first=True).eval()
    x = rng.standard_normal((2, 37, 24)).astype(np.float32)
    padding = np.arange(37) >= np.asarray([[37], [29]])
    future = np.triu(np.ones((37, 37), dtype=bool), 1)
    with torch.no_grad():
        tokens = torch.asarray(x)
        expected, _ = module(
            *(tokens,) * 3,
            key_padding_mask=torch.asarray(padding),
            attn_mask=torch.asarray(future),
            need_weights=False,
        )
    weights = {name: p.detach().numpy() for name, p in module.named_parameters()}
    projected = x @ weights["in_proj_weight"].T + weights["in_proj_bias"]
    q, k, v = (t.reshape(2, 37, 4, 6) for t in np.split(projected, 3, axis=-1))
    mixed = library.call(
        attention,
        *(library.asarray(t) for t in (q, k, v)),
        causal=True,
        mask=library.asarray(~padding[:, None, None, :]),
        layout="nhd",
        key_chunk_size=8,
    )
    mixed = library.numpy(mixed).reshape(2, 37, 24)
    out = mixed @ weights["out_proj.weight"].T + weights["out_proj.bias"]
    bound = 64 * max(library.eps(library.default), library.eps("float32")) * np.abs(projected).max()
    np.testing.assert_allclose(out, expected.numpy(), rtol=0, atol=bound)
