"""What JAX's types say beside shape and dtype.

Inside `jax.shard_map` a type names the axes of the mesh that its value varies over; on a mesh with
explicit axes it says how the array is sharded.  A loop's state keeps its type from the first step
to the last.  So all arrays of a call vary over what any of them varies over, and the algorithm sees
explicit axes as automatic ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .generic import Array

Arrays = dict[str, Array]

# What a JAX has depends on its version.
_auto_axes = getattr(jax.sharding, "auto_axes", None)
_typeof = getattr(jax, "typeof", None) or jax.core.get_aval


def axes_of(*trees: Any) -> frozenset[Any]:
    """Return the axes of a mesh that any array of the trees varies over."""
    found: frozenset[Any] = frozenset()
    for x in jax.tree.leaves(trees):
        kind = _typeof(x)
        kind = getattr(kind, "manual_axis_type", kind)
        found |= getattr(kind, "varying", None) or getattr(kind, "vma", frozenset())
    return found


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """Return the tree with arrays that vary over `axes`, too."""
    if not axes:
        return tree

    def one(x: Any) -> Any:
        missing = tuple(sorted(axes - axes_of(x), key=str))
        if not missing:
            return x
        if hasattr(lax, "pcast"):
            return lax.pcast(x, missing, to="varying")
        return lax.pvary(x, missing)

    return jax.tree.map(one, tree)


def shaped(shape: tuple[int, ...], dtype: Any, axes: frozenset[Any]) -> Any:
    """Return the type of an array that varies over `axes`."""
    if not axes:
        return jax.core.ShapedArray(shape, dtype)
    return jax.make_jaxpr(lambda: vary(jnp.zeros(shape, dtype), axes))().out_avals[0]


def explicit_mesh(*trees: Any) -> Any:
    """Return the mesh, with explicit axes, of any array of the trees; None where there is none."""
    for x in jax.tree.leaves(trees):
        mesh = getattr(getattr(_typeof(x), "sharding", None), "mesh", None)
        if getattr(mesh, "explicit_axes", ()):
            return mesh
    return None


def automatic(function: Callable[..., Arrays], operation: Any, spec: Any) -> Callable[..., Arrays]:
    """Return a function of ``(data, inputs)`` that sees explicit axes as automatic ones."""

    def call(data: dict[str, Any], inputs: Arrays) -> Arrays:
        mesh = None if _auto_axes is None else explicit_mesh(data, inputs)
        if mesh is None:
            return function(data, inputs)
        shapes = operation.shapes(spec, data, inputs)
        shardings = {
            name: NamedSharding(
                mesh,
                _typeof(inputs[name]).sharding.spec
                if name in inputs
                else _spec_of_result(spec, inputs, name, len(shapes[name][0])),
            )
            for name in operation.outputs
        }
        run = _auto_axes(function, axes=tuple(mesh.explicit_axes), out_sharding=shardings)
        found: Arrays = run(data, inputs)
        return found

    return call


def _spec_of_result(spec: Any, inputs: Arrays, name: str, ndim: int) -> PartitionSpec:
    """Return how a result is sharded: as the queries, and as keys and values on batch axes."""
    swapped = spec.layout == "nhd" and not spec.headless
    ndim += name not in ("out", "exact")  # `lse` lacks the width
    parts: list[Any] = [None] * ndim
    batch = range(len(spec.batch))
    whole = (*spec.batch, *(ndim - len(spec.batch)) * (0,))
    for token in ("query", "key", "value"):
        given = _typeof(inputs[token])
        before = ndim - given.ndim
        for i, part in enumerate(given.sharding.spec, before):
            own = given.shape[i - before] == whole[i] if i in batch else token == "query"
            if part is not None and own and i < ndim - 1 and parts[i] is None:
                if not _names(part) & frozenset().union(*map(_names, parts)):
                    parts[i] = part
    if name in ("out", "exact"):
        return PartitionSpec(*parts)
    parts = parts[:-1]
    if swapped:
        parts[-2:] = parts[-1], parts[-2]
    return PartitionSpec(*parts)


def _names(part: Any) -> frozenset[Any]:
    if part is None:
        return frozenset()
    return frozenset(part if isinstance(part, tuple) else (part,))
