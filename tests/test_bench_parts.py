"""The parts of `python -m chunkattn bench`: its cases, ways and timing."""

import warnings
from functools import partial

import numpy as np
import pytest

from chunkattn import attention, attention_vjp
from chunkattn.cli import _bench_library, _bench_numpy, _bench_timing
from chunkattn.cli._bench_case import Case
from chunkattn.cli._bench_library import Candidate, Gemm, NotApplicableError, Way
from chunkattn.cli._bench_timing import Spread


def case(**changed):
    sizes = {"n_q": 8, "n_k": 8, "d": 4, "heads": 2, "key_heads": 2}
    return Case(**{"mode": "forward", **sizes, "dtype": "float32", "causal": False, **changed})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_textbook_gradients_of_numpy(causal, key_heads):
    one = case(mode="forward+backward", heads=4, key_heads=key_heads, causal=causal)
    library = _bench_numpy.NumPy()
    candidates = list(library.candidates(one, ("auto",)))
    ours, theirs = (candidate.make().call() for candidate in candidates)
    *tokens, d_out = one.numbers().values()
    expected = attention_vjp(*tokens, causal=causal)[1](d_out)
    for x, y, right in zip(ours, theirs, expected.values(), strict=True):
        np.testing.assert_array_equal(x, right)
        np.testing.assert_allclose(y, right, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "operations"),
    [
        ({}, 4 * 2 * 8 * 8 * 4),
        ({"causal": True}, 2 * 2 * 8 * 8 * 4),
        ({"mode": "forward+backward"}, 14 * 2 * 8 * 8 * 4),
        ({"mode": "decode", "n_q": 1}, 4 * 2 * 8 * 4),
    ],
)
def test_operations(changed, operations):
    assert case(**changed).operations == operations


def test_data_is_the_same_in_every_library_and_rounded_alike():
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    one = case(dtype="bfloat16")
    from chunkattn.cli._bench_torch import Torch

    of_torch = Torch().arrays(one)
    for name, x in _bench_numpy.NumPy().arrays(one).items():
        np.testing.assert_array_equal(x.astype("float32"), of_torch[name].to(torch.float32).numpy())


@pytest.mark.parametrize(
    ("results", "wrong"),
    [
        ((1.0, 1.00001, 1.0), [False, False, False]),
        ((1.0, 1.001, 1.0), [False, True, False]),
        ((1.0, np.inf, 1.0), [False, True, False]),
        ((0.01, 0.0, 0.01), [False, True, False]),
        ((1.0, 1.00012), [True, True]),  # neither is known to be right
        ((1000.0, 1000.05), [False, False]),
    ],
)
def test_check(results, wrong):
    ready = [_bench_timing.Ready("it", False, None, [np.full((1, 2, 8, 4), x)]) for x in results]
    _bench_timing.check(ready, case())
    assert [one.wrong for one in ready] == wrong


def test_what_nothing_is_compared_with():
    one = _bench_timing.Ready("it", False, None, [np.ones((1, 2, 8, 4))])
    _bench_timing.check([one], case())
    assert (one.wrong, one.difference) == (False, None)


def test_check_of_shapes():
    ready = [_bench_timing.Ready("it", False, None, [np.zeros((1, 2, 8, d))]) for d in (4, 1)]
    _bench_timing.check(ready, case())
    assert [one.wrong for one in ready] == [False, True]


def test_ways_take_turns(monkeypatch):
    monkeypatch.setattr(_bench_timing, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(_bench_timing, "_WAKE_SECONDS", 0.0)
    calls = []
    ready = [
        _bench_timing.Ready(name, False, Way(partial(calls.append, name), list)) for name in "AB"
    ]
    gemm = Gemm(partial(calls.append, "G"), 1.0)
    samples, rates = _bench_timing.in_turns(ready, gemm, 5, float("inf"))
    assert "".join(calls[-15:]) == "GBAGABGABGABGAB"  # in random order, the same in each run
    assert [len(x) for x in samples.values()] == [5, 5]
    assert len(rates) == 5
    samples, _ = _bench_timing.in_turns(ready, gemm, 5, 0.0)
    assert [len(x) for x in samples.values()] == [_bench_timing.FEWEST_ROUNDS] * 2


@pytest.mark.parametrize(("each", "events"), [(True, "cwcwcw"), (False, "cwccw")])
def test_what_is_waited_for(monkeypatch, each, events):
    """Where calls follow each other, those before a sample and its last one are waited for."""
    monkeypatch.setattr(_bench_timing, "_REST_SECONDS", 0.0)
    found = []
    way = Way(partial(found.append, "c"), list, wait=lambda _: found.append("w"))
    _bench_timing._sample(way, 1, 2, each)
    assert "".join(found).startswith(events)
    assert found.count("c") == 3
    assert found[-1] == "w"


def test_an_error_of_chunkattn_gets_through():
    def fail():
        raise ZeroDivisionError

    for ours, error in ((True, ZeroDivisionError), (False, NotApplicableError)):
        with pytest.raises(error):
            _bench_timing.prepare(Candidate("it", fail, ours), case(), None)


def test_spread():
    assert Spread.of([2.0]) == (2.0, 2.0, 2.0)
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)


def test_attention_as_a_textbook():
    """The few lines that stand for what users write are attention."""
    one = case(causal=True, key_heads=1)
    arrays = one.numbers()
    tokens = [arrays[name] for name in ("query", "key", "value")]
    softmax = _bench_numpy.NumPy()._softmax
    attend = _bench_library.textbook(np, softmax, one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = attend(*tokens, np.tri(8, dtype=bool))
    np.testing.assert_allclose(out, attention(*tokens, causal=True), atol=1e-6)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_memory_of_torch_on_a_cpu(mode, capfd):
    """The textbook holds scores and weights at once, with gradients no less; nothing is printed."""
    pytest.importorskip("torch")
    from chunkattn.cli._bench_torch import Torch

    one = case(mode=mode, n_q=64, n_k=64)
    (make,) = (c.make for c in Torch().candidates(one, ()) if c.name == "textbook")
    held = make().memory()
    if mode == "forward":
        assert held == 2 * one.score_bytes
    else:
        assert held >= 2 * one.score_bytes
    assert capfd.readouterr() == ("", "")


def test_what_memory_efficient_attention_cannot_do():
    with pytest.raises(NotApplicableError, match="do not divide 1500"):
        _bench_library.check_memory_efficient(case(n_q=1500))
    with pytest.raises(NotApplicableError, match="grouped"):
        _bench_library.check_memory_efficient(case(key_heads=1))


def test_memory_of_jax_on_a_cpu():
    """XLA's plan leaves out what its kernels hold: the scores of textbook attention, here."""
    jax = pytest.importorskip("jax")
    from chunkattn.cli import _memory
    from chunkattn.cli._bench_jax import Jax

    if _memory.of_malloc(lambda: jax.numpy.ones(3), lambda x: x.is_ready()) is None:
        pytest.skip("needs mallinfo2 of glibc 2.33 or later")
    one = case(n_q=1024, n_k=1024)
    (make,) = (c.make for c in Jax().candidates(one, ()) if c.name == "textbook")
    way = make()
    way.wait(way.call())
    assert way.memory() >= one.score_bytes
