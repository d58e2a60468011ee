"""An arena's way to another file: of another size, or away from damage. And how many records get there at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

from shmstore.engine.arena import Arena
from shmstore.engine.frame import Key, head_of
from shmstore.engine.header import (
    EVENTS,
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
    WEIGHING,
)
from shmstore.engine.header import WEIGHT as TAKEN
from shmstore.engine.layout import CELL, Geometry
from shmstore.engine.reader import Entry
from shmstore.errors import StoreUnavailable
from shmstore.system.clock import Clock, boottime_ns
from shmstore.system.signals import pass_on_interruption

__all__ = ["Carried", "fill", "fitting", "move"]

Carried = tuple[bytes, int, int]
"""A sealed record, its deadline, when it was used last."""

_STEP = 1024  # records between two calls of `progress`


def _unseen(done: int) -> None:
    """Take note of no progress."""


def move(
    arena: Arena,
    geometry: Geometry | None = None,
    timeout: float = 2.0,
    progress: Callable[[int], object] = _unseen,
    clock: Clock = boottime_ns,
) -> int:
    """
    Carry all sessions over to a new file of this size, put it in the place of this one, and follow it.

    Records that are damaged stay behind, and if not all fit those that eviction would take first. All other users
    follow at their next call.

    Args:
        arena: Of which file.
        geometry: Of the new one; None: as it is.
        timeout: How long to wait for the lock, in seconds.
        progress: Called now and then with how many are there.
        clock: The store's.

    Returns:
        How many sessions stayed behind.

    Raises:
        StoreFull: The memory for another one cannot be had. Nothing has changed.
        StoreUnavailable: It cannot be put in the place of this one. Nothing has changed.
    """
    other, temporary = arena.prepare(arena.path, geometry or arena.geometry)
    unlock = arena.unlock
    try:
        arena.lock(timeout)
        unlock, cells = arena.unlock, arena.cells
        left = _carry_over(arena, other, progress, clock())
        if arena.path is not None:
            # In this order: who dies in between has moved nothing, see `Memory.lock`. The other way round some would go
            # on in the old file, and some in the new one.
            cells[STATE] = MOVED
            try:
                os.rename(temporary, arena.path)
            except OSError as error:
                cells[STATE] = LIVE
                pass_on_interruption(error)
                raise StoreUnavailable(f"{temporary} cannot take the place of the arena: {error.strerror}") from error
        arena.become(other)
        cells[STATE] = MOVED
    except BaseException:
        if arena.cells is not other.cells:
            other.close()
            if temporary:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        raise
    finally:
        unlock()
        arena.unlock()  # whichever of them it was: unlocking what one does not hold is refused
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

    vars(arena)["commit"] = arena.apply  # no journal: who dies now leaves a file that nobody ever finds
    try:
        for number, (record, expires, used) in enumerate(records):
            _, weight, low, high, owner, _ = head_of(record)
            if weight != 1:
                cells[WEIGHING] = 1
            # Whatever the time is: of these stamps nothing else is known.
            arena.publish(arena.find((low, high)), (low, high), record, owner, expires, NEVER, used=used)
            if not number % _STEP:
                progress(number)
    finally:
        del vars(arena)["commit"]
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
        slots.setdefault(arena.key_at(slot), slot)

    def rank(slot: int) -> int:
        return 2 if cells[arena.expires + slot] <= now else not cells[arena.owner + slot]

    return sorted(slots.values(), key=rank)


def _carry_over(arena: Arena, other: Arena, progress: Callable[[int], object], now: int) -> int:
    carried: list[Entry] = []
    live = arena.live_slots(every=True)
    count, slots = len(live), _by_worth(arena, live, now)

    def sizes() -> Iterator[tuple[int, int]]:
        for number, slot in enumerate(slots):
            if not number % _STEP:
                progress(0)  # a sign of life: none is there yet
            with contextlib.suppress(IndexError):
                arena.cells[arena.version + slot] &= ~1  # a mutation may have come to an end at damage
            entry = arena.under_lock(slot)
            if entry is not None:
                carried.append(entry)
                yield len(entry[4]), 0  # whoever lays down `max` sees to it

    entries = carried[: fitting(other, sizes())]
    used = arena.cells
    records = sorted(((entry[4], entry[2], used[arena.used + entry[0]]) for entry in entries), key=lambda each: each[2])
    fill(other, ((record, expires, min(stamp, now)) for record, expires, stamp in records), progress)
    ours, theirs = arena.cells, other.cells
    # Those that no counting leads to begin anew: the next one more might not fit, and be damage again.
    for counter in EVENTS:
        theirs[counter] = ours[counter] if ours[counter] < 2**63 else 0
    for number, counted in enumerate(arena.counted()):
        theirs[PAST + number] = counted % 2**64  # damaged or not
    if arena.geometry == other.geometry:
        theirs[arena.tombstones : arena.heads] = ours[arena.tombstones : arena.heads]
    theirs[MAX : WEIGHING + 1] = ours[MAX : WEIGHING + 1]
    other.set_options(ours[OPTION_CELLS].tolist())
    return count - len(entries)
