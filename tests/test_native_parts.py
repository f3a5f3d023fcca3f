"""PyTorch's kernel for CPUs with masks and a bias, which are added to the scores part by part."""

from __future__ import annotations

import gc
import logging
import weakref
from functools import partial

import libraries
import memory
import numpy as np
import pytest

from chunkattn import _partition, _parts, attention, plan
from chunkattn._request_cache import _KEPT
from chunkattn.cli import _memory
from chunkattn.masks import Lengths, Segments, Window

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

native = partial(attention, implementation="native")
chunked = partial(attention, implementation="chunked")
tensor = torch.as_tensor


@pytest.fixture
def lib():
    return libraries.library("torch")


@pytest.fixture(params=["as they are", "small"])
def sizes(request, monkeypatch):
    """Parts as they are, and small ones: several blocks, parts of each, a shorter last one."""
    if request.param == "small":
        monkeypatch.setattr(_partition, "ROWS", 7)
        monkeypatch.setattr(_partition, "FEW", 0)
        monkeypatch.setattr(_partition, "BYTES", 8 * 72 * 8 * 3)
    _KEPT.clear()  # what it has was cut otherwise
    yield
    _KEPT.clear()


def random(rng, *shape):
    return torch.from_numpy(rng.standard_normal(shape))


def some(rng, *shape):
    return torch.from_numpy(rng.random(shape) < 0.5)


# By name: shapes as (batch, (query heads, key heads), n_q, n_k), and the keywords.
CASES = {
    "array": (((2,), (4, 4), 64, 64), lambda rng: {"mask": some(rng, 64, 64)}),
    "array by head": (((2,), (4, 2), 40, 72), lambda rng: {"mask": some(rng, 2, 4, 40, 72)}),
    "array by batch": (((3,), (4, 2), 40, 72), lambda rng: {"mask": some(rng, 3, 1, 40, 72)}),
    "keys": (((2,), (4, 2), 40, 72), lambda rng: {"mask": some(rng, 2, 1, 1, 72)}),
    "queries": (((2,), (4, 2), 40, 72), lambda rng: {"mask": some(rng, 40, 1)}),
    "nothing seen": (((2,), (4, 2), 40, 72), lambda rng: {"mask": tensor([[False]])}),
    "everything seen": (((2,), (4, 4), 64, 64), lambda rng: {"mask": Window(None, None)}),
    "two masks": (
        ((2,), (4, 4), 64, 64),
        lambda rng: {"mask": (some(rng, 64, 64), Lengths(key=tensor([50, 3]))), "causal": True},
    ),
    "causal, later": (((), (4, 2), 40, 72), lambda rng: {"causal": True, "query_offset": 30}),
    "causal, by entry": (
        ((2,), (4, 2), 40, 72),
        lambda rng: {"causal": True, "query_offset": tensor([-5, 30]), "key_offset": 2},
    ),
    "window": (((2,), (4, 4), 64, 64), lambda rng: {"mask": Window(9, 3)}),
    "lengths": (
        ((3,), (4, 4), 64, 64),
        lambda rng: {"mask": Lengths(tensor([64, 40, 0]), tensor([20, 64, 1]))},
    ),
    "segments": (((), (4, 4), 64, 64), lambda rng: {"mask": Segments(torch.arange(64) // 9)}),
    "bias": (((2,), (4, 4), 64, 64), lambda rng: {"bias": random(rng, 64, 64)}),
    "bias by head": (((2,), (4, 2), 40, 72), lambda rng: {"bias": random(rng, 4, 40, 72)}),
    "bias by key": (((2,), (4, 2), 40, 72), lambda rng: {"bias": random(rng, 72)}),
    "bias and mask": (
        ((2,), (4, 4), 64, 64),
        lambda rng: {"bias": random(rng, 64, 64), "causal": True},
    ),
    "bias of -inf": (
        ((2,), (4, 4), 64, 64),
        lambda rng: {"bias": torch.where(some(rng, 64, 1) & some(rng, 64), 0.0, -torch.inf)},
    ),
    "one query": (((2,), (6, 2), 1, 72), lambda rng: {"mask": some(rng, 2, 1, 1, 72)}),
    "one query, by head": (((2,), (6, 2), 1, 72), lambda rng: {"mask": some(rng, 6, 1, 72)}),
    "few queries": (((2,), (6, 2), 3, 72), lambda rng: {"mask": some(rng, 2, 1, 3, 72)}),
    "few queries, by head": (((2,), (6, 2), 3, 72), lambda rng: {"mask": some(rng, 6, 3, 72)}),
    "few queries, keys by head": (((2,), (6, 2), 3, 72), lambda rng: {"mask": some(rng, 6, 1, 72)}),
    "few queries, keys": (((2,), (6, 2), 3, 72), lambda rng: {"bias": random(rng, 2, 1, 1, 72)}),
    "few queries, window": (
        ((2,), (6, 2), 3, 72),
        lambda rng: {"mask": Window(30, 9), "query_offset": 40},
    ),
    "one query, a bias": (((2,), (6, 2), 1, 72), lambda rng: {"bias": random(rng, 6, 1, 72)}),
    "two batch axes": (
        ((2, 3), (4, 2), 40, 72),
        lambda rng: {"mask": some(rng, 3, 1, 40, 72), "bias": random(rng, 2, 1, 4, 1, 72)},
    ),
    "layout": (
        ((2,), (4, 2), 40, 72),
        lambda rng: {"mask": some(rng, 40, 72), "layout": "nhd"},
    ),
    "no heads": (((), None, 40, 72), lambda rng: {"mask": some(rng, 40, 72)}),
}


def tokens(rng, shapes, dtype, layout="hnd", d=16):
    batch, heads, n_q, n_k = shapes
    found = []
    for which, n in ((0, n_q), (1, n_k), (1, n_k)):
        shape = (n, d) if heads is None else (*batch, heads[which], n, d)
        x = random(rng, *shape).to(dtype)
        found.append(x.transpose(-3, -2).contiguous() if layout == "nhd" else x)
    return found


def close(found, expected, dtype):
    """Compare to within some roundings of a dtype, by the largest number; -inf is itself."""
    assert found.dtype == expected.dtype
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    found, expected = (torch.where(x == -torch.inf, 0, x.double()) for x in (found, expected))
    bound = 16 * torch.finfo(dtype).eps * max(1, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("sizes")
def test_values_and_gradients(rng, case, dtype):
    shapes, keywords = CASES[case]
    given = keywords(rng)
    arrays = [x.requires_grad_() for x in tokens(rng, shapes, dtype, given.get("layout", "hnd"))]
    if "bias" in given:
        given["bias"] = given["bias"].to(dtype)
    results = []
    for way in (native, chunked):
        out, lse = way(*arrays, **given, return_lse=True)
        alone = way(*arrays, **given)
        assert torch.equal(out, alone)
        d_out = torch.ones_like(out) + torch.arange(16) / 16
        gradients = torch.autograd.grad(alone, arrays, d_out.to(dtype))
        with_lse = torch.autograd.grad((out, lse), arrays, (d_out.to(dtype), lse.exp().detach()))
        results.append((out, lse, *gradients, *with_lse))
    for found, expected in zip(*results, strict=True):
        close(found.detach(), expected.detach(), dtype)


@pytest.mark.parametrize("extreme", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["key", "value", "bias"])
def test_nan_behind_a_mask(rng, extreme, name):
    """The kernel multiplies it by 0; then the tiles take over, in the gradients too."""
    arrays = tokens(rng, ((2,), (4, 4), 64, 64), torch.float32)
    mask, bias = torch.ones(64, 64, dtype=torch.bool), torch.zeros(64, 64)
    mask[:40, 40] = False
    if name == "bias":
        bias[:40, 40] = extreme
    else:
        arrays[1 + (name == "value")][..., 40, :] = extreme
    d_out = (torch.arange(64) < 40).float()[:, None] * torch.ones(2, 4, 64, 16)
    results = []
    for way in (native, chunked):
        leaves = [x.clone().requires_grad_() for x in arrays]
        out, lse = way(*leaves, mask=mask, bias=bias, return_lse=True)
        alone = way(*leaves, mask=mask, bias=bias)
        results.append((out, lse, alone, torch.autograd.grad(alone, leaves[0], d_out)[0]))
    for found, expected in zip(*results, strict=True):
        assert found[:, :, :40].isfinite().all()
        assert torch.equal(found.isnan(), expected.isnan())
        close(found[:, :, :40].detach(), expected[:, :, :40].detach(), torch.float32)


def choice(caplog, *arrays, **given):
    with caplog.at_level(logging.DEBUG, "chunkattn"):
        caplog.clear()
        attention(*arrays, **given)
        return caplog.messages[-1]


def test_the_choice_of_auto(rng, caplog, monkeypatch):
    arrays = tokens(rng, ((), (2, 2), 64, 64), torch.float32)
    array, bias = torch.ones(64, 64, dtype=torch.bool), torch.zeros(64, 64)
    tell = partial(choice, caplog, *arrays)
    assert tell(mask=array).startswith("native: ")
    assert tell(bias=bias, causal=True).startswith("native: ")
    assert tell(mask=array, key_chunk_size=8) == "chunked: chunk sizes are given"
    bias.requires_grad_()
    assert tell(bias=bias) == "chunked: no kernel has the gradient of a bias"
    with torch.no_grad():
        assert tell(bias=bias).startswith("native: ")
    half = [x.half() for x in arrays]
    with torch.no_grad():
        assert choice(caplog, *half, bias=bias).startswith("native: ")
    why = choice(caplog, *half, bias=bias, return_lse=True)
    assert why == "chunked: no kernel has the gradient of a bias"
    monkeypatch.setattr(_partition, "RUNS", 60)
    _KEPT.clear()
    assert tell(mask=array).startswith("native: ")
    assert tell(mask=Window(9, 0)) == "chunked: tiles spare the masks of many keys"
    monkeypatch.setattr(_partition, "ROWS", 16)
    monkeypatch.setattr(_partition, "FEW", 0)
    _KEPT.clear()
    assert tell(mask=Window(9, 0)).startswith("native: ")
    few = partial(choice, caplog, arrays[0][:, :16], *arrays[1:], mask=Window(None, 0))
    assert few(query_offset=48).startswith("native: ")
    assert tell(mask=Window(9, None)) == "chunked: tiles spare the masks of many keys"
    monkeypatch.setattr(_partition, "BYTES", 1024)
    _KEPT.clear()
    told = "chunked: the smallest array that is added to scores would be large"
    assert tell(mask=array) == told
    _KEPT.clear()


@pytest.mark.parametrize(
    ("batch", "heads", "n_q", "n_k", "given", "shapes"),
    [
        ((), (4, 4), 1, 4096, {"mask": Window(99, 0), "query_offset": 2000}, {(4, 1, 100)}),
        ((), (4, 2), 2, 4096, {"mask": Window(99, 0), "query_offset": 2000}, {(2, 4, 101)}),
        ((), (4, 2), 40, 4096, {"mask": Window(99, 0), "query_offset": 2000}, {(4, 40, 139)}),
        ((), (8, 2), 16, 512, {"mask": torch.arange(512) > 300}, {(2, 64, 512)}),
        ((), (8, 8), 256, 4096, {"mask": torch.arange(4096) > 3000}, {(8, 256, 1095)}),
        (
            (),
            (8, 8),
            512,
            1024,
            {"causal": True, "query_offset": 0},
            {(8, 256, 256), (8, 256, 512)},
        ),
        (
            (2,),
            (2, 2),
            1,
            4096,
            {"mask": Window(99, 0), "query_offset": tensor([100, 4000])},
            {(2, 1, 100)},
        ),
        (
            (2,),
            (8, 8),
            512,
            1024,
            {"mask": Lengths(key=tensor([256, 1024]))},
            {(8, 512, 256), (8, 512, 1024)},
        ),
    ],
)
def test_what_the_kernel_sees(rng, monkeypatch, batch, heads, n_q, n_k, given, shapes):
    """Heads, queries and keys: no keys out of sight where a look takes less, few queries as one."""
    calls = []

    def kept(*args):
        calls.append(_call(*args))
        return calls[-1]

    _call = _parts._call
    monkeypatch.setattr(_parts, "_call", kept)
    arrays = tokens(rng, (batch, heads, n_q, n_k), torch.float32)
    close(native(*arrays, **given), chunked(*arrays, **given), torch.float32)
    assert {(*x.query.shape[1:3], x.key.shape[2]) for x in calls} == shapes


# By name: shapes of queries and of keys, and the keywords.
HELD = {
    "heads of a group": ((1, 8, 1024, 64), (1, 2, 1024, 64), {"mask": Window(256, 0)}),
    "layout": ((1, 512, 8, 64), (1, 512, 2, 64), {"mask": torch.eye(512) < 1, "layout": "nhd"}),
    "layout, few queries": (
        (1, 16, 32, 64),
        (1, 400, 8, 64),
        {"mask": torch.eye(16, 400) < 1, "layout": "nhd"},
    ),
    "windows by entry": (
        (2, 1, 256, 64),
        (2, 1, 4096, 64),
        {"mask": Window(99, 0), "query_offset": tensor([100, 3800])},
    ),
    "window, parts joined": ((1, 1, 8192, 64), (1, 1, 8192, 64), {"mask": Window(1792, 0)}),
    "window and bias": (
        (1, 1, 4096, 64),
        (1, 1, 4096, 64),
        {"mask": Window(3000, 0), "bias": torch.zeros(1, 4096)},
    ),
    "few keys of many": (
        (1, 8, 2048, 64),
        (1, 8, 4096, 64),
        {"mask": (torch.arange(4096) < 256).expand(2048, 4096)},
    ),
    "bias, widened": (
        (1, 8, 1024, 64),
        (1, 8, 1024, 64),
        {"bias": torch.zeros(1024, 1024).half(), "mask": torch.eye(1024) < 1},
    ),
    "two batch axes": (
        (2, 3, 2, 256, 64),
        (2, 3, 2, 256, 64),
        {"bias": torch.zeros(2, 1, 2, 256, 256)},
    ),
    "few queries, by entry": (
        (2, 8, 8, 64),
        (2, 1, 8192, 64),
        {"bias": torch.zeros(2, 1, 8, 8192)},
    ),
    "few queries, expanded": (
        (1, 8, 8, 64),
        (1, 2, 8192, 64),
        {"bias": torch.zeros(8, 8192).expand(8, 8, 8192)},
    ),
    "heads last": (
        (1, 8, 512, 64),
        (1, 8, 512, 64),
        {"bias": torch.zeros(512, 512, 8).permute(2, 0, 1)},
    ),
    "heads of keys, heads last": ((2, 1024, 8, 64), (2, 1024, 1, 64), {"layout": "nhd"}),
    "few queries, heads last": ((2, 16, 8, 64), (2, 1024, 2, 64), {"layout": "nhd"}),
    "mask, transposed": ((1, 4, 1024, 64), (1, 4, 1024, 64), {"mask": (torch.eye(1024) < 1).mT}),
}


UNUSUAL = {
    "heads of keys": ((1, 4, 64, 8), (1, 2, 64, 8), {"bias": torch.ones(64, 64)}),
    "a window": ((1, 4, 64, 8), (1, 2, 64, 8), {"mask": Window(3, 3)}),
    "entries": ((2, 3, 4, 600, 8),) * 2 + ({"mask": Lengths(key=torch.tensor([[9, 600, 3]]))},),
}


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("case", UNUSUAL)
def test_rows_whose_numbers_do_not_follow_each_other(rng, case, which):
    """The kernel would read past them, also where a copy of the call would look well."""
    of_queries, of_keys, given = UNUSUAL[case]
    arrays = [
        tensor(rng.standard_normal(shape, dtype=np.float32))
        for shape in (of_queries, of_keys, of_keys)
    ]
    expected = chunked(*arrays, **given)
    axes = (1, 0, *range(2, arrays[0].ndim))  # so that batch axes do not merge
    arrays[which] = arrays[which].permute(axes).mT.contiguous().mT.permute(axes)
    torch.testing.assert_close(attention(*arrays, **given), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", HELD)
def test_no_more_than_planned(case, training):
    """By the allocator's record."""
    of_queries, of_keys, given = HELD[case]
    arrays = [torch.ones(shape) for shape in (of_queries, of_keys, of_keys)]

    def call():
        if not training:
            return [native(*arrays, **given)]
        leaves = [x.detach().requires_grad_() for x in arrays]
        out = native(*leaves, **given)
        return [out, *torch.autograd.grad(out, leaves, arrays[0])]

    with memory.torch_threads(1):
        call()  # what a first call loads is no part of it
        peak, results = _memory.of_torch_cpu(call)
        planned = plan(*arrays, implementation="native", training=training, **given)
    assert planned.implementation == "native"
    assert peak - memory.nbytes(results) <= planned.peak_bytes


def test_calls_of_equal_shapes(rng):
    """Such a call is checked once, with the numbers of neither mask nor bias, and holds neither."""
    arrays = tokens(rng, ((), (2, 2), 32, 32), torch.float32)
    for _ in range(3):
        bias, offset = random(rng, 32, 32).float(), tensor(3)
        mask = (some(rng, 32, 32), Lengths(key=tensor(30)), Segments(torch.arange(32) // 20))
        held = [bias, offset, mask[0], mask[1].key, mask[2].query]
        given = {"mask": mask, "bias": bias, "causal": True, "query_offset": offset}
        close(attention(*arrays, **given), chunked(*arrays, **given), torch.float32)
    watched = [weakref.ref(x) for x in held]
    del given, bias, offset, mask, held
    gc.collect()
    assert [x() for x in watched] == [None] * 5
    with pytest.raises(TypeError, match="mask must be a boolean array"):
        attention(*arrays, mask=torch.ones(32, 32), bias=torch.ones(32, 32))
    with pytest.raises(ValueError, match="bias must broadcast"):
        attention(*arrays, mask=some(rng, 32, 32), bias=torch.ones(32, 31))
    with pytest.raises(TypeError, match=r"must be dense \(strided\)"):
        attention(*arrays, mask=some(rng, 32, 32).to_sparse(), bias=torch.ones(32, 32))
    with pytest.raises(TypeError, match="one library"):
        attention(*arrays, mask=np.ones((32, 32), dtype=bool), bias=torch.ones(32, 32))


def test_transforms(rng):
    """Of `torch.func`: over masks alone, and gradients by a bias."""
    arrays = tokens(rng, ((), (2, 2), 32, 32), torch.float64)
    many = some(rng, 3, 32, 32)
    found = torch.func.vmap(lambda mask: attention(*arrays, mask=mask))(many)
    close(found, torch.stack([chunked(*arrays, mask=mask) for mask in many]), torch.float64)
    bias = random(rng, 32, 32)
    found, expected = (
        torch.func.grad(lambda x, f=f: f(*arrays, bias=x, causal=True).sum())(bias)
        for f in (attention, chunked)
    )
    close(found, expected, torch.float64)
    found, expected = (
        torch.func.jvp(lambda q, f=f: f(q, *arrays[1:], bias=bias), (arrays[0],), (arrays[1],))[1]
        for f in (native, chunked)
    )
    close(found, expected, torch.float64)


@pytest.mark.parametrize("learns", [False, True])
def test_a_bias_in_compiled_code(rng, learns, monkeypatch):
    """It is the kernel's unless its gradient is asked for."""
    parts = []

    def counted(function):
        return lambda *args, **given: parts.append(1) or function(*args, **given)

    for name in ("forward", "backward"):
        monkeypatch.setattr(_parts, name, counted(getattr(_parts, name)))
    arrays = [x.requires_grad_() for x in tokens(rng, ((), (2, 2), 32, 32), torch.float32)]
    bias = random(rng, 32, 32).float().requires_grad_(learns)
    leaves = [*arrays, bias] if learns else arrays
    results = []
    for f in (torch.compile(attention, backend="eager", fullgraph=True), chunked):
        out = f(*arrays, bias=bias, causal=True)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    assert len(parts) == (0 if learns else 2)
    for found, expected in zip(*results, strict=True):
        close(found.detach(), expected.detach(), torch.float32)
