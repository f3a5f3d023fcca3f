"""What a call holds at its peak, and the largest tiles that keep it within a limit."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import starmap
from math import prod
from numbers import Integral
from typing import Any

from ._array_masks import axes_of_pairs
from ._calculus import RESULTS
from ._native import Native
from ._partition import Parts
from ._plain import is_folded
from ._problem import with_arrays
from ._request import Request
from ._terms import Counted, Term, fullest, total
from .masks import Dense

Array = Any

_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_UNITS = {"B": 1} | {
    f"{letter}{middle}B": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kMGT", start=1)
}


def bytes_of(memory_limit: Any) -> int | None:
    """Return a number of bytes that is given as an int, or as "64MB" or "64MiB".

    Examples
    --------
    >>> bytes_of("64MB"), bytes_of("1.5 MiB"), bytes_of("64KiB"), bytes_of(4096)
    (64000000, 1572864, 65536, 4096)
    """
    if memory_limit is None:
        return None
    limit = memory_limit
    if isinstance(limit, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)\s*", limit)
        unit = _UNITS.get(found[2].replace("K", "k")) if found else None
        limit = int(float(found[1]) * unit) if found and unit else None
    if not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1:
        kind = ValueError if isinstance(memory_limit, Integral | float | str) else TypeError
        raise kind(
            "memory_limit must be a positive number of bytes: an int, or a string like '64MB' "
            f"(10^6 bytes) or '64MiB' (2^20); got {memory_limit!r}"
        )
    return int(limit)


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


def _forward(xp: Any, operation: Any, spec: Any, data: Any, inputs: Any) -> Any:
    return operation(xp, spec, data, inputs)


def _with_gradients(
    xp: Any, operation: Any, spec: Any, data: Any, inputs: Any, bars: dict[str, Array]
) -> Any:
    """Return `out` and the gradients of the inputs, given that of `out`."""
    operation = operation.with_residuals(spec)
    found = operation(xp, spec, data, inputs)
    bars = {name: bars.get(name, xp.zeros_like(x)) for name, x in found.items() if name in RESULTS}

    def apply(operation: Any, spec: Any, data: Any, inputs: Any) -> Any:
        return operation(xp, spec, data, inputs)

    at = operation.point(apply, spec, data, inputs, found)
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
        packing = counted.packing(training=False)
        if training:
            later = replace(counted, spec=request.spec.backward)
            packing = max(packing, later.packing(training=True), key=total)
        return [
            Term(scores.name, scores.formula, min(scores.bytes, compiled)),
            Term("other temporaries", "XLA's memory analysis", max(0, compiled - scores.bytes)),
            *packing,
        ]
    again: list[Term] = []
    if isinstance(algorithm, Native):
        if not (training and algorithm.return_lse):
            return _of_kernel(request, algorithm, counted, training)
        again = _once_more(algorithm, counted)  # and the tiles hold more than a kernel
    passes = [counted.standard() if request.spec.standard else counted.forward()]
    if training:
        told = "- their bytes, which the outputs count"
        passes[0] += [*counted.saved(), Term("gradients to come", told, -to_come)]
        threads = request.xp.at_once(request.spec.blocks)
        counted = replace(counted, spec=request.spec.backward, threads=threads)
        passes.append([*counted.backward(tuple(request.inputs)), *counted.saved()])
    return [term for term in (*max(passes, key=total), *again) if term.bytes]


def _compiled(request: Request, algorithm: Any, training: bool) -> int | None:
    xp, spec = request.xp, request.spec
    if not training:
        ahead = xp.compiled_bytes(_forward, algorithm, spec, request.data, request.inputs)
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
    return Counted(
        spec=spec,
        masks=with_arrays(spec.masks, data),
        d=request.inputs["query"].shape[-1],
        bias_axes=None if bias is None else axes_of_pairs(bias),
        has_sinks="sinks" in request.inputs,
        widens_bias=bias is not None and bias.dtype != spec.compute,
        by_batch=bool(getattr(data["query_offset"], "shape", ())),
        threads=xp.at_once(spec.tasks),
        footprint=xp.footprint(request.inputs["query"]),
        number=number_bytes(xp, spec.compute),
        given=number_bytes(xp, spec.dtype),
    )


def _of_kernel(request: Request, algorithm: Native, counted: Counted, training: bool) -> list[Term]:
    """Return what a kernel of the library's own holds."""
    if algorithm.parts is not None:
        return _of_parts(request, algorithm.parts, algorithm, counted, training)
    spec, kernel = request.spec, algorithm.kernel
    lse = 2 if training else int(not algorithm.return_lse)
    heads, n_q, copies = spec.heads, spec.n_q, 0
    if is_folded(spec, algorithm.causal):
        heads, n_q = spec.key_heads, spec.group * spec.n_q
        copies = (2 + 3 * training) * (spec.n_q > 1)  # of arrays whose heads are not side by side
    batch = prod(spec.batch)
    shapes = (batch, heads, n_q, spec.d_v), (batch, spec.key_heads, spec.n_k, counted.d)
    exact = int(training and algorithm.exact)
    found = [
        *starmap(Term, kernel.scratch(*shapes, counted.number, training)),
        counted.term("lse", lse, "all_heads", "n_q"),
        counted.term("saved: out, not rounded", exact, "all_heads", "n_q", "d_v"),
        counted.term("queries of heads, and the like", copies, "all_heads", "n_q", "d"),
    ]
    return [term for term in found if term.bytes]


def _of_parts(
    request: Request, parts: Parts, algorithm: Native, counted: Counted, training: bool
) -> list[Term]:
    """Return what a kernel holds that is called for parts of a call."""
    spec, number, rows = parts.spec, counted.number, parts.rows
    seen = min(spec.n_k, parts.keys + rows - min(rows, spec.schedule.query_chunk))
    size = replace(spec.schedule, query_chunk=rows, key_chunk=seen)
    part = replace(counted, spec=replace(spec, schedule=size), threads=1)
    queries, keys = ("heads", "query_chunk"), ("key_heads", "key_chunk")
    sizes = {"q": "query_chunk", "k": "key_chunk"}
    pairs = [name for axis, name in sizes.items() if axis in parts.axes]
    *batch, heads = spec.schedule.block
    entries = prod(batch)
    masks = sum(mask.tile_arrays for mask in counted.masks) + (len(counted.masks) > 1)
    spread = sum(n > 1 for n in spec.batch) > 1 and "b" in parts.axes  # over the other batch axes
    given = [mask.allowed for mask in counted.masks if isinstance(mask, Dense)]
    given += [request.inputs["bias"]] if counted.has_bias else []
    ordered = any(algorithm.kernel.reorders(x, parts.folded > 1) for x in given)
    added = bool(counted.masks) * (1 + counted.has_bias) + counted.widens_bias + spread + ordered
    nhd = int(spec.layout == "nhd" and not spec.headless)
    wide, several, gradients = int(counted.widens), int(not parts.one), int(training)
    exact = int(training and algorithm.exact)
    of_rows = (entries, heads * spec.group // parts.folded, parts.folded * rows, spec.d_v)
    shapes = of_rows, (entries, heads, seen, counted.d)
    positions = part.term("positions", int(masks > 0), "key_chunk", number=8)
    of_part = [
        part.term("out of a part", max(wide, int(not parts.at_once)), *queries, "d_v"),
        part.term("gradients of a part", gradients * several, *queries, "d"),
        part.term("gradients of a part", 2 * gradients * several, *keys, "d"),
    ]
    heads_as_one = nhd * int(parts.folded > 1) * (1 + 2 * gradients)
    found = [
        part.term("added to scores", parts.arrays, added, *pairs),
        part.term("added to scores of heads", parts.arrays, parts.copies, *pairs),
        positions,
        part.term("queries of heads, and the like", heads_as_one, *queries, "d"),
        part.term("queries, widened", wide, *queries, "d"),
        part.term("keys and values, widened", 2 * wide, *keys, "d"),
        part.term("gradients, not rounded", gradients * wide, "all_heads", "n_q", "d"),
        part.term("gradients, not rounded", 2 * gradients * wide, "all_key_heads", "n_k", "d"),
        part.term("lse", 1 + gradients, "all_heads", "n_q"),
        part.term("saved: out, not rounded", exact, "all_heads", "n_q", "d_v"),
        *fullest(
            [
                part.term("masks", parts.arrays, masks, *pairs, number=1),
                positions,
            ],
            [*of_part, *starmap(Term, algorithm.kernel.scratch(*shapes, number, training))],
        ),
    ]
    return [term for term in found if term.bytes]


def _once_more(algorithm: Native, counted: Counted) -> list[Term]:
    """Return what a kernel leaves beside the tiles, which compute all again where `lse` counts."""
    exact = int(algorithm.exact)
    return [
        counted.term("out, once more", "all_heads", "n_q", "d_v", number=counted.given),
        counted.term("saved: out of the kernel", exact, "all_heads", "n_q", "d_v"),
    ]
