"""Progress reports: every task once and in order, to a callable or a tqdm bar, else nothing."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tqdm.auto

from chunkattn import attention


@pytest.fixture
def eager(lib):
    if not lib.eager:
        pytest.skip("progress is for eager calls")
    return lib


@pytest.fixture
def tokens(lib, rng):
    """Query, key and value of 4 heads over 2, in two batch entries."""
    return [
        lib.asarray(rng.standard_normal(s)) for s in ((2, 4, 19, 8), (2, 2, 29, 8), (2, 2, 29, 5))
    ]


class Reports(list):
    """A callable that keeps what it is told, and finds out whether it is called twice at once."""

    def __init__(self):
        self.busy = threading.Lock()

    def __call__(self, done, total):
        assert self.busy.acquire(blocking=False), "two reports at once"
        self.append((done, total))
        self.busy.release()

    def check(self):
        """Assert that all tasks were reported, in order, as ints."""
        assert self
        total = self[0][1]
        assert self == [(i, total) for i in range(1, total + 1)]
        assert {type(x) for report in self for x in report} == {int}
        return total


KEYWORDS = [
    pytest.param({}, id="plain"),
    pytest.param({"query_chunk_size": 4, "key_chunk_size": 8}, id="chunks"),
    pytest.param({"query_chunk_size": 4, "causal": True, "query_offset": 10}, id="causal"),
    pytest.param({"causal": True, "query_offset": -99}, id="nothing seen"),
    pytest.param({"implementation": "standard"}, id="standard"),
]


@pytest.mark.feature("progress")
@pytest.mark.parametrize("keywords", KEYWORDS)
def test_callable(eager, tokens, keywords):
    reports = Reports()
    out = attention(*tokens, **keywords, progress=reports)
    total = reports.check()
    if keywords.get("query_chunk_size") == 4:
        assert total % 5 == 0, "19 queries by 4"
    silent = attention(*tokens, **keywords)
    np.testing.assert_array_equal(eager.numpy(out), eager.numpy(silent))


@pytest.mark.parametrize("shape", [(19, 8), (4, 19, 8), (2, 1, 3, 4, 19, 8)])
def test_shapes(eager, rng, shape):
    x = eager.asarray(rng.standard_normal(shape))
    reports = Reports()
    attention(x, x, x, query_chunk_size=8, progress=reports)
    assert reports.check() % 3 == 0


@pytest.mark.parametrize("shape", [(0, 8), (0, 19, 8), (0, 4, 19, 8), (2, 4, 0, 8)])
def test_nothing_to_do(eager, shape):
    """Without queries there is no task; whatever is reported is consistent."""
    x = eager.asarray(np.ones(shape))
    reports = Reports()
    attention(x, x, x, progress=reports)
    assert not reports or reports.check()


def test_no_keys(eager):
    q, k = eager.asarray(np.ones((4, 19, 8))), eager.asarray(np.ones((4, 0, 8)))
    reports = Reports()
    attention(q, k, k, query_chunk_size=8, progress=reports)
    reports.check()


def test_each_call_reports_to_its_own(eager, tokens):
    """A second call of the same shapes, compiled or not, does not report to the first's."""
    one, two = Reports(), Reports()
    attention(*tokens, query_chunk_size=4, progress=one)
    attention(*tokens, query_chunk_size=4, progress=two)
    attention(*tokens, query_chunk_size=4)
    attention(*tokens, query_chunk_size=4, progress=one)
    two.check()
    assert one == two + two


def test_what_the_callable_returns_is_ignored(eager, tokens):
    reports = Reports()
    attention(*tokens, query_chunk_size=4, progress=lambda *report: reports(*report) or "stop")
    reports.check()


# tqdm


@pytest.fixture
def bars(monkeypatch):
    """The tqdm bars that are made."""
    made = []

    class Bar(tqdm.auto.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)
            self.closed = 0

        def close(self):
            self.closed += 1
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    return made


def test_bar(eager, tokens, capsys, bars):
    attention(*tokens, query_chunk_size=4, progress=True)
    (bar,) = bars
    assert bar.closed
    assert bar.n == bar.total > 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "100%" in captured.err
    assert f"{bar.total}/{bar.total}" in captured.err
    assert captured.err.endswith("\n"), "the bar was left open"


def test_bar_of_standard(eager, tokens, capsys, bars):
    attention(*tokens, implementation="standard", progress=True)
    (bar,) = bars
    assert bar.closed
    assert bar.n == bar.total
    assert "100%" in capsys.readouterr().err


def test_bar_is_closed_after_an_error(eager, tokens, capsys, bars, monkeypatch):
    error = RuntimeError("stop")

    def update(self, n=1):
        raise error

    monkeypatch.setattr(tqdm.auto.tqdm, "update", update)
    with pytest.raises(RuntimeError) as caught:
        attention(*tokens, query_chunk_size=4, progress=True)
    assert caught.value is error
    (bar,) = bars
    assert bar.closed
    attention(*tokens, query_chunk_size=4)


def test_no_bar_for_a_refused_call(lib, tokens, capsys, bars):
    with pytest.raises(ValueError, match="layout"):
        lib.call(attention, *tokens, layout="x", progress=True)
    assert not bars
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("progress", [None, False])
def test_silence(lib, tokens, capfd, bars, progress):
    lib.call(attention, *tokens, query_chunk_size=4, progress=progress)
    assert not bars
    assert capfd.readouterr() == ("", "")


# Traced calls


@pytest.mark.parametrize("progress", [True, lambda done, total: None], ids=["bar", "callable"])
@pytest.mark.parametrize("name", ["jit", "vmap", "grad", "eval_shape"])
def test_traced(progress, name, bars):
    jax = pytest.importorskip("jax")

    def function(x):
        return attention(x, x, x, progress=progress).sum()

    transform = getattr(jax, name)
    call = transform(function) if name != "eval_shape" else lambda x: transform(function, x)
    with pytest.raises(ValueError, match=r"progress .* traced.* eager"):
        call(jax.numpy.ones((3, 19, 8)))
    assert all(bar.closed for bar in bars)


@pytest.mark.parametrize("traced", ["key", "value", "bias", "mask", "query_offset", "scale"])
def test_traced_in_part(traced):
    """One traced array is enough: the call runs when nobody waits for it."""
    jax = pytest.importorskip("jax")
    reports = Reports()
    x = jax.numpy.ones((19, 8))
    arrays = {"query": x, "key": x, "value": x}
    arrays |= {
        "bias": jax.numpy.ones((19, 19)),
        "mask": jax.numpy.ones((19, 19), bool),
        "query_offset": jax.numpy.asarray(0),
        "scale": jax.numpy.asarray(0.5),
    }

    @jax.jit
    def function(x):
        return attention(**arrays | {traced: x}, progress=reports)

    with pytest.raises(ValueError, match=r"progress .* traced"):
        function(arrays[traced])
    assert not reports
