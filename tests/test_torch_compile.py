"""A compiled call of PyTorch is one operator, with gradients; what cannot be one is told."""

from __future__ import annotations

from inspect import signature

import numpy as np
import pytest
import torch
from chunkattn.backends import torch_compile

from chunkattn import attention, attention_vjp, interop, masks

pytestmark = [
    # PyTorch itself does what it warns of, where a graph ends.
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be inst:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 5)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gradients(function, *tensors):
    """Return the results and the gradients of a loss in which each number counts differently."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    found = function(*leaves)
    results = found if isinstance(found, tuple) else (found,)
    loss = sum((x.double().sin() * torch.arange(x.numel()).view(x.shape)).sum() for x in results)
    return found, torch.autograd.grad(loss, leaves)


def same(function, *tensors, backend="aot_eager", **keywords):
    """Compare a function with what the compiler makes of it, as one graph; return that."""
    compiled = torch.compile(function, backend=backend, fullgraph=True, **keywords)
    torch.testing.assert_close(gradients(compiled, *tensors), gradients(function, *tensors))
    return compiled


LENGTHS, IDS = torch.tensor([4, 9]), torch.arange(9) // 4
CASES = {
    "plain": {},
    "causal, lse": {"causal": True, "return_lse": True},
    "array": {"mask": torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) > 0.4},
    "window": {"mask": masks.Window(3, None)},
    "masks": {"mask": (masks.Lengths(key=LENGTHS), masks.Segments(IDS), masks.Causal())},
    "softcap, scale": {"softcap": 2, "scale": 0.3},
    "dropout": {"dropout": 0.3, "dropout_seed": 2**64 - 5, "compute_dtype": "float64"},
    "offset, chunks": {
        "causal": True,
        "query_offset": torch.tensor([-2, 3]),
        "query_chunk_size": 4,
        "key_chunk_size": 3,
    },
    "textbook": {"implementation": "standard", "compute_dtype": torch.float64},
}


@pytest.mark.parametrize("name", CASES)
def test_one_graph(tokens, name):
    same(lambda q, k, v: attention(2 * q, k, v, **CASES[name]), *tokens)


@pytest.mark.parametrize("name", ["bias", "sinks", "scale"])
def test_gradients_of_further_arrays(tokens, name):
    shape = {"bias": (4, 1, 9), "sinks": (4,), "scale": ()}[name]
    same(lambda q, k, v, x: attention(q, k, v, **{name: x}), *tokens, torch.full(shape, 0.3))


@pytest.mark.parametrize("layout", ["nhd", "headless", "broadcast"])
def test_layouts(tokens, layout):
    tokens = {
        "nhd": [x.transpose(1, 2) for x in tokens],
        "headless": [x[0, 0] for x in tokens],
        "broadcast": [tokens[0][:1], tokens[1], tokens[2][0]],
    }[layout]
    keywords = {"layout": "nhd" if layout == "nhd" else "hnd", "return_lse": True}
    same(lambda q, k, v: attention(q, k, v, **keywords), *tokens)


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_inductor(tokens, layout):
    """The code that PyTorch generates relies on the strides that the operator promises."""
    tokens = [x.bfloat16() for x in tokens]
    if layout == "nhd":
        tokens = [x.transpose(1, 2) for x in tokens]

    def around(q, k, v):
        return attention(q + 1, k, v, causal=True, layout=layout) * 2

    same(around, *tokens, backend="inductor")


@pytest.mark.parametrize("off_cpu", [False, True])
@pytest.mark.parametrize("implementation", ["auto", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(tokens, dtype, implementation, off_cpu, monkeypatch):
    """By PyTorch's kernels, and where one may be called, which is on GPUs, but none is."""
    x = tokens[0].to(dtype)
    monkeypatch.setattr(torch_compile, "_kernel_may_do", lambda given: off_cpu)
    for return_lse in (False, True):
        torch._dynamo.reset()
        keywords = {"implementation": implementation, "return_lse": return_lse}
        same(lambda *y, keywords=keywords: attention(*y, causal=True, **keywords), x, 2 * x, x)


@pytest.mark.parametrize("layout", ["hnd", "nhd"])
def test_the_operator_keeps_pytorchs_rules(tokens, layout):
    """Its schema, its fake, and its gradients; also where it keeps what they need."""
    from chunkattn._compiled import operands, operator

    tokens = [x.transpose(1, 2) if layout == "nhd" else x for x in tokens]
    tokens = [x.bfloat16().contiguous().requires_grad_() for x in tokens]
    parameters = signature(attention).parameters.values()
    keywords = {x.name: x.default for x in parameters if x.default is not x.empty}
    plain = operands(keywords | {"layout": layout, "mask": masks.Window(2, 0)})
    given = dict(zip(("query", "key", "value"), tokens, strict=True)) | plain
    given |= {"trains": True, "trains_bias": False}
    torch.library.opcheck(operator._opoverload, tuple(given[x] for x in torch_compile.ARGUMENTS))


def test_graph_holds_one_operator(tokens):
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(lambda q, k, v: attention(q, k, v), backend=keep, fullgraph=True)
    compiled(*tokens)
    assert [sum("attention" in target for target in graph) for graph in graphs] == [1]


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "dot_product_attention"])
@pytest.mark.parametrize("masked", [False, True])
def test_lengths_of_drop_ins_are_symbols(name, masked):
    drop_in, graphs = getattr(interop, name), []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    def call(x, mask):
        if name == "scaled_dot_product_attention":
            return drop_in(x, x, x, attn_mask=mask)
        return drop_in(x, x, x, mask=None if mask is None else mask[None, None])

    compiled = torch.compile(call, fullgraph=True, backend=keep)
    counts = []
    for n in range(8, 24, 2):
        x = torch.randn(2, 4, n, 8) if name.startswith("scaled") else torch.randn(2, n, 4, 8)
        mask = torch.rand(n, n) < 0.7 if masked else None
        torch.testing.assert_close(compiled(x, mask), call(x, mask))
        counts.append(len(graphs))
    assert counts[3] == counts[-1] <= 4


def test_one_compilation_for_all_widths(tokens):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    def call(q, k, v, width):
        return attention(q, k, v, mask=masks.Window(width, 0), query_offset=0)

    compiled = torch.compile(call, fullgraph=True, backend=keep)
    for width in range(2, 12):
        torch.testing.assert_close(compiled(*tokens, width), call(*tokens, width))
    assert len(graphs) < 4


@pytest.mark.parametrize("n", [9, 300])
@pytest.mark.parametrize("key_heads", [2, 4])
def test_results_lie_in_order(n, key_heads):
    """In layout "nhd" heads can be put together by a view, compiled or not."""
    query, key = torch.randn(2, n, 4, 8), torch.randn(2, n, key_heads, 8)

    def call(query, key):
        return attention(query, key, key, layout="nhd")

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for mask in ({}, {"causal": True}):
        out = attention(query, key, key, layout="nhd", **mask)
        assert out.is_contiguous()
    torch.testing.assert_close(compiled(query, key).view(2, n, 32), call(query, key).view(2, n, 32))


def test_lengths_are_symbols(tokens):
    """One compilation serves all lengths, and the offset that follows from them."""

    def cached(q, k, v):
        return attention(q, k, v, causal=True, query_offset=k.shape[2] - q.shape[2])

    compiled = same(cached, tokens[0][:, :, :6], *tokens[1:], dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n_q, n_k in ((3, 8), (4, 7)):
            cut = [tokens[0][:, :, :n_q], *(x[:, :, :n_k] for x in tokens[1:])]
            torch.testing.assert_close(gradients(compiled, *cut), gradients(cached, *cut))


def test_numbers_that_change(tokens):
    def windowed(width, scale):
        return attention(*tokens, mask=masks.Window(width, 0), scale=scale)

    compiled = torch.compile(windowed, backend="aot_eager", fullgraph=True)
    for width in range(1, 4):
        torch.testing.assert_close(compiled(width, 0.1 * width), windowed(width, 0.1 * width))


def test_numbers_of_numpy(tokens):
    """The compiler takes them for arrays."""
    number = 1 / np.sqrt(8)

    def scaled(*tokens):
        return attention(*tokens, scale=1 / np.sqrt(tokens[0].shape[-1]))

    def captured(*tokens):
        return attention(*tokens, scale=number, causal=True)

    def moved(*tokens):
        return attention(*tokens, causal=True, query_offset=np.int64(3))

    same(scaled, *tokens)
    same(captured, *tokens)
    torch.testing.assert_close(torch.compile(moved, backend="eager")(*tokens), moved(*tokens))


def test_autocast_and_modes(tokens):
    def mixed(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v)

    same(mixed, *tokens)
    with torch.autocast("cpu", torch.bfloat16):
        same(attention, *tokens)
    plain = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(plain(*tokens), attention(*tokens))


def test_checkpointing(tokens):
    again = torch.utils.checkpoint.checkpoint
    same(lambda *x: again(attention, *x, use_reentrant=False), *tokens)


def test_drop_in(tokens):
    query = tokens[0]
    same(
        lambda *x: interop.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True),
        *tokens,
    )

    def dropping(q):
        torch.manual_seed(1)
        return interop.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    compiled = torch.compile(dropping, backend="aot_eager")
    torch.testing.assert_close(compiled(query), dropping(query))


def test_functions_break_the_graph_once(tokens):
    """What they capture has its gradient nonetheless."""

    def biased(q, k, v, slopes):
        def mod(score, b, h, q_idx, kv_idx):
            return score + slopes[h] * (kv_idx - q_idx)

        return attention(2 * q, k, v, score_mod=mod, mask=lambda b, h, i, j: i >= j).sin()

    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    compiled = torch.compile(biased, backend="aot_eager")
    ours = gradients(compiled, *tokens, slopes)
    torch.testing.assert_close(ours, gradients(biased, *tokens, slopes))
    torch._dynamo.reset()
    assert torch._dynamo.explain(biased)(*tokens, slopes).graph_break_count == 1
    with pytest.raises(torch._dynamo.exc.Unsupported, match="score_mod, a mask_mod"):
        torch.compile(biased, backend="eager", fullgraph=True)(*tokens, slopes)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sin().sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(f)(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_breaks_the_graph(tokens, name):
    """An operator has no rule for them: a silent tangent of zero would be wrong."""

    def transformed(x):
        return TRANSFORMS[name](lambda y: attention(y, y, y), x)

    compiled = torch.compile(transformed, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens[0]), transformed(tokens[0]))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"neither torch\.func nor"):
        torch.compile(transformed, backend="eager", fullgraph=True)(tokens[0])


def test_forward_mode_breaks_the_graph(tokens):
    forward_ad = torch.autograd.forward_ad

    def moved(x):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            return forward_ad.unpack_dual(attention(dual, dual, dual)).tangent

    compiled = torch.compile(moved, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens[0]), moved(tokens[0]))


def test_second_derivatives_are_refused(tokens):
    x = tokens[0].requires_grad_()
    for backend, message in (("eager", "second derivatives"), ("aot_eager", "double backward")):
        torch._dynamo.reset()
        compiled = torch.compile(lambda y: attention(y, y, y), backend=backend)
        (first,) = torch.autograd.grad(compiled(x).sin().sum(), x, create_graph=True)
        with pytest.raises((NotImplementedError, RuntimeError), match=message):
            torch.autograd.grad(first.square().sum(), x)


def test_mistakes_are_told_as_they_are_without_a_compiler(tokens):
    q, k, v = tokens
    with pytest.raises(ValueError, match="query_offset must be given"):
        torch.compile(lambda: attention(q[:, :, :5], k, v, causal=True), backend="eager")()
    with pytest.raises(TypeError, match="scale must be a number"):
        torch.compile(lambda: attention(q, k, v, scale="1"), backend="eager")()


@pytest.mark.parametrize("keywords", [{}, {"score_mod": lambda s, b, h, i, j: s + j}])
def test_a_call_while_another_thread_compiles(tokens, keywords, monkeypatch):
    """PyTorch says so to every thread."""
    expected = gradients(lambda *x: attention(*x, **keywords), *tokens)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    found = gradients(lambda *x: attention(*x, **keywords), *tokens)
    torch.testing.assert_close(found, expected)


def test_other_entry_points(tokens):
    """Derivatives by name stand between two graphs."""

    def by_name(q, k, v):
        out, vjp = attention_vjp(q, k, v, causal=True)
        return vjp(out)["query"]

    torch.testing.assert_close(torch.compile(by_name, backend="eager")(*tokens), by_name(*tokens))


@pytest.mark.parametrize("lse", [False, True])
def test_traced_by_make_fx(lse):
    """A kernel whose result nothing has to be looked at for, and its gradients."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(query, key, value):
        query = query.detach().requires_grad_()
        found = attention(query, key, value, return_lse=lse)
        out = found[0] if lse else found
        return out if lse else torch.autograd.grad(out.square().sum(), query)[0]

    arrays = torch.randn(3, 1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(make_fx(gradient)(*arrays)(*arrays), gradient(*arrays))
