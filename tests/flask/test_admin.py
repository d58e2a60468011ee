"""The admin page, without a browser: its authorization, what it shows, which sessions it ends, what it costs."""

from __future__ import annotations

import os
import re
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import patch

import flask
import pytest
from browsing import Clock, make_app, put, visit
from flask import Flask, redirect
from flask.testing import FlaskClient
from flask_wtf.csrf import CSRFProtect
from jinja2 import StrictUndefined
from markupsafe import Markup
from processes import Start, wait_for
from redis_servers import RedisServer, StartRedis
from werkzeug.routing import BuildError
from werkzeug.test import TestResponse

from shmstore import ConfigError, RedisStore, Store, StoreFull, StoreUnavailable, connect
from shmstore.codec.body import unpack
from shmstore.contract import AnyStore
from shmstore.engine.header import HEARTBEAT
from shmstore.flask import StoreSessionInterface
from shmstore.flask.admin import admin_blueprint
from shmstore.listing import digest


@pytest.fixture
def app(app: Flask) -> Flask:
    app.register_blueprint(admin_blueprint(authorize=lambda: flask.session.get("_user_id") == "root"))
    return app


@pytest.fixture
def admin(app: Flask) -> FlaskClient:
    client = app.test_client()
    visit(client, put(_user_id="root"))
    return client


def sid_of(client: FlaskClient) -> str:
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


def token_of(page: str) -> str:
    found = re.search(r'name="token" value="([^"]+)"', page)
    assert found
    return found[1]


def press(
    client: FlaskClient, *, headers: Mapping[str, str] = {}, token: str | None = None, **form: str
) -> TestResponse:
    """Press a button of the page, as a browser that has loaded the page."""
    token = token_of(client.get("/sessions/").text) if token is None else token
    return client.post("/sessions/", data={"token": token, **form}, headers=headers)


def said(client: FlaskClient, **form: str) -> str:
    answer = press(client, headers={}, token=None, **form)
    assert answer.status_code == 303
    page = client.get(answer.location).text
    found = re.search(r'id="said"[^>]*>([^<]*)<', page)
    assert found
    assert 'id="said"' not in client.get("/sessions/").text  # once
    return found[1]


def lines(page: str) -> list[str]:
    return re.findall(r'<th scope="row"[^>]*><code>(\w+)</code>', page)


# -- authorization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("authorize", [None, True, "admin"])
def test_the_page_requires_an_authorize_function(authorize: Any) -> None:
    with pytest.raises(ConfigError, match=r"lambda: current_user\.is_authenticated and current_user\.is_admin"):
        admin_blueprint(authorize=authorize)
    with pytest.raises(ConfigError, match="authorize="):
        admin_blueprint()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"functools\.cache\(lambda: shmstore\.connect\('shop'\)\)"):
        admin_blueprint(authorize=lambda: True, store="shop")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="describe"):
        admin_blueprint(authorize=lambda: True, describe="address")  # type: ignore[arg-type]


def test_unauthorized_visitors_see_and_end_nothing(app: Flask, admin: FlaskClient, store: Store) -> None:
    token = token_of(admin.get("/sessions/").text)
    stranger, bob = app.test_client(), app.test_client()
    visit(bob, put(_user_id="bob", _shmstore_token=token))
    for client in (stranger, bob):
        for answer in (
            client.get("/sessions/"),
            client.get("/sessions/figures"),
            client.get("/sessions/end-all"),
            press(client, token=token, end_owner="root"),
            press(client, token=token, end=digest(sid_of(admin))),
            press(client, token=token, prune="1"),
        ):
            assert answer.status_code == 403
            assert "root" not in answer.text
    assert store.owned_by("root")


@pytest.mark.parametrize("allowed", [1, "yes", "denied", object(), [True]])
def test_a_truthy_result_of_authorize_is_an_error(store: Store, app: Flask, allowed: Any) -> None:
    app.register_blueprint(admin_blueprint(authorize=lambda: allowed, name="other"), url_prefix="/other")
    client = app.test_client()
    with pytest.raises(TypeError, match="True, False or a response"):
        client.get("/other/")
    app.testing = False
    assert client.get("/other/").status_code == 500


def test_a_coroutine_function_may_decide(app: Flask) -> None:
    async def authorize() -> Any:
        return redirect("/login")

    app.register_blueprint(admin_blueprint(authorize=authorize, name="other"), url_prefix="/other")
    answer = app.test_client().get("/other/")
    assert (answer.status_code, answer.location) == (302, "/login")


def test_a_redirect_to_the_login(app: Flask) -> None:
    app.register_blueprint(admin_blueprint(authorize=lambda: redirect("/login"), name="other"), url_prefix="/other")
    for answer in (app.test_client().get("/other/"), app.test_client().get("/other/figures")):
        assert (answer.status_code, answer.location, answer.headers["Cache-Control"]) == (302, "/login", "no-store")
        assert "Content-Security-Policy" not in answer.headers  # the application handles it


# -- forgery ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "x", "é", "\udce9"])
def test_a_form_without_the_token_does_nothing(admin: FlaskClient, store: Store, token: str) -> None:
    store.set("victim", {}, owner="ada")
    for form in ({"end": digest("victim")}, {"end_owner": "ada"}, {"prune": "1"}):
        assert admin.post("/sessions/", data={"token": token.encode(errors="replace"), **form}).status_code == 403
        admin.get("/sessions/")
        assert admin.post("/sessions/", data={"token": token.encode(errors="replace"), **form}).status_code == 403
    assert "victim" in store


def test_the_token_of_another_session_is_refused(app: Flask, admin: FlaskClient, store: Store) -> None:
    other = app.test_client()
    visit(other, put(_user_id="root"))
    assert press(admin, token=token_of(other.get("/sessions/").text), end_owner="root").status_code == 403
    assert len(store.owned_by("root")) == 2


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none"])
def test_a_browser_that_names_another_origin_is_refused(admin: FlaskClient, store: Store, site: str) -> None:
    store.set("victim", {}, owner="ada")
    assert press(admin, headers={"Sec-Fetch-Site": site}, end_owner="ada").status_code == 403
    assert press(admin, headers={"Sec-Fetch-Site": "same-origin"}, end_owner="ada").status_code == 303
    assert "victim" not in store


# -- headers ----------------------------------------------------------------------------------------------------------


def test_the_page_loads_only_own_files_and_is_not_cached(admin: FlaskClient) -> None:
    for path in ("/sessions/", "/sessions/figures", "/sessions/end-all?owner=ada"):
        headers = admin.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["form-action"] == "'self'"
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "same-origin"


def test_scripts_and_styles_are_files_and_read_no_session(app: Flask, admin: FlaskClient) -> None:
    page = admin.get("/sessions/").text
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|javascript:", page)
    for path in re.findall(r'(?:src|href)="(/sessions/static/[^"]+)"', page):
        with app.test_client().get(path) as answer:
            assert answer.status_code == 200
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "Set-Cookie" not in answer.headers
            assert "Vary" not in answer.headers


# -- the shown sessions -----------------------------------------------------------------------------------------------


def test_no_id_is_on_any_page(admin: FlaskClient, store: Store) -> None:
    for number in range(5):
        store.set(f"{number}-secret-id", {"_user_id": "ada"}, owner="ada")
    shown = admin.get("/sessions/").text + admin.get("/sessions/figures").text + admin.get("/sessions/?q=ada").text
    answer = press(admin, end=digest("0-secret-id"))
    shown += answer.text + str(answer.headers) + admin.get(answer.location).text
    assert digest("1-secret-id")[:12] in shown
    for sid in (*store.ids(), "0-secret-id"):
        assert sid not in shown


def test_a_session_is_shown_with_what_the_store_knows(admin: FlaskClient, store: Store, clock: Clock) -> None:
    store.set("a", {"x": "y" * 2000}, ttl=7200, owner="ada")
    store.set("b", {}, ttl=30)
    clock.tick(90)
    store.get("a")
    page = admin.get("/sessions/").text
    cells = {
        row[1]: re.findall(r"<td[^>]*>(?:<[^>]+>)*([^<]*)", row[2])
        for row in re.finditer(r"<code>(\w+)</code>(.*?)</tr>", page, re.DOTALL)
    }
    assert cells[digest("a")[:12]] == ["ada", "1.5m ago", "0s ago", "in 2.0h", "2.0 KiB", "End"]
    assert cells[digest("b")[:12]][:4] == ["nobody", "1.5m ago", "1.5m ago", "expired"]
    assert "Remove 1 expired" in page
    assert page.count('class="badge">yours<') == 1


HOSTILE = ["<script>alert(1)</script>", '"><img src=x>', "a\u202eb", "x\r\ny", "a&b=c#d /?", " ada "]


def test_user_input_is_escaped(admin: FlaskClient, store: Store) -> None:
    for number, owner in enumerate(HOSTILE):
        store.set(str(number), {}, owner=owner)
        store.set(f"{number}b", {}, owner=owner)
        page = admin.get("/sessions/", query_string={"q": owner}).text
        assert "<script>alert" not in page
        assert "<img" not in page
        assert len(lines(page)) == 2
        [confirm] = re.findall(r'href="(/sessions/end-all[^"]*)"', page)
        page = admin.get(unescape(confirm)).text
        assert "<script>alert" not in page
        assert "<img" not in page
        [value] = re.findall(r'name="end_owner" value="([^"]*)"', page)
        assert press(admin, end_owner=value).status_code == 303
        assert store.owned_by(owner) == []


def test_columns_of_the_application(store: Store, app: Flask) -> None:
    def describe(data: Mapping[str, Any]) -> dict[str, object]:
        return {"Address": data["address"]} if "address" in data else {}

    app.register_blueprint(
        admin_blueprint(authorize=lambda: True, store=lambda: store, describe=describe, name="other"),
        url_prefix="/other",
    )
    client = app.test_client()
    assert "Address" not in client.get("/other/").text
    store.set("a", {"address": "192.0.2.1<br>", "secret": "hunter2"})
    page = client.get("/other/").text
    assert '<th scope="col" role="columnheader" class="detail">Address</th>' in page
    assert "192.0.2.1&lt;br&gt;" in page
    assert "hunter2" not in page


def test_columns_with_an_html_method_are_escaped(store: Store, app: Flask) -> None:
    class Html:
        def __html__(self) -> str:
            return "<img>"

        def __str__(self) -> str:
            return Markup("<hr>")

    def describe(data: Mapping[str, Any]) -> dict[str, object]:
        return {Markup("<script>1</script>"): Markup(data["text"]), "Other": Html()}

    store.set("a", {"text": "<script>2</script>"})
    app.register_blueprint(admin_blueprint(lambda: True, store=store, describe=describe, name="other"), url_prefix="/o")
    page = app.test_client().get("/o/").text
    for number in (1, 2):
        assert f"&lt;script&gt;{number}&lt;" in page
    assert "&lt;hr&gt;" in page
    assert not re.search("<script>|<img>|<hr>", page)


def test_columns_that_fail_stay_empty(store: Store, app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    def describe(data: Mapping[str, Any]) -> Any:
        return None if data.get("odd") else {"Address": data["address"]}

    sessions: dict[str, dict[str, Any]] = {
        "a": {"address": "192.0.2.1"}, "b": {}, "c": {"odd": True}, "d": {"address": "192.0.2.2"}
    }  # fmt: skip
    for sid, data in sessions.items():
        store.set(sid, data)
    app.register_blueprint(admin_blueprint(lambda: True, store=store, describe=describe, name="other"), url_prefix="/o")
    page = app.test_client().get("/o/")
    assert page.status_code == 200
    assert {*lines(page.text)} >= {digest(sid)[:12] for sid in "abcd"}
    assert page.text.count("192.0.2.") == 2
    [record] = [record for record in caplog.records if "describe" in record.message]
    assert record.exc_info


def test_searching(admin: FlaskClient, store: Store) -> None:
    for sid, owner in {"1": "ada", "2": "ada", "3": "adam", "4": "Adele", "5": None}.items():
        store.set(sid, {}, owner=owner)

    def found(query: str) -> set[str]:
        return {*lines(admin.get("/sessions/", query_string={"q": query}).text)}

    def names(*sids: str) -> set[str]:
        return {digest(sid)[:12] for sid in sids}

    assert found("ada") == found(" ada ") == names("1", "2")
    assert found("adam") == names("3")
    assert found("AD") == names("1", "2", "3", "4")
    assert found("adel") == names("4")
    assert found(digest("5")[:6].upper()) == names("5")
    assert found("nobody there") == set()
    assert found("x" * 300) == set()
    page = admin.get("/sessions/?q=zz").text
    assert "No session matches “<bdi>zz</bdi>”" in page
    assert "Show all" in page


def test_paging(admin: FlaskClient, store: Store) -> None:
    for number in range(120):
        store.set(str(number), {})
    pages = [lines(admin.get("/sessions/", query_string={"page": number}).text) for number in (1, 2, 3)]
    assert [len(page) for page in pages] == [50, 50, 21]
    assert {each for page in pages for each in page} == {digest(sid)[:12] for sid in store.ids()}
    for wrong, right in ((0, 1), (-1, 1), ("x", 1), (99, 3), (10**30, 3)):
        assert f"page {right} of 3" in admin.get("/sessions/", query_string={"page": wrong}).text


ORDERED = {
    "-used": "cab", "used": "bac", "-created": "cba", "created": "abc", "-expires": "bac", "expires": "cab",
    "-size": "acb", "size": "bca", "": "cab", "owner": "cab",
}  # fmt: skip


def fill_in_order(store: AnyStore, tick: Callable[[], None]) -> None:
    """Store three sessions that each order lists in another way."""
    store.set("a", {"x": "y" * 900}, ttl=200)
    tick()
    store.set("b", {"x": "y"}, ttl=300)
    tick()
    store.set("c", {"x": "y" * 300}, ttl=100)


@pytest.mark.parametrize("order", ORDERED)
def test_the_order_of_the_table(store: Store, clock: Clock, order: str) -> None:
    fill_in_order(store, lambda: clock.tick(5))
    clock.tick(5)
    store.get("a")
    clock.tick(5)
    store.get("c")
    app = Flask(__name__)
    app.secret_key = "signed"
    app.register_blueprint(admin_blueprint(authorize=lambda: True, store=store))
    page = app.test_client().get("/sessions/", query_string={"sort": order}).text
    assert lines(page) == [digest(sid)[:12] for sid in ORDERED[order]]
    sorted_columns = re.findall(r'aria-sort="(ascending|descending)">\s*<a[^>]*>([\w ]+)', page)
    column = {"used": "Last used", "created": "Created", "expires": "Expires", "size": "Size"}
    known = order if order.lstrip("-") in column else "-used"
    assert sorted_columns == [("descending" if known[0] == "-" else "ascending", column[known.lstrip("-")])]


def test_a_second_click_reverses_an_order(admin: FlaskClient) -> None:
    def click(page: str, column: str) -> str:
        [link] = re.findall(rf'<a href="([^"]*)">{column}</a></th>', page)
        return unescape(link).partition("#")[0]

    page = admin.get("/sessions/").text
    for column, first, second in (("Size", "-size", "size"), ("Expires", "expires", "-expires")):
        once = click(page, column)
        assert once == f"/sessions/?sort={first}"
        assert click(admin.get(once).text, column) == f"/sessions/?sort={second}"
    assert click(page, "Last used") == "/sessions/?sort=used"


def test_every_link_and_form_repeats_what_is_shown(admin: FlaskClient, store: Store) -> None:
    for number in range(120):
        store.set(str(number), {}, owner="ada")
    page = admin.get("/sessions/?q=ada&sort=-size&page=2").text
    links = [unescape(link) for link in re.findall(r'href="(/sessions/[^"]*)"', page)]
    for word, link in (
        ("Refresh", "/sessions/?q=ada&sort=-size&page=2"),
        ("Next", "/sessions/?q=ada&sort=-size&page=3#sessions"),
        ("First", "/sessions/?q=ada&sort=-size#sessions"),
        ("Show all", "/sessions/?sort=-size#sessions"),
        ("End all of", "/sessions/end-all?owner=ada&q=ada&sort=-size&page=2"),
    ):
        assert word in page
        assert link in links
    [search, act] = re.findall(r"<form.*?</form>", page, re.DOTALL)
    assert re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', search) == [("sort", "-size")]
    assert {("q", "ada"), ("sort", "-size"), ("page", "2")} < {
        *re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', act)
    }


def test_an_empty_store_says_so(store: Store) -> None:
    app = Flask(__name__)
    app.secret_key = "signed"
    app.register_blueprint(admin_blueprint(authorize=lambda: True, store=store))
    client = app.test_client()
    assert "The store has no sessions." in client.get("/sessions/").text
    assert "No session has expired." in client.get("/sessions/?expired=1").text
    assert "No expired session matches" in client.get("/sessions/?expired=1&q=ada").text


def test_a_killed_server_is_reported(manage: Start, store_dir: Path) -> None:
    """The page only reads, so nothing starts another one."""
    manager = manage()
    manager.start()
    with connect("shop", directory=store_dir) as store:
        app = Flask(__name__)
        app.secret_key = "signed"
        app.register_blueprint(admin_blueprint(authorize=lambda: True, store=store))
        client = app.test_client()
        assert figures_of(client)["running"] is True
        assert 'id="stopped" role="alert" hidden>' in client.get("/sessions/").text
        manager.detach()  # it does not restart the server either
        os.kill(store.stats().server_pid, signal.SIGKILL)
        wait_for(lambda: not figures_of(client)["running"], "the missing heartbeat")
        whole: Any = store
        whole.arena.cells[HEARTBEAT] = 2**62  # damaged: it is in the future
        assert figures_of(client)["running"] is False
        assert 'id="stopped" role="alert">' in client.get("/sessions/").text


def test_the_time_of_the_list_is_shown(admin: FlaskClient) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    [shown] = re.findall(r'<time id="updated" datetime="([^"]+)"', admin.get("/sessions/").text)
    assert before <= datetime.fromisoformat(shown) <= datetime.now(UTC)


def test_the_figures_for_the_charts(admin: FlaskClient, store: Store) -> None:
    store.set("a", {}, owner="ada")
    store.get("missing")
    figures: Any = admin.get("/sessions/figures").json
    stats = store.stats()
    assert figures["counts"] == {
        name: getattr(stats, name) for name in ("sessions", "bytes", "memory", "hits", "gets", "evicted")
    }
    assert figures["shown"]["sessions"] == "2"
    assert figures["shown"]["owned"] == "2 of them logged in"


# -- ending sessions --------------------------------------------------------------------------------------------------


def test_ending_one_twice(admin: FlaskClient, store: Store) -> None:
    store.set("a", {}, owner="ada")
    name = digest("a")
    assert said(admin, end=name) == f"Ended session {name[:12]} of ada."
    assert "a" not in store
    assert said(admin, end=name).startswith(f"Session {name[:12]} does not exist any more")
    assert said(admin, end="zz").startswith("Session zz does not exist any more")


def test_ending_all_of_an_owner(admin: FlaskClient, store: Store) -> None:
    for sid in "abc":
        store.set(sid, {}, owner="ada")
    store.set("d", {}, owner="adam")
    assert "End all of" not in admin.get("/sessions/").text
    assert "End all of" in admin.get("/sessions/?q=ada").text
    assert said(admin, end_owner="ada", q="ada") == "Ended 3 sessions of ada."
    assert said(admin, end_owner="ada", q="ada") == "Ended 0 sessions of ada."
    assert store.owned_by("adam") == ["d"]


def test_removing_expired_sessions(admin: FlaskClient, store: Store, clock: Clock) -> None:
    for sid in "abc":
        store.set(sid, {}, ttl=1)
    assert "expired</button>" not in admin.get("/sessions/").text
    clock.tick(5)
    page = admin.get("/sessions/?expired=1").text
    assert len(lines(page)) == 3
    assert said(admin, prune="1", expired="1") == "Removed 3 sessions that had expired."
    assert len(store) == 1


def test_an_admin_can_end_their_own_session(admin: FlaskClient, store: Store) -> None:
    answer = press(admin, end=digest(sid_of(admin)))
    assert answer.status_code == 303
    assert admin.get(answer.location).status_code == 403
    assert store.owned_by("root") == []


def test_an_empty_form_is_a_bad_request(admin: FlaskClient) -> None:
    assert press(admin).status_code == 400


def test_ending_a_session_returns_to_the_shown_list(admin: FlaskClient, store: Store) -> None:
    answer = press(admin, end=digest("x"), q="a&b", page="2", expired="1")
    assert answer.location == "/sessions/?q=a%26b&expired=1&page=2#said"


def test_ending_all_asks_first(admin: FlaskClient, store: Store) -> None:
    for sid in "abc":
        store.set(sid, {}, owner="ada")
    admin.get("/sessions/?q=ada&sort=size")
    page = admin.get("/sessions/end-all?owner=ada&q=ada&sort=size").text
    assert "End 3 sessions of <bdi>ada</bdi>?" in page
    assert "is yours" not in page
    assert len(store.owned_by("ada")) == 3
    form = dict(re.findall(r'name="(\w+)" value="([^"]*)"', page))
    assert {*form} == {"token", "q", "sort", "end_owner"}
    answer = admin.post("/sessions/", data=form)
    assert answer.location == "/sessions/?q=ada&sort=size#said"
    assert "Ended 3 sessions of ada." in admin.get(answer.location).text
    assert "One of them is yours" in admin.get("/sessions/end-all?owner=root").text
    for nobody in ("ada", "", "x" * 300):
        page = admin.get("/sessions/end-all", query_string={"owner": nobody}).text
        assert "has no session" in page
        assert 'name="end_owner"' not in page


# -- the application around it ----------------------------------------------------------------------------------------


def test_sessions_with_a_prefix(store: Store) -> None:
    app = Flask(__name__)
    app.config["SESSION_KEY_PREFIX"] = "shop:"
    app.session_interface = StoreSessionInterface(store)
    app.register_blueprint(admin_blueprint(authorize=lambda: True), url_prefix="/admin")
    client = app.test_client()
    client.get("/admin/")
    assert 'class="badge">yours<' in client.get("/admin/").text


def test_an_application_with_another_session_interface(store: Store) -> None:
    app = Flask(__name__)
    app.secret_key = "signed"
    app.testing = True
    app.register_blueprint(admin_blueprint(authorize=lambda: True, name="wrong"), url_prefix="/wrong")
    app.register_blueprint(admin_blueprint(authorize=lambda: True, store=store), url_prefix="/admin")
    store.set("a", {}, owner="ada")
    client = app.test_client()
    page = client.get("/admin/").text
    assert lines(page) == [digest("a")[:12]]
    client.post("/admin/", data={"token": token_of(page), "end_owner": "ada"})
    assert "Ended 1 session of ada." in client.get("/admin/").text
    with pytest.raises(ConfigError, match="store="):
        client.get("/wrong/")


def test_a_store_of_another_kind_is_refused() -> None:
    class Other:
        """A store of an application's own."""

    other: Any = Other()
    with pytest.raises(ConfigError, match="can be listed, not those of"):
        admin_blueprint(authorize=lambda: True, store=other)


@pytest.fixture
def on_redis(redis_server: RedisServer) -> Iterator[RedisStore]:
    with RedisStore.from_url(f"{redis_server.url}?prefix=admin{secrets.token_hex(4)}:") as store:
        yield store


@pytest.fixture
def shop_on_redis(on_redis: RedisStore) -> FlaskClient:
    app = make_app(on_redis)
    app.register_blueprint(admin_blueprint(authorize=lambda: flask.session.get("_user_id") == "root"))
    client = app.test_client()
    visit(client, put(_user_id="root"))
    return client


def test_a_store_on_redis_is_shown_too(shop_on_redis: FlaskClient, on_redis: RedisStore) -> None:
    root = sid_of(shop_on_redis)
    for number in range(60):
        on_redis.set(f"a{number}", {"n": number}, owner="ada")
    on_redis.set("eve", {}, owner="Evelyn")
    page = shop_on_redis.get("/sessions/").text
    assert lines(page)[0] == digest("eve")[:12] or lines(page)[0] == digest(root)[:12]
    assert len(lines(page)) == 50
    assert "page 1 of 2" in page
    assert 'class="badge">yours<' in shop_on_redis.get("/sessions/?q=root").text
    assert len(lines(shop_on_redis.get("/sessions/?page=2").text)) == 12
    for query in ("Evelyn", "velYN", digest("eve")[:6]):
        assert lines(shop_on_redis.get(f"/sessions/?q={query}").text) == [digest("eve")[:12]]
    assert lines(shop_on_redis.get("/sessions/?expired=1").text) == []
    assert root not in page
    assert said(shop_on_redis, end=digest("eve")) == f"Ended session {digest('eve')[:12]} of Evelyn."
    assert said(shop_on_redis, end=digest("eve")).endswith("got a new id at a login or logout.")
    assert "does not exist" in said(shop_on_redis, end="*")
    assert said(shop_on_redis, end_owner="ada") == "Ended 60 sessions of ada."
    assert on_redis.ids() == [root]
    assert "by the whole server" in page


@pytest.mark.parametrize("order", ORDERED)
def test_the_order_of_a_store_on_redis(on_redis: RedisStore, order: str) -> None:
    """A touch counts as use there, a read does not."""

    def tick() -> None:
        begun = on_redis._link.now()
        wait_for(lambda: on_redis._link.now() > begun, "the server's clock")

    fill_in_order(on_redis, tick)
    for sid, ttl in (("a", 200), ("c", 100)):
        tick()
        assert on_redis.touch(sid, ttl=ttl)
    app = Flask(__name__)
    app.secret_key = "signed"
    app.register_blueprint(admin_blueprint(authorize=lambda: True, store=on_redis))
    page = app.test_client().get("/sessions/", query_string={"sort": order}).text
    assert lines(page) == [digest(sid)[:12] for sid in ORDERED[order]]
    assert "Only expired" not in page


def test_sizes_on_redis_are_ordered_as_they_are_shown(shop_on_redis: FlaskClient, on_redis: RedisStore) -> None:
    """The size is that of the data, without the owner's name."""
    on_redis.set("small", {"x": "y" * 500}, owner="x" * 250)
    on_redis.set("large", {"x": "y" * 600})
    assert lines(shop_on_redis.get("/sessions/?sort=-size").text)[:2] == [
        digest(sid)[:12] for sid in ("large", "small")
    ]


def figures_of(client: FlaskClient) -> Any:
    return client.get("/sessions/figures").json


def test_polls_do_not_keep_a_server_busy(shop_on_redis: FlaskClient, on_redis: RedisStore) -> None:
    """A server's keys are looked at for a twentieth of the time, and the page itself shows what is true now."""
    with patch("shmstore.flask.admin.blueprint._SHARE", 1e-9):  # once is enough for hours
        assert figures_of(shop_on_redis)["counts"]["sessions"] == 1
        on_redis.set("a", {})
        assert figures_of(shop_on_redis)["counts"]["sessions"] == 1
        assert "2 sessions." in shop_on_redis.get("/sessions/").text
    app = make_app(on_redis)
    app.register_blueprint(admin_blueprint(authorize=lambda: True))
    other = app.test_client()
    with patch("shmstore.flask.admin.blueprint._SHARE", float("inf")):  # no pause
        assert figures_of(other)["counts"]["sessions"] == 2
        on_redis.set("b", {})
        figures = figures_of(other)
        assert (figures["counts"]["sessions"], figures["counts"]["memory"]) == (3, 0)
        assert figures["shown"]["bytes"] == "without a limit, used by the whole server"
        assert figures["shown"]["memory"].endswith(" MiB")


def test_a_server_that_is_away_is_reported(start_redis: StartRedis) -> None:
    server = start_redis()
    with RedisStore.from_url(server.url) as store:
        app = Flask(__name__)
        app.secret_key = "signed"
        app.register_blueprint(admin_blueprint(authorize=lambda: True, store=store))
        client = app.test_client()
        assert client.get("/sessions/").status_code == 200
        server.kill()
        for path in ("/sessions/", "/sessions/figures"):
            assert client.get(path).status_code == 503


# -- a way back and a logout ------------------------------------------------------------------------------------------


def test_links_of_the_application(store: Store) -> None:
    app = Flask(__name__)
    app.secret_key = "signed"
    app.add_url_rule("/start", "start", lambda: "")
    app.add_url_rule("/bye", "bye", lambda: "", methods=["GET", "POST"])
    app.add_url_rule("/leave", "leave", lambda: "")
    for name, home, logout in (
        ("none", None, None),
        ("form", "start", "bye"),
        ("link", "/start?x=1", "leave"),
        ("elsewhere", "https://shop.example/", "https://login.example/logout"),
    ):
        blueprint = admin_blueprint(authorize=lambda: True, store=store, name=name, home=home, logout=logout)
        app.register_blueprint(blueprint, url_prefix=f"/{name}")
    client = app.test_client()
    page = client.get("/none/").text
    assert "Back to the application" not in page
    assert "Log out" not in page
    page = client.get("/form/").text
    assert '<a href="/start">Back to the application</a>' in page
    assert re.search(r'<form method="post" action="/bye">\s*<button class="quiet">Log out</button>', page)
    assert token_of(page) not in page[: page.index("Log out")]  # the page's own token is not sent elsewhere
    page = client.get("/link/end-all?owner=ada").text
    assert '<a href="/start?x=1">Back to the application</a>' in page
    assert '<a href="/leave">Log out</a>' in page
    assert '<a href="https://login.example/logout">Log out</a>' in client.get("/elsewhere/").text


def test_links_that_lead_nowhere_are_errors(app: Flask) -> None:
    wrong: Any
    for wrong in (flask.redirect("/"), ""):
        with pytest.raises(ConfigError, match="home must be an endpoint or a URL"):
            admin_blueprint(authorize=lambda: True, home=wrong)
    with pytest.raises(ConfigError, match=r"logout='\.bye' is relative to the admin page"):
        admin_blueprint(authorize=lambda: True, logout=".bye")
    app.register_blueprint(admin_blueprint(authorize=lambda: True, logout="typo", name="other"), url_prefix="/o")
    with pytest.raises(BuildError, match="typo"):
        app.test_client().get("/o/")


# -- beside Flask-WTF -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("field", ["csrf_token", "_guard"])
def test_forms_work_beside_csrf_protect(store: Store, early: bool, field: str) -> None:
    """Without exemptions, and whether the page or the extension is registered first."""
    app = Flask(__name__)
    app.session_interface = StoreSessionInterface(store)
    app.config.update(SECRET_KEY="of the tokens", WTF_CSRF_FIELD_NAME=field)
    app.add_url_rule("/bye", "bye", lambda: "bye", methods=["POST"])
    blueprint = admin_blueprint(authorize=lambda: True, logout="bye")
    if early:
        app.register_blueprint(blueprint)
    CSRFProtect(app)
    if not early:
        app.register_blueprint(blueprint)
    client = app.test_client()

    def forms(path: str) -> list[dict[str, str]]:
        page = client.get(path).text
        return [
            dict(re.findall(r'name="(\w+)" value="([^"]*)"', form))
            for form in re.findall(r'<form method="post".*?</form>', page, re.DOTALL)
        ]

    store.set("a", {}, owner="ada")
    store.set("b", {}, owner="ada")
    bye, sessions = forms("/sessions/")
    assert {*bye} == {field}
    assert client.post("/bye", data=bye).text == "bye"
    assert client.post("/bye").status_code == 400
    assert client.post("/sessions/", data=sessions | {"end": digest("a")}).status_code == 303
    assert "a" not in store
    sessions.pop(field)
    assert client.post("/sessions/", data=sessions | {"end": digest("b")}).status_code == 400  # by the extension
    _, confirm = forms("/sessions/end-all?owner=ada")
    assert client.post("/sessions/", data=confirm | {"token": ""}).status_code == 403  # by the page
    assert "b" in store
    assert client.post("/sessions/", data=confirm).status_code == 303
    assert "b" not in store


def test_an_unavailable_store_is_a_503(app: Flask) -> None:
    def gone() -> Store:
        raise StoreUnavailable("the server of 'shop' does not run: shmstore serve shop")

    app.register_blueprint(admin_blueprint(authorize=lambda: True, store=gone, name="other"), url_prefix="/other")
    client = app.test_client()
    answer = client.get("/other/")
    assert answer.status_code == 503
    assert "shmstore serve shop" in answer.text
    assert "Content-Security-Policy" in answer.headers
    assert client.get("/other/figures").status_code == 503


def test_the_pages_use_no_name_that_they_are_not_given(store: Store) -> None:
    """An application may have made that an error for all templates."""

    def gone() -> Store:
        raise StoreUnavailable("of a test")

    app = Flask(__name__)
    app.secret_key = "signed"
    app.jinja_env.undefined = StrictUndefined
    for name, source in (("shown", store), ("gone", gone)):
        app.register_blueprint(admin_blueprint(lambda: True, store=source, name=name), url_prefix=f"/{name}")
    client = app.test_client()
    store.set("a", {}, owner="ada")
    for path in ("", "?q=ada", "?q=nobody", "?expired=1", "end-all?owner=ada", "end-all"):
        assert client.get(f"/shown/{path}").status_code == 200
        assert client.get(f"/gone/{path}").status_code == 503


@pytest.mark.parametrize("error", [StoreUnavailable, StoreFull])
def test_the_reason_of_an_outage_is_shown_only_to_admins(app: Flask, error: type[Exception]) -> None:
    """Also after a request of another visitor in the same application context."""

    def authorize() -> bool:
        if flask.request.args.get("who") == "root":
            return True
        raise error("of /dev/shm/secret")

    def gone() -> Store:
        raise error("of /dev/shm/secret")

    app.register_blueprint(admin_blueprint(authorize, store=gone, name="other"), url_prefix="/other")
    with app.app_context():
        client = app.test_client()
        assert "secret" in client.get("/other/?who=root").text
        for path in ("/other/", "/other/figures"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert "secret" not in answer.text + str(answer.headers)


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large() -> Iterator[Store]:
    with Store(memory=2**24, recency=0) as store:
        for number in range(5000):
            store.set(str(number), {}, owner=f"user{number % 100}")
        yield store


def test_a_page_reads_the_sessions_that_it_shows(large: Store) -> None:
    """A search by owner does not read more; the figures read no session."""
    app = Flask(__name__)
    app.session_interface = StoreSessionInterface(large)
    app.register_blueprint(admin_blueprint(authorize=lambda: True), url_prefix="/admin")
    client = app.test_client()
    client.get("/admin/")

    def reads(path: str) -> int:
        with patch("shmstore.listing.unpack", wraps=unpack) as reading:
            assert client.get(path).status_code == 200
        return reading.call_count

    assert reads("/admin/") == reads("/admin/?page=51") == reads("/admin/?q=user7") == 50
    assert reads("/admin/figures") == 0


def test_a_search_stops_at_its_time_limit(large: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmstore.flask.admin.table._SEARCH_TIME", 0.0)
    app = Flask(__name__)
    app.session_interface = StoreSessionInterface(large)
    app.register_blueprint(admin_blueprint(authorize=lambda: True), url_prefix="/admin")
    page = app.test_client().get("/admin/?q=nobody+there").text
    assert "Only the first 1 sessions were searched" in page
