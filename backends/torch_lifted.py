"""Functions of the caller, and the tensors that they take from elsewhere than their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.overrides import TorchFunctionMode

from .generic import Array
from .torch_autograd import tensors_in

functorch = torch._C._functorch


def lift(
    function: Callable[..., Any],
    args: tuple[Array, ...],
    is_derived: Callable[[tuple[Array, ...]], bool],
) -> tuple[Lifted, tuple[Array, ...]]:
    """Return a lifted function, and the tensors to pass to it, found by calls that are watched.

    Refused is what would get no gradient, since it is out of sight.  `is_derived` says whether
    derivatives of a call that captures some tensors may be asked for.
    """
    transformed = torch._C._are_functorch_transforms_active()
    records = torch.is_grad_enabled() and not transformed
    with torch.set_grad_enabled(records), Watch(Known(args)) as watch:
        found = function(*args)
    captured = held = tuple(watch.captured)
    refuses = _requires_grad if records or transformed else _none
    if is_derived(captured):
        with Watch(Known(args)) as again:
            function(*args)
        seen, seen_again = Known(captured), Known(again.captured)
        held = tuple(x for x in captured if x in seen_again)
        # Results of TorchScript are seen at each call anew: then it cannot be told what is new.
        refuses = _any if len(held) == len(captured) else _none
        captured += tuple(x for x in again.captured if x not in seen)  # made before, and kept
    if _depends_on_more(found, held):
        raise TypeError(
            "score_mod must not hold tensors that require gradients inside of TorchScript or of a "
            "custom autograd.Function, where they are not found: pass plain PyTorch code, or call "
            "attention within torch.no_grad()"
        )
    return Lifted(function, captured, refuses), captured


def _any(x: Array) -> bool:
    return True


def _none(x: Array) -> bool:
    return False


def _requires_grad(x: Array) -> bool:
    return bool(x.requires_grad)


class Known:
    """Tensors by their identity; it keeps none of them."""

    def __init__(self, tensors: Iterable[Array] = ()) -> None:
        self.alive: WeakValueDictionary[int, Array] = WeakValueDictionary()
        self.add(tensors)

    def add(self, tensors: Iterable[Array]) -> None:
        """Know these, too."""
        for x in tensors:
            self.alive[id(x)] = x

    def __contains__(self, x: Array) -> bool:
        return self.alive.get(id(x)) is x


class Watch(TorchFunctionMode):  # type: ignore[misc]
    """Collects the tensors that a function takes from elsewhere; what it makes gets known."""

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.known = known
        self.depth = functorch.maybe_current_level() or 0
        self.captured: list[Array] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at what goes in, and remember what comes out."""
        self.captured += self._new((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._new(result)
        return result

    def _new(self, x: Any) -> list[Array]:
        """Return tensors not known before, but for those of a `torch.func` within the function."""
        found = [
            y
            for y in tensors_in(x)
            if y not in self.known and functorch.maybe_get_level(y) <= self.depth
        ]
        self.known.add(found)
        return found


def _depends_on_more(found: Any, captured: tuple[Array, ...]) -> bool:
    """Whether gradients of a function's result go to tensors that are not `captured`."""
    known = {id(x) for x in captured} | {id(x.grad_fn) for x in captured if x.grad_fn is not None}
    left = [found.grad_fn] if isinstance(found, torch.Tensor) and id(found) not in known else []
    while left:
        node = left.pop()
        if node is None or id(node) in known:
            continue
        known.add(id(node))
        variable = getattr(node, "variable", None)  # of a leaf
        if variable is not None and id(variable) not in known:
            return True
        left += [follower for follower, _ in node.next_functions]
    return False


class Exchange(Watch):
    """Puts other tensors in the place of captured ones, and refuses what was not captured.

    A derivative by it would be lost; and in the place of what was captured (a module's parameters,
    after `torch.func.functional_call`) it would make another function of the one differentiated.
    """

    def __init__(
        self,
        known: Known,
        old: tuple[Array, ...],
        new: tuple[Array, ...],
        refuses: Callable[[Array], bool],
    ) -> None:
        super().__init__(known)
        self.refuses = refuses
        self.new = {id(x): y for x, y in zip(old, new, strict=True)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call with the exchanged arguments."""
        if any(map(self.refuses, self._new((args, kwargs)))):
            raise RuntimeError(  # after a TypeError operators of Python would try something else
                "score_mod or mask_mod takes a tensor that it did not take when attention was "
                "called: where gradients are asked for, it must take the same ones on every tile "
                "and until the gradients are there (under torch.func.functional_call: slope = "
                "module.slope before it, not module.slope in it)"
            )
        result = func(*self._exchanged(args), **self._exchanged(kwargs or {}))
        self._new(result)
        return result

    def _exchanged(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self.new.get(id(x), x)
        if isinstance(x, dict):
            return {name: self._exchanged(y) for name, y in x.items()}
        if type(x) in (tuple, list):
            return type(x)(map(self._exchanged, x))
        return x


class Lifted:
    """A function with the tensors it captures as its first argument.

    `refuses` says of a tensor that it has not captured whether it must not come.
    """

    def __init__(
        self,
        function: Callable[..., Array],
        captured: tuple[Array, ...],
        refuses: Callable[[Array], bool],
    ) -> None:
        self.function, self.captured, self.refuses = function, captured, refuses
        self.known = Known(captured)

    def __call__(self, captured: tuple[Array, ...], *args: Array) -> Array:
        """Call the function with `captured` in the place of what it holds."""
        if not self.captured and self.refuses is _none:
            return self.function(*args)
        self.known.add((*captured, *args))
        with Exchange(self.known, self.captured, captured, self.refuses):
            return self.function(*args)
