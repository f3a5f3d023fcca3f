"""What NumPy's attention takes right after a product, whose threads are busy waiting for more.

    python benchmarks/busy.py [--rounds 9] [--out FILE]

OpenBLAS's threads look out for more work on all cores for a while (about 2²⁸ ticks of the CPU's
clock, a tenth of a second) before they sleep, and take their part of the cores from whoever runs
then.  The environment variable OPENBLAS_THREAD_TIMEOUT=20, set before NumPy is loaded, has them do
so for 2²⁰ ticks.  In float32, 8 heads of width 64; "at rest": after a rest of 0.3 s.  Medians, in
milliseconds; each column is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from statistics import median
from time import perf_counter, sleep

from machine import about, add_out, write

from chunkattn.cli._types import at_least

LENGTHS = (1024, 2048, 4096)
REST = 0.3
VARIABLE = "OPENBLAS_THREAD_TIMEOUT"


def measured(rounds):
    """Return the medians by length, at rest and right after a product."""
    import numpy as np

    from chunkattn import attention

    rng = np.random.default_rng(0)
    weights = rng.standard_normal((512, 512), dtype=np.float32)
    found = []
    for n in LENGTHS:
        tokens = rng.standard_normal((3, 1, 8, n, 64), dtype=np.float32)
        x = rng.standard_normal((n, 512), dtype=np.float32)
        times = []
        for _ in range(rounds + 1):
            pair = []
            for after in (False, True):
                sleep(REST)
                if after:
                    x @ weights
                begin = perf_counter()
                attention(*tokens)
                pair.append(perf_counter() - begin)
            times.append(pair)
        found.append([median(column) for column in zip(*times[1:], strict=True)])
    return found


def report(given):
    """Yield the lines of the report."""
    yield f"# Right after a product\n\n{about('python benchmarks/busy.py', given)}"
    yield f"\n{__doc__.partition('FILE]')[2].strip()}\n"
    columns = []
    for setting in ({}, {VARIABLE: "20"}):
        command = [sys.executable, __file__, "--rounds", str(given.rounds), "--measure"]
        environment = {name: x for name, x in os.environ.items() if name != VARIABLE} | setting
        told = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        columns.append(json.loads(told.stdout))
    yield f"| n | at rest | after a product | at rest, {VARIABLE}=20 | after a product |"
    yield "|--:|--:|--:|--:|--:|"
    for n, *rows in zip(LENGTHS, *columns, strict=True):
        yield f"| {n:,} | {' | '.join(f'{x * 1e3:.3g}' for row in rows for x in row)} |"


def main():
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=partial(at_least, 1), default=9, help="(default: 9)")
    add_out(parser)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(given.rounds)))
        return None
    del given.measure
    return write(report(given), given.out)


if __name__ == "__main__":
    sys.exit(main())
