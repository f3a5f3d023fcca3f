"""The memory of a call, term by term: what it holds at its peak beyond inputs and outputs.

Each term is a product of sizes, which are named in its formula: those of the arrays, and

===============  ===================================================================================
``threads``      tasks that run at a time
``heads``        batch entries times query heads of a task; ``key_heads``: those of keys
``batch``        batch entries of a task
``query_chunk``  queries of a tile
``key_chunk``    keys of a tile
``bias``         numbers of the bias
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
    do not broadcast, None where there is none, `bias_size` its numbers, of `bias_given` bytes;
    `widens_bias` says whether it is cast to the compute dtype; `footprint` is the adapter's;
    `by_batch` says whether the query offset differs from batch entry to batch entry, and
    `shares_keys` whether batch entries share keys or values; `threads` is the number of tasks at a
    time.
    """

    spec: Spec
    masks: tuple[Mask, ...]
    d: int
    bias_axes: str | None
    bias_size: int
    bias_given: int
    has_sinks: bool
    widens_bias: bool
    by_batch: bool
    shares_keys: bool
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
            "bias": self.bias_size,
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


def fullest(*moments: list[Term]) -> list[Term]:
    """Return the terms of the moment that takes most."""
    return max(moments, key=total)
