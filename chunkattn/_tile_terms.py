"""What the tiles of a call hold, term by term, in each pass at its fullest moment.

It was read from the algorithm and from the adapters, for libraries that compute as they are told.
``tests/test_plan.py`` holds it against measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from ._terms import Counted, Term, fullest

Names = tuple[str, ...]

SCORES = ("threads", "heads", "query_chunk", "key_chunk")
ROWS = ("threads", "heads", "query_chunk")
KEYS = ("threads", "key_heads", "key_chunk")
GRADIENTS = {
    "query": ("all_heads", "n_q", "d"),
    "key": ("all_key_heads", "n_k", "d"),
    "value": ("all_key_heads", "n_k", "d_v"),
}


def forward(call: Counted) -> list[Term]:
    """Return the terms of the forward pass at its fullest moment."""
    spec, own = call.spec, call.footprint
    wide, drops, shared = int(call.widens), int(bool(spec.dropout)), int(call.shares_keys)
    product = 1 - call.is_result if call.hides or not call.adds_up else own.products
    product += _in_runs(call, spec.tasks, spec.schedule.key_chunk)
    cut = int(prod(spec.schedule.block) > 1 and spec.schedule.key_chunk < spec.n_k)
    weights = call.term("weights", own.weights + own.powers, *SCORES)
    hashed = call.term("hash for dropout", own.hashes * drops, *SCORES, number=2)
    values = call.term("values, widened", wide, *KEYS, "d_v")
    stacked = int(spec.layout == "nhd" and spec.group > 1)
    before = [
        call.term("queries, as they are scaled", 1 + wide + stacked, *ROWS, "d"),
        call.term("buffers", "threads", own.buffers),
        call.term("objects of Python", own.objects, number=1),
    ]
    tiles = [
        call.term("scores", *SCORES),
        call.term("queries, scaled", *ROWS, "d"),
        call.term("accumulator", int(call.adds_up), *ROWS, "d_v"),
        call.term("sums and maxima", 6, *ROWS),
        call.term("buffers", "threads", own.buffers),
        *_positions(call),
        call.term("objects of Python", own.objects, number=1),
        *fullest(
            *_functions(call),
            [
                call.term("keys, widened", wide, *KEYS, "d"),
                _ordered(call, spec.tasks, "d"),
                call.term("keys, transposed", own.ordered, *KEYS, "d"),
                call.term("keys, for each batch entry", own.expands * shared, *KEYS, "d"),
            ],
            [weights, hashed, values],
            [
                weights,
                call.term("product with values", product, *ROWS, "d_v"),
                values,
                call.term("values, in order", own.ordered * cut, *KEYS, "d_v"),
                call.term("values, for each batch entry", own.expands * shared, *KEYS, "d_v"),
            ],
            [
                call.term("product with values", int(not call.adds_up), *ROWS, "d_v"),
                call.term("out, rounded", wide, *ROWS, "d_v", number=call.given),
            ],
        ),
    ]
    return fullest(tiles, before)


def standard(call: Counted) -> list[Term]:
    """Return the terms of textbook attention's forward pass."""
    hashes, wide = call.footprint.hashes * bool(call.spec.dropout), int(call.widens)
    return [
        call.term("scores, less their maxima, weights", 3, "all_heads", "n_q", "n_k"),
        call.term("sums and maxima", 6, "all_heads", "n_q"),
        call.term("queries, scaled", "all_heads", "n_q", "d"),
        call.term("keys, widened", wide, "all_key_heads", "n_k", "d"),
        call.term("values, widened", wide, "all_key_heads", "n_k", "d_v"),
        call.term("accumulator", "all_heads", "n_q", "d_v"),
        call.term("hash for dropout", hashes, "all_heads", "n_q", "n_k", number=2),
        call.term("objects of Python", call.footprint.objects, number=1),
    ]


def saved(call: Counted) -> list[Term]:
    """Return the terms of what is kept from the forward to the backward pass."""
    return [
        call.term("saved: lse and the like", call.footprint.saved, "all_heads", "n_q"),
        call.term("saved: out, not rounded", int(call.widens), "all_heads", "n_q", "d_v"),
    ]


def backward(call: Counted, wanted: Names) -> list[Term]:
    """Return the terms of the backward pass at its fullest moment."""
    spec, own = call.spec, call.footprint
    chained = spec.softcap is not None or spec.score_mod is not None
    width = "d" if call.d >= spec.d_v else "d_v"
    wide, unseen, drops = int(call.widens), int(call.hides), int(bool(spec.dropout))
    shared = int(call.shares_keys)
    visible = call.term("visible pairs", unseen, *SCORES, number=1)
    rounded: dict[str, tuple[Names, int]] = {}
    if call.widens:
        rounded = {name: (GRADIENTS[name], call.given) for name in wanted if name in GRADIENTS}
    if call.widens_bias and "bias" in wanted:
        rounded["bias"] = ("bias",), call.bias_given
    runs = _in_runs(call, spec.blocks, spec.group * spec.schedule.query_chunk)
    slopes = 4 * int(spec.score_mod is not None)
    swapped = 2 * int(spec.layout == "nhd" and spec.group > 1)
    widened = [
        call.term("values, widened", wide, *KEYS, "d_v"),
        call.term("keys, widened", wide, *KEYS, "d"),
    ]
    always = [
        call.term("queries, scaled", *ROWS, "d"),
        call.term("gradient of out", *ROWS, "d_v"),
        call.term("queries of heads, and the like", swapped, *ROWS, width),
        call.term("sums", 8, *ROWS),
        call.term("buffers", "threads", own.buffers),
        *_positions(call),
        call.term("objects of Python", own.objects, number=1),
    ]
    before = [*always, call.term("out times its gradient, and the like", 4, *ROWS, "d_v")]
    tiles = [
        *always,
        call.term("weights and their gradient", 2 + own.powers, *SCORES),
        call.term("scores before score_mod", int(chained), *SCORES),
        call.term("weights that dropout keeps", drops, *SCORES, number=1),
        call.term("gradient of queries", *ROWS, "d"),
        *fullest(
            *_functions(call),
            [
                visible,
                call.term("keys or values, widened", wide, *KEYS, width),
                _ordered(call, spec.blocks, width),
                call.term("keys or values, transposed", own.ordered, *KEYS, width),
                call.term("those of each batch entry", own.expands * shared, *KEYS, width),
            ],
            [visible, call.term("inverted", own.inverses * unseen, *SCORES, number=1)],
            [visible, call.term("hash for dropout", own.hashes * drops, *SCORES, number=2)],
            [visible, call.term("derivative of the softcap", int(chained), *SCORES)],
            [visible, call.term("derivative of score_mod, and the like", slopes, *SCORES)],
            [
                visible,
                *widened,
                call.term("keys made finite", 2 * unseen, *KEYS, width),
                call.term("which are finite", unseen, *KEYS, width, number=1),
            ],
            [
                visible,
                *widened,
                call.term("product for queries", *ROWS, "d"),
                call.term("keys, for each batch entry", own.expands * shared, *KEYS, "d"),
            ],
            [
                visible,
                widened[0],
                call.term("rows made finite", 2 * unseen, *ROWS, width),
                call.term("which are finite", unseen, *ROWS, width, number=1),
            ],
            [
                visible,
                widened[0],
                call.term("rows made finite", unseen, *ROWS, width),
                call.term("product for keys", 1 + runs + shared, *KEYS, width),
                call.term("weights, transposed", own.ordered, *SCORES),
            ],
        ),
    ]
    objects = call.term("objects of Python", own.objects, number=1)
    moments = [tiles, before]
    standing = []
    for name, (sizes, given) in rounded.items():
        told, number = f"gradient of {name}", call.number
        standing.append(call.term(f"{told}, not rounded", *sizes, number=max(0, number - given)))
        moments.append([call.term(f"{told}, rounded", *sizes, number=min(number, given)), objects])
    return [*standing, *fullest(*moments)]


def _positions(call: Counted) -> list[Term]:
    """Return the terms of the positions that masks compare and a tile keeps."""
    masks = int(bool(call.masks))
    return [
        call.term("positions of queries", masks, "threads", "query_chunk", number=8),
        call.term("positions of keys", masks, "threads", "key_chunk", number=8),
    ]


def packing(call: Counted, training: bool) -> list[Term]:
    """Return what a compiled program's products take that its own plan does not count.

    It was found by following the allocations of XLA's kernels for CPUs: keys or values, in
    the backward pass also queries, packed for a product, those of the one before not yet
    freed; for many heads the transposed weights, packed with some padding; and small objects
    of threads, fewer for small tiles.
    """
    own, sizes = call.footprint, call.spec.schedule
    scores = prod(sizes.block) * call.spec.group * sizes.query_chunk * sizes.key_chunk
    width = "d" if call.d >= call.spec.d_v else "d_v"
    transposed = int(training and own.packed and prod(sizes.block) > 1)
    packed = [call.term("packed for products", own.packed, "key_heads", "key_chunk", width)]
    if training:
        packed.append(call.term("packed for products", own.packed, *ROWS[1:], width))
    return [
        max(packed, key=lambda term: term.bytes),
        call.term(
            "transposed for products",
            transposed,
            *("heads", "query_chunk", "key_chunk"),
            number=5 * call.number // 4,
        ),
        call.term("objects of threads", min(own.buffers, scores), number=4),
    ]


def _ordered(call: Counted, tasks: int, width: str) -> Term:
    """Return what a product with a tile's keys or values copies of them."""
    sizes, bounds = call.spec.schedule, call.footprint.ordered_from
    copies = False
    if tasks > 1 and bounds is not None:
        rows = call.spec.group * sizes.query_chunk
        depth = call.d if width == "d" else call.spec.d_v
        copies = rows >= bounds[0] and rows * sizes.key_chunk * depth > bounds[1]
    return call.term("keys or values in another order", int(copies), *KEYS, width)


def _in_runs(call: Counted, tasks: int, depth: int) -> int:
    """Return how many arrays more a product of this depth takes."""
    bound = call.footprint.runs_from
    return int(tasks > 1 and bound is not None and depth > bound)


def _functions(call: Counted) -> Iterable[list[Term]]:
    """Yield the moments in which masks and functions of the caller are evaluated."""
    if call.bias_axes is not None:
        sizes = _sizes(call.bias_axes)
        yield [call.term("bias, widened", int(call.widens_bias), "threads", *sizes)]
    for mask in call.masks:
        axes = mask.tile_axes
        if mask.aligned and call.by_batch and "b" not in axes:
            axes = "b" + axes
        sizes = _sizes(axes)
        made, own = mask.tile_arrays, call.footprint
        name = f"mask: {type(mask).__name__.removeprefix('Lifted')}"
        pairs = call.term(name, *sizes, number=1).bytes
        held = min(own.positions, 2 * pairs) if made else 0
        yield [
            call.term(name, made, "threads", *sizes, number=1),
            call.term("buffers of positions", "threads", held, number=8),
        ]
        copied = own.inverses
        if own.bits and pairs:  # of wide integers, up to a byte for each score
            copied *= min(call.number, call.term("", *SCORES[1:], number=1).bytes // pairs)
        told = min(made, 1) + copied
        yield [call.term(name, told, "threads", *sizes, number=1)]
        if mask.key_arrays:
            told = f"{name}, the range of keys"
            yield [call.term(told, mask.key_arrays, "threads", "batch", "n_k", number=1)]
    if call.spec.score_mod is not None:
        yield [call.term("result of score_mod, and a copy", 2, *SCORES)]


def _sizes(axes: str) -> list[str]:
    """Return the sizes of a tile along the axes "b", "h", "q" and "k"."""
    names = {"b": "batch", "h": "heads", "q": "query_chunk", "k": "key_chunk"}
    if "h" in axes:  # where batch entries are counted, too
        axes = axes.replace("b", "")
    return [names[axis] for axis in axes]
