"""The contract: tombstones and locks, on which overlapping requests rely."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final

import pytest

from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.testing.base import SHORT, Base, Make, at_once, wait_until

__all__ = ["LockContract"]


# Calls that can leave a tombstone, with a store, an id, and whether to leave one.
ENDS: Final[dict[str, Callable[[Any, str, bool], object]]] = {
    "destroy": lambda store, sid, tombstone: store.destroy(sid, tombstone=tombstone),
    "destroy, several": lambda store, sid, tombstone: store.destroy([sid], tombstone=tombstone),
    "destroy_if_empty": lambda store, sid, tombstone: store.destroy_if_empty(sid, tombstone=tombstone),
    "rename": lambda store, sid, tombstone: store.rename(sid, f"{sid}2", tombstone=tombstone),
}


class LockContract(Base):
    """``gone`` and ``lock``."""

    @pytest.mark.parametrize("end", ENDS)
    def test_a_session_leaves_a_tombstone_on_request(self, store: Any, end: str) -> None:
        for sid in "ab":
            store.set(sid, {})
        assert not store.gone("a")
        assert ENDS[end](store, "a", True)
        assert ENDS[end](store, "b", False)
        assert store.gone("a")
        assert not store.gone("b")
        assert not any(map(store.gone, ["a2", "b2"]))
        assert store.gone("a", renamed=True) == (end == "rename")
        assert not store.gone("b", renamed=True)

    def test_an_id_can_be_used_again(self, store: Any) -> None:
        store.set("a", {"x": 1})
        store.rename("a", "b", tombstone=True)
        store.rename("b", "a", tombstone=True)
        assert store.get("a") == {"x": 1}
        assert store.gone("b")

    def test_a_call_that_removes_nothing_leaves_no_tombstone(self, store: Any) -> None:
        store.set("full", {"x": 1})
        store.set("taken", {})
        store.set("expired", {}, ttl=0)
        assert store.destroy(["missing", "expired"], tombstone=True) == 0
        assert not store.rename("missing", "new", tombstone=True)
        assert not store.rename("full", "taken", tombstone=True)
        assert not store.destroy_if_empty("missing", tombstone=True)
        assert not store.destroy_if_empty("full", tombstone=True)
        assert not any(map(store.gone, ["missing", "full", "taken", "new", "expired"]))

    def test_expiry_and_eviction_leave_no_tombstone(self, store: Any) -> None:
        for sid in "abcde":
            store.set(sid, {}, owner="ada")
        store.destroy(["a"])
        store.touch("b", ttl=0)
        store.set("c", {}, ttl=0)
        store.destroy_owned("ada", keep="e")
        store.clear()
        assert not any(map(store.gone, "abcde"))

    def test_the_caller_chooses_the_age_of_a_tombstone(self, store: Any) -> None:
        store.set("a", {})
        store.destroy("a", tombstone=True)
        assert store.gone("a", within=timedelta(seconds=20))
        assert store.gone("a", math.inf)
        assert not store.gone("a", within=0)
        wait_until(lambda: not store.gone("a", within=SHORT))
        assert store.gone("a")

    def test_an_invalid_id_has_no_tombstone(self, store: Any) -> None:
        assert not any(map(store.gone, ["", "x" * 257, "\ud800", None, 5]))

    def test_many_tombstones_are_kept(self, store: Any) -> None:
        sids = [f"session {number}" for number in range(20)]
        for sid in sids:
            store.set(sid, {})
        store.destroy(sids, tombstone=True)
        assert all(map(store.gone, sids))

    def test_a_lock_excludes_other_holders(self, store: Any) -> None:
        counted = 0

        def count() -> None:
            nonlocal counted
            for _ in range(20):
                with store.lock("a", timeout=60):  # waiting callers are not served in order
                    before = counted
                    time.sleep(0.0002)
                    counted = before + 1

        at_once([count] * 4)
        assert counted == 80

    def test_a_lock_concerns_one_id_and_does_not_block_writes(self, store: Any) -> None:
        with store.lock("a", timeout=20), store.lock("b", timeout=20):
            store.set("a", {"x": 1})
            assert store.get("a") == {"x": 1}
            assert store.destroy("a") == 1

    @pytest.mark.parametrize("timeout", [0, 0.01])
    def test_a_lock_that_is_not_free_in_time_is_a_timeout(self, store: Any, timeout: float) -> None:
        with store.lock("a"), pytest.raises(StoreTimeout), store.lock("a", timeout):
            raise AssertionError
        with store.lock("a", timeout):
            pass

    def test_a_lock_is_released_after_an_exception(self, store: Any) -> None:
        with pytest.raises(ZeroDivisionError), store.lock("a"):
            raise ZeroDivisionError
        with store.lock("a", timeout=0):
            pass

    @pytest.mark.parametrize(("sid", "error"), [("", ValueError), ("x" * 257, ValueError), (None, TypeError)])
    def test_a_lock_needs_a_valid_id(self, store: Any, sid: Any, error: type[Exception]) -> None:
        with pytest.raises(error), store.lock(sid):
            pass

    def test_a_closed_store_has_no_locks(self, make: Make) -> None:
        store = make()
        store.close()
        for call in (partial(store.gone, "a"), store.lock("a").__enter__):
            with pytest.raises(StoreUnavailable):
                call()
