"""`python -m chunkattn bench`: what it writes, what it refuses, and that it finds wrong peers."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import test_imports
from PIL import Image

from chunkattn.__main__ import main
from chunkattn.cli import _bench_library, _bench_numpy, _bench_timing, bench
from chunkattn.cli._bench_case import MODES, Case
from chunkattn.cli._bench_library import Gemm
from chunkattn.cli._bench_report import HEADINGS

SMALL = ("--n", 8, "--dim", 4, "--heads", 2, "--rounds", 1)
NUMPY = (*SMALL, "--libraries", "numpy", "--peers", "textbook")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Single calls in a sample, and a small matrix product; lines with tabs instead of tables."""
    monkeypatch.setattr(_bench_timing, "_SAMPLE_SECONDS", 0.0)
    product = Gemm(lambda: np.ones((8, 8)) @ np.ones((8, 8)), 2.0 * 8**3)
    monkeypatch.setattr(_bench_numpy.NumPy, "gemm", lambda self, dtype: product)
    for name in ("rich", "rich.box", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)


def status(*words):
    try:
        return main(["bench", *map(str, words)])
    except SystemExit as stop:
        return stop.code


def tables(text):
    """Read the tables by their titles: columns by way."""
    found = {}
    for line in text.splitlines():
        first, *cells = line.split("\t")
        if not cells:
            title = line
        elif first == HEADINGS[0]:
            assert line == "\t".join(HEADINGS)
            found[title] = {}
        else:
            found[title][first] = dict(zip(HEADINGS[1:], cells, strict=True))
    return found


# What it writes


def test_table_of_numpy(capsys):
    assert status(*NUMPY, "--causal", "--implementation", "auto,standard") == 0
    captured = capsys.readouterr()
    assert "100%" in captured.err
    found = tables(captured.out)
    assert list(found) == [
        "numpy: forward, n=8 h=2 d=4 causal",
        "numpy: forward+backward, n=8 h=2 d=4 causal",
        "numpy: decode, n_q=1 n_k=8 h=2 d=4",
        "numpy: small, n=8 h=2 d=4 causal",
    ]
    for rows in found.values():
        assert list(rows) == ["chunkattn", "chunkattn standard", "textbook"]
        assert rows["chunkattn"]["chunkattn / it"] == ""
        assert "[" in rows["textbook"]["chunkattn / it"]
        for row in rows.values():
            assert row["time"].split()[-1] in ("s", "ms", "µs")
            assert float(row["of GEMM"]) >= 0
            assert row["memory"].endswith("B")


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_rows_of_a_framework(library, capsys, tmp_path):
    pytest.importorskip(library)
    path = tmp_path / "bench.json"
    words = ("--libraries", library, "--mode", "forward+backward", "--key-heads", 1, "--causal")
    assert status(*SMALL, *words, "--json", path) == 0
    ways = {
        "torch": {"chunkattn", "textbook", "sdpa", "sdpa flash", "sdpa math"},
        "jax": {"chunkattn", "textbook", "jax.nn xla", "torch sdpa"},
    }
    rows = json.loads(path.read_text())["rows"]
    assert {row["way"] for row in rows} - {"memory-efficient"} == ways[library]
    assert all(row["difference"] < 1e-5 for row in rows)
    assert all(row["extra_bytes"] is not None for row in rows)


def test_flex_where_asked(capsys):
    pytest.importorskip("torch")
    if not (os.environ.get("CXX") or shutil.which("g++")):
        pytest.skip("PyTorch's compiler finds no C++ compiler")
    words = ("--libraries", "torch", "--peers", "flex", "--mode", "forward")
    assert status(*SMALL, *words) == 0
    ((_, rows),) = tables(capsys.readouterr().out).items()
    assert list(rows) == ["chunkattn", "flex"]


def test_yardstick_of_numpy(capsys):
    pytest.importorskip("torch")
    assert status(*SMALL, "--libraries", "numpy", "--peers", "sdpa", "--dtype", "float16") == 0
    for rows in tables(capsys.readouterr().out).values():
        assert list(rows) == ["chunkattn", "torch sdpa"]
        assert rows["torch sdpa"]["memory"].endswith("B")


def test_json(tmp_path):
    path = tmp_path / "bench.json"
    words = ("--mode", "forward,decode", "--n", "8,12", "--rounds", 4)
    assert status(*NUMPY, *words, "--json", path) == 0
    found = json.loads(path.read_text())
    assert found["command"].startswith("python -m chunkattn bench --mode forward,decode --n 8,12")
    assert found["machine"]["versions"]["numpy"] == np.__version__
    assert found["left_out"] == []
    rows = found["rows"]
    shapes = {(row["mode"], row["n_q"], row["n_k"]) for row in rows}
    assert shapes == {("forward", 8, 8), ("forward", 12, 12), ("decode", 1, 8), ("decode", 1, 12)}
    for ours, peer in zip(rows[::2], rows[1::2], strict=True):
        assert (ours["way"], peer["way"]) == ("chunkattn", "textbook")
        assert ours["ratio"] is None
        ratios = np.divide(ours["samples"], peer["samples"])
        assert len(ratios) == 4
        expected = np.quantile(ratios, [0.5, 0.25, 0.75])
        np.testing.assert_allclose(list(peer["ratio"].values()), expected)
        rates = 4 * 2 * peer["n_q"] * peer["n_k"] * 4 / np.asarray(peer["samples"])
        best = max(max(row["gemm_flops"]) for row in rows)
        assert peer["gemm_fraction"]["median"] == pytest.approx(np.median(rates) / best)


def test_markdown(tmp_path):
    path = tmp_path / "bench.md"
    assert status(*NUMPY, "--mode", "small", "--markdown", path) == 0
    lines = path.read_text().splitlines()
    assert lines[0] == "# Benchmark"
    assert "- Command: `python -m chunkattn bench --mode small --n 8 --dim 4 --heads 2" in lines[2]
    head = lines.index("| " + " | ".join(("library", "mode", "case", *HEADINGS)) + " |")
    assert [line.split(" | ")[3] for line in lines[head + 2 :]] == ["chunkattn", "textbook"]
    assert all(line.startswith("| numpy | small | n=8 h=2 d=4 |") for line in lines[head + 2 :])


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot(suffix, tmp_path):
    path = tmp_path / f"bench{suffix}"
    assert status(*NUMPY, "--mode", "forward", "--n", "8,16", "--plot", path) == 0
    if suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
    else:
        assert "<svg" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("module", "words"), [("matplotlib.figure", ("--plot", "x.svg")), ("tqdm", ())]
)
def test_a_missing_extra_is_named(module, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    assert status(*NUMPY, *words) == 1
    captured = capsys.readouterr()
    assert "pip install 'chunkattn[bench]'" in captured.err
    assert captured.out == ""


def test_memory_efficient_attention(monkeypatch, tmp_path):
    """A package of that name is called in its layout, where it applies."""
    (tmp_path / "memory_efficient_attention.py").write_text("""
from chunkattn import attention

def efficient_dot_product_attention_pt(query, key, value, mask_calc_fn=None):
    scores = query[..., :1] + key[..., 0].swapaxes(1, 2)[:, None]  # (1, n, h, n), as it has them
    mask = mask_calc_fn(0, 0, None, scores, None)
    return attention(query, key, value, mask=mask, layout="nhd")

efficient_dot_product_attention_jax = efficient_dot_product_attention_pt
""")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "memory_efficient_attention", raising=False)
    path = tmp_path / "bench.json"
    words = ("--libraries", "torch,jax", "--peers", "memory-efficient", "--mode", "forward")
    assert status(*SMALL, *words, "--n", "8", "--causal", "--json", path) == 0
    monkeypatch.delitem(sys.modules, "memory_efficient_attention")
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == ["chunkattn", "memory-efficient"] * 2


# What it refuses, and how it ends


@pytest.mark.parametrize(
    "words",
    [
        ("--libraries", "fortran"),
        ("--mode", "sideways"),
        ("--n", "0"),
        ("--n", "8,,16"),
        ("--dim", "wide"),
        ("--heads", "3", "--key-heads", "2"),
        ("--dtype", "int8"),
        ("--peers", "someone"),
        ("--implementation", "magic"),
        ("--rounds", "0"),
        ("--seconds", "0"),
        ("--json", "bench.txt"),
        ("--plot", "bench.pdf"),
        ("--markdown", "no/such/folder/bench.md"),
    ],
)
def test_bad_usage(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: python -m chunkattn bench")
    assert captured.out == ""


def test_help_tells_how_operations_are_counted(capsys):
    assert status("--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "4 h n_q n_k d operations, half of them when causal" in told
    assert "3.5 times" in told


def test_a_library_that_is_asked_for_and_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert status(*SMALL, "--libraries", "numpy,cupy") == 1
    assert "cannot use cupy" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [1e-2, np.nan])
def test_a_wrong_peer_is_reported(wrong, capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch")  # with two right ones, which the third disagrees with
    right = _bench_numpy.NumPy._softmax
    monkeypatch.setattr(_bench_numpy.NumPy, "_softmax", lambda self, s: right(self, s) + wrong)
    path = tmp_path / "bench.json"
    words = (*SMALL, "--libraries", "numpy", "--peers", "textbook,sdpa", "--mode", "forward")
    assert status(*words, "--json", path) == 1
    captured = capsys.readouterr()
    assert "numpy, forward n=8 h=2 d=4, textbook: wrong by" in captured.err
    ((_, rows),) = tables(captured.out).items()
    assert list(rows) == ["chunkattn", "torch sdpa"]
    (note,) = json.loads(path.read_text())["left_out"]
    assert (note["way"], note["failed"]) == ("textbook", True)


def test_a_peer_that_fails_is_left_out(capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(_bench_numpy.NumPy, "_textbook", fail)
    assert status(*NUMPY, "--mode", "forward") == 0
    told = capsys.readouterr().out
    assert "numpy, forward n=8 h=2 d=4, textbook: RuntimeError: no kernel\n" in told


def test_what_would_not_fit_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr(_bench_library.Library, "free_memory", lambda self: 100)
    assert status(*NUMPY, "--mode", "forward") == 0
    assert "textbook: its scores would need" in capsys.readouterr().out


def test_nothing_measured(capsys, tmp_path):
    """As no kernel is NumPy's."""
    words = ("--implementation", "native", "--peers", "jax.nn", "--json", tmp_path / "x.json")
    assert status("--libraries", "numpy", "--mode", "small", "--n", "64", *words) == 1
    assert "nothing was measured" in capsys.readouterr().err


def test_textbook_attention_of_ours_would_not_fit_either(capsys, monkeypatch):
    monkeypatch.setattr(_bench_library.Library, "free_memory", lambda self: 100)
    words = ("--implementation", "chunked,standard", "--mode", "forward")
    assert status(*NUMPY, *words) == 0
    assert "chunkattn standard: its scores would need" in capsys.readouterr().out


def test_a_case_that_fails_is_noted(capsys, monkeypatch, tmp_path):
    """And the others are measured, and written."""
    numbers = Case.numbers

    def fail(case):
        if case.n_k == 12:
            raise MemoryError("no room")
        return numbers(case)

    monkeypatch.setattr(Case, "numbers", fail)
    path = tmp_path / "bench.json"
    words = ("--mode", "forward", "--n", "12,8", "--rounds", 1, "--json", path)
    assert status(*NUMPY, *words) == 1
    assert "numpy, forward n=12 h=2 d=4: failed: MemoryError: no room" in capsys.readouterr().err
    assert {row["n_k"] for row in json.loads(path.read_text())["rows"]} == {8}


def test_a_library_that_is_broken(capsys, monkeypatch):
    def broken(self):
        raise RuntimeError("an incompatible version")

    monkeypatch.setattr("chunkattn.cli._bench_numpy.CuPy.__init__", broken)
    monkeypatch.setattr(bench, "LIBRARIES", ("numpy", "cupy"))
    assert status(*SMALL, "--mode", "forward", "--peers", "textbook") == 0
    told = "cupy: it does not import: RuntimeError: an incompatible version"
    assert told in capsys.readouterr().out
    assert status(*SMALL, "--libraries", "cupy") == 1


def test_with_a_budget_each_mode_comes_first(capsys):
    assert status(*NUMPY, "--n", "8,12", "--rounds", 1, "--seconds", 0.001) == 0
    told = capsys.readouterr().out
    assert told.index("not run") > told.index("numpy: forward, n=8")
    left_out = [line.split()[1] for line in told.splitlines() if "not run" in line]
    assert left_out[: len(MODES) - 1] == [mode for mode in MODES if mode != "forward"]


def test_the_budget_ends_the_run(capsys):
    assert status(*NUMPY, "--seconds", "1e-6") == 0
    captured = capsys.readouterr()
    assert len(tables("\n".join(captured.out.splitlines()[:4]))) == 1
    assert captured.out.count("not run, the time was spent") == len(MODES) - 1


def test_interrupted_it_shows_what_it_has(capsys, monkeypatch, tmp_path):
    measure, calls = bench.Bench.measure, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        measure(*args)

    monkeypatch.setattr(bench.Bench, "measure", interrupt)
    path = tmp_path / "bench.json"
    assert status(*NUMPY, "--json", path) == 130
    captured = capsys.readouterr()
    assert list(tables(captured.out)) == ["numpy: forward, n=8 h=2 d=4"]
    assert captured.err.endswith("interrupted\n")
    assert {row["mode"] for row in json.loads(path.read_text())["rows"]} == {"forward"}


def test_numpy_alone():
    """Without torch, jax and rich; no peer of theirs is there."""
    done = test_imports.run(f"""
        block("torch", "jax", "cupy", "rich", "ml_dtypes", "memory_efficient_attention")
        from chunkattn.__main__ import main
        assert main(["bench", "--libraries", "numpy", *{list(map(str, SMALL))!r}]) == 0
    """)
    found = tables(done.stdout)
    assert len(found) == len(MODES)
    assert all(list(rows) == ["chunkattn", "textbook"] for rows in found.values())
