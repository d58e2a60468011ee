"""What an update, a rename or a touch makes of the bytes of a stored session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Raw

from shmstore.codec.body import Codec, pack, payload_at, payload_of, unpack
from shmstore.codec.ids import require_key, stored_owner, stored_owner_digest
from shmstore.contract import KEEP, NewOwner
from shmstore.engine.frame import body_of, seal
from shmstore.engine.reader import Entry
from shmstore.errors import SerializationError

__all__ = ["Change", "Content", "Terms", "resealed"]

# What is written in place of a session: its id if it gets another one, its owner, the payload, the weight.
Content = tuple[str | None, NewOwner, bytes, int]

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

    __slots__ = ("_codec", "_delete", "_new", "_old", "_owner", "_values", "_weigh")

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

    def merge(self, entry: Entry) -> Content | None:
        """Return what is written in place of a session; None if it counts as absent: nothing here can read it."""
        try:
            stored = payload_of(body_of(entry[4]), self._codec.name)
        except SerializationError:
            return None  # of another serializer, or damaged
        payload = self._codec.merge(stored, self._values, self._delete)
        new = None if self._new is self._old else self._new
        return new, self._owner, payload, self._weigh(payload, self._new)


def resealed(entry: Entry, content: Content) -> bytes:
    """
    Return the record that takes the place of the one that was read as ``entry``; the C core builds the same.

    Raises:
        TypeError, ValueError: The new id or owner is not valid.
    """
    new, owner, payload, weight = content
    _, _, low, high, digest, created = entry[3]
    body = body_of(entry[4])
    if new is None and owner is KEEP:
        return seal((low, high), digest, created, body[: payload_at(body)] + payload, weight)
    stored = unpack(body)
    if owner is KEEP:
        owner = stored.owner
    else:
        owner = stored_owner(owner)
        digest = stored_owner_digest(owner)
    key = (low, high) if new is None else require_key(new)
    body = pack(stored.sid if new is None else new, owner, stored.codec_name, payload)
    return seal(key, digest, created, body, weight)


def _plain(name: Any) -> Any:
    return str.__str__(name) if type(name) is not str and isinstance(name, str) else name
