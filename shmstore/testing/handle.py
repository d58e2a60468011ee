"""The contract: the store itself, with its figures, its options and its end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest

from shmstore.contract import Capability
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.testing.base import Base, Make, can, needs

WRONG_OPTIONS: list[tuple[str, list[Any], str]] = [
    ("max", [0, -1, 2.5, True, "3", math.inf], "whole number from 1 "),
    ("memory", [10, 2**16 - 1, "64X", "1K", 2.0**20, None, True], "whole number from 65536 |number of bytes"),
    ("max_session", [0, 2**18, 1.5, "1X", True], "whole number from 1 |raise memory|number of bytes"),
    ("ttl", ["60", True, math.nan, [60], b""], "seconds|NaN"),
    ("check_period", [-1, "1m", True, math.nan, timedelta(-1)], "seconds|NaN"),
    ("dispose", [7, "print", True], "a function"),
    ("stale", [1, None, "yes"], "True or False"),
    ("no_dispose_on_set", [1, None, "yes"], "True or False"),
    ("length", [7, "len", True], "a function"),
    ("max_per_owner", [0, -1, 1.5, True, "3"], "whole number from 1 "),
    ("serializer", [7, "json", object()], r"dumps\(value\) and loads\(bytes\)"),
    ("recency", [-1, "1", None, True, math.nan], "seconds|NaN"),
    ("lock_timeout", [-1, "2", None, True, math.nan], "seconds|NaN"),
    ("persist", [1, None, "yes"], "True or False"),
    ("directory", [3, True, ["/tmp"]], "a path"),  # noqa: S108
]


class HandleContract(Base):
    """Figures, options, opening and closing of a store."""

    @needs(Capability.MAKES_ROOM, Capability.SHARED_FIGURES)
    def test_stats_are_exact(self, make: Make) -> None:
        def dispose(sid: str, session: Any, reason: str) -> None:
            if sid == "a":
                raise ZeroDivisionError

        store = make(max=4, dispose=dispose)
        zeros = asdict(store.stats())
        assert zeros.pop("memory") > 0
        assert zeros.pop("server_pid") > 0
        assert zeros.pop("server_uptime") >= 0
        assert zeros.pop("snapshot_age") is None
        engine = zeros.pop("engine")
        assert set(zeros.values()) == {0}

        store.set("a", {"x": 1})
        store.set("a", {"x": 2}, owner="ada")  # dispose fails
        assert store.add("b", {}, owner="bob")
        assert store.replace("b", {}, owner="bob")
        assert store.update("b", {"x": 1})
        assert store.rename("b", "c")  # 6 sets
        assert store.touch("c")
        assert store.touch("c", {"cookie": {}})  # 2 touches
        for sid in ("a", "c", "c", "missing", ""):
            store.get(sid)  # 3 hits, 2 misses
        store.peek("a")
        assert "a" in store
        assert store.add("a", {}) is store.replace("no", {}) is store.update("no") is store.rename("no", "b") is False
        assert store.touch("no") is False
        assert store.destroy("no") == 0
        store.set("d", {}, ttl=0)  # 7
        assert store.prune() == 1
        store.set("e", {}, ttl=0, owner="eve")  # 8
        assert store.destroy("e") == 0  # 2 expired
        for number in range(4):
            store.set(f"visitor {number}", {})  # 12; the last two evict the first two
        for number in range(4):
            store.set(f"user {number}", {}, owner="u")  # 16; they evict the visitors, then a (dispose fails) and c
        stats = asdict(store.stats())
        used = stats.pop("bytes")
        assert stats.pop("engine") == engine
        assert 0 < used <= stats["memory"]
        expected = zeros | {
            "sessions": 4, "owned": 4, "gets": 5, "hits": 3, "misses": 2, "sets": 16, "touches": 2,
            "expired": 2, "evicted": 6, "evicted_owned": 2, "dispose_errors": 2,
        }  # fmt: skip
        del expected["bytes"]
        assert {name: stats[name] for name in expected} == expected
        assert store.destroy(["user 0", "missing"]) == 1
        assert store.destroy_owned("u", keep=["user 2", "user 3"]) == 1
        store.clear()
        stats = asdict(store.stats())
        assert {name: stats[name] for name in expected} == expected | {
            "sessions": 0, "owned": 0, "destroyed": 2, "cleared": 2
        }  # fmt: skip
        assert stats["bytes"] == 0

    def test_stats_are_a_snapshot(self, store: Any) -> None:
        stats = store.stats()
        store.set("a", {})
        assert stats.sessions == 0
        with pytest.raises(AttributeError):
            stats.sessions = 5
        assert store.stats().server_uptime >= stats.server_uptime
        assert (store.stats().server_pid, store.stats().memory) == (stats.server_pid, stats.memory)

    def test_ping(self, store: Any) -> None:
        assert store.ping() is True

    def test_a_custom_serializer(self, make: Make) -> None:
        store = make(serializer=json)
        session = {"list": [1, (2,)], "none": None, "text": "é", "dict": {"1": 2.5}}
        store.set("a", session)
        assert store.update("a", {"new": (3,)}, delete=["none"])
        expected = {"list": [1, [2]], "text": "é", "dict": {"1": 2.5}, "new": [3]}
        assert store.get("a") == store.peek("a") == store.all()["a"] == expected
        assert store.rename("a", "b", {"list": {}})
        assert store.touch("b", {"cookie": {"max_age": 60}})
        assert store.get("b") == expected | {"list": {}, "cookie": {"max_age": 60}}

    # -- options ---------------------------------------------------------------------------------------------------

    def test_options_can_be_read(self, make: Make) -> None:
        given = {"ttl": timedelta(minutes=5), "max_per_owner": 3, "lock_timeout": 1.5}
        for name, value, capability in (("max", 7, Capability.MAKES_ROOM), ("stale", True, Capability.STALE)):
            if can(make(), capability):
                given[name] = value
        options = make(**given).options
        assert {name: getattr(options, name) for name in given} == given
        assert (options.no_dispose_on_set, options.max_session, options.length, options.persist) == (
            False, None, None, True
        )  # fmt: skip
        with pytest.raises(AttributeError):
            options.max = 8

    def test_an_invalid_option_is_an_error_that_says_what_is_valid(self, make: Make) -> None:
        for name, values, right in WRONG_OPTIONS:
            for value in values:
                print(name, value)  # shown if it is accepted
                with pytest.raises(ConfigError, match=f"{name}.*({right})"):
                    make(**{name: value})

    def test_an_unsupported_option_is_refused(self, make: Make) -> None:
        asked: list[tuple[Capability, str, Any]] = [
            (Capability.MAKES_ROOM, "max", 3),
            (Capability.MAKES_ROOM, "length", lambda size, sid: size),
            (Capability.STALE, "stale", True),
        ]
        for capability, name, value in asked:
            if can(make(), capability):
                assert getattr(make(**{name: value}).options, name) is not None
            else:
                with pytest.raises(ConfigError, match=f"{name} is not supported"):
                    make(**{name: value})

    def test_an_unknown_option_is_an_error_that_lists_the_options(self, make: Make) -> None:
        for name in ("maximum", "given", "checkPeriod", "Max"):
            with pytest.raises(ConfigError, match=f"unknown option '{name}'.*check_period.*max.*ttl"):
                make(**{name: 3})

    # -- the end ---------------------------------------------------------------------------------------------------

    def test_a_closed_store_is_unavailable(self, make: Make) -> None:
        store = make()
        store.set("a", {})
        assert store.close() is None
        store.close()
        calls: list[Callable[[], object]] = [
            lambda: store.get("a"), lambda: store.peek("a"), lambda: "a" in store,
            lambda: store.set("a", {}), lambda: store.add("b", {}), lambda: store.replace("a", {}),
            lambda: store.update("a", {"x": 1}), lambda: store.rename("a", "b"),
            lambda: store.touch("a"), lambda: store.touch("a", {"cookie": {}}),
            lambda: store.destroy("a"), lambda: store.destroy(["a"]),
            store.ids, store.all, store.length, lambda: store.length(live=True), lambda: len(store),
            lambda: list(store), store.clear, store.prune, store.start_interval, lambda: store.start_interval(60),
            lambda: store.owned_by("ada"), lambda: store.destroy_owned("ada"), store.stats, store.ping,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(StoreUnavailable, match="closed"):
                call()

    def test_a_store_is_a_context_manager(self, make: Make) -> None:
        store = make()
        with store as entered:
            assert entered is store
            store.set("a", {"x": 1})
        with pytest.raises(StoreUnavailable):
            store.get("a")
        with pytest.raises(ZeroDivisionError), make() as another:
            another.set("a", {"x": 1 // 0})
        with pytest.raises(StoreUnavailable):
            another.get("a")
