"""Shapes, chunk sizes, layouts, masks and offsets of any kind, driven by Hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
@settings(max_examples=100)
@given(call=calls())
def test_any_call(check, call):
    query, key, value, kwargs = call
    check(query, key, value, **kwargs)


@pytest.mark.slow
@settings(settings.get_profile("long"))
@given(call=calls())
def test_any_call_at_length(check, call):
    query, key, value, kwargs = call
    check(query, key, value, **kwargs)
