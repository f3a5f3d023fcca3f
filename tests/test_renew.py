"""`benchmarks/renew.py`: parts of a page of results, measured anew."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "renew.py"
COMMAND = (
    "python -m chunkattn bench --mode forward --n 16 --heads 1 --libraries numpy --peers textbook "
    "--rounds 1 --markdown part.md --plot part.png"
)
PAGE = f"""# A page

## One

Said before.

- Command: `{COMMAND}`

old

## A remark

Not measured.

## Two

- Command: `python -m chunkattn bench --n none --markdown two.md`

old, too
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def renew(page, *words):
    command = [sys.executable, str(SCRIPT), str(page), *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_one_part(page):
    done = renew(page, "--parts", "1")
    assert done.returncode == 0, done.stderr
    before, _, after = page.read_text().partition(f"- Command: `{COMMAND}`\n")
    assert before == "# A page\n\n## One\n\nSaid before.\n\n"
    measured, _, rest = after.partition("\n\n## A remark\n")
    assert measured.startswith("- Machine: ")
    assert "| numpy | forward | n=16 h=1 d=64 | textbook |" in measured
    assert "old" not in measured
    assert "\n## A remark\n" + rest == PAGE[PAGE.index("\n## A remark") :]
    assert sorted(path.name for path in page.parent.iterdir()) == ["page.md", "part.png"]


def test_the_last_part(page):
    page.write_text(PAGE[: PAGE.index("\n## Two")])
    assert renew(page, "--parts", "1").returncode == 0
    assert page.read_text().rstrip() + "\n" == page.read_text()


def test_what_fails_is_left(page):
    assert renew(page, "--parts", "2").returncode != 0
    assert renew(page, "--parts", "1,3").stderr == f"{page} has the parts 1 to 2, not 3\n"
    assert page.read_text() == PAGE
