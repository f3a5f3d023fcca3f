"""The examples of the README and of pages of the documentation, each section a doctest."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import libraries
import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = (README, *(ROOT / "docs" / f"{name}.md" for name in ("gradients", "pytorch")))
WITH_EXAMPLES = (*PAGES, ROOT / "docs" / "frameworks.md")
NEEDS = {"CuPy": "cupy"}  # the examples that only a GPU can run, by heading


def sections():
    """Yield the page, the heading, the examples and the line of each section that has any."""
    for page in WITH_EXAMPLES:
        text = page.read_text(encoding="utf-8")
        headings = list(re.finditer(r"^#+ (.+)$", text, re.MULTILINE))
        ends = [h.start() for h in headings[1:]] + [len(text)]
        for heading, end in zip(headings, ends, strict=True):
            section = text[heading.end() : end]
            blocks = re.findall(r"^```pycon\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
            if blocks:
                line = text.count("\n", 0, heading.start())
                id = f"{page.stem}: {heading[1]}"
                yield pytest.param(page, heading[1], "\n".join(blocks), line, id=id)


@pytest.mark.parametrize(("page", "heading", "text", "line"), list(sections()))
def test_example(page, heading, text, line):
    needed = NEEDS.get(heading)
    if needed and not libraries.present(needed):
        pytest.skip(f"{needed} finds no device here")
    example = doctest.DocTestParser().get_doctest(text, {}, heading, str(page), line)
    assert example.examples
    told = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert not result.failed, "".join(told)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_code_block_is_an_example_or_a_command(page):
    kinds = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(kinds) <= {"pycon", "sh", ""}
    assert "pycon" in kinds
