"""cuDNN's attention, as JAX calls it on a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .generic import Array

IMPLEMENTATION = "cudnn"
PLATFORMS = ("gpu", "cuda")  # as arrays tell it
LOWERED = "cuda"  # as a compilation does


def choose(call: Any) -> tuple[Kernel | None, bool, str]:
    """Return the kernel for a call or None, whether it beats tiles, and why."""
    query, key, value = call.query, call.key, call.value
    if query.dtype not in (jnp.float16, jnp.bfloat16):
        return None, False, "cuDNN wants float16 or bfloat16"
    d = query.shape[-1]
    if value.shape[-1] != d or d % 8 or d > 128:
        return None, False, "cuDNN wants one width, a multiple of 8 up to 128"
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value))
    if (why := _refusal(shapes, call.causal, training=False)) is not None:
        return None, False, why
    trains = _refusal(shapes, call.causal, training=True) is None
    return Kernel(trains), True, "as fast as cuDNN is"


@functools.lru_cache
def _refusal(shapes: tuple[jax.ShapeDtypeStruct, ...], causal: bool, training: bool) -> str | None:
    """Return what JAX says against cuDNN for arrays of these shapes; None where it takes them."""
    attend = functools.partial(_attend, causal=causal, scale=1.0)

    def trained(*arrays: Array) -> Any:
        out, vjp = jax.vjp(attend, *arrays)
        return vjp(out)

    try:
        jax.eval_shape(trained if training else attend, *shapes)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"JAX says: {error}"
    return None


def _attend(query: Array, key: Array, value: Array, *, causal: bool, scale: float) -> Array:
    """Return cuDNN's attention for arrays (b, h, n, d)."""
    found = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)),
        scale=scale,
        is_causal=causal,
        implementation=IMPLEMENTATION,
    )
    return jnp.swapaxes(found, 1, 2)


@dataclass(frozen=True)
class Kernel:
    """cuDNN's on a call's ``(query, key, value, causal, scale)``.

    JAX rounds its `lse` to the dtype of the tokens.
    """

    trains: bool  # for odd lengths JAX has no gradients

    needs_lse = exact = has_lse = False

    def __repr__(self) -> str:
        return "cuDNN"

    @staticmethod
    def forward(call: Any, names: tuple[str, ...]) -> tuple[Array, None]:
        """Return ``(out, None)``."""
        return _attend(*call[:3], causal=call.causal, scale=call.scale), None

    @staticmethod
    def backward(call: Any, out: Array, lse: None, d_out: Array) -> tuple[Array, Array, Array]:
        """Return the gradients of query, key and value, by way of another forward pass."""
        attend = functools.partial(_attend, causal=call.causal, scale=call.scale)
        _, vjp = jax.vjp(attend, *call[:3])
        found: tuple[Array, Array, Array] = vjp(d_out)
        return found
