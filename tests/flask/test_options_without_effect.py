"""An option that can have no effect is an error or a warning; the config of Flask counts whenever it is set."""

from __future__ import annotations

import builtins
import json
import logging
import math
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session

from shmstore import ConfigError, Store, StoreManager, attach
from shmstore.flask import Sessions, StoreSessionInterface
from shmstore.gunicorn import Hooks
from shmstore.options import Options
from shmstore.redis import RedisStore


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(memory=2**20, check_period=None) as store:
        yield store


def make_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update(TESTING=True, **config)

    @app.get("/")
    def count() -> dict[str, Any]:
        session["user"] = "ada"
        session["n"] = session.get("n", 0) + 1
        return {"n": session["n"]}

    return app


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -- options of a store that have no effect on Flask's sessions ----------------------------------------------


@pytest.mark.parametrize("options", [{"ttl": 20}, {"ttl": 0}, {"stale": True}])
def test_an_option_without_effect_under_flask_is_refused_in_the_config(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"SESSION_STORE_OPTIONS: {next(iter(options))} has no effect here: .*Flask"):
        Sessions(make_app(SESSION_STORE="shm://never", SESSION_STORE_OPTIONS=options))


@pytest.mark.parametrize("how", ["given", "opened"])
def test_a_store_with_an_option_without_effect_gets_a_warning(how: str, caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**20, ttl=20) as store:
        app = make_app()
        app.session_interface = StoreSessionInterface(store if how == "given" else lambda: store)
        client = app.test_client()
        assert [client.get("/").json for _ in range(2)] == [{"n": 1}, {"n": 2}]
    (line,) = warnings(caplog)
    assert "its option ttl has no effect here: sessions of Flask live for PERMANENT_SESSION_LIFETIME" in line


# -- the config, whenever it is set ----------------------------------------------------------------------------


def test_a_changed_config_applies_to_the_next_request(store: Store) -> None:
    app = make_app()
    Sessions(app, store=store)
    client = app.test_client()
    client.get("/")
    app.config.update(SESSION_KEY_PREFIX="z:", SESSION_OWNER_KEY="user", SESSION_PERMANENT=True, SESSION_ID_LENGTH=64)
    answer = app.test_client().get("/")
    (sid,) = store.owned_by("ada")
    assert sid.startswith("z:")
    assert len(sid) == len("z:") + 86
    assert "Expires=" in answer.headers["Set-Cookie"]
    app.config["SESSION_ID_LENGTH"] = 3
    with pytest.raises(ConfigError, match="SESSION_ID_LENGTH must be"):
        client.get("/")
    del app.config["SESSION_ID_LENGTH"]
    assert client.get("/").status_code == 200


def test_options_changed_in_place_apply_to_the_next_request(store: Store) -> None:
    options: dict[str, int] = {}
    app = make_app(SESSION_STORE=store, SESSION_STORE_OPTIONS=options)
    Sessions(app)
    client = app.test_client()
    assert client.get("/").status_code == 200
    options["max"] = 20
    with pytest.raises(ConfigError, match="SESSION_STORE_OPTIONS are for a URL"):
        client.get("/")


def test_a_store_that_is_named_after_init_app_is_used(store: Store, store_dir: Path) -> None:
    app = make_app(SESSION_STORE=f"shm://{store_dir}/never-opened")
    Sessions(app)
    app.config["SESSION_STORE"] = store
    client = app.test_client()
    assert client.get("/").json == {"n": 1}
    assert len(store) == 1
    with Store(memory=2**20) as other:
        app.config["SESSION_STORE"] = other
        assert client.get("/").json == {"n": 1}
        assert len(other) == 1
    app.config["SESSION_STORE"] = 7
    with pytest.raises(ConfigError, match="SESSION_STORE must be set"):
        client.get("/")


def test_a_given_store_that_overrides_the_config_gets_a_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app(SESSION_STORE="shm://never-opened")
    Sessions(app, store=store)
    assert app.test_client().get("/").json == {"n": 1}
    assert warnings(caplog) == [
        "SESSION_STORE='shm://never-opened' has no effect: Sessions(store=...) takes precedence over it"
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("SESSION_STOR", "SESSION_STORE"),
        ("SESSION_STORE_OPTION", "SESSION_STORE_OPTIONS"),
        ("SESSION_OWNER", "SESSION_OWNER_KEY"),
        ("SESSION_KEYPREFIX", "SESSION_KEY_PREFIX"),
        ("SESSION_LIFETIME", "PERMANENT_SESSION_LIFETIME"),
        ("SESSION_COOKIE_SAMSITE", "SESSION_COOKIE_SAMESITE"),
        ("PERMANENT_SESSION_LIFTIME", "PERMANENT_SESSION_LIFETIME"),
        ("SESSION_TYPE", "SESSION_STORE"),
        ("SESSION_FILE_DIR", "SESSION_STORE"),
    ],
)
def test_an_unused_key_gets_a_warning_that_names_the_right_one(
    key: str, meant: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    Sessions(make_app(SESSION_STORE=store, **{key: 1}))
    (line,) = warnings(caplog)
    assert line.startswith(f"{key} is ")
    assert "has no effect" in line
    assert meant in line


def test_keys_of_other_extensions_get_no_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    Sessions(make_app(SESSION_STORE=store, SESSION_PROTECTION="strong", SESSION_COLOUR="red", SESSION_PERMANENT=True))
    assert warnings(caplog) == []


# -- lifetimes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "life", [0, -1, -(10**9), timedelta(0), timedelta(days=-1), math.nan, math.inf, True, "3600", None]
)
def test_a_lifetime_of_zero_or_less_is_an_error(life: Any, store: Store) -> None:
    app = make_app(PERMANENT_SESSION_LIFETIME=life)
    with pytest.raises(ConfigError, match="PERMANENT_SESSION_LIFETIME must be"):
        Sessions(app, store=store)
    app.config["PERMANENT_SESSION_LIFETIME"] = 60
    Sessions(app, store=store)
    app.config["PERMANENT_SESSION_LIFETIME"] = life
    with pytest.raises(ConfigError, match="PERMANENT_SESSION_LIFETIME must be"):
        app.test_client().get("/")
    assert store.length() == 0


@pytest.mark.parametrize("life", [0.5, 10**9, 3 * 10**11, timedelta.max])
@pytest.mark.parametrize("permanent", [False, True])
def test_a_lifetime_may_be_of_any_length(life: Any, permanent: bool, store: Store) -> None:
    app = make_app(PERMANENT_SESSION_LIFETIME=life, SESSION_PERMANENT=permanent)
    Sessions(app, store=store)
    assert app.test_client().get("/").status_code == 200
    assert store.length() == 1


# -- functions -------------------------------------------------------------------------------------------------


class Dumps:
    @staticmethod
    def dumps(value: object, protocol: int) -> bytes:
        return b""

    @staticmethod
    def loads(data: bytes) -> object:
        return None


@pytest.mark.parametrize(
    ("option", "function", "arguments"),
    [
        ("dispose", lambda sid, session: None, r"dispose is called with \(sid, session, reason\)"),
        ("dispose", lambda: None, r"dispose is called with \(sid, session, reason\)"),
        ("ttl", lambda session: 60, r"ttl is called with \(options, session, sid\)"),
        ("length", lambda size: size, r"length is called with \(session_bytes, sid\)"),
        ("clock", lambda since: 0, r"clock is called with \(\)"),
        ("serializer", Dumps, r"serializer.dumps is called with \(value\)"),
    ],
)
def test_a_function_that_does_not_take_its_arguments_is_refused(
    option: str, function: Callable[..., object], arguments: str
) -> None:
    with pytest.raises(ConfigError, match=f"{arguments}, which .* does not accept: "):
        Store(memory=2**20, **{option: function})


def test_a_function_with_a_compatible_signature_is_accepted() -> None:
    told: list[Any] = []
    for dispose in (lambda *all: told.append(all), lambda sid, session, reason, more=1: told.append(sid), print):
        with Store(memory=2**20, dispose=dispose, serializer=json) as store:
            store.set("a", {})
            store.destroy("a")
    assert told == [("a", {}, "destroy"), "a"]
    Options.of(clock=builtins.int)


def test_an_owner_function_that_does_not_take_the_session_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"OWNER_KEY is called with \(session\)"):
        Sessions(make_app(SESSION_STORE=store, SESSION_OWNER_KEY=lambda: "ada"))


# -- options that need another one, or another kind of store ----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"length": lambda size, sid: size}, "the option length has no effect without max"),
        ({"no_dispose_on_set": True}, "the option no_dispose_on_set has no effect without dispose"),
    ],
)
def test_an_option_that_needs_another_one_gets_a_warning(
    options: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    Store(memory=2**20, **options).close()
    assert warnings(caplog) == [f"a private store: {line}"]


@pytest.mark.parametrize("options", [{"directory": "/tmp"}, {"persist": True}, {"snapshot_period": 5}])
def test_options_of_a_shared_store_are_refused_for_a_private_one(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is for shared stores"):
        Store(memory=2**20, **options)


def test_options_of_an_arena_get_a_warning_on_redis(caplog: pytest.LogCaptureFixture) -> None:
    RedisStore.from_url("redis://127.0.0.1:1", memory=2**20, recency=0).close()
    assert warnings(caplog) == [
        "the option memory has no effect on a store on Redis",
        "the option recency has no effect on a store on Redis",
    ]


# -- Gunicorn's hooks --------------------------------------------------------------------------------------------


def test_an_application_that_names_another_store_than_the_hooks_gets_a_warning(
    store_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "_registered", {})
    monkeypatch.setattr(attach, "_attached", {})
    Hooks("shop", directory=store_dir, memory=2**20)
    with StoreManager("shopp", directory=store_dir, memory=2**20), StoreManager("shop", directory=store_dir):
        app = make_app(SESSION_STORE=f"shm://{store_dir}/shopp")
        Sessions(app)
        assert app.test_client().get("/").json == {"n": 1}
        (line,) = warnings(caplog)
        assert line == (
            f"shm://{store_dir}/shopp is not among the stores of Gunicorn's hooks, whose options do not apply to it: "
            f"shm://{store_dir}/shop; is the name the same in both places?"
        )
        caplog.clear()
        app.config["SESSION_STORE"] = f"shm://{store_dir}/shop"
        assert app.test_client().get("/").json == {"n": 1}
        assert warnings(caplog) == []
        for proxy in attach._attached.values():
            proxy.close()
