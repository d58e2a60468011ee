"""The demo in one process. (The browser tests run it under Gunicorn.)"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session
from flask.testing import FlaskClient
from redis_servers import RedisServer

from shmstore import RedisStore, StoreUnavailable
from shmstore.flask import StoreSessionInterface
from shmstore.listing import digest
from shmstore.store.store import Store

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "app.py"
PHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 Version/17.5 Mobile Safari/604.1"
EDGE = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/126.0 Safari/537.36 Edg/126.0"


class Clock:
    """A clock that advances only when it is set."""

    now = 10**12

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[Store]:
    with Store(memory=2**20, check_period=None, clock=clock) as store:
        yield store


@pytest.fixture
def demo(store: Store, monkeypatch: pytest.MonkeyPatch) -> Flask:
    monkeypatch.syspath_prepend(DEMO.parent)
    for name in ("devices", "guard", "kill", "two_requests"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # each application gets blueprints of its own
    spec = importlib.util.spec_from_file_location("demo_app", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo_app", module)
    spec.loader.exec_module(module)
    app: Flask = module.app
    app.session_interface = StoreSessionInterface(store)
    return app


@pytest.fixture
def client(demo: Flask) -> FlaskClient:
    return demo.test_client()


def api(client: FlaskClient) -> Any:
    return client.get("/live").json


def facts(**different: Any) -> dict[str, Any]:
    """Return what `/live` answers in this process, to a first visitor but for what is different."""
    pid = os.getpid()  # of the only worker, and of the server of a private store
    expected = {"visits": 1, "pid": pid, "workers": [pid], "user": None, "sessions": 1, "server": pid, "lost": False}
    return expected | different


def cookie_of(client: FlaskClient) -> str | None:
    cookie = client.get_cookie("session")
    return None if cookie is None else cookie.value


def test_visits_are_counted_per_browser_and_sessions_in_total(demo: Flask) -> None:
    first, second = demo.test_client(), demo.test_client()
    assert api(first) == facts(visits=1)
    assert [api(first)["visits"] for _ in range(3)] == [2, 3, 4]
    assert api(second) == facts(visits=1, sessions=2)
    page = first.get("/")
    tiles = dict(re.findall(r'data-live="(\w+)">(.*?)<', page.text))
    assert tiles == {"visits": "5", "pid": str(os.getpid()), "server": str(os.getpid()), "sessions": "2"}
    assert page.headers["Vary"] == "Cookie"
    assert first.get("/api").json == {"visits": 6, "pid": os.getpid(), "user": None, "sessions": 2}


def test_a_login_keeps_the_visits_and_changes_the_id(client: FlaskClient, store: Store) -> None:
    api(client)
    before = cookie_of(client)
    page = client.post("/login", data={"user": " Ada <3 "}, follow_redirects=True)
    assert page.status_code == 200
    assert "Hello Ada &lt;3." in page.text
    assert "You are <strong>Ada &lt;3</strong>" in page.text
    assert api(client) == facts(visits=3, user="Ada <3")
    assert cookie_of(client) != before
    assert store.owned_by("Ada <3") == [cookie_of(client)]


@pytest.mark.parametrize("form", [{}, {"user": ""}, {"user": "  "}, {"user": "x" * 51}])
def test_a_login_without_a_name_is_refused(client: FlaskClient, store: Store, form: dict[str, str]) -> None:
    assert client.post("/login", data=form).status_code == 400
    assert len(store) == 0


def test_a_logout_ends_the_session(client: FlaskClient, store: Store) -> None:
    client.post("/login", data={"user": "Ada"})
    before = cookie_of(client)
    page = client.post("/logout", follow_redirects=True)
    assert "logged out" in page.text
    assert cookie_of(client) != before
    assert store.owned_by("Ada") == []
    assert api(client) == facts(visits=2)


def test_prune_removes_expired_sessions_and_shows_how_many(client: FlaskClient, store: Store, clock: Clock) -> None:
    for number in range(3):
        store.set(f"old{number}", {}, ttl=1)
    api(client)
    clock.now += 2 * 10**9
    assert api(client)["sessions"] == 1
    assert "3 expired sessions removed." in client.post("/prune", follow_redirects=True).text
    assert len(store) == 1
    store.set("old", {}, ttl=0)
    assert client.post("/prune", headers={"Accept": "application/json"}).json == {"pruned": 1}


def test_scripts_and_styles_are_separate_files(client: FlaskClient) -> None:
    answer = client.get("/")
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", answer.text)
    for name in ("style.css", "demo.js"):
        file = client.get(f"/static/{name}")
        assert file.status_code == 200
        assert not file.headers.getlist("Set-Cookie")
        assert "Vary" not in file.headers
        file.close()


def test_a_cookie_from_another_site_is_not_sent_along(client: FlaskClient) -> None:
    assert "SameSite=Lax" in client.get("/api").headers["Set-Cookie"]
    for path in POSTED:
        assert client.get(path).status_code == 405


POSTED = [
    "/login", "/logout", "/prune", "/kill-a-worker", "/kill-the-server", "/devices/log-out", "/devices/log-out-others",
    "/overlap/a", "/overlap/b",
]  # fmt: skip


@pytest.mark.parametrize("path", [*POSTED, "/overlap/"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "null"},
    ],
)
def test_requests_from_another_origin_are_refused(client: FlaskClient, path: str, headers: dict[str, str]) -> None:
    client.post("/login", data={"user": "ada"}, headers={"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost"})
    answer = client.post(path, data={"user": "eve"}, headers=headers)
    assert answer.status_code == 403
    assert "Another site" in answer.text
    assert api(client)["user"] == "ada"


@pytest.mark.parametrize("path", ["/kill-a-worker", "/kill-the-server"])
@pytest.mark.parametrize(
    "where",
    [{"REMOTE_ADDR": "192.0.2.1"}, {"REMOTE_ADDR": ""}, {"HTTP_HOST": "evil.example"}, {"HTTP_HOST": "192.0.2.1"}],
)
def test_a_remote_visitor_cannot_kill_processes(client: FlaskClient, path: str, where: dict[str, str]) -> None:
    assert client.post(path, environ_overrides=where).status_code == 403


def test_without_gunicorn_and_without_a_server_there_is_nothing_to_kill(client: FlaskClient) -> None:
    for path in ("/kill-a-worker", "/kill-the-server"):
        answer: Any = client.post(path, headers={"Accept": "application/json"}).json
        assert answer["killed"] is None  # the server of a private store is this process


# -- two requests at once ---------------------------------------------------------------------------------------------


def test_two_overlapping_requests_keep_both_changes(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have read the session before one of them changes it: each waits for the other."""
    turn = threading.Barrier(2)
    monkeypatch.setattr(sys.modules["two_requests"].time, "sleep", lambda _: turn.wait(60))
    api(client)
    page = client.post("/overlap/", follow_redirects=True)
    assert "Both changes are in the session." in page.text
    assert "Request A" in page.text
    assert "Request B" in page.text
    assert api(client)["visits"] == 3  # neither request has undone the others


def test_requests_that_do_not_overlap_are_not_said_to(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["two_requests"], "HOLD", 0)
    assert "Request" not in client.get("/overlap/").text
    client.post("/overlap/a", data={"run": "1"})
    assert "is missing" in client.get("/overlap/").text
    client.post("/overlap/b", data={"run": "1"})
    assert "one request waited for the other" in client.get("/overlap/").text
    client.post("/overlap/a", data={"run": "2"})
    assert "is missing" in client.get("/overlap/").text


def test_showing_the_outcome_changes_no_session(
    client: FlaskClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it could undo the change of a request that overlaps with it."""
    monkeypatch.setattr(sys.modules["two_requests"], "HOLD", 0)
    for key in "ab":
        client.post(f"/overlap/{key}", data={"run": "1"})
    before = store.peek(str(cookie_of(client)))
    assert "Request A" in client.get("/overlap/").text
    assert store.peek(str(cookie_of(client))) == before


def test_two_requests_below_the_prefix_of_a_proxy(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["two_requests"], "HOLD", 0)
    client.get("/")
    answer = client.post("/overlap/", environ_overrides={"SCRIPT_NAME": "/demo"})
    assert answer.location == "/demo/#overlap"
    assert "Both changes are in the session" in client.get("/overlap/").text


# -- errors -----------------------------------------------------------------------------------------------------------


def test_an_ended_session_is_reported(client: FlaskClient, store: Store) -> None:
    client.get("/")
    assert "Your session has ended" not in client.get("/").text
    store.destroy(str(cookie_of(client)))
    assert "Your session has ended" in client.get("/").text
    assert "Your session has ended" not in client.get("/").text
    store.destroy(str(cookie_of(client)))
    assert api(client) == facts(visits=1, lost=True)
    client.post("/login", data={"user": "ada"})
    assert "Your session has ended" not in client.post("/logout", follow_redirects=True).text


def test_errors_have_the_style_of_the_page(demo: Flask, client: FlaskClient) -> None:
    @demo.get("/broken")
    def broken() -> str:
        raise RuntimeError("secret")

    for path, status, words in (("/nothing", 404, "There is no such page"), ("/broken", 500, "That did not work")):
        page = client.get(path)
        assert page.status_code == status
        assert words in page.text
        assert "style.css" in page.text
        assert "secret" not in page.text
        answer = client.get(path, headers={"Accept": "application/json"})
        assert answer.status_code == status
        assert [*answer.get_json()] == ["message"]
    page = client.get("/login")
    assert page.status_code == 405
    assert {*page.headers["Allow"].split(", ")} == {"OPTIONS", "POST"}
    assert "style.css" in page.text


def test_a_store_out_of_reach_is_a_page_without_a_reason(demo: Flask) -> None:
    def gone() -> Store:
        raise StoreUnavailable("of /dev/shm/secret")

    demo.session_interface = StoreSessionInterface(gone)
    page = demo.test_client().get("/")
    assert page.status_code == 503
    assert "The store cannot be reached" in page.text
    assert "secret" not in page.text


# -- the admin page ---------------------------------------------------------------------------------------------------


def test_the_admin_page_is_for_admin(client: FlaskClient) -> None:
    assert client.get("/admin/").status_code == 403
    client.post("/login", data={"user": "ada"})
    refused = client.get("/admin/")
    assert refused.status_code == 403
    assert "<code>demo</code>" in refused.text
    for password in ("", "Demo", "demo "):
        assert client.post("/login", data={"user": "admin", "password": password}).status_code == 403
    assert client.post("/login", data={"user": "admin", "password": "demo"}).status_code == 303
    assert client.get("/admin/").status_code == 200


# -- your devices -----------------------------------------------------------------------------------------------------


def logged_in(demo: Flask, user: str, browser: str) -> FlaskClient:
    client = demo.test_client()
    client.post("/login", data={"user": user}, headers={"User-Agent": browser})
    return client


def test_only_the_devices_of_the_user_are_shown(demo: Flask, store: Store, clock: Clock) -> None:
    phone = logged_in(demo, "ada", PHONE)
    clock.now += 3 * 3600 * 10**9
    laptop = logged_in(demo, "ada", EDGE)
    logged_in(demo, "eve", "curl/8.5")
    page = laptop.get("/devices/").text
    assert re.findall(r"<strong>(.* on .*)</strong>", page) == ["Edge on Windows", "Safari on iPhone"]
    assert "last used 3 hours ago" in page
    assert page.index("Edge") < page.index("this device") < page.index("Safari")
    for sid in store.ids():
        assert sid not in page
    assert "last used 3 hours ago" in laptop.get("/devices/").text  # listing does not count as use
    assert phone.get("/devices/").text.count("this device") == 1


def test_logging_out_one_device_twice(demo: Flask, store: Store) -> None:
    phone, laptop = logged_in(demo, "ada", PHONE), logged_in(demo, "ada", EDGE)
    [device] = re.findall(r'name="device" value="(\w+)"', laptop.get("/devices/").text)
    for message in ("That device is logged out.", "That device is not in the list any more"):
        assert message in laptop.post("/devices/log-out", data={"device": device}, follow_redirects=True).text
    assert phone.get("/devices/").status_code == 403
    assert store.owned_by("ada") == [cookie_of(laptop)]


def test_user_ids_may_be_numbers(demo: Flask, store: Store) -> None:
    @demo.get("/as-42")
    def log_in() -> str:
        session["user"] = 42
        return ""

    phone, laptop, tablet = (demo.test_client() for _ in range(3))
    for client in (phone, laptop, tablet):
        client.get("/as-42")
    assert len(store.owned_by("42")) == 3
    device = re.findall(r'name="device" value="(\w+)"', laptop.get("/devices/").text)[0]
    assert (
        "That device is logged out."
        in laptop.post("/devices/log-out", data={"device": device}, follow_redirects=True).text
    )
    assert "1 other device logged out." in laptop.post("/devices/log-out-others", follow_redirects=True).text
    assert store.owned_by("42") == [cookie_of(laptop)]


@pytest.mark.parametrize(
    ("browser", "name"),
    [
        (PHONE, "Safari on iPhone"),
        (PHONE.replace("Version/17.5", "CriOS/126.0"), "Chrome on iPhone"),
        (PHONE.replace("Version/17.5", "FxiOS/127.0"), "Firefox on iPhone"),
        (EDGE, "Edge on Windows"),
    ],
)
def test_the_names_of_browsers(demo: Flask, browser: str, name: str) -> None:
    assert f"<strong>{name}</strong>" in logged_in(demo, "ada", browser).get("/devices/").text


def test_a_user_cannot_log_out_another(demo: Flask, store: Store) -> None:
    """Nor can a user log out the current device here; knowing digests or ids does not help."""
    ada, eve = logged_in(demo, "ada", PHONE), logged_in(demo, "eve", EDGE)
    for sid in store.ids():
        for guess in (digest(sid), sid, digest(sid)[:12], ""):
            eve.post("/devices/log-out", data={"device": guess, "user": "ada", "owner": "ada"})
    eve.post("/devices/log-out-others", data={"user": "ada"})
    assert api(ada)["user"] == "ada"
    assert api(eve)["user"] == "eve"
    stranger = demo.test_client()
    for path in ("/devices/log-out", "/devices/log-out-others"):
        assert stranger.post(path, data={"device": digest(str(cookie_of(ada)))}).status_code == 403


def test_logging_out_all_others(demo: Flask, store: Store) -> None:
    clients = [logged_in(demo, "ada", PHONE) for _ in range(3)]
    eve = logged_in(demo, "eve", EDGE)
    page = clients[0].post("/devices/log-out-others", follow_redirects=True).text
    assert "2 other devices logged out." in page
    assert store.owned_by("ada") == [cookie_of(clients[0])]
    assert api(eve)["user"] == "eve"


@pytest.mark.parametrize("prefix", ["", "demo:"])
def test_a_device_whose_id_is_about_to_change_is_still_this_device(demo: Flask, store: Store, prefix: str) -> None:
    """As after a login in an event of a socket, where no response can send the new id."""
    demo.config["SESSION_KEY_PREFIX"] = prefix
    laptop, phone = logged_in(demo, "ada", EDGE), logged_in(demo, "ada", PHONE)
    assert store.update(prefix + str(cookie_of(laptop)), {"_rotate": True})
    page = laptop.get("/devices/").text
    assert page.count("this device") == page.count("Log out Safari") == 1
    assert "Log out Edge" not in page
    assert store.update(prefix + str(cookie_of(laptop)), {"_rotate": True})
    assert "1 other device logged out." in laptop.post("/devices/log-out-others", follow_redirects=True).text
    assert laptop.get("/devices/").text.count("this device") == 1
    assert phone.get("/devices/").status_code == 403


def test_devices_of_sessions_on_a_redis_server(demo: Flask, redis_server: RedisServer) -> None:
    with RedisStore.from_url(f"{redis_server.url}?prefix=devices:") as store:
        demo.session_interface = StoreSessionInterface(store)
        phone, laptop = logged_in(demo, "ada", PHONE), logged_in(demo, "ada", EDGE)
        page = laptop.get("/devices/").text
        assert sorted(re.findall(r"<strong>(.* on .*)</strong>", page)) == ["Edge on Windows", "Safari on iPhone"]
        assert len(store.ids()) == 2
        for sid in store.ids():
            assert sid not in page
        [device] = re.findall(r'name="device" value="(\w+)"', page)
        assert device == digest(str(cookie_of(phone)))
        for message in ("That device is logged out.", "That device is not in the list any more"):
            assert message in laptop.post("/devices/log-out", data={"device": device}, follow_redirects=True).text
        assert phone.get("/devices/").status_code == 403
        assert store.owned_by("ada") == [cookie_of(laptop)]
