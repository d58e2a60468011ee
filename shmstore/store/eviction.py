"""
Eviction: which session goes when not all fit, how many sessions an owner may have, and their removal.

The order: expired sessions first, then the least recently used without an owner, then the least recently used with an
owner. A flood of anonymous visitors logs no user out. `next_victim` takes one session at a time in this order, and
`retained` sorts many: for an arena that is rebuilt, and for sessions that are copied or restored.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from shmstore.engine.arena import Arena
from shmstore.engine.header import (
    DISPLACED,
    DISPOSES,
    EVICTED,
    EVICTED_OWNED,
    EXPIRED,
    MAX,
    MAX_PER_OWNER,
    REFUSED,
    SESSIONS,
    USED_BLOCKS,
    WEIGHT,
)
from shmstore.engine.layout import CELL, ArenaDamaged
from shmstore.errors import RecordTooLarge, StoreUnavailable
from shmstore.store import live_options
from shmstore.store.dispose import Disposal
from shmstore.system.throttle import Throttle

__all__ = [
    "Eviction", "exceeds_limits", "has_room", "live_of_owner", "live_per_owner", "next_victim", "owner_room",
    "retained",
]  # fmt: skip

log = logging.getLogger("shmstore")

_AT_ONCE: Final = 16  # sessions of one owner that are dropped in one hold of the lock
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


# -- the removal -----------------------------------------------------------------------------------------------------


class Eviction:
    """
    Keeps an arena within its limits. Called with the lock, but for `report`.

    Attributes:
        evicted: Whether live sessions were evicted since the last report.
        displaced: Whether live sessions of an owner with too many were.
    """

    def __init__(self, disposal: Disposal) -> None:
        self._disposal = disposal
        self._evicting, self._displacing = Throttle(), Throttle()
        self.evicted = self.displaced = False

    def make_room(self, arena: Arena, length: int, weight: int, slot: int, owner: int, now: int) -> None:
        """
        Evict until a record of ``length`` bytes fits and all limits are kept.

        Args:
            length: Bytes of the record.
            weight: How much of ``max`` it takes.
            slot: Where it will be written, 0 for a new one. What is there now is never evicted.
            owner: The digest of its owner.
            now: The time.

        Raises:
            RecordTooLarge: It does not fit beside what it replaces, or is more than ``max``.
            DisposeRequired: A dispose must be called first.
        """
        cells = arena.file.cells
        joins_owner = cells[MAX_PER_OWNER] and owner and owner != (slot and cells[arena.table.owner + slot])
        if not (cells[DISPOSES] or joins_owner) and has_room(arena, length, weight, slot):
            return
        live_options.check(arena)  # because of them sessions are about to go
        self._check(arena, length, weight, slot)
        if joins_owner:
            self.displace(arena, now, owner, 1)
        while victim := self._disposal.announced(arena, slot):
            self.evict(arena, victim, now)
        audited = False
        while not has_room(arena, length, weight, slot):
            if not audited:
                arena.audit(length, new=not slot)  # before others lose their sessions to a wrong number
                audited = True
            victim = self._victim(arena, slot, now)
            if not victim:
                raise ArenaDamaged("there is no space, and no session that may be evicted")
            self.evict(arena, victim, now)

    def displace(self, arena: Arena, now: int, owner: int, joining: int) -> bool:
        """
        Drop the least recently used sessions of an owner until it may have ``joining`` more.

        If an owner has very many sessions, the ones that it has had for longest are considered.

        Return whether it still has too many: after the option was lowered there may be more than are dropped in one
        hold of the lock.
        """
        live_options.check(arena)
        count, live, expired = live_of_owner(arena, owner, now)
        excess = joining - owner_room(arena, count)
        if count > len(live):
            for slot in expired[:_AT_ONCE]:  # so that the sessions behind them are counted exactly
                self._disposal.drop(arena, slot, EXPIRED)
        for slot in arena.table.by_use(live)[: min(max(excess, 0), _AT_ONCE)]:
            self.drop_displaced(arena, slot, now)
        return excess > _AT_ONCE

    def drop_displaced(self, arena: Arena, victim: int, now: int) -> None:
        """Drop a session that its owner has too many of."""
        live = arena.file.cells[arena.table.expires + victim] > now
        self._disposal.drop(arena, victim, DISPLACED if live else EXPIRED)
        self.displaced |= live

    def _check(self, arena: Arena, length: int, weight: int, slot: int) -> None:
        """Refuse what cannot be written even if all others go: before one of them goes for nothing."""
        most = arena.file.cells[MAX]
        if most and weight > most:
            arena.counters.add(REFUSED)
            raise RecordTooLarge(f"the session takes {weight} of max={most}")
        if not arena.can_hold(length, slot):  # an arena smaller than the options that came later
            arena.counters.add(REFUSED)
            raise RecordTooLarge(f"a session of {length} bytes does not fit beside what it replaces")

    def trim(self, arena: Arena, now: int, most: int) -> bool:
        """Evict ``most`` of what is beyond `MAX`, after that was lowered; return whether there may be more."""
        cells = arena.file.cells
        live_options.check(arena)
        for _ in range(most):
            if not cells[MAX] or cells[WEIGHT] <= cells[MAX]:
                return False
            victim = self._victim(arena, 0, now)
            if not victim:
                return False
            self.evict(arena, victim, now)
        return True

    def report(self, arena: Arena) -> None:
        """Log, throttled, that live sessions are evicted, and why. Called without the lock."""
        cells = arena.file.cells
        evicted, displaced = self.evicted, self.displaced
        self.evicted = self.displaced = False
        with suppress(StoreUnavailable):  # another thread has closed the store meanwhile
            if evicted and self._evicting.due():
                log.warning(
                    "%s: evicting live sessions to make room (%d so far, %d of them logged in): raise max or memory",
                    arena.label, cells[EVICTED] + cells[EVICTED_OWNED], cells[EVICTED_OWNED],
                )  # fmt: skip
            if displaced and self._displacing.due():
                log.info(
                    "%s: ending the least recently used sessions of owners that log in more than max_per_owner=%d "
                    "times (%d so far)", arena.label, cells[MAX_PER_OWNER], cells[DISPLACED],
                )  # fmt: skip

    def _victim(self, arena: Arena, keep: int, now: int) -> int:
        """Return the slot that is dropped next, other than ``keep``; 0: none is left."""
        return self._disposal.announced(arena, keep) or next_victim(arena, keep, now)

    def evict(self, arena: Arena, victim: int, now: int) -> None:
        """Drop a session."""
        live = arena.file.cells[arena.table.expires + victim] > now
        owned = arena.file.cells[arena.table.owner + victim]
        self._disposal.drop(arena, victim, (EVICTED_OWNED if owned else EVICTED) if live else EXPIRED)
        self.evicted |= live
