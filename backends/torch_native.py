"""PyTorch's own attention kernels, with their lse and their gradients.

`torch.nn.functional.scaled_dot_product_attention` chooses among them and keeps the lse to itself;
these are the operators that it calls (by `torch` rather than `torch.ops` where they are in both,
as that takes less time).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend

from .generic import Array
from .torch_autograd import is_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """A kernel by name, on a call's ``(query, key, value, causal, scale)``."""

    name: str
    attend: Callable[[Any, bool], tuple[Array, Array]]  # out, and lse where that is wanted
    backward: Callable[[Any, Array, Array, Array], tuple[Array, Array, Array]]

    needs_lse: ClassVar = True

    def forward(self, call: Any, want_lse: bool) -> tuple[Array, Array | None]:
        """Return ``(out, lse)``, None for an `lse` that is not wanted."""
        out, lse = self.attend(call, want_lse)
        return out, lse if want_lse else None

    def scratch(
        self, shape: tuple[int, int, int, int], n_k: int, number: int, training: bool
    ) -> list[tuple[str, str, int]]:
        """Return what the kernel takes for itself: names, formulas and bytes.

        `shape` is that of its result.  Nothing is known on a GPU.  On a CPU each thread has a tile
        of its own, in sizes that PyTorch's source tells (FlashAttentionKernel.cpp).
        """
        if self.attend is not _cpu:
            return []
        _, heads, n_q, d_v = shape
        rows = min(n_q, 256 if n_q >= 768 else 64 if n_q >= 192 else 32)
        cols, threads = min(n_k, 512), torch.get_num_threads()
        told, count = f"{cols} + {d_v} + 2", cols + d_v + 2
        if training:
            told, count = f"2 × {cols} + 1", 2 * cols + 1
        formula = f"{threads} threads × {rows} × ({told}) × {number} B"
        found = [("scratch of the kernel", formula, threads * rows * count * number)]
        if training and heads > 1:
            formula = " × ".join(map(str, (*shape, f"{number} B")))
            found.append(("a copy in the kernel's order", formula, prod(shape) * number))
        return found

    def __repr__(self) -> str:
        return self.name


def choose(call: Any) -> tuple[Kernel | None, bool, str]:
    """Return the kernel that PyTorch would take or None, whether it beats tiles, and why."""
    tokens = tuple(map(_bare, call[:3]))
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tokens)):
        return None, False, "the kernels do not know torch.vmap"
    device, d = call.query.device.type, call.query.shape[-1]
    if call.value.shape[-1] != d:
        return None, False, "the kernels want values as wide as the keys"
    if device == "cuda" and d % 8:
        return None, False, "the kernels want a width that is a multiple of 8"
    if any(x.stride(-1) != 1 for x in tokens):
        return None, False, "the kernels want contiguous rows"
    if is_shape(call.query):
        return _ANY, True, "nothing is computed"
    grouped = call.query.shape[1] != call.key.shape[1]
    number = torch._fused_sdp_choice(
        *tokens, None, 0.0, call.causal, scale=call.scale, enable_gqa=grouped
    )
    found = _KERNELS.get((device, number))
    if found is None:
        return None, False, "PyTorch has only its textbook attention for it"
    if device == "cpu" and call.query.dtype not in (torch.float32, torch.float64):
        return found, False, "tiles keep the weights in float32, and round once"
    return found, True, "as fast as PyTorch's attention is"


def _bare(x: Array) -> Array:
    """Return the tensor that `torch.func` differentiates by."""
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _cpu(call: Any, want_lse: bool) -> tuple[Array, Array]:
    found: tuple[Array, Array] = torch._scaled_dot_product_flash_attention_for_cpu(
        call.query, call.key, call.value, 0.0, call.causal, scale=call.scale
    )
    return found


def _cpu_backward(call: Any, out: Array, lse: Array, d_out: Array) -> tuple[Array, Array, Array]:
    found: tuple[Array, Array, Array] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, call.query, call.key, call.value, out, lse, 0.0, call.causal, scale=call.scale
    )
    return found


def _flash(call: Any, want_lse: bool) -> tuple[Array, Array]:
    out, lse, *_ = torch._scaled_dot_product_flash_attention(
        call.query, call.key, call.value, 0.0, call.causal, False, scale=call.scale
    )
    return out, lse


def _flash_backward(call: Any, out: Array, lse: Array, d_out: Array) -> tuple[Array, Array, Array]:
    lengths = None, None, call.query.shape[-2], call.key.shape[-2]
    found: tuple[Array, Array, Array] = aten._scaled_dot_product_flash_attention_backward(
        d_out, call.query, call.key, call.value, out, lse, *lengths, 0.0, call.causal,
        *_no_seeds(out), scale=call.scale,
    )  # fmt: skip
    return found


def _efficient(call: Any, want_lse: bool) -> tuple[Array, Array]:
    out, lse, *_ = torch._scaled_dot_product_efficient_attention(
        call.query, call.key, call.value, None, want_lse, 0.0, call.causal, scale=call.scale
    )
    return out, lse[..., : out.shape[-2]]  # it comes in multiples of 32


def _efficient_backward(
    call: Any, out: Array, lse: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    d_query, d_key, d_value, _ = aten._scaled_dot_product_efficient_attention_backward(
        d_out, call.query, call.key, call.value, None, out, padded, *_no_seeds(out), 0.0,
        [True, True, True, False], call.causal, scale=call.scale,
    )  # fmt: skip
    return d_query, d_key, d_value


def _cudnn(call: Any, want_lse: bool) -> tuple[Array, Array]:
    out, lse, *_ = torch._scaled_dot_product_cudnn_attention(
        call.query, call.key, call.value, None, want_lse, 0.0, call.causal, False, scale=call.scale
    )
    return out, lse.reshape(out.shape[:-1]) if want_lse else lse


def _cudnn_backward(call: Any, out: Array, lse: Array, d_out: Array) -> tuple[Array, Array, Array]:
    lengths = None, None, call.query.shape[-2], call.key.shape[-2]
    found: tuple[Array, Array, Array] = aten._scaled_dot_product_cudnn_attention_backward(
        d_out, call.query, call.key, call.value, out, lse[..., None], *_no_seeds(out), None,
        *lengths, 0.0, call.causal, scale=call.scale,
    )  # fmt: skip
    return found


def _no_seeds(like: Array) -> tuple[Array, Array]:
    """Return the place in the random stream of a dropout that is not there."""
    zero = torch.zeros((), dtype=torch.int64, device=like.device)
    return zero, zero


def _none(*_: Any) -> Any:
    raise AssertionError("a kernel is called for tensors without values")


_ANY = Kernel("any kernel", _none, _none)  # stands for one, where the shapes are all that counts
_KERNELS = {
    (device, backend.value): Kernel(name, forward, backward)
    for device, backend, name, forward, backward in (
        ("cpu", SDPBackend.FLASH_ATTENTION, "flash attention for CPU", _cpu, _cpu_backward),
        ("cuda", SDPBackend.FLASH_ATTENTION, "flash attention", _flash, _flash_backward),
        (
            "cuda",
            SDPBackend.EFFICIENT_ATTENTION,
            "memory-efficient attention",
            _efficient,
            _efficient_backward,
        ),
        ("cuda", SDPBackend.CUDNN_ATTENTION, "cuDNN", _cudnn, _cudnn_backward),
    )
}
