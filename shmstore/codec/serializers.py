"""
Lossless encoding of session values to bytes.

msgpack itself represents None, bool, int, float, str, bytes, list and dict. Every other type is encoded as a msgpack
extension, so that no two types share an encoding:

    code  type                payload
    ----  ------------------  --------------------------------------------------------------
       1  tuple               msgpack array
       2  set                 msgpack array, elements in the order of their bytes
       3  frozenset           as set
       4  int                 two's complement, big-endian: beyond the 64 bits of msgpack
       5  Decimal             ASCII
       6  datetime            ISO 8601, "~" appended for fold=1, "[key]" for a ZoneInfo in place of its
                              offset; UTC uses msgpack's own timestamp (-1)
       7  date                ISO 8601
       8  time                as datetime
       9  timedelta           msgpack array of days, seconds, microseconds
      10  UUID                16 bytes
      11  Markup              UTF-8, surrogates as if they were characters
      12  str with surrogates as Markup: msgpack's own strings are strict UTF-8

msgspec would encode most of these types as the nearest msgpack type. Therefore a value is searched before it is
encoded (`_tag`), and copied only where something in it needs an extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import Any, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

from markupsafe import Markup
from msgspec import MsgspecError, Raw
from msgspec.msgpack import Decoder, Encoder, Ext

from shmstore.engine.core import is_plain
from shmstore.errors import SerializationError
from shmstore.system.signals import pass_on_interruption

__all__ = ["MAX_DEPTH", "MsgpackSerializer", "decoder", "dumps", "loads", "locate_error"]

_T = TypeVar("_T")

MAX_DEPTH = 200
"""The maximum nesting of containers. It is fixed, because a stored value must also be readable from deeper in the call
stack; an extension costs two levels of the interpreter's 1000."""


def dumps(value: Any, /) -> bytes:
    """
    Return a value as msgpack.

    Raises:
        SerializationError: A part of the value has an unsupported type, contains itself or is nested deeper
            than `MAX_DEPTH`. The message names its path and type.
    """
    try:
        return _dump(value, MAX_DEPTH)
    except Exception as exc:
        pass_on_interruption(exc)
        refused = locate_error(value, exc, _dump)
        # "Changed size during iteration": another thread is changing the value, and the session tries again.
        refused.__cause__ = exc if isinstance(exc, RuntimeError) else None
    raise refused  # outside the handler: the message already describes the inner error


def _dump(value: Any, room: int) -> bytes:
    try:
        # `_tag` returns a plain value as it is; the C core finds out faster.
        plain = is_plain is not None and is_plain(value, room)
        return _encode(value if plain else _tag(value, room))
    except UnicodeEncodeError:
        # Lone surrogates are rare, and checking each string is slow, so they are searched for only after a failure.
        return _encode(_tag(_mark_surrogates(value, room), room))


def decoder(kind: type[_T]) -> Callable[[Any], _T]:
    """
    Return a function that decodes bytes or another buffer and raises SerializationError if they are damaged.

    Args:
        kind: The expected type at the top level, for example ``dict[Any, msgspec.Raw]``.
    """
    decode = Decoder(kind, ext_hook=_untag).decode

    def loads(data: Any, /) -> _T:
        try:
            return decode(data)
        # All errors of msgspec and of the constructors in _UNTAG. A MemoryError does not mean damage.
        except (MsgspecError, ValueError, TypeError, ArithmeticError, LookupError, RecursionError) as exc:
            pass_on_interruption(exc)
            raise SerializationError(f"damaged data ({type(exc).__name__}: {exc})") from exc

    return loads


# --- from values to what msgspec encodes without loss -----------------------------------------------------

_TUPLE, _SET, _FROZENSET, _INT, _DECIMAL, _DATETIME, _DATE, _TIME, _TIMEDELTA, _UUID, _MARKUP, _STR = range(1, 13)


class _Key:
    """An Ext as the key of a dict, because Ext itself is not hashable."""

    __slots__ = ("ext",)

    def __init__(self, ext: Ext) -> None:
        self.ext = ext


_encode = Encoder(enc_hook=lambda key: key.ext).encode

_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1  # the range of msgpack's integers

# In all functions below, `room` is the number of levels of containers that may still be opened.


def _tag(value: Any, room: int) -> Any:
    kind = type(value)
    return value if kind in _NATIVE else _TAG.get(kind, _tag_other)(value, room)


def _tag_dict(value: dict[Any, Any], room: int) -> dict[Any, Any]:
    if room <= 0:
        raise RecursionError(_TOO_DEEP)
    result = value
    for key, item in value.items():
        if type(key) is not str:
            return {_tag_key(k, room - 1): _tag(v, room - 1) for k, v in value.items()}
        kind = type(item)
        if kind in _NATIVE or (kind is int and _MIN_INT <= item <= _MAX_INT):
            continue
        tagged = _TAG.get(kind, _tag_other)(item, room - 1)
        if tagged is not item:
            if result is value:
                result = value.copy()
            result[key] = tagged
    return result


def _tag_key(key: Any, room: int) -> Any:
    _check_hashed(key)
    tagged = _tag(key, room)
    return _Key(tagged) if type(tagged) is Ext else tagged


def _tag_items(value: list[Any] | tuple[Any, ...], room: int) -> list[Any] | tuple[Any, ...]:
    if room <= 0:
        raise RecursionError(_TOO_DEEP)
    result = value
    for index, item in enumerate(value):
        kind = type(item)
        if kind in _NATIVE or (kind is int and _MIN_INT <= item <= _MAX_INT):
            continue
        tagged = _TAG.get(kind, _tag_other)(item, room - 1)
        if tagged is not item:
            if result is value:
                result = list(value)
            result[index] = tagged  # type: ignore[index]  # a list since the line above
    return result


def _tag_tuple(value: tuple[Any, ...], room: int) -> Ext:
    return Ext(_TUPLE, _encode(_tag_items(value, room)))


def _tag_set(value: set[Any] | frozenset[Any], room: int) -> Ext:
    if room <= 0:
        raise RecursionError(_TOO_DEEP)
    for item in value:
        _check_hashed(item)
    items = sorted([_encode(_tag(item, room - 1)) for item in value])
    return Ext(_SET if isinstance(value, set) else _FROZENSET, _encode([*map(Raw, items)]))


def _check_hashed(value: Any) -> None:
    """Refuse a dataclass where a hashable value is needed: it is decoded as a dict, which is not hashable."""
    if isinstance(value, tuple | frozenset):
        for item in value:
            _check_hashed(item)
    elif type(value) not in _NATIVE and _is_dataclass_instance(value):
        raise TypeError(
            "a dataclass is stored as a dict, which cannot be a key or in a set: store a tuple of its fields"
        )


class _Surrogates(str):
    """A string that is not valid UTF-8."""

    __slots__ = ()


def _mark_surrogates(value: Any, room: int) -> Any:
    """Return a value with each string that is not valid UTF-8 as a `_Surrogates`; containers are copied."""
    if room < 0:
        raise RecursionError(_TOO_DEEP)
    kind = type(value)
    if kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            return _Surrogates(value)
        return value
    if issubclass(kind, dict):
        items = _EXACT[dict](value).items()
        return {_mark_surrogates(key, room - 1): _mark_surrogates(item, room - 1) for key, item in items}
    for base in (list, tuple, set, frozenset):
        if issubclass(kind, base):
            return base(_mark_surrogates(item, room - 1) for item in base.__iter__(value))
    return _mark_surrogates(_fields(value), room) if _is_dataclass_instance(value) else value


def _utf8(value: str) -> bytes:
    return str.encode(value, "utf-8", "surrogatepass")


def _is_dataclass_instance(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type) and not hasattr(type(value), "__html__")


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as a dict, as Flask's own session stores it. Values are not converted."""
    return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}


def _tag_int(value: int, room: int) -> int | Ext:
    if _MIN_INT <= value <= _MAX_INT:
        return value
    return Ext(_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


_parse_datetime = datetime.fromisoformat


def _tag_datetime(value: datetime, room: int) -> datetime | Ext:
    # msgspec refuses subclasses. `type(value) is datetime` cannot be used: freezegun replaces that name.
    if value.tzinfo is UTC and not value.fold and type(value) in _TAG:
        return value
    text = _iso_text(datetime, value)
    if text.endswith("]"):
        return Ext(_DATETIME, text.encode())
    # It is decoded as UTC, so it must have the same bytes as a value in UTC.
    return _parse_datetime(text) if text.endswith("+00:00") else Ext(_DATETIME, text.encode())


def _iso_text(kind: Any, value: datetime | time) -> str:
    zone = value.tzinfo
    if isinstance(zone, ZoneInfo) and zone.key and _is_loadable(zone.key):
        return f"{kind.isoformat(kind.replace(value, tzinfo=None))}{'~' * value.fold}[{zone.key}]"
    if zone is not None:
        offset = kind.utcoffset(value)
        # fromisoformat() takes an offset of less than a second for UTC.
        if offset is None or offset.microseconds:
            raise TypeError("its offset from UTC is unknown, or not in whole seconds")
    return f"{kind.isoformat(value)}{'~' * value.fold}"


def _tag_other(value: Any, room: int) -> Any:
    """Encode subclasses as the nearest supported base, lazy strings as text, and dataclasses as dicts."""
    kind = type(value)
    if not issubclass(kind, str) and hasattr(kind, "__mod__") and callable(getattr(value, "casefold", None)):
        return _tag_text(str(value))
    if hasattr(kind, "__html__"):
        return Ext(_MARKUP, _utf8(value.__html__()))
    for base in kind.__mro__:
        if base is str:
            return _tag_text(value)
        if base in _EXACT:
            return _tag(_EXACT[base](value), room)
        if base in _TAG:
            return _TAG[base](value, room)
    if _is_dataclass_instance(value):
        return _tag(_fields(value), room)
    raise TypeError("this type cannot be stored: store a str, a number or a dict made from it")


def _tag_text(value: str) -> str | Ext:
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return Ext(_STR, _utf8(text))
    return text


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels, or containing itself"

_NATIVE = frozenset({NoneType, bool, float, str, bytes, bytearray, Raw})

_TAG: dict[type, Callable[[Any, int], Any]] = {
    int: _tag_int,
    dict: _tag_dict,
    list: _tag_items,
    tuple: _tag_tuple,
    set: _tag_set,
    frozenset: _tag_set,
    Decimal: lambda value, _: Ext(_DECIMAL, Decimal.__str__(value).encode()),
    datetime: _tag_datetime,
    date: lambda value, _: Ext(_DATE, date.isoformat(value).encode()),
    time: lambda value, _: Ext(_TIME, _iso_text(time, value).encode()),
    timedelta: lambda value, _: Ext(_TIMEDELTA, _encode((value.days, value.seconds, value.microseconds))),
    UUID: lambda value, _: Ext(_UUID, value.bytes),
    Markup: lambda value, _: Ext(_MARKUP, _utf8(value)),
    _Surrogates: lambda value, _: Ext(_STR, _utf8(value)),
}

# From a subclass to its base, bypassing overridden methods: str() of a str enum is not its value, items() of a
# MultiDict is incomplete. Types that are missing here are read by unbound methods or have nothing to override.
_EXACT: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    bytes: bytes.__bytes__,
    bytearray: bytes,
    list: list,
    dict: lambda value: {key: dict.__getitem__(value, key) for key in value},
    timedelta: timedelta.__pos__,
}


def locate_error(
    value: Any, error: Exception, encode: Callable[[Any, int], object], *, key: Any = None, by: str = ""
) -> SerializationError:
    """
    Find the innermost part of a value that cannot be encoded. Encoding itself therefore need not track paths.

    Args:
        value: The value that could not be encoded.
        error: The error of its encoding.
        encode: Encodes a part of the value, given the levels of nesting left, or fails.
        key: The key of the value in the session; None: the value is the session.
        by: The name of the serializer, if it is not the default one.

    Returns:
        An error that names the path and the type of the part.
    """
    path, room = "" if key is None else _step(key), MAX_DEPTH
    parts = _parts(value)
    while room and (candidate := next(parts, None)):
        step, part = candidate
        try:
            encode(part, room - 1)
        except Exception as exc:
            pass_on_interruption(exc)
            value, error, path, room, parts = part, exc, path + step, room - 1, _parts(part)
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    path = path.removeprefix(".")
    where = f"{path[:100]}{'...' if len(path) > 100 else ''}: " if path else ""
    return SerializationError(f"{where}{by}{' ' if by else ''}cannot serialize {name}: {error}")


def _step(key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f".{key}"
    try:
        return f"[{key!r}]"
    except Exception as exc:
        pass_on_interruption(exc)
        return f"[{type(key).__qualname__}]"


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    kind = type(value)
    if issubclass(kind, dict):
        for key, item in dict.items(value):
            yield " key", key
            yield _step(key), item
    elif issubclass(kind, list | tuple):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif issubclass(kind, set | frozenset):
        for item in value:
            yield "", item
    elif _is_dataclass_instance(value):
        for key, item in _fields(value).items():
            yield _step(key), item


# --- from encoded data to values --------------------------------------------------------------------------


def _untag(code: int, data: memoryview) -> Any:
    return _UNTAG[code](data)


def _text(data: memoryview) -> str:
    return str(data, "utf-8", "surrogatepass")


def _from_iso(kind: Any) -> Callable[[memoryview], Any]:
    parse = kind.fromisoformat

    def untag(data: memoryview) -> Any:
        text, _, key = _text(data).partition("[")
        value = parse(text[:-1]).replace(fold=1) if text.endswith("~") else parse(text)
        return value.replace(tzinfo=_zone(key.removesuffix("]"))) if key else value

    return untag


def _zone(key: str) -> ZoneInfo:
    try:
        return ZoneInfo(key)
    except (LookupError, OSError) as exc:  # OSError: the key names a directory of zones
        pass_on_interruption(exc)
        raise ValueError(f"this system does not know the time zone {key!r}: install the package tzdata") from exc


def _is_loadable(key: str) -> bool:
    """Return whether a zone can be loaded by its key. One from a file may have any key and is stored as its offset."""
    try:
        _zone(key)
    except ValueError as exc:
        pass_on_interruption(exc)
        return False
    return True


_untag_timedelta = Decoder(tuple[int, int, int]).decode

_UNTAG: dict[int, Callable[[memoryview], Any]] = {
    _TUPLE: Decoder(tuple, ext_hook=_untag).decode,
    _SET: Decoder(set, ext_hook=_untag).decode,
    _FROZENSET: Decoder(frozenset, ext_hook=_untag).decode,
    _INT: lambda data: int.from_bytes(data, "big", signed=True),
    _DECIMAL: lambda data: Decimal(_text(data)),
    _DATETIME: _from_iso(datetime),
    _DATE: lambda data: date.fromisoformat(_text(data)),
    _TIME: _from_iso(time),
    _TIMEDELTA: lambda data: timedelta(*_untag_timedelta(data)),
    _UUID: lambda data: UUID(bytes=bytes(data)),
    _MARKUP: lambda data: Markup(_text(data)),  # noqa: S704  # it was Markup when it was stored
    _STR: _text,
}

loads: Callable[[Any], Any] = decoder(object)
"""Return the value that `dumps` encoded; raise SerializationError if the data is damaged."""


class MsgpackSerializer:
    """
    The default serializer. It keeps types, encodes equal content to equal bytes, and is safe on untrusted bytes.

    Decoded unchanged: None, bool, int of any size, float, str (also with lone surrogates), bytes, list, tuple, set,
    frozenset, Decimal, datetime (naive, in a ``ZoneInfo``, or with its UTC offset), date, time, timedelta, UUID,
    Markup, and dict, with any hashable of these as key. The order of a dict is part of its content.

    Decoded as the nearest of these: a subclass (named tuple, ``OrderedDict``, ``defaultdict``, ``IntEnum``,
    ``numpy.float64``) as its base, a bytearray as bytes, a dataclass as a dict of its fields, any other object with
    ``__html__`` as Markup, a lazy string as str, any other tzinfo as its offset. A lazy string, as of Flask-Babel or
    Django, is any object that is not a str but has str's ``casefold`` and ``__mod__``.

    A ``msgspec.Raw`` is taken as already encoded. Any other type is a SerializationError.
    """

    __slots__ = ()

    dumps = staticmethod(dumps)
    loads = staticmethod(loads)
