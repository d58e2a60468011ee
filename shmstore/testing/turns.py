"""The contract, in so far as requests that overlap rely on it: ids that are gone, and taking turns."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest

from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.testing.base import Base, Make, at_once

__all__ = ["TurnContract"]


class TurnContract(Base):
    """``gone`` and ``lock``."""

    def test_an_id_that_was_destroyed_is_gone(self, store: Any) -> None:
        assert not store.gone("a")
        store.set("a", {})
        store.set("b", {})
        assert not store.gone("a")
        store.destroy("a")
        assert store.gone("a")
        assert not store.gone("b")
        assert store.destroy_if_empty("b")
        assert store.gone("b")

    def test_an_id_that_was_renamed_is_gone(self, store: Any) -> None:
        store.set("a", {})
        store.rename("a", "b")
        assert store.gone("a")
        assert not store.gone("b")
        store.rename("b", "a")  # an id may come back
        assert store.get("a") == {}
        assert store.gone("b")

    def test_what_goes_by_the_dozen_is_not_gone(self, store: Any) -> None:
        for sid in "abc":
            store.set(sid, {}, owner="ada")
        store.destroy_owned("ada", keep="c")
        store.clear()
        assert not any(map(store.gone, "abc"))

    def test_an_id_nobody_can_have_is_not_gone(self, store: Any) -> None:
        assert not any(map(store.gone, ["", "x" * 257, "\ud800", None, 5]))

    def test_many_are_remembered(self, store: Any) -> None:
        sids = [f"session {number}" for number in range(20)]
        for sid in sids:
            store.set(sid, {})
        store.destroy(sids)
        assert all(map(store.gone, sids))

    def test_turns_are_taken_one_after_another(self, store: Any) -> None:
        counted = 0

        def count() -> None:
            nonlocal counted
            for _ in range(20):
                with store.lock("a"):
                    before = counted
                    time.sleep(0.0002)
                    counted = before + 1

        at_once([count] * 4)
        assert counted == 80

    def test_a_turn_concerns_one_id_and_nobody_who_takes_none(self, store: Any) -> None:
        with store.lock("a", timeout=20), store.lock("b", timeout=20):
            store.set("a", {"x": 1})
            assert store.get("a") == {"x": 1}
            assert store.destroy("a") == 1

    @pytest.mark.parametrize("timeout", [0, 0.01])
    def test_a_turn_that_does_not_come_is_a_timeout(self, store: Any, timeout: float) -> None:
        with store.lock("a"), pytest.raises(StoreTimeout), store.lock("a", timeout):
            raise AssertionError
        with store.lock("a", timeout):
            pass

    def test_a_turn_ends_with_an_exception(self, store: Any) -> None:
        with pytest.raises(ZeroDivisionError), store.lock("a"):
            raise ZeroDivisionError
        with store.lock("a", timeout=0):
            pass

    @pytest.mark.parametrize(("sid", "error"), [("", ValueError), ("x" * 257, ValueError), (None, TypeError)])
    def test_a_turn_needs_an_id(self, store: Any, sid: Any, error: type[Exception]) -> None:
        with pytest.raises(error), store.lock(sid):
            pass

    def test_a_closed_store_has_no_turns(self, make: Make) -> None:
        store = make()
        store.close()
        for call in (partial(store.gone, "a"), store.lock("a").__enter__):
            with pytest.raises(StoreUnavailable):
                call()
