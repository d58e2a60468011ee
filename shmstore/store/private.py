"""
Private stores by name: where processes cannot share a store, its name leads to a store of this process.

Applications can be developed and tested there. As a shared store survives its users and its server, such a store
survives them until the process ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from shmstore.engine.arena import Arena
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.engine.layout import MIN_MEMORY, ArenaDamaged, Geometry
from shmstore.errors import StoreUnavailable
from shmstore.options import Duration, Options
from shmstore.store.dispose import DisposeRequired
from shmstore.store.holder import ArenaHolder, Remote, Upkeep
from shmstore.store.store import Store
from shmstore.urls import Location

__all__ = ["change", "connect", "create", "end", "options"]

log = logging.getLogger("shmstore")

T = TypeVar("T")

_SHARED_ONLY: Final = ("directory", "persist", "snapshot", "snapshot_period")

_stores: dict[Location, Store] = {}
_creating = GreenletLock()


class _Connected(Store):
    """A store of this process, as one of its users has it: closing it concerns no other user."""

    def __init__(self, owner: Store) -> None:
        self._owner = owner
        self._begin(owner.arena, owner.options, _OwnersUpkeep(owner), owner._disposal)

    def start_interval(self, period: Duration | None = None) -> None:
        self.ping()  # raises if this object is closed
        self._owner.start_interval(period)

    def stop_interval(self) -> None:
        self._owner.stop_interval()

    def close(self) -> None:
        closed = Arena.create(None, Geometry.plan(MIN_MEMORY))
        closed.close()
        self.adopt(closed)


class _OwnersUpkeep(Upkeep):
    """The upkeep of an arena by the store that owns it."""

    def __init__(self, owner: Store) -> None:
        self._owner = owner

    def reopen(self, store: ArenaHolder) -> Arena:
        return self._owner.arena

    def repair(self, store: ArenaHolder, arena: Arena, damage: ArenaDamaged) -> None:
        self._owner.repair(arena, damage)
        store.reattach()

    def dispose(
        self, store: ArenaHolder, required: DisposeRequired, attempt: Callable[[], T], remote: Remote | None
    ) -> T:
        self.refresh_options(store)  # a read that removes an expired session has not done so
        return super().dispose(store, required, attempt, remote)

    def refresh_options(self, store: ArenaHolder) -> bool:
        changed = store.options is not self._owner.options
        if changed:
            store.apply_options(self._owner.options)
        return changed

    def before_write(self, store: ArenaHolder) -> None:
        super().before_write(store)
        self.refresh_options(store)


def create(place: Location, options: Mapping[str, Any], why: str) -> Store:
    """
    Return the store of this process with that name. It is created if it does not exist.

    The first time, a WARNING line says that the store is private.

    Args:
        place: The name of the store.
        options: The options of `Options`, for a store that is created. Those that only a shared store has do nothing.
        why: The reason why processes cannot share it.

    Raises:
        ConfigError: An option is wrong.
        StoreFull: The memory cannot be reserved.
    """
    ticket = _creating.ticket()
    try:
        ticket.acquire()
        owner = _stores.get(place)
        if owner is None or owner.closed:
            created = Store(**_own(options))
            if owner is None:
                log.warning(
                    "store %r is private to this process: no other process sees its sessions, and they end with the "
                    "process: %s", place.name, why,
                )  # fmt: skip
                if "snapshot" in options:
                    log.warning("store %r: the option snapshot has no effect on a private store", place.name)
            owner = _stores[place] = created
        return _Connected(owner)
    finally:
        ticket.release()


def connect(place: Location, why: str) -> Store:
    """
    Return the store of this process with that name.

    Args:
        place: The name of the store.
        why: The reason why processes cannot share it.

    Raises:
        StoreUnavailable: This process has not created it.
    """
    owner = _stores.get(place)
    if owner is None or owner.closed:
        raise StoreUnavailable(f"this process has no store {place.name!r}, and can use no other process' store: {why}")
    return _Connected(owner)


def options(place: Location) -> Mapping[str, Any] | None:
    """Return the options that the store of that name was given; None if this process has not created it."""
    owner = _stores.get(place)
    return None if owner is None or owner.closed else owner.options.given


def change(place: Location, options: Mapping[str, Any]) -> None:
    """Make these the options of a store, all others defaults. Its memory is replaced if its size changes."""
    owner, checked = _stores[place], Options.of(**_own(options))
    if checked.geometry != owner.arena.geometry:
        owner.move(checked.geometry)
    owner.change_options(checked)


def end(place: Location) -> None:
    """End the store of this process with that name, and its sessions."""
    if place in _stores:
        _stores[place].close()


def _own(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _SHARED_ONLY}
