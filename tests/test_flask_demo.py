"""What a visitor of the demo sees. (Under Gunicorn it is tested elsewhere: here it is one process.)"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from shmstore.flask import StoreSessionInterface
from shmstore.store import Store

DEMO = Path(__file__).parents[1] / "examples" / "demo" / "app.py"


class Clock:
    """A clock that only goes when told to."""

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
    return client.get("/api").json


def cookie_of(client: FlaskClient) -> str | None:
    cookie = client.get_cookie("session")
    return None if cookie is None else cookie.value


def test_visits_are_counted_for_each_browser_and_sessions_for_all(demo: Flask) -> None:
    first, second = demo.test_client(), demo.test_client()
    assert api(first) == {"visits": 1, "pid": os.getpid(), "user": None, "sessions": 1}
    assert [api(first)["visits"] for _ in range(3)] == [2, 3, 4]
    assert api(second) == {"visits": 1, "pid": os.getpid(), "user": None, "sessions": 2}
    page = first.get("/")
    assert "<dt>Your visits</dt><dd>5</dd>" in page.text
    assert f"<dd>{os.getpid()}</dd>" in page.text
    assert "<dt>Live sessions</dt><dd>2</dd>" in page.text
    assert page.headers["Vary"] == "Cookie"


def test_a_login_keeps_the_visits_and_changes_the_id(client: FlaskClient, store: Store) -> None:
    api(client)
    before = cookie_of(client)
    page = client.post("/login", data={"user": " Ada <3 "}, follow_redirects=True)
    assert page.status_code == 200
    assert "Hello Ada &lt;3." in page.text
    assert "You are <strong>Ada &lt;3</strong>" in page.text
    assert api(client) == {"visits": 3, "pid": os.getpid(), "user": "Ada <3", "sessions": 1}
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
    assert api(client) == {"visits": 2, "pid": os.getpid(), "user": None, "sessions": 1}


def test_prune_removes_expired_sessions_and_says_how_many(client: FlaskClient, store: Store, clock: Clock) -> None:
    for number in range(3):
        store.set(f"old{number}", {}, ttl=1)
    api(client)
    clock.now += 2 * 10**9
    assert api(client)["sessions"] == 1
    assert "3 expired sessions removed." in client.post("/prune", follow_redirects=True).text
    assert len(store) == 1
    store.set("old", {}, ttl=0)
    assert client.post("/prune", headers={"Accept": "application/json"}).json == {"pruned": 1}


def test_forms_need_no_script_and_the_style_is_a_file_of_its_own(client: FlaskClient) -> None:
    page = client.get("/").text
    assert "<script" not in page
    assert "style=" not in page
    style = client.get("/static/style.css")
    assert style.status_code == 200
    assert not style.headers.getlist("Set-Cookie")
    assert "Vary" not in style.headers
    style.close()


def test_a_cookie_from_another_site_is_not_sent_along(client: FlaskClient) -> None:
    assert "SameSite=Lax" in client.get("/api").headers["Set-Cookie"]
    for path in ("/login", "/logout", "/prune"):
        assert client.get(path).status_code == 405
