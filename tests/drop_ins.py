"""What the tests of the two drop-ins share."""

from __future__ import annotations

import libraries
import numpy as np


def floats(*shape, seed=0):
    return np.random.default_rng((2112, seed)).standard_normal(shape)


def allowed(*shape):
    """Return booleans that let the query 3, where there are several, see nothing."""
    found = np.random.default_rng(5682).random(shape) < 0.6
    found[..., 0] = True
    if shape[-2] > 3:
        found[..., 3, :] = False
    return found


def tokens_of(shapes, lib, dtype=None):
    """Return query, key and value in NumPy's float64, of values that the library's dtype holds."""
    exact = (floats(*shape, seed=i) for i, shape in enumerate(shapes))
    return [lib.numpy(lib.asarray(x, dtype)) for x in exact]


def near(lib, ours, theirs, dtype=None, error=5e-6):
    """Check library, dtype and values, up to `error` and the rounding to the dtype."""
    dtype = dtype or lib.default
    assert lib.is_own(ours)
    assert ours.dtype == lib.dtype(dtype)
    if lib.name in libraries.GPU and dtype in ("float16", "bfloat16"):
        error = lib.eps(dtype)  # kernels round the weights to it
    np.testing.assert_allclose(lib.numpy(ours), theirs, rtol=lib.eps(dtype), atol=error)


def peer(name):
    """Return the function that a drop-in stands in for."""
    if name == "torch":
        import torch

        return torch.nn.functional.scaled_dot_product_attention
    import jax

    return jax.nn.dot_product_attention


def gradients(lib, function, arrays, keywords, dtype="float64"):
    """Return the gradients of a sum of sines of the result, by all arrays, as NumPy's."""
    own = [lib.asarray(x, dtype) for x in arrays]

    def loss(*xs):
        return lib.xp.sum(lib.xp.sin(function(*xs, **keywords)))

    if lib.name.startswith("torch"):
        own = [x.requires_grad_() for x in own]
        loss(*own).backward()
        return [lib.numpy(x.grad) for x in own]
    import jax

    grad = jax.grad(loss, argnums=tuple(range(len(own))))
    return [lib.numpy(x) for x in (grad if lib.eager else jax.jit(grad))(*own)]


def arguments(lib, keywords, dtype=None):
    """Return the keywords with NumPy's arrays as the library's."""
    return {
        name: lib.asarray(x, dtype) if isinstance(x, np.ndarray) else x
        for name, x in keywords.items()
    }


def rounded(lib, keywords, dtype=None):
    """Return the keywords with NumPy's arrays in float64, of values that the dtype holds."""
    return {
        name: lib.numpy(x) if isinstance(keywords[name], np.ndarray) else x
        for name, x in arguments(lib, keywords, dtype).items()
    }


def refused(lib, function, shapes, keywords):
    """Call `function`, which refuses these arguments."""
    function(*(lib.asarray(floats(*shape)) for shape in shapes), **arguments(lib, keywords))
