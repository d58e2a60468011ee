"""Sessions as bytes: whole, key by key, merged, and as the body of a stored record."""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
import math
import os
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import pytest
from flask.json.tag import TaggedJSONSerializer
from flask.sessions import SecureCookieSession
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from shmstore import Store
from shmstore.callbacks import Serializer
from shmstore.codec.body import DEFAULT_CODEC, Codec, Record, pack, payload_at, payload_of, unpack
from shmstore.codec.serializers import MsgpackSerializer
from shmstore.errors import SerializationError
from shmstore.policy import Policy
from shmstore.session import Session

FULL = os.environ.get("SHMSTORE_FULL") == "1"
repeatable = settings(derandomize=True, max_examples=100 if FULL else 25)

CODECS = [Codec(), Codec(json), Codec(TaggedJSONSerializer()), Codec(pickle)]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)

SESSION = {
    "_user_id": "4711",
    "_fresh": True,
    "cart": [{"sku": "A-1", "price": 1999}, {"sku": "B-2", "price": 5}],
    "visits": 42,
    "nothing": None,
}

keys = st.text(max_size=6) | st.integers(-3, 300) | st.tuples(st.integers(0, 2), st.text(max_size=2))
# values that json restores, too
contents = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
sessions = st.dictionaries(keys, contents, max_size=8)


@repeatable
@given(session=sessions)
def test_decodes_what_it_encoded(session: dict[Any, Any]) -> None:
    for codec in CODECS:
        decoded = codec.decode(codec.encode(session))
        assert decoded == session, codec.name
        assert list(decoded) == list(session), codec.name


@repeatable
@given(session=sessions)
def test_fields_are_the_encoded_values(session: dict[Any, Any]) -> None:
    for codec in CODECS:
        fields = codec.fields(codec.encode(session))
        assert fields == {key: codec.encode_value(key, value) for key, value in session.items()}, codec.name
        assert {key: codec.decode_value(raw) for key, raw in fields.items()} == session, codec.name


@repeatable
@given(session=sessions, changes=sessions, others=st.lists(keys, max_size=4), data=st.data())
def test_merge_has_the_result_of_dict_update(
    session: dict[Any, Any], changes: dict[Any, Any], others: list[Any], data: st.DataObject
) -> None:
    present = data.draw(st.lists(st.sampled_from(list(session)), max_size=3)) if session else []
    delete = [*others, *present]
    expected = {key: value for key, value in session.items() if key in changes or key not in delete} | changes
    for codec in CODECS:
        payload = codec.encode(session)
        merged = codec.merge(payload, changes, delete)
        assert merged == codec.encode(expected), codec.name
        raws = {key: msgspec.Raw(codec.encode_value(key, value)) for key, value in changes.items()}
        assert codec.merge(memoryview(payload), raws, delete) == merged, codec.name


@every_codec
def test_merge_of_nothing_changes_nothing(codec: Codec) -> None:
    payload = codec.encode(SESSION)
    assert codec.merge(payload) == payload


def test_merge_does_not_decode_untouched_values() -> None:
    unknown = msgspec.msgpack.encode({"a": 1, "b": msgspec.msgpack.Ext(99, b"?")})
    assert Codec().merge(unknown, {"a": 2}) == unknown.replace(b"\x01", b"\x02")


@every_codec
def test_fields_show_a_nested_change(codec: Codec) -> None:
    session = {"a": 1, "cart": [{"price": 1}]}
    before = codec.fields(codec.encode(session))
    session["cart"][0]["price"] = 2  # type: ignore[index]
    after = codec.fields(codec.encode(session))
    assert [key for key in after if after[key] != before[key]] == ["cart"]


@every_codec
def test_changes_are_the_keys_that_differ(codec: Codec) -> None:
    before = {"same": [1, {"a": None}], "nested": [1, {"a": 1}], "type": 1, "gone": 1}
    after = {"new": 1, "type": True, "nested": [1, {"a": 2}], "same": [1, {"a": None}]}
    old, new = codec.encode(before), codec.encode(after)
    changed, removed = codec.changes(old, new)
    assert {key: codec.decode_value(raw) for key, raw in changed.items()} == {
        key: after[key] for key in ("new", "type", "nested")
    }
    assert removed == ["gone"]
    reordered = dict(reversed(before.items()))
    assert codec.changes(old, codec.encode(reordered)) == ({}, [])


class Encrypting:
    """Encodes the same value differently each time, as encryption with a nonce does."""

    name = "encrypting"

    @staticmethod
    def dumps(value: Any) -> bytes:
        return os.urandom(8) + pickle.dumps(value)

    @staticmethod
    def loads(data: bytes) -> Any:
        return pickle.loads(data[8:])


def test_changes_compare_values_if_the_encoding_is_not_deterministic() -> None:
    codec = Codec(Encrypting())
    session = {"same": [1, "a"], "type": 1, "nested": {"a": [1]}}
    stored = codec.encode(session)
    assert codec.encode(session) != stored
    session.update(type=True, nested={"a": (1,)})
    changed, removed = codec.changes(stored, codec.encode(session))
    assert (set(changed), removed) == ({"type", "nested"}, [])


class Color(enum.IntEnum):
    RED = 1


class Point(NamedTuple):
    x: int


@dataclass
class Item:
    price: Any


TYPES: list[Any] = [
    1, True, 1.0, Color.RED, {"x": 1}, OrderedDict(x=1), [1], (1,), Point(1), Item(1), Item([]), {"price": 1}, math.nan,
    {"a": [1]}, {"a": [Color.RED]}, {"a": (1,)}, b"1", "1", None,
]  # fmt: skip


@pytest.mark.parametrize("serializer", [pickle, Encrypting()], ids=["pickle", "encrypting"])
def test_a_changed_type_is_a_change_and_an_equal_value_is_not(serializer: Serializer) -> None:
    codec = Codec(serializer)
    for before, after in itertools.product(range(len(TYPES)), repeat=2):
        changed, _ = codec.changes(codec.encode({"a": TYPES[before]}), codec.encode({"a": TYPES[after]}))
        assert bool(changed) is (before != after), (TYPES[before], TYPES[after])


def test_a_value_that_cannot_be_compared_counts_as_changed() -> None:
    codec = Codec(Encrypting())
    deep: list[Any] = []
    deep.append(deep)
    session = {"deep": deep, "same": 1}
    changed, _ = codec.changes(codec.encode(session), codec.encode(session))
    assert list(changed) == ["deep"]


class Prices:
    """Decodes a value that it does not encode."""

    @staticmethod
    def dumps(value: Any) -> str:
        return json.dumps(value)

    @staticmethod
    def loads(data: bytes) -> Any:
        return json.loads(data, parse_float=Decimal)


def test_a_value_that_is_decoded_but_not_encoded_keeps_its_bytes() -> None:
    codec = Codec(Prices())
    stored = codec.encode({"price": 1.5, "prices": [1.5], "n": 1})
    session = codec.decode(stored)
    assert codec.encode(session, stored) == stored
    session["n"] = 2
    changed, removed = codec.changes(stored, codec.encode(session, stored))
    assert (list(changed), removed) == (["n"], [])
    session["prices"].append(1)
    with pytest.raises(SerializationError, match="prices"):
        codec.encode(session, stored)
    for key, value in (("price", Decimal("2.5")), ("other", Decimal("1.5"))):
        with pytest.raises(SerializationError, match=key):
            codec.encode(codec.decode(stored) | {"prices": 1, key: value}, stored)
    with pytest.raises(SerializationError, match="price"):
        codec.encode(codec.decode(stored))


def test_a_session_with_a_value_that_is_decoded_but_not_encoded_can_be_read_and_changed() -> None:
    with Store(memory=2**20, serializer=Prices(), check_period=None) as store:
        store.set("a" * 43, {"price": 1.5})
        session = Session(lambda: store, "a" * 43, Policy(ttl=60))
        assert session["price"] == Decimal("1.5")
        assert not session.modified
        assert session.save()
        session["n"] = 1
        assert session.save()
        assert store.all() == {"a" * 43: {"price": Decimal("1.5"), "n": 1}}


class Lazy:
    def __str__(self) -> str:
        return "text"

    def __mod__(self, values: Any) -> str:
        return "text"

    def casefold(self) -> str:
        return "text"


def test_changes_include_a_key_whose_decoded_form_differs() -> None:
    codec = Codec(json)
    for key in (Lazy(), math.nan):
        changed, removed = codec.changes(codec.encode({"a": 1}), codec.encode({"a": 1, key: 2}))
        assert [codec.decode_value(raw) for raw in changed.values()] == [2]
        assert removed == []


@every_codec
def test_takes_a_raw_value_as_encoded(codec: Codec) -> None:
    raw = msgspec.Raw(codec.encode_value("visits", 43))
    assert codec.encode_value("visits", raw) == bytes(raw)
    assert codec.decode_value(raw) == 43
    assert codec.decode(codec.encode({"visits": raw})) == {"visits": 43}


def test_encodes_the_sessions_of_flask() -> None:
    session = SecureCookieSession({"_flashes": [("message", "hi")], "at": datetime(2026, 1, 1)})
    decoded = Codec().decode(Codec().encode(session))
    assert (type(decoded), decoded) == (dict, dict(session))


def test_default_payload_is_plain_msgpack() -> None:
    assert msgspec.msgpack.decode(Codec().encode(SESSION)) == SESSION


class Rot13:
    """A serializer whose `dumps` returns text and whose `loads` takes bytes."""

    def dumps(self, value: Any, /) -> str:
        return repr(value)

    def loads(self, data: bytes, /) -> Any:
        return data.decode()


def test_stores_text_of_a_serializer_as_utf8() -> None:
    codec = Codec(Rot13())
    assert codec.decode(codec.encode({"a": "ü"})) == {"a": "'ü'"}


def _namesake() -> ModuleType:
    module = ModuleType("msgpack")
    module.dumps, module.loads = pickle.dumps, pickle.loads  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("serializer", "name"),
    [
        (None, "msgpack"),
        (MsgpackSerializer(), "msgpack"),
        (json, "json"),
        (pickle, "pickle"),
        (TaggedJSONSerializer(), "flask.json.tag.TaggedJSONSerializer"),
        (Rot13(), f"{__name__}.Rot13"),
        (_namesake(), "msgpack (module)"),
        (type("Own", (MsgpackSerializer,), {"__module__": "shop"})(), "shop.Own"),
    ],
)
def test_names_the_serializer(serializer: Serializer | None, name: str) -> None:
    assert Codec(serializer).name == name


def test_tagged_json_keeps_its_own_types() -> None:
    codec = Codec(TaggedJSONSerializer())
    session = {"t": (1, 2), "m": Markup("<b>"), "b": b"x"}
    assert codec.decode(codec.encode(session)) == session


class Failing:
    def dumps(self, value: Any, /) -> Any:
        return 5 if value == 5 else 1 / 0

    def loads(self, data: bytes, /) -> Any:
        raise KeyError("gone")


@pytest.mark.parametrize(
    ("codec", "cause", "path"),
    [
        (Codec(), type(None), r"^cart\[1\]\.x: cannot serialize object"),
        (Codec(json), TypeError, r"^cart\[1\]\.x: json cannot serialize object"),
        (Codec(TaggedJSONSerializer()), TypeError, r"^cart\[1\]\.x: flask\.json\..* cannot serialize object"),
        (Codec(Failing()), ZeroDivisionError, r"^cart\[0\]: .*Failing cannot serialize int: division by zero"),
    ],
)
def test_names_the_part_that_cannot_be_encoded(codec: Codec, cause: type[Exception], path: str) -> None:
    value = [1, {"x": object()}]
    payload = msgspec.msgpack.encode({})
    for attempt in (
        lambda: codec.encode({"cart": value}),
        lambda: codec.encode_value("cart", value),
        lambda: codec.merge(payload, {"cart": value}),
    ):
        with pytest.raises(SerializationError, match=path) as caught:
            attempt()  # type: ignore[no-untyped-call]
        assert isinstance(caught.value.__cause__, cause)


def test_refuses_a_serializer_that_does_not_return_bytes() -> None:
    with pytest.raises(SerializationError, match=r"^a: "):
        Codec(Failing()).encode({"a": 5})


def test_names_the_key_that_cannot_be_decoded() -> None:
    codec = Codec(Failing())
    payload = Codec(json).encode({"a": 1})
    with pytest.raises(SerializationError, match=r"^a: .*Failing") as caught:
        codec.decode(payload)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(SerializationError, match="Failing"):
        codec.decode_value(codec.fields(payload)["a"])


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\x90", b"\x81\xa1a", b"\x81\xa1a\x01\x01", b"\x81\x80\x01"])
@every_codec
def test_refuses_a_payload_that_is_not_a_map(codec: Codec, payload: bytes) -> None:
    for read in (codec.decode, codec.fields, codec.merge):
        with pytest.raises(SerializationError):
            read(payload)


def test_refuses_values_of_another_serializer() -> None:
    with pytest.raises(SerializationError):
        Codec(json).decode(Codec().encode({"a": 1}))


@pytest.mark.parametrize("codec", CODECS[:3], ids=lambda codec: codec.name)
@settings(repeatable, max_examples=200 if FULL else 50)
@given(payload=st.binary(max_size=100), prefix=st.sampled_from([b"", b"\x81\xa1a", b"\x82\x01\x02"]))
def test_any_payload_gives_a_value_or_the_error(codec: Codec, payload: bytes, prefix: bytes) -> None:
    for read in (codec.decode, codec.fields, codec.merge, codec.decode_value):
        with contextlib.suppress(SerializationError):
            read(prefix + payload)


# --- the body of a record ---

sids = st.text(min_size=1, max_size=64)
owners = st.none() | st.text(max_size=80)
names = st.just(DEFAULT_CODEC) | st.text(min_size=1, max_size=60)


@repeatable
@given(sids, owners, names, st.binary(max_size=300), st.sampled_from([bytes, memoryview]))
def test_unpacks_what_it_packed(sid: str, owner: str | None, name: str, payload: bytes, kind: Any) -> None:
    body = kind(pack(sid, owner, name, kind(payload)))
    record = unpack(body)
    assert record == Record(sid, owner, name, payload)
    assert type(record.payload) is kind
    assert body[payload_at(body) :] == payload_of(body, name) == payload


def test_costs_four_bytes() -> None:
    assert len(pack("s" * 43, None, DEFAULT_CODEC, b"payload")) == 43 + 7 + 4
    assert len(pack("s" * 43, "4711", DEFAULT_CODEC, b"payload")) == 43 + 4 + 7 + 4


def test_no_owner_and_an_empty_owner_differ() -> None:
    assert unpack(pack("s", None, DEFAULT_CODEC, b"")).owner is None
    assert unpack(pack("s", "", DEFAULT_CODEC, b"")).owner == ""


def test_takes_the_longest_texts() -> None:
    record = Record("ü" * 128, "o" * 65534, "n" * 255, b"p")
    assert unpack(pack(*record)) == record


@pytest.mark.parametrize(
    ("sid", "owner", "name"),
    [
        ("", None, "json"),
        ("s" * 257, None, "json"),
        ("s", "o" * 65535, "json"),
        ("s", None, "n" * 256),
        ("\udc80", None, "json"),
        ("s", "\udc80", "json"),
    ],
    ids=["no id", "long id", "long owner", "long name", "surrogate in id", "surrogate in owner"],
)
def test_refuses_texts_that_do_not_fit(sid: str, owner: str | None, name: str) -> None:
    with pytest.raises(SerializationError, match="does not fit"):
        pack(sid, owner, name, b"")


def test_payload_of_another_codec_is_refused() -> None:
    with pytest.raises(SerializationError, match="'json'"):
        payload_of(pack("s", None, "json", b""), DEFAULT_CODEC)
    with pytest.raises(SerializationError, match="'msgpack'"):
        payload_of(pack("s", None, DEFAULT_CODEC, b""), "json")


def test_refuses_every_truncation() -> None:
    body = pack("session", "owner", "json", b"")
    for size in range(len(body)):
        for read in (unpack, payload_at):
            with pytest.raises(SerializationError, match="damaged record"):
                read(body[:size])


@repeatable
@given(st.binary(max_size=80))
def test_any_body_gives_a_record_or_the_error(body: bytes) -> None:
    with contextlib.suppress(SerializationError):
        assert body.endswith(unpack(body).payload)
