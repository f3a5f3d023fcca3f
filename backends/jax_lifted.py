"""Functions of the caller, with the arrays that they capture as an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from ._functions import of_floating
from .generic import Array
from .jax_types import axes_of, explicit_mesh, is_floating, is_on_mesh, vary


def lift(
    function: Callable[..., Array],
    examples: list[tuple[Any, ...]],
    axes: frozenset[Any] = frozenset(),
) -> tuple[Lifted, tuple[Array, ...]]:
    """Return the lifted function, and the arrays to pass to it.

    It is traced at once, for all shapes of arguments to come, which vary over `axes` of a mesh:
    when they come, captured tracers may be dead, as JAX calls derivatives later.
    """

    def varying(*args: Array) -> Array:
        return function(*vary(args, axes))

    traces = {}
    for args in examples:
        kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
        traces[tuple(x.shape for x in args)] = jax.make_jaxpr(varying if axes else function)(*kinds)
    consts = {id(x): x for closed in traces.values() for x in closed.consts}
    if explicit_mesh(list(consts.values())) is not None:
        raise NotImplementedError(
            "score_mod and mask functions must not capture arrays on a mesh with explicit "
            "axes: call attention inside jax.shard_map or jax.sharding.auto_axes"
        )
    told = {shapes: text for shapes, closed in traces.items() if (text := _text(closed))}
    if len(told) == len(traces) and not any(map(_is_bound, consts.values())):
        return Lifted(traces, list(consts), told), tuple(consts.values())
    traced = {key: x for key, x in consts.items() if isinstance(x, jax.core.Tracer)}
    return Lifted(traces, list(traced), None, function), tuple(traced.values())


class Lifted:
    """A function with the arrays that it captures as its first argument.

    Two are equal where their traces are, which are `told` by their texts, so that what was compiled
    for one serves the other, whatever arrays it captures: it keeps none of those.  Where they are
    not told it equals no other; then the `function` is called where it captures no tracer.

    Attributes
    ----------
    reusable : bool
        Whether another may be equal.
    """

    def __init__(
        self,
        traces: dict[Any, ClosedJaxpr],
        passed: list[int],
        told: dict[Any, str] | None = None,
        function: Callable[..., Array] | None = None,
    ) -> None:
        self.reusable = told is not None
        self.function = None if passed else function
        # The constants of each trace: their numbers among those that are `passed`, or themselves.
        places = {id_: number for number, id_ in enumerate(passed)}
        self.traced = {
            shapes: (closed.jaxpr, [places.get(id(x), x) for x in closed.consts])
            for shapes, closed in traces.items()
        }
        self._key: Any = object()
        if told is not None:
            numbers = {shapes: tuple(consts) for shapes, (_, consts) in self.traced.items()}
            self._key = tuple((shapes, text, numbers[shapes]) for shapes, text in told.items())

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
        if axes_of(captured, args) or is_on_mesh():  # the steps remember another mesh
            (found,) = _varying(jaxpr, consts, list(args))
        else:
            (found,) = jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*args)
        return found


def _text(closed: ClosedJaxpr) -> str | None:
    """Return a text of which an equal one does the same, derivatives included; None where not.

    A function that comes with rules for its derivatives (`jax.custom_vjp`) is told with what it is
    differentiated by, since JAX's text has only the names of the rules.
    """
    returned, text = closed.jaxpr.outvars, str(closed.jaxpr)
    one = len(returned) == 1 and not isinstance(returned[0], Literal)
    if not (one and _is_told(closed.jaxpr)):
        return None
    ruled = _ruled(closed.jaxpr)
    if not ruled or not is_floating(returned[0].aval.dtype):
        return text
    try:
        derivative = _derivative(closed.jaxpr)
    except (TypeError, ValueError, NotImplementedError):  # it has none, of reverse mode
        return None
    known = _is_told(derivative.jaxpr) and _ruled(derivative.jaxpr) <= ruled
    return text + str(derivative.jaxpr) if known and not derivative.consts else None


def _derivative(jaxpr: Jaxpr) -> ClosedJaxpr:
    """Trace the gradients of a program's result by its floating arrays, captured ones too."""
    count = len(jaxpr.constvars)

    def result(*xs: Array) -> Array:
        (found,) = jaxpr_as_fun(ClosedJaxpr(jaxpr, xs[:count]))(*xs[count:])
        return found

    def gradients(bar: Array, *xs: Array) -> Any:
        function, floating = of_floating(result, xs, is_floating)
        _, vjp = jax.vjp(function, *(xs[i] for i in floating))
        return vjp(bar)

    variables = (*jaxpr.outvars, *jaxpr.constvars, *jaxpr.invars)
    kinds = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in variables]
    return jax.make_jaxpr(gradients)(*kinds)


def _steps(jaxpr: Jaxpr) -> Iterator[Any]:
    """Yield the steps of a program, and those of its inner programs."""
    for step in jaxpr.eqns:
        yield step
        for x in jax.tree.leaves(list(step.params.values())):
            inner = getattr(x, "jaxpr", x)
            if isinstance(inner, Jaxpr):
                yield from _steps(inner)


def _ruled(jaxpr: Jaxpr) -> set[str]:
    """Return the texts of those functions in a program that come with rules."""
    return {
        str(step.params.get("call_jaxpr"))
        for step in _steps(jaxpr)
        if step.primitive.name.startswith(("custom_jvp", "custom_vjp"))
    }


def _is_told(jaxpr: Jaxpr) -> bool:
    """Whether a program's text tells what it does, but for derivatives.

    Not where functions are in it, whose text is an address, or in its steps arrays, or shardings,
    whose text leaves out the devices.
    """
    held = (x for step in _steps(jaxpr) for x in jax.tree.leaves(list(step.params.values())))
    return " at 0x" not in str(jaxpr) and not any(
        getattr(x, "ndim", 0) or getattr(x, "consts", ()) or isinstance(x, jax.sharding.Sharding)
        for x in held
    )


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
            kinds = [x.aval for x in step.invars]
            if list(map(axes_of, given)) != list(map(axes_of, kinds)):  # else as it was traced
                given = vary(given, axes_of(given))
            how = step.primitive.get_bind_params(how)
            functions, how = how if isinstance(how, tuple) else ((), how)  # before JAX 0.10
            found = step.primitive.bind(*functions, *given, **how)
            found = found if step.primitive.multiple_results else [found]
        values.update(zip(step.outvars, found, strict=True))
    return [read(x) for x in jaxpr.outvars]
