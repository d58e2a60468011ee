"""Threads of one request that share its session: the changes of each are kept, in one session."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from browsing import look, make_app, meanwhile, put, session, sid_of, visit
from flask import copy_current_request_context, flash, get_flashed_messages
from flask.testing import FlaskClient
from processes import Run

from shmstore import Store
from shmstore.policy import Policy
from shmstore.session import Session

VISITORS = 30  # without a lock, most of them would lose a change
LARGE = "x" * 20_000  # takes long enough to encode that the threads overlap


def at_once(*actions: Callable[[], Any]) -> list[Any]:
    """Called in a view: run these functions concurrently, each in a thread with the context of the view."""
    start = threading.Barrier(len(actions))

    def do(action: Callable[[], Any]) -> Any:
        start.wait(20)
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        jobs = [pool.submit(copy_current_request_context(do), action) for action in actions]
    return [job.result() for job in jobs]


def saving(**values: Any) -> Callable[[], bool]:
    def action() -> bool:
        session.update(values)
        return session.save()

    return action


@pytest.mark.parametrize("known", [False, True])
def test_concurrent_threads_lose_no_change_and_start_one_session(store: Store, known: bool) -> None:
    app = make_app(store)
    answers = {f"answer{number}": LARGE for number in range(4)}
    for _ in range(VISITORS):
        client = app.test_client()
        if known:
            visit(client, put(cart=1))
        visit(client, lambda: str(at_once(*(saving(**{key: value}) for key, value in answers.items()))))
        assert store.get(sid_of(client)) == ({"cart": 1} if known else {}) | answers
        assert store.ids() == [sid_of(client)]
        store.clear()


def test_a_login_beside_a_save_is_kept(store: Store) -> None:
    app = make_app(store)
    for _ in range(VISITORS):
        client = app.test_client()
        visit(client, put(cart=1))
        before = sid_of(client)
        visit(client, lambda: str(at_once(saving(_user_id="ada"), saving(profile=LARGE))))
        assert store.get(sid_of(client)) == {"cart": 1, "_user_id": "ada", "profile": LARGE}
        assert store.ids() == store.owned_by("ada") == [sid_of(client)] != [before]
        store.clear()


def test_threads_of_one_request_take_the_lock_in_turn(store: Store, client: FlaskClient) -> None:
    visit(client, put(n=0))

    def count() -> None:
        for _ in range(5):
            with session.lock(timeout=20):
                session["n"] += 1

    visit(client, lambda: str(at_once(count, count, count)))
    assert store.get(sid_of(client)) == {"n": 15}


def test_changes_of_another_thread_during_a_wait_for_the_lock_are_kept(store: Store, client: FlaskClient) -> None:
    visit(client, put(n=0))
    waiting, done = threading.Event(), threading.Event()

    class Watched(Store):
        def lock(self, sid: str, timeout: Any = 5.0) -> Any:
            waiting.set()
            assert done.wait(20)
            return super().lock(sid, timeout)

    def take_turn() -> None:
        with session.lock():
            session["n"] += 1

    def answer() -> None:
        assert waiting.wait(20)
        session["answer"] = 1
        done.set()

    watched = make_app(Watched.over(store.arena, store.options)).test_client()
    watched.set_cookie("session", sid_of(client))
    visit(watched, lambda: str(at_once(take_turn, answer)))
    assert store.get(sid_of(client)) == {"n": 1, "answer": 1}


def test_what_another_thread_sets_while_the_lock_is_taken_is_kept(store: Store, client: FlaskClient) -> None:
    """After the save that precedes the reading, and before the reading."""
    visit(client, put(n=0, old=0, end=None))
    reading, written = threading.Event(), threading.Event()

    class Watched(Store):
        def load(self, sid: str) -> Any:
            loaded = super().load(sid)
            if locked:
                reading.set()
                assert written.wait(20)
            return loaded

        def lock(self, sid: str, timeout: Any = 5.0) -> Any:
            locked.append(True)
            return super().lock(sid, timeout)

    locked: list[bool] = []

    def take_turn() -> None:
        with session.lock():
            session["n"] += 1

    def answer() -> bool:
        assert reading.wait(20)
        session.update(answer=1, old=1, nothing=None)
        del session["end"]
        written.set()
        return session.save()

    watched = make_app(Watched.over(store.arena, store.options)).test_client()
    watched.set_cookie("session", sid_of(client))
    assert visit(watched, lambda: session["n"] or str(at_once(take_turn, answer))).text == "[None, True]"
    assert store.get(sid_of(client)) == {"n": 1, "old": 1, "answer": 1, "nothing": None}


def test_a_message_of_another_request_while_the_lock_is_taken_is_kept(store: Store, client: FlaskClient) -> None:
    """One is merged by the save that precedes the reading, and one comes between the two."""
    visit(client, lambda: flash("a"))
    other = client.application.test_client()
    other.set_cookie("session", sid_of(client))
    loads: list[str] = []

    class Watched(Store):
        def load(self, sid: str) -> Any:
            if locked:
                loads.append(sid)
                if len(loads) == 2:  # the first is that of the merge
                    meanwhile(lambda: visit(other, lambda: flash("c")))
            return super().load(sid)

        def lock(self, sid: str, timeout: Any = 5.0) -> Any:
            if not locked and not sid.startswith("lists "):
                locked.append(True)
                get_flashed_messages()  # shown by another thread
                meanwhile(lambda: visit(other, lambda: flash("b")))
            return super().lock(sid, timeout)

    locked: list[bool] = []

    def view() -> None:
        with session.lock():
            session["n"] = 1

    watched = make_app(Watched.over(store.arena, store.options)).test_client()
    watched.set_cookie("session", sid_of(client))
    visit(watched, view)
    assert len(loads) >= 2
    assert store.get(sid_of(client)) == {"n": 1, "_flashes": [("message", "b"), ("message", "c")]}


def test_a_default_is_set_by_one_thread_only(store: Store, client: FlaskClient) -> None:
    def collect() -> None:
        for number in range(200):
            session.setdefault("all", []).append(number)

    visit(client, lambda: str(at_once(collect, collect, collect)))
    stored = store.get(sid_of(client))
    assert stored is not None
    assert sorted(stored["all"]) == sorted([*range(200)] * 3)


def test_messages_of_threads_and_of_overlapping_requests_are_all_kept(store: Store, client: FlaskClient) -> None:
    visit(client, lambda: flash("old"))

    def view() -> None:
        flash("own")
        flashes = session["_flashes"]  # as flash() does in a thread, just before the save of another thread
        store.update(sid_of(client), {"_flashes": [("message", "old"), ("message", "from another request")]})
        assert session.save()
        flashes.append(("message", "from a thread"))
        session["_flashes"] = flashes

    visit(client, view)
    assert visit(client, get_flashed_messages).json == ["old", "from another request", "own", "from a thread"]


class Lazy:
    """A text that is evaluated when it is stored, as translations are; it calls a function then."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self._happens = happens

    def __str__(self) -> str:
        self._happens, happens = lambda: None, self._happens
        happens()
        return "text"

    def casefold(self) -> str:
        return str(self).casefold()

    def __mod__(self, other: object) -> str:
        return str(self) % other


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("inside", ["session", "value"])
def test_a_change_during_a_save_is_saved(store: Store, inside: str, known: bool) -> None:
    """As by another thread: a key is added to the session, or to one of its values."""
    current = Session(lambda: store, None, Policy(ttl=60))
    if known:
        current["before"] = 1
        assert current.save()
    value: dict[str, Any] = {}
    into: Any = {"session": current, "value": value}[inside]
    value["lazy"] = Lazy(lambda: into.update(late=1))
    current["value"] = value
    assert current.save()
    assert current.save()
    expected: dict[str, Any] = {"value": {"lazy": "text"}} | ({"before": 1} if known else {})
    (expected if inside == "session" else expected["value"])["late"] = 1
    assert store.get(current.sid) == expected


def test_a_value_that_cannot_be_stored_is_an_error_at_once(store: Store) -> None:
    tries = []

    class Broken:
        name = "broken"

        def dumps(self, value: object) -> bytes:
            tries.append(value)
            raise ValueError

        def loads(self, data: bytes) -> object:
            raise ValueError

    with Store(memory=2**18, serializer=Broken()) as other:
        current = Session(lambda: other, None, Policy(ttl=60))
        current["a"] = 1
        with pytest.raises(Exception, match="cannot serialize"):
            current.save()
    assert len(tries) < 5


def test_a_change_of_a_thread_during_a_logout_starts_a_new_session(store: Store, client: FlaskClient) -> None:
    visit(client, put(a=1))
    before = sid_of(client)

    class Meanwhile(Store):
        def destroy(self, sid: Any, tombstone: bool = False) -> int:
            session["late"] = 1  # as a thread would
            return super().destroy(sid, tombstone)

    watched = make_app(Meanwhile.over(store.arena, store.options)).test_client()
    watched.set_cookie("session", before)

    def view() -> None:
        session.clear()
        assert session.save()
        assert session.save()

    visit(watched, view)
    assert sid_of(watched) != before
    assert store.all() == {sid_of(watched): {"late": 1}}


def test_a_session_is_never_empty_while_it_is_reloaded(store: Store) -> None:
    current = Session(lambda: store, None, Policy(ttl=60))
    current.update(a=1, b=2)
    assert current.save()
    current["c"] = 3
    store.update(current.sid, {"a": 2})
    sizes = []
    sys.setprofile(lambda *_: sizes.append(len(current)))  # at each call, so before and after each step
    try:
        assert current.reload()
    finally:
        sys.setprofile(None)
    assert dict(current) == {"a": 2, "b": 2}
    assert {*sizes} == {3, 2}


def test_after_an_interrupted_save_another_thread_can_save(store: Store, client: FlaskClient) -> None:
    """For example, an exception of a signal handler."""

    class Interrupted(Store):
        def add(self, sid: str, session: Any, ttl: Any = None, owner: Any = None) -> bool:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().add(sid, session, ttl, owner)

    current = Session(lambda: Interrupted.over(store.arena, store.options), None, Policy(ttl=60))
    current["a"] = 1
    with pytest.raises(KeyboardInterrupt):
        current.save()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(current.save).result(20)
    assert store.get(current.sid) == {"a": 1}


def test_greenlets_that_share_a_session_start_one(run: Run) -> None:
    process = run(
        """
from shmstore import Store
from shmstore.policy import Policy
from shmstore.session import Session
import gevent.monkey
gevent.monkey.patch_all()  # late, as in a worker of Gunicorn that has preloaded the application
import gevent

class Slow(Store):
    def add(self, *args, **kwargs):
        gevent.sleep(0.01)
        return super().add(*args, **kwargs)

store = Slow(memory=2**18)
session = Session(lambda: store, None, Policy(ttl=60))

def answer(key):
    session[key] = 1
    return session.save()

jobs = [gevent.spawn(answer, key) for key in "abcd"]
gevent.joinall(jobs, raise_error=True)
assert all(job.value for job in jobs)
assert store.all() == {session.sid: dict.fromkeys("abcd", 1)}, store.all()
"""
    )
    assert process.wait(60) == 0


def test_a_reading_thread_is_not_blocked_by_a_save(store: Store, client: FlaskClient) -> None:
    """A save in one thread does not block a read in another."""
    visit(client, put(a=1))
    saving_now, looked = threading.Event(), threading.Event()

    class Slow(Store):
        def swap(self, *args: Any, **kwargs: Any) -> bool:
            saving_now.set()
            assert looked.wait(20)
            return super().swap(*args, **kwargs)

    slow = make_app(Slow.over(store.arena, store.options)).test_client()
    slow.set_cookie("session", sid_of(client))

    def read() -> None:
        assert saving_now.wait(20)
        assert session["a"] == 1
        session["c"] = 3
        looked.set()

    def view() -> None:
        assert session["a"] == 1
        at_once(saving(b=2), read)

    visit(slow, view)
    assert visit(client, look).json == {"a": "1", "b": "2", "c": "3"}
