"""Named locks that meet a rebuild, a signal, a fork or too many open files."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from shmstore import Store, StoreTimeout, StoreUnavailable
from shmstore.engine import named_locks
from shmstore.engine.arena import Arena
from shmstore.options import Options

GEOMETRY = Options.of(memory=2**18).geometry


@pytest.fixture
def two(store_dir: Path) -> Iterator[tuple[Store, Store]]:
    """Return two users of one file."""
    options = Options.of(memory=2**18)
    first = Store.over(Arena.create(store_dir / "arena", GEOMETRY), options)
    second = Store.over(Arena.open(store_dir / "arena"), options)
    yield first, second
    first.close()
    second.close()


def held(store: Store, name: int, timeout: float) -> AbstractContextManager[None]:
    return named_locks.named_lock(lambda: store.arena.file, name, timeout)


def test_after_a_rebuild_locks_are_taken_in_the_new_file(two: tuple[Store, Store]) -> None:
    first, second = two
    first.move()
    with held(first, 1, 0.01), pytest.raises(StoreTimeout), held(second, 1, 0.01):
        pass


def test_a_waiter_continues_in_the_rebuilt_file(two: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = two
    waited: list[bool] = []
    waits, taken = threading.Event(), threading.Event()

    class Clock:
        """The real clock, except that a waiter's first pause ends when the lock in the new file is taken."""

        monotonic = staticmethod(time.monotonic)

        @staticmethod
        def sleep(pause: float) -> None:
            waits.set()
            assert taken.wait(60)
            time.sleep(pause)

    def wait() -> None:
        try:
            with held(second, 1, 0.5):
                waited.append(False)
        except StoreTimeout:
            waited.append(True)

    monkeypatch.setattr(named_locks, "time", Clock)
    thread = threading.Thread(target=wait)
    try:
        with ExitStack() as in_the_new_file:
            with held(first, 1, 0):
                thread.start()
                assert waits.wait(60)
                first.move()
                in_the_new_file.enter_context(held(first, 1, 0))
            taken.set()
            thread.join()
    finally:
        taken.set()
        thread.join()
    assert waited == [True]


def open_files(arena: Arena) -> list[str]:
    """Return this process' descriptors of the file that an arena is in, or was in."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if target.removesuffix(" (deleted)") == arena.file.path:
            found.append(fd)
    return found


class Interruption(Exception):
    """The exception of a signal handler."""


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_signal_at_any_instruction_leaves_nothing_behind(store_dir: Path) -> None:
    arena = Arena.create(store_dir / "arena", GEOMETRY)
    store = Store.over(arena, Options.of(memory=2**18))
    files = len(open_files(arena))

    def interrupted(at: int) -> bool:
        steps = 0

        def tracer(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal steps
            if frame.f_code.co_filename == named_locks.__file__:
                frame.f_trace_opcodes = True
                if event == "opcode":
                    steps += 1
                    if steps == at:
                        sys.settrace(None)
                        raise Interruption
            return tracer

        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            with held(store, at, 1):
                pass
        except Interruption:
            return True
        finally:
            sys.settrace(before)
        return False

    at = 1
    gc.freeze()  # else each collection looks at all that the tests have imported
    try:
        while interrupted(at):
            gc.collect()
            with held(store, at, 0):
                pass
            assert len(open_files(arena)) == files, at
            at += 1
    finally:
        gc.unfreeze()
    assert at > 50
    arena.close()


def test_a_lock_is_released_although_another_process_has_the_descriptor(two: tuple[Store, Store]) -> None:
    """A child that another thread forked just before the descriptor was closed."""
    first, second = two
    with held(first, 1, 0):
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"],
            stdin=subprocess.PIPE,
            pass_fds=[int(fd) for fd in open_files(first.arena)],
        )
    try:
        with held(second, 1, 0):
            pass
    finally:
        child.communicate(b"\n")


def test_too_many_open_files_are_named_in_the_error() -> None:
    with Store(memory=2**18) as store:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(StoreUnavailable, match="Too many open files"), store.lock("a"):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
