"""Overlapping requests of one browser: flash messages, locks, stale requests, events on a socket."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from browsing import Clock, cookies, look, make_app, meanwhile, put, session, sid_of, twin, visit
from flask import Flask, flash, get_flashed_messages, request
from flask.testing import FlaskClient

from shmstore import SerializationError, Store, StoreTimeout
from shmstore.system.throttle import Throttle


def flashing(message: str) -> Callable[[], None]:
    return lambda: flash(message)


def shown() -> list[Any]:
    return list(get_flashed_messages())


# -- one key, and two -----------------------------------------------------------------------------------------


def test_the_later_of_two_changes_to_one_key_wins(client: FlaskClient) -> None:
    """The promises of README and docs/guides/overlapping-requests.md about overlapping requests."""
    visit(client, put(cart=["tea"], n=1))

    def fast() -> None:
        session["cart"].append("milk")
        session.update(n=session["n"] + 1, fast=True)

    def slow() -> None:
        session["cart"].append("bread")
        session.update(n=session["n"] + 1, slow=True)
        meanwhile(lambda: visit(twin(client), fast))

    visit(client, slow)
    assert visit(client, look).json == {"cart": "['tea', 'bread']", "n": "2", "fast": "True", "slow": "True"}


# -- flash messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [[], ["a"], ["a", "b"]])
def test_messages_of_overlapping_requests_are_all_kept(client: FlaskClient, before: list[str]) -> None:
    visit(client, put(x=1))
    for message in before:
        visit(client, flashing(message))

    def slow() -> None:
        flash("slow 1")
        meanwhile(lambda: visit(twin(client), flashing("fast")))
        flash("slow 2")

    visit(client, slow)
    assert visit(client, shown).json == [*before, "fast", "slow 1", "slow 2"]
    assert visit(client, shown).json == []


@pytest.mark.parametrize("flashes", [False, True])
def test_a_message_flashed_while_others_are_shown_is_kept(client: FlaskClient, flashes: bool) -> None:
    visit(client, put(x=1))
    visit(client, flashing("old"))

    def slow() -> list[Any]:
        messages = shown()
        meanwhile(lambda: visit(twin(client), flashing("new")))
        if flashes:
            flash("own")
        return messages

    assert visit(client, slow).json == ["old"]
    assert visit(client, shown).json == (["new", "own"] if flashes else ["new"])


def test_messages_shown_by_another_request_are_not_shown_again(client: FlaskClient) -> None:
    visit(client, put(x=1))
    visit(client, flashing("old"))

    def slow() -> None:
        flash("new")
        assert meanwhile(lambda: visit(twin(client), shown).json) == ["old"]

    visit(client, slow)
    assert visit(client, shown).json == ["new"]


def test_a_message_flashed_at_a_login_is_kept(store: Store, client: FlaskClient) -> None:
    visit(client, put(x=1))

    def login() -> None:
        session["_user_id"] = "ada"
        flash("welcome")
        meanwhile(lambda: visit(twin(client), flashing("fast")))

    visit(client, login)
    assert store.owned_by("ada") == [sid_of(client)]
    assert visit(client, shown).json == ["fast", "welcome"]


def test_flashes_that_are_not_a_list_are_left_alone(client: FlaskClient) -> None:
    visit(client, put(x=1))

    def slow() -> None:
        session["_flashes"] = "mine"
        meanwhile(lambda: visit(twin(client), put(_flashes="theirs")))

    visit(client, slow)
    assert visit(client, look).json == {"x": "1", "_flashes": "mine"}


def test_many_threads_flash_at_once(store: Store, app: Flask, client: FlaskClient) -> None:
    visit(client, put(x=1))
    barrier = threading.Barrier(4)

    def browse(name: str) -> None:
        tab = twin(client)
        barrier.wait()
        for n in range(50):
            visit(tab, flashing(f"{name}{n}"))

    threads = [threading.Thread(target=browse, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = visit(client, shown).json
    assert messages is not None
    assert sorted(messages) == sorted(f"{name}{n}" for name in "abcd" for n in range(50))
    assert [m for m in messages if m[0] == "a"] == [f"a{n}" for n in range(50)]


# -- locks ----------------------------------------------------------------------------------------------------


def count() -> None:
    with session.lock():
        number = session.get("n", 0)
        time.sleep(0.0005)
        session["n"] = number + 1


def test_a_counter_under_the_lock_loses_no_increment(client: FlaskClient) -> None:
    visit(client, put(n=0))

    def browse() -> None:
        tab = twin(client)
        for _ in range(50):
            visit(tab, count)

    threads = [threading.Thread(target=browse) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert visit(client, look).json == {"n": "200"}


def test_changes_before_the_lock_are_kept(client: FlaskClient) -> None:
    visit(client, put(n=0))

    def view() -> None:
        session["before"] = 1
        meanwhile(lambda: visit(twin(client), put(n=5)))
        with session.lock():
            assert session["n"] == 5
            session["n"] += 1
        assert meanwhile(lambda: visit(twin(client), look).json) == {"n": "6", "before": "1"}
        session["after"] = 1

    visit(client, view)
    assert visit(client, look).json == {"n": "6", "before": "1", "after": "1"}


def test_an_exception_under_the_lock_undoes_the_changes_made_there(client: FlaskClient) -> None:
    visit(client, put(n=0, cart=[]))

    def view() -> None:
        with suppress(ZeroDivisionError), session.lock():
            session["n"] = 1
            session["cart"].append(1)
            raise ZeroDivisionError
        session["m"] = 2

    visit(client, view)
    assert visit(client, look).json == {"n": "0", "cart": "[]", "m": "2"}


def test_a_failed_save_undoes_the_changes_made_under_the_lock(client: FlaskClient) -> None:
    visit(client, put(n=0))

    def view() -> None:
        with suppress(SerializationError), session.lock():
            session["n"] = 1
            session["m"] = object()

    assert visit(client, view).status_code == 200
    assert visit(client, look).json == {"n": "0"}


def test_an_exception_under_the_lock_of_a_new_session_undoes_its_changes(store: Store, client: FlaskClient) -> None:
    def view() -> None:
        with suppress(ZeroDivisionError), session.lock():
            session["n"] = 1
            raise ZeroDivisionError

    assert cookies(visit(client, view)) == []
    assert len(store) == 0


def test_a_new_session_needs_no_lock(client: FlaskClient) -> None:
    visit(client, count)
    visit(client, count)
    assert visit(client, look).json == {"n": "2"}


def test_a_lock_that_is_not_free_in_time_is_a_timeout(store: Store, client: FlaskClient) -> None:
    visit(client, put(n=0))

    def view() -> None:
        with store.lock(sid_of(client)), pytest.raises(StoreTimeout, match=r"for 0\.05 s"), session.lock(timeout=0.05):
            raise AssertionError
        session["n"] = 1  # a request that does not take the lock is not blocked

    visit(client, view)
    assert visit(client, look).json == {"n": "1"}


def test_locking_a_session_that_has_ended_meanwhile(client: FlaskClient) -> None:
    visit(client, put(n=0))

    def view() -> None:
        assert session["n"] == 0
        meanwhile(lambda: visit(twin(client), lambda: session.clear()))  # noqa: PLW0108 - a proxy has no such method
        with session.lock():
            session["n"] = session.get("n", 0) + 1

    assert cookies(visit(client, view)) == []
    assert visit(client, look).json == {}


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_lock_is_freed_when_its_holder_exits_or_dies(store: Store, how: str) -> None:
    def hold(ready: Any) -> None:
        context = store.lock("a")
        context.__enter__()
        ready.set()
        time.sleep(60 if how == "killed" else 0)
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=hold, args=(ready,))
    child.start()
    assert ready.wait(30)
    if how == "killed":
        with pytest.raises(StoreTimeout), store.lock("a", timeout=0.01):
            pass
        os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    with store.lock("a", timeout=0.01), store.lock("b", timeout=0.01):
        pass


def test_a_child_forked_under_the_lock_does_not_hold_it(store: Store) -> None:
    reader, writer = os.pipe()
    with store.lock("a"):
        pid = os.fork()
        if not pid:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    try:
        with store.lock("a", timeout=0.01):
            pass
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(pid, 0)


# -- stale requests -------------------------------------------------------------------------------------------


def rotate() -> None:
    session.rotate()


def log_in() -> None:
    session["_user_id"] = "ada"


def log_out() -> None:
    session.clear()


def destroy() -> None:
    session.destroy()


@pytest.fixture(params=[rotate, log_in, log_out, destroy])
def late(request: pytest.FixtureRequest, client: FlaskClient) -> FlaskClient:
    """Return a browser whose request was running while another one changed or ended its session."""
    visit(client, put(a=1))
    late = twin(client)
    visit(client, request.param)
    return late


def test_a_stale_request_gets_an_empty_session_and_no_cookie(late: FlaskClient, client: FlaskClient) -> None:
    there = visit(client, look).json
    response = visit(late, lambda: {**look(), "new": session.new, "written": session.setdefault("b", 2)})
    assert response.json == {"new": True, "written": 2}
    assert response.status_code == 200
    assert cookies(response) == []
    assert visit(client, look).json == there


def test_after_four_seconds_a_stale_request_is_a_new_visitor(late: FlaskClient, clock: Clock) -> None:
    clock.tick(3.9)
    assert cookies(visit(late, put(b=2))) == []
    clock.tick(0.2)
    assert len(cookies(visit(late, put(b=2)))) == 1
    assert visit(late, look).json == {"b": "2"}


@pytest.mark.parametrize("change", [rotate, log_in, log_out, destroy])
@pytest.mark.parametrize(
    ("headers", "navigates"),
    [
        ({"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}, True),
        ({"Sec_Fetch_Mode": "navigate"}, True),
        ({"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"}, False),
        ({"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document", "Sec_Purpose": "prefetch"}, False),
        ({"Sec_Fetch_Mode": "cors", "Sec_Fetch_Dest": "empty"}, False),
    ],
)
def test_a_navigation_is_stale_for_at_most_one_second(
    client: FlaskClient, clock: Clock, change: Callable[[], None], headers: dict[str, str], navigates: bool
) -> None:
    """If the session has ended, the browser has a deleted cookie, not a newer one."""
    visit(client, put(a=1))
    late = twin(client)
    visit(client, change)
    seconds = 4 if not navigates else 1 if change in (rotate, log_in) else 0
    if seconds:
        clock.tick(seconds - 0.1)
        assert cookies(visit(late, put(b=2), **headers)) == []
        clock.tick(0.2)
    assert len(cookies(visit(late, put(b=2), **headers))) == 1


def test_destroy_others_keeps_a_session_whose_id_changes_meanwhile(clock: Clock) -> None:
    """The overlapping request waits for the lock, so the session to keep is known."""
    waits, job = threading.Event(), list[threading.Thread]()

    class Racing(Store):
        def lock(self, sid: str, timeout: Any = 5.0) -> Any:
            if job and threading.current_thread() is job[0]:
                waits.set()
            return super().lock(sid, timeout)

        def destroy_owned(self, owner: Any, keep: Any = ()) -> int:
            job.append(threading.Thread(target=visit, args=(other, rotate)))
            job[0].start()
            while not waits.wait(0.001) and job[0].is_alive():
                pass
            return super().destroy_owned(owner, keep)

    with Racing(memory=2**20, clock=clock, check_period=None) as store:
        app = make_app(store)
        client, device = app.test_client(), app.test_client()
        visit(client, log_in)
        visit(device, log_in)
        other = twin(client)
        assert visit(client, lambda: str(session.destroy_others())).text == "1"
        job[0].join()
        assert sid_of(other) != sid_of(client)
        assert store.owned_by("ada") == [sid_of(other)]


def test_a_device_that_logs_in_and_logs_out_the_others_stays_if_an_overlapping_request_logs_in_too(
    clock: Clock,
) -> None:
    """The first login is stored before others are destroyed, so the second one gets a session of its own."""

    class Racing(Store):
        def destroy_owned(self, owner: Any, keep: Any = ()) -> int:
            meanwhile(lambda: visit(other, log_in))
            return super().destroy_owned(owner, keep)

    def view() -> str:
        log_in()
        return str(session.destroy_others())

    with Racing(memory=2**20, clock=clock, check_period=None) as store:
        app = make_app(store)
        client, device = app.test_client(), app.test_client()
        visit(device, log_in)
        visit(client, put(cart=1))
        other = twin(client)
        assert visit(client, view).text == "2"
        assert store.owned_by("ada") == [sid_of(client)]


def under_another_id() -> None:
    session.rotate()
    session["n"] = 1


@pytest.mark.parametrize("begin", [put(_user_id="eve"), put(n=1), flashing("bye"), under_another_id])
def test_a_cleared_session_has_nothing_of_an_overlapping_request(
    store: Store, client: FlaskClient, begin: Callable[[], None]
) -> None:
    visit(client, put(_user_id="ada", a=1))
    other = twin(client)

    def view() -> None:
        session["a"]
        meanwhile(lambda: visit(other, put(address="of ada")))
        session.clear()
        begin()

    visit(client, view)
    new = client.application.test_client()
    visit(new, begin)
    assert visit(client, look).json == visit(new, look).json
    assert len(store) == 2


@pytest.mark.parametrize("n", [1, 2])
def test_a_session_cleared_after_a_save_has_nothing_of_an_overlapping_request(client: FlaskClient, n: int) -> None:
    """Also if it then has exactly the data that it had."""
    visit(client, put(n=0))
    other = twin(client)

    def view() -> None:
        session["n"] = 1
        assert session.save()
        meanwhile(lambda: visit(other, put(address="of ada")))
        session.clear()
        session["n"] = n

    visit(client, view)
    assert visit(client, look).json == {"n": str(n)}


def test_a_cleared_session_of_another_serializer_has_nothing_of_an_overlapping_request() -> None:
    """It is not known to encode equal values equally."""
    with Store(memory=2**20, serializer=json, check_period=None) as store:
        client = make_app(store).test_client()
        visit(client, put(_user_id="ada"))
        other = twin(client)

        def view() -> None:
            session["_user_id"]
            meanwhile(lambda: visit(other, put(address="of ada")))
            session.clear()
            session["_user_id"] = "eve"

        visit(client, view)
        assert visit(client, look).json == {"_user_id": "eve"}


def test_clear_keeps_a_rotation_that_waits(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    before = sid_of(client)

    def rotate_on_a_socket() -> None:
        environ = {"wsgi.websocket": object(), "test.action": rotate}
        twin(client).get("/", environ_overrides=environ)

    def view() -> None:
        session["a"]
        meanwhile(rotate_on_a_socket)
        session.clear()
        session["b"] = 2

    visit(client, view)
    assert sid_of(client) != before
    assert store.all() == {sid_of(client): {"b": 2}}


@pytest.mark.parametrize("flashes", [False, True])
def test_a_login_keeps_what_an_overlapping_request_has_written(
    store: Store, client: FlaskClient, flashes: bool
) -> None:
    visit(client, put(a=1))
    old = sid_of(client)

    def view() -> None:
        log_in()
        if flashes:
            flash("welcome")
        meanwhile(lambda: visit(twin(client), put(b=2)))

    visit(client, view)
    stored = store.get(sid_of(client))
    assert stored is not None
    assert stored.pop("_flashes", []) == [("message", "welcome")] * flashes
    assert stored == {"a": 1, "b": 2, "_user_id": "ada"}
    assert old not in store
    assert store.owned_by("ada") == [sid_of(client)]


def test_changes_lost_by_a_stale_request_are_logged(
    late: FlaskClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.web.stored_session._stale", Throttle())
    visit(late, look)
    assert not caplog.records

    def view() -> None:
        session["b"] = 2
        assert not session.save()

    for _ in range(2):
        visit(late, view)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "new sessions not stored: 1; another request had just replaced the id in their cookie" in caplog.text


def test_changes_lost_by_a_slow_request_are_logged(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.web.stored_session._dropped", Throttle())
    visit(client, put(a=1))

    def slow() -> None:
        session["b"] = 2
        meanwhile(lambda: visit(twin(client), log_in))

    visit(client, slow)
    assert "saves dropped: 1; another request had destroyed the session or changed its id" in caplog.text


@pytest.mark.parametrize("noticed_by", ["lock", "reload", "touch", "destroy_others"])
def test_changes_lost_after_the_end_was_noticed_are_logged(
    client: FlaskClient,
    store: Store,
    noticed_by: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shmstore.web.stored_session._dropped", Throttle())

    def view(**values: Any) -> None:
        session["_user_id"]
        store.destroy(sid_of(client))
        noticed = getattr(session, noticed_by)()
        with noticed if noticed_by == "lock" else nullcontext():
            session.update(values)
        assert session.save() is False

    visit(client, put(_user_id="ada"))
    visit(client, view)
    assert not caplog.records, "there was nothing to lose"
    visit(client, put(_user_id="ada"))
    visit(client, lambda: view(cart=["tea"]))
    assert "saves dropped: 1; another request had destroyed the session or changed its id" in caplog.text


ELSEWHERE: dict[str, Callable[[Store, str], object]] = {
    "destroy": lambda store, sid: store.destroy(sid),
    "destroy, several": lambda store, sid: store.destroy([sid]),
    "rename": lambda store, sid: store.rename(sid, "moved"),
    "destroy_owned": lambda store, _: store.destroy_owned("ada"),
    "touch": lambda store, sid: store.touch(sid, ttl=0),
    "clear": lambda store, _: store.clear(),
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_a_device_logged_out_from_elsewhere_can_start_a_session_at_once(
    store: Store, client: FlaskClient, how: str
) -> None:
    """The browser got no cookie, so it cannot have a newer one."""
    visit(client, log_in)
    ELSEWHERE[how](store, sid_of(client))
    visit(client, put(token="x"))
    assert visit(client, look).json == {"token": "x"}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_a_running_request_can_start_a_session_after_a_logout_from_elsewhere(
    store: Store, client: FlaskClient, how: str
) -> None:
    visit(client, log_in)

    def view() -> None:
        assert session["_user_id"] == "ada"
        meanwhile(lambda: ELSEWHERE[how](store, sid_of(client)))
        assert not session.destroy()
        session["token"] = "x"

    visit(client, view)
    assert visit(client, look).json == {"token": "x"}


def test_a_login_is_never_lost(late: FlaskClient, store: Store) -> None:
    """A user who logs in gets a session with a new id, even in a stale request."""
    old = sid_of(late)
    visit(late, log_in)
    assert sid_of(late) != old
    assert sid_of(late) in store.owned_by("ada")


def test_a_login_is_kept_after_a_refused_save(
    late: FlaskClient, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = Throttle()
    monkeypatch.setattr("shmstore.web.stored_session._stale", stale)

    def view() -> None:
        session["seen"] = 1
        for _ in range(2):
            assert not session.save()
        with session.lock():
            session["_user_id"] = "ada"
        assert session.save()

    old = sid_of(late)
    assert len(cookies(visit(late, view))) == 1
    assert sid_of(late) != old
    assert sid_of(late) in store.owned_by("ada")
    assert caplog.text.count("new sessions not stored: 1;") == 1


@pytest.mark.parametrize("logs_in", [False, True])
def test_a_stale_request_starts_a_session_only_with_a_login(late: FlaskClient, store: Store, logs_in: bool) -> None:
    """The browser may hold a newer cookie, of another login: a stale logout must not end that session."""

    def view() -> None:
        session.regenerate()
        flash("good bye")
        if logs_in:
            session["_user_id"] = "bob"

    assert len(cookies(visit(late, view))) == logs_in
    assert len(store.owned_by("bob")) == logs_in


def test_a_slow_logout_does_not_end_a_newer_login(client: FlaskClient) -> None:
    visit(client, log_in)
    slow = twin(client)

    def log_out_and_in() -> None:
        visit(client, log_out)
        visit(client, log_in)

    def view() -> None:
        assert session["_user_id"] == "ada"
        meanwhile(log_out_and_in)
        assert not session.destroy()
        flash("good bye")

    assert cookies(visit(slow, view)) == []
    assert visit(client, look).json == {"_user_id": "ada"}


@pytest.mark.parametrize("overtaking", [log_in, log_out])
def test_a_login_yields_to_a_login_or_logout_that_finishes_first(
    store: Store, client: FlaskClient, overtaking: Callable[[], None]
) -> None:
    """The login began earlier: a logout is not undone, and the browser keeps the cookie of the other login."""
    visit(client, put(cart=1))
    other = twin(client)

    def view() -> None:
        assert session["cart"] == 1
        meanwhile(lambda: visit(other, overtaking))
        log_in()

    assert cookies(visit(client, view)) == []
    assert len(store.owned_by("ada")) == len(store) == (overtaking is log_in)


def test_removing_the_last_key_during_a_login_sends_no_cookie(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    other = twin(client)

    class Slow(Store):
        def destroy_if_empty(self, sid: str, ignore: Iterable[str] = (), tombstone: bool = False) -> bool:
            meanwhile(lambda: visit(other, log_in))
            return super().destroy_if_empty(sid, ignore, tombstone)

    slow = make_app(Slow.over(store.arena, store.options)).test_client()
    slow.set_cookie("session", sid_of(client))
    assert cookies(visit(slow, lambda: str(session.pop("a")))) == []
    assert visit(other, look).json == {"_user_id": "ada"}


def test_a_changed_id_is_sent_even_if_the_request_fails(client: FlaskClient) -> None:
    client.application.config.update(PROPAGATE_EXCEPTIONS=False)
    visit(client, put(a=1))

    def view() -> None:
        log_in()
        with session.lock():
            session["b"] = 2
        session["c"] = object()

    assert visit(client, view).status_code == 500
    assert visit(client, look).json == {"a": "1", "_user_id": "ada", "b": "2"}


@pytest.mark.parametrize("prefix", ["forum:", "a.b.", "session/"])
def test_a_prefix_keeps_applications_apart(store: Store, prefix: str) -> None:
    forum, shop = make_app(store, SESSION_KEY_PREFIX=prefix).test_client(), make_app(store).test_client()
    visit(forum, put(role="admin"))
    shop.set_cookie("session", prefix + sid_of(forum))
    gets = store.stats().gets
    assert visit(shop, look).json == {}
    assert store.stats().gets == gets


def test_a_changed_owner_rule_does_not_change_the_id(store: Store, client: FlaskClient) -> None:
    visit(client, put(user="ada", a=1))
    assert store.owned_by("ada") == []
    later = make_app(store, SESSION_OWNER_KEY="user").test_client()
    later.set_cookie("session", sid_of(client))
    assert cookies(visit(later, look)) == []
    assert store.owned_by("ada") == [sid_of(client)]


def test_an_unknown_id_is_a_new_visitor(client: FlaskClient) -> None:
    client.set_cookie("session", "x" * 43)
    visit(client, put(a=1))
    assert visit(client, look).json == {"a": "1"}


def test_a_login_and_a_slow_request_with_the_old_cookie(store: Store, client: FlaskClient) -> None:
    """Act as an attacker: plant an id, wait for the login, return with the planted id, read and write."""
    attacker = client
    visit(attacker, put(planted=1))
    planted = sid_of(attacker)
    victim = twin(attacker)

    def slow_attack() -> None:
        assert session["planted"] == 1
        visit_result = meanwhile(lambda: visit(victim, log_in))
        assert len(cookies(visit_result)) == 1
        session["evil"] = 1

    response = visit(attacker, slow_attack)
    assert cookies(response) == []
    assert sid_of(attacker) == planted
    assert visit(attacker, look).json == {}
    assert visit(victim, look).json == {"planted": "1", "_user_id": "ada"}
    assert store.owned_by("ada") == [sid_of(victim)]


# -- events on a socket ---------------------------------------------------------------------------------------


@pytest.fixture
def event(store: Store) -> Callable[..., Any]:
    """Return a function that runs an event in the context of a request, as Flask-SocketIO with manage_session=False."""
    app = make_app(store)

    def handle(client: FlaskClient, action: Callable[[], Any]) -> None:
        headers = {"Cookie": f"session={sid_of(client)}"} if client.get_cookie("session") else {}
        with app.test_request_context("/socket.io", headers=headers):
            request.event, request.namespace = {}, "/"  # type: ignore[attr-defined]
            action()
            ours = session._get_current_object()  # type: ignore[attr-defined]
            if ours.modified:
                app.session_interface.save_session(app, ours, app.response_class())

    return handle


def test_an_event_shares_the_session(client: FlaskClient, event: Callable[..., Any]) -> None:
    visit(client, put(a=1))
    event(client, put(b=2))
    assert visit(client, look).json == {"a": "1", "b": "2"}


def test_a_login_in_an_event_is_not_stored(store: Store, client: FlaskClient, event: Callable[..., Any]) -> None:
    visit(client, put(a=1))
    event(client, log_in)
    assert store.all() == {sid_of(client): {"a": 1}}


def test_a_rotation_in_an_event_is_deferred(store: Store, client: FlaskClient, event: Callable[..., Any]) -> None:
    visit(client, put(a=1))

    def view() -> None:
        session.rotate()
        session["b"] = 2

    event(client, view)
    assert store.ids() == [sid_of(client)]
    assert visit(client, look).json == {"a": "1", "b": "2"}


def test_a_session_started_in_an_event_is_not_kept(
    store: Store,
    client: FlaskClient,
    event: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shmstore.web.stored_session._unanswerable", Throttle())
    event(client, put(b=2))
    assert store.ids() == []
    assert "not stored" in caplog.text


def locked(action: Callable[[], Any]) -> Callable[[], None]:
    def view() -> None:
        action()
        with session.lock():
            session["n"] = session.get("n", 0) + 1

    return view


def test_a_lock_in_an_event_changes_no_id(store: Store, client: FlaskClient, event: Callable[..., Any]) -> None:
    visit(client, put(a=1))
    old = sid_of(client)
    event(client, locked(lambda: session.rotate()))  # noqa: PLW0108
    event(client, locked(look))
    assert store.ids() == [old]
    assert visit(client, look).json == {"a": "1", "n": "2"}
    assert store.ids() == [sid_of(client)] != [old]


def test_a_lock_in_an_event_starts_no_session(store: Store, client: FlaskClient, event: Callable[..., Any]) -> None:
    event(client, locked(look))
    assert store.ids() == []
