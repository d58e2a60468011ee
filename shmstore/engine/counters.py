"""Counters of reads and waits: a row for each process. Counting takes no lock and disturbs no other core."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from typing import Final

from shmstore.engine.header import PAST
from shmstore.engine.layout import CELL, ROW_CELLS, ROWS, Geometry
from shmstore.engine.mapping import Memory
from shmstore.system.forks import on_fork

__all__ = ["Counters"]

# A row; each is written by its own process only, and by who buries that.
_PID, _HITS, _MISSES, _WAITED, _WAITS = range(5)
WAITS: Final = (0.001, 0.01, 0.1, math.inf)
"""Bounds, in seconds, of what waits for the lock are counted by."""
_COUNTED: Final = range(_HITS, _WAITS + len(WAITS))


class Counters(Memory):
    """A `Memory` that counts what is read from it, and who waits for its lock."""

    def __init__(self, fd: int, geometry: Geometry, path: str | None = None, *, fresh: bool = False) -> None:
        first = geometry.offsets()["counters"] // CELL
        self._rows = range(first, first + ROWS * ROW_CELLS, ROW_CELLS)
        self._row = 0  # of this process; 0: none yet
        self._uncounted = [0] * _COUNTED.stop
        super().__init__(fd, geometry, path, fresh=fresh)
        on_fork(self)

    def after_fork_in_child(self) -> None:
        self._row = 0  # the parent's
        self._uncounted = [0] * _COUNTED.stop

    def hit(self) -> None:
        """Count a read that found its session."""
        row = self._row
        if row:
            self.cells[row + _HITS] += 1  # as `_count`; this is on the way of each read
        else:
            self._count(_HITS)

    def miss(self) -> None:
        """Count a read that found none."""
        self._count(_MISSES)

    def unhit(self) -> None:
        """Turn the hit just counted into a miss: what was found cannot be used."""
        self._count(_HITS, -1)
        self._count(_MISSES)

    def _count(self, which: int, by: int = 1) -> None:
        if not self._row:
            self._claim_row()
        self._note(which, by)

    def settle(self) -> None:
        """Show to all what was noted before there was a row. Not to be called with the lock."""
        if not self._row and any(self._uncounted):
            self._claim_row()

    def _note(self, which: int, by: int) -> None:
        """Count without taking the lock, for who may have it."""
        row = self._row  # once: another thread may be following to another file, where it has none yet
        if row:
            self.cells[row + which] += by
        else:
            self._uncounted[which] += by

    def _waited(self, seconds: float) -> None:
        """Count a wait for the lock, whether that was had in the end or not."""
        self._note(_WAITED, round(seconds * 1e9))
        self._note(_WAITS + bisect_left(WAITS, seconds), 1)

    def reads(self) -> tuple[int, int]:
        """Return all hits and misses since the arena was made."""
        hits, misses, *_ = self.counted()
        return hits, misses

    def waits(self) -> tuple[int, list[int]]:
        """Return the nanoseconds waited for the lock since the arena was made, and how many waits by `WAITS`."""
        counted = self.counted()
        return counted[_WAITED - _HITS], counted[_WAITS - _HITS :]

    def counted(self) -> list[int]:
        """Return all that was counted since the arena was made, in the order of a row."""
        cells = self.cells
        return [cells[PAST + which - _HITS] + sum(cells[row + which] for row in self._rows) for which in _COUNTED]

    def _claim_row(self) -> None:
        """
        Take a row for this process, burying a dead one's; with none left, share the last.

        Not now if the lock is busy: a read that counts must not wait for a holder that may be frozen.
        """
        me = os.getpid()
        try:
            if not self.lock_now():
                return
            cells = self.cells  # not before: taking the lock may lead to another file
            for row in self._rows:
                if cells[row] == me or not _alive(cells[row]):
                    break
            if cells[row] != me and not _alive(cells[row]):
                plan = [row + _PID, me]
                for which in _COUNTED:
                    past = PAST + which - _HITS
                    plan += (past, (cells[past] + cells[row + which]) % 2**64, row + which, 0)
                self.commit(plan)
        finally:
            self.unlock()
        for which in _COUNTED:
            cells[row + which] = max(0, cells[row + which] + self._uncounted[which])  # less by one after `unhit`
        self._uncounted = [0] * _COUNTED.stop
        self._row = row


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
