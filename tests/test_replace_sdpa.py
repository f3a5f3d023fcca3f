"""Inside of `replace_sdpa`, PyTorch's modules and functions call chunkattn."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention

from chunkattn import interop


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of attention that the drop-in makes."""
    made = []

    def counted(*args, **keywords):
        made.append(keywords)
        return original(*args, **keywords)

    original = interop.attention
    monkeypatch.setattr(interop, "attention", counted)
    return made


@pytest.fixture
def x():
    return torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)


def modules():
    torch.manual_seed(0)
    encoder = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    decoder = torch.nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    heads = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    causal = torch.nn.Transformer.generate_square_subsequent_mask(7)
    return {
        "encoder": (encoder, encoder, 1),
        "padded encoder": (encoder, lambda x: encoder(x, src_key_padding_mask=padding), 1),
        "causal encoder": (encoder, lambda x: encoder(x, src_mask=causal, is_causal=True), 1),
        "decoder": (decoder, lambda x: decoder(x, 2 * x, tgt_mask=causal), 2),
        "heads": (heads, lambda x: heads(x, x, x, need_weights=False)[0], 1),
        "weights are asked for": (heads, lambda x: heads(x, x, x)[0], 0),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", modules())
def test_modules(x, calls, name, training):
    module, function, count = modules()[name]
    module.train(training)
    parameters = [x, *module.parameters()]

    def results():
        out = function(x)
        return out, torch.autograd.grad(out.sin().sum(), parameters, allow_unused=True)

    expected = results()
    assert not calls
    with interop.replace_sdpa():
        torch.testing.assert_close(results(), expected)
    assert len(calls) == count
    with torch.no_grad(), interop.replace_sdpa():
        torch.testing.assert_close(function(x), expected[0])
    assert len(calls) == 2 * count
    function(x)
    assert len(calls) == 2 * count


def test_calls_by_any_name(x, calls):
    expected = scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5)
    with interop.replace_sdpa():
        ours = scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            x, x, x, None, 0.0, True, scale=0.5
        )
    torch.testing.assert_close((ours, theirs), (expected, expected))
    assert len(calls) == 2


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_pytorchs_causal_biases(bias, calls):
    query, key = (torch.randn(1, 2, n, 8) for n in (4, 7))
    expected = scaled_dot_product_attention(query, key, key, bias(4, 7))
    with interop.replace_sdpa():
        ours = scaled_dot_product_attention(query, key, key, attn_mask=bias(4, 7))
    torch.testing.assert_close(ours, expected)
    assert len(calls) == 1


def test_a_causal_bias_of_other_lengths():
    """PyTorch refuses it, too, but where both lengths are equal: it does not look at them then."""
    query, key = (torch.randn(1, 2, n, 8) for n in (4, 7))
    with pytest.raises(ValueError, match="attn_mask is of 4 queries and 9 keys; got 4 and 7"):
        interop.scaled_dot_product_attention(query, key, key, attn_mask=causal_lower_right(4, 9))
    mask = causal_lower_right(9, 9)
    expected = scaled_dot_product_attention(query, key, key, attn_mask=mask)
    ours = interop.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    torch.testing.assert_close(ours, expected)


def test_nesting_exceptions_and_threads(x, calls):
    def attend():
        scaled_dot_product_attention(x, x, x)
        return len(calls)

    with interop.replace_sdpa():
        with interop.replace_sdpa():
            assert attend() == 1
        assert attend() == 2
        other = Thread(target=attend)
        other.start()
        other.join()
        assert len(calls) == 2
    assert attend() == 2
    with pytest.raises(ZeroDivisionError), interop.replace_sdpa():
        1 / 0  # noqa: B018
    assert attend() == 2


def test_compiled(x):
    """The graph holds the operator where the context is, and PyTorch's own attention elsewhere."""
    graphs = []

    def keep(graph, _):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    heads = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    compiled = torch.compile(
        lambda x: heads(x, x, x, need_weights=False)[0], backend=keep, fullgraph=True
    )
    expected = compiled(x)
    with interop.replace_sdpa():
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), expected)
    assert ["chunkattn" in graph for graph in graphs] == [False, True]

    def inside(x):
        with interop.replace_sdpa():
            return scaled_dot_product_attention(x, x, x)

    torch.testing.assert_close(torch.compile(inside, backend=keep, fullgraph=True)(x), inside(x))
    assert "chunkattn" in graphs[-1]
