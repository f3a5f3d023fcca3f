"""PyTorch's autograd and `torch.func` through attention, `merge` and streams."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from autodiff import CHUNKS, SHAPES, call, merged, score_mod, streamed
from torch import func

from chunkattn import attention, attention_jvp, attention_vjp, masks

# PyTorch itself uses what it deprecates, on the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def tensors(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [torch.asarray(rng.standard_normal(shape)).requires_grad_() for shape in shapes]


# By name: the function, and the shapes of what it takes after query, key and value.
CASES = {
    "plain": (call, []),
    "scale": (lambda *x: call(*x[:3], scale=x[3]), [()]),
    "causal, softcap": (lambda *x: call(*x, causal=True, query_offset=1, softcap=1.5), []),
    "blind queries": (lambda *x: call(*x, causal=True, query_offset=-2), []),
    "window": (lambda *x: call(*x, mask=masks.Window(2, 1), query_offset=0), []),
    "bias, sinks": (lambda *x: call(*x[:3], bias=x[3], sinks=x[4]), [(2, 1, 6), (2,)]),
    "score_mod": (lambda *x: call(*x[:3], score_mod=score_mod(x[3]), softcap=2.0), [(2,)]),
    "dropout": (lambda *x: call(*x, dropout=0.3, dropout_seed=1), []),
    "textbook": (lambda *x: call(*x, implementation="standard"), []),
    "stream": (streamed, []),
    "merge": (merged, []),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    """Reverse, forward and second order, in float64 and with chunks that do not divide."""
    function, more = CASES[name]
    inputs = tensors(*SHAPES, *more)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("layout", ["nhd", "headless", "broadcast"])
def test_gradcheck_of_layouts(layout):
    shapes = {
        "nhd": [(2, 5, 2, 3), (1, 7, 1, 3), (7, 1, 2)],
        "headless": [(5, 3), (7, 3), (7, 2)],
        "broadcast": [(2, 1, 4, 5, 3), (1, 3, 2, 7, 3), (2, 7, 2)],
    }[layout]
    keywords = {"layout": "nhd"} if layout == "nhd" else {}
    assert torch.autograd.gradcheck(
        lambda *x: call(*x, **keywords), tensors(*shapes), check_forward_ad=True, fast_mode=True
    )


def loss(query, key, value):
    out, lse = call(query, key, value, causal=True, query_offset=1)
    return out.sin().sum() + lse.cos().sum()


def textbook(query, key, value):
    scores = query @ key.mT / 2**0.5
    scores = scores.masked_fill(~torch.ones(3, 6, dtype=torch.bool).tril(1), -torch.inf)
    return (scores.softmax(-1) @ value).sin().sum() + scores.logsumexp(-1).cos().sum()


ALL = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f, x, _: func.grad(f, ALL)(*x),
    "vjp": lambda f, x, _: func.vjp(f, *x)[1](torch.tensor(2.0, dtype=torch.float64)),
    "jvp": lambda f, x, _: func.jvp(f, x, x),
    "jacrev": lambda f, x, _: func.jacrev(f, ALL)(*x),
    "jacfwd": lambda f, x, _: func.jacfwd(f, ALL)(*x),
    "hessian": lambda f, x, _: func.hessian(f, ALL)(*x),
    "jacrev of jacrev": lambda f, x, _: func.jacrev(func.jacrev(f, ALL), ALL)(*x),
    "jacrev of jacfwd": lambda f, x, _: func.jacrev(func.jacfwd(f, ALL), ALL)(*x),
    "vmap": lambda f, _, xs: func.vmap(f)(*xs),
    "vmap over one": lambda f, x, xs: func.vmap(f, (0, None, None))(xs[0], *x[1:]),
    "vmap of grad": lambda f, _, xs: func.vmap(func.grad(f, ALL))(*xs),
    "grad of vmap": lambda f, _, xs: func.grad(lambda *y: func.vmap(f)(*y).sum(), ALL)(*xs),
    "vmap of hessian": lambda f, _, xs: func.vmap(func.hessian(f))(*xs),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name):
    x = tuple(y.detach() for y in tensors(*SHAPES))
    xs = tuple(torch.stack([y, y + 1, 2 * y]) for y in x)
    ours, theirs = (TRANSFORMS[name](f, x, xs) for f in (loss, textbook))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("implementation", ["native", "chunked"])
def test_gradients_in_batches(implementation):
    """By `is_grads_batched`, whose tensors are not those of torch.vmap."""
    inputs = tensors((1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 4))

    def function(*tokens):
        return attention(*tokens, implementation=implementation)

    def of_query(query):
        return function(query, *inputs[1:]).square().sum()

    out = function(*inputs)
    (bars,) = tensors((3, *out.shape), seed=1)
    batched = torch.autograd.grad(
        out, inputs, bars, is_grads_batched=True, create_graph=True, retain_graph=True
    )
    each = [torch.autograd.grad(out, inputs, bar, create_graph=True) for bar in bars]
    alone = tuple(map(torch.stack, zip(*each, strict=True)))
    torch.testing.assert_close(batched, alone)
    seconds = [
        torch.autograd.grad(sum(x.square().sum() for x in found), [*inputs, bars])
        for found in (batched, alone)
    ]
    torch.testing.assert_close(*seconds)
    hessian = torch.autograd.functional.hessian
    hessians = [hessian(of_query, inputs[0], vectorize=vectorize) for vectorize in (False, True)]
    torch.testing.assert_close(*hessians)
    jacobian = torch.autograd.functional.jacobian
    ways = ({}, {"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"})
    expected, *jacobians = (jacobian(of_query, inputs[0], **way) for way in ways)
    for found in jacobians:
        torch.testing.assert_close(found, expected)
    forward = hessian(of_query, inputs[0], vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(forward, hessians[0])


@pytest.mark.parametrize("implementation", ["native", "chunked"])
def test_gradients_in_batches_by_another_thread(implementation, monkeypatch):
    """As on a GPU, whose backward pass runs in a thread that does not know of the batch."""
    monkeypatch.setattr(torch._C, "_vmapmode_increment_nesting", lambda: 1)
    monkeypatch.setattr(torch._C, "_vmapmode_decrement_nesting", lambda: 0)
    query, key, value = tensors((1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 4))
    out = attention(query, key, value, implementation=implementation)
    (bars,) = tensors((3, *out.shape), seed=1)
    each = [torch.autograd.grad(out, query, bar, retain_graph=True)[0] for bar in bars]
    (found,) = torch.autograd.grad(out, query, bars, is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack(each))


def test_product_with_the_second_derivative():
    """`hvp` asks for the gradient by the cotangent alone, in a graph that has all of them."""
    query, key, value = (x.detach() for x in tensors((5, 4), (6, 4), (6, 4)))

    def function(query):
        return attention(query, key, value).sin().sum()

    _, found = torch.autograd.functional.hvp(function, query, query)
    _, expected = torch.autograd.functional.vhp(function, query, query)
    torch.testing.assert_close(found, expected)


def test_per_example_gradients_of_what_a_score_mod_captures():
    x = [y.detach() for y in tensors(*SHAPES)]
    slopes = torch.asarray([[0.3, -0.2], [1.0, 0.5]], dtype=torch.float64)

    def of_slopes(slopes):
        return call(*x, score_mod=score_mod(slopes))[0].sin().sum()

    each = torch.stack([func.grad(of_slopes)(one) for one in slopes])
    torch.testing.assert_close(func.vmap(func.grad(of_slopes))(slopes), each)
    assert (each != 0).all()


def test_torch_func_inside_of_a_score_mod():
    x = tensors(*SHAPES)

    def gradients(score_mod):
        out = attention(*x, score_mod=score_mod)
        return torch.autograd.grad(out.sin().sum(), x)

    slope = torch.asarray(0.5, dtype=torch.float64)
    each = func.vmap(lambda s: (slope * s).sin())
    ours = gradients(lambda s, b, h, i, j: each(s))
    torch.testing.assert_close(ours, gradients(lambda s, b, h, i, j: (slope * s).sin()))


class Sloped(torch.nn.Module):
    """Attention with a learnt slope for each head, which its functions take from the module."""

    def __init__(self, kept):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.asarray([1.0, 2.0], dtype=torch.float64))
        self.register_buffer("reach", torch.asarray(3))
        self.kept = kept

    def forward(self, q, k, v):
        slope, reach = self.slope, self.reach
        if self.kept:
            own = {
                "score_mod": lambda s, b, h, i, j: s * slope[h],
                "mask": lambda b, h, i, j: j - i < reach,
            }
        else:
            own = {
                "score_mod": lambda s, b, h, i, j: s * self.slope[h],
                "mask": lambda b, h, i, j: j - i < self.reach,
            }
        return call(q, k, v, **own)[0]


@pytest.mark.parametrize("name", ["slope", "reach"])
def test_functional_call(name):
    """Afterwards a module has its own tensors again, which are not those of the call."""
    inputs = tensors(*SHAPES)
    given = {
        "slope": torch.asarray([-1.0, 0.5], dtype=torch.float64).requires_grad_(),
        "reach": torch.asarray(2),
    }
    given = {name: given[name]}
    module = Sloped(kept=True)
    out = func.functional_call(module, given, tuple(inputs))
    leaves = [*inputs, *(x for x in given.values() if x.requires_grad)]
    found = torch.autograd.grad(out.sin().sum(), leaves)
    module.load_state_dict(module.state_dict() | given)
    leaves = [*inputs, *([module.slope] if name == "slope" else [])]
    expected = torch.autograd.grad(module(*inputs).sin().sum(), leaves)
    torch.testing.assert_close(found, expected)
    out = func.functional_call(Sloped(kept=False), given, tuple(inputs))
    with pytest.raises(RuntimeError, match="takes a tensor that it did not take"):
        out.sum().backward()


def test_what_functions_keep_between_calls():
    """Tables that a function makes for each shape, and gradients beside them."""
    inputs = tensors(*SHAPES)
    tables = {}

    def score_mod(s, b, h, i, j):
        if s.shape not in tables:
            tables[s.shape] = torch.arange(s.shape[-1], dtype=s.dtype)
        return s * (1 + tables[s.shape])

    def same(s, b, h, i, j):
        return s * (1 + torch.arange(s.shape[-1], dtype=s.dtype))

    found, expected = (
        torch.autograd.grad(call(*inputs, score_mod=mod)[0].sin().sum(), inputs)
        for mod in (score_mod, same)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_functions_out_of_sight():
    """TorchScript, whose results come from nowhere, and a custom autograd.Function."""

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(s):
            return s * 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, bar):
            return bar / 2

    @torch.jit.script
    def doubled(s: torch.Tensor):
        return 2 * s

    inputs = tensors(*SHAPES)
    plain = torch.autograd.grad(call(*inputs)[0].sum(), inputs[:2])
    for function, factor, slope in ((Halved.apply, 1, 0.5), (doubled, 2, 2)):
        found = torch.autograd.grad(
            call(*inputs, score_mod=lambda s, *_, f=function, x=factor: f(s) / x + 0)[0].sum(),
            inputs[:2],
        )
        for one, other in zip(found, plain, strict=True):
            torch.testing.assert_close(one, other * slope / factor)


def test_tensors_of_some_tiles_alone():
    """They are seen too late to be differentiated by; without gradients all is well."""
    inputs = [x.detach() for x in tensors(*SHAPES)]
    slope = torch.asarray(0.7, dtype=torch.float64)

    def score_mod(s, b, h, i, j):
        return s * slope if s.shape[-1] > 1 else s

    expected = call(*inputs, score_mod=lambda s, b, h, i, j: s * slope)[0]
    torch.testing.assert_close(call(*inputs, score_mod=score_mod)[0], expected)
    slope.requires_grad_()
    with pytest.raises(RuntimeError, match="takes a tensor that it did not take"):
        call(*inputs, score_mod=score_mod)
    with torch.no_grad():
        torch.testing.assert_close(call(*inputs, score_mod=score_mod)[0], expected)


def test_gradients_of_captured_complex_tensors_are_refused():
    inputs = tensors(*SHAPES)
    phases = torch.asarray([1j, 2j])

    def found():
        return call(*inputs, score_mod=lambda s, b, h, i, j: s * phases[h].abs())[0]

    expected = found()
    phases.requires_grad_()
    with pytest.raises(TypeError, match="must not capture complex arrays"):
        found()
    with torch.no_grad():
        torch.testing.assert_close(found(), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_parameters_out_of_sight_are_refused():
    """Their gradients would be missing without a word."""
    x = tensors(*SHAPES)
    layer = torch.nn.Linear(1, 1, dtype=torch.float64)

    def by(layer):
        return attention(*x, score_mod=lambda s, b, h, i, j: layer(s[..., None])[..., 0])

    by(layer).sum().backward()
    assert layer.weight.grad is not None
    hidden = torch.jit.trace(layer, torch.ones(1, dtype=torch.float64))
    with pytest.raises(TypeError, match="score_mod must not hold tensors that require gradients"):
        by(hidden)
    with torch.no_grad():
        torch.testing.assert_close(by(hidden), by(layer))


def test_forward_mode_of_autograd():
    x = [y.detach() for y in tensors(*SHAPES)]
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(y, y.flip(0)) for y in x]
        moved = torch.autograd.forward_ad.unpack_dual(loss(*dual)).tangent
    expected = func.jvp(textbook, tuple(x), tuple(y.flip(0) for y in x))[1]
    torch.testing.assert_close(moved, expected)


def test_third_derivatives_are_refused():
    x = tensors(*SHAPES)
    first = torch.autograd.grad(loss(*x), x, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second[0].sum(), x)
    with pytest.raises(NotImplementedError, match="forward mode of forward mode"):
        func.jacfwd(func.jacfwd(loss))(*(y.detach() for y in x))


def test_only_what_is_asked_for():
    query, key, value = tensors(*SHAPES)
    bias = torch.zeros(3, 6, dtype=torch.float64)
    call(query, key.detach(), value.detach(), bias=bias)[0].sum().backward()
    assert query.grad is not None
    assert bias.grad is None
    assert not call(*(x.detach() for x in (query, key, value)))[0].requires_grad
    with torch.no_grad():
        assert not call(query, key, value)[0].requires_grad


def test_checkpoint_hooks_and_inference_mode():
    x = tensors(*SHAPES)
    expected = torch.autograd.grad(loss(*x), x)
    again = torch.utils.checkpoint.checkpoint(loss, *x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, x), expected, atol=0, rtol=0)
    sizes = []

    def pack(saved):
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out, lse = call(*x)
        out.register_hook(lambda gradient: 2 * gradient)
    assert max(sizes) <= max(y.numel() for y in (*x, out, lse))  # no scores are kept
    doubled = torch.autograd.grad(out.sum(), x)
    once = torch.autograd.grad(call(*x)[0].sum(), x)
    torch.testing.assert_close(doubled, tuple(2 * g for g in once))
    with torch.inference_mode():
        assert call(*x)[0].is_inference()


def test_saved_tensors_are_held_by_autograd_alone():
    """What a hook on saved tensors moves elsewhere is freed: nothing else in the graph holds it."""
    leaves = tensors(*SHAPES)
    inputs = [x * 2 for x in leaves]
    held = [weakref.ref(x) for x in inputs]
    moved = []

    def pack(x):
        moved.append(x.clone())
        return len(moved) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, moved.__getitem__):
        total = sum(x.sum() for x in call(*inputs))
    del inputs
    gc.collect()
    assert [x() for x in held] == [None] * 3
    ours = torch.autograd.grad(total, leaves)
    expected = torch.autograd.grad(sum(x.sum() for x in call(*(2 * x for x in leaves))), leaves)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("layout", ["hnd", "nhd", "headless"])
def test_results_may_be_written_to(layout):
    """In place, as long as no gradient needs the old values: autograd refuses that of views."""
    shape = (4, 3) if layout == "headless" else (3, 4, 4, 3)
    keywords = {} if layout == "headless" else {"layout": layout}
    x = tensors(shape)[0]
    out, lse = attention(x, x, x, return_lse=True, **keywords)
    expected = 2 * out.detach(), 2 * lse.detach()
    torch.testing.assert_close((out.mul_(2), lse.mul_(2)), expected)


def test_autocast():
    """As PyTorch's own attention: a lower dtype for the tokens, gradients in the inputs' own."""
    x = [y.detach().float().requires_grad_() for y in tensors(*SHAPES)]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(*x, return_lse=True)
        assert attention(*(y.double() for y in x)).dtype == torch.float64
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, attention(*(y.bfloat16() for y in x)), atol=0, rtol=0)
    out.float().sum().backward()
    assert {y.grad.dtype for y in x} == {torch.float32}


def test_vjp_and_jvp_by_name_are_differentiable():
    """What `attention_vjp` and `attention_jvp` return is part of autograd's graph."""
    x = tensors(*SHAPES)

    def by_name(*x):
        out, vjp = attention_vjp(*x, **CHUNKS)
        return tuple(vjp(out.sin()).values())

    def forward(*x):
        return attention_jvp(x, x, **CHUNKS)[1]

    assert torch.autograd.gradcheck(by_name, x, fast_mode=True)
    assert torch.autograd.gradcheck(forward, x, fast_mode=True)
