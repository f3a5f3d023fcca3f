"""One `lib` fixture over all libraries, one comparison, and the record of what was shown."""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from contextlib import nullcontext
from inspect import signature
from pathlib import Path

import libraries
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, settings

from chunkattn import attention

gc.set_threshold(100_000, 20, 100)  # what JAX and PyTorch keep is much to look through

# Scripts for processes of their own, which set JAX and Keras up for the whole of one.
collect_ignore = ["keras_layers.py", "sharded.py"]

settings.register_profile(
    "suite",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("long", parent=settings.get_profile("suite"), max_examples=500)
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption(
        "--libraries",
        default=None,
        help="comma-separated libraries to test (default: all CPU ones, and each GPU one that "
        "finds a device); one that is missing is an error",
    )
    parser.addoption("--capabilities", default=None, help="write the capability record here (JSON)")


def chosen(config):
    asked = config.getoption("--libraries")
    if asked:
        names = asked.split(",")
        unknown = set(names) - {*libraries.CPU, *libraries.GPU}
        if unknown:
            raise pytest.UsageError(f"unknown libraries: {', '.join(sorted(unknown))}")
        return names
    return [*libraries.CPU, *(name for name in libraries.GPU if libraries.present(name))]


def pytest_generate_tests(metafunc):
    if "lib" in metafunc.fixturenames:
        metafunc.parametrize("lib", chosen(metafunc.config), indirect=True, scope="module")


@pytest.fixture(scope="module")
def lib(request):
    """A library under test, with its settings held.

    A module of many kinds of calls, each of which JAX compiles anew, is `COMPILED_QUICKLY`.
    """
    library = libraries.library(request.param)
    quick = getattr(request.module, "COMPILED_QUICKLY", False)
    with library.active(), libraries.quick_compilation(library) if quick else nullcontext():
        yield library


@pytest.fixture
def rng():
    return np.random.default_rng(20211210)


@pytest.fixture
def check(lib):
    """Compare one call of `attention` with the oracle, in every respect."""
    return Checker(lib)


class Checker:
    """Calls `attention` on this library's arrays and compares it with the oracle."""

    def __init__(self, lib):
        self.lib = lib

    def __call__(self, query, key, value, *, dtype=None, function=attention, known=None, **kwargs):
        """Call `function` with these arguments, and the oracle with them and those in `known`."""
        lib = self.lib
        dtype = dtype or lib.default
        tokens = [lib.asarray(x, dtype) for x in (query, key, value)]
        given = {
            name: lib.asarray(x, None) if isinstance(x, np.ndarray) else x
            for name, x in kwargs.items()
        }
        out, lse = lib.call(function, *tokens, **given, return_lse=True)
        told = {
            name: lib.numpy(given[name]) if isinstance(x, np.ndarray) else x
            for name, x in kwargs.items()
            if name in signature(oracle.attend).parameters
        }
        told |= known or {}
        with np.errstate(invalid="ignore"):
            answer = oracle.attend(*map(lib.numpy, tokens), **told)
        compute = "float64" if "float64" in (dtype, kwargs.get("compute_dtype")) else "float32"
        self.compare(answer, out, lse, dtype, compute)
        return out, lse

    def compare(self, answer, out, lse, dtype, compute):
        """Check values, shape, dtype, library and device of ``(out, lse)``.

        A score of d products is off by a few eps of its size, its exponential by as much
        relatively, and a mean of values so weighted by as much of the largest; sums of n terms
        add their own; at the end the result is rounded once to its dtype.
        """
        lib = self.lib
        assert lib.is_own(out)
        assert lib.is_own(lse)
        assert out.dtype == lib.dtype(dtype)
        assert lse.dtype == lib.dtype(compute)
        relative = lib.eps(compute) * (16 + 4 * answer.largest_score)
        bound = (relative + lib.eps(dtype)) * answer.largest_value
        same(lib.numpy(out), answer.out, bound)
        same(lib.numpy(lse), answer.lse, relative + lib.eps(compute) * np.log(2 + out.shape[-2]))


def same(actual, expected, bound):
    """Assert equal shapes, equal NaN and inf, and finite values within `bound`."""
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.where(finite, 0, actual), np.where(finite, 0, expected))
    error = np.abs(np.where(finite, actual, 0) - np.where(finite, expected, 0))
    assert error.max(initial=0) <= bound, f"error {error.max():.3g} over the bound {bound:.3g}"


# The record of which feature was shown on which library, for the table in the README.

_seen: dict[tuple[str, str], list[bool]] = defaultdict(list)


def pytest_runtest_logreport(report):
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if not skipped and (report.when == "call" or not report.passed):
        properties = dict(report.user_properties)
        if "feature" in properties:
            key = (properties["feature"], properties["library"])
            _seen[key].append(report.outcome == "passed")


@pytest.fixture(autouse=True)
def _feature(request, record_property):
    marker = request.node.get_closest_marker("feature")
    if marker is not None and "lib" in request.fixturenames:
        record_property("feature", marker.args[0])
        record_property("library", request.getfixturevalue("lib").name)


def pytest_sessionfinish(session):
    path = session.config.getoption("--capabilities")
    worker = hasattr(session.config, "workerinput")  # of xdist, whose controller sees every report
    if path and _seen and not worker:
        record = [
            {
                "feature": feature,
                "library": library,
                "passed": sum(oks),
                "failed": len(oks) - sum(oks),
            }
            for (feature, library), oks in sorted(_seen.items())
        ]
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
