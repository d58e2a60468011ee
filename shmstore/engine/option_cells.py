"""The options that every process applies at once, as cells of the file."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

from shmstore.engine.header import MAX, OPTION_CELLS, OPTIONS_COPY, OPTIONS_SUM
from shmstore.engine.layout import CELL, ArenaDamaged
from shmstore.engine.mapping import MappedFile

__all__ = ["OptionCells", "OptionsDamaged"]

_COUNT: Final = OPTION_CELLS.stop - OPTION_CELLS.start


class OptionsDamaged(ArenaDamaged):
    """The cells of the options are damaged."""


class OptionCells:
    """The cells of the options, a copy, and a checksum. They are used without the lock, whose holder may be stopped."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file

    def publish(self, values: Sequence[int]) -> None:
        """
        Set the cells. Called by the server only.

        In this order: a server that is killed in between leaves the old values, or the new ones, or damaged cells that
        `restore` sets to the new ones.
        """
        cells = self._file.cells
        for cell, value in enumerate(values, OPTIONS_COPY):
            cells[cell] = value
        cells[OPTIONS_SUM] = self._sum_of(OPTIONS_COPY)
        for cell, value in enumerate(values, MAX):
            cells[cell] = value

    def is_damaged(self) -> bool:
        """Return whether the cells differ from the values that were published."""
        known = self._file.cells[OPTIONS_SUM]
        return bool(known) and self._sum_of(MAX) != known

    def check(self) -> None:
        """
        Verify the cells before an irreversible step that depends on them.

        Raises:
            OptionsDamaged: The cells are damaged.
        """
        if self.is_damaged():
            raise OptionsDamaged("an option")

    def restore(self) -> bool:
        """Restore damaged cells from the copy; return whether they were damaged and are valid now."""
        cells = self._file.cells
        if not self.is_damaged():
            return False
        again = cells[OPTIONS_COPY : OPTIONS_COPY + _COUNT].tolist()
        if self._sum_of(OPTIONS_COPY) == cells[OPTIONS_SUM]:
            for cell, value in enumerate(again, MAX):
                cells[cell] = value
        elif cells[OPTION_CELLS].tolist() == again:
            cells[OPTIONS_SUM] = self._sum_of(MAX)
        return not self.is_damaged()

    def _sum_of(self, first: int) -> int:
        return zlib.crc32(self._file.memory[first * CELL : (first + _COUNT) * CELL])
