"""NumPy's threads: BLAS is held to one thread during a call, and as it was after it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import threadpoolctl
from chunkattn.backends import _threads

from chunkattn import attention, plan
from chunkattn._cached import cached_property


def blas_threads():
    """Return the thread count of NumPy's BLAS, and not of one that came later (SciPy's).

    `threadpoolctl.threadpool_info` tells it too, but sets it meanwhile to see what that does.
    """
    found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    own = [library for library in found if "numpy" in library.filepath.lower()]
    return [library.num_threads for library in own or found]


@pytest.fixture
def tokens(rng):
    return rng.standard_normal((3, 400, 16), dtype=np.float32)


@pytest.fixture
def two_threads():
    """Let BLAS, and so a call, have two threads, however many the machine has."""
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if max(blas_threads()) < 2:
            pytest.skip("this BLAS takes no second thread")
        yield


def call(tokens, **kwargs):
    return attention(*tokens, query_chunk_size=50, key_chunk_size=64, **kwargs)


@pytest.mark.usefixtures("two_threads")
def test_blas_is_held_and_released(tokens):
    before, seen, threads = blas_threads(), [], set()

    def progress(done, total):
        seen.append(max(blas_threads()))
        threads.add(threading.get_ident())

    call(tokens, progress=progress)
    assert set(seen) == {1}
    assert blas_threads() == before


def test_blas_at_one_thread_means_one(tokens):
    """Who limits BLAS limits the call."""
    threads = set()
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        call(tokens, progress=lambda done, total: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


@pytest.mark.usefixtures("two_threads")
def test_calls_from_many_threads(tokens):
    """The last call to end restores BLAS, whichever thread it is of; every result is the same."""
    before = blas_threads()
    expected = call(tokens)
    for _ in range(8):
        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(call, tokens) for _ in range(8)]
        for result in results:
            np.testing.assert_array_equal(result.result(), expected)
        assert blas_threads() == before


@pytest.mark.usefixtures("two_threads")
def test_a_call_within_a_call(tokens):
    """A callable that attends itself finds no second pool, and BLAS is restored once."""
    before = blas_threads()
    expected = call(tokens)

    def mask_mod(b, h, q_idx, kv_idx):
        np.testing.assert_allclose(call(tokens), expected, atol=1e-6)
        return kv_idx >= 0

    np.testing.assert_allclose(call(tokens, mask=mask_mod), expected, atol=1e-6)
    assert blas_threads() == before


INTERRUPTED = """
import os, signal, sys, threading
from time import perf_counter
import numpy as np
import {library} as xp
from chunkattn import attention

signal.signal(signal.SIGINT, signal.default_int_handler)  # where the parent ignores it
x = xp.asarray(np.ones((1, 2**17, 64), np.float32))  # a minute and more
begun = perf_counter()
threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    attention(x, x, x, implementation="chunked")
except KeyboardInterrupt:
    assert perf_counter() - begun < 15
    again = attention(x[:, :100], x[:, :100], x[:, :100])
    assert abs(again - 1).max() < 1e-5
    sys.exit(0)
sys.exit("it was not interrupted")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT between processes")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_interrupted(library):
    """Ctrl-C ends a long call soon, and the process goes on."""
    pytest.importorskip(library)
    code = INTERRUPTED.format(library=library)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class Interrupting:
    """A BLAS library at which Ctrl-C arrives right after it was held to one thread."""

    def __init__(self, library):
        self.library, self.armed = library, True

    @property
    def num_threads(self):
        return self.library.num_threads

    def set_num_threads(self, count):
        self.library.set_num_threads(count)
        if count == 1 and self.armed:
            self.armed = False
            raise KeyboardInterrupt

    def __getattr__(self, name):
        return getattr(self.library, name)


@pytest.mark.usefixtures("two_threads")
def test_interrupted_as_blas_is_held(tokens, monkeypatch):
    call(tokens)
    before = blas_threads()
    libraries = list(map(Interrupting, _threads._blas._find()))
    monkeypatch.setattr(_threads._blas, "libraries", libraries)
    with pytest.raises(KeyboardInterrupt):
        call(tokens)
    assert blas_threads() == before
    call(tokens)
    assert blas_threads() == before


@pytest.mark.usefixtures("two_threads")
def test_what_an_interrupt_left_is_given_back(tokens):
    """Where none of a call's code ran any more, the next call restores BLAS."""
    before = blas_threads()
    held = _threads._blas.single_threaded()
    held.__enter__()
    assert set(blas_threads()) == {1}
    _threads._blas.holders.clear()
    call(tokens)
    assert blas_threads() == before


@pytest.mark.usefixtures("two_threads")
def test_plans_beside_other_calls(tokens):
    """They count the threads that a call may have, whatever others have meanwhile."""
    expected, plans = plan(*tokens, query_chunk_size=50), []

    def progress(done, total):
        plans.append(plan(*tokens, query_chunk_size=50))

    call(tokens, progress=progress)
    assert expected.threads == 2
    assert {(x.threads, x.peak_bytes) for x in plans} == {(2, expected.peak_bytes)}


LATE = """
import atexit, threading, time
import numpy as np
from chunkattn import attention

x = np.ones((3, 8, 400, 16), np.float32)

def call(name):
    print(name, abs(attention(*x, query_chunk_size=50) - 1).max() < 1e-4)

def after_the_main_thread():
    threading.main_thread().join()
    call("thread")

call("first")
atexit.register(call, "at exit")
threading.Thread(target=after_the_main_thread).start()
"""


def test_calls_after_the_main_thread():
    """In threads that outlive it, and as Python exits, when it may start no more of them."""
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("first True\nthread True\nat exit True\n", "")


FAULTS = """
import resource, sys
import numpy as np
from chunkattn import attention

x = np.ones((8, 160, 64), np.float32)
for _ in range(20):
    attention(x, x, x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    attention(x, x, x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc has rules of its own")
def test_memory_of_small_calls_stays():
    """What a call frees the next one takes, and no page of it has to be cleared by the system."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < 30  # of 500 pages


def test_threads_do_not_wait_for_each_others_properties():
    """What tiles compute once (positions, the hash of dropout), they compute side by side."""
    together = threading.Barrier(2, timeout=30)

    class Part:
        @cached_property
        def number(self):
            return together.wait()

    parts = Part(), Part()
    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(lambda part: part.number, parts)) == [0, 1]
    assert [part.number for part in parts] == [part.__dict__["number"] for part in parts]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork")  # of a process with threads, which is the point here
@pytest.mark.usefixtures("two_threads")
def test_fork_within_a_call(tokens):
    """A child that is forked during a call has BLAS as it was before, and can attend."""
    before, status = blas_threads(), []

    def progress(done, total):
        if done != 3:
            return
        child = os.fork()
        if child == 0:
            code = 1
            try:
                held = blas_threads() == before
                code = 0 if held and np.isfinite(call(tokens)).all() else 2
            finally:
                sys.stdout.flush()
                os._exit(code)
        status.append(os.waitpid(child, 0)[1])

    call(tokens, progress=progress)
    assert status == [0]
    assert blas_threads() == before
