"""Which algorithm differentiates which: the rules that an adapter builds its autodiff from.

Four operations are closed under reverse and forward mode, to second order.  With ``f`` attention,
``J`` its Jacobian and ``H[g]`` the Hessian of ``<g, f>``, which is symmetric:

===========================  =========================  ======================================
operation                    its tangent                its cotangent
===========================  =========================  ======================================
`Forward`   ``f(x)``         `Tangent`                  `Backward`
`Tangent`   ``J x'``         none                       ``H[g] x'`` for x, ``Jᵀ g`` for x'
`Backward`  ``Jᵀ g``         `Second`                   ``H[g] u`` for x, ``J u`` for g
`Second`    ``H[g] x' + Jᵀ g'``  none                   ``H[g] u`` for x', ``J u`` for g'
===========================  =========================  ======================================

An operation is called as ``operation(xp, spec, data, inputs)``: `inputs` are the floating arrays by
name that it may be differentiated by, `data` is all else.  It returns a dict of arrays.  Its rules,
for tangents and for gradients, take the `Point` at which it is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ._chunked import chunked
from ._derivatives import backward, second, tangent
from ._problem import TANGENT
from ._spec import Spec
from ._squeezed import squeezing
from ._standard import standard

Array = Any
Arrays = dict[str, Array]
Apply = Callable[[Any, Spec, dict[str, Any], Arrays], Arrays]
Names = tuple[str, ...]
Shapes = dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype by name

RESULTS = ("out", "lse")
COTANGENTS = ("d_out", "d_lse")


def as_tangents(arrays: Arrays) -> Arrays:
    """Return arrays under the names of tangents."""
    return {name + TANGENT: x for name, x in arrays.items()}


def as_cotangents(arrays: Arrays) -> Arrays:
    """Return arrays under the names of gradients of results."""
    return {"d_" + name: x for name, x in arrays.items()}


def primals(inputs: Arrays) -> Arrays:
    """Return those inputs that are neither tangents nor gradients of results."""
    return {
        name: x
        for name, x in inputs.items()
        if not name.endswith(TANGENT) and name not in COTANGENTS
    }


def results(outputs: Arrays) -> Arrays:
    """Return what `Forward` gives as the data of the other operations: out, lse and low."""
    return {"out": outputs.get("exact", outputs["out"])} | {
        name: outputs[name] for name in ("lse", "low")
    }


class Point(NamedTuple):
    """Where an operation is differentiated: its arguments and results, and how to call others.

    ``apply(operation, spec, data, inputs)`` is the adapter's way to call an operation so that it
    can be differentiated in turn.
    """

    apply: Apply
    spec: Spec
    data: dict[str, Any]
    inputs: Arrays
    outputs: Arrays

    def call(self, operation: Any, inputs: Arrays, more: Arrays | None = None) -> Arrays:
        """Return what an operation gives for these inputs, and for `more` data."""
        return self.apply(operation, self.spec, self.data | (more or {}), inputs)


class Operation:
    """What operations have in common."""

    point = Point
    residuals: Names = ()  # the names of further results, that only the rules use
    done: Callable[[], None] | None = None  # called after each chunk of queries
    keeps_outputs = calls_kernel = False

    def with_residuals(self, spec: Spec) -> Operation:
        """Return the operation to call where a rule may be called later."""
        return self

    def results_tangent(self, at: Point, tangents: Arrays) -> Arrays:
        """Return the tangents of ``(out, lse)`` in the data, for a library's own forward mode."""
        moves = {name: x for name, x in tangents.items() if name in primals(tangents)}
        return at.call(Tangent(), primals(at.inputs) | as_tangents(moves))


@dataclass(frozen=True)
class Forward(Operation):
    """``(out, lse)`` of the inputs, or `out` alone where no more is asked for."""

    asked: Names = RESULTS
    done: Callable[[], None] | None = None
    residuals: Names = ()

    keeps_outputs = True

    @staticmethod
    def kind(spec: Spec) -> str:
        """Return the implementation that this is."""
        return "standard" if spec.standard else "chunked"

    @property
    def outputs(self) -> Names:
        """The names of the results."""
        return self.asked + self.residuals

    def with_residuals(self, spec: Spec) -> Forward:
        """Return the operation to call where a rule may be called later.

        The derivatives subtract what is nearly equal, and would show how `lse` is rounded ("low" is
        what is missing), and `out` ("exact" is in the compute dtype).
        """
        residuals = ("low", "exact")[: 1 + (spec.dtype != spec.compute)]
        return replace(self, asked=RESULTS, residuals=residuals)

    def shapes(self, spec: Spec, inputs: Arrays) -> Shapes:
        """Return shape and dtype of each result."""
        lead = () if spec.headless else (*spec.batch, spec.heads)
        out = (*lead, spec.n_q, spec.d_v)
        if spec.layout == "nhd" and not spec.headless:
            out = (*spec.batch, spec.n_q, spec.heads, spec.d_v)
        lse = (*lead, spec.n_q)
        found = {"out": (out, spec.dtype), "lse": (lse, spec.compute)}
        found |= {"low": (lse, spec.compute), "exact": (out, spec.compute)}
        return {name: found[name] for name in self.outputs}

    @squeezing
    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        algorithm = standard if spec.standard else chunked
        return algorithm(xp, spec, data | inputs, self.outputs, self.done)

    def tangent(self, at: Point, tangents: Arrays) -> Arrays:
        """Return the outputs' tangents; an input without one does not move."""
        return at.call(Tangent(), at.inputs | as_tangents(tangents), results(at.outputs))

    def cotangent(self, at: Point, cotangents: Arrays, wanted: Names) -> Arrays:
        """Return the gradients of the `wanted` inputs, for gradients of all outputs."""
        bars = as_cotangents({name: cotangents[name] for name in RESULTS})
        return at.call(Backward(wanted), at.inputs | bars, results(at.outputs))


@dataclass(frozen=True)
class Tangent(Operation):
    """The tangents of ``(out, lse)``, which are in `data`."""

    outputs = RESULTS
    tangent = None

    def shapes(self, spec: Spec, inputs: Arrays) -> Shapes:
        """As those of `Forward`."""
        return Forward().shapes(spec, inputs)

    @squeezing
    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        return tangent(xp, spec, data | inputs)

    def cotangent(self, at: Point, cotangents: Arrays, wanted: Names) -> Arrays:
        """As that of `Forward`."""
        bars = as_cotangents(cotangents)
        moved = tuple(name.removesuffix(TANGENT) for name in wanted if name.endswith(TANGENT))
        found: Arrays = {}
        if moved:
            found |= as_tangents(at.call(Backward(moved), primals(at.inputs) | bars))
        if still := tuple(name for name in wanted if not name.endswith(TANGENT)):
            found |= at.call(Second(still), at.inputs | bars)
        return found


@dataclass(frozen=True)
class Gradients(Operation):
    """One result for each of the `wanted` inputs, of its shape."""

    wanted: Names

    @property
    def outputs(self) -> Names:
        """The names of the results."""
        return self.wanted

    def shapes(self, spec: Spec, inputs: Arrays) -> Shapes:
        """Return shape and dtype of each result."""
        return {name: (tuple(inputs[name].shape), inputs[name].dtype) for name in self.wanted}


@dataclass(frozen=True)
class Backward(Gradients):
    """The gradients of the `wanted` inputs, from those of ``(out, lse)``; these are in `data`."""

    @squeezing
    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        return backward(xp, spec, data | inputs, self.wanted)

    def tangent(self, at: Point, tangents: Arrays) -> Arrays:
        """As that of `Forward`."""
        return at.call(Second(self.wanted), at.inputs | as_tangents(tangents))

    def cotangent(self, at: Point, cotangents: Arrays, wanted: Names) -> Arrays:
        """As that of `Forward`."""
        moved = as_tangents(cotangents)
        found: Arrays = {}
        if bars := tuple(name for name in wanted if name in COTANGENTS):
            moves = at.call(Tangent(), primals(at.inputs) | moved)
            found |= {name: moves[name.removeprefix("d_")] for name in bars}
        if still := tuple(name for name in wanted if name not in COTANGENTS):
            found |= at.call(Second(still), at.inputs | moved)
        return found


@dataclass(frozen=True)
class Second(Gradients):
    """The tangents of what `Backward` gives."""

    tangent = None

    @squeezing
    def __call__(self, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        return second(xp, spec, data | inputs, self.wanted)

    def cotangent(self, at: Point, cotangents: Arrays, wanted: Names) -> Arrays:
        """As that of `Forward`, for the tangents alone."""
        if still := [name for name in wanted if not name.endswith(TANGENT)]:
            raise NotImplementedError(
                "attention is differentiated to second order: a third derivative, with respect to "
                f"{', '.join(still)}, is not given"
            )
        wanted = tuple(name.removesuffix(TANGENT) for name in wanted)
        bars = {name: at.inputs[name] for name in COTANGENTS}
        moves = primals(at.inputs) | as_tangents(cotangents)
        found: Arrays = {}
        if arrays := tuple(name for name in wanted if name not in COTANGENTS):
            found |= at.call(Second(arrays), moves | bars)
        if of_bars := tuple(name for name in wanted if name in COTANGENTS):
            moved = at.call(Tangent(), moves)
            found |= {name: moved[name.removeprefix("d_")] for name in of_bars}
        return as_tangents(found)
