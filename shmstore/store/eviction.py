"""Who goes when there is no room: the expired, then the least recently used, those that have an owner last."""

from __future__ import annotations

import logging
from typing import Final

from shmstore.engine.arena import Arena
from shmstore.engine.header import (
    DISPLACED,
    DISPOSES,
    EVICTED,
    EVICTED_OWNED,
    EXPIRED,
    HAS_WEIGHTS,
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
_LOOKED_AT: Final = 256  # sessions of one owner among which expired ones are looked for


class Eviction:
    """Keeps an arena within its limits. Called with the lock, but for `report`."""

    def __init__(self, disposal: Disposal) -> None:
        self._disposal = disposal
        self._evicting, self._displacing = Throttle(), Throttle()
        self._evicted = self._displaced = False  # since the last report

    def make_room(self, arena: Arena, length: int, weight: int, slot: int, owner: int, now: int) -> int:
        """
        Evict until a record of ``length`` bytes fits and all limits are kept; return how many live sessions it took.

        Args:
            length: Bytes of the record.
            weight: How much of ``max`` it takes.
            slot: Where it will be written, 0 for a new one. What is there now is never evicted.
            owner: The digest of its owner.
            now: The time.

        Raises:
            RecordTooLarge: It does not fit beside what it replaces, or is more than ``max``.
            Due: A dispose comes first.
        """
        cells = arena.file.cells
        live = 0
        most_of_owner = cells[MAX_PER_OWNER] if owner and owner != (slot and cells[arena.table.owner + slot]) else 0
        if not (cells[DISPOSES] or most_of_owner) and arena.fits(length, new=not slot):
            most = cells[MAX]
            if not most or (slot and not cells[HAS_WEIGHTS]) or cells[WEIGHT] + weight <= most:
                return 0  # as nearly always
        self.expect_options(arena)
        self._check(arena, length, weight, slot)
        if most_of_owner:
            self.displace(arena, owner, most_of_owner - 1, now)
            live += self._displaced
        while victim := self._disposal.announced(arena, slot):
            live += self.evict(arena, victim, now)
        if most := cells[MAX]:
            weight -= arena.table.weight_at(slot) if slot else 0
        audited = False
        while not arena.fits(length, new=not slot) or (most and weight > 0 and cells[WEIGHT] + weight > most):
            if not audited:
                arena.audit(length, new=not slot)  # before others lose their sessions to a wrong number
                audited = True
            victim = self._victim(arena, slot, now)
            if not victim:
                raise ArenaDamaged("there is no room, and nobody who takes it")
            live += self.evict(arena, victim, now)
        return live

    def expect_options(self, arena: Arena) -> None:
        """
        Verify the options because of which sessions are about to go.

        Raises:
            ArenaDamaged: They are not what they were set to.
        """
        arena.live_options.check()

    def displace(self, arena: Arena, owner: int, most: int, now: int) -> bool:
        """
        Drop the least recently used sessions of an owner until it has ``most``. Expired ones do not count.

        Of an owner with very many, those that it has had for longest are looked at.

        Return whether there are still more: after the option was lowered there may be too many for one hold of the
        lock.
        """
        count = arena.owned_slots(owner)[0]
        excess = count - most
        if excess <= 0:
            return False
        alive, expired = list[int](), list[int]()
        for slot in arena.owned_slots(owner, _LOOKED_AT)[1]:
            (alive if arena.file.cells[arena.table.expires + slot] > now else expired).append(slot)
        if count > _LOOKED_AT:
            for slot in expired[:_AT_ONCE]:  # so that it is seen how many others there are
                self._disposal.drop(arena, slot, EXPIRED)
        excess -= len(expired)
        for slot in arena.table.by_use(alive)[: min(max(excess, 0), _AT_ONCE)]:
            self.drop_displaced(arena, slot, now)
        return excess > _AT_ONCE

    def drop_displaced(self, arena: Arena, victim: int, now: int) -> bool:
        """Drop a session that its owner has too many of; return whether it was alive."""
        live = arena.file.cells[arena.table.expires + victim] > now
        self._disposal.drop(arena, victim, DISPLACED if live else EXPIRED)
        self._displaced |= live
        return live

    def _check(self, arena: Arena, length: int, weight: int, slot: int) -> None:
        """Refuse what cannot be written even if all others go: before one of them goes for nothing."""
        most = arena.file.cells[MAX]
        if most and weight > most:
            arena.file.cells[REFUSED] += 1
            raise RecordTooLarge(f"the session takes {weight} of max={most}")
        if not arena.can_hold(length, slot):  # an arena smaller than the options that came later
            arena.file.cells[REFUSED] += 1
            raise RecordTooLarge(f"a session of {length} bytes does not fit beside what it replaces")

    def trim(self, arena: Arena, most: int, now: int) -> bool:
        """Evict ``most`` of what is beyond `MAX`, after that was lowered; return whether there may be more."""
        cells = arena.file.cells
        self.expect_options(arena)
        for _ in range(most):
            if not cells[MAX] or cells[WEIGHT] <= cells[MAX]:
                return False
            victim = self._victim(arena, 0, now)
            if not victim:
                return False
            self.evict(arena, victim, now)
        return True

    def report(self, arena: Arena) -> None:
        """Say, now and then, that live sessions are dropped, and why. Called without the lock."""
        cells = arena.file.cells
        evicted, displaced = self._evicted, self._displaced
        self._evicted = self._displaced = False
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
        """Return who goes next, never ``keep``; 0: nobody is left."""
        return (
            self._disposal.announced(arena, keep)
            or arena.expired_nearby(now, keep)
            or arena.least_used(owned=False, keep=keep)
            or arena.least_used(owned=True, keep=keep)
        )

    def evict(self, arena: Arena, victim: int, now: int) -> bool:
        """Drop a session; return whether it was alive."""
        live = arena.file.cells[arena.table.expires + victim] > now
        owned = arena.file.cells[arena.table.owner + victim]
        self._disposal.drop(arena, victim, (EVICTED_OWNED if owned else EVICTED) if live else EXPIRED)
        self._evicted |= live
        return live
