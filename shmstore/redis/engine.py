"""
Sessions by key on the server: what `shmstore.arena` is in shared memory. No policy, no Python objects.

The keys, after the prefix: ``{DIGEST}`` a session, ``{DIGEST}gone`` that it was there a moment ago, ``{DIGEST}lock``
who has its turn: all of one session are in one slot of a Cluster, and no key shows an id. ``owner:DIGEST`` is the index
of an owner's sessions: a sorted set of their digests with the time until which each is to be kept. A session is indexed
before it is written, so who logs out everywhere misses none; what is in an index is believed only if the session says
so too. An index has no deadline, so a server that evicts only keys that have one (``volatile-lru``) never evicts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Literal

from shmstore.life import REMEMBERED
from shmstore.names import digest_of, key_of_id
from shmstore.redis.link import Link
from shmstore.redis.scripts import CHANGE, DROP, FORGET, INDEX, MOVE, NEVER, NOW, TOUCH
from shmstore.redis.value import FOREVER, HEAD, LONGEST_HEAD, Value, new_tag, parse
from shmstore.sealed import Key, digest_of_key

__all__ = ["CHANGED", "Engine"]

CHANGED: Final = "changed"
"""What is there is not what was expected."""

_REMEMBERED: Final = REMEMBERED // 10**6  # ms
_RESERVED: Final = 10_000  # ms that a new id is kept for a session on its way


class Engine:
    """
    The operations, each in one step on the server, but for `move` in a Cluster.

    Args:
        link: The way to the server.
        prefix: What all keys begin with.
    """

    def __init__(self, link: Link, prefix: str) -> None:
        self.link, self._prefix = link, prefix
        self._pattern = "".join(f"[{each}]" if each in "*?[\\" else each for each in prefix)

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

    def _index_of(self, owner: str) -> str:
        return f"{self._prefix}owner:{digest_of(owner):016x}"

    def _member(self, key: str) -> str:
        return key[len(self._prefix) + 1 : -1]

    # -- sessions --------------------------------------------------------------------------------------------------

    def read(self, key: str) -> Value | None:
        """Return a session."""
        return parse(self.link.call("GET", key))

    def read_all(self, keys: Iterable[str]) -> list[Value | None]:
        """Return sessions."""
        return [parse(data) for data in self.link.many([("GET", key) for key in keys])]

    def heads(self, keys: Iterable[str]) -> list[Value | None]:
        """Return sessions without their data."""
        return [parse(data) for data in self.link.many([("GETRANGE", key, 0, LONGEST_HEAD - 1) for key in keys])]

    def put(self, key: str, value: Value, life: str, present: bool | None) -> bool:
        """Write a session; ``present`` says whether it must be there already, None that it does not matter."""
        call = self.link.call
        if life == NOW:  # expired at once, and here that is gone
            if present is False:
                return not call("EXISTS", key)
            return self.drop(key) is not None or present is None
        how = [] if life == NEVER else ["PX", life]
        if present is not None:
            how.append("XX" if present else "NX")
        if call("SET", key, value.pack(), *how) is not None:
            return True
        # Sent twice, because the first answer was lost, it finds itself.
        return present is False and bool(call("GETRANGE", key, 0, len(value.tag) - 1) == value.tag)

    def change(self, key: str, tag: bytes, value: Value, life: str) -> Literal[True] | Value | None:
        """Overwrite a session if it still has this tag: True; else return what is there."""
        answer = self.link.script(CHANGE, [key], tag, value.pack(), life)
        return True if answer == 1 else parse(answer)

    def move(self, old: str, new: str, tag: bytes, value: Value, life: str) -> bool | Value | None:
        """Move a session to another key if it still has this tag, as `change`; False: there is one at that key."""
        if self.link.cluster:
            return self._move_slots(old, new, tag, value, life)
        answer = self.link.script(MOVE, [old, new, old + "gone"], tag, value.pack(), life, _REMEMBERED)
        return bool(answer) if isinstance(answer, int) else parse(answer)

    def _move_slots(self, old: str, new: str, tag: bytes, value: Value, life: str) -> bool | Value | None:
        """
        Move a session between two servers, which no step can do at once: take the new key, end the old, write.

        Who dies in between leaves a key that expires, and at worst has lost the session: it is never under both.
        """
        reserved = value._replace(tag=new_tag(), body=b"")
        if not self.put(new, reserved, str(_RESERVED), False):
            return False
        dropped: bytes | str | None = None
        try:
            dropped = self.drop(old, tag, remember=True)
        finally:
            if not isinstance(dropped, bytes):
                self.drop_reserved(new, reserved.tag)
        if dropped is None:
            return None
        if dropped == CHANGED:
            return self.read(old)
        return self.change(new, reserved.tag, value, life) is True

    def drop_reserved(self, key: str, tag: bytes) -> None:
        """Give a key back that was taken for a session on its way."""
        self.change(key, tag, Value(new_tag(), 0, 0, 0, 0, b""), NOW)

    def touch(self, key: str, deadline: int, used: int, life: str) -> int | None:
        """Give a session another deadline; return until when its owner's index knows it, None if it is not there."""
        answer = self.link.script(TOUCH, [key], HEAD.pack(b"", deadline, used, 0, 0)[8:24], life)
        return None if answer is None else int.from_bytes(answer)

    def drop(self, key: str, tag: bytes = b"", *, remember: bool = False) -> bytes | str | None:
        """Remove a session, if it still has this tag (else `CHANGED`); return what stands before its data."""
        keys = [key, key + "gone"]
        answer = self.link.script(DROP, keys, tag, _REMEMBERED if remember else 0, new_tag())
        return CHANGED if answer == 0 else answer

    def gone(self, key: str) -> bool:
        """Return whether a session was removed with ``remember``, or moved away, in the last 30 seconds."""
        return bool(self.link.call("EXISTS", key + "gone"))

    # -- owners ----------------------------------------------------------------------------------------------------

    def index(self, owner: str, key: str, until: int, now: int) -> None:
        """Note a session among those of its owner; forget those whose time is over."""
        self.link.script(INDEX, [self._index_of(owner)], self._member(key), _score(until), _score(now))

    def forget(self, owner: str, key: str, until: int) -> None:
        """Forget a session of an owner that is not there any more, unless it was noted again since."""
        self.link.script(FORGET, [self._index_of(owner)], self._member(key), _score(until))

    def indexed(self, owner: str) -> list[str]:
        """Return the keys of sessions that may be an owner's."""
        members = self.link.call("ZRANGE", self._index_of(owner), 0, -1)
        return [f"{self._prefix}{{{member.decode()}}}" for member in members]

    def tidy(self, now: int) -> None:
        """Forget, for all owners, the sessions whose time is over."""
        for page in self.link.scan(f"{self._pattern}owner:*"):
            for index in page:
                self.link.call("ZREMRANGEBYSCORE", index, "-inf", f"({_score(now)}")


def _score(time: int) -> str:
    return "inf" if time >= FOREVER else str(time // 1000)
