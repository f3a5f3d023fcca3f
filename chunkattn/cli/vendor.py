"""Copy the package into another project, as a folder that works under any name.

DEST receives a folder `chunkattn` with the Python files and the licence.
"""

from __future__ import annotations

import argparse
import keyword
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path, PurePath

from . import CommandError, UsageError

REQUIREMENT = "array-api-compat>=1.11"

_PACKAGE = __package__.rpartition(".")[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the destination and how to treat it."""
    parser.add_argument("dest", metavar="DEST", type=Path, help="where to put the folder")
    parser.add_argument(
        "--name",
        type=_identifier,
        default="chunkattn",
        help="name of the folder (default: chunkattn)",
    )
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")


def run(arguments: argparse.Namespace) -> None:
    """Copy the files, and print what was written."""
    target = arguments.dest / arguments.name
    _check(target, arguments.force)
    files = package_files()
    try:
        arguments.dest.mkdir(parents=True, exist_ok=True)
        _copy(files, target)
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error}") from error
    print(f"{target}: {len(files)} files written")
    print(f"They require {REQUIREMENT}, and the array library of your choice.")


def package_files() -> dict[PurePath, Path]:
    """Return where each file of the package stands, by its path in a copy.

    The import system knows the folders: in a checkout ``backends`` is not inside ``chunkattn``.
    """
    files = {}
    for inside, package in ((PurePath(), _PACKAGE), (PurePath("backends"), f"{_PACKAGE}.backends")):
        folder = _folder(package)
        for path in sorted((*folder.rglob("*.py"), *folder.glob("py.typed"))):
            files[inside / path.relative_to(folder)] = path
    files[PurePath("LICENSE")] = _licence(_folder(_PACKAGE))
    return files


def _folder(package: str) -> Path:
    folder = Path(next(iter(import_module(package).__path__)))
    if not folder.is_dir():
        raise CommandError(f"{package} is not in a folder that could be copied: {folder}")
    return folder


def _licence(package: Path) -> Path:
    """Return the licence: inside a copy, recorded by an installation, or beside a checkout."""
    for path in (package / "LICENSE", *_recorded_licences(package), package.parent / "LICENSE"):
        if path.is_file():
            return path
    raise CommandError(f"no licence goes with {package}, and no copy may be made without")


def _recorded_licences(package: Path) -> Iterator[Path]:
    """Yield the licences of the distribution, if it is the one that installed this package."""
    try:
        distribution = metadata.distribution("chunkattn")
    except metadata.PackageNotFoundError:
        return
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    if (package / "__init__.py").resolve() in [file.resolve() for file in files]:
        yield from (file for file in files if file.name == "LICENSE")


def _check(target: Path, force: bool) -> None:
    """Refuse, before any work, a target that must not be written."""
    folder = target.parent
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    if target.exists() or target.is_symlink():
        if not force:
            raise UsageError(f"{target} exists already (--force replaces it)")
        if _folder(_PACKAGE).resolve().is_relative_to(target.resolve()):
            raise UsageError(f"{target} holds the package that would be copied")


def _copy(files: dict[PurePath, Path], target: Path) -> None:
    """Copy `files` to `target`, which is replaced whole or stays as it is."""
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True
    ) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        for inside, source in files.items():
            (new / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, new / inside)
        replaces = target.exists() or target.is_symlink()
        if replaces:
            os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            if replaces:
                os.replace(old, target)
            raise


def _identifier(text: str) -> str:
    if not text.isidentifier() or keyword.iskeyword(text):
        raise argparse.ArgumentTypeError(f"must be a name that Python can import; got {text!r}")
    return text
