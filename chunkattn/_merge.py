"""Merge the results over disjoint sets of keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

from ._adapters import common_adapter, is_array
from ._checks import choice, compute_dtype_of
from ._partial import combine, finish, unfinish
from ._problem import lse_to_caller, out_to_caller, to_heads
from ._request import LAYOUTS
from ._shapes import is_accepted

Array = Any


@dataclass(frozen=True)
class Form:
    """The static part of a merge, as `Spec` is that of a call."""

    layout: str = "hnd"
    headless: bool = False
    dtype: Any = None


def merge(*partials: tuple[Array, Array], layout: str = "hnd") -> tuple[Array, Array]:
    r"""Merge attention over disjoint sets of keys into attention over all of them.

    Parameters
    ----------
    *partials : tuple of (out, lse)
        Results of `attention` with ``return_lse=True`` for the same queries, each over its own
        keys: `out` of shape (…, h, n_q, d_v) (in layout "nhd" (…, n_q, h, d_v); without heads
        (n_q, d_v)), and `lse` of shape (…, h, n_q) (without heads (n_q,)), all of one library,
        device, shape and dtype.  At least one.
    layout : {"hnd", "nhd"}, default "hnd"
        The axes of each `out`.

    Returns
    -------
    out : array
        :math:`\sum_p e^{lse_p - lse}\, out_p`, with the shape and dtype of each `out`.
    lse : array
        :math:`\log \sum_p e^{lse_p}`, with the shape and dtype of each `lse`.

    Raises
    ------
    TypeError
        If a partial is not a pair of arrays, or libraries or dtypes differ.
    ValueError
        If there is no partial, or shapes or devices differ.

    Notes
    -----
    Associative and commutative up to rounding; ``(0, -inf)`` is the identity.  `sinks` count once:
    give them to one of the partials only.  Computed in the dtype of `lse`, of float16 and bfloat16
    in float32.

    Examples
    --------
    >>> import numpy as np
    >>> from chunkattn import attention, merge
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 100, 8))
    >>> one = attention(q, k[:30], v[:30], return_lse=True)
    >>> two = attention(q, k[30:], v[30:], return_lse=True)
    >>> out, lse = merge(one, two)
    >>> np.allclose(out, attention(q, k, v))
    True
    """
    choice("layout", layout, LAYOUTS)
    if not partials:
        raise ValueError("merge needs at least one (out, lse) pair")
    arrays: list[tuple[str, Array]] = []
    for i, pair in enumerate(partials):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_array, pair)):
            raise TypeError(f"partial {i} must be a pair (out, lse) of arrays; got {pair!r:.80}")
        arrays += [(f"partial {i}: out", pair[0]), (f"partial {i}: lse", pair[1])]
    xp = common_adapter(arrays)
    _check_partials(xp, arrays, layout)
    out = partials[0][0]
    form = Form(layout, len(out.shape) == 2, out.dtype)
    merged: tuple[Array, Array] = xp.run(_merge, form, {"partials": tuple(map(tuple, partials))})
    return merged


def _check_partials(xp: Any, arrays: list[tuple[str, Array]], layout: str) -> None:
    (_, out), (_, lse), *_ = arrays
    if len(out.shape) < 2:
        shape = tuple(out.shape)
        raise ValueError(f"partial 0: out must have at least two axes; got shape {shape}")
    expected = tuple(out.shape[:-1])
    if len(out.shape) > 2 and layout == "nhd":
        expected = (*expected[:-2], expected[-1], expected[-2])
    for name, x in arrays:
        shape, dtype = (out.shape, out.dtype) if name.endswith("out") else (expected, lse.dtype)
        if tuple(x.shape) != tuple(shape):
            raise ValueError(
                f"{name} must have shape {tuple(shape)} to go with partial 0's out "
                f"{tuple(out.shape)} in layout {layout!r}; got {tuple(x.shape)}"
            )
        if x.dtype != dtype or not is_accepted(xp, x):
            wanted = dtype if dtype in xp.floats.values() else f"one of {', '.join(xp.floats)}"
            raise TypeError(f"{name} must have the dtype {wanted}; got {x.dtype}")


def _merge(xp: Any, form: Form, arrays: dict[str, Any]) -> tuple[Array, ...]:
    dtype = arrays["partials"][0][1].dtype
    compute = compute_dtype_of(xp, dtype, None)
    summaries = (
        unfinish(xp, *to_heads(xp, form, out, xp.cast(lse, compute)))
        for out, lse in arrays["partials"]
    )
    out, lse = finished(xp, form, reduce(partial(combine, xp), summaries))
    return out, xp.cast(lse, dtype)


def finished(xp: Any, form: Form, summary: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return a summary's ``(out, lse)`` in the caller's axes and dtype."""
    out, lse = finish(xp, summary)
    return out_to_caller(xp, form, xp.cast(out, form.dtype)), lse_to_caller(form, lse)
