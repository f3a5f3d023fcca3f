"""Keras' layer on chunkattn against its own: run by test_keras.py, with KERAS_BACKEND set."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest

from chunkattn.interop import keras_multi_head_attention

BACKEND = keras.config.backend()
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((2, 9, 12)), RNG.standard_normal((2, 7, 12))
SEEN = np.asarray([[True] * 7, [True] * 4 + [False] * 3])
PAIRS = RNG.random((2, 9, 7)) < 0.6
PAIRS[..., 0] = True
SIZES = {"num_heads": 3, "key_dim": 5}
CALLS = {
    "plain": {},
    "causal": {"use_causal_mask": True},
    "attention mask": {"attention_mask": PAIRS},
    "padding": {"value_mask": SEEN},
    "all masks": {"use_causal_mask": True, "attention_mask": PAIRS, "value_mask": SEEN},
}


def layers(**keywords):
    """Return this library's layer and Keras' own, of the same weights."""
    own = keras_multi_head_attention()(**SIZES, **keywords)
    theirs = keras.layers.MultiHeadAttention(**SIZES, **keywords)
    for layer in (own, theirs):
        layer.build(X.shape, Y.shape)
    own.set_weights([0.4 * RNG.standard_normal(x.shape) for x in theirs.get_weights()])
    theirs.set_weights(own.get_weights())
    return own, theirs


def close(ours, theirs, error=1e-5):
    ours, theirs = map(keras.ops.convert_to_numpy, (ours, theirs))
    assert ours.dtype == theirs.dtype
    error *= max(1.0, np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=error)


def gradients(layer, x, y, keywords):
    """Return the gradients of a sum of sines by all weights."""
    if BACKEND == "torch":
        loss = keras.ops.sum(keras.ops.sin(layer(x, y, training=True, **keywords)))
        layer.zero_grad()
        loss.backward()
        return [variable.value.grad for variable in layer.trainable_variables]
    import jax

    fixed = [variable.value for variable in layer.non_trainable_variables]

    def loss(weights):
        out, _ = layer.stateless_call(weights, fixed, x, y, training=True, **keywords)
        return keras.ops.sum(keras.ops.sin(out))

    return jax.jit(jax.grad(loss))([variable.value for variable in layer.trainable_variables])


def compare():
    """Results and gradients by every kind of mask."""
    x, y = map(keras.ops.convert_to_tensor, (X, Y))
    own, theirs = layers()
    for name, given in CALLS.items():
        keywords = {
            key: keras.ops.convert_to_tensor(m) if m is not True else m for key, m in given.items()
        }
        for training in (False, True):
            close(
                own(x, y, training=training, **keywords),
                theirs(x, y, training=training, **keywords),
            )
        if BACKEND != "numpy" and name == "all masks":
            pairs = zip(*(gradients(one, x, y, keywords) for one in (own, theirs)), strict=True)
            for ours, other in pairs:
                close(ours, other)
    own, theirs = layers(sliding_window=3, use_gate=True)
    close(own(x, x), theirs(x, x))


def drop():
    """The dropout acts in training alone, and follows the layer's seed."""
    first, again, other = (
        keras_multi_head_attention()(**SIZES, dropout=0.5, seed=seed) for seed in (1, 1, 2)
    )
    x = keras.ops.convert_to_tensor(X)
    outs = []
    for layer in (first, again, other):
        layer.build(X.shape, X.shape)
        layer.set_weights(
            [np.ones(w.shape) if w.dtype.kind == "f" else w for w in layer.get_weights()]
        )
        outs.append(keras.ops.convert_to_numpy(layer(x, x, training=True)))
    close(outs[0], outs[1])
    assert not np.allclose(outs[0], outs[2])
    close(first(x, x), other(x, x))
    assert not np.allclose(outs[0], keras.ops.convert_to_numpy(first(x, x, training=True)))


def model():
    """In a model, which is saved and read again, with the masks of its inputs."""
    ids = keras.Input((9,), dtype="int32")
    x = keras.layers.Embedding(20, 12, mask_zero=True)(ids)
    layer = keras_multi_head_attention()(num_heads=2, key_dim=6)
    whole = keras.Model(ids, layer(x, x, use_causal_mask=True))
    config = whole.get_config()
    same = keras.Model.from_config(config)
    same.set_weights(whole.get_weights())
    given = RNG.integers(0, 20, (2, 9))
    close(whole.predict(given, verbose=0), same.predict(given, verbose=0))
    assert isinstance(same.layers[-1], keras_multi_head_attention())


def call_within_a_call():
    """As of two threads: what one asks for is not the other's."""
    own, theirs = layers()
    attend = own._compute_attention
    inner = []

    def nested(*args, **keywords):
        if not inner:
            inner.append(None)
            inner[0] = own(X, Y)
        return attend(*args, **keywords)

    own._compute_attention = nested
    close(own(X, Y, use_causal_mask=True), theirs(X, Y, use_causal_mask=True))
    close(inner[0], theirs(X, Y))


def refuse():
    own, _ = layers()
    with pytest.raises(NotImplementedError, match="return_attention_scores must be False"):
        own(X, Y, return_attention_scores=True)
    keras.config.backend = lambda: "tensorflow"
    with pytest.raises(NotImplementedError, match="must be torch, jax or numpy; got tensorflow"):
        keras_multi_head_attention.__wrapped__()


if __name__ == "__main__":
    for step in (compare, drop, model, call_within_a_call, refuse):
        step()
    sys.exit()
