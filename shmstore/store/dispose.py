"""Calls ``dispose`` before a session is removed: without the lock, and with the current record.

A caller that is about to remove a session holds the lock, under which no application code may run. So its attempt ends
with `DisposeRequired`, the lock is released, dispose is called, and the attempt is repeated. It removes the session if
the session has not changed since the call; otherwise it ends with `DisposeRequired` again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from shmstore.callbacks import Dispose
from shmstore.codec.body import Codec, Record, unpack
from shmstore.engine.arena import Arena
from shmstore.engine.frame import body_of
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.engine.header import (
    CLEARED,
    CORRUPT,
    DESTROYED,
    DISPLACED,
    DISPOSE_ERRORS,
    DISPOSES,
    DISPOSES_ON_SET,
    EVICTED,
    EVICTED_OWNED,
    EXPIRED,
)
from shmstore.errors import SerializationError, safe_traceback
from shmstore.options import Options, seconds
from shmstore.system.blocking import before_blocking
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

__all__ = ["Disposal", "DisposeRequired", "announce", "inside", "refuse_inside"]

log = logging.getLogger("shmstore")

_REASONS: Final = {
    DESTROYED: "destroy", EXPIRED: "expire", EVICTED: "evict", EVICTED_OWNED: "evict", DISPLACED: "evict",
    CLEARED: "clear",
}  # fmt: skip


class _Inside(threading.local):
    dispose = False  # whether this thread is inside a call of dispose


_inside = _Inside()

T = TypeVar("T")

Pending = tuple[Arena, int, int]  # a session that is about to be removed: its arena, slot and version


class DisposeRequired(Exception):
    """
    The dispose of the pending session must be called before the lock is taken again.

    Attributes:
        pending: The session.
        reason: The reason that is passed to dispose.
        displaced: Whether the session is removed because its owner has more than ``max_per_owner``.
    """

    def __init__(self, pending: Pending, reason: str, *, displaced: bool = False) -> None:
        super().__init__(pending, reason)
        self.pending, self.reason, self.displaced = pending, reason, displaced


class _Announced(threading.local):
    """
    The sessions for which this thread has called dispose, so that it must remove them.

    Other threads must not remove them: space that one thread is about to free is not available to another.
    """

    def __init__(self) -> None:
        self.pending: set[Pending] = set()


class Disposal:
    """Removes sessions from an arena, each after its dispose if the options of the store have one."""

    def __init__(self) -> None:
        self._one_at_a_time = GreenletLock()  # held from a dispose to the removal that it announces
        self._announced = _Announced()
        self._failing = Throttle()

    def drop(self, arena: Arena, slot: int, count: int, tombstone: int | None = None) -> None:
        """
        Remove a session, see `Arena.drop`. Called with the lock.

        Raises:
            DisposeRequired: The session's dispose must be called first.
        """
        if arena.file.cells[DISPOSES]:
            self._require(arena, slot, _REASONS[count], displaced=count == DISPLACED)
        arena.drop(slot, count, tombstone)

    def overwrite(self, arena: Arena, slot: int) -> None:
        """Return if a session may be overwritten. Called with the lock; raises as `drop`."""
        if arena.file.cells[DISPOSES_ON_SET]:
            self._require(arena, slot, "set")

    def _require(self, arena: Arena, slot: int, reason: str, *, displaced: bool = False) -> None:
        pending = _pending(arena, slot)
        if pending not in self._announced.pending:
            raise DisposeRequired(pending, reason, displaced=displaced)

    def announced(self, arena: Arena, keep: int) -> int:
        """Return a slot other than ``keep`` whose dispose was called, or 0. Called with the lock."""
        for pending in self._announced.pending:
            of, slot, _ = pending
            if slot != keep and of is arena and pending == _pending(arena, slot):
                return slot
        return 0

    def carry_out(self, required: DisposeRequired, attempt: Callable[[], T], options: Options, codec: Codec) -> T:
        """Call dispose, and repeat the attempt that was stopped for it until it succeeds."""
        before_blocking()  # the call would be repeated in a thread, and so would dispose
        ticket, announced = self._one_at_a_time.ticket(), self._announced.pending
        try:
            ticket.acquire()
            try:
                while True:
                    self._call(required, options, codec)
                    try:
                        return attempt()
                    except DisposeRequired as another:
                        required = another
            finally:
                announced.clear()
        finally:
            ticket.release()

    def _call(self, required: DisposeRequired, options: Options, codec: Codec) -> None:
        arena, slot, _ = required.pending
        entry = arena.reader.at(slot, seconds(options.lock_timeout))
        if _pending(arena, slot) != required.pending:
            return  # the session has changed in the meantime: the next attempt decides again
        if entry is not None and options.dispose is not None:
            try:
                record = unpack(body_of(entry[4]))
            except SerializationError:
                arena.counters.add(CORRUPT)
            else:
                if announce(options.dispose, record, codec, required.reason, arena.label, self._failing):
                    arena.counters.add(DISPOSE_ERRORS)
        self._announced.pending.add(required.pending)


def _pending(arena: Arena, slot: int) -> Pending:
    return arena, slot, arena.file.cells[arena.table.version + slot]


def announce(dispose: Dispose, record: Record, codec: Codec, reason: str, label: str, failing: Throttle) -> bool:
    """Call a dispose; return whether it raised. An exception is logged, and the session is removed anyway."""
    try:
        _inside.dispose = True
        dispose(record.sid, _session(record, codec), reason)
    except Exception as exc:
        pass_on_interruption(exc)
        if times := failing.due():
            text = safe_traceback(exc)
            log.error("%s: failed calls of dispose: %d; the sessions are removed anyway: %s", label, times, text)  # noqa: TRY400
        return True
    finally:
        _inside.dispose = False
    return False


def _session(record: Record, codec: Codec) -> dict[Any, Any] | None:
    try:
        return codec.readable(record.payload) if record.codec_name == codec.name else None
    except SerializationError:
        return None


def inside() -> bool:
    """Return whether this thread is inside a dispose, where the store may be read but not written to."""
    return _inside.dispose


def refuse_inside() -> None:
    """
    Refuse a write from inside a dispose: it could deadlock, and a repeated dispose would repeat it.

    Raises:
        RuntimeError: This thread is inside a dispose.
    """
    if _inside.dispose:
        raise RuntimeError("dispose must not write to the store: let a thread or a queue do so afterwards")
