"""Shapes, chunk sizes, layouts, masks and offsets of any kind, driven by Hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkattn import attention, masks

COMPILED_QUICKLY = True

sizes = st.one_of(st.integers(0, 4), st.integers(1, 33))
chunk = st.one_of(st.none(), st.integers(1, 40))


@st.composite
def calls(draw):
    """Return the tokens and keywords of a random call."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    keys, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_q, n_k, d, d_v = draw(sizes), draw(sizes), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    layout = draw(st.sampled_from(["hnd", "nhd"]))

    def some(*axes):
        """Return axes of which any may be 1, and the leading ones absent."""
        kept = tuple(n if draw(st.booleans()) else 1 for n in axes)
        return kept[draw(st.integers(0, len(axes))) :]

    def token(heads, n, width):
        lead = batch if draw(st.booleans()) else some(*batch)
        shape = (*lead, heads, n, width) if layout == "hnd" else (*lead, n, heads, width)
        return rng.standard_normal(shape)

    query, key, value = token(keys * group, n_q, d), token(keys, n_k, d), token(keys, n_k, d_v)
    batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    pairs = (*batch, keys * group, n_q, n_k)
    kwargs = {
        "layout": layout,
        "query_chunk_size": draw(chunk),
        "key_chunk_size": draw(chunk),
        "scale": draw(st.sampled_from([None, 0.5])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "key_offset": draw(st.integers(-5, 5)),
        "implementation": draw(st.sampled_from(["chunked", "chunked", "standard"])),
    }
    if draw(st.booleans()):
        kwargs["mask"] = np.asarray(rng.random(some(*pairs)) < draw(st.sampled_from([0.2, 0.8])))
    if draw(st.booleans()):
        kwargs["bias"] = np.asarray(rng.standard_normal(some(*pairs)))
    if draw(st.booleans()):
        by_batch = batch and draw(st.booleans())
        offset = rng.integers(-9, 40, some(*batch) if by_batch else ())
        kwargs |= {"causal": True, "query_offset": np.asarray(offset) if by_batch else int(offset)}
    return query, key, value, kwargs


@pytest.mark.feature("any mixture of these")
@settings(max_examples=70)
@given(call=calls())
def test_any_call(check, call):
    query, key, value, kwargs = call
    check(query, key, value, **kwargs)


@st.composite
def masked_calls(draw):
    """Return tokens, keywords, masks by name with their data, and the pairs that they allow."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    n_q, n_k = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    q, k, v = (rng.standard_normal((batch, heads, n, 3)) for n in (n_q, n_k, n_k))
    query_offset = rng.integers(-20, 40, batch) if draw(st.booleans()) else draw(st.integers(-9, 9))
    key_offset = draw(st.integers(-5, 5))
    kwargs = {
        "query_chunk_size": draw(chunk),
        "key_chunk_size": draw(chunk),
        "query_offset": query_offset,
        "key_offset": key_offset,
    }
    if draw(st.booleans()):
        kwargs["sinks"] = rng.standard_normal(heads)
    i, j = np.arange(n_q)[:, None], np.arange(n_k)
    position = j + key_offset
    distance = position - i - np.asarray(query_offset)[..., None, None, None]
    allowed = np.ones((batch, 1, n_q, n_k), dtype=bool)
    chosen = []
    for kind in draw(st.lists(st.sampled_from(["window", "lengths", "segments"]), max_size=3)):
        if kind == "window":
            left, right = (draw(st.one_of(st.none(), st.integers(0, 12))) for _ in range(2))
            chosen.append((lambda left=left, right=right: masks.Window(left, right), []))
            allowed &= (left is None) | (distance >= -(left or 0))
            allowed &= (right is None) | (distance <= (right or 0))
        elif kind == "lengths":
            data = [rng.integers(-2, n + 3, batch) for n in (n_q, n_k)]
            chosen.append((masks.Lengths, data))
            queries, keys = (x[:, None, None, None] for x in data)
            allowed &= (i < queries) & (position < keys)
        else:
            data = [rng.integers(0, 4, (batch, n)) for n in (n_q, n_k)]
            data = [np.sort(x) for x in data] if draw(st.booleans()) else data
            chosen.append((masks.Segments, data))
            allowed &= data[0][:, None, :, None] == data[1][:, None, None, :]
    return (q, k, v), kwargs, chosen, allowed


def check_masks(check, call):
    tokens, kwargs, chosen, allowed = call
    data = [[check.lib.asarray(x) for x in held] for _, held in chosen]

    def function(query, key, value, *, data, **kwargs):
        mask = tuple(make(*x) for (make, _), x in zip(chosen, data, strict=True))
        return attention(query, key, value, mask=mask, **kwargs)

    check(*tokens, function=function, data=data, known={"mask": allowed}, **kwargs)


@pytest.mark.feature("any mixture of these")
@settings(max_examples=40)
@given(call=masked_calls())
def test_any_masks(check, call):
    check_masks(check, call)


@pytest.mark.slow
@settings(settings.get_profile("long"))
@given(call=calls())
def test_any_call_at_length(check, call):
    query, key, value, kwargs = call
    check(query, key, value, **kwargs)


@pytest.mark.slow
@settings(settings.get_profile("long"))
@given(call=masked_calls())
def test_any_masks_at_length(check, call):
    check_masks(check, call)
