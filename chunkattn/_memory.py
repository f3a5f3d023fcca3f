"""What a call holds at its peak beyond inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from ._array_masks import axes_of_pairs
from ._calculus import RESULTS
from ._kernel_terms import of_kernel, once_more
from ._mask import with_arrays
from ._native import Native
from ._problem import TOKENS
from ._request import Request
from ._terms import Counted, Term, total
from ._tile_terms import backward, forward, packing, saved, standard

Array = Any

_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of an array that need not exist, for `plan`.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : str or dtype, default "float32"
        Its dtype, by name ("bfloat16") or as a library's own object.
    """

    shape: tuple[int, ...]
    dtype: Any = "float32"


def number_bytes(xp: Any, dtype: Any) -> int:
    """Return the size of a number of a floating dtype."""
    return next(_SIZES[name] for name, known in xp.floats.items() if known == dtype)


def _called(xp: Any, operation: Any, spec: Any, data: Any, inputs: Any) -> Any:
    return operation(xp, spec, data, inputs)


def _with_gradients(
    xp: Any, operation: Any, spec: Any, data: Any, inputs: Any, bars: dict[str, Array]
) -> Any:
    """Return `out` and the gradients of the inputs, given that of `out`."""
    operation = operation.with_residuals(spec)
    found = operation(xp, spec, data, inputs)
    bars = {name: bars.get(name, xp.zeros_like(x)) for name, x in found.items() if name in RESULTS}
    at = operation.point(partial(_called, xp), spec, data, inputs, found)
    gradients = operation.cotangent(at, bars, tuple(inputs))
    return found["out"], gradients


def terms(request: Request, algorithm: Any, *, training: bool, to_come: int = 0) -> list[Term]:
    """Return what a call holds at its fullest moment beyond inputs and outputs.

    With `training` its gradients follow.  If they count as outputs of the whole, `to_come` are the
    bytes of these, which the forward pass does not hold yet.
    """
    compiled = _compiled(request, algorithm, training)
    counted = _counted(request)
    if compiled is not None:
        scores = counted.term("scores", "heads", "query_chunk", "key_chunk")
        packed = packing(counted, training=False)
        if training:
            later = replace(counted, spec=request.spec.backward)
            packed = max(packed, packing(later, training=True), key=total)
        return [
            Term(scores.name, scores.formula, min(scores.bytes, compiled)),
            Term("other temporaries", "XLA's memory analysis", max(0, compiled - scores.bytes)),
            *packed,
        ]
    again: list[Term] = []
    if isinstance(algorithm, Native):
        if not (training and algorithm.return_lse):
            return of_kernel(request, algorithm, counted, training)
        again = once_more(algorithm, counted)  # and the tiles hold more than a kernel
    passes = [standard(counted) if request.spec.standard else forward(counted)]
    if training:
        told = "- their bytes, which the outputs count"
        passes[0] += [*saved(counted), Term("gradients to come", told, -to_come)]
        threads = request.xp.at_once(request.spec.blocks)
        counted = replace(counted, spec=request.spec.backward, threads=threads)
        passes.append([*backward(counted, tuple(request.inputs)), *saved(counted)])
    return [*max(passes, key=total), *again]


def _compiled(request: Request, algorithm: Any, training: bool) -> int | None:
    xp, spec = request.xp, request.spec
    if not training:
        ahead = xp.compiled_bytes(_called, algorithm, spec, request.data, request.inputs)
    else:
        shape, dtype = algorithm.shapes(spec, request.inputs)["out"]
        bars = {"out": ArraySpec(shape, dtype)}
        arrays = (request.data, request.inputs, bars)
        ahead = xp.compiled_bytes(_with_gradients, algorithm, spec, *arrays)
    found: int | None = ahead
    return found


def _counted(request: Request) -> Counted:
    xp, spec, data = request.xp, request.spec, request.data
    bias = request.inputs.get("bias")
    lead = [request.inputs[name].shape[:-3] for name in TOKENS[1:]]
    return Counted(
        spec=spec,
        masks=with_arrays(spec.masks, data),
        d=request.inputs["query"].shape[-1],
        bias_axes=None if bias is None else axes_of_pairs(bias),
        bias_size=0 if bias is None else prod(bias.shape),
        bias_given=0 if bias is None else number_bytes(xp, bias.dtype),
        has_sinks="sinks" in request.inputs,
        widens_bias=bias is not None and bias.dtype != spec.compute,
        by_batch=bool(getattr(data["query_offset"], "shape", ())),
        shares_keys=any(tuple(shape) != spec.batch for shape in lead),
        threads=xp.at_once(spec.tasks),
        footprint=xp.footprint(request.inputs["query"]),
        number=number_bytes(xp, spec.compute),
        given=number_bytes(xp, spec.dtype),
    )
