"""Rounding errors of derivatives: the tiles' beside the textbook's, against wider arithmetic."""

from __future__ import annotations

from functools import cache

import gradients
import libraries
import numpy as np
import pytest
from gradients import Point

# PyTorch's forward mode, on its first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

CASES = {
    "normal scores": {},
    "causal": {"causal": True},
    "large scores": {"spread": 4.0},
    "large scores, causal": {"spread": 4.0, "causal": True},
    "bias by key": {"bias": True},
    "large scores, causal, bias by key": {"spread": 4.0, "causal": True, "bias": True},
}
HEADS, N, WIDTH = 2, 256, 64


def drawn(heads, n, *, spread=1.0, bias=False, causal=False):
    """Return a `Point` of one case: float64, and of n queries and keys."""
    rng = np.random.default_rng(2112_05682)
    shapes = [(heads, n, WIDTH)] * 3 + [(heads, 1, n)] * bias
    query, *rest = map(rng.standard_normal, shapes)
    return Point(
        (spread * query, *rest),
        tuple(map(rng.standard_normal, shapes)),
        rng.standard_normal(shapes[0]),
    )


@cache
def exact(case, dtype, heads, n):
    """Return a case's `Point` as `dtype` holds it, and by mode its derivatives in wider arithmetic.

    The `Point` is in float64.
    """
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    given = CASES[case]
    narrow = _each(drawn(heads, n, **given), lambda x: x.astype(dtype))
    wide = np.longdouble if dtype == "float64" else np.float64
    point = _each(narrow, lambda x: x.astype(wide))
    return _each(narrow, lambda x: x.astype(np.float64)), {
        mode: gradients.by_hand(mode, point, causal="causal" in given) for mode in gradients.MODES
    }


def _each(point, change):
    return Point(*(tuple(map(change, xs)) for xs in point[:2]), change(point.d_out))


def errors(lib, dtype, case, heads=HEADS, n=N):
    """Yield mode, name of the result, and for the tiles and the textbook the errors of it."""
    point, known = exact(case, dtype, heads, n)
    point = _each(point, lambda x: lib.asarray(x, dtype))
    # JAX's own attention is compiled, so its textbook is too.
    compiled = libraries.library("jax-jit") if lib.name.startswith("jax") else lib
    causal = "causal" in CASES[case]
    for mode in gradients.modes(lib):
        found = {
            way: own.call(gradients.derivative(lib, way, mode, causal=causal), point)
            for way, own in (("chunked", lib), ("textbook", compiled))
        }
        for name in known[mode].keys() - {"out"}:
            exactly = known[mode][name]
            yield mode, name, {way: lib.numpy(x[name]) - exactly for way, x in found.items()}


def rms(error):
    """Return the root of the mean square of an error.

    Of few thousand numbers the largest error is that of one unlucky row, in either way.
    """
    return float(np.sqrt(np.mean(error**2)))


@pytest.mark.parametrize("case", ["normal scores", "large scores, causal, bias by key"])
@pytest.mark.feature("gradient error at most twice the textbook's")
def test_error_is_at_most_twice_the_textbooks(lib, case):
    for dtype in lib.dtypes:
        for mode, name, error in errors(lib, dtype, case):
            chunked, textbook = rms(error["chunked"]), rms(error["textbook"])
            told = f"{mode} mode, {name}, {dtype}: {chunked:.3g} against {textbook:.3g}"
            assert chunked <= 2 * textbook, told
