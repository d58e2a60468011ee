"""Counters of reads and waits: a row for each process. Counting needs no lock and no cache line of another process."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from typing import Final
from weakref import WeakMethod

from shmstore.engine.header import PAST
from shmstore.engine.journal import Journal
from shmstore.engine.layout import CELL, ROW_CELLS, ROWS
from shmstore.engine.lock import ArenaLock
from shmstore.engine.mapping import ArenaReplaced, MappedFile
from shmstore.system.forks import on_fork

__all__ = ["Counters"]

# The cells of a row. Only its process writes to it; after the death of that process, another process may claim it.
_PID, _HITS, _MISSES, _WAITED, _WAITS = range(5)
WAITS: Final = (0.001, 0.01, 0.1, math.inf)
"""The upper bounds of the classes in which waits for the lock are counted, in seconds."""
_COUNTED: Final = range(_HITS, _WAITS + len(WAITS))


class Counters:
    """The reads of all processes, and the time they have waited for the lock."""

    def __init__(self, file: MappedFile, lock: ArenaLock, journal: Journal) -> None:
        self._file, self._lock, self._journal = file, lock, journal
        first = file.geometry.offsets()["counters"] // CELL
        self._rows = range(first, first + ROWS * ROW_CELLS, ROW_CELLS)
        self._row = 0  # of this process; 0: not claimed yet
        self._uncounted = [0] * _COUNTED.stop
        waited = WeakMethod(self._waited)  # no cycle: a file that was replaced is unmapped with its last reference
        lock.on_wait = lambda seconds: (count := waited()) and count(seconds)
        on_fork(self)

    def after_fork_in_child(self) -> None:
        self._set_row(0)  # the row belongs to the parent
        self._uncounted = [0] * _COUNTED.stop

    def hit(self) -> None:
        """Count a read that found its session."""
        row = self._row
        if row:
            cells = self._file.cells
            cells[row + _HITS] = (cells[row + _HITS] + 1) % 2**64  # as `_count`, without a call
        else:
            self._count(_HITS)

    def miss(self) -> None:
        """Count a read whose session was absent."""
        self._count(_MISSES)

    def unhit(self) -> None:
        """Turn the hit just counted into a miss, because the session found cannot be used."""
        self.uncount_hit()
        self._count(_MISSES)

    def uncount_hit(self) -> None:
        """Take back the hit just counted: the session is read again."""
        self._count(_HITS, -1)

    def add(self, cell: int) -> None:
        """Add one to a counter of the header. It wraps, because a damaged one may hold the largest number."""
        self._file.cells[cell] = (self._file.cells[cell] + 1) % 2**64

    def _count(self, which: int, by: int = 1) -> None:
        if not self._row:
            self._claim_row()
        self._note(which, by)

    def flush(self) -> None:
        """Publish what was counted before this process had a row. Called without the lock."""
        if not self._row and any(self._uncounted):
            self._claim_row()

    def _note(self, which: int, by: int) -> None:
        """Count without taking the lock: the caller may hold it."""
        row = self._row
        if row:
            cells = self._file.cells
            cells[row + which] = max(0, cells[row + which] + by) % 2**64  # it wraps as in `add`
        else:
            self._uncounted[which] += by

    def _waited(self, seconds: float) -> None:
        """Count a wait for the lock, successful or not."""
        self._note(_WAITED, round(seconds * 1e9))
        self._note(_WAITS + bisect_left(WAITS, seconds), 1)

    def reads(self) -> tuple[int, int]:
        """Return all hits and misses since the arena was created."""
        hits, misses, *_ = self.counted()
        return hits, misses

    def waits(self) -> tuple[int, list[int]]:
        """Return the nanoseconds waited for the lock since the arena was created, and how many waits by `WAITS`."""
        counted = self.counted()
        return counted[_WAITED - _HITS], counted[_WAITS - _HITS :]

    def counted(self) -> list[int]:
        """Return all that was counted since the arena was created, in the order of a row."""
        cells, first, end = self._file.cells, self._rows.start, self._rows.stop
        return [cells[PAST + which - _HITS] + sum(cells[first + which : end : ROW_CELLS]) for which in _COUNTED]

    def _claim_row(self) -> None:
        """
        Claim a row for this process: a free row, the row of a dead process, or else the last row together with others.

        If the lock is busy, no row is claimed yet: counting a read must not wait for a holder that may be stopped.
        """
        me = os.getpid()
        try:
            if not self._lock.try_acquire():
                return
            cells = self._file.cells
            for row in self._rows:
                if cells[row] == me or not _alive(cells[row]):
                    break
            if cells[row] != me and not _alive(cells[row]):
                plan = [row + _PID, me]
                for which in _COUNTED:
                    past = PAST + which - _HITS
                    plan += (past, (cells[past] + cells[row + which]) % 2**64, row + which, 0)
                self._journal.commit(plan)
        except ArenaReplaced:
            return  # the caller notices too
        finally:
            self._lock.release()
        for which in _COUNTED:
            cells[row + which] = max(0, cells[row + which] + self._uncounted[which]) % 2**64  # as above
        self._uncounted = [0] * _COUNTED.stop
        self._set_row(row)

    def _set_row(self, row: int) -> None:
        self._row = row
        if (core := self._file.core) is not None:
            core.count_in(row)


def _alive(pid: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
