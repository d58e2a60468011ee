"""Counters of reads: a row for each process, so that counting takes no lock and disturbs no other processor."""

from __future__ import annotations

import os
import weakref
from typing import Final

from shmstore.cells import PAST_HITS, PAST_MISSES
from shmstore.layout import CELL, ROW_CELLS, ROWS, Geometry
from shmstore.memory import Memory

__all__ = ["Counters"]

# A row; each is written by its own process only, and by who buries that.
_PID, _HITS, _MISSES = 0, 1, 2

_all: Final[weakref.WeakSet[Counters]] = weakref.WeakSet()


class Counters(Memory):
    """A `Memory` that counts what is read from it."""

    def __init__(self, fd: int, geometry: Geometry, path: str | None = None, *, fresh: bool = False) -> None:
        first = geometry.offsets()["counters"] // CELL
        self._rows = range(first, first + ROWS * ROW_CELLS, ROW_CELLS)
        self._row = 0  # of this process; 0: none yet
        self._uncounted = [0, 0, 0]
        super().__init__(fd, geometry, path, fresh=fresh)
        _all.add(self)

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
        row = self._row or self._claim_row()
        if row:
            self.cells[row + which] += by
        else:
            self._uncounted[which] += by

    def reads(self) -> tuple[int, int]:
        """Return all hits and misses since the arena was made."""
        cells = self.cells
        hits = cells[PAST_HITS] + sum(cells[row + _HITS] for row in self._rows)
        return hits, cells[PAST_MISSES] + sum(cells[row + _MISSES] for row in self._rows)

    def _claim_row(self) -> int:
        """
        Take a row for this process, burying a dead one's; with none left, share the last.

        Return 0 if the lock is busy: a read that counts must not wait for a holder that may be frozen.
        """
        cells, me = self.cells, os.getpid()
        try:
            if not self.lock_now():
                return 0
            for row in self._rows:
                if cells[row] == me or not _alive(cells[row]):
                    break
            if cells[row] != me and not _alive(cells[row]):
                self.commit([
                    PAST_HITS, cells[PAST_HITS] + cells[row + _HITS],
                    PAST_MISSES, cells[PAST_MISSES] + cells[row + _MISSES],
                    row + _PID, me, row + _HITS, 0, row + _MISSES, 0,
                ])  # fmt: skip
        finally:
            self.unlock()
        for which in (_HITS, _MISSES):
            cells[row + which] += self._uncounted[which]
        self._uncounted = [0, 0, 0]
        self._row = row
        return row


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


def _after_fork() -> None:
    for counters in list(_all):
        counters._row = 0  # the parent's
        counters._uncounted = [0, 0, 0]


os.register_at_fork(after_in_child=_after_fork)
