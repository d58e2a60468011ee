"""The lock of an arena's writers: the mutex, then recovery, and a check that the file is still in use."""

from __future__ import annotations

from collections.abc import Callable

from shmstore.engine.header import CLOSED, LIVE, PENDING, STATE
from shmstore.engine.journal import Journal
from shmstore.engine.mapping import MappedFile
from shmstore.errors import StoreTimeout, StoreUnavailable

__all__ = ["ArenaLock"]


def _unavailing() -> bool:
    return False


def _uncounted(_: float) -> None:
    pass


class ArenaLock:
    """
    The lock of one arena, used as ``try: lock.acquire(timeout) ... finally: lock.release()``; see `Mutex`.

    Attributes:
        release: Releases it; does nothing if this thread does not hold it.
        on_timeout: Called after a timeout. Returns whether one more attempt makes sense.
        on_wait: Called with the seconds of each wait, successful or not.
    """

    def __init__(self, file: MappedFile, journal: Journal) -> None:
        self._file = file
        self._journal = journal
        self.release = file.mutex.release
        self.on_timeout: Callable[[], bool] = _unavailing
        self.on_wait: Callable[[float], object] = _uncounted

    def acquire(self, timeout: float) -> None:
        """
        Take the lock, and complete a mutation that its previous holder has left unfinished.

        Raises:
            StoreTimeout: The lock was not free within ``timeout`` seconds; the message names the holder.
            ArenaReplaced: The sessions are in another file.
            StoreUnavailable: The store was removed or closed.
        """
        file = self._file
        mutex = file.mutex
        try:
            waited = mutex.acquire(timeout)
        except StoreTimeout as error:
            if timeout < 0:
                raise
            if error.waited:
                self.on_wait(error.waited)
            if not self.on_timeout():
                raise
            waited = mutex.acquire(timeout)
        if mutex is not file.mutex:
            mutex.release()  # the file was closed in the meantime: nothing else would release this mutex
            raise StoreUnavailable("this store was closed")
        if waited:
            self.on_wait(waited)
        cells = file.cells
        if cells[PENDING]:
            self._journal.recover()
        if cells[STATE]:
            if file.path is not None and cells[STATE] != CLOSED and file.is_at(file.path):
                cells[STATE] = LIVE  # the process that was replacing it died before the new file took its place
            else:
                file.check_current()

    def try_acquire(self) -> bool:
        """Take the lock if it is free; return whether it was."""
        try:
            self.acquire(-1)
        except StoreTimeout:
            return False
        return True
