"""What a call of attention will hold, before it is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isqrt, prod
from typing import Any

from ._adapters import adapter_of, is_array
from ._attention import bound
from ._choice import prepared
from ._comparison import Comparison, aligned
from ._memory import number_bytes, terms
from ._problem import TOKENS
from ._request import Request
from ._terms import Term, term, total

Array = Any

_MODULES = {"jax": "jax.numpy"}
PAPER_QUERIES, PAPER_KEYS = 1024, 4096


def plan(
    query: Any,
    key: Any,
    value: Any,
    *,
    training: bool = False,
    library: str | None = None,
    device: Any = None,
    **keywords: Any,
) -> Plan:
    """Tell how `attention` would compute a call, and what it would hold, term by term.

    Nothing is computed.  On JAX the call is compiled.

    Parameters
    ----------
    query, key, value : array or ArraySpec
        As in `attention`; or, all three, what has a shape and a dtype (`ArraySpec`,
        ``jax.ShapeDtypeStruct``).
    training : bool, default False
        Whether gradients by all floating arrays follow: by `attention_vjp` on libraries without
        automatic differentiation; on PyTorch by a `bias` only where that requires gradients.
    library : str, optional
        Where query, key and value are no arrays, their library: "numpy" (the default; "jax" for
        ``jax.ShapeDtypeStruct``), "cupy", "torch", "jax", …
    device : optional
        Where they are no arrays, their device, as the library's functions take it.
    **keywords
        Those of `attention`, `memory_limit` among them, with the same meaning.

    Returns
    -------
    Plan
        Chunk sizes, implementation and why, and the memory; its `peak_bytes` is an upper bound.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`.

    See Also
    --------
    attention : `memory_limit` there makes the tiles smaller.

    Notes
    -----
    Counted are the arrays of one call on finite numbers (a NaN or inf behind a mask takes another
    tile or two), and of one entry of `jax.vmap`; what functions of the caller (`score_mod`, a
    mask's function) hold inside is theirs, but for their results.  On a GPU what PyTorch's own
    kernels take for themselves is not known.  On a CPU, XLA's plan leaves out what its matrix
    products copy; that is a bound for two cores.

    Examples
    --------
    >>> from chunkattn import ArraySpec, plan
    >>> tokens = ArraySpec((1, 1_048_576, 64), "float32")
    >>> found = plan(tokens, tokens, tokens, query_chunk_size=512, key_chunk_size=1024)
    >>> found.terms[0]
    Term(name='scores', formula='threads × heads × query_chunk × key_chunk × 4 B', bytes=...)
    >>> plan(tokens, tokens, tokens, memory_limit="1MB").peak_bytes <= 1_000_000
    True
    """
    given, tokens = bound(query, key, value, keywords), (query, key, value)
    limit, return_lse = given.pop("memory_limit"), given.pop("return_lse")
    asked = {"return_lse": return_lse, "reports": given.pop("progress") not in (None, False)}
    for name, x in zip(TOKENS, tokens, strict=True):
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            raise TypeError(f"{name} must be an array or an ArraySpec; got {type(x).__name__}")
        if any(n < 0 for n in x.shape):
            raise ValueError(f"{name} must have axes of length 0 or more; got {tuple(x.shape)}")

    def planned(*tokens: Array) -> Plan:
        request, algorithm, why = prepared(tokens, given, limit, training, **asked)
        return _of_request(request, algorithm, why, training=training, return_lse=return_lse)

    if any(map(is_array, tokens)):
        return planned(*tokens)
    name = library or ("jax" if type(query).__module__.startswith("jax") else "numpy")
    module: Any = import_module(_MODULES.get(name, name)) if is_module(name) else None
    if not hasattr(module, "zeros"):
        raise ValueError(f"library must be the name of an array library; got {name!r}")
    like = module.zeros((), **({} if device is None else {"device": device}))
    xp = adapter_of(like, "library")
    specs = [(tuple(x.shape), _dtype(xp, x.dtype)) for x in tokens]
    found: Plan = xp.stand_in(planned, like, specs)
    return found


def is_module(name: Any) -> bool:
    """Whether `name` may be that of a module, as far as its letters tell."""
    return isinstance(name, str) and all(map(str.isidentifier, name.split(".")))


def _dtype(xp: Any, dtype: Any) -> Any:
    """Return a dtype by name, or of any library, as one of this library."""
    names = (getattr(dtype, word, None) for word in ("name", "__name__"))
    name = dtype if isinstance(dtype, str) else next(filter(None, names), str(dtype).split(".")[-1])
    floats = xp.floats
    if name not in floats:
        raise TypeError(f"dtype must be one of {', '.join(floats)}; got {dtype!r}")
    return floats[name]


def _of_request(
    request: Request, algorithm: Any, why: str, *, training: bool, return_lse: bool
) -> Plan:
    """Return the plan of a checked call."""
    xp, spec = request.xp, request.spec

    def arrays(found: dict[str, tuple[tuple[int, ...], Any]]) -> tuple[Term, ...]:
        return tuple(
            Term(name, " × ".join(map(str, (*shape, f"{size} B"))), prod(shape) * size)
            for name, (shape, dtype) in found.items()
            for size in [number_bytes(xp, dtype)]
        )

    inputs = {name: (tuple(x.shape), x.dtype) for name, x in request.inputs.items()}
    shapes = algorithm.shapes(spec, request.inputs)
    outputs = {name: shapes[name] for name in ("out", *(["lse"] if return_lse else []))}
    gradients = {f"gradient of {name}": x for name, x in inputs.items()} if training else {}
    if training:
        inputs["gradient of out"] = shapes["out"]
    kind = algorithm.kind(spec)
    tiled = kind == "chunked"
    tasks = spec.tasks if tiled else 1
    to_come = total(arrays(gradients))
    found = terms(request, algorithm, training=training, to_come=to_come)
    return Plan(
        library=xp.name,
        implementation=kind,
        why=why,
        query_chunk_size=spec.schedule.query_chunk if tiled else spec.n_q,
        key_chunk_size=spec.schedule.key_chunk if tiled else spec.n_k,
        tasks=tasks,
        threads=xp.at_once(tasks),
        inputs=arrays(inputs),
        outputs=arrays(outputs | gradients),
        terms=tuple(one for one in found if one.bytes),
        d_v=spec.d_v,
        all_heads=prod(spec.batch) * spec.heads,
        number=number_bytes(xp, spec.compute),
    )


@dataclass(frozen=True)
class Plan:
    """How a call will be computed, and what it will hold; `print` shows it as a table.

    Attributes
    ----------
    library : str
        The array library.
    implementation, why : str
        "chunked", "native" or "standard", and the reason.
    query_chunk_size, key_chunk_size : int
        Queries and keys of a tile; those of the call where there are no tiles.
    tasks, threads : int
        The parts that the work is cut into, and how many of them run at a time.
    inputs, outputs : tuple of Term
        The arrays that come in and go out; `outputs` has the gradients with ``training=True``.
    terms : tuple of Term
        What the call holds beyond these at its fullest moment.
    d_v, all_heads, number : int
        The width of values, the heads of all batch entries, and the bytes of a number in the
        compute dtype, as formulas have them.
    """

    library: str
    implementation: str
    why: str
    query_chunk_size: int
    key_chunk_size: int
    tasks: int
    threads: int
    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    terms: tuple[Term, ...]
    d_v: int
    all_heads: int
    number: int

    @property
    def peak_bytes(self) -> int:
        """The bytes that the call holds at its fullest moment, beyond inputs and outputs."""
        return total(self.terms)

    @property
    def heading(self) -> str:
        """What computes the call, and on which tiles: two lines."""
        return (
            f"attention on {self.library}: {self.implementation} ({self.why})\n"
            f"tiles of {self.query_chunk_size:,} queries × {self.key_chunk_size:,} keys, "
            f"{self.tasks:,} task{'s' * (self.tasks > 1)}, {self.threads} at a time"
        )

    def __str__(self) -> str:
        """Return a table."""
        rows = [("", "bytes", "formula")]
        for title, found in (("inputs", self.inputs), ("outputs", self.outputs)):
            rows += [(f"{title}: {one.name}", f"{one.bytes:,}", one.formula) for one in found]
        rows += [(one.name, f"{one.bytes:,}", one.formula) for one in self.terms]
        rows.append(("peak beyond inputs and outputs", f"{self.peak_bytes:,}", ""))
        return "\n".join([self.heading, "", *aligned(rows)])

    def compare(self, lengths: Sequence[int] | None = None) -> Comparison:
        """Set schedules of the same attention side by side, over lengths.

        Parameters
        ----------
        lengths : sequence of int, optional
            Numbers of keys, and of queries; default: powers of 2 from 1,024 to 1,048,576.

        Returns
        -------
        Comparison
            Bytes of scores, weights and summaries of: textbook attention, the schedule of Rabe &
            Staats with √n and with 4,096 keys to a chunk, and the tiles of this plan, where what
            they take does not grow with the lengths (it does with gradients, say, and with
            kernels).
        """
        chosen = [2**i for i in range(10, 21)] if lengths is None else list(lengths)
        if not chosen or not all(isinstance(n, int) and n > 0 for n in chosen):
            raise ValueError(f"lengths must be positive ints, one at least; got {lengths!r}")
        return Comparison(tuple(chosen), tuple(self._schedules(chosen)))

    def _schedules(self, lengths: Sequence[int]) -> Iterable[tuple[str, str, tuple[int, ...]]]:
        known = {"all_heads": self.all_heads, "d_v": self.d_v}

        def column(name: str, count: Any) -> tuple[str, str, tuple[int, ...]]:
            found = [count(n) for n in lengths]
            return name, found[-1].formula, tuple(one.bytes for one in found)

        def textbook(n: int) -> Term:
            return term(known | {"n": n}, "", "all_heads", "n", "n", number=self.number)

        def stacked(n: int, keys: int, told: str) -> Term:
            rows, keys = min(PAPER_QUERIES, n), min(keys, n)
            summaries = -(-n // keys) * (self.d_v + 2)
            size = self.all_heads * rows * (keys + summaries) * self.number
            formula = f"all_heads × min(n, {PAPER_QUERIES}) × ({told} + n / ({told}) × (d_v + 2))"
            return Term("", f"{formula} × {self.number} B", size)

        yield column("textbook", textbook)
        most = f"min(n, {PAPER_KEYS})"
        yield column("paper, √n keys", lambda n: stacked(n, isqrt(n - 1) + 1, "√n"))
        yield column(f"paper, {PAPER_KEYS} keys", lambda n: stacked(n, PAPER_KEYS, most))
        if self.implementation == "chunked" and not any(map(_grows, self.terms)):
            peak = Term("", "the peak of their terms", self.peak_bytes)
            yield column("these tiles", lambda n: peak)


def _grows(term: Term) -> bool:
    """Whether a term's size depends on the lengths."""
    return bool({"n_q", "n_k"} & set(term.formula.split()))
