"""
Sessions by key on the server, the counterpart of `shmstore.engine.arena`. It has no policy and no Python objects.

The keys, after the prefix: ``{DIGEST}`` is a session, ``{DIGEST}gone`` its tombstone (`RENAMED` if it was renamed, else
empty), ``{DIGEST}lock`` its lock. All keys of one session are in one slot of a Cluster, and no key contains an id.
``owner:DIGEST`` is the index of an owner's sessions: a sorted set of their digests, with the time until which each is
listed. A single server changes it together with the session. In a Cluster it is on another server and is updated before
the session is written, so that logging out everywhere misses no session. An entry of an index counts only if the
session confirms it. An index has no expiry, so a server that evicts only keys with one (``volatile-lru``) never evicts
it. If its key holds another type, that key is removed and the index rebuilt from all sessions. ``clock`` keeps the
time of the store from going back. ``counters`` is a hash.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from shmstore.codec.ids import digest_of_key, key_of_id
from shmstore.engine.frame import Key
from shmstore.engine.layout import TOMBSTONE_TTL
from shmstore.errors import StoreUnavailable
from shmstore.redis.link import Link
from shmstore.redis.routes import Command
from shmstore.redis.scripts import BREAK, CHANGE, CLEAR_WAY, DROP, DROP_OWNED, EXCHANGE, PUT, RENAMED, REPLACE, TOUCH
from shmstore.redis.value import FOREVER, MAX_HEAD, NO_OWNER, Value, index_until, new_tag, owner_bytes, parse

__all__ = ["CHANGED", "Changes", "Engine", "TooLarge", "Unmergeable", "is_wrong_type"]

log = logging.getLogger("shmstore")

T = TypeVar("T")

CHANGED: Final = "changed"
"""The stored session is not the expected one."""

_TOMBSTONE_TTL: Final = TOMBSTONE_TTL // 10**6  # ms
_RESERVATION_TTL: Final = 10_000  # ms for which a new key is reserved for a migrating session
_AT_ONCE: Final = 1000  # sessions of an owner that one step removes: the server serves others in between
_NEVER, _NOW = "never", "0"


class TooLarge(Exception):
    """A session would exceed its limit; the argument is its size in bytes."""


class Unmergeable(Exception):
    """The server cannot merge: the session has keys that are not strings, or has changed since it was read."""


class Changes(NamedTuple):
    """
    The changes to a session.

    Attributes:
        now: The time, microseconds by the server's clock.
        span: Microseconds until it expires; None: unchanged; `FOREVER` and more: never.
        codec: The name of its codec as in a record's body.
        max_payload: Maximum bytes of its payload.
        set: Encoded keys and values.
        delete: Encoded keys.
        keep_owner: Whether its owner is unchanged; otherwise it is ``owner``.
        whole: Instead of ``set`` and ``delete``: the tag of the session that was read, and its new payload.
    """

    now: int
    span: int | None
    codec: bytes
    max_payload: int
    set: dict[bytes, bytes]
    delete: Sequence[bytes]
    keep_owner: bool
    owner: str | None
    whole: tuple[bytes, bytes] | None = None


class Engine:
    """
    The operations. Each is one step on the server, except moving a session in a Cluster, and `drop_owned`.

    Args:
        link: The connection to the server.
        prefix: The prefix of all keys.
    """

    def __init__(self, link: Link, prefix: str) -> None:
        self.link, self._prefix = link, prefix
        self._pattern = re.sub(r"([*?\[\]\\])", r"\\\1", prefix)
        self._indexes = "" if link.cluster else f"{prefix}owner:"  # scripts can use them only on a single server

    # -- keys ------------------------------------------------------------------------------------------------------

    def key(self, key: Key) -> str:
        """Return the key of a session."""
        return self.key_of_digest(digest_of_key(key))

    def key_of(self, sid: object) -> str | None:
        """Return the key of a session by its id, None if the id is invalid."""
        key = key_of_id(sid)
        return None if key is None else self.key(key)

    def key_of_digest(self, digest: str) -> str:
        """Return the key of a session by the digest of its id."""
        return f"{self._prefix}{{{digest}}}"

    def digest_of(self, key: str) -> str:
        """Return the digest that a key is made from."""
        return key[len(self._prefix) + 1 : -1]

    def pages(self, digest: str = "") -> Iterator[list[str]]:
        """Yield the keys of all sessions, page by page; only of those whose digest starts with these digits."""
        for page in self.link.scan(f"{self._pattern}{{{digest}*}}"):
            yield [key.decode() for key in page]

    def _index_of(self, owner: bytes) -> str:
        return f"{self._prefix}owner:{owner.hex()}"

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, key: str) -> Value | None:
        """Return a session."""
        return parse(self.link.read("GET", key))

    def read_all(self, keys: Iterable[str]) -> list[Value | None]:
        """Return sessions."""
        return [parse(data) for data in self.link.many([("GET", key) for key in keys], again=True)]

    def heads(self, keys: Iterable[str]) -> list[Value | None]:
        """Return sessions without their data."""
        commands = [("GETRANGE", key, 0, MAX_HEAD - 1) for key in keys]
        return [parse(data) for data in self.link.many(commands, again=True)]

    def sizes(self, keys: Iterable[str]) -> list[int]:
        """Return the bytes of whole values, 0 for those that are gone."""
        return self.link.many([("STRLEN", key) for key in keys], again=True)

    def gone(self, key: str, within: int, renamed: bool) -> bool:
        """Return whether a session has left a tombstone in the last ``within`` ms; ``renamed``: only by a rename."""
        left = int(self.link.read("PTTL", f"{key}gone"))  # negative: no tombstone
        if left <= max(0, _TOMBSTONE_TTL - within):
            return False
        return not renamed or bool(self.link.read("GET", f"{key}gone") == RENAMED.encode())

    # -- writing a whole session -----------------------------------------------------------------------------------

    def put(self, key: str, value: Value, present: bool | None) -> bool:
        """Write a session if ``present`` matches whether it is stored; None: in any case. Return whether it did."""
        life = _life(value)
        if life == _NOW:  # it expires at once, which removes it here
            if present is False:
                return not self.link.read("EXISTS", key)
            return self.drop(key) is not None or present is None
        how = "" if present is None else "XX" if present else "NX"
        if value.owner != NO_OWNER and self._indexes:
            return self._put_owned(key, value, life, how) is not None
        self.index_before_write(key, value)
        expiry = () if life == _NEVER else ("PX", life)
        return self.link.write("SET", key, value.pack(), *expiry, *([how] if how else [])) is not None

    def replace(self, key: str, tag: bytes, value: Value) -> bool | Value | None:
        """Overwrite a session if it still has this tag, and return True; else return the stored session."""
        life = _life(value)
        if value.owner != NO_OWNER and self._indexes:
            answer = self._put_owned(key, value, life, tag)
        else:
            self.index_before_write(key, value)
            answer = self.link.write(*REPLACE.on([key], tag, value.pack(), life))
        return True if answer == 1 else parse(answer)

    def swap(self, key: str, tag: bytes, value: Value) -> bool:
        """Overwrite a session, which its owner's index lists long enough, if it still has this tag."""
        return bool(self.link.write(*REPLACE.on([key], tag, value.pack(), _life(value))) == 1)

    def exchange(self, key: str, before: Value, after: Value, to: str | None, *, tombstone: bool) -> bool:
        """
        Overwrite a session if it still is as it was read; single server only. Return whether it did.

        Args:
            key: Its key.
            before: As it was read.
            after: As it is written. It does not expire at once.
            to: Its new key, which must be free, for another id; None: it keeps its key.
            tombstone: Whether a renamed one leaves a tombstone.
        """
        keys = [key] if to is None else [key, to, key + "gone"]
        leaves = before.owner != NO_OWNER and (to is not None or after.owner != before.owner)
        command = EXCHANGE.on(
            keys, before.tag, after.pack(), _life(after), self._index_of(before.owner) if leaves else "",
            self.digest_of(key), "" if after.owner == NO_OWNER else self._index_of(after.owner), _score(after.indexed),
            self.digest_of(to or key), _tombstone_ttl(tombstone),
        )  # fmt: skip
        return self._with_index(after.owner, lambda: self.link.write(*command)) is not None

    def _put_owned(self, key: str, value: Value, life: str, how: str | bytes) -> Any:
        """Write a session and update its owner's index, in one step."""
        index, score = self._index_of(value.owner), _score(value.indexed)
        command = PUT.on([key], value.pack(), life, how, index, score, self.digest_of(key))
        return self._with_index(value.owner, lambda: self.link.write(*command))

    def _index_command(self, owner: bytes, key: str, until: int) -> Command:
        """Return the command that lists a session in an index; it never shortens an entry of another writer."""
        return "ZADD", self._index_of(owner), "GT", _score(until), self.digest_of(key)

    def add_to_index(self, owner: bytes, key: str, until: int) -> None:
        """List a session in its owner's index until a time."""
        self._with_index(owner, lambda: self.link.write(*self._index_command(owner, key, until)))

    def _with_index(self, owner: bytes, call: Callable[[], T]) -> T:
        """Make a call that fails if the key of the index holds another type; then rebuild the index and repeat it."""
        try:
            return call()
        except StoreUnavailable as exc:
            if not is_wrong_type(exc):
                raise
        self._rebuild_index(owner)
        return call()

    def _rebuild_index(self, owner: bytes) -> None:
        """Rebuild an index whose key holds another type."""
        index = self._index_of(owner)
        found = self.link.write(*CLEAR_WAY.on([index]))
        if found is not None:
            log.error(
                "%s: the key %s held a %s, so another program uses the keys of this store: give each program its own "
                "prefix; the key was removed, and the index of this owner's sessions is rebuilt",
                self.link.where, index, found.decode(),
            )  # fmt: skip
        for page in self.pages():
            for key, value in zip(page, self.heads(page), strict=True):
                if value is not None and value.owner == owner:
                    self.link.write(*self._index_command(owner, key, value.indexed))

    # -- changing a session ----------------------------------------------------------------------------------------

    def change(
        self, key: str, changes: Changes, to: tuple[str, bytes] | None = None, *, tombstone: bool = False
    ) -> bool | None:
        """
        Change a session; with ``to``, also move it to another key and id, with or without a tombstone.

        Returns:
            None: It is not stored or unreadable. False: another session is stored at the new key.

        Raises:
            TooLarge: It would exceed its limit.
            Unmergeable: The change must be passed as a ``whole``.
        """
        keys = [key] if to is None else [key, to[0], key + "gone"]
        target = key if to is None else to[0]
        pairs = (part for pair in changes.set.items() for part in pair)
        what = ("whole", *changes.whole) if changes.whole else (len(changes.set), *pairs, *changes.delete)

        def command(indexed: int) -> Command:
            return CHANGE.on(
                keys, new_tag(), changes.now, _span(changes.span), self._indexes, self.digest_of(target), indexed,
                changes.codec, changes.max_payload, "keep" if changes.keep_owner else owner_bytes(changes.owner),
                changes.owner or "", self.digest_of(key), to[1] if to else "", _tombstone_ttl(tombstone), *what,
            )  # fmt: skip

        answer = self._run_indexed(target, changes.now, command)
        if isinstance(answer, list):
            raise Unmergeable if answer[0] == b"odd" else TooLarge(int(answer[1]))
        return None if answer is None else bool(answer)

    def touch(self, key: str, now: int, span: int) -> bool:
        """Change the deadline of a session; return whether it is stored."""

        def command(indexed: int) -> Command:
            return TOUCH.on([key], now, _span(span), self._indexes, self.digest_of(key), indexed)

        return self._run_indexed(key, now, command) is not None

    def _run_indexed(self, key: str, now: int, command: Any) -> Any:
        """Run a script; in a Cluster, extend the entry in the index first if the script asks for it."""
        answer = self.link.write(*command(0))
        while isinstance(answer, list) and answer[0] in (b"index", b"wrong"):
            until = 0
            if answer[0] == b"wrong":
                self._rebuild_index(answer[1])
            else:
                until = index_until(now, int(answer[2]))
                self.add_to_index(answer[1], key, until)
            answer = self.link.write(*command(until))
        return answer

    # -- moving a session in a Cluster -----------------------------------------------------------------------------

    def reserve(self, key: str, origin: str) -> bytes | None:
        """Reserve a key for a session that moves there; return the tag of the reservation, None if the key is used."""
        tag = new_tag()
        reservation = tag + self.digest_of(origin).encode()
        return tag if self.link.write("SET", key, reservation, "NX", "PX", _RESERVATION_TTL) is not None else None

    def release(self, key: str, tag: bytes) -> None:
        """Cancel a reservation."""
        self.link.write(*REPLACE.on([key], tag, b"", _NOW))

    def index_before_write(self, key: str, value: Value) -> None:
        """List a session that is about to be written in its owner's index."""
        if value.owner != NO_OWNER:
            self.add_to_index(value.owner, key, value.indexed)

    def cancel_moves(self, keys: Iterable[str]) -> list[str]:
        """Cancel the moves of sessions to these keys; return the keys that these sessions come from."""
        origins = self.link.many([BREAK.on([key]) for key in keys], again=False)
        return [self.key_of_digest(origin.decode()) for origin in origins if origin is not None]

    # -- removing --------------------------------------------------------------------------------------------------

    def drop(self, key: str, tag: bytes = b"", *, tombstone: bool = False, why: str = "") -> bool | str | None:
        """Remove a session, if it still has this tag (else `CHANGED`); None: not stored. ``why``: for the tombstone."""
        return _dropped(self.link.write(*self._drop(key, tag, tombstone=tombstone, why=why)))

    def drop_all(self, keys: Sequence[str], tags: Sequence[bytes]) -> list[bool | str | None]:
        """Remove sessions that still have these tags; return the result of `drop` for each."""
        commands = [self._drop(key, tag, tombstone=False) for key, tag in zip(keys, tags, strict=True)]
        return [_dropped(answer) for answer in self.link.many(commands, again=False)]

    def _drop(self, key: str, tag: bytes, *, tombstone: bool, why: str = "") -> Command:
        return DROP.on([key, key + "gone"], tag, _tombstone_ttl(tombstone), self._indexes, self.digest_of(key), why)

    def drop_owned(self, owner: str, keep: Iterable[str]) -> int:
        """
        Remove all sessions of an owner except those at some keys; single server only. Return their number.

        The server serves others between the steps. The last step looks at the whole index, so that it finds the
        sessions that were renamed meanwhile.
        """
        digest = owner_bytes(owner)
        kept = [self.digest_of(key) for key in keep]
        count, most, left = 0, _AT_ONCE, math.inf
        while left:
            command = DROP_OWNED.on([self._index_of(digest)], owner, f"{self._prefix}{{", "}", most, *kept)
            dropped, remain = self._with_index(digest, partial(self.link.write, *command))
            count += dropped
            if remain > left - most / 2:
                most *= 2  # sessions begin as fast as they are removed: larger steps come to an end
            left = remain
        return count

    # -- owners ----------------------------------------------------------------------------------------------------

    def indexed(self, owner: str) -> list[str]:
        """Return the keys of the sessions in an owner's index, which may contain others too."""
        digest = owner_bytes(owner)
        members = self._with_index(digest, lambda: self.link.read("ZRANGE", self._index_of(digest), 0, -1))
        return [self.key_of_digest(member.decode()) for member in members]

    def prune_indexes(self, now: int) -> None:
        """Remove outdated entries from the indexes of all owners."""
        for page in self.link.scan(f"{self._pattern}owner:{'[0-9a-f]' * 16}"):
            for index in page:
                command = "ZREMRANGEBYSCORE", index.decode(), "-inf", f"({_score(now)}"
                self._with_index(bytes.fromhex(index[-16:].decode()), lambda: self.link.write(*command))  # noqa: B023


def is_wrong_type(error: StoreUnavailable) -> bool:
    """Return whether a server has refused a call because its key holds another type."""
    return "WRONGTYPE" in str(error.__cause__)


def _tombstone_ttl(tombstone: bool) -> int:
    return _TOMBSTONE_TTL if tombstone else 0


def _dropped(answer: Any) -> bool | str | None:
    return None if answer is None else CHANGED if answer == 0 else True


def _score(time: int) -> str:
    return "inf" if time >= FOREVER else str(time // 1000)


def _span(span: int | None) -> str:
    return "keep" if span is None else _NEVER if span >= FOREVER else str(span)


def _life(value: Value) -> str:
    """Return the ttl of a new value in milliseconds, rounded up."""
    if value.deadline >= FOREVER:
        return _NEVER
    return str(max(0, -(-(value.deadline - value.used) // 1000)))
