"""From what a caller passed to a checked `Spec` and its arrays."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields, replace
from typing import Any

from ._adapters import common_adapter, is_array
from ._dropout import seed_words
from ._spec import Spec, schedule
from .masks import Causal, Dense, Mask, Predicate

Array = Any

IMPLEMENTATIONS = ("auto", "chunked", "native", "standard")
LAYOUTS = ("hnd", "nhd")


@dataclass(frozen=True)
class Request:
    """A checked call: the adapter, what is asked for, and the arrays by argument name."""

    xp: Any
    spec: Spec
    arrays: dict[str, Any]


def make_request(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: Any,
    causal: bool,
    mask: Any,
    bias: Array | None,
    softcap: float | None,
    score_mod: Any,
    sinks: Array | None,
    dropout: float,
    dropout_seed: Any,
    query_offset: Any,
    key_offset: Any,
    layout: str,
    query_chunk_size: int | None,
    key_chunk_size: int | None,
    compute_dtype: Any,
    implementation: str,
    partial: bool = False,
) -> Request:
    """Check every argument of `attention` and put the call into its canonical form."""
    choice("layout", layout, LAYOUTS)
    choice("implementation", implementation, IMPLEMENTATIONS)
    masks = _masks(causal, mask)
    if partial and not all(m.positional for m in masks):
        raise ValueError(
            "mask must speak of positions in a stream, whose length is not known: "
            "an array of pairs cannot be given"
        )
    tokens = {"query": query, "key": key, "value": value}
    extra = [("bias", bias), ("sinks", sinks), ("scale", scale), ("dropout_seed", dropout_seed)]
    extra += [("query_offset", query_offset), ("key_offset", key_offset)]
    extra += [("mask", x) for m in masks for x in _held(m).values()]
    xp = common_adapter([*tokens.items(), *((name, x) for name, x in extra if is_array(x))])
    shapes = _shapes(tokens, layout)
    dtype = _common_dtype(xp, tokens)
    compute = _compute_dtype(xp, dtype, compute_dtype)
    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"score_mod must be callable; got {score_mod!r}")
    _check_floats(xp, "bias", bias, shapes.scores)
    _check_floats(xp, "sinks", sinks, (shapes.heads,), exact=True)
    for one in masks:
        one.check(xp, shapes)
    offset = _query_offset(xp, query_offset, shapes, masks, streamed=partial)
    key_offset = index("key_offset", key_offset, xp)
    for name, first, n in (
        ("query_offset", offset, shapes.n_q),
        ("key_offset", key_offset, shapes.n_k),
    ):
        _check_positions(xp, name, first, n)
    lead = (*shapes.batch, shapes.key_heads)
    group = shapes.heads // shapes.key_heads if shapes.key_heads else 1
    spec = Spec(
        **vars(shapes),
        layout=layout,
        dtype=dtype,
        compute=compute,
        softcap=_softcap(xp, softcap, compute),
        score_mod=score_mod,
        dropout=_dropout(dropout, dropout_seed),
        masks=tuple(replace(m, **dict.fromkeys(_held(m))) for m in masks),
        schedule=schedule(
            xp,
            lead,
            group,
            shapes.n_q,
            shapes.n_k,
            positive("query_chunk_size", query_chunk_size),
            positive("key_chunk_size", key_chunk_size),
            masks,
        ),
        standard=_standard(implementation),
        partial=partial,
    )
    arrays = {
        **tokens,
        "scale": _scale(xp, scale, query.shape[-1], compute),
        "masks": tuple(_held(m) for m in masks),
        "query_offset": offset,
        "key_offset": key_offset,
        "dropout_seed": _seed(xp, dropout_seed),
    }
    arrays |= {name: x for name, x in (("bias", bias), ("sinks", sinks)) if x is not None}
    return Request(xp, spec, arrays)


@dataclass(frozen=True)
class Shapes:
    """The sizes that the shapes of query, key and value agree on."""

    batch: tuple[int, ...]
    heads: int
    key_heads: int
    n_q: int
    n_k: int
    d_v: int
    headless: bool

    @property
    def scores(self) -> tuple[int, ...]:
        """The shape that bias and masks broadcast to, as the caller sees it."""
        pairs = (self.n_q, self.n_k)
        return pairs if self.headless else (*self.batch, self.heads, *pairs)

    def check_mask(self, xp: Any, name: str, x: Array) -> None:
        """Refuse a mask array that is not boolean or does not broadcast to the scores."""
        if not hasattr(x, "dtype") or not xp.is_bool(x.dtype):
            raise TypeError(
                f"{name} must be a boolean array (True = may attend); got "
                f"{getattr(x, 'dtype', type(x).__name__)} (a float array that is added to the "
                "scores is a bias)"
            )
        _check_broadcasts(name, x, self.scores)

    def check_integers(
        self, xp: Any, name: str, x: Array, shape: tuple[int, ...], last: int | None = None
    ) -> None:
        """Refuse an array that holds no integers, or does not broadcast to `shape`.

        Where `last` is given, the last axis must have that length.
        """
        if not xp.is_integer(x.dtype):
            raise TypeError(f"{name} must be an integer array; got {x.dtype}")
        if last is not None and (not x.shape or x.shape[-1] != last):
            raise ValueError(
                f"{name} must have shape (…, {last}), one for each; got {tuple(x.shape)}"
            )
        _check_broadcasts(name, x, shape)


def _shapes(tokens: dict[str, Array], layout: str) -> Shapes:
    shapes = {name: tuple(x.shape) for name, x in tokens.items()}
    told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    ranks = {len(shape) for shape in shapes.values()}
    if min(ranks) < 2 or (2 in ranks and len(ranks) > 1):
        raise ValueError(
            "query, key and value must all be (n, d), or all have a head axis, "
            f"as (…, h, n, d) in layout 'hnd' and (…, n, h, d) in layout 'nhd'; got {told}"
        )
    headless = ranks == {2}
    n, h = (-2, -3) if layout == "hnd" else (-3, -2)
    if headless:
        shapes = {name: (1, *shape) for name, shape in shapes.items()}
        n, h = -2, -3
    q, k, v = shapes.values()
    if q[-1] != k[-1]:
        raise ValueError(f"query and key must have the same width d (last axis); got {told}")
    if k[n] != v[n] or k[h] != v[h]:
        raise ValueError(
            f"key and value must have the same length n_k and the same number of heads; got {told}"
            f" in layout {layout!r}"
        )
    if q[h] != k[h] and (k[h] == 0 or q[h] % k[h]):
        raise ValueError(
            f"the heads of query ({q[h]}) must be a multiple of those of key and value ({k[h]}); "
            f"got {told} in layout {layout!r}"
        )
    batch = broadcast([shape[:-3] for shape in shapes.values()])
    if batch is None:
        raise ValueError(f"the batch axes of query, key and value do not broadcast; got {told}")
    return Shapes(batch, q[h], k[h], q[n], k[n], v[-1], headless)


def broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape that `shapes` broadcast to; None where they do not."""
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True)
    sizes = [{n for n in column if n != 1} for column in columns]
    return None if any(len(s) > 1 for s in sizes) else tuple(min(s, default=1) for s in sizes)


def _common_dtype(xp: Any, tokens: dict[str, Array]) -> Any:
    allowed = xp.floats
    for name, x in tokens.items():
        if not any(x.dtype == dtype for dtype in allowed.values()):
            raise TypeError(f"{name} must be one of {', '.join(allowed)}; got {x.dtype}")
    dtype = tokens["query"].dtype
    if any(x.dtype != dtype for x in tokens.values()):
        told = ", ".join(f"{name} {x.dtype}" for name, x in tokens.items())
        raise TypeError(f"query, key and value must have one dtype; got {told}")
    return dtype


def _compute_dtype(xp: Any, dtype: Any, wanted: Any) -> Any:
    floats = xp.floats
    if wanted is None:
        return dtype if dtype == floats.get("float64") else floats["float32"]
    for name in ("float32", "float64"):
        if name in floats and (wanted == name or floats[name] == wanted):
            return floats[name]
    offered = " or ".join(name for name in ("float32", "float64") if name in floats)
    raise ValueError(
        f"compute_dtype must be None or {offered} for these {xp.name} arrays; got {wanted!r}"
    )


def _masks(causal: bool, mask: Any) -> tuple[Mask, ...]:
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False; got {causal!r}")
    given = mask if isinstance(mask, tuple) else () if mask is None else (mask,)
    masks: list[Mask] = [Causal()] if causal else []
    for one in given:
        if isinstance(one, type):
            raise TypeError(f"mask must be a mask, not the class {one.__name__}: call it first")
        if isinstance(one, Mask):
            masks.append(one)
        elif is_array(one):
            masks.append(Dense(one))
        elif callable(one):
            masks.append(Predicate(one))
        else:
            raise TypeError(
                "mask must be a boolean array (True = may attend), a mask of chunkattn.masks, a "
                f"callable mask_mod(b, h, q_idx, kv_idx), or a tuple of these; got {one!r}"
            )
    return tuple(masks)


def _held(mask: Mask) -> dict[str, Array]:
    """Return the arrays that a mask holds, by field name."""
    values = ((field.name, getattr(mask, field.name)) for field in fields(mask))
    return {name: x for name, x in values if is_array(x)}


def _check_floats(
    xp: Any, name: str, x: Array | None, shape: tuple[int, ...], exact: bool = False
) -> None:
    if x is None:
        return
    if not is_array(x):
        raise TypeError(f"{name} must be an array; got {x!r}")
    if not any(x.dtype == dtype for dtype in xp.floats.values()):
        raise TypeError(f"{name} must be one of {', '.join(xp.floats)}; got {x.dtype}")
    if exact and tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(x.shape)}")
    _check_broadcasts(name, x, shape)


def _check_broadcasts(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if broadcast([tuple(x.shape), shape]) != shape:
        raise ValueError(f"{name} must broadcast to {shape}; got shape {tuple(x.shape)}")


def _scale(xp: Any, scale: Any, d: int, compute: Any) -> Any:
    if scale is None:
        return 1.0 / math.sqrt(d) if d else 1.0
    if is_array(scale):
        if tuple(scale.shape) != () or not any(scale.dtype == t for t in xp.floats.values()):
            raise TypeError(
                "scale must be a number or a floating array without axes; "
                f"got {scale.dtype} of shape {tuple(scale.shape)}"
            )
        return scale
    return _number("scale", scale, xp.finfo(compute).max)


def _softcap(xp: Any, softcap: Any, compute: Any) -> float | None:
    if softcap is None:
        return None
    number = _number("softcap", softcap, xp.finfo(compute).max, "positive and finite")
    if number <= 0:
        raise ValueError(f"softcap must be positive; got {softcap!r}")
    return number


def _dropout(dropout: Any, seed: Any) -> float:
    rate = _number("dropout", dropout)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout!r}")
    if rate and seed is None:
        raise ValueError(
            f"dropout_seed must be given with dropout={rate}: an int, or an integer array without "
            "axes; equal seeds drop equal weights"
        )
    return rate


def _seed(xp: Any, seed: Any) -> Any:
    """Return a seed as two 32-bit words."""
    if seed is None:
        return 0, 0
    seed = index("dropout_seed", seed, xp)
    if not hasattr(seed, "shape"):
        return seed_words(seed)
    wide = seed.dtype in (xp.int64, getattr(xp, "uint64", None))
    return xp.astype(seed, xp.int32), xp.astype(seed >> 32, xp.int32) if wide else 0


def _number(name: str, x: Any, limit: float = math.inf, kind: str = "finite") -> float:
    if isinstance(x, str | bytes | bool):
        raise TypeError(f"{name} must be a number; got {x!r}")
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number; got {x!r}") from None
    if not abs(number) < limit:
        raise ValueError(f"{name} must be {kind} in the compute dtype; got {x!r:.40}")
    return number


def _query_offset(
    xp: Any, offset: Any, shapes: Shapes, masks: tuple[Mask, ...], streamed: bool
) -> Any:
    if offset is None:
        if not any(mask.aligned for mask in masks) or (shapes.n_q == shapes.n_k and not streamed):
            return 0
        if streamed:
            raise ValueError(
                "query_offset must be given for a stream with a Causal or Window mask: the "
                "position of query 0 among all keys to come (0 where both begin together)"
            )
        raise ValueError(
            "query_offset must be given where a Causal or Window mask meets "
            f"n_q = {shapes.n_q} and n_k = {shapes.n_k}, since libraries disagree: "
            "query_offset=0 aligns the first query with the first key (PyTorch's is_causal, JAX), "
            "query_offset=n_k - n_q = "
            f"{shapes.n_k - shapes.n_q} the last query with the last key (FlashAttention, MLX, "
            "decoding with a cache)"
        )
    return index("query_offset", offset, xp, batch=shapes.batch)


def index(name: str, x: Any, xp: Any, batch: tuple[int, ...] = ()) -> Any:
    """Return `x` as an int, or as it is where it is an integer array that broadcasts to `batch`."""
    kinds = "an int" + (" or an integer array over the batch axes" if batch else "")
    if is_array(x):
        if not xp.is_integer(x.dtype):
            raise TypeError(f"{name} must be {kinds}; got an array of {x.dtype}")
        if broadcast([tuple(x.shape), batch]) != batch:
            raise ValueError(
                f"{name} must broadcast to the batch shape {batch}; got shape {tuple(x.shape)}"
            )
        return x
    if not isinstance(x, bool):
        try:
            return operator.index(x)
        except TypeError:
            pass
    raise TypeError(f"{name} must be {kinds}; got {x!r}")


def _check_positions(xp: Any, name: str, first: Any, n: int) -> None:
    """Refuse positions that the library's index dtype cannot hold."""
    limit = int(xp.iinfo(xp.index_dtype).max) // 2  # so that a difference of two is held, too
    if isinstance(first, int) and not -limit <= first <= limit - n:
        raise ValueError(
            f"{name} must keep positions within ±{limit}, half of {xp.index_dtype}; got {first}"
        )


def positive(name: str, x: Any) -> int | None:
    """Return `x` as a positive int; None stays None."""
    if x is None:
        return None
    try:
        number = operator.index(x)
    except TypeError:
        number = None
    if number is None or isinstance(x, bool):
        raise TypeError(f"{name} must be a positive int; got {x!r}")
    if number < 1:
        raise ValueError(f"{name} must be a positive int; got {x!r}")
    return number


def choice(name: str, x: Any, allowed: tuple[str, ...]) -> None:
    """Refuse an `x` that is not one of `allowed`."""
    if x not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {x!r}")


def _standard(implementation: str) -> bool:
    if implementation == "native":
        raise NotImplementedError(
            "implementation='native': no framework's own kernel is connected yet; "
            "'chunked' computes the same"
        )
    return implementation == "standard"
