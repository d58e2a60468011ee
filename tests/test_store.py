"""The private store: the contract, and what only it can show."""

from __future__ import annotations

from typing import Any

import pytest

from shmstore import RecordTooLarge, Store
from shmstore.testing import StoreContract


class TestStore(StoreContract):
    def make_store(self, **options: Any) -> Store:
        return Store(**options)


class Clock:
    """Time that stands still until told."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_session_is_alive_at_exactly_its_age_and_not_later(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, ttl=5) as store:
        store.set("a", {"x": 1})
        clock.now = 5 * 10**9
        assert store.get("a") == {"x": 1}
        clock.now += 1
        assert store.get("a") is None


def test_reads_within_recency_do_not_reorder(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, recency=1) as store:
        for sid in "abc":
            store.set(sid, {})
        clock.now = 10**9 - 1
        store.get("a")
        assert store.ids() == ["c", "b", "a"]
        clock.now += 10
        store.get("a")
        assert store.ids() == ["a", "c", "b"]


def test_ttl_functions_see_options_session_and_id(clock: Clock) -> None:
    seen = []

    def life(options: Any, session: Any, sid: str) -> float:
        seen.append((options.max, session, sid))
        return float(session["life"])

    with Store(memory=2**18, clock=clock, ttl=life, max=9) as store:
        store.set("a", {"life": 2})
        assert seen == [(9, {"life": 2}, "a")]
        clock.now = 10**9
        assert store.touch("a")
        assert seen[1] == (9, {"life": 2}, "a")
        clock.now = 3 * 10**9
        assert "a" in store
        clock.now += 1
        assert "a" not in store


@pytest.mark.parametrize("result", [None, "60", True, float("nan")])
def test_a_ttl_function_that_returns_nonsense_stores_nothing(result: Any) -> None:
    with Store(memory=2**18, ttl=lambda *_: result) as store:
        with pytest.raises((TypeError, ValueError), match="ttl"):
            store.set("a", {})
        assert store.ids() == []


def test_load_tells_age_idleness_and_remaining_life(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, recency=0) as store:
        store.set("a", {"x": 1}, ttl=100, owner="ada")
        clock.now = 10 * 10**9
        store.update("a", {"y": 2})
        clock.now = 30 * 10**9
        loaded = store.load("a")
        assert loaded is not None
        assert store.codec.decode(loaded.payload) == {"x": 1, "y": 2}
        assert (loaded.created, loaded.idle, loaded.owner) == (30, 20, "ada")
        assert loaded.remaining == pytest.approx(70, abs=1e-6)
        assert store.load("b") is None


def test_another_serializers_record_is_a_counted_miss() -> None:
    import json

    with Store(memory=2**18) as store:
        store.set("a", {"x": 1})
        other = Store.over(store.arena, type(store.options).of(serializer=json))
        assert other.get("a") is None
        assert other.load("a") is None
        assert other.all() == {}
        assert store.stats().misses == 2
        assert store.get("a") == {"x": 1}


def test_the_largest_session_fits_beside_itself() -> None:
    with Store(memory=2**16) as store:
        limit = store.options.session_limit
        value = "y" * (limit - 10)
        for _ in range(5):
            store.set("s" * 256, {"x": value}, owner="o" * 256)
        assert store.update("s" * 256, {"x": value[::-1]})
        with pytest.raises(RecordTooLarge):
            store.set("t", {"x": value + "y" * 10})
        store.arena.check()


def test_a_store_does_not_outlive_its_last_reference() -> None:
    import gc
    import weakref

    store = Store(memory=2**18, check_period=60)
    reference = weakref.ref(store)
    del store
    gc.collect()
    assert reference() is None
