"""The contract: the ttl of a session, and that an expired session is absent."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from shmstore.contract import Capability
from shmstore.testing.base import SHORT, Base, Make, can, wait_until

OVER: list[Any] = [0, -1, 0.0, -0.5, -math.inf, -(10**30), timedelta(0), timedelta(microseconds=-1)]
NOT_OVER: list[Any] = [60, 59.5, math.inf, 10**30, 1e300, timedelta(minutes=1), timedelta.max]
LONG = 0.5  # seconds: sufficient to renew a session on a machine that is not busy


class ExpiryContract(Base):
    """Durations, the ttl rule, and expiry in each method."""

    # -- durations -------------------------------------------------------------------------------------------------

    def test_a_ttl_of_zero_or_less_stores_an_expired_session(self, store: Any) -> None:
        for number, ttl in enumerate(OVER):
            store.set(f"set {number}", {"x": 1}, ttl=ttl)
            assert store.add(f"add {number}", {"x": 1}, ttl) is True
        assert store.all() == {}
        there = 2 * len(OVER) if can(store, Capability.KEEPS_EXPIRED) else 0
        assert store.length() == there
        assert store.prune() == there
        assert store.length() == 0

    def test_a_positive_ttl_stores_a_live_session(self, store: Any) -> None:
        for number, ttl in enumerate(NOT_OVER):
            store.set(str(number), {"x": number}, ttl=ttl)
        assert store.prune() == 0
        assert store.all() == {str(number): {"x": number} for number in reversed(range(len(NOT_OVER)))}

    def test_every_method_applies_its_ttl(self, store: Any) -> None:
        methods: list[tuple[bool, Callable[[Any], object]]] = [  # whether it needs a stored session, and the call
            (False, lambda ttl: store.set("a", {}, ttl=ttl)),
            (True, lambda ttl: store.set("a", {}, ttl=ttl)),
            (False, lambda ttl: store.add("a", {}, ttl=ttl)),
            (True, lambda ttl: store.replace("a", {}, ttl=ttl)),
            (True, lambda ttl: store.update("a", {"x": 1}, ttl=ttl)),
            (True, lambda ttl: store.touch("a", ttl=ttl)),
            (True, lambda ttl: store.touch("a", {"cookie": {"max_age": 60}}, ttl=ttl)),
            (True, lambda ttl: store.rename("a", "b", ttl=ttl) and store.rename("b", "a")),
        ]
        for needed, method in methods:
            for ttl in (*OVER, *NOT_OVER):
                store.destroy(["a", "b"])
                if needed:
                    store.set("a", {}, ttl=60)
                method(ttl)
                assert ("a" in store) is (ttl in NOT_OVER), ttl

    def test_a_ttl_counts_from_the_call(self, make: Make) -> None:
        store = make(ttl=60)
        life = LONG
        while True:
            begun = time.monotonic()
            for sid in ("touched", "ruled", "updated", "renamed", "replaced", "unchanged", "read"):
                store.set(sid, {}, ttl=life)
            done = [
                store.touch("touched", ttl=60),
                store.touch("ruled"),
                store.update("updated", ttl=60),
                store.rename("renamed", "new", ttl=60),
                store.replace("replaced", {}),
                store.update("unchanged", {"x": 1}),  # keeps its deadline
            ]
            store.set("last", {}, ttl=life)
            if time.monotonic() - begun < life:
                break
            life *= 2  # the machine was so busy that some may have expired before they were renewed
            store.clear()
        assert done == [True] * 6
        wait_until(lambda: store.get("read") is None)  # reading does not extend it
        wait_until(lambda: "last" not in store)
        assert sorted(store.all()) == ["new", "replaced", "ruled", "touched", "updated"]
        for sid in store.all():
            assert store.touch(sid, ttl=SHORT)  # a ttl can also become shorter
        wait_until(lambda: store.all() == {})

    # -- the ttl rule ----------------------------------------------------------------------------------------------

    def test_precedence_of_argument_option_and_cookie_for_the_ttl(self, make: Make) -> None:
        cookie = {"cookie": {"max_age": 60}}
        for ttl in (0, timedelta(seconds=-1), lambda options, session, sid: 0):
            store = make(ttl=ttl)
            store.set("a", cookie)
            assert "a" not in store
            assert store.add("a", cookie, ttl=60) is True
            assert "a" in store
            assert store.touch("a", cookie) is True
            assert "a" not in store

    def test_the_ttl_of_the_cookie(self, store: Any) -> None:
        for over in (0, -1, -0.5, -math.inf):
            store.set("a", {"cookie": {"max_age": over}})
            assert "a" not in store, over
        for not_over in (60, 0.5e9, math.inf):
            store.set("a", {"cookie": {"max_age": not_over}})
            assert "a" in store, not_over

    def test_a_max_age_that_is_not_a_number_is_ignored(self, store: Any) -> None:
        no_numbers: list[Any] = [None, "0", b"0", False, math.nan, Decimal(0), timedelta(0), [0], {}]
        for age in no_numbers:
            store.set("a", {"cookie": {"max_age": age}})
            assert "a" in store, age
        for cookie in (None, "0", 0, [0], {}, {"maxAge": 0}):
            store.set("a", {"cookie": cookie})
            assert store.touch("a", {"cookie": cookie}), cookie
            assert "a" in store, cookie

    def test_touch_uses_the_stored_cookie_or_the_given_one(self, store: Any) -> None:
        for given, alive in ((None, False), ({}, True), ({"cookie": {"max_age": 60}}, True)):
            store.set("a", {"cookie": {"max_age": 0}}, ttl=60)
            assert store.touch("a", given)
            assert ("a" in store) is alive, given
        store.set("a", {"cookie": {"max_age": 60}})
        assert store.touch("a", {"cookie": {"max_age": 0}})
        assert "a" not in store

    def test_a_ttl_function_gets_options_session_and_id_in_the_calling_process(
        self, make: Make, tmp_path: Path
    ) -> None:
        path = tmp_path / "seen"

        def life(options: Any, session: Any, sid: str) -> float:
            import json
            import os

            with path.open("a") as file:
                file.write(json.dumps([options.max_per_owner, dict(session), sid, os.getpid()]) + "\n")
            return float(session.get("life", 60))

        def seen() -> list[Any]:
            calls = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("")
            return calls

        store = make(max_per_owner=9, ttl=life)
        store.set("a", {"x": 1})
        assert store.add("b", {"x": 2})
        assert store.replace("b", {"x": 3})
        assert store.touch("b")
        assert store.touch("b", {"given": 1})
        assert store.touch("b", {"given": 2, "cookie": {"life": 0}})
        assert seen() == [
            [9, {"x": 1}, "a", os.getpid()],
            [9, {"x": 2}, "b", os.getpid()],
            [9, {"x": 3}, "b", os.getpid()],
            [9, {"x": 3}, "b", os.getpid()],
            [9, {"given": 1}, "b", os.getpid()],
            [9, {"given": 2, "cookie": {"life": 0}}, "b", os.getpid()],
        ]
        assert store.update("a", {"x": 4})
        assert store.rename("a", "c")
        store.set("c", {}, ttl=60)
        assert store.touch("c", ttl=60)
        assert store.touch("missing") is False
        assert seen() == []
        store.set("c", {"life": 0})
        assert "c" not in store
        assert store.touch("b", {"life": -1})
        assert "b" not in store

    # -- expired = absent ------------------------------------------------------------------------------------------

    def test_an_expired_session_is_absent(self, store: Any) -> None:
        answers: list[tuple[Callable[[], object], object]] = [
            (lambda: store.get("a"), None),
            (lambda: store.peek("a"), None),
            (lambda: "a" in store, False),
            (store.all, {}),
            (lambda: store.length(live=True), 0),
            (lambda: store.owned_by("ada"), []),
            (lambda: store.touch("a", ttl=60), False),
            (lambda: store.touch("a", {"cookie": {"max_age": 60}}), False),
            (lambda: store.update("a", {"x": 2}, ttl=60), False),
            (lambda: store.rename("a", "b", ttl=60), False),
            (lambda: store.replace("a", {"x": 2}), False),
        ]
        store.set("a", {"x": 1}, ttl=0, owner="ada")
        left = (["a"], 1, 1) if can(store, Capability.KEEPS_EXPIRED) else ([], 0, 0)
        for call, answer in answers[:-1]:
            assert call() == answer
            assert (store.ids(), store.length(), len(store)) == left, "removal is left to prune and eviction"
        assert store.stats().misses == 1
        for call, answer in answers[-1:]:
            assert call() == answer
        assert store.all() == {}

    def test_the_successor_of_an_expired_session_inherits_nothing(self, store: Any) -> None:
        for create in (store.add, store.set):
            store.set("a", {"x": 1}, ttl=0, owner="ada")
            assert create("a", {"y": 2}) in (True, None)
            assert store.get("a") == {"y": 2}
            assert store.owned_by("ada") == []
        if can(store, Capability.KEEPS_EXPIRED):
            assert store.stats().expired == 2

    def test_destroy_removes_an_expired_session_and_counts_none(self, store: Any) -> None:
        for destroy, of in ((store.destroy, "a"), (store.destroy, ["a"]), (store.destroy_owned, "ada")):
            store.set("a", {}, ttl=0, owner="ada")
            assert destroy(of) == 0
            assert store.length() == 0
        assert store.stats().destroyed == 0
        if can(store, Capability.KEEPS_EXPIRED):
            assert store.stats().expired == 3

    def test_rename_onto_an_expired_session(self, store: Any) -> None:
        store.set("a", {"x": 1})
        store.set("b", {"x": 2}, ttl=0, owner="ada")
        assert store.rename("a", "b") is True
        assert store.all() == {"b": {"x": 1}}
        assert store.length() == 1
        assert store.stats().owned == 0
