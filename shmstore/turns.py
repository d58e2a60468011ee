"""Taking turns: a lock by name, on a byte of the arena's file that belongs to nobody else.

The lock is one of an open file description (``F_OFD_SETLK``): the kernel keeps it, apart for each thread and greenlet,
and frees it when its holder dies, so there is nothing to clean up.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shmstore.errors import StoreTimeout
from shmstore.memory import Memory

__all__ = ["held"]

_FLOCK: Final = struct.Struct("hhqqi4x")  # type, whence, start, length, pid; Linux with 64 bits
_SHORTEST, _LONGEST = 0.0002, 0.01  # seconds between attempts

_mine: set[int] = set()  # descriptors


@contextmanager
def held(memory: Memory, name: int, timeout: float) -> Iterator[None]:
    """
    Hold the lock of that name.

    Args:
        memory: Whose processes take turns.
        name: A number; those that are the same in the last 62 bits have one lock.
        timeout: Seconds to wait for it.

    Raises:
        StoreTimeout: Another has it for longer.
    """
    fd = memory.open_again()
    try:
        _mine.add(fd)
        _acquire(fd, name % 2**62, timeout)
        yield
    finally:
        if fd in _mine:  # not so in a child forked meanwhile
            _mine.remove(fd)
            os.close(fd)


def _acquire(fd: int, at: int, timeout: float) -> None:
    deadline, pause = time.monotonic() + timeout, _SHORTEST
    while not _try(fd, at):
        if time.monotonic() >= deadline:
            raise StoreTimeout(f"somebody else has had the lock of this session for {timeout:g} s")
        time.sleep(pause)  # not a blocking wait: greenlets share a thread
        pause = min(2 * pause, _LONGEST)


def _try(fd: int, at: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
    except BlockingIOError:
        return False
    return True


def _forked() -> None:
    # The child has them too, with the locks on them, which would outlive their holder in the parent.
    for fd in _mine:
        os.close(fd)
    _mine.clear()


os.register_at_fork(after_in_child=_forked)
