"""The functions that transformers calls, by themselves: masks, and attention without one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from drop_ins import floats

from chunkattn import attention
from chunkattn._interop_transformers import Visible
from chunkattn.interop import register_transformers

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", autouse=True)
def transformers():
    """The package, with the implementation registered."""
    transformers = pytest.importorskip("transformers")
    register_transformers()
    return transformers


def same(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14)


def patterns():
    from transformers import masking_utils as m

    return {
        "causal": (m.causal_mask_function, None),
        "all": (m.bidirectional_mask_function, None),
        "window": (m.sliding_window_causal_mask_function(4), 4),
        "window of both sides": (m.sliding_window_bidirectional_mask_function(4), 4),
        "chunks": (m.chunked_causal_mask_function(4, torch.tensor([0, 3])), 4),
        "size of another": (m.sliding_window_causal_mask_function(3), 4),
    }


PLAIN = ("causal", "all", "window", "window of both sides")


@pytest.mark.parametrize("padding", [None, (slice(9, 15),), (slice(0, 6),)])
@pytest.mark.parametrize("place", [(9, 9, 0, 0), (4, 13, 9, 0), (1, 8, 9, 2), (3, 15, 4, 0)])
@pytest.mark.parametrize("pattern", [*PLAIN, "chunks", "size of another"])
def test_masks_are_those_of_transformers(transformers, pattern, place, padding):
    """Wherever queries and keys begin: with padding left and right, and keys past its end."""
    masks = transformers.AttentionMaskInterface()
    function, size = patterns()[pattern]
    n_q, n_k, q_offset, kv_offset = place
    seen = None
    if padding:
        seen = torch.ones(2, 13, dtype=torch.bool)
        seen[1, padding[0]] = False
    given = {
        "batch_size": 2,
        "q_length": n_q,
        "kv_length": n_k,
        "q_offset": torch.tensor(q_offset) if n_k == 15 else q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": seen,
        "local_size": size,
        "device": "cpu",
    }
    ours = masks["chunkattn"](**given)
    assert isinstance(ours, Visible) == (pattern in PLAIN)
    theirs = masks["sdpa"](**given, allow_is_causal_skip=False)
    tensor = masks["chunkattn"](**given, allow_is_causal_skip=False)  # the model reads it
    assert torch.equal(tensor, theirs)
    assert tuple(ours.shape) == (2, 1, n_q, n_k)
    if n_k == 15:
        given["q_offset"] += n_q  # a static cache counts on, in its own tensor
    if pattern in PLAIN:  # prepared before the forward pass
        assert masks["chunkattn"](**given | {"attention_mask": ours}) is ours
    q, k = (torch.asarray(floats(2, 1, n, 8)) for n in (n_q, n_k))
    v = torch.eye(n_k, dtype=q.dtype).expand(2, 1, -1, -1)
    out, weights = attend(q, k, v, ours)
    assert weights is None
    same(out, attention(q, k, v, mask=theirs).transpose(1, 2))


def attend(q, k, v, mask, module=None, **keywords):
    from transformers import AttentionInterface

    return AttentionInterface()["chunkattn"](module, q, k, v, mask, **keywords)


@pytest.mark.parametrize(("own", "given", "causal"), [(True, None, 1), (False, None, 0), (0, 1, 1)])
def test_without_a_mask(own, given, causal):
    """What the layer says counts, where the call does not; a single query sees all."""
    q, k = (torch.asarray(floats(2, 2, n, 8)) for n in (5, 9))
    module = SimpleNamespace(is_causal=own)
    out, _ = attend(q, k, k, None, module, is_causal=given, scaling=0.7)
    expected = attention(q, k, k, causal=bool(causal), query_offset=0, scale=0.7)
    same(out, expected.transpose(1, 2))
    assert out.is_contiguous()
    one, _ = attend(q[:, :, :1], k, k, None, module, is_causal=given)
    same(one, attention(q[:, :, :1], k, k).transpose(1, 2))


def test_a_bias_and_a_mask_of_numbers():
    q, k = (torch.asarray(floats(2, 2, n, 8)) for n in (5, 9))
    bias, mask = torch.asarray(floats(2, 1, 2, 5, 9))
    out, _ = attend(q, k, k, mask, position_bias=bias)
    same(out, attention(q, k, k, bias=bias + mask).transpose(1, 2))


def test_full_padding_masks_are_dropped(transformers):
    """A mask of ones, which tokenizers give to every batch, costs nothing in any layer."""
    mask = transformers.AttentionMaskInterface()["chunkattn"]
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5}
    seen = torch.ones(2, 5, dtype=torch.bool)
    assert mask(**sizes, attention_mask=seen).padding is None
    seen[1, 4] = False
    assert mask(**sizes, attention_mask=seen).padding.shape == (2, 5)


def test_refused(monkeypatch):
    q = torch.asarray(floats(2, 2, 5, 8))
    with pytest.raises(NotImplementedError, match="sinks that differ by position"):
        attend(q, q, q, None, sinks=q)
    mask = Visible((), None, 0, 0, (2, 1, 5, 6))
    with pytest.raises(
        ValueError, match="5 queries and 6 keys, but attention is asked for 5 and 5"
    ):
        attend(q, q, q, mask)
    with pytest.raises(TypeError, match="name must be a str; got 3"):
        register_transformers(3)
    # by name: transformers puts another object in the place of its module
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.1")
    with pytest.raises(ImportError, match=r"transformers 5.4 or later .* 5.3.1"):
        register_transformers()
