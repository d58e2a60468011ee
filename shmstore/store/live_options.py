"""
Options that change while processes use the store.

`StoreServer.apply` merges and saves them, and `Store.change_options` obeys them and calls `publish`. The numbers among
them are cells of the arena, which each process reads whenever it needs one. The cell `OPTIONS` tells it that functions
and the rest have changed too: `FollowedOptions` reads these from the options file before the next write.

The cells have a copy and a checksum. Both are written before the cells: after an interrupted change the old values are
in force, or the cells are known as damaged. A write compares the ttl with its copy, which takes less time than the
checksum. The cells are used without the lock, whose holder may be stopped.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from shmstore.engine.arena import Arena
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.engine.header import BY_FUNCTION, MAX, NO_TTL, ON, OPTION_CELLS, OPTIONS, OPTIONS_COPY, OPTIONS_SUM
from shmstore.engine.layout import CELL, ArenaDamaged
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.options import Options
from shmstore.store.expiry import nanoseconds
from shmstore.system.clock import boottime_ns
from shmstore.system.signals import pass_on_interruption, suppressing

if TYPE_CHECKING:
    from shmstore.store.holder import ArenaHolder

__all__ = ["FollowedOptions", "OptionsDamaged", "are_damaged", "check", "copy", "publish"]

log = logging.getLogger("shmstore")

_COUNT: Final = OPTION_CELLS.stop - OPTION_CELLS.start
_PAUSE: Final = 1.0  # seconds between attempts to read new options


class OptionsDamaged(ArenaDamaged):
    """The cells of the options are damaged."""


def publish(arena: Arena, options: Options) -> None:
    """Write the options to the cells that every process reads. Called by the server only."""
    arena.cells[OPTIONS] = boottime_ns()  # first: a process that sees one of those below can read the others
    ttl = NO_TTL if options.ttl is None else BY_FUNCTION if callable(options.ttl) else nanoseconds(options.ttl)
    disposes = ON if options.dispose is not None else 0
    _write(
        arena,
        options.max or 0,
        nanoseconds(options.recency),
        ttl,
        min(options.session_limit, arena.geometry.largest_session),
        options.max_per_owner or 0,
        ON if options.stale else 0,
        disposes,
        0 if options.no_dispose_on_set else disposes,
    )


def copy(arena: Arena, other: Arena) -> None:
    """Give another arena the published options of this one. What is damaged remains known as damaged."""
    for published in OPTION_CELLS, slice(OPTIONS_COPY, OPTIONS_SUM + 1):
        other.cells[published] = arena.cells[published]


def _write(arena: Arena, *values: int) -> None:
    # In this order: a server that is killed in between leaves the old values, or the new ones, or cells that are known
    # as damaged until the next server publishes its options.
    cells = arena.file.cells
    for cell, value in enumerate(values, OPTIONS_COPY):
        cells[cell] = value
    cells[OPTIONS_SUM] = _sum_of(arena, OPTIONS_COPY)
    for cell, value in enumerate(values, MAX):
        cells[cell] = value


# -- damage --------------------------------------------------------------------------------------------------------


def are_damaged(arena: Arena) -> bool:
    """Return whether the cells differ from the values that were published."""
    known = arena.file.cells[OPTIONS_SUM]
    return bool(known) and _sum_of(arena, MAX) != known


def check(arena: Arena) -> None:
    """
    Verify the cells before an irreversible step that depends on them.

    Raises:
        OptionsDamaged: The cells are damaged.
    """
    if are_damaged(arena):
        raise OptionsDamaged("an option")


def _sum_of(arena: Arena, first: int) -> int:
    return zlib.crc32(arena.file.memory[first * CELL : (first + _COUNT) * CELL])


# -- the options of another process --------------------------------------------------------------------------------


class FollowedOptions:
    """
    The options of a store whose server may change them, in a process that follows.

    Args:
        arena: The memory of the store.
        read: Returns the options that the server has saved, and their serializer as it was saved.
        read_serializer: Returns the serializer alone.

    Attributes:
        applied: What the cell `OPTIONS` contained when this process read the options that it obeys.
        first: The options at the beginning.

    Raises:
        ConfigError, OSError: The options cannot be read.
    """

    def __init__(
        self, arena: Arena, read: Callable[[], tuple[Options, str | None]], read_serializer: Callable[[], str | None]
    ) -> None:
        self.applied: int = arena.file.cells[OPTIONS]  # before they are read: a change meanwhile is noticed
        self.first, self._serializer = read()
        self._read, self._read_serializer = read, read_serializer
        self._refreshing = GreenletLock()
        self._not_applied = 0  # options that could not be read
        self._next_attempt = 0.0
        self._unreadable = ""  # why nothing can be read or written under the options of the store

    def refresh(self, store: ArenaHolder) -> bool:
        """
        Apply the options of the store if they have changed; return whether they had.

        Raises:
            StoreUnavailable: The store has another serializer, which this process cannot read.
        """
        changed = store.arena.file.cells[OPTIONS]
        if changed == self.applied:
            return False
        ticket = self._refreshing.ticket()  # another thread must not continue with the old options meanwhile
        try:
            ticket.acquire()
            if changed == self.applied:
                return True
            if changed != self._not_applied or time.monotonic() >= self._next_attempt:
                try:
                    options, serializer = self._read()
                    store.apply_options(options)
                except (ConfigError, OSError) as exc:
                    pass_on_interruption(exc)
                    if changed != self._not_applied:
                        log.warning("%s has new options that this process cannot follow: %s", store.label, exc)
                    with suppressing(ConfigError, OSError):
                        self._unreadable = str(exc) if self._read_serializer() != self._serializer else ""
                    self._not_applied, self._next_attempt = changed, time.monotonic() + _PAUSE
                else:
                    self.applied, self._serializer, self._unreadable = changed, serializer, ""
                    return True
            if self._unreadable:
                # This process and the others cannot read each other's sessions.
                raise StoreUnavailable(f"{store.label} has another serializer now: {self._unreadable}")
            return False
        finally:
            ticket.release()
