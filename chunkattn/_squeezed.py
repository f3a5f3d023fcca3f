"""Calls without batch axes of length 1, for libraries whose products do better without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from math import prod
from typing import Any

from ._problem import TANGENT
from ._spec import Spec

Array = Any
Arrays = dict[str, Array]
Call = Callable[[Any, Any, Spec, dict[str, Any], Arrays], Arrays]

# How many axes an array of a call has beside the batch axes.
_AXES = {"query_offset": 0, "lse": 2, "low": 2}
_AXES |= dict.fromkeys(("query", "key", "value", "bias", "out", "exact"), 3)


def squeezing(call: Call) -> Call:
    """Return an operation's `__call__` that leaves out the batch axes, where all have length 1.

    Not where functions of the caller or arrays of masks take part, which know of batch axes.
    """

    @wraps(call)
    def squeezed(
        self: Any, xp: Any, spec: Spec, data: dict[str, Any], inputs: Arrays
    ) -> dict[str, Array]:
        knowing = spec.calls_back or any(data["masks"])
        if knowing or not spec.batch or prod(spec.batch) != 1 or not xp.squeezes(inputs["query"]):
            return call(self, xp, spec, data, inputs)
        shapes = self.shapes(spec, inputs)
        less = replace(spec, batch=(), schedule=spec.schedule.of_heads())
        found = call(self, xp, less, _without_batch(data), _without_batch(inputs))
        return {name: xp.reshape(x, shapes[name][0]) for name, x in found.items()}

    return squeezed


def _without_batch(arrays: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, x in arrays.items():
        axes = _AXES.get(name.removesuffix(TANGENT).removeprefix("d_"))
        extra = 0 if axes is None else len(getattr(x, "shape", ())) - axes
        found[name] = x[(0,) * extra] if extra > 0 else x
    return found
