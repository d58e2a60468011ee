"""Verify an arena: every cell against every other. Slow and sure; for tests and for those who doubt."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from shmstore.engine import header as at
from shmstore.engine.layout import CELL, SLOT

if TYPE_CHECKING:
    from shmstore.engine.arena import Arena


_LOW = 2**32 - 1
_STEP = 1024  # sessions between two calls of `progress`


def _unseen(done: int, total: int) -> None:
    """Take note of no progress."""


def problems(arena: Arena, progress: Callable[[int, int], object] = _unseen) -> list[str]:
    """
    Return what is wrong with an arena whose lock is held, nothing if it is sound.

    Args:
        arena: Which one.
        progress: Called now and then with how many sessions are verified, and of how many.
    """
    try:
        return _Check(arena, progress).run()
    except (IndexError, struct.error) as error:
        return [f"a cell is damaged: {error}"]


class _Check:
    def __init__(self, arena: Arena, progress: Callable[[int, int], object]) -> None:
        self.arena = arena
        self.progress = progress
        self.cells = arena.cells
        self.found: list[str] = []

    def expect(self, fact: bool, complaint: str) -> None:
        if not fact:
            self.found.append(complaint)

    def run(self) -> list[str]:
        cells, arena = self.cells, self.arena
        top = cells[at.TOP_SLOT]
        self.expect(top <= arena.last_slot and top % SLOT == 0, f"the last slot used is {top} of {arena.last_slot}")
        self.expect(not cells[at.PENDING], "a plan is pending")
        self.expect(not cells[at.STRUCTURE] & 1, "the index is marked as changing")
        if self.found:
            return self.found
        live = [slot for slot in arena.used_slots() if cells[arena.record + slot]]
        free = self._walk(cells[at.FREE_SLOT], arena.next, "free slots")
        self.expect(
            len(live) + len(free) == len(arena.used_slots()),
            f"{len(live)} live + {len(free)} free slots != {len(arena.used_slots())}",
        )
        self.expect(not set(live) & set(free), "a slot is live and free")
        self.expect(len(live) == cells[at.SESSIONS], f"{cells[at.SESSIONS]} sessions, {len(live)} live")
        self._index(live)
        self._lists(live)
        used = self._blocks(live)
        self.expect(used == cells[at.USED_BLOCKS], f"{cells[at.USED_BLOCKS]} blocks used, {used} found")
        weight = sum(arena.weight_at(slot) for slot in live)
        self.expect(weight == cells[at.WEIGHT], f"the weight is {cells[at.WEIGHT]}, {weight} found")
        deadlines = [cells[arena.expires + slot] for slot in live]
        earliest = min(deadlines, default=at.NEVER)
        for cell in (at.EARLIEST, at.EARLIEST_AGAIN):
            self.expect(cells[cell] <= earliest, "a deadline is before the earliest")
        for slot in free:
            self.expect(cells[arena.expires + slot] == at.NEVER, f"free slot {slot} has a deadline")
            self.expect(not cells[arena.owner + slot], f"free slot {slot} has an owner")
        return self.found

    def _ring(self, first: int) -> list[int]:
        """Verify the slots of one owner, and return them."""
        cells, arena, used = self.cells, self.arena, self.arena.used_slots()
        name, owner, count = f"the owner of slot {first}", cells[arena.owner + first], cells[arena.owner_head + first]
        seen, slot = [first], cells[arena.owner_links + first] & _LOW
        while slot != first and slot in used and len(seen) <= len(used):
            self.expect(cells[arena.owner_links + slot] >> 32 == seen[-1], f"{name}: slot {slot} points back wrongly")
            seen.append(slot)
            slot = cells[arena.owner_links + slot] & _LOW
        self.expect(slot == first and cells[arena.owner_links + first] >> 32 == seen[-1], f"{name}: no ring")
        self.expect(len(seen) == count >> 32, f"{name} has {count >> 32} slots, {len(seen)} found")
        self.expect(all(cells[arena.owner + slot] == owner for slot in seen), f"{name} has slots of others")
        return seen

    def _walk(self, slot: int, field: int, name: str) -> list[int]:
        """Follow a chain of slots; what else is in a link's cell is in its upper half."""
        used = self.arena.used_slots()
        seen: list[int] = []
        while slot in used and len(seen) <= len(used):
            seen.append(slot)
            slot = self.cells[field + slot]
            if field == self.arena.owner_head:
                slot &= _LOW
        self.expect(len(seen) == len(set(seen)) and slot == 0, f"{name}: a ring or a wild index")
        return seen

    def _taken(self, buckets: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield the buckets that hold something, and what: most of a small store's are empty."""
        return ((bucket, head) for bucket, head in enumerate(self.cells[buckets : buckets + count]) if head)

    def _index(self, live: list[int]) -> None:
        cells, arena = self.cells, self.arena
        indexed: list[int] = []
        for bucket, first in self._taken(arena.buckets, arena.geometry.buckets):
            chain = self._walk(first, arena.chain, f"bucket {bucket}")
            wrong = [slot for slot in chain if cells[arena.key_low + slot] % arena.geometry.buckets != bucket]
            self.expect(not wrong, f"bucket {bucket} holds slots of others: {wrong}")
            indexed += chain
        self.expect(sorted(indexed) == live, f"{len(indexed)} slots in the index, {len(live)} live")
        owned = []
        for bucket, head in self._taken(arena.owners, arena.geometry.owner_buckets):
            self.expect(not head >> 32, f"owners {bucket} is no slot")
            chain = self._walk(head, arena.owner_head, f"owners {bucket}")
            wrong = [slot for slot in chain if cells[arena.owner + slot] % arena.geometry.owner_buckets != bucket]
            self.expect(not wrong, f"owners {bucket} holds slots of others: {wrong}")
            self.expect(len({cells[arena.owner + slot] for slot in chain}) == len(chain), f"owners {bucket}: one twice")
            for first in chain:
                owned += self._ring(first)
        self.expect(
            sorted(owned) == [slot for slot in live if cells[arena.owner + slot]], "the index of owners is wrong"
        )
        keys = {arena.key_at(slot) for slot in live}
        self.expect(len(keys) == len(live), "a key is there twice")

    def _lists(self, live: list[int]) -> None:
        cells, arena = self.cells, self.arena
        for anchor, owned in ((0, False), (arena.owned_list, True)):
            members = [slot for slot in live if bool(cells[arena.owner + slot]) == owned]
            order: list[int] = []
            above, slot = anchor, cells[arena.next + anchor]
            while slot != anchor and slot in arena.used_slots() and len(order) <= len(live):
                self.expect(cells[arena.prev + slot] == above, f"slot {slot} points back wrongly")
                order.append(slot)
                above, slot = slot, cells[arena.next + slot]
            self.expect(cells[arena.prev + anchor] == above, "the order of use has a wrong end")
            self.expect(sorted(order) == members, f"{len(order)} slots in order of use, {len(members)} live")
            stamps = [cells[arena.used + slot] for slot in order]
            ordered = all(first > second for first, second in pairwise(stamps))
            self.expect(ordered, "stamps of use are out of order")

    def _blocks(self, live: list[int]) -> int:
        cells, arena = self.cells, self.arena
        blocks, size, shortest = arena.geometry.blocks, arena.geometry.block_size, arena.geometry.shortest
        owner_of = bytearray(blocks + 1)

        def claim(block: int, who: str) -> tuple[int, int]:
            """Return the length of a run, 0 if it is none, and where the next one begins."""
            link = cells[arena.head(block)] if 0 < block <= blocks else 0
            count = link >> 32
            if count < shortest or block + count > blocks + 1:
                self.found.append(f"{who}: run of {count} blocks at {block}")
                return 0, 0
            self.expect(not any(owner_of[block : block + count]), f"{who}: a block is used twice")
            owner_of[block : block + count] = b"\1" * count
            return count, link & (2**32 - 1)

        used = 0
        for number, slot in enumerate(live):
            if not number % _STEP:
                self.progress(number, len(live))
            record = cells[arena.record + slot]
            block, length = record & (2**32 - 1), record >> 32
            while length > 0:
                run, block = claim(block, f"slot {slot}")
                if not run:
                    break
                used += run
                length -= run * size - CELL
            fits = -2 * shortest * size < length <= 0
            self.expect(fits, f"slot {slot}: its chain is not as long as its record")
            entry = arena.under_lock(slot)  # None also if the record is another key's
            self.expect(not cells[arena.version + slot] & 1, f"slot {slot} is marked as changing")
            if entry is None:
                self.found.append(f"slot {slot}: the record is damaged")
            else:
                self.expect(entry[3][4] == cells[arena.owner + slot], f"slot {slot}: its owner is not the record's")
        block, free = cells[at.FREE_RUN], 0
        while block and free <= blocks:  # else it is a ring
            run, block = claim(block, "free")
            free += run
        self.expect(used + free == blocks, f"{used} used + {free} free blocks != {blocks}")
        return used
