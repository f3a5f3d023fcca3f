"""The README's examples, each run as a doctest."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import libraries
import pytest

README = Path(__file__).parents[1] / "README.md"
NEEDS = {"CuPy": "cupy"}  # the examples that only a GPU can run, by heading


def examples():
    """Yield the heading, the text and the line of each example."""
    text = README.read_text(encoding="utf-8")
    headings = list(re.finditer(r"^#+ (.+)$", text, re.MULTILINE))
    for block in re.finditer(r"^```pycon\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        heading = [h[1] for h in headings if h.start() < block.start()][-1]
        line = text.count("\n", 0, block.start(1))
        yield pytest.param(heading, block[1], line, id=heading)


@pytest.mark.parametrize(("heading", "text", "line"), list(examples()))
def test_example(heading, text, line):
    needed = NEEDS.get(heading)
    if needed and not libraries.present(needed):
        pytest.skip(f"{needed} finds no device here")
    example = doctest.DocTestParser().get_doctest(text, {}, heading, str(README), line)
    assert example.examples
    told = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert not result.failed, "".join(told)


def test_every_code_block_is_an_example_or_a_command():
    kinds = re.findall(r"^```(\w*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(kinds) == {"pycon", "sh", ""}
