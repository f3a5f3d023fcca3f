"""Attention by a framework's own fused kernel, where that means exactly the same.

A kernel knows query, key and value, a scale and a causal mask, and no derivative but the gradients
of `out`.  All else is the tiles': forward mode, second order, the gradient of `lse`, and whatever
the kernel lets through a mask (where it multiplies a hidden NaN by 0).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from ._problem import TOKENS, Problem
from ._request import Request
from ._spec import Spec
from .masks import Causal

Array = Any

log = logging.getLogger(__package__)


class Plain(NamedTuple):
    """A call that kernels know: arrays (b, h, n, d), perhaps fewer heads of key and value."""

    query: Array
    key: Array
    value: Array
    causal: bool  # with query 0 and key 0 at the same position
    scale: float


def operation(request: Request, implementation: str, *, return_lse: bool, reports: bool) -> Any:
    """Return the operation that computes `request`: by a kernel, or by this library's algorithm.

    `reports` says whether progress is reported, which no kernel does.
    """
    if implementation not in ("auto", "native"):
        return Forward()
    kernel, better, why = _kernel(request)
    if kernel is not None and reports:
        kernel, why = None, "no kernel reports progress"
    if implementation == "native" and kernel is None:
        raise NotImplementedError(f"implementation='native': {why}; 'chunked' computes the same")
    if implementation == "auto":
        if kernel is not None and request.chunks_given:
            better, why = False, "chunk sizes are given"
        if kernel is None or not better:
            log.debug("chunked: %s", why)
            return Forward()
    log.debug("native (%s): %s", kernel, why)
    return Native(kernel, () if return_lse else ("lse",))


def _kernel(request: Request) -> tuple[Any, bool, str]:
    """Return the kernel for a request or None, whether it is better than tiles, and why."""
    xp, spec, arrays = request.xp, request.spec, request.data | request.inputs
    if not xp.has_kernels:  # spare the look at the call
        return None, False, f"{xp.name} has no attention of its own"
    if (why := _lacking(xp, spec, arrays)) is not None:
        return None, False, why
    found: tuple[Any, bool, str] = xp.kernel(plain(Problem(xp, spec, arrays), arrays))
    return found


def _lacking(xp: Any, spec: Spec, arrays: dict[str, Any]) -> str | None:
    """Return why no kernel can do a call; None where one may."""
    shapes = [tuple(arrays[name].shape[: -3 if not spec.headless else None]) for name in TOKENS]
    wide = xp.float64 if spec.dtype == xp.float64 else xp.float32
    reasons = {
        "no kernel has a bias": "bias" in arrays,
        "no kernel has sinks": "sinks" in arrays,
        "no kernel has a softcap": spec.softcap is not None,
        "no kernel has a score_mod": spec.score_mod is not None,
        "no kernel drops the weights that dropout_seed says": bool(spec.dropout),
        "no kernel has a mask other than Causal": any(type(m) is not Causal for m in spec.masks),
        "the scale is an array": hasattr(arrays["scale"], "shape"),
        "kernels do not choose their compute_dtype": spec.compute != wide,
        "the batch axes have to be broadcast": not spec.headless and len(set(shapes)) > 1,
        "there is nothing to compute": 0 in (*spec.lead, spec.n_q, spec.n_k, spec.d_v),
        "the causal mask does not begin at the first query and key": _causal(spec, arrays) is None,
    }
    return next((why for why, holds in reasons.items() if holds), None)


def _causal(spec: Spec, arrays: dict[str, Any]) -> bool | None:
    """Return whether a kernel's causal mask is wanted; None where it would be another one."""
    if not spec.masks:
        return False
    offset, start = arrays["query_offset"], arrays["key_offset"]
    if not (isinstance(offset, int) and isinstance(start, int)):
        return None
    if offset - start >= spec.n_k - 1:  # every query sees every key
        return False
    return True if offset == start and spec.n_q == spec.n_k else None


def plain(problem: Problem, arrays: dict[str, Any]) -> Plain:
    """Return a call in the terms of kernels."""
    query, key, value = (_four(problem.xp, x) for x in (problem.query, problem.key, problem.value))
    return Plain(query, key, value, bool(_causal(problem.spec, arrays)), problem.scale)


def _four(xp: Any, x: Array) -> Array:
    """Return (…, h, n, d) with one batch axis."""
    return x if x.ndim == 4 else xp.reshape(x, (-1, *x.shape[-3:]))


def _result(problem: Problem, call: Plain, found: tuple[Array, Array]) -> dict[str, Array]:
    """Return ``(out, lse)`` of a kernel as the results of a call."""
    xp, spec = problem.xp, problem.spec
    lead = (*spec.batch, spec.heads, spec.n_q)
    out, lse = found
    return problem.results(
        {
            "out": xp.reshape(out, (*lead, spec.d_v)),
            "lse": xp.reshape(xp.cast(lse, spec.compute), (*lead, 1)),
        }
    )


def _trusted(problem: Problem, call: Plain, found: Arrays, tiles: Callable[[], Arrays]) -> Arrays:
    """Return what a kernel found, or what the tiles do where a NaN came through its mask."""
    if not call.causal:
        return found
    xp, dtype = problem.xp, problem.spec.compute
    total = sum(xp.sum(x, dtype=dtype) for name, x in found.items() if name != "lse")
    trusted: Arrays = xp.when(~xp.isfinite(total), tiles, lambda: found)
    return trusted


@dataclass(frozen=True)
class Native(Operation):
    """``(out, lse)`` by a kernel; `residuals` has "lse" where no derivative is asked of it."""

    kernel: Any
    residuals: Names

    keeps_outputs = True
    outputs = RESULTS

    def shapes(self, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Shapes:
        """As those of `Forward`."""
        return Forward().shapes(spec, data, inputs)

    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        arrays = data | inputs
        problem = Problem(xp, spec, arrays)
        call = plain(problem, arrays)
        found = _result(problem, call, self.kernel.forward(call))
        return _trusted(problem, call, found, lambda: chunked(xp, spec, arrays, RESULTS))

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
        return forward.tangent(apply, spec, data, inputs, exact, tangents)

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
        """Return the gradients by the kernel, or by tiles where `lse` takes part."""
        if not self.residuals:
            forward = Forward().with_residuals(spec)
            exact = apply(forward, spec, data, inputs)
            return forward.cotangent(apply, spec, data, inputs, exact, cotangents, wanted)
        known = {name: outputs[name] for name in RESULTS}
        bars = as_cotangents({"out": cotangents["out"]})
        return apply(NativeBackward(self.kernel, wanted), spec, data | known, inputs | bars)


@dataclass(frozen=True)
class NativeBackward(Operation):
    """The gradients of query, key and value by a kernel, from that of `out`."""

    kernel: Any
    wanted: Names

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
        problem = Problem(xp, spec, arrays)
        call = plain(problem, arrays)
        out, d_out = (_four(xp, problem.tokens(arrays[name])) for name in ("out", "d_out"))
        lse = xp.reshape(arrays["lse"], (*out.shape[:-1],))
        found = dict(zip(TOKENS, self.kernel.backward(call, out, lse, d_out), strict=True))
        found = {
            name: problem.gradient(name, self._unfold(problem, name, found[name]))
            for name in self.wanted
        }

        def tiles() -> Arrays:
            exact = chunked(xp, spec, arrays, Forward().with_residuals(spec).outputs)
            zero = {"d_lse": xp.zeros_like(arrays["lse"])}
            gradients = backward(xp, spec, arrays | results(exact) | zero, self.wanted)
            return dict(zip(self.wanted, gradients, strict=True))

        return _trusted(problem, call, found, tiles)

    @staticmethod
    def _unfold(problem: Problem, name: str, x: Array) -> Array:
        heads = problem.spec.heads if name == "query" else problem.spec.key_heads
        return problem.xp.reshape(x, (*problem.spec.batch, heads, *x.shape[-2:]))

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
