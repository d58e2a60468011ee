"""Memory of one process, and the lock of its threads: what an arena has where processes cannot share one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import count

import pytest
from fault_injection import Interrupted, Steps, interrupt, tracing
from mutual_exclusion import check_mutual_exclusion

from shmstore.codec.ids import key_of
from shmstore.engine.arena import Arena
from shmstore.engine.frame import seal
from shmstore.engine.header import SERVER_PID
from shmstore.engine.layout import MAX_MEMORY, Geometry, available
from shmstore.engine.mapping import PrivateMemory
from shmstore.engine.mutex import ThreadMutex
from shmstore.engine.verify import problems
from shmstore.errors import StoreFull, StoreTimeout, StoreUnavailable
from shmstore.testing.base import at_once, in_background

KEY = key_of(b"a")


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(PrivateMemory(Geometry.plan(2**16)), fresh=True)
    assert isinstance(arena.file.mutex, ThreadMutex)
    yield arena
    arena.close()


def publish(arena: Arena, body: bytes) -> None:
    arena.publish(arena.find(KEY), KEY, seal(KEY, 0, 0, body), 0, 2**62, 1)


def is_free(arena: Arena) -> bool:
    """Return whether another thread gets the lock at once."""

    def take() -> bool:
        try:
            return arena.try_lock()
        finally:
            arena.unlock()

    with in_background(take) as taken:
        return taken()


def test_threads_exclude_each_other(arena: Arena) -> None:
    check_mutual_exclusion(arena)


def test_waiting_is_bounded_and_the_lock_stays_with_its_holder(arena: Arena) -> None:
    def wait(timeout: float) -> None:
        try:
            arena.lock(timeout)
        finally:
            arena.unlock()  # it is not this thread's, so nothing happens

    try:
        arena.lock(1)
        for timeout, said in ((-1, "busy"), (0.0, "not free for 0 s: another thread"), (0.05, "not free for 0.05 s")):
            with pytest.raises(StoreTimeout, match=said):
                at_once([partial(wait, timeout)])
        assert not is_free(arena)
    finally:
        arena.unlock()
    assert is_free(arena)
    wait(float("inf"))
    arena.counters.flush()
    _, waits = arena.counters.waits()
    assert sum(waits) == 2, "those who did not wait are not counted"


def test_a_call_inside_a_call_is_refused_and_harms_nothing(arena: Arena) -> None:
    try:
        arena.lock(1)
        try:
            with pytest.raises(StoreTimeout, match="inside"):
                arena.lock(1)
        finally:
            arena.unlock()
        assert not is_free(arena)
    finally:
        arena.unlock()
    assert is_free(arena)


def test_an_exception_at_any_instruction_leaves_it_free(arena: Arena) -> None:
    for chosen in count(1):
        steps = Steps(chosen, interrupt)
        with suppress(Interrupted):
            try:
                with tracing(steps, instructions=True):
                    arena.lock(5)
            finally:
                arena.unlock()
        assert is_free(arena), f"instruction {chosen}"
        if steps.count < chosen:
            break
    assert chosen > 30, "nothing was stepped"


def test_releasing_it_runs_no_instruction_of_python(arena: Arena) -> None:
    """At each of these a signal handler could raise, and the lock would stay with this thread for ever."""
    steps = Steps(0, interrupt)
    with tracing(steps, instructions=True):
        arena.lock(5)
        taken = steps.count
        (free,) = (arena.unlock,)
        free()
    assert (steps.count, is_free(arena)) == (taken, True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_of_fork_has_a_copy_and_a_free_lock(arena: Arena) -> None:
    publish(arena, b"before")
    arena.cells[SERVER_PID] = os.getpid()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            arena.lock(1)
            held.set()
            done.wait()
        finally:
            arena.unlock()

    with in_background(hold) as ended:
        held.wait()
        child = os.fork()
        if not child:
            try:
                arena.lock(1)
                publish(arena, b"of the child")
                arena.unlock()
                os._exit(0 if arena.cells[SERVER_PID] == os.getpid() and not problems(arena) else 1)
            finally:
                os._exit(77)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        done.set()
        ended()
    entry = arena.reader.read(KEY, 1)
    assert entry is not None
    assert b"before" in entry[4]
    assert arena.cells[SERVER_PID] == os.getpid()


def test_what_does_not_fit_into_memory_is_refused() -> None:
    if available() > MAX_MEMORY:
        pytest.skip("this machine has more memory than a store can use")
    with pytest.raises(StoreFull, match="cannot reserve"):
        PrivateMemory(Geometry.plan(MAX_MEMORY))


def test_a_closed_one_is_that(arena: Arena) -> None:
    arena.close()
    assert arena.closed
    with pytest.raises(StoreUnavailable, match="closed"):
        arena.lock(1)
    arena.unlock()
