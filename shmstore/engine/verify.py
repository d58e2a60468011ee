"""Verification of an arena: every cell is compared with every other. Thorough and slow, for tests and diagnosis."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from shmstore.engine import header as at
from shmstore.engine.arena import Arena
from shmstore.engine.layout import CELL, LOW_HALF, ArenaDamaged

_STEP = 1024  # sessions between two calls of `progress`


def _ignore_progress(done: int, total: int) -> None:
    """Report nothing."""


def problems(arena: Arena, progress: Callable[[int, int], object] = _ignore_progress) -> list[str]:
    """
    Return a description of each inconsistency in an arena; an empty list if it is sound. Its lock must be held.

    Args:
        arena: The arena.
        progress: Called repeatedly with the number of verified sessions and the total number.
    """
    verification = _Verification(arena, progress)
    try:
        return verification.run()
    except (IndexError, struct.error):
        return [*verification.found, "a cell points outside the memory; what follows was not verified"]
    except ArenaDamaged as damage:
        return [*verification.found, f"{damage}; what follows was not verified"]


def verify(arena: Arena) -> None:
    """
    Verify every invariant of an arena, under its lock.

    Raises:
        ArenaDamaged: The message lists what is wrong.
    """
    try:
        arena.lock(10.0)
        found = problems(arena)
    finally:
        arena.unlock()
    if found:
        raise ArenaDamaged("; ".join(found[:20]))


class _Verification:
    def __init__(self, arena: Arena, progress: Callable[[int, int], object]) -> None:
        self.arena = arena
        self.progress = progress
        self.cells, self.table = arena.cells, arena.table
        self.found: list[str] = []

    def expect(self, condition: bool, problem: str) -> None:
        if not condition:
            self.found.append(problem)

    def run(self) -> list[str]:
        cells, table = self.cells, self.table
        self.expect(not cells[at.PENDING], "a plan is pending")
        self.expect(not cells[at.STRUCTURE] & 1, "the index is marked as changing")
        if self.found:
            return self.found
        live = [slot for slot in table.used_slots() if cells[table.record + slot]]
        free = self._walk(cells[at.FREE_SLOT], table.next, "free slots")
        self.expect(
            len(live) + len(free) == len(table.used_slots()),
            f"{len(live)} live + {len(free)} free slots != {len(table.used_slots())}",
        )
        self.expect(not set(live) & set(free), "a slot is live and free")
        self.expect(len(live) == cells[at.SESSIONS], f"{cells[at.SESSIONS]} sessions, {len(live)} live")
        self._index(live)
        self._order_of_use(live)
        used = self._blocks(live)
        self.expect(used == cells[at.USED_BLOCKS], f"{cells[at.USED_BLOCKS]} blocks used, {used} found")
        weight = sum(map(self._weight, live))
        self.expect(weight == cells[at.WEIGHT], f"the weight is {cells[at.WEIGHT]}, {weight} found")
        deadlines = [cells[table.expires + slot] for slot in live]
        earliest = min(deadlines, default=at.NEVER)
        for cell in (at.EARLIEST, at.EARLIEST_COPY):
            self.expect(cells[cell] <= earliest, "a deadline is before the earliest")
        for slot in free:
            self.expect(cells[table.expires + slot] == at.NEVER, f"free slot {slot} has a deadline")
            self.expect(not cells[table.owner + slot], f"free slot {slot} has an owner")
        return self.found

    def _weight(self, slot: int) -> int:
        try:
            return self.table.weight_at(slot)
        except ArenaDamaged:
            self.found.append(f"slot {slot}: the record is outside the memory")
            return 0

    def _ring(self, first: int) -> list[int]:
        """Verify and return the slots of one owner."""
        cells, table, used = self.cells, self.table, self.table.used_slots()
        name, owner, count = f"the owner of slot {first}", cells[table.owner + first], cells[table.owner_head + first]
        seen, slot = [first], cells[table.owner_links + first] & LOW_HALF
        while slot != first and slot in used and len(seen) <= len(used):
            self.expect(cells[table.owner_links + slot] >> 32 == seen[-1], f"{name}: slot {slot} points back wrongly")
            seen.append(slot)
            slot = cells[table.owner_links + slot] & LOW_HALF
        self.expect(slot == first and cells[table.owner_links + first] >> 32 == seen[-1], f"{name}: not a ring")
        self.expect(len(seen) == count >> 32, f"{name} has {count >> 32} slots, {len(seen)} found")
        self.expect(all(cells[table.owner + slot] == owner for slot in seen), f"{name} has slots of others")
        return seen

    def _walk(self, slot: int, field: int, name: str) -> list[int]:
        """Follow a chain of slots. The upper half of a link's cell may hold other data."""
        used = self.table.used_slots()
        seen: list[int] = []
        while slot in used and len(seen) <= len(used):
            seen.append(slot)
            slot = self.cells[field + slot]
            if field == self.table.owner_head:
                slot &= LOW_HALF
        self.expect(len(seen) == len(set(seen)) and slot == 0, f"{name}: a cycle or an invalid index")
        return seen

    def _used_buckets(self, buckets: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield the buckets that are in use, and their first slots; most buckets of a small store are empty."""
        return ((bucket, head) for bucket, head in enumerate(self.cells[buckets : buckets + count]) if head)

    def _index(self, live: list[int]) -> None:
        cells, arena, table = self.cells, self.arena, self.table
        indexed: list[int] = []
        for bucket, first in self._used_buckets(table.buckets, arena.geometry.buckets):
            chain = self._walk(first, table.chain, f"bucket {bucket}")
            wrong = [slot for slot in chain if cells[table.key_low + slot] % arena.geometry.buckets != bucket]
            self.expect(not wrong, f"bucket {bucket} holds slots of others: {wrong}")
            indexed += chain
        self.expect(sorted(indexed) == live, f"{len(indexed)} slots in the index, {len(live)} live")
        owned = []
        for bucket, head in self._used_buckets(table.owners, arena.geometry.owner_buckets):
            self.expect(not head >> 32, f"owners {bucket}: not a slot")
            chain = self._walk(head, table.owner_head, f"owners {bucket}")
            wrong = [slot for slot in chain if cells[table.owner + slot] % arena.geometry.owner_buckets != bucket]
            self.expect(not wrong, f"owners {bucket} holds slots of others: {wrong}")
            self.expect(len({cells[table.owner + slot] for slot in chain}) == len(chain), f"owners {bucket}: one twice")
            for first in chain:
                owned += self._ring(first)
        self.expect(
            sorted(owned) == [slot for slot in live if cells[table.owner + slot]], "the index of owners is inconsistent"
        )
        keys = {table.key_at(slot) for slot in live}
        self.expect(len(keys) == len(live), "two slots have the same key")

    def _order_of_use(self, live: list[int]) -> None:
        cells, table = self.cells, self.table
        for anchor, owned in ((0, False), (table.owned_list, True)):
            members = [slot for slot in live if bool(cells[table.owner + slot]) == owned]
            order: list[int] = []
            above, slot = anchor, cells[table.next + anchor]
            while slot != anchor and slot in table.used_slots() and len(order) <= len(live):
                self.expect(cells[table.prev + slot] == above, f"slot {slot} points back wrongly")
                order.append(slot)
                above, slot = slot, cells[table.next + slot]
            self.expect(cells[table.prev + anchor] == above, "the order of use has a wrong end")
            self.expect(sorted(order) == members, f"{len(order)} slots in order of use, {len(members)} live")
            late = [slot for slot in order if cells[table.used + slot] > cells[at.TICK]]
            self.expect(not late, f"stamps of use are later than the last one: {late}")

    def _blocks(self, live: list[int]) -> int:
        cells, arena, table = self.cells, self.arena, self.table
        blocks, size, shortest = arena.geometry.blocks, arena.geometry.block_size, arena.geometry.shortest
        owner_of = bytearray(blocks + 1)

        def claim(block: int, user: str) -> tuple[int, int]:
            """Return the length of a run, 0 if it is invalid, and the block at which the next run starts."""
            link = cells[table.run_head(block)] if 0 < block <= blocks else 0
            count = link >> 32
            if count < shortest or block + count > blocks + 1:
                self.found.append(f"{user}: run of {count} blocks at {block}")
                return 0, 0
            self.expect(not any(owner_of[block : block + count]), f"{user}: a block is used twice")
            owner_of[block : block + count] = b"\1" * count
            return count, link & (2**32 - 1)

        used = 0
        for number, slot in enumerate(live):
            if not number % _STEP:
                self.progress(number, len(live))
            record = cells[table.record + slot]
            block, length = record & (2**32 - 1), record >> 32
            while length > 0:
                run, block = claim(block, f"slot {slot}")
                if not run:
                    break
                used += run
                length -= run * size - CELL
            fits = -2 * shortest * size < length <= 0
            self.expect(fits, f"slot {slot}: the length of its chain does not match its record")
            entry = arena.reader.try_at(slot)  # None also if the record is another key
            self.expect(not cells[table.version + slot] & 1, f"slot {slot} is marked as changing")
            if entry is None:
                self.found.append(f"slot {slot}: the record is damaged")
            else:
                self.expect(entry[3][4] == cells[table.owner + slot], f"slot {slot}: its owner is not the record's")
        block, free = cells[at.FREE_RUN], 0
        while block and free <= blocks:  # more free blocks than blocks mean a cycle
            run, block = claim(block, "free")
            free += run
        self.expect(used + free == blocks, f"{used} used + {free} free blocks != {blocks}")
        return used
