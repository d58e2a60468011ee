"""The sessions of a store, listed by digests of their ids, never by the ids, and read without the lock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, TypeGuard

from shmstore.codec.body import Record, unpack
from shmstore.codec.ids import digest_of_key, key_of_id, owner_digest, require_key, stored_owner
from shmstore.contract import AnyStore, ArenaStore, Row
from shmstore.engine.arena import Arena
from shmstore.engine.frame import body_of
from shmstore.engine.header import NEVER
from shmstore.engine.reader import Entry
from shmstore.errors import ConfigError, SerializationError
from shmstore.options import Options, seconds
from shmstore.system.clock import NS

__all__ = ["ORDERS", "Listing", "Row", "digest", "row_of"]

ORDERS: Final = tuple(sign + field for field in ("used", "created", "expires", "size") for sign in ("-", ""))
"""The orders of a `Listing`: by a time or a size, descending with a minus sign."""

LAST_USED_FIRST: Final = "-used"


class Listing:
    """
    A selection of the sessions in a store at one moment, the most recently used first, or in another order.

    Selecting compares a few numbers per session. Records are read when they are iterated over, so the first fifty of
    100 000 sessions cost little more than fifty. A session that has been removed since, or does not match any more, is
    left out. A `RedisStore` lists in the order of writes and touches, and reads the heads of all sessions unless they
    are selected by an owner.

    Args:
        store: An open store: a `Store`, a `StoreProxy` or a `RedisStore`.
        digest: Only sessions whose digest starts with these lower-case digits.
        owner: Only sessions of this owner.
        idle: Only sessions that were not used for this number of seconds.
        expired: Only sessions that have expired (True), or have not (False).
        order: One of `ORDERS`: by last use, creation, end or size; the latest or largest first with a minus sign.

    Raises:
        ConfigError: There is no such order, or the sessions of this kind of store cannot be listed.
    """

    def __init__(
        self,
        store: AnyStore,
        *,
        digest: str = "",
        owner: str | None = None,
        idle: float = 0,
        expired: bool | None = None,
        order: str = LAST_USED_FIRST,
    ) -> None:
        if order not in ORDERS:
            raise ConfigError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
        self._digest, self._owner, self._idle, self._expired = digest, stored_owner(owner), idle, expired
        self._sessions = sessions_of(store)
        self._selected = self._sessions.select(digest, self._owner, idle, expired, order)

    @classmethod
    def one(cls, store: AnyStore, digest: str) -> tuple[Row, Record]:
        """
        Return the only session whose digest starts with these digits, and its record. The record contains the id.

        Raises:
            LookupError: No session has such a digest, or several have.
        """
        listing = cls(store, digest=digest)
        found = list(listing.records()) if len(listing) == 1 else []
        if not found:
            # Several, even if only one of them is readable: the other one may be the one that is meant.
            many = len(listing) if len(listing) > 1 else "no"
            raise LookupError(f"{many} sessions have a digest that begins with {digest}")
        return found[0]

    def __len__(self) -> int:
        return len(self._selected)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Yield the current rows of the sessions at positions ``start`` to ``stop``."""
        return (row for row, _ in self.records(start, stop))

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Row, Record]]:
        """Yield the same rows, each with its record. The record contains the id, which must not be shown."""
        for row, record in self._sessions.read(self._selected[start:stop]):
            if self._matches(row):
                yield row, record

    def _matches(self, row: Row) -> bool:
        return (
            row.digest.startswith(self._digest)
            and (self._owner is None or row.owner == self._owner)
            and row.idle >= self._idle
            and (self._expired is None or (row.remaining <= 0) == self._expired)
        )


class Sessions(Protocol):
    """The sessions of a store of some kind; what identifies one of them is opaque."""

    def select(self, digest: str, owner: str | None, idle: float, expired: bool | None, order: str) -> Sequence[Any]:
        """Return the sessions that are selected, as by the arguments of `Listing`."""

    def read(self, selected: Sequence[Any]) -> Iterator[tuple[Row, Record]]:
        """Yield the sessions, without those that are gone or unreadable."""


def sessions_of(store: AnyStore) -> Sessions:
    """
    Return the sessions of a store.

    Raises:
        ConfigError: The sessions of this kind of store cannot be listed.
    """
    if has_arena(store):
        return _ArenaSessions(store)
    with suppress(ImportError):  # without the package redis there is no such store
        from shmstore.redis import RedisStore
        from shmstore.redis.listing import ServerSessions

        if isinstance(store, RedisStore):
            return ServerSessions(store)
    raise ConfigError(f"the sessions of a Store, a StoreProxy or a RedisStore can be listed, not those of {store!r}")


class _ArenaSessions:
    """The sessions in an arena, each identified by its slot."""

    def __init__(self, store: ArenaStore) -> None:
        self._arena, self._options = store.sound_arena(), store.options

    def select(self, digest: str, owner: str | None, idle: float, expired: bool | None, order: str) -> Sequence[int]:
        arena, cells, now = self._arena, self._arena.cells, self._options.clock()
        owner_number, unused_since = owner_digest(owner), now - idle * NS
        found = [
            slot
            for slot in arena.table.live_slots()
            if (not digest or digest_of_key(arena.table.key_at(slot)).startswith(digest))
            and (not owner_number or cells[arena.table.owner + slot] == owner_number)
            and (not idle or cells[arena.table.used + slot] <= unused_since)
            and (expired is None or (cells[arena.table.expires + slot] <= now) == expired)
        ]
        if order != LAST_USED_FIRST:
            found.sort(key=self._rank(order.lstrip("-")), reverse=order.startswith("-"))
        return found

    def _rank(self, field: str) -> Callable[[int], int]:
        """Return what slots are sorted by. Without the lock: one that changes meanwhile may be in the wrong place."""
        cells, table = self._arena.cells, self._arena.table
        ranks: dict[str, Callable[[int], int]] = {
            "used": lambda slot: cells[table.used + slot],
            "created": table.created_at,
            "expires": lambda slot: cells[table.expires + slot],
            "size": lambda slot: cells[table.record + slot] >> 32,
        }
        return ranks[field]

    def read(self, slots: Sequence[int]) -> Iterator[tuple[Row, Record]]:
        timeout = seconds(self._options.lock_timeout)
        for slot in slots:
            entry = self._arena.reader.at(slot, timeout)
            found = None if entry is None else _read_entry(self._arena, self._options, entry)
            if found is not None:
                yield found


def digest(sid: str) -> str:
    """Return the digest of a session's id, as in `Row`."""
    return digest_of_key(require_key(sid))


def row_of(store: AnyStore, sid: str) -> Row | None:
    """
    Return the facts about a session, None if it is not stored. It does not count as used.

    In a `RedisStore` it counts as a hit or a miss.
    """
    key = key_of_id(sid)
    if key is None:
        return None
    if has_arena(store):
        entry = store.arena.reader.read(key, seconds(store.options.lock_timeout))
        found = None if entry is None else _read_entry(store.arena, store.options, entry)
        return None if found is None else found[0]
    loaded = store.load(sid)
    if loaded is None:
        return None
    return Row(digest_of_key(key), loaded.owner, loaded.created, loaded.idle, loaded.remaining, len(loaded.payload))


def has_arena(store: object) -> TypeGuard[ArenaStore]:
    """Return whether a store has an arena in this process' memory."""
    return isinstance(getattr(store, "arena", None), Arena)


def _read_entry(arena: Arena, options: Options, entry: Entry) -> tuple[Row, Record] | None:
    slot, _, expires, (length, _, low, high, _, created), data = entry
    try:
        record = unpack(body_of(data))
    except SerializationError:
        return None
    if key_of_id(record.sid) != (low, high):  # the record contains another id
        return None
    now = options.clock()
    row = Row(
        digest_of_key((low, high)),
        record.owner,
        (now - created) / NS,
        max(0, now - arena.cells[arena.table.used + slot]) / NS,
        math.inf if expires >= NEVER else (expires - now) / NS,
        length,
    )
    return row, record
