"""The contract as a test suite, for our own stores and for anybody's.

    class TestMyStore(StoreContract):
        def make_store(self, **options):
            return MyStore(**options)

Needs pytest. The suite never asks which store it runs on. Each test makes its own store and closes it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmstore.errors import ConfigError, RecordTooLarge, SerializationError, ShmStoreError
from shmstore.store import KEEP

__all__ = ["StoreContract"]

SHORT = 0.05  # seconds; a life that a test waits for


class StoreContract:
    """What every store keeps. Inherit it and say in `make_store` how to make one."""

    def make_store(self, **options: Any) -> Any:
        """Return a new, empty store with these options; the suite closes it."""
        raise NotImplementedError

    @pytest.fixture
    def make(self) -> Iterator[Callable[..., Any]]:
        """A function that makes stores, exact in their order of use unless told otherwise."""
        stores = []

        def make(**options: Any) -> Any:
            stores.append(self.make_store(**{"memory": 2**18, "recency": 0, "check_period": None} | options))
            return stores[-1]

        yield make
        for store in stores:
            store.close()

    @pytest.fixture
    def store(self, make: Callable[..., Any]) -> Any:
        """One store with nothing special about it."""
        return make()

    # -- get, peek, in ----------------------------------------------------------------------------------------------

    def test_what_is_set_is_got(self, store: Any) -> None:
        session = {"user": "ada", "cart": [{"id": 1, "tags": ("a", "b")}], "n": 2**70, "none": None}
        store.set("a", session)
        assert store.get("a") == session
        assert type(store.get("a")["cart"][0]["tags"]) is tuple

    def test_a_missing_session_is_none(self, store: Any) -> None:
        assert store.get("nobody") is None
        assert store.peek("nobody") is None
        assert "nobody" not in store

    @pytest.mark.parametrize("sid", ["", None, 7, b"a", "x" * 257, "é" * 129, "\ud800", ("a",), ["a"], {}])
    def test_an_impossible_id_is_a_plain_miss_when_read(self, store: Any, sid: Any) -> None:
        assert store.get(sid) is None
        assert store.peek(sid) is None
        assert sid not in store
        assert store.touch(sid) is False
        assert store.destroy(sid) == 0

    @pytest.mark.parametrize("sid", ["", None, 7, b"a", "x" * 257, "é" * 129, "\ud800"])
    def test_an_impossible_id_is_an_error_when_written(self, store: Any, sid: Any) -> None:
        expected = ValueError if isinstance(sid, str) else TypeError
        for write in (store.set, store.add, store.replace):
            with pytest.raises(expected):
                write(sid, {"a": 1})
        with pytest.raises(expected):
            store.update(sid, {"a": 1})
        store.set("there", {})
        with pytest.raises(expected):
            store.rename("there", sid)
        assert store.ids() == ["there"]

    def test_the_longest_id_and_strange_ids_work(self, store: Any) -> None:
        for sid in ("x" * 256, "é" * 128, "a b/../\x00\n", "🐍", "1"):
            store.set(sid, {"id": sid})
            assert store.get(sid) == {"id": sid}
        assert store.length() == 5

    def test_a_session_got_is_a_copy(self, store: Any) -> None:
        store.set("a", {"list": [1]})
        store.get("a")["list"].append(2)
        assert store.get("a") == {"list": [1]}

    def test_get_does_not_extend_a_life(self, store: Any) -> None:
        store.set("a", {}, ttl=SHORT)
        end = time.monotonic() + 10
        while store.get("a") is not None:
            assert time.monotonic() < end

    # -- set, add, replace -----------------------------------------------------------------------------------------

    def test_set_overwrites_wholly(self, store: Any) -> None:
        store.set("a", {"x": 1, "y": 2})
        store.set("a", {"x": 3})
        assert store.get("a") == {"x": 3}
        assert store.length() == 1

    def test_set_without_owner_has_no_owner(self, store: Any) -> None:
        store.set("a", {}, owner="ada")
        store.set("a", {})
        assert store.owned_by("ada") == []

    def test_add_only_creates(self, store: Any) -> None:
        assert store.add("a", {"x": 1}) is True
        assert store.add("a", {"x": 2}) is False
        assert store.get("a") == {"x": 1}

    def test_add_takes_the_place_of_an_expired_session(self, store: Any) -> None:
        store.set("a", {"x": 1}, ttl=0)
        assert store.add("a", {"x": 2}) is True
        assert store.get("a") == {"x": 2}
        assert store.stats().expired == 1

    def test_replace_only_overwrites(self, store: Any) -> None:
        assert store.replace("a", {"x": 1}) is False
        assert store.length() == 0
        store.set("a", {"x": 1})
        assert store.replace("a", {"x": 2}) is True
        assert store.get("a") == {"x": 2}
        store.set("a", {"x": 3}, ttl=-1)
        assert store.replace("a", {"x": 4}) is False

    @pytest.mark.parametrize("session", [None, 1, "text", ["list"], b""])
    def test_a_session_must_be_a_mapping(self, store: Any, session: Any) -> None:
        with pytest.raises(TypeError):
            store.set("a", session)
        assert "a" not in store

    def test_a_value_that_cannot_be_stored_leaves_the_old_session(self, store: Any) -> None:
        store.set("a", {"x": 1})
        writes: list[Callable[[], object]] = [
            lambda: store.set("a", {"cart": [1, {"price": object()}]}),
            lambda: store.update("a", {"cart": [1, {"price": object()}]}),
            lambda: store.rename("a", "b", {"cart": [1, {"price": object()}]}),
        ]
        for write in writes:
            with pytest.raises(SerializationError, match=r"cart.*price.*object"):
                write()
        assert store.get("a") == {"x": 1}
        assert "b" not in store

    def test_a_session_that_is_too_large_leaves_the_old_one(self, make: Callable[..., Any]) -> None:
        store = make(max_session=1000)
        store.set("a", {"x": "y" * 900})
        writes: list[Callable[[], object]] = [
            lambda: store.set("a", {"x": "y" * 1001}),
            lambda: store.add("b", {"x": "y" * 1001}),
            lambda: store.update("a", {"z": "y" * 101}),
        ]
        for write in writes:
            with pytest.raises(RecordTooLarge, match="max_session"):
                write()
        assert store.all() == {"a": {"x": "y" * 900}}

    def test_sessions_of_all_sizes(self, store: Any) -> None:
        for size in (0, 1, 50, 127, 128, 129, 1000, 5000, 20_000, 3):
            store.set("a", {"x": "y" * size})
            assert store.get("a") == {"x": "y" * size}

    # -- update ----------------------------------------------------------------------------------------------------

    def test_update_changes_only_what_it_names(self, store: Any) -> None:
        store.set("a", {"x": 1, "y": 2, "z": [3]})
        assert store.update("a", {"x": 10, "new": (1,)}, delete=["y", "not there"]) is True
        assert store.get("a") == {"x": 10, "z": [3], "new": (1,)}

    def test_update_never_brings_a_session_back(self, store: Any) -> None:
        assert store.update("a", {"x": 1}) is False
        store.set("b", {"x": 1}, ttl=0)
        assert store.update("b", {"x": 2}) is False
        store.set("c", {"x": 1})
        store.destroy("c")
        assert store.update("c", {"x": 2}) is False
        assert store.all() == {}

    def test_update_keeps_deadline_and_owner(self, store: Any) -> None:
        store.set("a", {"x": 1}, ttl=SHORT, owner="ada")
        assert store.update("a", {"x": 2})
        assert store.owned_by("ada") == ["a"]
        wait_until(lambda: "a" not in store)

    def test_update_with_a_ttl_sets_the_deadline(self, store: Any) -> None:
        store.set("a", {"x": 1}, ttl=SHORT)
        assert store.update("a", {"x": 2}, ttl=60)
        time.sleep(2 * SHORT)
        assert store.get("a") == {"x": 2}
        assert store.update("a", {"x": 3}, ttl=0)
        assert store.get("a") is None

    def test_update_can_change_the_owner(self, store: Any) -> None:
        store.set("a", {})
        assert store.update("a", owner="ada")
        assert store.owned_by("ada") == ["a"]
        assert store.update("a", {"x": 1}, owner=KEEP)
        assert store.owned_by("ada") == ["a"]
        assert store.update("a", owner=None)
        assert store.owned_by("ada") == []
        assert store.get("a") == {"x": 1}

    # -- touch -----------------------------------------------------------------------------------------------------

    def test_touch_renews_the_life_and_nothing_else(self, make: Callable[..., Any]) -> None:
        store = make(ttl=60)
        store.set("a", {"x": 1}, ttl=SHORT)
        assert store.touch("a") is True
        time.sleep(2 * SHORT)
        assert store.get("a") == {"x": 1}

    def test_touch_says_whether_the_session_was_there(self, store: Any) -> None:
        assert store.touch("a") is False
        store.set("a", {}, ttl=0)
        assert store.touch("a") is False
        assert store.touch("a", {"cookie": {"max_age": 5}}) is False
        assert "a" not in store

    def test_touch_with_a_session_replaces_only_its_cookie(self, store: Any) -> None:
        store.set("a", {"x": 1, "cookie": {"max_age": 60}})
        assert store.touch("a", {"x": 99, "cookie": {"max_age": 30, "path": "/"}})
        assert store.get("a") == {"x": 1, "cookie": {"max_age": 30, "path": "/"}}

    def test_touch_with_a_ttl(self, store: Any) -> None:
        store.set("a", {"x": 1})
        assert store.touch("a", ttl=-1)
        assert "a" not in store

    # -- the ttl rule ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ttl", [0, -1, 0.0, -0.5, timedelta(0), timedelta(seconds=-1), -math.inf])
    def test_zero_and_less_is_stored_expired(self, store: Any, ttl: Any) -> None:
        store.set("a", {"x": 1}, ttl=ttl)
        assert store.get("a") is None
        assert store.length() == 1
        assert store.prune() == 1
        assert store.length() == 0

    @pytest.mark.parametrize("ttl", [60, 0.5, timedelta(minutes=1), math.inf, 10**30])
    def test_more_than_zero_lives(self, store: Any, ttl: Any) -> None:
        store.set("a", {"x": 1}, ttl=ttl)
        assert store.get("a") == {"x": 1}
        assert store.prune() == 0

    @pytest.mark.parametrize("ttl", ["60", True, math.nan, [60], b"", object()])
    def test_any_other_ttl_is_an_error_and_stores_nothing(self, store: Any, ttl: Any) -> None:
        store.set("a", {"x": 1})
        writes: list[Callable[[], object]] = [
            lambda: store.set("a", {"x": 2}, ttl=ttl),
            lambda: store.add("b", {"x": 2}, ttl=ttl),
            lambda: store.update("a", {"x": 2}, ttl=ttl),
            lambda: store.touch("a", ttl=ttl),
        ]
        for write in writes:
            with pytest.raises((TypeError, ValueError)):
                write()
        assert store.all() == {"a": {"x": 1}}

    def test_the_ttl_of_the_store(self, make: Callable[..., Any]) -> None:
        for ttl in (0, timedelta(seconds=-1)):
            store = make(ttl=ttl)
            store.set("a", {"cookie": {"max_age": 60}})
            assert "a" not in store
            store.set("a", {}, ttl=60)
            assert "a" in store

    def test_the_ttl_of_the_cookie(self, store: Any) -> None:
        store.set("a", {"cookie": {"max_age": 0}})
        store.set("b", {"cookie": {"max_age": 60}})
        store.set("c", {"cookie": {"max_age": None}})
        store.set("d", {"cookie": {"max_age": "0"}})
        store.set("e", {"cookie": "0"})
        assert sorted(store.all()) == ["b", "c", "d", "e"]
        assert store.touch("b", {"cookie": {"max_age": 0}})
        assert "b" not in store

    def test_touch_follows_the_stored_cookie(self, store: Any) -> None:
        store.set("a", {"cookie": {"max_age": 0}}, ttl=60)
        assert store.touch("a")
        assert "a" not in store

    # -- destroy, rename -------------------------------------------------------------------------------------------

    def test_destroy_one_and_many(self, store: Any) -> None:
        for sid in "abcd":
            store.set(sid, {})
        assert store.destroy("a") == 1
        assert store.destroy("a") == 0
        assert store.destroy(["b", "missing", "c", "c", None]) == 2
        assert store.destroy(sid for sid in ["d"]) == 1
        assert store.ids() == []

    def test_destroy_removes_an_expired_session_and_counts_none(self, store: Any) -> None:
        store.set("a", {}, ttl=0)
        assert store.destroy("a") == 0
        assert store.length() == 0

    def test_rename_moves_with_changes(self, store: Any) -> None:
        store.set("a", {"x": 1, "y": 2}, owner="ada")
        assert store.rename("a", "b", {"x": 3}, delete=["y"]) is True
        assert store.all() == {"b": {"x": 3}}
        assert store.owned_by("ada") == ["b"]

    def test_rename_can_change_owner_and_life(self, store: Any) -> None:
        store.set("a", {"x": 1}, ttl=SHORT)
        assert store.rename("a", "b", ttl=60, owner="ada")
        time.sleep(2 * SHORT)
        assert store.get("b") == {"x": 1}
        assert store.owned_by("ada") == ["b"]

    def test_rename_changes_nothing_if_it_cannot(self, store: Any) -> None:
        assert store.rename("a", "b", {"x": 1}) is False
        store.set("a", {"x": 1})
        store.set("b", {"x": 2})
        assert store.rename("a", "b", {"x": 3}) is False
        assert store.rename("a", "a", {"x": 3}) is False
        assert store.all() == {"a": {"x": 1}, "b": {"x": 2}}
        store.set("a", {"x": 1}, ttl=0)
        assert store.rename("a", "c") is False
        assert "c" not in store

    def test_rename_onto_an_expired_session(self, store: Any) -> None:
        store.set("a", {"x": 1})
        store.set("b", {"x": 2}, ttl=0)
        assert store.rename("a", "b") is True
        assert store.all() == {"b": {"x": 1}}
        assert store.length() == 1

    # -- all of them -----------------------------------------------------------------------------------------------

    def test_ids_and_all_are_most_recently_used_first(self, store: Any) -> None:
        for sid in "abcd":
            store.set(sid, {"id": sid}, owner="ada" if sid in "ac" else None)
        store.get("b")
        store.touch("a")
        store.peek("c")
        assert "d" in store
        assert store.ids() == ["a", "b", "d", "c"]
        assert list(store.all()) == ["a", "b", "d", "c"]

    def test_ids_and_length_include_the_expired(self, store: Any) -> None:
        store.set("a", {})
        store.set("b", {}, ttl=0)
        assert store.ids() == ["b", "a"]
        assert store.all() == {"a": {}}
        assert store.length() == len(store) == 2
        assert store.length(live=True) == 1

    def test_clear(self, store: Any) -> None:
        for number in range(200):
            store.set(str(number), {}, owner="ada" if number % 2 else None, ttl=number % 3)
        store.clear()
        assert store.length() == 0
        assert store.ids() == []
        store.set("a", {"x": 1})
        assert store.all() == {"a": {"x": 1}}

    def test_an_empty_store_is_true(self, store: Any) -> None:
        assert store
        assert len(store) == 0

    # -- prune -----------------------------------------------------------------------------------------------------

    def test_prune_removes_the_expired_and_keeps_the_order(self, store: Any) -> None:
        for number in range(10):
            store.set(str(number), {}, ttl=0 if number % 2 else 60)
        before = [sid for sid in store.ids() if not int(sid) % 2]
        assert store.prune() == 5
        assert store.ids() == before
        assert store.prune() == 0
        assert store.stats().expired == 5

    def test_the_least_recently_used_goes_first_after_a_prune(self, make: Callable[..., Any]) -> None:
        store = make(max=3)
        for sid in "abc":
            store.set(sid, {})
        store.prune()
        store.set("d", {})
        assert store.ids() == ["d", "c", "b"]

    def test_the_automatic_prune(self, make: Callable[..., Any]) -> None:
        store = make(check_period=0.02)
        store.set("a", {}, ttl=0)
        wait_until(lambda: store.length() == 0)
        store.stop_interval()
        time.sleep(0.1)
        store.set("b", {}, ttl=0)
        time.sleep(0.1)
        assert store.length() == 1
        store.start_interval(0.02)
        wait_until(lambda: store.length() == 0)
        store.start_interval(timedelta(hours=1))
        time.sleep(0.1)
        store.set("c", {}, ttl=0)
        time.sleep(0.1)
        assert store.length() == 1

    # -- owners ----------------------------------------------------------------------------------------------------

    def test_owned_by(self, store: Any) -> None:
        store.set("a", {}, owner="ada")
        store.set("b", {}, owner="bob")
        store.set("c", {}, owner="ada")
        store.set("d", {}, owner="ada", ttl=0)
        store.set("e", {})
        assert store.owned_by("ada") == ["c", "a"]
        store.get("a")
        assert store.owned_by("ada") == ["a", "c"]
        assert store.owned_by("nobody") == []
        assert store.stats().owned == 4

    def test_destroy_owned(self, store: Any) -> None:
        for sid in "abc":
            store.set(sid, {}, owner="ada")
        store.set("d", {}, owner="bob")
        assert store.destroy_owned("ada", keep=["b"]) == 2
        assert store.ids() == ["d", "b"]
        assert store.destroy_owned("ada") == 1
        assert store.destroy_owned("ada") == 0

    @pytest.mark.parametrize("owner", [7, b"ada", "", "x" * 257])
    def test_an_impossible_owner_is_an_error(self, store: Any, owner: Any) -> None:
        with pytest.raises(ValueError if isinstance(owner, str) else TypeError):
            store.set("a", {}, owner=owner)
        assert "a" not in store

    # -- policy ----------------------------------------------------------------------------------------------------

    def test_the_least_recently_used_is_evicted(self, make: Callable[..., Any]) -> None:
        store = make(max=3)
        for sid in "abc":
            store.set(sid, {})
        store.get("a")
        store.set("d", {})
        assert store.ids() == ["d", "a", "c"]
        assert store.stats().evicted == 1

    def test_overwriting_evicts_nobody(self, make: Callable[..., Any]) -> None:
        store = make(max=2)
        store.set("a", {})
        store.set("b", {})
        store.set("a", {"x": 1})
        assert store.update("b", {"x": 1})
        assert store.rename("b", "c")
        assert store.ids() == ["c", "a"]

    def test_the_expired_go_before_the_living(self, make: Callable[..., Any]) -> None:
        store = make(max=3)
        store.set("a", {})
        store.set("b", {})
        store.set("c", {}, ttl=0)
        store.set("d", {})
        assert store.ids() == ["d", "b", "a"]
        assert (store.stats().evicted, store.stats().expired) == (0, 1)

    def test_sessions_with_an_owner_go_last(self, make: Callable[..., Any]) -> None:
        store = make(max=4)
        store.set("ada", {}, owner="ada")
        store.set("bob", {}, owner="bob")
        for number in range(20):
            store.set(f"visitor {number}", {})
        assert store.ids() == ["visitor 19", "visitor 18", "bob", "ada"]
        for number in range(3):
            store.set(f"user {number}", {}, owner=str(number))
        assert store.ids() == ["user 2", "user 1", "user 0", "bob"]
        assert store.stats().evicted == 18 + 2 + 1

    def test_memory_is_never_too_full_for_one_more(self, make: Callable[..., Any]) -> None:
        store = make(memory=2**17)
        for number in range(300):
            size = (10, 500, 5000, 15_000)[number % 4]
            store.set(str(number), {"x": "y" * size})
            assert store.get(str(number)) == {"x": "y" * size}
        assert store.stats().evicted > 0
        assert store.stats().bytes <= store.stats().memory

    # -- dispose, stale and the limits -----------------------------------------------------------------------------

    @pytest.fixture
    def disposals(self, tmp_path: Path) -> Disposals:
        """What dispose was called with; in a file, because it runs in the process that owns the store."""
        return Disposals(tmp_path / "disposals")

    def test_dispose_is_called_with_the_reason(self, make: Callable[..., Any], disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, max=3)
        store.set("a", {"n": 1})
        store.set("a", {"n": 2})
        assert disposals.take() == [["a", {"n": 1}, "set"]]
        store.destroy(["a", "missing"])
        assert disposals.take() == [["a", {"n": 2}, "destroy"]]
        for sid in "bcde":
            store.set(sid, {"id": sid})
        assert disposals.take() == [["b", {"id": "b"}, "evict"]]
        store.touch("c", ttl=-1)
        assert store.prune() == 1
        assert disposals.take() == [["c", {"id": "c"}, "expire"]]
        store.clear()
        assert sorted(disposals.take()) == [["d", {"id": "d"}, "clear"], ["e", {"id": "e"}, "clear"]]
        assert store.length() == 0

    def test_dispose_of_an_expired_session_that_is_replaced_or_destroyed(
        self, make: Callable[..., Any], disposals: Disposals
    ) -> None:
        store = make(dispose=disposals.dispose)
        for sid in "abc":
            store.set(sid, {}, ttl=0)
        assert store.add("a", {"new": 1})
        assert store.destroy("b") == 0
        store.set("d", {"x": 1})
        assert store.rename("d", "c")
        assert disposals.take() == [[sid, {}, "expire"] for sid in "abc"]
        assert store.ids() == ["c", "a"]

    def test_dispose_is_not_called_for_what_stays(self, make: Callable[..., Any], disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose)
        store.set("a", {"n": 1})
        assert store.update("a", {"n": 2})
        assert store.touch("a")
        assert store.touch("a", {"cookie": {"max_age": 60}})
        assert store.rename("a", "b")
        assert store.get("b") == {"n": 2, "cookie": {"max_age": 60}}
        assert store.add("b", {}) is False
        assert store.replace("a", {}) is False
        assert store.destroy("a") == 0
        assert store.prune() == 0
        assert disposals.take() == []

    def test_dispose_may_be_left_out_when_a_session_is_overwritten(
        self, make: Callable[..., Any], disposals: Disposals
    ) -> None:
        store = make(dispose=disposals.dispose, no_dispose_on_set=True)
        store.set("a", {"n": 1})
        store.set("a", {"n": 2})
        assert disposals.take() == []
        store.clear()
        assert disposals.take() == [["a", {"n": 2}, "clear"]]

    def test_overwriting_and_evicting_at_once_dispose_of_both_once(
        self, make: Callable[..., Any], disposals: Disposals
    ) -> None:
        store = make(dispose=disposals.dispose, memory=2**17)
        number = 0
        while not disposals.take():
            store.set(f"s{number}", {"x": "y" * 5000})
            number += 1
        before = set(store.ids())
        newest = store.ids()[0]
        store.set(newest, {"x": "y" * 15_000})
        gone = before - set(store.ids())
        assert len(gone) >= 2
        taken = disposals.take()
        assert sorted((sid, reason) for sid, _, reason in taken) == sorted(
            [(newest, "set"), *((sid, "evict") for sid in gone)]
        )

    def test_an_exception_in_dispose_stops_nothing(self, make: Callable[..., Any]) -> None:
        def dispose(sid: str, session: Any, reason: str) -> None:
            raise ZeroDivisionError(sid)

        store = make(dispose=dispose)
        store.set("a", {"n": 1})
        store.set("a", {"n": 2})
        assert store.destroy("a") == 1
        assert store.length() == 0
        assert store.stats().dispose_errors == 2

    def test_a_stale_session_is_handed_out_once(self, make: Callable[..., Any]) -> None:
        store = make(stale=True)
        store.set("a", {"n": 1}, ttl=0)
        assert store.peek("a") is None
        assert "a" not in store
        assert store.get("a") == {"n": 1}
        assert store.get("a") is None
        assert store.length() == 0
        store.set("b", {"n": 2}, ttl=60)
        assert store.get("b") == store.get("b") == {"n": 2}
        assert store.get("missing") is None

    def test_a_stale_session_is_disposed_of(self, make: Callable[..., Any], disposals: Disposals) -> None:
        store = make(stale=True, dispose=disposals.dispose)
        store.set("a", {"n": 1}, ttl=0)
        assert store.get("a") == {"n": 1}
        assert store.get("a") is None
        assert disposals.take() == [["a", {"n": 1}, "expire"]]

    def test_length_weighs_sessions(self, make: Callable[..., Any]) -> None:
        store = make(max=1000, length=lambda size, sid: size)
        for sid in "abcd":
            store.set(sid, {"x": "y" * 300})
        assert store.ids() == ["d", "c", "b"]
        store.update("d", {"x": "y" * 600})
        assert store.ids() == ["d", "c"]
        store.set("d", {})
        store.set("e", {"x": "y" * 300})
        assert store.ids() == ["e", "d", "c"]
        with pytest.raises(RecordTooLarge, match="max"):
            store.set("f", {"x": "y" * 1000})
        assert store.ids() == ["e", "d", "c"]

    @pytest.mark.parametrize("result", [None, -1, 1.5, "1"])
    def test_a_length_that_returns_nonsense_stores_nothing(self, make: Callable[..., Any], result: Any) -> None:
        store = make(max=10, length=lambda size, sid: result)
        with pytest.raises(ValueError, match="length"):
            store.set("a", {})
        assert store.ids() == []

    def test_an_owner_has_at_most_so_many_sessions(self, make: Callable[..., Any], disposals: Disposals) -> None:
        store = make(max_per_owner=2, dispose=disposals.dispose)
        for sid in "abc":
            store.set(sid, {"id": sid}, owner="ada")
        store.set("x", {}, owner="bob")
        store.set("y", {})
        assert store.owned_by("ada") == ["c", "b"]
        assert disposals.take() == [["a", {"id": "a"}, "evict"]]
        store.get("b")
        assert store.update("y", owner="ada")
        assert store.owned_by("ada") == ["y", "b"]
        assert store.update("y", {"again": 1}, owner="ada")
        assert store.rename("y", "z", owner="ada")
        assert store.owned_by("ada") == ["z", "b"]
        assert store.owned_by("bob") == ["x"]

    # -- the store itself ------------------------------------------------------------------------------------------

    def test_stats(self, store: Any) -> None:
        store.set("a", {"x": 1})
        store.set("b", {"x": 1}, owner="bob")
        store.get("a")
        store.get("b")
        store.get("missing")
        store.peek("a")
        store.touch("a")
        store.destroy("b")
        stats = store.stats()
        assert (stats.sessions, stats.owned) == (1, 0)
        assert (stats.gets, stats.hits, stats.misses) == (3, 2, 1)
        assert (stats.sets, stats.touches, stats.destroyed) == (2, 1, 1)
        assert (stats.expired, stats.evicted) == (0, 0)
        assert 0 < stats.bytes < stats.memory
        assert stats.server_pid > 0
        assert stats.server_uptime >= 0
        with pytest.raises(AttributeError):
            stats.sessions = 5

    def test_ping(self, store: Any) -> None:
        assert store.ping() is True

    def test_options_can_be_read(self, make: Callable[..., Any]) -> None:
        store = make(max=7, ttl=timedelta(minutes=5))
        assert store.options.max == 7
        assert store.options.ttl == timedelta(minutes=5)

    def test_a_closed_store_says_so(self, make: Callable[..., Any]) -> None:
        store = make()
        store.set("a", {})
        store.close()
        store.close()
        with pytest.raises(ShmStoreError, match="closed"):
            store.get("a")
        with pytest.raises(ShmStoreError, match="closed"):
            store.set("a", {})

    def test_a_store_is_a_context_manager(self, make: Callable[..., Any]) -> None:
        with make() as store:
            store.set("a", {"x": 1})
        with pytest.raises(ShmStoreError):
            store.get("a")

    @pytest.mark.parametrize(
        "options",
        [
            {"maximum": 3}, {"max": 0}, {"max": -1}, {"max": 2.5}, {"max": True}, {"max": "3"},
            {"memory": 10}, {"memory": "64M"}, {"memory": 2**18, "max_session": 2**18}, {"max_session": 0},
            {"ttl": "60"}, {"ttl": True}, {"ttl": math.nan}, {"check_period": -1}, {"check_period": "1m"},
            {"recency": -1}, {"lock_timeout": "2"}, {"persist": 1}, {"serializer": 7}, {"directory": 3},
            {"stale": 1}, {"dispose": 7}, {"length": 7}, {"max_per_owner": 0}, {"no_dispose_on_set": "yes"},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_wrong_option_is_a_clear_error(self, make: Callable[..., Any], options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(reversed(options))):
            make(**options)


class Disposals:
    """A dispose that writes down its calls."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def dispose(self) -> Callable[[str, Any, str], None]:
        """The function; by value it goes to any process."""
        path = str(self.path)

        def dispose(sid: str, session: Any, reason: str) -> None:
            import json

            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps([sid, session, reason]) + "\n")

        return dispose

    def take(self) -> list[list[Any]]:
        """Return the calls since the last time."""
        if not self.path.exists():
            return []
        calls = [json.loads(line) for line in self.path.read_text().splitlines()]
        self.path.unlink()
        return calls


def wait_until(condition: Callable[[], object], timeout: float = 20) -> None:
    """Wait for a condition instead of a time; fail if it does not come true within ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.005)
