"""PyTorch's flash attention for CPUs, in half precision on copies.

It is called by its operator; `torch_native` tells why.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .generic import Array

aten = torch.ops.aten

Shape = tuple[int, int, int, int]
Place = tuple[slice, slice]  # of batch entries and heads
Scratch = list[tuple[str, str, int]]

COPIES = 2**24  # bytes of copies in float32 at a time
LOSES_NAN = 16  # keys, below which the kernel gives 0 to a query with a NaN


def of_cpu(query: Array, key: Array, adds: bool) -> tuple[Flash, bool, str]:
    """Return the kernel for a call, whether it beats tiles, and why; `adds` is that of `choose`."""
    if adds or query.dtype in (torch.float32, torch.float64):
        return FLASH, True, "as fast as PyTorch's attention is"
    of_head, _ = _copies(query.shape, key.shape, training=False)
    if of_head > COPIES:
        return IN_FLOAT32, False, "a head's copies in float32 would be large"
    return IN_FLOAT32, True, "faster than tiles, and PyTorch's own rounds the weights"


class Flash:
    """The kernel, on a call's ``(query, key, value, causal, scale, added)``."""

    has_lse = needs_lse = trains = True
    exact = False

    def forward(self, call: Any, names: tuple[str, ...]) -> tuple[Array, Array | None]:
        """Return ``(out, lse)``, None for an `lse` that is not among the wanted `names`."""
        out, lse = _forward(call)
        return out, lse if "lse" in names else None

    def backward(
        self, call: Any, out: Array, lse: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        """Return the gradients of query, key and value."""
        return _backward(call, out, lse, d_out)

    def doubtful(self, lse: Array) -> Array | bool:
        """Return whether a row may have no score but -inf, for which `lse` is 0.

        Nobody looks while `make_fx` traces, which would raise.
        """
        return get_proxy_mode() is None and (lse == 0).any()

    def coarse(self, lse: Array) -> bool:
        """Return whether the rounding of `lse`, which is relative, spoils weights; likewise."""
        if get_proxy_mode() is not None:
            return False
        low, high = map(float, lse.aminmax())
        return max(-low, high) > 1e-4 / float(torch.finfo(lse.dtype).eps)

    def scratch(self, rows: Shape, keys: Shape, number: int, training: bool) -> Scratch:
        """Return what the kernel takes for itself: names, formulas and bytes.

        `rows` is the shape of its result, `keys` that of the keys.  Each thread has a tile of its
        own, whose sizes are told by PyTorch's source (FlashAttentionKernel.cpp).
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

    def reorders(self, added: Array, folded: bool) -> bool:
        """Whether an array that is added is copied, since its numbers do not follow each other.

        `folded` says whether it is given with the queries of several heads as those of one.
        """
        rows = added.ndim == 0 or added.shape[-1] == 1 or added.stride(-1) == 1
        return not rows or (folded and not added.is_contiguous())

    def __repr__(self) -> str:
        return "flash attention for CPU"


class InFloat32(Flash):
    """The kernel for CPUs on float32 copies of half precision, of some heads at a time.

    On the arrays themselves it would round the weights to their dtype.
    """

    exact = True

    def forward(self, call: Any, names: tuple[str, ...]) -> tuple[Array, Array | None]:
        """Return ``(out, lse)``, with `out` in float32 where "exact" is among the `names`."""
        dtype = torch.float32 if "exact" in names else call.query.dtype
        out = torch.empty_like(call.query, dtype=dtype)
        lse = out.new_empty(out.shape[:-1], dtype=torch.float32)
        for rows, keys in _parts(call.query.shape, call.key.shape, training=False):
            out[rows], lse[rows] = _forward(_widened(call, rows, keys))
        return out, lse if "lse" in names else None

    def backward(
        self, call: Any, out: Array, lse: Array, d_out: Array
    ) -> tuple[Array, Array, Array]:
        """Return the gradients of query, key and value, from `out` in float32."""
        query, key, value = map(torch.empty_like, call[:3])
        for rows, keys in _parts(call.query.shape, call.key.shape, training=True):
            query[rows], key[keys], value[keys] = _backward(
                _widened(call, rows, keys), out[rows], lse[rows], d_out[rows].float()
            )
        return query, key, value

    def scratch(self, rows: Shape, keys: Shape, number: int, training: bool) -> Scratch:
        """Return what is taken beside results, as `Flash.scratch` does."""
        (entry, heads), (_, key_heads) = next(_parts(rows, keys, training))
        entries = min(rows[0], entry.stop)
        held = min(keys[1], key_heads.stop)
        of_head, formula = _copies(rows, keys, training)
        told = f"{entries} × {held} × ({formula}) × {rows[3]} × 4 B"
        part = entries, min(rows[1], heads.stop)
        return [
            ("copies in float32", told, entries * held * of_head),
            ("lse of copies", f"{part[0]} × {part[1]} × {rows[2]} × 4 B", 4 * prod(part) * rows[2]),
            *super().scratch((*part, *rows[2:]), keys, number, training),
        ]

    def __repr__(self) -> str:
        return "flash attention for CPU, in float32"


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


def _forward(call: Any) -> tuple[Array, Array]:
    added = call.added
    if added is None and call.key.shape[-2] < LOSES_NAN:  # not where something is added
        added = call.query.new_zeros((1, 1, 1, 1))
    found: tuple[Array, Array] = torch._scaled_dot_product_flash_attention_for_cpu(
        call.query, call.key, call.value, 0.0, call.causal, attn_mask=added, scale=call.scale
    )
    return found


def _backward(call: Any, out: Array, lse: Array, d_out: Array) -> tuple[Array, Array, Array]:
    found: tuple[Array, Array, Array] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_out, call.query, call.key, call.value, out, lse, 0.0, call.causal,
        attn_mask=call.added, scale=call.scale,
    )  # fmt: skip
    return found


FLASH, IN_FLOAT32 = Flash(), InFloat32()
