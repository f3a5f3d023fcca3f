"""The examples: what they say that they show."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
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


def test_equinox(capsys):
    """Result and gradients are those of equinox's own layer."""
    pytest.importorskip("equinox")
    main = runpy.run_path(str(EXAMPLES / "equinox_attention.py"))["main"]
    assert main() == 0
    assert "largest difference" in capsys.readouterr().out


# diffusers and what it imports warn, of themselves.
DIFFUSERS = """
import runpy, sys
import torch
example = runpy.run_path(sys.argv[1])
torch.set_num_threads(1)
assert example["main"]() == 0
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
torch.manual_seed(0)
sizes = {"query_dim": 32, "heads": 4, "dim_head": 8}
kinds = [
    {"qk_norm": "layer_norm", "norm_num_groups": 4, "residual_connection": True},
    {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm", "rescale_output_factor": 2},
    {"spatial_norm_dim": 5, "residual_connection": True},
]
text, seen = torch.randn(2, 7, 12), torch.randn(2, 1, 7)
for kind in kinds:
    layer = Attention(**sizes, **kind)
    calls = {
        "picture": (torch.randn(2, 32, 4, 5), None, None, torch.randn(2, 5, 4, 5)),
        "tokens": (torch.randn(2, 9, 32), text, seen, None),
    }
    call = calls["tokens" if "cross_attention_dim" in kind else "picture"]
    found = []
    for processor in (AttnProcessor2_0(), example["ChunkattnProcessor"]()):
        layer.set_processor(processor)
        layer.zero_grad()
        out = layer(call[0], *call[1:3], temb=call[3])
        out.sin().sum().backward()
        found.append([out, *(x.grad for x in layer.parameters() if x.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
"""


def test_diffusers():
    """A UNet, and attention layers of every kind, with gradients."""
    if find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    path = EXAMPLES / "diffusers_processor.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", DIFFUSERS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
