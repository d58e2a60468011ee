"""Records by key in shared memory: slots, blocks, index, order of use, deadlines. No policy, no sessions.

Writers hold the lock, and change everything through the journal. New records go into blocks that are free. One 8-byte
store of the ``record`` cell of a slot (first block and length) publishes a record to readers.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Concatenate, Final, ParamSpec, Self, TypeVar

from shmstore.engine import core, layout
from shmstore.engine.counters import Counters
from shmstore.engine.frame import Key, TimedRecord, head_of, weight_of
from shmstore.engine.header import (
    CLOSED,
    EARLIEST,
    EARLIEST_COPY,
    FREE_RUN,
    FREE_SLOT,
    HAND,
    HAS_WEIGHTS,
    MAX,
    NEVER,
    NO_TTL,
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
    WEIGHT,
)
from shmstore.engine.journal import Journal
from shmstore.engine.layout import CELL, LOW_HALF, RENAMED, SLOT, TOMBSTONE_WAYS, ArenaDamaged, Geometry
from shmstore.engine.lock import ArenaLock
from shmstore.engine.mapping import MappedFile, PrivateMemory
from shmstore.engine.reader import AHEAD, Reader
from shmstore.engine.table import Table
from shmstore.errors import StoreUnavailable
from shmstore.system.platform import LACKING
from shmstore.system.signals import suppressing

__all__ = ["STAMPS_AHEAD", "Arena"]


_POPULATE_READ, _POPULATE_WRITE = 22, 23  # linux/mman.h: MADV_POPULATE_READ, MADV_POPULATE_WRITE
_BATCH: Final = 32  # slots that eviction looks at for an expired session
STAMPS_AHEAD: Final = 60 * 10**9
"""Nanoseconds by which the stamp of a last use may be ahead of the clock. A later stamp is damaged."""


P = ParamSpec("P")
R = TypeVar("R")


def _sound(method: Callable[Concatenate[Arena, P], R]) -> Callable[Concatenate[Arena, P], R]:
    """Make a mutation raise `ArenaDamaged` if it follows a damaged cell. Nothing has changed then."""

    @wraps(method)
    def call(self: Arena, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except (IndexError, struct.error) as error:
            raise ArenaDamaged(f"a cell is damaged: {error}") from error

    return call


def _released() -> int:
    return 0


class _Planned(dict[int, int]):
    """Cells as they will be: those that a plan changes, else as they are."""

    def __init__(self, cells: memoryview) -> None:
        super().__init__()
        self._cells = cells

    def __missing__(self, cell: int) -> int:
        return int(self._cells[cell])


class Arena:
    """
    Records by key in one file. Methods that change something are called with the lock, as in
    ``try: arena.lock(timeout) ... finally: arena.unlock()``.

    An arena is immutable in what it maps: when the store moves to another file, its methods raise `ArenaReplaced`, and
    their caller opens another arena.

    Attributes:
        file: The mapped file.
        geometry: The size of everything in it.
        table: Where the fields of its slots are.
        reader: Its records, readable without the lock.
        find: Returns the slot of a key, or 0; see `Reader.find`.
        counters: What all processes have read.
        writers: The lock of its writers.
        lock: Takes that lock; see `ArenaLock.acquire`.
        unlock: Releases that lock; does nothing if this thread does not hold it.
        commit: Applies a plan, wholly or not at all; see `Journal.commit`.
    """

    def __init__(self, file: MappedFile, *, fresh: bool = False) -> None:
        journal = Journal(file)
        self.writers = writers = ArenaLock(file, journal)
        self.file, self.geometry, self.journal = file, file.geometry, journal
        self.lock, self.try_lock, self.unlock = writers.acquire, writers.try_acquire, writers.release
        self.commit: Callable[[list[int]], None] = journal.commit
        self.table = Table(file)
        file.core = core.attach(file, self.table)
        self.reader = Reader(file, self.table, writers)
        self.find = self.reader.find
        self.counters = Counters(file, writers, journal)
        geometry = file.geometry
        self._bucket_count, self._owner_buckets = geometry.buckets, geometry.owner_buckets
        self._slots, self._blocks, self._block_size = geometry.slots, geometry.blocks, geometry.block_size
        self._step, self._shortest = geometry.block_size // CELL, geometry.shortest
        if fresh:
            self._format()

    def _format(self) -> None:
        """Fill in what is not zero in an empty arena."""
        cells, table = self.cells, self.table
        cells[table.prev + table.owned_list] = cells[table.next + table.owned_list] = table.owned_list
        cells[FREE_RUN] = 1
        cells[table.run_head(1)] = self._blocks << 32
        cells[EARLIEST] = cells[EARLIEST_COPY] = cells[RECENT_EARLIEST] = NEVER
        cells[TTL] = NO_TTL

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, geometry: Geometry) -> Self:
        """
        Make an empty arena at ``path`` (None: in memory without a name).

        Raises:
            StoreFull: The memory cannot be reserved.
        """
        place = None if path is None else os.path.abspath(path)
        arena, temporary = cls.prepare(place, geometry)
        if place is not None:
            try:
                os.rename(temporary, place)
            except BaseException:
                os.unlink(temporary)
                raise
        return arena

    @classmethod
    def prepare(cls, path: str | None, geometry: Geometry) -> tuple[Self, str]:
        """Make an empty arena for ``path``; return it and the file to rename to that path ("" without one)."""
        if path is None and LACKING:
            return cls(PrivateMemory(geometry), fresh=True), ""
        fd, temporary = layout.create(None if path is None else os.path.dirname(path), geometry)
        try:
            return cls(MappedFile(fd, geometry, path), fresh=True), temporary
        except BaseException:
            if temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """
        Open the arena at ``path``.

        Raises:
            FileNotFoundError: The file does not exist.
            ArenaDamaged: The file is not an arena that can be used.
            StoreUnavailable: Processes of another pid namespace use it.
        """
        return cls(MappedFile.open(path))

    def duplicate(self, timeout: float) -> Self:
        """
        Return a point-in-time copy in memory without a name, for long inspection without blocking writers.

        The lock is held while the bytes are copied, 0.1 to 0.2 s for each GiB.

        Raises:
            StoreFull: There is not as much memory again.
            StoreTimeout: The lock was not free within ``timeout`` seconds.
        """
        state = slice(layout.STATE_CELLS * CELL, None)  # the identity and the mutex before it are the copy's own
        copy, _ = self.prepare(None, self.geometry)
        try:
            # Before Linux 5.14, and elsewhere, it is impossible: each page then costs its fault under the lock.
            with suppressing(OSError, AttributeError):
                self.file.memory.madvise(_POPULATE_READ)
                copy.file.memory.madvise(_POPULATE_WRITE)
            self.lock(timeout)
            memoryview(copy.file.memory)[state] = memoryview(self.file.memory)[state]
        except BaseException:
            copy.close()
            raise
        finally:
            self.unlock()
        return copy

    @property
    def cells(self) -> memoryview:
        """All of the file, as 8-byte cells."""
        return self.file.cells

    @property
    def label(self) -> str:
        """The name of the store in log lines."""
        return self.file.label

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.file.closed

    def close(self) -> None:
        """Close the file; see `MappedFile.close`."""
        if self.file.close():
            self.unlock = self.writers.release = _released  # the mutex in the file would keep it mapped

    def mark_closed(self, timeout: float = 1.0) -> None:
        """Tell all users of the file that the store ends. A stopped holder of the lock is not waited for."""
        try:
            with contextlib.suppress(StoreUnavailable):
                self.lock(timeout)
            self.cells[STATE] = CLOSED
        finally:
            self.unlock()

    def fits(self, length: int, *, new: bool) -> bool:
        """Return whether a record of ``length`` bytes, in a ``new`` slot or not, can be written without evicting."""
        cells = self.file.cells
        used, sessions = cells[USED_BLOCKS], cells[SESSIONS]
        if used > self._blocks or sessions > self._slots:
            raise ArenaDamaged("there is more in it than it can hold")
        # How many runs the free blocks are shows only when they are taken: the worst is assumed.
        return length <= self.geometry.holds(self._blocks - used) and not (new and sessions == self._slots)

    def free_runs(self) -> int:
        """Return how many runs the free blocks form, counted without the lock; more if they change meanwhile."""
        cells, most = self.file.cells, self._blocks // self.geometry.shortest
        block, count = cells[FREE_RUN], 0
        while 0 < block <= self._blocks and count < most:
            block, count = cells[self.table.heads + block * self._step] & LOW_HALF, count + 1
        return count if not block else most

    @_sound
    def audit(self, length: int, *, new: bool) -> None:
        """
        Verify the numbers because of which sessions are about to be evicted for a record of ``length`` bytes.

        Raises:
            ArenaDamaged: One is wrong, so there may be room.
        """
        cells, table = self.file.cells, self.table
        if new and cells[SESSIONS] == self._slots and (cells[FREE_SLOT] or cells[TOP_SLOT] < table.last_slot):
            raise ArenaDamaged("the number of sessions is wrong")
        if not cells[HAS_WEIGHTS]:
            if cells[WEIGHT] != cells[SESSIONS]:
                raise ArenaDamaged("the weight of the sessions is wrong")
        elif cells[MAX] and cells[WEIGHT] > cells[MAX]:  # as after `max` was lowered: rare, so this may take its time
            slots = table.used_slots()
            records = zip(slots, table.column(table.record, slots), strict=True)
            if cells[WEIGHT] != sum(table.weight_at(slot) for slot, record in records if record):
                raise ArenaDamaged("the weight of the sessions is wrong")
        free, block, found = self._blocks - cells[USED_BLOCKS], cells[FREE_RUN], 0
        if length > self.geometry.holds(free):  # so there are few runs to look at
            while block and found <= free:
                link = cells[table.heads + block * self._step]
                found += max(link >> 32, 1)
                block = link & LOW_HALF
            if found != free:
                raise ArenaDamaged("the number of free blocks is wrong")

    @_sound
    def can_hold(self, length: int, slot: int) -> bool:
        """Return whether a record of ``length`` bytes fits beside what is in ``slot``, if all others go."""
        table = self.table
        beside = self._last_run(self.file.cells[table.record + slot])[1] if slot else 0
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
        Store a record under its key as the most recently used one, and return its slot.

        Args:
            slot: The slot to change; 0 takes a new one. If it had another key, it is renamed.
            key: The key of the record.
            record: What `seal` returned.
            owner: Digest of the owner, 0 for none.
            expires: Deadline.
            now: The time.
            count: The cell that counts this.
            tombstone: Whether a renamed one leaves a tombstone under its old key.
            used: When it was used last, its stamp of use; None: now. Eviction takes it after all others in any case.
        """
        table = self.table
        cells, size, shortest = self.file.cells, self._block_size, self._shortest
        plan: list[int] = []
        old = 0
        if slot:
            old = cells[table.record + slot]
            if not old:
                raise ArenaDamaged("a slot in the index has no record")
            renamed = table.key_at(slot) != key
        else:
            renamed = True
            slot = cells[FREE_SLOT]
            plan += (FREE_SLOT, cells[table.next + slot]) if slot else (TOP_SLOT, cells[TOP_SLOT] + SLOT)
            slot = slot or cells[TOP_SLOT] + SLOT
            if slot % SLOT or slot > table.last_slot or cells[table.record + slot]:
                raise ArenaDamaged("the list of free slots is damaged")
        version = cells[table.version + slot] | 1  # odd while it changes, whatever damage has made of it

        # Into free blocks, which no reader sees before the plan is applied.
        first = block = cells[FREE_RUN]
        at = taken = 0
        weight = weight_of(record)
        while True:
            head = table.heads + block * self._step
            link = cells[head]
            run, following = link >> 32, link & LOW_HALF
            if run < shortest or block + run > self._blocks + 1:
                raise ArenaDamaged("the list of free blocks is damaged")
            start, holds = head * CELL + CELL, run * size - CELL
            part = record[at : at + holds]
            self.file.memory[start : start + len(part)] = part
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
                self._add_tombstone(plan, table.key_at(slot), now, RENAMED)
            structure = cells[STRUCTURE] | 1
            plan += (STRUCTURE, structure)
        plan += (table.version + slot, version)
        if renamed:
            # No cell that readers look at is in a plan twice: a plan that is applied again, after its process died,
            # must not lead them through anything that it did not leave in the end.
            bucket = table.buckets + key[0] % self._bucket_count
            before, after = self._unchain(slot) if old else (0, 0)
            plan += (table.key_low + slot, key[0], table.key_high + slot, key[1])
            if before != bucket:
                if old:
                    plan += (before, after)
                plan += (table.chain + slot, cells[bucket], bucket, slot)
        plan += (table.record + slot, len(record) << 32 | first, table.expires + slot, expires)
        was_owned = cells[table.owner + slot] if old else 0
        if owner != was_owned:
            self._list_under(plan, slot, was_owned, owner)
        elif cells[table.owner + slot] != owner:
            plan += (table.owner + slot, owner)  # damage has left something in a slot that is free
        plan += (table.version + slot, version + 1)
        if renamed:
            plan += (STRUCTURE, structure + 1)

        if old:
            # A chain of runs is also a list of runs: it becomes the front of the free list in one store.
            last, freed = self._last_run(old)
            plan += (last, cells[last] & ~LOW_HALF | rest, FREE_RUN, old & LOW_HALF)
            taken -= freed
            weight -= table.weight_at(slot) if cells[HAS_WEIGHTS] else 1
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

    def fill(self, records: Iterable[TimedRecord]) -> None:
        """
        Put records into this arena, which no other process has mapped yet: neither lock nor journal is used.

        Args:
            records: The least recently used first, all with different keys. There is room for all of them.
        """
        journaled, self.commit = self.commit, self.journal.apply  # if this process dies now, the file is never used
        try:
            for record, deadline, used in records:
                _, weight, low, high, owner, _ = head_of(record)
                if weight != 1:
                    self.cells[HAS_WEIGHTS] = 1
                # `NEVER` as the time: nothing else is known about these stamps of use.
                self.publish(0, (low, high), record, owner, deadline, NEVER, used=used)
        finally:
            self.commit = journaled
        self.cells[SETS] = 0  # no caller has set them

    @_sound
    def retime(self, slot: int, expires: int, now: int) -> None:
        """Give ``slot`` another deadline and make it the most recently used."""
        cells, table = self.file.cells, self.table
        plan = [table.expires + slot, expires, TOUCHES, cells[TOUCHES] + 1]
        owned = bool(cells[table.owner + slot])
        self._use(plan, slot, owned, owned, now)
        self._deadline(plan, expires)
        self.commit(plan)

    @_sound
    def use(self, slot: int, version: int, now: int) -> None:
        """Make ``slot`` the most recently used, unless it has changed since it was read."""
        cells, table = self.file.cells, self.table
        if cells[table.version + slot] == version:
            plan: list[int] = []
            owned = bool(cells[table.owner + slot])
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
        cells, table = self.file.cells, self.table
        version, structure = cells[table.version + slot] | 1, cells[STRUCTURE] | 1
        record = cells[table.record + slot]
        before, after = self._unchain(slot)
        last, freed = self._last_run(record)
        if cells[FREE_RUN] > self._blocks or cells[FREE_SLOT] > table.last_slot:
            raise ArenaDamaged("a list of what is free is damaged")
        above, below = self._neighbours(slot)
        plan: list[int] = []
        if tombstone is not None:
            self._add_tombstone(plan, table.key_at(slot), tombstone, 0)
        plan += (
            STRUCTURE, structure,
            table.version + slot, version,
            table.record + slot, 0,
            table.expires + slot, NEVER,
            table.version + slot, version + 1,
            before, after,
            STRUCTURE, structure + 1,
            table.next + above, below,
            table.prev + below, above,
            table.next + slot, cells[FREE_SLOT],
            FREE_SLOT, slot,
            last, cells[last] & ~LOW_HALF | cells[FREE_RUN],
            FREE_RUN, record & LOW_HALF,
            USED_BLOCKS, cells[USED_BLOCKS] - freed,
            SESSIONS, cells[SESSIONS] - 1,
            WEIGHT, cells[WEIGHT] - (table.weight_at(slot) if cells[HAS_WEIGHTS] else 1),
            count, cells[count] + 1,
        )  # fmt: skip
        if owner := cells[table.owner + slot]:
            self._list_under(plan, slot, owner, 0)
        self.commit(plan)

    @_sound
    def least_used(self, *, owned: bool, keep: int) -> int:
        """Return the least recently used slot with or without an owner, other than ``keep``, or 0."""
        cells, table = self.file.cells, self.table
        anchor = table.owned_list if owned else 0
        slot = cells[table.prev + anchor]
        if slot == keep and slot != anchor:
            slot = cells[table.prev + slot]
        if slot == anchor:
            return 0
        if slot not in table.used_slots() or not cells[table.record + slot]:
            raise ArenaDamaged("the order of use is damaged")
        return slot

    @_sound
    def expired_nearby(self, now: int, keep: int) -> int:
        """Return an expired slot other than ``keep`` that the moving hand finds in one batch; 0 if it finds none."""
        cells, table = self.file.cells, self.table
        earliest = cells[EARLIEST]
        # With the same said twice, a bit that has flipped in one of the three costs time at most.
        if now < earliest <= cells[RECENT_EARLIEST] and now < cells[EARLIEST_COPY]:
            return 0
        used = table.used_slots()
        hand = cells[HAND] if cells[HAND] in used else SLOT
        ahead = range(hand, min(hand + _BATCH * SLOT, used.stop), SLOT)
        around = range(SLOT, min(hand, SLOT + (_BATCH - len(ahead)) * SLOT), SLOT)
        for batch in (ahead, around):
            for slot, expires in zip(batch, table.column(table.expires, batch), strict=True):
                if expires <= now and slot != keep and cells[table.record + slot]:
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
        cells, table = self.file.cells, self.table
        _, first = self._first_of(owner, cells)
        if not first:
            return 0, []
        count, slot = cells[table.owner_head + first] >> 32, first
        if count > self._slots:
            raise ArenaDamaged("the number of an owner's sessions is damaged")
        found: list[int] = []
        for left in range(count - 1, max(count - most, 0) - 1, -1):
            slot = cells[table.owner_links + slot] >> 32
            if cells[table.owner + slot] != owner or not cells[table.record + slot] or (slot == first) != (not left):
                raise ArenaDamaged("the list of an owner's sessions is damaged")
            found.append(slot)
        return count, found

    def begin_sweep(self) -> int:
        """Before a prune scans: from here on deadlines are collected apart, for `end_sweep`. Return its number."""
        number = (self.file.cells[SWEEP] + 1) % 2**64
        self.commit([RECENT_EARLIEST, NEVER, SWEEP, number])
        return number

    def end_sweep(self, number: int, earliest: int) -> None:
        """After a prune: ``earliest`` is the earliest deadline that it left, of those that it saw."""
        if self.file.cells[SWEEP] == number:  # else another has begun since, and collects apart only from then on
            earliest = min(earliest, self.file.cells[RECENT_EARLIEST])
            self.commit([EARLIEST, earliest, EARLIEST_COPY, earliest])

    def _unchain(self, slot: int) -> tuple[int, int]:
        """Return the cell that points to ``slot`` in the index, and the value that unlinks the slot."""
        cells, table = self.file.cells, self.table
        cell = table.buckets + cells[table.key_low + slot] % self._bucket_count
        for _ in range(self._slots):
            if cells[cell] == slot:
                return cell, cells[table.chain + slot]
            cell = table.chain + cells[cell]
        raise ArenaDamaged("a slot is missing in the index")

    def _list_under(self, plan: list[int], slot: int, old: int, new: int) -> None:
        """
        Plan to move a slot from the list of owner ``old`` to the front of that of ``new``; 0 stands for no owner.

        An owner's slots are a ring, the newest first. Use does not change its order: a caller that needs the
        order of use sorts by stamps. The first slot is in the chain of the owner's bucket. Used only under the lock.
        """
        table = self.table
        cells, links, heads = self.file.cells, table.owner_links, table.owner_head
        seen: memoryview | _Planned = cells
        if old:
            leading, first = self._first_of(old, cells)
            seen = planned = _Planned(cells)
            self._leave_owner(planned, slot, leading, first)
            for cell, value in planned.items():
                plan += (cell, value)
        if new:
            leading = table.owners + new % self._owner_buckets
            first = seen[leading]
            if first and cells[table.owner + first] != new:
                leading, first = self._first_of(new, seen)
            if first:
                last = seen[links + first] >> 32
                if seen[links + last] & LOW_HALF != first:
                    raise ArenaDamaged("the list of an owner's sessions is damaged")
                after = slot if last == first else seen[links + first] & LOW_HALF
                plan += (
                    links + slot, last << 32 | first,
                    links + last, seen[links + last] & ~LOW_HALF | slot,
                    links + first, slot << 32 | after,
                    heads + slot, seen[heads + first] + (1 << 32),
                    leading, seen[leading] & ~LOW_HALF | slot,
                )  # fmt: skip
            else:
                plan += (links + slot, slot << 32 | slot, heads + slot, 1 << 32 | seen[leading], leading, slot)
        plan += (table.owner + slot, new)

    def _first_of(self, owner: int, seen: memoryview | _Planned) -> tuple[int, int]:
        """Return the cell that leads to the first slot of an owner, and that slot; else the bucket and 0."""
        cells, table = self.file.cells, self.table
        bucket = cell = table.owners + owner % self._owner_buckets
        for _ in range(self._slots + 1):
            slot = seen[cell]
            if cell != bucket:
                slot &= LOW_HALF
            if not slot:
                return bucket, 0
            if slot % SLOT or slot > table.last_slot:
                raise ArenaDamaged("the index of owners leads out of the arena")
            if cells[table.owner + slot] == owner:
                return cell, slot
            cell = table.owner_head + slot
        raise ArenaDamaged("the index of owners is a ring")

    def _leave_owner(self, planned: _Planned, slot: int, leading: int, first: int) -> None:
        """Plan to take ``slot`` out of the ring that begins with ``first``, to which the cell ``leading`` leads."""
        table = self.table
        cells, links = self.file.cells, table.owner_links
        before, after = cells[links + slot] >> 32, cells[links + slot] & LOW_HALF
        head = cells[table.owner_head + first]
        alone = after == slot
        if (
            not first
            or cells[links + before] & LOW_HALF != slot
            or cells[links + after] >> 32 != slot
            or alone != (head >> 32 == 1)
        ):
            raise ArenaDamaged("the list of an owner's sessions is damaged")
        if alone:
            planned[leading] = cells[leading] & ~LOW_HALF | head & LOW_HALF
            return
        planned[links + before] = cells[links + before] & ~LOW_HALF | after
        planned[links + after] = before << 32 | planned[links + after] & LOW_HALF
        if slot == first:
            first = after
            planned[leading] = cells[leading] & ~LOW_HALF | after
        planned[table.owner_head + first] = head - (1 << 32)

    def _add_tombstone(self, plan: list[int], key: Key, now: int, renamed: int) -> None:
        """Plan a tombstone: in place of the one that the key has, of a damaged one, else of the oldest of its set."""
        first, keys, times = self.reader.tombstones_of(key)
        time = max(now, 2) & ~RENAMED | renamed
        if key[1] in keys:
            way = keys.index(key[1])
        else:
            latest = max(times)
            way = times.index(latest if latest > time + AHEAD else min(times))  # ahead of the clock: damaged
        plan += (first + way, key[1], first + TOMBSTONE_WAYS + way, time)

    def _last_run(self, record: int) -> tuple[int, int]:
        """Return the head of a record's last run, and how many blocks the record has."""
        table = self.table
        cells, size, shortest = self.file.cells, self._block_size, self._shortest
        block, left, blocks = record & LOW_HALF, record >> 32, 0
        while True:
            head = table.heads + block * self._step
            run = cells[head] >> 32
            left -= run * size - CELL
            # The last run is as long as it has to be, or a little longer if what was left of it had been too short.
            if not block or run < shortest or block + run > self._blocks + 1 or left <= -2 * shortest * size:
                raise ArenaDamaged("a chain of blocks is damaged")
            blocks += run
            if blocks > self._blocks:
                raise ArenaDamaged("a chain of blocks is a ring")
            if left <= 0:
                return head, blocks
            block = cells[head] & LOW_HALF

    def _use(
        self, plan: list[int], slot: int, was_owned: bool | None, owned: bool, now: int, used: int | None = None
    ) -> None:
        """Plan to make ``slot`` the first of its list; ``was_owned`` tells the list it is in, None if in none yet."""
        cells, table = self.file.cells, self.table
        prev, next_ = table.prev, table.next
        tick = max(now if used is None else used, cells[TICK] + 1)
        if tick > now + STAMPS_AHEAD:
            raise ArenaDamaged("the last stamp of use is in the future")
        # Only the order of uses before the boot is known: their stamps count up.
        stamp = tick if used is None else max(used, cells[SESSIONS] + 1)
        plan += (table.used + slot, stamp, TICK, tick)
        anchor = table.owned_list if owned else 0
        first = cells[next_ + anchor]
        if first == slot:
            return
        if cells[prev + first] != anchor:
            raise ArenaDamaged("the order of use is damaged")
        if was_owned is not None:
            above, below = self._neighbours(slot)
            plan += (next_ + above, below, prev + below, above)
        plan += (
            next_ + slot, first, prev + slot, anchor,
            prev + first, slot, next_ + anchor, slot,
        )  # fmt: skip

    def _neighbours(self, slot: int) -> tuple[int, int]:
        """Return the slots before and after this one in the order of use."""
        cells, table = self.file.cells, self.table
        above, below = cells[table.prev + slot], cells[table.next + slot]
        if cells[table.next + above] != slot or cells[table.prev + below] != slot:  # else others' cells were changed
            raise ArenaDamaged("the order of use is damaged")
        return above, below

    def _deadline(self, plan: list[int], expires: int) -> None:
        cells = self.file.cells
        if expires < cells[RECENT_EARLIEST]:
            plan += (RECENT_EARLIEST, expires)
            if expires < cells[EARLIEST]:
                plan += (EARLIEST, expires)
            if expires < cells[EARLIEST_COPY]:
                plan += (EARLIEST_COPY, expires)
