"""The examples: what they say that they show."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def train():
    return runpy.run_path(str(EXAMPLES / "train.py"))


def test_training_learns_by_attention(train):
    """Without attention to other positions no guess beats the uniform one."""
    losses = train["losses"]("numpy", 70)
    assert np.mean(losses[-10:]) < 0.05 * losses[0]
    blind = train["losses"]("numpy", 70, reach=0)
    assert np.mean(blind[-10:]) > 0.95 * np.log(train["VOCABULARY"] - 1)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_training_is_the_same_on_every_library(train, name):
    pytest.importorskip(name)
    steps = 45  # most of the fall
    expected = train["losses"]("numpy", steps)
    np.testing.assert_allclose(train["losses"](name, steps), expected, rtol=0, atol=1e-9)
    assert expected[-1] < expected[0] / 2


def test_training_command_compares(train, capsys, monkeypatch):
    """The exit status tells whether all libraries agree."""
    pytest.importorskip("torch")
    monkeypatch.setitem(train["main"].__globals__, "find_spec", lambda name: name != "jax")
    assert train["main"](["--compare", "--steps", "3"]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "numpy", "loss", "torch", "loss", "difference"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert last.startswith("largest difference")
    assert train["main"](["--compare", "--steps", "3", "--tolerance", "-1"]) == 1


def test_training_command_refuses_no_steps(train):
    with pytest.raises(SystemExit, match="2"):
        train["main"](["--steps", "0"])
