"""The memory of a call, term by term: what it holds at its peak beyond inputs and outputs.

Each term is a product of sizes, which are named in its formula: those of the arrays, and

===============  ===================================================================================
``threads``      tasks that run at a time
``heads``        batch entries times query heads of a task; ``key_heads``: those of keys
``batch``        batch entries of a task
``query_chunk``  queries of a tile
``key_chunk``    keys of a tile
``all_heads``    batch entries times query heads of the call; ``all_key_heads``: those of keys
===============  ===================================================================================

The last factor is the size of a number in bytes.  What is counted was read from the algorithm and
from the adapters, for libraries that compute as they are told.  ``tests/test_plan.py`` holds it
against measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from ._spec import Spec
from .masks import Mask

Names = tuple[str, ...]

SCORES = ("threads", "heads", "query_chunk", "key_chunk")
ROWS = ("threads", "heads", "query_chunk")
KEYS = ("threads", "key_heads", "key_chunk")
GRADIENTS = {
    "query": ("all_heads", "n_q", "d"),
    "key": ("all_key_heads", "n_k", "d"),
    "value": ("all_key_heads", "n_k", "d_v"),
}


@dataclass(frozen=True)
class Term:
    """Some of a call's memory.

    Attributes
    ----------
    name : str
        What it holds.
    formula : str
        A product of named sizes; the last factor is the size of a number in bytes.
    bytes : int
        Its value.
    """

    name: str
    formula: str
    bytes: int


def term(known: dict[str, int], name: str, *factors: str | int, number: int) -> Term:
    """Return a term: the product of `factors`, names of `known` sizes among them, in numbers."""
    values = [x if isinstance(x, int) else known[x] for x in factors]
    told = [str(x) for x in factors if x != 1]
    return Term(name, " × ".join([*told, f"{number} B"]), prod(values) * number)


def total(terms: Iterable[Term]) -> int:
    """Return the bytes of all terms."""
    return sum(one.bytes for one in terms)


@dataclass(frozen=True)
class Counted:
    """A call whose memory is counted.

    `masks` have their arrays; `d` is the width of queries; `bias_axes` are those of the bias that
    do not broadcast, None where there is none; `widens_bias` says whether it is cast to the compute
    dtype; `footprint` is the adapter's; `by_batch` says whether the query
    offset differs from batch entry to batch entry; `threads` is the number of tasks at a time.
    """

    spec: Spec
    masks: tuple[Mask, ...]
    d: int
    bias_axes: str | None
    has_sinks: bool
    widens_bias: bool
    by_batch: bool
    threads: int
    footprint: Any
    number: int  # bytes of a number of the compute dtype
    given: int  # and of the inputs'

    def term(self, name: str, *factors: str | int, number: int | None = None) -> Term:
        """Return a term of this call, by default in numbers of the compute dtype."""
        spec = self.spec
        block = spec.schedule.block
        known = {
            "threads": self.threads,
            "batch": prod(block[:-1]),
            "heads": prod(block) * spec.group,
            "key_heads": prod(block),
            "all_heads": prod(spec.batch) * spec.heads,
            "all_key_heads": prod(spec.lead),
            "query_chunk": spec.schedule.query_chunk,
            "key_chunk": spec.schedule.key_chunk,
            "n_q": spec.n_q,
            "n_k": spec.n_k,
            "d": self.d,
            "d_v": spec.d_v,
        }
        return term(known, name, *factors, number=self.number if number is None else number)

    @property
    def widens(self) -> bool:
        """Whether the arrays have to be widened to the compute dtype."""
        return self.given != self.number

    @property
    def has_bias(self) -> bool:
        """Whether there is a bias."""
        return self.bias_axes is not None

    @property
    def hides(self) -> bool:
        """Whether a query may not see some key."""
        return bool(self.masks) or self.has_bias or self.spec.score_mod is not None

    @property
    def adds_up(self) -> bool:
        """Whether summaries of several tiles are added up, or what masks and sinks leave of one."""
        return not self.spec.one_tile or self.has_sinks

    @property
    def is_result(self) -> bool:
        """Whether a tile's product with values is the call's result itself."""
        kept = self.spec.layout == "hnd" and not self.widens
        return self.spec.tasks == 1 and kept and not self.adds_up

    def forward(self) -> list[Term]:
        """Return the terms of the forward pass at its fullest moment."""
        spec, own = self.spec, self.footprint
        wide, drops = int(self.widens), int(bool(spec.dropout))
        product = 1 - self.is_result if self.hides or not self.adds_up else own.products
        product += self._in_runs(spec.tasks, spec.schedule.key_chunk)
        cut = int(prod(spec.schedule.block) > 1 and spec.schedule.key_chunk < spec.n_k)
        weights = self.term("weights", own.weights + own.powers, *SCORES)
        hashed = self.term("hash for dropout", own.hashes * drops, *SCORES, number=2)
        return [
            self.term("scores", *SCORES),
            self.term("queries, scaled", *ROWS, "d"),
            self.term("accumulator", int(self.adds_up), *ROWS, "d_v"),
            self.term("sums and maxima", 6, *ROWS),
            self.term("buffers", "threads", own.buffers),
            self.term("objects of Python", own.objects, number=1),
            *fullest(
                *self._functions(),
                [
                    self.term("keys, widened", wide, *KEYS, "d"),
                    self._ordered(spec.tasks, "d"),
                    self.term("keys, transposed", own.ordered, *KEYS, "d"),
                ],
                [weights, hashed],
                [
                    weights,
                    self.term("product with values", product, *ROWS, "d_v"),
                    self.term("values, widened", wide, *KEYS, "d_v"),
                    self.term("values, in order", own.ordered * cut, *KEYS, "d_v"),
                ],
                [self.term("out, rounded", wide, *ROWS, "d_v", number=self.given)],
            ),
        ]

    def standard(self) -> list[Term]:
        """Return the terms of textbook attention's forward pass."""
        hashes = self.footprint.hashes * bool(self.spec.dropout)
        return [
            self.term("scores, less their maxima, weights", 3, "all_heads", "n_q", "n_k"),
            self.term("sums and maxima", 6, "all_heads", "n_q"),
            self.term("queries, scaled", "all_heads", "n_q", "d"),
            self.term("accumulator", "all_heads", "n_q", "d_v"),
            self.term("hash for dropout", hashes, "all_heads", "n_q", "n_k", number=2),
            self.term("objects of Python", self.footprint.objects, number=1),
        ]

    def saved(self) -> list[Term]:
        """Return the terms of what is kept from the forward to the backward pass."""
        exact = self.footprint.exact * self.widens
        return [
            self.term("saved: lse and the like", self.footprint.saved, "all_heads", "n_q"),
            self.term("saved: out, not rounded", exact, "all_heads", "n_q", "d_v"),
        ]

    def backward(self, wanted: Names) -> list[Term]:
        """Return the terms of the backward pass at its fullest moment."""
        spec, own = self.spec, self.footprint
        chained = spec.softcap is not None or spec.score_mod is not None
        width = "d" if self.d >= spec.d_v else "d_v"
        wide, unseen, drops = int(self.widens), int(self.hides), int(bool(spec.dropout))
        visible = self.term("visible pairs", unseen, *SCORES, number=1)
        rounded = [name for name in wanted if name in GRADIENTS and self.widens]
        runs = self._in_runs(spec.blocks, spec.group * spec.schedule.query_chunk)
        slopes = 4 * int(spec.score_mod is not None)
        swapped = 2 * int(spec.layout == "nhd" and spec.group > 1)
        always = [
            self.term("queries, scaled", *ROWS, "d"),
            self.term("gradient of out", *ROWS, "d_v"),
            self.term("queries of heads, and the like", swapped, *ROWS, width),
            self.term("sums", 8, *ROWS),
            self.term("buffers", "threads", own.buffers),
            self.term("objects of Python", own.objects, number=1),
        ]
        before = [*always, self.term("out times its gradient, and the like", 4, *ROWS, "d_v")]
        tiles = [
            *always,
            self.term("weights and their gradient", 2 + own.powers, *SCORES),
            self.term("scores before score_mod", int(chained), *SCORES),
            self.term("weights that dropout keeps", drops, *SCORES, number=1),
            self.term("gradient of queries", *ROWS, "d"),
            *fullest(
                *self._functions(),
                [
                    visible,
                    self.term("keys or values, widened", wide, *KEYS, width),
                    self._ordered(spec.blocks, width),
                    self.term("keys or values, transposed", own.ordered, *KEYS, width),
                ],
                [visible, self.term("inverted", own.inverses * unseen, *SCORES, number=1)],
                [visible, self.term("hash for dropout", own.hashes * drops, *SCORES, number=2)],
                [visible, self.term("derivative of the softcap", int(chained), *SCORES)],
                [visible, self.term("derivative of score_mod, and the like", slopes, *SCORES)],
                [
                    visible,
                    self.term("keys made finite", 2 * unseen, *KEYS, width),
                    self.term("which are finite", unseen, *KEYS, width, number=1),
                ],
                [
                    visible,
                    self.term("values, widened", wide, *KEYS, "d_v"),
                    self.term("keys, widened", wide, *KEYS, "d"),
                    self.term("product for queries", *ROWS, "d"),
                ],
                [
                    visible,
                    self.term("values, widened", wide, *KEYS, "d_v"),
                    self.term("rows made finite", unseen, *ROWS, width),
                    self.term("product for keys", 1 + runs, *KEYS, width),
                    self.term("weights, transposed", own.ordered, *SCORES),
                ],
            ),
        ]
        return [
            *(
                self.term(
                    f"gradient of {name}, not rounded",
                    *GRADIENTS[name],
                    number=self.number - self.given,
                )
                for name in rounded
            ),
            *fullest(
                tiles,
                before,
                *(
                    [self.term(f"gradient of {name}, rounded", *GRADIENTS[name], number=self.given)]
                    for name in rounded
                ),
            ),
        ]

    def packing(self, training: bool) -> list[Term]:
        """Return what a compiled program's products take that its own plan does not count.

        It was found by following the allocations of XLA's kernels for CPUs: keys or values, in
        the backward pass also queries, packed for a product, those of the one before not yet
        freed; for many heads the transposed weights, packed with some padding; and small objects
        of threads, fewer for small tiles.
        """
        own, sizes = self.footprint, self.spec.schedule
        scores = prod(sizes.block) * self.spec.group * sizes.query_chunk * sizes.key_chunk
        width = "d" if self.d >= self.spec.d_v else "d_v"
        transposed = int(training and own.packed and prod(sizes.block) > 1)
        packed = [self.term("packed for products", own.packed, "key_heads", "key_chunk", width)]
        if training:
            packed.append(self.term("packed for products", own.packed, *ROWS[1:], width))
        return [
            max(packed, key=lambda term: term.bytes),
            self.term(
                "transposed for products",
                transposed,
                *("heads", "query_chunk", "key_chunk"),
                number=5 * self.number // 4,
            ),
            self.term("objects of threads", min(own.buffers, scores), number=4),
        ]

    def _ordered(self, tasks: int, width: str) -> Term:
        """Return what a product with a tile's keys or values copies of them."""
        sizes, bounds = self.spec.schedule, self.footprint.ordered_from
        copies = False
        if tasks > 1 and bounds is not None:
            rows = self.spec.group * sizes.query_chunk
            depth = self.d if width == "d" else self.spec.d_v
            copies = rows >= bounds[0] and rows * sizes.key_chunk * depth > bounds[1]
        return self.term("keys or values in another order", int(copies), *KEYS, width)

    def _in_runs(self, tasks: int, depth: int) -> int:
        """Return how many arrays more a product of this depth takes."""
        bound = self.footprint.runs_from
        return int(tasks > 1 and bound is not None and depth > bound)

    def _functions(self) -> Iterable[list[Term]]:
        """Yield the moments in which masks and functions of the caller are evaluated."""
        if self.bias_axes is not None:
            sizes = _sizes(self.bias_axes)
            yield [self.term("bias, widened", int(self.widens_bias), "threads", *sizes)]
        for mask in self.masks:
            axes = mask.tile_axes
            if mask.aligned and self.by_batch and "b" not in axes:
                axes = "b" + axes
            sizes = _sizes(axes)
            made, own = mask.tile_arrays, self.footprint
            name = f"mask: {type(mask).__name__.removeprefix('Lifted')}"
            pairs = self.term(name, *sizes, number=1).bytes
            held = min(own.positions, 2 * pairs) if made else 0
            yield [
                self.term(name, made, "threads", *sizes, number=1),
                self.term("buffers of positions", "threads", held, number=8),
            ]
            copied = own.inverses
            if own.bits and pairs:  # of wide integers, up to a byte for each score
                copied *= min(self.number, self.term("", *SCORES[1:], number=1).bytes // pairs)
            told = min(made, 1) + copied
            yield [self.term(name, told, "threads", *sizes, number=1)]
            if mask.key_arrays:
                told = f"{name}, the range of keys"
                yield [self.term(told, mask.key_arrays, "threads", "batch", "n_k", number=1)]
        if self.spec.score_mod is not None:
            yield [self.term("result of score_mod, and a copy", 2, *SCORES)]


def _sizes(axes: str) -> list[str]:
    """Return the sizes of a tile along the axes "b", "h", "q" and "k"."""
    names = {"b": "batch", "h": "heads", "q": "query_chunk", "k": "key_chunk"}
    if "h" in axes:  # where batch entries are counted, too
        axes = axes.replace("b", "")
    return [names[axis] for axis in axes]


def fullest(*moments: list[Term]) -> list[Term]:
    """Return the terms of the moment that takes most."""
    return max(moments, key=total)
