"""PyTorch's autograd around operations that come with rules for their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .generic import Array


def is_shape(x: Array) -> bool:
    """Whether `x` has no values (on the meta device, or fake), and nothing traces the call."""
    return (x.is_meta or is_fake(x)) and get_proxy_mode() is None


def is_fake(x: Array) -> bool:
    """Whether `x` has no values and perhaps no known lengths, as PyTorch's compiler traces it."""
    return isinstance(x, FakeTensor)


def is_captured(x: Array) -> bool:
    """Whether what is done with `x` is captured for a CUDA graph, and nobody can look at it."""
    return bool(x.is_cuda and torch.cuda.is_current_stream_capturing())


def in_autocast(x: Array) -> bool:
    """Whether `torch.autocast` holds where `x` lives."""
    device = "cpu" if x.is_cpu else x.device.type  # spare a CPU the question, which takes longer
    return device != "meta" and torch.is_autocast_enabled(device)


def computed(
    adapter: Any,
    operation: Any,
    spec: Any,
    data: dict[str, Any],
    inputs: dict[str, Array],
    watched: bool = True,
) -> dict[str, Array]:
    """Return the operation's results, in the dtypes that they are asked for.

    A kernel sees no arrays but its own: where these are not `watched`, nothing is recorded.
    """
    like = inputs["query"]
    if is_shape(like):
        shapes = operation.shapes(spec, inputs)
        return {name: like.new_empty(shape, dtype=t) for name, (shape, t) in shapes.items()}
    mixed = in_autocast(like)
    recorded = torch.is_grad_enabled() and (watched or not operation.calls_kernel)
    found: dict[str, Array]
    if not (recorded or mixed):  # spare the contexts
        found = operation(adapter, spec, data, inputs)
        return found
    plain = torch.autocast(like.device.type, enabled=False) if mixed else nullcontext()
    with torch.no_grad(), plain:
        found = operation(adapter, spec, data, inputs)
    return found


class Call:
    """One call of an operation, without its tensors; these travel beside it in one tuple.

    A context that kept them would defeat checkpointing and the hooks on saved tensors.
    """

    def __init__(
        self,
        adapter: Any,
        operation: Any,
        spec: Any,
        data: dict[str, Any],
        names: tuple[str, ...],
        held: int,
    ) -> None:
        self.adapter, self.operation, self.spec, self.names = adapter, operation, spec, names
        self.data = _rebuilt(data, count()) if held else data  # numbers in place of tensors
        self.size = len(names) + held

    def arrays(self, tensors: tuple[Array, ...]) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return ``(data, inputs)`` with these tensors in them."""
        first = len(self.names)
        inputs = dict(zip(self.names, tensors[:first], strict=True))
        held = tensors[first:]
        return _filled(self.data, held) if held else self.data, inputs

    def run(self, tensors: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return the operation's results, in the order of ``operation.outputs``."""
        found = computed(self.adapter, self.operation, self.spec, *self.arrays(tensors))
        return tuple(_whole(found[name]) for name in self.operation.outputs)


class _Place(int):
    """The number of a tensor in the data of a call."""


_NO_TENSORS = frozenset({type(None), bool, int, float})
_NOTHING = ()


def tensors_in(x: Any) -> list[Array]:
    """Return the tensors in a nest of dicts and tuples."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, tuple | list):
        return []
    found: list[Array] = []
    for y in x:
        if type(y) in _NO_TENSORS or y is _NOTHING:  # spare them the question, which takes longer
            continue
        if isinstance(y, dict | tuple | list):
            found += tensors_in(y)
        elif isinstance(y, torch.Tensor):
            found.append(y)
    return found


def _rebuilt(x: Any, numbers: Iterator[int]) -> Any:
    """Return the nest with places for its tensors."""
    if isinstance(x, torch.Tensor):
        return _Place(next(numbers))
    if isinstance(x, dict):
        return {name: _rebuilt(y, numbers) for name, y in x.items()}
    return tuple(_rebuilt(y, numbers) for y in x) if isinstance(x, tuple) else x


def _filled(x: Any, tensors: tuple[Array, ...]) -> Any:
    """Return the nest with tensors in their places."""
    if isinstance(x, _Place):
        return tensors[x]
    if isinstance(x, dict):
        return {name: _filled(y, tensors) for name, y in x.items()}
    return tuple(_filled(y, tensors) for y in x) if isinstance(x, tuple) else x


def _whole(x: Array) -> Array:
    """Return `x` as no view, so that autograd lets the caller write to it."""
    return x.data if type(x) is torch.Tensor and x._is_view() else x


class Operation(torch.autograd.Function):  # type: ignore[misc]
    """An operation with its rules; its arguments are a `Call` and the call's tensors."""

    @staticmethod
    def forward(call: Call, *tensors: Array) -> tuple[Array, ...]:
        """Compute."""
        return call.run(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, ...]) -> None:
        """Keep the inputs, and the outputs where the rules want them."""
        ctx.call, *tensors = inputs
        operation = ctx.call.operation
        found = dict(zip(operation.outputs, output, strict=True))
        ctx.mark_non_differentiable(*(found[name] for name in operation.residuals))
        ctx.set_materialize_grads(not operation.residuals)  # which would have zeros as gradients
        kept = (*tensors, *(output if operation.keeps_outputs else ()))
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Array | None) -> tuple[Array | None, ...]:
        """Call the rule for gradients."""
        call, at = ctx.call, _point(ctx)
        operation = call.operation
        needed = zip(call.names, ctx.needs_input_grad[1:], ctx.next_functions, strict=False)
        wanted = tuple(name for name, needs, (node, _) in needed if needs and _is_asked(node))

        def rule(*cotangents: Array | None) -> tuple[Array | None, ...]:
            bars = {
                name: torch.zeros_like(at.outputs[name]) if x is None else x
                for name, x in zip(operation.outputs, cotangents, strict=True)
                if name not in operation.residuals
            }
            found = operation.cotangent(at, bars, wanted)
            return tuple(found.get(name) for name in call.names)

        rest = len(ctx.needs_input_grad) - 1 - len(call.names)
        return (None, *_one_by_one(rule, cotangents), *(None,) * rest)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Array | None) -> tuple[Array | None, ...]:
        """Call the rule for tangents."""
        call = ctx.call
        operation = call.operation
        if operation.tangent is None:
            raise NotImplementedError(
                "forward mode of forward mode is not given for attention: take "
                "torch.func.hessian, or jacfwd of jacrev, for second derivatives"
            )
        at, still = _point(ctx), operation.residuals

        def rule(*tangents: Array | None) -> tuple[Array | None, ...]:
            named = zip(call.names, tangents, strict=False)
            found = operation.tangent(at, {name: x for name, x in named if x is not None})
            return tuple(None if name in still else found.get(name) for name in operation.outputs)

        return _one_by_one(rule, tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: Call, *tensors: Array
    ) -> tuple[tuple[Array, ...], tuple[int, ...]]:
        """Call once for each entry."""
        dims = in_dims[1:]
        results = [
            Operation.apply(
                call,
                *(
                    x if dim is None else x.select(dim, i)
                    for x, dim in zip(tensors, dims, strict=True)
                ),
            )
            for i in range(info.batch_size)
        ]
        stacked = tuple(map(torch.stack, zip(*results, strict=True)))
        return stacked, (0,) * len(stacked)


class Recorded(Operation):
    """The same for a call outside of `torch.func`: PyTorch takes less time with one method."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Array) -> tuple[Array, ...]:  # type: ignore[override]
        """Compute, and keep what the rules want."""
        output = call.run(tensors)
        Operation.setup_context(ctx, (call, *tensors), output)
        return output

    setup_context = torch.autograd.Function.setup_context  # as if it were not there


def _is_asked(node: Any) -> bool:
    """Whether a gradient goes on to a node: not in a backward pass that asks for others alone."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # it cannot be told of a leaf for which `autograd.grad` asks
        return True


_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _one_by_one(
    rule: Callable[..., tuple[Array | None, ...]], arrays: tuple[Array | None, ...]
) -> tuple[Array | None, ...]:
    """Call a rule; with `vectorize` of `torch.autograd.functional`, and the like, for each entry.

    PyTorch hands over tensors then that are not torch.vmap's, and that nothing can be written into.
    """
    if not any(x is not None and _is_batched(x) for x in arrays):
        return rule(*arrays)
    level = max(1, torch._C._vmapmode_increment_nesting() - 1)  # unknown in a GPU's own thread
    torch._C._vmapmode_decrement_nesting()

    def entries(x: Array | None, size: int) -> Array | None:
        return None if x is None else torch._remove_batch_dim(x, level, size, 0)

    ones = [entries(x, 1) for x in arrays]  # what is not batched has one then
    size = max(len(x) for x in ones if x is not None)
    given = [entries(x, size) for x in arrays]
    found = [rule(*(None if x is None else x[i] for x in given)) for i in range(size)]
    return tuple(
        None if x[0] is None else torch._add_batch_dim(torch.stack(x), 0, level)
        for x in zip(*found, strict=True)
    )


def _point(ctx: Any) -> Any:
    """Return where the rules are called, from what a context keeps."""
    call, saved = ctx.call, ctx.saved_tensors
    operation = call.operation
    outputs = dict(zip(operation.outputs, saved[call.size :], strict=False))
    arrays = call.arrays(saved[: call.size])
    return operation.point(call.adapter.differentiable, call.spec, *arrays, outputs)
