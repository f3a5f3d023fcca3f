"""A caller's mistake: the right class of error, a message to act on, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import chunkattn
from chunkattn import OnlineAttention, ScoreMod, attention, attention_jvp, attention_vjp, merge
from chunkattn._adapters import adapter_of
from chunkattn.masks import Causal, Dense

Q, K, V = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)
SOURCES = {Path(chunkattn.__file__).parent, Path(__file__).parents[1] / "backends"}


@cache
def blas():
    return threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers


def state():
    """Return what belongs to the process and not to a call."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    return {
        "BLAS threads": [library.num_threads for library in blas()],
        "NumPy errors": np.geterr(),
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("chunkattn")],
        "torch": torch
        and (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()),
        "JAX": jax and (jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision),
    }


@pytest.fixture(autouse=True)
def _nothing_global_changes(request):
    if "lib" in request.fixturenames:
        request.getfixturevalue("lib")
    before = state()
    yield
    after = state()
    assert {name: x for name, x in after.items() if before[name] is not None} == {
        name: x for name, x in before.items() if x is not None
    }


def array(lib, shape, kind=float):
    """Return ones of a library: floats in its default dtype, another kind, or a dtype by name."""
    if isinstance(kind, str):
        return lib.asarray(np.ones(shape), kind)
    return lib.asarray(np.ones(shape, kind))


def tokens(lib):
    return {name: array(lib, s) for name, s in (("query", Q), ("key", K), ("value", V))}


def refused(error, told, call, *args, **kwargs):
    """Assert that chunkattn itself raises `error`, with every part of ``told.split(" | ")``."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    message = str(caught.value)
    missing = [words for words in told.split(" | ") if words.lower() not in message.lower()]
    assert not missing, f"{missing} not in: {message}"
    raised_in = Path(caught.traceback[-1].path)
    assert SOURCES & set(raised_in.parents), f"raised in {raised_in}"


# What the arguments of attention may be

CASES = [
    # query, key and value: shapes
    ("query without axes", {"query": ((),)}, ValueError, "query () | (n, d)"),
    ("query with one axis", {"query": ((8,),)}, ValueError, "query (8,) | (n, d)"),
    (
        "query alone without heads",
        {"query": ((5, 8),)},
        ValueError,
        "query (5, 8) | key (2, 2, 7, 8) | (…, h, n, d)",
    ),
    (
        "query without heads, key with",
        {"query": ((5, 8),), "key": ((2, 7, 8),), "value": ((2, 7, 6),)},
        ValueError,
        "query (5, 8) | key (2, 7, 8) | value (2, 7, 6) | head",
    ),
    (
        "width of key",
        {"key": ((2, 2, 7, 9),)},
        ValueError,
        "query (2, 4, 5, 8) | key (2, 2, 7, 9) | width d",
    ),
    (
        "width of key, 2-d",
        {"query": ((5, 8),), "key": ((7, 9),), "value": ((7, 9),)},
        ValueError,
        "query | (5, 8) | key | (7, 9) | width d",
    ),
    (
        "length of value",
        {"value": ((2, 2, 6, 6),)},
        ValueError,
        "key (2, 2, 7, 8) | value (2, 2, 6, 6) | length n_k",
    ),
    (
        "length of value, nhd",
        {"value": ((2, 1, 7, 6),), "layout": "nhd"},
        ValueError,
        "key (2, 2, 7, 8) | value (2, 1, 7, 6) | length n_k | 'nhd'",
    ),
    (
        "heads of value",
        {"value": ((2, 1, 7, 6),)},
        ValueError,
        "key (2, 2, 7, 8) | value (2, 1, 7, 6) | heads",
    ),
    (
        "heads not a multiple",
        {"key": ((2, 3, 7, 8),), "value": ((2, 3, 7, 6),)},
        ValueError,
        "query (2, 4, 5, 8) | key (2, 3, 7, 8) | heads | multiple",
    ),
    (
        "more key heads than query heads",
        {"key": ((2, 8, 7, 8),), "value": ((2, 8, 7, 6),)},
        ValueError,
        "query (2, 4, 5, 8) | key (2, 8, 7, 8) | heads | multiple",
    ),
    (
        "no key heads",
        {"key": ((2, 0, 7, 8),), "value": ((2, 0, 7, 6),)},
        ValueError,
        "query (2, 4, 5, 8) | key (2, 0, 7, 8) | heads | multiple",
    ),
    (
        "heads in the other layout",
        {"layout": "nhd"},
        ValueError,
        "query (2, 4, 5, 8) | key (2, 2, 7, 8) | heads | multiple | 'nhd'",
    ),
    (
        "batch of key and value",
        {"key": ((3, 2, 7, 8),), "value": ((3, 2, 7, 6),)},
        ValueError,
        "query (2, 4, 5, 8) | key (3, 2, 7, 8) | value (3, 2, 7, 6) | batch | broadcast",
    ),
    (
        "batch of value",
        {"key": ((1, 2, 7, 8),), "value": ((3, 2, 7, 6),)},
        ValueError,
        "query (2, 4, 5, 8) | value (3, 2, 7, 6) | batch | broadcast",
    ),
    # choices
    ("layout", {"layout": "bhnd"}, ValueError, "layout | 'hnd' | 'nhd' | 'bhnd'"),
    ("layout None", {"layout": None}, ValueError, "layout | 'hnd' | 'nhd' | None"),
    ("layout list", {"layout": ["hnd"]}, ValueError, "layout | 'hnd' | 'nhd' | ['hnd']"),
    (
        "implementation",
        {"implementation": "flash"},
        ValueError,
        "implementation | 'auto' | 'chunked' | 'native' | 'standard' | 'flash'",
    ),
    (
        "implementation that does not cover",
        {"implementation": "native", "softcap": 5.0},
        NotImplementedError,
        "implementation | native",
    ),
    # scale and softcap
    ("scale NaN", {"scale": float("nan")}, ValueError, "scale | nan"),
    ("scale str", {"scale": "large"}, TypeError, "scale | number | 'large'"),
    ("scale bool", {"scale": True}, TypeError, "scale | number | True"),
    ("scale complex", {"scale": 1j}, TypeError, "scale | number | 1j"),
    ("scale list", {"scale": [0.5]}, TypeError, "scale | number | [0.5]"),
    ("scale with axes", {"scale": ((4,),)}, TypeError, "scale | number | (4,)"),
    ("scale with one entry", {"scale": ((1,),)}, TypeError, "scale | number | (1,)"),
    ("scale too large", {"scale": 10**400}, ValueError, "scale | 1000"),
    ("scale bool array", {"scale": ((), bool)}, TypeError, "scale | number | bool"),
    ("softcap zero", {"softcap": 0}, ValueError, "softcap | positive | 0"),
    ("softcap zero float", {"softcap": 0.0}, ValueError, "softcap | positive | 0.0"),
    ("softcap negative", {"softcap": -1}, ValueError, "softcap | positive | -1"),
    ("softcap NaN", {"softcap": float("nan")}, ValueError, "softcap | nan"),
    ("softcap inf", {"softcap": float("inf")}, ValueError, "softcap | finite | inf"),
    ("softcap -inf", {"softcap": -float("inf")}, ValueError, "softcap | positive | -inf"),
    ("softcap too large", {"softcap": 10**400}, ValueError, "softcap | finite | 1000"),
    ("softcap str", {"softcap": "large"}, TypeError, "softcap | number | 'large'"),
    ("softcap bool", {"softcap": True}, TypeError, "softcap | number | True"),
    ("softcap list", {"softcap": [1.0]}, TypeError, "softcap | number | [1.0]"),
    ("softcap with axes", {"softcap": ((2,),)}, TypeError, "softcap | number"),
    # masks
    ("causal int", {"causal": 1}, TypeError, "causal | True or False | 1"),
    ("causal None", {"causal": None}, TypeError, "causal | True or False | None"),
    ("causal str", {"causal": "yes"}, TypeError, "causal | True or False | 'yes'"),
    ("mask of floats", {"mask": ((5, 7),)}, TypeError, "mask | bool | float | bias"),
    ("mask of ints", {"mask": ((5, 7), int)}, TypeError, "mask | bool | int64"),
    (
        "mask of ints in a tuple",
        {"mask": lambda lib: (array(lib, (5, 7), bool), array(lib, (7,), int))},
        TypeError,
        "mask | bool | int64",
    ),
    (
        "mask of ints in Dense",
        {"mask": lambda lib: Dense(array(lib, (5, 7), int))},
        TypeError,
        "mask | bool | int64",
    ),
    ("mask of one row too many", {"mask": ((6, 7), bool)}, ValueError, "mask | (6, 7)"),
    ("mask transposed", {"mask": ((7, 5), bool)}, ValueError, "mask | (2, 4, 5, 7) | (7, 5)"),
    (
        "mask of key heads",
        {"mask": ((2, 2, 5, 7), bool)},
        ValueError,
        "mask | (2, 4, 5, 7) | (2, 2, 5, 7)",
    ),
    (
        "mask with an axis too many",
        {"mask": ((3, 2, 4, 5, 7), bool)},
        ValueError,
        "mask | (2, 4, 5, 7) | (3, 2, 4, 5, 7)",
    ),
    (
        "mask with an axis of 1 too many",
        {"mask": ((1, 2, 4, 5, 7), bool)},
        ValueError,
        "mask | (2, 4, 5, 7) | (1, 2, 4, 5, 7)",
    ),
    (
        "mask larger than the batch",
        {
            "query": ((1, 4, 5, 8),),
            "key": ((1, 2, 7, 8),),
            "value": ((1, 2, 7, 6),),
            "mask": ((3, 1, 5, 7), bool),
        },
        ValueError,
        "mask | (1, 4, 5, 7) | (3, 1, 5, 7)",
    ),
    (
        "mask larger than 2-d inputs",
        {"query": ((5, 8),), "key": ((7, 8),), "value": ((7, 8),), "mask": ((2, 5, 7), bool)},
        ValueError,
        "mask | (5, 7) | (2, 5, 7)",
    ),
    (
        "mask of the wrong shape in a tuple",
        {"mask": lambda lib: (Causal(), array(lib, (2, 7), bool)), "query_offset": 0},
        ValueError,
        "mask | (2, 4, 5, 7) | (2, 7)",
    ),
    ("mask str", {"mask": "causal"}, TypeError, "mask | bool | chunkattn.masks | 'causal'"),
    ("mask int", {"mask": 5}, TypeError, "mask | bool | 5"),
    ("mask True", {"mask": True}, TypeError, "mask | bool | True"),
    ("mask list", {"mask": [[True] * 7] * 5}, TypeError, "mask | bool | tuple | [[True"),
    ("mask class", {"mask": Causal}, TypeError, "mask | Causal"),
    ("mask None in a tuple", {"mask": (None,)}, TypeError, "mask | bool | None"),
    ("mask tuple in a tuple", {"mask": ((Causal(),),)}, TypeError, "mask | tuple | Causal()"),
    # bias
    ("bias of ints", {"bias": ((5, 7), int)}, TypeError, "bias | float32 | int64"),
    ("bias of bools", {"bias": ((5, 7), bool)}, TypeError, "bias | float32 | bool"),
    ("bias number", {"bias": 0.5}, TypeError, "bias | array | 0.5"),
    ("bias list", {"bias": [0.5]}, TypeError, "bias | array | [0.5]"),
    ("bias transposed", {"bias": ((7, 5),)}, ValueError, "bias | (2, 4, 5, 7) | (7, 5)"),
    (
        "bias larger than the batch",
        {
            "query": ((1, 4, 5, 8),),
            "key": ((1, 2, 7, 8),),
            "value": ((1, 2, 7, 6),),
            "bias": ((3, 1, 5, 7),),
        },
        ValueError,
        "bias | (1, 4, 5, 7) | (3, 1, 5, 7)",
    ),
    (
        "bias with an axis too many",
        {"bias": ((1, 2, 4, 5, 7),)},
        ValueError,
        "bias | (2, 4, 5, 7) | (1, 2, 4, 5, 7)",
    ),
    # offsets
    (
        "causal, lengths differ",
        {"causal": True},
        ValueError,
        "query_offset=0 | query_offset=n_k - n_q | n_q = 5 | n_k = 7",
    ),
    (
        "Causal, lengths differ",
        {"mask": Causal()},
        ValueError,
        "query_offset=0 | query_offset=n_k - n_q | n_q = 5 | n_k = 7",
    ),
    (
        "Causal in a tuple, lengths differ",
        {"mask": lambda lib: (array(lib, (7,), bool), Causal())},
        ValueError,
        "query_offset=0 | query_offset=n_k - n_q | n_q = 5 | n_k = 7",
    ),
    ("query_offset float", {"query_offset": 1.5}, TypeError, "query_offset | int | 1.5"),
    ("query_offset whole float", {"query_offset": 2.0}, TypeError, "query_offset | int | 2.0"),
    ("query_offset bool", {"query_offset": True}, TypeError, "query_offset | int | True"),
    ("query_offset str", {"query_offset": "2"}, TypeError, "query_offset | int | '2'"),
    ("query_offset list", {"query_offset": [0, 1]}, TypeError, "query_offset | int | [0, 1]"),
    (
        "query_offset of floats",
        {"query_offset": ((2,), "float32")},
        TypeError,
        "query_offset | int | float32",
    ),
    (
        "query_offset of bools",
        {"query_offset": ((2,), bool)},
        TypeError,
        "query_offset | int | bool",
    ),
    (
        "query_offset of another batch",
        {"query_offset": ((3,), int)},
        ValueError,
        "query_offset | (2,) | (3,)",
    ),
    (
        "query_offset with an axis too many",
        {"query_offset": ((2, 2), int)},
        ValueError,
        "query_offset | (2,) | (2, 2)",
    ),
    (
        "query_offset with axes, no batch",
        {"query": ((5, 8),), "key": ((7, 8),), "value": ((7, 8),), "query_offset": ((1,), int)},
        ValueError,
        "query_offset | without axes | (1,)",
    ),
    ("key_offset float", {"key_offset": 1.5}, TypeError, "key_offset | int | 1.5"),
    ("key_offset bool", {"key_offset": False}, TypeError, "key_offset | int | False"),
    ("key_offset None", {"key_offset": None}, TypeError, "key_offset | int | None"),
    ("key_offset str", {"key_offset": "2"}, TypeError, "key_offset | int | '2'"),
    (
        "key_offset of floats",
        {"key_offset": ((), "float32")},
        TypeError,
        "key_offset | int | float32",
    ),
    ("key_offset with axes", {"key_offset": ((2,), int)}, ValueError, "key_offset | (2,)"),
    # sizes, dtypes, progress
    *(
        (f"{name} {x!r}", {name: x}, error, f"{name} | positive int | {x!r}")
        for name in ("query_chunk_size", "key_chunk_size")
        for x, error in (
            (0, ValueError),
            (-1, ValueError),
            (1.5, TypeError),
            (True, TypeError),
            ("8", TypeError),
            ([8], TypeError),
        )
    ),
    *(
        (
            f"compute_dtype {x!r}",
            {"compute_dtype": x},
            ValueError,
            f"compute_dtype | float32 | float64 | {x!r}",
        )
        for x in ("float16", "int32", "nonsense", 7, [])
    ),
    *(
        (
            f"compute_dtype, the library's {x}",
            {"compute_dtype": lambda lib, x=x: lib.dtype(x)},
            ValueError,
            f"compute_dtype | float32 | float64 | {x}",
        )
        for x in ("int32", "bool")
    ),
    ("progress int", {"progress": 5}, TypeError, "progress | callable | 5"),
    ("progress str", {"progress": "bar"}, TypeError, "progress | callable | 'bar'"),
]


def is_recipe(x):
    """Whether `x` stands for an array: ``(shape,)`` or ``(shape, kind)``."""
    return isinstance(x, tuple) and isinstance(x[0], tuple) and all(type(n) is int for n in x[0])


@pytest.mark.parametrize(
    ("arguments", "error", "told"), [pytest.param(*case, id=name) for name, *case in CASES]
)
def test_arguments(lib, arguments, error, told):
    given = tokens(lib)
    for name, x in arguments.items():
        if is_recipe(x):
            x = array(lib, *x)
        elif callable(x) and not isinstance(x, type):
            x = x(lib)
        given[name] = x
    refused(error, told, lib.call, attention, **given)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize(
    "x", [[[1.0]], None, 0.5, "text", object()], ids=["list", "None", "float", "str", "object"]
)
def test_not_an_array(lib, name, x):
    told = f"{name} | array | {type(x).__name__}"
    refused(TypeError, told, lib.call, attention, **tokens(lib) | {name: x})


@pytest.mark.parametrize("kind", [int, bool, complex])
def test_dtype_that_is_not_floating(lib, kind):
    if kind is complex and not hasattr(lib.xp, "complex128"):
        pytest.skip("a standard of before the complex dtypes")
    for names in (("query",), ("key",), ("value",), ("query", "key", "value")):
        wrong = {name: array(lib, {"query": Q, "key": K, "value": V}[name], kind) for name in names}
        told = f"{names[0]} | float32 | {np.dtype(kind).name}"
        refused(TypeError, told, lib.call, attention, **tokens(lib) | wrong)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_dtypes_mixed(lib, name):
    given = tokens(lib)
    given[name] = array(lib, given[name].shape, "float64")
    told = f"{name} | one dtype | {name} {given[name].dtype} | {lib.default}"
    refused(TypeError, told, lib.call, attention, **given)


def test_complex_bias(lib):
    if not hasattr(lib.xp, "complex128"):
        pytest.skip("a standard of before the complex dtypes")
    bias = array(lib, (5, 7), complex)
    told = "bias | float32 | complex128"
    refused(TypeError, told, lib.call, attention, **tokens(lib), bias=bias)


@pytest.mark.parametrize("position", [3, 4])
def test_keywords_are_not_positional(lib, position):
    with pytest.raises(TypeError, match="positional argument"):
        attention(*tokens(lib).values(), *[None] * (position - 2))


def test_numpy_scalars_are_numbers(lib):
    """``np.float64`` is a float: ``scale=1 / np.sqrt(d)`` is for every library."""
    given = tokens(lib)
    plain = lib.call(attention, **given, scale=0.5, softcap=2.0, query_offset=2, causal=True)
    numpy = lib.call(
        attention,
        **given,
        scale=np.float64(0.5),
        softcap=np.float64(2),
        query_offset=np.int64(2),
        causal=True,
    )
    np.testing.assert_array_equal(lib.numpy(plain), lib.numpy(numpy))


@pytest.mark.parametrize("dtype", ["int8", "uint64"])
@pytest.mark.parametrize(
    ("name", "offset"),
    [("query_offset", np.asarray([3, 120])), ("key_offset", np.asarray(3))],
    ids=["query_offset", "key_offset"],
)
def test_offset_of_any_integer_dtype(check, rng, name, offset, dtype):
    """Positions go past what an int8 can hold; a uint64 may be refused, by its name."""
    tokens = (rng.standard_normal((2, 1, 150, 4)) for _ in "qkv")
    keywords = {"query_offset": 0, name: offset.astype(dtype)}
    try:
        check(*tokens, causal=True, query_chunk_size=50, key_chunk_size=30, **keywords)
    except TypeError as error:
        message = str(error)
    else:
        return
    assert dtype == "uint64"
    assert name in message
    assert dtype in message


def test_positions_past_the_index_dtype(lib, rng):
    """The result is right, or the call refused by a message that names the offset."""
    q, k, v = (lib.asarray(rng.standard_normal((5, 4))) for _ in "qkv")
    right = lib.numpy(lib.call(attention, q, k, v, causal=True))
    for far in (2**62, 2**70):
        try:
            out = lib.call(attention, q, k, v, causal=True, query_offset=far, key_offset=far)
        except ValueError as error:
            message = str(error)
        else:
            np.testing.assert_array_equal(lib.numpy(out), right)
            continue
        assert "query_offset" in message


# NumPy's and torch's own kinds of arrays


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "bias"])
def test_masked_array(name):
    given = {"query": np.ones(Q), "key": np.ones(K), "value": np.ones(V)}
    x = given.get(name, np.ones((5, 7), bool if name == "mask" else float))
    given[name] = np.ma.masked_array(x, mask=x == 2)
    refused(TypeError, f"{name} | MaskedArray", attention, **given)


@pytest.mark.parametrize("name", ["query", "bias"])
def test_matrix(name):
    given = {"query": np.ones((5, 8)), "key": np.ones((7, 8)), "value": np.ones((7, 8))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        given[name] = np.matrix(given.get(name, np.ones((5, 7))))
    refused(TypeError, f"{name} | matrix", attention, **given)


@pytest.mark.parametrize("dtype", [np.longdouble, object, "U3", "M8[s]"])
def test_dtype_of_numpy_alone(dtype):
    x = np.zeros((5, 8), dtype)
    refused(TypeError, f"query | float32 | {x.dtype}", attention, x, x, x)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "mask"])
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_torch_sparse(name, layout):
    torch = pytest.importorskip("torch")
    given = {name: torch.ones(5, 5) for name in ("query", "key", "value")}
    x = given.get(name, torch.ones(5, 5, dtype=torch.bool if name == "mask" else None))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR", UserWarning)
        given[name] = x.to_sparse(layout=getattr(torch, layout))
    refused(TypeError, f"{name} | {layout} | dense", attention, **given)


@pytest.mark.parametrize("layout", ["strided", "jagged"])
def test_torch_nested(layout):
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors", UserWarning)
        x = torch.nested.nested_tensor(
            [torch.ones(2, 3), torch.ones(4, 3)], layout=getattr(torch, layout)
        )
    refused(TypeError, "query", attention, x, x, x)


# Two libraries, two devices


def of_library(name, shape, kind=float):
    """Return an array of a library by its name, and the name in messages."""
    if name == "torch":
        return (
            pytest.importorskip("torch").ones(shape).to(getattr(sys.modules[name], kind.__name__))
        )
    if name == "jax":
        return pytest.importorskip("jax").numpy.ones(shape, kind)
    if name == "array_api_strict":
        strict = pytest.importorskip(name)
        return strict.asarray(np.ones(shape, kind))
    return np.ones(shape, kind)


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "bias", "query_offset", "scale"])
@pytest.mark.parametrize(
    "pair",
    [("numpy", "torch"), ("torch", "jax"), ("numpy", "array_api_strict"), ("jax", "numpy")],
    ids="+".join,
)
def test_two_libraries(pair, name):
    both = " | ".join(pair)
    for one, two in (pair, pair[::-1]):
        given = {n: of_library(one, s) for n, s in (("query", Q), ("key", K), ("value", V))}
        shape, kind = {
            "query": (Q, float),
            "key": (K, float),
            "value": (V, float),
            "mask": ((5, 7), bool),
            "bias": ((5, 7), float),
            "query_offset": ((2,), int),
            "scale": ((), float),
        }[name]
        given[name] = of_library(two, shape, kind)
        refused(TypeError, f"{name} | {both}", attention, **given)
        if name == "mask":
            for mask in (Dense(given[name]), (Causal(), given[name])):
                refused(TypeError, f"{name} | {both}", attention, **given | {"mask": mask})


def test_two_libraries_in_pieces():
    q, k, v = (np.ones(shape) for shape in (Q, K, V))
    other = attention(*(of_library("array_api_strict", s) for s in (Q, K, V)), return_lse=True)
    both = "numpy | array_api_strict"
    refused(TypeError, both, merge, attention(q, k, v, return_lse=True), other)
    refused(TypeError, f"value | {both}", OnlineAttention(q).update, k, other[0])
    stream = OnlineAttention(of_library("array_api_strict", Q))
    stream.update(of_library("array_api_strict", K), of_library("array_api_strict", V))
    refused(TypeError, both, OnlineAttention(q).update(k, v).merge, stream)


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "bias", "query_offset"])
def test_two_devices_array_api_strict(name):
    xp = pytest.importorskip("array_api_strict")
    given = {"query": np.ones(Q), "key": np.ones(K), "value": np.ones(V)}
    given |= {
        "mask": np.ones((5, 7), bool),
        "bias": np.ones((5, 7)),
        "query_offset": np.ones(2, int),
    }
    given = {
        n: xp.asarray(x, device=xp.Device("device1" if n == name else "CPU_DEVICE"))
        for n, x in given.items()
    }
    refused(ValueError, f"{name} | CPU_DEVICE | device1", attention, **given)


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "bias", "query_offset"])
def test_two_devices_torch(name):
    torch = pytest.importorskip("torch")
    given = {"query": torch.ones(Q), "key": torch.ones(K), "value": torch.ones(V)}
    given |= {
        "mask": torch.ones(5, 7, dtype=torch.bool),
        "bias": torch.ones(5, 7),
        "query_offset": torch.ones(2, dtype=torch.int64),
    }
    given[name] = given[name].to("meta")
    refused(ValueError, f"{name} | cpu | meta", attention, **given)


def test_two_devices_jax():
    pytest.importorskip("jax")
    code = """
import jax, jax.numpy as jnp, numpy as np
from chunkattn import OnlineAttention, attention, merge
one, two = jax.devices()
x = np.ones((5, 8), "float32")
here, there, free = jax.device_put(x, one), jax.device_put(x, two), jnp.asarray(x)
mask = jax.device_put(np.ones((5, 5), bool), two)
def refused(name, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ValueError as error:
        told = str(error)
        assert all(words in told for words in (name, "id=0", "id=1")), told
    else:
        raise AssertionError(name)
refused("key", attention, here, there, here)
refused("value", attention, here, free, there)
refused("mask", attention, here, free, free, mask=mask)
refused("bias", attention, free, here, free, bias=there)
refused("value", OnlineAttention(here).update, here, there)
a, b = (attention(x, x, x, return_lse=True) for x in (here, there))
refused("partial 1", merge, a, b)
one, two = OnlineAttention(here).update(here, here), OnlineAttention(there).update(there, there)
refused("query", one.merge, two)
assert attention(free, there, free).devices() == there.devices()
"""
    flags = "--xla_force_host_platform_device_count=2"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Derivatives

BARS = [
    ("d_out shape", {"d_out": ((2, 4, 5, 8),)}, ValueError, "d_out | (2, 4, 5, 6) | (2, 4, 5, 8)"),
    (
        "d_out that would broadcast",
        {"d_out": ((1, 4, 5, 6),)},
        ValueError,
        "d_out | (2, 4, 5, 6) | (1, 4, 5, 6)",
    ),
    ("d_out of ints", {"d_out": ((2, 4, 5, 6), int)}, TypeError, "d_out | float32 | int64"),
    ("d_out list", {"d_out": [0.5]}, TypeError, "d_out | array | [0.5]"),
    ("d_lse shape", {"d_lse": ((2, 4, 5, 1),)}, ValueError, "d_lse | (2, 4, 5) | (2, 4, 5, 1)"),
    ("d_lse of bools", {"d_lse": ((2, 4, 5), bool)}, TypeError, "d_lse | float32 | bool"),
    ("d_lse number", {"d_lse": 1.0}, TypeError, "d_lse | array | 1.0"),
    ("softcap", {"softcap": -1}, ValueError, "softcap | positive | -1"),
]


def gradients(query, key, value, *, d_out=None, d_lse=None, **keywords):
    return attention_vjp(query, key, value, **keywords)[1](d_out, d_lse)


@pytest.mark.parametrize(
    ("arguments", "error", "told"), [pytest.param(*case, id=name) for name, *case in BARS]
)
def test_vjp_arguments(lib, arguments, error, told):
    given = {name: array(lib, *x) if is_recipe(x) else x for name, x in arguments.items()}
    refused(error, told, lib.call, gradients, **tokens(lib), **given)


MOVES = [
    ("d_query shape", {"d_query": (K,)}, ValueError, f"d_query | {Q} | {K}"),
    ("d_key of another dtype", {"d_key": (K, "float64")}, TypeError, "d_key | float64"),
    ("d_value of ints", {"d_value": (V, int)}, TypeError, "d_value | int64"),
    ("d_value number", {"d_value": 0.0}, TypeError, "d_value | array | 0.0"),
    (
        "d_bias shape",
        {"bias": ((5, 7),), "d_bias": ((7,),)},
        ValueError,
        "d_bias | (5, 7) | (7,)",
    ),
    ("d_bias without bias", {"d_bias": ((5, 7),)}, ValueError, "d_bias | without bias"),
    ("d_sinks without sinks", {"d_sinks": ((4,),)}, ValueError, "d_sinks | without sinks"),
    ("softcap", {"softcap": -1}, ValueError, "softcap | positive | -1"),
]


def moved(query, key, value, *, d_query=None, d_key=None, d_value=None, **keywords):
    return attention_jvp((query, key, value), (d_query, d_key, d_value), **keywords)


@pytest.mark.parametrize(
    ("arguments", "error", "told"), [pytest.param(*case, id=name) for name, *case in MOVES]
)
def test_jvp_arguments(lib, arguments, error, told):
    given = {name: array(lib, *x) if is_recipe(x) else x for name, x in arguments.items()}
    refused(error, told, lib.call, moved, **tokens(lib), **given)


def test_jvp_of_other_than_three(lib):
    three = tuple(tokens(lib).values())
    for wrong in (three[:2], (*three, None), three[0], None):
        refused(TypeError, "primals | three", attention_jvp, wrong, three)
        refused(TypeError, "tangents | three", attention_jvp, three, wrong)


def test_derivatives_take_the_keywords_of_attention(lib):
    three = tuple(tokens(lib).values())
    for name in ("colour", "d_bias"):
        with pytest.raises(TypeError, match=name):
            attention_vjp(*three, **{name: None})
    with pytest.raises(TypeError, match="colour"):
        attention_jvp(three, three, colour=None)


def cube(s, b, h, q_idx, kv_idx):
    return s * s * s


def differentiates(lib):
    return adapter_of(array(lib, Q), "query").autodiff


def test_score_mod_without_derivative(lib):
    if differentiates(lib):
        pytest.skip("this library differentiates functions itself")
    told = "score_mod | ScoreMod | derivative"
    refused(TypeError, told, attention_vjp, **tokens(lib), score_mod=cube)
    three = tuple(tokens(lib).values())
    refused(TypeError, told, attention_jvp, three, three, score_mod=cube)


@pytest.mark.parametrize("wrong", [None, 0.5])
def test_score_mod_of_what_is_no_function(wrong):
    refused(TypeError, f"ScoreMod | function | {wrong}", ScoreMod, wrong, cube)
    refused(TypeError, f"ScoreMod | derivative | {wrong}", ScoreMod, cube, wrong)


@pytest.mark.parametrize(
    "result",
    [lambda s: s[None, ...], lambda s: s[..., :2], lambda s: None],
    ids=["an axis too many", "another length", "None"],
)
def test_derivative_of_another_shape(lib, result):
    if differentiates(lib):
        pytest.skip("this library differentiates functions itself")
    mod = ScoreMod(cube, lambda s, *place: result(s))
    refused(ValueError, "ScoreMod | shape", gradients, **tokens(lib), score_mod=mod)


def test_exception_of_derivative(lib):
    if differentiates(lib):
        pytest.skip("this library differentiates functions itself")
    error = Mine("stop")

    def derivative(*args):
        raise error

    mod = ScoreMod(cube, derivative)
    with pytest.raises(Mine) as caught:
        gradients(**tokens(lib), score_mod=mod, query_chunk_size=2)
    assert caught.value is error


def test_derivatives_of_two_libraries():
    both = "numpy | array_api_strict"
    _, vjp = attention_vjp(np.ones(Q), np.ones(K), np.ones(V))
    refused(TypeError, f"d_out | {both}", vjp, of_library("array_api_strict", (2, 4, 5, 6)))
    three, key = (np.ones(Q), np.ones(K), np.ones(V)), of_library("array_api_strict", K)
    refused(TypeError, f"d_key | {both}", attention_jvp, three, (None, key, None))


def test_derivatives_on_two_devices():
    xp = pytest.importorskip("array_api_strict")
    there = xp.asarray(np.ones((2, 4, 5, 6)), device=xp.Device("device1"))
    _, vjp = attention_vjp(*(of_library("array_api_strict", shape) for shape in (Q, K, V)))
    refused(ValueError, "d_out | CPU_DEVICE | device1", vjp, there)


# merge

OUT, LSE = (2, 4, 5, 6), (2, 4, 5)
PAIR = ((OUT,), (LSE,))

MERGES = [
    ("nothing", [], {}, ValueError, "at least one | (out, lse)"),
    ("lse shape", [((OUT,), ((2, 5, 4),))], {}, ValueError, f"lse | {LSE} | (2, 5, 4)"),
    ("lse as out", [((OUT,), (OUT,))], {}, ValueError, f"lse | {LSE} | {OUT}"),
    ("out without axes", [(((),), ((),))], {}, ValueError, "partial 0 | out | ()"),
    ("out with one axis", [(((5,),), ((5,),))], {}, ValueError, "partial 0 | out | (5,)"),
    (
        "2-d out, 2-d lse",
        [(((5, 6),), ((1, 5),))],
        {},
        ValueError,
        "partial 0 | lse | (5,) | (1, 5)",
    ),
    (
        "out shapes",
        [PAIR, (((2, 4, 5, 7),), (LSE,))],
        {},
        ValueError,
        f"partial 1 | out | {OUT} | (2, 4, 5, 7)",
    ),
    (
        "batch that would broadcast",
        [PAIR, (((1, 4, 5, 6),), ((1, 4, 5),))],
        {},
        ValueError,
        f"partial 1 | out | {OUT} | (1, 4, 5, 6)",
    ),
    (
        "lengths",
        [PAIR, PAIR, (((2, 4, 6, 6),), ((2, 4, 6),))],
        {},
        ValueError,
        f"partial 2 | out | {OUT} | (2, 4, 6, 6)",
    ),
    ("other layout", [PAIR], {"layout": "nhd"}, ValueError, f"lse | (2, 5, 4) | {LSE} | 'nhd'"),
    ("layout", [PAIR], {"layout": "hdn"}, ValueError, "layout | 'hnd' | 'nhd' | 'hdn'"),
    ("out dtypes", [PAIR, ((OUT, "float64"), (LSE,))], {}, TypeError, "partial 1 | out | float64"),
    (
        "lse dtypes",
        [((OUT,), (LSE, "float32")), ((OUT,), (LSE, "float64"))],
        {},
        TypeError,
        "partial 1 | lse | float32 | float64",
    ),
    ("out of ints", [((OUT, int), (LSE,))], {}, TypeError, "partial 0 | out | float | int64"),
    ("lse of ints", [((OUT,), (LSE, int))], {}, TypeError, "partial 0 | lse | float | int64"),
]


@pytest.mark.parametrize(
    ("partials", "keywords", "error", "told"),
    [pytest.param(*case, id=name) for name, *case in MERGES],
)
def test_merge(lib, partials, keywords, error, told):
    made = [tuple(array(lib, *recipe) for recipe in pair) for pair in partials]
    refused(error, told, lib.call, merge, *made, **keywords)


def test_merge_of_what_are_no_pairs(lib):
    out, lse = array(lib, OUT), array(lib, LSE)
    told = "partial 1 | (out, lse)"
    for wrong in (out, (out,), (out, lse, lse), (out, None), (None, lse), None, 1.0, "ab", [1, 2]):
        refused(TypeError, told, merge, (out, lse), wrong)


# streams


@pytest.fixture
def stream(lib, rng):
    """A stream that has taken its first chunk, in one task, and that chunk."""
    q, k, v = (lib.asarray(rng.standard_normal(shape)) for shape in (Q, K, V))
    return OnlineAttention(q).update(k, v)


def test_stream_result_before_update(lib):
    refused(ValueError, "no keys | update", OnlineAttention(array(lib, Q)).result)
    refused(
        ValueError,
        "no keys | update",
        OnlineAttention(array(lib, Q)).merge(OnlineAttention(array(lib, Q))).result,
    )


@pytest.mark.parametrize("x", [[[1.0]], None, 0.5], ids=["list", "None", "float"])
def test_stream_of_no_array(lib, x):
    refused(TypeError, f"query | array | {type(x).__name__}", OnlineAttention, x)
    online = OnlineAttention(array(lib, Q))
    refused(TypeError, f"key | array | {type(x).__name__}", online.update, x, array(lib, V))
    refused(TypeError, f"value | array | {type(x).__name__}", online.update, array(lib, K), x)


@pytest.mark.parametrize("square", [True, False])
def test_stream_causal_without_offset(lib, square):
    """Also where the first chunk is as long as the queries: nobody knows the whole length."""
    q, v = array(lib, Q), array(lib, (2, 2, 5, 6) if square else V)
    k = array(lib, (*v.shape[:-1], 8))
    for keywords in ({"causal": True}, {"mask": Causal()}, {"mask": (Causal(),)}):
        refused(
            ValueError, "query_offset", lambda kw=keywords: OnlineAttention(q, **kw).update(k, v)
        )


@pytest.mark.parametrize("wrap", [lambda x: x, Dense, lambda x: (Causal(), x)])
def test_stream_mask_array(lib, wrap):
    q, k, v = tokens(lib).values()
    mask = wrap(array(lib, (5, 7), bool))
    refused(
        ValueError,
        "mask | position",
        lambda: OnlineAttention(q, mask=mask, query_offset=0).update(k, v),
    )


@pytest.mark.parametrize(
    ("keywords", "error", "told"),
    [
        pytest.param({"layout": "x"}, ValueError, "layout | 'hnd' | 'x'", id="layout"),
        pytest.param({"softcap": 0}, ValueError, "softcap | positive", id="softcap"),
        pytest.param({"scale": "x"}, TypeError, "scale | number", id="scale"),
        pytest.param({"causal": 1}, TypeError, "causal | 1", id="causal"),
        pytest.param({"key_offset": 1.5}, TypeError, "key_offset | 1.5", id="key_offset"),
        pytest.param({"query_offset": 1.5}, TypeError, "query_offset", id="query_offset"),
        pytest.param({"key_chunk_size": 0}, ValueError, "key_chunk_size", id="key_chunk_size"),
        pytest.param({"compute_dtype": 7}, ValueError, "compute_dtype", id="compute_dtype"),
    ],
)
def test_stream_keywords(lib, keywords, error, told):
    q, k, v = tokens(lib).values()
    refused(error, told, lambda: OnlineAttention(q, **keywords).update(k, v))


@pytest.mark.parametrize("name", ["bias", "implementation", "progress"])
def test_stream_has_no(lib, name):
    with pytest.raises(TypeError, match=name):
        OnlineAttention(array(lib, Q), **{name: None})
    with pytest.raises(TypeError, match="positional"):
        OnlineAttention(array(lib, Q), 0.5)


UPDATES = [
    ("width of value", {"value": ((2, 2, 7, 5),)}, ValueError, "value | d_v | 6 | 5"),
    ("width of key", {"key": ((2, 2, 7, 9),)}, ValueError, "key (2, 2, 7, 9) | width"),
    ("length", {"value": ((2, 2, 6, 6),)}, ValueError, "value (2, 2, 6, 6) | length"),
    ("integers", {"value": (V, int)}, TypeError, "value | int64"),
    ("dtype", {"key": (K, "float64")}, TypeError, "key | float64"),
    (
        "heads",
        {"key": ((2, 3, 7, 8),), "value": ((2, 3, 7, 6),)},
        ValueError,
        "key (2, 3, 7, 8) | multiple",
    ),
    (
        "batch",
        {"key": ((3, 2, 7, 8),), "value": ((3, 2, 7, 6),)},
        ValueError,
        "key (3, 2, 7, 8) | batch",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "error", "told"), [pytest.param(*case, id=name) for name, *case in UPDATES]
)
def test_stream_is_as_before_a_failed_update(lib, rng, stream, arguments, error, told):
    before = [lib.numpy(x) for x in stream.result(return_lse=True)]
    given = tokens(lib) | {name: array(lib, *recipe) for name, recipe in arguments.items()}
    refused(error, told, stream.update, given["key"], given["value"])
    for x, y in zip(stream.result(return_lse=True), before, strict=True):
        np.testing.assert_array_equal(lib.numpy(x), y)


def test_stream_counts_no_keys_of_a_failed_update(lib, rng):
    q, k, v = (lib.asarray(rng.standard_normal(shape)) for shape in (Q, K, V))
    results = []
    for fails in (False, True):
        stream = OnlineAttention(q, causal=True, query_offset=9).update(k, v)
        if fails:
            refused(ValueError, "length", stream.update, k, array(lib, (2, 2, 6, 6)))
            refused(ValueError, "d_v", stream.update, k, array(lib, (2, 2, 7, 5)))
        results.append(lib.numpy(stream.update(k, v).result()))
    np.testing.assert_array_equal(*results)


def test_stream_batch_that_cannot_join(lib):
    """Each chunk goes with the queries, but not with the other chunk."""
    stream = OnlineAttention(array(lib, (1, 4, 5, 8)))
    stream.update(array(lib, (2, 2, 7, 8)), array(lib, (2, 2, 7, 6)))
    before = lib.numpy(stream.result())
    key, value = array(lib, (3, 2, 7, 8)), array(lib, (3, 2, 7, 6))
    refused(ValueError, "batch | 2 | 3", stream.update, key, value)
    np.testing.assert_array_equal(lib.numpy(stream.result()), before)


@pytest.mark.parametrize(
    "keywords",
    [
        {"dropout": 0.5, "dropout_seed": 1},
        {"mask": chunkattn.masks.Predicate(lambda b, h, i, j: i + b > j)},
    ],
)
def test_stream_whose_batch_entries_are_counted(lib, keywords):
    """Their numbers would be others than before."""
    stream = OnlineAttention(array(lib, (1, 4, 5, 8)), **keywords)
    stream.update(array(lib, (1, 2, 7, 8)), array(lib, (1, 2, 7, 6)))
    key, value = array(lib, (3, 2, 7, 8)), array(lib, (3, 2, 7, 6))
    refused(ValueError, "must keep the batch axes", stream.update, key, value)


def other_stream(lib, q, k, v, **keywords):
    q, k, v = (array(lib, shape) for shape in (q, k, v))
    return OnlineAttention(q, **keywords).update(k, v)


@pytest.mark.parametrize("wrong", [None, 1.0, "stream", (1, 2)])
def test_stream_merge_of_what_is_no_stream(stream, wrong):
    refused(TypeError, f"other | OnlineAttention | {type(wrong).__name__}", stream.merge, wrong)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        pytest.param((Q, K, (2, 2, 7, 5)), "other | d_v | 6 | 5", id="d_v"),
        pytest.param(((2, 4, 3, 8), K, V), "other | n_q | 5 | 3", id="n_q"),
        pytest.param(((2, 2, 5, 8), K, V), "other | heads | 4 | 2", id="heads"),
        pytest.param(
            ((3, 4, 5, 8), (3, 2, 7, 8), (3, 2, 7, 6)), "other | batch | 2 | 3", id="batch"
        ),
    ],
)
def test_stream_merge_of_other_queries(lib, stream, other, told):
    before = lib.numpy(stream.result())
    refused(ValueError, told, stream.merge, other_stream(lib, *other))
    np.testing.assert_array_equal(lib.numpy(stream.result()), before)


def test_stream_merge_of_other_settings(lib, stream):
    q, k, v = (array(lib, (*s[:-2], s[-3], s[-1])) for s in ((2, 4, 4, 8), K, V))
    one, two = (OnlineAttention(q, layout=layout).update(k, v) for layout in ("hnd", "nhd"))
    refused(ValueError, "other | layout | hnd | nhd", one.merge, two)
    wide = other_stream(lib, Q, K, V, compute_dtype="float64")
    refused(ValueError, "other | float32 | float64", stream.merge, wide)


def test_empty_stream_takes_no_other_queries(lib):
    """What is refused after an update is refused before it."""
    other = other_stream(lib, (2, 4, 3, 8), K, V)
    refused(ValueError, "other | n_q | 5 | 3", OnlineAttention(array(lib, Q)).merge, other)


# An exception of a callable is the caller's own


class Mine(Exception):
    pass


def report_to(error, at):
    def progress(done, total):
        if done == at:
            raise error

    return progress


@pytest.mark.parametrize("kind", [Mine, KeyboardInterrupt])
def test_exception_of_progress(lib, kind):
    if not lib.eager:
        pytest.skip("progress is for eager calls")
    error = kind("stop")
    with pytest.raises(kind) as caught:
        attention(**tokens(lib), query_chunk_size=1, progress=report_to(error, at=3))
    assert caught.value is error
    out = attention(**tokens(lib), query_chunk_size=1)
    np.testing.assert_array_equal(lib.numpy(out), 1)


@pytest.mark.parametrize("from_main", [True, False], ids=["caller's thread", "worker"])
@pytest.mark.parametrize("kind", [Mine, KeyboardInterrupt])
def test_exception_of_progress_on_threads(kind, from_main):
    error, after = kind("stop"), []
    main = threading.main_thread()

    def progress(done, total):
        if after:
            after.append(done)
        elif (threading.current_thread() is main) is from_main:
            after.append(done)
            raise error
        else:
            time.sleep(0.001)

    q, k, v = np.ones((400, 8)), np.ones((7, 8)), np.ones((7, 8))
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        inside = state()
        with pytest.raises(kind) as caught:
            attention(q, k, v, query_chunk_size=1, progress=progress)
        assert caught.value is error
        assert state() == inside
    assert len(after) == 1, "a report after the exception"


def test_limits_are_held_by_the_last_caller():
    """A failing call beside one that goes on leaves the limits to it, and restores none early."""
    q, k, v = np.ones((8, 8)), np.ones((7, 8)), np.ones((7, 8))
    seen = []

    def outer(done, total):
        if done == 1:
            with pytest.raises(Mine):
                attention(q, k, v, query_chunk_size=1, progress=report_to(Mine(), at=2))
        seen.append(state()["BLAS threads"])

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        attention(q, k, v, query_chunk_size=1, progress=outer)
        assert state()["BLAS threads"] == [2] * len(blas())
    assert seen == [[1] * len(blas())] * 8
