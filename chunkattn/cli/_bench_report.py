"""The benchmark's results as a table, Markdown, JSON and plots."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

from .. import __version__
from . import CommandError
from ._bench_case import MODES, Case
from ._bench_timing import Note, Row, Spread
from ._table import in_bytes, show
from .info import version

HEADINGS = ("way", "time", "chunkattn / it", "of GEMM", "memory")
PANELS = ("time in s", "fraction of GEMM peak", "peak extra memory in bytes")
_LIBRARIES = (
    *("numpy", "torch", "jax", "cupy", "ml_dtypes", "threadpoolctl", "array-api-compat"),
    "memory-efficient-attention",
)


def show_tables(rows: Sequence[Row], notes: Sequence[Note]) -> None:
    """Print a table for each case on each library, and what is left out."""
    for (library, case), group in _groups(rows):
        print(f"{library}: {case.mode}, {case}")
        show([_cells(row) for row in group], HEADINGS)
    for note in notes:
        print(note)


def _groups(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, Case], list[Row]]]:
    for key, group in groupby(rows, lambda row: (row.library, row.case)):
        yield key, list(group)


def _cells(row: Row) -> tuple[str, ...]:
    """Return a row of the table; brackets have the quartiles."""
    return (
        row.way,
        _in_seconds(row.seconds),
        "{:.2f} [{:.2f}, {:.2f}]".format(*row.ratio) if row.ratio else "",
        f"{row.gemm_fraction.median:.2f}",
        "–" if row.memory is None else in_bytes(row.memory),
    )


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    loaded = {name: sys.modules.get(name.replace("-", "_")) for name in _LIBRARIES}
    versions = {"chunkattn": __version__} | {
        name: version(name, module) for name, module in loaded.items() if module is not None
    }
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def as_json(rows: Sequence[Row], notes: Sequence[Note], command: str) -> str:
    """Return everything that was measured."""
    content = {
        "command": command,
        "machine": machine(),
        "rows": [_content(row) for row in rows],
        "left_out": [note._asdict() for note in notes],
    }
    return json.dumps(content, indent=1) + "\n"


def as_markdown(rows: Sequence[Row], notes: Sequence[Note], command: str) -> str:
    """Return the table with what it was measured on."""
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    devices = sorted({f"{row.library} on {row.device}" for row in rows})
    lines = [
        "# Benchmark",
        "",
        f"- Command: `{command}`",
        f"- Machine: {about['processor']}, {about['cores']} cores, {about['system']}",
        f"- Devices: {', '.join(devices)}",
        f"- Python {about['python']}, {versions}",
        "",
        "Medians, with the quartiles in brackets; a ratio below 1 means that chunkattn is faster.",
        "",
        _line(("library", "mode", "case", *HEADINGS)),
        _line(["---"] * (3 + len(HEADINGS))),
        *(_line((row.library, row.case.mode, str(row.case), *_cells(row))) for row in rows),
    ]
    if notes:
        lines += ["", "Left out:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path, command: str) -> None:
    """Draw time, fraction of GEMM and memory against n, a line of panels by library and mode."""
    from matplotlib.figure import Figure

    groups = sorted(
        {(row.library, row.case.mode) for row in rows},
        key=lambda key: (key[0], MODES.index(key[1])),
    )
    figure = Figure(figsize=(15, 0.6 + 3.6 * max(1, len(groups))), layout="constrained")
    figure.suptitle("\n".join(wrap(f"{command}  ({_processor()})", 150)), fontsize="small")
    panels = figure.subplots(max(1, len(groups)), len(PANELS), squeeze=False)
    for line, (library, mode) in zip(panels, groups, strict=False):
        chosen = [row for row in rows if (row.library, row.case.mode) == (library, mode)]
        for axes, label, value in zip(line, PANELS, _VALUES, strict=True):
            _draw(axes, chosen, value)
            axes.set(title=f"{library}, {mode}", xlabel="n", ylabel=label)
            axes.set_xscale("log", base=2)
            lengths = sorted({row.case.n_k for row in chosen})
            axes.set_xticks(lengths, [str(n) for n in lengths])
            if label == PANELS[1]:
                axes.set_ylim(bottom=0)
            else:
                axes.set_yscale("log")
            axes.set_visible(axes.has_data())
        line[0].legend(fontsize="x-small")
    write(path, lambda partial: figure.savefig(partial, format=path.suffix[1:].lower()))


def write_text(path: Path, text: str) -> None:
    """Write a file of text."""
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file, which appears whole or not at all."""
    partial = path.with_name(f".{os.getpid()}{path.suffix}")
    try:
        save(partial)
        os.replace(partial, path)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


_VALUES: tuple[Callable[[Row], float | None], ...] = (
    lambda row: row.seconds.median,
    lambda row: row.gemm_fraction.median,
    lambda row: row.memory or None,  # 0 has no place on a logarithmic axis
)


def _draw(axes: Any, rows: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    """Draw a line for each way and width, chunkattn's thick."""
    widths = {row.case.d for row in rows}
    for way, d in sorted({(row.way, row.case.d) for row in rows}):
        found = [(row.case.n_k, value(row)) for row in rows if (row.way, row.case.d) == (way, d)]
        points = sorted((n, y) for n, y in found if y is not None)
        if points:
            label = way if len(widths) == 1 else f"{way}, d={d}"
            width = 2.5 if way.startswith("chunkattn") else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=label)


def _content(row: Row) -> dict[str, Any]:
    case = row.case
    return {
        "library": row.library,
        "device": row.device,
        "mode": case.mode,
        "n_q": case.n_q,
        "n_k": case.n_k,
        "d": case.d,
        "heads": case.heads,
        "key_heads": case.key_heads,
        "dtype": case.dtype,
        "causal": case.causal,
        "way": row.way,
        "seconds": row.seconds._asdict(),
        "ratio": row.ratio._asdict() if row.ratio else None,
        "gemm_fraction": row.gemm_fraction._asdict(),
        "extra_bytes": row.memory,
        "difference": row.difference,
        "samples": row.samples,
        "gemm_flops": row.gemm,
    }


def _in_seconds(spread: Spread) -> str:
    """Return a time in the unit that suits its median."""
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
    unit, factor = next((pair for pair in units if spread.median * pair[1] >= 1), units[-1])
    numbers = (factor * x for x in spread)
    median, low, high = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in numbers)
    return f"{median} [{low}, {high}] {unit}"


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"


def _processor() -> str:
    """Return the processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
