"""The memory of an arena: one mapped file, its lock, and mutations that happen wholly or not at all.

How it is safe against kill -9 at any instruction. A mutation is planned as a list of (cell, value) pairs while nothing
is changed. The plan is written to the journal; one 8-byte store of ``PENDING`` commits it; then its pairs are applied.
Whoever takes the lock next and finds ``PENDING`` set applies the plan again. Applying twice does no harm, so a mutation
happens wholly or not at all, whenever its process dies and whatever exception is raised in the middle of it, and
recovery takes microseconds however many sessions there are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Callable
from mmap import MADV_DONTDUMP, mmap
from posix import close as _close  # gevent's os.close is in pieces when the interpreter ends
from typing import Any, Final, Self, cast

from shmstore.engine import layout
from shmstore.engine.header import CLOSED, LIVE, PENDING, STATE
from shmstore.engine.layout import CELL, JOURNAL, JOURNAL_CELLS, STATE_CELLS, ArenaDamaged, Geometry
from shmstore.engine.mutex import Lock
from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.system.greenlet_lock import GreenletLock

_PLANS: Final = [struct.Struct(f"@{2 + n}Q") for n in range(JOURNAL_CELLS - 1)]


_PATIENCE: Final = 5.0  # seconds
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # linux/mman.h: MADV_POPULATE_READ, MADV_POPULATE_WRITE
_following = GreenletLock()  # guards Memory.become


class Memory:
    """
    The mapping of one arena into this process. Made by `create` and `open`.

    Attributes:
        geometry: Its size.
        alone: Whether nobody else had it mapped when it was opened.
        cells: Everything, as 8-byte cells. Aligned: each is read and written in one move.
        path: Where its file is; None: nowhere.
        epoch: How often it was followed to another file: slots found before mean nothing afterwards.
        unblock: Called by who waited for the lock in vain. Returns whether waiting once more makes sense.
    """

    unblock: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(self, fd: int, geometry: Geometry, path: str | None = None, *, fresh: bool = False) -> None:
        self.geometry = geometry
        self.path = path
        self.epoch = 0
        self._file = _Descriptor(fd)
        self._memory = mmap(fd, geometry.size)
        self._memory.madvise(MADV_DONTDUMP)  # sessions are not for core files
        self.cells = memoryview(self._memory).cast("Q")
        data = geometry.offsets()["blocks"]
        step = geometry.block_size // CELL
        # What a plan may change: what lies between the mutex and the blocks, and the heads of runs.
        self._small = range(STATE_CELLS, data // CELL)
        self._heads = range(data // CELL + step, geometry.size // CELL, step)
        # A shared flock is held for as long as anybody uses the arena, children of fork included. Who can have it
        # exclusively is alone: only then may the mutex be made anew, whatever state it was left or damaged in.
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.alone = True
        except BlockingIOError:
            _share(fd)
            self.alone = False
        self._mutex = Lock(self._memory, layout.MUTEX, fresh=self.alone)
        self.unlock = self._mutex.release
        if fresh:
            self._format()
        if self.alone:
            _share(fd)

    def _format(self) -> None:
        """Fill in what is not zero in an empty arena."""
        raise NotImplementedError

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, geometry: Geometry) -> Self:
        """
        Make an empty arena at ``path`` (None: in memory without a name).

        Raises:
            StoreFull: The memory cannot be reserved.
        """
        place = None if path is None else os.path.abspath(path)
        arena, temporary = cls.prepare(place, geometry)
        if place is not None:
            try:
                os.rename(temporary, place)
            except BaseException:
                os.unlink(temporary)
                raise
        return arena

    @classmethod
    def prepare(cls, path: str | None, geometry: Geometry) -> tuple[Self, str]:
        """Make an empty arena for ``path``; return it and the file to rename to that, "" if it has none."""
        fd, temporary = layout.create(None if path is None else os.path.dirname(path), geometry)
        return cls(fd, geometry, path, fresh=True), temporary

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """
        Attach to the arena at ``path``.

        Raises:
            FileNotFoundError: There is none.
            ArenaDamaged: The file is not an arena that can be used.
            StoreUnavailable: Processes of another pid namespace use it.
        """
        place = os.path.abspath(path)
        fd, geometry = layout.open_file(place)
        arena = cls(fd, geometry, place)
        try:
            layout.check_namespace(fd, place)
        except BaseException:
            arena.close()
            raise
        return arena

    def duplicate(self, timeout: float) -> Self:
        """
        Return a copy of this moment, in memory without a name: for who looks at it for long, and stops nobody.

        The lock is held while the bytes are copied, 0.1 to 0.2 s for each GiB.

        Raises:
            StoreFull: There is not as much memory again.
            StoreTimeout: The lock was not free within ``timeout`` seconds.
        """
        state = slice(STATE_CELLS * layout.CELL, None)  # what it is and whose lock it is are its own
        while True:
            other, _ = self.prepare(None, self.geometry)
            try:
                with contextlib.suppress(OSError):  # before Linux 5.14: each page then costs its fault under the lock
                    self._memory.madvise(_POPULATE_READ)
                    other._memory.madvise(_POPULATE_WRITE)
                self.lock(timeout)
                if other.geometry == self.geometry:  # else it has followed to a file of another size just now
                    memoryview(other._memory)[state] = memoryview(self._memory)[state]
                    return other
            except BaseException:
                other.close()
                raise
            finally:
                self.unlock()
            other.close()

    @property
    def name(self) -> str:
        """The store's name; empty: a private one has none."""
        return "" if self.path is None else os.path.basename(os.path.dirname(self.path))

    @property
    def label(self) -> str:
        """What the log calls the store."""
        return f"store {self.name!r}" if self.name else "a private store"

    def keep_up(self) -> None:
        """Follow if this arena is no longer in use."""
        if self.cells[STATE]:
            self.follow()

    def follow(self) -> None:
        """
        Become the arena that has taken the place of this one, which is no longer in use.

        Raises:
            StoreUnavailable: There is none.
        """
        ticket = _following.ticket()
        try:
            ticket.acquire()
            if not self.cells[STATE]:
                return  # another thread was faster
            if self.path is None:
                raise StoreUnavailable("the store is no longer in use")
            try:
                other = self.open(self.path)
            except (FileNotFoundError, ArenaDamaged) as error:
                raise StoreUnavailable(f"the store has left {self.path}, and no other is there") from error
            if other.cells[STATE] == CLOSED:
                other.close()
                raise StoreUnavailable(f"the store in {self.path} is no longer in use")
            self.become(other)
        finally:
            ticket.release()

    def become(self, other: Self) -> None:
        """Take over another arena's mapping. Who is in the middle of reading the old one reads it to its end."""
        vars(self).update(vars(other), epoch=self.epoch + 1)

    def retire(self, timeout: float = 1.0) -> None:
        """Say to all who have it mapped that its file is going away. Best effort: a frozen holder is not waited for."""
        try:
            with contextlib.suppress(StoreUnavailable):
                self.lock(timeout)
            self.cells[STATE] = CLOSED
        finally:
            self.unlock()

    def close(self) -> None:
        """
        Let go of the mapping, which goes when the last thread in the middle of reading lets go of it too.

        A mutation of another thread is waited for. One of this very thread (a signal handler closes the store in the
        middle of a call) can still be ended: then the mapping goes with this object.
        """
        mutex, unlock = self._mutex, self.unlock
        try:
            with contextlib.suppress(StoreUnavailable):
                mutex.acquire(_PATIENCE)
                self.unlock = cast("Any", _CLOSED).release
            self._memory = self.cells = self._mutex = cast("Any", _CLOSED)
        finally:
            unlock()
        self._file.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.fd < 0

    def way_in(self) -> str:
        """Return a path by which the file can be opened once more: locks taken on a descriptor are its own."""
        if self.closed:
            raise StoreUnavailable("this store was closed")
        self.keep_up()
        return f"/proc/self/fd/{self._file.fd}"

    def way_in_by_name(self) -> str:
        """
        Return the same where there is no /proc.

        Raises:
            StoreUnavailable: There is no such path.
        """
        if self.path is None:
            raise StoreUnavailable("the sessions of a private store can only be locked where /proc is mounted")
        if not self.same_file(self.path):
            raise StoreUnavailable(f"{self.path} was removed or replaced")
        return self.path

    def is_in(self, fd: int) -> bool:
        """Return whether the store is now in the file of that descriptor."""
        self.keep_up()
        return os.path.sameopenfile(fd, self._file.fd)

    def same_file(self, path: str | os.PathLike[str]) -> bool:
        """Return whether ``path`` still leads to this arena."""
        try:
            return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(self._file.fd))
        except FileNotFoundError:
            return False

    def _in_place(self) -> bool:
        """Whether this file is where it was, and was not closed: then a store is in it, whatever its state says."""
        return self.path is not None and self.cells[STATE] != CLOSED and self.same_file(self.path)

    def lock(self, timeout: float) -> None:
        """
        Take the lock and settle what its last holder may have left half done.

        Raises:
            StoreTimeout: It was not free within ``timeout`` seconds; the message names the holder.
            StoreUnavailable: The store has left this file, and no other has taken its place.
        """
        mutex = self._mutex
        try:
            waited = mutex.acquire(timeout)
        except StoreTimeout as error:
            if timeout < 0:
                raise
            if error.waited:
                self._waited(error.waited)
            if not self.unblock():
                raise
            waited = mutex.acquire(timeout)
        if mutex is not self._mutex:  # another thread has followed meanwhile
            mutex.release()
            self.lock(timeout)
            return
        if waited:
            # Not before: this may have been closed while we waited, and then it is this mutex that must be freed.
            self._waited(waited)
        cells = self.cells
        if cells[PENDING]:
            self._recover()
        if cells[STATE]:
            if self._in_place():
                cells[STATE] = LIVE  # whoever was moving it died before the new file took its place
                return
            mutex.release()
            self.follow()
            self.lock(timeout)

    def _waited(self, seconds: float) -> None:
        """Take note of a wait for the lock."""

    def holder(self) -> str:
        """Return who holds the lock, for messages."""
        return self._mutex.holder()

    def lock_now(self) -> bool:
        """Take the lock if it is free this very moment; return whether it was."""
        try:
            self.lock(-1)
        except StoreTimeout:
            return False
        return True

    def commit(self, plan: list[int]) -> None:
        """Apply ``plan``, cell and value in turn, wholly or not at all."""
        cells = self.cells
        number = (cells[JOURNAL // 8] + 1) % 2**64 or 1  # damaged or not
        _PLANS[len(plan)].pack_into(self._memory, JOURNAL, number, len(plan), *plan)
        cells[PENDING] = number
        pairs = iter(plan)
        for cell, value in zip(pairs, pairs, strict=False):  # strict would cost half as much again
            cells[cell] = value
        cells[PENDING] = 0

    def _recover(self) -> None:
        cells, start = self.cells, JOURNAL // 8
        number, length = cells[start], cells[start + 1]
        # The number guards against a flipped bit in PENDING: an old plan must not be applied to newer cells.
        if cells[PENDING] == number and length <= JOURNAL_CELLS - 2 and not length & 1:
            plan = cells[start + 2 : start + 2 + length].tolist()
            if all(cell in self._small or cell in self._heads for cell in plan[::2]):
                self.apply(plan)
        cells[PENDING] = 0

    def apply(self, plan: list[int]) -> None:
        """Carry out ``plan`` without a journal: again, or in a file that nobody else knows yet."""
        cells, pairs = self.cells, iter(plan)
        for cell, value in zip(pairs, pairs, strict=True):
            cells[cell] = value


class _Descriptor:
    """A file descriptor that is closed once, at the latest with its last reference."""

    fd = -1  # if a signal handler raises at the very start of its making

    def __init__(self, fd: int) -> None:
        self.fd = fd

    # Bound here: a descriptor may outlive the globals of this module when the interpreter ends.
    def close(self, close: Callable[[int], None] = _close) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)

    def __del__(self) -> None:
        self.close()


def _share(fd: int) -> None:
    """Hold a shared flock; who holds an exclusive one is just opening the file, and may have been stopped there."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreTimeout("another process has been opening the store for too long: is it stopped?") from None
            time.sleep(0.002)


class _Closed:
    """What stands in for the parts of an arena after `Memory.close`."""

    def acquire(self, *_: object) -> Any:
        raise StoreUnavailable("this store was closed")

    __getitem__ = __setitem__ = acquire

    def release(self) -> int:
        return 0


_CLOSED = _Closed()
