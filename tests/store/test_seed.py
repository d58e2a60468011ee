"""
What npm's memorystore promises, checked here: the 18 cases of its test suite, then what its README promises.

In our words and over every kind of store. Where shmstore differs on purpose, the test shows what it does, and
docs/understand/differences.md says why. Ids are numbers in memorystore and strings here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kinds
import pytest
from processes import Start

from shmstore.testing import wait_until

Make = Callable[..., Any]


@pytest.fixture(params=kinds.KINDS)
def make(request: pytest.FixtureRequest, manage: Start) -> Iterator[Make]:
    stores = []

    def make(**options: Any) -> Any:
        stores.append(kinds.make_store(request.param, manage, **{"memory": 2**18, **options}))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def fill(store: Any, count: int, **cookie: Any) -> None:
    for number in range(count):
        store.set(f"sess-{number}", {"cookie": cookie, "i": number})


# -- its test suite, in its order ------------------------------------------------------------------------------------


def test_default_options(make: Make) -> None:
    options = make().options
    assert options.max is None  # theirs: Infinity
    assert options.ttl is None
    assert options.stale is options.no_dispose_on_set is False


def test_options_are_set(make: Make) -> None:
    given = {
        "max": 10, "check_period": 10, "ttl": 36, "dispose": None, "stale": True, "no_dispose_on_set": True,
    }  # fmt: skip
    options = make(**given).options
    assert {name: getattr(options, name) for name in given} == given


def test_sessions_are_pruned_by_default(make: Make) -> None:
    assert make().options.check_period == 60  # memorystore: not by default


def test_only_10_sessions_are_kept(make: Make) -> None:
    store = make(max=10)
    fill(store, 15, max_age=600)
    assert store.length() == 10


def test_the_newest_session_can_be_destroyed(make: Make) -> None:
    store = make(max=10)
    fill(store, 15)
    store.destroy("sess-14")
    assert store.length() == 9


def test_the_oldest_sessions_can_be_destroyed_and_leave_room(make: Make) -> None:
    store = make(max=10)
    fill(store, 10)
    store.destroy("sess-0")
    store.destroy("sess-1")
    assert store.length() == 8
    store.set("sess-10", {})
    store.set("sess-11", {})
    assert store.length() == 10
    assert store.stats().evicted == 0


def test_a_session_is_got_as_it_was_set(make: Make) -> None:
    store = make()
    store.set("hello", {"cookie": {}, "sample": True})
    assert store.get("hello") == {"cookie": {}, "sample": True}


def test_the_life_is_the_max_age_of_the_cookie(make: Make) -> None:
    store = make()
    store.set("hello", {"cookie": {"max_age": 60}, "sample": True})
    assert store.get("hello") == {"cookie": {"max_age": 60}, "sample": True}
    store.set("hello", {"cookie": {"max_age": 0.05}, "sample": True})
    wait_until(lambda: store.get("hello") is None)


def test_the_empty_id_is_invalid(make: Make) -> None:
    assert make().get("") is None


def test_a_destroyed_session_is_gone(make: Make) -> None:
    store = make()
    store.set("foo", {"cookie": {}})
    assert store.get("foo") == {"cookie": {}}
    store.destroy("foo")
    assert store.get("foo") is None


def test_an_expired_session_is_not_got(make: Make) -> None:
    store = make()
    store.set("hello", {"cookie": {"max_age": 0}, "sample": True})  # memorystore: 0 is for ever
    assert store.get("hello") is None


def test_expired_sessions_are_pruned_automatically(make: Make) -> None:
    store = make(check_period=0.2)
    store.set("foo", {"cookie": {"max_age": -1}})
    store.set("bar", {"cookie": {"max_age": 0.01}})
    wait_until(lambda: store.length() == 0)
    assert store.stats().expired == 2


def test_without_a_period_expired_sessions_stay(make: Make) -> None:
    store = make(check_period=None)
    store.set("foo", {"cookie": {"max_age": -1}})
    store.set("bar", {"cookie": {"max_age": -1}})
    time.sleep(0.1)
    assert store.length() == 2


def test_touch_renews_the_deadline(make: Make) -> None:
    store = make()

    def touched() -> Any:
        begun = time.monotonic()
        store.set("hei", {"cookie": {"max_age": 1}, "sample": True})
        done = store.touch("hei", {"cookie": {"max_age": 300}})
        assert done or time.monotonic() - begun > 0.9, "it was not too late"
        return done

    wait_until(touched)
    store.set("untouched", {"cookie": {"max_age": 1}})
    wait_until(lambda: store.get("untouched") is None)
    assert store.get("hei") == {"cookie": {"max_age": 300}, "sample": True}


def test_ids_are_the_newest_first(make: Make) -> None:
    store = make()
    fill(store, 10)
    assert store.ids() == [f"sess-{number}" for number in reversed(range(10))]


def test_all_sessions_come_with_their_ids(make: Make) -> None:
    store = make()
    fill(store, 10)
    assert store.all() == {f"sess-{number}": {"cookie": {}, "i": number} for number in range(10)}


def test_sessions_are_counted(make: Make) -> None:
    store = make()
    fill(store, 10)
    assert store.length() == 10


def test_all_sessions_can_be_removed(make: Make) -> None:
    store = make()
    fill(store, 10)
    store.clear()
    assert store.length() == 0


# -- its README ------------------------------------------------------------------------------------------------------


def test_ttl_may_be_a_function_of_options_session_and_id(make: Make) -> None:
    store = make(ttl=lambda options, session, sid: 60 if (options.stale, session["i"], sid) == (False, 1, "a") else 0)
    store.set("a", {"i": 1})
    store.set("b", {"i": 1})
    assert store.ids() == ["b", "a"]
    assert store.all() == {"a": {"i": 1}}


def test_dispose_is_called_with_id_and_session_before_it_is_removed(make: Make, tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    def dispose(sid: str, session: Any, reason: str) -> None:  # memorystore: the serialised session, and no reason
        with gone.open("a") as file:
            print(json.dumps([sid, session, reason]), file=file)

    store = make(dispose=dispose, max=1)
    store.set("a", {"i": 1})
    store.set("a", {"i": 2})
    store.set("b", {"i": 3})
    assert list(map(json.loads, gone.read_text().splitlines())) == [["a", {"i": 1}, "set"], ["a", {"i": 2}, "evict"]]


def test_no_dispose_on_set_exempts_overwriting(make: Make, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    store = make(dispose=lambda sid, session, reason: gone.write_text(reason), no_dispose_on_set=True)
    store.set("a", {})
    store.set("a", {})
    assert not gone.exists()
    store.destroy("a")
    assert gone.read_text() == "destroy"


def test_touch_disposes_of_nothing(make: Make, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    store = make(dispose=lambda sid, session, reason: gone.write_text(reason))
    store.set("a", {})
    assert store.touch("a", {"cookie": {"max_age": 60}})  # memorystore calls dispose here, though the session stays
    assert not gone.exists()


def test_stale_returns_an_expired_session_once(make: Make) -> None:
    store = make(stale=True)
    store.set("a", {"i": 1}, ttl=-1)
    assert store.get("a") == {"i": 1}
    assert store.get("a") is None


def test_a_custom_serializer(make: Make) -> None:
    store = make(serializer=json)
    store.set("a", {"tuple": (1, 2)})
    assert store.get("a") == {"tuple": [1, 2]}


def test_prune_removes_only_expired_sessions_and_keeps_the_order(make: Make) -> None:
    store = make(max=3, check_period=None)
    for sid in "abc":
        store.set(sid, {}, ttl=0 if sid == "b" else 60)
    store.prune()
    assert store.ids() == ["c", "a"]
    store.set("d", {})
    store.set("e", {})
    assert store.ids() == ["e", "d", "c"]  # memorystore evicts c, the most recently used
