"""Threads for NumPy's tasks, with BLAS held to one thread meanwhile.

BLAS's thread count belongs to the process.  The first call that needs it lowers it and the last
one to end restores it, under a lock, whatever happens in between; `fork` in the middle of a call
leaves the child with the count as it was before.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any

try:
    import threadpoolctl
except ImportError:  # BLAS keeps its own threads, and the tasks run one after the other
    threadpoolctl = None


class _Holder:
    """A call that holds BLAS to one thread."""


class _Blas:
    """The BLAS libraries of the process: their thread count, and who holds it at one.

    They are those that are loaded at the first call, NumPy's among them; to look again at each call
    would take a millisecond.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # An interrupt may come where no code can catch it: then a holder goes with its call.
        self.holders: weakref.WeakSet[_Holder] = weakref.WeakSet()
        self.before: list[tuple[Any, int]] = []
        self.libraries: list[Any] | None = None

    def _find(self) -> list[Any]:
        if self.libraries is None:
            found = threadpoolctl.ThreadpoolController().select(user_api="blas")
            self.libraries = found.lib_controllers
        return self.libraries

    def _set(self, counts: list[tuple[Any, int]]) -> None:
        for library, count in counts:
            library.set_num_threads(count)
            # threadpoolctl lets only the thread that set a limit change it again, and ignores
            # every other: give that up, since another thread may be the last to leave.
            give_up = getattr(library, "clear_controlling_thread", None)
            if give_up is not None:
                give_up(force=True)

    def architectures(self) -> set[str]:
        """Return the kinds of CPU whose kernels the BLAS libraries of the process take.

        As OpenBLAS names them; "" for another BLAS, and no kind at all where threadpoolctl is
        missing.
        """
        if threadpoolctl is None:
            return set()
        with self.lock:
            return {getattr(library, "architecture", None) or "" for library in self._find()}

    def most(self) -> int:
        """Return how many threads a call may take at most: those that BLAS would."""
        if threadpoolctl is None:
            return 1
        with self.lock:
            return self._most()

    def _most(self) -> int:
        counts = [n for _, n in self.before] or [b.num_threads for b in self._find()]
        return max(1, *counts)

    def share(self) -> int:
        """Return how many threads a call that starts now should take, beside those under way."""
        if threadpoolctl is None:
            return 1
        with self.lock:
            return max(1, self._most() // (len(self.holders) + 1))

    @contextmanager
    def single_threaded(self) -> Iterator[None]:
        """Hold BLAS to one thread per caller."""
        holder = _Holder()
        try:
            with self.lock:
                if not self.holders:
                    self._restore()
                    self.before = [(library, library.num_threads) for library in self._find()]
                self.holders.add(holder)
                self._set([(library, 1) for library, _ in self.before])
            yield
        finally:
            with self.lock:
                self.holders.discard(holder)
                if not self.holders:
                    self._restore()

    def _restore(self) -> None:
        """Give back the threads; also those that a call left which was interrupted as it ended."""
        self._set(self.before)
        self.before = []

    def after_fork(self) -> None:
        """Start afresh in a child: nobody there holds BLAS any more."""
        self.lock = threading.Lock()
        self.holders = weakref.WeakSet()
        self._restore()

    def enter_worker(self) -> None:
        """Hold BLAS to one thread in a worker where OpenMP counts threads by their caller."""
        for library in self._find():
            if getattr(library, "threading_layer", None) == "openmp":
                library.set_num_threads(1)


class _Here(threading.local):
    """How many tasks the call has whose task runs in this thread; 0 outside of calls."""

    tasks = 0


_here = _Here()
_blas = _Blas()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_blas.after_fork)


most, share, architectures = _blas.most, _blas.share, _blas.architectures


def as_one_of(tasks: int, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, called as one of so many tasks of a call."""
    before, _here.tasks = _here.tasks, tasks
    try:
        return function(*args)
    finally:
        _here.tasks = before


def one_of_several() -> bool:
    """Whether this code is one of several tasks of a call, and BLAS has one thread in it."""
    return _here.tasks > 1


def run_all(task: Callable[[int], None], count: int, threads: int) -> None:
    """Call ``task(i)`` for every `i` below `count` on `threads` threads, the caller's among them.

    The last comes first: under a causal mask it takes longest, and no thread is left with it alone.
    After an exception no further task is begun; it is raised, as the same object, once the tasks
    under way have ended.
    """
    numbers = iter(reversed(range(count)))
    lock = threading.Lock()
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return
                task(i)
        except BaseException:
            stop.set()
            raise

    def help_out() -> None:
        try:
            _blas.enter_worker()
            work()
        except BaseException as error:
            failed.append(error)

    with _blas.single_threaded():
        helpers: list[threading.Thread] = []
        try:
            for _ in range(threads - 1):
                helper = threading.Thread(target=copy_context().run, args=(help_out,))
                with suppress(RuntimeError):  # there can be no more, as when Python shuts down
                    helper.start()
                    helpers.append(helper)
            work()
            for helper in helpers:
                helper.join()
        finally:
            stop.set()
            for helper in helpers:
                helper.join()
    if failed:
        raise failed[0]
