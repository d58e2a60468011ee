"""An arena's way to another file: of another size, or away from damage."""

from __future__ import annotations

import contextlib
import os

from shmstore.arena import Arena
from shmstore.cells import CORRUPT, MAX, MOVED, PAST_HITS, PAST_MISSES, SETS, STATE, WEIGHING
from shmstore.layout import CELL, Geometry
from shmstore.reading import Entry
from shmstore.sealed import Key

__all__ = ["move"]


def move(arena: Arena, geometry: Geometry | None = None, timeout: float = 2.0) -> int:
    """
    Carry all sessions over to a new file of this size, put it in the place of this one, and follow it.

    Records that are damaged stay behind, and the least recently used if not all fit. All other users follow at
    their next call.

    Args:
        arena: Of which file.
        geometry: Of the new one; None: as it is.
        timeout: How long to wait for the lock, in seconds.

    Returns:
        How many sessions stayed behind.

    Raises:
        StoreFull: The memory for another one cannot be had. Nothing has changed.
    """
    other, temporary = arena.prepare(arena.path, geometry or arena.geometry)
    unlock = arena.unlock
    try:
        arena.lock(timeout)
        unlock, cells = arena.unlock, arena.cells
        left = _carry_over(arena, other)
        if arena.path is not None:
            # In this order: who dies in between has moved nothing, see `Memory.lock`. The other way round some would go
            # on in the old file, and some in the new one.
            cells[STATE] = MOVED
            os.rename(temporary, arena.path)
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


def _carry_over(arena: Arena, other: Arena) -> int:
    carried: dict[Key, Entry] = {}
    blocks = other.geometry.blocks
    found = 0
    for slot in arena.live_slots():
        found += 1
        with contextlib.suppress(IndexError):
            arena.cells[arena.version + slot] &= ~1  # a mutation may have come to an end at damage
        entry = arena.under_lock(slot)
        if entry is None or arena.key_at(slot) in carried or len(carried) == other.geometry.slots:
            continue
        blocks -= -(-(len(entry[4]) + CELL) // other.geometry.block_size)  # in an empty file all are one run
        if blocks < 0:
            break
        carried[arena.key_at(slot)] = entry
    for key, entry in reversed(carried.items()):
        other.publish(0, key, entry[4], entry[3][4], entry[2], arena.cells[arena.used + entry[0]])
    ours, theirs = arena.cells, other.cells
    # Those that no counting leads to begin anew: the next one more might not fit, and be damage again.
    for counter in (*range(SETS, PAST_HITS), CORRUPT):
        theirs[counter] = ours[counter] if ours[counter] < 2**63 else 0
    theirs[PAST_HITS], theirs[PAST_MISSES] = (count % 2**64 for count in arena.reads())  # damaged or not
    if arena.geometry == other.geometry:
        theirs[arena.tombstones : arena.heads] = ours[arena.tombstones : arena.heads]
    theirs[MAX : WEIGHING + 1] = ours[MAX : WEIGHING + 1]
    return found - len(carried)
