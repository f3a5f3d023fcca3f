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
_abstract_mesh = getattr(jax.sharding, "get_abstract_mesh", None)
_typeof = getattr(jax, "typeof", None) or jax.core.get_aval


def is_floating(dtype: Any) -> bool:
    """Whether `dtype` is one of real floating numbers."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _type(x: Any) -> Any:
    """Return the type of an array, which may be the type itself."""
    return x if isinstance(x, jax.core.ShapedArray) else _typeof(x)


def axes_of(*trees: Any) -> frozenset[Any]:
    """Return the axes of a mesh that any array, or type of one, of the trees varies over."""
    found: set[Any] = set()
    for x in jax.tree.leaves(trees):
        kind = _type(x)
        kind = getattr(kind, "manual_axis_type", kind)
        found.update(getattr(kind, "varying", getattr(kind, "vma", ())))
    return frozenset(found)


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


def shaped(of: tuple[tuple[int, ...], Any], axes: frozenset[Any]) -> Any:
    """Return the type of an array of this shape and dtype that varies over `axes`."""
    if not axes:
        return jax.core.ShapedArray(*of)
    return jax.make_jaxpr(lambda: vary(jnp.zeros(*of), axes))().out_avals[0]


def explicit_mesh(*trees: Any) -> Any:
    """Return the mesh, with explicit axes, of any array of the trees; None where there is none."""
    for x in jax.tree.leaves(trees):
        mesh = getattr(getattr(_type(x), "sharding", None), "mesh", None)
        if getattr(mesh, "explicit_axes", ()):
            return mesh
    return None


def is_on_mesh() -> bool:
    """Whether code is called on a mesh, which JAX's context tells."""
    return _abstract_mesh is not None and not _abstract_mesh().empty


def automatic(function: Callable[..., Arrays], operation: Any, spec: Any) -> Callable[..., Arrays]:
    """Return a function of ``(data, inputs)`` that sees explicit axes as automatic ones."""

    def call(data: dict[str, Any], inputs: Arrays) -> Arrays:
        mesh = explicit_mesh(data, inputs)
        if mesh is None or _auto_axes is None:
            return function(data, inputs)
        shapes = operation.shapes(spec, inputs)
        shardings = {
            name: NamedSharding(
                mesh,
                _type(inputs[name]).sharding.spec
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
    whole = name in ("out", "exact")  # `lse` lacks the width
    width = ndim - 1 if whole else ndim
    parts: list[Any] = [None] * (width + 1)
    for token in ("query", "key", "value"):
        given = _type(inputs[token])
        before = width + 1 - given.ndim
        for i, part in enumerate(given.sharding.spec, before):
            if i < len(spec.batch):
                own = given.shape[i - before] == spec.batch[i]
            else:
                own = token == "query" and i < width
            if own and parts[i] is None and not _names(part) & _names(*parts):
                parts[i] = part
    if not whole and spec.layout == "nhd" and not spec.headless:
        parts[-3:-1] = parts[-2], parts[-3]
    return PartitionSpec(*(parts if whole else parts[:-1]))


def _names(*parts: Any) -> set[Any]:
    """Return the names of axes in parts of a `PartitionSpec`."""
    tuples = (part if isinstance(part, tuple) else (part,) for part in parts)
    return {name for part in tuples for name in part if name is not None}
