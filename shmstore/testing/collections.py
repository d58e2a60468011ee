"""The contract: all sessions, the sessions of one owner, and pruning."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from shmstore.contract import Capability
from shmstore.testing.base import Base, Disposals, Make, at_once, can, needs, wait_until


def moody_serializer() -> Any:
    """Return a serializer that cannot decode the value "bad". It is pickled by value, so it runs in any process."""

    class Moody:
        def dumps(self, value: Any) -> bytes:
            return str(value).encode()

        def loads(self, data: bytes) -> str:
            if data == b"bad":
                raise ValueError("moody")
            return data.decode()

    return Moody()


class CollectionContract(Base):
    """Operations on many sessions."""

    # -- ids, all, length, clear -----------------------------------------------------------------------------------

    def test_ids_and_all_are_most_recently_used_first(self, store: Any) -> None:
        for sid in "abcdef":
            store.set(sid, {"id": sid}, owner="ada" if sid in "ac" else None)
        store.get("b")
        store.touch("a")
        store.peek("c")
        assert "d" in store
        assert store.update("e", {"new": 1})
        assert store.rename("f", "g")
        by_use = can(store, Capability.USE_ORDER)  # otherwise a read does not move b
        assert store.ids() == (["g", "e", "a", "b", "d", "c"] if by_use else ["g", "e", "a", "d", "c", "b"])
        assert list(store) == list(store.all()) == store.ids()
        store.set("c", {}, owner="ada")
        assert store.replace("d", {})
        assert store.ids() == ["d", "c", "g", "e", "a", "b"]

    def test_ids_and_length_include_the_expired(self, store: Any) -> None:
        store.set("a", {"x": 1})
        store.set("b", {}, ttl=0)
        kept = can(store, Capability.KEEPS_EXPIRED)
        assert store.ids() == (["b", "a"] if kept else ["a"])
        assert store.all() == {"a": {"x": 1}}
        assert store.length() == store.length(live=False) == len(store) == 1 + kept
        assert store.length(live=True) == 1

    def test_an_empty_store_is_true(self, store: Any) -> None:
        assert bool(store) is True
        assert (store.ids(), store.all(), store.length(), len(store)) == ([], {}, 0, 0)

    def test_an_unreadable_value_is_omitted_and_counted(self, make: Make) -> None:
        store = make(serializer=moody_serializer())
        store.set("a", {"mood": "good"})
        store.set("b", {"mood": "bad", "name": "ada"})
        assert store.all() == {"b": {"name": "ada"}, "a": {"mood": "good"}}
        assert store.stats().corrupt == 1
        assert store.get("b") == store.peek("b") == {"name": "ada"}
        assert (store.stats().hits, store.stats().misses, store.stats().corrupt) == (1, 0, 3)
        loaded = store.load("b")
        bad = store.codec.fields(loaded.payload)["mood"]
        assert store.codec.salvage(loaded.payload) == ({"name": "ada"}, {"mood"})
        assert store.update("b", {"name": "bob"})
        assert store.rename("b", "c", {"age": "36"})
        assert store.touch("c", {"cookie": "tea"})
        assert store.codec.fields(store.load("c").payload)["mood"] == bad  # it may be readable later
        assert store.update("c", {"mood": "better"}, delete=["cookie"])
        assert store.get("c") == {"mood": "better", "name": "bob", "age": "36"}

    def test_clear(self, store: Any) -> None:
        for number in range(200):
            store.set(str(number), {}, owner="ada" if number % 2 else None, ttl=60 * (number % 3))
        assert store.clear() is None
        stats = store.stats()
        there = 200 if can(store, Capability.KEEPS_EXPIRED) else 133
        assert (stats.sessions, stats.owned, stats.cleared, stats.destroyed) == (0, 0, there, 0)
        assert store.ids() == store.owned_by("ada") == []
        store.set("a", {"x": 1})
        assert store.all() == {"a": {"x": 1}}

    @needs(Capability.USE_ORDER)
    def test_clear_removes_the_sessions_that_existed_at_the_call(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose)
        store.set("a", {})
        store.set("b", {})
        store.set("c", {})
        with disposals.held("c", store.clear) as clear:
            assert store.add("new", {"x": 1})
            assert store.rename("a", "renamed")
            assert store.update("b", {"x": 1})
        clear()
        assert store.all() == {"new": {"x": 1}}
        assert sorted(sid for sid, _, _ in disposals.take()) == ["b", "c", "renamed"]

    # -- prune -----------------------------------------------------------------------------------------------------

    @needs(Capability.KEEPS_EXPIRED)
    def test_prune_removes_the_expired_and_keeps_the_order(self, store: Any) -> None:
        for number in range(100):
            store.set(str(number), {}, ttl=0 if number % 2 else 60, owner="ada" if number % 3 else None)
        store.get("50")
        before = [sid for sid in store.ids() if not int(sid) % 2]
        assert store.prune() == 50
        assert store.ids() == before
        assert store.prune() == 0
        assert (store.stats().expired, store.stats().destroyed, store.stats().gets) == (50, 0, 1)

    @needs(Capability.MAKES_ROOM)
    def test_a_prune_keeps_the_order_of_eviction(self, make: Make) -> None:
        store = make(max=3)
        for sid in "abc":
            store.set(sid, {})
        assert store.prune() == 0
        store.set("d", {})
        assert store.ids() == ["d", "c", "b"]

    @needs(Capability.KEEPS_EXPIRED)
    def test_concurrent_prunes_count_each_session_once(self, store: Any) -> None:
        for number in range(300):
            store.set(str(number), {}, ttl=60 * (number % 2))
        assert sum(at_once([store.prune] * 4)) == 150
        assert store.length() == 150

    @needs(Capability.KEEPS_EXPIRED)
    def test_the_automatic_prune(self, make: Make) -> None:
        store = make(check_period=0.02)
        store.set("a", {}, ttl=0)
        wait_until(lambda: store.length() == 0)
        store.stop_interval()
        store.stop_interval()
        time.sleep(0.05)  # a prune in progress is finished
        store.set("b", {}, ttl=0)
        time.sleep(0.1)
        assert store.length() == 1
        store.start_interval()  # the period of the options again
        wait_until(lambda: store.length() == 0)
        store.start_interval(timedelta(hours=1))  # replaces the previous period
        time.sleep(0.05)
        store.set("c", {}, ttl=0)
        time.sleep(0.1)
        assert store.length() == 1
        store.start_interval(0.02)
        wait_until(lambda: store.length() == 0)

    @needs(Capability.KEEPS_EXPIRED)
    def test_without_a_period_there_is_no_automatic_prune(self, make: Make) -> None:
        stores = [make(check_period=period) for period in (None, 0, timedelta(0))]
        for store in stores:
            store.start_interval()
            store.set("a", {}, ttl=0)
        time.sleep(0.1)
        assert [store.length() for store in stores] == [1, 1, 1]

    def test_a_period_must_be_a_duration(self, store: Any) -> None:
        for period in ("1", True, math.nan, [1], -1, timedelta(-1)):
            with pytest.raises((TypeError, ValueError), match="period"):
                store.start_interval(period)

    # -- owners ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("owner", ["o" * 257, "é" * 129, "o" * 5000, "\ud83d", "o" * 256 + "\udc80"])
    def test_an_owner_is_any_text(self, store: Any, owner: str) -> None:
        store.set("a", {}, owner=owner)
        store.set("b", {})
        assert store.update("b", {"x": 1}, owner=owner)
        assert store.rename("b", "c", owner=owner)
        store.set("d", {}, owner=owner + "x")
        assert sorted(store.owned_by(owner)) == ["a", "c"]
        assert store.load("a").owner == store.load("c").owner != store.load("d").owner
        assert store.owned_by(store.load("a").owner) == store.owned_by(owner)
        assert store.destroy_owned(owner, ["c"]) == 1
        assert store.owned_by(owner) == ["c"]
        assert store.owned_by(owner + "x") == ["d"]

    def test_owned_by(self, store: Any) -> None:
        for sid, owner in zip("abcde", ["ada", "bob", "ada", "é" * 128, None], strict=True):
            store.set(sid, {}, owner=owner)
        store.set("f", {}, owner="ada", ttl=0)
        assert store.owned_by("ada") == ["c", "a"]
        store.get("a")
        assert store.owned_by("ada") == (["a", "c"] if can(store, Capability.USE_ORDER) else ["c", "a"])
        assert store.owned_by("é" * 128) == ["d"]
        assert store.owned_by("nobody") == []
        assert store.stats().owned == (5 if can(store, Capability.KEEPS_EXPIRED) else 4)

    def test_destroy_owned(self, store: Any) -> None:
        keeps: list[Any] = [["b"], ("b", "missing"), {"b"}, iter(["b"]), (sid for sid in "b"), {"b": 1}.keys(), "b"]
        for keep in keeps:
            for sid in "abc":
                store.set(sid, {}, owner="ada")
            store.set("d", {}, owner="bob")
            assert store.destroy_owned("ada", keep=keep) == 2
            assert store.ids() == ["d", "b"]
        assert store.destroy_owned("ada") == 1
        assert store.destroy_owned("ada") == 0
        assert store.destroy_owned("nobody") == 0
        assert store.ids() == ["d"]

    def test_concurrent_destroy_owned_counts_each_session_once(self, store: Any) -> None:
        for number in range(20):
            store.set(str(number), {}, owner="ada")
        assert sum(at_once([partial(store.destroy_owned, "ada")] * 4)) == 20
        assert store.length() == 0
