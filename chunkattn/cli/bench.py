"""Compare chunkattn's speed with what each library's users would call instead.

On each library and device, chunkattn and its peers compute the same data in turns (A B A B ...),
so that a machine that slows down does so for all.  Ratios are medians over pairs of one round,
with their quartiles in brackets; below 1, chunkattn is faster.  A way's result is checked against
the others' before it is timed: a wrong one is an error.  On the CPU, torch's SDPA is timed beside
NumPy and JAX too, as the common measure.

"of GEMM" is the part of the machine's rate of matrix products (NumPy's on the CPU, the library's
own on a GPU) that is reached, where attention counts as 4 h n_q n_k d operations, half of them
when causal, and forward and backward pass together as 3.5 times that.  Memory is the peak of one
more call beyond its inputs and results: by tracemalloc for NumPy, PyTorch's profiler, the
compiler's plan for JAX, the allocator on GPUs.  JAX is compiled, and compiled before it is timed.

A sample has as many calls as take a fiftieth of a second.  It follows a rest, so that no threads of
another way are awake, and calls for a twentieth of a second that wake the way's own (none where a
call takes over a second).  On a GPU the calls follow each other, and the last is waited for: what
the host does for a call is hidden behind the call before, unless it takes longer.  With --wait each
it is in the figures.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import inf
from time import perf_counter

from . import CommandError, UsageError, require
from ._bench_case import Case
from ._bench_library import LIBRARIES, Candidate, Library, NotApplicableError, make
from ._bench_options import QUICK_ROUNDS, QUICK_SECONDS, ROUNDS, add_arguments, cases, command
from ._bench_report import as_json, as_markdown, plot, show_tables, write_text
from ._bench_timing import Note, Ready, Row, check, in_turns, prepare
from ._bench_torch import Torch

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table as far as it came, and write the files."""
    if arguments.heads % (arguments.key_heads or 1):
        raise UsageError("argument --key-heads: must divide --heads")
    require("bench", "numpy", "tqdm", *(["matplotlib.figure"] if arguments.plot else []))
    bench = Bench(arguments, _libraries(arguments.libraries))
    try:
        bench.run()
    finally:  # where it is interrupted, too
        bench.rows.sort(key=lambda row: list(bench.libraries).index(row.library))
        show_tables(bench.rows, bench.notes)
    told = command(arguments)
    if arguments.json:
        write_text(arguments.json, as_json(bench.rows, bench.notes, told))
    if arguments.markdown:
        write_text(arguments.markdown, as_markdown(bench.rows, bench.notes, told))
    if arguments.plot:
        plot(bench.rows, arguments.plot)
    wrong = [note for note in bench.notes if note.wrong]
    if wrong:
        raise CommandError("wrong results: " + "; ".join(map(str, wrong)))


@dataclass
class Bench:
    """A run: its options, and what it has found so far."""

    options: argparse.Namespace
    libraries: dict[str, Library]
    rows: list[Row] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def run(self) -> None:
        """Measure each case on each library, within the budget."""
        from tqdm import tqdm

        options = self.options
        end = perf_counter() + (options.seconds or (QUICK_SECONDS if options.quick else inf))
        groups = list(product(cases(options), self.libraries.items()))
        with tqdm(total=len(groups), desc="bench", unit="case") as bar:
            for i, (case, (name, library)) in enumerate(groups):
                bar.set_postfix_str(f"{name} {case.mode} {case}")
                now = perf_counter()
                if i and now > end:
                    self.notes.append(Note(name, _of(case), "", "not run, the time was spent"))
                else:
                    deadline = now + (end - now) / (len(groups) - i)
                    with library.active(case.dtype), warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of kernels that do not apply, or are slow
                        self.measure(name, library, case, deadline)
                bar.update()

    def measure(self, name: str, library: Library, case: Case, deadline: float) -> None:
        """Add the rows of one case on one library."""
        try:
            ready = self._ready(name, library, case)
        except NotApplicableError as error:
            self.notes.append(Note(name, _of(case), "", str(error)))
            return
        check(ready, case)
        for one in ready:
            if one.wrong:
                reason = f"wrong by {one.difference:.2g}, not timed"
                self.notes.append(Note(name, _of(case), one.name, reason, wrong=True))
        ready = [one for one in ready if not one.wrong]
        rounds = self.options.rounds or (QUICK_ROUNDS if self.options.quick else ROUNDS)
        each = not library.queues or self.options.wait == "each"
        samples, gemm = in_turns(ready, library.gemm(case.dtype), rounds, deadline, each)
        ours = next((samples[one.name] for one in ready if one.ours), None)
        for one in ready:
            self.rows.append(
                Row(
                    name,
                    library.device,
                    case,
                    one.name,
                    samples[one.name],
                    ours,
                    gemm,
                    one.way.memory(),
                    one.difference,
                )
            )

    def _ready(self, name: str, library: Library, case: Case) -> list[Ready]:
        """Return the ways that apply, each called once; note the others."""
        ready = []
        for candidate in self._candidates(name, library, case):
            try:
                ready.append(prepare(candidate, case, library.free_memory()))
            except NotApplicableError as error:
                self.notes.append(Note(name, _of(case), candidate.name, str(error)))
        return ready

    def _candidates(self, name: str, library: Library, case: Case) -> Iterator[Candidate]:
        peers = self.options.peers
        for candidate in library.candidates(case, self.options.implementation):
            if candidate.ours:
                suffix = "" if candidate.name == "auto" else f" {candidate.name}"
                yield candidate._replace(name=f"chunkattn{suffix}")
            elif candidate.name.partition(" ")[0] in peers:
                yield candidate
        if name in ("numpy", "jax") and "sdpa" in peers:
            try:
                torch = Torch()
            except (ImportError, OSError):
                return
            yield torch.yardstick(case)


def _libraries(names: tuple[str, ...] | None) -> dict[str, Library]:
    """Return the libraries of these names, or those that are there."""
    libraries = {}
    for name in names or LIBRARIES:
        try:
            libraries[name] = make(name)
        except (ImportError, OSError) as error:
            if names:
                raise CommandError(f"cannot use {name}: {error}") from error
    return libraries


def _of(case: Case) -> str:
    return f"{case.mode} {case}"
