"""Functions of the caller, and the tensors that they take from elsewhere than their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .generic import Array
from .torch_autograd import tensors_in

functorch = torch._C._functorch


def captured_by(function: Callable[..., Any], args: tuple[Array, ...]) -> tuple[Array, ...]:
    """Return the tensors that a function takes from elsewhere, found by a call that is watched.

    Refused is what would get no gradient, since it is out of sight.
    """
    records = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    with torch.set_grad_enabled(records), Watch(args) as watch:
        found = function(*args)
    captured = held = tuple(watch.captured)
    if any(x.grad_fn is not None for x in captured):
        with Watch(args) as again:  # what is not there then was made by the function itself
            function(*args)
        held = tuple(x for x in captured if any(x is y for y in again.captured))
    if _depends_on_more(found, held):
        raise TypeError(
            "score_mod must not hold tensors that require gradients inside of TorchScript or of a "
            "custom autograd.Function, where they are not found: pass plain PyTorch code, or call "
            "attention within torch.no_grad()"
        )
    return captured


class Watch(TorchFunctionMode):  # type: ignore[misc]
    """Collects the tensors that a function takes from elsewhere than its arguments."""

    def __init__(self, own: tuple[Array, ...]) -> None:
        super().__init__()
        self.own = list(own)  # held, so that no number of an object is used twice
        self.known = {id(x) for x in own}
        self.depth = functorch.maybe_current_level() or 0
        self.captured: list[Array] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Look at what goes in, and remember what comes out."""
        self.captured += self._new((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.own += self._new(result)
        return result

    def _new(self, x: Any) -> list[Array]:
        """Return tensors not seen before, but for those of a `torch.func` within the function."""
        found = [
            y
            for y in tensors_in(x)
            if id(y) not in self.known and functorch.maybe_get_level(y) <= self.depth
        ]
        self.known.update(map(id, found))
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


class Exchange(TorchFunctionMode):  # type: ignore[misc]
    """Puts other tensors in the place of captured ones."""

    def __init__(self, old: tuple[Array, ...], new: tuple[Array, ...]) -> None:
        super().__init__()
        self.new = {id(x): y for x, y in zip(old, new, strict=True)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call with the exchanged arguments."""
        return func(*self._exchanged(args), **self._exchanged(kwargs or {}))

    def _exchanged(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self.new.get(id(x), x)
        if isinstance(x, dict):
            return {name: self._exchanged(y) for name, y in x.items()}
        if type(x) in (tuple, list):
            return type(x)(map(self._exchanged, x))
        return x


class Lifted:
    """A function with the tensors it captures as its first argument."""

    def __init__(self, function: Callable[..., Array], captured: tuple[Array, ...]) -> None:
        self.function, self.captured = function, captured

    def __call__(self, captured: tuple[Array, ...], *args: Array) -> Array:
        """Call the function with `captured` in the place of what it holds."""
        if not self.captured:
            return self.function(*args)
        with Exchange(self.captured, captured):
            return self.function(*args)
