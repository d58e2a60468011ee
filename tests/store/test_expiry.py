"""Deadlines to the nanosecond, with a controlled clock; the contract tests the rest."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
from fault_injection import Clock

from shmstore import ConfigError, Store

NS = 10**9


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("session", "ttl", "seconds"),
    [
        ({}, None, 86_400),
        ({"cookie": {"max_age": 2.5}}, None, 2.5),
        ({"cookie": {"max_age": "7"}}, None, 86_400),
        ({"cookie": {"max_age": 7}}, timedelta(seconds=3), 3),
    ],
)
def test_the_ttl_rule_to_the_nanosecond(clock: Clock, session: Any, ttl: Any, seconds: float) -> None:
    with Store(memory=2**18, clock=clock) as store:
        end = clock.now + int(seconds * NS)
        store.set("set", session, ttl)
        store.set("touched", session)
        clock.now += NS
        assert store.touch("touched", None if ttl is None else session, ttl)
        for last, alive in ((end, ["set", "touched"]), (end + NS, ["touched"])):
            clock.now = last
            assert sorted(store.all()) == alive
            clock.now += 1
            assert sorted(store.all()) == alive[1:]


def test_a_later_ttl_counts_from_its_call(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, ttl=10) as store:
        for sid in ("kept", "updated", "renamed", "replaced"):
            store.set(sid, {})
        begun, clock.now = clock.now, clock.now + 5 * NS
        assert store.update("kept", {"x": 1})
        assert store.rename("renamed", "new")
        assert store.update("updated", ttl=20)
        assert store.replace("replaced", {})
        for seconds, alive in ((10, "kept new replaced updated"), (15, "replaced updated"), (25, "updated")):
            clock.now = begun + seconds * NS
            assert sorted(store.all()) == alive.split()
        clock.now += 1
        assert store.all() == {}


def test_a_session_without_a_deadline_never_expires(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, ttl=math.inf) as store:
        store.set("a", {})
        store.set("b", {}, ttl=60)
        assert store.touch("b")
        clock.now = 2**62  # a century and a half
        assert store.prune() == 0
        assert sorted(store.all()) == ["a", "b"]


@pytest.mark.parametrize("clock", [3, None, "now"])
def test_a_clock_is_a_function(clock: Any) -> None:
    with pytest.raises(ConfigError, match="clock must be a function"):
        Store(memory=2**18, clock=clock)
