"""JAX's transformations of operations that come with rules for their derivatives.

Primitives of JAX stand for every operation and its tangent, with the rules that JAX asks of any
(https://docs.jax.dev/en/latest/jax-primitives.html): one for the operations that call a kernel of
JAX's, one for all others, and one for the tangents of both.  Forward mode takes the operation's
rule for tangents.  To JAX, reverse mode is forward mode with what is linear in it transposed: the
transpose of the tangent is the operation's rule for gradients.

A function with these in it is to `jax.jit` as any other: its compiled calls need no Python, which
those with a primitive of `jax.experimental.hijax` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .generic import NO_COMPLEX, Array
from .jax_mapped import Mapped
from .jax_types import automatic, axes_of, explicit_mesh, shaped, vary

try:
    from jax._src.dispatch import prim_requires_devices_during_lowering as named_devices
except ImportError:  # a JAX to come: calls of its kernels may lack derivatives there
    named_devices = set()

Arrays = dict[str, Array]

primitive, tangent_primitive = Primitive("chunkattn"), Primitive("chunkattn_tangent")
kernel_primitive = Primitive("chunkattn_kernel")
# JAX lowers its kernels for devices that it knows, and all else for any.  It tells by the
# primitives in a function, does not see those inside of ours, and has no public name for this set.
named_devices.add(kernel_primitive)


def apply(adapter: Any, operation: Any, spec: Any, data: dict[str, Any], inputs: Arrays) -> Arrays:
    """Return the operation's results, so that JAX can differentiate and batch them."""
    which = kernel_primitive if operation.calls_kernel else primitive
    return _bound(which, adapter, operation, spec, data, inputs)


def _bound(which: Any, adapter: Any, operation: Any, spec: Any, *arrays: dict[str, Any]) -> Arrays:
    """Return the results of a primitive by name."""
    arrays = jax.tree.map(jax.numpy.asarray, arrays)
    flat, tree = jax.tree.flatten(vary(arrays, axes_of(arrays)))
    found = which.bind(*flat, call=Call(adapter, operation, spec, tree))
    return dict(zip(operation.outputs, found, strict=True))


@dataclass(frozen=True)
class Call:
    """What is static in a call of a primitive, whose arrays come flat.

    These are `data` and `inputs` of the operation; of the tangent also `results`, and the tangents
    of the inputs that move.
    """

    adapter: Any
    operation: Any
    spec: Any
    tree: Any

    def arrays(self, flat: Any) -> tuple[dict[str, Any], ...]:
        """Return the arrays by name."""
        found: tuple[dict[str, Any], ...] = jax.tree.unflatten(self.tree, flat)
        return found

    def flat(self, found: Arrays) -> list[Array]:
        """Return results in their order."""
        return [found[name] for name in self.operation.outputs]

    def again(self, operation: Any, spec: Any, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Call an operation, as rules do."""
        return apply(self.adapter, operation, spec, data, inputs)

    def at(self, data: dict[str, Any], inputs: Arrays, results: Arrays) -> Any:
        """Return where rules are called."""
        return self.operation.point(self.again, self.spec, data, inputs, results)

    def compute(self, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Return the operation's results."""
        run = partial(self.operation, self.adapter, self.spec)
        found: Arrays = automatic(run, self.operation, self.spec)(data, inputs)
        varied: Arrays = vary(found, axes_of(data, inputs))
        return varied

    def tangents(
        self, data: dict[str, Any], inputs: Arrays, results: Arrays, moves: Arrays
    ) -> Arrays:
        """Return the tangents of the results, from those of the inputs that move."""
        operation, at = self.operation, self.at(data, inputs, results)
        if operation.tangent is not None:
            found: Arrays = operation.tangent(at, moves)
            still = {name: jax.numpy.zeros_like(results[name]) for name in operation.residuals}
            return found | still
        moving = operation.results_tangent(at, moves)

        def of_moving(results: Arrays, moved: Arrays) -> Arrays:
            return self.compute(data | results, inputs | moved)

        points = ({name: data[name] for name in moving}, {name: inputs[name] for name in moves})
        _, found = jax.jvp(of_moving, points, (moving, moves))
        return found

    def moved(self, *arrays: dict[str, Any]) -> list[Array]:
        """Return the `tangents` by their primitive, which can be transposed."""
        return self.flat(
            _bound(tangent_primitive, self.adapter, self.operation, self.spec, *arrays)
        )


def _compute(*flat: Array, call: Call) -> list[Array]:
    return call.flat(call.compute(*call.arrays(flat)))


def _move(*flat: Array, call: Call) -> list[Array]:
    return call.flat(call.tangents(*call.arrays(flat)))


def _types(*flat: Any, call: Call) -> list[Any]:
    """Return the types of the results, or of their tangents, from those of the arguments."""
    _, inputs, *more = call.arrays(flat)
    if explicit_mesh(flat) is not None:  # they tell how the results are sharded
        traced = jax.make_jaxpr(partial(_move if more else _compute, call=call))(*flat)
        return list(traced.out_avals)
    shapes = call.operation.shapes(call.spec, inputs)
    return [shaped(shapes[name], axes_of(*flat)) for name in call.operation.outputs]


def _nonzero(tangents: Arrays) -> Arrays:
    return {name: x for name, x in tangents.items() if not isinstance(x, ad.Zero)}


def _jvp(primals: Any, tangents: Any, *, call: Call) -> tuple[list[Array], list[Array]]:
    """Forward mode: the results, computed with what the rules need, and their tangents."""
    (data, inputs), (still, moves) = call.arrays(primals), call.arrays(tangents)
    if any(jax.numpy.iscomplexobj(x) for x in jax.tree.leaves(still) if type(x) is not ad.Zero):
        raise TypeError(NO_COMPLEX)
    results = call.again(call.operation.with_residuals(call.spec), call.spec, data, inputs)
    return call.flat(results), call.moved(data, inputs, results, _nonzero(moves))


def _jvp_of_tangent(primals: Any, tangents: Any, *, call: Call) -> tuple[list[Array], list[Array]]:
    """Forward mode of tangents, which are linear in the moves alone."""
    *still, moves = call.arrays(tangents)
    if not any(map(_nonzero, still)):
        found = tangent_primitive.bind(*primals, call=call)
        return found, call.moved(*call.arrays(primals)[:3], _nonzero(moves))
    dense = tuple(map(ad.instantiate_zeros, tangents))
    outputs, moved = jax.jvp(partial(_move, call=call), tuple(primals), dense)
    return outputs, moved


def _transpose(bars: Any, *flat: Any, call: Call) -> list[Array | None]:
    """Return the gradients of what is not there: the last arrays, or some of them."""
    data, inputs, *rest = call.arrays(flat)
    results, moves = rest or ({}, inputs)
    wanted = tuple(name for name, x in moves.items() if ad.is_undefined_primal(x))
    if not rest and call.operation.keeps_outputs:  # its rule wants results
        raise NotImplementedError("jax.linear_transpose of attention is not given: take jax.vjp")
    if not rest:
        inputs = {name: x for name, x in inputs.items() if name not in wanted}
    named = dict(zip(call.operation.outputs, map(ad.instantiate_zeros, bars), strict=True))
    found = call.operation.cotangent(call.at(data, inputs, results), named, wanted)
    places = call.arrays(range(len(flat)))[-1]
    gradients: list[Array | None] = [None] * len(flat)
    for name in wanted:
        gradients[places[name]] = found[name]
    return gradients


def _names(axis: Any) -> tuple[tuple[str, Any], ...]:
    """Return what `jax.vmap` takes for an axis; it has a name where its user gives it one."""
    name = axis.name if isinstance(axis.name, str) else None
    found = {"axis_size": axis.size, "spmd_axis_name": axis.spmd_name, "axis_name": name}
    return tuple((key, x) for key, x in found.items() if x is not None)


def _batch(axis: Any, flat: Any, dims: Any, *, call: Call) -> tuple[list[Array], Any]:
    """Return the results of the same operation, mapped."""
    mapped = Mapped(call.operation, _names(axis), tuple(dims), call.tree)
    found = call.again(mapped, call.spec, *call.arrays(flat))
    return list(found.values()), [0] * len(found)


def _batch_tangent(axis: Any, flat: Any, dims: Any, *, call: Call) -> tuple[list[Array], Any]:
    """Return the tangents of each entry."""
    names = dict(_names(axis))
    found = jax.vmap(partial(_move, call=call), in_axes=tuple(dims), **names)(*flat)
    return found, [0] * len(found)


def _register(which: Any, compute: Any, jvp: Any, batch: Any) -> None:
    """Give a primitive its rules."""

    def batched(axis: Any, flat: Any, dims: Any, *, call: Call) -> tuple[list[Array], Any]:
        if any(dim is not None for dim in dims):
            found: tuple[list[Array], Any] = batch(axis, flat, dims, call=call)
            return found
        alone = which.bind(*flat, call=call)
        return alone, [None] * len(alone)

    which.multiple_results = True
    which.def_impl(compute)
    which.def_abstract_eval(_types)
    ad.primitive_jvps[which] = jvp
    ad.primitive_transposes[which] = _transpose
    batching.fancy_primitive_batchers[which] = batched
    mlir.register_lowering(which, mlir.lower_fun(compute, multiple_results=True))


for one in (primitive, kernel_primitive):
    _register(one, _compute, _jvp, _batch)
_register(tangent_primitive, _move, _jvp_of_tangent, _batch_tangent)
