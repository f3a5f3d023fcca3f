"""cuDNN's attention, as JAX calls it on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .generic import Array

IMPLEMENTATION = "cudnn"
PLATFORMS = ("gpu", "cuda")


def choose(call: Any) -> tuple[Kernel | None, bool, str]:
    """Return the kernel for a call or None, whether it beats tiles, and why."""
    query, key, value = call.query, call.key, call.value
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return None, False, "cuDNN wants float16 or bfloat16"
    d = query.shape[-1]
    if value.shape[-1] != d or d % 8 or d > 128:
        return None, False, "cuDNN wants one width, a multiple of 8 up to 128"
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]
    if (why := _refusal(tuple(shapes), call.causal)) is not None:
        return None, False, why
    return CUDNN, True, "as fast as cuDNN is"


@functools.lru_cache
def _refusal(shapes: tuple[jax.ShapeDtypeStruct, ...], causal: bool) -> str | None:
    """Return what JAX says against cuDNN for arrays of these shapes; None where it takes them."""
    attend = functools.partial(_attend, causal=causal, scale=1.0, return_residual=True)
    try:
        jax.eval_shape(attend, *shapes)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"JAX says: {error}"
    return None


def _attend(
    query: Array, key: Array, value: Array, *, causal: bool, scale: float, return_residual: bool
) -> Any:
    """Return cuDNN's attention for arrays (b, h, n, d), with lse as (b, h, n) where asked for."""
    found = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)),
        scale=scale,
        is_causal=causal,
        implementation=IMPLEMENTATION,
        **({"return_residual": True} if return_residual else {}),
    )
    return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), found)


class Kernel:
    """cuDNN's on a call's ``(query, key, value, causal, scale)``."""

    needs_lse = exact = False

    def __repr__(self) -> str:
        return "cuDNN"

    @staticmethod
    def forward(call: Any, names: tuple[str, ...]) -> tuple[Array, Array | None]:
        """Return ``(out, lse)``, None for an `lse` that is not among the wanted `names`."""
        want_lse = "lse" in names
        given = {"causal": call.causal, "scale": call.scale, "return_residual": want_lse}
        found = _attend(call.query, call.key, call.value, **given)
        return found if want_lse else (found, None)

    @staticmethod
    def backward(call: Any, out: Array, lse: None, d_out: Array) -> tuple[Array, Array, Array]:
        """Return the gradients of query, key and value, by way of another forward pass."""
        given = {"causal": call.causal, "scale": call.scale, "return_residual": False}
        attend = functools.partial(_attend, **given)
        _, vjp = jax.vjp(attend, call.query, call.key, call.value)
        found: tuple[Array, Array, Array] = vjp(d_out)
        return found


CUDNN = Kernel()
