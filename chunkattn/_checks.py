"""Arguments that are numbers, dtypes or choices, checked one by one."""

from __future__ import annotations

import math
import operator
import re
from numbers import Integral
from typing import Any

from ._adapters import is_array
from ._dropout import seed_words
from ._shapes import broadcast, is_accepted

Array = Any

_UNITS = {"B": 1} | {
    f"{letter}{middle}B": base**power
    for middle, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("kMGT", start=1)
}


def common_dtype(xp: Any, tokens: dict[str, Array]) -> Any:
    """Return the floating dtype that query, key and value share."""
    for name, x in tokens.items():
        if not is_accepted(xp, x):
            raise TypeError(f"{name} must be one of {', '.join(xp.floats)}; got {x.dtype}")
    dtype, *_ = dtypes = [x.dtype for x in tokens.values()]
    if dtypes.count(dtype) < len(dtypes):
        told = ", ".join(f"{name} {x.dtype}" for name, x in tokens.items())
        raise TypeError(f"query, key and value must have one dtype; got {told}")
    return dtype


def compute_dtype_of(xp: Any, dtype: Any, wanted: Any) -> Any:
    """Return the dtype of scores, sums and lse."""
    floats = xp.floats
    if is_array(wanted):
        raise TypeError(
            f"compute_dtype must be a dtype or its name; got an array of {wanted.dtype}"
        )
    if wanted is None:
        return dtype if dtype == floats.get("float64") else floats["float32"]
    for name in ("float32", "float64"):
        if name in floats and (wanted == name or floats[name] == wanted):
            return floats[name]
    offered = "None, float32 or float64" if "float64" in floats else "None or float32"
    raise ValueError(f"compute_dtype must be {offered} for these {xp.name} arrays; got {wanted!r}")


def scale_of(xp: Any, scale: Any, d: int, compute: Any) -> Any:
    """Return the scale: a float, or an array without axes."""
    if scale is None:
        return 1.0 / math.sqrt(d) if d else 1.0
    if is_array(scale):
        is_integer = xp.is_integer(scale.dtype)
        if tuple(scale.shape) != () or not (is_integer or is_accepted(xp, scale)):
            raise TypeError(
                "scale must be a number or an array of one, without axes; "
                f"got {scale.dtype} of shape {tuple(scale.shape)}"
            )
        with xp.on_device_of(scale):
            return xp.astype(scale, compute) if is_integer else scale
    return _number("scale", scale, xp.finfo(compute).max)


def softcap_of(xp: Any, softcap: Any, compute: Any) -> float | None:
    """Return the softcap, positive and finite; None stays None."""
    if softcap is None:
        return None
    number = _number("softcap", softcap, xp.finfo(compute).max, "positive and finite")
    if number <= 0:
        raise ValueError(f"softcap must be positive; got {softcap!r}")
    return number


def dropout_rate(dropout: Any, seed: Any) -> float:
    """Return the rate of dropout, which needs a seed unless it is 0."""
    rate = _number("dropout", dropout)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be in [0, 1); got {dropout!r}")
    if rate and seed is None:
        raise ValueError(
            f"dropout_seed must be given with dropout={rate}: an int, or an integer array without "
            "axes; equal seeds drop equal weights"
        )
    return rate


def seed_of(xp: Any, seed: Any) -> Any:
    """Return a seed as two 32-bit words."""
    if seed is None:
        return 0, 0
    seed = index("dropout_seed", seed, xp)
    if not hasattr(seed, "shape"):
        return seed_words(seed)
    with xp.on_device_of(seed):
        return _words(xp, seed)


def _words(xp: Any, seed: Array) -> tuple[Any, Any]:
    """Return an array without axes as two 32-bit words, of which the low one comes first."""
    if any(seed.dtype == getattr(xp, name, None) for name in ("int64", "uint64")):
        seed = xp.astype(seed, xp.int64)  # PyTorch shifts no uint64
        return xp.astype(seed, xp.int32), xp.astype(seed >> 32, xp.int32)
    low = xp.astype(seed, xp.int32)
    unsigned = any(seed.dtype == getattr(xp, f"uint{bits}", None) for bits in (8, 16, 32))
    return low, 0 if unsigned else low >> 31  # the sign, as in a wider seed


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


def whole(x: Any) -> int | None:
    """Return `x` as an int where it is one, or an array without axes of one; a bool is none."""
    try:
        if isinstance(x, int):  # perhaps a symbol of PyTorch's compiler
            return None if isinstance(x, bool) else x
        return operator.index(x)
    except TypeError:
        return None


def index(name: str, x: Any, xp: Any, batch: tuple[int, ...] = ()) -> Any:
    """Return `x` as an int, or as it is where it is an integer array that broadcasts to `batch`."""
    form = f"that broadcasts to the batch axes {batch}" if batch else "without axes"
    kinds = f"an int or an integer array {form}"
    if is_array(x):
        if not xp.is_integer(x.dtype):
            raise TypeError(f"{name} must be {kinds}; got an array of {x.dtype}")
        if broadcast([tuple(x.shape), batch]) != batch:
            raise ValueError(f"{name} must be {kinds}; got shape {tuple(x.shape)}")
        return x
    if (number := whole(x)) is None:
        raise TypeError(f"{name} must be {kinds}; got {x!r}")
    return number


def check_positions(xp: Any, name: str, first: Any, n: int) -> None:
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
    if (number := whole(x)) is None:
        raise TypeError(f"{name} must be a positive int; got {x!r}")
    if number < 1:
        raise ValueError(f"{name} must be a positive int; got {x!r}")
    return number


def choice(name: str, x: Any, allowed: tuple[str, ...]) -> None:
    """Refuse an `x` that is not one of `allowed`."""
    if not isinstance(x, str) or x not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {x!r}")


def bytes_of(memory_limit: Any) -> int | None:
    """Return a number of bytes that is given as an int, or as "64MB" or "64MiB".

    Examples
    --------
    >>> bytes_of("64MB"), bytes_of("1.5 MiB"), bytes_of("64KiB"), bytes_of(4096)
    (64000000, 1572864, 65536, 4096)
    """
    if memory_limit is None:
        return None
    limit = memory_limit
    if isinstance(limit, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)\s*", limit)
        unit = _UNITS.get(found[2].replace("K", "k")) if found else None
        limit = int(float(found[1]) * unit) if found and unit else None
    if not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1:
        kind = ValueError if isinstance(memory_limit, Integral | float | str) else TypeError
        raise kind(
            "memory_limit must be a positive number of bytes: an int, or a string like '64MB' "
            f"(10^6 bytes) or '64MiB' (2^20); got {memory_limit!r}"
        )
    return int(limit)
