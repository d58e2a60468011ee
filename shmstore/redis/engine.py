"""
Sessions by key on the server: what `shmstore.arena` is in shared memory. No policy, no Python objects.

The keys, after the prefix: ``{DIGEST}`` a session, ``{DIGEST}gone`` its tombstone, ``{DIGEST}lock`` who has its turn:
all of one session are in one slot of a Cluster, and no key shows an id. ``owner:DIGEST`` is the index of an owner's
sessions: a sorted set of their digests with the time until which each is to be kept. One server changes it together
with the session. In a Cluster it is on another one: it is told before the session is written, so who logs out
everywhere misses none. What is in an index is believed only if the session says so too. An index has no deadline, so a
server that evicts only keys that have one (``volatile-lru``) never evicts it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from shmstore.life import REMEMBERED
from shmstore.names import digest_of, key_of_id
from shmstore.redis.link import Link
from shmstore.redis.routes import Command
from shmstore.redis.scripts import BREAK, CHANGE, DROP, DROP_OWNED, REPLACE, TEXTS, TOUCH
from shmstore.redis.value import FOREVER, LONGEST_HEAD, NOBODY, Value, known_until, new_tag, owner_bytes, parse
from shmstore.sealed import Key, digest_of_key

__all__ = ["CHANGED", "Changes", "Engine", "TooLarge"]

CHANGED: Final = "changed"
"""What is there is not what was expected."""

_REMEMBERED: Final = REMEMBERED // 10**6  # ms
_RESERVED: Final = 10_000  # ms that a new id is kept for a session on its way
_NEVER, _NOW = "never", "0"


class TooLarge(Exception):
    """A session would have more bytes than it may; their number."""


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
    """

    now: int
    span: int | None
    codec: bytes
    most: int
    set: dict[bytes, bytes]
    delete: Sequence[bytes]
    keep_owner: bool
    owner: str | None


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

    def gone(self, key: str, within: int) -> bool:
        """Return whether a session has left a tombstone in the last ``within`` milliseconds."""
        left = int(self.link.read("PTTL", f"{key}gone"))  # negative: there is none
        return left > max(0, _REMEMBERED - within)

    # -- writing a whole session -----------------------------------------------------------------------------------

    def put(self, key: str, value: Value, present: bool | None) -> bool:
        """Write a session; ``present`` says whether it must be there already, None that it does not matter."""
        life = _life(value)
        if life == _NOW:  # expired at once, and here that is gone
            if present is False:
                return not self.link.read("EXISTS", key)
            return self.drop(key) is not None or present is None
        how: list[Any] = [] if life == _NEVER else ["PX", life]
        if present is not None:
            how.append("XX" if present else "NX")
        return self._indexed(key, value, ("SET", key, value.pack(), *how)) is not None

    def replace(self, key: str, tag: bytes, value: Value) -> bool | Value | None:
        """Overwrite a session if it still has this tag: True; else return what is there."""
        text = TEXTS[REPLACE.sha]  # in a transaction nobody can be asked whether they know it
        answer = self._indexed(key, value, ("EVAL", text, 1, key, tag, value.pack(), _life(value)))
        return True if answer == 1 else parse(answer)

    def _indexed(self, key: str, value: Value, command: Command) -> Any:
        """Write a session after its owner's index was told."""
        if value.owner == NOBODY:
            return self.link.write(*command)
        note = self._note(value.owner, key, value.indexed)
        if self.link.cluster:
            self.link.write(*note)
            return self.link.write(*command)
        return self.link.transaction(note, command)[1]

    def _note(self, owner: bytes, key: str, until: int) -> Command:
        """Return the command that tells an index: never less than it knows, for another writer may have told it."""
        return "ZADD", self._index_of(owner), "GT", _score(until), self._member(key)

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
        """
        keys = [key] if to is None else [key, to[0], key + "gone"]
        target = key if to is None else to[0]

        def command(promised: int) -> Command:
            return CHANGE.on(
                keys, new_tag(), changes.now, _span(changes.span), self._indexes, self._member(target), promised,
                changes.codec, changes.most, "keep" if changes.keep_owner else owner_bytes(changes.owner),
                changes.owner or "", self._member(key), to[1] if to else "", _life_of(tombstone), len(changes.set),
                *(part for pair in changes.set.items() for part in pair), *changes.delete,
            )  # fmt: skip

        answer = self._promised(target, changes.now, command)
        if isinstance(answer, list):
            raise TooLarge(int(answer[1]))
        return None if answer is None else bool(answer)

    def touch(self, key: str, now: int, span: int) -> bool:
        """Give a session another deadline; return whether it was there."""

        def command(promised: int) -> Command:
            return TOUCH.on([key], now, _span(span), self._indexes, self._member(key), promised)

        return self._promised(key, now, command) is not None

    def _promised(self, key: str, now: int, command: Any) -> Any:
        """Run a script; in a Cluster tell an index first if that proves to be necessary."""
        answer = self.link.write(*command(0))
        while isinstance(answer, list) and answer[0] == b"index":
            until = known_until(now, int(answer[2]))
            self.link.write(*self._note(answer[1], key, until))
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
        """Tell the index of its owner of a session that is on its way."""
        if value.owner != NOBODY:
            self.link.write(*self._note(value.owner, key, value.indexed))

    def arrive(self, key: str, tag: bytes, value: Value) -> bool:
        """Write a session to the key that was kept for it; False: it is not any more."""
        return bool(self.link.write(*REPLACE.on([key], tag, value.pack(), _life(value))) == 1)

    def intercept(self, keys: Iterable[str]) -> list[str]:
        """Let no session arrive that is on its way to one of these keys; return the keys those come from."""
        origins = self.link.many([BREAK.on([key]) for key in keys], again=False)
        return [self._of_member(origin) for origin in origins if origin is not None]

    # -- removing --------------------------------------------------------------------------------------------------

    def drop(self, key: str, tag: bytes = b"", *, tombstone: bool = False) -> bool | str | None:
        """Remove a session, if it still has this tag (else `CHANGED`); None: there is none."""
        return _dropped(self.link.write(*self._drop(key, tag, tombstone=tombstone)))

    def drop_all(self, keys: Sequence[str], tags: Sequence[bytes]) -> list[bool | str | None]:
        """Remove sessions that still have these tags; return what `drop` does of each."""
        commands = [self._drop(key, tag, tombstone=False) for key, tag in zip(keys, tags, strict=True)]
        return [_dropped(answer) for answer in self.link.many(commands, again=False)]

    def _drop(self, key: str, tag: bytes, *, tombstone: bool) -> Command:
        return DROP.on([key, key + "gone"], tag, _life_of(tombstone), self._indexes, self._member(key))

    def drop_owned(self, owner: str, keep: Iterable[str]) -> int:
        """Remove all sessions of an owner but those of some keys; on one server only. Return how many."""
        index = self._index_of(owner_bytes(owner))
        kept = [self._member(key) for key in keep]
        return int(self.link.write(*DROP_OWNED.on([index], owner, f"{self._prefix}{{", "}", *kept)))

    # -- owners ----------------------------------------------------------------------------------------------------

    def indexed(self, owner: str) -> list[str]:
        """Return the keys of sessions that may be an owner's."""
        members = self.link.read("ZRANGE", f"{self._prefix}owner:{digest_of(owner):016x}", 0, -1)
        return [self._of_member(member) for member in members]

    def tidy(self, now: int) -> None:
        """Forget, for all owners, the sessions whose time is over."""
        for page in self.link.scan(f"{self._pattern}owner:{'[0-9a-f]' * 16}"):
            for index in page:
                self.link.write("ZREMRANGEBYSCORE", index.decode(), "-inf", f"({_score(now)}")


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
