"""Records by key in shared memory: slots, blocks, index, order of use, deadlines. No policy, no sessions.

How they are read is in reader.py. Writers hold the lock, and change everything through the journal (mapping.py). New
records go into blocks that nobody uses yet. One 8-byte store of the ``record`` cell of a slot (first block and length)
publishes a record to readers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

from shmstore.engine.frame import HEAD, Key, weight_of
from shmstore.engine.header import (
    EARLIEST,
    EARLIEST_AGAIN,
    FREE_RUN,
    FREE_SLOT,
    HAND,
    MAX,
    NEVER,
    NO_TTL,
    OPTION_CELLS,
    OPTIONS_AGAIN,
    OPTIONS_SUM,
    RECENT_EARLIEST,
    SESSIONS,
    SETS,
    STRUCTURE,
    SWEEP,
    TICK,
    TOP_SLOT,
    TOUCHES,
    TTL,
    USED_BLOCKS,
    WEIGHING,
    WEIGHT,
)
from shmstore.engine.layout import CELL, RENAMED, SLOT, TOMBSTONE_WAYS, ArenaDamaged
from shmstore.engine.reader import AHEAD, Reader
from shmstore.engine.verify import problems

__all__ = ["STAMPS_AHEAD", "Arena"]

_LOW: Final = 2**32 - 1

_OPTIONS: Final = OPTION_CELLS.stop - OPTION_CELLS.start
_BATCH: Final = 32  # slots that eviction looks at for an expired session
STAMPS_AHEAD: Final = 60 * 10**9
"""Nanoseconds by which a stamp of use may be ahead of the clock: of what is further ahead damage is the cause."""


P = ParamSpec("P")
R = TypeVar("R")


def _sound(method: Callable[Concatenate[Arena, P], R]) -> Callable[Concatenate[Arena, P], R]:
    """Return a mutation that says `ArenaDamaged` when damaged cells lead it astray. It has changed nothing then."""

    @wraps(method)
    def call(self: Arena, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except (IndexError, struct.error) as error:
            raise ArenaDamaged(f"a cell is damaged: {error}") from error

    return call


class _Planned(dict[int, int]):
    """Cells as they will be: those that a plan changes, else as they are."""

    def __init__(self, cells: memoryview) -> None:
        super().__init__()
        self._cells = cells

    def __missing__(self, cell: int) -> int:
        return int(self._cells[cell])


class Arena(Reader):
    """Records by key. Whatever changes them is called with the lock, which ``finally: arena.unlock()`` lets go of."""

    def _format(self) -> None:
        cells = self.cells
        cells[self.prev + self.owned_list] = cells[self.next + self.owned_list] = self.owned_list
        cells[FREE_RUN] = 1
        cells[self.head(1)] = self._blocks << 32
        cells[EARLIEST] = cells[EARLIEST_AGAIN] = cells[RECENT_EARLIEST] = NEVER
        cells[TTL] = NO_TTL

    def set_options(self, options: Sequence[int]) -> None:
        """
        Set the cells of the options. Called by the server, without the lock, whose holder may be frozen.

        In this order: a server that is killed in between leaves the old options, or the new ones, or cells that are
        damaged and that `restore_options` makes the new ones.
        """
        cells = self.cells
        for cell, value in enumerate(options, OPTIONS_AGAIN):
            cells[cell] = value
        cells[OPTIONS_SUM] = self._sum_of(OPTIONS_AGAIN)
        for cell, value in enumerate(options, MAX):
            cells[cell] = value

    def options_damaged(self) -> bool:
        """Return whether the cells of the options are not what they were set to."""
        known = self.cells[OPTIONS_SUM]
        return bool(known) and self._sum_of(MAX) != known

    def restore_options(self) -> bool:
        """Set damaged cells of the options to what they were; return whether they were damaged and now are not."""
        cells = self.cells
        if not self.options_damaged():
            return False
        again = cells[OPTIONS_AGAIN : OPTIONS_AGAIN + _OPTIONS].tolist()
        if self._sum_of(OPTIONS_AGAIN) == cells[OPTIONS_SUM]:
            for cell, value in enumerate(again, MAX):
                cells[cell] = value
        elif cells[OPTION_CELLS].tolist() == again:
            cells[OPTIONS_SUM] = self._sum_of(MAX)
        return not self.options_damaged()

    def _sum_of(self, first: int) -> int:
        return zlib.crc32(self._memory[first * CELL : (first + _OPTIONS) * CELL])

    def find(self, key: Key) -> int:
        """Return the slot of ``key``, 0 if there is none."""
        return self._look(*key)

    def fits(self, length: int, *, new: bool) -> bool:
        """Return whether a record of ``length`` bytes, in a ``new`` slot or not, can be written without evicting."""
        cells = self.cells
        used, sessions = cells[USED_BLOCKS], cells[SESSIONS]
        if used > self._blocks or sessions > self._slots:
            raise ArenaDamaged("there is more in it than it can hold")
        # How many runs the free blocks are shows only when they are taken: the worst is assumed.
        return length <= self.geometry.holds(self._blocks - used) and not (new and sessions == self._slots)

    @_sound
    def audit(self, length: int, *, new: bool) -> None:
        """
        Verify the numbers because of which sessions are about to be evicted for a record of ``length`` bytes.

        Raises:
            ArenaDamaged: One is wrong, so there may be room.
        """
        cells = self.cells
        if new and cells[SESSIONS] == self._slots and (cells[FREE_SLOT] or cells[TOP_SLOT] < self.last_slot):
            raise ArenaDamaged("the number of sessions is wrong")
        if not cells[WEIGHING]:
            if cells[WEIGHT] != cells[SESSIONS]:
                raise ArenaDamaged("the weight of the sessions is wrong")
        elif cells[MAX] and cells[WEIGHT] > cells[MAX]:  # as after `max` was lowered: rare, so this may take its time
            slots = self.used_slots()
            records = zip(slots, self.column(self.record, slots), strict=True)
            if cells[WEIGHT] != sum(self.weight_at(slot) for slot, record in records if record):
                raise ArenaDamaged("the weight of the sessions is wrong")
        free, block, found = self._blocks - cells[USED_BLOCKS], cells[FREE_RUN], 0
        if length > self.geometry.holds(free):  # so there are few runs to look at
            while block and found <= free:
                link = cells[self.heads + block * self._step]
                found += max(link >> 32, 1)
                block = link & _LOW
            if found != free:
                raise ArenaDamaged("the number of free blocks is wrong")

    @_sound
    def can_hold(self, length: int, slot: int) -> bool:
        """Return whether a record of ``length`` bytes fits beside what is in ``slot``, if all others go."""
        beside = self._last_run(self.cells[self.record + slot])[1] if slot else 0
        return length <= self.geometry.holds(self._blocks - beside)

    @_sound
    def publish(
        self,
        slot: int,
        key: Key,
        record: bytes,
        owner: int,
        expires: int,
        now: int,
        count: int = SETS,
        *,
        tombstone: bool = False,
        used: int | None = None,
    ) -> int:
        """
        Make ``record`` what ``key`` leads to, as the most recently used, and return its slot.

        Args:
            slot: The slot to change; 0 takes a new one. If it had another key, it is renamed.
            key: The key of the record.
            record: What `seal` returned.
            owner: Digest of the owner, 0 for none.
            expires: Deadline.
            now: The time.
            count: The cell that counts this.
            tombstone: Whether a renamed one leaves a tombstone under its old key.
            used: When it was used last; None: now. It comes after all others in the order of use in any case.
        """
        cells, size, shortest = self.cells, self._block_size, self._shortest
        plan: list[int] = []
        old = 0
        if slot:
            old = cells[self.record + slot]
            if not old:
                raise ArenaDamaged("a slot in the index has no record")
            renamed = self.key_at(slot) != key
        else:
            renamed = True
            slot = cells[FREE_SLOT]
            plan += (FREE_SLOT, cells[self.next + slot]) if slot else (TOP_SLOT, cells[TOP_SLOT] + SLOT)
            slot = slot or cells[TOP_SLOT] + SLOT
            if slot % SLOT or slot > self.last_slot or cells[self.record + slot]:
                raise ArenaDamaged("the list of free slots is damaged")
        version = cells[self.version + slot] | 1  # odd while it changes, whatever damage has made of it

        # Into free blocks: nobody sees them before the plan is applied.
        first = block = cells[FREE_RUN]
        at = taken = 0
        weight = weight_of(record)
        while True:
            head = self.heads + block * self._step
            link = cells[head]
            run, following = link >> 32, link & _LOW
            if run < shortest or block + run > self._blocks + 1:
                raise ArenaDamaged("the list of free blocks is damaged")
            start, holds = head * CELL + CELL, run * size - CELL
            part = record[at : at + holds]
            self._memory[start : start + len(part)] = part
            at += holds
            if at >= len(record):
                break
            taken += run
            block = following
        need = max(-(-(len(part) + CELL) // size), shortest)
        if run - need >= shortest:
            rest = block + need
            plan += (head, need << 32, head + need * self._step, run - need << 32 | following)
        else:
            need, rest = run, following
            plan += (head, run << 32)
        taken += need

        if renamed:
            if old and tombstone:
                self._add_tombstone(plan, self.key_at(slot), now, RENAMED)
            structure = cells[STRUCTURE] | 1
            plan += (STRUCTURE, structure)
        plan += (self.version + slot, version)
        if renamed:
            # No cell that readers look at is in a plan twice: a plan that is applied again, after its process died,
            # must not lead them through anything that it did not leave in the end.
            bucket = self.buckets + key[0] % self._bucket_count
            before, after = self._unchain(slot) if old else (0, 0)
            plan += (self.key_low + slot, key[0], self.key_high + slot, key[1])
            if before != bucket:
                if old:
                    plan += (before, after)
                plan += (self.chain + slot, cells[bucket], bucket, slot)
        plan += (self.record + slot, len(record) << 32 | first, self.expires + slot, expires)
        was_owned = cells[self.owner + slot] if old else 0
        if owner != was_owned:
            self._list_under(plan, slot, was_owned, owner)
        elif cells[self.owner + slot] != owner:
            plan += (self.owner + slot, owner)  # damage has left something in a slot that is free
        plan += (self.version + slot, version + 1)
        if renamed:
            plan += (STRUCTURE, structure + 1)

        if old:
            # A chain of runs is also a list of runs: it becomes the front of the free list in one store.
            last, freed = self._last_run(old)
            plan += (last, cells[last] & ~_LOW | rest, FREE_RUN, old & _LOW)
            taken -= freed
            weight -= self.weight_at(slot) if cells[WEIGHING] else 1
        else:
            plan += (FREE_RUN, rest, SESSIONS, cells[SESSIONS] + 1)
        if weight:
            plan += (WEIGHT, cells[WEIGHT] + weight)
        if taken:
            plan += (USED_BLOCKS, cells[USED_BLOCKS] + taken)
        plan += (count, cells[count] + 1)
        self._use(plan, slot, bool(was_owned) if old else None, bool(owner), now, used)
        self._deadline(plan, expires)
        self.commit(plan)
        return slot

    @_sound
    def retime(self, slot: int, expires: int, now: int) -> None:
        """Give ``slot`` another deadline and make it the most recently used."""
        cells = self.cells
        plan = [self.expires + slot, expires, TOUCHES, cells[TOUCHES] + 1]
        owned = bool(cells[self.owner + slot])
        self._use(plan, slot, owned, owned, now)
        self._deadline(plan, expires)
        self.commit(plan)

    @_sound
    def use(self, slot: int, version: int, now: int) -> None:
        """Make ``slot`` the most recently used, unless it is no longer what was read."""
        cells = self.cells
        if cells[self.version + slot] == version:
            plan: list[int] = []
            owned = bool(cells[self.owner + slot])
            self._use(plan, slot, owned, owned, now)
            self.commit(plan)

    @_sound
    def drop(self, slot: int, count: int, tombstone: int | None = None) -> None:
        """
        Free ``slot`` and its blocks.

        Args:
            slot: Which one.
            count: The cell that counts such drops.
            tombstone: The time, if it leaves a tombstone under its key.
        """
        cells = self.cells
        version, structure = cells[self.version + slot] | 1, cells[STRUCTURE] | 1
        record = cells[self.record + slot]
        before, after = self._unchain(slot)
        last, freed = self._last_run(record)
        if cells[FREE_RUN] > self._blocks or cells[FREE_SLOT] > self.last_slot:
            raise ArenaDamaged("a list of what is free is damaged")
        above, below = self._neighbours(slot)
        plan: list[int] = []
        if tombstone is not None:
            self._add_tombstone(plan, self.key_at(slot), tombstone, 0)
        plan += (
            STRUCTURE, structure,
            self.version + slot, version,
            self.record + slot, 0,
            self.expires + slot, NEVER,
            self.version + slot, version + 1,
            before, after,
            STRUCTURE, structure + 1,
            self.next + above, below,
            self.prev + below, above,
            self.next + slot, cells[FREE_SLOT],
            FREE_SLOT, slot,
            last, cells[last] & ~_LOW | cells[FREE_RUN],
            FREE_RUN, record & _LOW,
            USED_BLOCKS, cells[USED_BLOCKS] - freed,
            SESSIONS, cells[SESSIONS] - 1,
            WEIGHT, cells[WEIGHT] - (self.weight_at(slot) if cells[WEIGHING] else 1),
            count, cells[count] + 1,
        )  # fmt: skip
        if owner := cells[self.owner + slot]:
            self._list_under(plan, slot, owner, 0)
        self.commit(plan)

    @_sound
    def least_used(self, *, owned: bool, keep: int) -> int:
        """Return the least recently used slot with or without an owner, other than ``keep``; 0 if there is none."""
        cells = self.cells
        anchor = self.owned_list if owned else 0
        slot = cells[self.prev + anchor]
        if slot == keep and slot != anchor:
            slot = cells[self.prev + slot]
        if slot == anchor:
            return 0
        if slot not in self.used_slots() or not cells[self.record + slot]:
            raise ArenaDamaged("the order of use is damaged")
        return slot

    @_sound
    def expired_nearby(self, now: int, keep: int) -> int:
        """Return an expired slot other than ``keep`` that the moving hand finds in one batch; 0 if it finds none."""
        cells = self.cells
        earliest = cells[EARLIEST]
        # With the same said twice, a bit that has flipped in one of the three costs time at most.
        if now < earliest <= cells[RECENT_EARLIEST] and now < cells[EARLIEST_AGAIN]:
            return 0
        used = self.used_slots()
        hand = cells[HAND] if cells[HAND] in used else SLOT
        ahead = range(hand, min(hand + _BATCH * SLOT, used.stop), SLOT)
        around = range(SLOT, min(hand, SLOT + (_BATCH - len(ahead)) * SLOT), SLOT)
        for batch in (ahead, around):
            for slot, expires in zip(batch, self.column(self.expires, batch), strict=True):
                if expires <= now and slot != keep and cells[self.record + slot]:
                    cells[HAND] = slot
                    return slot
        cells[HAND] = (around or ahead).stop
        return 0

    @_sound
    def owned_slots(self, owner: int, most: int = 0) -> tuple[int, list[int]]:
        """
        Return how many slots an owner has, and at most ``most`` of them: the oldest first, whenever they were used.

        Called with the lock. Takes time for those that it returns, whatever number there are.
        """
        cells = self.cells
        _, first = self._first_of(owner, cells)
        if not first:
            return 0, []
        count, slot = cells[self.owner_head + first] >> 32, first
        found: list[int] = []
        for left in range(count - 1, max(count - most, 0) - 1, -1):
            slot = cells[self.owner_links + slot] >> 32
            if cells[self.owner + slot] != owner or not cells[self.record + slot] or (slot == first) != (not left):
                raise ArenaDamaged("the list of an owner's sessions is damaged")
            found.append(slot)
        return count, found

    def owned(self) -> int:
        """Return how many slots have an owner; takes time for all slots."""
        slots = self.used_slots()
        return len(slots) - self.column(self.owner, slots).count(0)

    def by_use(self, slots: list[int]) -> list[int]:
        """Return these slots, the least recently used first."""
        cells, used = self.cells, self.used
        return sorted(slots, key=lambda slot: cells[used + slot])

    def scan_owned(self, owner: int) -> list[int]:
        """Return all slots of an owner, the most recently used first, without the lock; takes time for all slots."""
        slots = self.used_slots()
        owners, stamps = self.column(self.owner, slots), self.column(self.used, slots)
        found = ((stamp, slot) for stamp, slot, each in zip(stamps, slots, owners, strict=True) if each == owner)
        return [slot for _, slot in sorted(found, reverse=True)]

    def weight_at(self, slot: int) -> int:
        """Return how much of ``max`` the session in ``slot`` takes."""
        start = self.head(self.cells[self.record + slot] & _LOW) * CELL + CELL
        return weight_of(self._memory[start : start + HEAD])

    def begin_sweep(self) -> int:
        """Before a prune scans: from here on deadlines are collected apart, for `end_sweep`. Return its number."""
        number = (self.cells[SWEEP] + 1) % 2**64
        self.commit([RECENT_EARLIEST, NEVER, SWEEP, number])
        return number

    def end_sweep(self, number: int, earliest: int) -> None:
        """After a prune: ``earliest`` is the earliest deadline that it left, of those that it saw."""
        if self.cells[SWEEP] == number:  # else another has begun since, and collects apart only from then on
            earliest = min(earliest, self.cells[RECENT_EARLIEST])
            self.commit([EARLIEST, earliest, EARLIEST_AGAIN, earliest])

    def _unchain(self, slot: int) -> tuple[int, int]:
        """Return the cell that leads to ``slot`` in the index, and where it must lead without."""
        cells = self.cells
        cell = self.buckets + cells[self.key_low + slot] % self._bucket_count
        for _ in range(self._slots):
            if cells[cell] == slot:
                return cell, cells[self.chain + slot]
            cell = self.chain + cells[cell]
        raise ArenaDamaged("a slot is missing in the index")

    def _list_under(self, plan: list[int], slot: int, old: int, new: int) -> None:
        """
        Plan to make ``slot`` the first of ``new``'s, which was one of ``old``'s; 0 stands for no owner.

        An owner's slots are a ring, the newest first. Use does not change its order: who needs the order of use sorts
        by stamps. The first slot is in the chain of the owner's bucket. All this is used under the lock only.
        """
        cells, links, heads = self.cells, self.owner_links, self.owner_head
        seen: memoryview | _Planned = cells
        if old:
            leading, first = self._first_of(old, cells)
            seen = planned = _Planned(cells)
            self._leave_owner(planned, slot, leading, first)
            for cell, value in planned.items():
                plan += (cell, value)
        if new:
            leading = self.owners + new % self._owner_buckets
            first = seen[leading]
            if first and cells[self.owner + first] != new:
                leading, first = self._first_of(new, seen)
            if first:
                last = seen[links + first] >> 32
                if seen[links + last] & _LOW != first:
                    raise ArenaDamaged("the list of an owner's sessions is damaged")
                after = slot if last == first else seen[links + first] & _LOW
                plan += (
                    links + slot, last << 32 | first,
                    links + last, seen[links + last] & ~_LOW | slot,
                    links + first, slot << 32 | after,
                    heads + slot, seen[heads + first] + (1 << 32),
                    leading, seen[leading] & ~_LOW | slot,
                )  # fmt: skip
            else:
                plan += (links + slot, slot << 32 | slot, heads + slot, 1 << 32 | seen[leading], leading, slot)
        plan += (self.owner + slot, new)

    def _first_of(self, owner: int, seen: memoryview | _Planned) -> tuple[int, int]:
        """Return the cell that leads to the first slot of an owner, and that slot; the bucket and 0 if it has none."""
        cells = self.cells
        bucket = cell = self.owners + owner % self._owner_buckets
        for _ in range(self._slots + 1):
            slot = seen[cell]
            if cell != bucket:
                slot &= _LOW
            if not slot:
                return bucket, 0
            if slot % SLOT or slot > self.last_slot:
                raise ArenaDamaged("the index of owners leads out of the arena")
            if cells[self.owner + slot] == owner:
                return cell, slot
            cell = self.owner_head + slot
        raise ArenaDamaged("the index of owners is a ring")

    def _leave_owner(self, planned: _Planned, slot: int, leading: int, first: int) -> None:
        """Plan to take ``slot`` out of the ring that begins with ``first``, to which the cell ``leading`` leads."""
        cells, links = self.cells, self.owner_links
        before, after = cells[links + slot] >> 32, cells[links + slot] & _LOW
        head = cells[self.owner_head + first]
        alone = after == slot
        if (
            not first
            or cells[links + before] & _LOW != slot
            or cells[links + after] >> 32 != slot
            or alone != (head >> 32 == 1)
        ):
            raise ArenaDamaged("the list of an owner's sessions is damaged")
        if alone:
            planned[leading] = cells[leading] & ~_LOW | head & _LOW
            return
        planned[links + before] = cells[links + before] & ~_LOW | after
        planned[links + after] = before << 32 | planned[links + after] & _LOW
        if slot == first:
            first = after
            planned[leading] = cells[leading] & ~_LOW | after
        planned[self.owner_head + first] = head - (1 << 32)

    def _add_tombstone(self, plan: list[int], key: Key, now: int, renamed: int) -> None:
        """Plan a tombstone: in place of the one that the key has, of a damaged one, else of the oldest of its set."""
        first, keys, times = self.tombstones_of(key)
        time = max(now, 2) & ~RENAMED | renamed
        if key[1] in keys:
            way = keys.index(key[1])
        else:
            latest = max(times)
            way = times.index(latest if latest > time + AHEAD else min(times))  # ahead of the clock: damaged
        plan += (first + way, key[1], first + TOMBSTONE_WAYS + way, time)

    def _last_run(self, record: int) -> tuple[int, int]:
        """Return the head of a record's last run, and how many blocks the record has."""
        cells, size, shortest = self.cells, self._block_size, self._shortest
        block, left, blocks = record & _LOW, record >> 32, 0
        while True:
            head = self.heads + block * self._step
            run = cells[head] >> 32
            left -= run * size - CELL
            # The last run is as long as it has to be, or a little longer if what was left of it had been too short.
            if not block or run < shortest or block + run > self._blocks + 1 or left <= -2 * shortest * size:
                raise ArenaDamaged("a chain of blocks is damaged")
            blocks += run
            if left <= 0:
                return head, blocks
            block = cells[head] & _LOW

    def _use(
        self, plan: list[int], slot: int, was_owned: bool | None, owned: bool, now: int, used: int | None = None
    ) -> None:
        """Plan to make ``slot`` the first of its list; ``was_owned`` tells the list it is in, None if in none yet."""
        cells = self.cells
        prev, next_ = self.prev, self.next
        stamp = max(now if used is None else used, cells[TICK] + 1)
        if stamp > now + STAMPS_AHEAD:
            raise ArenaDamaged("the last stamp of use is in the future")
        plan += (self.used + slot, stamp, TICK, stamp)
        anchor = self.owned_list if owned else 0
        first = cells[next_ + anchor]
        if first == slot:
            return
        if cells[prev + first] != anchor:
            raise ArenaDamaged("the order of use is damaged")
        if was_owned is not None:
            above, below = cells[prev + slot], cells[next_ + slot]  # as `_neighbours`; this is on the way of each write
            if cells[next_ + above] != slot or cells[prev + below] != slot:
                raise ArenaDamaged("the order of use is damaged")
            plan += (next_ + above, below, prev + below, above)
        plan += (
            next_ + slot, first, prev + slot, anchor,
            prev + first, slot, next_ + anchor, slot,
        )  # fmt: skip

    def _neighbours(self, slot: int) -> tuple[int, int]:
        """Return the slots before and after this one in the order of use."""
        cells = self.cells
        above, below = cells[self.prev + slot], cells[self.next + slot]
        if cells[self.next + above] != slot or cells[self.prev + below] != slot:  # else others' cells were changed
            raise ArenaDamaged("the order of use is damaged")
        return above, below

    def _deadline(self, plan: list[int], expires: int) -> None:
        cells = self.cells
        if expires < cells[RECENT_EARLIEST]:
            plan += (RECENT_EARLIEST, expires)
            if expires < cells[EARLIEST]:
                plan += (EARLIEST, expires)
            if expires < cells[EARLIEST_AGAIN]:
                plan += (EARLIEST_AGAIN, expires)

    def check(self) -> None:
        """
        Verify every invariant of the arena, under its lock.

        Raises:
            ArenaDamaged: The message lists what is wrong.
        """
        try:
            self.lock(10.0)
            found = problems(self)
        finally:
            self.unlock()
        if found:
            raise ArenaDamaged("; ".join(found[:20]))
