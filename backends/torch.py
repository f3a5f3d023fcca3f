"""PyTorch: products, exponentials and masks in place."""

from __future__ import annotations

from typing import Any

import torch

from . import generic
from .generic import Array


class Adapter(generic.Adapter):
    """PyTorch on any of its devices."""

    name = "torch"

    def is_integer(self, dtype: Any) -> bool:
        """Whether `dtype` is an integer, the barely supported unsigned ones included."""
        return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)

    def check(self, x: Array, name: str) -> None:
        """Refuse sparse and nested tensors."""
        if x.is_nested:
            raise TypeError(f"{name} is a nested tensor; pad it, or use masks.Segments")
        if x.layout != torch.strided:
            raise TypeError(f"{name} is a tensor of layout {x.layout}; it must be dense (strided)")

    def device(self, x: Array) -> Any:
        """Where `x` lives."""
        return x.device

    def new(self, like: Array, shape: Any, fill: float, dtype: Any) -> Array:
        """Return a tensor of `shape` and `dtype` full of `fill`, on the device of `like`."""
        return torch.full(tuple(shape), fill, dtype=dtype, device=like.device)

    def index(self, like: Array, size: int) -> Array:
        """Return the integers 0 … size-1 on the device of `like`."""
        return torch.arange(size, device=like.device)

    def cast(self, x: Array, dtype: Any) -> Array:
        """Return `x` in `dtype`."""
        return x.to(dtype)

    def workspace(self, like: Array, size: int, dtype: Any) -> Array | None:
        """Return flat memory for `size` elements."""
        return torch.empty(size, dtype=dtype, device=like.device)

    def matmul(self, a: Array, b: Array, workspace: Array | None = None) -> Array:
        """Return ``a @ b``, in `workspace` where there is one."""
        if workspace is None:
            return torch.matmul(a, b)
        lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        shape = torch.Size((*lead, a.shape[-2], b.shape[-1]))
        return torch.matmul(a, b, out=workspace[: shape.numel()].view(shape))

    def exp_(self, x: Array) -> Array:
        """Overwrite `x` with its exponential."""
        return x.exp_()

    def hide(self, scores: Array, allowed: Array) -> Array:
        """Overwrite `scores` with -inf where not `allowed`."""
        return scores.masked_fill_(~allowed, -torch.inf)

    def maximum(self, a: Array, b: Array) -> Array:
        """Return the larger of `a` and `b`, NaN where either is NaN."""
        return torch.maximum(a, b)

    def run(self, algorithm: Any, spec: Any, arrays: dict[str, Any]) -> tuple[Array, ...]:
        """Call the algorithm; refuse where autograd would need what it overwrites."""
        if torch.is_grad_enabled():
            wanted = [k for k, x in arrays.items() if getattr(x, "requires_grad", False)]
            if wanted and not spec.functional:
                raise NotImplementedError(
                    f"{', '.join(wanted)} require gradients, which implementation='chunked' does "
                    "not give yet: call it under torch.no_grad(), or ask for "
                    "implementation='standard', which autograd follows"
                )
        return tuple(algorithm(self, spec, arrays))
