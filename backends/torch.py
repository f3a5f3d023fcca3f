"""PyTorch: products, exponentials and masks in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch.autograd import forward_ad

from . import _bits, generic, torch_lifted, torch_native
from ._functions import of_floating
from ._sizes import OF_CPU, OF_GPU, Footprint, TileSizes
from .generic import LOG2_E, NO_COMPLEX, SMALL, Array
from .torch_autograd import (
    Call,
    Operation,
    Recorded,
    computed,
    in_autocast,
    is_captured,
    is_fake,
    tensors_in,
)


def _is_watched(tensors: Sequence[Array]) -> bool:
    """Whether derivatives with respect to some of these may be asked for."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    if torch._C._are_functorch_transforms_active() and any(map(torch_native.is_wrapped, tensors)):
        return True
    if forward_ad._current_level < 0:  # spare the question, which takes longer
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


@functools.cache
def _fused_exp_difference() -> Callable[[Array, Array], Array] | None:
    """Return a CUDA kernel, None where PyTorch has no compiler for it."""
    jiterator = getattr(torch.cuda, "jiterator", None)
    if jiterator is None or torch.version.hip is not None:
        return None
    code = "template <typename T> T exp_difference(T x, T y) { return ::exp(x - y); }"
    kernel: Callable[[Array, Array], Array] = jiterator._create_jit_fn(code)
    return kernel


def _flat(x: Array, lead: torch.Size) -> Array:
    """Return `x` (…, n, m), broadcast to the leading axes `lead`, with one axis for these."""
    if x.shape[:-2] != lead:
        x = x.expand(*lead, *x.shape[-2:])
    return x if x.ndim == 3 else x.flatten(0, -3)


def _are_one(lengths: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether axes of these lengths are one axis in memory."""
    axes = [axis for axis in zip(lengths, strides, strict=False) if axis[0] != 1]
    return all(one[1] == two[0] * two[1] for one, two in pairwise(axes))


class Adapter(generic.Adapter):
    """PyTorch on any of its devices."""

    name = "torch"
    autodiff = True

    def is_floating(self, dtype: Any) -> bool:
        """Whether `dtype` is floating, the ones of 8 bits included."""
        return bool(dtype.is_floating_point)

    def is_integer(self, dtype: Any) -> bool:
        """Whether `dtype` is an integer, the barely supported unsigned ones included."""
        return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)

    def check(self, x: Array, name: str) -> None:
        """Refuse sparse, nested and distributed tensors."""
        kind = type(x).__name__
        if kind == "MaskedTensor":
            raise TypeError(f"{name} is a MaskedTensor; pass its data, and what it shows as `mask`")
        if kind == "DTensor":  # of torch.distributed, which is slow to import
            raise TypeError(
                f"{name} is a DTensor; pass its local part, {name}.to_local(): attention of shards "
                "of batch or heads, or of replicated tensors, is that of the parts"
            )
        if x.is_nested:
            raise TypeError(f"{name} is a nested tensor; pad it, or use masks.Segments")
        if x.layout != torch.strided:
            raise TypeError(f"{name} is a tensor of layout {x.layout}; it must be dense (strided)")

    def device(self, x: Array) -> Any:
        """Where `x` lives."""
        return x.device

    def tile_sizes(self, like: Array, backward: bool = False) -> TileSizes:
        """Return the sizes for GPUs, or those for a CPU, whose threads share a tile.

        The backward pass has two tiles at a time, each with half as many keys.
        """
        if like.device.type != "cpu":
            return OF_GPU
        cols = OF_CPU.cols // 2 if backward else OF_CPU.cols
        elements = torch.get_num_threads() * OF_CPU.rows * cols
        return OF_CPU._replace(cols=cols, elements=elements, shared=True)

    def setting(self, arrays: Sequence[Array]) -> Any:
        """Return the modes, and how each tensor lies in memory and is watched.

        None of tensors without values, whose lengths may be symbols.
        """
        query = arrays[0]
        if query.is_meta or any(map(is_fake, arrays)):
            return None
        strides = [x.stride() for x in arrays]
        watched = _is_watched(arrays) and tuple(
            (_is_watched([x]), torch_native.is_batched(x)) for x in arrays
        )
        modes = torch_native.modes()
        return query.device, torch.get_num_threads(), is_captured(query), watched, *modes, *strides

    def new(self, like: Array, shape: Any, fill: float, dtype: Any) -> Array:
        """Return a tensor of `shape` and `dtype` full of `fill`, on the device of `like`."""
        return torch.full(tuple(shape), fill, dtype=dtype, device=like.device)

    def index(self, like: Array, size: int) -> Array:
        """Return the integers 0 … size-1 on the device of `like`."""
        return torch.arange(size, device=like.device)

    def cast(self, x: Array, dtype: Any) -> Array:
        """Return `x` in `dtype`."""
        return x if x.dtype == dtype else x.to(dtype)

    def cut(self, x: Array, cuts: Any) -> Array:
        """Return a part of `x`."""
        for axis, cut in enumerate(cuts):
            if cut is not None:
                x = x.narrow(axis, *cut)
        return x

    def in_order(self, x: Array) -> Array:
        """Return `x` such that axes side by side can be put together by a view."""
        return x.contiguous()

    def matrix_transpose(self, x: Array) -> Array:
        """Return a view with the last two axes exchanged."""
        return x.mT

    def workspace(self, like: Array, size: int, dtype: Any) -> Array | None:
        """Return flat memory for `size` elements."""
        return torch.empty(size, dtype=dtype, device=like.device)

    def matmul(self, a: Array, b: Array, workspace: Array | None = None) -> Array:
        """Return ``a @ b``, in `workspace` where there is one."""
        if workspace is None:
            return torch.matmul(a, b)
        lead = a.shape[:-2]
        if lead != b.shape[:-2]:
            lead = torch.broadcast_shapes(lead, b.shape[:-2])
        shape = torch.Size((*lead, a.shape[-2], b.shape[-1]))
        out = workspace[: shape.numel()].view(shape)
        a, b = (_flat(x, lead) for x in (a, b))
        torch.bmm(a, b, out=_flat(out, lead))
        return out

    def add_product(self, x: Array, a: Array, b: Array) -> Array:
        """Add to `x` in the product itself, where the memory of `x` allows it."""
        if not x.is_contiguous():
            return x.add_(torch.matmul(a, b))
        lead = x.shape[:-2]
        _flat(x, lead).baddbmm_(_flat(a, lead), _flat(b, lead))
        return x

    def exp_difference(self, x: Array, y: Array) -> Array:
        """Overwrite `x` with ``exp(x - y)``, or make it in one pass over memory.

        On a CPU a power of 2 takes PyTorch less time than one of e.
        """
        if x.is_cpu:
            return x.sub_(y).mul_(LOG2_E).exp2_()
        fused = _fused_exp_difference() if x.is_cuda else None
        return x.sub_(y).exp_() if fused is None else fused(x, y)

    def cap(self, s: Array, softcap: float) -> Array:
        """Overwrite `s` with ``softcap * tanh(s / softcap)``."""
        return s.div_(softcap).tanh_().mul_(softcap)

    def weigh(self, s: Array, top: Array) -> tuple[Array, Array, Array]:
        """Overwrite the scores with the weights.

        On a CPU maxima that are small may as well be 0, which need not be subtracted.
        """
        if not s.is_cpu:
            return super().weigh(s, top)
        largest = s.amax(-1, keepdim=True)
        low, high = largest.aminmax()
        if float(low) >= -SMALL and float(high) <= SMALL and float(top.max()) <= SMALL:
            top = top if top.ndim == 0 and not top else top.new_zeros(())
        else:
            top = torch.maximum(top, largest)
            s.sub_(top)
        weights = s.mul_(LOG2_E).exp2_()
        return weights, weights.sum(-1, keepdim=True), top

    def ordered(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Return unsigned integers, which PyTorch cannot compare, as signed ones."""
        if a.dtype not in _SIGNED and b.dtype not in _SIGNED:
            return a, b
        if a.dtype == b.dtype:
            return a.view(_SIGNED[a.dtype]), b.view(_SIGNED[b.dtype])
        return a.to(torch.int64), b.to(torch.int64)

    def looks(self, like: Array) -> bool:
        """Whether `like` is on a CPU; elsewhere Python would wait."""
        return bool(like.is_cpu)

    def some(self, x: Array) -> Array:
        """Look at bytes: PyTorch's `any` takes many times as long as its maximum."""
        return x.view(torch.uint8).amax(tuple(range(x.ndim - 1))).view(torch.bool)

    def every(self, x: Array) -> Array:
        """Look at bytes, likewise."""
        return x.view(torch.uint8).amin(tuple(range(x.ndim - 1))).view(torch.bool)

    def hide(self, x: Array, allowed: Array, fill: float) -> Array:
        """Overwrite `x` with `fill` where not `allowed`."""
        if not x.is_cpu or x.numel() < _bits.FEW:
            return x.masked_fill_(~allowed, fill)
        if allowed.view(torch.uint8).min():  # all are
            return x
        return _bits.hide(self, x, allowed, fill)

    def barrier(self, allowed: Array, dtype: Any) -> Array:
        """Return the barrier by the bits of numbers, whose zero has none."""
        return _bits.barrier(self, allowed, dtype)

    def maximum(self, a: Array, b: Array) -> Array:
        """Return the larger of `a` and `b`, NaN where either is NaN."""
        return torch.maximum(a, b)

    def footprint(self, like: Array) -> Footprint:
        """Return what PyTorch holds of its own; on CUDA its fused exponential is a new tensor."""
        powers = int(like.device.type == "cuda" and _fused_exp_difference() is not None)
        found = Footprint(weights=0, powers=powers, products=0, hashes=3, bits=like.is_cpu)
        return found._replace(buffers=3_072, positions=0, objects=0, expands=True)

    def watched(self, arrays: Any) -> bool:
        """Whether some tensor requires gradients or is differentiated by `torch.func`."""
        return _is_watched(tensors_in(arrays))

    def nonfinite(self, x: Array, dtype: Any) -> Array | bool:
        """Look at the sum of `x`; on a CPU by Python, which takes less time."""
        if x.is_cpu:
            return not isfinite(x.sum(dtype=dtype).item())
        return super().nonfinite(x, dtype)

    def when(
        self, test: Array | bool, then: Callable[[], Array], other: Callable[[], Array]
    ) -> Array:
        """Branch; but a CUDA graph that is captured cannot, and takes what is always right."""
        unknown = not isinstance(test, bool) and is_captured(test)
        return then() if unknown or test else other()

    def promoted(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """Cast to the dtype of a surrounding `torch.autocast`, as PyTorch's own attention does."""
        query = tokens["query"]
        if not in_autocast(query):
            return tokens
        dtype = torch.get_autocast_dtype(query.device.type)
        return {
            name: x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            for name, x in tokens.items()
        }

    def random_seed(self, like: Array) -> Array:
        """Draw from the generator that `torch.manual_seed` sets and dropout draws from."""
        return torch.randint(2**63 - 1, (), device=like.device)

    def lift(
        self,
        function: Callable[..., Array],
        example: Callable[..., tuple[Array, ...]],
        sizes: list[Any],
        arrays: list[Array],
    ) -> tuple[Callable[..., Array], tuple[Array, ...]]:
        """Find the captured tensors by a call that is watched."""
        with torch.no_grad():
            args = example(sizes[0][0], 1, 1)

        def is_derived(captured: tuple[Array, ...]) -> bool:
            return _is_watched([*arrays, *captured])

        return torch_lifted.lift(function, args, is_derived)

    def pushforward(
        self, function: Any, primals: tuple[Array, ...], tangents: tuple[Array, ...]
    ) -> Any:
        """Differentiate by `torch.func`: reverse mode twice, since forward mode does not nest.

        The gradients are linear in the cotangent, and the transpose of that map is the tangent.
        """
        function, floating = of_floating(function, primals, self.is_floating)
        xs = tuple(primals[i] for i in floating)
        found = function(*xs)

        def back(cotangent: Any) -> Any:
            return torch.func.vjp(function, *xs)[1](cotangent)

        zero = tuple(map(torch.zeros_like, found)) if isinstance(found, tuple) else found * 0
        _, push = torch.func.vjp(back, zero)
        return push(tuple(tangents[i] for i in floating))[0]

    def pullback(
        self, function: Any, primals: tuple[Array, ...], cotangent: Array
    ) -> tuple[Array | None, ...]:
        """Differentiate by `torch.func`."""
        function, floating = of_floating(function, primals, self.is_floating)
        _, vjp = torch.func.vjp(function, *(primals[i] for i in floating))
        found = dict(zip(floating, vjp(cotangent), strict=True))
        return tuple(map(found.get, range(len(primals))))

    def no_kernel(self, inputs: dict[str, Array]) -> str | None:
        """Look at how they lie in memory; where they are does not matter."""
        for name in ("query", "key", "value"):
            x = inputs[name]
            if x.stride(-1) != 1:
                return "the kernels want contiguous rows"
            if x.ndim > 4 and not _are_one(x.shape[:-3], x.stride()):
                return "the kernels want one batch axis, which would be a copy"
        return None

    def kernel(self, call: Any, adds: bool) -> tuple[Any, bool, str]:
        """Return the kernel that PyTorch's own attention would take."""
        return torch_native.choose(call, adds)

    def differentiable(
        self, operation: Any, spec: Any, data: dict[str, Any], inputs: dict[str, Array]
    ) -> dict[str, Array]:
        """Call the operation as an `autograd.Function`, which PyTorch's compiler leaves as it is.

        The compiler would unroll the loops over the tiles, and it refuses a Function with a `jvp`.
        A call of `attention` is one operator to it, and does not come here before it runs; other
        entry points do.
        """
        traced = torch.compiler.is_compiling()
        apply = torch.compiler.disable(self._apply) if traced else self._apply
        found: dict[str, Array] = apply(operation, spec, data, inputs)
        return found

    def _apply(
        self, operation: Any, spec: Any, data: dict[str, Any], inputs: dict[str, Array]
    ) -> dict[str, Array]:
        held = tensors_in(data)
        if not _is_watched([*inputs.values(), *held]):
            return computed(self, operation, spec, data, inputs, watched=False)
        if any(x.is_complex() and _is_watched([x]) for x in held):
            raise TypeError(NO_COMPLEX)
        operation = operation.with_residuals(spec)
        call = Call(self, operation, spec, data, tuple(inputs), len(held))
        # No derivative is asked of what is in `data`.
        constants = (x.detach() if x.is_floating_point() else x for x in held)
        function = Operation if torch._C._are_functorch_transforms_active() else Recorded
        found = function.apply(call, *inputs.values(), *constants)
        return dict(zip(operation.outputs, found, strict=True))
