"""Taking turns: a lock by name, on a byte of the arena's file that belongs to nobody else.

The lock is one of an open file description (``F_OFD_SETLK``): the kernel keeps it, apart for each thread and greenlet,
and frees it when its holder dies, so there is nothing to clean up.
"""

from __future__ import annotations

import fcntl
import io
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shmstore.engine.mapping import Memory
from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.system.forks import on_fork
from shmstore.system.signals import pass_on_interruption

__all__ = ["held"]

_FLOCK: Final = struct.Struct("hhqqi4x")  # type, whence, start, length, pid; Linux with 64 bits
_SHORTEST, _LONGEST = 0.0002, 0.01  # seconds between attempts


class _Turn(io.FileIO):
    """A descriptor and the locks on it, which go together: at the latest with the last reference, whatever happens."""

    def take(self, at: int) -> bool:
        """Lock a byte; return whether nobody else has it."""
        try:
            self._lock(fcntl.F_WRLCK, at, 1)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        if not self.closed:
            self._lock(fcntl.F_UNLCK, 0, 0)  # a process forked this moment has the descriptor too, and keeps it open
        super().close()

    def after_fork_in_child(self) -> None:
        # The child has the descriptor too, with the locks on it, which would outlive their holder in the parent.
        super().close()  # not `close`: it would unlock what the parent holds

    def _lock(self, kind: int, at: int, length: int) -> None:
        fcntl.fcntl(self, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, length, 0))


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
        StoreUnavailable: The store was closed, or this process has too many files open.
    """
    at, deadline, pause = name % 2**62, time.monotonic() + timeout, _SHORTEST
    turn = _begin(memory)
    try:
        while True:
            if not memory.is_in(turn.fileno()):  # the store has moved: there the others take turns
                turn.close()
                turn = _begin(memory)
            elif turn.take(at):
                if memory.is_in(turn.fileno()):
                    break
            elif time.monotonic() >= deadline:
                raise StoreTimeout(f"somebody else has had the lock of this session for {timeout:g} s")
            else:
                time.sleep(pause)  # not a blocking wait: greenlets share a thread
                pause = min(2 * pause, _LONGEST)
        yield
    finally:
        turn.close()


def _begin(memory: Memory) -> _Turn:
    try:
        try:
            turn = _Turn(memory.way_in(), "r+")
        except FileNotFoundError:
            turn = _Turn(memory.way_in_by_name(), "r+")
    except OSError as exc:
        pass_on_interruption(exc)
        raise StoreUnavailable(f"the lock of this session cannot be taken: {exc.strerror}") from exc
    on_fork(turn)
    return turn
