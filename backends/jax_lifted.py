"""Functions of the caller, with the arrays that they capture as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from .generic import Array
from .jax_types import axes_of, explicit_mesh, vary


def lift(
    function: Callable[..., Array], examples: list[tuple[Any, ...]]
) -> tuple[Lifted, tuple[Array, ...]]:
    """Return the lifted function, and the arrays to pass to it.

    It is traced at once, for all shapes of arguments to come: when they come, captured tracers may
    be dead, as JAX calls derivatives later.
    """
    traces = {}
    for args in examples:
        kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
        traces[tuple(x.shape for x in args)] = jax.make_jaxpr(function)(*kinds)
    consts = {id(x): x for closed in traces.values() for x in closed.consts}
    if explicit_mesh(list(consts.values())) is not None:
        raise NotImplementedError(
            "score_mod and mask functions must not capture arrays on a mesh with explicit "
            "axes: call attention inside jax.shard_map or jax.sharding.auto_axes"
        )
    if all(map(_tells_all, traces.values())) and not any(map(_is_bound, consts.values())):
        return Lifted(traces, list(consts)), tuple(consts.values())
    traced = {key: x for key, x in consts.items() if isinstance(x, jax.core.Tracer)}
    return Lifted(traces, list(traced), function), tuple(traced.values())


class Lifted:
    """A function with the arrays that it captures as its first argument.

    Two are equal where their traces are, so that what was compiled for one serves the other,
    whatever arrays it captures: it keeps none of those.  A trace that is not told by its text
    equals no other; then the `function` is called where it captures no tracer.

    Attributes
    ----------
    reusable : bool
        Whether another may be equal.
    """

    def __init__(
        self,
        traces: dict[Any, ClosedJaxpr],
        passed: list[int],
        function: Callable[..., Array] | None = None,
    ) -> None:
        self.reusable = function is None
        self.function = None if passed else function
        # The constants of each trace: their numbers among those that are `passed`, or themselves.
        places = {id_: number for number, id_ in enumerate(passed)}
        self.traced = {
            shapes: (closed.jaxpr, [places.get(id(x), x) for x in closed.consts])
            for shapes, closed in traces.items()
        }
        told = ((key, str(x), tuple(numbers)) for key, (x, numbers) in self.traced.items())
        self._key: Any = tuple(told) if self.reusable else object()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lifted) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __call__(self, captured: tuple[Array, ...], *args: Array) -> Array:
        """Call the function with `captured` in the place of what it holds."""
        if self.function is not None:
            return self.function(*args)
        jaxpr, places = self.traced[tuple(x.shape for x in args)]
        consts = [captured[x] if isinstance(x, int) else x for x in places]
        given = zip(args, jaxpr.invars, strict=True)
        args = tuple(x.astype(variable.aval.dtype) for x, variable in given)
        if axes_of(captured, args):
            (found,) = _varying(jaxpr, consts, list(args))
        else:
            (found,) = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*args)
        return found


def _tells_all(closed: ClosedJaxpr) -> bool:
    """Whether a trace of equal text does the same, and returns one array.

    Not where functions are in it, whose text is an address, or in its steps arrays, or shardings,
    whose text leaves out the devices.
    """
    returned = closed.jaxpr.outvars
    one = len(returned) == 1 and not isinstance(returned[0], Literal)
    return one and " at 0x" not in str(closed.jaxpr) and not _holds_more(closed.jaxpr)


def _holds_more(jaxpr: Jaxpr) -> bool:
    """Whether arrays or shardings are in a program's steps, or in those of its inner programs."""
    for step in jaxpr.eqns:
        for x in jax.tree.leaves(list(step.params.values())):
            inner = getattr(x, "jaxpr", x)
            if getattr(x, "ndim", 0) or getattr(x, "consts", ()):
                return True
            if isinstance(x, jax.sharding.Sharding):
                return True
            if isinstance(inner, Jaxpr) and _holds_more(inner):
                return True
    return False


def _is_bound(x: Any) -> bool:
    """Whether an array may be on other devices than those of a call that it were passed to."""
    if isinstance(x, jax.core.Tracer) or jax.device_count() == 1:
        return False
    return bool(getattr(x, "committed", False))


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
