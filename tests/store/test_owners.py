"""Owners with very many sessions: the cost for others does not depend on their number."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from engines import on_each_engine
from fault_injection import Steps, stepping

from shmstore import Store, StoreTimeout
from shmstore.codec.ids import key_of, owner_digest
from shmstore.engine.verify import verify
from shmstore.store import bulk, live_options
from shmstore.testing import wait_until

pytestmark = on_each_engine

FEW, MANY = 20, 2000


@contextmanager
def crowded(count: int, **options: Any) -> Iterator[Store]:
    """A store in which one owner has ``count`` sessions."""
    with Store(**({"memory": 2**21, "check_period": None, "recency": 0} | options)) as store:
        for number in range(count):
            store.set(str(number), {}, owner="eve")
        yield store


def steps_of(store: Store, operation: Callable[[], object]) -> int:
    """Return the number of cells that an operation reads and writes."""
    steps = Steps(0, lambda: None, reads=True)
    with stepping(store.arena, steps):
        operation()
    return steps.count


def at_limit(store: Store) -> None:
    live_options.publish(store.arena, replace(store.options, max_per_owner=store.length()))
    store.set("login", {}, owner="eve")


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "the oldest ends": lambda store: store.destroy("0"),
    "one in the middle ends": lambda store: store.destroy("7"),
    "the newest ends": lambda store: store.destroy(str(store.length() - 1)),
    "one more": lambda store: store.set("login", {}, owner="eve"),
    "one is used": lambda store: store.get("3"),
    "one is renewed": lambda store: store.touch("3", ttl=60),
    "one becomes another's": lambda store: store.update("3", owner="bob"),
    "one becomes nobody's": lambda store: store.update("3", owner=None),
    "one is renamed": lambda store: store.rename("3", "new"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_cost_does_not_depend_on_the_number_of_sessions_of_an_owner(name: str) -> None:
    counts = []
    for count in (FEW, MANY):
        with crowded(count) as store:
            steps = steps_of(store, lambda: OPERATIONS[name](store))
            # An index of sessions by id has chains of other lengths in another arena: a few cells.
            counts.append(steps)
            verify(store.arena)
    few, many = counts
    assert many <= few + 20


def test_a_login_when_another_owner_fills_the_store() -> None:
    counts = []
    for count in (FEW, MANY):
        with crowded(count, max=count) as store:
            counts.append(steps_of(store, lambda: store.set("bob", {}, owner="bob")))
            assert store.owned_by("bob") == ["bob"]
            assert store.length() == count
            verify(store.arena)
    few, many = counts
    assert many <= few + 20


def test_a_login_checks_a_bounded_number_of_sessions() -> None:
    counts = []
    for count in (1000, MANY):
        with crowded(count) as store:
            counts.append(steps_of(store, lambda: at_limit(store)))
            assert store.length() == count
            assert store.stats().displaced == 1
            verify(store.arena)
    few, many = counts
    assert many <= few + 20


class Holds:
    """Counts the work in each hold of a store's lock."""

    def __init__(self, store: Store) -> None:
        self.drops, self.reads = [0], [0]
        arena: Any = store.arena
        lock, drop, read = arena.lock, arena.drop, arena.reader.try_at

        def noted(timeout: float) -> None:
            lock(timeout)
            self.drops.append(0)
            self.reads.append(0)

        def dropped(*arguments: Any) -> None:
            self.drops[-1] += 1
            drop(*arguments)

        def looked(slot: int) -> Any:
            self.reads[-1] += 1
            return read(slot)

        arena.lock, arena.drop, arena.reader.try_at = noted, dropped, looked


def test_destroy_owned_removes_in_batches() -> None:
    with crowded(500) as store:
        holds = Holds(store)
        assert store.destroy_owned("eve", keep=["7"]) == 499
        assert store.ids() == ["7"]
        assert max(holds.drops) <= 16
        assert max(holds.reads) <= 16


def test_sessions_of_an_owner_are_listed_without_holding_the_lock() -> None:
    counts = []
    for count in (1000, MANY):
        with crowded(count) as store:
            arena: Any = store.arena
            steps = Steps(0, lambda: None, reads=True)
            reads: list[int] = []
            lock, unlock = arena.lock, arena.unlock

            def locked(timeout: float, lock: Any = lock, steps: Steps = steps, reads: list[int] = reads) -> None:
                lock(timeout)
                reads.append(-steps.count)

            def unlocked(unlock: Any = unlock, steps: Steps = steps, reads: list[int] = reads) -> int:
                reads[-1] += steps.count
                return int(unlock())

            with stepping(arena, steps):
                arena.lock, arena.unlock = locked, unlocked
                found = store.owned_by("eve")
            del arena.lock
            assert found == [str(number) for number in reversed(range(count))]
            counts.append(sum(reads))
    assert counts[0] == counts[1] > 0


def between_batches(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Call a function once, after the first batch of sessions was removed."""
    done: list[float] = []

    def act(since: float) -> None:
        if not done:
            done.append(since)
            action()

    monkeypatch.setattr(bulk, "_yield_lock", act)


def test_destroy_owned_keeps_concurrent_logins_and_removes_renamed_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    with crowded(100) as store:

        def meanwhile() -> None:
            store.set("login", {"new": True}, owner="eve")
            assert store.rename("0", "renamed")
            store.set("1", {"overwritten": True}, owner="eve")
            assert store.update("2", owner="bob")
            assert store.destroy("3")

        between_batches(monkeypatch, meanwhile)
        assert store.destroy_owned("eve") == 98
        assert store.ids() == ["2", "login"]
        verify(store.arena)


@pytest.mark.parametrize(("timeouts", "left"), [(3, 0), (9, 92)])
def test_destroy_owned_after_a_lock_timeout(timeouts: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with crowded(100, lock_timeout=0.02) as store:
        arena: Any = store.arena
        held, over = threading.Event(), threading.Event()

        def hold() -> None:
            try:
                arena.lock(5)
                held.set()
                over.wait()
            finally:
                arena.unlock()

        holder = threading.Thread(target=hold)

        def stall() -> None:
            holder.start()
            held.wait()

        def waited_in_vain() -> bool:
            in_vain.append(True)
            if len(in_vain) == timeouts:
                over.set()
                holder.join()
            return False

        in_vain: list[bool] = []
        arena.writers.on_timeout = waited_in_vain
        between_batches(monkeypatch, stall)
        try:
            if left:
                with pytest.raises(StoreTimeout):
                    store.destroy_owned("eve")
            else:
                assert store.destroy_owned("eve") == 100
        finally:
            over.set()
            holder.join()
        assert store.length() == left
        assert store.destroy_owned("eve") == left


def test_destroy_owned_calls_dispose_for_each_session() -> None:
    told: list[str] = []
    with crowded(100, dispose=lambda sid, _, reason: told.append(f"{sid} {reason}")) as store:
        assert store.destroy_owned("eve") == 100
        assert sorted(told) == sorted(f"{number} destroy" for number in range(100))
        verify(store.arena)


def test_a_lowered_max_per_owner_is_enforced_in_batches() -> None:
    with crowded(100) as store:
        store.set("bob", {}, owner="bob")
        holds = Holds(store)
        store.change_options(type(store.options).of(memory=2**21, check_period=None, max_per_owner=5))
        wait_until(lambda: store.stats().displaced == 95)
        assert max(holds.drops) <= 16
        assert store.owned_by("eve") == ["99", "98", "97", "96", "95"]
        assert store.owned_by("bob") == ["bob"]
        verify(store.arena)


def test_expired_sessions_do_not_hide_live_ones_from_max_per_owner() -> None:
    now = [10**9]
    with Store(memory=2**21, check_period=None, max_per_owner=5, clock=lambda: now[0]) as store:
        for number in range(400):
            store.set(f"old {number}", {}, owner="eve", ttl=0)
        for number in range(100):
            store.set(str(number), {}, owner="eve")
        assert store.owned_by("eve") == ["99", "98", "97", "96", "95"]
        verify(store.arena)


def test_order_of_use_decides_eviction_and_listing() -> None:
    with crowded(5, max_per_owner=5) as store:
        store.get("0")
        store.touch("2", ttl=60)
        store.update("1", {"x": 1})
        assert store.owned_by("eve") == ["1", "2", "0", "4", "3"]
        store.set("login", {}, owner="eve")
        store.set("another", {}, owner="eve")
        assert store.owned_by("eve") == ["another", "login", "1", "2", "0"]
        verify(store.arena)


@pytest.mark.parametrize("ask", [lambda store: store.destroy_owned("eve"), lambda store: len(store.owned_by("eve"))])
def test_a_rebuild_just_after_the_list_was_made(ask: Callable[[Store], int], monkeypatch: pytest.MonkeyPatch) -> None:
    with crowded(20) as store:
        store.destroy(["0", "1"])
        owned, moves = bulk._owned, [1]

        def moving(store: Any, owner: str) -> Any:
            found = owned(store, owner)
            if moves and moves.pop():
                store.move()  # as another thread that has found damage
            return found

        monkeypatch.setattr(bulk, "_owned", moving)
        assert ask(store) == 18


def test_max_per_owner_displaces_without_an_eviction(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO, "shmstore"),
        Store(memory=2**18, check_period=None, max_per_owner=2, max=5) as store,
    ):
        for number in range(4):
            store.set(str(number), {}, owner="eve")
        assert (store.stats().displaced, store.stats().evicted) == (2, 0)
        [line] = caplog.messages
        assert "max_per_owner=2" in line
        assert "raise max or memory" not in line
        for number in range(10):
            store.set(f"stranger {number}", {})
        assert (store.stats().displaced, store.stats().evicted) == (2, 7)
        assert "raise max or memory" in caplog.messages[-1]


def test_the_owner_index_lists_the_first_sessions_of_an_owner() -> None:
    with crowded(3) as store:
        arena = store.arena
        assert arena.owned_slots(owner_digest("eve"), 2) == (3, [arena.find(key_of(sid)) for sid in (b"0", b"1")])
        assert arena.owned_slots(owner_digest("eve"), 3)[1] == arena.table.slots_of_owner(owner_digest("eve"))[::-1]
        assert arena.owned_slots(owner_digest("bob"), 3) == (0, [])
