"""Check a package that was built or copied: its files are all there, and it computes attention.

``smoke.py NAME [FOLDER]`` imports NAME, from FOLDER where given, and calls it on NumPy arrays;
run it with ``python -I`` from outside the checkout.  ``smoke.py --archives FOLDER`` looks into
the wheel and the sdist in FOLDER.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> None:
    if arguments[0] == "--archives":
        check_archives(Path(arguments[1]))
    else:
        check_package(*arguments)


def check_package(name: str, folder: str | None = None) -> None:
    """Import the package, compare its files with the checkout's, and call it."""
    if folder is not None:
        sys.path.insert(0, folder)
    package = import_module(name)
    place = Path(package.__file__).parent
    assert place != ROOT / "chunkattn", f"{name} comes from the checkout"
    assert folder is None or place.parent == Path(folder), f"{name} comes from {place}"
    found = {
        x.relative_to(place).as_posix() for x in place.rglob("*") if x.suffix in (".py", ".typed")
    }
    compare(found, set(sources()))
    check_attention(package)
    strangers = {"chunkattn", "torch", "jax", "cupy"} - {name}
    assert not strangers & set(sys.modules), f"{name} imports {strangers & set(sys.modules)}"
    print(f"{name} {package.__version__}: {len(found)} files, attention is right on NumPy")


def sources() -> list[str]:
    """Return the package's files by their path in an installation."""
    places = ((ROOT / "chunkattn", ""), (ROOT / "backends", "backends/"))
    return [
        prefix + path.relative_to(folder).as_posix()
        for folder, prefix in places
        for path in folder.rglob("*")
        if path.suffix in (".py", ".typed")
    ]


def compare(found: set[str], expected: set[str]) -> None:
    assert found == expected, (
        f"missing: {sorted(expected - found)}, too many: {sorted(found - expected)}"
    )


def check_attention(package) -> None:
    """Compare a causal call, in chunks, with the textbook."""
    import numpy as np

    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(8)
    weights = np.exp(np.where(np.tri(50, dtype=bool), scores, -np.inf))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ value
    out = package.attention(query, key, value, causal=True, query_chunk_size=16, key_chunk_size=16)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-14)


def check_archives(folder: Path) -> None:
    """Check that wheel and sdist hold the package, the licence and (sdist) what tests it."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = [name.removeprefix("chunkattn/") for name in names if name.startswith("chunkattn/")]
    compare(set(inside), set(sources()))
    assert any(name.endswith("/LICENSE") for name in names), f"no licence in {wheel.name}"
    with tarfile.open(sdist) as archive:
        held = {str(PurePosixPath(*PurePosixPath(n).parts[1:])) for n in archive.getnames()}
    wanted = {"LICENSE", "README.md", "pyproject.toml", "Makefile", "backends/generic.py"}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert wanted <= held, f"missing in {sdist.name}: {sorted(wanted - held)}"
    print(f"{wheel.name}: {len(names)} files; {sdist.name}: {len(held)} files")


if __name__ == "__main__":
    main(sys.argv[1:])
