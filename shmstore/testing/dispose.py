"""The contract: `dispose` with its reasons and guarantees, and `stale`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from shmstore.contract import Capability
from shmstore.errors import RecordTooLarge
from shmstore.testing.base import Base, Disposals, Make, at_once, needs


class DisposeContract(Base):
    """``dispose`` is called before a session is removed; with ``stale`` an expired session is returned once."""

    # -- reasons ---------------------------------------------------------------------------------------------------

    @needs(Capability.MAKES_ROOM, Capability.DISPOSES_OF_ALL)
    def test_dispose_is_called_with_id_session_and_reason(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, max=3)
        store.set("a", {"n": 1})
        store.set("a", {"n": 2})
        assert disposals.take() == [["a", {"n": 1}, "set"]]
        assert store.replace("a", {"n": 3})
        assert disposals.take() == [["a", {"n": 2}, "set"]]
        assert store.destroy(["a", "missing"]) == 1
        assert disposals.take() == [["a", {"n": 3}, "destroy"]]
        for sid in "bcde":
            store.set(sid, {"id": sid})
        assert disposals.take() == [["b", {"id": "b"}, "evict"]]
        store.touch("c", ttl=-1)
        assert store.prune() == 1
        assert disposals.take() == [["c", {"id": "c"}, "expire"]]
        store.clear()
        assert sorted(disposals.take()) == [["d", {"id": "d"}, "clear"], ["e", {"id": "e"}, "clear"]]
        assert store.length() == 0

    @needs(Capability.DISPOSES_OF_ALL)
    def test_an_expired_session_is_disposed_of_with_reason_expire(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, max=6)
        drops: list[Callable[[], object]] = [
            lambda: store.add("a", {"new": 1}),
            lambda: store.set("b", {"new": 1}),
            lambda: store.destroy("c"),
            lambda: store.rename("a", "d"),
            lambda: store.destroy_owned("ada"),
        ]
        for sid, drop in zip("abcde", drops, strict=True):
            store.set(sid, {}, ttl=0, owner="ada" if sid == "e" else None)
            drop()
            assert disposals.take() == [[sid, {}, "expire"]]
        store.set("f", {}, ttl=0)
        for number in range(6):
            store.set(str(number), {})
        assert disposals.take()[0] == ["f", {}, "expire"]

    def test_every_way_to_destroy_or_to_be_evicted(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, max_per_owner=1)
        store.set("a", {}, owner="ada")
        store.set("b", {"n": 1}, owner="ada")
        assert disposals.take() == [["a", {}, "evict"]]
        store.set("c", {})
        assert store.update("c", {"n": 2}, owner="ada")
        assert disposals.take() == [["b", {"n": 1}, "evict"]]
        store.set("d", {})
        assert store.rename("d", "e", owner="ada")
        assert disposals.take() == [["c", {"n": 2}, "evict"]]
        assert store.destroy_owned("ada") == 1
        assert disposals.take() == [["e", {}, "destroy"]]
        for sid in "fg":
            store.set(sid, {})
        assert store.destroy(sid for sid in "fg") == 2
        assert disposals.take() == [["f", {}, "destroy"], ["g", {}, "destroy"]]

    def test_dispose_is_not_called_for_sessions_that_stay(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, max_session=100)
        store.set("a", {"n": 1})
        assert store.update("a", {"n": 2}, ttl=60, owner="ada")
        assert store.touch("a")
        assert store.touch("a", {"cookie": {"max_age": 60}})
        assert store.rename("a", "b")
        assert store.get("b") == {"n": 2, "cookie": {"max_age": 60}}
        assert store.add("b", {}) is False
        assert store.replace("a", {}) is False
        assert store.rename("b", "b") is False
        assert store.destroy("a") == store.prune() == store.destroy_owned("nobody") == 0
        with pytest.raises(RecordTooLarge):
            store.set("b", {"x": "y" * 100})
        assert disposals.take() == []

    @needs(Capability.MAKES_ROOM)
    def test_a_refused_write_disposes_of_nothing(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, max=10, length=lambda size, sid: size, max_per_owner=1)
        store.set("a", {"x": 1}, owner="ada")
        for sid, owner in (("a", None), ("b", "ada")):
            with pytest.raises(RecordTooLarge):
                store.set(sid, {"x": "y" * 10}, owner=owner)
        assert disposals.take() == []
        assert store.all() == {"a": {"x": 1}}

    @needs(Capability.DISPOSES_OF_ALL)
    def test_no_dispose_on_set(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, no_dispose_on_set=True)
        store.set("a", {"n": 1})
        store.set("a", {"n": 2})
        assert store.replace("a", {"n": 3})
        assert disposals.take() == []
        store.set("a", {"n": 4}, ttl=0)
        store.set("a", {"n": 5})  # that session expired and was not overwritten
        store.clear()
        assert disposals.take() == [["a", {"n": 4}, "expire"], ["a", {"n": 5}, "clear"]]

    @needs(Capability.DISPOSES_OF_ALL)
    def test_overwriting_with_an_expired_session_disposes_once(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose)
        store.set("a", {"n": 1})
        store.set("a", {"n": 2}, ttl=-1)
        assert disposals.take() == [["a", {"n": 1}, "set"]]
        assert store.prune() == 1
        assert disposals.take() == [["a", {"n": 2}, "expire"]]

    # -- guarantees ------------------------------------------------------------------------------------------------

    def test_dispose_is_called_before_the_removal_without_the_lock(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose)
        store.set("a", {"n": 1})
        with disposals.held("a", partial(store.destroy, "a")) as destroyed:
            assert store.get("a") == {"n": 1}
            store.set("b", {"n": 2})
            assert store.touch("a", ttl=60)
        assert destroyed() == 1
        assert disposals.take() == [["a", {"n": 1}, "destroy"]]
        assert store.all() == {"b": {"n": 2}}

    def test_dispose_gets_the_latest_state_of_a_session(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose)
        drops: list[tuple[str, Callable[[], object]]] = [
            ("set", lambda: store.set("a", {"n": 3})),
            ("destroy", lambda: store.destroy("a")),
            ("clear", store.clear),
        ]
        for reason, drop in drops:
            store.set("a", {"n": 1})
            disposals.take()
            with disposals.held("a", drop) as dropped:
                assert store.update("a", {"n": 2})
            dropped()
            assert disposals.take() == [["a", {"n": 1}, reason], ["a", {"n": 2}, reason]]
            assert store.all() == ({"a": {"n": 3}} if reason == "set" else {})

    def test_a_session_removed_meanwhile_is_not_removed_again(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose)
        store.set("a", {"n": 1})
        with disposals.held("a", partial(store.destroy, "a")) as destroyed:
            assert store.rename("a", "b")
        assert destroyed() == 0
        assert store.all() == {"b": {"n": 1}}

    @needs(Capability.MAKES_ROOM)
    def test_a_session_stays_until_its_dispose_returns(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, max=100, length=lambda size, sid: size)
        for sid in "abc":
            store.set(sid, {"x": sid * 20})
        with disposals.held("a", partial(store.set, "c", {"x": "c" * 80})) as written:
            assert disposals.take() == [["a", {"x": "a" * 20}, "evict"]]
            store.set("d", {})  # evicts nothing
            assert store.get("c") == {"x": "c" * 20}
            assert store.ids() == ["c", "d", "b", "a"]
        written()
        assert disposals.take() == [["b", {"x": "b" * 20}, "evict"], ["c", {"x": "c" * 20}, "set"]]
        assert store.ids() == ["c", "d"]
        assert store.stats().evicted == 2

    @needs(Capability.MAKES_ROOM)
    def test_overwriting_that_evicts_disposes_of_both_once(self, make: Make, disposals: Disposals) -> None:
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
        assert sorted((sid, reason) for sid, _, reason in disposals.take()) == sorted(
            [(newest, "set"), *((sid, "evict") for sid in gone)]
        )

    @needs(Capability.MAKES_ROOM)
    def test_concurrent_removals_dispose_of_each_session_once(self, make: Make, disposals: Disposals) -> None:
        store = make(dispose=disposals.dispose, max=5)
        store.set("a", {"n": -1})

        def overwrite(first: int) -> None:
            for number in range(first, first + 10):
                store.set("a", {"n": number})
                store.set(f"visitor {number}", {"n": number})

        at_once([partial(overwrite, 10 * thread) for thread in range(4)])
        left = store.all()
        at_once([store.clear, partial(store.destroy, [*left]), store.clear])
        calls = disposals.take()
        assert sorted(session["n"] for sid, session, _ in calls if sid == "a") == list(range(-1, 40))
        assert sorted(session["n"] for sid, session, _ in calls if sid != "a") == list(range(40))
        assert store.length() == 0

    @needs(Capability.MAKES_ROOM, Capability.DISPOSES_OF_ALL)
    def test_an_exception_in_dispose_is_counted_and_has_no_other_effect(self, make: Make) -> None:
        def dispose(sid: str, session: Any, reason: str) -> None:
            raise ZeroDivisionError(sid)

        store = make(dispose=dispose, max=2)
        store.set("a", {"n": 1})
        store.set("a", {"n": 2})
        assert store.destroy("a") == 1
        for sid in "bcd":
            store.set(sid, {}, ttl=0 if sid == "d" else 60)
        assert store.prune() == 1
        store.clear()
        assert store.length() == 0
        assert store.stats().dispose_errors == 5

    def test_dispose_gets_the_readable_values(self, make: Make, disposals: Disposals) -> None:
        class Mute:
            def dumps(self, value: Any) -> bytes:
                return str(value).encode()

            def loads(self, data: bytes) -> Any:
                if data == b"bad":
                    raise ValueError("mute")
                return data.decode()

        store = make(dispose=disposals.dispose, serializer=Mute())
        store.set("a", {"n": 1, "mood": "bad"})
        assert store.destroy("a") == 1
        assert disposals.take() == [["a", {"n": "1"}, "destroy"]]

    # -- stale -----------------------------------------------------------------------------------------------------

    @needs(Capability.STALE)
    def test_a_stale_session_is_returned_once(self, make: Make) -> None:
        store = make(stale=True)
        store.set("a", {"n": 1}, ttl=0, owner="ada")
        assert store.peek("a") is None
        assert "a" not in store
        assert store.all() == {}
        assert store.owned_by("ada") == []
        assert store.touch("a", ttl=60) is False
        assert store.update("a", {"n": 2}, ttl=60) is False
        assert store.get("a") == {"n": 1}
        assert store.length() == 0
        assert store.get("a") is None
        stats = store.stats()
        assert (stats.gets, stats.hits, stats.misses, stats.expired) == (2, 0, 2, 1)
        store.set("b", {"n": 2}, ttl=60)
        assert store.get("b") == store.get("b") == {"n": 2}
        assert store.get("missing") is store.get("") is None

    @needs(Capability.STALE)
    def test_one_of_many_concurrent_gets_returns_a_stale_session(self, make: Make) -> None:
        store = make(stale=True)
        for number in range(10):
            store.set("a", {"n": number}, ttl=0)
            got = at_once([partial(store.get, "a")] * 6)
            assert sorted(got, key=str) == [None] * 5 + [{"n": number}] or got.count(None) == 5
            assert {"n": number} in got
            assert store.length() == 0

    @needs(Capability.STALE)
    def test_a_stale_session_is_disposed_of_and_counted_once(self, make: Make, disposals: Disposals) -> None:
        store = make(stale=True, dispose=disposals.dispose)
        store.set("a", {"n": 1}, ttl=0)
        got = at_once([partial(store.get, "a")] * 4)
        assert got.count(None) == 3
        assert disposals.take() == [["a", {"n": 1}, "expire"]]
        assert (store.stats().gets, store.stats().misses, store.stats().expired) == (4, 4, 1)
