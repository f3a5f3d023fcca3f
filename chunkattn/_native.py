"""Attention by a framework's own fused kernel, where that means exactly the same.

A kernel knows query, key and value, a scale and a causal mask, some an array that is added to the
scores, and no derivative but the gradients of `out`.  All else is the tiles': forward mode, second
order, the gradient of `lse`, and whatever the kernel lets through a mask (where it multiplies a
hidden NaN by 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from operator import or_
from typing import Any

from . import _parts
from ._calculus import (
    RESULTS,
    Apply,
    Arrays,
    Backward,
    Forward,
    Names,
    Operation,
    Second,
    Shapes,
    as_cotangents,
    as_tangents,
    primals,
    results,
)
from ._chunked import chunked
from ._derivatives import backward
from ._parts import Parts, beats_tiles, parts_of
from ._plain import four, like, plain
from ._problem import TOKENS, lse_to_caller, out_to_caller
from ._request import Request
from ._spec import Spec
from .masks import Causal, Dense, Lengths, Segments, Window

Array = Any

_FORWARD = Forward(RESULTS[:1]), Forward(RESULTS)  # one object each: it is a key of compilations


def operation(
    request: Request,
    implementation: str,
    *,
    return_lse: bool,
    reports: bool = False,
    learns: bool = False,
) -> tuple[Any, str]:
    """Return what computes `request`, a kernel or this library's algorithm, and why.

    `reports` says whether progress is reported, which no kernel does; `learns` that the gradient of
    a bias may be asked for, beside what the arrays tell.
    """
    if implementation not in ("auto", "native"):
        return _tiles(request, return_lse), f"implementation={implementation!r}"
    kernel, better, parts, why = _kernel(request, learns)
    if kernel is not None and reports:
        kernel, why = None, "no kernel reports progress"
    exact = kernel is not None and kernel.exact
    if parts is not None:
        exact = request.spec.dtype != request.spec.compute
    if implementation == "native" and kernel is None:
        raise NotImplementedError(f"implementation='native': {why}; 'chunked' computes the same")
    if implementation == "auto":
        if kernel is not None and request.chunks_given:
            better, why = False, "chunk sizes are given"
        elif kernel is not None and exact and return_lse:
            better, why = False, "gradients with lse are the tiles', which hold more beside copies"
        if kernel is None or not better:
            return _tiles(request, return_lse), why
    causal = parts is None and bool(_causal(request.spec, request.data))
    found = _native(kernel, causal, request.data["scale"], return_lse, exact, parts)
    return found, f"{kernel}: {why}"


@lru_cache
def _native(*args: Any) -> Native:
    return Native(*args)


def _tiles(request: Request, return_lse: bool) -> Forward:
    """Return the algorithm; a traced call may be differentiated, and then needs all results."""
    return _FORWARD[return_lse or request.xp.traced(request.inputs)]


def _kernel(request: Request, learns: bool) -> tuple[Any, bool, Parts | None, str]:
    """Return the kernel for a request or None, whether it is better than tiles, and why.

    The third is how the call is cut for it, where that is called for parts.
    """
    xp, spec, data, inputs = request.xp, request.spec, request.data, request.inputs
    if (why := xp.no_kernel(inputs)) is not None:  # spare the look at the call
        return None, False, None, why
    if "bias" in inputs and (learns or xp.watched(inputs["bias"])):
        return None, False, None, "no kernel has the gradient of a bias"
    if "lacking" not in request.known:
        request.known["lacking"] = _lacking(request)
    if (why := request.known["lacking"]) is not None:
        return None, False, None, why
    causal = _causal(spec, data)
    adds = causal is None or "bias" in inputs
    call = plain(xp, spec, inputs, not adds and causal is True, data["scale"])
    kernel, better, why = xp.kernel(call, adds)
    if kernel is None or not adds:
        return kernel, better, None, why
    if "parts" not in request.known:
        request.known["parts"] = parts_of(request)
    parts = request.known["parts"]
    if parts is None:
        return None, False, None, "the smallest array that is added to scores would be large"
    if not beats_tiles(request, parts):
        better, why = False, "tiles spare the masks of many keys"
    return kernel, better, parts, why


_MASKS = frozenset({Causal, Dense, Lengths, Segments, Window})


def _lacking(request: Request) -> str | None:
    """Return why no kernel can do a call; None where one may."""
    xp, spec, inputs = request.xp, request.spec, request.inputs
    batches = [tuple(inputs[name].shape[:-3]) for name in TOKENS]
    wide = spec.compute == (xp.float64 if spec.dtype == xp.float64 else xp.float32)
    reasons = {
        "no kernel has sinks": "sinks" in inputs,
        "no kernel has a softcap": spec.softcap is not None,
        "no kernel has a score_mod": spec.score_mod is not None,
        "no kernel drops the weights that dropout_seed says": bool(spec.dropout),
        "no kernel calls a mask of the caller's own": not _MASKS.issuperset(map(type, spec.masks)),
        "the scale is an array": "scale" in inputs,
        "kernels do not choose their compute_dtype": not wide,
        "there is nothing to compute": 0 in (*spec.lead, spec.n_q, spec.n_k, spec.d_v),
        "the batch axes have to be broadcast": batches.count(batches[0]) < len(batches),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _causal(spec: Spec, data: dict[str, Any]) -> bool | None:
    """Return whether a kernel's causal mask is wanted; None where other masks are."""
    if not spec.masks:
        return False
    if any(type(m) is not Causal for m in spec.masks):
        return None
    offset, start = data["query_offset"], data["key_offset"]
    aligned = isinstance(offset, int) and isinstance(start, int) and offset == start
    return True if aligned and spec.n_q == spec.n_k else None


def _trusted(
    xp: Any, spec: Spec, hides: bool, found: Arrays, tiles: Callable[[], Arrays]
) -> Arrays:
    """Return what a kernel found, or what the tiles do where a NaN came through its mask."""
    if not hides:
        return found
    tests = (xp.nonfinite(x, spec.compute) for name, x in found.items() if name != "lse")
    trusted: Arrays = xp.when(reduce(or_, tests), tiles, lambda: found)
    return trusted


@dataclass(frozen=True)
class Native(Operation):
    """`out` by a kernel, and `lse` where it is asked for, or as a residual for the gradients."""

    kernel: Any
    causal: bool
    scale: float
    return_lse: bool
    exact: bool  # the gradients want `out` as it is in the compute dtype
    parts: Parts | None  # of a call for which something is added to the scores
    residuals: Names = ()

    keeps_outputs = calls_kernel = True

    @staticmethod
    def kind(spec: Spec) -> str:
        """Return the implementation that this is."""
        return "native"

    @property
    def outputs(self) -> Names:
        """The names of the results."""
        return RESULTS[: 1 + self.return_lse] + self.residuals

    def with_residuals(self, spec: Spec) -> Native:
        """Return the operation to call where a rule may be called later."""
        lse = ("lse",) if self.kernel.needs_lse and not self.return_lse else ()
        return replace(self, residuals=(*lse, "exact") if self.exact else lse)

    def shapes(self, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Shapes:
        """As those of `Forward`."""
        return Forward(self.outputs).shapes(spec, data, inputs)

    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        if self.parts is None:
            found = self._whole(xp, spec, inputs)
        else:
            found = _parts.forward(xp, self.parts, self.kernel, data | inputs, self.outputs)

        def tiles() -> Arrays:
            return chunked(xp, spec, data | inputs, self.outputs)

        return _trusted(xp, spec, self.causal or self.parts is not None, found, tiles)

    def _whole(self, xp: Any, spec: Spec, inputs: Arrays) -> Arrays:
        """Return what the kernel finds for the call."""
        call = plain(xp, spec, inputs, self.causal, self.scale)
        names = self.outputs
        out, lse = self.kernel.forward(call, names)
        lead = (*spec.batch, spec.heads, spec.n_q)
        out = out_to_caller(xp, spec, like(xp, out, (*lead, spec.d_v)))
        found = {"out": out}
        if "exact" in names:
            found = {"out": xp.cast(out, spec.dtype), "exact": out}
        if lse is not None:
            lse = lse_to_caller(spec, like(xp, lse, (*lead, 1)))
            found["lse"] = xp.cast(lse, spec.compute)
        return found

    def tangent(
        self,
        apply: Apply,
        spec: Spec,
        data: dict[str, Any],
        inputs: Arrays,
        outputs: Arrays,
        tangents: Arrays,
    ) -> Arrays:
        """As that of `Forward`, from results that are more exact."""
        forward = Forward().with_residuals(spec)
        exact = apply(forward, spec, data, inputs)
        moved = forward.tangent(apply, spec, data, inputs, exact, tangents)
        return {name: moved[name] for name in RESULTS[: 1 + self.return_lse]}

    def cotangent(
        self,
        apply: Apply,
        spec: Spec,
        data: dict[str, Any],
        inputs: Arrays,
        outputs: Arrays,
        cotangents: Arrays,
        wanted: Names,
    ) -> Arrays:
        """Return the gradients by the kernel, or by tiles where `lse` or a bias takes part."""
        if self.return_lse or not set(wanted) <= set(TOKENS):
            forward = Forward().with_residuals(spec)
            exact = apply(forward, spec, data, inputs)
            return forward.cotangent(apply, spec, data, inputs, exact, cotangents, wanted)
        known = {name: outputs[name] for name in RESULTS if name in outputs}
        known["out"] = outputs.get("exact", outputs["out"])
        bars = as_cotangents({"out": cotangents["out"]})
        backward = NativeBackward(self.kernel, self.causal, self.scale, self.parts, wanted)
        return apply(backward, spec, data | known, inputs | bars)


@dataclass(frozen=True)
class NativeBackward(Operation):
    """The gradients of query, key and value by a kernel, from that of `out`."""

    kernel: Any
    causal: bool
    scale: float
    parts: Parts | None
    wanted: Names

    calls_kernel = True

    @property
    def outputs(self) -> Names:
        """The names of the results."""
        return self.wanted

    def shapes(self, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Shapes:
        """As those of `Forward`."""
        return Backward(self.wanted).shapes(spec, data, inputs)

    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        arrays = data | inputs
        if self.parts is None:
            found = self._whole(xp, spec, arrays)
        else:
            found = _parts.backward(xp, self.parts, self.kernel, arrays, self.wanted)

        def tiles() -> Arrays:
            exact = chunked(xp, spec, arrays, Forward().with_residuals(spec).outputs)
            more = results(exact) | {"d_lse": xp.zeros_like(exact["lse"])}
            return dict(
                zip(self.wanted, backward(xp, spec, arrays | more, self.wanted), strict=True)
            )

        return _trusted(xp, spec, self.causal or self.parts is not None, found, tiles)

    def _whole(self, xp: Any, spec: Spec, arrays: dict[str, Any]) -> Arrays:
        """Return what the kernel finds for the call."""
        call = plain(xp, spec, arrays, self.causal, self.scale)
        shape = (*call.query.shape[:-1], spec.d_v)
        out, d_out = (like(xp, four(xp, spec, arrays[name]), shape) for name in ("out", "d_out"))
        lse = like(xp, arrays["lse"], shape[:-1]) if "lse" in arrays else None
        gradients = dict(zip(TOKENS, self.kernel.backward(call, out, lse, d_out), strict=True))
        found = {}
        for name in self.wanted:
            heads = spec.heads if name == "query" else spec.key_heads
            rows = spec.n_q if name == "query" else spec.n_k
            shape = (*spec.batch, heads, rows, arrays[name].shape[-1])
            found[name] = out_to_caller(xp, spec, like(xp, gradients[name], shape))
        return found

    def _exact(
        self, apply: Apply, spec: Spec, data: dict[str, Any], inputs: Arrays
    ) -> tuple[dict[str, Any], Arrays]:
        """Return the data and inputs of `Backward` for the same gradients, from exact results."""
        exact = apply(Forward().with_residuals(spec), spec, data, primals(inputs))
        return data | results(exact), inputs | {"d_lse": exact["lse"] - exact["lse"]}

    def tangent(
        self,
        apply: Apply,
        spec: Spec,
        data: dict[str, Any],
        inputs: Arrays,
        outputs: Arrays,
        tangents: Arrays,
    ) -> Arrays:
        """As that of `Backward`."""
        data, inputs = self._exact(apply, spec, data, inputs)
        return apply(Second(self.wanted), spec, data, inputs | as_tangents(tangents))

    def cotangent(
        self,
        apply: Apply,
        spec: Spec,
        data: dict[str, Any],
        inputs: Arrays,
        outputs: Arrays,
        cotangents: Arrays,
        wanted: Names,
    ) -> Arrays:
        """As that of `Backward`."""
        data, inputs = self._exact(apply, spec, data, inputs)
        rule = Backward(self.wanted).cotangent
        return rule(apply, spec, data, inputs, outputs, cotangents, wanted)
