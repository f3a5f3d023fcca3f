"""The command line: `info`, `demo`, `plan` and `vendor`, and what all subcommands share."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chunkattn.__main__ import main
from chunkattn.cli import SUBCOMMANDS, _memory, _table, demo, denoise, info, vendor

SIGMA = 25 / 255


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def no_rich(monkeypatch):
    for name in ("rich", "rich.box", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)


def status(*argv):
    """Run `main` and return its exit status, as the shell would see it."""
    try:
        return main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code


def python(code, *flags):
    """Run `code` in a process of its own."""
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=300
    )


def table(text):
    """Read a table that was printed with tabs."""
    return {line.split("\t")[0]: line.split("\t")[1:] for line in text.splitlines()}


def noisy_picture(size):
    original = demo._read(demo._photograph(), size)
    return original, denoise.add_noise(original, SIGMA, seed=0)


# Parsing


@pytest.mark.parametrize("words", [(), *((name,) for name in SUBCOMMANDS)])
def test_help(words, capsys):
    assert status(*words, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: python -m chunkattn")


def test_help_imports_no_library():
    code = """
import sys
from chunkattn.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    print(sorted({"numpy", "torch", "jax", "matplotlib", "tqdm", "rich"} & set(sys.modules)))
"""
    for words in ["'--help'", *(f"'{name}', '--help'" for name in SUBCOMMANDS)]:
        done = python(code.replace("sys.argv[1:]", f"[{words}]"))
        assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_import_loads_no_command_line():
    done = python("import sys, chunkattn; print([m for m in sys.modules if '.cli' in m])")
    assert done.stdout == "[]\n"


def test_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "chunkattn", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "chunkattn 0.1.0\n")


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("nonsense",),
        ("info", "nonsense"),
        ("demo", "--library", "fortran"),
        ("demo", "--size", "7"),
        ("demo", "--size", "large"),
        ("demo", "--sigma", "0"),
        ("demo", "--sigma", "-1"),
        ("demo", "--sigma", "nan"),
        ("demo", "--sigma", "1e-300"),
        ("demo", "--sigma", "1e300"),
        ("demo", "--patch", "4"),
        ("demo", "--seed", "-1"),
        ("demo", "--image", "no/such/picture.png"),
        ("demo", "--out", "no/such/folder/denoised.png"),
        ("demo", "--out", "denoised.jpg"),
        ("vendor",),
        ("vendor", ".", "--name", "not-a-name"),
        ("vendor", ".", "--name", "class"),
    ],
)
def test_bad_usage(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(*words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: python -m chunkattn")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


# Tables


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (65_536**2 * 4, "17.2 GB"), (5e15, "5,000.0 TB")],
)
def test_bytes(count, told):
    assert _table.in_bytes(count) == told


def test_table_keeps_brackets(capsys):
    _table.show([("a", "[red]")], headings=("name", "colour"))
    assert "[red]" in capsys.readouterr().out


@pytest.mark.usefixtures("no_rich")
def test_table_without_rich(capsys):
    _table.show([("a", "b"), ("c", "d")], headings=("one", "two"))
    assert capsys.readouterr().out == "one\ttwo\na\tb\nc\td\n"


# info


@pytest.mark.usefixtures("no_rich")
def test_info(capsys):
    assert status("info") == 0
    rows = table(capsys.readouterr().out)
    assert rows["Python"] == ["{}.{}.{}".format(*sys.version_info)]
    assert rows["chunkattn"] == ["0.1.0"]
    assert re.match(r"\d", rows["array-api-compat"][0])
    assert set(info._DEVICES) <= set(rows)
    assert rows["numpy"] == ["found", np.__version__, "numpy", "cpu"]
    assert rows["jax"][2] == "jax"
    assert rows["torch"][2:] == ["torch", rows["torch"][3]]
    assert rows["array_api_strict"][2] == "generic"


def test_info_with_rich(capsys):
    assert status("info") == 0
    assert np.__version__ in capsys.readouterr().out


@pytest.mark.usefixtures("no_rich")
def test_info_of_a_missing_library(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert status("info") == 0
    assert table(capsys.readouterr().out)["jax"] == ["not found", "", "", ""]


@pytest.mark.usefixtures("no_rich")
def test_info_of_a_broken_library(capsys, monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise OSError('libcuda.so.1:\\n not there')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert status("info") == 0
    state, _, adapter, devices = table(capsys.readouterr().out)["cupy"]
    assert (state, adapter, devices) == ("broken", "", "OSError: libcuda.so.1: not there")


# demo


@pytest.mark.usefixtures("no_rich")
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_demo(library, capsys, tmp_path):
    out = tmp_path / "denoised.png"
    assert status("demo", "--library", library, "--size", 32, "--out", out) == 0
    captured = capsys.readouterr()
    assert "100%" in captured.err
    rows = table(captured.out)
    assert rows["tokens"] == ["1,024"]
    assert rows["score matrix of textbook attention"] == ["4.19 MB"]
    assert rows["written"] == [str(out)]
    before, after = (float(rows[f"PSNR {when}"][0].split()[0]) for when in ("before", "after"))
    assert 19.5 < before < 20.8  # 20 log10(255 / 25) = 20.17
    assert after > before + 1
    assert [path.name for path in tmp_path.iterdir()] == ["denoised.png"]
    with Image.open(out) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 2 * picture.height


def test_demo_is_the_same_in_every_library():
    _, noisy = noisy_picture(24)
    of_numpy, of_torch, of_jax = (
        demo.denoised(noisy, SIGMA, 3, library).picture for library in ("numpy", "torch", "jax")
    )
    assert np.abs(of_torch - of_numpy).max() < 1e-4
    assert np.abs(of_jax - of_numpy).max() < 1e-4


@pytest.mark.parametrize("patch", [1, 3, 5])
def test_demo_is_non_local_means(patch):
    original, noisy = noisy_picture(24)
    picture = demo.denoised(noisy, SIGMA, patch, "numpy").picture
    expected = non_local_means(noisy, patch, denoise.filter_width(SIGMA, patch))
    assert np.abs(picture - expected).max() < 1e-4
    before = psnr(noisy, original)
    assert psnr(expected, original) > before + 0.5
    assert denoise.psnr(picture, original) == pytest.approx(psnr(expected, original), abs=1e-3)


def non_local_means(noisy, size, h):
    """Buades, Coll & Morel's definition, pixel by pixel in float64."""
    height, width, _ = noisy.shape
    margin = size // 2
    padded = np.pad(noisy.astype(np.float64), ((margin,) * 2, (margin,) * 2, (0, 0)), "reflect")
    pixels = [(y, x) for y in range(height) for x in range(width)]
    patches = np.stack([padded[y : y + size, x : x + size] for y, x in pixels])
    out = np.empty(noisy.shape)
    for (y, x), patch in zip(pixels, patches, strict=True):
        distances = ((patches - patch) ** 2).sum(axis=(1, 2, 3))
        weights = np.exp(-distances / h**2).reshape(height, width, 1)
        out[y, x] = (weights * noisy).sum(axis=(0, 1)) / weights.sum()
    return out


def psnr(picture, original):
    return 10 * np.log10(1 / ((picture - original.astype(np.float64)) ** 2).mean())


@pytest.mark.slow
@pytest.mark.usefixtures("no_rich")
def test_demo_at_its_default(capsys, tmp_path):
    assert status("demo", "--out", tmp_path / "denoised.png") == 0
    rows = table(capsys.readouterr().out)
    assert rows["score matrix of textbook attention"] == ["17.2 GB"]
    before, after = (float(rows[f"PSNR {when}"][0].split()[0]) for when in ("before", "after"))
    assert after > before + 7
    amount, unit, *_ = rows["peak extra memory of this call"][0].split()
    assert unit in ("kB", "MB")
    assert unit == "kB" or float(amount) < 100


def test_demo_reads_other_pictures(tmp_path):
    given = tmp_path / "given.png"
    Image.new("RGBA", (50, 30), (10, 200, 30, 128)).save(given)
    assert demo._read(given, 16).shape == (16, 16, 3)
    assert status("demo", "--image", given, "--size", 8, "--out", tmp_path / "out.png") == 0


def test_demo_refuses_what_is_no_picture(capsys, tmp_path):
    given = tmp_path / "given.png"
    given.write_text("text")
    assert status("demo", "--image", given, "--size", 8, "--out", tmp_path / "out.png") == 2
    assert "argument --image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "words", "extra"),
    [("matplotlib.figure", (), "demo"), ("tqdm", (), "demo"), ("jax", ("--library", "jax"), "jax")],
)
def test_demo_names_the_missing_extra(module, words, extra, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert status("demo", *words, "--out", tmp_path / "out.png") == 1
    assert f"pip install 'chunkattn[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_interrupted_demo_leaves_no_file(library, capsys, monkeypatch, tmp_path):
    def interrupt(bar, done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_move", interrupt)
    words = ("--library", library, "--size", 32, "--out", tmp_path / "out.png")
    assert status("demo", *words) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_demo_interrupted_while_it_writes_leaves_no_file(monkeypatch, tmp_path):
    def interrupt(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    assert status("demo", "--size", 8, "--out", tmp_path / "out.png") == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
def test_demo_stops_at_control_c(tmp_path):
    code = f"""
import signal, sys
from chunkattn.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the parent ignores it
sys.exit(main(["demo", "--size", "512", "--out", {str(tmp_path / "out.png")!r}]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        told = b""
        while b"%" not in told:
            told += os.read(process.stderr.fileno(), 1024)
            assert process.poll() is None, told
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert rest.endswith(b"interrupted\n")
    assert out == b""
    assert list(tmp_path.iterdir()) == []


def test_memory_rises_by_what_is_allocated():
    meter = _memory.start(np.zeros(1))
    if meter is None or meter.measure != "resident set":
        pytest.skip("the resident set has no high-water mark that can be reset here")
    held = np.ones(64_000_000, dtype=np.uint8)
    del held
    assert 60e6 < meter.rise() < 80e6


@pytest.mark.usefixtures("no_rich")
def test_memory_where_nothing_measures_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_memory, "_resident_set", lambda: None)
    meter = _memory.start(np.zeros(1))
    assert meter is None or meter.rise() >= 0
    monkeypatch.setattr(_memory, "_largest_resident_set", lambda: None)
    assert status("demo", "--size", 8, "--out", tmp_path / "out.png") == 0
    rows = table(capsys.readouterr().out)
    assert rows["peak extra memory of this call"] == ["not measured"]


# vendor

USE = """
import sys
sys.path[:0] = {paths!r}
import numpy as np
from {name} import attention
from {name}.__main__ import main
x = np.ones((5, 4), dtype=np.float32)
assert attention(x, x, x).shape == (5, 4)
print(sorted(m for m in sys.modules if m.partition(".")[0] == "chunkattn"))
sys.exit(main({words!r}))
"""


def test_vendored_copy_works_renamed(capsys, tmp_path):
    dest = tmp_path / "new" / "dest"
    assert status("vendor", dest, "--name", "lent_attention") == 0
    told = capsys.readouterr().out
    assert str(dest / "lent_attention") in told
    assert vendor.REQUIREMENT in told
    assert [path.name for path in dest.iterdir()] == ["lent_attention"]
    code = USE.format(paths=[str(dest)], name="lent_attention", words=["vendor", str(tmp_path)])
    done = python(code, "-I")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[]\n")
    assert contents(tmp_path / "chunkattn") == contents(dest / "lent_attention")


def test_vendored_copy_needs_nothing_else(tmp_path):
    """`info` works with array-api-compat alone, and `demo` tells what is missing."""
    import array_api_compat

    assert status("vendor", tmp_path) == 0
    shutil.copytree(Path(array_api_compat.__file__).parent, tmp_path / "array_api_compat")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from chunkattn.__main__ import main
assert main(["info"]) == 0
sys.exit(main(["demo", "--out", {str(tmp_path / "out.png")!r}]))
"""
    done = python(code, "-I", "-S")
    assert done.returncode == 1, done.stderr
    assert "numpy\tnot found" in done.stdout
    assert "pip install 'chunkattn[demo]'" in done.stderr


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if "__pycache__" not in path.parts
    }


def test_vendored_files(tmp_path):
    assert status("vendor", tmp_path) == 0
    files = contents(tmp_path / "chunkattn")
    package, backends = vendor._folder("chunkattn"), vendor._folder("chunkattn.backends")
    expected = {str(p.relative_to(package)) for p in package.rglob("*.py")}
    expected |= {f"backends/{p.relative_to(backends)}" for p in backends.rglob("*.py")}
    assert set(files) == expected | {"py.typed", "LICENSE"}
    assert files["LICENSE"].startswith(b"MIT License")
    assert (tmp_path / "chunkattn").stat().st_mode & 0o777 == tmp_path_mode(tmp_path)


def tmp_path_mode(tmp_path):
    """Return the mode of a folder that is made in the ordinary way."""
    (tmp_path / "ordinary").mkdir()
    return (tmp_path / "ordinary").stat().st_mode & 0o777


def test_vendor_from_an_installation(tmp_path):
    """In a wheel `backends` is inside the package, and the licence beside the metadata."""
    site = tmp_path / "site"
    assert status("vendor", site) == 0
    recorded = site / "chunkattn-0.1.0.dist-info"
    (recorded / "licenses").mkdir(parents=True)
    (recorded / "METADATA").write_text("Metadata-Version: 2.4\nName: chunkattn\nVersion: 0.1.0\n")
    (recorded / "RECORD").write_text(
        "chunkattn/__init__.py,,\nchunkattn-0.1.0.dist-info/licenses/LICENSE,,\n"
    )
    (site / "chunkattn" / "LICENSE").rename(recorded / "licenses" / "LICENSE")
    (site / "LICENSE").write_text("some other project's")
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
from chunkattn.__main__ import main
sys.exit(main(["vendor", {str(tmp_path / "dest")!r}]))
"""
    done = python(code, "-I")
    assert done.returncode == 0, done.stderr
    expected = contents(site / "chunkattn")
    expected["LICENSE"] = (recorded / "licenses" / "LICENSE").read_bytes()
    assert contents(tmp_path / "dest" / "chunkattn") == expected


def test_vendor_refuses_without_a_licence(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(vendor, "_recorded_licences", lambda package: ())
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    assert status("vendor", tmp_path) == 1
    assert "no licence" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_vendor_refuses_and_force_replaces(capsys, tmp_path):
    target = tmp_path / "chunkattn"
    target.mkdir()
    (target / "mine.py").write_text("")
    assert status("vendor", tmp_path) == 2
    assert "--force" in capsys.readouterr().err
    assert set(contents(target)) == {"mine.py"}
    assert status("vendor", tmp_path, "--force") == 0
    assert "mine.py" not in contents(target)
    assert "__init__.py" in contents(target)
    assert list(tmp_path.iterdir()) == [target]


def test_vendor_refuses_its_own_source(tmp_path):
    assert status("vendor", tmp_path) == 0
    before = contents(tmp_path / "chunkattn")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from chunkattn.__main__ import main
sys.exit(main(["vendor", {str(tmp_path)!r}, "--force"]))
"""
    done = python(code, "-I")
    assert done.returncode == 2, done.stderr
    assert "holds the package" in done.stderr
    assert contents(tmp_path / "chunkattn") == before


def test_vendor_refuses_a_file_for_a_folder(tmp_path):
    (tmp_path / "dest").write_text("")
    assert status("vendor", tmp_path / "dest") == 2


@pytest.mark.parametrize("failing", [1, 2])
def test_vendor_that_fails_restores(failing, capsys, monkeypatch, tmp_path):
    target = tmp_path / "chunkattn"
    target.mkdir()
    (target / "mine.py").write_text("")
    replace, calls = os.replace, []

    def fail(source, destination):
        calls.append(source)
        if len(calls) == failing:
            raise OSError("disk full")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    assert status("vendor", tmp_path, "--force") == 1
    assert "disk full" in capsys.readouterr().err
    assert set(contents(target)) == {"mine.py"}
    assert list(tmp_path.iterdir()) == [target]


def test_requirement_is_the_projects():
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["dependencies"] == [vendor.REQUIREMENT]


# plan


def test_plan(capsys, no_rich):
    words = (
        "--n",
        1024,
        "--heads",
        2,
        "--dim",
        16,
        "--causal",
        "--training",
        "--memory-limit",
        "2MB",
    )
    assert status("plan", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split("\t")[:2]): line.split("\t")[3] for line in lines if "\t" in line}
    assert rows["input", "query"] == f"{2 * 1024 * 16 * 4:,}"
    assert rows["output", "gradient of key"] == rows["input", "query"]
    peak = int(rows["peak", "beyond inputs and outputs"].replace(",", ""))
    assert peak <= 2_000_000
    terms = [int(x.replace(",", "")) for (kind, _), x in rows.items() if kind == "call"]
    assert sum(terms) == peak
    assert any(line.startswith("paper, √n keys: all_heads × min(n, 1024)") for line in lines)


def test_plan_within_bytes(capsys):
    """Bytes alone are a number of bytes."""
    assert status("plan", "--n", 256, "--memory-limit", 64000000) == 0
    assert "peak" in capsys.readouterr().out


def test_plan_draws(tmp_path):
    assert status("plan", "--n", 4096, "--plot", tmp_path / "plan.png") == 0
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory-limit", "1kB"), "memory_limit must be at least"),
        (("--memory-limit", "x"), "memory_limit must be a positive number of bytes"),
        (("--heads", 8, "--key-heads", 3), "--key-heads: must divide --heads"),
        (("--plot", "plan.txt"), "must be the name of a file in .png or .svg"),
        (("--queries", 64, "--plot", "plan.png"), "--plot: needs --queries to be --n"),
        (("--library", ""), "must be the name of an array library; got ''"),
        (("--library", "../x"), "must be the name of an array library; got '../x'"),
        (("--n", 0), "must be a whole number from 1 on"),
        (("--library", "json"), "library must be the name of an array library; got 'json'"),
    ],
)
def test_plan_refuses(capsys, words, message):
    assert status("plan", *words) == 2
    assert message in capsys.readouterr().err


def test_plan_without_a_library(capsys):
    assert status("plan", "--library", "no_such_library") == 1
    told = capsys.readouterr().err
    assert "cannot import no_such_library" in told
    assert "pip install" not in told


def test_plan_of_few_queries(capsys):
    """Other schedules are told of as many queries as keys alone."""
    for queries, compared in ((), True), (("--queries", 1), False):
        assert status("plan", "--n", 2048, *queries) == 0
        assert ("textbook: " in capsys.readouterr().out) == compared
