"""PyTorch's own attention kernels, with their lse and their gradients.

`torch.nn.functional.scaled_dot_product_attention` chooses among them and keeps the lse to itself;
these are the operators that it calls (by `torch` rather than `torch.ops` where they are in both,
as that takes less time).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend

from .generic import Array
from .torch_autograd import is_captured, is_shape
from .torch_native_cpu import Flash, Scratch, Shape, of_cpu

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """A kernel for GPUs by name, on a call's ``(query, key, value, causal, scale)``."""

    name: str
    attend: Callable[[Any, bool], tuple[Array, Array]]  # out, and lse where that is wanted
    backward: Callable[[Any, Array, Array, Array], tuple[Array, Array, Array]]

    has_lse: ClassVar = True
    needs_lse: ClassVar = True
    trains: ClassVar = True
    exact: ClassVar = False

    def forward(self, call: Any, names: tuple[str, ...]) -> tuple[Array, Array | None]:
        """Return ``(out, lse)``, None for an `lse` that is not among the wanted `names`."""
        out, lse = self.attend(call, "lse" in names)
        return out, lse if "lse" in names else None

    def doubtful(self, lse: Array) -> Array:
        """Return whether a row may have NaN, or no score but -inf: some kernels say inf there."""
        return ~lse.isfinite().all()

    def coarse(self, lse: Array) -> bool:
        """Return False: nobody looks, since Python would wait."""
        return False

    def scratch(self, rows: Shape, keys: Shape, number: int, training: bool) -> Scratch:
        """Return nothing, as is known of them."""
        return []

    reorders = Flash.reorders  # of tensors without values

    def __repr__(self) -> str:
        return self.name


def choose(call: Any, adds: bool) -> tuple[Kernel | Flash | None, bool, str]:
    """Return the kernel that PyTorch would take or None, whether it beats tiles, and why.

    `adds` says whether an array will be added to the scores, which is done in the compute dtype.
    """
    query, key, value, causal, scale, _ = call
    if is_batched(query) or is_batched(key) or is_batched(value):
        return None, False, "the kernels do not know torch.vmap"
    query, key, value = map(_bare, (query, key, value))
    device, d = query.device.type, query.shape[-1]
    if value.shape[-1] != d:
        return None, False, "the kernels want values as wide as the keys"
    if adds and device not in ("cpu", "meta"):
        why = "on GPUs kernels take no bias, and no mask but Causal for as many queries as keys"
        return None, False, why
    if device == "cuda" and d % 8:
        return None, False, "the kernels want a width that is a multiple of 8"
    if causal and is_captured(query):
        return None, False, "no look at a kernel's result is captured for a CUDA graph"
    if is_shape(query):
        return _ANY, True, "nothing is computed"
    grouped = query.shape[1] != key.shape[1]
    number = _choice(query, key, value, causal, scale, grouped)
    if device == "cpu" and number == SDPBackend.FLASH_ATTENTION.value:
        return of_cpu(query, key, adds)
    found = _KERNELS.get(number) if device == "cuda" else None
    if found is None:
        return None, False, "PyTorch has only its textbook attention for it"
    if found.attend is _efficient and grouped:
        return None, False, "memory-efficient attention does not group heads"
    return found, True, "as fast as PyTorch's attention is"


def _choice(
    query: Array, key: Array, value: Array, causal: bool, scale: float, grouped: bool
) -> int | None:
    """Return PyTorch's number for a kernel, which covers gradients too; None for none."""
    wide = query.is_cuda and query.shape[-1] > 128  # some of these have no gradients
    if wide:
        query = query.detach().requires_grad_()
    try:
        with torch.enable_grad() if wide else nullcontext():
            number: int = torch._fused_sdp_choice(
                query, key, value, None, 0.0, causal, scale=scale, enable_gqa=grouped
            )
    except RuntimeError:  # `torch.nn.attention.sdpa_kernel` allows none
        return None
    return number


_PRIORITY = getattr(torch._C, "_get_sdp_priority_order", tuple)  # not in PyTorch before 2.6
_FLAGS = [getattr(torch._C, name) for name in dir(torch._C) if name.endswith("_sdp_enabled")]


def modes() -> tuple[Any, ...]:
    """Return what PyTorch's choice depends on beside the tensors."""
    flags = [flag() for flag in _FLAGS]
    return torch.are_deterministic_algorithms_enabled(), *flags, *_PRIORITY()


is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def is_batched(x: Array) -> bool:
    """Whether `torch.vmap` maps over the tensor."""
    return bool(is_wrapped(x) and is_wrapped(_bare(x)))


def _bare(x: Array) -> Array:
    """Return the tensor that `torch.func` differentiates by."""
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


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
    backend.value: Kernel(name, forward, backward)
    for backend, name, forward, backward in (
        (SDPBackend.FLASH_ATTENTION, "flash attention", _flash, _flash_backward),
        (
            SDPBackend.EFFICIENT_ATTENTION,
            "memory-efficient attention",
            _efficient,
            _efficient_backward,
        ),
        (SDPBackend.CUDNN_ATTENTION, "cuDNN", _cudnn, _cudnn_backward),
    )
}
