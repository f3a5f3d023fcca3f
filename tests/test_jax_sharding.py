"""JAX on a mesh of devices: inside `jax.shard_map`, and sharded arrays under `jax.jit`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

jax = pytest.importorskip("jax")
if not hasattr(jax, "shard_map"):
    pytest.skip("this JAX has no jax.shard_map", allow_module_level=True)

SCRIPT = Path(__file__).parent / "sharded.py"
CASES = [
    *("plain", "all at once", "captured arrays", "merge", "lse", "keys of all", "vmap"),
    *("scan of checkpoints", "jvp", "a projection", "functions", "functions with rules"),
]


@pytest.fixture(scope="module")
def found():
    """What the script prints, by case and way."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert list(found) == [*CASES, "refused", "elsewhere", "eagerly"]
    return found


@pytest.mark.parametrize("name", CASES)
def test_sharded_over_batch_and_heads(found, name):
    """Result and gradients are those of one device, and no device has an array whole."""
    ways = found[name]
    assert "failed" not in ways, ways["failed"]
    assert ways
    for way, one in ways.items():
        assert one["error"] < 1e-12, way
        assert one["spec"] == (["b"] if name == "keys of all" else ["b", "h"]), way
        assert set(one["collectives"]) <= {"all-reduce"}, way


def test_captured_on_explicit_axes(found):
    assert "attention inside jax.shard_map or jax.sharding.auto_axes" in found["refused"]


def test_captured_on_another_device(found):
    assert found["elsewhere"] < 1e-12


def test_eager_gradients_on_explicit_axes(found):
    assert found["eagerly"] < 1e-12
