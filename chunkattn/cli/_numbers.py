"""Numbers on the command line."""

from __future__ import annotations

import argparse
import math


def at_least(smallest: int, text: str) -> int:
    """Return a whole number from `smallest` on."""
    if not text.isdecimal() or int(text) < smallest:
        raise argparse.ArgumentTypeError(f"must be a whole number from {smallest} on; got {text!r}")
    return int(text)


def positive(text: str) -> float:
    """Return a positive, finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number; got {text!r}")
    return number
