"""The sessions that Flask-Session has stored on a Redis or Valkey server, as the source of a copy."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final

from shmstore.codec.body import Codec, pack
from shmstore.codec.flask_session import PREFIX, decode, is_pickle, storable
from shmstore.codec.ids import AT_NAVIGATION, ROTATE, key_of_id, owner_digest, require_key, stored_owner
from shmstore.engine.frame import OVERHEAD, Key, TimedRecord, seal
from shmstore.engine.header import NEVER
from shmstore.errors import ConfigError, SerializationError
from shmstore.redis.client import Address
from shmstore.redis.link import Link
from shmstore.system.clock import boottime_ns
from shmstore.transfer.copy import Progress, Survey

__all__ = ["FlaskSessionSource"]

_MILLI: Final = 10**6  # ns
_OWNER_KEY: Final = "_user_id"
_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,256}", re.ASCII)  # sessions with other ids cannot be reached by a cookie here


class FlaskSessionSource:
    """
    The sessions: a `shmstore.transfer.copy.Source`.

    Each keeps its id, so the browsers' cookies stay valid, and gets a new one at its next page: Flask-Session before
    0.6 lets a client choose its id. Its owner is its ``_user_id``. Flask-Session does not store when a session was used
    last: that is estimated from the life it has left. Values that cannot be stored are left out.

    Args:
        url: The URL of the server; its ``prefix`` is the ``SESSION_KEY_PREFIX``.
        timeout: Seconds that the server has for an answer.
        allow_pickle: Whether to read pickles, which executes what is in them.
        key_prefix: The prefix that the application gives its ids in a store.

    Attributes:
        left_out: How many values were left out.

    Raises:
        ConfigError: The URL is invalid.
    """

    def __init__(self, url: str, timeout: float, *, allow_pickle: bool, key_prefix: str = "") -> None:
        address = Address.of(url, prefix=PREFIX)
        self.label = f"Flask-Session {address.prefix} on {address.where}"
        self.places, self.damaged, self.left_out = frozenset[object](), list[Key](), 0
        self._prefix, self._key_prefix = address.prefix, key_prefix
        self._allow_pickle, self._codec = allow_pickle, Codec()
        self._link = Link(partial(address.open, timeout), address.where, clock="", cluster=address.cluster)
        self._names: list[str] = []
        self._longest = 0  # life that a session has left, ns: that of one that was just used

    def close(self) -> None:
        """Close the connections."""
        self._link.close(disconnect=True)

    def survey(self, progress: Progress) -> Survey:
        found: list[tuple[int, str, int, int]] = []
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", self._prefix)
        for page in self._link.scan(f"{pattern}*"):
            progress(0, 0)
            names = [name.decode(errors="replace") for name in page]
            names = [name for name in names if _ID.fullmatch(self._old_id(name)) and key_of_id(self._sid(name))]
            kinds = self._link.many([("TYPE", name) for name in names], again=True)
            strings = [name for name, kind in zip(names, kinds, strict=True) if kind == b"string"]
            for name, body, owner, left in self._load(strings, self.damaged):
                found.append((left, name, OVERHEAD + len(body), owner))
        found.sort()  # the one with the longest life left was used last
        self._names = [name for _, name, _, _ in found]
        self._longest = max((left for left, *_ in found if left != NEVER), default=0)
        self.left_out = 0
        keys = [self._key(name) for name in self._names]
        lows, highs = (array("Q", [key[half] for key in keys]) for half in (0, 1))
        sizes, owners = array("Q", [each[2] for each in found]), array("Q", [each[3] for each in found])
        return Survey(lows, highs, sizes, array("Q", [1]) * len(found), owners)

    def read(self, numbers: Sequence[int]) -> list[TimedRecord]:
        records = []
        for name, body, owner, left in self._load([self._names[number] for number in numbers], []):
            now = boottime_ns()
            used = now if left == NEVER else max(1, now - max(0, self._longest - left))
            deadline = NEVER if left == NEVER else now + left
            records.append((seal(self._key(name), owner, used, body), deadline, used))
        return records

    def _load(self, names: Sequence[str], damaged: list[Key]) -> Iterator[tuple[str, bytes, int, int]]:
        """Yield names, bodies of records, digests of owners, and the lives that are left in nanoseconds."""
        commands = [command for name in names for command in (("GET", name), ("PTTL", name))]
        answers = iter(self._link.many(commands, again=True))
        for name, data, left in zip(names, answers, answers, strict=True):
            if data is None or left == 0 or left == -2:
                continue  # it has ended meanwhile
            try:
                session = decode(data, allow_pickle=self._allow_pickle)
            except SerializationError:
                if not self._allow_pickle and is_pickle(data):
                    raise ConfigError(
                        f"{self.label} has pickles, of Flask-Session before 0.7 or of cachelib: --allow-pickle reads "
                        "them, which executes what is in them: only if no other program can write there"
                    ) from None
                damaged.append(self._key(name))
                continue
            session, left_out = storable(self._codec, session)
            self.left_out += len(left_out)
            user = session.get(_OWNER_KEY)
            owner = None if user in (None, "") else stored_owner(str(user))
            payload = self._codec.payload({**session, ROTATE: AT_NAVIGATION})
            body = pack(self._sid(name), owner, self._codec.name, payload)
            yield name, body, owner_digest(owner), NEVER if left < 0 else left * _MILLI

    def _old_id(self, name: str) -> str:
        return name[len(self._prefix) :]

    def _sid(self, name: str) -> str:
        return self._key_prefix + self._old_id(name)

    def _key(self, name: str) -> Key:
        return require_key(self._sid(name))
