"""A store in shared memory as an end of a copy, and an arena that no other process has mapped yet."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Final

from shmstore.codec.body import unpack
from shmstore.contract import ArenaStore
from shmstore.engine.arena import Arena
from shmstore.engine.frame import Key, TimedRecord, body_of, head_of, seal
from shmstore.engine.header import HAS_WEIGHTS, NEVER
from shmstore.engine.layout import TOMBSTONE_TTL
from shmstore.engine.mapping import ArenaReplaced
from shmstore.errors import SerializationError, StoreUnavailable
from shmstore.options import seconds
from shmstore.store.eviction import has_room, live_of_owner, live_per_owner, owner_room, retained
from shmstore.system.clock import boottime_ns
from shmstore.system.files import identity_of
from shmstore.transfer.copy import COPIED, CROWDED, DAMAGED, FULL, SKIPPED, Progress, Survey, is_stored

__all__ = ["LARGE", "MemoryEndpoint", "UnmappedArena"]

LARGE: Final = "too large"

_LOCKED: Final = 32  # records that are written in one hold of the lock
_PAUSE: Final = 0.0005  # seconds between two of them: other processes get the lock and the processor
_REPLACED: Final = 10.0  # seconds after which an arena that is replaced again and again is an error


class MemoryEndpoint:
    """
    The sessions of a store in shared memory: a `shmstore.transfer.copy.Source` and a `Sink`.

    They are read without the lock: each session is whole, and as it was at some moment meanwhile. Those that are stored
    keep the time of their last use; eviction takes them after all others.

    Args:
        store: The store.
        label: Its name in messages.
    """

    shared = True

    def __init__(self, store: ArenaStore, label: str = "the store") -> None:
        self.label, self.damaged = label, list[Key]()
        self._store, self._options = store, store.options
        self._timeout, self._limit = seconds(store.options.lock_timeout), store.options.session_limit
        clock = store.options.clock
        self._shift = 0 if clock is boottime_ns else clock() - boottime_ns()
        self.places = identity_of(store.arena.file.path) or frozenset({id(store.arena)})

    def _now(self) -> int:
        return boottime_ns() + self._shift

    # -- as a source -----------------------------------------------------------------------------------------------

    def survey(self, progress: Progress) -> Survey:
        self._seen = arena = self._store.sound_arena()  # if the store is moved meanwhile, this one stays as it was then
        now, cells, table = self._now(), arena.cells, arena.table
        self._slots = slots = [slot for slot in reversed(table.live_slots()) if cells[table.expires + slot] > now]
        lows, highs, records, owners = (
            array("Q", [cells[field + slot] for slot in slots])
            for field in (table.key_low, table.key_high, table.record, table.owner)
        )
        weights = array("Q", [1]) * len(slots)
        if cells[HAS_WEIGHTS]:
            entries = map(arena.reader.try_at, slots)  # one that is being changed counts as 0
            weights = array("Q", [0 if entry is None else entry[3][1] for entry in entries])
        return Survey(lows, highs, array("Q", [record >> 32 for record in records]), weights, owners)

    def read(self, numbers: Sequence[int]) -> list[TimedRecord]:
        return [record for number in numbers if (record := self._read(self._slots[number])) is not None]

    def _read(self, slot: int) -> TimedRecord | None:
        arena, entry = self._seen, None
        used = arena.cells[arena.table.used + slot]  # before the record: an old record never gets a later stamp
        with suppress(ArenaReplaced):  # nothing changes in the arena any more: what cannot be read is damaged
            entry = arena.reader.try_at(slot) or arena.reader.at(slot, self._timeout)
        if entry is None:
            if arena.cells[arena.table.record + slot]:
                self.damaged.append(arena.table.key_at(slot))
            return None
        _, _, deadline, _, sealed = entry
        now = self._now()
        return _shifted((sealed, deadline, min(used, now)), -self._shift) if deadline > now else None

    # -- as a sink -------------------------------------------------------------------------------------------------

    def choose(self, survey: Survey) -> dict[int, str]:
        # `length` is called when a session is stored: until then it is not known how much of `max` that takes.
        weight = 1 if self._options.length is None else 0
        arena = self._store.sound_arena()
        return _refused(arena, survey, self._now(), lambda _: weight, arena.free_runs())

    def put(self, records: Sequence[TimedRecord]) -> list[str]:
        outcomes: list[str] = []
        for at in range(0, len(records), _LOCKED):
            outcomes += self._put_all([self._prepared(record) for record in records[at : at + _LOCKED]])
            time.sleep(_PAUSE)
        return outcomes

    def _prepared(self, record: TimedRecord) -> TimedRecord | str:
        """Return a record by the clock of this store, with the weight that it has here, or why it is refused."""
        sealed, deadline, used = record
        options, (_, weight, low, high, owner, created) = self._options, head_of(sealed)
        try:
            content = unpack(body_of(sealed))
        except SerializationError:
            return DAMAGED
        if content.codec_name != self._store.codec.name:
            return f"written by the serializer {content.codec_name!r}, not by {self._store.codec.name!r}"
        if len(content.payload) > self._limit:
            return LARGE
        ours = 1 if options.length is None else options.length(len(content.payload), content.sid)
        if ours != weight:
            sealed = seal((low, high), owner, created, body_of(sealed), ours)
        return _shifted((sealed, deadline, used), self._shift)

    def _put_all(self, records: list[TimedRecord | str]) -> list[str]:
        deadline = time.monotonic() + _REPLACED
        while True:
            arena = self._store.arena
            try:
                arena.lock(self._timeout)
                now = self._now()
                return [each if isinstance(each, str) else self._put(arena, each, now) for each in records]
            except ArenaReplaced as error:  # before the first of them
                if time.monotonic() > deadline:
                    raise StoreUnavailable(
                        f"the memory of {self.label} is replaced again and again: see the log of its server, and "
                        f"repeat the copy"
                    ) from error
            finally:
                arena.unlock()

    def _put(self, arena: Arena, record: TimedRecord, now: int) -> str:
        cells, table, (sealed, deadline, used) = arena.file.cells, arena.table, record
        _, weight, low, high, owner, _ = head_of(sealed)
        key = low, high
        slot = arena.find(key)
        entry = arena.reader.try_at(slot) if slot else None
        there = (entry[4], entry[2], cells[table.used + slot]) if entry is not None and entry[2] > now else None
        if not is_stored(record, there, lambda: arena.reader.tombstone(key, now, TOMBSTONE_TTL)):
            return SKIPPED
        joins = owner and not (slot and cells[table.owner + slot] == owner)
        if joins and owner_room(arena, live_of_owner(arena, owner, now)[0]) <= 0:
            return CROWDED
        if not has_room(arena, len(sealed), weight, slot):
            return FULL
        if weight != 1:
            cells[HAS_WEIGHTS] = 1
        arena.publish(slot, key, sealed, owner, deadline, now, used=min(used, now))
        return COPIED

    def missing(self, keys: AbstractSet[Key]) -> set[Key]:
        arena, now = self._store.sound_arena(), self._now()
        return {key for key in keys - arena.table.keys() if not arena.reader.tombstone(key, now, TOMBSTONE_TTL)}


class UnmappedArena:
    """An empty arena that no other process has mapped yet: a sink that needs neither its lock nor its journal."""

    label, places, shared = "the arena", frozenset[object](), False

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def choose(self, survey: Survey) -> dict[int, str]:
        return _refused(self._arena, survey, boottime_ns(), survey.weights.__getitem__)

    def put(self, records: Sequence[TimedRecord]) -> list[str]:
        self._arena.fill(records)
        return [COPIED] * len(records)

    def missing(self, keys: AbstractSet[Key]) -> set[Key]:
        return set()


def _refused(
    arena: Arena, survey: Survey, now: int, weight_of: Callable[[int], int], free_runs: int = 1
) -> dict[int, str]:
    """Return the sessions that an arena has no room for, each with the reason. Those that it has need no room."""
    there, live = arena.table.keys(), live_per_owner(arena, now)
    refused, new = dict[int, str](), list[int]()
    for number in reversed(range(len(survey.sizes))):
        if there and survey.key(number) in there:
            continue
        if owner := survey.owners[number]:
            if owner_room(arena, live[owner]) <= 0:
                refused[number] = CROWDED
                continue
            live[owner] += 1
        new.append(number)
    owner_of, length_of = survey.owners.__getitem__, survey.sizes.__getitem__
    kept = set(retained(arena, new, owner_of, length_of, weight_of=weight_of, free_runs=free_runs))
    return refused | {number: FULL for number in new if number not in kept}


def _shifted(record: TimedRecord, by: int) -> TimedRecord:
    """Return a record by another clock."""
    if not by:
        return record
    sealed, deadline, used = record
    _, weight, low, high, owner, created = head_of(sealed)
    sealed = seal((low, high), owner, created + by, body_of(sealed), weight)
    return sealed, deadline if deadline >= NEVER else deadline + by, max(1, used + by)
