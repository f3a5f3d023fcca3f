"""Attention on a mesh of four CPU devices: run by test_jax_sharding.py, prints what it finds.

A process of its own, since JAX counts its devices once.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from chunkattn import attention, masks, merge

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)

CHUNKS = {"query_chunk_size": 4, "key_chunk_size": 4}
HEADS = P("b", "h")
call = partial(attention, **CHUNKS)


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(shape).standard_normal(shape))


QUERY, KEY, VALUE = drawn(2, 4, 12, 6), drawn(2, 2, 12, 6), drawn(2, 2, 12, 5)


def all_at_once(q, k, v, bias, sinks, scale, lengths):
    keywords = {"bias": bias, "sinks": sinks, "scale": scale, "softcap": 2.0}
    return call(q, k, v, mask=(masks.Causal(), masks.Lengths(key=lengths)), **keywords)


def alibi(q, k, v, slopes, shift):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * jnp.where(q_idx > kv_idx, kv_idx - q_idx, shift)

    return call(q, k, v, score_mod=score_mod)


def merged(q, k, v):
    cuts = (slice(None, 8), slice(8, None))
    return merge(*(call(q, k[..., cut, :], v[..., cut, :], return_lse=True) for cut in cuts))[0]


def lse(q, k, v):
    swapped = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return call(*swapped, layout="nhd", return_lse=True)[1]


def one(q, k, v):
    return call(q, k, v, causal=True)


def steps(q, k, v):
    def step(carry, _):
        return carry + jax.checkpoint(one)(carry, k, v @ jnp.ones((5, 6))), None

    return jax.lax.scan(step, q, None, length=2)[0]


def moved(q, k, v):
    return jax.jvp(lambda *x: one(*x), (q, k, v), (q, k, v))[1]


def projected(q, k, v):
    return one(jnp.sin(q), 2 * k, v)


def functions(q, k, v):
    def mask_mod(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx + 2

    return call(q, k, v, score_mod=lambda s, *_: 3 * jnp.tanh(s / 3), mask=mask_mod)


def with_rules(q, k, v):
    def score_mod(s, b, h, q_idx, kv_idx):
        s = jax.nn.softplus(s) + jax.checkpoint(jnp.sin)(s)
        return jax.lax.fori_loop(0, 2, lambda i, s: s / 2, s)

    return call(q, k, v, score_mod=score_mod)


def shared(q, k, v):
    return one(q, k[:1], v[:1])


# By name: a function, its further arguments, and how all of them are sharded.
TOKENS = (HEADS,) * 3
CASES = {
    "plain": (call, (), TOKENS),
    "all at once": (
        all_at_once,
        (drawn(4, 1, 12), drawn(4), jnp.asarray(0.4), jnp.asarray([12, 5])),
        (*TOKENS, P("h"), P("h"), P(), P("b")),
    ),
    "captured arrays": (alibi, (drawn(4), jnp.asarray(0.1)), (*TOKENS, P("h"), P())),
    "merge": (merged, (), TOKENS),
    "lse": (lse, (), TOKENS),
    "keys of all": (shared, (), (P("b"), P(), P())),
    "vmap": (jax.vmap(one), (), TOKENS),
    "scan of checkpoints": (steps, (), TOKENS),
    "jvp": (moved, (), TOKENS),
    "a projection": (projected, (), TOKENS),
    "functions": (functions, (), TOKENS),
    "functions with rules": (with_rules, (), TOKENS),
}


def in_shards(function, mesh, specs):
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0])


def as_it_is(function, mesh, specs):
    return function


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
WAYS = {
    "shard_map": (in_shards, AUTO, tuple(name for name in CASES if name != "lse")),
    "shard_map, explicit axes": (in_shards, EXPLICIT, ("plain",)),
    "jit": (as_it_is, AUTO, ("all at once",)),
    "jit, explicit axes": (
        as_it_is,
        EXPLICIT,
        ("all at once", "lse", "keys of all", "vmap", "a projection", "functions"),
    ),
}


def with_gradients(function, arrays):
    floating = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]

    def loss(*x):
        out = function(*x)
        return jnp.sin(out).sum(), out

    return jax.jit(jax.value_and_grad(loss, floating, has_aux=True))


def largest_difference(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def collectives(compiled):
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return sorted(set(re.findall(rf" ({kinds})(?:-start)?\(", compiled.as_text())))


def findings(name):
    """Return by way: the largest difference, how the result is sharded, and the collectives."""
    function, more, specs = CASES[name]
    arrays = (QUERY, KEY, VALUE, *more)
    expected = with_gradients(function, arrays)(*arrays)
    found = {}
    for way, (wrapped, axis_type, names) in WAYS.items():
        if name not in names:
            continue
        mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(axis_type,) * 2)
        with jax.set_mesh(mesh):
            places = [NamedSharding(mesh, spec) for spec in specs]
            own = list(map(jax.device_put, arrays, places))
            run = with_gradients(wrapped(function, mesh, specs), arrays).lower(*own).compile()
            results = run(*own)
        found[way] = {
            "error": largest_difference(results, expected),
            "spec": [x for x in results[0][1].sharding.spec if x],
            "collectives": collectives(run),
        }
    return found


def refusal():
    """Return what is said of a captured array on explicit axes."""
    mesh = jax.make_mesh((4,), ("b",), axis_types=(EXPLICIT,))
    with jax.set_mesh(mesh):
        factor = jax.device_put(jnp.asarray(2.0), NamedSharding(mesh, P()))
        try:
            call(QUERY, KEY, VALUE, score_mod=lambda score, b, h, q_idx, kv_idx: score * factor)
        except NotImplementedError as error:
            return str(error)
    return "nothing"


def eagerly():
    """Return the error of eager gradients on explicit axes, of an array that is all three."""
    mesh = jax.make_mesh((2,), ("b",), axis_types=(EXPLICIT,))

    def loss(x):
        return jnp.sin(call(x, x, x)).sum()

    expected = jax.grad(loss)(QUERY)
    with jax.set_mesh(mesh):
        found = jax.grad(loss)(jax.device_put(QUERY, NamedSharding(mesh, P("b"))))
    return largest_difference(found, expected)


def elsewhere():
    """Return the error where a function captures what is on other devices than the tokens."""
    here, there = jax.devices()[:2]
    slopes = jax.device_put(jnp.asarray([0.1, 0.2, 0.3, 0.4]), there)
    own = (jax.device_put(x, here) for x in (QUERY, KEY, VALUE))
    found = call(*own, score_mod=lambda score, b, h, q_idx, kv_idx: score + slopes[h] * kv_idx)
    bias = np.asarray(slopes)[:, None, None] * np.arange(KEY.shape[-2])
    return float(jnp.abs(found - call(QUERY, KEY, VALUE, bias=jnp.asarray(bias))).max())


def main():
    for name in CASES:
        try:
            found = findings(name)
        except Exception:
            found = {"failed": traceback.format_exc()}
        print(json.dumps({name: found}), flush=True)
    print(json.dumps({"refused": refusal(), "elsewhere": elsewhere(), "eagerly": eagerly()}))


if __name__ == "__main__":
    sys.exit(main())
