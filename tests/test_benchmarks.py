"""The scripts of `benchmarks/`: what they refuse before any work, and where they write."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script, *words):
    command = [sys.executable, str(FOLDER / f"{script}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("sizes", ("--libraries", "numpy,foo"), "must be of numpy, torch, jax; got 'foo'"),
        ("floors", ("--libraries", "foo"), "must be of numpy, torch, jax; got 'foo'"),
        ("predicted", ("--libraries", "foo"), "; got 'foo'"),
        ("pieces", ("--rounds", 1), "must be a whole number from 2 on"),
        ("gradients", ("--longest", 4096), "must be a whole number from 4097 on"),
        ("masks", ("--memory-n", 0), "argument --memory-n: must be a whole number from 1 on"),
        ("memory", ("--longest", 1000), "must be a whole number from 1024 on"),
        ("memory", ("--out", "nowhere/x.md"), "there is no folder nowhere"),
        ("floors", ("--dim", "64,0"), "must be a whole number from 1 on; got '0'"),
        ("schedules", ("--longest", 5), "must be a whole number from 1024 on; got '5'"),
        ("schedules", ("--figure", "x.txt"), "must be the name of a file in"),
        ("busy", ("--rounds", "-3"), "must be a whole number from 1 on; got '-3'"),
        ("renew", (__file__, "--parts", "x"), "must be a whole number from 1 on; got 'x'"),
        ("million", ("--n", 0), "must be a whole number from 1 on"),
        ("million", ("--dtype", "foo"), "invalid choice: 'foo'"),
        ("million", ("--library", "foo"), "invalid choice: 'foo'"),
        ("renew", ("nonexistent.md",), "there is no page nonexistent.md"),
    ],
)
def test_bad_usage(script, words, message):
    done = run(script, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert message in done.stderr
    assert done.stdout == ""


def test_a_trial_run_leaves_the_results(tmp_path):
    results = FOLDER / "results" / "memory.md"
    before = results.read_bytes()
    done = run("memory", "--longest", 1024)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# Memory of one call on NumPy\n\n- Command: ")
    assert results.read_bytes() == before
    assert run("memory", "--longest", 1024, "--out", tmp_path / "memory.md").returncode == 0
    assert (tmp_path / "memory.md").read_text().startswith("# Memory of one call on NumPy")
