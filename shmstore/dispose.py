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

from shmstore.arena import Arena
from shmstore.cells import (
    CLEARED,
    CORRUPT,
    DESTROYED,
    DISPOSE_ERRORS,
    DISPOSES,
    DISPOSES_ON_SET,
    EVICTED,
    EVICTED_OWNED,
    EXPIRED,
)
from shmstore.errors import SerializationError
from shmstore.options import Options, seconds
from shmstore.record import Codec, Record, unpack
from shmstore.sealed import body_of

__all__ = ["Disposal", "Due", "inside", "refuse_inside"]

log = logging.getLogger("shmstore")

_REASONS: Final = {
    DESTROYED: "destroy", EXPIRED: "expire", EVICTED: "evict", EVICTED_OWNED: "evict", CLEARED: "clear",
}  # fmt: skip

_inside = threading.local()  # `dispose`: whether this thread is inside one

T = TypeVar("T")


class Due(Exception):
    """A dispose must be called before the lock is taken again: for ``slot`` if it still has this ``version``."""

    def __init__(self, slot: int, version: int, reason: str) -> None:
        super().__init__(slot, version, reason)
        self.slot, self.version, self.reason = slot, version, reason


class _Promises(threading.local):
    """
    Slots and versions for which this thread has called dispose, so that it must drop them.

    No other thread must: what one is about to overwrite or to destroy is no room for another.
    """

    def __init__(self) -> None:
        self.made: set[tuple[int, int]] = set()


class Disposal:
    """Drops sessions from an arena, each after its dispose if the options of the store have one."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._one_at_a_time = threading.RLock()  # held from a dispose to the drop that it announces
        self._promises = _Promises()

    def drop(self, slot: int, count: int, buried: int = 0) -> None:
        """
        Drop a session, see `Arena.drop`. Called with the lock.

        Raises:
            Due: Its dispose comes first.
        """
        if self._arena.cells[DISPOSES]:
            self._announce(slot, _REASONS[count])
        self._arena.drop(slot, count, buried)

    def overwrite(self, slot: int) -> None:
        """Go on if a session may be overwritten. Called with the lock; raises as `drop`."""
        if self._arena.cells[DISPOSES_ON_SET]:
            self._announce(slot, "set")

    def _announce(self, slot: int, reason: str) -> None:
        version = self._arena.cells[self._arena.version + slot]
        if (slot, version) not in self._promises.made:
            raise Due(slot, version, reason)

    def promised(self, keep: int) -> int:
        """Return a slot that was promised to go, other than ``keep``; 0: none. Called with the lock."""
        versions = self._arena.version
        for slot, version in self._promises.made:
            if slot != keep and self._arena.cells[versions + slot] == version:
                return slot
        return 0

    def carry_out(self, due: Due, attempt: Callable[[], T], options: Options, codec: Codec) -> T:
        """Call dispose, and make the attempt that was interrupted for it again, until it is through."""
        with self._one_at_a_time:
            try:
                while True:
                    self._call(due, options, codec)
                    try:
                        return attempt()
                    except Due as next_due:
                        due = next_due
            finally:
                self._promises.made.clear()

    def _call(self, due: Due, options: Options, codec: Codec) -> None:
        cells = self._arena.cells
        entry = self._arena.at(due.slot, seconds(options.lock_timeout))
        if cells[self._arena.version + due.slot] != due.version:
            return  # it has changed since: the next attempt will see as what
        if entry is not None and options.dispose is not None:
            try:
                record = unpack(body_of(entry[4]))
            except SerializationError:
                cells[CORRUPT] += 1
            else:
                _inside.dispose = True
                try:
                    options.dispose(record.sid, _session(record, codec), due.reason)
                except Exception:
                    cells[DISPOSE_ERRORS] += 1
                    log.exception("dispose raised an exception; the session goes all the same")
                finally:
                    _inside.dispose = False
        self._promises.made.add((due.slot, due.version))


def _session(record: Record, codec: Codec) -> dict[Any, Any] | None:
    try:
        return codec.decode(record.payload) if record.codec_name == codec.name else None
    except SerializationError:
        return None


def inside() -> bool:
    """Return whether this thread is inside a dispose, where the store may be read but not written to."""
    return getattr(_inside, "dispose", False)


def refuse_inside() -> None:
    """
    Refuse what a dispose wants to write: it would wait for itself, or not know how often it is called.

    Raises:
        RuntimeError: This thread is inside a dispose.
    """
    if inside():
        raise RuntimeError("dispose must not write to the store: let a thread or a queue do so afterwards")
