"""Under the transformations of JAX and PyTorch: offsets, lengths and ids are data there."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from chunkattn import attention, masks

N = 29


@pytest.fixture
def tokens(rng):
    """Return three examples of query, key and value: (3, batch, h, n, d)."""
    shapes = [(3, 2, 4, N, 8), (3, 2, 2, N, 8), (3, 2, 2, N, 5)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def masked(q, k, v, lengths, ids, offset):
    mask = (masks.Lengths(key=lengths), masks.Segments(ids), masks.Window(9, 3))
    return attention(q, k, v, mask=mask, query_offset=offset, query_chunk_size=8, key_chunk_size=8)


def data(rng):
    return (
        rng.integers(0, N, (3, 2)),
        np.sort(rng.integers(0, 3, (3, 2, N))),
        rng.integers(-3, 3, (3, 2)),
    )


def test_jax_vmap(rng, tokens):
    """Mapped masks and offsets give what one example at a time gives; jit changes nothing."""
    import jax

    arrays = [jax.numpy.asarray(x) for x in (*tokens, *data(rng))]
    mapped = jax.vmap(masked)(*arrays)
    one_by_one = np.stack([masked(*(x[i] for x in arrays)) for i in range(3)])
    np.testing.assert_allclose(mapped, one_by_one, atol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(masked))(*arrays), one_by_one, atol=1e-6)


def test_jax_vmap_of_boolean_masks(tokens):
    """Each example skips what no example sees, and loops with the bounds of all."""
    import jax

    allowed = jax.numpy.asarray([np.tri(N, N, i, dtype=bool) for i in (0, 5, -9)])

    def one(q, k, v, mask):
        return attention(q, k, v, mask=mask, query_chunk_size=4, key_chunk_size=4)

    arrays = [jax.numpy.asarray(x) for x in tokens]
    mapped = jax.vmap(one)(*arrays, allowed)
    one_by_one = np.stack([one(*(x[i] for x in arrays), allowed[i]) for i in range(3)])
    np.testing.assert_allclose(mapped, one_by_one, atol=1e-6)
    shared = jax.vmap(one, (0, 0, 0, None))(*arrays, allowed[1])
    np.testing.assert_allclose(shared[1], one_by_one[1], atol=1e-6)


def test_jax_vmap_in_part(rng, tokens):
    """Only what is mapped is: shared keys, one mapped offset."""
    import jax

    q, k, v = (jax.numpy.asarray(x) for x in tokens)
    offsets = jax.numpy.asarray([0, 5, -4])

    def one(q, offset):
        return attention(q, k[0], v[0], causal=True, query_offset=offset, key_chunk_size=8)

    expected = np.stack([one(q[i], int(offsets[i])) for i in range(3)])
    np.testing.assert_allclose(jax.vmap(one)(q, offsets), expected, atol=1e-6)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (2, 0, None)])
def test_jax_vmap_with_limited_memory(rng, axes):
    """The limit is that of one entry, and the entries come one after the other."""
    jax = pytest.importorskip("jax")
    shape, entries = [2, 256, 16], 64

    def token(axis):
        mapped = shape if axis is None else [*shape[:axis], entries, *shape[axis:]]
        return jax.numpy.asarray(rng.standard_normal(mapped), "float32")

    arrays = list(map(token, axes))

    def mapped(limit):
        return jax.jit(jax.vmap(partial(attention, causal=True, memory_limit=limit), axes))

    def gradients(limit):
        call = partial(attention, causal=True, memory_limit=limit)
        return jax.vmap(jax.grad(lambda *x: call(*x).sum(), argnums=(0, 1, 2)), axes)(*arrays)

    for x, y in zip(gradients("500kB"), gradients(None), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    limited, free = (mapped(limit) for limit in ("200kB", None))
    np.testing.assert_allclose(limited(*arrays), free(*arrays), atol=1e-6)
    held = limited.lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    of_entry = 3 * 4 * 2 * 256 * 16  # slices of query, key and value
    assert held <= 200_000 + of_entry


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_jax_vmap_of_hidden_values(tokens, bad):
    """What stands behind a mask in one example reaches neither it nor the others."""
    import jax

    q, k, v = tokens
    dirty = v.copy()
    dirty[1, :, :, 20:] = bad

    def one(q, k, v, length):
        return attention(q, k, v, mask=masks.Lengths(key=length), key_chunk_size=8)

    lengths = np.asarray([N, 20, 7])
    clean = jax.vmap(one)(*map(jax.numpy.asarray, (q, k, v, lengths)))
    np.testing.assert_array_equal(
        jax.vmap(one)(*map(jax.numpy.asarray, (q, k, dirty, lengths))), clean
    )


def test_jax_scan(tokens):
    """A decoding loop: one compiled step, whose offset counts on."""
    import jax

    q, k, v = (jax.numpy.asarray(x[0]) for x in tokens)

    def step(position, row):
        out = attention(row, k, v, causal=True, query_offset=position, key_chunk_size=8)
        return position + 1, out[..., 0, :]

    rows = jax.numpy.moveaxis(q, 2, 0)[..., None, :]
    _, out = jax.lax.scan(step, 0, rows)
    expected = attention(q, k, v, causal=True)
    np.testing.assert_allclose(jax.numpy.moveaxis(out, 0, 2), expected, atol=1e-6)


def test_torch_compile(rng, tokens):
    """PyTorch's compiler takes a call with masks of data, in one graph."""
    import torch

    arrays = [torch.asarray(x[0]) for x in (*tokens, *data(rng))]
    compiled = torch.compile(masked, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arrays), masked(*arrays), atol=0, rtol=0)


def test_torch_inference_mode(tokens):
    import torch

    q, k, v = (torch.asarray(x) for x in tokens)
    with torch.inference_mode():
        out = attention(q, k, v, causal=True)
    torch.testing.assert_close(out, attention(q, k, v, causal=True))
