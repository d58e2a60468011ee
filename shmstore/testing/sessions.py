"""The contract: one session, from `get` to `rename`."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import partial
from types import MappingProxyType
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from markupsafe import Markup
from msgspec import Raw

from shmstore.contract import KEEP, Capability
from shmstore.store.store import Store
from shmstore.testing.base import Base, at_once, can

IMPOSSIBLE_IDS: list[Any] = ["", None, 7, b"a", "x" * 257, "é" * 129, "\ud800", ("no",), ["no"], {}, 1.5]

EVERY_TYPE = {
    "none": None, "flag": True, "int": -1, "large": 2**70, "float": 0.1, "infinite": -math.inf, "text": "é\x00🐍",
    "bytes": b"\x00\xff", "list": [1, ["a"]], "tuple": (1, ("a", [()])), "set": {1, "a"}, "frozen": frozenset({(1, 2)}),
    "dict": {1: {"x": ()}, (2, 3): None, None: 4}, "decimal": Decimal("1.10"), "id": UUID(int=7),
    "markup": Markup("<b>"), "surrogate": "\ud83d", "\udce9": ["\udce9", ("\ud83d",)],
    "berlin": datetime(2026, 7, 2, 3, 4, 5, 6, ZoneInfo("Europe/Berlin")),
    "aware": datetime(2026, 1, 2, 3, 4, 5, 678901, UTC),
    "zoned": datetime(2026, 1, 2, 3, 4, 5, 6, timezone(timedelta(hours=-3, minutes=-30))),
    "naive": datetime(2026, 1, 2, 3, 4, 5, 678901), "date": date(2026, 1, 2), "time": time(3, 4, 5, 6),
    "span": timedelta(days=-1, microseconds=1), 7: "a key of another type", (1, "t"): "and another",
}  # fmt: skip


class SessionContract(Base):
    """What each method does with one session."""

    # -- get, peek, in ----------------------------------------------------------------------------------------------

    def test_get_returns_what_was_set(self, store: Any) -> None:
        store.set("a", EVERY_TYPE)
        got = store.get("a")
        assert got == store.peek("a") == EVERY_TYPE
        assert list(got) == list(EVERY_TYPE)
        assert [type(value) for value in got.values()] == [type(value) for value in EVERY_TYPE.values()]
        assert type(got["tuple"][1][1][0]) is tuple
        assert got["aware"].tzinfo is UTC
        assert got["berlin"].tzinfo is ZoneInfo("Europe/Berlin")
        assert got["zoned"].utcoffset() == timedelta(hours=-3, minutes=-30)

    def test_a_session_is_any_mapping_and_comes_back_as_a_dict(self, store: Any) -> None:
        for session in (UserDict(x=1), MappingProxyType({"x": 1})):
            store.set("a", session)
            assert store.update("a", UserDict(y=2))
            assert store.get("a") == {"x": 1, "y": 2}
            assert type(store.get("a")) is dict

    def test_a_missing_session_is_none(self, store: Any) -> None:
        assert store.get("nobody") is None
        assert store.peek("nobody") is None
        assert "nobody" not in store

    def test_an_empty_session_is_a_session(self, store: Any) -> None:
        store.set("a", {})
        assert store.get("a") == {}
        assert "a" in store

    def test_an_impossible_id_is_a_plain_miss_when_read_or_destroyed(self, store: Any) -> None:
        store.set("a", {})
        for sid in IMPOSSIBLE_IDS:
            assert store.get(sid) is None, sid
            assert store.peek(sid) is None, sid
            assert sid not in store, sid
            assert store.touch(sid) is False, sid
            assert store.destroy(sid) == 0, sid
            assert store.destroy([sid]) == 0, sid
        assert store.ids() == ["a"]

    def test_the_longest_id_and_strange_ids_work(self, store: Any) -> None:
        strange = ["x" * 256, "é" * 128, "🐍" * 64, "a b/../\x00\n", " ", "1", "None"]
        for sid in strange:
            store.set(sid, {"id": sid})
        assert store.all() == {sid: {"id": sid} for sid in strange}
        assert store.rename("1", "y" * 256)
        assert store.destroy(strange) == len(strange) - 1
        assert store.ids() == ["y" * 256]

    def test_get_returns_a_copy(self, store: Any) -> None:
        session = {"list": [1]}
        store.set("a", session)
        session["list"].append(2)
        store.get("a")["list"].append(3)
        assert store.get("a") == {"list": [1]}

    def test_only_get_counts_as_use(self, store: Any) -> None:
        for sid in "abc":
            store.set(sid, {})
        store.peek("a")
        assert "b" in store
        assert store.ids() == ["c", "b", "a"]
        assert store.stats().gets == 0
        store.get("a")
        assert store.ids() == (["a", "c", "b"] if can(store, Capability.USE_ORDER) else ["c", "b", "a"])
        assert store.stats().gets == 1

    # -- set, add, replace -----------------------------------------------------------------------------------------

    def test_set_overwrites_wholly_and_returns_nothing(self, store: Any) -> None:
        assert store.set("a", {"x": 1, "y": 2}) is None
        assert store.set("a", {"x": 3}) is None
        assert store.get("a") == {"x": 3}
        assert store.length() == 1

    def test_add_only_creates(self, store: Any) -> None:
        assert store.add("a", {"x": 1}) is True
        assert store.add("a", {"x": 2}, owner="ada") is False
        assert store.get("a") == {"x": 1}
        assert store.owned_by("ada") == []

    def test_replace_only_overwrites(self, store: Any) -> None:
        assert store.replace("a", {"x": 1}) is False
        assert store.length() == 0
        store.set("a", {"x": 1, "y": 1})
        assert store.replace("a", {"x": 2}) is True
        assert store.get("a") == {"x": 2}

    def test_a_write_without_an_owner_removes_the_owner(self, store: Any) -> None:
        writes: list[Callable[..., object]] = [store.set, store.replace, store.add]
        for write in writes:
            if write == store.add:
                store.destroy("a")
            write("a", {}, owner="ada")
            assert store.owned_by("ada") == ["a"]
            if write != store.add:
                write("a", {})
                assert store.owned_by("ada") == []

    def test_one_of_many_concurrent_adds_succeeds(self, store: Any) -> None:
        for sid in "abcd":
            added = at_once([partial(store.add, sid, {"n": number}) for number in range(4)])
            assert sorted(added) == [False, False, False, True]
            assert store.get(sid) == {"n": added.index(True)}

    def test_sessions_of_all_sizes(self, store: Any) -> None:
        for size in (0, 1, 50, 127, 128, 129, 1000, 5000, 20_000, 3):
            store.set("a", {"x": "y" * size})
            assert store.get("a") == {"x": "y" * size}

    # -- update ----------------------------------------------------------------------------------------------------

    def test_keys_that_are_equal_are_one_key(self, store: Any) -> None:
        """As in a dict, where the key that is there stays."""
        pairs: list[tuple[Any, Any]] = [
            ("name", Markup("name")), (Markup("name"), "name"), (1, True), (True, 1), (1, 1.0), (Decimal("1.0"), 1),
            ((1, "t"), (True, Markup("t"))),
        ]  # fmt: skip
        for there, given in pairs:
            store.set("a", {there: "old", "x": 1})
            assert store.update("a", {given: "new"})
            assert list(store.get("a").items()) == [(there, "new"), ("x", 1)]
            assert type(next(iter(store.get("a")))) is type(there)
            assert store.rename("a", "b", {given: "newer", "x": 2}, ttl=60, owner="ada")
            assert store.get("b") == {there: "newer", "x": 2}
            assert store.update("b", delete=[given])
            assert store.get("b") == {"x": 2}
            assert store.owned_by("ada") == ["b"]
            assert store.destroy("b") == 1

    def test_update_changes_only_what_it_names(self, store: Any) -> None:
        store.set("a", {"x": 1, "y": 2, "z": [3]})
        assert store.update("a", {"x": 10, "new": (1,)}, delete=["y", "not there"]) is True
        assert store.get("a") == {"x": 10, "z": [3], "new": (1,)}
        assert store.update("a", {"x": 11}, delete=["x", "new"]) is True
        assert store.get("a") == {"x": 11, "z": [3]}
        assert store.update("a") is True
        assert store.get("a") == {"x": 11, "z": [3]}

    def test_update_deletes_the_keys_of_any_iterable(self, store: Any) -> None:
        names: list[Any] = [("x", "y"), {"x", "y"}, {"x": 1, "y": 2}.keys(), iter(["x", "y"]), (name for name in "xy")]
        for delete in names:
            store.set("a", {"x": 1, "y": 2, "z": 3})
            assert store.update("a", {"new": 1}, delete)
            assert store.get("a") == {"z": 3, "new": 1}

    def test_update_never_restores_a_session(self, store: Any) -> None:
        assert store.update("a", {"x": 1}) is False
        store.set("a", {"x": 1})
        store.destroy("a")
        assert store.update("a", {"x": 2}) is False
        assert store.length() == 0

    def test_update_changes_the_stored_session_not_the_loaded_one(self, store: Any) -> None:
        store.set("a", {"x": 1, "y": 1})
        assert store.load("a") is not None
        store.set("a", {"x": 2})
        assert store.update("a", {"z": 3})
        assert store.get("a") == {"x": 2, "z": 3}
        assert store.load("a") is not None
        store.destroy("a")
        assert store.update("a", {"x": 4}) is False
        store.set("a", {"x": 5}, ttl=0)
        store.set("b", {"x": 6})
        assert store.load("b") is not None
        assert store.rename("b", "a", {"y": 7})
        assert store.update("b", {"x": 8}) is False
        assert store.get("a") == {"x": 6, "y": 7}

    def test_swap_changes_a_session_that_is_still_as_it_was_loaded(self, store: Any) -> None:
        for change in ({"x": 2}, {"x": "longer" * 100, "y": 1}):
            store.set("a", {"x": 1}, ttl=1000, owner="ada")
            created = store.load("a").created
            assert store.touch("a", ttl=500)  # a new deadline is not a change
            loaded = store.load("a")
            swapped = store.swap("a", loaded, store.codec.encode(change))
            assert swapped is (loaded.handle is not None)
            if swapped:
                after = store.load("a")
                assert (store.get("a"), after.owner) == (change, "ada")
                assert created <= after.created < 100
                assert 400 < after.remaining <= 500
                assert store.swap("a", after, store.codec.encode({"z": 3}), ttl=1000, owner=None)
                assert (store.get("a"), store.load("a").owner, store.owned_by("ada")) == ({"z": 3}, None, [])
                assert store.load("a").remaining > 500

    def test_swap_refuses_what_is_no_owner(self, store: Any) -> None:
        store.set("a", {"x": 1}, owner="ada")
        loaded = store.load("a")
        for owner in (5, b"ada", ["ada"], "") if loaded.handle is not None else ():
            with pytest.raises((TypeError, ValueError), match="an owner must"):
                store.swap("a", loaded, loaded.payload, owner=owner)
        assert store.load("a").owner == "ada"

    def test_swap_moves_a_session_to_another_id(self, store: Any) -> None:
        payload = store.codec.encode({"x": 2})
        for old, tombstone in (("a", False), ("A", True)):
            store.clear()
            store.set(old, {"x": 1}, ttl=500)
            store.set("b", {})
            assert store.swap(old, store.load(old), payload, new=old) is False
            assert store.swap(old, store.load(old), payload, new="b") is False
            assert store.all() == {"b": {}, old: {"x": 1}}
            store.destroy("b")
            loaded = store.load(old)
            if not store.swap(old, loaded, payload, owner="ada", new="b", tombstone=tombstone):
                assert store.all() == {old: {"x": 1}}  # the store cannot tell
                continue
            after = store.load("b")
            assert (store.all(), after.owner, store.owned_by("ada")) == ({"b": {"x": 2}}, "ada", ["b"])
            assert loaded.created <= after.created < 100
            assert 400 < after.remaining <= 500
            assert store.gone(old) is store.gone(old, renamed=True) is tombstone
            assert store.swap(old, loaded, payload, new="c") is False
            assert store.swap("b", after, payload, ttl=1000, new="c")
            assert (store.ids(), store.owned_by("ada"), store.gone("b")) == (["c"], ["c"], False)
            assert store.load("c").remaining > 500

    def test_swap_to_another_id_does_so_only_if_the_session_is_as_it_was_loaded(self, store: Any) -> None:
        store.set("a", {"x": 1})
        loaded = store.load("a")
        assert store.update("a", {"y": 1})
        assert store.swap("a", loaded, store.codec.encode({"x": 2}), owner="ada", new="b", tombstone=True) is False
        assert (store.all(), store.owned_by("ada"), store.gone("a")) == ({"a": {"x": 1, "y": 1}}, [], False)

    def test_swap_leaves_a_session_alone_that_was_changed_removed_or_replaced(self, store: Any) -> None:
        changes: list[Callable[[], Any]] = [
            lambda: store.update("a", {"y": 1}),
            lambda: store.set("a", {"x": 1}),
            lambda: store.destroy("a"),
            lambda: [store.destroy("a"), store.set("a", {"x": 1})],
            lambda: store.rename("a", "b"),
            lambda: [store.rename("a", "b"), store.set("a", {"x": 5})],
            lambda: store.touch("a", ttl=0),
            store.clear,
        ]
        for change in changes:
            store.clear()
            store.set("a", {"x": 1})
            loaded = store.load("a")
            change()
            before = store.all()
            assert store.swap("a", loaded, store.codec.encode({"x": 2})) is False
            assert store.all() == before

    def test_what_was_loaded_of_another_session_or_store_swaps_nothing(self, store: Any) -> None:
        for sid in "ab":
            store.set(sid, {"x": 1})
        payload = store.codec.encode({"x": 2})
        assert store.swap("b", store.load("a"), payload) is False
        assert store.swap("c", store.load("a"), payload) is False
        with Store(memory=2**20, check_period=None) as other:
            other.set("a", {"x": 3})
            assert store.swap("a", other.load("a"), payload) is False
            assert other.swap("a", store.load("a"), payload) is False
            assert other.all() == {"a": {"x": 3}}
        assert store.all() == {"a": {"x": 1}, "b": {"x": 1}}

    def test_a_copy_of_what_was_loaded_swaps_nothing(self, store: Any) -> None:
        store.set("a", {"x": 1})
        copied = copy.copy(store.load("a"))
        assert copied.payload == store.load("a").payload
        assert store.swap("a", copied, store.codec.encode({"x": 2})) is False
        assert store.get("a") == {"x": 1}

    def test_of_concurrent_swaps_one_succeeds(self, store: Any) -> None:
        store.set("a", {})
        loaded = store.load("a")
        payloads = [store.codec.encode({"winner": number}) for number in range(4)]
        results = at_once([partial(store.swap, "a", loaded, payload) for payload in payloads])
        assert sum(results) == (loaded.handle is not None)
        if any(results):
            assert store.get("a") == {"winner": results.index(True)}

    def test_a_session_may_come_encoded(self, store: Any) -> None:
        encoded = Raw(store.codec.encode({"x": (1,), "cookie": {"max_age": 100}}))
        store.set("a", encoded)
        assert store.get("a") == {"x": (1,), "cookie": {"max_age": 100}}
        assert store.load("a").remaining <= 100
        assert store.add("b", encoded, ttl=1000) is True
        assert store.add("b", encoded) is False
        assert store.replace("c", encoded) is False
        assert store.get("b") == store.get("a")

    def test_concurrent_updates_lose_nothing(self, store: Any) -> None:
        store.set("a", {})

        def update(key: str) -> bool:
            return all(store.update("a", {f"{key} {number}": number}) for number in range(10))

        assert all(at_once([partial(update, key) for key in "wxyz"]))
        assert store.get("a") == {f"{key} {number}": number for key in "wxyz" for number in range(10)}

    def test_update_can_change_the_owner(self, store: Any) -> None:
        store.set("a", {}, owner="bob")
        assert store.update("a", {"x": 1})
        assert store.owned_by("bob") == ["a"]
        assert store.update("a", owner="ada")
        assert (store.owned_by("ada"), store.owned_by("bob")) == (["a"], [])
        assert store.update("a", {"x": 2}, owner=KEEP)
        assert store.owned_by("ada") == ["a"]
        assert store.update("a", owner=None)
        assert store.owned_by("ada") == []
        assert store.get("a") == {"x": 2}

    # -- touch -----------------------------------------------------------------------------------------------------

    def test_touch_returns_whether_the_session_exists(self, store: Any) -> None:
        assert store.touch("a") is False
        assert store.touch("a", {"cookie": {"max_age": 5}}) is False
        store.set("a", {})
        assert store.touch("a") is True
        assert store.length() == 1

    def test_touch_with_a_session_replaces_only_its_cookie(self, store: Any) -> None:
        store.set("a", {"x": 1, "cookie": {"max_age": 60}}, owner="ada")
        assert store.touch("a", {"x": 99, "new": object(), "cookie": {"max_age": 30, "path": "/"}}) is True
        assert store.get("a") == {"x": 1, "cookie": {"max_age": 30, "path": "/"}}
        assert store.touch("a", {"x": 99}) is True
        assert store.get("a") == {"x": 1, "cookie": {"max_age": 30, "path": "/"}}
        assert store.owned_by("ada") == ["a"]

    def test_touch_does_not_overwrite_concurrent_updates(self, store: Any) -> None:
        store.set("a", {"n": 0})

        def touch() -> bool:
            return all(store.touch("a", {"cookie": {"max_age": 60}}) and store.touch("a") for _ in range(10))

        def update() -> bool:
            return all(store.update("a", {"n": number}) for number in range(1, 21))

        assert at_once([touch, update]) == [True, True]
        assert store.get("a") == {"n": 20, "cookie": {"max_age": 60}}

    # -- destroy, rename -------------------------------------------------------------------------------------------

    def test_destroy_one_and_many(self, store: Any) -> None:
        iterables: list[Any] = [["a", "b"], ("a", "b"), {"a", "b"}, {"a": 1, "b": 2}.keys(), (sid for sid in "ab")]
        for sids in [*iterables, iter(["a", "missing", "b", "a", None, 7])]:
            for sid in "abc":
                store.set(sid, {})
            assert store.destroy(sids) == 2
            assert store.ids() == ["c"]
        assert store.destroy("c") == 1
        assert store.destroy("c") == 0
        assert store.destroy([]) == 0
        assert store.length() == 0

    def test_a_str_is_one_id_not_an_iterable(self, store: Any) -> None:
        for sid in ("abc", "a", "b"):
            store.set(sid, {})
        assert store.destroy("abc") == 1
        assert store.ids() == ["b", "a"]

    def test_concurrent_destroys_count_each_session_once(self, store: Any) -> None:
        for sid in "abcd":
            store.set(sid, {})
            assert sorted(at_once([partial(store.destroy, sid)] * 4)) == [0, 0, 0, 1]
        assert store.stats().destroyed == 4

    def test_rename_moves_with_changes(self, store: Any) -> None:
        store.set("a", {"x": 1, "y": 2}, owner="ada")
        assert store.rename("a", "b", {"x": 3}, delete=(name for name in ["y"])) is True
        assert store.all() == {"b": {"x": 3}}
        assert store.owned_by("ada") == ["b"]
        assert store.rename("b", "c", owner="bob")
        assert (store.owned_by("ada"), store.owned_by("bob")) == ([], ["c"])
        assert store.rename("c", "d", owner=None)
        assert store.owned_by("bob") == []
        assert store.rename("d", "e", owner=KEEP)
        assert store.all() == {"e": {"x": 3}}

    def test_rename_changes_nothing_if_it_cannot(self, store: Any) -> None:
        assert store.rename("a", "b", {"x": 1}) is False
        store.set("a", {"x": 1})
        store.set("b", {"x": 2})
        assert store.rename("a", "b", {"x": 3}) is False
        assert store.rename("a", "a", {"x": 3}) is False
        assert store.rename("missing", "b") is False
        assert store.all() == {"a": {"x": 1}, "b": {"x": 2}}
        assert store.ids() == ["b", "a"]

    def test_one_of_many_concurrent_renames_succeeds(self, store: Any) -> None:
        for number in range(4):
            store.set("a", {"n": number})
            renamed = at_once([partial(store.rename, "a", f"{number} {new}") for new in range(4)])
            assert sorted(renamed) == [False, False, False, True]
            assert "a" not in store
            assert store.get(f"{number} {renamed.index(True)}") == {"n": number}
        assert store.length() == 4
