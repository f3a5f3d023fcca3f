"""`torch.export`, and tensors without values: the meta device and fake tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import chunkattn
from chunkattn import (
    OnlineAttention,
    attention,
    attention_jvp,
    attention_vjp,
    backends,
    interop,
    masks,
    merge,
)

IMPLEMENTATIONS = ("auto", "chunked", "native", "standard")


class Layer(torch.nn.Module):
    """Calls attention with keywords of its own, on what a linear layer makes of the queries."""

    def __init__(self, **keywords):
        super().__init__()
        self.linear, self.keywords = torch.nn.Linear(8, 8), keywords

    def forward(self, query, key, value, mask=None):
        given = self.keywords if mask is None else self.keywords | {"mask": mask}
        return attention(self.linear(query), key, value, **given)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 5)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


CASES = {
    "plain": ({}, ()),
    "causal": ({"causal": True, "softcap": 2.0, "return_lse": True}, ()),
    "window": ({"mask": masks.Window(3, None)}, ()),
    "array": ({}, (torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) > 0.4,)),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_export(tokens, name, strict):
    keywords, more = CASES[name]
    layer, args = Layer(**keywords), (*tokens, *more)
    program = torch.export.export(layer, args, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("chunkattn.attention.default") == 1
    torch.testing.assert_close(program.module()(*args), layer(*args))


@pytest.mark.parametrize("strict", [True, False])
def test_lengths_are_symbols(tokens, strict):
    n_q, n_k = (torch.export.Dim(name, min=2, max=4096) for name in ("n_q", "n_k"))
    shapes = {"query": {1: n_q}, "key": {1: n_k}, "value": {1: n_k}, "mask": None}
    layer = Layer(causal=True, query_offset=0, layout="nhd")
    query, key, value = (x.transpose(1, 2) for x in tokens)
    program = torch.export.export(
        layer, (query, key, value, None), dynamic_shapes=shapes, strict=strict
    )
    cut = query[:, :4], key[:, :7], value[:, :7]
    torch.testing.assert_close(program.module()(*cut, None), layer(*cut))


def test_a_trained_program(tokens):
    """Gradients flow through an exported program."""
    layer = Layer(causal=True)
    program = torch.export.export(layer, tuple(tokens)).module()
    program(*tokens).sin().sum().backward()
    layer(*tokens).sin().sum().backward()
    ours = [x.grad for x in program.parameters()]
    torch.testing.assert_close(ours, [x.grad for x in layer.parameters()])


def test_saved_and_read_by_another_process(tokens, tmp_path):
    layer = Layer(causal=True, mask=masks.Lengths(key=torch.tensor([4, 9])))
    with torch.no_grad():
        program = torch.export.export(layer, tuple(tokens))
        torch.save((tokens, layer(*tokens)), tmp_path / "values.pt")
    torch.export.save(program, tmp_path / "program.pt2")
    code = f"""
import torch
from chunkattn.interop import register_torch
register_torch()
register_torch()
program = torch.export.load({str(tmp_path / "program.pt2")!r})
tokens, expected = torch.load({str(tmp_path / "values.pt")!r})
torch.testing.assert_close(program.module()(*tokens), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# PyTorch itself does what it warns of.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("mask", [None, masks.Lengths(key=torch.tensor([4, 9]))])
def test_compiled_ahead_of_time(tokens, tmp_path, mask):
    if not (os.environ.get("CXX") or shutil.which("g++")):
        pytest.skip("PyTorch's compiler finds no C++ compiler")
    layer = Layer(causal=True, mask=mask)
    with torch.no_grad():
        program = torch.export.export(layer, tuple(tokens))
    package = str(tmp_path / "layer.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=package)
    compiled = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(compiled(*tokens), layer(*tokens))


def test_a_copied_package_has_operators_of_its_own(tmp_path, monkeypatch):
    ignore = shutil.ignore_patterns("__pycache__")
    for module, place in ((chunkattn, "otherattn"), (backends, "otherattn/backends")):
        shutil.copytree(
            Path(module.__file__).parent, tmp_path / place, ignore=ignore, dirs_exist_ok=True
        )
    monkeypatch.syspath_prepend(tmp_path)
    interop.register_torch()
    import_module("otherattn.interop").register_torch()
    for name in ("chunkattn", "otherattn"):
        assert {"attention", "attention_backward"} <= set(dir(getattr(torch.ops, name)))


@pytest.mark.parametrize("strict", [True, False])
def test_functions_cannot_be_exported(tokens, strict):
    layer = Layer(mask=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    with pytest.raises(
        (NotImplementedError, torch._dynamo.exc.Unsupported), match="is Python code, which no"
    ):
        torch.export.export(layer, tuple(tokens), strict=strict)


# Tensors without values


def shapes_and_dtypes(results):
    return [(x.shape, x.dtype) for x in results]


def everything(query, key, value, implementation):
    """Return results, first and second derivatives; see that they have no values either."""
    like = type(query), query.device
    keywords = {"causal": True, "implementation": implementation, "layout": "nhd"}
    found = attention(query, key, value, **keywords, return_lse=True)
    loss = sum(x.float().sum() for x in found)
    tokens = query, key, value
    first = torch.autograd.grad(loss, tokens, create_graph=True)
    second = torch.autograd.grad(sum(x.float().sum() for x in first), tokens)
    results = [*found, *first, *second]
    assert all((type(x.detach()), x.device) == like for x in results)
    return shapes_and_dtypes(results)


def random(device="cpu"):
    shapes = [(2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8)]
    tensors = [torch.randn(x, device=device, dtype=torch.bfloat16) for x in shapes]
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_meta_and_fake_tensors(implementation):
    expected = everything(*random(), implementation)
    assert everything(*random("meta"), implementation) == expected
    with FakeTensorMode():
        assert everything(*random(), implementation) == expected
        on_gpu = [torch.empty(2, 4, 9, 8, device="cuda") for _ in range(3)]
        assert attention(*on_gpu, implementation=implementation).device.type == "cuda"


def test_meta_of_any_size():
    """Nothing is computed: these scores alone would take 2 TB."""
    query = torch.empty(8, 2**18, 64, device="meta")
    assert attention(query, query, query, implementation="standard").shape == query.shape


def test_meta_of_every_argument_and_entry_point():
    query, key, value = (x.detach().transpose(1, 2) for x in random("meta"))
    ones = torch.ones(2, 9, dtype=torch.int64, device="meta")
    allowed = torch.ones(9, 9, dtype=torch.bool, device="meta")
    out = attention(
        query,
        key,
        value,
        mask=(
            allowed,
            masks.Lengths(key=ones[:, 0]),
            masks.Segments(ones),
            lambda b, h, i, j: i > j,
        ),
        score_mod=lambda score, b, h, q_idx, kv_idx: score + q_idx,
        bias=torch.ones(4, 1, 9, device="meta"),
        sinks=torch.ones(4, device="meta"),
        dropout=0.1,
        dropout_seed=torch.ones((), dtype=torch.int64, device="meta"),
    )
    assert out.shape == (2, 4, 9, 8)
    assert interop.scaled_dot_product_attention(query, query, query).is_meta
    out, vjp = attention_vjp(query, key, value)
    assert shapes_and_dtypes(vjp(out).values()) == shapes_and_dtypes((query, key, value))
    assert attention_jvp((query, key, value), (query, None, None))[1].is_meta
    partial = attention(query, key, value, return_lse=True)
    assert merge(partial, partial)[0].is_meta
    stream = OnlineAttention(query)
    stream.update(key, value)
    assert stream.result().is_meta


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_is_refused(tokens, mode):
    """Its trace would depend on values; one of empty tensors would be wrong."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with pytest.raises(RuntimeError, match="data-dependent"):
        make_fx(lambda *x: attention(*x, causal=True), tracing_mode=mode)(*tokens)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
def test_masked_tensors_are_refused():
    x = torch.masked.masked_tensor(torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match="query is a MaskedTensor; pass its data"):
        attention(x, x, x)


def test_distributed_tensors_are_refused():
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        x = distribute_tensor(torch.ones(4, 8), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match=r"query is a DTensor.*to_local"):
            attention(x, x, x)
        assert attention(*(x.to_local(),) * 3).shape == (4, 8)
    finally:
        distributed.destroy_process_group()
