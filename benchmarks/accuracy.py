"""Rounding errors by library and dtype: chunked attention beside the textbook's.

    python benchmarks/accuracy.py [--out FILE]

The cases and the ways to compute them are those of tests/test_accuracy.py, whose needs are needed
here too (pytest, ml_dtypes).
"""

from __future__ import annotations

import sys
from pathlib import Path

from machine import about, run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import libraries  # noqa: E402
from test_accuracy import CASES, errors  # noqa: E402

LIBRARIES = ("array-api-strict-2025.12", "numpy", "numpy-bfloat16", "torch", "jax")
SMALL = 16
HEAD = """| library | dtype | case | chunked | standard | textbook | ratio | in chunks of {SMALL} |
|---|---|---|--:|--:|--:|--:|--:|"""


def measured():
    """Yield for each library, dtype and case the errors by the way of computing."""
    for name in LIBRARIES:
        lib = libraries.library(name)
        with lib.active():
            for dtype in lib.dtypes:
                small = errors(lib, dtype, key_chunk_size=SMALL)
                for case, found in errors(lib, dtype).items():
                    yield name, dtype, case, {**found, "small": small[case]["chunked"]}


def ratio(found):
    """Return the chunked error relative to the smaller one of the textbook's."""
    return found["chunked"] / min(found["standard"], found["textbook"])


def report(arguments):
    """Yield the lines of the report."""
    yield f"# Rounding errors\n\n{about('python benchmarks/accuracy.py', arguments)}\n"
    lengths = " or ".join(f"{n_q} queries × {n_k:,} keys (“long rows”)" for n_q, n_k in CASES)
    lengths = lengths.replace(" (“long rows”)", "", 1)
    yield (
        f"Four heads of width 64, {lengths}, default chunk sizes: the largest error against wider "
        "arithmetic (float64; for float64 long double) on the same rounded inputs.  “standard” is "
        '`implementation="standard"`, “textbook” a few lines in the library\'s own operations and '
        "in the compute dtype (under `jax.jit` on JAX).\n"
    )
    yield "## Largest ratio of all cases: chunked to the better one of standard and textbook\n"
    rows = list(measured())
    yield "| library | dtype | ratio | case |\n|---|---|--:|---|"
    for name, dtype in dict.fromkeys(row[:2] for row in rows):
        own = ((ratio(found), case) for *kind, case, found in rows if kind == [name, dtype])
        largest, case = max(own)
        yield f"| {name} | {dtype} | {largest:.2f} | {case} |"
    yield "\n## All cases\n"
    yield HEAD.format(SMALL=SMALL)
    for name, dtype, case, found in rows:
        ways = ("chunked", "standard", "textbook")
        told = " | ".join(f"{found[way]:.2e}" for way in ways)
        yield f"| {name} | {dtype} | {case} | {told} | {ratio(found):.2f} | {found['small']:.2e} |"


if __name__ == "__main__":
    run(__doc__, report)
