"""The memory of an arena: a file that is mapped into this process, or memory of this process alone."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from shmstore.engine import layout
from shmstore.engine.header import CLOSED, SERVER_PID, STATE
from shmstore.engine.layout import Geometry
from shmstore.engine.mutex import Mutex, ThreadMutex
from shmstore.errors import StoreFull, StoreTimeout, StoreUnavailable
from shmstore.system.files import LEAVING, is_same_file, try_lock
from shmstore.system.forks import on_fork
from shmstore.system.platform import close, fcntl, private_memory
from shmstore.system.signals import pass_on_interruption

if TYPE_CHECKING:
    from shmstore.engine._core import Core

__all__ = ["ArenaReplaced", "MappedFile", "PrivateMemory"]

_PATIENCE: Final = 5.0  # seconds


class ArenaReplaced(StoreUnavailable):
    """The sessions are in another file: its path must be opened again."""


class MappedFile:
    """
    The mapping of one file, which stays the same until it is closed.

    Attributes:
        geometry: The size of everything in it.
        path: The path at which it was opened; None: anonymous memory.
        exclusive: Whether no other process or object had it open at that moment.
        memory: The whole file, as bytes.
        cells: The whole file, as 8-byte cells. They are aligned, so each is read and written in one instruction.
        mutex: The lock of its writers.
        closed: Whether `close` was called.
        core: The C core over it; None: the Python engine works alone, or the file was closed.
    """

    mutex: Mutex | ThreadMutex
    core: Core | None = None
    closed = False

    def __init__(self, fd: int, geometry: Geometry, path: str | None = None) -> None:
        self.geometry = geometry
        self.path = path
        self._descriptor = _Descriptor(fd)
        self.memory = mmap.mmap(fd, geometry.size)
        self.memory.madvise(mmap.MADV_DONTDUMP)  # core files must not contain sessions
        self.cells = memoryview(self.memory).cast("Q")
        # Each user of the file, children of fork included, holds a shared flock on it. Whoever gets the exclusive lock
        # is the only user. Only then may the mutex be initialised, in whatever state it was left or damaged.
        self.exclusive = try_lock(fd)
        if not self.exclusive:
            _share(fd)
        self.mutex = Mutex(self.memory, layout.MUTEX, fresh=self.exclusive)
        if self.exclusive:
            _share(fd)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MappedFile:
        """
        Map the arena at ``path``.

        Raises:
            FileNotFoundError: The file does not exist.
            ArenaDamaged: The file is not an arena that can be used.
            StoreUnavailable: Processes of another pid namespace use it.
        """
        place = os.path.abspath(path)
        fd, geometry = layout.open_file(place)
        file = cls(fd, geometry, place)
        try:
            layout.check_namespace(fd, place)
        except BaseException:
            file.close()
            raise
        return file

    def is_alone(self) -> bool:
        """
        Return whether no other process or object uses the file; wait `LEAVING` seconds at most for that.

        Raises:
            StoreUnavailable: Processes of another pid namespace have begun to use it meanwhile.
        """
        alone, deadline = self.exclusive, time.monotonic() + LEAVING
        while not alone and time.monotonic() < deadline:
            time.sleep(0.01)
            try:
                alone = try_lock(self._descriptor.fd)  # gives up the shared lock for a moment, even if it fails
            finally:
                _share(self._descriptor.fd)
            layout.check_namespace(self._descriptor.fd, str(self.path))
        return alone

    @property
    def name(self) -> str:
        """The name of the store; empty: a private store has no name."""
        return "" if self.path is None else os.path.basename(os.path.dirname(self.path))

    @property
    def label(self) -> str:
        """The name of the store in log lines."""
        return f"store {self.name!r}" if self.name else "a private store"

    def check_current(self) -> None:
        """
        Make sure that this is still the file of the store.

        Raises:
            ArenaReplaced: The sessions are in another file.
            StoreUnavailable: The store was removed, or this object was closed.
        """
        state = self.cells[STATE]
        if not state:
            return
        if state == CLOSED:
            raise StoreUnavailable("the store is no longer in use")
        raise ArenaReplaced(f"{self.path or 'the memory of the store'} was replaced")

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Return whether ``path`` leads to this file."""
        return is_same_file(path, self._descriptor.fd)

    def identity(self) -> tuple[int, int]:
        """Return the device and inode of the file."""
        status = os.fstat(self._descriptor.fd)
        return status.st_dev, status.st_ino

    def reopen_path(self) -> str:
        """
        Return a path by which the file can be opened once more: locks on another descriptor are independent.

        Raises:
            StoreUnavailable: The file was closed; or /proc is not mounted, and no path leads to the file.
        """
        if self.closed:
            raise StoreUnavailable("this store was closed")
        if os.path.lexists(by_descriptor := f"/proc/self/fd/{self._descriptor.fd}"):
            return by_descriptor
        if self.path is None:
            raise StoreUnavailable("the sessions of a private store can only be locked where /proc is mounted")
        if not self.is_at(self.path):
            raise StoreUnavailable(f"{self.path} was removed or replaced")
        return self.path

    def close(self) -> bool:
        """
        Close the file. Its memory is unmapped when the last thread that is reading it has finished.

        A mutation of another thread is waited for. A mutation of this thread (a signal handler closes the store in the
        middle of a call) can still be completed.

        Returns:
            Whether no mutation is left that has to release the mutex.
        """
        mutex, release = self.mutex, self.mutex.release
        idle = False
        try:
            try:
                mutex.acquire(_PATIENCE)
                idle = True
            except StoreTimeout:
                pass
            except StoreUnavailable:
                idle = True  # it is damaged, so no thread holds it
            if self.core is not None:
                self.core.close()
            self.core = None
            self.memory = self.cells = self.mutex = cast("Any", _CLOSED)
        finally:
            release()
        self._descriptor.close()
        self.closed = True
        return idle


class PrivateMemory(MappedFile):
    """
    Memory of this process alone: what a private store uses where processes cannot share one.

    A forked child gets a copy, of which it is the owner.

    Raises:
        StoreFull: There is not as much memory.

    Attributes:
        named_locks: The holders of the named locks, by the numbers of these.
    """

    def __init__(self, geometry: Geometry) -> None:
        layout.check_available(geometry.size)
        self.geometry, self.path, self.exclusive = geometry, None, True
        self._descriptor = _Descriptor(-1)
        try:
            self.memory = private_memory(geometry.size)
        except (OSError, OverflowError) as error:
            pass_on_interruption(error)
            raise StoreFull(f"cannot reserve {geometry.size} bytes: {error}; give a smaller memory=") from error
        self.cells = memoryview(self.memory).cast("Q")
        self.mutex = ThreadMutex()
        self.named_locks: dict[int, object] = {}
        on_fork(self)

    def after_fork_in_child(self) -> None:
        self.named_locks.clear()  # their holders are threads of the parent
        if not self.closed:
            self.cells[SERVER_PID] = os.getpid()


class _Descriptor:
    """A file descriptor that is closed once, at the latest with its last reference."""

    fd = -1  # for `__del__`, if a signal handler raises before `__init__` has set it

    def __init__(self, fd: int) -> None:
        self.fd = fd

    # Bound here: a descriptor may outlive the globals of this module when the interpreter ends.
    def close(self, close: Callable[[int], None] = close) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)

    def __del__(self) -> None:
        self.close()


def _share(fd: int) -> None:
    """Take a shared flock. A process that holds it exclusively is opening the file, and may have been stopped there."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreTimeout("another process has been opening the store for too long: is it stopped?") from None
            time.sleep(0.002)


class _Closed:
    """Replaces the parts of a file after `MappedFile.close`: every use raises `StoreUnavailable`."""

    def acquire(self, *_: object) -> Any:
        raise StoreUnavailable("this store was closed")

    __getitem__ = __setitem__ = acquire

    def release(self) -> int:
        return 0


_CLOSED = _Closed()
