"""What a figure was measured on."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from chunkattn.cli._types import at_least, file_in

LIBRARIES = (
    "chunkattn",
    "array-api-compat",
    "numpy",
    "torch",
    "jax",
    "array-api-strict",
    "ml_dtypes",
)


def about(command, arguments):
    """Return the command, the machine and the versions as Markdown lines."""
    options = " ".join(
        f"--{name.replace('_', '-')} {told(value)}"
        for name, value in vars(arguments).items()
        if value is not None and name != "out"
    )
    return "\n".join(
        [
            f"- Command: `{f'{command} {options}'.strip()}`",
            f"- Machine: {', '.join([processor(), *gpus()])}, {os.cpu_count()} cores, "
            f"{platform.system()}",
            f"- Python {platform.python_version()}, {', '.join(versions())}",
            *commit(),
        ]
    )


def told(value):
    """Return the value of an option as it is given."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def numbers(text):
    """Return positive whole numbers that are given with commas between them."""
    return tuple(at_least(1, word) for word in text.split(","))


def commit():
    """Return a line with the commit of the checkout that this file is in, where there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    if shutil.which("git") is None:
        return []
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return [f"- Commit {found}"] if found else []


def run(text, report, known=(), least=None, **options):
    """Print the report of a benchmark whose docstring is `text`; its lines are ``report(given)``.

    `options` are those of the command line with their defaults, `known` the libraries that there
    are figures for, and `least` the smallest value of numbers by name (else 1).
    """
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    for name, x in options.items():
        option = f"--{name.replace('_', '-')}"
        kind = numbers if isinstance(x, tuple) else type(x)
        parser.add_argument(option, type=kind, default=x, help=f"(default: {told(x)})")
    add_out(parser)
    given = parser.parse_args()
    for name in getattr(given, "libraries", "").split(","):
        if known and name not in known:
            parser.error(f"argument --libraries: must be of {', '.join(known)}; got {name!r}")
    for name, x in vars(given).items():
        smallest = (least or {}).get(name, 1)
        if isinstance(x, int) and x < smallest:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"argument {option}: must be a whole number from {smallest} on; got {x}")
    write(report(given), given.out)


def add_out(parser):
    """Add the file that a report is written to."""
    told = "write the report here (default: nowhere)"
    parser.add_argument("--out", type=file_in(".md"), metavar="FILE", help=told)


def write(lines, path):
    """Print a report line by line as it comes, then write it to `path` where there is one."""
    written = []
    for line in lines:
        print(line, flush=True)
        written.append(line)
    if path:
        path.write_text("\n".join(written) + "\n")


def processor():
    """Return the processor's name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpus():
    """Return the names of the GPUs that NVIDIA's driver tells."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def versions():
    """Yield name and version of each library that is installed."""
    for name in LIBRARIES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        yield f"cupy {cupy.__version__}"
