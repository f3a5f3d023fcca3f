"""Attention as one operator of PyTorch's compiler, which never looks inside of it.

The operator's arguments are plain: tensors, numbers and strings, so that a graph that holds it can
be saved and read in another process.  Its gradients are a second operator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .generic import Array

Given = dict[str, Any]

ARGUMENTS = {
    "query": "Tensor",
    "key": "Tensor",
    "value": "Tensor",
    "bias": "Tensor?",
    "sinks": "Tensor?",
    "scale_tensor": "Tensor?",
    "query_offset_tensor": "Tensor?",
    "key_offset_tensor": "Tensor?",
    "dropout_seed_tensor": "Tensor?",
    "mask_tensors": "Tensor[]?",  # None for none: AOTInductor makes it of an empty list
    "masks": "str",
    "mask_widths": "SymInt[]?",
    "scale": "float?",
    "query_offset": "SymInt?",
    "key_offset": "SymInt?",
    "dropout_seed": "SymInt?",
    "causal": "bool",
    "softcap": "float?",
    "dropout": "float",
    "layout": "str",
    "query_chunk_size": "SymInt?",
    "key_chunk_size": "SymInt?",
    "memory_limit": "str?",
    "compute_dtype": "str?",
    "implementation": "str",
    "return_lse": "bool",
    "trains": "bool",  # whether to keep what the gradients need
    "trains_bias": "bool",  # whether that of the bias is among them
}
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks", "scale_tensor")
RESULTS = ("out", "lse", "low", "exact")
INTEGERS = (int, torch.SymInt)
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
TENSOR = torch.Tensor
DTYPES: dict[Any, str] = {"float32": "float32", "float64": "float64"}
DTYPES |= {torch.float32: "float32", torch.float64: "float64"}


def outside(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """Return the function as one that the compiler calls between two graphs."""
    try:
        return torch.compiler.disable(function, reason=reason)  # type: ignore[no-any-return]
    except TypeError:  # an older PyTorch, which takes no reason
        return torch.compiler.disable(function)  # type: ignore[no-any-return]


def transformed() -> bool:
    """Whether the call is inside of a transformation of `torch.func`, or of forward mode."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return bool(forward_mode or torch._C._are_functorch_transforms_active())


def exporting() -> bool:
    """Whether a program is exported by running the code, which leaves nothing out."""
    return not torch.compiler.is_dynamo_compiling()


def elsewhere() -> bool:
    """Whether it is another thread that compiles, of which PyTorch tells every thread."""
    return exporting() and _get_current_dispatch_mode() is None


def is_tensor(x: Any) -> bool:
    """Whether `x` is a tensor."""
    return isinstance(x, TENSOR)


def is_numpy(x: Any) -> bool:
    """Whether `x` is a number of NumPy, which the compiler takes for an array without axes."""
    numpy: Any = sys.modules.get("numpy")
    return numpy is not None and isinstance(x, (numpy.ndarray, numpy.generic)) and not x.shape


def example() -> Array:
    """Return a tensor."""
    return torch.empty(0)


def trains(*tensors: Array | None) -> bool:
    """Whether gradients with respect to one of the tensors may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def register(
    namespace: str,
    forward: Callable[[Given, tuple[str, ...]], Given],
    backward: Callable[[Given, Given, Given, tuple[str, ...]], Given],
) -> Any:
    """Define the operators ``attention`` and ``attention_backward``; return the first.

    ``forward(given, names)`` returns those results, `given` being the arguments by name.
    ``backward(given, results, gradients, names)`` returns the gradients of those arguments, from
    those of `out` and `lse` where there are any.
    """
    arguments = ", ".join(f"{kind} {name}" for name, kind in ARGUMENTS.items())
    saved = ", ".join(f"Tensor {name}" for name in RESULTS)

    def attend(*args: Any) -> tuple[Array, ...]:
        given = _named(args)
        names = _kept(given)
        with torch.no_grad(), torch.autocast(given["query"].device.type, enabled=False):
            found = forward(given, names)
        return _results(given, {name: found[name].contiguous() for name in names})

    def attend_backward(
        d_out: Array | None, d_lse: Array | None, wanted: str, *args: Any
    ) -> list[Array]:
        results, given = args[: len(RESULTS)], _named(args[len(RESULTS) :])
        found = {name: x for name, x in zip(RESULTS, results, strict=True) if name in _kept(given)}
        bars = {name: x for name, x in (("out", d_out), ("lse", d_lse)) if x is not None}
        names = tuple(wanted.split())
        with torch.no_grad(), torch.autocast(given["query"].device.type, enabled=False):
            gradients = backward(given, found, bars, names)
        return [gradients[name].contiguous() for name in names]

    def fake(*args: Any) -> tuple[Array, ...]:
        given = _named(args)
        shapes, empty = _shapes(given), given["query"].new_empty
        kept = {name: shapes[name] for name in _kept(given)}
        return _results(given, {name: empty(shape, dtype=t) for name, (shape, t) in kept.items()})

    def fake_backward(
        d_out: Array | None, d_lse: Array | None, wanted: str, *args: Any
    ) -> list[Array]:
        given = _named(args[len(RESULTS) :])
        return [
            given["query"].new_empty(given[name].shape, dtype=given[name].dtype)
            for name in wanted.split()
        ]

    # What looks at numbers cannot be captured for a CUDA graph.
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # since PyTorch 2.9
    define = partial(torch.library.custom_op, **({} if unsafe is None else {"tags": (unsafe,)}))
    operator = define(
        f"{namespace}::attention",
        attend,
        mutates_args=(),
        schema=f"({arguments}) -> ({', '.join(['Tensor'] * len(RESULTS))})",
    )
    operator.register_fake(fake)
    of_gradients = define(
        f"{namespace}::attention_backward",
        attend_backward,
        mutates_args=(),
        schema=f"(Tensor? d_out, Tensor? d_lse, str wanted, {saved}, {arguments}) -> Tensor[]",
    )
    of_gradients.register_fake(fake_backward)
    _differentiate(operator, of_gradients)
    return operator


def _differentiate(operator: Any, of_gradients: Any) -> None:
    """Give the one operator the other one for its gradients."""
    places = [place for place, kind in enumerate(ARGUMENTS.values()) if kind.startswith("Tensor")]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Array, ...]) -> None:
        ctx.set_materialize_grads(False)
        *alone, masks = (inputs[place] for place in places)
        ctx.save_for_backward(*output, *alone, *(masks or ()))
        ctx.rest = inputs[places[-1] + 1 :]

    def back(ctx: Any, d_out: Array | None, d_lse: Array | None, *_: Any) -> tuple[Any, ...]:
        saved, first = ctx.saved_tensors, len(RESULTS)
        alone = first + len(places) - 1
        masks = list(saved[alone:]) or None
        wanted = [
            name
            for name, needs in zip(ARGUMENTS, ctx.needs_input_grad, strict=True)
            if needs and name in DIFFERENTIABLE
        ]
        args = (*saved[first:alone], masks, *ctx.rest)
        found = of_gradients(d_out, d_lse, " ".join(wanted), *saved[:first], *args)
        gradients = dict(zip(wanted, found, strict=True))
        return tuple(
            [None] * len(masks) if masks and name == "mask_tensors" else gradients.get(name)
            for name in ARGUMENTS
        )

    def refuse(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "second derivatives of attention are not given in compiled or exported code; take them "
            "outside of it"
        )

    operator.register_autograd(back, setup_context=setup)
    of_gradients.register_autograd(refuse)


def _named(args: tuple[Any, ...]) -> Given:
    return dict(zip(ARGUMENTS, args, strict=True))


def _kept(given: Given) -> tuple[str, ...]:
    """Return the names of the results that a call has; the others are empty."""
    if not given["trains"]:
        return RESULTS[: 1 + given["return_lse"]]
    dtype = given["query"].dtype
    rounded = dtype != _compute(given) and not _kernel_may_do(given)
    return RESULTS if rounded else RESULTS[:3]


def _kernel_may_do(given: Given) -> bool:
    """Whether PyTorch's own kernel may compute a call in low precision, as it may off the CPU.

    It makes no results in the compute dtype.
    """
    further = ("bias", "sinks", "scale_tensor", "softcap", "query_chunk_size", "key_chunk_size")
    return (
        given["query"].device.type != "cpu"
        and given["implementation"] in ("auto", "native")
        and not given["masks"]
        and not given["dropout"]
        and all(given[name] is None for name in further)
    )


def _compute(given: Given) -> Any:
    """Return the dtype of scores, sums and lse."""
    asked, dtype = given["compute_dtype"], given["query"].dtype
    if asked is not None:
        return getattr(torch, asked)
    return dtype if dtype == torch.float64 else torch.float32


def _shapes(given: Given) -> dict[str, tuple[Any, Any]]:
    """Return shape and dtype of each result; lengths may be symbols."""
    tokens = [given[name] for name in ("query", "key", "value")]
    if _swapped(given):
        tokens = [x.transpose(-3, -2) for x in tokens]
    query, value = tokens[0], tokens[-1]
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tokens))
    lse = (*batch, *query.shape[-3:-1])
    out = (*lse, value.shape[-1])
    if _swapped(given):
        out = (*batch, query.shape[-2], query.shape[-3], value.shape[-1])
    compute = _compute(given)
    return {
        "out": (out, query.dtype),
        "lse": (lse, compute),
        "low": (lse, compute),
        "exact": (out, compute),
    }


def _swapped(given: Given) -> bool:
    """Whether the arrays have their positions before their heads."""
    return bool(given["layout"] == "nhd" and given["query"].ndim > 2)


def _results(given: Given, found: Given) -> tuple[Array, ...]:
    """Return all results, empty ones for those that a call does not have."""
    none = {name: given["query"].new_empty(0) for name in RESULTS if name not in found}
    return tuple((found | none)[name] for name in RESULTS)
