"""Rebuilds: all sessions of an arena in another file, of another size or without the damage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from shmstore.engine.arena import Arena
from shmstore.engine.frame import Key, TimedRecord
from shmstore.engine.header import (
    EVENTS,
    HAS_WEIGHTS,
    LIVE,
    MAX,
    MOVED,
    PAST,
    STATE,
)
from shmstore.engine.layout import Geometry
from shmstore.errors import StoreUnavailable
from shmstore.store import live_options
from shmstore.store.eviction import retained
from shmstore.system.clock import Clock, boottime_ns
from shmstore.system.signals import pass_on_interruption

__all__ = ["rebuild"]

_STEP = 1024  # records between two calls of `progress`


def rebuild(
    arena: Arena,
    adopt: Callable[[Arena], object],
    geometry: Geometry | None = None,
    timeout: float = 2.0,
    progress: Callable[[int], object] = lambda _: None,
    clock: Clock = boottime_ns,
) -> int:
    """
    Carry all sessions over to a new file, which takes the place of the old one.

    Damaged records are left out, and if not all fit, also those that eviction would remove first.

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


def _carry_over(arena: Arena, other: Arena, progress: Callable[[int], object], now: int) -> int:
    """Copy what fits from one arena to another, and return how many sessions did not. Damaged records stay behind."""
    cells, table, records = arena.cells, arena.table, dict[int, bytes]()
    live = table.live_slots(table.all_slots())
    slots: dict[Key, int] = {}
    for slot in live:
        slots.setdefault(table.key_at(slot), slot)  # of two with one key the one that was used last

    def length_of(slot: int) -> int:
        if not len(records) % _STEP:
            progress(0)  # a sign of life: none is copied yet
        with contextlib.suppress(IndexError):
            cells[table.version + slot] &= ~1  # a mutation may have ended at damage
        entry = arena.reader.try_at(slot)
        if entry is None:
            return 0
        records[slot] = entry[4]
        return len(entry[4])

    def timed(kept: list[int]) -> Iterator[TimedRecord]:
        for number, slot in enumerate(kept):
            if not number % _STEP:
                progress(number)
            yield records[slot], cells[table.expires + slot], min(cells[table.used + slot], now)

    kept = retained(  # the store enforces `max` when it publishes its options
        other,
        slots.values(),
        lambda slot: cells[table.owner + slot],
        length_of,
        lambda slot: bool(cells[table.expires + slot] <= now),
    )
    other.fill(timed(table.by_use(kept)))
    ours, theirs = cells, other.cells
    # Counters that no counting can have reached begin at 0: the next increment might overflow, and be damage again.
    for counter in EVENTS:
        theirs[counter] = ours[counter] if ours[counter] < 2**63 else 0
    for number, counted in enumerate(arena.counters.counted()):
        theirs[PAST + number] = counted % 2**64  # damaged or not
    if arena.geometry == other.geometry:
        theirs[table.tombstones : table.heads] = ours[table.tombstones : table.heads]
    theirs[MAX:HAS_WEIGHTS] = ours[MAX:HAS_WEIGHTS]  # not that itself: `fill` has set it if a record needs it
    live_options.copy(arena, other)
    return len(live) - len(kept)
