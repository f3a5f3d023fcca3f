"""The forward pass on every library, feature by feature, against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest

from chunkattn import attention

COMPILED_QUICKLY = True

CHUNKS = [(None, None), (7, 11), (16, 8), (1, 3), (1000, 1000)]


def tokens(rng, q_shape=(2, 4, 19, 8), k_shape=(2, 2, 29, 8), d_v=5):
    """Return query, key and value; 19 and 29 are divided by no chunk size of `CHUNKS` but 1."""
    v_shape = (*k_shape[:-1], d_v)
    return tuple(rng.standard_normal(shape) for shape in (q_shape, k_shape, v_shape))


@pytest.fixture(params=["chunked", "standard"])
def implementation(request):
    return request.param


@pytest.mark.feature("chunk sizes of any size")
@pytest.mark.parametrize(("rows", "cols"), CHUNKS)
def test_chunk_sizes(check, rng, rows, cols):
    check(*tokens(rng), query_chunk_size=rows, key_chunk_size=cols)


@pytest.mark.parametrize("sizes", [(0.1, 30, 0.1, 3), (30, 0.1, 300, 1), (-80, 0.1, -80, -1)])
def test_small_scores_and_large_ones(check, rng, sizes):
    """Chunk by chunk, and small for every other query: libraries may take 0 as their maximum."""
    q = np.abs(rng.standard_normal((2, 7, 8)))
    q[:, ::2] *= 0.01
    k = np.concatenate([x * np.abs(rng.standard_normal((2, 5, 8))) for x in sizes], axis=-2)
    v = rng.standard_normal(k.shape)
    mask = rng.random((7, 20)) < 0.5
    for kwargs in ({}, {"mask": mask}, {"sinks": np.asarray([25.0, -25.0])}):
        check(q, k, v, key_chunk_size=5, **kwargs)
        check(q, k[:, :5], v[:, :5], **kwargs | ({"mask": mask[:, :5]} if "mask" in kwargs else {}))


def test_calls_alike(lib, rng):
    """A call is checked although one of equal numbers was: 1 is not True."""
    q, k, v = (lib.asarray(x) for x in tokens(rng, (2, 5, 4), (2, 5, 4)))
    for _ in range(2):
        lib.call(attention, q, k, v, causal=True, query_chunk_size=1)
        for name, value in {"causal": 1, "query_chunk_size": True}.items():
            with pytest.raises(TypeError, match=name):
                lib.call(
                    attention, q, k, v, **({"causal": True, "query_chunk_size": 1} | {name: value})
                )
        with pytest.raises(ValueError, match="key and value"):
            lib.call(attention, q, k, v[:, :4, :], causal=True, query_chunk_size=1)


@pytest.mark.feature("dtypes")
def test_dtypes(lib, check, rng, implementation):
    for dtype in lib.dtypes:
        check(*tokens(rng), dtype=dtype, implementation=implementation, key_chunk_size=8)


@pytest.mark.feature("compute_dtype")
def test_compute_dtype(lib, check, rng):
    for dtype in lib.dtypes:
        check(*tokens(rng), dtype=dtype, compute_dtype="float64", key_chunk_size=8)
    q, k, v = (lib.asarray(x) for x in tokens(rng))
    for name in ("float32", "float64"):
        wanted = lib.dtype(name)
        _, lse = lib.call(attention, q, k, v, compute_dtype=wanted, return_lse=True)
        assert lse.dtype == wanted


@pytest.mark.feature("2-d inputs, without heads")
def test_headless(check, rng, implementation):
    q, k, v = tokens(rng, (19, 8), (29, 8))
    mask, bias = rng.random((19, 29)) < 0.5, rng.standard_normal((1, 29))
    for layout in ("hnd", "nhd"):
        check(q, k, v, layout=layout, implementation=implementation, query_chunk_size=4)
    check(q, k, v, mask=mask, bias=bias, implementation=implementation, key_chunk_size=4)


@pytest.mark.feature("any number of batch axes")
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 3)])
def test_batch_axes(check, rng, implementation, batch):
    q, k, v = tokens(rng, (*batch, 2, 9, 4), (*batch, 2, 7, 4))
    check(q, k, v, implementation=implementation, query_chunk_size=4, key_chunk_size=4)


@pytest.mark.feature("batch broadcasting")
@pytest.mark.parametrize(
    ("q_batch", "k_batch", "v_batch"),
    [
        ((2, 1), (1, 3), (2, 3)),
        ((3,), (), ()),
        ((), (3,), (1,)),
        ((), (1,), (3,)),
        ((2, 3), (3,), (2, 1)),
    ],
)
def test_batch_broadcasting(check, rng, implementation, q_batch, k_batch, v_batch):
    q = rng.standard_normal((*q_batch, 4, 9, 6))
    k = rng.standard_normal((*k_batch, 2, 11, 6))
    v = rng.standard_normal((*v_batch, 2, 11, 3))
    batch = np.broadcast_shapes(q_batch, k_batch, v_batch)
    mask, bias = rng.random((4, 1, 11)) < 0.6, rng.standard_normal((*batch, 4, 1, 11))
    check(q, k, v, implementation=implementation, key_chunk_size=4)
    check(q, k, v, implementation=implementation, key_chunk_size=4, mask=mask, bias=bias)


@pytest.mark.feature("layout (…, n, h, d)")
def test_layout(check, rng, implementation):
    q, k, v = (np.swapaxes(x, -2, -3) for x in tokens(rng))
    mask = rng.random((2, 4, 19, 29)) < 0.5
    check(q, k, v, layout="nhd", implementation=implementation, query_chunk_size=8)
    check(q, k, v, layout="nhd", implementation=implementation, mask=mask, key_chunk_size=8)


@pytest.mark.feature("GQA and MQA")
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 6), (6, 3), (6, 2), (6, 1)])
def test_grouped_heads(check, rng, implementation, heads, key_heads):
    q, k, v = tokens(rng, (2, heads, 19, 8), (2, key_heads, 29, 8))
    bias = rng.standard_normal((heads, 19, 29))
    check(q, k, v, implementation=implementation, query_chunk_size=8, key_chunk_size=8)
    check(
        q,
        k,
        v,
        implementation=implementation,
        query_chunk_size=8,
        bias=bias,
        causal=True,
        query_offset=10,
    )


@pytest.mark.feature("d_v other than d")
@pytest.mark.parametrize("d_v", [0, 1, 8, 33])
def test_value_width(check, rng, implementation, d_v):
    check(*tokens(rng, d_v=d_v), implementation=implementation, key_chunk_size=8)


@pytest.mark.feature("axes of length 0")
@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((2, 4, 0, 8), (2, 2, 9, 8)),
        ((2, 4, 5, 8), (2, 2, 0, 8)),
        ((0, 4, 5, 8), (0, 2, 9, 8)),
        ((0, 4, 5, 8), (1, 2, 9, 8)),
        ((2, 4, 5, 0), (2, 2, 9, 0)),
        ((0, 8), (9, 8)),
        ((5, 8), (0, 8)),
    ],
)
def test_empty_axes(check, rng, implementation, q_shape, k_shape):
    q, k, v = tokens(rng, q_shape, k_shape)
    check(q, k, v, implementation=implementation)
    check(q, k, v, implementation=implementation, causal=True, query_offset=2)


@pytest.mark.feature("scale")
def test_scale(lib, check, rng, implementation):
    q, k, v = tokens(rng)
    for scale in (0.0, 0.3, -1.5, 2):
        check(q, k, v, scale=scale, implementation=implementation, key_chunk_size=8)
    check(q, k, v, scale=np.asarray(0.7), implementation=implementation, key_chunk_size=8)
    check(q, k, v, scale=np.asarray(2), implementation=implementation, key_chunk_size=8)


@pytest.mark.feature("softcap")
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(check, rng, implementation, softcap):
    q, k, v = tokens(rng)
    check(4 * q, k, v, softcap=softcap, implementation=implementation, key_chunk_size=8)
    check(4 * q, k, v, softcap=softcap, bias=rng.standard_normal((19, 29)), key_chunk_size=8)


@pytest.mark.feature("causal, with offsets")
@pytest.mark.parametrize("offset", [0, 10, -7, -100, 100])
def test_causal(check, rng, implementation, offset):
    q, k, v = tokens(rng)
    check(
        q,
        k,
        v,
        causal=True,
        query_offset=offset,
        implementation=implementation,
        query_chunk_size=4,
        key_chunk_size=4,
    )
    check(
        q,
        k,
        v,
        causal=True,
        query_offset=offset + 5,
        key_offset=5,
        query_chunk_size=8,
        key_chunk_size=8,
    )


@pytest.mark.feature("causal, square")
@pytest.mark.parametrize(("rows", "cols"), CHUNKS)
def test_causal_square(check, rng, implementation, rows, cols):
    q, k, v = tokens(rng, (2, 4, 29, 8))
    check(
        q,
        k,
        v,
        causal=True,
        query_chunk_size=rows,
        key_chunk_size=cols,
        implementation=implementation,
    )


@pytest.mark.feature("query_offset by batch entry")
@pytest.mark.parametrize("shape", [(2,), (1,), (3, 2), (3, 1), ()])
def test_offset_by_batch(check, rng, implementation, shape):
    q, k, v = tokens(rng, (3, 2, 4, 9, 8), (3, 2, 2, 29, 8))
    offset = rng.integers(-9, 29, shape)
    check(
        q,
        k,
        v,
        causal=True,
        query_offset=np.asarray(offset),
        implementation=implementation,
        query_chunk_size=4,
        key_chunk_size=8,
    )


@pytest.mark.feature("mask array, of every broadcast shape")
@pytest.mark.parametrize(
    "shape", [(), (1,), (29,), (19, 1), (19, 29), (4, 1, 29), (2, 1, 1, 29), (2, 4, 19, 29)]
)
def test_mask(check, rng, implementation, shape):
    q, k, v = tokens(rng)
    mask = np.asarray(rng.random(shape) < 0.6)
    check(q, k, v, mask=mask, implementation=implementation, query_chunk_size=8, key_chunk_size=4)
    check(
        q,
        k,
        v,
        mask=mask,
        causal=True,
        query_offset=10,
        implementation=implementation,
        query_chunk_size=8,
        key_chunk_size=4,
    )


@pytest.mark.feature("bias array, of every broadcast shape")
@pytest.mark.parametrize(
    "shape", [(), (1,), (29,), (19, 1), (19, 29), (4, 1, 29), (2, 1, 1, 29), (2, 4, 19, 29)]
)
def test_bias(check, rng, implementation, shape):
    q, k, v = tokens(rng)
    bias = np.asarray(rng.standard_normal(shape))
    check(q, k, v, bias=bias, implementation=implementation, query_chunk_size=8, key_chunk_size=4)


@pytest.mark.feature("bias of another dtype")
def test_bias_dtype(lib, rng):
    q, k, v = (lib.asarray(x) for x in tokens(rng))
    for dtype in lib.dtypes:
        bias = lib.asarray(rng.standard_normal((19, 29)), dtype)
        own = lib.call(attention, q, k, v, bias=bias, key_chunk_size=8)
        wide = lib.asarray(lib.numpy(bias), "float64")
        other = lib.call(attention, q, k, v, bias=wide, key_chunk_size=8)
        np.testing.assert_allclose(
            lib.numpy(own), lib.numpy(other), rtol=0, atol=4 * lib.eps(lib.default)
        )


@pytest.mark.feature("non-contiguous, reversed and broadcast inputs")
def test_strides(lib, check, rng):
    q, k, v = (lib.asarray(x) for x in tokens(rng, (2, 4, 38, 16), (2, 2, 58, 16)))
    dense = [lib.numpy(x)[..., ::2, ::2].copy() for x in (q, k, v)]
    answer = oracle.attend(*dense)

    def compare(*tokens):
        out, lse = lib.call(attention, *tokens, key_chunk_size=8, return_lse=True)
        check.compare(answer, out, lse, lib.default, lib.compute)

    compare(*(x[..., ::2, ::2] for x in (q, k, v)))
    if lib.name not in ("torch", "torch-cuda"):  # torch has no negative strides
        compare(*(lib.asarray(x[..., ::-1].copy())[..., ::-1] for x in dense))
    dense[1][...] = dense[1][:1, :1, :1]
    one = lib.asarray(dense[1][:1, :1, :1])
    answer = oracle.attend(*dense)
    compare(lib.asarray(dense[0]), lib.xp.broadcast_to(one, dense[1].shape), lib.asarray(dense[2]))


@pytest.mark.feature("inputs left as they were")
def test_inputs_untouched(lib, rng):
    arrays = [lib.asarray(x) for x in tokens(rng)]
    bias, mask = lib.asarray(rng.standard_normal((19, 29))), lib.asarray(rng.random((19, 29)) < 0.5)
    before = [lib.numpy(x).copy() for x in (*arrays, bias, mask)]
    for implementation in ("chunked", "standard"):
        lib.call(
            attention, *arrays, bias=bias, mask=mask, softcap=3.0, implementation=implementation
        )
    for x, y in zip((*arrays, bias, mask), before, strict=True):
        np.testing.assert_array_equal(lib.numpy(x), y)


def test_results_do_not_depend_on_the_run(lib, rng):
    arrays = [lib.asarray(x) for x in tokens(rng, (4, 99, 8), (2, 77, 8))]
    first, *others = (
        lib.numpy(lib.call(attention, *arrays, query_chunk_size=9, key_chunk_size=8))
        for _ in range(4)
    )
    for other in others:
        np.testing.assert_array_equal(first, other)
