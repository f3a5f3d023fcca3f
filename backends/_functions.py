"""Functions of the caller, with other arguments than the caller gave them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Array = Any


class Unlifted:
    """A function that captures nothing, with an empty tuple as its first argument."""

    def __init__(self, function: Callable[..., Array]) -> None:
        self.function = function

    def __call__(self, captured: tuple[Array, ...], *args: Array) -> Array:
        """Call the function."""
        return self.function(*args)


def of_floating(
    function: Callable[..., Any], primals: tuple[Array, ...], is_floating: Callable[[Any], bool]
) -> tuple[Callable[..., Any], list[int]]:
    """Return `function` of its floating arguments alone, and the numbers of these.

    `is_floating` is asked about dtypes.
    """
    floating = [i for i, x in enumerate(primals) if is_floating(x.dtype)]

    def of_those(*xs: Array) -> Any:
        args = list(primals)
        for i, x in zip(floating, xs, strict=True):
            args[i] = x
        return function(*args)

    return of_those, floating
