"""Evicts sessions to keep an arena within its limits, in the order that `shmstore.engine.capacity` states."""

from __future__ import annotations

import logging
from typing import Final

from shmstore.engine.arena import Arena
from shmstore.engine.capacity import has_room, live_of_owner, next_victim, owner_room
from shmstore.engine.header import (
    DISPLACED,
    DISPOSES,
    EVICTED,
    EVICTED_OWNED,
    EXPIRED,
    MAX,
    MAX_PER_OWNER,
    REFUSED,
    WEIGHT,
)
from shmstore.engine.layout import ArenaDamaged
from shmstore.errors import RecordTooLarge
from shmstore.store.dispose import Disposal
from shmstore.system.throttle import Throttle

__all__ = ["Eviction"]

log = logging.getLogger("shmstore")

_AT_ONCE: Final = 16  # sessions of one owner that are dropped in one hold of the lock


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
        arena.option_cells.check()  # because of them sessions are about to go
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
        arena.option_cells.check()
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
        arena.option_cells.check()
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
        if evicted and self._evicting.due():
            log.warning(
                "%s: evicting live sessions to make room (%d so far, %d of them logged in): raise max or memory",
                arena.label, cells[EVICTED] + cells[EVICTED_OWNED], cells[EVICTED_OWNED],
            )  # fmt: skip
        if displaced and self._displacing.due():
            log.info(
                "%s: ending the least recently used sessions of owners that log in more than max_per_owner=%d times "
                "(%d so far)", arena.label, cells[MAX_PER_OWNER], cells[DISPLACED],
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
