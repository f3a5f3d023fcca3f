"""Operations under `jax.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import jax

from .generic import Array

Arrays = dict[str, Array]


def _to_axis(x: Array, axis: int | None) -> Array:
    """Return `x` with its first axis as `axis`; for None without it, as all entries are equal."""
    return x[0] if axis is None else jax.numpy.moveaxis(x, 0, axis)


@dataclass(frozen=True)
class Mapped:
    """An operation under `jax.vmap`, with rules that map those of the operation."""

    operation: Any
    axis: tuple[tuple[str, Any], ...]  # what `jax.vmap` takes for it: its size, and names
    dims: tuple[int | None, ...]  # of data and inputs, flat
    tree: Any

    # What the mapping does not change.
    calls_kernel = property(attrgetter("operation.calls_kernel"))
    keeps_outputs = property(attrgetter("operation.keeps_outputs"))
    outputs = property(attrgetter("operation.outputs"))
    point = property(attrgetter("operation.point"))
    residuals = property(attrgetter("operation.residuals"))

    def with_residuals(self, spec: Any) -> Mapped:
        """Return the operation with what its rules need, mapped."""
        return replace(self, operation=self.operation.with_residuals(spec))

    @property
    def axes(self) -> tuple[Any, dict[str, int | None]]:
        """The mapped axes of data and inputs."""
        data, inputs = jax.tree.unflatten(self.tree, self.dims)
        return data, inputs

    def _vmap(self, function: Callable[..., Arrays], *axes: Any) -> Callable[..., Arrays]:
        mapped: Callable[..., Arrays] = jax.vmap(function, in_axes=axes, **dict(self.axis))
        return mapped

    def shapes(self, spec: Any, inputs: Arrays) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return shape and dtype of each result."""

        def one(x: Any, dim: int | None) -> Any:
            shape = tuple(x.shape)
            if dim is not None:
                shape = shape[:dim] + shape[dim + 1 :]
            return jax.ShapeDtypeStruct(shape, x.dtype)

        of_inputs = self.axes[1]
        ones = {name: one(x, of_inputs[name]) for name, x in inputs.items()}
        shapes, size = self.operation.shapes(spec, ones), dict(self.axis)["axis_size"]
        return {name: ((size, *shape), dtype) for name, (shape, dtype) in shapes.items()}

    def __call__(self, xp: Any, spec: Any, data: dict[str, Any], inputs: Arrays) -> Arrays:
        """Compute."""

        def call(data: dict[str, Any], inputs: Arrays) -> Arrays:
            found: Arrays = self.operation(xp, spec, data, inputs)
            return found

        if spec.schedule.limited and list(dict(self.axis)) == ["axis_size"]:
            return self._one_by_one(call, data, inputs)
        data_axes, input_axes = self.axes
        if self.calls_kernel:  # which wants all of its arrays mapped
            size = dict(self.axis)["axis_size"]
            inputs = {
                name: jax.numpy.broadcast_to(x, (size, *x.shape)) if input_axes[name] is None else x
                for name, x in inputs.items()
            }
            input_axes = {name: axis or 0 for name, axis in input_axes.items()}
        return self._vmap(call, data_axes, input_axes)(data, inputs)

    def _one_by_one(
        self, call: Callable[..., Arrays], data: dict[str, Any], inputs: Arrays
    ) -> Arrays:
        """Call for one entry after the other, since memory is limited."""
        flat = jax.tree.leaves((data, inputs))

        def entry(i: Array) -> Arrays:
            ones = (
                x if axis is None else jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)
                for x, axis in zip(flat, self.dims, strict=True)
            )
            return call(*jax.tree.unflatten(self.tree, ones))

        found: Arrays = jax.lax.map(entry, jax.numpy.arange(dict(self.axis)["axis_size"]))
        return found

    @property
    def tangent(self) -> Any:
        """The rule for tangents, mapped; None where the operation has none."""
        return None if self.operation.tangent is None else self._tangent

    def _tangent(self, at: Any, tangents: Arrays) -> Arrays:
        def rule(data: dict[str, Any], inputs: Arrays, outputs: Arrays, tangents: Arrays) -> Arrays:
            one = at._replace(data=data, inputs=inputs, outputs=outputs)
            found: Arrays = self.operation.tangent(one, tangents)
            return found

        moving = {name: self.axes[1][name] for name in tangents}
        return self._vmap(rule, *self.axes, 0, moving)(at.data, at.inputs, at.outputs, tangents)

    def results_tangent(self, at: Any, tangents: Arrays) -> Arrays:
        """Return the tangents of attention's results in the data, mapped."""

        def rule(data: dict[str, Any], inputs: Arrays, tangents: Arrays) -> Arrays:
            one = at._replace(data=data, inputs=inputs)
            found: Arrays = self.operation.results_tangent(one, tangents)
            return found

        moving = {name: self.axes[1][name] for name in tangents}
        found = self._vmap(rule, *self.axes, moving)(at.data, at.inputs, tangents)
        return {name: _to_axis(x, self.axes[0][name]) for name, x in found.items()}

    def cotangent(self, at: Any, cotangents: Arrays, wanted: tuple[str, ...]) -> Arrays:
        """Return the gradients of the `wanted` inputs, mapped; summed for what is not mapped."""

        def rule(data: dict[str, Any], inputs: Arrays, outputs: Arrays, bars: Arrays) -> Arrays:
            one = at._replace(data=data, inputs=inputs, outputs=outputs)
            found: Arrays = self.operation.cotangent(one, bars, wanted)
            return found

        of_data, axes = self.axes
        given = {name: axes[name] for name in at.inputs}
        found = self._vmap(rule, of_data, given, 0, 0)(at.data, at.inputs, at.outputs, cotangents)
        return {
            name: x.sum(axis=0) if axes[name] is None else jax.numpy.moveaxis(x, 0, axes[name])
            for name, x in found.items()
        }
