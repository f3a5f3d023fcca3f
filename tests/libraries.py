"""The libraries that the conformance suite runs on, each behind the same few methods."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import numpy as np

STRICT_VERSIONS = ("2021.12", "2022.12", "2023.12", "2024.12", "2025.12")
CPU = (
    "numpy",
    "numpy-readonly",
    "numpy-bfloat16",
    *(f"array-api-strict-{version}" for version in STRICT_VERSIONS),
    "torch",
    "jax",
    "jax-jit",
)
GPU = ("cupy", "torch-cuda", "jax-cuda")


class Library:
    """NumPy; the other libraries override what differs."""

    dtypes = ("float16", "float32", "float64")
    default = "float32"
    eager = True
    differentiates = False  # functions of the caller

    def __init__(self, name):
        self.name = name
        self.xp = self.load()

    def __repr__(self):
        return self.name

    @property
    def compute(self):
        """The compute dtype of the default dtype."""
        return "float64" if self.default == "float64" else "float32"

    def load(self):
        return np

    @contextmanager
    def active(self):
        """Hold the settings that the library's tests run under."""
        yield

    def dtype(self, name):
        return np.dtype(name)

    def asarray(self, x, dtype=None):
        """Return a NumPy array as one of this library, floats in `dtype` (the default's)."""
        x = np.asarray(x)
        if x.dtype.kind == "f":
            x = x.astype(self.dtype(dtype or self.default))
        return x

    def numpy(self, x):
        """Return an array of this library as NumPy's: floats in float64."""
        x = np.asarray(x)
        return x if x.dtype.kind in "biu" else x.astype(np.float64)

    def call(self, function, *args, **kwargs):
        """Call `function` the way this library's users do."""
        return function(*args, **kwargs)

    def table(self, x):
        """Return an array that integer arrays can index, as callables do."""
        return self.asarray(x, "float32")

    def real(self, x):
        """Return integers as what multiplies with floats."""
        return x

    def where(self, test, x, y):
        """Return `x` where `test` holds, else `y`, which may be a number."""
        return self.xp.where(test, x, y)

    def is_own(self, x):
        """Whether `x` is an array of this library on this fixture's device."""
        return type(x) is np.ndarray

    def eps(self, dtype):
        """Return the spacing at 1 of a dtype by name."""
        return {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}[dtype]


class ReadOnly(Library):
    def asarray(self, x, dtype=None):
        x = super().asarray(x, dtype).copy()
        x.flags.writeable = False
        return x


class Bfloat16(Library):
    dtypes = ("bfloat16",)
    default = "bfloat16"

    def dtype(self, name):
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


class Strict(Library):
    dtypes = ("float32", "float64")

    def load(self):
        import array_api_strict

        return array_api_strict

    @contextmanager
    def active(self):
        version = self.name.removeprefix("array-api-strict-")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The 2021.12 version", UserWarning)
            with self.xp.ArrayAPIStrictFlags(
                api_version=version,
                boolean_indexing=False,
                data_dependent_shapes=False,
                enabled_extensions=(),
            ):
                yield

    def dtype(self, name):
        return getattr(self.xp, name)

    def asarray(self, x, dtype=None):
        x = np.asarray(x)
        name = (dtype or self.default) if x.dtype.kind == "f" else x.dtype.name
        return self.xp.asarray(x.astype(name))

    def numpy(self, x):
        x = np.asarray(x._array)
        return x if x.dtype.kind in "biu" else x.astype(np.float64)

    def table(self, x):
        return Table(super().table(x))

    def real(self, x):
        return self.xp.astype(x, self.xp.float32)

    def where(self, test, x, y):
        return self.xp.where(test, x, self.xp.asarray(y, dtype=x.dtype))

    def is_own(self, x):
        return type(x) is type(self.xp.asarray(0.0))


class Table:
    """An array of array-api-strict that integer arrays of any shape index, by way of `take`."""

    def __init__(self, x):
        self.x, self.dtype = x, x.dtype
        self.xp = x.__array_namespace__()

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        flat = index[0]
        for n, i in zip(self.x.shape[1:], index[1:], strict=True):
            flat = flat * n + i
        values = self.xp.reshape(self.x, (-1,))
        return self.xp.reshape(
            self.xp.take(values, self.xp.reshape(flat, (-1,)), axis=0), flat.shape
        )


class Torch(Library):
    dtypes = ("float16", "bfloat16", "float32", "float64")
    differentiates = True
    device = "cpu"

    def load(self):
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no CUDA device")
        return torch

    def dtype(self, name):
        return getattr(self.xp, name)

    def asarray(self, x, dtype=None):
        x = np.asarray(x)
        wanted = self.dtype((dtype or self.default) if x.dtype.kind == "f" else x.dtype.name)
        return self.xp.asarray(x.copy(), device=self.device).to(wanted)

    def numpy(self, x):
        x = x.detach().cpu()
        return x.double().numpy() if x.is_floating_point() else x.numpy()

    def is_own(self, x):
        return type(x) is self.xp.Tensor and x.device.type == self.device


class TorchCuda(Torch):
    device = "cuda"


class Jax(Library):
    dtypes = ("float16", "bfloat16", "float32", "float64")
    differentiates = True
    platform = "cpu"

    def load(self):
        import jax

        jax.config.update("jax_enable_x64", True)
        self.device = jax.devices(self.platform)[0]
        return jax.numpy

    def dtype(self, name):
        return self.xp.dtype(name)

    def asarray(self, x, dtype=None):
        import jax

        x = np.asarray(x)
        if x.dtype.kind == "f":
            x = x.astype(self.dtype(dtype or self.default))
        return jax.device_put(self.xp.asarray(x), self.device)

    def is_own(self, x):
        import jax

        return isinstance(x, jax.Array) and x.devices() == {self.device}


class JaxCuda(Jax):
    platform = "cuda"


def quick_compilation(lib):
    """Have JAX compile quickly rather than well, where `lib` is JAX."""
    return compiled_quickly() if lib.name.startswith("jax") else nullcontext()


@contextmanager
def compiled_quickly():
    """Have JAX compile quickly rather than well: in a third of the time.

    XLA's option is one of a `jax.jit` or of the whole process, and no setting of JAX's; here it is
    given to all that is compiled meanwhile.
    """
    import jax
    from jax._src import compiler

    options_of = compiler.get_compile_options
    before = jax.config.read("jax_disable_most_optimizations")

    def quick_options(*args, env_options_overrides=None, **kwargs):
        overrides = {"xla_cpu_use_fusion_emitters": False} | (env_options_overrides or {})
        return options_of(*args, env_options_overrides=overrides, **kwargs)

    jax.config.update("jax_disable_most_optimizations", True)
    compiler.get_compile_options = quick_options
    try:
        yield
    finally:
        compiler.get_compile_options = options_of
        jax.config.update("jax_disable_most_optimizations", before)


class JaxJit(Jax):
    """JAX with every call under `jax.jit`: all arrays are traced, and compiled quickly."""

    eager = False

    def active(self):
        return quick_compilation(self)

    def call(self, function, *args, **kwargs):
        import jax

        def is_data(x):
            return isinstance(x, jax.Array) or (isinstance(x, list) and all(map(is_data, x)))

        traced = {name: x for name, x in kwargs.items() if is_data(x)}
        static = {name: x for name, x in kwargs.items() if name not in traced}
        compiled = jax.jit(lambda args, traced: partial(function, **static)(*args, **traced))
        return compiled(args, traced)


class Cupy(Library):
    def load(self):
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        return cupy

    def asarray(self, x, dtype=None):
        return self.xp.asarray(super().asarray(x, dtype))

    def numpy(self, x):
        return super().numpy(self.xp.asnumpy(x))

    def is_own(self, x):
        return type(x) is self.xp.ndarray


_CLASSES = {
    "numpy": Library,
    "numpy-readonly": ReadOnly,
    "numpy-bfloat16": Bfloat16,
    "torch": Torch,
    "torch-cuda": TorchCuda,
    "jax": Jax,
    "jax-jit": JaxJit,
    "jax-cuda": JaxCuda,
    "cupy": Cupy,
}


def library(name):
    """Return a library by its name; ImportError or RuntimeError where it cannot be had."""
    return Strict(name) if name.startswith("array-api-strict-") else _CLASSES[name](name)


def present(name):
    """Whether a GPU library finds its device here."""
    try:
        library(name)
    except Exception:  # an absent library, driver or device: each raises its own
        return False
    return True


def compilations_of_its_own(lib):
    """Keep JAX from what it compiled before, and from keeping what is compiled meanwhile."""
    if not lib.name.startswith("jax"):
        return nullcontext()
    import jax

    jax.clear_caches()
    stack = ExitStack()
    stack.callback(jax.clear_caches)
    return stack
