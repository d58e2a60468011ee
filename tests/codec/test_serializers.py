"""The default serializer: each value is restored, or refused with an error that names it."""

from __future__ import annotations

import contextlib
import enum
import io
import json
import math
import os
import pickle
import signal
import struct
import sys
import threading
from collections import Counter, OrderedDict, UserString, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pytest
from flask.json.tag import TaggedJSONSerializer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from werkzeug.datastructures import MultiDict

from shmstore import Store
from shmstore.callbacks import Serializer
from shmstore.codec import serializers
from shmstore.codec.body import Codec
from shmstore.codec.serializers import MAX_DEPTH, MsgpackSerializer
from shmstore.engine import core
from shmstore.errors import SerializationError
from shmstore.policy import Policy
from shmstore.session import Session

FULL = os.environ.get("SHMSTORE_FULL") == "1"
repeatable = settings(derandomize=True, max_examples=100 if FULL else 25)

serializer = MsgpackSerializer()
dumps, loads = serializer.dumps, serializer.loads


def same(a: Any, b: Any) -> bool:
    """Compare values with their types, order, precision and NaNs."""
    return type(a) is type(b) and bool(_same(a, b))


def _same(a: Any, b: Any) -> Any:
    match a:
        case dict():
            return len(a) == len(b) and all(
                same(k, l) and same(v, w) for (k, v), (l, w) in zip(a.items(), b.items(), strict=True)
            )
        case list() | tuple():
            return len(a) == len(b) and all(map(same, a, b))
        case set() | frozenset():
            return len(a) == len(b) and sorted(map(dumps, a)) == sorted(map(dumps, b))
        case float():
            return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
        case Decimal():
            return a.as_tuple() == b.as_tuple()
        case datetime() | time():
            named = [zone if isinstance(zone, ZoneInfo) else None for zone in (a.tzinfo, b.tzinfo)]
            return (
                a.replace(tzinfo=None) == b.replace(tzinfo=None)
                and (a.fold, a.utcoffset()) == (b.fold, b.utcoffset())
                and named[0] is named[1]
            )
        case _:
            return a == b


offsets = st.integers(-86399, 86399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
zones = st.none() | st.just(UTC) | offsets
texts = st.text(st.characters())  # lone surrogates among them
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | texts
    | st.binary()
    | texts.map(Markup)
    | st.uuids()
    | st.decimals()
    | st.dates()
    | st.timedeltas()
    | st.datetimes(timezones=st.none() | zones.filter(bool) | st.timezones())
    | st.times(timezones=zones | st.timezones())
)


# a signaling NaN has no hash
def _hashable(value: Any) -> bool:
    return not (isinstance(value, Decimal) and value.is_snan())


hashables = st.recursive(
    scalars.filter(_hashable),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.frozensets(inner, max_size=4),
    max_leaves=6,
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=5)
        | st.dictionaries(hashables, inner, max_size=5)
        | st.sets(hashables, max_size=4)
    ),
    max_leaves=30,
)


@settings(repeatable, max_examples=500 if FULL else 100)
@given(values)
def test_comes_back_with_value_and_type(value: Any) -> None:
    assert same(loads(dumps(value)), value)


@repeatable
@given(values)
def test_encodes_what_came_back_to_the_same_bytes(value: Any) -> None:
    data = dumps(value)
    assert dumps(loads(data)) == data


NOW = datetime(2026, 11, 23, 15, 30, 34, 364466)
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    "value",
    [
        pytest.param((1, ("a", [2])), id="tuple"),
        pytest.param(b"\x00\xff", id="bytes"),
        pytest.param(NOW.replace(tzinfo=UTC), id="aware datetime"),
        pytest.param(NOW.replace(tzinfo=timezone(timedelta(hours=5, minutes=30))), id="datetime with offset"),
        pytest.param(NOW, id="naive datetime"),
        pytest.param(NOW.replace(fold=1), id="fold"),
        pytest.param(UUID("12345678-1234-5678-1234-567812345678"), id="UUID"),
        pytest.param(Markup("<b>hi</b>"), id="Markup"),
        pytest.param(Decimal("19.990"), id="Decimal"),
        pytest.param({1, "a", (2, 3)}, id="set"),
        pytest.param(frozenset({frozenset({1}), b"x"}), id="frozenset"),
        pytest.param({1: "a", -1: "b"}, id="int dict key"),
        pytest.param({None: 1, True: 2, 2.5: 3, b"b": 4, (1, (2,)): 5, date.min: 6, 2**70: 7}, id="other dict keys"),
        pytest.param(2**70, id="int 2**70"),
        pytest.param(-(2**70), id="int -2**70"),
        pytest.param([2**64 - 1, 2**64, -(2**63), -(2**63) - 1], id="int boundaries"),
        pytest.param(1 << 100_000, id="int of 30000 digits"),
        pytest.param([math.inf, -math.inf, math.nan, -0.0], id="special floats"),
        pytest.param([datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)], id="datetime bounds"),
        pytest.param([timedelta.min, timedelta.max, timedelta(microseconds=-1)], id="timedelta"),
        pytest.param([date.min, date.max, time.max, time(1, tzinfo=UTC)], id="date and time"),
        pytest.param([NOW.replace(tzinfo=BERLIN), NOW.replace(month=7, tzinfo=BERLIN, fold=1)], id="ZoneInfo"),
        pytest.param([time(1, 2, 3, 4, tzinfo=BERLIN), NOW.replace(tzinfo=ZoneInfo("UTC"))], id="more of ZoneInfo"),
        pytest.param({"\ud83d": ["\udce9.txt", ("\ud800",), {"\udc80"}], "ok": "\U0001f600"}, id="lone surrogates"),
        pytest.param({("\ud83d", 1): {2: Markup("\ud83d")}}, id="surrogates in other keys"),
        pytest.param([Decimal("NaN"), Decimal("-Infinity"), Decimal("1E+999999")], id="special Decimals"),
    ],
)
def test_keeps_types_that_other_serializers_lose(value: Any) -> None:
    assert same(loads(dumps({"k": value})), {"k": value})


def test_keeps_the_offset_of_a_zone() -> None:
    winter, summer = NOW.replace(tzinfo=BERLIN), NOW.replace(month=7, tzinfo=BERLIN)
    assert [x.utcoffset() for x in loads(dumps([winter, summer]))] == [timedelta(hours=1), timedelta(hours=2)]
    assert loads(dumps(winter)) == winter


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class Plan(str, enum.Enum):  # noqa: UP042  # whose str() is not its value
    FREE = "free"


class Price(Decimal, enum.Enum):
    LOW = "9.90"


Point = namedtuple("Point", "x y")


class Html:
    def __html__(self) -> str:
        return "<i>x</i>"


class SafeText(str):
    def __html__(self) -> str:
        return str(self)


class BabelLazy:
    """A lazy text as in Flask-Babel: some special methods by hand, all others from the text."""

    def __getattr__(self, name: str) -> Any:
        return getattr(str(self), name)

    def __str__(self) -> str:
        return "Grüße"

    def __mod__(self, other: Any) -> str:
        return f"{self}{other}"

    def __html__(self) -> str:
        return str(self)


@pytest.mark.parametrize("key", ["Mars/Olympus_Mons", "Europe", "../../etc/passwd", "/etc/passwd", "\udc80", ""])
def test_an_unusable_zone_name_is_damaged_data(key: str) -> None:
    data = dumps(NOW.replace(tzinfo=ZoneInfo("Europe/Berlin")))
    text = f"{NOW.isoformat()}[{key}]".encode(errors="surrogatepass") if key else b"x["
    assert data[:1] == b"\xc7"
    assert data[2] == 6
    with pytest.raises(SerializationError, match="damaged data"):
        loads(b"\xc7" + bytes([len(text)]) + b"\x06" + text)


@dataclass
class User:
    name: str
    roles: Any = ("admin",)
    more: Any = None


@dataclass
class Shown:
    """A dataclass that is also Markup: Flask's own session stores it as Markup."""

    def __html__(self) -> str:
        return "<i>\ud83d</i>"


class Moment(datetime):
    """As pendulum's and freezegun's."""

    def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:
        return "now"


def _moved() -> OrderedDict[str, int]:
    result = OrderedDict(a=1, b=2)
    result.move_to_end("a")
    return result


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Level.HIGH, 3),
        (Plan.FREE, "free"),
        (Price.LOW, Decimal("9.90")),
        (Point(1, (2,)), (1, (2,))),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (_moved(), {"b": 2, "a": 1}),
        (MultiDict([("a", 1), ("a", 2)]), {"a": [1, 2]}),
        (type("L", (list,), {})([1, (2,)]), [1, (2,)]),
        (type("F", (float,), {})(1.5), 1.5),
        (type("B", (bytes,), {})(b"x"), b"x"),
        (type("S", (set,), {})({1}), {1}),
        (bytearray(b"x"), b"x"),
        (Html(), Markup("<i>x</i>")),
        (SafeText("<b>"), Markup("<b>")),
        (BabelLazy(), "Grüße"),
        (UserString("text"), "text"),
        (Moment(2026, 1, 2, 3), datetime(2026, 1, 2, 3)),
        (Moment(2026, 1, 2, 3, tzinfo=UTC), datetime(2026, 1, 2, 3, tzinfo=UTC)),
        ({Level.HIGH: 1, Plan.FREE: 2}, {3: 1, "free": 2}),
        (msgspec.Raw(b"\x07"), 7),
        (
            User("ada", more=User("bob")),
            {"name": "ada", "roles": ("admin",), "more": {"name": "bob", "roles": ("admin",), "more": None}},
        ),
        (User("\ud83d", more=[Level.HIGH]), {"name": "\ud83d", "roles": ("admin",), "more": [3]}),
        (Shown(), Markup("<i>\ud83d</i>")),
        (UserString("\ud83d"), "\ud83d"),
        (type("T", (str,), {})("\ud83d"), "\ud83d"),
        (Point("\ud83d", defaultdict(list, a=["\ud83d"])), ("\ud83d", {"a": ["\ud83d"]})),
    ],
    ids=lambda value: type(value).__name__,
)
def test_encodes_a_subclass_as_its_nearest_base_type(value: Any, expected: Any) -> None:
    assert same(loads(dumps([value])), [expected])


def test_does_not_change_what_it_encodes() -> None:
    value = {"a": [(1, 2**70)], "b": {"c": {1, 2}}, 3: (4,)}
    before = pickle.dumps(value)
    dumps(value)
    assert pickle.dumps(value) == before


def test_encodes_equal_sets_equally() -> None:
    # 8 and 16 collide in a small table, so these two iterate in different orders
    one, other = {8, 16, "a"}, {"a", 16, 8}
    assert dumps([one, frozenset(one)]) == dumps([other, frozenset(other)])


@pytest.mark.parametrize("other", [NOW.replace(tzinfo=timezone(timedelta(0), "Z")), Moment.fromtimestamp(0, UTC)])
def test_encodes_utc_equally_by_any_name(other: datetime) -> None:
    assert dumps(other) == dumps(datetime.fromtimestamp(other.timestamp(), UTC))


class Money:
    pass


class Broken:
    def __html__(self) -> str:
        raise RuntimeError("no request")


class Nowhere(tzinfo):
    dst = tzname = lambda self, when: None

    def utcoffset(self, when: datetime | None) -> None:
        return None


def _cycle() -> dict[str, Any]:
    value: dict[str, Any] = {"a": [1]}
    value["a"].append(value)
    return value


def _nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"cart": [1, 2, {"price": Money()}]},
            r"^cart\[2\]\.price: cannot serialize .*test_serializers\.Money: ",
        ),
        ({"a": ({"b": Money()},)}, r"^a\[0\]\.b: .*Money"),
        ({"two words": {7: Money()}}, r"^\['two words'\]\[7\]: .*Money"),
        ({"prices": {Money(): 1}}, r"^prices key: .*Money"),
        ({"tags": {1, Colour.RED}}, r"^tags: .*Colour"),
        ({"name": ["\udc80"], "x": Money()}, r"^x: cannot serialize .*Money: .*store a str, a number or a dict"),
        ({"x": {"\udc80": Money()}}, r"^x.*: cannot serialize .*Money"),
        ({"user": User("ada", Money())}, r"^user\.roles: cannot serialize .*Money"),
        ({"x": Broken()}, r"^x: .*Broken: no request"),
        ({"x": time(1, tzinfo=Nowhere())}, r"^x: cannot serialize datetime\.time: .*UTC"),
        ({"x": datetime(2026, 1, 1, tzinfo=Nowhere())}, r"^x: cannot serialize datetime\.datetime: .*UTC"),
        ({"x": datetime(2026, 1, 1, tzinfo=timezone(timedelta(microseconds=1)))}, r"^x: .*whole seconds"),
        (deque([1]), r"^cannot serialize collections\.deque: "),
        (1j, r"^cannot serialize complex: "),
        (Money, r"^cannot serialize type: "),
        ({"x": msgspec.msgpack.Ext(1, b"")}, r"^x: cannot serialize msgspec\.msgpack\.Ext"),
        (_cycle(), r"^a\[1\]\.a\[1\]\.a.*\.\.\.: cannot serialize (dict|list): nested deeper than"),
    ],
    ids=range(17),
)
def test_an_encoding_error_names_the_value(value: Any, message: str) -> None:
    with pytest.raises(SerializationError, match=message):
        dumps(value)


WRAPPERS: list[Callable[[Any], Any]] = [
    lambda inner: [inner],
    lambda inner: (inner,),
    lambda inner: {"k": inner},
    lambda inner: {1: inner},
    lambda inner: {(inner,)},
]


@pytest.mark.parametrize("wrap", WRAPPERS[:4], ids=["list", "tuple", "dict", "dict with int key"])
def test_takes_every_depth_up_to_its_limit(wrap: Callable[[Any], Any]) -> None:
    value = _nested(MAX_DEPTH, wrap)
    assert loads(dumps(value)) == value
    with pytest.raises(SerializationError, match="nested deeper than"):
        dumps(wrap(value))


@pytest.mark.parametrize("wrap", WRAPPERS[:4], ids=["list", "tuple", "dict", "dict with int key"])
def test_refuses_absurd_depth(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(SerializationError, match="nested deeper than"):
        dumps(_nested(50_000, wrap))


def test_takes_nested_frozensets_up_to_its_limit() -> None:
    value = _nested(MAX_DEPTH, lambda inner: frozenset({inner}))
    assert same(loads(dumps(value)), value)


def _ext(code: int, data: bytes) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xa1\xff",
        b"\xdd\xff\xff\xff\xff" * 1000,
        b"\x91" * 1_000_000,
        b"\x81\x01" * 1_000_000,
        _ext(99, b""),
        _ext(-128, b""),
        _ext(1, b"\x01"),
        _ext(1, b"\x91"),
        _ext(1, b"\xdd\xff\xff\xff\xff"),
        _ext(2, b"\x91\x80"),
        _ext(3, b"\x91" + _ext(2, b"\x90")),
        _ext(5, b"one"),
        _ext(5, b"\xff"),
        _ext(6, b"yesterday"),
        _ext(6, b"~"),
        _ext(7, b"2026-02-30"),
        _ext(8, b"25:00"),
        _ext(9, b"\x91\x01"),
        _ext(9, msgspec.msgpack.encode([2**62, 0, 0])),
        _ext(10, b"short"),
        _ext(11, b"\xff"),
        b"\x81" + _ext(2, b"\x90") + b"\x01",
        b"\x81" + _ext(5, b"sNaN") + b"\x01",
        b"\x81\x80\x01",
    ],
)
def test_refuses_damaged_data(data: bytes) -> None:
    with pytest.raises(SerializationError, match="damaged data"):
        loads(data)


def test_refuses_nested_extensions_that_would_exhaust_the_stack() -> None:
    # headers written from the inside out, each extension holding an array of the next
    data = b"\x90"
    for _ in range(20_000):
        data = b"\xc9" + struct.pack(">Ib", len(data) + 1, 1) + b"\x91" + data if len(data) < 100_000 else data
    failures: list[BaseException] = []

    def load() -> None:
        try:
            loads(data)
        except SerializationError as exc:
            failures.append(exc)

    # a thread has a smaller stack than main
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert len(failures) == 1


@settings(repeatable, max_examples=500 if FULL else 100)
@given(st.binary(max_size=200))
@example(b"\x81\xa1a\xd4\x04\x00")
def test_any_bytes_give_a_value_or_the_error(data: bytes) -> None:
    with contextlib.suppress(SerializationError):
        loads(data)


@settings(repeatable, max_examples=300 if FULL else 60)
@given(st.integers(-128, 127), st.binary(max_size=60), values)
def test_any_extension_gives_a_value_or_the_error(code: int, data: bytes, value: Any) -> None:
    for content in (data, dumps(value)):
        with contextlib.suppress(SerializationError):
            loads(_ext(code, content))


@settings(repeatable, max_examples=300 if FULL else 60)
@given(values, st.data())
def test_damaged_bytes_give_a_value_or_the_error(value: Any, data: st.DataObject) -> None:
    encoded = bytearray(dumps(value))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(SerializationError):
        loads(bytes(encoded))


def test_reads_a_number_of_any_size_in_linear_time() -> None:
    # int() of so many digits would be refused by the interpreter, or take minutes
    assert sys.get_int_max_str_digits() < 1_000_000
    assert loads(_ext(4, b"\x7f" * 1_000_000)).bit_length() == 7_999_999


@pytest.mark.parametrize(
    "candidate",
    [json, pickle, TaggedJSONSerializer(), MsgpackSerializer()],
    ids=lambda each: Codec(each).name,
)
def test_modules_and_objects_implement_the_protocol(candidate: Serializer) -> None:
    assert isinstance(candidate, Serializer)


# -- through a store and a session ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf() -> Iterator[Store]:
    with Store(memory=2**23, check_period=None) as store:
        yield store


@settings(repeatable, max_examples=200 if FULL else 40)
@given(value=values)
def test_comes_back_from_a_store_and_in_a_session(shelf: Store, value: Any) -> None:
    shelf.set("a", {"k": value})
    assert same(shelf.get("a"), {"k": value})
    session = Session(lambda: shelf, "a", Policy(ttl=60))
    assert same(dict(session), {"k": value})
    assert not session.modified, "what came back is what is stored"


def test_what_cannot_be_stored_leaves_the_stored_session_as_it_was(shelf: Store) -> None:
    shelf.set("a", {"k": 1})
    session = Session(lambda: shelf, "a", Policy(ttl=60))
    session.update(k=2, cart=[{"price": Money()}])
    for attempt in (session.save, lambda: shelf.set("a", dict(session)), lambda: shelf.update("a", dict(session))):
        with pytest.raises(SerializationError, match=r"^cart\[0\]\.price: cannot serialize .*Money"):
            attempt()
    assert shelf.get("a") == {"k": 1}


SERIALIZERS: list[Any] = [None, json, TaggedJSONSerializer(), pickle]


@pytest.mark.parametrize("serializer", SERIALIZERS, ids=lambda each: Codec(each).name)
def test_nested_changes_are_detected_with_every_serializer(serializer: Any) -> None:
    with Store(memory=2**20, serializer=serializer) as store:
        store.set("a", {"cart": [{"n": 1}], "other": None})
        session = Session(lambda: store, "a", Policy(ttl=60))
        assert session["cart"] == [{"n": 1}]
        assert not session.modified
        session["cart"][0]["n"] = 2
        assert session.modified
        assert session.save()
        assert store.get("a") == {"cart": [{"n": 2}], "other": None}


@pytest.mark.parametrize(("serializer", "loses"), [(json, 9), (TaggedJSONSerializer(), 5), (pickle, 0), (None, 0)])
def test_the_table_of_types(serializer: Any, loses: int) -> None:
    """Types that the default serializer keeps and others lose; pickle, which can run code, keeps all of them too."""
    rows = [
        (1, 2), b"bytes", NOW.replace(tzinfo=UTC), NOW, UUID(int=1), Markup("<b>"), Decimal("1.20"), {1, 2},
        {1: "int key"}, 2**70,
    ]  # fmt: skip
    lost = 0
    with Store(memory=2**20, serializer=serializer) as store:
        for value in rows:
            try:
                store.set("a", {"k": value})
            except SerializationError:
                lost += 1
            else:
                lost += not same(store.get("a"), {"k": value})
    assert lost == loses


executed: list[bool] = []


def execute() -> None:
    executed.append(True)


class Evil:
    def __reduce__(self) -> Any:
        return execute, ()


hostile = (
    st.binary(max_size=100)
    | st.tuples(values, st.integers(0, 10**6), st.integers(0, 255)).map(lambda args: _damaged(*args))
    | st.just(pickle.dumps(Evil()))
)


def _damaged(value: Any, at: int, by: int) -> bytes:
    data = bytearray(dumps(value))
    data[at % len(data)] ^= by
    return bytes(data)


@pytest.mark.parametrize("serializer", SERIALIZERS[:-1], ids=lambda each: Codec(each).name)
@settings(repeatable, max_examples=300 if FULL else 60)
@given(data=hostile)
def test_hostile_bytes_give_a_miss_a_value_or_the_error(serializer: Any, data: bytes) -> None:
    for raw in (data, dumps(data)):  # as a value of the default serializer, and as bytes for another one
        with Store(memory=2**16, serializer=serializer, check_period=None) as store:
            store.set("a", {"k": msgspec.Raw(raw)})
            found = store.get("a")
            assert found is None or found.keys() <= {"k"}
            assert store.all().keys() <= {"a"}
            session = Session(lambda: store, "a", Policy(ttl=60))
            assert dict(session) == {} or found is not None
            with contextlib.suppress(SerializationError):
                store.update("a", {"more": 1})
    assert executed == []


@pytest.mark.parametrize("serializer", SERIALIZERS[:-1], ids=lambda each: Codec(each).name)
def test_a_pickle_is_not_loaded_without_a_pickle_serializer(serializer: Any) -> None:
    with Store(memory=2**16, serializer=pickle) as store:
        store.set("a", {"k": Evil()})
        store._codec = Codec(serializer)
        assert store.get("a") is None
        assert dict(Session(lambda: store, "a", Policy(ttl=60))) == {}
        assert executed == []
        store._codec = Codec(pickle)
        assert store.get("a") == {"k": None}
        assert executed.pop()


class Foreign:
    """A serializer that refuses everything."""

    name = "foreign"

    def dumps(self, value: Any) -> bytes:
        raise KeyError("why")

    def loads(self, data: bytes) -> Any:
        raise NotImplementedError


def test_the_traceback_of_a_refused_value_ends_at_the_caller() -> None:
    with Store(memory=2**20) as store, Store(memory=2**20, serializer=Foreign()) as foreign:
        store.set("a", {})
        for write in (
            lambda: store.set("a", {"x": {"y": [object()]}}),
            lambda: store.update("a", {"x": {"y": [object()]}}),
            lambda: store.codec.encode_value("x", {"y": [object()]}),
        ):
            with pytest.raises(SerializationError, match=r"x\.y\[0\]: cannot serialize object") as refused:
                write()
            assert refused.value.__cause__ is refused.value.__context__ is None
        with pytest.raises(SerializationError) as refused:  # the fault is in the user's own code: it is shown
            foreign.set("a", {"x": 1})
        assert isinstance(refused.value.__cause__, KeyError)


@dataclass(frozen=True)
class Place:
    x: int = 1
    y: int = field(init=False, compare=False)


@pytest.mark.parametrize("value", [{Place()}, {(1, (Place(),))}, frozenset({Place()}), {Place(): 1}, {(Place(),): 1}])
def test_a_dataclass_inside_a_set_or_a_key_is_refused(value: object) -> None:
    """It would be restored as a dict, which is not hashable, so its container would be unreadable."""
    with pytest.raises(SerializationError, match=r"k: cannot serialize .*a dataclass is stored as a dict"):
        MsgpackSerializer().dumps({"k": value})


def test_an_unset_field_of_a_dataclass_is_omitted() -> None:
    serializer = MsgpackSerializer()
    assert serializer.loads(serializer.dumps(Place())) == {"x": 1}


def test_an_unknown_zone_comes_back_as_its_offset() -> None:
    header = struct.pack(">4s16x6l", b"TZif", 0, 0, 0, 0, 1, 4)  # one type of local time, 4 bytes of names: RFC 9636
    zone = ZoneInfo.from_file(io.BytesIO(header + struct.pack(">lbb", 7200, 0, 0) + b"XYZ\0"), key="My/Zone")
    serializer = MsgpackSerializer()
    found = serializer.loads(serializer.dumps(datetime(2026, 7, 1, 12, tzinfo=zone)))
    assert found.isoformat() == "2026-07-01T12:00:00+02:00"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.binary() | st.integers(-(2**63), 2**64 - 1),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


class Name(str):
    __slots__ = ()


def is_plain(value: Any, room: int) -> bool:
    """Whether a value needs no tag, which both engines must agree about."""
    try:
        plain = serializers._tag(value, room) is value
    except (RecursionError, SerializationError, TypeError):
        plain = False
    assert core.is_plain is None or core.is_plain(value, room) == plain
    return plain


@given(value=PLAIN)
def test_plain_values_need_no_tag(value: Any) -> None:
    assert is_plain(value, MAX_DEPTH)


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


OTHERS = [
    (1,), {1}, 2**64, -(2**63) - 1, Name("a"), {1: 2}, {Name("a"): 1}, [[Name("a")]], {"a": {"b": [(1,)]}},
    Decimal(1), nested(MAX_DEPTH + 1), object(), float, signal.SIGTERM,
]  # fmt: skip


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_values_that_need_a_tag_are_not_plain(value: Any) -> None:
    assert not is_plain(value, MAX_DEPTH)


def test_the_depth_of_plain_values_is_limited() -> None:
    for depth in (0, 1, 2, MAX_DEPTH):
        assert is_plain(nested(depth), depth)
        assert not is_plain(nested(depth + 1), depth)
