"""Tell which array libraries are installed, and what serves them."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

import array_api_compat

from .. import __version__
from .._adapters import _ADAPTERS
from ._table import show

Module = Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: there is nothing to choose."""


def run(arguments: argparse.Namespace) -> None:
    """Print the versions, then the libraries."""
    show(
        [
            ("chunkattn", __version__),
            ("Python", platform.python_version()),
            ("array-api-compat", version("array_api_compat", array_api_compat)),
        ]
    )
    show(
        [_library(name) for name in _DEVICES],
        headings=("library", "state", "version", "adapter", "devices"),
    )


def _library(name: str) -> tuple[str, str, str, str, str]:
    """Return the table's row for one library; no failure of the library's own gets through."""
    try:
        module = import_module(_MODULES.get(name, name))
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            return name, "not found", "", "", ""
        return name, "broken", version(name, None), "", _told(error)
    try:
        devices = ", ".join(_DEVICES[name](module))
    except Exception as error:
        devices = _told(error)
    return name, "found", version(name, module), _SERVED.get(name, "generic"), devices


def version(distribution: str, module: Module) -> str:
    """Return the version of a distribution, or what its module tells."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # such as cupy, which comes as cupy-cuda12x
        return str(getattr(module, "__version__", "unknown"))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _of_cupy(cupy: Module) -> list[str]:
    runtime = cupy.cuda.runtime
    names = [
        runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())
    ]
    return [f"cuda:{i} ({name})" for i, name in enumerate(names)]


def _of_torch(torch: Module) -> list[str]:
    cuda = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])]


def _of_jax(jax: Module) -> list[str]:
    return [f"{device.platform}:{device.id} ({device.device_kind})" for device in jax.devices()]


def _of_strict(strict: Module) -> list[str]:
    devices = strict.__array_namespace_info__().devices()
    return [str(device).removeprefix("array_api_strict.") for device in devices]


# What lists a library's devices.
_DEVICES: dict[str, Callable[[Module], list[str]]] = {
    "numpy": lambda numpy: ["cpu"],
    "cupy": _of_cupy,
    "torch": _of_torch,
    "jax": _of_jax,
    "dask": lambda dask: ["those of its blocks"],
    "array_api_strict": _of_strict,
    "ml_dtypes": lambda ml_dtypes: ["cpu"],
}
_MODULES = {"dask": "dask.array"}  # dask alone can be there without its arrays
_SERVED = {**_ADAPTERS, "ml_dtypes": "numpy"}  # its dtypes are those of NumPy arrays
