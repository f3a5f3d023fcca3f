"""Types of arguments on the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile


def at_least(smallest: int, text: str) -> int:
    """Return a whole number from `smallest` on."""
    if not text.isdecimal() or int(text) < smallest:
        raise argparse.ArgumentTypeError(f"must be a whole number from {smallest} on; got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """Return a positive, finite number."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text!r}")
    return number


def within(low: float, high: float, text: str) -> float:
    """Return a number from `low` to `high`."""
    number = _number(text)
    if not low <= number <= high:
        told = f"must be a number from {low:g} to {high:g}; got {text!r}"
        raise argparse.ArgumentTypeError(told)
    return number


def _number(text: str) -> float:
    """Return a number; NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def file_in(*suffixes: str) -> Callable[[str], Path]:
    """Return the type of a file that can be written, which is checked before any work."""

    def parse(text: str) -> Path:
        path = Path(text)
        if len(path.name.encode()) > 255:
            raise argparse.ArgumentTypeError(f"the name {path.name[:20]}… is too long")
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(
                f"must be the name of a file in {' or '.join(suffixes)}; got {text}"
            )
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
        try:
            with NamedTemporaryFile(dir=path.parent, prefix="."):
                pass
        except OSError as error:
            told = f"the folder {path.parent} cannot be written to: {error.strerror}"
            raise argparse.ArgumentTypeError(told) from error
        return path

    return parse
