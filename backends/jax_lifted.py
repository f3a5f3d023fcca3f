"""Functions of the caller, with the traced arrays that they capture as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal, jaxpr_as_fun

from .generic import Array
from .jax_types import axes_of, explicit_mesh, vary


class Lifted:
    """A function with the traced arrays that it captures as its first argument.

    It is traced at once, for all shapes of arguments to come: when they come, the captured tracers
    may be dead, as JAX calls derivatives later.
    """

    def __init__(self, function: Callable[..., Array], examples: list[tuple[Any, ...]]) -> None:
        self.function = function
        self.traced = {}
        for args in examples:
            kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
            self.traced[tuple(x.shape for x in args)] = jax.make_jaxpr(function)(*kinds)
        consts = {id(x): x for closed in self.traced.values() for x in closed.consts}
        if explicit_mesh(list(consts.values())) is not None:
            raise NotImplementedError(
                "score_mod and mask functions must not capture arrays on a mesh with explicit "
                "axes: call attention inside jax.shard_map or jax.sharding.auto_axes"
            )
        self.captured = tuple(x for x in consts.values() if isinstance(x, jax.core.Tracer))

    def __call__(self, captured: tuple[Array, ...], *args: Array) -> Array:
        """Call the function with `captured` in the place of what it holds."""
        if not self.captured:
            return self.function(*args)
        new = {id(x): y for x, y in zip(self.captured, captured, strict=True)}
        closed = self.traced[tuple(x.shape for x in args)]
        consts = [new.get(id(x), x) for x in closed.consts]
        args = tuple(x.astype(t.dtype) for x, t in zip(args, closed.in_avals, strict=True))
        if axes_of(captured, args):
            (found,) = _varying(closed.jaxpr, consts, list(args))
        else:
            (found,) = jaxpr_as_fun(closed.replace(consts=consts))(*args)
        return found


def _varying(jaxpr: Any, consts: list[Array], args: list[Array]) -> list[Array]:
    """Evaluate a jaxpr on arrays that vary over more axes of a mesh than those of its trace."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(x: Any) -> Array:
        return x.val if isinstance(x, Literal) else values[x]

    for step in jaxpr.eqns:
        given, how = [read(x) for x in step.invars], step.params
        if step.primitive.name == "pvary":  # some may have these axes already
            found = vary(given, frozenset(how["axes"]))
        elif step.primitive.name in ("jit", "pjit"):
            found = _varying(how["jaxpr"].jaxpr, how["jaxpr"].consts, given)
        else:
            given = vary(given, axes_of(given))
            how = step.primitive.get_bind_params(how)
            functions, how = how if isinstance(how, tuple) else ((), how)  # before JAX 0.10
            found = step.primitive.bind(*functions, *given, **how)
            found = found if step.primitive.multiple_results else [found]
        values.update(zip(step.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]
