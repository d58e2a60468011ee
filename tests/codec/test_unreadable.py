"""Sessions with an unreadable value: the other values are served, and the stored value is kept."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browsing import cookies, look, make_app, put, session, sid_of, visit
from flask import Flask, flash, get_flashed_messages
from flask.testing import FlaskClient
from msgspec import Raw
from msgspec.msgpack import Ext, encode

from shmstore import Store
from shmstore.codec.body import Codec
from shmstore.errors import RecordTooLarge
from shmstore.system.throttle import Throttle

SID = "a" * 43


class Cart:
    """A class of the application; a deploy renames it."""

    def __init__(self, *items: str) -> None:
        self.items = items


@pytest.fixture
def deploy(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function that removes the class."""
    monkeypatch.setattr("shmstore.codec.body._unreadable_log", Throttle())
    return lambda: monkeypatch.delattr(f"{__name__}.Cart")


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(memory=2**20, serializer=pickle, check_period=None) as store:
        yield store


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def visitor(client: FlaskClient, deploy: Callable[[], None]) -> FlaskClient:
    """Return a browser that is logged in and whose cart is unreadable."""
    visit(client, put(_user_id="ada", cart=Cart("tea"), theme="dark"))
    deploy()
    return client


def raw(store: Store, key: str) -> bytes | None:
    (sid,) = store.ids()
    loaded = store.load(sid)
    assert loaded is not None
    return store.codec.fields(loaded.payload).get(key)


READABLE = {"_user_id": "ada", "theme": "dark"}


def test_an_unreadable_value_does_not_affect_the_others(
    store: Store, visitor: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    sid, value = sid_of(visitor), raw(store, "cart")
    caplog.set_level(logging.ERROR)
    for _ in range(3):
        answer = visit(visitor, look)
        assert answer.json == READABLE
        assert cookies(answer) == []
    assert store.stats().corrupt == 3
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "a private store: unreadable values omitted from their sessions: 1; the last is 'cart': AttributeError\n"
    )
    assert "Cart" not in record.getMessage()  # the text of an error may quote the value
    assert (store.owned_by("ada"), raw(store, "cart")) == ([sid], value)


@pytest.mark.parametrize("read", ["get", "peek", "all"])
def test_every_reader_gets_the_readable_values(store: Store, visitor: FlaskClient, read: str) -> None:
    sid = sid_of(visitor)
    found = store.all()[sid] if read == "all" else getattr(store, read)(sid)
    assert found == READABLE
    assert store.stats().corrupt == 1
    assert store.stats().misses == 0


def call(method: str) -> Callable[[], object]:
    def change() -> object:
        return getattr(session, method)()

    return change


CHANGES: dict[str, Callable[[], object]] = {
    "another key": put(n=1),
    "no other key": lambda: session.pop("theme"),
    "a logout": lambda: session.pop("_user_id"),
    "a logout that leaves nothing else": lambda: [session.pop(key) for key in READABLE],
    "a new id": call("rotate"),
    "touch": call("touch"),
    "reload": call("reload"),
    "flash": lambda: flash("hello"),
    "get": lambda: session.get("cart"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_unreadable_value_stays_stored(store: Store, visitor: FlaskClient, change: str) -> None:
    value = raw(store, "cart")
    visit(visitor, lambda: str(CHANGES[change]()))
    assert raw(store, "cart") == value


def delete() -> None:
    del session["cart"]


def refill(emptied: Callable[[], object]) -> Callable[[], None]:
    def change() -> None:
        emptied()
        session["n"] = 1

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda: session.pop("cart", None),
        delete,
        put(cart="new"),
        lambda: session.setdefault("cart", "new"),
        refill(call("clear")),
        refill(call("destroy")),
    ],
    ids=["pop", "del", "set", "setdefault", "clear", "destroy"],
)
def test_a_key_that_is_assigned_or_deleted_is_replaced(
    store: Store, visitor: FlaskClient, change: Callable[[], object]
) -> None:
    visit(visitor, lambda: str(change()))
    stored = raw(store, "cart")
    assert stored in (None, store.codec.encode_value("cart", "new"))
    counted = store.stats().corrupt
    visit(visitor, look)
    assert store.stats().corrupt == counted


def test_an_unreadable_key_is_treated_as_absent(visitor: FlaskClient) -> None:
    def view() -> dict[str, Any]:
        with pytest.raises(KeyError):
            session["cart"]
        with pytest.raises(KeyError):
            session.pop("cart")
        del session["cart"]
        with pytest.raises(KeyError):
            del session["cart"]
        return {"there": "cart" in session, "keys": list(session)}

    assert visit(visitor, view).json == {"there": False, "keys": ["_user_id", "theme"]}


def test_clear_ends_the_session(store: Store, visitor: FlaskClient) -> None:
    visit(visitor, call("clear"))
    assert len(store) == 0


def test_the_owner_is_kept_if_its_key_is_unreadable(
    store: Store, client: FlaskClient, deploy: Callable[[], None]
) -> None:
    store.set(SID, {"_user_id": Cart(), "theme": "dark"}, owner="ada")
    client.set_cookie("session", SID)
    deploy()

    def view() -> None:
        session["n"] = 1
        session.save()
        session["n"] = 2

    visit(client, view)
    assert store.owned_by("ada") == [sid_of(client)] == [SID]
    visit(client, put(_user_id="bob"))
    assert store.owned_by("bob") == [sid_of(client)] != [SID]
    assert store.owned_by("ada") == []


def test_unreadable_flash_messages_are_replaced(store: Store, client: FlaskClient, deploy: Callable[[], None]) -> None:
    visit(client, put(_flashes=[("message", Cart())], n=1))
    deploy()

    def view() -> str:
        flash("one")
        store.update(sid_of(client), {"_flashes": [1, 2]})  # of another version of the application
        return ""

    visit(client, view)
    assert visit(client, get_flashed_messages).status_code == 200
    assert visit(client, look).json == {"n": "1"}


def test_dispose_gets_the_readable_values(deploy: Callable[[], None]) -> None:
    told = []
    with Store(memory=2**20, serializer=pickle, dispose=lambda *args: told.append(args)) as store:
        store.set("a", {"cart": Cart(), "n": 1})
        deploy()
        store.destroy("a")
        assert told == [("a", {"n": 1}, "destroy")]
        assert store.stats().corrupt == 1


def test_a_type_of_a_newer_version_makes_only_its_value_unreadable() -> None:
    """The default serializer decodes a session as a whole, and value by value only if that fails."""
    with Store(memory=2**20) as store:
        store.set(SID, {"n": 1})
        newer = encode({"n": 1, "zone": Ext(99, b"?"), "t": Ext(1, encode([1]))})
        codec = Codec()
        assert codec.salvage(newer) == ({"n": 1, "t": (1,)}, {"zone"})
        assert codec.readable(newer) == codec.readable(memoryview(newer)) == {"n": 1, "t": (1,)}
        store.update(SID, {"zone": Raw(encode(Ext(99, b"?")))})
        assert store.get(SID) == {"n": 1}
        assert store.stats().corrupt == 1


def test_each_readable_value_is_decoded_once() -> None:
    asked = []

    class Counting:
        dumps = staticmethod(json.dumps)

        def loads(self, data: bytes) -> Any:
            asked.append(data)
            return json.loads(data)

    with Store(memory=2**20, serializer=Counting()) as counted:
        counted.set("a", {"x": 1, "y": 2})
        assert counted.get("a") == {"x": 1, "y": 2}
    assert asked == [b"1", b"2"]


def test_a_session_of_another_serializer_is_counted() -> None:
    with Store(memory=2**20, serializer=json) as other:
        other.set("a", {"x": 1})
        other._codec = Codec(pickle)
        assert (other.get("a"), other.peek("a"), other.load("a")) == (None, None, None)
        assert other.stats().corrupt == 2


@pytest.fixture
def encrypted(store: Store, client: FlaskClient, deploy: Callable[[], None]) -> FlaskClient:
    """Return a browser that is logged in and whose user and cart are unreadable."""
    store.set(SID, {"_user_id": Cart(), "cart": Cart("tea"), "_fresh": True}, owner="ada")
    client.set_cookie("session", SID)
    deploy()
    return client


def test_the_owner_is_kept_while_another_unreadable_key_is_removed(store: Store, encrypted: FlaskClient) -> None:
    """Else "log out everywhere" would miss it, and it would be logged in again once the value can be read."""
    visit(encrypted, lambda: str(session.pop("cart", None)))
    assert raw(store, "cart") is None
    assert store.owned_by("ada") == [sid_of(encrypted)] == [SID]
    assert store.destroy_owned("ada") == 1


@pytest.mark.parametrize("key", [["account", "_user_id"], lambda data: data.get("_user_id")])
def test_removing_an_unreadable_key_keeps_the_owner_under_every_rule(
    store: Store, deploy: Callable[[], None], key: Any
) -> None:
    client = make_app(store, SESSION_OWNER_KEY=key).test_client()
    store.set(SID, {"_user_id": Cart(), "cart": Cart("tea")}, owner="ada")
    client.set_cookie("session", SID)
    deploy()
    visit(client, lambda: str(session.pop("cart", None)))
    assert store.owned_by("ada") == [SID]
    visit(client, lambda: str(session.pop("_user_id", None)))
    assert len(store) == 0


def test_unreadable_values_are_removed_when_another_user_logs_in(store: Store, encrypted: FlaskClient) -> None:
    visit(encrypted, put(_user_id="bob"))
    assert store.owned_by("bob") == [sid_of(encrypted)] != [SID]
    assert raw(store, "cart") is None


def test_a_failed_save_of_a_login_removes_no_unreadable_value(store: Store, visitor: FlaskClient) -> None:
    value = raw(store, "cart")

    def view() -> None:
        session["_user_id"] = "bob"
        session["large"] = "x" * 2**20
        with pytest.raises(RecordTooLarge):
            session.save()
        del session["large"]
        put(_user_id="ada", theme="light")()

    visit(visitor, view)
    assert raw(store, "cart") == value


def test_a_key_that_is_assigned_and_then_popped_is_removed(store: Store, visitor: FlaskClient) -> None:
    visit(visitor, lambda: str([put(cart="new")(), session.pop("cart")]))
    assert raw(store, "cart") is None


def test_unreadable_values_are_kept_when_the_same_user_logs_in(store: Store, encrypted: FlaskClient) -> None:
    value = raw(store, "cart")
    visit(encrypted, put(_user_id="ada"))
    assert raw(store, "cart") == value


LOGOUTS: dict[str, Callable[[], object]] = {
    "the key": lambda: session.pop("_user_id", None),
    "as Flask-Login does": lambda: session.pop("_fresh"),
    "as Flask-Login does with a remember-me cookie": put(_remember="clear"),
    "after a login": lambda: [put(_user_id="ada")(), session.save(), session.pop("_user_id")],
}


@pytest.mark.parametrize("how", LOGOUTS)
def test_a_logout_removes_an_unreadable_login(store: Store, encrypted: FlaskClient, how: str) -> None:
    """Flask-Login removes only keys that it can read."""
    visit(encrypted, lambda: str(LOGOUTS[how]()))
    assert store.owned_by("ada") == []
    assert raw(store, "_user_id") is None
    assert sid_of(encrypted) != SID


def test_reload_restores_a_deleted_unreadable_value(store: Store, visitor: FlaskClient) -> None:
    value = raw(store, "cart")

    def view() -> None:
        del session["cart"]
        session.reload()
        session["n"] = 1

    visit(visitor, view)
    assert raw(store, "cart") == value
