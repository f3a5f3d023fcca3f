"""Show the record of a test run as the capability table of the README.

The suite writes the record (``pytest --capabilities FILE``): how many tests of each feature passed
and failed on each library.  ``--write`` puts the table between the markers in the README;
``--check`` fails with a diff where another table stands there; without either it is printed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- capabilities: begin -->", "<!-- capabilities: end -->"
STRICT = "array-api-strict-"

# The head of each column, and the libraries of the suite that it stands for.
COLUMNS = {
    "NumPy": ("numpy", "numpy-readonly"),
    "NumPy bfloat16 (ml_dtypes)": ("numpy-bfloat16",),
    "array-api-strict": (STRICT,),
    "PyTorch": ("torch",),
    "JAX": ("jax",),
    "JAX under jit": ("jax-jit",),
    "CuPy": ("cupy",),
    "PyTorch on CUDA": ("torch-cuda",),
    "JAX on CUDA": ("jax-cuda",),
}
GPU = ("CuPy", "PyTorch on CUDA", "JAX on CUDA")
IF_RUN = GPU[1:]  # the columns that are left out where nothing ran

Record = list[dict]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "records", type=Path, nargs="+", help="the JSON files that the suite wrote, of one run each"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="put the table into the README")
    action.add_argument("--check", action="store_true", help="fail where the README has another")
    arguments = parser.parse_args()
    for path in arguments.records:
        if not path.is_file():
            parser.error(f"there is no record {path}: make test writes it")
    table = render([x for path in arguments.records for x in json.loads(path.read_text())])
    if not (arguments.write or arguments.check):
        print(table)
        return 0
    old = arguments.readme.read_text()
    new = replaced(old, table)
    if arguments.write:
        arguments.readme.write_text(new)
        return 0
    sys.stdout.writelines(
        difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), "README.md", "this run"
        )
    )
    if old != new:
        print("The capability table is out of date: make table writes it.", file=sys.stderr)
    return int(old != new)


def replaced(readme: str, table: str) -> str:
    """Return the README with `table` between the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the README lacks the markers {BEGIN} and {END}")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def render(record: Record) -> str:
    """Return the table: a row for each feature, a column for each library, the tests below."""
    features = sorted({entry["feature"] for entry in record}, key=str.lower)
    columns = {name: [x for x in record if of_column(x, name)] for name in COLUMNS}
    columns = {name: x for name, x in columns.items() if x or name not in IF_RUN}
    rows = [["", *(head(name, x) for name, x in columns.items())]]
    rows += [[name, *(cell(name, *x) for x in columns.items())] for name in features]
    rows += [["number of tests", *map(total, columns.values())]]
    return "\n".join(lines(rows))


def of_column(entry: dict, column: str) -> bool:
    return any(
        entry["library"].startswith(name) if name == STRICT else entry["library"] == name
        for name in COLUMNS[column]
    )


def head(column: str, entries: Record) -> str:
    """Return the head of a column; that of array-api-strict tells the versions it ran as."""
    versions = sorted(
        {x["library"].removeprefix(STRICT) for x in entries if x["library"].startswith(STRICT)}
    )
    return f"{column} {versions[0]} to {versions[-1]}" if versions else column


def cell(feature: str, column: str, entries: Record) -> str:
    """Return what the run showed of a feature on the libraries of a column."""
    if not entries:
        return "no GPU in this run" if column in GPU else "not run"
    results = [entry for entry in entries if entry["feature"] == feature]
    if not results:
        return "–"
    if any(entry["failed"] for entry in results):
        return "✗"
    missing = len({x["library"] for x in entries}) - len({x["library"] for x in results})
    return "✓ (some)" if missing else "✓"


def total(entries: Record) -> str:
    passed = sum(entry["passed"] for entry in entries)
    failed = sum(entry["failed"] for entry in entries)
    return f"{passed:,}" + (f", {failed:,} failed" if failed else "")


def lines(rows: list[list[str]]) -> Iterator[str]:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |".replace("|  |", "| |")

    first, *rest = rows
    yield line(first)
    yield line(["---", *[":-:"] * (len(first) - 1)])
    yield from map(line, rest)


if __name__ == "__main__":
    sys.exit(main())
