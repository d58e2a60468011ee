"""The configuration of sessions in a Flask application."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session
from flask.testing import FlaskClient

from shmstore.engine.header import MAX_SESSION
from shmstore.errors import ConfigError
from shmstore.flask import Sessions, StoreSessionInterface
from shmstore.manager import StoreManager
from shmstore.policy import Policy
from shmstore.session import Cookie, Session, cookie_of
from shmstore.store.store import Store


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(memory=2**20, check_period=None) as store:
        yield store


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch, store: Store) -> list[tuple[str, dict[str, Any]]]:
    """The URLs that the manager is asked to open; it returns `store`."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def attach_or_start(url: str, options: dict[str, Any]) -> Store:
        calls.append((url, options))
        return store

    monkeypatch.setattr("shmstore.flask.extension.attach_or_start", attach_or_start)
    return calls


def make_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update(TESTING=True, **config)

    @app.get("/count")
    def count() -> str:
        session["count"] = session.get("count", 0) + 1
        return str(session["count"])

    @app.get("/hello")
    def hello() -> str:
        return "hello"

    return app


def sid_of(client: FlaskClient) -> str:
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


def test_an_application_with_a_store_in_its_config_counts_visits(store: Store) -> None:
    app = make_app(SESSION_STORE=store, SESSION_KEY_PREFIX="shop:", SESSION_ID_LENGTH=16)
    Sessions(app)
    client = app.test_client()
    assert [client.get("/count").text for _ in range(3)] == ["1", "2", "3"]
    assert len(sid_of(client)) == 22
    assert store.all() == {f"shop:{sid_of(client)}": {"count": 3}}


def test_one_extension_serves_several_applications(store: Store) -> None:
    sessions = Sessions()
    with Store(memory=2**20, check_period=None) as other:
        apps = [make_app(SESSION_STORE=store), make_app(SESSION_STORE=other, SESSION_OWNER_KEY="count")]
        for app in apps:
            sessions.init_app(app)
            app.test_client().get("/count")
            assert app.extensions["shmstore"] is app.session_interface
        for app, its_store in zip(apps, (store, other), strict=True):
            with app.app_context():
                assert sessions.store is its_store
        assert store.owned_by("1") == []
        assert len(other.owned_by("1")) == 1


def test_a_given_store_takes_precedence_over_the_config(store: Store) -> None:
    app = make_app(SESSION_STORE="shm://never-opened")
    Sessions(app, store=store)
    app.test_client().get("/count")
    assert len(store) == 1


def test_a_test_can_replace_the_store(store: Store) -> None:
    app = make_app(SESSION_STORE="shm://never-opened", SESSION_KEY_PREFIX="shop:")
    sessions = Sessions(app)
    app.session_interface = StoreSessionInterface(store)
    client = app.test_client()
    client.get("/count")
    assert store.ids() == [f"shop:{sid_of(client)}"]
    with app.app_context():
        assert sessions.store is store


def test_a_store_named_by_url_is_opened_at_first_use(attached: list[tuple[str, dict[str, Any]]]) -> None:
    app = make_app(SESSION_STORE="shm://shop", SESSION_STORE_OPTIONS={"max": 10, "recency": 5})
    Sessions(app)
    client = app.test_client()
    client.set_cookie("session", "x" * 43)
    client.get("/hello")
    assert attached == []
    assert [client.get("/count").text for _ in range(2)] == ["1", "2"]
    assert attached == [("shm://shop", {"max": 10, "recency": 5})]


def test_opening_an_unavailable_store_is_retried(
    attached: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(SESSION_STORE="shm://shop")
    Sessions(app)
    with monkeypatch.context() as broken:

        def fail(url: str, options: dict[str, Any]) -> Store:
            raise OSError("no room")

        broken.setattr("shmstore.flask.extension.attach_or_start", fail)
        with pytest.raises(OSError, match="no room"):
            app.test_client().get("/count")
    assert app.test_client().get("/count").text == "1"
    assert len(attached) == 1


def test_applications_with_the_same_store_url_share_the_store(
    store_dir: Path, run: Callable[..., subprocess.Popen[str]]
) -> None:
    script = """
import pathlib, sys
from flask import Flask, session
from shmstore.flask import Sessions

def make_app():
    app = Flask(__name__)
    app.config["SESSION_STORE"] = f"shm://{sys.argv[1]}/shop"
    app.config["SESSION_STORE_OPTIONS"] = {"memory": 2**20}

    @app.get("/")
    def count():
        session["count"] = session.get("count", 0) + 1
        return str(session["count"])

    Sessions(app)
    return app

shop, forum = make_app(), make_app()
assert not list(pathlib.Path(sys.argv[1]).iterdir())
first, second = shop.test_client(), forum.test_client()
print(first.get("/").text)
second.set_cookie("session", first.get_cookie("session").value)
print(second.get("/").text)
print(shop.extensions["shmstore"].store is forum.extensions["shmstore"].store)
"""
    assert run(script, store_dir).communicate()[0].split() == ["1", "2", "True"]


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        ({"SESSION_STORE": None}, "SESSION_STORE must be set to 'shm://"),
        ({"SESSION_STORE": 7}, "SESSION_STORE must be set to 'shm://"),
        ({"SESSION_STORE": "http://shop"}, "SESSION_STORE: .*shm://NAME"),
        ({"SESSION_STORE": "shm://"}, "SESSION_STORE: .*is not a valid store name"),
        ({"SESSION_STORE": "shm://../etc"}, "SESSION_STORE: .*is not a valid store name"),
        ({"SESSION_STORE_OPTIONS": ["max"]}, "SESSION_STORE_OPTIONS must be a dict"),
        ({"SESSION_STORE_OPTIONS": {"maximum": 1}}, "SESSION_STORE_OPTIONS: unknown option 'maximum'"),
        ({"SESSION_STORE_OPTIONS": {"max": "many"}}, "SESSION_STORE_OPTIONS: max must be"),
        ({"SESSION_PERMANENT": "yes"}, "SESSION_PERMANENT must be True or False"),
        ({"SESSION_KEY_PREFIX": b"x"}, "SESSION_KEY_PREFIX must be at most 64 ASCII characters"),
        ({"SESSION_KEY_PREFIX": "x" * 65}, "SESSION_KEY_PREFIX must be"),
        ({"SESSION_KEY_PREFIX": "shop"}, "SESSION_KEY_PREFIX must be a text whose last character"),
        ({"SESSION_ID_LENGTH": 15}, "SESSION_ID_LENGTH must be a number of bytes from 16"),
        ({"SESSION_ID_LENGTH": "32"}, "SESSION_ID_LENGTH must be"),
        ({"SESSION_TOUCH_AFTER": -1}, "SESSION_TOUCH_AFTER must be at least 0 seconds, not -1"),
        ({"SESSION_TOUCH_AFTER": True}, "SESSION_TOUCH_AFTER must be"),
        ({"SESSION_TOUCH_AFTER": float("nan")}, "SESSION_TOUCH_AFTER must not be NaN"),
        ({"SESSION_ABSOLUTE_LIFETIME": timedelta(0)}, "SESSION_ABSOLUTE_LIFETIME must be"),
        ({"SESSION_ABSOLUTE_LIFETIME": "a day"}, "SESSION_ABSOLUTE_LIFETIME must be"),
        ({"SESSION_ON_ERROR": "ignore"}, "SESSION_ON_ERROR must be 'raise' or 'anonymous'"),
        ({"SESSION_OWNER_KEY": 7}, "SESSION_OWNER_KEY must be a key"),
        ({"SESSION_OWNER_KEY": ["a", 7]}, "SESSION_OWNER_KEY must be a key"),
        ({"PERMANENT_SESSION_LIFETIME": "a day"}, "PERMANENT_SESSION_LIFETIME must be seconds"),
        ({"PERMANENT_SESSION_LIFETIME": 10**20}, "PERMANENT_SESSION_LIFETIME must be seconds"),
        ({"PERMANENT_SESSION_LIFETIME": None}, "PERMANENT_SESSION_LIFETIME must be seconds"),
    ],
)
def test_a_wrong_setting_is_reported_at_once_with_valid_values(config: dict[str, Any], advice: str) -> None:
    app = make_app(**{"SESSION_STORE": "shm://shop", **config})
    with pytest.raises(ConfigError, match=advice):
        Sessions(app)
    assert not isinstance(app.session_interface, StoreSessionInterface)


def test_options_beside_a_store_are_an_error(store: Store) -> None:
    with pytest.raises(ConfigError, match="are for a URL"):
        Sessions(make_app(SESSION_STORE=store, SESSION_STORE_OPTIONS={"max": 1}))


def test_initialising_an_application_twice_is_an_error(store: Store) -> None:
    app = make_app(SESSION_STORE=store)
    sessions = Sessions(app)
    with pytest.raises(ConfigError, match="only once"):
        sessions.init_app(app)


def test_an_application_with_another_session_interface_has_no_store() -> None:
    with make_app().app_context(), pytest.raises(ConfigError, match="init_app"):
        _ = Sessions().store


def test_a_policy_needs_no_flask() -> None:
    policy = Policy(ttl=timedelta(hours=1), touch_after=timedelta(minutes=30), owner_key=["a", "b"])
    assert (policy.ttl, policy.touch_after) == (3600, 360)
    assert policy.owner({"b": 7}) == "7"
    assert policy.owner({}) is None
    assert policy.remaining_ttl(10**9) == 3600
    with pytest.raises(ConfigError, match=r"TTL must be seconds \(int, float\) or a timedelta, not str"):
        Policy(ttl="x")  # type: ignore[arg-type]


def test_a_session_needs_no_flask(store: Store) -> None:
    def opened(sid: str | None) -> Session:
        return Session(lambda: store, sid, Policy(ttl=60))

    first = opened(None)
    assert not first.accessed
    first["a"] = 1
    assert first.accessed
    assert first.save()
    assert cookie_of(first) == (Cookie.SEND, first.sid)
    second = opened(first.sid)
    assert second["a"] == 1
    assert second.save()
    assert cookie_of(second)[0] is Cookie.KEEP
    assert second.destroy()
    assert cookie_of(second)[0] is Cookie.DELETE
    first["a"] = 2
    assert not first.save()
    assert cookie_of(first)[0] is Cookie.KEEP


def test_a_custom_store_needs_only_the_contract(store: Store) -> None:
    class Wrapped:
        def __getattr__(self, name: str) -> Any:
            if name == "closed":
                raise AttributeError(name)
            return getattr(store, name)

    wrapped: Any = Wrapped()
    interface = StoreSessionInterface(wrapped)
    interface.store.set("a", {"x": 1})
    assert interface.store.get("a") == {"x": 1}


def test_an_application_may_override_the_session_lifetime(store: Store) -> None:
    class Mine(Flask):
        life = 60

        @property
        def permanent_session_lifetime(self) -> timedelta:  # type: ignore[override]
            return timedelta(seconds=self.life)

    app, interface = Mine(__name__), StoreSessionInterface(store)
    assert interface.policy(app).ttl == 60
    app.life = 120
    assert interface.policy(app).ttl == 120


def test_update_takes_the_arguments_of_dict_update(store: Store) -> None:
    session = Session(lambda: store, None, Policy(ttl=60))
    session.update({})
    session.update([("a", 1)], self=2)
    assert dict(session) == {"a": 1, "self": 2}


def test_a_deferred_rotation_keeps_later_deletions(store: Store) -> None:
    session = Session(lambda: store, None, Policy(ttl=60))
    session.update(a=1, b=2)
    session.save()
    sid = session.sid
    session = Session(lambda: store, sid, Policy(ttl=60))
    session.save(final=True)
    session.rotate()
    assert session.sid == sid
    assert session.save()
    del session["a"]
    assert session.save()
    stored = store.get(sid)
    assert stored is not None
    assert "a" not in stored


@pytest.mark.parametrize("how", ["destroyed", "made smaller"])
def test_the_size_limit_applies_to_the_stored_session(store: Store, how: str) -> None:
    store.arena.cells[MAX_SESSION] = 10_000
    store.set("a", {"_user_id": "1", "draft": b"x" * 8000})
    slow = Session(lambda: store, "a", Policy(ttl=60))
    slow["cart"] = b"y" * 5000
    if how == "destroyed":
        store.destroy("a")
        assert slow.save() is False
    else:
        Store.over(store.arena, store.options).update("a", delete=["draft"])
        assert slow.save() is True
        assert store.get("a") == {"_user_id": "1", "cart": b"y" * 5000}
    assert store.stats().refused == 0


@pytest.mark.parametrize(
    "look",
    [
        lambda session: session.get("user"),
        lambda session: session.pop("user", None),
        lambda session: session.setdefault("user", 1),
        lambda session: "user" in session,
        lambda session: session.copy(),
    ],
)
def test_a_key_error_raised_when_the_store_is_opened_propagates(look: Callable[[Session], object]) -> None:
    def source() -> Store:
        raise KeyError("REDIS_URL")

    with pytest.raises(KeyError, match="REDIS_URL"):
        look(Session(source, "a", Policy(ttl=60)))


def test_request_is_a_keyword_only_argument(store: Store) -> None:
    with pytest.raises(TypeError):
        Session(lambda: store, None, Policy(ttl=60), lambda: True)  # type: ignore[call-arg]


def test_a_private_store_is_shared_with_the_children_that_are_forked() -> None:
    opened: list[Store] = []

    def source() -> Store:
        opened.append(Store(memory=2**18, check_period=None))
        return opened[-1]

    app = make_app()
    app.session_interface = StoreSessionInterface(source)
    client = app.test_client()
    assert client.get("/count").text == "1"
    for expected in "23":
        if not (pid := os.fork()):
            os._exit(not (client.get("/count").text == expected and len(opened) == 1))
        assert os.waitpid(pid, 0)[1] == 0
    assert client.get("/count").text == "4"
    opened[0].close()


def test_a_process_that_has_become_another_user_opens_its_own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Store] = []

    def source() -> Store:
        opened.append(Store(memory=2**18, check_period=None))
        return opened[-1]

    interface = StoreSessionInterface(source)
    first = interface.store
    if not (pid := os.fork()):
        monkeypatch.setattr("shmstore.flask.interface.geteuid", lambda: 12345)
        os._exit(not (interface.store is not first and interface.store is opened[-1] and len(opened) == 2))
    assert os.waitpid(pid, 0)[1] == 0
    assert interface.store is first
    first.close()


def test_the_error_for_a_misplaced_argument_shows_the_right_call() -> None:
    app = Flask(__name__)
    with Store(memory=2**20) as store:
        for wrong, right in (
            (lambda: Sessions("shm://shop"), "use Sessions(app, store='shm://shop')"),  # type: ignore[arg-type]
            (lambda: Sessions("redis://:secret@x"), "use Sessions(app, store='redis://...@x')"),  # type: ignore[arg-type]
            (lambda: Sessions(store), "use Sessions(app, store=...)"),  # type: ignore[arg-type]
            (lambda: Sessions().init_app("shm://shop"), "a Flask application"),  # type: ignore[arg-type]
            (lambda: StoreSessionInterface("shm://shop"), "use Sessions(app, store='shm://shop')"),  # type: ignore[arg-type]
            (lambda: StoreSessionInterface("redis://:secret@x"), "store='redis://...@x'"),  # type: ignore[arg-type]
            (lambda: StoreSessionInterface(None), "such as Store()"),  # type: ignore[arg-type]
            (lambda: StoreSessionInterface(app), "such as Store()"),  # type: ignore[arg-type]
            (lambda: StoreSessionInterface(StoreManager("shop")), "StoreManager('shop').store()"),
            (lambda: StoreSessionInterface(lambda: "shop").store, "must return a store"),  # type: ignore[arg-type,return-value]
        ):
            with pytest.raises(ConfigError, match=re.escape(right)) as error:
                wrong()
            assert "secret" not in str(error.value)
