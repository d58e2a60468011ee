"""
The operations on many sessions: in batches, between which other processes have the lock.

The sessions are listed without the lock, so a batch looks again at each of its sessions before it removes them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from shmstore.codec.body import Record, unpack
from shmstore.codec.ids import Key, key_of_id, owner_digest, stored_owner
from shmstore.engine.arena import Arena
from shmstore.engine.frame import body_of
from shmstore.engine.header import CLEARED, CORRUPT, DESTROYED, DISPOSES, EXPIRED, NEVER
from shmstore.engine.mapping import ArenaReplaced
from shmstore.engine.reader import Entry
from shmstore.errors import SerializationError, ShmStoreError, StoreTimeout
from shmstore.store.eviction import live_per_owner, owner_room
from shmstore.store.holder import ArenaHolder
from shmstore.store.retry import retrying

__all__ = [
    "clear", "destroy_owned", "ids", "owned_by", "prune", "record_of", "records", "sessions", "shrink", "sound_arena",
]  # fmt: skip

log = logging.getLogger("shmstore")

_BATCH: Final = 8  # sessions that are removed in one hold of the lock
_FEW: Final = 256  # sessions of one owner that are listed in one hold of the lock
_TIMEOUTS: Final = 5  # in a row, after which a removal of many sessions is given up
_LONGEST_PAUSE: Final = 0.002  # seconds between two batches

T = TypeVar("T")

# A session as it was found: slot, version, key, when it was created; the last two None if its record cannot be read.
Found = tuple[int, int, Key | None, int | None]


@retrying()
def sound_arena(store: ArenaHolder) -> Arena:
    arena = store.arena
    arena.table.used_slots()
    return arena


@retrying()
def ids(store: ArenaHolder) -> list[str]:
    return [record.sid for _, record in records(store)]


@retrying()
def sessions(store: ArenaHolder) -> dict[str, dict[Any, Any]]:
    now, codec, found = store._clock(), store.codec, {}
    for entry, record in records(store):
        if entry[2] > now and record.codec_name == codec.name:
            try:
                found[record.sid] = codec.readable(record.payload)
            except SerializationError:
                store.arena.counters.add(CORRUPT)
    return found


def records(store: ArenaHolder) -> Iterator[tuple[Entry, Record]]:
    """Yield all sessions, the most recently used first, also the expired ones."""
    arena = store.arena
    for slot in arena.table.live_slots():
        entry = arena.reader.at(slot, store._timeout)
        if entry is not None and (record := record_of(arena, entry)) is not None:
            yield entry, record


def record_of(arena: Arena, entry: Entry) -> Record | None:
    """Return the parts of a record; None if it is damaged, which is counted."""
    try:
        record = unpack(body_of(entry[4]))
        if key_of_id(record.sid) == entry[3][2:4]:  # else the id in it is another session's
            return record
    except SerializationError:
        pass
    arena.counters.add(CORRUPT)
    return None


# -- clear -----------------------------------------------------------------------------------------------------------


def clear(store: ArenaHolder) -> None:
    arena, there = _all_found(store)
    for batch in _batches(store, there):
        _clear_batch(store, arena, batch)


@retrying()
def _all_found(store: ArenaHolder) -> tuple[Arena, list[Found]]:
    arena, there = store.arena, list[Found]()
    for slot in arena.table.live_slots():
        version = arena.file.cells[arena.table.version + slot]
        entry = arena.reader.at(slot, store._timeout)
        key, created = (None, None) if entry is None else (entry[3][2:4], entry[3][5])
        there.append((slot, version, key, created))
    return arena, there


@retrying(lambda *_: ("clear", {}))
def _clear_batch(store: ArenaHolder, found_in: Arena, batch: list[Found]) -> None:
    store._upkeep.before_write(store)

    def clear_locked(arena: Arena, now: int) -> None:
        for slot in _still_there(arena, found_in, batch):
            store._disposal.drop(arena, slot, CLEARED)

    store._locked(store.arena, clear_locked)


def _still_there(arena: Arena, found_in: Arena, batch: list[Found], *, overwritten: bool = False) -> Iterator[int]:
    """
    Yield the slots of sessions that were found and are still stored. Called with the lock.

    A session is identified by when it was created: it may have been changed or renamed since. With ``overwritten``
    the session that has its id now counts as well.
    """
    moved = found_in is not arena  # in another file slots and versions are others
    version_at, record_at = arena.table.version, arena.table.record
    for found, version, key, created in batch:
        slot = (arena.find(key) if key else 0) if moved else found
        if not moved and arena.file.cells[version_at + slot] == version:
            if arena.file.cells[record_at + slot]:
                yield slot
            continue
        entry = arena.reader.try_at(slot)
        if entry is not None and (entry[3][5] == created or (overwritten and entry[3][2:4] == key)):
            yield slot


# -- owners ----------------------------------------------------------------------------------------------------------


def owned_by(store: ArenaHolder, owner: str) -> list[str]:
    now = store._clock()
    _, owned = _owned(store, owner)
    return [record.sid for entry, record in owned if entry[2] > now]


def destroy_owned(store: ArenaHolder, owner: str, keep: Iterable[str] = ()) -> int:
    store._upkeep.before_write(store)
    kept = frozenset([keep] if isinstance(keep, str) else keep)
    arena, owned = _owned(store, owner)
    there: list[Found] = [
        (slot, version, head[2:4], head[5]) for (slot, version, _, head, _), record in owned if record.sid not in kept
    ]
    removed: list[bool] = []  # for each session whether it was live
    count = timeouts = 0
    for number, batch in enumerate(_batches(store, there)):
        while True:
            try:
                count += _destroy_batch(store, owner, kept, arena, batch, removed)
                break
            except StoreTimeout:
                timeouts += 1
                if not number or timeouts >= _TIMEOUTS:  # otherwise it would end half done
                    raise
        timeouts = 0
    return count + sum(removed)


@retrying(lambda owner, kept, *_: ("destroy_owned", {"owner": owner, "keep": kept}))
def _destroy_batch(
    store: ArenaHolder, owner: str, kept: frozenset[str], found_in: Arena, batch: list[Found], removed: list[bool]
) -> int:
    """
    Remove sessions of an owner, also those that were renamed meanwhile.

    Append to ``removed`` whether each was live, also if the attempt ends early. Return how many a server has
    removed instead of this process.
    """
    store._upkeep.before_write(store)
    digest = owner_digest(owner)

    def destroy_locked(arena: Arena, now: int) -> int:
        cells, table = arena.file.cells, arena.table
        for slot in _still_there(arena, found_in, batch, overwritten=True):
            if cells[table.owner + slot] == digest:
                live = cells[table.expires + slot] > now
                store._disposal.drop(arena, slot, DESTROYED if live else EXPIRED)
                removed.append(live)
        return 0

    return store._locked(store.arena, destroy_locked)


@retrying()
def _owned(store: ArenaHolder, owner: str) -> tuple[Arena, list[tuple[Entry, Record]]]:
    """Return an owner's sessions, last used first, and the arena that they are in."""
    owner = stored_owner(owner)
    arena, digest = store.arena, owner_digest(owner)

    def few_locked(arena: Arena, now: int) -> list[int] | None:
        count, few = arena.owned_slots(digest, _FEW)
        return None if count > _FEW else arena.table.by_use(few)[::-1]

    slots = store._locked(arena, few_locked)
    if slots is None:
        slots = arena.table.slots_of_owner(digest)
    entries = [entry for slot in slots if (entry := arena.reader.at(slot, store._timeout)) is not None]
    found = [(entry, record_of(arena, entry)) for entry in entries]
    # Two owners may share a digest of eight bytes.
    return arena, [(entry, record) for entry, record in found if record and record.owner == owner]


# -- expired and excess sessions -------------------------------------------------------------------------------------


def prune(store: ArenaHolder) -> int:
    store.check_options()
    arena, number = _begin_sweep(store)
    table, now = arena.table, store._clock()
    pruned = 0
    for batch in _batches(store, table.expired_slots(now)):
        pruned += _expire_batch(store, batch, now)
    earliest = min(table.column(table.expires, table.used_slots()), default=NEVER)
    with contextlib.suppress(ArenaReplaced):
        store._locked(arena, lambda arena, _: arena.end_sweep(number, earliest))
    return pruned


@retrying()
def _begin_sweep(store: ArenaHolder) -> tuple[Arena, int]:
    arena = sound_arena(store)
    return arena, store._locked(arena, lambda arena, _: arena.begin_sweep())


@retrying()
def _expire_batch(store: ArenaHolder, batch: list[int], before: int) -> int:
    store._upkeep.before_write(store)

    def expire_locked(arena: Arena, now: int) -> int:
        pruned, cells, table = 0, arena.file.cells, arena.table
        for slot in batch:
            # The slots may have been found in another file: whatever has expired may be removed.
            if cells[table.record + slot] and cells[table.expires + slot] <= before:
                store._disposal.drop(arena, slot, EXPIRED)
                pruned += 1
        return pruned

    return store._locked(store.arena, expire_locked)


def shrink(store: ArenaHolder) -> None:
    """
    Remove what exceeds `max` and `max_per_owner` after these were lowered.

    What remains is removed by the next writes, a part of it by each.
    """
    arena = store._arena  # not `arena`: the store may have been closed before this thread has started
    try:
        _audit(store)
        _repeat(partial(_trim, store))
        for owner, live in live_per_owner(arena, store._clock()).items():
            if owner_room(arena, live) < 0:
                _repeat(partial(_trim_owner, store, owner))
    except ShmStoreError as exc:
        if not store._arena.closed:
            log.warning("%s: what is beyond max or max_per_owner stays for now: %s", store.label, exc)


@retrying()
def _audit(store: ArenaHolder) -> None:
    """Verify what `max` is compared with. Once, because the weights of all sessions may have to be added up."""
    store._locked(store.arena, lambda arena, _: arena.audit(0, new=False))


@retrying()
def _trim(store: ArenaHolder) -> bool:
    """Evict some of what exceeds `max`; return whether there is more."""
    return store._locked(store.arena, store._eviction.trim, _batch_size(store))


@retrying()
def _trim_owner(store: ArenaHolder, owner: int) -> bool:
    """Remove some of what an owner has beyond `max_per_owner`; return whether there is more."""
    return store._locked(store.arena, store._eviction.displace, owner, 0)


# -- batches ---------------------------------------------------------------------------------------------------------


def _batch_size(store: ArenaHolder) -> int:
    return 1 if store.arena.file.cells[DISPOSES] else _BATCH


def _batches(store: ArenaHolder, items: list[T]) -> Iterator[list[T]]:
    size = _batch_size(store)
    for at in range(0, len(items), size):
        begun = time.monotonic()
        yield items[at : at + size]
        if 1 < size < len(items) - at:  # between single removals there is a dispose
            _yield_lock(begun)


def _repeat(step: Callable[[], bool]) -> None:
    """Call a function that holds the lock, until it returns False; let other processes have the lock in between."""
    begun = time.monotonic()
    while step():
        _yield_lock(begun)
        begun = time.monotonic()


def _yield_lock(since: float) -> None:
    """
    Leave the lock free for twice as long as it was held, ``since`` that time: two such callers leave it a third of it.

    Retaking the lock at once would starve the waiters, which look for it only now and then.
    """
    time.sleep(min(2 * (time.monotonic() - since), _LONGEST_PAUSE))
