"""The example for plain WSGI: the same sessions without a framework."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

import pytest
from browsing import meanwhile
from gunicorns import StartGunicorn
from processes import ROOT
from werkzeug.test import Client

from shmstore import SerializationError, Store
from shmstore.policy import Policy

EXAMPLE = Path(ROOT, "examples", "wsgi.py")

APP = f"""
import sys
sys.path.insert(0, {str(EXAMPLE.parent)!r})
from wsgi import Policy, SessionMiddleware, attach_or_start, count

app = SessionMiddleware(count, lambda: attach_or_start("shop"), Policy(ttl=60))
"""

View = Callable[[Any], Iterable[bytes] | None]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("wsgi_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def browser(store: Store) -> Client:
    return new_browser(store)


def new_browser(store: Store, **policy: Any) -> Client:
    """A browser of an application whose view is passed with the request; both sides of the middleware are checked."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        parts = environ["test.view"](environ["shmstore.session"])
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [] if parts is None else parts

    middleware = example().SessionMiddleware(validator(app), lambda: store, Policy(ttl=60, **policy))
    return Client(validator(middleware))


def visit(browser: Client, view: View) -> Any:
    with browser.get("/", environ_overrides={"test.view": view}) as response:
        response.get_data()
    return response


def twin(browser: Client) -> Client:
    other = Client(browser.application)
    cookie = browser.get_cookie("session")
    assert cookie is not None
    other.set_cookie("session", cookie.value)
    return other


def put(**values: Any) -> View:
    return lambda session: session.update(values)


def cookies(response: Any) -> list[str]:
    found: list[str] = response.headers.getlist("Set-Cookie")
    return found


@pytest.mark.parametrize("arguments", [(), ("-k", "gthread"), ("-k", "gevent")])
def test_visits_are_counted_by_all_workers(gunicorn: StartGunicorn, arguments: tuple[str, ...]) -> None:
    g = gunicorn(*arguments).booted()
    first = g.ask("/")
    assert (first.status, first.body) == (200, "Visit 1\n")
    [cookie] = first.cookies
    sid = cookie.partition(";")[0].removeprefix("session=")
    assert [g.ask("/", sid) for _ in range(10)] == [(200, [], f"Visit {n}\n") for n in range(2, 12)]
    assert g.complaints() == []


def test_data_are_kept_and_the_cookie_is_sent_once(store: Store, browser: Client) -> None:
    response = visit(browser, put(cart=(1, 2)))
    [sid] = store.ids()
    assert cookies(response) == [f"session={sid}; HttpOnly; Path=/; SameSite=Lax"]
    assert response.headers["Vary"] == "Cookie"
    response = visit(browser, lambda session: [repr(session["cart"]).encode()])
    assert (response.text, cookies(response), response.headers["Vary"]) == ("(1, 2)", [], "Cookie")


def test_a_request_that_does_not_use_its_session_reads_nothing(store: Store, browser: Client) -> None:
    visit(browser, put(a=1))
    gets = store.stats().gets
    response = visit(browser, lambda session: [b"hello"])
    assert store.stats().gets == gets
    assert "Vary" not in response.headers


def test_the_cookie_is_deleted_when_the_session_ends(store: Store, browser: Client) -> None:
    visit(browser, put(a=1))
    [cookie] = cookies(visit(browser, lambda session: session.destroy() and None))
    assert cookie.startswith('session=""; ')
    assert "Max-Age=0" in cookie
    assert len(store) == 0
    assert browser.get_cookie("session") is None


def test_a_permanent_session_outlives_the_browser(store: Store) -> None:
    [cookie] = cookies(visit(new_browser(store, permanent=True), put(a=1)))
    assert "Max-Age=60" in cookie


def test_overlapping_requests_keep_each_others_changes(store: Store, browser: Client) -> None:
    visit(browser, put(cart=[1]))

    def slow(session: Any) -> None:
        session["cart"].append(2)
        meanwhile(lambda: visit(twin(browser), put(b=2)))

    visit(browser, slow)
    assert store.all() == {store.ids()[0]: {"cart": [1, 2], "b": 2}}


def test_a_slow_request_does_not_undo_a_logout(store: Store, browser: Client) -> None:
    visit(browser, put(a=1))

    def slow(session: Any) -> None:
        session["a"] = 2
        meanwhile(lambda: visit(twin(browser), lambda session: session.destroy() and None))

    assert cookies(visit(browser, slow)) == []
    assert len(store) == 0


def test_a_login_changes_the_id(store: Store, browser: Client) -> None:
    visit(browser, put(a=1))
    before = store.ids()
    visit(browser, put(_user_id="ada"))
    assert store.ids() == store.owned_by("ada") != before


def test_changes_during_a_stream_are_not_saved(store: Store, browser: Client) -> None:
    def streaming(session: Any) -> Iterator[bytes]:
        session["before"] = 1
        yield b"one"
        session["after"] = 1
        yield b"two"

    response = visit(browser, streaming)
    assert response.text == "onetwo"
    assert store.all() == {store.ids()[0]: {"before": 1}}

    def saving(session: Any) -> Iterator[bytes]:
        assert session["before"] == 1
        yield b"one"
        session["after"] = 1
        session.save()

    visit(browser, saving)
    assert store.all() == {store.ids()[0]: {"before": 1, "after": 1}}


# Werkzeug's client does not close a failed response, and the validator reports that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_save_is_an_error_and_sends_no_cookie(store: Store, browser: Client) -> None:
    with pytest.raises(SerializationError, match=r"cart\[0\]\.price"):
        visit(browser, put(cart=[{"price": object()}]))
    assert len(store) == 0
    gc.collect()  # the report is raised here, not in another test


def test_an_error_in_the_middle_of_a_stream_reaches_the_server(store: Store) -> None:
    def failing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"one"
        try:
            1 / 0  # noqa: B018
        except ArithmeticError:
            start_response("500 Sorry", [], sys.exc_info())

    def server(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        if exc_info:
            raise exc_info[1]

    parts = example().SessionMiddleware(failing, lambda: store, Policy(ttl=60))({}, server)
    assert next(parts) == b"one"
    with pytest.raises(ArithmeticError):
        next(parts)


@pytest.mark.parametrize("others", ["a/b=1; ", "a[0]=1;", 'x="; ', "; ; =;"])
def test_foreign_cookies_are_ignored(store: Store, browser: Client, others: str) -> None:
    visit(browser, put(a=1))
    header = f"{others} session={store.ids()[0]}; z=1"
    other = Client(browser.application, use_cookies=False)
    environ = {"test.view": lambda session: [repr(dict(session)).encode()], "HTTP_COOKIE": header}
    with other.get("/", environ_overrides=environ) as response:
        assert response.get_data() == b"{'a': 1}"


def test_nothing_but_the_flask_side_needs_flask() -> None:
    code = f"""
import sys
sys.modules.update(flask=None, werkzeug=None)  # importing them is an error
import shmstore, shmstore.gunicorn, shmstore.session
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import wsgi
with shmstore.Store(memory=2**20) as store:
    app = wsgi.SessionMiddleware(wsgi.count, lambda: store, wsgi.Policy(ttl=60))
    print(b"".join(app({{}}, lambda *_: None)).decode())
try:
    import shmstore.flask
except ImportError:
    print("shmstore.flask does")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ROOT})
    assert done.stdout.splitlines() == ["Visit 1", "", "shmstore.flask does"], done.stderr
