"""Locks by name, on a byte of the arena's file for each name.

A lock belongs to an open file description (``F_OFD_SETLK``). Each thread or greenlet opens its own. The kernel releases
the lock when the process of its holder dies, so no cleanup is needed. Memory of one process has a table of locks
instead.
"""

from __future__ import annotations

import io
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from shmstore.engine.mapping import MappedFile, PrivateMemory
from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.system.blocking import before_blocking
from shmstore.system.forks import on_fork
from shmstore.system.platform import fcntl
from shmstore.system.signals import pass_on_interruption

__all__ = ["named_lock"]

_FLOCK: Final = struct.Struct("hhqqi4x")  # type, whence, start, length, pid; Linux with 64 bits
_SHORTEST, _LONGEST = 0.0002, 0.01  # seconds between attempts


class _LockFile(io.FileIO):
    """A descriptor with its locks. They are released when it is closed, at the latest with its last reference."""

    def try_lock(self, offset: int) -> bool:
        """Lock a byte; return False if another descriptor has locked it."""
        try:
            self._set_lock(fcntl.F_WRLCK, offset, 1)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        if not self.closed:
            # A process forked at this moment has the descriptor too, and keeps it open.
            self._set_lock(fcntl.F_UNLCK, 0, 0)
        super().close()

    def after_fork_in_child(self) -> None:
        # The child has the descriptor too, with the locks on it, which would outlive their holder in the parent.
        super().close()  # not `close`, which would release the locks of the parent

    def _set_lock(self, kind: int, start: int, length: int) -> None:
        fcntl.fcntl(self, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


class _TableLock:
    """A place in a table of locks. It is given up at the latest with the last reference."""

    def __init__(self, table: dict[int, object]) -> None:
        self._table, self._token, self._name = table, object(), -1

    def try_lock(self, name: int) -> bool:
        """Take a lock; return False if another caller has it."""
        self._name = name
        return self._table.setdefault(name, self._token) is self._token

    def close(self) -> None:
        if self._table.get(self._name) is self._token:
            del self._table[self._name]

    __del__ = close


@contextmanager
def named_lock(current: Callable[[], MappedFile], name: int, timeout: float) -> Iterator[None]:
    """
    Hold the lock of a name.

    Args:
        current: Returns the file of the store, which may be replaced meanwhile.
        name: The name, as a number. Numbers with the same last 62 bits share one lock.
        timeout: Seconds to wait for the lock.

    Raises:
        StoreTimeout: Another caller has held the lock for that long.
        StoreUnavailable: The store was closed, or this process has too many files open.
    """
    offset, deadline, pause = name % 2**62, time.monotonic() + timeout, _SHORTEST
    file = current()
    lock = _open(file)
    try:
        while True:
            if file is not (now := current()):  # other callers lock the current file
                lock.close()
                file, lock = now, _open(now)
            elif lock.try_lock(offset):
                if file is current():
                    break
            elif time.monotonic() >= deadline:
                raise StoreTimeout(f"another caller has held the lock of this session for {timeout:g} s")
            else:
                before_blocking()
                time.sleep(pause)  # not a blocking wait: greenlets share a thread
                pause = min(2 * pause, _LONGEST)
        yield
    finally:
        lock.close()


def _open(file: MappedFile) -> _LockFile | _TableLock:
    if isinstance(file, PrivateMemory):
        if file.closed:
            raise StoreUnavailable("this store was closed")
        return _TableLock(file.named_locks)
    try:
        lock = _LockFile(file.reopen_path(), "r+")
    except OSError as exc:
        pass_on_interruption(exc)
        raise StoreUnavailable(f"the lock of this session cannot be taken: {exc.strerror}") from exc
    on_fork(lock)
    return lock
