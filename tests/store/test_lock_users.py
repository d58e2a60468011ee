"""Holders of the store's lock, waiters for it, and what is never done under it: `dispose`, `length`, logging."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fault_injection as faults
import pytest
from processes import Run, wait_for

from shmstore import Store, StoreTimeout
from shmstore.engine.arena import Arena
from shmstore.engine.layout import Geometry
from shmstore.options import Options
from shmstore.store import bulk
from shmstore.store.bulk import _BATCH


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Hold the lock of a store in another thread while the block runs."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        store.arena.lock(5)
        held.set()
        done.wait(60)
        store.arena.unlock()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("dispose", [None, lambda *_: None], ids=["plain", "with dispose"])
def test_a_lock_timeout_changes_nothing(dispose: Any) -> None:
    with Store(memory=2**18, lock_timeout=0.01, dispose=dispose, max=2, recency=0) as store:
        store.set("a", {"x": 1}, owner="ada")
        store.set("b", {}, ttl=0)
        before = faults.content(store), store.stats().sets
        calls: list[Callable[[], object]] = [
            lambda: store.set("a", {}), lambda: store.set("c", {}), lambda: store.add("c", {}),
            lambda: store.replace("a", {}), lambda: store.update("a", {"x": 2}), lambda: store.rename("a", "c"),
            lambda: store.touch("a"), lambda: store.touch("a", {"cookie": {}}), lambda: store.destroy("a"),
            lambda: store.destroy_owned("ada"), lambda: store.owned_by("ada"), lambda: store.get("a"),
            store.clear, store.prune,
        ]  # fmt: skip
        with locked(store):
            for call in calls:
                with pytest.raises(StoreTimeout, match=f"not free for 0.01 s: process {os.getpid()} .* holds it"):
                    call()
            assert store.peek("a") == {"x": 1}  # reading needs no lock
        assert (faults.content(store), store.stats().sets) == before
        store.set("a", {"x": 2})
        assert store.get("a") == {"x": 2}


def test_a_lock_timeout_of_zero_still_takes_a_free_lock() -> None:
    with Store(memory=2**18, lock_timeout=0) as store:
        store.set("a", {})
        with locked(store), pytest.raises(StoreTimeout):
            store.set("a", {})
        assert store.destroy("a") == 1


@pytest.mark.parametrize("drop", [Store.prune, Store.clear])
def test_bulk_removals_release_the_lock_between_batches(drop: Callable[[Store], object]) -> None:
    with Store(memory=2**20) as store, ThreadPoolExecutor(1) as other:

        def look(_: float) -> None:
            free.append(other.submit(lambda: (store.arena.try_lock(), store.arena.unlock())[0]).result())

        for count, pauses in ((_BATCH, 0), (3 * _BATCH + 1, 3)):
            free: list[bool] = []
            for number in range(count):
                store.set(str(number), {}, ttl=0)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(time, "sleep", look)
                drop(store)
            assert (free, len(store)) == ([True] * pauses, 0)


def test_options_are_published_atomically_while_the_lock_is_held(caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**18, lock_timeout=0.01) as store:
        for sid in "abc":
            store.set(sid, {}, ttl=0.001)
        with locked(store):
            store.change_options(store.options.of(memory=2**18, lock_timeout=0.01, ttl=5))
            store.change_options(store.options.of(memory=2**18, lock_timeout=0.01, max=2, ttl=7, check_period=0.01))
        assert "what is beyond max or max_per_owner stays for now: the store's lock was not free" in caplog.text
        wait_for(lambda: not store.ids(), "the automatic prune")
        store.set("d", {})
        loaded = store.load("d")
        assert loaded is not None
        assert round(loaded.remaining) == 7


def test_lowered_limits_of_a_store_that_is_closed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """The thread that enforces them may start only afterwards: it ends without an error."""
    with Store(memory=2**18, max=2) as store:
        pass
    bulk.shrink(store)
    assert not caplog.records


def test_length_is_never_called_under_the_lock() -> None:
    interruptions = list(range(8))
    me = threading.current_thread()

    def length(size: int, sid: str) -> int:
        if threading.current_thread() is me and sid == "a" and interruptions:
            number = interruptions.pop()
            with ThreadPoolExecutor(1) as other:  # times out if the lock is held here
                assert other.submit(store.update, "a", {"other": number}).result()
        return size

    with Store(memory=2**18, max=10_000, lock_timeout=0.1) as plain:
        plain.set("a", {})
        store = Store.over(plain.arena, type(plain.options).of(length=length, lock_timeout=0.1))
        assert store.update("a", {"mine": 1})  # although each of the first attempts is interrupted by a change
        assert store.get("a") == {"other": 0, "mine": 1}


def test_dispose_reads_an_expired_session_as_absent() -> None:
    seen: list[Any] = []

    def dispose(sid: str, session: Any, reason: str) -> None:
        seen.append((sid, session, store.get("a"), store.get("b")))
        with pytest.raises(RuntimeError, match="must not write"):
            store.destroy("b")

    with Store(memory=2**18, dispose=dispose, stale=True) as store:
        store.set("a", {"n": 1}, ttl=0)
        store.set("b", {"n": 2}, ttl=0)
        assert store.get("a") == {"n": 1}
        assert seen == [("a", {"n": 1}, None, None)]
        assert store.ids() == ["b"]
        assert store.stats().dispose_errors == 0


def test_evictions_of_live_sessions_are_logged_at_intervals(caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**18, max=2) as store, caplog.at_level(logging.WARNING, "shmstore"):
        store.set("old", {}, ttl=0)
        store.set("a", {})
        store.set("b", {})
        assert not caplog.records  # removing an expired session is not a loss
        for number in range(10):
            store.set(str(number), {}, owner="ada")
        assert [record.getMessage() for record in caplog.records] == [
            "a private store: evicting live sessions to make room (1 so far, 0 of them logged in): raise max or memory"
        ]


def test_closing_a_store_while_a_caller_waits_frees_the_lock(store_dir: Path, run: Run) -> None:
    """The call finally gets the real mutex, although the store no longer refers to it."""
    path = str(store_dir / "arena")
    options = Options.of(memory=2**18, check_period=None)
    with Store.over(Arena.create(path, Geometry.plan(2**18)), options) as store:
        store.publish_options()
        store.set("x", {})
        waiter = run(CLOSED_WHILE_WAITING, path)
        assert waiter.stdout
        assert waiter.stdout.readline() == "ready\n"
        try:
            store.arena.lock(1)
            waiter.send_signal(signal.SIGUSR1)
            time.sleep(0.3)  # it waits
            waiter.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        finally:
            store.arena.unlock()
        assert waiter.stdout.readline() == "StoreUnavailable\n"
        store._timeout = 1.0
        store.set("y", {})
        waiter.kill()
        waiter.wait()
        store.set("y", {})
    (store_dir / "arena").unlink()


CLOSED_WHILE_WAITING = """
import signal, sys, time
from shmstore import Store
from shmstore.engine.arena import Arena
from shmstore.options import Options

store = Store.over(Arena.open(sys.argv[1]), Options.of(memory=2**18, check_period=None))
store.get("x")  # from here on it counts
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: store.close())
print("ready", flush=True)
signal.pause()
try:
    store.set("x", {"a": 1})
except Exception as exc:
    print(type(exc).__name__, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("timeout", [2.0, math.inf])
def test_a_reentrant_call_is_refused_without_waiting(timeout: float) -> None:
    with Store(memory=2**18, check_period=None, lock_timeout=timeout) as store:
        try:
            store.arena.lock(1)
            with pytest.raises(StoreTimeout, match="called again"):
                store.set("a", {})
        finally:
            store.arena.unlock()
        store.get("a")
        assert store.stats().lock_waits == 0


def test_clear_removes_all_earlier_sessions_despite_a_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(memory=2**20, check_period=None) as store:
        for number in range(400):
            store.set(f"old {number}", {})
        for number in range(200):
            store.destroy(f"old {number}")
        moved: list[int] = []

        def move_once(_: float) -> None:
            if not moved:
                moved.append(store.move())
                for number in range(200):
                    store.set(f"new {number}", {})

        monkeypatch.setattr("shmstore.store.bulk.time.sleep", move_once)
        store.clear()
        assert moved
        assert {sid.split()[0] for sid in store.ids()} == {"new"}
        assert len(store) == 200
