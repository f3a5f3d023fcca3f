"""From an array to its library's adapter, loaded on the first array of that library."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib import import_module
from numbers import Number
from typing import Any

import array_api_compat

Array = Any

# The top-level module that defines an array class, to the adapter in backends/.
_ADAPTERS = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}


@lru_cache
def _named(module: str, namespace: Any) -> Any:
    return import_module(f"{__package__}.backends.{module}").Adapter(namespace)


def _known(cls: Any) -> str | None:
    """Return the adapter's name for an array class, found through its bases; else None."""
    roots = (base.__module__.partition(".")[0] for base in cls.__mro__)
    return next((_ADAPTERS[root] for root in roots if root in _ADAPTERS), None)


def compiling() -> bool:
    """Whether PyTorch's compiler or export traces the call, and wants to see one operator."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


_ARRAYS: dict[type, bool] = {}  # whether a class is one of arrays; asking array_api_compat is slow
_BY_CLASS: dict[type, Any] = {}


def is_array(x: Any) -> bool:
    """Whether `x` is an array of a library that attention can take."""
    cls = type(x)
    if isinstance(x, type):  # NumPy's scalar classes look like arrays, and all share one class
        return False
    if compiling():  # spare the compiler a look at caches, on which the compiled code would depend
        from ._compiled import is_tensor

        if is_tensor(x):
            return True
    if cls not in _ARRAYS:  # a NumPy scalar is none
        _ARRAYS[cls] = array_api_compat.is_array_api_obj(x) and not isinstance(x, Number)
    return _ARRAYS[cls]


def loaded(x: Array) -> Any:
    """Return the adapter for an array of this class, which is imported where it was not yet."""
    return _named(_known(type(x)) or "generic", array_api_compat.array_namespace(x))


def adapter_of(x: Array, name: str) -> Any:
    """Return the adapter for the array `x`, the argument called `name`."""
    return _adapter_of(x, name, compiling())


def _adapter_of(x: Array, name: str, tracing: bool) -> Any:
    """Do the work of `adapter_of`; `tracing` is whether the compiler looks on."""
    adapter = None if tracing else _BY_CLASS.get(type(x))
    if adapter is None:
        adapter = _found(x, name, tracing)
    adapter.check(x, name)
    return adapter


def _found(x: Array, name: str, tracing: bool) -> Any:
    """Find the adapter for the class of `x`, and keep it unless the compiler looks on."""
    if tracing:
        from ._compiled import TORCH, is_tensor

        if is_tensor(x):
            return TORCH
    if not is_array(x):
        raise TypeError(
            f"{name} must be an array of an array API library (NumPy, CuPy, JAX, PyTorch, …), "
            f"not {_class_name(x)}"
        )
    cls: Any = type(x)
    if cls not in _BY_CLASS:
        _BY_CLASS[cls] = loaded(x)
    return _BY_CLASS[cls]


def common_adapter(arrays: Iterable[tuple[str, Array]]) -> Any:
    """Return the adapter that all `arrays`, with their names, share; refuse two libraries."""
    (first, x), *rest = arrays
    tracing = compiling()
    xp = _adapter_of(x, first, tracing)
    device, place = xp.device(x), first
    for name, y in rest:
        other = _adapter_of(y, name, tracing)
        if other is not xp:
            raise TypeError(
                f"{first} is a {xp.name} array and {name} is a {other.name} array; "
                "all arrays of a call must come from one library"
            )
        elsewhere = xp.device(y)
        if device is None:
            device, place = elsewhere, name
        elif elsewhere is not None and elsewhere != device:
            raise ValueError(
                f"{place} is on device {device} and {name} is on device {elsewhere}; "
                "all arrays of a call must be on one device"
            )
    return xp


def _class_name(x: Any) -> str:
    cls = type(x)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"
