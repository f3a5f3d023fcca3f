"""What a library's own kernel holds in a call, term by term."""

from __future__ import annotations

from dataclasses import replace
from itertools import starmap
from math import prod

from ._native import Native
from ._partition import Parts
from ._plain import is_folded
from ._request import Request
from ._terms import Counted, Term, fullest
from .masks import Dense


def of_kernel(request: Request, algorithm: Native, counted: Counted, training: bool) -> list[Term]:
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
    return [
        *starmap(Term, kernel.scratch(*shapes, counted.number, training)),
        counted.term("lse", lse, "all_heads", "n_q"),
        counted.term("saved: out, not rounded", exact, "all_heads", "n_q", "d_v"),
        counted.term("queries of heads, and the like", copies, "all_heads", "n_q", "d"),
    ]


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
    return [
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


def once_more(algorithm: Native, counted: Counted) -> list[Term]:
    """Return what a kernel leaves beside the tiles, which compute all again where `lse` counts."""
    exact = int(algorithm.exact)
    return [
        counted.term("out, once more", "all_heads", "n_q", "d_v", number=counted.given),
        counted.term("saved: out of the kernel", exact, "all_heads", "n_q", "d_v"),
    ]
