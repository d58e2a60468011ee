"""A store on a Redis or Valkey server as one end of a copy: many sessions in a round trip, each in one step."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from redis.exceptions import OutOfMemoryError

from shmstore.engine.frame import OVERHEAD, Key
from shmstore.engine.header import NEVER
from shmstore.errors import StoreUnavailable
from shmstore.redis.engine import is_wrong_type
from shmstore.redis.routes import Command
from shmstore.redis.scripts import REPLACE, Script
from shmstore.redis.store import RedisStore
from shmstore.redis.value import FOREVER, HEAD, NO_OWNER, Value, index_until, new_tag, parse
from shmstore.system.clock import boottime_ns
from shmstore.transfer.copy import COPIED, FULL, SKIPPED, Found, Moving, is_newer
from shmstore.transfer.snapshot_file import Progress

__all__ = ["OnServer"]

_MICRO: Final = 1000  # ns
_KEY: Final = struct.Struct("<QQ")

ADD: Final = Script.of("""
-- session, tombstone; value, how long it lives (ms; 'never')
-- 1: done; 0: there is one, or was until a moment ago
if redis.call('EXISTS', KEYS[1], KEYS[2]) > 0 then return 0 end
if ARGV[2] == 'never' then redis.call('SET', KEYS[1], ARGV[1])
else redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return 1
""")


class OnServer:
    """
    The sessions of a store on a server: a `shmstore.transfer.copy.Source` and a `Sink`.

    For the server reading one is a use: they are read in the order of their use, so that stays the same.
    """

    codec: str | None = None  # each record says what wrote it, and what the application reads is not known here
    limit = 0

    def __init__(self, store: RedisStore, prefix: str) -> None:
        self.label = store.label
        self._link, self._engine, self._prefix = store._link, store._engine, prefix
        self._shift = self._link.now() * _MICRO - boottime_ns()
        self.places = self._whereabouts()

    def _whereabouts(self) -> frozenset[object]:
        database = b"0"
        with suppress(StoreUnavailable):  # a user may be forbidden to ask: then two ways to it are not recognised
            if not self._link.cluster:
                said = dict(each.partition(b"=")[::2] for each in self._link.read("CLIENT", "INFO").split())
                database = said[b"db"]
            runs = [server["run_id"] for server in self._link.info()]
            return frozenset((run, database, self._prefix) for run in runs)
        return frozenset()

    # -- from there ------------------------------------------------------------------------------------------------

    def survey(self, progress: Progress) -> list[Found]:
        found: list[tuple[int, Found]] = []
        try:
            for page in self._engine.pages():
                progress(0, 0)
                commands: list[Command] = []
                for name in page:
                    commands += [("GETRANGE", name, 0, HEAD.size), ("STRLEN", name)]
                answers = iter(self._link.many(commands, again=True))
                for name, head, length in zip(page, answers, answers, strict=True):
                    value = parse(head)
                    if value is not None:
                        size = int(length) - HEAD.size + OVERHEAD
                        found.append((value.used, Found(self._key(name), size, 1, int.from_bytes(value.owner))))
        except ValueError:
            raise StoreUnavailable(
                f"{self.label} has a key that no store has written; give each store a prefix of its own"
            ) from None
        found.sort()
        return [each for _, each in found]

    def _key(self, name: str) -> Key:
        digest = bytes.fromhex(name[len(self._prefix) + 1 : -1])
        if len(digest) != _KEY.size:
            raise ValueError(name)
        low, high = _KEY.unpack(digest)
        return low, high

    def read(self, wanted: Sequence[Found]) -> list[Moving]:
        values = self._engine.read_all(self._engine.key(each.key) for each in wanted)
        return [
            Moving(
                each.key,
                int.from_bytes(value.owner),
                each.weight,
                value.body,
                self._here(value.created),
                self._here(value.used),
                self._ends(value),
            )
            for each, value in zip(wanted, values, strict=True)
            if value is not None and self._ends(value) > boottime_ns()
        ]

    def _here(self, micros: int) -> int:
        """Return a time of the server's clock by the clock of this process."""
        return micros * _MICRO - self._shift

    def _ends(self, value: Value) -> int:
        return NEVER if value.deadline >= FOREVER else self._here(value.deadline)

    def _there(self, time: int) -> int:
        return max(0, -(-(time + self._shift) // _MICRO))  # no part of a microsecond lost

    # -- to there --------------------------------------------------------------------------------------------------

    def choose(self, found: Sequence[Found]) -> dict[Key, str]:
        return {}  # how much finds room is the server's knowledge

    def put(self, sessions: Sequence[Moving]) -> list[str]:
        """Raises `StoreUnavailable` if the server fails; that it is full is an answer."""
        names = [self._engine.key(each.key) for each in sessions]
        stored = self._engine.read_all(names)
        outcomes, writes = [SKIPPED] * len(sessions), {}
        indexed: list[tuple[bytes, str, int]] = []
        for number, (session, name, there) in enumerate(zip(sessions, names, stored, strict=True)):
            if there is not None:
                used = self._here(there.used)
                if not is_newer(session, there.body, used, self._ends(there)):
                    continue
            value, life = self._stored(session)
            if there is None:
                writes[number] = value.tag, ADD.on([name, f"{name}gone"], value.pack(), life)
            else:
                writes[number] = value.tag, REPLACE.on([name], there.tag, value.pack(), life)
            if value.owner != NO_OWNER:  # the index is told first, so who logs out everywhere misses none
                indexed.append((value.owner, name, value.indexed))
        try:
            self._tell(indexed)
            done = self._link.many([command for _, command in writes.values()], again=False)
        except StoreUnavailable as exc:
            if not _is_full(exc):
                raise
            tags = self._link.many([("GETRANGE", names[number], 0, 7) for number in writes], again=True)
            for (number, (tag, _)), there_now in zip(writes.items(), tags, strict=True):
                outcomes[number] = COPIED if there_now == tag else FULL
        else:
            for number, answer in zip(writes, done, strict=True):
                outcomes[number] = COPIED if answer == 1 else SKIPPED  # somebody has been faster, so it is newer there
        return outcomes

    def _tell(self, indexed: Sequence[tuple[bytes, str, int]]) -> None:
        try:
            self._link.many([self._engine._index_command(*each) for each in indexed], again=False)
        except StoreUnavailable as exc:
            if not is_wrong_type(exc):
                raise
            for each in indexed:
                self._engine.add_to_index(*each)

    def _stored(self, session: Moving) -> tuple[Value, str]:
        """Return a session as it is stored, and how long it lives from now on."""
        left = -(-(session.expires - boottime_ns()) // 10**6)
        deadline = FOREVER if session.expires >= NEVER else self._there(session.expires)
        owner, used = session.owner.to_bytes(8), self._there(session.used)
        indexed = 0 if owner == NO_OWNER else index_until(used, deadline)
        value = Value(new_tag(), deadline, used, indexed, self._there(session.created), owner, session.body)
        return value, "never" if deadline >= FOREVER else str(max(left, 1))

    def missing(self, keys: Sequence[Key]) -> set[Key]:
        commands: list[Command] = []
        for key in keys:
            name = self._engine.key(key)
            commands += [("EXISTS", name), ("EXISTS", f"{name}gone")]
        answers = iter(self._link.many(commands, again=True))
        return {key for key, there, gone in zip(keys, answers, answers, strict=True) if not there and not gone}


def _is_full(error: StoreUnavailable) -> bool:
    """Servers before version 7 say it in the error of a script."""
    return isinstance(error.__cause__, OutOfMemoryError) or "OOM" in str(error.__cause__)
