"""What the middleware does with one connection, called as servers call it."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import trio
from asgi_browsing import Answer, Browser, View, look, make_app, no_message, put, respond
from browsing import Clock
from flask import Flask
from flask import session as flask_session
from redis_servers import RedisServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from shmstore import ConfigError, SerializationError, Store, StoreTimeout, StoreUnavailable
from shmstore.asgi import SessionMiddleware
from shmstore.asgi.session import ScopeSession
from shmstore.flask import StoreSessionInterface
from shmstore.session import save, unsaved
from shmstore.web.cookie import SessionCookie


@pytest.fixture
def browser(store: Store) -> Browser:
    return Browser(make_app(store))


def visit(browser: Browser, *arguments: Any, **more: Any) -> Answer:
    return asyncio.run(browser.get(*arguments, **more))


# -- what is read, stored and sent ----------------------------------------------------------------------------


def test_a_session_that_is_not_looked_at_changes_nothing(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))
    before = store.stats()
    answer = visit(browser, lambda session: "nothing")
    assert answer == ([], "nothing")
    assert store.stats() == replace(before, gets=before.gets + 1, hits=before.hits + 1)


def test_c_code_sees_a_session_that_was_not_looked_at(browser: Browser) -> None:
    def view(session: ScopeSession) -> Any:
        return json.loads(msgspec.json.encode(session))

    assert visit(browser, view).body == {}
    visit(browser, put(a=1))
    assert visit(browser, view).body == {"a": 1}
    assert visit(browser, lambda session: session.setdefault("b", view(session))).body == {"a": 1}
    assert visit(browser, look).body == {"a": 1, "b": {"a": 1}}


@pytest.mark.parametrize("view", [None, look, put(b=2), put(_user_id="ann")], ids=["none", "read", "write", "login"])
def test_a_request_leaves_nothing_to_the_garbage_collector(browser: Browser, view: View | None) -> None:
    async def main() -> None:
        await browser.get(put(a=1))
        gc.collect()
        gc.disable()
        try:
            await browser.get(view)
            assert gc.collect() == 0
        finally:
            gc.enable()

    asyncio.run(main())


def test_looking_at_an_empty_session_starts_none(store: Store, browser: Browser) -> None:
    answer = visit(browser, look)
    assert (answer.body, answer.vary, answer.cookies) == ({}, "Cookie", [])
    assert len(store) == 0


def test_a_session_goes_on(store: Store, browser: Browser) -> None:
    answer = visit(browser, put(a=1))
    assert answer.cookies == [f"session={browser.cookie}; path=/; httponly; samesite=lax"]
    assert store.get(browser.cookie) == {"a": 1}
    again = visit(browser, look)
    assert (again.body, again.vary, again.cookies) == ({"a": 1}, "Cookie", [])


def test_the_session_is_a_dict(browser: Browser) -> None:
    visit(browser, put(a=1))
    assert visit(browser, lambda session: session).body == {"a": 1}, "json takes it as it is"


def test_an_invented_id_is_not_adopted(store: Store) -> None:
    browser = Browser(make_app(store), "A" * 43)
    visit(browser, put(a=1))
    assert browser.cookie != "A" * 43


def test_of_several_cookies_the_one_that_is_known_counts(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))
    headers = [(b"cookie", b"session=" + b"A" * 43), (b"cookie", b"session=" + browser.cookie.encode())]
    assert visit(Browser(browser.app), look, headers=headers).body == {"a": 1}


@pytest.mark.parametrize(
    ("headers", "vary"),
    [
        ([], ["Cookie"]),
        ([(b"Vary", b"Accept")], ["Accept, Cookie"]),
        ([(b"vary", b"accept, COOKIE")], ["accept, COOKIE"]),
        ([(b"vary", b"*")], ["*"]),
    ],
)
def test_vary(browser: Browser, headers: list[tuple[bytes, bytes]], vary: list[str]) -> None:
    given = headers.copy()
    assert visit(browser, look, answer_headers=headers).all("vary") == vary
    assert headers == given, "an application may use its list again"


def test_a_session_that_is_emptied_ends(store: Store) -> None:
    browser = Browser(make_app(store, cookie_secure=True, cookie_domain="example.com", cookie_path="/shop"))
    visit(browser, put(a=1))
    answer = visit(browser, lambda session: session.clear())
    attributes = "path=/shop; httponly; samesite=lax; secure; domain=example.com"
    assert answer.cookies == [f"session=; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0; {attributes}"]
    assert len(store) == 0


# -- permanence -----------------------------------------------------------------------------------------------


def make_permanent(session: ScopeSession) -> dict[str, Any]:
    session.permanent = True
    return dict(session)


def forget_me(session: ScopeSession) -> None:
    session.permanent = False


def test_a_permanent_session_has_no_key_for_that(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))
    answer = visit(browser, make_permanent)
    assert answer.body == {"a": 1}
    assert answer.cookies == [f"session={browser.cookie}; Max-Age=3600; path=/; httponly; samesite=lax"]
    again = visit(browser, lambda session: [dict(session), session.permanent])
    assert again.body == [{"a": 1}, True]
    assert again.cookies == answer.cookies, "sent again at each look, so that it lives as long as the session"
    assert visit(browser, forget_me).cookies == [f"session={browser.cookie}; path=/; httponly; samesite=lax"]
    assert visit(browser, lambda session: session.permanent).body is False
    assert store.get(browser.cookie) == {"a": 1}


def test_permanent_by_default(store: Store) -> None:
    browser = Browser(make_app(store, permanent=True, refresh_each_request=False))
    assert visit(browser, look) == ([("vary", "Cookie")], {})
    assert "Max-Age=3600" in visit(browser, put(a=1)).cookies[0]
    assert visit(browser, look) == ([("vary", "Cookie")], {"a": 1})
    visit(browser, forget_me)
    assert visit(browser, lambda session: session.permanent).body is False
    visit(browser, lambda session: session.clear() or session.update(b=1))
    assert visit(browser, lambda session: session.permanent).body is True


def test_flask_and_asgi_share_sessions(store: Store) -> None:
    app = Flask(__name__)
    app.session_interface = StoreSessionInterface(store)

    @app.get("/")
    def view() -> Any:
        flask_session.permanent = True
        flask_session["a"] = 1
        return ""

    client = app.test_client()
    client.get("/")
    cookie = client.get_cookie("session")
    assert cookie is not None
    browser = Browser(make_app(store), cookie.value)
    assert visit(browser, lambda session: [dict(session), session.permanent]).body == [{"a": 1}, True]
    visit(browser, put(b=2))
    assert store.get(cookie.value) == {"_permanent": True, "a": 1, "b": 2}


def test_a_session_without_an_end_has_a_cookie_with_one(store: Store) -> None:
    browser = Browser(make_app(store, ttl=float("inf"), permanent=True))
    assert f"Max-Age={400 * 86400};" in visit(browser, put(a=1)).cookies[0]


# -- login and logout -----------------------------------------------------------------------------------------


def test_a_login_changes_the_id(store: Store, browser: Browser) -> None:
    visit(browser, put(cart=["tea"]))
    before = browser.tab()
    visit(browser, put(_user_id="ann"))
    assert browser.cookie != before.cookie
    assert store.owned_by("ann") == [browser.cookie]
    assert visit(browser, look).body == {"cart": ["tea"], "_user_id": "ann"}
    assert visit(before, look) == ([("vary", "Cookie")], {}), "no cookie over the newer one"


def test_a_logout_is_final(store: Store, browser: Browser) -> None:
    visit(browser, put(_user_id="ann"))
    slow, late = browser.tab(), browser.tab()

    async def log_out_meanwhile(session: ScopeSession) -> None:
        session["seen"] = True
        await browser.get(lambda session: session.clear())

    assert visit(slow, log_out_meanwhile).cookies == []
    assert visit(late, put(csrf="x")).cookies == [], "its cookie is on the way to be deleted"
    assert len(store) == 0


def test_a_navigation_after_a_logout_starts_a_session(browser: Browser, clock: Clock) -> None:
    visit(browser, put(_user_id="ann"))
    late = browser.tab()
    visit(browser, lambda session: session.clear())
    navigation = [(b"sec-fetch-mode", b"navigate"), (b"sec-fetch-dest", b"document")]
    assert visit(late, put(csrf="x"), headers=navigation).cookies != []


# -- requests that overlap ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", range(3))
def test_overlapping_requests_keep_each_others_keys(store: Store, browser: Browser, rounds: int) -> None:
    visit(browser, put(n=0))

    async def main() -> None:
        met = asyncio.Barrier(5)

        def writer(number: int) -> Any:
            async def view(session: ScopeSession) -> None:
                session[f"key{number}"] = number
                await met.wait()  # all have read it, none has saved it

            return view

        await asyncio.gather(*(browser.tab().get(writer(number)) for number in range(5)))

    asyncio.run(main())
    assert visit(browser, look).body == {"n": 0} | {f"key{number}": number for number in range(5)}


def test_flash_messages_of_overlapping_requests_are_all_kept(browser: Browser) -> None:
    visit(browser, put(_flashes=["a"]))

    async def main() -> None:
        async def slow(session: ScopeSession) -> None:
            session["_flashes"] = [*session["_flashes"], "b"]
            await browser.tab().get(lambda session: session["_flashes"].append("c"))

        await browser.get(slow)

    asyncio.run(main())
    assert visit(browser, look).body == {"_flashes": ["a", "c", "b"]}


# -- after the response has started ---------------------------------------------------------------------------


def changed_and_saved(**values: Any) -> View:
    async def view(session: ScopeSession) -> None:
        session.update(values)
        assert unsaved(session)
        stored = await save(session)
        assert unsaved(session) is not stored

    return view


def test_a_change_after_the_start_of_the_response_can_be_saved(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))
    answer = visit(browser, look, after=changed_and_saved(b=2))
    assert answer.cookies == []
    assert store.get(browser.cookie) == {"a": 1, "b": 2}


def test_no_session_begins_after_the_start_of_the_response(store: Store, browser: Browser) -> None:
    answer = visit(browser, None, after=changed_and_saved(a=1))
    assert answer.headers == []
    assert len(store) == 0


def test_a_rotation_after_the_start_waits_for_the_next_response(browser: Browser) -> None:
    visit(browser, put(a=1))
    before = browser.cookie

    async def rotate(session: ScopeSession) -> None:
        session.rotate()
        assert await save(session)

    assert visit(browser, look, after=rotate).cookies == []
    assert visit(browser, look).body == {"a": 1}
    assert browser.cookie != before


def test_an_id_chosen_before_the_start_waits_for_the_next_response(store: Store, browser: Browser) -> None:
    """The session is read before the application is called, and a new id is due then."""
    visit(browser, put(a=1))
    before = browser.cookie
    asyncio.run(browser.socket(lambda session: session.rotate()))
    assert visit(browser, None, after=changed_and_saved(b=2)).cookies == []
    assert store.ids() == [before]
    assert visit(browser, look).body == {"a": 1, "b": 2}
    assert browser.cookie != before


def test_a_login_after_the_start_is_not_stored(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))
    assert visit(browser, look, after=changed_and_saved(_user_id="ann")).cookies == []
    assert store.all() == {browser.cookie: {"a": 1}}


def test_what_is_unsaved(browser: Browser) -> None:
    def view(session: ScopeSession) -> list[bool]:
        found = [unsaved(session)]  # not looked at
        session.get("a")
        found.append(unsaved(session))
        session["a"] = [1]
        session.save()
        found.append(unsaved(session))
        session["a"].append(2)
        found.append(unsaved(session))
        session.save()
        session.rotate()
        return [*found, unsaved(session)]

    assert visit(browser, view).body == [False, False, False, True, True]


def test_a_request_that_fails_stores_nothing(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))

    def fail(session: ScopeSession) -> None:
        session["a"] = 2
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        visit(browser, fail)
    assert store.get(browser.cookie) == {"a": 1}


def failing(store: Store, changes: dict[str, Any], *, rotates: bool, permanent: bool) -> TestClient:
    """Starlette sends its page for errors outside of all middlewares."""

    async def begin(request: Request) -> Response:
        request.session.update(a=1)
        return Response("")

    async def fail(request: Request) -> Response:
        session: Any = request.session
        if rotates:
            session.rotate()
        session.update(changes)
        async with session.lock():
            session["b"] = 2
        raise ZeroDivisionError

    app = Starlette(routes=[Route("/", begin), Route("/fail", fail)])
    app.add_middleware(SessionMiddleware, store=store, permanent=permanent)
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(("rotates", "changes"), [(True, {}), (False, {"_user_id": "ann"})])
def test_an_id_that_was_changed_is_sent_even_if_the_request_fails(
    store: Store, rotates: bool, changes: dict[str, Any]
) -> None:
    client = failing(store, changes, rotates=rotates, permanent=False)
    client.get("/")
    before = client.cookies["session"]
    answer = client.get("/fail")
    assert (answer.status_code, answer.text, answer.headers["vary"]) == (500, "Internal Server Error", "Cookie")
    assert store.all() == {client.cookies["session"]: {"a": 1, "b": 2, **changes}}
    assert client.cookies["session"] != before


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_a_failed_request_that_changed_no_id_sends_no_cookie(store: Store, permanent: bool, known: bool) -> None:
    client = failing(store, {"a": 1}, rotates=False, permanent=permanent)
    if known:
        client.get("/")
    answer = client.get("/fail")
    assert answer.status_code == 500
    assert "set-cookie" not in answer.headers  # it is the page of the framework, which may show more than ours
    assert "vary" not in answer.headers


def test_after_a_failed_request_no_session_begins(store: Store, browser: Browser) -> None:
    found: list[ScopeSession] = []

    def fail(session: ScopeSession) -> None:
        session.get("a")
        found.append(session)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        visit(browser, fail)
    found[0]["answer"] = 1
    assert not found[0].save()
    assert len(store) == 0


# -- WebSockets -----------------------------------------------------------------------------------------------


def test_a_websocket_reads_and_changes_a_session(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))
    asyncio.run(browser.socket(lambda session: session.update(b=session["a"] + 1)))
    assert store.get(browser.cookie) == {"a": 1, "b": 2}


def test_a_websocket_that_ends_by_an_exception_keeps_its_changes(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))

    def change(session: ScopeSession) -> None:
        session["b"] = 2
        raise ConnectionError("the browser has left")

    with pytest.raises(ConnectionError):
        asyncio.run(browser.socket(change))
    assert store.get(browser.cookie) == {"a": 1, "b": 2}


def test_a_websocket_begins_no_session_and_stores_no_login(store: Store, browser: Browser) -> None:
    asyncio.run(browser.socket(put(a=1)))
    assert len(store) == 0
    visit(browser, put(a=1))
    asyncio.run(browser.socket(put(_user_id="ann")))
    assert store.all() == {browser.cookie: {"a": 1}}
    asyncio.run(browser.socket(lambda session: session.destroy()))
    assert len(store) == 0


# -- what an application puts in the place of the session -----------------------------------------------------


class Litestars(Enum):
    """As Litestar marks a session that was cleared."""

    EMPTY = 0


class OtherSession(dict[str, Any]):
    """The session of another middleware."""


REPLACED = [({"b": 2}, {"b": 2}), ({}, None), (None, None), (Litestars.EMPTY, None), (OtherSession(b=2), {"a": 1})]


def replacing(store: Store, value: object, app: object = "litestar") -> SessionMiddleware:
    """Return an application in Litestar that puts a value in the place of the session."""

    async def replace_session(scope: Any, receive: Any, send: Any) -> None:
        scope.update(session=value, app=app)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body"})

    middleware = SessionMiddleware(replace_session, store)

    async def in_litestar(scope: Any, receive: Any, send: Any) -> None:
        await middleware({**scope, "app": "litestar", "litestar_app": "litestar"}, receive, send)

    return in_litestar  # type: ignore[return-value]


@pytest.mark.parametrize(("value", "stored"), REPLACED)
def test_what_litestar_puts_in_its_place(store: Store, browser: Browser, value: object, stored: object) -> None:
    visit(browser, put(a=1))
    visit(Browser(replacing(store, value), browser.cookie))
    assert store.get(browser.cookie) == stored


@pytest.mark.parametrize(("value", "stored"), REPLACED)
def test_what_litestar_puts_in_its_place_in_a_websocket(
    store: Store, browser: Browser, value: object, stored: object
) -> None:
    visit(browser, put(a=1))
    asyncio.run(Browser(replacing(store, value), browser.cookie).socket(look))
    assert store.get(browser.cookie) == stored


def test_what_cannot_be_a_session_is_refused(store: Store) -> None:
    with pytest.raises(TypeError, match="must be a dict, not int"):
        visit(Browser(replacing(store, 7)))


@pytest.mark.parametrize("value", [{"b": 2}, {}, None, 7])
def test_what_an_application_mounted_in_litestar_puts_in_its_place(
    store: Store, browser: Browser, value: object
) -> None:
    visit(browser, put(a=1))
    visit(Browser(replacing(store, value, app="mounted"), browser.cookie))
    assert store.get(browser.cookie) == {"a": 1}


# -- several session middlewares ------------------------------------------------------------------------------


class PlainSessions:
    """A middleware as Starlette's: its session is a plain dict in the scope, and its cookie tells what was in it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["session"] = {}

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"plain", json.dumps(scope["session"]).encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, answer)


def mounted(app: Any) -> Starlette:
    return Starlette(routes=[Mount("", app)])


@pytest.mark.parametrize(("view", "plain"), [(None, "{}"), (put(b=2), '{"b": 2}')])
def test_another_session_middleware_below_this_one(
    store: Store, browser: Browser, view: View | None, plain: str
) -> None:
    visit(browser, put(a=1))
    nested = Browser(SessionMiddleware(mounted(PlainSessions(respond)), store), browser.cookie)
    assert visit(nested, view).headers == [("plain", plain)]
    assert visit(browser, look).body == {"a": 1}


def test_another_session_middleware_around_this_one(store: Store) -> None:
    browser: Any = Browser(PlainSessions(mounted(SessionMiddleware(respond, store))))  # type: ignore[arg-type]
    assert visit(browser, put(b=2)).all("plain") == ["{}"]
    assert visit(browser, look).body == {"b": 2}


def test_this_middleware_twice(store: Store) -> None:
    other = Store()
    inner = SessionMiddleware(respond, other)
    outer = Browser(SessionMiddleware(mounted(inner), store), "")
    visit(outer, put(b=2))
    assert (len(store), len(other)) == (0, 1)
    other.close()


def test_error_pages_around_the_middleware_see_the_session(store: Store) -> None:
    scope: dict[str, Any] = {"type": "http", "headers": []}

    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(SessionMiddleware(fail, store)(scope, no_message, no_message))
    assert scope["session"] == {}


# -- errors ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_stored_is_an_error_once(store: Store) -> None:
    shown = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["session"]["a"] = object()
        with pytest.raises(SerializationError, match="a: cannot"):
            await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.start", "status": 500})  # the page that says so
        shown.append(True)
        await send({"type": "http.response.body"})

    assert visit(Browser(SessionMiddleware(app, store))).cookies == []
    assert shown
    assert len(store) == 0


@pytest.mark.parametrize("on_error", ["raise", "anonymous"])
def test_a_store_that_cannot_be_reached(store: Store, browser: Browser, on_error: str) -> None:
    visit(browser, put(a=1))
    store.close()
    browser = Browser(make_app(store, on_error=on_error), browser.cookie)
    assert visit(browser).headers == [], "a request that does not need it is answered"
    if on_error == "raise":
        with pytest.raises(StoreUnavailable):
            visit(browser, look)
    else:
        assert visit(browser, look).body == {}
        assert visit(browser, put(a=2)).cookies == []


@pytest.mark.parametrize("on_error", ["raise", "anonymous"])
def test_a_store_that_cannot_be_opened(browser: Browser, on_error: str) -> None:
    app = make_app("shm:///proc/1/no-store", on_error=on_error)
    assert visit(Browser(app)).headers == []
    if on_error == "raise":
        with pytest.raises(StoreUnavailable):
            visit(Browser(app, "A" * 43), look)
    else:
        assert visit(Browser(app, "A" * 43), look).body == {}


def test_a_store_is_opened_for_the_first_request_that_needs_it(store: Store) -> None:
    app, opened = make_app(store), list[None]()
    source = app._source

    def counting() -> Any:
        opened.append(None)
        return source()

    app._source = counting
    browser = Browser(app)
    for view in (None, look, lambda session: session.clear()):
        visit(browser, view)
    visit(Browser(app, "not an id"), look)
    assert opened == []
    visit(browser, put(a=1))
    visit(browser, look)
    assert opened == [None]


def test_requests_that_come_at_once_try_once_to_open_a_store() -> None:
    app, opened = make_app("shm:///proc/1/no-store"), list[None]()

    def failing() -> Any:
        opened.append(None)
        all_wait.wait()
        raise StoreUnavailable("not here")

    async def main() -> None:
        visits = [asyncio.create_task(Browser(app, "A" * 43).get()) for _ in range(3)]
        while not opened:
            await asyncio.sleep(0)
        all_wait.set()
        await asyncio.gather(*visits)

    all_wait = threading.Event()
    app._source = failing
    asyncio.run(main())
    assert opened == [None]


def test_a_failure_to_open_a_store_is_remembered_for_a_moment(store_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmstore.asgi.middleware._RETRY_AFTER", float("inf"))
    directory = Path(store_dir) / "here"
    directory.touch()  # not a directory
    browser = Browser(make_app(f"shm://{directory}/shop", store_options={"memory": 2**20}), "A" * 43)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            visit(browser, look)
        directory.unlink(missing_ok=True)
    browser.app._retry_at = 0
    assert visit(browser, look).body == {}
    asyncio.run(browser.app._close())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": 7}, "store must be"),
        ({"store": "shm://a/b"}, "not a valid store name"),
        ({"store": "redis://"}, ""),
        ({"store": "shm://shop", "store_options": {"size": 1}}, "size"),
        ({"store": "shm://shop", "store_options": {"ttl": 5}}, "ttl has no effect here"),
        ({"store_options": {"max": 5}}, "when you create it"),
        ({"ttl": 0}, "TTL"),
        ({"permanent": 1}, "PERMANENT"),
        ({"on_error": "ignore"}, "ON_ERROR"),
        ({"cookie_name": "a b"}, "COOKIE_NAME"),
        ({"cookie_path": "shop"}, "COOKIE_PATH"),
        ({"cookie_path": "/; domain=x"}, "COOKIE_PATH"),
        ({"cookie_domain": "a;b"}, "COOKIE_DOMAIN"),
        ({"cookie_secure": "no"}, "COOKIE_SECURE"),
        ({"cookie_samesite": "Laxer"}, "COOKIE_SAMESITE"),
    ],
)
def test_invalid_options(store: Store, options: dict[str, Any], message: str) -> None:
    if options == {"store": "redis://"}:
        make_app("redis://")
        return
    with pytest.raises(ConfigError, match=message):
        make_app(**{"store": store, **options})


def test_attributes_of_the_cookie() -> None:
    cookie = SessionCookie.checked("__Host-id", secure=True, httponly=False, samesite="Strict")
    assert cookie.set("x", max_age=60) == "__Host-id=x; Max-Age=60; path=/; samesite=strict; secure"
    cookie = SessionCookie.checked(samesite=None, partitioned=True)
    assert cookie.set("x") == "session=x; path=/; httponly; secure; partitioned"
    assert (
        cookie.delete
        == "session=; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0; path=/; httponly; secure; partitioned"
    )


# -- an application's lifespan --------------------------------------------------------------------------------


def test_lifespan(store_dir: Any) -> None:
    """It passes through. The store is closed when the application has ended, and before the server learns of it."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await respond(scope, receive, send)
            return
        seen.append((scope, receive))
        await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    async def send(message: Any) -> None:
        seen.append((message["type"], opened.closed))

    browser = Browser(SessionMiddleware(app, f"shm://{store_dir}/shop", store_options={"memory": 2**20}))
    visit(browser, put(a=1))
    opened: Any = browser.app._store
    scope: Any = {"type": "lifespan"}
    asyncio.run(browser.app(scope, no_message, send))
    assert seen == [
        ({"type": "lifespan"}, no_message),
        ("lifespan.startup.complete", False),
        ("lifespan.shutdown.complete", True),
    ]
    with pytest.raises(StoreUnavailable, match="has ended"):
        browser.app._opened()  # for a session of a connection that has not ended
    assert visit(browser, look).body == {"a": 1}, "the sessions stay, and it is opened again"
    asyncio.run(browser.app._close())


@pytest.mark.parametrize("kind", ["shm", "redis"])
def test_the_last_application_closes_the_store(store_dir: Any, redis_server: RedisServer, kind: str) -> None:
    url, options = f"{redis_server.url}?prefix=asgi-last-", {}
    if kind == "shm":
        url, options = f"shm://{store_dir}/shop", {"memory": 2**20}
    first, second = (Browser(SessionMiddleware(respond, url, store_options=options)) for _ in range(2))
    visit(first, put(a=1))
    visit(second, put(b=2))
    opened = first.app._store
    assert opened is not None
    assert second.app._store is opened
    asyncio.run(first.app._close())
    assert not opened.closed
    assert visit(second, look).body == {"b": 2}
    asyncio.run(second.app._close())
    assert opened.closed


def test_a_store_that_was_given_stays_open(store: Store, browser: Browser) -> None:
    visit(browser, put(a=1))
    asyncio.run(browser.app._close())
    assert store.get(browser.cookie) == {"a": 1}


# -- locks ----------------------------------------------------------------------------------------------------


async def count(session: ScopeSession) -> None:
    async with session.lock(timeout=60):
        n = session.get("n", 0)
        await asyncio.sleep(0)
        session["n"] = n + 1


def test_a_lock_in_coroutines(browser: Browser) -> None:
    visit(browser, put(n=0))

    async def main() -> None:
        await asyncio.gather(*(browser.tab().get(count) for _ in range(5)))

    asyncio.run(main())
    assert visit(browser, look).body == {"n": 5}


def test_a_lock_that_is_held_stops_no_other_task(browser: Browser) -> None:
    visit(browser, put(n=0))
    order = []

    async def main() -> None:
        held, go_on = asyncio.Event(), asyncio.Event()

        async def holder(session: ScopeSession) -> None:
            async with session.lock():
                held.set()
                await go_on.wait()
                order.append("holder")

        async def waiter(session: ScopeSession) -> None:
            await held.wait()
            async with session.lock(timeout=60):
                order.append("waiter")

        async def others() -> None:
            await held.wait()
            for _ in range(20):
                await asyncio.sleep(0.001)
            order.append("others")
            go_on.set()

        await asyncio.gather(browser.tab().get(holder), browser.tab().get(waiter), others())

    asyncio.run(main())
    assert order == ["others", "holder", "waiter"]


def test_tasks_take_turns_in_their_order_and_only_the_first_asks_the_store() -> None:
    asked = []

    class Asked(Store):
        def lock(self, sid: str, timeout: Any = None) -> Any:
            asked.append(asyncio.current_task())
            return super().lock(sid, timeout)

    with Asked(memory=2**20) as store:
        browser = Browser(make_app(store))
        visit(browser, put(n=0))
        order = list[int]()

        async def main() -> None:
            waiting = list[int]()

            async def wait(number: int, session: ScopeSession) -> None:
                waiting.append(number)
                async with session.lock(timeout=60):
                    order.append(number)

            with Store.lock(store, browser.cookie):
                tasks = []
                for number in range(20):
                    tasks.append(asyncio.create_task(browser.tab().get(partial(wait, number))))
                    while len(waiting) == number:
                        await asyncio.sleep(0)
                while len(asked) < 40:
                    await asyncio.sleep(0.001)
                assert set(asked) == {tasks[0]}
            await asyncio.gather(*tasks)

        asyncio.run(main())
        assert order == list(range(20))


def test_a_task_that_gives_up_or_is_cancelled_keeps_no_other_from_its_turn(browser: Browser) -> None:
    visit(browser, put(n=0))

    async def main() -> None:
        held, go_on = asyncio.Event(), asyncio.Event()

        async def hold(session: ScopeSession) -> None:
            async with session.lock():
                held.set()
                await go_on.wait()

        async def give_up(session: ScopeSession) -> None:
            with pytest.raises(StoreTimeout, match=r"for 0\.001 s"):
                async with session.lock(timeout=0.001):
                    raise AssertionError

        holder = asyncio.create_task(browser.tab().get(hold))
        await held.wait()
        cancelled, later = (asyncio.create_task(browser.tab().get(count)) for _ in range(2))
        await browser.tab().get(give_up)
        cancelled.cancel()
        go_on.set()
        await asyncio.gather(holder, later)
        with pytest.raises(asyncio.CancelledError):
            await cancelled

    asyncio.run(main())
    assert visit(browser, look).body == {"n": 1}


def test_a_lock_is_taken_several_times_by_one_object(browser: Browser) -> None:
    async def twice(session: ScopeSession) -> None:
        lock = session.lock(timeout=60)
        async with lock:
            session["n"] += 1
        session.clear()
        await asyncio.to_thread(session.destroy)
        async with lock:  # nothing is stored
            session["n"] = 1

    visit(browser, put(n=0))
    visit(browser, twice)
    assert visit(browser, look).body == {"n": 1}


def test_a_lock_that_is_not_free_in_time(store: Store, browser: Browser) -> None:
    visit(browser, put(n=0))

    async def impatient(session: ScopeSession) -> None:
        with pytest.raises(StoreTimeout, match=r"for 0\.01 s"):
            async with session.lock(timeout=0.01):
                raise AssertionError

    with store.lock(browser.cookie):
        visit(browser, impatient)


def test_an_exception_in_the_block_discards_changes_and_frees_the_lock(store: Store, browser: Browser) -> None:
    visit(browser, put(n=0))

    async def fail(session: ScopeSession) -> None:
        with pytest.raises(ZeroDivisionError):
            async with session.lock():
                session["n"] = 1
                raise ZeroDivisionError
        assert session["n"] == 0

    visit(browser, fail)
    assert store.get(browser.cookie) == {"n": 0}
    with store.lock(browser.cookie, timeout=0):
        pass


def test_a_cancelled_task_frees_the_lock(store: Store, browser: Browser) -> None:
    visit(browser, put(n=0))

    async def main() -> None:
        held = asyncio.Event()

        async def hold(session: ScopeSession) -> None:
            async with session.lock():
                held.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(browser.tab().get(hold))
        await held.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    with store.lock(browser.cookie, timeout=0):
        pass


def test_the_synchronous_lock_is_refused_in_the_event_loop(browser: Browser) -> None:
    def block(session: ScopeSession) -> None:
        with session.lock():
            session["n"] += 1

    visit(browser, put(n=0))
    with pytest.raises(RuntimeError, match="async with"):
        visit(browser, block)

    async def in_thread(session: ScopeSession) -> None:
        await asyncio.to_thread(block, session)

    visit(browser, in_thread)
    assert visit(browser, look).body == {"n": 1}


# -- trio -----------------------------------------------------------------------------------------------------


def test_under_trio(browser: Browser) -> None:
    async def view(session: ScopeSession) -> None:
        async with session.lock():
            session["n"] += 1
            await trio.sleep(0)

    def refused(session: ScopeSession) -> None:
        with pytest.raises(RuntimeError, match="async with"), session.lock():
            pass

    async def main() -> None:
        await browser.get(put(n=0))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(browser.tab().get, view)
        await browser.get(refused)
        assert (await browser.get(look)).body == {"n": 3}

        async def too_late(session: ScopeSession) -> None:
            async with session.lock(timeout=0):
                await browser.tab().get(refused_in_time)

        async def refused_in_time(session: ScopeSession) -> None:
            for timeout in (0, 0.001):
                with pytest.raises(StoreTimeout):
                    async with session.lock(timeout=timeout):
                        raise AssertionError

        await browser.get(too_late)

    trio.run(main)


def test_trio_that_another_thread_is_importing_changes_nothing(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trio", ModuleType("trio"))
    visit(browser, put(n=0))
    visit(browser, count)
    assert visit(browser, look).body == {"n": 1}
