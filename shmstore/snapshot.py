"""
A store's sessions in a file that survives a reboot: a picture without an instant.

Each session in it is whole, and as it was at some moment while the picture was taken. Nobody waits for it: it is read
without the lock, a few at a time.
"""

from __future__ import annotations

import logging
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Final

from shmstore.contract import ArenaStore
from shmstore.engine.arena import Arena
from shmstore.engine.frame import OVERHEAD, Key, head_of
from shmstore.engine.header import HAS_WEIGHTS, MAX, MAX_PER_OWNER, WEIGHT
from shmstore.engine.layout import TOMBSTONE_TTL
from shmstore.engine.reader import Entry
from shmstore.engine.rebuild import fill, fitting
from shmstore.errors import SnapshotError
from shmstore.system.clock import Clock, boottime_ns
from shmstore.transfer.snapshot_file import Contents, Progress, Saved, in_the_way, replacing

__all__ = ["Contents", "describe", "load", "restore", "save", "set_aside"]

log = logging.getLogger("shmstore")


Held = ArenaStore

# So many at a time, and then a pause: who writes sessions gets the processor, whoever else wants it.
_BATCH: Final = 32
_PAUSE: Final = 0.0005  # seconds
_LOCKED: Final = 16  # records per hold of the lock


def _unseen(done: int, total: int) -> None:
    """Take note of no progress."""


def save(store: Held | Arena, path: str | os.PathLike[str], progress: Progress = _unseen) -> int:
    """
    Write all sessions of a store to a file, which appears whole or not at all, and return how many.

    Args:
        store: A store of this process, a proxy, or the arena of a store that is stopped.
        path: Where. What is there is replaced if it is a snapshot of a store of this name. It can be read by this user
            only.
        progress: Called now and then with how many are written, and of how many.

    Raises:
        SnapshotError: It cannot be written, or something else is there, another store's snapshot say; or more sessions
            cannot be read than can, for the memory is damaged. What is there stays.
        StoreTimeout: A session was in the middle of a change for too long: its writer stands still.
    """
    arena, clock = _of(store)
    with replacing(os.path.abspath(path), arena.file.name) as writer:
        writer.begin(clock())
        damaged: list[int] = []
        for entry, used in _paced(arena, progress, damaged):
            writer.add(entry, used)
        _tell(arena, damaged, writer.count)
        return writer.count


def load(
    store: Held | Arena, path: str | os.PathLike[str], progress: Progress = _unseen, *, of: str | None = None
) -> int:
    """
    Put the sessions of a snapshot into a store that may be in use, and return how many.

    A session that is there is newer and stays, and so does room that others have: if not all fit, those that have an
    owner go first, then the most recently used, and of an owner no more than ``max_per_owner`` allows. A session that a
    request of its browser has ended, or given another id, in the last 30 seconds stays gone. Those that are put there
    are the most recently used ones then, in their old order. Time since the snapshot was taken counts as life. Each
    counts as a `set`.

    Args:
        store: As for `save`.
        path: Of the snapshot.
        progress: Called now and then with how many have been looked at, and of how many.
        of: The name of the store whose it must be; None: any store's will do.

    Raises:
        FileNotFoundError: There is none.
        SnapshotError: It is damaged, not a snapshot, another store's, or could have been written by another user.
            Nothing was changed.
    """
    arena, clock = _of(store)
    with Saved(path, clock(), progress, of) as saved:
        chosen = _chosen(saved, arena, scattered=True)
        records = saved.records(chosen)
        loaded: set[Key] = set()
        done = 0
        while batch := list(islice(records, _LOCKED)):
            try:
                arena.lock(2.0)
                for record, expires, used in batch:
                    now = clock()
                    if _is_welcome(arena, record, loaded, now):
                        _, weight, low, high, owner, _ = head_of(record)
                        if weight != 1:
                            arena.cells[HAS_WEIGHTS] = 1
                        arena.publish(arena.find((low, high)), (low, high), record, owner, expires, now, used=used)
                        loaded.add((low, high))
            finally:
                arena.unlock()
            done += len(batch)
            if not done % _BATCH:
                progress(done, len(chosen))
                time.sleep(_PAUSE)
    return len(loaded)


def _is_welcome(arena: Arena, record: bytes, loaded: set[Key], now: int) -> bool:
    _, weight, low, high, owner, _ = head_of(record)
    key, slot, most = (low, high), arena.find((low, high)), arena.cells[MAX]
    if key not in loaded:
        if slot or arena.reader.tombstone(key, now, TOMBSTONE_TTL):
            return False
        if owner and arena.cells[MAX_PER_OWNER] and arena.owned_slots(owner)[0] >= arena.cells[MAX_PER_OWNER]:
            return False
    return arena.fits(len(record), new=not slot) and (not most or arena.cells[WEIGHT] + weight <= most)


def restore(arena: Arena, path: str | os.PathLike[str], progress: Progress = _unseen, *, of: str | None = None) -> int:
    """Put the sessions of a snapshot into an empty arena that nobody else has mapped yet; otherwise like `load`."""
    with Saved(path, boottime_ns(), progress, of) as saved:
        chosen = _chosen(saved, arena)
        return fill(arena, saved.records(chosen), lambda done: progress(done, len(chosen)))


def describe(path: str | os.PathLike[str]) -> Contents:
    """Verify a snapshot, and return what it holds; raises as `load`."""
    with Saved(path, boottime_ns(), _unseen) as saved:
        return saved.contents


def set_aside(path: str, name: str) -> str | None:
    """
    Rename a snapshot that cannot be read, so that the next one does not replace it; return its new name.

    What is no snapshot of the store ``name`` stays where it is, and `save` will refuse to replace it: that is None.
    """
    try:
        if in_the_way(path, name):
            return None
        names = chain([f"{path}.refused"], (f"{path}.refused.{number}" for number in count(2)))
        aside = next(name for name in names if not os.path.lexists(name))  # what is there is somebody's
        os.rename(path, aside)
    except OSError:
        return None
    return aside


def _of(store: Held | Arena) -> tuple[Arena, Clock]:
    return (store, boottime_ns) if isinstance(store, Arena) else (store.arena, store.options.clock)


def _tell(arena: Arena, damaged: list[int], count: int) -> None:
    """Tell that sessions are missing in a snapshot; and refuse it if that one before has probably more."""
    total = len(damaged) + count
    if len(damaged) > count:
        text = f"{len(damaged)} of {total} sessions are damaged, and cannot be saved: the snapshot before stays"
        raise SnapshotError(f"{text}; shmstore check {arena.file.name} tells more")
    if damaged:
        log.error("store %r: %d of %d sessions are damaged, and cannot be saved", arena.file.name, len(damaged), total)


def _paced(arena: Arena, progress: Progress, damaged: list[int]) -> Iterator[tuple[Entry, int]]:
    """Yield the sessions, and when each was used; note the slots of those that cannot be read."""
    slots = arena.table.live_slots()
    cells = arena.cells
    changing: list[int] = []
    for number, slot in enumerate(reversed(slots)):
        if not number % _BATCH:
            time.sleep(_PAUSE)
            progress(number, len(slots))
        entry = arena.reader.under_lock(slot)  # which it is not: what is just being changed is looked at again
        if entry is not None:
            yield entry, cells[arena.table.used + slot]
        elif cells[arena.table.record + slot]:
            changing.append(slot)
    for slot in changing:
        entry = arena.reader.at(slot, 2.0)
        if entry is not None:
            yield entry, cells[arena.table.used + slot]
        elif cells[arena.table.record + slot]:
            damaged.append(slot)
    progress(len(slots), len(slots))


def _chosen(saved: Saved, arena: Arena, *, scattered: bool = False) -> array[int]:
    """Return the numbers of the records for which an arena has room; of too many those that eviction would keep."""
    alive = _allowed(saved, arena, _missing(saved, arena))
    kept = sorted(alive, key=lambda number: (not saved.owners[number], -number))
    sizes = ((OVERHEAD + saved.lengths[number], saved.weights[number]) for number in kept)
    left = len(alive) - fitting(arena, sizes, scattered=scattered)
    if left:
        log.warning("store %r: %d of %d sessions in %s find no room", arena.file.name, left, len(alive), saved.path)
    return array("Q", sorted(kept[: len(alive) - left]))


def _missing(saved: Saved, arena: Arena) -> array[int]:
    """Return those that are alive, and not there already: these take no room."""
    slots = arena.table.live_slots()
    if not slots:
        return saved.alive
    there = {arena.table.key_at(slot) for slot in slots}
    return array("Q", (n for n in saved.alive if (saved.lows[n], saved.highs[n]) not in there))


def _allowed(saved: Saved, arena: Arena, missing: array[int]) -> array[int]:
    """Return those of an owner that `MAX_PER_OWNER` has room for."""
    most = arena.cells[MAX_PER_OWNER]
    if not most:
        return missing
    there = Counter(arena.table.column(arena.table.owner, arena.table.used_slots()))
    allowed = array("Q")
    for number in reversed(missing):
        owner = saved.owners[number]
        if not owner or there[owner] < most:
            there[owner] += 1
            allowed.append(number)
    allowed.reverse()
    return allowed
