"""Calling ``dispose`` before a session goes: without the lock, on the record as it then goes.

Whoever is about to drop a session holds the lock, under which nothing foreign may run. So the attempt ends with `Due`,
the lock is let go of, dispose is called, and the attempt is made again: it drops the session if that is still the one
dispose was called for, else asks again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from shmstore.codec.body import Codec, Record, unpack
from shmstore.engine.arena import Arena
from shmstore.engine.frame import body_of
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
from shmstore.errors import SerializationError, outline
from shmstore.options import Dispose, Options, seconds
from shmstore.system.greenlet_lock import GreenletLock
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

__all__ = ["Disposal", "Due", "announce", "inside", "refuse_inside"]

log = logging.getLogger("shmstore")

_REASONS: Final = {
    DESTROYED: "destroy", EXPIRED: "expire", EVICTED: "evict", EVICTED_OWNED: "evict", DISPLACED: "evict",
    CLEARED: "clear",
}  # fmt: skip


class _Inside(threading.local):
    dispose = False  # whether this thread is inside one


_inside = _Inside()

T = TypeVar("T")

Promise = tuple[int, int, int]  # a slot, its version, and the epoch of the arena: other sessions come with another file


class Due(Exception):
    """
    A dispose must be called before the lock is taken again: for ``slot`` if it is still as ``promise`` says.

    ``displaced``: the session goes because its owner has too many.
    """

    def __init__(self, slot: int, promise: Promise, reason: str, *, displaced: bool = False) -> None:
        super().__init__(slot, promise, reason)
        self.slot, self.promise, self.reason, self.displaced = slot, promise, reason, displaced


class _Promises(threading.local):
    """
    The slots for which this thread has called dispose, so that it must drop them.

    No other thread must: what one is about to overwrite or to destroy is no room for another.
    """

    def __init__(self) -> None:
        self.made: set[Promise] = set()


class Disposal:
    """Drops sessions from an arena, each after its dispose if the options of the store have one."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._one_at_a_time = GreenletLock()  # held from a dispose to the drop that it announces
        self._promises = _Promises()
        self._failing = Throttle()

    def drop(self, slot: int, count: int, tombstone: int | None = None) -> None:
        """
        Drop a session, see `Arena.drop`. Called with the lock.

        Raises:
            Due: Its dispose comes first.
        """
        if self._arena.cells[DISPOSES]:
            self._announce(slot, _REASONS[count], displaced=count == DISPLACED)
        self._arena.drop(slot, count, tombstone)

    def overwrite(self, slot: int) -> None:
        """Go on if a session may be overwritten. Called with the lock; raises as `drop`."""
        if self._arena.cells[DISPOSES_ON_SET]:
            self._announce(slot, "set")

    def _announce(self, slot: int, reason: str, *, displaced: bool = False) -> None:
        promise = self._promise(slot)
        if promise not in self._promises.made:
            raise Due(slot, promise, reason, displaced=displaced)

    def promised(self, keep: int) -> int:
        """Return a slot that was promised to go, other than ``keep``; 0: none. Called with the lock."""
        for promise in self._promises.made:
            slot, _, epoch = promise
            if slot != keep and epoch == self._arena.epoch and promise == self._promise(slot):
                return slot
        return 0

    def _promise(self, slot: int) -> Promise:
        arena = self._arena
        return slot, arena.cells[arena.version + slot], arena.epoch

    def carry_out(self, due: Due, attempt: Callable[[], T], options: Options, codec: Codec) -> T:
        """Call dispose, and make the attempt that was interrupted for it again, until it is through."""
        ticket, made = self._one_at_a_time.ticket(), self._promises.made
        try:
            ticket.acquire()
            try:
                while True:
                    self._call(due, options, codec)
                    try:
                        return attempt()
                    except Due as next_due:
                        due = next_due
            finally:
                made.clear()
        finally:
            ticket.release()

    def _call(self, due: Due, options: Options, codec: Codec) -> None:
        cells = self._arena.cells
        entry = self._arena.at(due.slot, seconds(options.lock_timeout))
        if self._promise(due.slot) != due.promise:
            return  # it has changed since: the next attempt will see as what
        if entry is not None and options.dispose is not None:
            try:
                record = unpack(body_of(entry[4]))
            except SerializationError:
                cells[CORRUPT] += 1
            else:
                if announce(options.dispose, record, codec, due.reason, self._arena.label, self._failing):
                    cells[DISPOSE_ERRORS] += 1
        self._promises.made.add(due.promise)


def announce(dispose: Dispose, record: Record, codec: Codec, reason: str, label: str, failing: Throttle) -> bool:
    """Call a dispose; return whether it raised, which is logged and stops nothing."""
    try:
        _inside.dispose = True
        dispose(record.sid, _session(record, codec), reason)
    except Exception as exc:
        pass_on_interruption(exc)
        if times := failing.due():
            log.error("%s: dispose raised %d times; the sessions go all the same: %s", label, times, outline(exc))  # noqa: TRY400
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
    Refuse what a dispose wants to write: it would wait for itself, or not know how often it is called.

    Raises:
        RuntimeError: This thread is inside a dispose.
    """
    if _inside.dispose:
        raise RuntimeError("dispose must not write to the store: let a thread or a queue do so afterwards")
