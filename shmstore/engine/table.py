"""The slots of an arena, field by field.

A slot is identified by the index of its row, a multiple of `SLOT`. Field ``f`` of a slot is the cell ``f + slot``.
Slot 0 and block 0 mean "none".
"""

from __future__ import annotations

from shmstore.engine.frame import HEAD, Key, head_of, weight_of
from shmstore.engine.header import SESSIONS, TOP_SLOT
from shmstore.engine.layout import CELL, LOW_HALF, SLOT, ArenaDamaged
from shmstore.engine.mapping import MappedFile

__all__ = ["Table"]


class Table:
    """The positions of the fields of all slots in one file, and copies of whole columns."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        geometry = file.geometry
        offsets = geometry.offsets()
        first = offsets["slots"] // CELL
        (
            self.key_low, self.key_high, self.record, self.expires, self.used,
            self.version, self.prev, self.next, self.owner, self.chain, self.owner_links, self.owner_head,
        ) = range(first, first + SLOT)  # fmt: skip
        self.buckets, self.owners, self.tombstones, self.heads = (
            offsets[name] // CELL for name in ("buckets", "owners", "tombstones", "blocks")
        )
        self.last_slot = geometry.slots * SLOT
        self.owned_list = (
            self.last_slot + SLOT
        )  # the anchor of the list of owned slots; slot 0 anchors the list of slots without an owner
        self._step = geometry.block_size // CELL

    def run_head(self, block: int) -> int:
        """Return the cell at the head of the run that begins with ``block``: its number of blocks, the next run."""
        return self.heads + block * self._step

    def key_at(self, slot: int) -> Key:
        """Return the key of a slot."""
        cells = self._file.cells
        return cells[self.key_low + slot], cells[self.key_high + slot]

    def weight_at(self, slot: int) -> int:
        """
        Return how much of ``max`` the session in ``slot`` takes.

        Raises:
            ArenaDamaged: Its record would begin outside the file.
        """
        start = self.run_head(self._file.cells[self.record + slot] & LOW_HALF) * CELL + CELL
        head = self._file.memory[start : start + HEAD]
        if len(head) < HEAD:
            raise ArenaDamaged("a chain of blocks is damaged")
        return weight_of(head)

    def created_at(self, slot: int) -> int:
        """Return when the session in ``slot`` was created. Without the lock it may be any time."""
        start = self.run_head(self._file.cells[self.record + slot] & LOW_HALF) * CELL + CELL
        data = self._file.memory[start : start + HEAD]
        created: int = head_of(data)[5] if len(data) == HEAD else 0
        return created

    def used_slots(self) -> range:
        """
        Return the slots up to the highest that was ever used.

        Raises:
            ArenaDamaged: `TOP_SLOT` is damaged: sessions would be missed.
        """
        sessions = self._file.cells[SESSIONS]  # first: a plan stores it last
        top = self._file.cells[TOP_SLOT]
        if top % SLOT or not sessions * SLOT <= top <= self.last_slot:
            raise ArenaDamaged(f"the last slot used is {top} of {self.last_slot}, with {sessions} sessions")
        return range(SLOT, top + SLOT, SLOT)

    def all_slots(self) -> range:
        """Return all slots, used or not, for an arena in which `TOP_SLOT` may be damaged."""
        return range(SLOT, self.last_slot + SLOT, SLOT)

    def column(self, field: int, slots: range) -> list[int]:
        """Return a copy of one field of these slots."""
        return self._file.cells[field + slots.start : field + slots.stop : SLOT].tolist()

    def keys(self) -> set[Key]:
        """Return the keys of all sessions. Takes time for all slots, and needs no lock."""
        slots = self.used_slots()
        records, lows, highs = (self.column(field, slots) for field in (self.record, self.key_low, self.key_high))
        return {(low, high) for record, low, high in zip(records, lows, highs, strict=True) if record}

    def live_slots(self, slots: range | None = None) -> list[int]:
        """Return the slots among ``slots`` (None: `used_slots`) that hold a session, last used first."""
        slots = self.used_slots() if slots is None else slots
        records, stamps = self.column(self.record, slots), self.column(self.used, slots)
        live = ((stamp, slot) for stamp, slot, record in zip(stamps, slots, records, strict=True) if record)
        return [slot for _, slot in sorted(live, reverse=True)]

    def expired_slots(self, now: int) -> list[int]:
        """Return the slots whose deadline has passed. Free slots have no deadline."""
        slots = self.used_slots()
        return [slot for slot, expires in zip(slots, self.column(self.expires, slots), strict=True) if expires <= now]

    def slots_of_owner(self, owner: int) -> list[int]:
        """Return the slots of an owner, last used first. Scans all slots; needs no lock."""
        slots = self.used_slots()
        owners, stamps = self.column(self.owner, slots), self.column(self.used, slots)
        found = ((stamp, slot) for stamp, slot, each in zip(stamps, slots, owners, strict=True) if each == owner)
        return [slot for _, slot in sorted(found, reverse=True)]

    def count_owned(self) -> int:
        """Return how many slots have an owner. Scans all slots."""
        slots = self.used_slots()
        return len(slots) - self.column(self.owner, slots).count(0)

    def by_use(self, slots: list[int]) -> list[int]:
        """Return these slots, the least recently used first."""
        cells, used = self._file.cells, self.used
        return sorted(slots, key=lambda slot: cells[used + slot])
