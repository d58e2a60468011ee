"""Records by key in shared memory: slots, blocks, index, order of use, deadlines. No policy, no sessions.

Writers hold the lock, and change everything through the journal (memory.py). New records go into blocks that nobody
uses yet. One 8-byte store of the ``record`` cell of a slot (first block and length) publishes a record to readers.

Readers do without the lock. ``version`` of a slot is odd while the slot changes, ``STRUCTURE`` is odd while the chains
of the index change; both only ever grow. A hit counts if the slot's version was even and the same before and after, and
the record carries the right key and checksum; a miss counts if ``STRUCTURE`` was. Else: look again, at last under the
lock.
"""

from __future__ import annotations

import contextlib
import os
import struct
import weakref
import zlib
from collections.abc import Callable
from functools import wraps
from hashlib import blake2b
from typing import Concatenate, Final, ParamSpec, TypeVar

from shmstore.cells import (
    CLOSED,
    EARLIEST,
    FREE_RUN,
    FREE_SLOT,
    HAND,
    MAX,
    MOVED,
    NEVER,
    NO_TTL,
    OWNED,
    PAST_HITS,
    PAST_MISSES,
    RECENT_EARLIEST,
    SESSIONS,
    SETS,
    STATE,
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
from shmstore.errors import StoreUnavailable
from shmstore.layout import CELL, ROW_CELLS, ROWS, SLOT, ArenaDamaged, Geometry
from shmstore.memory import Memory

__all__ = ["Arena", "ArenaDamaged", "Entry", "Geometry", "Key", "body_of", "key_of", "seal"]

_LOW: Final = 2**32 - 1

# A row of counters; each is written by its own process only, and by who buries that.
_PID, _HITS, _MISSES = 0, 1, 2

_TRIES: Final = 8  # of a reader before it takes the lock
_BATCH: Final = 32  # slots that eviction looks at for an expired session

# A record: length, weight, key, owner, created; the body; a CRC-32 of all before it. With its CRC at the end the CRC
# of the whole is a constant, so checking takes one call and no copy.
_HEAD: Final = struct.Struct("<IIQQQQ")
_CRC: Final = struct.Struct("<I")
_RESIDUE: Final = 0x2144DF1C
OVERHEAD: Final = _HEAD.size + _CRC.size

_KEY: Final = struct.Struct("<QQ")

Key = tuple[int, int]
# length, weight, low and high half of the key, owner, created
Head = tuple[int, int, int, int, int, int]
# slot, version, deadline, head, record: what `read` finds. Made at each request, so a plain tuple.
Entry = tuple[int, int, int, Head, bytes]

_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def key_of(name: bytes) -> Key:
    """Return the key of a name: where its session is looked for tells nothing about the name."""
    low, high = _KEY.unpack(blake2b(name, digest_size=16).digest())
    return low, high


def seal(key: Key, owner: int, created: int, body: bytes, weight: int = 1) -> bytes:
    """Return a record as it stands in the arena."""
    head = _HEAD.pack(OVERHEAD + len(body), weight, *key, owner, created)
    return b"".join((head, body, _CRC.pack(zlib.crc32(body, zlib.crc32(head)))))


def _weight_of(record: bytes) -> int:
    weight: int = _HEAD.unpack_from(record)[1]
    return weight


def body_of(record: bytes) -> bytes:
    """Return what was sealed."""
    return record[_HEAD.size : -_CRC.size]


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


class Arena(Memory):
    """
    Records by key in one `Memory`.

    What reads may be called at any time. Everything named a mutation is called with the lock held, through
    ``try: arena.lock(timeout) ... finally: arena.unlock()``.
    """

    def __init__(self, fd: int, geometry: Geometry, path: str | None = None, *, fresh: bool = False) -> None:
        offsets = geometry.offsets()
        # Where each field of slot 0 is; of another slot, which is a multiple of SLOT, so many cells further on.
        first = offsets["slots"] // CELL
        (
            self.key_low, self.key_high, self.record, self.expires, self.used,
            self.version, self.prev, self.next, self.owner, self.chain, self.owner_chain,
        ) = range(first, first + SLOT)  # fmt: skip
        self.buckets, self.owners, self.links, self._rows = (
            offsets[name] // CELL for name in ("buckets", "owners", "links", "counters")
        )
        self._bucket_count, self._owner_buckets = geometry.buckets, geometry.owner_buckets
        self._slots, self._blocks, self._block_size = geometry.slots, geometry.blocks, geometry.block_size
        self.last_slot = geometry.slots * SLOT
        self.owned_list = self.last_slot + SLOT  # the anchor of the list of owned slots; slot 0 is the others'
        self._row = 0  # of this process' counters; 0: none yet
        self._uncounted = [0, 0, 0]
        super().__init__(fd, geometry, path, fresh=fresh)
        _arenas.add(self)

    def _format(self) -> None:
        cells = self.cells
        cells[self.prev + self.owned_list] = cells[self.next + self.owned_list] = self.owned_list
        cells[FREE_RUN] = 1
        cells[self.links + 1] = self._blocks << 32
        cells[EARLIEST] = cells[RECENT_EARLIEST] = NEVER
        cells[TTL] = NO_TTL

    # -- reading, without the lock ---------------------------------------------------------------------------------

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
        run = (cells[self.links + block] >> 32) * self._block_size
        start = self._data + block * self._block_size
        # Nearly always one run: records of like size take the place of their predecessors.
        data = self._memory[start : start + left] if run >= left else self._gather(block, left)
        if cells[self.version + slot] != version or zlib.crc32(data) != _RESIDUE:
            return None
        head: Head = _HEAD.unpack_from(data)
        if head[2] != low or head[3] != high:
            return None
        return slot, version, expires, head, data

    def _gather(self, block: int, left: int) -> bytes:
        cells, size = self.cells, self._block_size
        parts = []
        while left > 0 and 0 < block <= self._blocks:
            link = cells[self.links + block]
            start = self._data + block * size
            length = min((link >> 32) * size, left)
            if not length:
                break
            parts.append(self._memory[start : start + length])
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

    def key_at(self, slot: int) -> Key:
        """Return the key of a slot."""
        return self.cells[self.key_low + slot], self.cells[self.key_high + slot]

    def used_slots(self) -> range:
        """Return the slots that were ever used."""
        if self.cells[STATE]:
            self.follow()
        return range(SLOT, min(self.cells[TOP_SLOT], self.last_slot) + SLOT, SLOT)

    def column(self, field: int, slots: range) -> list[int]:
        """Return a copy of one field of these slots."""
        return self.cells[field + slots.start : field + slots.stop : SLOT].tolist()

    def live_slots(self) -> list[int]:
        """Return the slots in use, the most recently used first."""
        slots = self.used_slots()
        records, stamps = self.column(self.record, slots), self.column(self.used, slots)
        live = ((stamp, slot) for stamp, slot, record in zip(stamps, slots, records, strict=True) if record)
        return [slot for _, slot in sorted(live, reverse=True)]

    def expired_slots(self, now: int) -> list[int]:
        """Return the slots whose deadline has come. Free ones never expire."""
        slots = self.used_slots()
        return [slot for slot, expires in zip(slots, self.column(self.expires, slots), strict=True) if expires <= now]

    # -- mutations: the lock is held -------------------------------------------------------------------------------

    def find(self, key: Key) -> int:
        """Return the slot of ``key``, 0 if there is none."""
        return self._look(*key)

    def fits(self, length: int, *, new: bool) -> bool:
        """Return whether a record of ``length`` bytes, in a ``new`` slot or not, can be written without evicting."""
        cells = self.cells
        used, sessions = cells[USED_BLOCKS], cells[SESSIONS]
        if used > self._blocks or sessions > self._slots:
            raise ArenaDamaged("there is more in it than it can hold")
        return length <= (self._blocks - used) * self._block_size and not (new and sessions == self._slots)

    def can_hold(self, length: int, slot: int) -> bool:
        """Return whether a record of ``length`` bytes fits beside what is in ``slot``, if all others go."""
        beside = -(-(self.cells[self.record + slot] >> 32) // self._block_size) if slot else 0
        return length <= (self._blocks - beside) * self._block_size

    @_sound
    def publish(self, slot: int, key: Key, record: bytes, owner: int, expires: int, now: int, count: int = SETS) -> int:
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
        """
        cells = self.cells
        size = self._block_size
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
        head = cells[FREE_RUN]
        block, need, at = head, -(-len(record) // size), 0
        taken, weight = need, _weight_of(record)
        while True:
            link = cells[self.links + block]
            run, following = link >> 32, link & _LOW
            if not run or block + run > self._blocks + 1:
                raise ArenaDamaged("the list of free blocks is damaged")
            start = self._data + block * size
            if run >= need:
                part = record[at:] if at else record
                self._memory[start : start + len(part)] = part
                break
            self._memory[start : start + run * size] = record[at : at + run * size]
            at += run * size
            need -= run
            block = following
        plan += (self.links + block, need << 32)
        if run > need:
            rest = block + need
            plan += (self.links + rest, run - need << 32 | following)
        else:
            rest = following

        if renamed:
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
        plan += (self.record + slot, len(record) << 32 | head, self.expires + slot, expires)
        was_owned = cells[self.owner + slot] if old else 0
        if owner != was_owned:
            self._change_owner(plan, slot, was_owned, owner)
        plan += (self.version + slot, version + 2)
        if renamed:
            plan += (STRUCTURE, structure + 2)

        if old:
            # A chain of runs is also a list of runs: it becomes the front of the free list in one store.
            last, freed = self._last_run(old)
            plan += (self.links + last, cells[self.links + last] & ~_LOW | rest, FREE_RUN, old & _LOW)
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
    def drop(self, slot: int, count: int) -> None:
        """Free ``slot`` and its blocks; ``count`` is the cell that counts such drops."""
        cells = self.cells
        version, structure = cells[self.version + slot], cells[STRUCTURE]
        record = cells[self.record + slot]
        before, after = self._unchain(slot)
        last, freed = self._last_run(record)
        if cells[FREE_RUN] > self._blocks or cells[FREE_SLOT] > self.last_slot:
            raise ArenaDamaged("a list of what is free is damaged")
        above, below = cells[self.prev + slot], cells[self.next + slot]
        plan = [
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
            self.links + last, cells[self.links + last] & ~_LOW | cells[FREE_RUN],
            FREE_RUN, record & _LOW,
            USED_BLOCKS, cells[USED_BLOCKS] - freed,
            SESSIONS, cells[SESSIONS] - 1,
            WEIGHT, cells[WEIGHT] - (self.weight_at(slot) if cells[WEIGHING] else 1),
            count, cells[count] + 1,
        ]  # fmt: skip
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
            if not 0 < slot <= self.last_slot:
                break
            if cells[self.owner + slot] == owner:
                found.append(slot)
            slot = cells[self.owner_chain + slot]
        else:
            raise ArenaDamaged("the index of owners is a ring")
        return sorted(found, key=lambda slot: cells[self.used + slot], reverse=True)

    def weight_at(self, slot: int) -> int:
        """Return how much of ``max`` the session in ``slot`` takes."""
        start = self._data + (self.cells[self.record + slot] & _LOW) * self._block_size
        return _weight_of(self._memory[start : start + _HEAD.size])

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

    def _last_run(self, record: int) -> tuple[int, int]:
        """Return the first block of a record's last run, and how many blocks the record has."""
        cells = self.cells
        block, left = record & _LOW, -(-(record >> 32) // self._block_size)
        blocks = left
        while True:
            link = cells[self.links + block]
            left -= link >> 32
            if left <= 0:
                return block, blocks
            block = link & _LOW
            if not block or block > self._blocks or not link >> 32:
                raise ArenaDamaged("a chain of blocks is damaged")

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

    # -- another file ----------------------------------------------------------------------------------------------

    def move(self, geometry: Geometry | None = None, timeout: float = 2.0) -> int:
        """
        Carry all sessions over to a new file of this size, put it in the place of this one, and follow it.

        Records that are damaged stay behind, and the least recently used if not all fit. All other users follow at
        their next call.

        Args:
            geometry: Of the new one; None: as it is.
            timeout: How long to wait for the lock, in seconds.

        Returns:
            How many sessions stayed behind.

        Raises:
            StoreFull: The memory for another one cannot be had. Nothing has changed.
        """
        other, temporary = self.prepare(self.path, geometry or self.geometry)
        try:
            self.lock(timeout)
            left = self._carry_over(other)
            if self.path is not None:
                os.rename(temporary, self.path)
            self.cells[STATE] = MOVED
        except BaseException:
            other.close()
            if temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            raise
        finally:
            self.unlock()
        self.become(other)
        return left

    def retire(self, timeout: float = 1.0) -> None:
        """Say to all who have it mapped that its file is going away. Best effort: a frozen holder is not waited for."""
        try:
            with contextlib.suppress(StoreUnavailable):
                self.lock(timeout)
            self.cells[STATE] = CLOSED
        finally:
            self.unlock()

    def _carry_over(self, other: Arena) -> int:
        carried: dict[Key, Entry] = {}
        blocks = other.geometry.blocks
        found = 0
        for slot in self.live_slots():
            found += 1
            with contextlib.suppress(IndexError):
                self.cells[self.version + slot] &= ~1  # a mutation may have come to an end at damage
            entry = self.under_lock(slot)
            if entry is None or self.key_at(slot) in carried or len(carried) == other.geometry.slots:
                continue
            blocks -= -(-len(entry[4]) // other.geometry.block_size)
            if blocks < 0:
                break
            carried[self.key_at(slot)] = entry
        for key, entry in reversed(carried.items()):
            other.publish(0, key, entry[4], entry[3][4], entry[2], self.cells[self.used + entry[0]])
        ours, theirs = self.cells, other.cells
        theirs[SETS:PAST_HITS] = ours[SETS:PAST_HITS]
        theirs[PAST_HITS], theirs[PAST_MISSES] = (count % 2**64 for count in self.reads())  # damaged or not
        theirs[MAX : WEIGHING + 1] = ours[MAX : WEIGHING + 1]
        return found - len(carried)

    # -- counters of reads: one row per process --------------------------------------------------------------------

    def hit(self) -> None:
        """Count a read that found its session."""
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
        rows = range(self._rows, self._rows + ROWS * ROW_CELLS, ROW_CELLS)
        hits = cells[PAST_HITS] + sum(cells[row + _HITS] for row in rows)
        return hits, cells[PAST_MISSES] + sum(cells[row + _MISSES] for row in rows)

    def _claim_row(self) -> int:
        """
        Take a row for this process, burying a dead one's; with none left, share the last.

        Return 0 if the lock is busy: a read that counts must not wait for a holder that may be frozen.
        """
        cells, me = self.cells, os.getpid()
        try:
            if not self.lock_now():
                return 0
            for row in range(self._rows, self._rows + ROWS * ROW_CELLS, ROW_CELLS):
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

    def check(self) -> None:
        """
        Verify every invariant of the arena, under its lock.

        Raises:
            ArenaDamaged: The message lists what is wrong.
        """
        try:
            self.lock(10.0)
            found = problems(self)
        except (IndexError, struct.error) as error:
            found = [f"a cell is damaged: {error}"]
        finally:
            self.unlock()
        if found:
            raise ArenaDamaged("; ".join(found[:20]))


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
    for arena in list(_arenas):
        arena._row = 0  # the parent's
        arena._uncounted = [0, 0, 0]


os.register_at_fork(after_in_child=_after_fork)
