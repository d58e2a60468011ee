"""Reading an arena, without its lock.

``version`` of a slot is odd while the slot changes, ``STRUCTURE`` is odd while the chains of the index change; both
only ever grow. A hit counts if the slot's version was even and the same before and after, and the record carries the
right key and checksum; a miss counts if ``STRUCTURE`` was. Else: look again, at last under the lock.
"""

from __future__ import annotations

import contextlib
import zlib
from typing import Final

from shmstore.engine.counters import Counters
from shmstore.engine.frame import OVERHEAD, RESIDUE, Head, Key, head_of
from shmstore.engine.header import STATE, STRUCTURE, TOP_SLOT
from shmstore.engine.layout import CELL, RENAMED, SLOT, TOMBSTONE, TOMBSTONE_WAYS, Geometry

__all__ = ["Entry", "Reader"]

_LOW: Final = 2**32 - 1
AHEAD: Final = 10**9  # nanoseconds: another process may have left a tombstone since the clock was read
_TRIES: Final = 8  # before the lock is taken

# slot, version, deadline, head, record: what `read` finds. Made at each request, so a plain tuple.
Entry = tuple[int, int, int, Head, bytes]


class Reader(Counters):
    """Records by key, as they can be read at any time. A slot is given by how many cells it is away from slot 0."""

    def __init__(self, fd: int, geometry: Geometry, path: str | None = None, *, fresh: bool = False) -> None:
        offsets = geometry.offsets()
        # Where each field of slot 0 is; of another slot, which is a multiple of SLOT, so many cells further on.
        first = offsets["slots"] // CELL
        (
            self.key_low, self.key_high, self.record, self.expires, self.used,
            self.version, self.prev, self.next, self.owner, self.chain, self.owner_links, self.owner_head,
        ) = range(first, first + SLOT)  # fmt: skip
        self.buckets, self.owners, self.tombstones, self.heads = (
            offsets[name] // CELL for name in ("buckets", "owners", "tombstones", "blocks")
        )
        self._bucket_count, self._owner_buckets = geometry.buckets, geometry.owner_buckets
        self._tombstone_sets = geometry.tombstone_sets
        self._slots, self._blocks, self._block_size = geometry.slots, geometry.blocks, geometry.block_size
        self._step, self._shortest = geometry.block_size // CELL, geometry.shortest
        self.last_slot = geometry.slots * SLOT
        self.owned_list = self.last_slot + SLOT  # the anchor of the list of owned slots; slot 0 is the others'
        super().__init__(fd, geometry, path, fresh=fresh)

    def read(self, key: Key, timeout: float) -> Entry | None:
        """
        Return the record of ``key``, expired or not, or None if there is none.

        Raises:
            StoreTimeout: The slot, or the index for a miss, was in the middle of a change for ``timeout`` seconds.
        """
        low, high = key
        for _ in range(_TRIES):
            cells = self.cells
            if cells[STATE]:
                self.follow()
                continue
            try:
                structure = cells[STRUCTURE]
                slot = self._look(low, high)
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
            self.lock(timeout)
            slot = self._look(low, high)
            return self._copy(slot, low, high) if slot else None
        except IndexError:
            return None  # whoever writes next heals it
        finally:
            self.unlock()

    def _look(self, low: int, high: int) -> int:
        """Return the slot of a key, 0 if it is not found. Only as good as the counters around it."""
        cells = self.cells
        key_low, key_high, last = self.key_low, self.key_high, self.last_slot
        slot = cells[self.buckets + low % self._bucket_count]
        hops = 0
        while 0 < slot <= last and hops <= self._slots:  # a chain that is being changed may for a moment be a ring
            if cells[key_low + slot] == low and cells[key_high + slot] == high:
                return slot
            slot = cells[self.chain + slot]
            hops += 1
        return 0

    def _copy(self, slot: int, low: int, high: int) -> Entry | None:
        """Return the record of this key that is in a slot, None if there is none or it changed meanwhile."""
        cells = self.cells
        version = cells[self.version + slot]
        record = cells[self.record + slot]
        expires = cells[self.expires + slot]
        if version & 1 or not record:
            return None
        block, left = record & _LOW, record >> 32
        if block > self._blocks or not OVERHEAD <= left <= self._blocks * self._block_size:
            return None
        at = self.heads + block * self._step
        start = at * CELL + CELL
        # Mostly one run: records of like size take the place of their predecessors.
        if (cells[at] >> 32) * self._block_size - CELL >= left:
            data = self._memory[start : start + left]
        else:
            data = self._gather(block, left)
        if cells[self.version + slot] != version or zlib.crc32(data) != RESIDUE:
            return None
        head: Head = head_of(data)
        if head[2] != low or head[3] != high:
            return None
        return slot, version, expires, head, data

    def _gather(self, block: int, left: int) -> bytes:
        cells, memory = self.cells, self._memory
        parts = []
        while left > 0 and 0 < block <= self._blocks:
            head = self.heads + block * self._step
            link = cells[head]
            start, length = head * CELL + CELL, min((link >> 32) * self._block_size - CELL, left)
            if length <= 0:
                break
            parts.append(memory[start : start + length])
            left -= length
            block = link & _LOW
        return b"".join(parts)

    def at(self, slot: int, timeout: float) -> Entry | None:
        """
        Return what is in a slot, for those who scan: None if it is free, or damaged.

        Raises:
            StoreTimeout: The slot was in the middle of a change for ``timeout`` seconds.
        """
        cells = self.cells
        for _ in range(_TRIES):
            if not cells[self.record + slot]:
                return None
            with contextlib.suppress(IndexError):
                entry = self._copy(slot, *self.key_at(slot))
                if entry is not None:
                    return entry
        try:
            self.lock(timeout)
            return self.under_lock(slot)
        finally:
            self.unlock()

    def under_lock(self, slot: int) -> Entry | None:
        """Return what is in a slot: None if it is free, or damaged. Called with the lock."""
        try:
            return self._copy(slot, *self.key_at(slot)) if self.cells[self.record + slot] else None
        except IndexError:
            return None

    def head(self, block: int) -> int:
        """Return the cell at the head of the run that begins with ``block``: how many blocks it has, the next run."""
        return self.heads + block * self._step

    def key_at(self, slot: int) -> Key:
        """Return the key of a slot."""
        return self.cells[self.key_low + slot], self.cells[self.key_high + slot]

    def tombstone(self, key: Key, now: int, within: int) -> int:
        """
        Return when a tombstone was left for ``key``; 0: not in the ``within`` nanoseconds before ``now``.

        The lowest bit is no part of the time: it is `RENAMED` if the session was renamed, not removed. A time that is
        more than `AHEAD` later than ``now`` is damaged, and counts for nothing.
        """
        self.keep_up()
        _, keys, times = self.tombstones_of(key)
        when = times[keys.index(key[1])] if key[1] in keys else 0
        return when if when and -AHEAD < now - (when & ~RENAMED) < within else 0

    def tombstones_of(self, key: Key) -> tuple[int, list[int], list[int]]:
        """Return the set that may hold the tombstone of a key: its first cell, its keys, and the times of these."""
        low, _ = key
        first = self.tombstones + low % self._tombstone_sets * TOMBSTONE_WAYS * TOMBSTONE
        middle = first + TOMBSTONE_WAYS
        return first, self.cells[first:middle].tolist(), self.cells[middle : middle + TOMBSTONE_WAYS].tolist()

    def used_slots(self) -> range:
        """Return the slots that were ever used."""
        self.keep_up()
        return range(SLOT, min(self.cells[TOP_SLOT], self.last_slot) + SLOT, SLOT)

    def column(self, field: int, slots: range) -> list[int]:
        """Return a copy of one field of these slots."""
        return self.cells[field + slots.start : field + slots.stop : SLOT].tolist()

    def live_slots(self, *, every: bool = False) -> list[int]:
        """Return the slots in use, the most recently used first; ``every``: of all, as `TOP_SLOT` may be damaged."""
        slots = range(SLOT, self.last_slot + SLOT, SLOT) if every else self.used_slots()
        records, stamps = self.column(self.record, slots), self.column(self.used, slots)
        live = ((stamp, slot) for stamp, slot, record in zip(stamps, slots, records, strict=True) if record)
        return [slot for _, slot in sorted(live, reverse=True)]

    def expired_slots(self, now: int) -> list[int]:
        """Return the slots whose deadline has come. Free ones never expire."""
        slots = self.used_slots()
        return [slot for slot, expires in zip(slots, self.column(self.expires, slots), strict=True) if expires <= now]
