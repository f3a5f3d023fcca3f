"""What the benchmark asks of an array library, and the libraries that are there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ._bench_case import Case

Array = Any

# Each with its module and class; the first part of the name is what has to be installed.
LIBRARIES = {
    "numpy": ("_bench_numpy", "NumPy"),
    "torch": ("_bench_torch", "Torch"),
    "torch-cuda": ("_bench_torch", "TorchCuda"),
    "jax": ("_bench_jax", "Jax"),
    "jax-cuda": ("_bench_jax", "JaxCuda"),
    "cupy": ("_bench_numpy", "CuPy"),
}
PEERS = ("textbook", "sdpa", "flex", "jax.nn", "memory-efficient")


class NotApplicableError(Exception):
    """What keeps a way from a case: a row that is not there, and no failure."""


def there(result: Any) -> Any:
    """Return a result that is there once it is returned."""
    return result


def unmeasured() -> int | None:
    """Return that nothing tells the memory."""
    return None


@dataclass(frozen=True)
class Way:
    """One way to compute a case, ready to be called.

    Attributes
    ----------
    call : callable
        Computes, or has a device begin to.
    fetch : callable
        From the result to NumPy arrays: the output, or the three gradients, of (1, h, n, d).
    memory : callable
        Bytes that one call holds at its peak beyond inputs and result; None where unknown.
    context : callable
        The context that calls are made in; to enter it is not timed.
    wait : callable
        Returns the result of a call once it is there.
    """

    call: Callable[[], Any]
    fetch: Callable[[Any], list[Array]]
    memory: Callable[[], int | None] = unmeasured
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    wait: Callable[[Any], Any] = there


class Candidate(NamedTuple):
    """A way that may turn out not to apply."""

    name: str
    make: Callable[[], Way]
    ours: bool = False
    score_arrays: int = 0  # how many arrays of all scores it holds at a time


class Gemm(NamedTuple):
    """The product of two square matrices, which is the limit."""

    call: Callable[[], Any]
    operations: float
    wait: Callable[[Any], Any] = there


class Library(ABC):
    """An array library on one device; making one raises ImportError where it is not there."""

    device = "cpu"
    queues = False  # whether a call returns before its result is there, so that others may follow

    @abstractmethod
    def candidates(self, case: Case, implementations: tuple[str, ...]) -> Iterator[Candidate]:
        """Yield chunkattn in its implementations, then the peers, named by `PEERS`."""

    @abstractmethod
    def gemm(self, dtype: str) -> Gemm:
        """Return the product that tells this device's rate."""

    def active(self, dtype: str) -> AbstractContextManager[Any]:
        """Return the context that everything of `dtype` happens in."""
        return nullcontext()

    def free_memory(self) -> int | None:
        """Return how many bytes can still be allocated, None where nothing tells."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        found = [line.split()[1] for line in lines if line.startswith("MemAvailable")]
        return int(found[0]) * 1024 if found else None


def make(name: str) -> Library:
    """Return the library of that name; ImportError where it, or its device, is not there."""
    module, cls = LIBRARIES[name]
    library: Library = getattr(import_module(f".{module}", __package__), cls)()
    return library


def textbook(xp: Any, softmax: Callable[[Array], Array], case: Case) -> Callable[..., Array]:
    """Return textbook attention for arrays (1, h, n, d) as its few lines in any library.

    `visible` is the causal mask, or None.
    """
    scale = case.d**-0.5

    def attend(query: Array, key: Array, value: Array, visible: Array | None) -> Array:
        grouped = split(query, case)
        scores = grouped @ split_keys(key, case).swapaxes(-1, -2) * scale
        if visible is not None:
            scores = xp.where(visible, scores, -xp.inf)
        return (softmax(scores) @ split_keys(value, case)).reshape(query.shape)

    return attend


def nbytes(result: list[Array]) -> int:
    """Return the size of the arrays of a result."""
    return sum(int(x.nbytes) for x in result)


def split(x: Array, case: Case) -> Array:
    """Return (1, h, n, d) as (1, h_k, h / h_k, n, d), where heads are grouped."""
    if not case.grouped:
        return x
    return x.reshape(1, case.key_heads, case.heads // case.key_heads, *x.shape[-2:])


def split_keys(x: Array, case: Case) -> Array:
    """Return (1, h_k, n, d) as (1, h_k, 1, n, d), where heads are grouped."""
    return x[:, :, None] if case.grouped else x


def memory_efficient() -> Any:
    """Return the package memory-efficient-attention, None where it does not import."""
    try:
        return import_module("memory_efficient_attention")
    except Exception:  # it needs JAX and PyTorch both
        return None


def causal_chunks(arange: Callable[[int], Array]) -> Callable[..., Array]:
    """Return the causal mask as memory-efficient-attention calls it for each of its chunks.

    A mask as an array costs it n², and fails on JAX where there is no bias (in 0.1.3).
    """

    def visible(query_offset: Any, key_offset: Any, _: Any, scores: Array, __: Any) -> Array:
        n_q, _heads, n_k = scores.shape[-3:]
        queries, keys = arange(n_q) + query_offset, arange(n_k) + key_offset
        return (queries[:, None] >= keys)[None, None]

    return visible


def check_memory_efficient(case: Case) -> None:
    """Refuse what memory-efficient-attention cannot do."""
    if case.grouped:
        raise NotApplicableError("it has no grouped heads")
    for n, chunk in ((case.n_q, 1024), (case.n_k, 4096)):  # its defaults
        if n > chunk and n % chunk:
            raise NotApplicableError(f"its chunks of {chunk} do not divide {n}")
