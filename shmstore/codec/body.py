"""
Encoding of a session to bytes.

The payload is one msgpack map from top-level keys to values. It is decoded as a whole in one call, or split into raw
values by key, so changes are found and the writes of two processes are merged without decoding values.

The body is what a record in the arena contains, little-endian:

    u8   bytes of the session id, minus one
    u8   bytes of the codec's name, 0 = the default codec
    u16  bytes of the owner, plus one, 0 = no owner
    ...  session id, codec's name, owner in UTF-8, payload up to the end
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from msgspec import Raw

from shmstore.callbacks import Serializer
from shmstore.codec.serializers import MsgpackSerializer, decoder, dumps, loads, locate_error
from shmstore.errors import SerializationError, safe_traceback
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

__all__ = [
    "DEFAULT_CODEC",
    "Codec",
    "Record",
    "content_of",
    "log_unreadable",
    "pack",
    "payload_at",
    "payload_of",
    "unpack",
]

DEFAULT_CODEC = "msgpack"

log = logging.getLogger("shmstore")

_unreadable_log = Throttle()

_load_map = decoder(dict[Any, Any])
_load_raws = decoder(dict[Any, Raw])
_load_bins = decoder(dict[Any, bytes])
_load_bin = decoder(bytes)


class Codec:
    """
    Encodes and decodes the data of sessions, as a whole or key by key.

    Keys are always encoded by the default serializer. Values that another serializer has encoded are byte strings in
    the map.

    Args:
        serializer: Encodes the values; None: `MsgpackSerializer`.
        unreadable: Called by `salvage` with the key of each value that cannot be read, and the error.

    Attributes:
        name: Identifies the serializer in records: ``msgpack`` for the default one, else the name of the
            module or class, such as ``json`` or ``flask.json.tag.TaggedJSONSerializer``.
        is_deterministic: Whether equal sessions with the same order of keys are equal payloads.
    """

    __slots__ = ("_serializer", "_unreadable", "is_deterministic", "name")

    def __init__(
        self,
        serializer: Serializer | None = None,
        unreadable: Callable[[Any, BaseException], object] = lambda key, error: None,
    ) -> None:
        self._unreadable = unreadable
        if serializer is None or type(serializer) is MsgpackSerializer:
            self._serializer = None
            self.name = DEFAULT_CODEC
        else:
            self._serializer = serializer
            self.name = _name(serializer)
        self.is_deterministic = self._serializer is None

    def encode(self, session: Mapping[Any, Any], stored: bytes | None = None) -> bytes:
        """
        Return a session as a payload.

        Args:
            session: The session.
            stored: The payload that it was read from. A value that the serializer can decode but not encode keeps its
                bytes there.

        Raises:
            SerializationError: A key or value cannot be encoded; the message names it.
        """
        if self._serializer is None and type(session) is dict:
            return dumps(session)
        return dumps(self._dump_values(session, stored))

    def payload(self, session: object) -> bytes:
        """
        Return a session as a payload: a mapping, or a ``msgspec.Raw`` that `encode` has returned the bytes of.

        Raises:
            TypeError: It is neither.
            SerializationError: A key or value cannot be encoded; the message names it.
        """
        if type(session) is Raw:
            return bytes(session)
        if type(session) is dict or isinstance(session, Mapping):
            return self.encode(session)
        raise TypeError(f"a session must be a mapping, not {type(session).__name__}")

    def decode(self, payload: bytes | memoryview) -> dict[Any, Any]:
        """
        Return the session in a payload.

        Raises:
            SerializationError: The payload is damaged, or the serializer refuses one of its values.
        """
        if self._serializer is None:
            return _load_map(payload)
        bins = _load_bins(payload)
        return {key: self._load(self._serializer, data, f"{key}: ") for key, data in bins.items()}

    def salvage(self, payload: bytes | memoryview) -> tuple[dict[Any, Any], set[Any]]:
        """
        Return the readable part of a session that `decode` refuses, and the keys of the unreadable values.

        Raises:
            SerializationError: The payload is not a map.
        """
        session: dict[Any, Any] = {}
        lost: set[Any] = set()
        for key, raw in _load_raws(payload).items():
            try:
                session[key] = self.decode_value(raw)
            except SerializationError as error:
                lost.add(key)
                self._unreadable(key, error.__cause__ or error)
        return session, lost

    def encode_value(self, key: Any, value: Any) -> bytes:
        """
        Return a value as the raw bytes that represent it in a payload.

        Args:
            key: The key of the value in the session, for the error message.
            value: Any value of a session; a ``msgspec.Raw`` is taken as already encoded.

        Raises:
            SerializationError: The value cannot be encoded; the message names the key.
        """
        data = self._dump_values({key: value})[key]
        try:
            return dumps(data)
        except SerializationError as exc:
            refused = exc
        dumps({key: data})  # fails in the same way and names the key
        raise refused

    def decode_value(self, raw: bytes | memoryview | Raw) -> Any:
        """
        Return the value that raw bytes from `fields` or `encode_value` represent.

        Raises:
            SerializationError: The bytes are damaged, or the serializer refuses them.
        """
        if self._serializer is None:
            return loads(raw)
        return self._load(self._serializer, _load_bin(raw), "")

    def fields(self, payload: bytes | memoryview) -> dict[Any, bytes]:
        """
        Return the raw value of each key in a payload, in order.

        Raises:
            SerializationError: The payload is not a map. Its values are not decoded.
        """
        raws = _load_raws(payload)
        return dict(zip(raws, map(bytes, raws.values()), strict=True))

    def raws(self, payload: bytes) -> dict[Any, Raw]:
        """Return the raw values as `fields` does, but as slices of the payload instead of copies."""
        return _load_raws(payload)

    def changes(self, before: bytes, after: bytes) -> tuple[dict[Any, Raw], list[Any]]:
        """
        Return the keys whose values are not the stored ones, with these values, and the stored keys that are missing.

        Args:
            before: The stored session.
            after: The session now.

        Raises:
            SerializationError: The stored payload is not a map.
        """
        old, new = _load_raws(before), _load_raws(after)
        changed = {key: raw for key, raw in new.items() if raw != old.get(key)}
        if self._serializer is not None:
            changed = {key: raw for key, raw in changed.items() if not self._is_same(old.get(key), raw)}
        return changed, [key for key in old if key not in new]

    def _is_same(self, old: Raw | None, new: Raw) -> bool:
        """Return whether two different raw values are one value, which the serializer encodes differently each time."""
        if old is None:
            return False
        try:
            stored = self.decode_value(old)
            if self.encode_value("", stored) == bytes(old):  # it encodes this value the same each time
                return False
            return _is_equal(stored, self.decode_value(new))
        except SerializationError:
            return False

    def readable(self, payload: bytes | memoryview) -> dict[Any, Any]:
        """
        Return the session in a payload, without the values that cannot be read.

        Raises:
            SerializationError: The payload is not a map.
        """
        try:
            return self.decode(payload)  # much faster than value by value
        except SerializationError:
            return self.salvage(payload)[0]

    def merge(self, payload: bytes | memoryview, set: Mapping[Any, Any] = {}, delete: Iterable[Any] = ()) -> bytes:
        """
        Return a payload with some top-level keys changed; all other values are copied unchanged.

        Args:
            payload: The stored session.
            set: New values, or `msgspec.Raw` around encoded values, which calls no serializer. Existing keys keep
                their place; new keys are appended.
            delete: Keys to remove if present. A key that is also in ``set`` is set.

        Raises:
            SerializationError: The payload is damaged, or a new value cannot be encoded.
        """
        merged = _load_raws(payload)
        for key in delete:
            if key not in set:
                merged.pop(key, None)
        merged.update(self._dump_values(set))
        return dumps(merged)

    def _dump_values(self, values: Mapping[Any, Any], stored: bytes | None = None) -> dict[Any, Any]:
        serializer = self._serializer
        if serializer is None:
            return dict(values)
        dumped = {}
        for key, value in values.items():
            try:
                dumped[key] = self._dump(serializer, key, value)
            except SerializationError:
                raw = None if stored is None else _load_raws(stored).get(key)
                if raw is None or not self._represents(raw, value):
                    raise
                dumped[key] = raw
        return dumped

    def _represents(self, raw: Raw, value: Any) -> bool:
        try:
            return _is_equal(self.decode_value(raw), value)
        except SerializationError:
            return False

    def _dump(self, serializer: Serializer, key: Any, value: Any) -> bytes | Raw:
        if type(value) is Raw:
            return value
        try:
            data = serializer.dumps(value)
            return data.encode() if isinstance(data, str) else bytes(memoryview(data))
        except Exception as exc:
            pass_on_interruption(exc)
            raise locate_error(value, exc, lambda part, _: serializer.dumps(part), key=key, by=self.name) from exc

    def _load(self, serializer: Serializer, data: bytes, where: str) -> Any:
        try:
            return serializer.loads(data)
        except Exception as exc:
            pass_on_interruption(exc)
            raise SerializationError(f"{where}{self.name} cannot decode the stored value: {exc}") from exc


def log_unreadable(label: str, key: object, error: BaseException) -> None:
    """
    Log that stored values cannot be read, because a class or the serializer has changed. Throttled.

    Args:
        label: The name of the store.
        key: The key of the value in its session.
        error: The error of the serializer. Its text is not logged, because it may quote the value.
    """
    if times := _unreadable_log.due():
        log.error(
            "%s: unreadable values omitted from their sessions: %d; the last is %.100r: %s",
            label, times, key, safe_traceback(error),
        )  # fmt: skip


def _name(serializer: Serializer) -> str:
    if isinstance(serializer, ModuleType):
        # The module msgpack has dumps and loads too, and is not the default codec.
        return serializer.__name__ if serializer.__name__ != DEFAULT_CODEC else f"{DEFAULT_CODEC} (module)"
    kind = serializer if isinstance(serializer, type) else type(serializer)
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal and of one type, and so are the items of built-in containers."""
    kind = type(one)
    if type(other) is not kind:
        return False
    try:
        if kind is dict:
            one, other = [*one.items()], [*other.items()]
        elif kind is not list and kind is not tuple:
            return bool(one == other or (one != one and other != other))  # NaN
        return len(one) == len(other) and all(map(_is_equal, one, other))
    except Exception as error:  # the value's own comparison failed
        pass_on_interruption(error)
        return False


class Record(NamedTuple):
    """The parts of a record's body."""

    sid: str
    owner: str | None
    codec_name: str
    payload: bytes | memoryview
    """A slice of the body: a copy if the body is bytes, a view if it is a memoryview."""


_HEAD = struct.Struct("<BBH")


def pack(sid: str, owner: str | None, codec_name: str, payload: bytes | memoryview) -> bytes:
    """
    Return the body of a record: its parts and 4 bytes; the name of the default codec is not stored.

    Args:
        sid: The session id, 1 to 256 bytes of UTF-8.
        owner: The owner of the session, up to 65534 bytes of UTF-8.
        codec_name: `Codec.name`, up to 255 bytes of UTF-8.
        payload: The encoded session.

    Raises:
        SerializationError: One of the texts is too long or not valid Unicode.
    """
    try:
        id_ = sid.encode()
        name = b"" if codec_name == DEFAULT_CODEC else codec_name.encode()
        if owner is None:
            return b"".join((_HEAD.pack(len(id_) - 1, len(name), 0), id_, name, payload))
        owner_bytes = owner.encode()
        head = _HEAD.pack(len(id_) - 1, len(name), len(owner_bytes) + 1)
        return b"".join((head, id_, name, owner_bytes, payload))
    except (struct.error, UnicodeEncodeError) as exc:
        raise SerializationError(f"session id, owner or codec name does not fit a record: {exc}") from exc


def unpack(body: bytes | memoryview) -> Record:
    """
    Return the parts of a record's body.

    Raises:
        SerializationError: The body is damaged. The payload is not checked.
    """
    at = payload_at(body)
    name_at = 5 + body[0]
    owner_at = name_at + body[1]
    try:
        return Record(
            str(body[4:name_at], "utf-8"),
            str(body[owner_at:at], "utf-8") if body[2] or body[3] else None,
            str(body[name_at:owner_at], "utf-8") if body[1] else DEFAULT_CODEC,
            body[at:],
        )
    except UnicodeDecodeError as exc:
        raise SerializationError(f"damaged record: {exc}") from exc


def payload_at(body: bytes | memoryview) -> int:
    """
    Return the offset of the payload in a record's body.

    Raises:
        SerializationError: The body is damaged.
    """
    try:
        id_size, name_size, owner_size = _HEAD.unpack_from(body)
    except struct.error as exc:
        raise SerializationError(f"damaged record: {exc}") from exc
    at: int = id_size + name_size + owner_size + (4 if owner_size else 5)
    if at > len(body):
        raise SerializationError("damaged record: it is truncated")
    return at


def content_of(body: bytes, codec_name: str) -> tuple[bytes, str | None]:
    """
    Return the payload and the owner in a record's body.

    Raises:
        SerializationError: The body is damaged, or another codec wrote it.
    """
    at = payload_at(body)
    if body[1] or codec_name != DEFAULT_CODEC:
        _check_codec(body, codec_name)
    size = body[2] | body[3] << 8
    try:
        return body[at:], str(body[at - size + 1 : at], "utf-8") if size else None
    except UnicodeDecodeError as exc:
        raise SerializationError(f"damaged record: {exc}") from exc


def payload_of(body: bytes, codec_name: str) -> bytes:
    """
    Return the payload in a record's body, for callers that need nothing else of it.

    Raises:
        SerializationError: The body is damaged, or another codec wrote it.
    """
    at = payload_at(body)
    if body[1] or codec_name != DEFAULT_CODEC:
        _check_codec(body, codec_name)
    return body[at:]


def _check_codec(body: bytes, codec_name: str) -> None:
    written_by = unpack(body).codec_name
    if written_by != codec_name:
        raise SerializationError(f"the session was written by the serializer {written_by!r}")
