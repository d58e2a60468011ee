"""After the response was sent, and without a response: the stored session can change, but no cookie is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from browsing import cookies, look, make_app, put, session, sid_of, visit
from flask import Flask, Response, copy_current_request_context, request, stream_with_context
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from shmstore import Store
from shmstore.errors import RecordTooLarge
from shmstore.policy import Policy
from shmstore.session import Session
from shmstore.system.throttle import Throttle

Action = Callable[[], Any]

# Runs an action in a request of a client after the response was sent; returns its result.
Late = Callable[[FlaskClient, Action], Any]


def in_a_stream(client: FlaskClient, action: Action) -> Any:
    results = []

    def parts() -> Iterator[str]:
        yield "one"
        results.append(action())
        yield "two"

    answer = visit(client, lambda: Response(stream_with_context(parts())))
    assert answer.text == "onetwo"
    return said_nothing(answer, results)


def in_a_thread(client: FlaskClient, action: Action) -> Any:
    left, pool = threading.Event(), ThreadPoolExecutor(1)
    jobs: list[Future[Any]] = []

    def view() -> None:
        @copy_current_request_context
        def work() -> Any:
            assert left.wait(20)
            return action()

        jobs.append(pool.submit(work))

    with pool:
        answer = visit(client, view)
        left.set()
    return said_nothing(answer, [jobs[0].result()])


def at_teardown(client: FlaskClient, action: Action) -> Any:
    results: list[Any] = []

    def view() -> None:
        request.environ["test.teardown"] = lambda: results.append(action())

    return said_nothing(visit(client, view), results)


def on_a_websocket(client: FlaskClient, action: Action) -> Any:
    """As with Flask-Sock: the view uses the socket, and returns when the socket is closed."""
    headers = {"Upgrade": "websocket", "Connection": "keep-alive, Upgrade", "Sec-WebSocket-Key": "x"}
    return in_an_environ(client, action, headers=headers)


def on_a_websocket_of_gevent(client: FlaskClient, action: Action) -> Any:
    return in_an_environ(client, action, environ_overrides={"wsgi.websocket": object()})


def in_an_environ(client: FlaskClient, action: Action, **options: Any) -> Any:
    results: list[Any] = []
    overrides = options.pop("environ_overrides", {}) | {"test.action": lambda: results.append(action())}
    return said_nothing(client.get("/", environ_overrides=overrides, **options), results)


def said_nothing(answer: TestResponse, results: list[Any]) -> Any:
    assert answer.status_code == 200
    assert cookies(answer) == []
    [result] = results
    return result


LATE = [in_a_stream, in_a_thread, at_teardown, on_a_websocket, on_a_websocket_of_gevent]


@pytest.fixture(params=LATE, ids=[late.__name__ for late in LATE])
def late(request: pytest.FixtureRequest) -> Late:
    late: Late = request.param
    return late


@pytest.fixture
def app(store: Store) -> Flask:
    app = make_app(store)
    app.add_url_rule("/", "socket", app.view_functions["act"], websocket=True)

    @app.teardown_request
    def teardown(_: object) -> None:
        request.environ.get("test.teardown", lambda: None)()

    return app


def saves(change: Action) -> Callable[[], bool]:
    def action() -> bool:
        change()
        return session.save()

    return action


def log_in() -> None:
    session["_user_id"] = "ada"


def end() -> bool:
    return session.destroy()


def known(app: Flask) -> FlaskClient:
    client = app.test_client()
    with client.session_transaction() as opened:
        opened["a"] = 1
    return client


def test_a_stored_session_is_changed(store: Store, app: Flask, late: Late) -> None:
    client = known(app)
    assert late(client, saves(put(b=2))) is True
    assert store.all() == {sid_of(client): {"a": 1, "b": 2}}


@pytest.mark.parametrize("looks_first", [False, True])
def test_no_session_is_started_and_save_returns_false(
    store: Store,
    app: Flask,
    late: Late,
    looks_first: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shmstore.web.stored_session._unanswerable", Throttle())
    client = app.test_client()
    if looks_first:
        app.before_request(lambda: str(session.get("a")) and None)
    assert late(client, saves(put(b=2))) is False
    assert len(store) == 0
    assert caplog.text.count("not stored") == 1


def test_a_new_id_waits_for_a_request_with_a_response(store: Store, app: Flask, late: Late) -> None:
    client = known(app)
    old = sid_of(client)

    def rotate() -> None:
        session.rotate()
        assert session.sid == old

    assert late(client, saves(rotate)) is True
    assert late(client, saves(put(b=2))) is True  # nor does another one without a response change it
    assert store.ids() == [old]
    assert len(cookies(visit(client, look))) == 1
    assert store.ids() == [sid_of(client)] != [old]
    assert store.get(sid_of(client)) == {"a": 1, "b": 2}
    assert cookies(visit(client, look)) == []


@pytest.mark.parametrize("before", [put(a=1), put(_user_id="eve")])
def test_a_login_is_not_stored_under_an_id_that_may_have_been_planted(
    store: Store, app: Flask, late: Late, before: Action, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("shmstore.web.stored_session._planted", Throttle())
    client = app.test_client()
    visit(client, before)
    stored = store.all()
    assert late(client, saves(log_in)) is False
    assert store.all() == stored
    assert "logins not stored" in caplog.text
    visit(client, log_in)
    assert store.owned_by("ada") == [sid_of(client)] != list(stored)


def test_a_logout_is_stored_and_the_new_id_waits(store: Store, app: Flask, late: Late) -> None:
    client = app.test_client()
    visit(client, put(a=1, _user_id="ada"))
    old = sid_of(client)
    assert late(client, saves(lambda: session.pop("_user_id"))) is True
    assert (store.ids(), store.owned_by("ada")) == ([old], [])
    assert len(cookies(visit(client, look))) == 1
    assert store.all() == {sid_of(client): {"a": 1}}


@pytest.mark.parametrize("how", [end, saves(lambda: session.clear()), saves(lambda: session.pop("a"))])  # noqa: PLW0108
def test_a_session_can_be_ended_and_its_browser_starts_another_at_once(
    store: Store, app: Flask, late: Late, how: Action
) -> None:
    """The browser got no cookie, so a request with the old id cannot overwrite a newer one."""
    client = known(app)
    old = sid_of(client)
    assert late(client, how) is True
    assert len(store) == 0
    assert sid_of(client) == old
    assert visit(client, look).json == {}
    assert len(cookies(visit(client, put(b=2)))) == 1
    assert visit(client, look).json == {"b": "2"}


def test_a_login_that_is_not_stored_logs_out_no_device(store: Store, app: Flask, late: Late) -> None:
    visit(app.test_client(), put(_user_id="ada"))

    def log_in() -> tuple[int, bool]:
        session["_user_id"] = "ada"
        return session.destroy_others(), session.save()

    assert late(app.test_client(), log_in) == (0, False)
    assert len(store.owned_by("ada")) == 1


def test_a_lock_changes_no_id_and_starts_no_session(store: Store, app: Flask, late: Late) -> None:
    def count() -> bool:
        log_in()
        with session.lock():
            session["n"] = session.get("n", 0) + 1
        return session.save()

    client, newcomer = known(app), app.test_client()
    old = sid_of(client)
    assert late(client, count) is True
    stored = store.peek(old)
    assert stored is not None
    assert stored["n"] == 1
    assert store.ids() == [old]
    assert late(newcomer, count) is False
    assert store.ids() == [old]


def test_an_id_changed_before_the_response_is_sent(store: Store, app: Flask) -> None:
    client = known(app)
    old = sid_of(client)

    def view() -> Response:
        log_in()
        assert session.save()
        return Response(stream_with_context(iter(["x"])))

    assert len(cookies(visit(client, view))) == 1
    assert store.ids() == [sid_of(client)] != [old]


def test_an_id_changed_by_a_thread_while_the_cookie_is_written_is_not_sent(store: Store, app: Flask) -> None:
    client = known(app)
    interface = app.session_interface
    seen: list[str] = []

    class Racing(type(interface)):  # type: ignore[misc]
        def get_cookie_domain(self, app: Flask) -> None:
            if not seen:
                seen.append(session.sid)
                session.rotate()  # as a thread that is still running

    app.session_interface = Racing(store)
    answer = visit(client, log_in)
    assert len(cookies(answer)) == 1
    assert store.ids() == [sid_of(client)] == seen


def test_a_test_can_start_a_session(store: Store, app: Flask) -> None:
    for _ in range(2):
        client = app.test_client()
        with client.session_transaction() as opened:
            opened["a"] = 1
        assert visit(client, look).json == {"a": "1"}
    for path in ("/", "/elsewhere"):
        with app.test_request_context(path):
            session["b"] = 2
            response = app.response_class()
            app.session_interface.save_session(app, session._get_current_object(), response)  # type: ignore[attr-defined]
            assert len(cookies(response)) == 1
    assert len(store) == 4


def test_a_framework_marks_its_last_save(store: Store) -> None:
    first = Session(lambda: store, None, Policy(ttl=60))
    first["a"] = 1
    assert first.save()
    first.rotate()
    assert first.save(final=True)
    sid = first.sid
    first.rotate()
    first["b"] = 2
    assert first.save()
    assert first.sid == sid
    untouched = Session(lambda: store, None, Policy(ttl=60))
    assert untouched.save(final=True)
    untouched["c"] = 3
    assert not untouched.save()
    assert store.ids() == [sid]


def test_a_new_id_is_pending_until_a_save_succeeds() -> None:
    with Store(memory=2**20, max_session=400, check_period=None) as store:
        first = Session(lambda: store, None, Policy(ttl=60))
        first["a"] = 1
        assert first.save(final=True)
        first.rotate()
        first["large"] = "x" * 500
        with pytest.raises(RecordTooLarge):
            first.save()
        del first["large"]
        first["a"] = 2
        assert first.save()
        assert store.ids() == [first.sid]
        following = Session(lambda: store, first.sid, Policy(ttl=60))
        assert following == {"a": 2}
        assert following.save(final=True)
        assert store.ids() == [following.sid] != [first.sid]


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", {"Upgrade": "websocket"}),
        ("GET", {"Upgrade": "websocket", "Sec-WebSocket-Key": "x"}),
        ("GET", {"Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Connection": "keep-alive"}),
        ("POST", {"Upgrade": "websocket", "Sec-WebSocket-Key": "x"}),
        ("GET", {"Upgrade": "h2c", "Sec-WebSocket-Key": "x", "Connection": "Upgrade"}),
    ],
)
def test_a_request_that_resembles_a_handshake_has_a_response(
    store: Store, app: Flask, method: str, headers: dict[str, str]
) -> None:
    app.add_url_rule("/login", "login", log_in_and_answer, methods=["GET", "POST"])
    assert cookies(app.test_client().open("/login", method=method, headers=headers))
    assert len(store.owned_by("ada")) == 1


def log_in_and_answer() -> str:
    log_in()
    return ""
