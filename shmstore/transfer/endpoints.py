"""The ends of a copy on this host: a store in shared memory, a file that is read, a file that is written."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Final, Self

from shmstore.codec.body import unpack
from shmstore.contract import ArenaStore
from shmstore.engine.frame import Key, body_of, head_of, seal
from shmstore.engine.header import HAS_WEIGHTS, MAX, MAX_PER_OWNER, NEVER, WEIGHT
from shmstore.engine.layout import TOMBSTONE_TTL
from shmstore.engine.rebuild import fitting
from shmstore.errors import SnapshotError
from shmstore.options import seconds
from shmstore.system.clock import boottime_ns
from shmstore.transfer.copy import COPIED, CROWDED, FULL, SKIPPED, Found, Moving, is_newer
from shmstore.transfer.snapshot_file import Progress, Saved, Writer, replacing

__all__ = ["File", "InMemory", "Snapshot"]

_CHECKED: Final = 100  # keys that are looked for in one hold of the lock
_LOCKED: Final = 16  # records that are written in one
_PAUSE: Final = 0.0005  # seconds, in which others have the processor


def _place_of(path: str | None) -> frozenset[object]:
    with suppress(OSError, TypeError):
        status = os.stat(path)  # type: ignore[arg-type] # None is a TypeError
        return frozenset({(status.st_dev, status.st_ino)})
    return frozenset()


# -- in shared memory ----------------------------------------------------------------------------------------------


Held = ArenaStore


class InMemory:
    """The sessions of a store in shared memory: a `Source` and a `Sink`. Those that come are the most recently used."""

    def __init__(self, store: Held, label: str) -> None:
        self.label = label
        self._arena, self._options = store.arena, store.options
        clock = store.options.clock
        self._shift = 0 if clock is boottime_ns else clock() - boottime_ns()
        self._timeout = seconds(store.options.lock_timeout)
        self.codec: str | None = store.codec.name
        self.limit = store.options.session_limit
        self.places = _place_of(self._arena.file.path) or frozenset({id(self._arena)})

    def survey(self, progress: Progress) -> list[Found]:
        arena = self._arena
        return [self._found(slot) for slot in reversed(arena.table.live_slots()) if self._lives(slot)]

    def _lives(self, slot: int) -> bool:
        return self._arena.cells[self._arena.table.expires + slot] > self._now()

    def _now(self) -> int:
        return boottime_ns() + self._shift

    def _found(self, slot: int) -> Found:
        arena, cells = self._arena, self._arena.cells
        return Found(
            arena.table.key_at(slot), cells[arena.table.record + slot] >> 32, 1, cells[arena.table.owner + slot]
        )

    def read(self, wanted: Sequence[Found]) -> list[Moving]:
        arena, sessions = self._arena, []
        for each in wanted:
            entry = arena.reader.read(each.key, self._timeout)  # it does not count as use
            if entry is None:
                continue
            slot, _, expires, (_, weight, low, high, owner, created), sealed = entry
            if expires > self._now():
                shift = self._shift
                used = min(arena.cells[arena.table.used + slot], self._now()) - shift
                ends = NEVER if expires >= NEVER else expires - shift
                sessions.append(Moving((low, high), owner, weight, body_of(sealed), created - shift, used, ends))
        return sessions

    def choose(self, found: Sequence[Found]) -> dict[Key, str]:
        arena, known = self._arena, self._known(found)
        new = [each for each in reversed(found) if each.key not in known]
        refused: dict[Key, str] = {}
        if most := arena.cells[MAX_PER_OWNER]:
            owned, allowed = Counter(arena.table.column(arena.table.owner, arena.table.used_slots())), []
            for each in new:
                if each.owner and owned[each.owner] >= most:
                    refused[each.key] = CROWDED
                else:
                    owned[each.owner] += 1
                    allowed.append(each)
            new = allowed
        weight = 1 if self._options.length is None else 0  # what that says is known when it comes to them
        room = fitting(arena, ((each.size, weight) for each in new), scattered=True)
        return refused | {each.key: FULL for each in new[room:]}

    def _known(self, found: Sequence[Found]) -> set[Key]:
        known: set[Key] = set()
        for at in range(0, len(found), _CHECKED):
            try:
                self._arena.lock(self._timeout)
                known.update(each.key for each in found[at : at + _CHECKED] if self._arena.find(each.key))
            finally:
                self._arena.unlock()
        return known

    def put(self, sessions: Sequence[Moving]) -> list[str]:
        arena, outcomes = self._arena, []
        for at in range(0, len(sessions), _LOCKED):
            weighed = [(each, self._weigh(each)) for each in sessions[at : at + _LOCKED]]
            try:
                arena.lock(self._timeout)
                outcomes += [self._put(each, weight, self._now()) for each, weight in weighed]
            finally:
                arena.unlock()
            time.sleep(_PAUSE)
        return outcomes

    def _weigh(self, session: Moving) -> int:
        if self._options.length is None:
            return 1
        record = unpack(session.body)
        return self._options.length(len(record.payload), record.sid)

    def _put(self, session: Moving, weight: int, now: int) -> str:
        arena, cells, owner, shift = self._arena, self._arena.cells, session.owner, self._shift
        slot, beside = arena.find(session.key), 0
        if slot:
            there = arena.reader.under_lock(slot)
            if there is not None and there[2] > now:
                expires = NEVER if there[2] >= NEVER else there[2] - shift
                if not is_newer(session, body_of(there[4]), cells[arena.table.used + slot] - shift, expires):
                    return SKIPPED
            beside = arena.table.weight_at(slot)
        elif arena.reader.tombstone(session.key, now, TOMBSTONE_TTL):
            return SKIPPED
        most, joins = cells[MAX_PER_OWNER], owner and not (slot and cells[arena.table.owner + slot] == owner)
        if most and joins and arena.owned_slots(owner)[0] >= most:
            return CROWDED
        record = seal(session.key, owner, session.created + shift, session.body, weight)
        if not arena.fits(len(record), new=not slot) or (cells[MAX] and cells[WEIGHT] - beside + weight > cells[MAX]):
            return FULL
        if weight != 1:
            cells[HAS_WEIGHTS] = 1
        expires = NEVER if session.expires >= NEVER else session.expires + shift
        arena.publish(slot, session.key, record, owner, expires, now, used=min(max(1, session.used + shift), now))
        return COPIED

    def missing(self, keys: Sequence[Key]) -> set[Key]:
        arena, now = self._arena, self._now()
        return {
            key
            for key in keys
            if arena.reader.read(key, self._timeout) is None and not arena.reader.tombstone(key, now, TOMBSTONE_TTL)
        }


# -- in a file -----------------------------------------------------------------------------------------------------


class Snapshot:
    """The sessions of a snapshot, verified: a `Source`. Time since it was taken counts as life."""

    def __init__(self, path: str, progress: Progress = lambda done, total: None) -> None:
        self.label = path
        self._saved = Saved(path, boottime_ns(), progress)
        self.name = self._saved.contents.store
        self.places = _place_of(path)
        self._records = self._saved.records(())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._saved.__exit__()

    def survey(self, progress: Progress) -> list[Found]:
        found = []
        for sealed, _, _ in self._saved.records(self._saved.alive):
            size, weight, low, high, owner, _ = head_of(sealed)
            found.append(Found((low, high), size, weight, owner))
        self._records = self._saved.records(self._saved.alive)
        return found

    def read(self, wanted: Sequence[Found]) -> list[Moving]:
        sessions: list[Moving] = []
        left = [each.key for each in reversed(wanted)]
        while left:
            sealed, expires, used = next(self._records, (b"", 0, 0))
            if not sealed:
                raise SnapshotError(f"{self.label} has changed while it was read")
            _, weight, low, high, owner, created = head_of(sealed)
            if (low, high) != left[-1]:
                continue  # not wanted
            left.pop()
            if expires > boottime_ns():
                sessions.append(Moving((low, high), owner, weight, body_of(sealed), created, used, expires))
        return sessions


class File:
    """
    A snapshot that is written: a `Sink`. It is a picture of the source, which replaces the one before when it is whole.

    Args:
        path: Where.
        name: Of the store whose it is to be; empty: of none in particular.

    Raises:
        SnapshotError: It cannot be written, or what is there is not to be replaced. It stays.
    """

    codec: str | None = None
    limit = 0

    def __init__(self, path: str, name: str) -> None:
        self.label = path
        self.places = _place_of(path)
        self._path, self._name = os.path.abspath(path), name
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._writer: Writer = self._stack.enter_context(replacing(self._path, self._name))
        self._writer.begin(boottime_ns())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type] # what came is what goes on

    def choose(self, found: Sequence[Found]) -> dict[Key, str]:
        return {}

    def put(self, sessions: Sequence[Moving]) -> list[str]:
        for each in sessions:
            sealed = seal(each.key, each.owner, each.created, each.body, each.weight)
            self._writer.add((0, 0, each.expires, head_of(sealed), sealed), max(1, each.used))
        return [COPIED] * len(sessions)

    def missing(self, keys: Sequence[Key]) -> set[Key]:
        return set()  # it is whole, or not there
