"""`jax.export`, donated arguments, and numbers that are static or traced."""

from __future__ import annotations

import numpy as np
import pytest

from chunkattn import attention, masks

jax = pytest.importorskip("jax")
jnp = jax.numpy
export = pytest.importorskip("jax.export")

CHUNKS = {"query_chunk_size": 8, "key_chunk_size": 8}
SHAPES = [(2, 4, 20, 6), (2, 2, 20, 6), (2, 2, 20, 5)]


@pytest.fixture(autouse=True)
def numbers_of_32_bits():
    """JAX's default, which other modules change."""
    with jax.enable_x64(False):
        yield


@pytest.fixture
def tokens(rng):
    return [jnp.asarray(rng.standard_normal(shape), "float32") for shape in SHAPES]


def causal(q, k, v):
    return attention(q, k, v, causal=True, **CHUNKS)


def masked(q, k, v):
    mask = (masks.Lengths(key=jnp.asarray([20, 7])), lambda b, h, i, j: (i + j) % 3 > 0)
    return attention(q, k, v, mask=mask, **CHUNKS)


def dropped(q, k, v):
    return attention(q, k, v, dropout=0.3, dropout_seed=1)


def again(function, types, vjp_order=0):
    """Return the function from the bytes that it was exported to."""
    pytest.importorskip("flatbuffers")
    exported = export.export(jax.jit(function))(*types)
    return export.deserialize(exported.serialize(vjp_order=vjp_order)).call


def close(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("function", [causal, masked, dropped])
def test_export(function, tokens):
    """The result and the gradients, from the types of the arguments alone."""
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in tokens]

    def answer(function):
        def loss(*x):
            out = function(*x)
            return jnp.sin(out).sum(), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*tokens)

    close(answer(again(function, types, vjp_order=1)), answer(function))


def symbolic(*shapes):
    scope = export.SymbolicScope()
    shapes = (export.symbolic_shape(shape, scope=scope) for shape in shapes)
    return [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]


def test_export_with_a_symbolic_batch(tokens):
    """By vmap around the call."""
    types = symbolic("b, 4, 20, 6", "b, 2, 20, 6", "b, 2, 20, 5")
    run = again(jax.vmap(causal), types)
    for n in (1, 2):
        close(run(*(x[:n] for x in tokens)), causal(*(x[:n] for x in tokens)))


@pytest.mark.parametrize("shape", ["b, 4, 20, 6", "2, h, 20, 6", "2, 4, n, 6"])
def test_symbolic_shapes_are_refused(shape, tokens):
    (query,) = symbolic(shape)
    with pytest.raises(ValueError, match=r"query must have axes of known length; got shape .*vmap"):
        export.export(jax.jit(causal))(query, *tokens[1:])


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_arguments(tokens):
    expected = causal(*tokens)
    q, k, v = map(jnp.array, tokens)
    close(jax.jit(causal, donate_argnums=(0, 1, 2))(q, k, v), expected)
    if v.is_deleted() or q.is_deleted():  # what CPUs do depends on the version
        with pytest.raises(RuntimeError, match="deleted"):
            causal(q, k, v)


WAYS = {"scale": 0.5, "query_offset": 3, "key_offset": 1, "dropout_seed": 7}


@pytest.mark.parametrize("name", WAYS)
def test_numbers_of_any_kind(name, tokens):
    """Python's, NumPy's, JAX's, and traced ones."""
    number = WAYS[name]
    fixed = {"causal": True, "query_offset": 2}
    if name == "dropout_seed":
        fixed = {"dropout": 0.2}
    kind = np.float64 if name == "scale" else np.uint8

    def call(number):
        return attention(*tokens, **(fixed | {name: number}))

    expected = call(number)
    for one in (kind(number), jnp.asarray(number)):
        close(call(one), expected)
    for one in (number, kind(number)):
        close(jax.jit(call)(one), expected)


@pytest.mark.parametrize(
    ("name", "number", "told"),
    [
        ("softcap", 2.0, "softcap must be a number; got .*Tracer"),
        ("dropout", 0.5, "dropout must be a number; got .*Tracer"),
        ("scale", True, "scale must be a number or an array of one, without axes; got bool"),
        ("query_offset", 1.0, "query_offset must be an int or an integer array .*float32"),
        ("key_offset", 1.0, "key_offset must be an int"),
        ("dropout_seed", 1.0, "dropout_seed must be an int"),
    ],
)
def test_traced_numbers_that_are_refused(name, number, told, tokens):
    """A softcap is part of what is compiled; other numbers have their kinds."""
    fixed = {"dropout": 0.5, "dropout_seed": 1}

    def call(number):
        return attention(*tokens, **(fixed | {name: number}))

    with pytest.raises(TypeError, match=told):
        jax.jit(call)(number)
    if name in ("softcap", "dropout"):
        close(call(jnp.asarray(number)), call(number))
