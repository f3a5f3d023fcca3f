"""Tell what memory a call would take, term by term, before it is made.

Beyond inputs and outputs, attention holds tiles of scores, sums, and what the masks take; the table
gives each term with its formula.  Below it the same attention is set beside other schedules, over
n: textbook attention with all scores, and that of Rabe & Staats (arXiv 2112.05682), which stacks a
summary for each chunk of keys, with chunks of √n and of 4,096 keys.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from .._plan import is_module
from .._request import IMPLEMENTATIONS
from . import CommandError, UsageError, require
from ._bench_case import DTYPES
from ._bench_report import write
from ._table import in_bytes, show
from ._types import at_least, file_in

_EXTRAS = ("numpy", "torch", "jax", "cupy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shapes, the limit and the picture."""
    number = partial(at_least, 1)
    parser.add_argument("--n", type=number, default=16384, help="keys (default: 16384)")
    parser.add_argument(
        "--queries",
        type=number,
        help="queries (default: as many as keys; else nothing is compared)",
    )
    parser.add_argument("--batch", type=number, default=1, help="batch entries (default: 1)")
    parser.add_argument("--heads", type=number, default=8, help="query heads (default: 8)")
    parser.add_argument(
        "--key-heads", type=number, help="heads of key and value (default: --heads)"
    )
    parser.add_argument("--dim", type=number, default=64, help="width (default: 64)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    parser.add_argument("--causal", action="store_true", help="with a causal mask, ends aligned")
    parser.add_argument("--training", action="store_true", help="with the gradients")
    parser.add_argument(
        "--library", type=_module, default="numpy", help="array library (default: numpy)"
    )
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="as in chunkattn.attention (default: auto)",
    )
    parser.add_argument(
        "--memory-limit", type=_limit, metavar="BYTES", help="such as 64000000, 64MB or 64MiB"
    )
    parser.add_argument("--query-chunk-size", type=number, help="(default: chosen)")
    parser.add_argument("--key-chunk-size", type=number, help="(default: chosen)")
    parser.add_argument(
        "--plot", type=file_in(".png", ".svg"), metavar="FILE", help="draw bytes against n"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the plan and the comparison, and draw the picture."""
    if arguments.heads % (arguments.key_heads or 1):
        raise UsageError("argument --key-heads: must divide --heads")
    square = arguments.queries in (None, arguments.n)
    if arguments.plot and not square:
        raise UsageError("argument --plot: needs --queries to be --n")
    name = arguments.library
    require(name if name in _EXTRAS else None, name)
    require("demo", *(["matplotlib.figure"] if arguments.plot else []))
    found = _plan(arguments)
    print(found.heading)
    kinds = (("input", found.inputs), ("output", found.outputs), ("call", found.terms))
    rows = [
        (kind, term.name, in_bytes(term.bytes), f"{term.bytes:,}", term.formula)
        for kind, terms in kinds
        for term in terms
    ]
    peak = found.peak_bytes
    rows.append(("peak", "beyond inputs and outputs", in_bytes(peak), f"{peak:,}", ""))
    show(rows, headings=("", "what", "", "bytes", "formula"))
    if square:
        _show_comparison(found)
    if arguments.plot:
        plot(found, _chosen(arguments), arguments.plot)


def _module(text: str) -> str:
    """Return the name of a module."""
    if not is_module(text):
        raise argparse.ArgumentTypeError(f"must be the name of an array library; got {text!r}")
    return text


def _limit(text: str) -> int | str:
    """Return a number of bytes, perhaps with its unit."""
    return int(text) if text.isdecimal() else text


def _show_comparison(found: Any) -> None:
    """Print other schedules of as many queries as keys beside the plan."""
    comparison = found.compare()
    names = [name for name, _, _ in comparison.schedules]
    columns = [sizes for _, _, sizes in comparison.schedules]
    show(
        [
            (f"{n:,}", *map(in_bytes, sizes))
            for n, *sizes in zip(comparison.lengths, *columns, strict=True)
        ],
        headings=("n", *names),
    )
    for name, formula, _ in comparison.schedules:
        print(f"{name}: {formula}")


def _plan(arguments: argparse.Namespace, **sizes: int) -> Any:
    """Return the plan of what the arguments say, or with other chunk sizes."""
    from .. import ArraySpec, plan

    heads = {"query": arguments.heads, "key": arguments.key_heads or arguments.heads}
    queries = arguments.queries or arguments.n
    query, key = (
        ArraySpec((arguments.batch, heads[name], n, arguments.dim), arguments.dtype)
        for name, n in (("query", queries), ("key", arguments.n))
    )
    if arguments.dtype == "bfloat16" and arguments.library == "numpy":
        require("demo", "ml_dtypes")
    try:
        return plan(
            query,
            key,
            key,
            library=arguments.library,
            training=arguments.training,
            causal=arguments.causal,
            query_offset=arguments.n - queries if arguments.causal else None,
            implementation=arguments.implementation,
            memory_limit=None if sizes else arguments.memory_limit,
            query_chunk_size=sizes.get("query_chunk_size", arguments.query_chunk_size),
            key_chunk_size=sizes.get("key_chunk_size", arguments.key_chunk_size),
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    except NotImplementedError as error:
        raise CommandError(str(error)) from error


def _chosen(arguments: argparse.Namespace) -> dict[str, int]:
    """Return the bytes of some chunk sizes by their names."""
    return {
        f"{size:,} × {size:,}": _plan(
            arguments, query_chunk_size=size, key_chunk_size=size
        ).peak_bytes
        for size in (128, 512, 2048)
        if size <= arguments.n
    }


def plot(found: Any, chosen: dict[str, int], path: Path) -> None:
    """Draw the schedules' bytes against n, and lines for some chunk sizes."""
    from matplotlib.figure import Figure

    comparison = found.compare()
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for name, _, sizes in comparison.schedules:
        axes.plot(comparison.lengths, sizes, marker="o", markersize=3, label=name)
    for i, (name, size) in enumerate(chosen.items()):
        axes.axhline(size, linestyle=":", color=f"C{i + 4}", label=f"chunks of {name}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="n", ylabel="bytes beyond inputs and outputs", title=f"on {found.library}")
    axes.legend(fontsize="small")
    write(path, lambda partial: figure.savefig(partial, format=path.suffix[1:].lower()))
