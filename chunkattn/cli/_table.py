"""Tables on standard output: by rich where it is installed, else as lines with tabs."""

from __future__ import annotations

from collections.abc import Sequence


def show(rows: Sequence[Sequence[str]], headings: Sequence[str] = ()) -> None:
    """Print `rows` of text, below `headings` where there are any."""
    try:
        from rich.box import SIMPLE
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for row in (headings, *rows) if headings else rows:
            print("\t".join(row))
        return
    table = Table(box=SIMPLE, show_header=bool(headings))
    for i in range(max(map(len, rows))):
        table.add_column(headings[i] if headings else "", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, so that brackets are not taken for markup
    Console().print(table)


def in_bytes(count: float) -> str:
    """Return a number of bytes in decimal units.

    Examples
    --------
    >>> in_bytes(65_536**2 * 4)
    '17.2 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
