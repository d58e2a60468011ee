"""The contract: limits and eviction."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from shmstore.contract import Capability
from shmstore.errors import RecordTooLarge
from shmstore.testing.base import Base, Make, needs


def sized(size: int) -> dict[str, str]:
    """Return a session whose size is exactly this number of bytes: 5 to 35, or 37 to 260."""
    return {"x": "y" * (size - 4 - (size > 36))}


class LimitContract(Base):
    """Eviction, ``max``, ``length``, ``memory``, ``max_session``, ``max_per_owner``, ``recency``."""

    # -- max -------------------------------------------------------------------------------------------------------

    @needs(Capability.MAKES_ROOM)
    def test_the_least_recently_used_is_evicted(self, make: Make) -> None:
        store = make(max=3)
        for sid in "abc":
            store.set(sid, {})
        store.get("a")
        store.set("d", {})
        assert store.ids() == ["d", "a", "c"]
        store.touch("c")
        assert store.add("e", {})
        assert store.ids() == ["e", "c", "d"]
        assert store.stats().evicted == 2

    @needs(Capability.MAKES_ROOM)
    def test_overwriting_a_session_evicts_none(self, make: Make) -> None:
        store = make(max=2)
        store.set("a", {})
        store.set("b", {})
        store.set("a", {"x": 1})
        assert store.replace("a", {"x": 2})
        assert store.update("b", {"x": 1})
        assert store.rename("b", "c")
        assert store.add("a", {}) is False
        assert store.replace("missing", {}) is False
        assert store.update("missing", {"x": 1}) is False
        assert store.ids() == ["c", "a"]
        assert store.stats().evicted == 0

    @needs(Capability.MAKES_ROOM)
    def test_expired_sessions_are_evicted_first(self, make: Make) -> None:
        store = make(max=3)
        store.set("a", {})
        store.set("b", {})
        store.set("c", {}, ttl=0, owner="ada")
        store.set("d", {})
        assert store.ids() == ["d", "b", "a"]
        assert (store.stats().evicted, store.stats().expired) == (0, 1)

    @needs(Capability.MAKES_ROOM)
    def test_sessions_with_an_owner_are_evicted_last(self, make: Make) -> None:
        store = make(max=4)
        store.set("ada", {}, owner="ada")
        store.set("bob", {}, owner="bob")
        for number in range(20):
            store.set(f"visitor {number}", {})
        assert store.ids() == ["visitor 19", "visitor 18", "bob", "ada"]
        for number in range(3):
            store.set(f"user {number}", {}, owner=str(number))
        assert store.ids() == ["user 2", "user 1", "user 0", "bob"]
        store.set("visitor", {})  # a new visitor is always stored
        assert store.ids() == ["visitor", "user 2", "user 1", "user 0"]
        assert (store.stats().evicted, store.stats().evicted_owned) == (18 + 2 + 1 + 1, 2)

    @needs(Capability.MAKES_ROOM)
    def test_an_owner_gained_or_lost_counts_at_the_next_eviction(self, make: Make) -> None:
        store = make(max=3)
        store.set("a", {})
        store.set("b", {}, owner="bob")
        store.set("c", {})
        assert store.update("a", owner="ada")
        assert store.rename("b", "visitor", owner=None)
        store.set("d", {}, owner="dan")
        assert store.ids() == ["d", "visitor", "a"]
        store.set("e", {})
        assert store.ids() == ["e", "d", "a"]

    # -- length ----------------------------------------------------------------------------------------------------

    @needs(Capability.MAKES_ROOM)
    def test_length_weighs_sessions_by_size_and_id(self, make: Make) -> None:
        store = make(max=100, length=lambda size, sid: 60 if sid == "heavy" else size)
        for sid in "abcd":
            store.set(sid, sized(30))
        assert store.ids() == ["d", "c", "b"]
        store.set("e", sized(10))  # exactly full
        assert store.ids() == ["e", "d", "c", "b"]
        assert store.rename("e", "heavy")
        assert store.ids() == ["heavy", "d"]
        assert store.rename("heavy", "e")
        store.set("f", sized(60))
        assert store.ids() == ["f", "e", "d"]

    @needs(Capability.MAKES_ROOM)
    def test_a_change_of_weight_evicts_as_needed(self, make: Make) -> None:
        store = make(max=100, length=lambda size, sid: size)
        changes: list[Callable[[], object]] = [
            lambda: store.set("c", sized(60)),
            lambda: store.replace("c", sized(60)),
            lambda: store.update("c", sized(60)),
            lambda: store.touch("c", {"cookie": "y" * (60 - 30 - 8)}),
        ]
        for change in changes:
            for sid in "abc":
                store.set(sid, sized(30))
            change()
            assert store.ids() == ["c", "b"]
            store.set("c", sized(30))  # releases weight
            store.set("a", sized(40))
            assert store.ids() == ["a", "c", "b"]

    @needs(Capability.MAKES_ROOM)
    def test_a_session_heavier_than_max_is_refused_and_evicts_none(self, make: Make) -> None:
        store = make(max=100, max_per_owner=1, length=lambda size, sid: size)
        for sid, owner in zip("abc", [None, "ada", None], strict=True):
            store.set(sid, sized(30), owner=owner)
        writes: list[Callable[[], object]] = [
            lambda: store.set("a", sized(101)),
            lambda: store.set("new", sized(101), owner="ada"),
            lambda: store.add("new", sized(101)),
            lambda: store.replace("a", sized(101)),
            lambda: store.update("a", sized(101), owner="ada"),
            lambda: store.rename("a", "new", sized(101)),
            lambda: store.touch("a", {"cookie": "y" * 101}),
        ]
        for write in writes:
            with pytest.raises(RecordTooLarge, match="max=100"):
                write()
            assert store.all() == {sid: sized(30) for sid in "cba"}
        assert store.stats().evicted == 0
        store.set("a", sized(100))
        assert store.ids() == ["a"]

    @needs(Capability.MAKES_ROOM)
    def test_a_weight_may_be_zero(self, make: Make) -> None:
        store = make(max=2, length=lambda size, sid: int(sid.isupper()))
        for sid in "abAcBdC":
            store.set(sid, {})
        assert store.ids() == ["C", "d", "B", "c"]  # a and b were evicted before A

    # -- memory ----------------------------------------------------------------------------------------------------

    @needs(Capability.MAKES_ROOM)
    def test_a_full_memory_always_takes_another_session(self, make: Make) -> None:
        store = make(memory=2**17)
        for number in range(300):
            size = (10, 500, 5000, 15_000)[number % 4]
            store.set(str(number), {"x": "y" * size})
            assert store.get(str(number)) == {"x": "y" * size}
        assert store.stats().evicted > 0
        assert 0 < store.stats().bytes <= store.stats().memory <= 2**17

    def test_a_session_has_at_most_a_quarter_of_the_memory(self, make: Make) -> None:
        store = make(memory=2**17)
        store.set("a", {"x": b"y" * (2**15 - 20)})
        with pytest.raises(RecordTooLarge, match="max_session allows 32768"):
            store.set("a", {"x": b"y" * 2**15})
        assert store.get("a") == {"x": b"y" * (2**15 - 20)}

    def test_max_session_is_exact(self, make: Make) -> None:
        store = make(max_session=100)
        store.set("a", sized(100))
        for size in (101, 10**6):
            with pytest.raises(RecordTooLarge, match="max_session"):
                store.set("a", {"x": "y" * (size - 5)})
        assert store.get("a") == sized(100)

    # -- max_per_owner, recency ------------------------------------------------------------------------------------

    @needs(Capability.USE_ORDER, Capability.KEEPS_EXPIRED)
    def test_max_per_owner_limits_the_sessions_of_an_owner(self, make: Make) -> None:
        store = make(max_per_owner=2)
        store.set("old", {}, owner="ada", ttl=0)  # absent, so it does not count
        for sid in "abc":
            store.set(sid, {}, owner="ada")
        store.set("x", {}, owner="bob")
        store.set("y", {})
        assert store.owned_by("ada") == ["c", "b"]
        store.get("b")
        assert store.update("y", owner="ada")
        assert store.owned_by("ada") == ["y", "b"]
        assert store.update("y", {"again": 1}, owner="ada")
        assert store.rename("y", "z", owner="ada")
        store.set("z", {}, owner="ada")
        assert store.owned_by("ada") == ["z", "b"]
        assert store.owned_by("bob") == ["x"]
        assert store.replace("x", {}, owner="ada")
        assert store.owned_by("ada") == ["x", "z"]
        assert (store.stats().displaced, store.stats().evicted, store.stats().evicted_owned) == (3, 0, 0)
        assert sorted(store.ids()) == ["old", "x", "z"]

    def test_displaced_sessions_are_counted(self, make: Make) -> None:
        store = make(max_per_owner=2)
        for sid in "abcde":
            store.set(sid, {}, owner="ada")
        assert sorted(store.owned_by("ada")) == ["d", "e"]
        assert (store.stats().displaced, store.stats().destroyed) == (3, 0)

    @needs(Capability.MAKES_ROOM)
    def test_within_recency_a_read_does_not_refresh(self, make: Make) -> None:
        for recency in (3600, timedelta(hours=1)):
            store = make(recency=recency, max=2)
            store.set("a", {})
            store.set("b", {})
            store.get("a")
            assert store.ids() == ["b", "a"]
            store.touch("a")  # a write does
            store.set("c", {})
            assert store.ids() == ["c", "a"]
            assert store.stats().hits == 1

    def test_recency_is_one_second_by_default(self, make: Make) -> None:
        assert make().options.recency == 0
        assert type(make().options)().recency == 1
