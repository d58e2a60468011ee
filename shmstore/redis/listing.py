"""The sessions of a store on a server, for `shmstore.listing`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress

from shmstore.codec.body import Record, payload_at
from shmstore.contract import Row
from shmstore.errors import SerializationError
from shmstore.options import Duration, seconds
from shmstore.redis.store import RedisStore
from shmstore.redis.value import FOREVER, HEAD, NO_OWNER, Value, owner_bytes

__all__ = ["ServerSessions"]

_SECOND = 10**6  # microseconds
_BATCH = 100  # sessions that are read at once
_DIGITS = 32  # of a whole digest
_FIELDS = {"used": "used", "created": "created", "expires": "deadline"}  # of a value, by the order of a listing


class ServerSessions:
    """
    The sessions, each identified by its key.

    To select some of them, the heads of all are read, unless they are selected by an owner or by a whole digest.
    """

    def __init__(self, store: RedisStore) -> None:
        self._engine, self._now = store._engine, store._link.now

    def select(self, digest: str, owner: str | None, idle: Duration, expired: bool | None, order: str) -> Sequence[str]:
        """Return the sessions that are selected. Writes and touches count as use, reads do not."""
        if expired:
            return []  # the server removes them
        engine, until = self._engine, self._now() - seconds(idle) * _SECOND
        pages = (
            [engine.indexed(owner)] if owner is not None
            else [[engine.key_of_digest(digest)]] if len(digest) == _DIGITS
            else engine.pages(digest)
        )  # fmt: skip
        theirs = NO_OWNER if owner is None else owner_bytes(owner)
        found = {
            key: value
            for page in pages
            for key, value in zip(page, engine.heads(page), strict=True)
            if value is not None
            and engine.digest_of(key).startswith(digest)
            and (owner is None or value.owner == theirs)
            and (not idle or value.used <= until)
        }
        field = order.lstrip("-")
        if field == "size":
            fronts = map(_front, found.values())
            ranks = [size - front for size, front in zip(engine.sizes(found), fronts, strict=True)]
        else:
            ranks = [getattr(value, _FIELDS[field]) for value in found.values()]
        return [key for _, key in sorted(zip(ranks, found, strict=True), reverse=order.startswith("-"))]

    def read(self, keys: Sequence[str]) -> Iterator[tuple[Row, Record]]:
        """Yield the sessions, without those that are gone or unreadable."""
        for at in range(0, len(keys), _BATCH):
            batch = keys[at : at + _BATCH]
            for key, value in zip(batch, self._engine.read_all(batch), strict=True):
                if value is None:
                    continue
                try:
                    record = value.record()
                except SerializationError:
                    continue
                now = self._now()
                row = Row(
                    self._engine.digest_of(key),
                    record.owner,
                    max(0, now - value.created) / _SECOND,
                    max(0, now - value.used) / _SECOND,
                    math.inf if value.deadline >= FOREVER else (value.deadline - now) / _SECOND,
                    len(record.payload),
                )
                yield row, record


def _front(value: Value) -> int:
    """Return the bytes in front of a session's data; 0: the value is damaged."""
    with suppress(SerializationError):
        return HEAD.size + payload_at(value.body)
    return 0
