"""How the benchmark compares: every way checked against the others, then timed in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import quantiles
from time import perf_counter, sleep
from typing import Any, NamedTuple

from ._bench_case import Case
from ._bench_library import Candidate, Gemm, NotApplicableError, Way

Array = Any

# Largest difference of two right results, by the largest number in them.  jax.nn takes
# the softmax of float64 in float32.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
FEWEST_ROUNDS = 3
_REST_SECONDS = 0.15  # BLAS looks out for more work, on all cores, for 2^28 ticks: 0.1 s at 2.6 GHz
_SAMPLE_SECONDS = 0.02  # what one sample takes at least: that of many calls where they are small
_WAKE_SECONDS = 0.05  # cores that were at rest take about this long to come back to their rate
_LONG_SECONDS = 1.0  # and then it does not count


class Spread(NamedTuple):
    """The median of samples, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Return that of one sample or more."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Row:
    """One way's figures: the samples are in turns with those of the other ways of the case."""

    library: str
    device: str
    case: Case
    way: str
    samples: list[float]
    ours: list[float] | None  # chunkattn's samples, in the same rounds
    gemm: list[float]  # operations per second of the matrix product, in the same rounds
    peak: list[float]  # the same of all cases in the library's run
    memory: int | None
    difference: float | None  # from the middle of all ways' results, where there are several

    @property
    def seconds(self) -> Spread:
        """The time of one call."""
        return Spread.of(self.samples)

    @property
    def ratio(self) -> Spread | None:
        """Chunkattn's time by this way's, of pairs; None for chunkattn itself."""
        if self.ours is None or self.ours is self.samples:
            return None
        return Spread.of([a / b for a, b in zip(self.ours, self.samples, strict=True)])

    @property
    def gemm_fraction(self) -> Spread:
        """Operations per second by the best rate of the matrix product."""
        best = max(self.peak)
        return Spread.of([self.case.operations / seconds / best for seconds in self.samples])


class Note(NamedTuple):
    """What is not in the table, and why; `failed` where it should be."""

    library: str
    case: str
    way: str
    reason: str
    failed: bool = False

    def __str__(self) -> str:
        """Return it as one line."""
        return ", ".join(filter(None, self[:3])) + f": {self.reason}"


@dataclass
class Ready:
    """A way that has been called once."""

    name: str
    ours: bool
    way: Way
    result: list[Array] = field(default_factory=list)
    difference: float | None = None
    wrong: bool = False


def prepare(candidate: Candidate, case: Case, free: int | None) -> Ready:
    """Make a way and call it, which is its warm-up; NotApplicableError where it cannot.

    An error of chunkattn's own gets through, unless it says that it does not do this.
    """
    needed = candidate.score_arrays * case.score_bytes
    if free is not None and needed > free / 2:
        raise NotApplicableError(f"its scores would need about {needed / 1e9:,.1f} GB")
    try:
        way = candidate.make()
        with way.context():
            result = way.fetch(way.wait(way.call()))
    except (NotApplicableError, NotImplementedError) as error:
        raise NotApplicableError(told(error)) from error
    except Exception as error:
        if candidate.ours:
            raise
        raise NotApplicableError(told(error)) from error
    return Ready(candidate.name, candidate.ours, way, result)


def told(error: Exception) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    if isinstance(error, NotApplicableError):
        return text
    return f"{type(error).__name__}: {text}"[:200]


def check(ready: list[Ready], case: Case) -> None:
    """Compare each result with the middle of all, tell the wrong ones, and drop the results.

    Of two that disagree, neither is known to be right: both are wrong.  One alone is only known to
    be finite and of the right shape.
    """
    import numpy as np

    query, key = ((1, case.heads, case.n_q, case.d), (1, case.key_heads, case.n_k, case.d))
    shapes = [query, key, key] if case.backward else [query]
    for one in ready:
        right_shapes = [x.shape for x in one.result] == shapes
        if not right_shapes or not all(np.isfinite(x).all() for x in one.result):
            one.difference, one.wrong = math.inf, True
    shaped = [one for one in ready if not one.wrong]
    # With one key the gradients of query and key are 0, and rounding is all there is of them.
    least = 1.0 if case.n_k == 1 else 0.0
    for i in range(len(shapes)):
        _compare(shaped, i, TOLERANCE[case.dtype], least)
    for one in ready:
        one.result = []


def _compare(ready: list[Ready], i: int, tolerance: float, least: float) -> None:
    import numpy as np

    if not ready:
        return
    arrays = [one.result[i] for one in ready]
    middle = np.median(np.stack(arrays), axis=0)
    largest = float(np.abs(middle).max(initial=least))
    for one, x in zip(ready, arrays, strict=True):
        # Of two, each is half of their difference away from the middle.
        difference = float(np.abs(x - middle).max(initial=0)) * (2 if len(arrays) == 2 else 1)
        if len(arrays) > 1:
            one.difference = max(one.difference or 0.0, difference)
        one.wrong |= difference > tolerance * largest


def in_turns(
    ready: list[Ready],
    gemm: Gemm,
    rounds: int,
    deadline: float,
    each: bool = True,
) -> tuple[dict[str, list[float]], list[float]]:
    """Return samples by name, and the matrix product's rates, of as many rounds as time allows.

    Of the calls of a sample `each` is waited for, or the last alone.
    """
    calls: dict[str, tuple[Way, int, int]] = {}
    for one in ready:
        calls[one.name] = one.way, *_counts(one.way, each)
    product = Way(gemm.call, lambda result: [], wait=gemm.wait)
    product_counts = _counts(product, each)
    samples: dict[str, list[float]] = {one.name: [] for one in ready}
    rates: list[float] = []
    for i in range(rounds):
        if i >= FEWEST_ROUNDS and perf_counter() > deadline:
            break
        rates.append(gemm.operations / _sample(product, *product_counts, each))
        # In random order, so that no way always follows the same other.
        for name in Random(i).sample(list(calls), len(calls)):
            samples[name].append(_sample(*calls[name], each))
    return samples, rates


def _counts(way: Way, each: bool) -> tuple[int, int]:
    """Return how many calls come before a sample, and how many it takes.

    By a time without what disturbs a single call.
    """
    seconds = _sample(way, 0, 1, each)
    if seconds < _SAMPLE_SECONDS:
        seconds = min(seconds, *(_sample(way, 1, 1, each, rest=0.0) for _ in range(4)))
    before = 0 if seconds > _LONG_SECONDS else math.ceil(_WAKE_SECONDS / seconds)
    return before, max(1, math.ceil(_SAMPLE_SECONDS / seconds))


def _sample(way: Way, before: int, count: int, each: bool, rest: float = _REST_SECONDS) -> float:
    """Return the mean time of `count` calls, after some `before`.

    They come once the threads of the way before are at rest; so are its own, which have to wake.
    """
    sleep(rest)
    with way.context():
        for _ in range(before):
            way.wait(way.call())
        begin = perf_counter()
        for _ in range(count):
            result = way.call()
            if each:
                way.wait(result)
        way.wait(result)
        return (perf_counter() - begin) / count
