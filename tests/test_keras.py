"""Keras' `MultiHeadAttention` with chunkattn's attention, on each of Keras' backends."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "keras_layers.py"


def run(*command, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("keras") is None, reason="keras is not installed")
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_layer(backend):
    """Results, gradients, dropout, a model read again, and what is refused."""
    pytest.importorskip(backend)
    run(str(SCRIPT), KERAS_BACKEND=backend)


def test_keras_is_imported_by_the_first_call():
    run("-c", "import sys, chunkattn.interop; assert 'keras' not in sys.modules")
