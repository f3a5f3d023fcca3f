"""Memory that does not grow with n_q · n_k, traces that do not grow at all, tiles left out."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from importlib import import_module

import libraries
import numpy as np
import plans
import pytest
from memory import extra_bytes, tokens

from chunkattn import attention
from chunkattn._adapters import adapter_of
from chunkattn.masks import Causal

SIZES = {"query_chunk_size": 256, "key_chunk_size": 512}
default = partial(attention, implementation="chunked", return_lse=True)
chunked = partial(default, **SIZES)
standard = partial(attention, implementation="standard", return_lse=True)


@pytest.mark.feature("memory that does not grow with the length")
def test_memory_does_not_grow(lib):
    """A twentieth of the textbook's, and no more at twice that length.

    A tile of the library's own size may have all of the shortest call's queries.  On a GPU XLA's
    products take 32 MiB for themselves.
    """
    n = 16384 if lib.name in libraries.GPU else 2048
    short, long, longer = (tokens(lib, size) for size in (n, 2 * n, 4 * n))
    extra = extra_bytes(lib, chunked, *short)
    assert 20 * extra < extra_bytes(lib, standard, *short)
    assert extra_bytes(lib, chunked, *long) <= 1.02 * extra
    assert extra_bytes(lib, default, *longer) <= 1.02 * extra_bytes(lib, default, *long)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_a_million_keys(name, rng):
    """Right on queries that are looked at in float64, in the memory of a short call."""
    lib = libraries.library(name)
    arrays = tokens(lib, 4096, 2**20)
    extra = extra_bytes(lib, chunked, *arrays)
    assert extra <= 1.02 * extra_bytes(lib, chunked, *tokens(lib, 4096, 2**13))
    out, lse = (lib.numpy(x) for x in chunked(*arrays))
    query, key, value = map(lib.numpy, arrays)
    chosen = [0, 1, 2047, 4095]
    scores = query[chosen] @ key.T / np.sqrt(query.shape[-1])
    known = np.logaddexp.reduce(scores, axis=-1)
    np.testing.assert_allclose(lse[chosen], known, rtol=1e-6)
    expected = np.exp(scores - known[:, None]) @ value
    np.testing.assert_allclose(out[chosen], expected, atol=1e-6)


def test_memory_of_threads():
    """Each of NumPy's threads has a tile of its own, and no more than that."""
    lib = libraries.library("numpy")
    arrays = tokens(lib, 4096)
    one, two = (extra_bytes(lib, chunked, *arrays, threads=n) for n in (1, 2))
    assert two <= 2.1 * one
    assert 20 * two < extra_bytes(lib, standard, *arrays)


@pytest.mark.feature("mask arrays are never expanded")
def test_mask_is_not_expanded(lib, rng):
    n = 4096 if lib.name in libraries.GPU else 2048  # XLA has more arrays of a tile there
    arrays = tokens(lib, n)
    plain = extra_bytes(lib, chunked, *arrays)
    for rows in (1, n):
        mask = lib.asarray(rng.random((rows, n)) < 0.5)
        assert extra_bytes(lib, chunked, *arrays, mask=mask) - plain < n * n / 4, rows


def widened(lib, dtype):
    """Return the bytes that a call needs with long `dtype` keys, and those of one float32 copy."""
    arrays = tokens(lib, 64, 65536, dtype)
    return extra_bytes(lib, chunked, *arrays), 4 * 65536 * 64


@pytest.mark.feature("half precision is widened tile by tile (not bfloat16 by XLA on CPU)")
def test_half_precision_is_widened_by_tile(lib):
    halves = set(lib.dtypes) & {"float16", "bfloat16"}
    if lib.name in ("jax", "jax-jit"):
        halves.discard("bfloat16")  # see below
    for dtype in halves:
        extra, copy = widened(lib, dtype)
        assert extra < copy / 2, dtype


def test_bfloat16_is_widened_by_tile_in_jax(jax, request):
    if jax.default_backend() == "cpu":
        reason = "XLA for CPU slices no bfloat16: it widens the whole array"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    extra, copy = widened(libraries.library("jax"), "bfloat16")
    assert extra < copy / 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["cupy", "torch-cuda"])
def test_prediction_on_a_gpu(name, training):
    """Of tiles: what PyTorch's kernels for CUDA take for themselves is not known."""
    if not libraries.present(name):
        pytest.skip(f"{name} finds no device")
    lib = libraries.library(name)
    for case in plans.cases(lib):
        if not case.startswith("auto"):
            found = plans.Case(lib, case, training)
            measured, predicted = found.measured(), found.plan().peak_bytes
            assert measured <= predicted <= 1.25 * measured, case


# Invisible tiles: the calls of the verbs, which each tile makes.


@pytest.fixture
def count(lib, monkeypatch):
    """Return a function that calls `attention` and says how often each verb ran."""
    adapter = type(adapter_of(lib.asarray(np.zeros((1, 1))), "x"))
    calls = []

    def counted(verb):
        plain = getattr(adapter, verb)

        def counting(self, *args, **kwargs):
            if lib.name.startswith("jax"):
                import jax

                jax.debug.callback(lambda: calls.append(verb))
            else:
                calls.append(verb)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(adapter, verb, counting)

    def run(*args, **kwargs):
        calls.clear()
        results = lib.call(chunked, *args, **kwargs)
        lib.numpy(results[0])
        if lib.name.startswith("jax"):
            import jax

            jax.effects_barrier()
        return {verb: calls.count(verb) for verb in ("weigh", "hide")}

    with libraries.compilations_of_its_own(lib):
        for verb in ("weigh", "hide"):
            counted(verb)
        yield run


ROWS, COLS = 8, 16  # the chunks
RAGGED, EVEN = (37, 53), (40, 64)  # n_q and n_k


def visible(lengths, first, last):
    """Return how many tiles a causal call sees, and how many of them in part.

    `first` and `last` are the smallest and the largest position of query 0 less that of key 0.
    """
    n_q, n_k = lengths
    seen = partly = 0
    for row in range(0, n_q, ROWS):
        for col in range(0, n_k, COLS):
            if col <= min(row + ROWS, n_q) - 1 + last:
                seen += 1
                partly += min(col + COLS, n_k) - 1 > row + first
    return seen, partly


def test_the_count_of_tiles():
    assert visible(RAGGED, 1000, 1000) == visible(EVEN, 1000, 1000) == (20, 0)
    assert visible(RAGGED, -1000, -1000) == visible(EVEN, -1000, -1000) == (0, 0)
    assert visible(RAGGED, 0, 0) == visible(EVEN, 0, 0) == (1 + 1 + 2 + 2 + 3, 5)


@pytest.fixture(params=[RAGGED, EVEN], ids=["ragged", "even"])
def check_tiles(lib, count, rng, request):
    """Check how many tiles a causal call computes, and how many of them it masks.

    A last chunk that is shorter may be masked although all see it.
    """
    lengths = request.param
    n_q, n_k = lengths
    shapes = (2, 2, n_q, 8), (2, 2, n_k, 8), (2, 2, n_k, 8)
    arrays = [lib.asarray(rng.standard_normal(shape)) for shape in shapes]
    sizes = {"query_chunk_size": ROWS, "key_chunk_size": COLS}
    each, rest = divmod(count(*arrays, **sizes)["weigh"], 20)
    assert each > 0
    assert rest == 0

    def check(first, last, all_masked=False, **kwargs):
        calls = count(*arrays, **sizes, **kwargs)
        seen, partly = visible(lengths, first, last)
        masked = seen if all_masked else partly
        assert calls["weigh"] == each * seen, kwargs
        most = seen if lengths == RAGGED else masked
        assert masked <= calls["hide"] <= most, kwargs

    check.lengths = lengths
    return check


@pytest.mark.feature("invisible tiles are skipped")
def test_causal_tiles(lib, check_tiles):
    for offset in (0, 7, -5, 1000, -1000) if lib.eager else (7,):  # each is compiled anew there
        check_tiles(offset, offset, causal=True, query_offset=offset)
    check_tiles(7, 7, mask=Causal(), query_offset=20, key_offset=13)


@pytest.mark.feature("invisible tiles are skipped")
def test_causal_tiles_with_offsets_by_batch(lib, check_tiles):
    for first, last in ((-5, 16), (-1000, -900), (900, 1000)):
        check_tiles(first, last, causal=True, query_offset=lib.asarray(np.asarray([last, first])))


@pytest.mark.feature("invisible tiles are skipped")
def test_tiles_of_a_boolean_array(lib, check_tiles):
    """What it leaves empty at either end of the keys; where it is traced, all others are masked."""
    n_q, n_k = check_tiles.lengths
    allowed = np.tri(n_q, n_k, 7, dtype=bool)
    all_masked = lib.name.startswith("jax")
    for shape in ((n_q, n_k), (2, 1, n_q, n_k), (2, n_q, n_k)):
        mask = lib.asarray(np.broadcast_to(allowed, shape))
        check_tiles(7, 7, all_masked, mask=mask)
    check_tiles(-1000, -1000, all_masked, mask=lib.asarray(np.zeros((2, 1, 1, n_k), bool)))


def looks(lib):
    """Whether masks without a range are looked at tile by tile: on CPUs, by these libraries."""
    known = lib.name.startswith(("numpy", "torch", "jax"))
    return known and not lib.name.endswith("cuda")


@pytest.mark.feature("invisible tiles are skipped")
def test_tiles_of_a_function(lib, check_tiles):
    """Where values are at hand: what it leaves empty is seen tile by tile."""
    end = 7 if looks(lib) else 1000  # of what may be left out
    check_tiles(end, end, all_masked=True, mask=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + 7)


@pytest.mark.feature("invisible tiles are skipped")
def test_tiles_between_others(lib, count, rng):
    """Likewise those that a boolean array leaves empty between others, but where it is traced."""
    x = lib.asarray(rng.standard_normal((EVEN[1], 8)))
    allowed = np.ones((EVEN[1], EVEN[1]), bool)
    allowed[:, COLS : 3 * COLS] = False
    every = count(x, x, x, key_chunk_size=COLS)["weigh"]
    calls = count(x, x, x, mask=lib.asarray(allowed), key_chunk_size=COLS)
    looked_at = looks(lib) and not lib.name.startswith("jax")
    assert calls["weigh"] == every // (2 if looked_at else 1)


# JAX: traces and compilations.


@pytest.fixture(scope="module")
def jax():
    libraries.library("jax")
    return pytest.importorskip("jax")


def equations(jaxpr):
    """Count the equations of a jaxpr and of all those inside."""
    import jax

    count = 0
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
        inner = (getattr(part, "jaxpr", part) for part in parts if _is_jaxpr(part))
        count += 1 + sum(map(equations, inner))
    return count


def _is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


KINDS = {
    "plain": lambda n: {},
    "causal": lambda n: {"causal": True},
    "masked": lambda n: {"mask": (n, n)},
    "causal and masked": lambda n: {"causal": True, "mask": (2, 1, 1, n)},
    "offset": lambda n: {"causal": True, "query_offset": ()},
    "offset by batch": lambda n: {"causal": True, "query_offset": (2,)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_trace_does_not_grow(jax, kind):
    """Lengths that no chunk divides, so that the last chunks are in each."""

    def size(n):
        kinds = {"mask": bool, "query_offset": int}
        given = KINDS[kind](n)
        arrays = {
            name: jax.ShapeDtypeStruct(given.pop(name), dtype)
            for name, dtype in kinds.items()
            if name in given
        }
        query = jax.ShapeDtypeStruct((2, 4, n, 8), np.float32)
        key = jax.ShapeDtypeStruct((2, 2, n, 8), np.float32)
        function = partial(chunked, **given, query_chunk_size=64, key_chunk_size=32)
        trace = jax.make_jaxpr(lambda q, k, v, arrays: function(q, k, v, **arrays))
        return equations(trace(query, key, key, arrays).jaxpr)

    short, *longer = (size(n) for n in (201, 2001, 20001))
    assert short > 0
    assert longer == [short, short]


def test_memory_does_not_grow_in_jax(jax):
    lib = libraries.library("jax")
    for given in ({}, {"causal": True}):
        extra = {extra_bytes(lib, chunked, *tokens(lib, n), **given) for n in (4096, 8192, 16384)}
        assert len(extra) == 1


def test_one_compilation_for_calls_alike(jax, caplog, rng):
    lib = libraries.library("jax")

    def compilations(**kwargs):
        arrays = [lib.asarray(rng.standard_normal((3, n, 8))) for n in (19, 29, 29)]
        caplog.clear()
        with jax.log_compiles():
            chunked(*arrays, causal=True, query_chunk_size=8, key_chunk_size=8, **kwargs)
        return [r.message for r in caplog.records if r.message.startswith("Compiling")]

    compilations(query_offset=10, softcap=1.0)  # and whatever a first call needs
    assert len(compilations(query_offset=10)) == 1
    assert compilations(query_offset=10) == []
    assert compilations(query_offset=3) == []
    assert compilations(query_offset=-4, key_offset=2) == []
    assert compilations(query_offset=10, scale=0.5) == []
    assert compilations(query_offset=10, scale=2) == []
    assert len(compilations(query_offset=10, softcap=2.0)) == 1


def test_one_compilation_within_a_limit(jax, caplog, rng):
    """Planning compiles, too, and offsets and scale are data to that."""
    x = libraries.library("jax").asarray(rng.standard_normal((3, 40, 8)))

    def compilations(offset, scale):
        caplog.clear()
        with jax.log_compiles():
            chunked(x, x, x, causal=True, query_offset=offset, scale=scale, memory_limit="1MB")
        return [r.message for r in caplog.records if r.message.startswith("Compiling")]

    assert compilations(3, 0.5)
    assert compilations(4, 0.25) == []


def test_one_compilation_for_functions_alike(jax, caplog, rng):
    """Functions that are written anew, and capture other arrays; not those that do otherwise."""
    lib = libraries.library("jax")
    tokens = [rng.standard_normal((3, n, 8)) for n in (19, 29, 29)]
    distance = np.arange(29) - np.arange(19)[:, None]

    def compilations(**kwargs):
        arrays = [lib.asarray(x) for x in tokens]
        told = {"query_chunk_size": 8, "key_chunk_size": 8, "query_offset": 0}
        caplog.clear()
        with jax.log_compiles():
            out, _ = chunked(*arrays, **kwargs, **told)
        found = [r.message for r in caplog.records if r.message.startswith("Compiling")]
        return out, found

    def call(slopes, reach):
        slopes = lib.asarray(slopes)
        out, found = compilations(
            mask=lambda b, h, i, j: j - i < reach,
            score_mod=lambda score, b, h, i, j: score + slopes[h] * (j - i),
        )
        bias = np.where(distance < reach, np.asarray(slopes)[:, None, None] * distance, -np.inf)
        expected, _ = chunked(*(lib.asarray(x) for x in tokens), bias=lib.asarray(bias))
        np.testing.assert_allclose(out, expected, atol=1e-5)
        return len(found)

    first, other = np.asarray([0.1, 0.2, 0.3]), np.asarray([-0.4, 0.5, 0.0])
    call(first, 3)  # and whatever a first call needs
    assert call(first, 4) == 1
    assert call(first, 4) == 0
    assert call(other, 4) == 0
    assert call(other, 3) == 0
    near = np.nextafter(np.float32(0.5), np.float32(1))
    scaled = [lambda score, *_, by=by: score * jax.numpy.float32(by) for by in (0.5, near, 0.5)]
    assert [len(compilations(score_mod=f)[1]) for f in scaled] == [1, 1, 0]


def test_functions_alike_that_are_not(jax, rng):
    """Arrays inside of a compiled function are not in the text of a trace."""
    lib = libraries.library("jax")
    q, k, v = (lib.asarray(rng.standard_normal((3, n, 8))) for n in (19, 29, 29))
    for slopes in ([0.1, 0.2, 0.3], [-0.4, 0.5, 0.0]):
        held = lib.asarray(np.asarray(slopes))
        inner = jax.jit(lambda h, j, held=held: held[h] * j)
        out = attention(q, k, v, score_mod=lambda s, b, h, i, j, f=inner: s + f(h, j))
        bias = held[:, None, None] * jax.numpy.arange(29)
        np.testing.assert_allclose(out, attention(q, k, v, bias=bias), atol=1e-5)


def test_functions_alike_with_keys(jax, rng):
    """A key of random numbers is data, and within a compiled function it is not told, either."""
    lib = libraries.library("jax")
    q, k, v = (lib.asarray(rng.standard_normal((3, n, 8))) for n in (19, 29, 29))

    def noise(key, n):
        return jax.random.normal(jax.random.fold_in(key, n), ())

    def call(f):
        return attention(q, k, v, score_mod=lambda s, b, h, i, j: s * f(0))

    for number in (1, 2):
        key = jax.random.key(number)
        expected = attention(q, k, v, scale=float(noise(key, 0)) * 8**-0.5)
        for f in (partial(noise, key), jax.jit(partial(noise, key))):
            np.testing.assert_allclose(call(f), expected, atol=1e-5)


def test_functions_with_shardings_are_not_alike(jax):
    """Their text names a mesh's axes, and not its devices."""
    from jax.sharding import NamedSharding, PartitionSpec

    lift = import_module("chunkattn.backends.jax_lifted").lift
    place = NamedSharding(jax.make_mesh((1,), ("b",)), PartitionSpec())
    example = [(jax.ShapeDtypeStruct((2, 3), np.float32),)]
    assert lift(lambda s: 2 * s, example)[0] == lift(lambda s: 2 * s, example)[0]
    placed = [lift(lambda s: jax.lax.with_sharding_constraint(s, place), example) for _ in "ab"]
    assert placed[0][0] != placed[1][0]
    assert not placed[0][0].reusable


def test_captured_arrays_do_not_outlive_a_call(jax, rng):
    lib = libraries.library("jax")
    q, k, v = (lib.asarray(rng.standard_normal((3, n, 8))) for n in (19, 29, 29))

    def call():
        held = lib.asarray(rng.standard_normal(3))
        attention(q, k, v, score_mod=lambda score, b, h, i, j: score + held[h])
        return weakref.ref(held)

    gone = call()
    gc.collect()
    assert gone() is None
