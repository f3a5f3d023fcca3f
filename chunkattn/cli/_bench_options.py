"""The options of the benchmark, and what they ask for."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, zip_longest

from ._bench_case import DTYPES, MODES, Case
from ._bench_library import LIBRARIES, PEERS
from ._types import at_least, file_in, positive

IMPLEMENTATIONS = ("auto", "chunked", "native", "standard")
_LENGTHS = {
    "forward": (256, 1024, 4096),
    "forward+backward": (256, 1024, 2048),
    "decode": (4096,),
    "small": (64, 128),
}
_QUICK_LENGTHS = {**_LENGTHS, "forward": (256, 2048), "forward+backward": (1024,), "small": (64,)}
ROUNDS, QUICK_ROUNDS = 11, 7
QUICK_SECONDS = 80.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the benchmark."""
    _add_cases(parser.add_argument)
    _add_ways(parser.add_argument)
    _add_files(parser.add_argument)


def _add_cases(add: Callable[..., object]) -> None:
    add(
        "--mode",
        type=_some(MODES),
        default=MODES,
        metavar="LIST",
        help=f"of {', '.join(MODES)} (default: all); decode has one query, small is a forward pass",
    )
    add("--n", type=_numbers, metavar="LIST", help="lengths (default: some that suit each mode)")
    add("--dim", type=_numbers, default=(64,), metavar="LIST", help="widths (default: 64)")
    add("--heads", type=_number, default=8, help="heads of the query (default: 8)")
    add("--key-heads", type=_number, help="heads of key and value (default: as the query)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    add("--causal", action="store_true", help="with a causal mask; decode needs none")


def _add_ways(add: Callable[..., object]) -> None:
    add(
        "--libraries",
        type=_some(LIBRARIES),
        metavar="LIST",
        help=f"of {', '.join(LIBRARIES)}, with commas (default: those that are installed)",
    )
    add(
        "--implementation",
        type=_some(IMPLEMENTATIONS),
        default=("auto",),
        metavar="LIST",
        help=f"chunkattn's: of {', '.join(IMPLEMENTATIONS)} (default: auto), ratios by the first",
    )
    add(
        "--peers",
        type=_some(PEERS),
        default=tuple(name for name in PEERS if name != "flex"),
        metavar="LIST",
        help=f"of {', '.join(PEERS)} (default: all but flex, which takes a compiler)",
    )
    add("--rounds", type=_number, help=f"(default: {ROUNDS}; with --quick {QUICK_ROUNDS})")
    add(
        "--wait",
        choices=("last", "each"),
        default="last",
        help="on a GPU, wait for the last of a sample's calls, or for each (default: last)",
    )
    add("--seconds", type=positive, help="budget: fewer rounds, then fewer cases (default: none)")
    add("--quick", action="store_true", help="few sizes, in under two minutes on two cores")


def _add_files(add: Callable[..., object]) -> None:
    add("--json", type=file_in(".json"), metavar="FILE", help="write all samples as JSON")
    add("--markdown", type=file_in(".md"), metavar="FILE", help="write the table as Markdown")
    add("--plot", type=file_in(".png", ".svg"), metavar="FILE", help="plot against n: PNG or SVG")


def cases(options: argparse.Namespace) -> list[Case]:
    """Return what the options ask to compute; with a budget, one case of each mode first."""
    lengths = _QUICK_LENGTHS if options.quick else _LENGTHS
    by_mode = [_of_mode(options, mode, options.n or lengths[mode]) for mode in options.mode]
    if not (options.quick or options.seconds):
        return [*chain(*by_mode)]
    return [case for some in zip_longest(*by_mode) for case in some if case is not None]


def _of_mode(options: argparse.Namespace, mode: str, lengths: Iterable[int]) -> list[Case]:
    return [
        Case(
            mode=mode,
            n_q=1 if mode == "decode" else n,
            n_k=n,
            d=d,
            heads=options.heads,
            key_heads=options.key_heads or options.heads,
            dtype=options.dtype,
            causal=options.causal and mode != "decode",
        )
        for d in options.dim
        for n in lengths
    ]


def command(arguments: argparse.Namespace) -> str:
    """Return the command with the options that were given."""
    words = ["python -m chunkattn bench"]
    for name, value in vars(arguments).items():
        if name in ("run", "parser") or value == arguments.parser.get_default(name):
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(shlex.quote(text))
    return " ".join(words)


def _some(choices: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the type of a list of names with commas."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(
                    f"must be of {', '.join(choices)}, with commas; got {name!r}"
                )
        return names

    return parse


_number = partial(at_least, 1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(_number, text.split(","))))
