"""Progress of a call: a tqdm bar, or the caller's own function."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any


class Progress:
    """Counts finished tasks and reports them; a context, so that a bar is closed in any case.

    `done` is what the algorithm calls after each task, from any thread.  An exception of the
    caller's function stops the call and leaves the context as the same object, also where a library
    wraps it on the way (JAX).
    """

    def __init__(self, progress: Any, total: int) -> None:
        self._lock = threading.Lock()
        self._count, self._total = 0, total
        self._error: BaseException | None = None
        self._bar: Any = None
        self._new_bar: Any = None
        self._report: Callable[[int, int], Any] = progress
        if progress is True:
            self._new_bar = _tqdm()
            self._report = lambda done, total: self._bar.update()
        elif not callable(progress):
            raise TypeError(
                f"progress must be None, True or a callable (done, total); got {progress!r}"
            )

    def done(self) -> None:
        """Count a task, and report it."""
        with self._lock:
            self._count += 1
            if self._error is not None:
                return
            try:
                self._report(self._count, self._total)
            except BaseException as error:
                self._error = error
                raise

    def __enter__(self) -> Progress:
        if self._new_bar is not None:
            self._bar = self._new_bar(total=self._total, desc="attention", unit="chunk")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._error is not None and error is not self._error:
            raise self._error


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm
