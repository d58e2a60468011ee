"""
What an arena has room for: which sessions are kept when not all fit, and how many of one owner.

These rules are used wherever sessions arrive or leave in numbers: at eviction, when an arena is rebuilt, and when
sessions are copied or restored into it.

The order of eviction: expired sessions first, then the least recently used without an owner, then the least recently
used with an owner. A flood of anonymous visitors logs no user out. `next_victim` takes one session at a time in this
order, and `retained` sorts many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from shmstore.engine.arena import Arena
from shmstore.engine.header import MAX, MAX_PER_OWNER, SESSIONS, USED_BLOCKS, WEIGHT
from shmstore.engine.layout import CELL

__all__ = ["exceeds_limits", "has_room", "live_of_owner", "live_per_owner", "next_victim", "owner_room", "retained"]

_UNLIMITED: Final = 2**64
_SCANNED: Final = 256  # sessions of one owner among which the expired ones are looked for


def next_victim(arena: Arena, keep: int, now: int) -> int:
    """Return the slot that is evicted next, other than ``keep``; 0: none is left. Called with the lock."""
    return (
        arena.expired_nearby(now, keep)
        or arena.least_used(owned=False, keep=keep)
        or arena.least_used(owned=True, keep=keep)
    )


def retained(
    arena: Arena,
    items: Iterable[int],
    owner_of: Callable[[int], int],
    length_of: Callable[[int], int],
    is_expired: Callable[[int], bool] = lambda item: False,
    *,
    weight_of: Callable[[int], int] = lambda item: 0,
    free_runs: int = 1,
) -> list[int]:
    """
    Return the sessions that fit into an arena beside its present content, the first to be evicted last.

    Args:
        arena: The arena.
        items: The sessions, the most recently used first.
        owner_of: Returns the digest of the owner of a session, 0 without an owner.
        length_of: Returns the bytes of its record, 0 if it is left out. Called in the order of the result.
        is_expired: Returns whether it has expired.
        weight_of: Returns how much of ``max`` it takes.
        free_runs: How many runs the free blocks form, or a larger number.
    """
    cells, geometry, kept = arena.cells, arena.geometry, list[int]()
    slots, blocks = geometry.slots - cells[SESSIONS], geometry.blocks - cells[USED_BLOCKS]
    left = cells[MAX] - cells[WEIGHT] if cells[MAX] else _UNLIMITED
    # A record that uses up a run takes less than two of the shortest runs more than in one piece.
    in_runs, in_pieces = 2 * free_runs * geometry.shortest if free_runs > 1 else 0, 0
    for item in sorted(items, key=lambda item: 2 if is_expired(item) else not owner_of(item)):
        if not (length := length_of(item)):
            continue
        whole = max(-(-(length + CELL) // geometry.block_size), geometry.shortest)
        slots, left = slots - 1, left - weight_of(item)
        in_runs, in_pieces = in_runs + whole, in_pieces + geometry.takes(length)
        if slots < 0 or min(in_runs, in_pieces) > blocks or left < 0:
            break
        kept.append(item)
    return kept


def has_room(arena: Arena, length: int, weight: int, slot: int) -> bool:
    """Return whether a record can be written to a slot, 0 for a new one, without evicting, and within ``max``."""
    most = arena.file.cells[MAX]
    more = weight - arena.table.weight_at(slot) if most and slot else weight
    return arena.fits(length, new=not slot) and not (most and more > 0 and arena.file.cells[WEIGHT] + more > most)


def exceeds_limits(arena: Arena) -> bool:
    """Return whether an arena may hold more than its options allow, because these were lowered."""
    cells = arena.cells
    return 0 < cells[MAX] < cells[WEIGHT] or 0 < cells[MAX_PER_OWNER] < arena.table.count_owned()


# -- max_per_owner -------------------------------------------------------------------------------------------------


def owner_room(arena: Arena, live: int) -> int:
    """
    Return how many more sessions an owner of ``live`` sessions may have; negative: how many must be dropped.

    Expired sessions do not count.
    """
    most: int = arena.file.cells[MAX_PER_OWNER]
    return most - live if most else _UNLIMITED


def live_of_owner(arena: Arena, owner: int, now: int) -> tuple[int, list[int], list[int]]:
    """
    Return how many live sessions an owner has, and some of its slots: live ones, expired ones. Called with the lock.

    The slots are the ones that the owner has had for longest, at most `_SCANNED`. Expired sessions beyond these are
    taken for live ones. An owner within the limit is not scanned, and without a limit none is counted.
    """
    live, expired = list[int](), list[int]()
    count = arena.owned_slots(owner)[0] if arena.file.cells[MAX_PER_OWNER] else 0
    if owner_room(arena, count) <= 0:
        for slot in arena.owned_slots(owner, _SCANNED)[1]:
            (live if arena.file.cells[arena.table.expires + slot] > now else expired).append(slot)
    return count - len(expired), live, expired


def live_per_owner(arena: Arena, now: int) -> Counter[int]:
    """Return how many live sessions each owner has; takes time for all slots, and no lock."""
    slots = arena.table.used_slots()
    owners, deadlines = arena.table.column(arena.table.owner, slots), arena.table.column(arena.table.expires, slots)
    return Counter(owner for owner, deadline in zip(owners, deadlines, strict=True) if owner and deadline > now)
