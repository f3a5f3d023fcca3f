"""How far memory rises above where it stood, measured from outside for any library."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import array_api_compat

Array = Any


class Meter(NamedTuple):
    """A measurement under way: what is measured, and the bytes that its peak has risen by."""

    measure: str
    rise: Callable[[], int]


def start(like: Array) -> Meter | None:
    """Begin to measure the peak of the memory that holds `like`; None where nothing can.

    On an accelerator this is the peak of the library's allocator.  Else it is the resident set of
    the process, which counts whatever the library does: its threads, BLAS's buffers, a
    compilation.  Memory that the process had freed but not given back is not seen again.
    """
    if array_api_compat.is_torch_array(like) and like.is_cuda:
        return _torch(like.device)
    if array_api_compat.is_cupy_array(like):
        return _cupy()
    if array_api_compat.is_jax_array(like):
        (device, *_) = like.devices()
        if device.memory_stats() is not None:
            return _jax(device)
    return _resident_set() or _largest_resident_set()


def of_torch_cpu(call: Callable[[], Any]) -> tuple[int, Any]:
    """Return by how much PyTorch's allocations on the CPU rise in one call, and its result.

    They are read from the profiler's trace, whose every event slows the call.  What MKL takes for
    itself is not among them.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each profile writes to stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event["name"] == "[memory]"]
    steps.sort(key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in steps), initial=0)), result


def _torch(device: Any) -> Meter:
    from torch import cuda

    cuda.synchronize(device)
    cuda.reset_peak_memory_stats(device)
    before = cuda.memory_allocated(device)
    return Meter("allocator", lambda: cuda.max_memory_allocated(device) - before)


def of_malloc(call: Callable[[], Any], is_ready: Callable[[Any], bool]) -> tuple[int, Any] | None:
    """Return by how much what glibc's malloc has given out rises in one call, and its result.

    It is read as often as can be until the result is there, and a short peak may be missed.  None
    where malloc does not tell.
    """
    info = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if info is None:  # before glibc 2.33
        return None
    info.restype = _MallocInfo

    def held() -> int:
        found = info()
        return int(found.uordblks + found.hblkhd)

    give_back()  # of many free chunks it would take long to see how much they are
    before = peak = held()
    result = call()
    while not is_ready(result):
        peak = max(peak, held())
    return max(peak, held()) - before, result


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def give_back() -> None:
    """Return what the process has freed to the system, or a call that takes it would not count."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)  # glibc's
        trim(0)


def _cupy() -> Meter:
    """Measure the pool, which keeps what it once took."""
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    return Meter("allocator", lambda: pool.total_bytes() - before)


def _jax(device: Any) -> Meter:
    """Measure from JAX's peak, which cannot be reset: an upper bound after a larger call."""
    before = device.memory_stats()["bytes_in_use"]
    return Meter("allocator", lambda: device.memory_stats()["peak_bytes_in_use"] - before)


def _resident_set() -> Meter | None:
    """Measure by Linux's high-water mark of the resident set, set back to where it stands."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        _status("VmHWM")
    except (OSError, KeyError):
        return None
    return Meter("resident set", lambda: max(0, _status("VmHWM") - before))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[field].split()[0]) * 1024


def _largest_resident_set() -> Meter | None:
    """Measure by the largest resident set so far: a lower bound after a larger peak."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:
        return None

    unit = 1 if sys.platform == "darwin" else 1024
    before = getrusage(RUSAGE_SELF).ru_maxrss
    return Meter(
        "resident set, at least", lambda: (getrusage(RUSAGE_SELF).ru_maxrss - before) * unit
    )
