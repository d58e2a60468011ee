"""Atomic mutations of an arena, also if their process is killed.

A mutation is planned as a list of (cell, value) pairs while nothing is changed. The plan is written to the journal. One
8-byte store of ``PENDING`` commits it. Then its pairs are applied. The next process that takes the lock and finds
``PENDING`` set applies the plan again. Applying a plan twice does no harm, so a mutation is atomic whenever its process
dies and whatever exception is raised in the middle of it. Recovery takes microseconds however many sessions there are.
"""

from __future__ import annotations

import struct
from typing import Final

from shmstore.engine.header import PENDING
from shmstore.engine.layout import CELL, JOURNAL, JOURNAL_CELLS, STATE_CELLS
from shmstore.engine.mapping import MappedFile

__all__ = ["Journal"]

_PLANS: Final = [struct.Struct(f"@{2 + n}Q") for n in range(JOURNAL_CELLS - 1)]


class Journal:
    """The journal of one arena. The caller of every method except `apply` holds the lock."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        geometry = file.geometry
        blocks = geometry.offsets()["blocks"] // CELL
        step = geometry.block_size // CELL
        # The cells that a plan may change: all between the mutex and the blocks, and the heads of runs.
        self._small = range(STATE_CELLS, blocks)
        self._heads = range(blocks + step, geometry.size // CELL, step)

    def commit(self, plan: list[int]) -> None:
        """Apply ``plan``, a list of cells and values in turn, atomically."""
        file = self._file
        cells = file.cells
        number = (cells[JOURNAL // CELL] + 1) % 2**64 or 1  # valid for any value, also a damaged one
        _PLANS[len(plan)].pack_into(file.memory, JOURNAL, number, len(plan), *plan)
        cells[PENDING] = number
        pairs = iter(plan)
        for cell, value in zip(pairs, pairs, strict=False):  # strict takes 1.5 times as long
            cells[cell] = value
        cells[PENDING] = 0

    def recover(self) -> None:
        """Apply the plan that another process has committed and not completed."""
        cells, start = self._file.cells, JOURNAL // CELL
        number, length = cells[start], cells[start + 1]
        # The number guards against a flipped bit in PENDING: an old plan must not be applied to newer cells.
        if cells[PENDING] == number and length <= JOURNAL_CELLS - 2 and not length & 1:
            plan = cells[start + 2 : start + 2 + length].tolist()
            if all(cell in self._small or cell in self._heads for cell in plan[::2]):
                self.apply(plan)
        cells[PENDING] = 0

    def apply(self, plan: list[int]) -> None:
        """Apply ``plan`` without the journal: in recovery, or in a file that no other process has opened yet."""
        cells, pairs = self._file.cells, iter(plan)
        for cell, value in zip(pairs, pairs, strict=True):
            cells[cell] = value
