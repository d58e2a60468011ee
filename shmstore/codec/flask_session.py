"""Session data as the extension Flask-Session has stored it: MessagePack or JSON, before its version 0.7 a pickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from shmstore.codec.body import Codec
from shmstore.errors import SerializationError
from shmstore.system.signals import pass_on_interruption

__all__ = ["PREFIX", "decode", "is_pickle", "storable"]

PREFIX: Final = "session:"
"""The default prefix of its ids."""

_PROTOCOLS: Final = {bytes([protocol]) for protocol in range(2, 6)}  # of pickle; those before 2 have no PROTO


def decode(data: object, *, allow_pickle: bool) -> dict[Any, Any]:
    """
    Return the data of a session.

    Args:
        data: Its bytes, or what a cache has made of them.
        allow_pickle: Whether to read a pickle. That executes what is in it: only for data that no other user and no
            other program can have written.

    Raises:
        SerializationError: It is not a session, or it is a pickle.
    """
    if isinstance(data, bytes):
        readers: tuple[Callable[[bytes], Any], ...] = (msgspec.msgpack.decode, msgspec.json.decode)
        for read in (*readers, *([pickle.loads] if allow_pickle else [])):
            try:
                found = read(data)
            except Exception as exc:  # of classes that a pickle names, for example
                pass_on_interruption(exc)
            else:
                if isinstance(found, dict):
                    return found
        if not allow_pickle and is_pickle(data):
            raise SerializationError("it is a pickle, and allow_pickle is not set")
    elif isinstance(data, Mapping):
        return dict(data)
    raise SerializationError("it is not a session of Flask-Session")


def is_pickle(data: bytes) -> bool:
    """Return whether bytes may be a pickle: they begin with the opcode PROTO and a protocol, and end with STOP."""
    return data[:1] == b"\x80" and data[1:2] in _PROTOCOLS and data.endswith(b".")


def storable(codec: Codec, session: dict[Any, Any]) -> tuple[dict[Any, Any], list[Any]]:
    """Return a session without the values that a codec cannot encode, and the keys of these values."""
    left_out = []
    for name, value in session.items():
        try:
            codec.payload({name: value})
        except SerializationError:
            left_out.append(name)
    return {name: value for name, value in session.items() if name not in left_out}, left_out
