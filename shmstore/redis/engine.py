"""
Sessions by key on the server: what `shmstore.engine.arena` is in shared memory. No policy, no Python objects.

The keys, after the prefix: ``{DIGEST}`` a session, ``{DIGEST}gone`` its tombstone (`RENAMED` if it was renamed, else
empty), ``{DIGEST}lock`` who has its turn: all of one session are in one slot of a Cluster, and no key shows an id.
``owner:DIGEST`` is the index of an owner's sessions: a sorted set of their digests with the time until which each is to
be kept. One server changes it together with the session. In a Cluster it is on another one: it is told before the
session is written, so who logs out everywhere misses none. What is in an index is believed only if the session says so
too. An index has no deadline, so a server that evicts only keys that have one (``volatile-lru``) never evicts it.
Should its key hold something else, that is removed, and the index is made anew of all sessions. ``clock`` is what keeps
the time of the store from going back.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from shmstore.codec.ids import digest_of_key, key_of_id
from shmstore.engine.frame import Key
from shmstore.errors import StoreUnavailable
from shmstore.redis.link import Link
from shmstore.redis.routes import Command
from shmstore.redis.scripts import BREAK, CHANGE, CLEAR_WAY, DROP, DROP_OWNED, PUT, RENAMED, REPLACE, TOUCH
from shmstore.redis.value import FOREVER, LONGEST_HEAD, NOBODY, Value, known_until, new_tag, owner_bytes, parse
from shmstore.store.expiry import REMEMBERED

__all__ = ["CHANGED", "Changes", "Engine", "Odd", "TooLarge", "is_wrong_type"]

log = logging.getLogger("shmstore")

T = TypeVar("T")

CHANGED: Final = "changed"
"""What is there is not what was expected."""

_REMEMBERED: Final = REMEMBERED // 10**6  # ms
_RESERVED: Final = 10_000  # ms that a new id is kept for a session on its way
_NEVER, _NOW = "never", "0"


class TooLarge(Exception):
    """A session would have more bytes than it may; their number."""


class Odd(Exception):
    """A session has keys that are no strings, which the server cannot compare, or has changed since it was read."""


class Changes(NamedTuple):
    """
    What is to become of a session.

    Attributes:
        now: The time, microseconds by the server's clock.
        span: Microseconds it lives from then on; None: as before; `FOREVER` and more: for ever.
        codec: The name of its codec as in a record's body.
        most: Bytes its payload may have.
        set: Encoded keys and values.
        delete: Encoded keys.
        keep_owner: Whether its owner stays; else it is ``owner``.
        whole: Instead of ``set`` and ``delete``: the tag of the session that was read, and its new payload.
    """

    now: int
    span: int | None
    codec: bytes
    most: int
    set: dict[bytes, bytes]
    delete: Sequence[bytes]
    keep_owner: bool
    owner: str | None
    whole: tuple[bytes, bytes] | None = None


class Engine:
    """
    The operations, each in one step on the server, but for `move` in a Cluster.

    Args:
        link: The way to the server.
        prefix: What all keys begin with.
    """

    def __init__(self, link: Link, prefix: str) -> None:
        self.link, self._prefix = link, prefix
        self._pattern = re.sub(r"([*?\[\]\\])", r"\\\1", prefix)
        self._indexes = "" if link.cluster else f"{prefix}owner:"  # scripts reach them only on the same server

    # -- keys ------------------------------------------------------------------------------------------------------

    def key(self, key: Key) -> str:
        """Return the key of a session."""
        return f"{self._prefix}{{{digest_of_key(key)}}}"

    def key_of(self, sid: object) -> str | None:
        """Return the key of a session by its id, None if no session can have that."""
        key = key_of_id(sid)
        return None if key is None else self.key(key)

    def pages(self) -> Iterator[list[str]]:
        """Yield the keys of all sessions, page by page."""
        for page in self.link.scan(f"{self._pattern}{{*}}"):
            yield [key.decode() for key in page]

    def _index_of(self, owner: bytes) -> str:
        return f"{self._prefix}owner:{owner.hex()}"

    def _member(self, key: str) -> str:
        return key[len(self._prefix) + 1 : -1]

    def _of_member(self, member: bytes) -> str:
        return f"{self._prefix}{{{member.decode()}}}"

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, key: str) -> Value | None:
        """Return a session."""
        return parse(self.link.read("GET", key))

    def read_all(self, keys: Iterable[str]) -> list[Value | None]:
        """Return sessions."""
        return [parse(data) for data in self.link.many([("GET", key) for key in keys], again=True)]

    def heads(self, keys: Iterable[str]) -> list[Value | None]:
        """Return sessions without their data."""
        commands = [("GETRANGE", key, 0, LONGEST_HEAD - 1) for key in keys]
        return [parse(data) for data in self.link.many(commands, again=True)]

    def gone(self, key: str, within: int, renamed: bool) -> bool:
        """Return whether a session has left a tombstone in the last ``within`` ms; ``renamed``: as it was renamed."""
        left = int(self.link.read("PTTL", f"{key}gone"))  # negative: there is none
        if left <= max(0, _REMEMBERED - within):
            return False
        return not renamed or bool(self.link.read("GET", f"{key}gone") == RENAMED.encode())

    # -- writing a whole session -----------------------------------------------------------------------------------

    def put(self, key: str, value: Value, present: bool | None) -> bool:
        """Write a session; ``present`` says whether it must be there already, None that it does not matter."""
        life = _life(value)
        if life == _NOW:  # expired at once, and here that is gone
            if present is False:
                return not self.link.read("EXISTS", key)
            return self.drop(key) is not None or present is None
        how = "" if present is None else "XX" if present else "NX"
        if value.owner != NOBODY and self._indexes:
            return self._put_owned(key, value, life, how) is not None
        self.expect(key, value)
        lasts = () if life == _NEVER else ("PX", life)
        return self.link.write("SET", key, value.pack(), *lasts, *([how] if how else [])) is not None

    def replace(self, key: str, tag: bytes, value: Value) -> bool | Value | None:
        """Overwrite a session if it still has this tag: True; else return what is there."""
        life = _life(value)
        if value.owner != NOBODY and self._indexes:
            answer = self._put_owned(key, value, life, tag)
        else:
            self.expect(key, value)
            answer = self.link.write(*REPLACE.on([key], tag, value.pack(), life))
        return True if answer == 1 else parse(answer)

    def _put_owned(self, key: str, value: Value, life: str, how: str | bytes) -> Any:
        """Write a session and tell its owner's index, in one step."""
        command = PUT.on([key], value.pack(), life, how, self._indexes, self._member(key))
        return self._with_index(value.owner, lambda: self.link.write(*command))

    def _note(self, owner: bytes, key: str, until: int) -> Command:
        """Return the command that tells an index: never less than it knows, for another writer may have told it."""
        return "ZADD", self._index_of(owner), "GT", _score(until), self._member(key)

    def tell(self, owner: bytes, key: str, until: int) -> None:
        """Tell an index that a session is its owner's, until a time."""
        self._with_index(owner, lambda: self.link.write(*self._note(owner, key, until)))

    def _with_index(self, owner: bytes, call: Callable[[], T]) -> T:
        """Make a call that does nothing if the key of the index holds something else; mend that, and call again."""
        try:
            return call()
        except StoreUnavailable as exc:
            if not is_wrong_type(exc):
                raise
        self._mend(owner)
        return call()

    def _mend(self, owner: bytes) -> None:
        """Make an index anew whose key holds something else."""
        index = self._index_of(owner)
        found = self.link.write(*CLEAR_WAY.on([index]))
        if found is not None:
            log.error(
                "%s: the key %s held a %s, so another program uses the keys of this store: give each a prefix of its "
                "own; the key was removed, and the index of this owner's sessions is made anew",
                self.link.where, index, found.decode(),
            )  # fmt: skip
        for page in self.pages():
            for key, value in zip(page, self.heads(page), strict=True):
                if value is not None and value.owner == owner:
                    self.link.write(*self._note(owner, key, value.indexed))

    # -- changing one ----------------------------------------------------------------------------------------------

    def change(
        self, key: str, changes: Changes, to: tuple[str, bytes] | None = None, *, tombstone: bool = False
    ) -> bool | None:
        """
        Change a session, and move it to another key, under its new id, if one is given; then with a tombstone or not.

        Returns:
            None: it is not there, or cannot be read. False: there is one at the new key.

        Raises:
            TooLarge: It would be.
            Odd: See there; what is to be stored must be said as a ``whole``.
        """
        keys = [key] if to is None else [key, to[0], key + "gone"]
        target = key if to is None else to[0]
        pairs = (part for pair in changes.set.items() for part in pair)
        what = ("whole", *changes.whole) if changes.whole else (len(changes.set), *pairs, *changes.delete)

        def command(promised: int) -> Command:
            return CHANGE.on(
                keys, new_tag(), changes.now, _span(changes.span), self._indexes, self._member(target), promised,
                changes.codec, changes.most, "keep" if changes.keep_owner else owner_bytes(changes.owner),
                changes.owner or "", self._member(key), to[1] if to else "", _life_of(tombstone), *what,
            )  # fmt: skip

        answer = self._promised(target, changes.now, command)
        if isinstance(answer, list):
            raise Odd if answer[0] == b"odd" else TooLarge(int(answer[1]))
        return None if answer is None else bool(answer)

    def touch(self, key: str, now: int, span: int) -> bool:
        """Give a session another deadline; return whether it was there."""

        def command(promised: int) -> Command:
            return TOUCH.on([key], now, _span(span), self._indexes, self._member(key), promised)

        return self._promised(key, now, command) is not None

    def _promised(self, key: str, now: int, command: Any) -> Any:
        """Run a script; in a Cluster tell an index first if that proves to be necessary."""
        answer = self.link.write(*command(0))
        while isinstance(answer, list) and answer[0] in (b"index", b"wrong"):
            until = 0
            if answer[0] == b"wrong":
                self._mend(answer[1])
            else:
                until = known_until(now, int(answer[2]))
                self.tell(answer[1], key, until)
            answer = self.link.write(*command(until))
        return answer

    # -- moving one in a Cluster -----------------------------------------------------------------------------------

    def reserve(self, key: str, origin: str) -> bytes | None:
        """Keep a key for a session on its way from another; return the tag to come with, None if it is not free."""
        tag = new_tag()
        place = tag + self._member(origin).encode()
        return tag if self.link.write("SET", key, place, "NX", "PX", _RESERVED) is not None else None

    def release(self, key: str, tag: bytes) -> None:
        """Give a key back that was kept."""
        self.link.write(*REPLACE.on([key], tag, b"", _NOW))

    def expect(self, key: str, value: Value) -> None:
        """Tell the index of its owner of a session that is about to be written."""
        if value.owner != NOBODY:
            self.tell(value.owner, key, value.indexed)

    def arrive(self, key: str, tag: bytes, value: Value) -> bool:
        """Write a session to the key that was kept for it; False: it is not any more."""
        return bool(self.link.write(*REPLACE.on([key], tag, value.pack(), _life(value))) == 1)

    def intercept(self, keys: Iterable[str]) -> list[str]:
        """Let no session arrive that is on its way to one of these keys; return the keys those come from."""
        origins = self.link.many([BREAK.on([key]) for key in keys], again=False)
        return [self._of_member(origin) for origin in origins if origin is not None]

    # -- removing --------------------------------------------------------------------------------------------------

    def drop(self, key: str, tag: bytes = b"", *, tombstone: bool = False, why: str = "") -> bool | str | None:
        """Remove a session, if it still has this tag (else `CHANGED`); None: there is none. The tombstone says why."""
        return _dropped(self.link.write(*self._drop(key, tag, tombstone=tombstone, why=why)))

    def drop_all(self, keys: Sequence[str], tags: Sequence[bytes]) -> list[bool | str | None]:
        """Remove sessions that still have these tags; return what `drop` does of each."""
        commands = [self._drop(key, tag, tombstone=False) for key, tag in zip(keys, tags, strict=True)]
        return [_dropped(answer) for answer in self.link.many(commands, again=False)]

    def _drop(self, key: str, tag: bytes, *, tombstone: bool, why: str = "") -> Command:
        return DROP.on([key, key + "gone"], tag, _life_of(tombstone), self._indexes, self._member(key), why)

    def drop_owned(self, owner: str, keep: Iterable[str]) -> int:
        """Remove all sessions of an owner but those of some keys; on one server only. Return how many."""
        digest = owner_bytes(owner)
        kept = [self._member(key) for key in keep]
        command = DROP_OWNED.on([self._index_of(digest)], owner, f"{self._prefix}{{", "}", *kept)
        return int(self._with_index(digest, lambda: self.link.write(*command)))

    # -- owners ----------------------------------------------------------------------------------------------------

    def indexed(self, owner: str) -> list[str]:
        """Return the keys of sessions that may be an owner's."""
        digest = owner_bytes(owner)
        members = self._with_index(digest, lambda: self.link.read("ZRANGE", self._index_of(digest), 0, -1))
        return [self._of_member(member) for member in members]

    def tidy(self, now: int) -> None:
        """Forget, for all owners, the sessions whose time is over."""
        for page in self.link.scan(f"{self._pattern}owner:{'[0-9a-f]' * 16}"):
            for index in page:
                command = "ZREMRANGEBYSCORE", index.decode(), "-inf", f"({_score(now)}"
                self._with_index(bytes.fromhex(index[-16:].decode()), lambda: self.link.write(*command))  # noqa: B023


def is_wrong_type(error: StoreUnavailable) -> bool:
    """Return whether a server has refused a call because a key holds something else than what the call is for."""
    return "WRONGTYPE" in str(error.__cause__)


def _life_of(tombstone: bool) -> int:
    return _REMEMBERED if tombstone else 0


def _dropped(answer: Any) -> bool | str | None:
    return None if answer is None else CHANGED if answer == 0 else True


def _score(time: int) -> str:
    return "inf" if time >= FOREVER else str(time // 1000)


def _span(span: int | None) -> str:
    return "keep" if span is None else _NEVER if span >= FOREVER else str(span)


def _life(value: Value) -> str:
    """Return how long a new value lives: milliseconds, no part of one lost."""
    if value.deadline >= FOREVER:
        return _NEVER
    return str(max(0, -(-(value.deadline - value.used) // 1000)))
