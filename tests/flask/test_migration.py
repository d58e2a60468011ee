"""Moving from Flask-Session, which is real here: its visitors stay logged in, and what they end stays ended."""

from __future__ import annotations

import datetime
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask
import msgspec
import pytest
import redis
from browsing import Clock
from cachelib import FileSystemCache, SimpleCache
from flask import Flask
from flask.testing import FlaskClient
from itsdangerous import Signer
from old_shop import SECRET, cookie, customer, goes_on, old_shop, shop
from redis_servers import RedisCluster, RedisServer, StartRedis

from shmstore import ConfigError, RedisStore, Store, StoreUnavailable
from shmstore.flask import FlaskSession, Sessions
from shmstore.system.throttle import Throttle

NAVIGATION = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
FETCH = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}


@pytest.fixture(autouse=True)
def first_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each test find its lines in the log: others may just have caused the same."""
    monkeypatch.setattr("shmstore.flask.migration._failing", Throttle())
    monkeypatch.setattr("shmstore.flask.migration._partly", Throttle())


Backend = tuple[dict[str, Any], Any]


@pytest.fixture
def client(redis_server: RedisServer) -> redis.Redis:
    client = redis_server.client(db=3)
    client.flushdb()
    return client


@pytest.fixture(params=["redis", "a URL", "json", "signed", "filesystem", "cachelib", "another prefix"])
def backend(request: pytest.FixtureRequest, redis_server: RedisServer, client: redis.Redis, tmp_path: Path) -> Backend:
    """Return the configuration of Flask-Session, and what is migrated from."""
    on_redis = {"SESSION_TYPE": "redis", "SESSION_REDIS": client}
    if request.param == "redis":
        return on_redis, FlaskSession(client)
    if request.param == "a URL":
        return on_redis, FlaskSession(f"unix://{redis_server.socket}?db=3")
    if request.param == "json":
        return on_redis | {"SESSION_SERIALIZATION_FORMAT": "json"}, FlaskSession(client)
    if request.param == "signed":
        return on_redis | {"SESSION_USE_SIGNER": True}, FlaskSession(client, signed=True)
    if request.param == "another prefix":
        return on_redis | {"SESSION_KEY_PREFIX": "shop:"}, FlaskSession(client, prefix="shop:")
    if request.param == "filesystem":
        cache: Any = FileSystemCache(str(tmp_path), threshold=0)
        return {"SESSION_TYPE": "filesystem", "SESSION_FILE_DIR": str(tmp_path)}, FlaskSession(cache, allow_pickle=True)
    cache = SimpleCache()
    return {"SESSION_TYPE": "cachelib", "SESSION_CACHELIB": cache}, FlaskSession(cache, allow_pickle=True)


def new_shop(store: Any, source: FlaskSession | None, **config: Any) -> Flask:
    app = shop(**config)
    Sessions(app, store=store, migrate_from=source)
    return app


def test_a_customer_stays_logged_in(backend: Backend, store: Store, clock: Clock) -> None:
    config, source = backend
    old, token = customer(old_shop(**config))
    app = new_shop(store, source)
    browser = goes_on(old, app)
    assert browser.get("/").json == {"user": "ada", "cart": ["tea"]}
    assert cookie(browser) != cookie(old), "it is continued under an id of ours"
    assert "." not in cookie(browser)
    assert store.owned_by("ada") == [cookie(browser)]
    assert browser.post("/cart", data={"what": "milk", "csrf_token": token}).status_code == 200
    assert browser.get("/").json == {"user": "ada", "cart": ["tea", "milk"]}
    assert set(store.get(cookie(browser)) or {}) == {"_user_id", "_fresh", "_id", "_permanent", "cart", "csrf_token"}
    again = goes_on(browser, new_shop(store, None))
    assert again.get("/").json == {"user": "ada", "cart": ["tea", "milk"]}, "without migrate_from too"


def test_what_was_ended_does_not_come_back(backend: Backend, store: Store, clock: Clock) -> None:
    config, source = backend
    old, token = customer(old_shop(**config))
    app = new_shop(store, source)
    browser = goes_on(old, app)
    browser.post("/logout", data={"csrf_token": token})
    assert store.ids() == []
    for seconds in (0, 3, 60):  # beyond any tombstone
        clock.tick(seconds)
        assert goes_on(old, app).get("/").json == {"user": None, "cart": None}
    assert old.get("/").json == {"user": None, "cart": None}, "nor at the old application"


def test_the_old_id_ends_with_the_first_page(backend: Backend, store: Store, clock: Clock) -> None:
    config, source = backend
    old, _ = customer(old_shop(**config))
    app = new_shop(store, source)
    goes_on(old, app).get("/")
    clock.tick(60)
    assert goes_on(old, app).get("/").json == {"user": None, "cart": None}
    assert store.length() == 1


def test_requests_of_one_page_all_find_it(backend: Backend, store: Store) -> None:
    config, source = backend
    old, token = customer(old_shop(**config))
    app = new_shop(store, source)
    for number in range(3):
        browser = goes_on(old, app)
        assert browser.get("/", headers=FETCH).json == {"user": "ada", "cart": ["tea", *map(str, range(number))]}
        done = browser.post("/cart", headers=FETCH, data={"what": str(number), "csrf_token": token})
        assert done.status_code == 200
    page = goes_on(old, app)
    assert page.get("/", headers=NAVIGATION).json == {"user": "ada", "cart": ["tea", "0", "1", "2"]}
    assert cookie(page) != cookie(old)
    assert store.ids() == [cookie(page)]


def test_of_threads_that_bring_the_same_cookie_one_moves_it(store: Store, client: redis.Redis) -> None:
    app = new_shop(store, FlaskSession(client))
    for _ in range(20):
        old, _ = customer(old_shop(SESSION_TYPE="redis", SESSION_REDIS=client))
        begin, found = threading.Barrier(4), list[Any]()

        def visit(old: FlaskClient = old, begin: Any = begin, found: list[Any] = found) -> None:
            browser = goes_on(old, app)
            begin.wait(30)
            found.append((browser.get("/", headers=FETCH).json or {}).get("user"))

        threads = [threading.Thread(target=visit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == ["ada"] * 4
        assert client.keys() == []
        assert store.ids() == [cookie(old)]
        store.clear()


def test_to_a_store_on_redis(client: redis.Redis, redis_server: RedisServer) -> None:
    old, _ = customer(old_shop(SESSION_TYPE="redis", SESSION_REDIS=client))
    with RedisStore.from_url(f"{redis_server.url}?prefix=migrated:") as store:
        browser = goes_on(old, new_shop(store, FlaskSession(client)))
        assert browser.get("/").json == {"user": "ada", "cart": ["tea"]}
        assert store.owned_by("ada") == [cookie(browser)]
        store.clear()


def test_from_a_cluster(redis_cluster: RedisCluster, store: Store) -> None:
    client: Any = redis.RedisCluster(host="127.0.0.1", port=redis_cluster.servers[0].port)
    try:
        client.set("session:abc", LOGGED_IN, ex=60)
        assert ask(new_shop(store, FlaskSession(redis_cluster.url)), "abc")["user"] == "ada"
        assert client.get("session:abc") is None
    finally:
        client.close()
    app = new_shop(store, FlaskSession("redis+cluster://127.0.0.1:1"), SESSION_ON_ERROR="anonymous")
    assert ask(app, "abc") == NOBODY, "it does not connect before it is needed, and its failure is one of the store"


def test_a_visitor_without_a_cookie_costs_the_old_store_nothing(store: Store) -> None:
    class Never:
        def get(self, key: str) -> Any:
            raise AssertionError("asked")

        delete = get

    browser = new_shop(store, FlaskSession(Never())).test_client()
    assert browser.get("/form").status_code == 200
    assert browser.get("/form").status_code == 200  # it has a session here by now
    assert store.length() == 1


def test_the_life_and_the_permanence_are_ours(store: Store, client: redis.Redis) -> None:
    old, _ = customer(old_shop(SESSION_TYPE="redis", SESSION_REDIS=client, PERMANENT_SESSION_LIFETIME=100))
    browser = goes_on(old, new_shop(store, FlaskSession(client), PERMANENT_SESSION_LIFETIME=500))
    set_cookie = browser.get("/").headers["Set-Cookie"]
    assert "Expires=" in set_cookie  # Flask-Session's sessions are permanent
    loaded = store.load(cookie(browser))
    assert loaded is not None
    assert loaded.remaining == pytest.approx(500)


# -- hostile and broken -----------------------------------------------------------------------------------------------


def put(client: redis.Redis, sid: str, data: bytes) -> None:
    client.set(f"session:{sid}", data, ex=60)


def ask(app: Flask, value: str) -> Any:
    browser = app.test_client()
    browser.set_cookie("session", value)
    return browser.get("/").json


LOGGED_IN = msgspec.msgpack.encode({"_user_id": "ada", "_fresh": True, "cart": ["tea"]})
NOBODY = {"user": None, "cart": None}


def test_without_its_signature_a_signed_id_opens_nothing(store: Store, client: redis.Redis) -> None:
    put(client, "abc", LOGGED_IN)
    app = new_shop(store, FlaskSession(client, signed=True))
    forged = Signer("another secret", salt="flask-session", key_derivation="hmac").sign("abc").decode()
    salted = Signer(SECRET, salt="something else", key_derivation="hmac").sign("abc").decode()
    for value in ("abc", "abc.", "abc.x", forged, salted, ".", "abc.\u00e4"):
        assert ask(app, value) == NOBODY
        assert client.get("session:abc") == LOGGED_IN
    genuine = Signer(SECRET, salt="flask-session", key_derivation="hmac").sign("abc").decode()
    assert ask(app, genuine)["user"] == "ada"


@pytest.mark.parametrize(
    "value", ["../../etc/passwd", "a/b", "*", "a b", "a\x00", "x" * 129, "x" * 4000, "session:abc", "", "a.b.c"]
)
def test_an_id_that_is_none_reaches_no_store(store: Store, value: str) -> None:
    asked: list[str] = []

    class Spy:
        def get(self, key: str) -> None:
            asked.append(key)

        delete = get

    app = new_shop(store, FlaskSession(Spy()))
    assert ask(app, value) == NOBODY
    assert asked == []
    assert ask(app, "x" * 128) == NOBODY
    assert asked == ["session:" + "x" * 128]


def test_many_cookies_are_not_all_looked_up(store: Store, client: redis.Redis) -> None:
    before: Any = client.info("commandstats")
    app = new_shop(store, FlaskSession(client))
    app.test_client().get("/", headers={"Cookie": "; ".join(f"session=id{number}" for number in range(100))})
    after: Any = client.info("commandstats")
    assert after["cmdstat_get"]["calls"] - before.get("cmdstat_get", {"calls": 0})["calls"] <= 8


class Explosive:
    """A value whose pickle runs code."""

    def __reduce__(self) -> Any:
        return Path("/nonexistent/exploded").touch, ()


def test_a_pickle_is_read_only_on_request(
    store: Store, client: redis.Redis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[Path] = []
    monkeypatch.setattr(Path, "touch", touched.append)
    put(client, "old", pickle.dumps({"_user_id": "ada", "cart": ["tea"]}))
    put(client, "bad", pickle.dumps(Explosive()))
    app = new_shop(store, FlaskSession(client))
    for sid in ("old", "bad"):
        assert ask(app, sid) == NOBODY
    assert touched == []
    assert "unreadable sessions of Flask-Session" in caplog.text
    assert "pickle" in caplog.text
    app = new_shop(store, FlaskSession(client, allow_pickle=True))
    assert ask(app, "old") == {"user": "ada", "cart": ["tea"]}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        put(client, f"p{protocol}", pickle.dumps({"_user_id": "ada", "cart": [protocol]}, protocol))
        assert ask(app, f"p{protocol}") == {"user": "ada", "cart": [protocol]}


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"null", b"[1]", b'"a"', b"\xc1", b"\x91" * 100_000, b"[" * 100_000, b"\x80\x04.", b"cnosuch\nX\n."],
    ids=lambda each: repr(each[:6]),
)
def test_what_is_no_session_is_none(store: Store, client: redis.Redis, data: bytes) -> None:
    put(client, "abc", data)
    for allow_pickle in (False, True):
        assert ask(new_shop(store, FlaskSession(client, allow_pickle=allow_pickle)), "abc") == NOBODY
    assert store.ids() == []


def test_a_session_that_is_too_large_is_not_moved(client: redis.Redis, caplog: pytest.LogCaptureFixture) -> None:
    put(client, "abc", msgspec.msgpack.encode({"_user_id": "ada", "cart": ["x" * 100_000]}))
    with Store(memory=2**20, max_session=10_000) as store:
        assert ask(new_shop(store, FlaskSession(client)), "abc") == NOBODY
    assert "unreadable sessions of Flask-Session" in caplog.text
    assert client.get("session:abc")


def test_a_value_that_cannot_be_stored_costs_that_value(
    store: Store, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    put(client, "abc", pickle.dumps({"_user_id": "ada", "cart": ["tea"], "when": datetime.date(2026, 1, 1), "x": 1j}))
    assert ask(new_shop(store, FlaskSession(client, allow_pickle=True)), "abc") == {"user": "ada", "cart": ["tea"]}
    assert (store.get(store.ids()[0]) or {})["when"] == datetime.date(2026, 1, 1)
    assert "without 'x'" in caplog.text


def test_a_session_with_nothing_in_it_is_left_where_it_is(store: Store, client: redis.Redis) -> None:
    put(client, "abc", msgspec.msgpack.encode({"_permanent": True}))
    assert ask(new_shop(store, FlaskSession(client)), "abc") == NOBODY
    assert store.ids() == []


def test_an_old_store_that_is_away(store: Store, start_redis: StartRedis) -> None:
    server = start_redis()
    client = server.client(retry=None)
    put(client, "abc", LOGGED_IN)
    server.kill()
    with pytest.raises(StoreUnavailable, match="a session of Flask-Session cannot be moved"):
        ask(new_shop(store, FlaskSession(client)), "abc")
    app = new_shop(store, FlaskSession(client), SESSION_ON_ERROR="anonymous")
    assert ask(app, "abc") == NOBODY
    server.start()
    put(client, "abc", LOGGED_IN)
    assert ask(app, "abc")["user"] == "ada"


def test_what_cannot_be_removed_there_is_not_kept_here(store: Store, start_redis: StartRedis) -> None:
    """Else it would be there again after a logout."""
    server = start_redis()
    client = server.client()
    put(client, "abc", LOGGED_IN)
    client.execute_command("ACL", "SETUSER", "default", "-del")
    with pytest.raises(StoreUnavailable, match="cannot be moved"):
        ask(new_shop(store, FlaskSession(client)), "abc")
    assert store.ids() == []

    class Stuck(SimpleCache):
        def delete(self, key: str) -> bool:
            return False

    cache = Stuck()
    cache.set("session:abc", {"_user_id": "ada"})
    with pytest.raises(StoreUnavailable, match="cannot be removed"):
        ask(new_shop(store, FlaskSession(cache, allow_pickle=True)), "abc")
    assert store.ids() == []


def test_what_it_cannot_migrate_from_is_said(store: Store) -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: FlaskSession(3), "takes a client of Redis"),  # type: ignore[arg-type]
        (lambda: FlaskSession("shm://shop"), "is not the URL of a Redis"),
        (lambda: FlaskSession(SimpleCache()), r"allow_pickle=True\), if no other user"),
        (lambda: FlaskSession(redis.Redis(), prefix=3), "SESSION_KEY_PREFIX"),  # type: ignore[arg-type]
        (lambda: Sessions(migrate_from="redis://x"), "takes a shmstore.flask.FlaskSession"),  # type: ignore[arg-type]
    ]
    for call, what in wrong:
        with pytest.raises(ConfigError, match=what):
            call()
    app = Flask(__name__)
    Sessions(app, store=store, migrate_from=FlaskSession(redis.Redis(), signed=True))
    with pytest.raises(ConfigError, match="SECRET_KEY"), app.test_request_context(headers={"Cookie": "session=a.b"}):
        flask.session.get("x")
