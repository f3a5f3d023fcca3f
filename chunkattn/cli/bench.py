"""Compare chunkattn's speed with what each library's users would call instead.

On each library and device, chunkattn and its peers compute the same data in turns (A B A B ...),
so that a machine that slows down does so for all.  Ratios are medians over pairs of one round,
with their quartiles in brackets; below 1, chunkattn is faster.  A way's result is checked against
the others' before it is timed: a wrong one is an error.  On the CPU, torch's SDPA is timed beside
NumPy and JAX too, as the common measure.

"of GEMM" is the part that is reached of the machine's rate of matrix products, the best of the run
(NumPy's on the CPU, the library's own on a GPU).  Attention counts as 4 h n_q n_k d operations,
half of them when causal, and forward and backward pass together as 3.5 times that.  Memory is the
peak of one more call beyond its inputs and results: by tracemalloc for NumPy, PyTorch's profiler,
the compiler's plan for JAX (by malloc where its kernels take more), the allocator on GPUs.  JAX and
FlexAttention are compiled before they are timed.

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
from ._bench_timing import Note, Ready, Row, check, in_turns, prepare, told
from ._bench_torch import Torch

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table as far as it came, and write the files."""
    if arguments.heads % (arguments.key_heads or 1):
        raise UsageError("argument --key-heads: must divide --heads")
    require("bench", "numpy", "tqdm", *(["matplotlib.figure"] if arguments.plot else []))
    bench = Bench(arguments, *_libraries(arguments.libraries))
    try:
        bench.run()
    finally:  # where it is interrupted, too
        bench.sort()
        show_tables(bench.rows, bench.notes)
        if bench.rows:
            _write(bench, arguments)
    failed = [note for note in bench.notes if note.failed]
    if failed:
        raise CommandError("; ".join(map(str, failed)))
    if not bench.rows:
        raise CommandError("nothing was measured")


def _write(bench: Bench, arguments: argparse.Namespace) -> None:
    """Write the files that are asked for."""
    asked = command(arguments)
    if arguments.json:
        write_text(arguments.json, as_json(bench.rows, bench.notes, asked))
    if arguments.markdown:
        write_text(arguments.markdown, as_markdown(bench.rows, bench.notes, asked))
    if arguments.plot:
        plot(bench.rows, arguments.plot, asked)


@dataclass
class Bench:
    """A run: its options, and what it has found so far."""

    options: argparse.Namespace
    libraries: dict[str, Library]
    notes: list[Note]
    rows: list[Row] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)  # of the matrix product, by library

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
                        try:
                            self.measure(name, library, case, deadline)
                        except Exception as error:
                            reason = f"failed: {told(error)}"
                            self.notes.append(Note(name, _of(case), "", reason, failed=True))
                bar.update()

    def sort(self) -> None:
        """Put the rows in the order of the libraries and of the cases."""
        names, options = list(self.libraries), self.options

        def place(row: Row) -> tuple[int, ...]:
            mode, d = row.case.mode, row.case.d
            return names.index(row.library), options.mode.index(mode), options.dim.index(d)

        self.rows.sort(key=place)

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
                self.notes.append(Note(name, _of(case), one.name, reason, failed=True))
        ready = [one for one in ready if not one.wrong]
        rounds = self.options.rounds or (QUICK_ROUNDS if self.options.quick else ROUNDS)
        each = not library.queues or self.options.wait == "each"
        samples, gemm = in_turns(ready, library.gemm(case.dtype), rounds, deadline, each)
        self.rates.setdefault(name, []).extend(gemm)
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
                    self.rates[name],
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
            except Exception:  # as in `_libraries`
                return
            yield torch.yardstick(case)


def _libraries(names: tuple[str, ...] | None) -> tuple[dict[str, Library], list[Note]]:
    """Return the libraries of these names, or those that are there, and which are broken."""
    libraries, notes = {}, []
    for name in names or LIBRARIES:
        try:
            libraries[name] = make(name)
        except Exception as error:  # whatever an import does
            if names:
                raise CommandError(f"cannot use {name}: {error}") from error
            if not isinstance(error, ImportError):
                notes.append(Note(name, "", "", f"it does not import: {told(error)}"))
    return libraries, notes


def _of(case: Case) -> str:
    return f"{case.mode} {case}"
