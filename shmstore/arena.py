"""Records by key in shared memory: slots, blocks, index, order of use, deadlines. No policy, no sessions.

How they are read is in reading.py. Writers hold the lock, and change everything through the journal (memory.py). New
records go into blocks that nobody uses yet. One 8-byte store of the ``record`` cell of a slot (first block and length)
publishes a record to readers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, Final, ParamSpec, TypeVar

from shmstore.cells import (
    EARLIEST,
    FREE_RUN,
    FREE_SLOT,
    HAND,
    NEVER,
    NO_TTL,
    OWNED,
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
from shmstore.check import problems
from shmstore.layout import CELL, SLOT, TOMBSTONE_WAYS, ArenaDamaged
from shmstore.reading import Reader
from shmstore.sealed import HEAD, Key, weight_of

__all__ = ["Arena"]

_LOW: Final = 2**32 - 1

_BATCH: Final = 32  # slots that eviction looks at for an expired session

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


class Arena(Reader):
    """Records by key. Whatever changes them is called with the lock, which ``finally: arena.unlock()`` lets go of."""

    def _format(self) -> None:
        cells = self.cells
        cells[self.prev + self.owned_list] = cells[self.next + self.owned_list] = self.owned_list
        cells[FREE_RUN] = 1
        cells[self.head(1)] = self._blocks << 32
        cells[EARLIEST] = cells[RECENT_EARLIEST] = NEVER
        cells[TTL] = NO_TTL

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
    ) -> int:
        """
        Make ``record`` what ``key`` leads to, as the most recently used, and return its slot.

        Args:
            slot: The slot to change; 0 takes a new one. If it had another key, it is renamed.
            key: The key of the record.
            record: What `seal` returned.
            owner: Digest of the owner, 0 for none.
            expires: Deadline.
            now: The time, for the order of use.
            count: The cell that counts this.
            tombstone: Whether a renamed one leaves a tombstone under its old key.
        """
        cells, size, shortest = self.cells, self._block_size, self._shortest
        plan: list[int] = []
        old = 0
        if slot:
            old = cells[self.record + slot]
            renamed = self.key_at(slot) != key
        else:
            renamed = True
            slot = cells[FREE_SLOT]
            plan += (FREE_SLOT, cells[self.next + slot]) if slot else (TOP_SLOT, cells[TOP_SLOT] + SLOT)
            slot = slot or cells[TOP_SLOT] + SLOT
            if slot % SLOT or slot > self.last_slot or cells[self.record + slot]:
                raise ArenaDamaged("the list of free slots is damaged")
        version = cells[self.version + slot]

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
                self._add_tombstone(plan, self.key_at(slot), now)
            structure = cells[STRUCTURE]
            plan += (STRUCTURE, structure + 1)
        plan += (self.version + slot, version + 1)
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
            self._change_owner(plan, slot, was_owned, owner)
        plan += (self.version + slot, version + 2)
        if renamed:
            plan += (STRUCTURE, structure + 2)

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
        self._use(plan, slot, bool(was_owned) if old else None, bool(owner), now)
        self._deadline(plan, expires)
        self.commit(plan)
        return slot

    @_sound
    def retime(self, slot: int, expires: int, now: int) -> None:
        """Give ``slot`` another deadline and make it the most recently used."""
        owned = bool(self.cells[self.owner + slot])
        plan = [self.expires + slot, expires, TOUCHES, self.cells[TOUCHES] + 1]
        self._use(plan, slot, owned, owned, now)
        self._deadline(plan, expires)
        self.commit(plan)

    @_sound
    def use(self, slot: int, version: int, now: int) -> None:
        """Make ``slot`` the most recently used, unless it is no longer what was read."""
        cells = self.cells
        if cells[self.version + slot] == version:
            owned = bool(cells[self.owner + slot])
            plan: list[int] = []
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
        version, structure = cells[self.version + slot], cells[STRUCTURE]
        record = cells[self.record + slot]
        before, after = self._unchain(slot)
        last, freed = self._last_run(record)
        if cells[FREE_RUN] > self._blocks or cells[FREE_SLOT] > self.last_slot:
            raise ArenaDamaged("a list of what is free is damaged")
        above, below = cells[self.prev + slot], cells[self.next + slot]
        plan: list[int] = []
        if tombstone is not None:
            self._add_tombstone(plan, self.key_at(slot), tombstone)
        plan += (
            STRUCTURE, structure + 1,
            self.version + slot, version + 1,
            self.record + slot, 0,
            self.expires + slot, NEVER,
            self.version + slot, version + 2,
            before, after,
            STRUCTURE, structure + 2,
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
            self._change_owner(plan, slot, owner, 0)
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
        if now < cells[EARLIEST]:
            return 0
        used = self.used_slots()
        hand = cells[HAND] if cells[HAND] in used else SLOT
        ahead = range(hand, min(hand + _BATCH * SLOT, used.stop), SLOT)
        around = range(SLOT, min(hand, SLOT + (_BATCH - len(ahead)) * SLOT), SLOT)
        for batch in (ahead, around):
            for slot, expires in zip(batch, self.column(self.expires, batch), strict=True):
                if expires <= now and slot != keep:
                    cells[HAND] = slot
                    return slot
        cells[HAND] = (around or ahead).stop
        return 0

    @_sound
    def owned_slots(self, owner: int) -> list[int]:
        """Return the slots of one owner, the most recently used first. Called with the lock."""
        cells = self.cells
        found: list[int] = []
        slot = cells[self.owners + owner % self._owner_buckets]
        for _ in range(self._slots + 1):
            if not slot:
                break
            if slot > self.last_slot:
                raise ArenaDamaged("the index of owners leads out of the arena")
            if cells[self.owner + slot] == owner:
                found.append(slot)
            slot = cells[self.owner_chain + slot]
        else:
            raise ArenaDamaged("the index of owners is a ring")
        return sorted(found, key=lambda slot: cells[self.used + slot], reverse=True)

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
            self.commit([EARLIEST, min(earliest, self.cells[RECENT_EARLIEST])])

    def _unchain(self, slot: int) -> tuple[int, int]:
        """Return the cell that leads to ``slot`` in the index, and where it must lead without."""
        bucket = self.buckets + self.cells[self.key_low + slot] % self._bucket_count
        return self._leading_to(slot, bucket, self.chain), self.cells[self.chain + slot]

    def _leading_to(self, slot: int, cell: int, chain: int) -> int:
        """Return the cell of a chain that leads to ``slot``; the chain begins at ``cell``."""
        cells = self.cells
        for _ in range(self.geometry.slots):
            if cells[cell] == slot:
                return cell
            cell = chain + cells[cell]
        raise ArenaDamaged("a slot is missing in the index")

    def _change_owner(self, plan: list[int], slot: int, old: int, new: int) -> None:
        """Plan another owner for ``slot``. The index of owners is only used under the lock."""
        cells = self.cells
        leading = after = 0
        if old:
            leading = self._leading_to(slot, self.owners + old % self._owner_buckets, self.owner_chain)
            after = cells[self.owner_chain + slot]
            plan += (leading, after)
        if new:
            bucket = self.owners + new % self._owner_buckets
            plan += (self.owner_chain + slot, after if bucket == leading else cells[bucket], bucket, slot)
        plan += (self.owner + slot, new)
        if bool(old) != bool(new):
            plan += (OWNED, cells[OWNED] + (1 if new else -1))

    def _add_tombstone(self, plan: list[int], key: Key, now: int) -> None:
        """Plan a tombstone: in place of the one that the key has, else of the oldest of its set."""
        first, keys, times = self.tombstones_of(key)
        way = keys.index(key[1]) if key[1] in keys else times.index(min(times))
        plan += (first + way, key[1], first + TOMBSTONE_WAYS + way, max(now, 1))  # 0 stands for never

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

    def _use(self, plan: list[int], slot: int, was_owned: bool | None, owned: bool, now: int) -> None:
        """Plan to make ``slot`` the first of its list; ``was_owned`` tells the list it is in, None if in none yet."""
        cells = self.cells
        prev, next_ = self.prev, self.next
        stamp = max(now, cells[TICK] + 1)
        plan += (self.used + slot, stamp, TICK, stamp)
        anchor = self.owned_list if owned else 0
        first = cells[next_ + anchor]
        if first == slot:
            return
        if was_owned is not None:
            above, below = cells[prev + slot], cells[next_ + slot]
            plan += (next_ + above, below, prev + below, above)
        plan += (
            next_ + slot, first, prev + slot, anchor,
            prev + first, slot, next_ + anchor, slot,
        )  # fmt: skip

    def _deadline(self, plan: list[int], expires: int) -> None:
        cells = self.cells
        if expires < cells[RECENT_EARLIEST]:
            plan += (RECENT_EARLIEST, expires)
            if expires < cells[EARLIEST]:
                plan += (EARLIEST, expires)

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
