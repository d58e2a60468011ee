"""Sessions in a store, as a Flask application and its browsers see them."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from browsing import HOUR, Clock, cookies, look, make_app, meanwhile, put, session, sid_of, twin, visit
from flask import (
    Blueprint,
    Flask,
    Response,
    copy_current_request_context,
    flash,
    get_flashed_messages,
    render_template_string,
    stream_with_context,
)
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from shmstore.errors import RecordTooLarge, SerializationError, StoreUnavailable
from shmstore.flask import Sessions, StoreSessionInterface
from shmstore.flask.session import StoreSession
from shmstore.store.store import Store
from shmstore.system.throttle import Throttle

# -- a request does only the work that it needs --------------------------------------------------------------


def test_a_request_that_does_not_use_its_session_reads_nothing(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    gets = store.stats().gets
    response = visit(client, lambda: "hello")
    assert client.get("/nowhere").status_code == 404
    assert store.stats().gets == gets
    assert "Vary" not in response.headers
    assert not cookies(response)


def test_reading_a_session_reads_the_store_once(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    gets = store.stats().gets
    visit(client, lambda: [session["a"], session.get("b"), "c" in session, len(session)])
    assert store.stats().gets == gets + 1


def test_the_store_is_opened_at_the_first_use_of_a_session(store: Store) -> None:
    opened = []
    app = make_app(store)
    app.session_interface = StoreSessionInterface(lambda: opened.append(1) or store)  # type: ignore[func-returns-value]
    client = app.test_client()
    client.set_cookie("session", "x" * 43)
    visit(client, lambda: "hello")
    assert not opened
    visit(client, look)
    visit(client, look)
    assert opened == [1]


def test_threads_with_a_copy_of_the_context_share_one_read(store: Store, app: Flask) -> None:
    def slowly_opened() -> Store:
        time.sleep(0.05)  # without a lock, all threads get here
        return store

    visit(client := app.test_client(), put(a=1))
    app.session_interface = StoreSessionInterface(slowly_opened)
    gets = store.stats().gets
    barrier = threading.Barrier(8)

    def view() -> str:
        def read() -> int:
            barrier.wait()
            session["mine"] = session["a"]
            return id(session._get_current_object())  # type: ignore[attr-defined]

        with ThreadPoolExecutor(8) as pool:
            tasks = [pool.submit(copy_current_request_context(read)) for _ in range(8)]
        assert len({task.result() for task in tasks}) == 1
        return ""

    visit(client, view)
    assert store.stats().gets == gets + 1
    assert store.get(sid_of(client)) == {"a": 1, "mine": 1}


def test_an_empty_session_is_neither_stored_nor_sent(store: Store, client: FlaskClient) -> None:
    def view() -> str:
        assert session.new
        session.permanent = True
        session["a"] = 1
        del session["a"]
        session.clear()
        session.permanent = True
        assert not session
        return ""

    response = visit(client, view)
    assert not cookies(response)
    assert len(store) == 0


@pytest.mark.parametrize(
    "header",
    ["session={}", "a=b; session={}; c=d", 'session="{}"', "xsession=no;session={}", "session={}; session=no",
     "; =;;session ={} ", "session; session={}", 'x="; session=no; "; session={}'],
)  # fmt: skip
def test_the_cookie_is_found_among_others(store: Store, app: Flask, header: str) -> None:
    store.set("a" * 43, {"x": 1})
    environ = {"HTTP_COOKIE": header.format("a" * 43), "test.action": look}
    found = app.test_client(use_cookies=False).get("/", environ_overrides=environ).json
    assert found == {"x": "1"}


def test_a_new_session_gets_a_256_bit_id_that_is_not_guessable(store: Store, app: Flask) -> None:
    ids = set()
    for _ in range(20):
        client = app.test_client()
        visit(client, put(a=1))
        ids.add(sid_of(client))
    assert len(ids) == 20
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{43}", sid) for sid in ids)
    assert set(store.ids()) == ids


@pytest.mark.parametrize(
    "cookie",
    [
        "session=" + "a" * 43,
        "session=" + "a" * 100_000,
        "session=",
        'session=""',
        "session=\x00\xff\xfe\x80",
        "session=%00%ff../../etc/passwd",
        "session=schlüssel",
        "session",
        "session=a; session=b",
    ],
)
def test_an_invented_cookie_is_treated_as_a_new_visitor(store: Store, app: Flask, cookie: str) -> None:
    def ask(action: Callable[[], Any]) -> TestResponse:
        client = app.test_client(use_cookies=False)
        return client.get(
            "/", environ_overrides={"HTTP_COOKIE": cookie.encode().decode("latin1"), "test.action": action}
        )

    reader = ask(look)
    assert reader.json == {}
    assert not cookies(reader)
    assert len(store) == 0
    writer = ask(put(a=1))
    [sent] = cookies(writer)
    [sid] = store.ids()
    assert sent.startswith(f"session={sid};")
    assert sid not in cookie
    assert len(sid) == 43


# -- saving --------------------------------------------------------------------------------------------------


def test_data_keep_their_types_at_the_next_request(client: FlaskClient) -> None:
    values = {"when": datetime(2026, 11, 23, 1, 2, 3, 4, tzinfo=UTC), "sum": Decimal("1.20"), "pair": (1, {2})}
    visit(client, put(**values))

    def view() -> str:
        assert dict(session) == values
        assert not session.new
        return ""

    assert visit(client, view).status_code == 200


@pytest.mark.parametrize(
    ("start", "change"),
    [
        ({"a": {"b": {"c": [1]}}}, lambda value: value["a"]["b"]["c"].append(2)),
        ([{"n": 1}], lambda value: value[0].update(n=2)),
        ({1, 2}, lambda value: value.add(3)),
        ([1, 2], lambda value: value.clear()),
    ],
)
def test_changes_deep_inside_a_value_are_saved(
    store: Store, client: FlaskClient, start: Any, change: Callable[[Any], Any]
) -> None:
    visit(client, put(value=start, other=0))

    def view() -> str:
        assert not session.modified
        change(session["value"])
        assert session.modified
        return ""

    visit(client, view)
    change(start)
    assert store.get(sid_of(client)) == {"value": start, "other": 0}


def test_an_unchanged_session_is_not_written_and_sends_no_cookie(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1, b=[1]))
    before = store.stats()

    def view() -> str:
        session["a"] = 1
        session["b"] = [1]
        session["c"] = session.pop("b")
        session["b"] = session.pop("c")
        return ""

    response = visit(client, view)
    assert (store.stats().sets, store.stats().touches) == (before.sets, before.touches)
    assert not cookies(response)
    assert response.headers["Vary"] == "Cookie"


def test_only_changed_keys_are_written(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1, b=1, c=1))

    def view() -> str:
        session["a"] = 2
        del session["b"]
        # another request writes after this one has read
        store.update(session.sid, set={"c": 9, "d": 9})
        return ""

    visit(client, view)
    assert store.get(sid_of(client)) == {"a": 2, "c": 9, "d": 9}


def test_overlapping_requests_that_change_different_keys_both_survive(
    store: Store, app: Flask, client: FlaskClient
) -> None:
    visit(client, put(start=0))
    sid = sid_of(client)
    barrier = threading.Barrier(2)

    def one(key: str) -> TestResponse:
        def view() -> str:
            session.setdefault(key, [])
            barrier.wait()  # both have read
            session[key].append(1)
            return ""

        return visit(twin(client), view)

    for turn in range(20):
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(one, [f"left{turn}", f"right{turn}"]))
        assert [answer.status_code for answer in answers] == [200, 200]
    stored = store.get(sid)
    assert stored is not None
    assert sorted(stored) == sorted(["start", *(f"{side}{n}" for side in ("left", "right") for n in range(20))])


def test_a_value_read_after_a_save_in_mid_request_is_not_written_back(
    store: Store, clock: Clock, client: FlaskClient
) -> None:
    visit(client, put(cart=[1]))
    clock.tick(100)

    def view() -> None:
        assert session
        assert session.save()  # renews the session's life
        assert session["cart"] == [1]
        store.update(session.sid, set={"cart": [1, 2]})

    visit(client, view)
    assert store.get(sid_of(client)) == {"cart": [1, 2]}


def test_a_key_deleted_and_saved_in_mid_request_is_not_deleted_again(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1, b=1))

    def view() -> None:
        del session["a"]
        assert session.save()
        store.update(session.sid, set={"a": 2})

    visit(client, view)
    assert store.get(sid_of(client)) == {"b": 1, "a": 2}


def test_a_session_can_be_saved_in_mid_request(store: Store, client: FlaskClient) -> None:
    def view() -> str:
        session["a"] = 1
        assert session.save()
        assert store.get(session.sid) == {"a": 1}
        assert session.new
        session["b"] = 2
        return ""

    response = visit(client, view)
    assert len(cookies(response)) == 1
    assert store.get(sid_of(client)) == {"a": 1, "b": 2}


def test_saving_twice_sends_the_same_cookie_twice(store: Store, app: Flask) -> None:
    with app.test_request_context():
        session["a"] = 1
        answers = [Response(), Response()]
        current = session._get_current_object()  # type: ignore[attr-defined]
        for answer in answers:
            app.session_interface.save_session(app, current, answer)
        assert cookies(answers[0])
        assert cookies(answers[0]) == cookies(answers[1])
    assert store.stats().sets == 1


def test_a_value_that_cannot_be_stored_is_one_error_and_changes_nothing(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(store, PROPAGATE_EXCEPTIONS=False)
    seen: list[Exception] = []

    @app.errorhandler(500)
    def page(error: Any) -> tuple[str, int]:
        seen.append(error.original_exception)
        return f"sorry, {session['a']}", 500

    client = app.test_client()
    visit(client, put(a=1))
    for wrong, error in ((object(), SerializationError), ("x" * 2**19, RecordTooLarge)):
        response = visit(client, put(b=2, wrong=wrong))
        assert (response.status_code, response.text) == (500, "sorry, 1")
        assert not cookies(response)
        assert isinstance(seen.pop(), error)
        assert not seen
        assert store.get(sid_of(client)) == {"a": 1}
    assert len(caplog.records) == 2  # Flask reports a failure while it answers with an error, too
    visit(client, put(b=2))
    assert store.get(sid_of(client)) == {"a": 1, "b": 2}


def test_the_session_of_a_failing_view_is_saved(store: Store) -> None:
    app = make_app(store, PROPAGATE_EXCEPTIONS=False)

    def view() -> str:
        session["a"] = 1
        raise ArithmeticError

    client = app.test_client()
    assert visit(client, view).status_code == 500
    assert store.get(sid_of(client)) == {"a": 1}


# -- the end of a session, and stale requests -----------------------------------------------------------------


def clear() -> None:
    session.clear()


def pop() -> None:
    session.pop("a")


def rotate() -> None:
    session.rotate()


def regenerate() -> None:
    session.regenerate()


def touch() -> None:
    session.touch()


def destroy() -> None:
    assert session.destroy()
    assert dict(session) == {}


@pytest.mark.parametrize("end", [clear, pop, destroy, regenerate])
def test_emptying_or_destroying_a_session_ends_it_and_deletes_the_cookie(
    store: Store, client: FlaskClient, end: Callable[[], None]
) -> None:
    visit(client, put(a=1))
    response = visit(client, end)
    [cookie] = cookies(response)
    assert cookie.startswith("session=; Expires=Thu, 01 Jan 1970")
    assert response.headers["Vary"] == "Cookie"
    assert len(store) == 0
    assert client.get_cookie("session") is None


def test_a_logout_without_a_session_sends_no_cookie(store: Store, client: FlaskClient) -> None:
    client.set_cookie("session", "x" * 43)

    def view() -> str:
        assert not session.destroy()
        session.clear()
        return ""

    assert not cookies(visit(client, view))


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("late", [look, put(b=2), pop, clear, rotate, touch])
def test_a_slow_request_never_restores_a_session_after_a_logout(
    store: Store, client: FlaskClient, late: Callable[[], Any], permanent: bool
) -> None:
    visit(client, put(a=1, _permanent=permanent))
    other = twin(client)

    def view() -> Any:
        assert session["a"] == 1
        assert cookies(meanwhile(lambda: visit(other, destroy)))
        return late()

    response = visit(client, view)
    assert response.status_code == 200
    assert not cookies(response)
    assert len(store) == 0


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("late", [look, put(b=2), pop, clear, destroy, rotate])
def test_a_slow_request_leaves_a_rotated_session_and_its_cookie_alone(
    store: Store, client: FlaskClient, late: Callable[[], Any], permanent: bool
) -> None:
    visit(client, put(a=1, _permanent=permanent))
    other = twin(client)

    def view() -> Any:
        assert session["a"] == 1
        assert cookies(meanwhile(lambda: visit(other, put(_user_id="7"))))
        return late() if late is not destroy else str(session.destroy())

    assert not cookies(visit(client, view))
    assert store.ids() == [sid_of(other)]
    assert store.get(sid_of(other)) == {"a": 1, "_permanent": permanent, "_user_id": "7"}


def test_after_a_dropped_save_a_new_session_can_start(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    other = twin(client)

    def view() -> str:
        session["b"] = 2
        meanwhile(lambda: visit(other, destroy))
        assert not session.save()
        assert not session.touch()
        session.regenerate()
        session["_user_id"] = "7"
        return ""

    assert len(cookies(visit(client, view))) == 1
    assert store.get(sid_of(client)) == {"_user_id": "7"}


def test_removing_the_last_key_keeps_a_key_added_by_another_request(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    other = twin(client)

    def view() -> str:
        session.pop("a")
        meanwhile(lambda: visit(other, put(cart=[1])))
        return ""

    assert not cookies(visit(client, view))
    assert store.get(sid_of(client)) == {"cart": [1]}


def test_clearing_a_session_ends_it_despite_a_key_added_by_another_request(store: Store, client: FlaskClient) -> None:
    def logout() -> None:
        del session["_user_id"]

    for end, key in ((clear, "a"), (logout, "_user_id")):
        visit(client, put(**{key: "7"}))
        other = twin(client)

        def view(end: Callable[[], None] = end, other: FlaskClient = other) -> None:
            assert session
            meanwhile(lambda: visit(other, put(cart=[1])))
            end()

        assert cookies(visit(client, view))[0].startswith("session=;")
        assert len(store) == 0


def test_a_session_cleared_and_filled_again_does_not_end(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    other = twin(client)

    def view() -> None:
        session.clear()
        session["b"] = 2
        session.save()
        meanwhile(lambda: visit(other, put(cart=[1])))
        del session["b"]

    assert not cookies(visit(client, view))
    assert store.get(sid_of(client)) == {"cart": [1]}


def test_writing_to_a_destroyed_session_starts_a_new_one(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1, _permanent=True))
    before = sid_of(client)

    def view() -> str:
        session.destroy()
        assert session.new
        assert session.sid != before
        assert not session.permanent
        session["b"] = 2
        return ""

    assert len(cookies(visit(client, view))) == 1
    assert store.all() == {sid_of(client): {"b": 2}}
    assert sid_of(client) != before


def test_a_session_started_and_ended_in_one_request_leaves_no_trace(store: Store, client: FlaskClient) -> None:
    def view() -> str:
        session["a"] = 1
        session.save()
        session.destroy()
        return ""

    assert not cookies(visit(client, view))
    assert len(store) == 0


# -- ids and owners ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_the_interface", [False, True])
def test_rotation_changes_the_id_and_keeps_the_data(
    store: Store, app: Flask, client: FlaskClient, through_the_interface: bool
) -> None:
    visit(client, put(a=1, b=1))
    before = sid_of(client)

    def view() -> str:
        assert session.sid == before
        if through_the_interface:
            app.session_interface.regenerate(session)  # type: ignore[attr-defined]
        else:
            session.rotate()
        assert session.sid != before
        session["a"] = 2
        assert store.get(before) == {"a": 1, "b": 1}
        return session.sid

    response = visit(client, view)
    assert len(cookies(response)) == 1
    assert response.text == sid_of(client)
    assert store.all() == {sid_of(client): {"a": 2, "b": 1}}


def test_the_id_rotates_by_itself_when_the_owner_changes(store: Store, client: FlaskClient) -> None:
    visit(client, put(cart=[1]))
    ids = [sid_of(client)]
    for user in (7, "8", None):
        response = visit(client, put(_user_id=user))
        assert len(cookies(response)) == 1
        ids.append(sid_of(client))
        assert store.ids() == [ids[-1]]
        assert store.owned_by(str(user)) == ([ids[-1]] if user else [])
        assert not cookies(visit(client, put(other=user)))
        assert store.owned_by(str(user)) == ([ids[-1]] if user else [])
    assert len(set(ids)) == 4
    assert store.get(ids[-1]) == {"cart": [1], "_user_id": None, "other": None}


def test_a_new_session_has_its_owner_from_the_start(store: Store, client: FlaskClient) -> None:
    visit(client, put(_user_id="7"))
    assert store.owned_by("7") == [sid_of(client)]


def test_an_id_planted_before_the_login_is_worthless_after_it(store: Store, client: FlaskClient) -> None:
    attacker = client.application.test_client()
    visit(attacker, put(a=1))
    client.set_cookie("session", sid_of(attacker))
    visit(client, put(_user_id="victim"))
    assert visit(client, look).json == {"a": "1", "_user_id": "victim"}
    assert visit(attacker, look).json == {}
    visit(attacker, put(evil=1))
    assert visit(client, look).json == {"a": "1", "_user_id": "victim"}


@pytest.mark.parametrize(
    ("key", "data", "owner"),
    [
        ("uid", {"uid": 0}, "0"),
        (["uid", "admin"], {"admin": "root"}, "root"),
        (("uid", "admin"), {"admin": "root", "uid": "7"}, "7"),
        (lambda session: session["user"]["id"], {"user": {"id": 7}}, "7"),
        ("uid", {"uid": ""}, None),
        ("uid", {"_user_id": "7"}, None),
        (None, {"_user_id": "7"}, None),
    ],
)
def test_the_owner_is_found_as_configured(store: Store, key: Any, data: dict[str, Any], owner: str | None) -> None:
    client = make_app(store, SESSION_OWNER_KEY=key).test_client()
    visit(client, put(**data))
    loaded = store.load(sid_of(client))
    assert loaded is not None
    assert loaded.owner == owner


def test_a_late_save_does_not_undo_a_change_of_owner(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))

    def view() -> str:
        session["a"] = 2
        store.update(session.sid, owner="7")
        return ""

    visit(client, view)
    assert store.owned_by("7") == [sid_of(client)]


# -- how long a session lives --------------------------------------------------------------------------------


def test_a_session_lives_as_long_as_it_is_used(clock: Clock, client: FlaskClient) -> None:
    visit(client, put(a=1))
    for _ in range(5):
        clock.tick(HOUR * 0.9)
        assert visit(client, look).json == {"a": "1"}
    clock.tick(HOUR * 1.01)
    assert visit(client, look).json == {}


def test_an_unchanged_session_is_touched_at_most_once_in_touch_after(
    store: Store, clock: Clock, client: FlaskClient
) -> None:
    visit(client, put(a=1))
    sets = store.stats().sets
    for _ in range(31):
        clock.tick(10.01)
        visit(client, look)
    assert store.stats().touches == 5  # every sixth
    assert store.stats().sets == sets


def test_a_short_lived_session_is_touched_at_every_tenth_of_its_life(store: Store, clock: Clock) -> None:
    client = make_app(store, SESSION_TOUCH_AFTER=timedelta(hours=1)).test_client()
    client.application.permanent_session_lifetime = timedelta(seconds=100)
    visit(client, put(a=1))
    for _ in range(20):
        clock.tick(5.01)
        visit(client, look)
    assert store.stats().touches == 10


def test_touch_renews_the_deadline_at_once(store: Store, clock: Clock, client: FlaskClient) -> None:
    visit(client, put(a=1))
    clock.tick(1)

    def view() -> str:
        assert session.touch()
        return ""

    visit(client, view)
    loaded = store.load(sid_of(client))
    assert loaded is not None
    assert loaded.remaining == pytest.approx(HOUR)
    assert store.stats().touches == 1


def test_a_lifetime_changed_at_run_time_applies_to_existing_sessions(clock: Clock, client: FlaskClient) -> None:
    visit(client, put(a=1))
    clock.tick(1000)
    client.application.permanent_session_lifetime = timedelta(hours=10)
    assert visit(client, look).json == {"a": "1"}
    clock.tick(9 * HOUR)
    assert visit(client, look).json == {"a": "1"}
    client.application.config["PERMANENT_SESSION_LIFETIME"] = 100
    clock.tick(200)
    assert visit(client, look).json == {}


def test_no_use_extends_a_life_beyond_the_absolute_lifetime(store: Store, clock: Clock) -> None:
    client = make_app(store, SESSION_ABSOLUTE_LIFETIME=2 * HOUR).test_client()
    visit(client, put(a=1))
    for turn in range(1, 8):
        clock.tick(HOUR / 4)
        visit(client, put(a=turn, _user_id=str(turn % 2)))  # rotations do not extend it either
    assert visit(client, look).json == {"a": "7", "_user_id": "1"}
    loaded = store.load(sid_of(client))
    assert loaded is not None
    assert loaded.remaining == pytest.approx(HOUR / 4, abs=0.01)
    clock.tick(HOUR / 4)
    assert visit(client, look).json == {}


def test_an_absolute_lifetime_applies_to_existing_sessions(store: Store, clock: Clock) -> None:
    client = make_app(store).test_client()
    visit(client, put(a=1))
    clock.tick(100)
    stricter = make_app(store, SESSION_ABSOLUTE_LIFETIME=timedelta(seconds=100)).test_client()
    stricter.set_cookie("session", sid_of(client))
    assert visit(stricter, look).json == {}
    assert store.length(live=True) == 0
    assert len(cookies(visit(stricter, put(b=2)))) == 1  # and the next request is not treated as stale


# -- headers -------------------------------------------------------------------------------------------------


def test_the_cookie_expires_only_if_the_session_is_permanent(client: FlaskClient) -> None:
    [browser_session] = cookies(visit(client, put(a=1)))
    assert "Expires" not in browser_session
    [permanent] = cookies(visit(client, put(_permanent=True)))
    assert "Expires" in permanent
    [browser_session] = cookies(visit(client, put(_permanent=False)))
    assert "Expires" not in browser_session


def test_a_lifetime_changed_at_run_time_applies_to_the_next_cookie(client: FlaskClient) -> None:
    def expiry() -> datetime:
        visit(client, put(a=1, _permanent=True))
        cookie = client.get_cookie("session")
        assert cookie is not None
        assert isinstance(cookie.expires, datetime)
        return cookie.expires

    first = expiry()
    client.application.permanent_session_lifetime = timedelta(hours=10)
    assert expiry() - first > timedelta(hours=8)
    client.application.config["PERMANENT_SESSION_LIFETIME"] = 60
    assert first - expiry() > timedelta(minutes=50)


@pytest.mark.parametrize("refresh", [True, False])
def test_a_permanent_cookie_is_renewed_as_flask_does_it(store: Store, refresh: bool) -> None:
    client = make_app(store, SESSION_PERMANENT=True, SESSION_REFRESH_EACH_REQUEST=refresh).test_client()
    visit(client, put(a=1))
    assert len(cookies(visit(client, look))) == refresh
    assert len(cookies(visit(client, put(a=2)))) == 1
    assert not cookies(visit(client, lambda: ""))


def test_a_new_session_is_permanent_if_configured(store: Store) -> None:
    client = make_app(store, SESSION_PERMANENT=True).test_client()
    [cookie] = cookies(visit(client, put(a=1)))
    assert "Expires" in cookie

    def again() -> str:
        session.clear()
        assert session.permanent
        return ""

    assert cookies(visit(client, again))[0].startswith("session=;")
    assert len(store) == 0


def test_setting_modified_sends_the_cookie_again(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    sets = store.stats().sets

    def view() -> str:
        session.modified = True
        return ""

    assert cookies(visit(client, view)) == [f"session={sid_of(client)}; HttpOnly; Path=/"]
    assert store.stats().sets == sets


@pytest.mark.parametrize(
    "use",
    [
        lambda: "a" in session,
        lambda: len(session),
        lambda: session.get("a"),
        lambda: bool(session),
        lambda: list(session),
        lambda: session.sid,
        lambda: session.permanent,
    ],
)
def test_every_use_varies_by_cookie(client: FlaskClient, use: Callable[[], Any]) -> None:
    assert visit(client, lambda: str(use())).headers["Vary"] == "Cookie"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"DOMAIN": "example.org", "SECURE": True, "HTTPONLY": False, "SAMESITE": "None", "PARTITIONED": True},
            {"Domain=example.org", "Path=/", "Secure", "SameSite=None", "Partitioned"},
        ),
        ({"PATH": "/shop", "SAMESITE": "Strict"}, {"Path=/shop", "HttpOnly", "SameSite=Strict"}),
        ({}, {"Path=/", "HttpOnly"}),
    ],
)
def test_the_cookie_is_deleted_with_the_attributes_it_was_set_with(
    store: Store, config: dict[str, Any], expected: set[str]
) -> None:
    names = {f"SESSION_COOKIE_{name}": value for name, value in config.items()}
    app = make_app(store, SESSION_COOKIE_NAME="shop", **names)
    app.add_url_rule("/shop", view_func=app.view_functions["act"])
    client = app.test_client()

    def attributes(action: Callable[[], Any]) -> tuple[str, set[str]]:
        environ = {"test.action": action}
        answer = client.get("/shop", base_url="https://example.org", environ_overrides=environ)
        [cookie] = cookies(answer)
        first, *rest = cookie.split("; ")
        assert answer.headers["Vary"] == "Cookie"
        return first, {each for each in rest if not each.startswith(("Expires=", "Max-Age="))}

    assert attributes(put(a=1)) == (f"shop={store.ids()[0]}", expected)
    assert attributes(destroy) == ("shop=", expected)


@pytest.mark.parametrize("config", [{"PATH": "/-blank-/<>"}, {"DOMAIN": "-blank-.example.org", "PATH": "/-blank-"}])
def test_the_path_and_domain_of_the_cookie_are_configurable(store: Store, config: dict[str, Any]) -> None:
    names = {f"SESSION_COOKIE_{name}": value for name, value in config.items()}
    answer = visit(make_app(store, **names).test_client(), put(a=1, _permanent=True))
    expected = Response()
    expected.set_cookie(
        "session", store.ids()[0], expires=0, httponly=True, path=config["PATH"], domain=config.get("DOMAIN")
    )
    [cookie] = cookies(answer)
    one, other = ({*re.sub("Expires=[^;]*", "", each).split("; ")} for each in (cookie, expected.headers["Set-Cookie"]))
    assert one == other


# -- when the store cannot be reached --------------------------------------------------------------------------


def test_a_request_that_does_not_use_its_session_is_served_without_a_store(store: Store) -> None:
    client = make_app(store).test_client()
    visit(client, put(a=1))
    store.close()
    assert visit(client, lambda: "hello").text == "hello"


def test_an_outage_is_one_error_and_its_page_may_use_the_session(store: Store) -> None:
    app = make_app(store, PROPAGATE_EXCEPTIONS=False)
    seen = []

    @app.errorhandler(500)
    def page(error: Any) -> tuple[str, int]:
        seen.append(error.original_exception)
        session["x"] = 1
        return f"sorry, {session.get('a', 'stranger')}", 500

    client = app.test_client()
    visit(client, put(a=1))
    store.close()
    for action in (look, put(b=2)):
        response = visit(client, action)
        assert (response.status_code, response.text) == (500, "sorry, stranger")
        assert not cookies(response)
        assert isinstance(seen.pop(), StoreUnavailable)
        assert not seen


def test_an_outage_can_leave_visitors_anonymous(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.web.stored_session._unavailable", Throttle())
    client = make_app(store, SESSION_ON_ERROR="anonymous").test_client()
    visit(client, put(a=1))
    before = sid_of(client)

    def until_it_closes() -> dict[str, Any]:
        seen = look()
        store.close()
        session["b"] = 2
        return seen

    actions: list[Callable[[], Any]] = [until_it_closes, look, put(b=2), clear, rotate]
    for action in actions:
        response = visit(client, action)
        assert response.status_code == 200
        assert not cookies(response)
    assert caplog.text.count("is unavailable") == 1  # not at each request
    assert sid_of(client) == before
    newcomer = client.application.test_client()
    assert not cookies(visit(newcomer, put(a=1)))


def test_a_request_that_began_during_an_outage_saves_nothing_after_it(store: Store) -> None:
    app = make_app(store, SESSION_ON_ERROR="anonymous")
    client = app.test_client()
    visit(client, put(a=1))
    down = [True]

    def source() -> Store:
        if down:
            raise StoreUnavailable("not yet")
        return store

    app.session_interface = StoreSessionInterface(source)

    def view() -> dict[str, Any]:
        seen = look()
        down.clear()
        session["b"] = 2
        return seen

    response = visit(client, view)
    assert response.json == {}
    assert not cookies(response)
    assert visit(client, look).json == {"a": "1"}
    assert len(store) == 1


@pytest.fixture
def outage(store: Store) -> tuple[FlaskClient, list[bool]]:
    """Return a browser that is logged in, and a list: while it is not empty, the store is unavailable."""
    app = make_app(store, SESSION_ON_ERROR="anonymous")
    client, down = app.test_client(), list[bool]()

    def source() -> Store:
        if down:
            raise StoreUnavailable("not yet")
        return store

    visit(client, put(_user_id="ada"))
    app.session_interface = StoreSessionInterface(source)
    down.append(True)
    return client, down


def test_destroy_others_is_an_error_during_an_outage(
    store: Store, outage: tuple[FlaskClient, list[bool]], caplog: pytest.LogCaptureFixture
) -> None:
    """The user is not known then, so the request must not be treated as anonymous."""
    client, down = outage

    def view() -> None:
        look()
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                session.destroy_others()
            down.clear()
        session.destroy()
        session["_user_id"] = "ada"
        assert session.destroy_others() == 1

    visit(client, view)
    assert "finds no user" not in caplog.text


@pytest.mark.parametrize("logs_in", [False, True])
def test_after_an_outage_a_request_starts_a_session_only_with_a_login(
    store: Store, outage: tuple[FlaskClient, list[bool]], logs_in: bool
) -> None:
    """It is unknown which cookie the browser has; it may be a valid one."""
    client, down = outage

    def view() -> None:
        look()
        down.clear()
        session.destroy()
        session["_user_id" if logs_in else "n"] = "bob"

    assert len(cookies(visit(client, view))) == logs_in
    assert len(store) == 1 + logs_in


# -- other features of Flask ---------------------------------------------------------------------------------


def test_flashed_messages_are_shown_once(store: Store, client: FlaskClient) -> None:
    visit(client, lambda: flash("saved", "info"))
    assert visit(client, lambda: get_flashed_messages(with_categories=True)).json == [["info", "saved"]]
    assert visit(client, get_flashed_messages).json == []
    assert len(store) == 0


def test_a_test_can_open_the_session_of_its_client(store: Store, client: FlaskClient) -> None:
    with client.session_transaction() as opened:
        opened["a"] = 1
    assert visit(client, look).json == {"a": "1"}
    with client.session_transaction() as opened:
        assert opened["a"] == 1
        opened.clear()
    assert visit(client, look).json == {}
    assert len(store) == 0


def test_a_session_of_another_class_is_ignored(store: Store, app: Flask) -> None:
    response = Response()
    app.session_interface.save_session(app, {"a": 1}, response)  # type: ignore[arg-type]
    assert not cookies(response)
    assert len(store) == 0


def test_reload_discards_unsaved_changes(store: Store, client: FlaskClient) -> None:
    def never_stored() -> str:
        session["a"] = 1
        assert not session.reload()
        assert dict(session) == {}
        return ""

    assert not cookies(visit(client, never_stored))
    visit(client, put(a=1))

    def stored() -> str:
        session["a"] = 2
        session.rotate()
        store.update(sid_of(client), set={"b": 3})
        assert session.reload()
        assert dict(session) == {"a": 1, "b": 3}
        assert session.sid == sid_of(client)
        store.destroy(session.sid)
        assert not session.reload()
        assert dict(session) == {}
        session["c"] = 4
        return ""

    assert not cookies(visit(client, stored))
    assert len(store) == 0


def test_a_session_behaves_like_a_dict(client: FlaskClient) -> None:
    def view() -> str:
        session.update(a=1, b=2)
        current = session._get_current_object()  # type: ignore[attr-defined]
        current |= {"c": 3}
        assert session == {"a": 1, "b": 2, "c": 3}
        assert session.copy() == dict(session)
        assert session.pop("a") == 1
        assert session.setdefault("b", 5) == 2
        assert session.pop("nothing", None) is None
        assert list(session) == ["b", "c"]
        assert list(reversed(session)) == ["c", "b"]
        assert "'b': 2" in repr(session)
        return ""

    visit(client, view)


def test_changes_during_a_stream_are_not_saved(store: Store, client: FlaskClient) -> None:
    def streaming(save: bool) -> Callable[[], Response]:
        def parts() -> Iterator[str]:
            yield "one"
            session["after"] = save
            if save:
                assert session.save()
            yield "two"

        def view() -> Response:
            session["before"] = save
            return Response(stream_with_context(parts()))

        return view

    for save, expected in ((False, {"before": False}), (True, {"before": True, "after": True})):
        assert visit(client, streaming(save)).text == "onetwo"
        assert store.get(sid_of(client)) == expected


def test_a_session_started_during_a_stream_is_not_stored(store: Store, client: FlaskClient) -> None:
    def parts() -> Iterator[str]:
        yield "one"
        session["after"] = 1

    response = visit(client, lambda: Response(stream_with_context(parts())))
    assert (response.text, cookies(response)) == ("one", [])
    assert len(store) == 0


def test_a_thread_must_save_its_changes_after_the_response(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    go_on, pool = threading.Event(), ThreadPoolExecutor(1)

    def view() -> None:
        @copy_current_request_context
        def work() -> bool:
            go_on.wait()
            session["done"] = 1
            return session.save()

        assert session
        tasks.append(pool.submit(work))

    tasks: list[Any] = []
    with pool:
        visit(client, view)
        assert store.get(sid_of(client)) == {"a": 1}
        go_on.set()
    assert tasks[0].result()
    assert store.get(sid_of(client)) == {"a": 1, "done": 1}


def test_applications_of_a_factory_have_separate_sessions() -> None:
    sessions = Sessions()
    cart = Blueprint("cart", __name__, url_prefix="/cart")

    @cart.before_request
    def count() -> None:
        session["visits"] = session.get("visits", 0) + 1

    @cart.get("/<item>")
    def add(item: str) -> list[str]:
        session.setdefault("items", []).append(item)
        return list(session["items"])

    @cart.after_request
    def last(response: Response) -> Response:
        session["last"] = response.json
        return response

    def create_app(store: Store, name: str) -> Flask:
        app = Flask(__name__)
        app.config.update(SESSION_STORE=store, SESSION_COOKIE_NAME=name)
        sessions.init_app(app)
        app.register_blueprint(cart)
        return app

    with Store(memory=2**20) as one, Store(memory=2**20) as two:
        clients = [create_app(store, name).test_client() for store, name in ((one, "one"), (two, "two"))]
        for client, name in zip(clients, ("one", "two"), strict=True):
            for item in "ab":
                client.get(f"/cart/{name}-{item}")
        for store, name in ((one, "one"), (two, "two")):
            items = [f"{name}-a", f"{name}-b"]
            assert list(store.all().values()) == [{"visits": 2, "items": items, "last": items}]


def test_two_applications_can_share_a_store_with_separate_sessions(store: Store) -> None:
    shop, forum = (make_app(store, SESSION_KEY_PREFIX=prefix).test_client() for prefix in ("shop:", "forum:"))
    visit(shop, put(a=1))
    forum.set_cookie("session", sid_of(shop))
    assert visit(forum, look).json == {}
    assert visit(shop, look).json == {"a": "1"}
    assert store.ids() == [f"shop:{sid_of(shop)}"]
    visit(shop, rotate)
    assert store.ids() == [f"shop:{sid_of(shop)}"]
    visit(shop, destroy)
    assert len(store) == 0


def test_an_interface_does_not_keep_an_application_alive(store: Store) -> None:
    interface = StoreSessionInterface(store)
    app = Flask(__name__)
    interface.policy(app)
    known = weakref.ref(app)
    del app
    gc.collect()
    assert known() is None


# -- code and templates that are written for Flask's own session --------------------------------------------

PUBLIC = {
    "accessed", "destroy", "destroy_others", "lock", "modified", "new", "permanent", "regenerate", "reload", "rotate",
    "save", "sid", "touch",
}  # fmt: skip


def test_templates_find_keys_unless_they_have_the_name_of_a_public_attribute(client: FlaskClient) -> None:
    public = {name for name in dir(StoreSession) if not name.startswith("_")}
    assert public - set(dir(dict)) == PUBLIC
    names = ["lists", "cookie", "abandon", "request", "policy", "data", "user"]
    visit(client, put(**{name: name.upper() for name in [*names, "sid"]}))
    page = "".join(f"{{{{ session.{name} }}}} " for name in names) + "{{ session['sid'] }}"
    assert visit(client, lambda: render_template_string(page)).text.split() == [*map(str.upper, names), "SID"]


def test_printing_a_session_reads_it(client: FlaskClient) -> None:
    visit(client, put(user="ada"))
    answer = visit(client, lambda: f"{session}")
    assert answer.text == "<StoreSession {'user': 'ada'}>"
    assert answer.headers["Vary"] == "Cookie"


@pytest.mark.parametrize(
    "made", [copy.copy, copy.deepcopy, lambda session: pickle.loads(pickle.dumps(session)), StoreSession.copy]
)
def test_a_copy_of_a_session_is_a_dict_of_its_own(client: FlaskClient, made: Callable[[Any], dict[str, Any]]) -> None:
    visit(client, put(cart=["tea"]))

    def view() -> str:
        mine = made(session._get_current_object())  # type: ignore[attr-defined]
        assert type(mine) is dict
        mine["other"] = 1
        assert dict(session) == {"cart": ["tea"]}
        mine["cart"].append("milk")
        return ""

    visit(client, view)
    shallow = made in (copy.copy, StoreSession.copy)
    assert visit(client, look).json == {"cart": "['tea', 'milk']" if shallow else "['tea']"}


@pytest.mark.parametrize("change", [put(b=2), lambda: session["a"].append(2), lambda: session.pop("a")])
def test_modified_stays_true_after_the_save(client: FlaskClient, change: Callable[[], Any]) -> None:
    visit(client, put(a=[1]))

    def view() -> list[bool]:
        before = session.modified
        change()
        session.save()
        after = session.modified
        session.save()
        return [before, after, session.modified]

    assert visit(client, view).json == [False, True, True]
    assert visit(client, lambda: [session.save(), session.modified]).json == [True, False]


def test_a_touch_modifies_nothing(client: FlaskClient, clock: Clock) -> None:
    visit(client, put(a=1))
    clock.tick(HOUR / 2)
    assert visit(client, lambda: [session["a"], session.save(), session.modified]).json == [1, True, False]


def test_a_dataclass_is_restored_as_by_flasks_own_session(client: FlaskClient) -> None:
    @dataclasses.dataclass
    class User:
        name: str

    visit(client, put(user=User("ada")))
    assert visit(client, lambda: session["user"]).json == {"name": "ada"}


# -- input of visitors ---------------------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_stored_as_by_flasks_own_session(client: FlaskClient) -> None:
    visit(client, put(search="\ud83d", **{"\udce9": "caf\udce9.txt"}))
    assert visit(client, lambda: {ascii(k): ascii(v) for k, v in session.items()}).json == {
        ascii("search"): ascii("\ud83d"),
        ascii("\udce9"): ascii("caf\udce9.txt"),
    }


@pytest.mark.parametrize("owner", ["x" * 257, "token" * 1000, "\ud83d"])
def test_the_id_of_a_user_may_be_any_text(store: Store, client: FlaskClient, owner: str) -> None:
    other = client.application.test_client()
    visit(client, put(_user_id=owner))
    visit(other, put(_user_id=owner))
    sid = sid_of(client)
    visit(client, put(a=1))
    assert sid_of(client) == sid, "the same user: no other id"
    assert len(store.owned_by(owner)) == 2
    assert visit(client, lambda: {"ended": session.destroy_others()}).json == {"ended": 1}
    assert store.owned_by(owner) == [sid]
    assert store.destroy_owned(owner) == 1
