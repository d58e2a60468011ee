"""
What a store works on: its arena, replaced, repaired and locked here, and the options that it obeys.

The tasks of the arena's owner, which is this process or a server, are the `Upkeep` of a store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from shmstore.codec.body import DEFAULT_CODEC, Codec, log_unreadable
from shmstore.engine.arena import Arena
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.engine.header import CORRUPT, REBUILDS, STATE
from shmstore.engine.layout import ArenaDamaged, Geometry
from shmstore.engine.mapping import ArenaReplaced
from shmstore.errors import StoreFull, StoreUnavailable
from shmstore.options import Options, seconds
from shmstore.store import live_options
from shmstore.store.dispose import Disposal, DisposeRequired, refuse_inside
from shmstore.store.eviction import Eviction
from shmstore.store.rebuild import rebuild
from shmstore.system.throttle import Throttle

__all__ = ["ArenaHolder", "Remote", "Upkeep", "reopen"]

log = logging.getLogger("shmstore")

_TIMEOUT = 5.0  # seconds to wait for a process that is replacing a file

P = ParamSpec("P")
T = TypeVar("T")


Remote = tuple[str, dict[str, Any]]
"""A method of the contract, and its arguments."""


class ArenaHolder:
    """
    Holds the arena of a store. An arena is immutable in what it maps: when it was replaced, this holds another one.
    """

    def __init__(self, arena: Arena, options: Options, upkeep: Upkeep, disposal: Disposal | None = None) -> None:
        self._upkeep = upkeep  # what the owner of the arena does for this store
        # It may have been replaced: the property `arena` checks that. Reads and the lock check it themselves.
        self._arena = arena
        self.apply_options(options)
        self._disposal = disposal or Disposal()  # removes sessions, each after its dispose
        self._eviction = Eviction(self._disposal)
        self._reattaching = GreenletLock()  # held while the arena is replaced by another object
        self._repairs, self._no_room = Throttle(), Throttle()

    @property
    def arena(self) -> Arena:
        """
        The memory that holds the sessions now.

        Raises:
            StoreUnavailable: The store was closed, or has ended.
        """
        if self._arena.file.cells[STATE]:
            self.reattach()
        return self._arena

    @property
    def options(self) -> Options:
        return self._options

    @property
    def codec(self) -> Codec:
        return self._codec

    @property
    def label(self) -> str:
        return self._arena.label

    def apply_options(self, options: Options) -> None:
        """Obey these options in this object."""
        self._options = options
        self._codec = self._make_codec()
        self._clock = options.clock
        self._timeout = seconds(options.lock_timeout)  # of the arena's lock

    def _make_codec(self) -> Codec:
        codec = Codec(self._options.serializer, partial(_count_unreadable, self._arena))
        self._usual = codec.name == DEFAULT_CODEC and self._options.length is None  # what the core can write alone
        return codec

    def _locked(
        self, arena: Arena, step: Callable[Concatenate[Arena, int, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Take the lock, call a step with the arena and the time, and log what it has evicted."""
        try:
            arena.lock(self._timeout)
            done = step(arena, self._clock(), *args, **kwargs)  # not before: while waiting a session may have expired
        finally:
            arena.unlock()
        if self._eviction.evicted or self._eviction.displaced:
            self._eviction.report(arena)
        return done

    # -- another arena -----------------------------------------------------------------------------------------------

    def adopt(self, arena: Arena) -> None:
        """Continue on another arena, which has the sessions now. Reads in progress finish on the old one."""
        self._arena = arena
        self._codec = self._make_codec()

    def reattach(self) -> None:
        """
        Continue on the arena that has taken the place of this one, unless another thread has done so.

        Raises:
            StoreUnavailable: There is no such arena.
        """
        ticket = self._reattaching.ticket()
        try:
            ticket.acquire()
            if self._arena.file.cells[STATE]:
                self.adopt(self._upkeep.reopen(self))
        finally:
            ticket.release()

    def repair(self, arena: Arena, damage: ArenaDamaged, progress: Callable[[int], object] = lambda _: None) -> None:
        """
        Publish damaged options again, or carry all undamaged sessions over to another file. Only the owner may do this.

        Damage is found while a mutation is planned, so nothing has been changed.

        Args:
            arena: Where the damage was found. Nothing is done if another thread has repaired it.
            damage: What was found.
            progress: Called now and then with how many sessions were carried over.

        Raises:
            StoreFull: There is no room for another file.
        """
        lost = 0
        ticket = self._reattaching.ticket()
        try:
            ticket.acquire()
            if self._arena is not arena:
                return
            if live_options.are_damaged(arena):
                # From this object's options: the arena's copy may be damaged too.
                live_options.publish(arena, self._options)
            elif isinstance(damage, live_options.OptionsDamaged):
                return
            else:
                try:
                    lost = rebuild(arena, self.adopt, None, self._timeout, progress, self._clock)
                except StoreFull as error:
                    if self._no_room.due():
                        log.error(  # noqa: TRY400
                            "%s: its memory is damaged (%s), and the repair needs room for a second file: %s",
                            self.label, damage, error,
                        )  # fmt: skip
                    raise StoreFull(
                        f"the memory of the store is damaged ({damage}), and the repair needs room for a second file: "
                        f"{error}"
                    ) from error
            self._arena.counters.add(REBUILDS)
        finally:
            ticket.release()
        if lost or self._repairs.due():
            log.error("%s: its memory was damaged (%s): %d sessions are lost", self.label, damage, lost)

    def move(self, geometry: Geometry | None = None, progress: Callable[[int], object] = lambda _: None) -> int:
        """
        Carry the sessions over to another file at the path of the store. Only the owner may do this.

        Args:
            geometry: The size of that file; None: that of the present one.
            progress: Called now and then with how many sessions were carried over.

        Returns:
            How many sessions stayed behind.

        Raises:
            StoreFull: The memory for another file cannot be reserved. Nothing has changed.
            StoreUnavailable: The other file cannot take the place of this one. Nothing has changed.
        """
        ticket = self._reattaching.ticket()
        try:
            ticket.acquire()
            return rebuild(self._arena, self.adopt, geometry, self._timeout, progress, self._clock)
        finally:
            ticket.release()

    def check_options(self) -> None:
        """Repair the published options if they are damaged. Called now and then, without the lock."""
        arena = self.arena
        try:
            live_options.check(arena)
        except live_options.OptionsDamaged as damage:
            self._upkeep.repair(self, arena, damage)


class Upkeep:
    """The tasks that a store leaves to the owner of its arena. Here it is this process; a subclass is for another."""

    def reopen(self, store: ArenaHolder) -> Arena:
        """
        Return the arena that has replaced the store's arena.

        Raises:
            StoreUnavailable: No arena has replaced it.
        """
        return reopen(store._arena.file.path)

    def repair(self, store: ArenaHolder, arena: Arena, damage: ArenaDamaged) -> None:
        """
        Restore damaged options, or have all undamaged sessions carried over to another file.

        Raises:
            StoreUnavailable: The arena cannot be repaired now.
        """
        store.repair(arena, damage)

    def dispose(
        self, store: ArenaHolder, required: DisposeRequired, attempt: Callable[[], T], remote: Remote | None
    ) -> T:
        """
        Have dispose called, and complete the step that was stopped for this.

        Args:
            store: The store.
            required: The session, and the reason.
            attempt: Repeats the step.
            remote: The call to the server that replaces the step; None: the server only removes the session.
        """
        return store._disposal.carry_out(required, attempt, store.options, store.codec)

    def refresh_options(self, store: ArenaHolder) -> bool:
        """Apply the options of the store if they have changed; return whether they had."""
        return False

    def before_write(self, store: ArenaHolder) -> None:
        """
        Prepare for a write. Called without the lock.

        Raises:
            RuntimeError: This thread is inside a dispose, see `refuse_inside`.
        """
        refuse_inside()


def reopen(path: str | None) -> Arena:
    """
    Return the arena that has replaced the previous one at ``path``.

    Raises:
        StoreUnavailable: No arena has replaced it.
    """
    if path is None:
        raise StoreUnavailable("the store is no longer in use")
    while True:
        try:
            arena = Arena.open(path)
        except (FileNotFoundError, ArenaDamaged) as error:
            raise StoreUnavailable(f"{path} was removed or replaced, and there is no other store") from error
        if not arena.cells[STATE]:
            return arena
        # Another process is replacing this file too, or died while it did. With the lock this is known.
        try:
            arena.lock(_TIMEOUT)
        except ArenaReplaced:
            arena.close()
        except BaseException:
            arena.close()
            raise
        finally:
            arena.unlock()


def _count_unreadable(arena: Arena, key: object, error: BaseException) -> None:
    """Count and log a value that cannot be read."""
    arena.counters.add(CORRUPT)
    log_unreadable(arena.label, key, error)
