"""A multi-head attention layer of equinox whose attention is chunkattn's.

It takes the place of `equinox.nn.MultiheadAttention`, whose weights it holds.
"""

from __future__ import annotations

import sys

import equinox as eqx
import jax
import jax.numpy as jnp

from chunkattn import attention


class MultiheadAttention(eqx.Module):
    """`equinox.nn.MultiheadAttention` without the array of all weights."""

    own: eqx.nn.MultiheadAttention

    def __call__(self, query, key, value, mask=None, *, causal=False):
        """Return the attention of (n_q, width) to (n_k, width); `mask` as `chunkattn` takes it."""
        layer = self.own
        q, k, v = (
            jax.vmap(project)(x).reshape(len(x), layer.num_heads, -1)
            for project, x in (
                (layer.query_proj, query), (layer.key_proj, key), (layer.value_proj, value),
            )
        )  # fmt: skip
        out = attention(q, k, v, mask=mask, causal=causal, query_offset=0, layout="nhd")
        return jax.vmap(layer.output_proj)(out.reshape(len(query), -1))


def main():
    """Compare with equinox's own layer: result and gradients by its weights."""
    theirs = eqx.nn.MultiheadAttention(4, 32, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (100, 32))

    def loss(layer):
        mask = jnp.tril(jnp.ones((100, 100), bool))
        return jnp.sin(layer(x, x, x, mask)).sum()

    (value, grads), (expected, expected_grads) = (
        eqx.filter_jit(eqx.filter_value_and_grad(loss))(layer)
        for layer in (MultiheadAttention(theirs), theirs)
    )
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True)
    difference = max(float(jnp.abs(a - b).max()) for a, b in [(value, expected), *pairs])
    print(f"largest difference from equinox's own, gradients too: {difference:.1e}")
    return int(difference > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
