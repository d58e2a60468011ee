"""Reads without the lock: a seqlock for each slot.

``version`` of a slot is odd while the slot changes, ``STRUCTURE`` is odd while the chains of the index change. Both
only ever grow. A hit is valid if the slot's version was even and the same before and after, and if the record carries
the right key and checksum. A miss is valid if ``STRUCTURE`` was even and the same. Otherwise the read is repeated, at
last under the lock.

That needs stores and loads that are seen in their order, as x86-64 guarantees. On other machines reads of both engines
take the lock. Fences in the C core would not be enough there: some writes are done by Python, which has none, and a
reader cannot tell which process has written last.
"""

from __future__ import annotations

import contextlib
import platform
import zlib
from typing import Final

from shmstore.engine.frame import OVERHEAD, RESIDUE, Head, Key, head_of
from shmstore.engine.header import STATE, STRUCTURE
from shmstore.engine.layout import CELL, LOW_HALF, RENAMED, TOMBSTONE, TOMBSTONE_WAYS
from shmstore.engine.lock import ArenaLock
from shmstore.engine.mapping import MappedFile
from shmstore.engine.table import Table

__all__ = ["Entry", "Reader"]

AHEAD: Final = 10**9  # nanoseconds: another process may have left a tombstone since the clock was read


def tries(machine: str) -> int:
    """Return how often to read without the lock: never where other cores may see stores in another order."""
    return 8 if machine in ("x86_64", "AMD64") else 0


_TRIES: Final = tries(platform.machine())

# slot, version, deadline, head, record: what `read` finds. Made at each request, so a plain tuple.
Entry = tuple[int, int, int, Head, bytes]


class Reader:
    """Records by key or by slot, as they can be read at any time."""

    def __init__(self, file: MappedFile, table: Table, lock: ArenaLock) -> None:
        self._file, self._table, self._lock = file, table, lock
        geometry = file.geometry
        self._bucket_count, self._tombstone_sets = geometry.buckets, geometry.tombstone_sets
        self._slots, self._blocks, self._block_size = geometry.slots, geometry.blocks, geometry.block_size
        self._step = geometry.block_size // CELL

    def read(self, key: Key, timeout: float) -> Entry | None:
        """
        Return the record of ``key``, expired or not, or None.

        Raises:
            StoreTimeout: The slot, or the index for a miss, was in the middle of a change for ``timeout`` seconds.
        """
        low, high = key
        core = self._file.core
        if core is not None:
            found = core.read(low, high)
            if not isinstance(found, int):
                return found
        cells = self._file.cells
        for _ in range(_TRIES):
            if cells[STATE]:
                self._file.check_current()
            try:
                structure = cells[STRUCTURE]
                slot = self.find(key)
                if not slot:
                    if not structure & 1 and cells[STRUCTURE] == structure:
                        return None
                    continue
                entry = self._copy(slot, low, high)
            except IndexError:  # a cell that is just changing, or damaged
                continue
            if entry is not None:
                return entry
        try:
            self._lock.acquire(timeout)
            slot = self.find(key)
            return self._copy(slot, low, high) if slot else None
        except IndexError:
            return None  # the next writer has it repaired
        finally:
            self._lock.release()

    def find(self, key: Key) -> int:
        """Return the slot of a key, 0 if it is not found. Without the lock, check `STRUCTURE` before and after."""
        low, high = key
        cells, table = self._file.cells, self._table
        key_low, key_high, last = table.key_low, table.key_high, table.last_slot
        slot = cells[table.buckets + low % self._bucket_count]
        hops = 0
        while 0 < slot <= last and hops <= self._slots:  # a chain that is being changed may for a moment be a ring
            if cells[key_low + slot] == low and cells[key_high + slot] == high:
                return slot
            slot = cells[table.chain + slot]
            hops += 1
        return 0

    def _copy(self, slot: int, low: int, high: int) -> Entry | None:
        """Return the record of this key that is in a slot, or None, also if it changed meanwhile."""
        file, table = self._file, self._table
        cells = file.cells
        version = cells[table.version + slot]
        record = cells[table.record + slot]
        expires = cells[table.expires + slot]
        if version & 1 or not record:
            return None
        block, left = record & LOW_HALF, record >> 32
        if block > self._blocks or not OVERHEAD <= left <= self._blocks * self._block_size:
            return None
        at = table.heads + block * self._step
        start = at * CELL + CELL
        # Mostly one run: records of like size take the place of their predecessors.
        if (cells[at] >> 32) * self._block_size - CELL >= left:
            data = file.memory[start : start + left]
        else:
            data = self._gather(block, left)
        if cells[table.version + slot] != version or zlib.crc32(data) != RESIDUE:
            return None
        head: Head = head_of(data)
        if head[2] != low or head[3] != high:
            return None
        return slot, version, expires, head, data

    def _gather(self, block: int, left: int) -> bytes:
        cells, memory, heads = self._file.cells, self._file.memory, self._table.heads
        parts = []
        while left > 0 and 0 < block <= self._blocks:
            head = heads + block * self._step
            link = cells[head]
            start, length = head * CELL + CELL, min((link >> 32) * self._block_size - CELL, left)
            if length <= 0:
                break
            parts.append(memory[start : start + length])
            left -= length
            block = link & LOW_HALF
        return b"".join(parts)

    def at(self, slot: int, timeout: float) -> Entry | None:
        """
        Return what is in a slot, for those who scan: None if it is free, or damaged.

        Raises:
            StoreTimeout: The slot was in the middle of a change for ``timeout`` seconds.
        """
        cells, table = self._file.cells, self._table
        for _ in range(_TRIES):
            if not cells[table.record + slot]:
                return None
            with contextlib.suppress(IndexError):
                entry = self._copy(slot, *table.key_at(slot))
                if entry is not None:
                    return entry
        try:
            self._lock.acquire(timeout)
            return self.try_at(slot)
        finally:
            self._lock.release()

    def try_at(self, slot: int) -> Entry | None:
        """Return the record in a slot as `at` does, without waiting: None also if it is being changed."""
        try:
            table = self._table
            return self._copy(slot, *table.key_at(slot)) if self._file.cells[table.record + slot] else None
        except IndexError:
            return None

    def tombstone(self, key: Key, now: int, within: int) -> int:
        """
        Return when a tombstone was left for ``key``; 0: not in the ``within`` nanoseconds before ``now``.

        The lowest bit is not part of the time: it is `RENAMED` if the session was renamed, not removed. A time that is
        more than `AHEAD` later than ``now`` is damaged, and is ignored.
        """
        _, keys, times = self.tombstones_of(key)
        when = times[keys.index(key[1])] if key[1] in keys else 0
        return when if when and -AHEAD < now - (when & ~RENAMED) < within else 0

    def tombstones_of(self, key: Key) -> tuple[int, list[int], list[int]]:
        """Return the set that may hold the tombstone of a key: its first cell, its keys, and the times of these."""
        low, _ = key
        first = self._table.tombstones + low % self._tombstone_sets * TOMBSTONE_WAYS * TOMBSTONE
        middle = first + TOMBSTONE_WAYS
        cells = self._file.cells
        return first, cells[first:middle].tolist(), cells[middle : middle + TOMBSTONE_WAYS].tolist()
