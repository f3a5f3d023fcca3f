"""Attention by a framework's own fused kernel, where that means exactly the same.

A kernel knows query, key and value, a scale and a causal mask, some an array that is added to the
scores, and no derivative but the gradients of `out`.  All else is the tiles': forward mode, second
order, the gradient of `lse`, and whatever the kernel lets through a mask (where it multiplies a
hidden NaN by 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

from . import _parts
from ._calculus import (
    RESULTS,
    Arrays,
    Backward,
    Forward,
    Gradients,
    Names,
    Operation,
    Point,
    Shapes,
    as_cotangents,
    primals,
    results,
)
from ._chunked import chunked
from ._derivatives import backward
from ._partition import Parts
from ._plain import four, like, plain
from ._problem import TOKENS, lse_to_caller, out_to_caller
from ._spec import Spec

Array = Any


def _trusted(xp: Any, tests: list[Any], found: Arrays, tiles: Callable[[], Arrays]) -> Arrays:
    """Return what a kernel found, or what the tiles do where a test holds."""
    if not tests:
        return found
    trusted: Arrays = xp.when(reduce(or_, tests), tiles, lambda: found)
    return trusted


def _leaks(xp: Any, spec: Spec, found: Arrays) -> list[Any]:
    """Return tests of whether a NaN came through a kernel's mask."""
    return [xp.nonfinite(x, spec.compute) for name, x in found.items() if name != "lse"]


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

    def shapes(self, spec: Spec, inputs: Arrays) -> Shapes:
        """As those of `Forward`."""
        return Forward(self.outputs).shapes(spec, inputs)

    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        arrays = data | inputs

        def tiles() -> Arrays:
            return chunked(xp, spec, arrays, self.outputs)

        def kernel() -> Arrays:
            if self.parts is None:
                found = self._whole(xp, spec, inputs)
            else:
                told = xp, self.parts, self.kernel, arrays, self.outputs
                found = _parts.forward(*told, blind=self.return_lse)
            if spec.layout == "nhd":
                found |= {name: xp.in_order(x) for name, x in found.items() if name != "lse"}
            tests = _leaks(xp, spec, found) if self.causal or self.parts is not None else []
            if self.return_lse:
                tests.append(self.kernel.doubtful(found["lse"]))
            return _trusted(xp, tests, found, tiles)

        found: Arrays = xp.where_kernel(kernel, tiles)
        return found

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

    def tangent(self, at: Point, tangents: Arrays) -> Arrays:
        """As that of `Forward`, from results that are more exact."""
        forward = Forward().with_residuals(at.spec)
        exact = at._replace(outputs=at.call(forward, at.inputs))
        moved = forward.tangent(exact, tangents)
        return {name: moved[name] for name in RESULTS[: 1 + self.return_lse]}

    def cotangent(self, at: Point, cotangents: Arrays, wanted: Names) -> Arrays:
        """Return the gradients by the kernel, or by tiles where `lse` or a bias takes part."""
        if self.return_lse or not self.kernel.trains or not set(wanted) <= set(TOKENS):
            forward = Forward().with_residuals(at.spec)
            exact = at._replace(outputs=at.call(forward, at.inputs))
            unused = {"lse": _zeros(exact.outputs)}
            return forward.cotangent(exact, unused | cotangents, wanted)
        known = {name: at.outputs[name] for name in RESULTS if name in at.outputs}
        known["out"] = at.outputs.get("exact", at.outputs["out"])
        bars = as_cotangents({"out": cotangents["out"]})
        backward = NativeBackward(wanted, self.kernel, self.causal, self.scale, self.parts)
        return at.call(backward, at.inputs | bars, known)


@dataclass(frozen=True)
class NativeBackward(Gradients):
    """The gradients of query, key and value by a kernel, from that of `out`."""

    kernel: Any
    causal: bool
    scale: float
    parts: Parts | None

    calls_kernel = True

    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        arrays = data | inputs

        def tiles() -> Arrays:
            exact = chunked(xp, spec, arrays, Forward().with_residuals(spec).outputs)
            more = results(exact) | {"d_lse": xp.zeros_like(exact["lse"])}
            return backward(xp, spec, arrays | more, self.wanted)

        def kernel() -> Arrays:
            if self.parts is None:
                found = self._whole(xp, spec, arrays)
            else:
                found = _parts.backward(xp, self.parts, self.kernel, arrays, self.wanted)
            hides = self.causal or self.parts is not None
            return _trusted(xp, _leaks(xp, spec, found) if hides else [], found, tiles)

        found: Arrays
        if self.kernel.needs_lse:
            found = xp.when(self.kernel.coarse(arrays["lse"]), tiles, kernel)
        else:
            found = xp.where_kernel(kernel, tiles)
        return found

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

    def tangent(self, at: Point, tangents: Arrays) -> Arrays:
        """As that of `Backward`."""
        return Backward(self.wanted).tangent(_exactly(at), tangents)

    def cotangent(self, at: Point, cotangents: Arrays, wanted: Names) -> Arrays:
        """As that of `Backward`."""
        return Backward(self.wanted).cotangent(_exactly(at), cotangents, wanted)


def _exactly(at: Point) -> Point:
    """Return where `Backward` gives the same gradients, from exact results."""
    exact = at.call(Forward().with_residuals(at.spec), primals(at.inputs))
    bars = {"d_lse": _zeros(exact)}
    return at._replace(data=at.data | results(exact), inputs=at.inputs | bars)


def _zeros(exact: Arrays) -> Array:
    """Return the gradient of an `lse` that nothing depends on; "low" is finite."""
    return exact["low"] - exact["low"]
