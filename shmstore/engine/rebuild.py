"""Rebuilds: all sessions of an arena in another file, of another size or without the damage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

from shmstore.engine.arena import Arena
from shmstore.engine.frame import Key, head_of
from shmstore.engine.header import (
    EVENTS,
    HAS_WEIGHTS,
    LIVE,
    MAX,
    MOVED,
    NEVER,
    OPTION_CELLS,
    PAST,
    SESSIONS,
    SETS,
    STATE,
    USED_BLOCKS,
)
from shmstore.engine.header import WEIGHT as TAKEN
from shmstore.engine.layout import CELL, Geometry
from shmstore.engine.reader import Entry
from shmstore.errors import StoreUnavailable
from shmstore.system.clock import Clock, boottime_ns
from shmstore.system.signals import pass_on_interruption

__all__ = ["Carried", "fill", "fitting", "rebuild"]

Carried = tuple[bytes, int, int]
"""A sealed record, its deadline, when it was used last."""

_STEP = 1024  # records between two calls of `progress`


def _unseen(done: int) -> None:
    """Take note of no progress."""


def rebuild(
    arena: Arena,
    adopt: Callable[[Arena], object],
    geometry: Geometry | None = None,
    timeout: float = 2.0,
    progress: Callable[[int], object] = _unseen,
    clock: Clock = boottime_ns,
) -> int:
    """
    Carry all sessions over to a new file, which takes the place of the old one.

    Damaged records stay behind, and if not all fit those that eviction would take first.

    Args:
        arena: The old file. Afterwards all its users get `ArenaReplaced`.
        adopt: Called with the arena of the new file, before the lock of the old one is released.
        geometry: The size of the new file; None: that of the old one.
        timeout: How long to wait for the lock, in seconds.
        progress: Called now and then with how many sessions were carried over.
        clock: The store's.

    Returns:
        How many sessions stayed behind.

    Raises:
        StoreFull: The memory for another file cannot be reserved. Nothing has changed.
        StoreUnavailable: The new file cannot take the place of the old one. Nothing has changed.
    """
    path = arena.file.path
    new, temporary = Arena.prepare(path, geometry or arena.geometry)
    adopted = False
    try:
        arena.lock(timeout)
        cells = arena.cells
        left = _carry_over(arena, new, progress, clock())
        if path is not None:
            # In this order: if this process dies in between, nothing has been replaced, see `ArenaLock.acquire`. In the
            # other order some processes would write to the old file, and some to the new one.
            cells[STATE] = MOVED
            try:
                os.rename(temporary, path)
            except OSError as error:
                cells[STATE] = LIVE
                pass_on_interruption(error)
                raise StoreUnavailable(f"{temporary} cannot take the place of the arena: {error.strerror}") from error
        adopted = True
        adopt(new)
        cells[STATE] = MOVED
    except BaseException:
        if not adopted:
            new.close()
            if temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        raise
    finally:
        arena.unlock()
    return left


def fill(arena: Arena, records: Iterable[Carried], progress: Callable[[int], object] = _unseen) -> int:
    """
    Put records into an arena that nobody else has mapped yet; return how many keys they have.

    Args:
        arena: Where. It has room for all of them, see `fitting`.
        records: The least recently used first. Of two with one key, the later one counts.
        progress: Called now and then with how many are there.
    """
    cells = arena.cells

    journaled, arena.commit = arena.commit, arena.journal.apply  # no other process has the file
    try:
        for number, (record, expires, used) in enumerate(records):
            _, weight, low, high, owner, _ = head_of(record)
            if weight != 1:
                cells[HAS_WEIGHTS] = 1
            # Whatever the time is: of these stamps nothing else is known.
            arena.publish(arena.find((low, high)), (low, high), record, owner, expires, NEVER, used=used)
            if not number % _STEP:
                progress(number)
    finally:
        arena.commit = journaled
    cells[SETS] = 0  # it is nobody's doing
    return cells[SESSIONS]


def fitting(arena: Arena, sizes: Iterable[tuple[int, int]], *, scattered: bool = False) -> int:
    """
    Return how many records find room in an arena beside what is in it.

    Args:
        arena: Which one.
        sizes: Bytes and weight of each, those that matter most first: none counts after one that does not fit.
        scattered: Whether what is free may be in many pieces, so that each record takes as many blocks as it can.
    """
    cells, geometry = arena.cells, arena.geometry
    room = [
        arena.geometry.slots - cells[SESSIONS],
        arena.geometry.blocks - cells[USED_BLOCKS],
        cells[MAX] - cells[TAKEN] if cells[MAX] else 2**64,
    ]

    def fits(record: tuple[int, int]) -> bool:
        length, weight = record
        room[0] -= 1
        if scattered:
            room[1] -= geometry.takes(length)
        else:
            room[1] -= max(-(-(length + CELL) // geometry.block_size), geometry.shortest)
        room[2] -= weight
        return min(room) >= 0

    return sum(1 for _ in takewhile(fits, sizes))


def _by_worth(arena: Arena, live: list[int], now: int) -> list[int]:
    """Return slots in use, those first that eviction would take last; of two with one key the one used last."""
    cells = arena.cells
    slots: dict[Key, int] = {}
    for slot in live:
        slots.setdefault(arena.table.key_at(slot), slot)

    def rank(slot: int) -> int:
        return 2 if cells[arena.table.expires + slot] <= now else not cells[arena.table.owner + slot]

    return sorted(slots.values(), key=rank)


def _carry_over(arena: Arena, other: Arena, progress: Callable[[int], object], now: int) -> int:
    carried: list[Entry] = []
    live = arena.table.live_slots(arena.table.all_slots())
    count, slots = len(live), _by_worth(arena, live, now)

    def sizes() -> Iterator[tuple[int, int]]:
        for number, slot in enumerate(slots):
            if not number % _STEP:
                progress(0)  # a sign of life: none is there yet
            with contextlib.suppress(IndexError):
                arena.cells[arena.table.version + slot] &= ~1  # a mutation may have come to an end at damage
            entry = arena.reader.under_lock(slot)
            if entry is not None:
                carried.append(entry)
                yield len(entry[4]), 0  # whoever lays down `max` sees to it

    entries = carried[: fitting(other, sizes())]
    used = arena.cells
    records = sorted(
        ((entry[4], entry[2], used[arena.table.used + entry[0]]) for entry in entries), key=lambda each: each[2]
    )
    fill(other, ((record, expires, min(stamp, now)) for record, expires, stamp in records), progress)
    ours, theirs = arena.cells, other.cells
    # Those that no counting leads to begin anew: the next one more might not fit, and be damage again.
    for counter in EVENTS:
        theirs[counter] = ours[counter] if ours[counter] < 2**63 else 0
    for number, counted in enumerate(arena.counters.counted()):
        theirs[PAST + number] = counted % 2**64  # damaged or not
    if arena.geometry == other.geometry:
        table = arena.table
        theirs[table.tombstones : table.heads] = ours[table.tombstones : table.heads]
    theirs[MAX : HAS_WEIGHTS + 1] = ours[MAX : HAS_WEIGHTS + 1]
    other.live_options.publish(ours[OPTION_CELLS].tolist())
    return count - len(entries)
