"""`flax_attention_fn` in flax's modules, against flax's own `dot_product_attention`."""

from __future__ import annotations

import numpy as np
import pytest
from drop_ins import floats

from chunkattn.interop import flax_attention_fn

jax = pytest.importorskip("jax")
flax = pytest.importorskip("flax")
jnp = jax.numpy


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def masks():
    seen = jnp.asarray([[1] * 9, [1] * 5 + [0] * 4])
    return {
        "none": None,
        "padding": flax.linen.make_attention_mask(seen, seen * 0 + 1),  # of floats
        "causal": flax.linen.make_causal_mask(seen, dtype=bool),
        "keys": (seen > 0)[:, None, None, :],
    }


def linen_module(attention_fn, **keywords):
    """Return a function of input, mask and key of linen's layer, and its parameters."""
    layer = flax.linen.MultiHeadDotProductAttention(
        num_heads=4,
        attention_fn=attention_fn,
        param_dtype="float64",
        deterministic=keywords.get("dropout_rate") is None,
        **keywords,
    )
    x = jnp.asarray(floats(2, 9, 16))
    parameters = layer.init(jax.random.key(0), x)

    def run(parameters, x, mask, key=None):
        return layer.apply(parameters, x, mask=mask, rngs=None if key is None else {"dropout": key})

    return run, parameters


def nnx_module(attention_fn, **keywords):
    """Return the same of nnx's layer."""
    from flax import nnx

    layer = nnx.MultiHeadAttention(
        num_heads=4,
        in_features=16,
        attention_fn=attention_fn,
        param_dtype="float64",
        deterministic=keywords.get("dropout_rate") is None,
        decode=False,
        keep_rngs=False,
        rngs=nnx.Rngs(0),
        **keywords,
    )
    graph, parameters = nnx.split(layer)

    def run(parameters, x, mask, key=None):
        rngs = None if key is None else nnx.Rngs(key)
        return nnx.merge(graph, parameters)(x, mask=mask, rngs=rngs)

    return run, parameters


MODULES = pytest.mark.parametrize("module", [linen_module, nnx_module])


def own(module):
    from flax import nnx

    library = flax.linen if module is linen_module else nnx
    return library.dot_product_attention


def close(ours, theirs):
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)  # flax's softmax is in float32


@MODULES
@pytest.mark.parametrize("mask", ["none", "padding", "causal", "keys"])
def test_modules(module, mask):
    """Result and gradients by the parameters; also compiled."""
    x = jnp.asarray(floats(2, 9, 16))
    mask = masks()[mask]
    seen = (jnp.arange(9) < jnp.asarray([[9], [5]]))[..., None]

    def answer(attention_fn):
        run, parameters = module(attention_fn)

        def loss(parameters):
            out = run(parameters, x, mask) * seen
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)

    close(answer(flax_attention_fn), answer(own(module)))


def test_arguments():
    """A bias, fewer heads of the keys, batch axes, is_causal, and a dtype to compute in."""
    from flax import nnx

    q, k, v = (jnp.asarray(floats(2, 3, n, h, 8)) for n, h in ((5, 4), (9, 4), (9, 4)))
    bias = jnp.asarray(floats(2, 3, 4, 5, 9))
    theirs = nnx.dot_product_attention
    close(flax_attention_fn(q, k, v, bias), theirs(q, k, v, bias))
    few = k[0, :, :, :2, :], v[0, :, :, :2, :]
    close(
        flax_attention_fn(q[0], *few, is_causal=True, deterministic=True, dropout_rate=0.5),
        theirs(q[0], *few, is_causal=True),
    )
    half = flax_attention_fn(q, k, v, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype("float64"), theirs(q, k, v), atol=0.05)
    assert flax_attention_fn(q.astype("float32"), k, v).dtype == jnp.float64
    hidden = jnp.zeros((5, 9)).at[0].set(1)
    assert not flax_attention_fn(q, k, v, mask=hidden)[:, :, 1:].any()


@MODULES
def test_dropout(module):
    """The key decides; each weight is dropped by itself."""
    run, parameters = module(flax_attention_fn, dropout_rate=0.5)
    x = jnp.asarray(floats(2, 9, 16))
    first, again, other = (run(parameters, x, None, jax.random.key(i)) for i in (1, 1, 2))
    assert jnp.array_equal(first, again)
    assert not jnp.allclose(first, other)
    assert not jnp.allclose(first, module(flax_attention_fn)[0](parameters, x, None))
    q = jnp.zeros((2, 40, 3, 8))
    eye = jnp.broadcast_to(jnp.eye(40)[:, None], (2, 40, 3, 40))  # the weights themselves
    kept = flax_attention_fn(q, q, eye, dropout_rate=0.25, dropout_rng=jax.random.key(0)) * 40
    np.testing.assert_allclose(np.unique(kept), [0, 1 / 0.75], rtol=1e-6)
    assert abs(kept.mean() - 1) < 0.03
    assert not jnp.array_equal(kept[:, :, 0], kept[:, :, 1])


def test_refused():
    q = jnp.asarray(floats(5, 2, 8))
    with pytest.raises(NotImplementedError, match="sow_weights must be False"):
        flax_attention_fn(q, q, q, module=object())
    with pytest.raises(ValueError, match="dropout_rng must be given where dropout_rate"):
        flax_attention_fn(q, q, q, dropout_rate=0.5)
