"""Memory of derivatives: linear in the length, and a small part of the textbook's."""

from __future__ import annotations

import gradients
import libraries
import pytest
from memory import WIDTH, extra_bytes_of_derivative, of_process

# PyTorch's forward mode, on its first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

LONG, SHORT = 16384, 2048
# What a derivative may hold for each position: so many arrays as large as the query in float32.
ARRAYS = {"reverse": 4, "forward": 2, "second": 8}


def textbooks(lib, mode):
    """Return what the textbook needs for `LONG` queries and keys, from what it needs for `SHORT`.

    It grows by n² at least.
    """
    return extra_bytes_of_derivative(lib, "textbook", mode, SHORT) * (LONG // SHORT) ** 2


@pytest.mark.feature("gradients in memory linear in the length")
def test_memory_of_derivatives_is_linear(lib):
    for mode in gradients.modes(lib):
        short, long = (
            extra_bytes_of_derivative(lib, "chunked", mode, n) for n in (SHORT, 2 * SHORT)
        )
        by_position = (long - short) / SHORT
        assert by_position <= ARRAYS[mode] * 4 * WIDTH, mode
        at_long = short + by_position * (LONG - SHORT)
        factor = 200 if mode == "reverse" else 100
        assert factor * at_long < textbooks(lib, mode), mode


def test_memory_of_the_backward_pass():
    """Measured at full length; NumPy has one thread here."""
    lib = libraries.library("numpy")
    extra = extra_bytes_of_derivative(lib, "chunked", "reverse", LONG)
    assert 200 * extra < textbooks(lib, "reverse")


def test_memory_of_the_backward_pass_in_jax():
    pytest.importorskip("jax")
    lib = libraries.library("jax")
    extra, textbook = (
        extra_bytes_of_derivative(lib, way, "reverse", LONG) for way in ("chunked", "textbook")
    )
    assert 200 * extra < textbook


def test_memory_of_the_backward_pass_of_a_torch_process():
    """The resident set counts whatever there is, threads and allocators included."""
    pytest.importorskip("torch")
    extra = of_process("torch", "chunked", "reverse", LONG)
    assert 200 * extra < textbooks(libraries.library("torch"), "reverse")
