"""Kernels of the libraries themselves: the same results, gradients and reasons not to take them."""

from __future__ import annotations

import logging
from functools import partial
from importlib import import_module
from itertools import product

import gradients
import libraries
import numpy as np
import pytest
from array_api_compat import array_namespace
from conftest import chosen

from chunkattn import attention
from chunkattn._adapters import adapter_of
from chunkattn.masks import Causal, Window

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

native = partial(attention, implementation="native")
chunked = partial(attention, implementation="chunked")

# The dtypes of the kernels; everything else is refused.
KERNELS = {
    "torch": ("float16", "bfloat16", "float32", "float64"),
    "torch-cuda": ("float16", "bfloat16", "float32"),
    "jax": ("float32",),
    "jax-cuda": ("float16", "bfloat16"),
}


def pytest_generate_tests(metafunc):
    if "owner" in metafunc.fixturenames:
        names = [name for name in chosen(metafunc.config) if name in KERNELS]
        metafunc.parametrize("owner", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def owner(request):
    """A library with kernels of its own.

    For JAX on a CPU its textbook attention plays the kernel, so that all around it is tested.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "jax":
            from chunkattn.backends import jax_native

            found = jax_native.Kernel(trains=True), True, "it is played"
            patch.setattr(jax_native, "IMPLEMENTATION", "xla")
            patch.setattr(jax_native, "_attend", _partitioned(jax_native._attend))
            patch.setattr(jax_native, "choose", lambda call: found)
            patch.setattr(jax_native, "PLATFORMS", ("cpu",))
            patch.setattr(jax_native, "LOWERED", "cpu")
        yield libraries.library(request.param)


def _partitioned(attend):
    """Return a function that JAX lowers for devices it knows, as it does cuDNN's kernel."""
    import jax
    from jax.experimental.custom_partitioning import custom_partitioning

    @custom_partitioning
    def partitioned(x):
        return x

    def partition(mesh, arguments, result):
        shardings = [x.sharding for x in arguments]
        return mesh, lambda x: x, result.sharding, shardings

    partitioned.def_partition(partition, sharding_rule="... -> ...")
    same = jax.custom_vjp(partitioned)
    same.defvjp(lambda x: (partitioned(x), None), lambda _, bar: (bar,))
    return lambda query, *rest, **given: attend(same(query), *rest, **given)


@pytest.fixture(scope="module")
def dtypes(owner):
    return KERNELS[owner.name]


def test_no_kernel(lib, rng):
    """A library without kernels says so, and one that has some says what they do not take."""
    kernels = () if lib.name == "jax" else KERNELS.get(lib.name, ())
    for dtype in set(lib.dtypes) - set(kernels):
        arrays = [lib.asarray(rng.standard_normal((1, 2, 16, 8)), dtype) for _ in range(3)]
        with pytest.raises(NotImplementedError, match="implementation='native': "):
            lib.call(native, *arrays)
    arrays = [lib.asarray(rng.standard_normal((1, 2, 16, d))) for d in (8, 8, 4)]
    with pytest.raises(NotImplementedError, match="implementation='native': "):
        lib.call(native, *arrays)


def tokens(lib, rng, dtype, n_q=64, n_k=64, heads=(4, 4), batch=(2,), d=16):
    shapes = [(*batch, h, n, d) for h, n in ((heads[0], n_q), (heads[1], n_k), (heads[1], n_k))]
    return tuple(lib.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def close(lib, dtype, found, expected):
    """Compare to within some roundings of the inputs' dtype, by the largest number."""
    expected = lib.numpy(expected)
    error = np.abs(lib.numpy(found) - expected).max(initial=0)
    assert error <= 16 * lib.eps(dtype) * max(1, np.abs(expected).max(initial=0))


SHAPES = {
    "plain": ({}, {}),
    "causal": ({}, {"causal": True}),
    "grouped heads": ({"heads": (6, 2)}, {}),
    "grouped heads, causal": ({"heads": (6, 2)}, {"causal": True}),
    "two lengths": ({"n_q": 24, "n_k": 72}, {}),
    "one query of many keys": ({"n_q": 1, "n_k": 72}, {"causal": True, "query_offset": 71}),
    "no batch axis": ({"batch": ()}, {"causal": True}),
    "two batch axes": ({"batch": (2, 3)}, {"causal": True}),
    "a scale": ({}, {"scale": 0.5}),
    "equal offsets": ({}, {"mask": Causal(), "query_offset": 9, "key_offset": 9}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_values(owner, dtypes, rng, case):
    shapes, given = SHAPES[case]
    for dtype in dtypes:
        if (owner.name, dtype, case) == ("torch-cuda", "float32", "grouped heads, causal"):
            continue  # PyTorch has no kernel for it, as test_grouped_float32 sees
        arrays = tokens(owner, rng, dtype, **shapes)
        found, expected = (owner.call(f, *arrays, **given) for f in (native, chunked))
        assert found.dtype == expected.dtype
        close(owner, dtype, found, expected)
        if owner.name.startswith("jax"):
            continue  # whose kernel has no lse in the compute dtype
        both, expected = (
            owner.call(f, *arrays, **given, return_lse=True) for f in (native, chunked)
        )
        close(owner, dtype, both[0], found)
        assert both[1].dtype == expected[1].dtype
        close(owner, "float32", both[1], expected[1])


def test_grouped_float32(rng):
    """PyTorch's kernel for float32 on CUDA does not group heads; unmasked, they need not be."""
    if not libraries.present("torch-cuda"):
        pytest.skip("PyTorch finds no CUDA device")
    owner = libraries.library("torch-cuda")
    arrays = tokens(owner, rng, "float32", heads=(4, 2))
    with pytest.raises(NotImplementedError, match="textbook"):
        native(*arrays, causal=True)


def test_layouts(owner, dtypes, rng):
    for dtype in dtypes:
        arrays = tokens(owner, rng, dtype, heads=(4, 2))
        turned = [array_namespace(arrays[0]).permute_dims(x, (0, 2, 1, 3)) for x in arrays]
        out = native(*turned, layout="nhd")
        close(
            owner,
            dtype,
            array_namespace(arrays[0]).permute_dims(out, (0, 2, 1, 3)),
            chunked(*arrays),
        )
        close(owner, dtype, native(*(x[0, 0] for x in arrays)), chunked(*(x[0, 0] for x in arrays)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [64, 65])
def test_derivatives(owner, dtypes, rng, causal, n):
    """The kernel's own gradients, and the tiles' derivatives of what it computed.

    cuDNN has none of odd lengths by JAX.
    """
    shapes = {"n_q": n, "n_k": n, "heads": (4, 4) if causal else (4, 2)}
    for dtype in dtypes:
        inputs, moves = (tokens(owner, rng, dtype, **shapes) for _ in range(2))
        point = gradients.Point(inputs, moves, tokens(owner, rng, dtype, **shapes)[0])
        for mode in gradients.MODES:
            found, expected = (
                gradients.derivative(owner, way, mode, causal=causal)(point)
                for way in ("native", "chunked")
            )
            for name, x in expected.items():
                close(owner, dtype, found[name], x)


def test_gradient_of_lse(owner, dtypes, rng):
    if owner.name.startswith("jax"):
        with pytest.raises(NotImplementedError, match="lse is rounded to the dtype of query"):
            owner.call(native, *tokens(owner, rng, dtypes[0]), return_lse=True)
        return

    def lse(*arrays, way, bias=None):
        return attention(*arrays, implementation=way, causal=True, return_lse=True)[1]

    for dtype in dtypes:
        inputs = tokens(owner, rng, dtype)
        d_lse = owner.asarray(rng.standard_normal(inputs[0].shape[:-1]), "float32")
        if dtype == "float64":
            d_lse = owner.asarray(owner.numpy(d_lse), dtype)
        found, expected = (
            gradients.BY_LIBRARY["torch"](
                partial(lse, way=way), "reverse", gradients.Point(inputs, (), d_lse)
            )
            for way in ("native", "chunked")
        )
        for name, x in expected.items():
            close(owner, dtype, found[name], x)


@pytest.mark.parametrize("causal", [False, True])
def test_visible_nan_of_few_keys(owner, dtypes, rng, causal):
    """PyTorch's kernel for CPUs takes a query with a NaN for one that sees nothing."""
    for dtype, n in product(dtypes, (1, 2, 7, 8, 15, 16, 17)):
        arrays = [owner.numpy(x).copy() for x in tokens(owner, rng, "float32", n_q=n, n_k=n)]
        arrays[0][:, :, n // 2, 0] = np.nan
        arrays = [owner.asarray(x, dtype) for x in arrays]
        found, expected = (
            owner.numpy(owner.call(f, *arrays, causal=causal)) for f in (native, chunked)
        )
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        assert np.isnan(found).any()


def test_lse_of_infinite_scores(owner, dtypes, rng):
    """A score of -inf hides its key, whatever computes: kernels say 0 or inf for such a query."""
    for dtype in dtypes:
        query, key, value = (owner.numpy(x).copy() for x in tokens(owner, rng, dtype))
        query[:, :, 5] = np.inf
        key[:] = -1
        arrays = [owner.asarray(x, dtype) for x in (query, key, value)]
        out, lse = map(owner.numpy, owner.call(attention, *arrays, return_lse=True))
        assert (lse[:, :, 5] == -np.inf).all()
        assert (out[:, :, 5] == 0).all()
        assert np.isfinite(lse[:, :, :5]).all()


def test_gradients_of_large_scores(rng):
    """From one rounded lse they would be coarse; on a GPU they are."""
    torch = pytest.importorskip("torch")
    arrays = tokens(libraries.library("torch"), rng, "float32", n_q=300, n_k=40)
    arrays[1][0, 1, 0, 0] = 1e8
    arrays = [x.requires_grad_() for x in arrays]
    found, expected = (
        torch.autograd.grad(f(*arrays).sin().sum(), arrays)
        for f in (native, partial(attention, implementation="standard"))
    )
    for x, y in zip(found, expected, strict=True):
        assert (x - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("extreme", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["key", "value"])
def test_nan_behind_the_causal_mask(owner, dtypes, rng, extreme, name):
    """Kernels multiply it by 0; then the tiles take over, in the gradients too."""
    for dtype in dtypes:
        query, *rest = (owner.numpy(x) for x in tokens(owner, rng, dtype))
        rest[name == "value"][..., 40, :] = extreme
        arrays = [owner.asarray(x, dtype) for x in (query, *rest)]
        found, expected = (owner.numpy(f(*arrays, causal=True)) for f in (native, chunked))
        assert np.isfinite(found[..., :40, :]).all()
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        d_out = np.where(np.arange(64)[:, None] < 40, rng.standard_normal(found.shape), 0)
        point = gradients.Point(tuple(arrays), (), owner.asarray(d_out, dtype))
        d_query = gradients.derivative(owner, "native", "reverse", causal=True)(point)["query"]
        assert np.isfinite(owner.numpy(d_query)[..., :40, :]).all()


REASONS = {
    "sinks": lambda lib: {"sinks": lib.asarray(np.zeros(2))},
    "softcap": lambda lib: {"softcap": 5.0},
    "score_mod": lambda lib: {"score_mod": lambda s, b, h, q, k: s},
    "dropout": lambda lib: {"dropout": 0.5, "dropout_seed": 1},
    "mask of the caller's own": lambda lib: {"mask": lambda b, h, q_idx, kv_idx: q_idx > kv_idx},
    "scale is an array": lambda lib: {"scale": lib.asarray(np.asarray(0.5))},
    "compute_dtype": lambda lib: {"compute_dtype": "float64"},
    "progress": lambda lib: {"progress": print},
}


ADDED = {  # to the scores, by some kernels
    "bias": lambda lib: {"bias": lib.asarray(np.zeros((16, 16)))},
    "window": lambda lib: {"mask": Window(4, 4)},
    "array": lambda lib: {"mask": lib.asarray(np.ones((16, 16), dtype=bool))},
    "offset": lambda lib: {"causal": True, "query_offset": 3},
}


@pytest.mark.parametrize("case", ADDED)
def test_what_some_kernels_do(owner, dtypes, rng, case):
    given = ADDED[case](owner)
    arrays = [owner.asarray(rng.standard_normal((1, 2, 16, 8)), dtypes[0]) for _ in range(3)]
    if owner.name == "torch":
        close(owner, dtypes[0], native(*arrays, **given), chunked(*arrays, **given))
        return
    with pytest.raises(NotImplementedError, match=r"bias, and .* mask other than Causal"):
        owner.call(native, *arrays, **given)


@pytest.mark.parametrize("reason", REASONS)
def test_what_no_kernel_does(owner, dtypes, rng, reason, caplog):
    """It is refused by name, and "auto" computes it by tiles."""
    given = REASONS[reason](owner)
    arrays = [owner.asarray(rng.standard_normal((1, 2, 16, 8)), dtypes[0]) for _ in range(3)]
    with pytest.raises(NotImplementedError, match=reason):
        owner.call(native, *arrays, **given)
    with caplog.at_level(logging.DEBUG, "chunkattn"):
        owner.call(attention, *arrays, **given)
    assert caplog.messages
    assert caplog.messages[-1].startswith("chunked: ")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_a_cpu(dtype, causal, rng, monkeypatch, caplog):
    """As float32 rounded once, however many heads are copied at a time."""
    torch = pytest.importorskip("torch")
    from chunkattn.backends import torch_native_cpu

    def derived(d_out, *arrays):
        arrays = [x.detach().requires_grad_() for x in arrays]
        out = native(*arrays, causal=causal)
        return out, *torch.autograd.grad(out, arrays, d_out)

    lib = libraries.library("torch")
    arrays = tokens(lib, rng, dtype, heads=(6, 2), batch=(3,))
    d_out = torch.ones_like(arrays[0])
    expected = [x.to(d_out.dtype) for x in derived(*(x.float() for x in (d_out, *arrays)))]
    for most in (2**24, 2**18, 2**17, 2**16, 1):  # all at once, some, one head at a time
        monkeypatch.setattr(torch_native_cpu, "COPIES", most)
        for x, known in zip(derived(d_out, *arrays), expected, strict=True):
            assert torch.equal(x, known)
    with caplog.at_level(logging.DEBUG, "chunkattn"):
        attention(*arrays, causal=causal)
    assert caplog.messages[-1] == "chunked: a head's copies in float32 would be large"


def test_the_choice_of_auto(owner, dtypes, rng, caplog):
    def choice(*arrays, **given):
        with caplog.at_level(logging.DEBUG, "chunkattn"):
            caplog.clear()
            owner.call(attention, *arrays, **given)
            return caplog.messages[-1]

    for dtype in dtypes:
        arrays = tokens(owner, rng, dtype)
        assert choice(*arrays).startswith("native: ")
        one = tokens(owner, rng, dtype, n_q=1)
        assert choice(*one, causal=True, query_offset=63).startswith("native: ")
        assert choice(*arrays, query_chunk_size=32) == "chunked: chunk sizes are given"
        assert choice(*arrays, implementation="native").startswith("native: ")


def _captured(function, *arrays):
    """Return the result of a CUDA graph, captured of other numbers, for these."""
    import torch

    places = [torch.ones_like(x) for x in arrays]
    function(*places)  # compiles what there is to compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*places)
    for place, x in zip(places, arrays, strict=True):
        place.copy_(x)
    graph.replay()
    return out


@pytest.mark.parametrize("implementation", ["auto", "chunked"])
def test_cuda_graphs(rng, implementation):
    """A captured call is right for every number, behind a mask too."""
    if not libraries.present("torch-cuda"):
        pytest.skip("PyTorch finds no CUDA device")
    owner = libraries.library("torch-cuda")
    call = partial(attention, implementation=implementation)
    for dtype in KERNELS["torch-cuda"]:
        arrays = tokens(owner, rng, dtype)
        for causal in (False, True):
            expected = chunked(*arrays, causal=causal)
            close(owner, dtype, _captured(partial(call, causal=causal), *arrays), expected)
        arrays[2][:, :, 40] = float("nan")
        expected = chunked(*arrays, causal=True)
        found = _captured(partial(call, causal=True), *arrays)
        assert np.isfinite(owner.numpy(found)[:, :, :40]).all()
        close(owner, dtype, found[:, :, :40], expected[:, :, :40])


def test_no_kernel_is_allowed(rng, caplog):
    """Within `sdpa_kernel` PyTorch's own attention raises, where it has none of these on a CPU."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    arrays = tokens(libraries.library("torch"), rng, "float32")
    with caplog.at_level(logging.DEBUG, "chunkattn"), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        found = attention(*arrays, bias=torch.zeros(64, 64)), attention(*arrays)
    for x in found:
        torch.testing.assert_close(x, chunked(*arrays))
    assert caplog.messages[-1] == "chunked: PyTorch has only its textbook attention for it"


def test_what_is_kept_of_a_choice(rng, caplog):
    """Calls of the same shapes and keywords differ in what no shape tells."""
    torch = pytest.importorskip("torch")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = tokens(libraries.library("torch"), rng, "float32")
    scattered = v.mT.contiguous().mT
    bias = torch.zeros(64, 64)
    watched = torch.zeros(64, 64, requires_grad=True)

    def told(*arrays, **keywords):
        caplog.clear()
        attention(*arrays, **keywords)
        return caplog.messages[-1]

    def told_within(x):
        mapped.append(told(x, k, v))
        return x.sum()

    mapped = []
    flash = "flash attention for CPU: as fast as PyTorch's attention is"
    rows = "chunked: the kernels want contiguous rows"
    gradient = "chunked: no kernel has the gradient of a bias"
    textbook = "chunked: PyTorch has only its textbook attention for it"
    entries = "chunked: the kernels do not know torch.vmap"
    with caplog.at_level(logging.DEBUG, "chunkattn"):
        for _ in range(2):
            assert flash in told(q, k, v)
            assert told(q, k, scattered) == rows
            assert flash in told(q, k, v, bias=bias)
            assert told(q, k, v, bias=watched) == gradient
            with torch.no_grad():
                assert flash in told(q, k, v, bias=watched)
            with sdpa_kernel(SDPBackend.MATH):
                assert told(q, k, v) == textbook
            torch.vmap(told_within)(q[None])
            assert mapped[-1] == entries
            torch.func.grad(told_within)(q)
            assert flash in mapped[-1]


def test_batch_axes_that_do_not_merge(rng, caplog):
    """As one axis they would be a copy, which no plan counts."""
    pytest.importorskip("torch")
    arrays = tokens(libraries.library("torch"), rng, "float32", batch=(2, 3))
    with caplog.at_level(logging.DEBUG, "chunkattn"):
        attention(*arrays)
        for cut in (lambda x: x[:, :2], lambda x: x.transpose(0, 1), lambda x: x[:1, :1]):
            attention(*map(cut, arrays))
    ways = [message.partition(":")[0] for message in caplog.messages]
    assert ways == ["native", "chunked", "chunked", "native"]


def test_what_is_captured_takes_no_branch(monkeypatch):
    """A graph has what is right in either case, and no kernel whose result is to be looked at."""
    torch = pytest.importorskip("torch")
    from chunkattn.backends import torch_native

    from chunkattn._plain import Plain

    adapter = adapter_of(torch.ones(1), "x")
    test = torch.zeros((), dtype=torch.bool)
    assert adapter.when(test, lambda: 1, lambda: 2) == 2
    for module in (import_module("chunkattn.backends.torch"), torch_native):
        monkeypatch.setattr(module, "is_captured", lambda x: True)
    assert adapter.when(test, lambda: 1, lambda: 2) == 1
    arrays = [torch.ones(1, 2, 8, 8)] * 3
    assert torch_native.choose(Plain(*arrays, False, 1.0), False)[0] is not None
    assert torch_native.choose(Plain(*arrays, True, 1.0), False)[0] is None
