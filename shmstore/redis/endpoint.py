"""A store on a Redis or Valkey server as an end of a copy: many sessions in a round trip, each in one step."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Final

from shmstore.codec.body import Codec, unpack
from shmstore.codec.ids import key_of_id
from shmstore.engine.frame import OVERHEAD, Key, TimedRecord, body_of, head_of, key_of, seal
from shmstore.engine.header import NEVER
from shmstore.errors import SerializationError, StoreUnavailable
from shmstore.redis.engine import is_wrong_type
from shmstore.redis.routes import Command
from shmstore.redis.scripts import STORE
from shmstore.redis.store import RedisStore
from shmstore.redis.value import FOREVER, HEAD, NO_OWNER, Value, index_until, new_tag, owner_bytes, parse
from shmstore.system.clock import boottime_ns
from shmstore.transfer.copy import COPIED, FULL, SAME, SKIPPED, Progress, Survey

__all__ = ["RedisEndpoint"]

_MICRO: Final = 1000  # ns
_KEY: Final = struct.Struct("<QQ")


class RedisEndpoint:
    """
    The sessions of a store on a server: a `shmstore.transfer.copy.Source` and a `Sink`.

    For the server, reading a session is a use. They are read in the order of their use, so that order stays the same.
    The server decides by itself how much it has room for; it does not know `max_per_owner`, which an application
    enforces at the next login of the owner.
    """

    shared = True

    def __init__(self, store: RedisStore, prefix: str) -> None:
        self.label = store.label
        self.damaged: list[Key] = []
        self._link, self._engine, self._prefix = store._link, store._engine, prefix
        self._shift = self._link.now() * _MICRO - boottime_ns()
        self.places = self._identity()

    def _identity(self) -> frozenset[object]:
        database = b"0"
        with suppress(StoreUnavailable):  # a user may be forbidden to ask: then two URLs of one server look different
            if not self._link.cluster:
                answer = dict(each.partition(b"=")[::2] for each in self._link.read("CLIENT", "INFO").split())
                database = answer[b"db"]
            runs = [server["run_id"] for server in self._link.info()]
            return frozenset((run, database, self._prefix) for run in runs)
        return frozenset()

    # -- as a source -----------------------------------------------------------------------------------------------

    def survey(self, progress: Progress) -> Survey:
        found: list[tuple[int, Key, int, int]] = []
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
                        found.append((value.used, self._key(name), size, int.from_bytes(value.owner)))
        except ValueError:
            raise StoreUnavailable(
                f"{self.label} has a key that no store has written; give each store a prefix of its own"
            ) from None
        found.sort()
        lows, highs = (array("Q", [key[half] for _, key, _, _ in found]) for half in (0, 1))
        sizes, owners = array("Q", [each[2] for each in found]), array("Q", [each[3] for each in found])
        self._keys = [key for _, key, _, _ in found]
        return Survey(lows, highs, sizes, array("Q", [1]) * len(found), owners)

    def _key(self, name: str) -> Key:
        digest = bytes.fromhex(self._engine.digest_of(name))
        if len(digest) != _KEY.size:
            raise ValueError(name)
        low, high = _KEY.unpack(digest)
        return low, high

    def read(self, numbers: Sequence[int]) -> list[TimedRecord]:
        keys = [self._keys[number] for number in numbers]
        records = []
        for key, value in zip(keys, self._engine.read_all(map(self._engine.key, keys)), strict=True):
            deadline = 0 if value is None else NEVER if value.deadline >= FOREVER else self._here(value.deadline)
            if value is None or deadline <= boottime_ns():
                continue
            if _is_sound(key, value):
                sealed = seal(key, int.from_bytes(value.owner), self._here(value.created), value.body)
                records.append((sealed, deadline, self._here(value.used)))
            else:
                self.damaged.append(key)
        return records

    def _here(self, micros: int) -> int:
        """Return a time of the server's clock by the clock of this process."""
        return micros * _MICRO - self._shift

    def _there(self, time: int) -> int:
        return max(0, -(-(time + self._shift) // _MICRO))  # no part of a microsecond lost

    # -- as a sink -------------------------------------------------------------------------------------------------

    def choose(self, survey: Survey) -> dict[int, str]:
        return {}

    def put(self, records: Sequence[TimedRecord]) -> list[str]:
        engine = self._engine
        values = [(engine.key(key_of(record[0])), self._value(record)) for record in records]
        lives = [max(1, -(-(deadline - boottime_ns()) // 10**6)) for _, deadline, _ in records]
        if self._link.cluster:
            self._tell([(value.owner, name, value.indexed) for name, value in values if value.owner != NO_OWNER])
        commands = [
            STORE.on(
                [name, f"{name}gone"], value.pack(), "never" if value.deadline >= FOREVER else life,
                engine._indexes, engine.digest_of(name), SAME // _MICRO,
            )
            for (name, value), life in zip(values, lives, strict=True)
        ]  # fmt: skip
        answers = self._link.many(commands, again=False)
        for number, answer in enumerate(answers):
            if isinstance(answer, list):  # the key of the owner's index holds something else
                engine._rebuild_index(answer[1])
                answers[number] = self._link.write(*commands[number])
        return [FULL if answer == b"full" else COPIED if answer == 1 else SKIPPED for answer in answers]

    def _tell(self, indexed: Sequence[tuple[bytes, str, int]]) -> None:
        """Tell the indexes of a Cluster first: they are on other servers, and must miss no session."""
        try:
            self._link.many([self._engine._index_command(*each) for each in indexed], again=False)
        except StoreUnavailable as exc:
            if not is_wrong_type(exc):
                raise
            for each in indexed:
                self._engine.add_to_index(*each)

    def _value(self, record: TimedRecord) -> Value:
        sealed, deadline, used = record
        _, _, _, _, owner, created = head_of(sealed)
        until = FOREVER if deadline >= NEVER else self._there(deadline)
        last, digest = self._there(used), owner.to_bytes(8)
        indexed = 0 if digest == NO_OWNER else index_until(last, until)
        return Value(new_tag(), until, last, indexed, self._there(created), digest, body_of(sealed))

    def missing(self, keys: AbstractSet[Key]) -> set[Key]:
        names = [self._engine.key(key) for key in keys]
        commands: list[Command] = [("EXISTS", key) for name in names for key in (name, f"{name}gone")]
        answers = iter(self._link.many(commands, again=True))
        return {key for key, there, gone in zip(keys, answers, answers, strict=True) if not there and not gone}


def _is_sound(key: Key, value: Value) -> bool:
    """Return whether a value is the session of its key. Other programs may have written it."""
    try:
        record = unpack(value.body)
        Codec().raws(bytes(record.payload))
        return key_of_id(record.sid) == key and owner_bytes(record.owner) == value.owner
    except (SerializationError, ValueError):
        return False
