"""JAX's transformations of operations that come with rules for their derivatives.

A `HiPrim` (`VJPHiPrimitive` before JAX 0.11) has rules for forward and reverse mode at once; in a
JAX without it, a `jax.custom_vjp` stands in, which refuses forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from .generic import Array
from .jax_mapped import Mapped
from .jax_types import axes_of, shaped, vary

try:
    from jax.experimental import hijax
    from jax.experimental.hijax import Zero, instantiate_zeros
except ImportError:
    hijax = None
HiPrim = getattr(hijax, "HiPrim", None) or getattr(hijax, "VJPHiPrimitive", None)

Arrays = dict[str, Array]


def apply(adapter: Any, operation: Any, spec: Any, data: dict[str, Any], inputs: Arrays) -> Arrays:
    """Return the operation's results, so that JAX can differentiate and batch them."""
    data, inputs = vary((data, inputs), axes_of(data, inputs))
    if HiPrim is None:
        return _with_vjp(adapter, operation, spec)(data, inputs)
    found: Arrays = Primitive(adapter, operation, spec, data, inputs)(data, inputs)
    return found


def _cotangent(
    adapter: Any,
    operation: Any,
    spec: Any,
    kept: tuple[dict[str, Any], Arrays, Arrays],
    bars: Arrays,
    wanted: tuple[str, ...],
) -> Arrays:
    """Call the operation's rule for gradients."""

    def again(*call: Any) -> Arrays:
        return apply(adapter, *call)

    found: Arrays = operation.cotangent(again, spec, *kept, bars, wanted)
    return found


def _with_vjp(adapter: Any, operation: Any, spec: Any) -> Callable[..., Arrays]:
    """Return the operation of ``(data, inputs)`` by means of `jax.custom_vjp`."""

    @jax.custom_vjp  # type: ignore[untyped-decorator]
    def call(data: dict[str, Any], inputs: Arrays) -> Arrays:
        found: Arrays = operation(adapter, spec, data, inputs)
        return found

    def forward(data: dict[str, Any], inputs: Arrays) -> tuple[Arrays, Any]:
        results = apply(adapter, operation.with_residuals(spec), spec, data, inputs)
        return {name: results[name] for name in operation.outputs}, (data, inputs, results)

    def backward(kept: Any, bars: Arrays) -> tuple[None, Arrays]:
        return None, _cotangent(adapter, operation, spec, kept, bars, tuple(kept[1]))

    call.defvjp(forward, backward)
    return call  # type: ignore[no-any-return]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Names:
    """Names of arrays, among residuals."""

    names: tuple[str, ...]


class Primitive(HiPrim or object):  # type: ignore[misc]
    """An operation on ``(data, inputs)`` as one primitive."""

    adapter: Any
    operation: Any
    spec: Any

    def __init__(
        self, adapter: Any, operation: Any, spec: Any, data: dict[str, Any], inputs: Arrays
    ) -> None:
        self.in_avals = jax.tree.map(jax.typeof, (data, inputs))
        shapes, axes = operation.shapes(spec, data, inputs), axes_of(data, inputs)
        self.out_aval = {name: shaped(shapes[name], axes) for name in operation.outputs}
        flat, tree = jax.tree.flatten(self.in_avals)
        self.params = {
            "adapter": adapter, "operation": operation, "spec": spec, "types": (tuple(flat), tree),
        }  # fmt: skip
        super().__init__()

    def expand(self, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""
        found = self.operation(self.adapter, self.spec, data, inputs)
        varied: Arrays = vary(found, axes_of(data, inputs))
        return varied

    def _tangent(self, kept: tuple[dict[str, Any], Arrays, Arrays], tangents: Arrays) -> Arrays:
        """Return the tangents of the outputs from those of the inputs that are not zero."""
        moves = {name: x for name, x in tangents.items() if not isinstance(x, Zero)}
        if self.operation.tangent is not None:
            found: Arrays = self.operation.tangent(self._apply, self.spec, *kept, moves)
            still = {name: jax.numpy.zeros_like(kept[2][name]) for name in self.operation.residuals}
            return found | still
        data, inputs, _ = kept
        results = self.operation.results_tangent(self._apply, self.spec, data, inputs, moves)

        def of_moving(results: Arrays, moving: Arrays) -> Arrays:
            return self.expand(data | results, inputs | moving)

        points = ({name: data[name] for name in results}, {name: inputs[name] for name in moves})
        _, found = jax.jvp(of_moving, points, (results, moves))
        return found

    def _apply(self, *call: Any) -> Arrays:
        return apply(self.adapter, *call)

    def _kept(self, *args: Any) -> tuple[Arrays, Any]:
        """Return the outputs, and what derivatives need: the arguments and all results."""
        results = self._apply(self.operation.with_residuals(self.spec), self.spec, *args)
        return {name: results[name] for name in self.operation.outputs}, (*args, results)

    def jvp(self, primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
        """Forward mode."""
        outputs, kept = self._kept(*primals)
        return outputs, self._tangent(kept, tangents[1])

    def lin(self, _: Any, *args: Any) -> tuple[Arrays, Any]:
        """Forward mode at a point that stays: the outputs, and what the tangents need."""
        return self._kept(*args)

    def linearized(self, kept: Any, _: Any, tangents: Any) -> Arrays:
        """Forward mode at a point that stays: the tangents."""
        return self._tangent(kept, tangents)

    def vjp_fwd(self, nonzero: Any, *args: Any) -> tuple[Arrays, Any]:
        """Reverse mode: the outputs, and what the gradients need."""
        outputs, kept = self._kept(*args)
        wanted = Names(tuple(name for name, wants in nonzero[1].items() if wants))
        return outputs, (*kept, wanted)

    def vjp_bwd(self, kept: Any, bars: Arrays, _: Any, totals: Any) -> None:
        """Reverse mode: add the gradients to their totals."""
        self._pull(kept[:-1], bars, kept[-1].names, totals)

    def _pull(self, kept: Any, bars: Arrays, wanted: tuple[str, ...], totals: Any) -> None:
        bars = {name: instantiate_zeros(x) for name, x in bars.items()}
        found = _cotangent(self.adapter, self.operation, self.spec, kept, bars, wanted)
        for name, gradient in found.items():
            totals[name].accum(gradient)

    def transpose(self, bars: Arrays, data: Any, inputs: Any) -> None:
        """Reverse mode of what is linear in some inputs, which come as their totals."""
        known = {name: x for name, x in inputs.items() if not hasattr(x, "accum")}
        wanted = tuple(name for name in inputs if name not in known)
        self._pull((data, known, {}), bars, wanted, inputs)

    def batch(self, axis: Any, args: Any, dims: Any) -> tuple[Arrays, dict[str, int | None]]:
        """Batching: the same operation, mapped."""
        flat, tree = jax.tree.flatten(dims, is_leaf=lambda x: x is None)
        if all(dim is None for dim in flat):
            alone: Arrays = self(*args)
            return alone, dict.fromkeys(alone)
        mapped = Mapped(self.operation, axis.size, axis.spmd_name, tuple(flat), tree)
        found = apply(self.adapter, mapped, self.spec, *args)
        return found, dict.fromkeys(found, 0)
