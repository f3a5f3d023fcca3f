"""The command line: one module for each subcommand.

A subcommand's module has a docstring (its help; the first line stands in the overview),
``add_arguments(parser)`` and ``run(arguments)``.  It imports no array library and nothing of the
``demo`` extra before ``run``, so that ``--help`` is quick and needs nothing installed.
"""

from __future__ import annotations

import argparse
from importlib import import_module

from .. import __version__

SUBCOMMANDS = (
    "info",
    "demo",
    "plan",
    "bench",
    "vendor",
)


class CommandError(Exception):
    """What kept a subcommand from its work: exit status 1."""


class UsageError(Exception):
    """An argument that only the subcommand could see is wrong: exit status 2."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has ``run`` and ``parser``, those of the subcommand."""
    package = __package__.rpartition(".")[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}",
        description="Exact attention in memory linear in the sequence length.",
    )
    parser.add_argument("--version", action="version", version=f"{package} {__version__}")
    subparsers = parser.add_subparsers(metavar="SUBCOMMAND", required=True)
    for name in SUBCOMMANDS:
        module = import_module(f".{name}", __package__)
        description = module.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run, parser=subparser)
    return parser


def require(extra: str | None, *modules: str) -> None:
    """Import `modules`, and where one is missing name the extra that brings it, if one does."""
    for module in modules:
        try:
            import_module(module)
        except (ImportError, OSError) as error:
            hint = f"; try: pip install 'chunkattn[{extra}]'" if extra else ""
            raise CommandError(f"cannot import {module} ({error}){hint}") from error
