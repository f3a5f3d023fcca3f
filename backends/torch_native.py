"""PyTorch's own attention kernels, with their lse and their gradients.

`torch.nn.functional.scaled_dot_product_attention` chooses among them and keeps the lse to itself;
these are the operators that it calls (by `torch` rather than `torch.ops` where they are in both,
as that takes less time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend

from .generic import Array
from .torch_autograd import is_captured, is_shape

aten = torch.ops.aten

Shape = tuple[int, int, int, int]
Place = tuple[slice, slice]  # of batch entries and heads
Scratch = list[tuple[str, str, int]]

FAST = "as fast as PyTorch's attention is"
COPIES = 2**24  # bytes of copies in float32 at a time
LOSES_NAN = 16  # keys, below which the kernel for CPUs gives 0 to a query with a NaN


@dataclass(frozen=True)
class Kernel:
    """A kernel by name, on a call's ``(query, key, value, causal, scale, added)``."""

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
        """Return whether a row may have NaN, or no score but -inf: some kernels say 0 or inf."""
        return (lse == 0).any() if self.attend is _cpu else ~lse.isfinite().all()

    def coarse(self, lse: Array) -> bool:
        """Return whether weights computed from `lse` would be; on a GPU nobody looks."""
        return self.attend is _cpu and _is_large(lse)

    def scratch(self, rows: Shape, keys: Shape, number: int, training: bool) -> Scratch:
        """Return what the kernel takes for itself: names, formulas and bytes.

        `rows` is the shape of its result, `keys` that of the keys.  Nothing is known on a GPU.
        """
        return _scratch_on_cpu(rows, keys, number, training) if self.attend is _cpu else []

    def reorders(self, added: Array, folded: bool) -> bool:
        """Whether an array that is added is copied, since its numbers do not follow each other.

        `folded` says whether it is given with the queries of several heads as those of one.
        """
        rows = added.ndim == 0 or added.shape[-1] == 1 or added.stride(-1) == 1
        return not rows or (folded and not added.is_contiguous())

    def __repr__(self) -> str:
        return self.name


class InFloat32:
    """The kernel for CPUs on float32 copies of half precision, of some heads at a time.

    On the arrays themselves it would round the weights to their dtype.
    """

    has_lse = needs_lse = trains = exact = True

    def forward(self, call: Any, names: tuple[str, ...]) -> tuple[Array, Array | None]:
        """Return ``(out, lse)``, with `out` in float32 where "exact" is among the `names`."""
        dtype = torch.float32 if "exact" in names else call.query.dtype
        out = torch.empty_like(call.query, dtype=dtype)
        lse = out.new_empty(out.shape[:-1], dtype=torch.float32)
        for rows, keys in _parts(call.query.shape, call.key.shape, training=False):
            out[rows], lse[rows] = _cpu(_widened(call, rows, keys), True)
        return out, lse if "lse" in names else None

    def backward(
        self, call: Any, out: Array, lse: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        """Return the gradients of query, key and value, from `out` in float32."""
        query, key, value = map(torch.empty_like, call[:3])
        for rows, keys in _parts(call.query.shape, call.key.shape, training=True):
            query[rows], key[keys], value[keys] = _cpu_backward(
                _widened(call, rows, keys), out[rows], lse[rows], d_out[rows].float()
            )
        return query, key, value

    def doubtful(self, lse: Array) -> Array:
        """As that of `Kernel` for CPUs."""
        return (lse == 0).any()

    def coarse(self, lse: Array) -> bool:
        """As that of `Kernel` for CPUs."""
        return _is_large(lse)

    def scratch(self, rows: Shape, keys: Shape, number: int, training: bool) -> Scratch:
        """Return what is taken beside results, as `Kernel.scratch` does."""
        (entry, heads), (_, key_heads) = next(_parts(rows, keys, training))
        entries = min(rows[0], entry.stop)
        held = min(keys[1], key_heads.stop)
        of_head, formula = _copies(rows, keys, training)
        told = f"{entries} × {held} × ({formula}) × {rows[3]} × 4 B"
        part = entries, min(rows[1], heads.stop)
        return [
            ("copies in float32", told, entries * held * of_head),
            ("lse of copies", f"{part[0]} × {part[1]} × {rows[2]} × 4 B", 4 * prod(part) * rows[2]),
            *_scratch_on_cpu((*part, *rows[2:]), keys, number, training),
        ]

    def __repr__(self) -> str:
        return "flash attention for CPU, in float32"


def _is_large(lse: Array) -> bool:
    """Whether the rounding of `lse`, which is relative, leaves weights less than four digits."""
    low, high = map(float, lse.aminmax())
    return max(-low, high) > 1e-4 / float(torch.finfo(lse.dtype).eps)


def _scratch_on_cpu(rows: Shape, keys: Shape, number: int, training: bool) -> Scratch:
    """Return what the kernel for CPUs takes: each thread has a tile of its own.

    Its sizes are told by PyTorch's source (FlashAttentionKernel.cpp).
    """
    _, heads, n_q, d_v = rows
    height = min(n_q, 256 if n_q >= 768 else 64 if n_q >= 192 else 32)
    width, threads = min(keys[2], 512), torch.get_num_threads()
    told, count = f"{width} + {d_v} + 2", width + d_v + 2
    if training:
        told, count = f"2 × {width} + 1", 2 * width + 1
    formula = f"{threads} threads × {height} × ({told}) × {number} B"
    found = [("scratch of the kernel", formula, threads * height * count * number)]
    if training and heads > 1:
        formula = " × ".join(map(str, (*rows, f"{number} B")))
        found.append(("a copy in the kernel's order", formula, prod(rows) * number))
    return found


def _copies(rows: Shape, keys: Shape, training: bool) -> tuple[int, str]:
    """Return the bytes of the float32 copies for a head of keys, and which rows they have."""
    of_rows, of_keys = (3, 4) if training else (2, 2)  # with results of the kernel
    group = rows[1] // keys[1]
    count = of_rows * group * rows[2] + of_keys * keys[2]
    return 4 * rows[3] * count, f"{of_rows * group} × {rows[2]} + {of_keys} × {keys[2]}"


def _parts(rows: Shape, keys: Shape, training: bool) -> Iterator[tuple[Place, Place]]:
    """Yield places in queries and in keys, of as many heads as `COPIES` allow, or of one."""
    batch, heads = keys[:2]
    group = rows[1] // heads
    of_head, _ = _copies(rows, keys, training)
    some = min(heads, max(1, COPIES // of_head))
    entries = max(1, COPIES // (of_head * heads))
    for i, j in product(range(0, batch, entries), range(0, heads, some)):
        entry = slice(i, i + entries)
        yield (entry, slice(group * j, group * (j + some))), (entry, slice(j, j + some))


def _widened(call: Any, rows: Place, keys: Place) -> Any:
    """Return a part of a call in float32."""
    tokens = call.query[rows].float(), call.key[keys].float(), call.value[keys].float()
    return type(call)(*tokens, *call[3:])


def choose(call: Any, adds: bool) -> tuple[Kernel | InFloat32 | None, bool, str]:
    """Return the kernel that PyTorch would take or None, whether it beats tiles, and why.

    `adds` says whether an array will be added to the scores, which is done in the compute dtype.
    """
    query, key, value, causal, scale, _ = call
    if _wrapped(query) or _wrapped(key) or _wrapped(value):
        query, key, value = map(_bare, (query, key, value))
        if _wrapped(query) or _wrapped(key) or _wrapped(value):
            return None, False, "the kernels do not know torch.vmap"
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
    found = _KERNELS.get((device, _choice(query, key, value, causal, scale, grouped)))
    if found is None:
        return None, False, "PyTorch has only its textbook attention for it"
    if found.attend is _efficient and grouped:
        return None, False, "memory-efficient attention does not group heads"
    if device == "cpu" and not adds:
        return _of_cpu(found, query, key)
    return found, True, FAST


def _of_cpu(found: Kernel, query: Array, key: Array) -> tuple[Kernel | InFloat32, bool, str]:
    """Return the kernel for a call without masks on a CPU, whether it beats tiles, and why."""
    kernel: Kernel | InFloat32 = found
    why = FAST
    if query.dtype not in (torch.float32, torch.float64):
        kernel, why = _IN_FLOAT32, "faster than tiles, and PyTorch's own rounds the weights"
        of_head, _ = _copies(query.shape, key.shape, training=False)
        if of_head > COPIES:
            return kernel, False, "a head's copies in float32 would be large"
    return kernel, True, why


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


_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def _bare(x: Array) -> Array:
    """Return the tensor that `torch.func` differentiates by."""
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _cpu(call: Any, want_lse: bool) -> tuple[Array, Array]:
    added = call.added
    if added is None and call.key.shape[-2] < LOSES_NAN:  # not where something is added
        added = call.query.new_zeros((1, 1, 1, 1))
    found: tuple[Array, Array] = torch._scaled_dot_product_flash_attention_for_cpu(
        call.query, call.key, call.value, 0.0, call.causal, attn_mask=added, scale=call.scale
    )
    return found


def _cpu_backward(call: Any, out: Array, lse: Array, d_out: Array) -> tuple[Array, Array, Array]:
    found: tuple[Array, Array, Array] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, call.query, call.key, call.value, out, lse, 0.0, call.causal,
        attn_mask=call.added, scale=call.scale,
    )  # fmt: skip
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


_IN_FLOAT32 = InFloat32()
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
