"""What the schedules of attention hold in memory: the textbook's, the paper's, and ours.

    python benchmarks/schedules.py [--longest 1048576] [--out FILE] [--figure FILE]

One head of width 64 in float32, n queries and n keys.  What is counted is the most that a call
holds at a time beyond its inputs and outputs: on NumPy by tracemalloc, on JAX by XLA's analysis of
the compiled call, which does not have to run.  The schedules are in paper.py, their formulas those
of `plan(...).compare()`, for NumPy in one thread;
tests/memory.py measures, whose needs are needed here too (pytest, ml_dtypes).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import paper
from machine import about, add_out, write

from chunkattn import ArraySpec, attention, plan
from chunkattn.cli._types import at_least, file_in

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import libraries  # noqa: E402
import memory  # noqa: E402

SHORTEST = 2**10
WHOLE = 2**14  # NumPy: the longest textbook, and beyond it one chunk of queries for the others
OURS = partial(attention, implementation="chunked")
SCHEDULES = {
    "numpy": {
        "textbook": paper.textbook_numpy,
        "paper, √n keys": partial(paper.attention_numpy, key_chunk_size=None),
        "paper, 4096 keys": paper.attention_numpy,
        "chunkattn": OURS,
    },
    "jax": {
        "textbook": paper.textbook_jax,
        "paper, √n keys": partial(paper.attention_jax, key_chunk_size=None),
        "paper, 4096 keys": paper.attention_jax,
        "chunkattn": OURS,
    },
}
# On a CPU XLA hands all of the textbook's attention to one kernel, and its analysis leaves out the
# n × n scores that this kernel holds.
COMPILER = {"xla_disable_hlo_passes": "dot-library-rewriter"}
TEXT = f"""\
One head, d = 64, float32, n queries and n keys: the most held at a time beyond inputs and outputs,
in MiB, as formula / NumPy / JAX.  “paper” is the schedule of Rabe & Staats with
{paper.QUERIES:,} queries at a time and as many keys per summary as the column says; “chunkattn” is
its plan with the default tiles.

NumPy by tracemalloc, in one thread (each further thread of ours has a tile of its own).  Above
n = {WHOLE:,} it has {2 * paper.QUERIES:,} queries instead of n, since the chunks of queries come
one after the other, and no textbook.  JAX by XLA's memory analysis of the compiled call, which does
not run; compiled without the pass that hands all of the textbook's attention to one kernel, since
the analysis leaves out the n × n scores that this kernel holds."""


def formulas(n):
    """Return by schedule what it holds beyond inputs and outputs, in bytes."""
    token = ArraySpec((n, memory.WIDTH))
    with memory.blas_threads(1):
        found = plan(token, token, token).compare([n])
    return dict(zip(SCHEDULES["numpy"], (sizes[0] for _, _, sizes in found.schedules), strict=True))


def of_numpy(name, n):
    """Return the bytes that a schedule holds on NumPy, or None where that is too much."""
    if name == "textbook" and n > WHOLE:
        return None
    lib = libraries.library("numpy")
    tokens = memory.tokens(lib, n if n <= WHOLE else 2 * paper.QUERIES, n)
    return memory.extra_bytes(lib, lambda *x: (SCHEDULES["numpy"][name](*x),), *tokens)


def of_jax(name, n):
    """Return the bytes that a schedule holds on JAX."""
    import jax

    token = jax.ShapeDtypeStruct((n, memory.WIDTH), np.float32)
    lowered = jax.jit(SCHEDULES["jax"][name]).lower(token, token, token)
    return lowered.compile(COMPILER).memory_analysis().temp_size_in_bytes


def measured(longest):
    """Yield (n, schedule, formula, NumPy, JAX) in bytes."""
    n = SHORTEST
    while n <= longest:
        for name, formula in formulas(n).items():
            yield n, name, formula, of_numpy(name, n), of_jax(name, n)
        n *= 4


def told(size):
    """Return a size in MiB."""
    return "–" if size is None else f"{size / 2**20:,.1f}"


def draw(rows, path):
    """Draw the formulas as lines, and what was measured as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row[1] for row in rows)):
        lengths, _, *sizes = zip(*(row for row in rows if row[1] == name), strict=True)
        color = f"C{number}"
        axes.plot(lengths, _mebibytes(sizes[0]), color=color, label=name)
        for size, marker in zip(sizes[1:], "ox", strict=True):
            axes.plot(lengths, _mebibytes(size), marker, color=color, fillstyle="none")
    axes.plot([], [], "o", color="gray", fillstyle="none", label="measured, NumPy")
    axes.plot([], [], "x", color="gray", label="measured, JAX")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(top=2**12)  # MiB; the textbook leaves the picture
    axes.set(xlabel="n", ylabel="MiB beyond inputs and outputs", title="One head, d = 64, float32")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _mebibytes(sizes):
    return [np.nan if size is None else size / 2**20 for size in sizes]


def report(arguments):
    """Yield the lines of the report, and draw the figure where one is asked for."""
    yield f"# Memory by schedule\n\n{about('python benchmarks/schedules.py', arguments)}\n"
    yield f"<!-- what -->\n\n{TEXT}\n"
    names = list(formulas(SHORTEST))
    yield f"| n | {' | '.join(names)} |\n|--:|{'--:|' * len(names)}"
    rows, cells = [], []
    for row in measured(arguments.longest):
        rows.append(row)
        cells.append(" / ".join(map(told, row[2:])))
        if len(cells) == len(names):
            yield f"| {row[0]:,} | {' | '.join(cells)} |"
            cells.clear()
    if arguments.figure:
        draw(rows, arguments.figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--longest", type=partial(at_least, SHORTEST), default=2**20)
    add_out(parser)
    figure = file_in(".png", ".svg", ".pdf")
    parser.add_argument("--figure", type=figure, metavar="FILE", help="draw a picture here")
    arguments = parser.parse_args()
    write(report(arguments), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
