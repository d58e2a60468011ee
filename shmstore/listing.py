"""The sessions of a store, listed by digests of their ids, never by the ids, and read without the lock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

from shmstore.codec.body import Record, unpack
from shmstore.codec.ids import digest_of_key, key_of_id, owner_digest, require_key, stored_owner
from shmstore.contract import AnyStore, ArenaStore
from shmstore.engine.arena import Arena
from shmstore.engine.frame import body_of
from shmstore.engine.header import NEVER
from shmstore.engine.reader import Entry
from shmstore.errors import SerializationError
from shmstore.options import Options, seconds
from shmstore.system.clock import NS

__all__ = ["Listing", "Row", "digest", "has_arena", "row_of"]


class Row(NamedTuple):
    """
    The facts about a session that may be shown.

    Attributes:
        digest: The digest of its id, 32 hexadecimal digits; logs show the first eight.
        owner: Its owner, None if it has no owner.
        created: Seconds since it was created.
        idle: Seconds since it was last used.
        remaining: Seconds until it expires; 0 or less: it has expired and was not pruned yet.
        size: Bytes of its record; in a store without an arena, of its data.
    """

    digest: str
    owner: str | None
    created: float
    idle: float
    remaining: float
    size: int


class Listing:
    """
    A selection of the sessions in a store at one moment, the most recently used first.

    Selecting compares a few numbers per session. Records are read when they are iterated over, so the first fifty of
    100 000 sessions cost little more than fifty. A session that has been removed since, or does not match any more, is
    left out.

    Args:
        store: An open store that has an arena.
        digest: Only sessions whose digest starts with these lower-case digits.
        owner: Only sessions of this owner.
        idle: Only sessions that were not used for this number of seconds.
        expired: Only sessions that have expired (True), or have not (False).
    """

    def __init__(
        self,
        store: ArenaStore,
        *,
        digest: str = "",
        owner: str | None = None,
        idle: float = 0,
        expired: bool | None = None,
    ) -> None:
        self._arena, self._options = store.arena, store.options
        self._digest, self._owner, self._idle, self._expired = digest, stored_owner(owner), idle, expired
        arena, cells, now = self._arena, self._arena.cells, self._options.clock()
        owner_number, unused_since = owner_digest(owner), now - idle * NS
        self._slots = [
            slot
            for slot in arena.table.live_slots()
            if (not digest or digest_of_key(arena.table.key_at(slot)).startswith(digest))
            and (not owner_number or cells[arena.table.owner + slot] == owner_number)
            and (not idle or cells[arena.table.used + slot] <= unused_since)
            and (expired is None or (cells[arena.table.expires + slot] <= now) == expired)
        ]

    @classmethod
    def one(cls, store: ArenaStore, digest: str) -> tuple[Row, Record]:
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
        return len(self._slots)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Yield the current rows of the sessions at positions ``start`` to ``stop``."""
        return (row for row, _ in self.records(start, stop))

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Row, Record]]:
        """Yield the same rows, each with its record. The record contains the id, which must not be shown."""
        timeout = seconds(self._options.lock_timeout)
        for slot in self._slots[start:stop]:
            entry = self._arena.reader.at(slot, timeout)
            found = None if entry is None else _read_entry(self._arena, self._options, entry)
            if found is not None and self._matches(found[0]):
                yield found

    def _matches(self, row: Row) -> bool:
        return (
            row.digest.startswith(self._digest)
            and (self._owner is None or row.owner == self._owner)
            and row.idle >= self._idle
            and (self._expired is None or (row.remaining <= 0) == self._expired)
        )


def digest(sid: str) -> str:
    """Return the digest of a session's id, as in `Row`."""
    return digest_of_key(require_key(sid))


def row_of(store: AnyStore, sid: str) -> Row | None:
    """
    Return the facts about a session, None if it is not stored. It does not count as used.

    In a store without an arena, `load` reads the session, which counts as a hit or a miss.
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
    """Return whether a store has an arena in this process' memory, which `Listing` needs and `row_of` does not."""
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
