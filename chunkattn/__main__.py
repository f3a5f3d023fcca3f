"""``python -m chunkattn``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .cli import CommandError, UsageError, make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status; bad usage and ``--help`` exit by argparse."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UsageError as error:
        arguments.parser.error(str(error))
    except CommandError as error:
        print(f"{arguments.parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{arguments.parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
