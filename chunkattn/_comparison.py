"""Bytes of several schedules side by side, and tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Bytes of several schedules over lengths; `print` shows a table.

    Attributes
    ----------
    lengths : tuple of int
        The lengths.
    schedules : tuple of (str, str, tuple of int)
        For each schedule its name, its formula, and its bytes at each length.
    """

    lengths: tuple[int, ...]
    schedules: tuple[tuple[str, str, tuple[int, ...]], ...]

    def __str__(self) -> str:
        """Return a table, with the formulas below it."""
        rows = [("n", *(name for name, _, _ in self.schedules))]
        for i, n in enumerate(self.lengths):
            rows.append((f"{n:,}", *(f"{sizes[i]:,}" for _, _, sizes in self.schedules)))
        told = [f"{name}: {formula}" for name, formula, _ in self.schedules]
        return "\n".join([*aligned(rows, right=True), "", *told])


def aligned(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Return rows of text with their columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right or i == 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
