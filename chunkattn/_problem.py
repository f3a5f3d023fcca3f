"""A call's arrays as views with the axes ``(*batch, heads, n, d)``; length 1 broadcasts."""

from __future__ import annotations

from typing import Any

from ._cached import cached_property
from ._mask import with_arrays
from ._spec import Spec

Array = Any

TOKENS = ("query", "key", "value")
TANGENT = "_tangent"  # ends the name of an array's tangent


def swap_layout(xp: Any, x: Array) -> Array:
    """Exchange the axes of heads and positions: "hnd" from "nhd", or back."""
    axes = list(range(x.ndim))
    axes[-3], axes[-2] = axes[-2], axes[-3]
    return xp.permute_dims(x, tuple(axes))


def to_heads(xp: Any, form: Any, out: Array, lse: Array) -> tuple[Array, Array]:
    """Return ``(out, lse)`` of a caller as (…, h, n, d_v) and (…, h, n, 1)."""
    if form.headless:
        lse = lse[None, ...]
    return heads_first(xp, form, out), lse[..., None]


def out_to_caller(xp: Any, form: Any, out: Array) -> Array:
    """Undo `to_heads` for `out`; a `form` has the attributes ``headless`` and ``layout``."""
    if form.headless:
        return out[0, ...]
    return swap_layout(xp, out) if form.layout == "nhd" else out


def lse_to_caller(form: Any, lse: Array) -> Array:
    """Undo `to_heads` for `lse`."""
    return lse[0, ..., 0] if form.headless else lse[..., 0]


def heads_first(xp: Any, form: Any, x: Array) -> Array:
    """Return an array of a caller's axes as (…, h, n, width)."""
    if form.headless:
        return x[None, ...]
    return swap_layout(xp, x) if form.layout == "nhd" else x


class Problem:
    """A call's arrays as views of shape ``(*batch, heads, n, d)``, and its masks whole again.

    Scores are `bounded` where they are known to be small, so that no maximum is looked for.  There
    is no scale, None, where something else multiplies by it.
    """

    def __init__(self, xp: Any, spec: Spec, arrays: dict[str, Any], bounded: bool = False) -> None:
        self.xp, self.spec, self.bounded = xp, spec, bounded
        self.ndim = len(spec.batch) + 3
        self.query, self.key, self.value = (self.tokens(arrays[name]) for name in TOKENS)
        scale = arrays["scale"]
        self.scale = xp.cast(scale, spec.compute) if hasattr(scale, "shape") else scale
        self.bias, self.sinks = arrays.get("bias"), arrays.get("sinks")
        self.masks = with_arrays(spec.masks, arrays)
        offset, start = arrays["query_offset"], arrays["key_offset"]
        self.query_offset = xp.cast(offset, xp.index_dtype) if hasattr(offset, "shape") else offset
        self.key_offset = xp.as_index(start) if hasattr(start, "shape") else start
        self.dropout_seed = arrays["dropout_seed"]
        self._given = arrays

    @cached_property
    def captured(self) -> dict[str, Array]:
        """The arrays that score_mod captures, in their order."""
        return {
            name: x
            for name, x in sorted(self._given.items(), key=lambda item: (len(item[0]), item[0]))
            if name.startswith("captured") and not name.endswith(TANGENT)
        }

    def aligned(self, x: Array) -> Array:
        """Return `x` with leading axes of length 1, up to the axes of the scores."""
        lacking = self.ndim - x.ndim
        return x[(None,) * lacking + (...,)] if lacking else x

    def tokens(self, x: Array) -> Array:
        """Return an array of the caller's axes as (…, h, n, width)."""
        return self.aligned(heads_first(self.xp, self.spec, x))

    def outputs(self, names: tuple[str, ...] = ("out", "lse")) -> dict[str, Array]:
        """Return new arrays for results by name.

        "out" and "lse"; "low", what `lse` lacks by its rounding; "exact", `out` in the compute
        dtype.  They are None where one task has all of the results.
        """
        spec = self.spec
        one = spec.blocks == 1 and spec.n_q == spec.schedule.query_chunk
        if one and spec.layout == "hnd":
            return dict.fromkeys(names)
        shape = (*spec.batch, spec.heads, spec.n_q, 1)
        new = {
            "out": lambda: self._new_out(spec.dtype),
            "lse": lambda: self.xp.new(self.query, shape, -float("inf"), spec.compute),
            "low": lambda: self.xp.new(self.query, shape, 0.0, spec.compute),
            "exact": lambda: self._new_out(spec.compute),
        }
        return {name: new[name]() for name in names}

    def _new_out(self, dtype: Any) -> Array:
        """Return a new array for `out`, which lies in memory as the caller's layout has it."""
        spec = self.spec
        if spec.layout == "hnd":
            shape = (*spec.batch, spec.heads, spec.n_q, spec.d_v)
            return self.xp.new(self.query, shape, 0.0, dtype)
        shape = (*spec.batch, spec.n_q, spec.heads, spec.d_v)
        return swap_layout(self.xp, self.xp.new(self.query, shape, 0.0, dtype))

    def zeros(self, name: str) -> Array:
        """Return zeros in the compute dtype to sum up the gradient of an array of the call in.

        They have its shape, in the axes of this problem.
        """
        zeros = self.xp.new(self.query, self._given[name].shape, 0.0, self.spec.compute)
        if name in self.captured:
            return zeros
        if name in TOKENS:
            return self.tokens(zeros)
        return self.aligned(zeros[:, None, None] if name == "sinks" else zeros)

    def gradient(self, name: str, x: Array) -> Array:
        """Return what was summed up in `zeros` in the axes and dtype of the caller's array."""
        given = self._given[name]
        if name == "sinks":
            x = x[..., 0, 0]
        x = x[(0,) * (x.ndim - given.ndim) + (...,)]
        if name in TOKENS and self.spec.layout == "nhd" and not self.spec.headless:
            x = swap_layout(self.xp, x)
        return self.xp.cast(x, given.dtype)

    def is_shared(self, total: Array) -> bool:
        """Whether several batch entries or heads add to the same entries of `total`."""
        lead = self.spec.lead
        shape = total.shape[: len(lead)] if total.ndim == self.ndim else ()
        return len(shape) < len(lead) or any(
            n == 1 and m > 1 for n, m in zip(shape, lead, strict=True)
        )

    def results(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """Return results by name with the caller's axes."""
        return {
            name: lse_to_caller(self.spec, x)
            if name in ("lse", "low")
            else out_to_caller(self.xp, self.spec, x)
            for name, x in outputs.items()
        }
