"""JAX's transformations of attention, `merge` and streams."""

from __future__ import annotations

import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autodiff import CHUNKS, SHAPES, call, merged, score_mod, streamed
from chunkattn.backends.jax_lifted import lift
from jax.test_util import check_grads
from libraries import compiled_quickly

from chunkattn import OnlineAttention, attention, attention_jvp, attention_vjp, masks

ALL = (0, 1, 2)


@pytest.fixture(autouse=True)
def _float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    with compiled_quickly():
        yield
    jax.config.update("jax_enable_x64", before)


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


# By name: the function, and the shapes of what it takes after query, key and value.
CASES = {
    "all at once, a blind query": (
        lambda *x: call(
            *x[:3], bias=x[3], sinks=x[4], scale=x[5], causal=True, query_offset=-1, softcap=1.5
        ),
        [(2, 1, 6), (2,), ()],
    ),
    "score_mod, dropout": (
        lambda *x: call(
            *x[:3], score_mod=score_mod(x[3]), softcap=2.0, dropout=0.3, dropout_seed=1
        ),
        [(2,)],
    ),
    "stream": (streamed, []),
    "merge": (merged, []),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "score_mod, dropout" else name
        for name in CASES
    ],
)
def test_check_grads(name):
    """Reverse and forward mode, in float64 and with chunks that do not divide.

    To second order, but for what JAX differentiates by itself between calls.
    """
    function, more = CASES[name]
    order = 1 if name in ("stream", "merge") else 2
    check_grads(jax.jit(function), arrays(*SHAPES, *more), order=order)


def loss(query, key, value):
    out, lse = call(query, key, value, mask=masks.Window(5, 0), query_offset=1, key_chunk_size=3)
    return jnp.sin(out).sum() + jnp.cos(lse).sum()


def textbook(query, key, value):
    scores = query @ key.mT / 2**0.5
    scores = jnp.where(jnp.tril(jnp.ones((3, 6), bool), 1), scores, -jnp.inf)
    out = jax.nn.softmax(scores) @ value
    return jnp.sin(out).sum() + jnp.cos(jax.nn.logsumexp(scores, -1)).sum()


def scanned(f):
    def steps(*x):
        return jax.lax.scan(lambda c, _: (c + f(c * x[0], *x[1:]), None), 1.0, None, length=3)[0]

    return steps


# Each takes a function, its arguments, and three times these, stacked.
TRANSFORMS = {
    "grad": lambda f, x, _: jax.grad(f, ALL)(*x),
    "jit of grad": lambda f, x, _: jax.jit(jax.grad(f, ALL))(*x),
    "vjp": lambda f, x, _: jax.vjp(f, *x)[1](2.0),
    "jvp": lambda f, x, _: jax.jvp(f, x, x),
    "linearize": lambda f, x, _: jax.linearize(f, *x)[1](*x),
    "jacfwd": lambda f, x, _: jax.jacfwd(f, ALL)(*x),
    "jacrev": lambda f, x, _: jax.jacrev(f, ALL)(*x),
    "hessian": lambda f, x, _: jax.hessian(f, ALL)(*x),
    "grad of grad": lambda f, x, _: jax.grad(lambda *y: (jax.grad(f)(*y) ** 2).sum(), ALL)(*x),
    "jacrev of jacfwd": lambda f, x, _: jax.jacrev(jax.jacfwd(f), ALL)(*x),
    "jacfwd of jacfwd": lambda f, x, _: jax.jacfwd(jax.jacfwd(f), ALL)(*x),
    "vmap": lambda f, _, xs: jax.vmap(f)(*xs),
    "vmap of vmap of grad": lambda f, _, xs: jax.vmap(jax.vmap(jax.grad(f, ALL)))(
        *(x[None] for x in xs)
    ),
    "grad of vmap over one": lambda f, x, xs: jax.grad(
        lambda *y: jax.vmap(f, (2, None, None), 0)(*y).sum(), ALL
    )(jnp.moveaxis(xs[0], 0, 2), *x[1:]),
    "jit of vmap of hessian": lambda f, _, xs: jax.jit(jax.vmap(jax.hessian(f)))(*xs),
    "checkpoint": lambda f, x, _: jax.grad(jax.checkpoint(f), ALL)(*x),
    "jvp of checkpoint": lambda f, x, _: jax.jvp(jax.checkpoint(f), x, x),
    "scan": lambda f, x, _: jax.grad(scanned(f), ALL)(*x),
    "checkpoint in scan": lambda f, x, _: jax.grad(scanned(jax.checkpoint(f)), ALL)(*x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations(name):
    x = arrays(*SHAPES)
    xs = tuple(jnp.stack([y, y + 1, 2 * y]) for y in x)
    ours, theirs = (TRANSFORMS[name](f, x, xs) for f in (loss, textbook))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


def test_textbook():
    """The derivatives do not depend on what computed the result."""
    x = arrays(*SHAPES)
    check_grads(jax.jit(lambda *x: call(*x, implementation="standard")), x, order=1)


@pytest.mark.slow
def test_third_derivatives_forward():
    x = arrays(*SHAPES)
    ours, theirs = (jax.jacfwd(jax.hessian(f))(*x) for f in (loss, textbook))
    np.testing.assert_allclose(ours, theirs, atol=1e-11)


def test_captured_arrays():
    """The gradients of what callables capture, eager, compiled and batched, to second order."""
    x, slopes = arrays(*SHAPES), jnp.asarray([[0.3, -0.2], [1.0, 0.5]])

    def of_slopes(slopes):
        seen = jnp.sum(slopes > -9) + 3  # traced, and captured by the mask
        mask = lambda b, h, q, k: k < seen  # noqa: E731
        return jnp.sin(call(*x, score_mod=score_mod(slopes), mask=mask)[0]).sum()

    check_grads(jax.jit(of_slopes), (slopes[0],), order=2, modes=["rev"])
    each = jnp.stack([jax.grad(of_slopes)(one) for one in slopes])
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(of_slopes)))(slopes), each, atol=1e-12)
    assert (each != 0).all()


@pytest.mark.parametrize("rule", ["custom_jvp", "custom_vjp"])
def test_functions_with_rules_of_their_own(rule):
    """JAX's text of such a function leaves out its rules, which may differ."""
    x = arrays(*SHAPES)

    def with_slope(slope):
        function = getattr(jax, rule)(lambda s: s)
        if rule == "custom_jvp":
            function.defjvp(lambda s, moves: (s[0], slope * moves[0]))
        else:
            function.defvjp(lambda s: (s, None), lambda _, bar: (slope * bar,))
        return lambda s, b, h, q_idx, kv_idx: function(s)

    def gradient(slope):
        return jax.grad(lambda q: call(q, *x[1:], score_mod=with_slope(slope))[0].sum())(x[0])

    plain = jax.grad(lambda q: call(q, *x[1:])[0].sum())(x[0])
    for slope in (1.0, 3.0, 0.5):
        np.testing.assert_allclose(gradient(slope), slope * plain, atol=1e-12)


def test_relu_is_compiled_once():
    """It has a rule of its own, which is told by what it does."""

    def lifted(factor):
        example = (jnp.ones((2, 3)),)
        return lift(lambda s: factor * jax.nn.relu(s), [example])[0]

    seen = list(map(lifted, (2.0, 2.0, 3.0)))
    assert seen[0].reusable
    assert seen[0] == seen[1] != seen[2]


def test_nothing_is_kept_of_functions_that_cannot_be_told():
    """Nor of callables that are told the progress."""
    q = jnp.ones((2, 6, 4))

    def looks(array):
        shape = jax.ShapeDtypeStruct((), array.dtype)
        return lambda s, b, h, i, j: s + jax.pure_callback(lambda x: x, shape, array[0])

    def counts(array):
        return lambda done, total: array[0]

    for name, make in (("score_mod", looks), ("progress", counts)):
        captured = []
        for i in range(3):
            array = jnp.full((2,), float(i))
            captured.append(weakref.ref(array))
            attention(q, q, q, **{name: make(array)})
            del array
        gc.collect()
        assert [x() for x in captured] == [None] * 3


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float16"])
def test_captured_arrays_of_few_bits(dtype):
    x = arrays(*SHAPES)

    def of_slopes(slopes):
        out, _ = call(*x, score_mod=lambda s, b, h, i, j: s * slopes[h].astype(s.dtype))
        return jnp.sin(out).sum()

    slopes = jnp.asarray([0.5, 1.5])
    found = jax.grad(of_slopes)(slopes.astype(dtype))
    assert found.dtype == dtype
    expected = jax.grad(of_slopes)(slopes).astype(dtype)
    np.testing.assert_allclose(
        found.astype("float32"), expected.astype("float32"), rtol=float(jnp.finfo(dtype).eps)
    )


def test_gradients_of_captured_complex_arrays_are_refused():
    x = arrays(*SHAPES)

    def of_phases(phases):
        return call(*x, score_mod=lambda s, b, h, i, j: s * abs(phases[h]))[0].sum()

    phases = jnp.asarray([1j, 2j])
    np.testing.assert_allclose(jax.jit(of_phases)(phases), of_phases(phases))
    with pytest.raises(TypeError, match="must not capture complex arrays"):
        jax.grad(of_phases)(phases)


def test_named_axes_of_vmap():
    (x,) = arrays((3, *SHAPES[0]))

    def one(q):
        def score_mod(s, b, h, q_idx, kv_idx):
            return s + jax.lax.psum(q.ravel()[0], "z") * (kv_idx - q_idx)

        return call(q, q, q, score_mod=score_mod)[0]

    def textbook(q, total):
        distance = jnp.arange(q.shape[-2]) - jnp.arange(q.shape[-2])[:, None]
        scores = q @ q.mT / q.shape[-1] ** 0.5 + total * distance
        return jax.nn.softmax(scores, axis=-1) @ q

    for derived in (lambda f: f, lambda f: jax.grad(lambda x: jnp.sin(f(x)).sum())):
        found = derived(lambda x: jax.vmap(one, axis_name="z")(x))(x)
        expected = derived(
            lambda x: jax.vmap(textbook, in_axes=(0, None))(x, x.reshape(3, -1)[:, 0].sum())
        )(x)
        np.testing.assert_allclose(found, expected, atol=1e-11)


def test_ranks_are_not_promoted():
    q, k, v = arrays(*SHAPES)
    sinks = jnp.asarray([0.5, -1.0])

    def loss(sinks):
        online = OnlineAttention(q, sinks=sinks, **CHUNKS).update(k, v).result()
        return call(q, k, v, sinks=sinks)[0].sum() + online.sum()

    expected = jax.grad(loss)(sinks)
    with jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(jax.grad(loss)(sinks), expected)


def test_linear_transpose_is_refused():
    q, k, v = arrays(*SHAPES)
    transposed = jax.linear_transpose(lambda v: call(q, k, v)[0], v)
    with pytest.raises(NotImplementedError, match="linear_transpose of attention is not given"):
        transposed(call(q, k, v)[0])


def test_third_derivatives_in_reverse_are_refused():
    third = jax.grad(lambda q: jax.hessian(loss)(q, *arrays(*SHAPES[1:])).sum())
    with pytest.raises(NotImplementedError, match="third derivative"):
        third(*arrays(SHAPES[0]))


def test_vjp_and_jvp_by_name_are_differentiable():
    def by_name(*x):
        out, vjp = attention_vjp(*x, **CHUNKS)
        return tuple(vjp(jnp.sin(out)).values())

    def forward(*x):
        return attention_jvp(x, x, **CHUNKS)[1]

    for function in (by_name, forward):
        check_grads(jax.jit(function), arrays(*SHAPES), order=1)


@pytest.mark.parametrize(
    "of", [lambda f: f, lambda f: jax.grad(f, ALL), jax.vmap], ids=["forward", "gradient", "vmap"]
)
def test_compiled_calls_run_no_python(of):
    """After the first, a call of a compiled function with attention in it costs what JAX's do."""
    x = arrays(*SHAPES)
    x = tuple(y[None] for y in x) if of is jax.vmap else x
    compiled, seen = jax.jit(of(loss)), []
    jax.block_until_ready(compiled(*x))

    def profile(frame, event, arg):
        if event == "call":
            seen.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        found = compiled(*x)
    finally:
        sys.setprofile(None)
    jax.block_until_ready(found)
    assert seen == []
