"""Measure a page of results anew: run its `python -m chunkattn bench` commands, part by part.

    python benchmarks/renew.py benchmarks/results/cpu.md --parts 1,3

A part is a section with such a command.  What stands before the command is kept, and what stands
after it, up to the next section, is replaced by what the command writes, at once: what an
interrupted run has measured stays.  Plots go beside the page.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

COMMAND = re.compile(r"^- Command: `python (-m chunkattn bench .*)`$", re.MULTILINE)


def main():
    options = parsed(sys.argv[1:])
    count = len([s for s in sections(options.page) if COMMAND.search(s)])
    if not count:
        sys.exit(f"{options.page} has no command of the benchmark")
    for number in options.parts or ():
        if number > count:
            sys.exit(f"{options.page} has the parts 1 to {count}, not {number}")
    for number in options.parts or range(1, count + 1):
        renew(options.page, number)


def parsed(words):
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--parts", type=machine.numbers, metavar="1,2,…", help="(default: all)")
    options = parser.parse_args(words)
    if not options.page.is_file():
        parser.error(f"there is no page {options.page}")
    return options


def sections(page):
    """Return the sections of a page, which put together are its text."""
    return re.split(r"^(?=## )", page.read_text(), flags=re.MULTILINE)


def renew(page, number):
    """Run the command of one part, and put in what it writes."""
    found = sections(page)
    place = [i for i, section in enumerate(found) if COMMAND.search(section)][number - 1]
    command = COMMAND.search(found[place])
    title = found[place].partition("\n")[0]
    print(f"{title}\n{command[1]}", file=sys.stderr, flush=True)
    found[place] = found[place][: command.start()] + measured(command[1], page.parent)
    page.write_text("".join(found).rstrip() + "\n")


def measured(command, folder):
    """Return what a command of the benchmark writes as Markdown, and the commit."""
    words = shlex.split(command)
    with tempfile.TemporaryDirectory() as temporary:
        run = list(words)
        for option, where in (("--markdown", temporary), ("--json", temporary), ("--plot", folder)):
            if option in words:
                place = words.index(option) + 1
                run[place] = str(Path(where, words[place]))
        subprocess.run([sys.executable, *run], check=True, stdout=subprocess.DEVNULL)
        report = Path(run[run.index("--markdown") + 1]).read_text()
    head, mark, rest = report[report.index("- Machine:") :].partition("\n\n")
    lines = [f"- Command: `python {command}`", head, *machine.commit()]
    return "\n".join(lines) + mark + rest.rstrip() + "\n\n"


if __name__ == "__main__":
    main()
