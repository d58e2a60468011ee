"""What an update, a rename or a touch makes of the bytes of a stored session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Raw

from shmstore.codec.body import Codec, pack, payload_of, unpack
from shmstore.codec.ids import Key, stored_owner, stored_owner_digest
from shmstore.contract import KEEP, NewOwner
from shmstore.engine.frame import body_of, seal
from shmstore.engine.reader import Entry
from shmstore.errors import SerializationError

__all__ = ["Change", "Content", "Terms", "resealed"]

# What is written of a session: id and owner as in the body of a record, the payload, the owner's digest, the weight.
Content = tuple[bytes, bytes, int, int]

# How it is written: the nanoseconds it has to live (None: the deadline stays), the cell that counts this, and whether a
# session that is renamed leaves a tombstone.
Terms = tuple[int | None, int, bool]


class Change:
    """
    A change of a session's keys, owner and id, encoded when it is made: `merge` calls no foreign code.

    Args:
        codec: The codec of the store.
        weigh: Returns how much of ``max`` a payload takes under an id.
        old: The id of the session.
        new: Its id from now on.
        values: The keys that are set.
        delete: The keys that are deleted.
        owner: Its owner from now on.
    """

    __slots__ = ("_codec", "_delete", "_digest", "_new", "_old", "_owner", "_values", "_weigh")

    def __init__(
        self,
        codec: Codec,
        weigh: Callable[[bytes, str], int],
        old: str,
        new: str,
        values: Mapping[Any, Any],
        delete: Iterable[Any],
        owner: NewOwner,
    ) -> None:
        if type(values) is not dict and not isinstance(values, Mapping):
            raise TypeError(f"what to set must be a mapping, not {type(values).__name__}")
        self._codec, self._weigh, self._old, self._new = codec, weigh, old, new
        # Names as plain str: comparing those of a subclass may run foreign code, which the lock does not allow.
        self._values: dict[Any, Raw] = {}
        for name, value in values.items():
            self._values[_plain(name)] = value if type(value) is Raw else Raw(codec.encode_value(name, value))
        self._delete = tuple(map(_plain, delete))
        self._owner = owner if owner is KEEP else stored_owner(owner)
        self._digest = None if self._owner is KEEP else stored_owner_digest(self._owner)

    def merge(self, entry: Entry) -> Content | None:
        """Return what is written in place of a session; None if it counts as absent: nothing here can read it."""
        body, digest = body_of(entry[4]), self._digest
        try:
            stored = payload_of(body, self._codec.name)
        except SerializationError:
            return None  # of another serializer, or damaged
        payload = self._codec.merge(stored, self._values, self._delete)
        weight = self._weigh(payload, self._new)
        if self._owner is KEEP and self._new is self._old:
            front = body[: len(body) - len(stored)]  # id and owner stand before the payload, and stay
        else:
            owner = unpack(body).owner if self._owner is KEEP else self._owner
            front = pack(self._new, owner, self._codec.name, b"")
        return front, payload, entry[3][4] if digest is None else digest, weight


def resealed(entry: Entry, key: Key, content: Content) -> bytes:
    """Return the record that takes the place of the one that was read as ``entry``."""
    front, payload, owner, weight = content
    return seal(key, owner, entry[3][5], front + payload, weight)


def _plain(name: Any) -> Any:
    return str.__str__(name) if type(name) is not str and isinstance(name, str) else name
