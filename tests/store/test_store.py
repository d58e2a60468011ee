"""The private store: the contract, and its particular behaviour."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import pickle
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_injection as faults
import pytest
from engines import on_each_engine
from processes import ROOT

from shmstore import ConfigError, RecordTooLarge, Store, StoreFull, StoreUnavailable, snapshot
from shmstore.codec.ids import key_of
from shmstore.engine.arena import Arena
from shmstore.engine.layout import TOMBSTONE_WAYS, Geometry
from shmstore.engine.verify import verify
from shmstore.options import Options
from shmstore.testing import StoreContract

pytestmark = on_each_engine


class TestStore(StoreContract):
    def make_store(self, **options: Any) -> Store:
        return Store(**options)


class Clock:
    """A clock that advances only when it is set."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_session_is_alive_at_its_deadline_and_not_later(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, ttl=5) as store:
        store.set("a", {"x": 1})
        clock.now = 5 * 10**9
        assert store.get("a") == {"x": 1}
        clock.now += 1
        assert store.get("a") is None


def test_reads_within_recency_do_not_reorder(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, recency=1) as store:
        for sid in "abc":
            store.set(sid, {})
        clock.now = 10**9 - 1
        store.get("a")
        assert store.ids() == ["c", "b", "a"]
        clock.now += 10
        store.get("a")
        assert store.ids() == ["a", "c", "b"]


def test_ttl_functions_see_options_session_and_id(clock: Clock) -> None:
    seen = []

    def life(options: Any, session: Any, sid: str) -> float:
        seen.append((options.max, session, sid))
        return float(session["life"])

    with Store(memory=2**18, clock=clock, ttl=life, max=9) as store:
        store.set("a", {"life": 2})
        assert seen == [(9, {"life": 2}, "a")]
        clock.now = 10**9
        assert store.touch("a")
        assert seen[1] == (9, {"life": 2}, "a")
        clock.now = 3 * 10**9
        assert "a" in store
        clock.now += 1
        assert "a" not in store


@pytest.mark.parametrize("result", [None, "60", True, float("nan")])
def test_a_ttl_function_that_returns_nonsense_stores_nothing(result: Any) -> None:
    with Store(memory=2**18, ttl=lambda *_: result) as store:
        with pytest.raises((TypeError, ValueError), match="ttl"):
            store.set("a", {})
        assert store.ids() == []


def test_load_returns_age_idle_time_and_remaining_ttl(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, recency=0) as store:
        store.set("a", {"x": 1}, ttl=100, owner="ada")
        clock.now = 10 * 10**9
        store.update("a", {"y": 2})
        clock.now = 30 * 10**9
        loaded = store.load("a")
        assert loaded is not None
        assert store.codec.decode(loaded.payload) == {"x": 1, "y": 2}
        assert (loaded.created, loaded.idle, loaded.owner) == (30, 20, "ada")
        assert loaded.remaining == pytest.approx(70, abs=1e-6)
        assert store.load("b") is None


def test_another_serializers_record_is_a_counted_miss() -> None:
    import json

    with Store(memory=2**18) as store:
        store.set("a", {"x": 1})
        other = Store.over(store.arena, type(store.options).of(serializer=json))
        assert other.get("a") is None
        assert other.load("a") is None
        assert other.all() == {}
        assert store.stats().misses == 2
        assert store.get("a") == {"x": 1}


def test_the_largest_session_can_be_overwritten() -> None:
    with Store(memory=2**16) as store:
        limit = store.options.session_limit
        value = "y" * (limit - 10)
        for _ in range(5):
            store.set("s" * 256, {"x": value}, owner="o" * 256)
        assert store.update("s" * 256, {"x": value[::-1]})
        with pytest.raises(RecordTooLarge):
            store.set("t", {"x": value + "y" * 10})
        verify(store.arena)


def test_a_store_does_not_outlive_its_last_reference() -> None:
    import weakref

    store = Store(memory=2**18, check_period=60)
    reference = weakref.ref(store)
    del store
    gc.collect()
    assert reference() is None


def test_the_order_of_use_is_exact_with_a_stopped_clock(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, recency=0) as store:
        for sid in "abc":
            store.set(sid, {})
        store.get("a")
        assert store.ids() == ["a", "c", "b"]


def held_until(store: Store, wait: Callable[[], object]) -> threading.Thread:
    """Hold the lock of a store in another thread until ``wait`` returns."""
    held = threading.Event()

    def hold() -> None:
        store.arena.lock(5)
        held.set()
        wait()
        store.arena.unlock()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    return thread


@pytest.mark.parametrize("write", ["touch", "update", "replace", "rename"])
def test_a_session_that_expires_while_a_writer_waits_stays_expired(clock: Clock, write: str) -> None:
    with Store(memory=2**18, clock=clock) as store:
        store.set("a", {"n": 1}, ttl=1)

        def expire() -> None:
            time.sleep(0.05)  # a writer that starts later finds it expired at once
            clock.now = 2 * 10**9

        thread = held_until(store, expire)
        arguments: dict[str, tuple[Any, ...]] = {
            "touch": ("a", None, 60),
            "update": ("a", {"n": 2}, (), 60),
            "replace": ("a", {"n": 2}, 60),
            "rename": ("a", "b", {}, (), 60),
        }
        assert getattr(store, write)(*arguments[write]) is False
        thread.join()
        assert store.get("a") is None
        assert store.get("b") is None


def test_hits_succeed_and_are_counted_while_the_lock_is_held() -> None:
    with Store(memory=2**18, lock_timeout=0.1) as store:
        store.set("a", {"n": 1})
        done = threading.Event()
        thread = held_until(store, done.wait)
        assert store.get("a") == store.get("a") == {"n": 1}
        done.set()
        thread.join()
        assert store.get("a") == {"n": 1}
        assert store.stats().hits == 3


def test_concurrent_prunes_lose_no_deadline(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock) as store:
        store.set("a", {}, ttl=1000)
        arena = store.arena
        first = arena.begin_sweep()
        store.set("b", {}, ttl=5)  # seen by the second only
        second = arena.begin_sweep()
        arena.end_sweep(second, store.arena.cells[arena.table.expires + arena.find(key_of(b"b"))])
        arena.end_sweep(first, 10**15)
        verify(arena)


def test_expired_sessions_are_evicted_first_at_any_position_of_the_hand(clock: Clock) -> None:
    with Store(memory=2**18, clock=clock, max=10, recency=0) as store:
        for number in range(10):
            store.set(str(number), {}, ttl=1000)
        for round_ in range(50):
            clock.now += 10**9
            expiring = store.ids()[round_ % 10]
            store.touch(expiring, ttl=0)
            store.set(f"new {round_}", {}, ttl=1000)
            assert expiring not in store.ids()
        assert store.stats().evicted == 0


def test_closing_during_writes_frees_the_lock(store_dir: Path) -> None:
    path = store_dir / "arena"
    with Store.over(Arena.create(path, Options.of(memory=2**18).geometry), Options.of(memory=2**18)) as witness:
        witness.change_options(witness.options)
        for _ in range(20):
            store = Store.over(Arena.open(path), Options.of(memory=2**18))
            threads = [threading.Thread(target=write_until_closed, args=(store, str(n))) for n in range(3)]
            for thread in threads:
                thread.start()
            time.sleep(0.005)
            store.close()
            for thread in threads:
                thread.join()
            witness.set("a", {"n": 1})
        verify(witness.arena)


def write_until_closed(store: Store, sid: str) -> None:
    with contextlib.suppress(StoreUnavailable):
        while True:
            store.set(sid, {"x": "y" * 300})


def test_unreferenced_stores_leave_no_open_descriptor() -> None:
    inodes = set()
    for _ in range(5):
        store = Store(memory=2**18)
        store.set("a", {})
        inodes.add(store.arena.file.identity()[1])
    del store
    gc.collect()
    left = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            left.add(os.stat(f"/proc/self/fd/{fd}").st_ino)
    assert len(inodes) == 5
    assert not left & inodes


def test_a_cell_that_points_to_another_session_is_a_miss() -> None:
    with Store(memory=2**18, check_period=None) as store:
        store.set("a", {"who": "a"})
        store.set("b", {"who": "b"})
        arena = store.arena
        arena.cells[arena.table.record + arena.find(key_of(b"a"))] = arena.cells[
            arena.table.record + arena.find(key_of(b"b"))
        ]
        assert store.get("a") is None
        assert store.all() == {"b": {"who": "b"}}
        assert store.update("a", {"x": 1}) is False
        assert store.get("b") == {"who": "b"}


def test_destroy_owned_misses_no_session_of_a_stopped_writer() -> None:
    for chosen in range(1, 40):
        with faults.populated() as store:

            class Stop(BaseException):
                pass

            def stop(error: type[BaseException] = Stop) -> None:
                raise error

            with faults.stepping(store.arena, faults.Steps(chosen, stop)), contextlib.suppress(Stop):
                store.update("a", {"more": 1})
            assert sorted(store.owned_by("ada")) == ["a", "d"]
            assert store.destroy_owned("ada", keep="nobody") == 2
            assert store.owned_by("ada") == []


def test_dispose_may_read_and_must_not_write() -> None:
    seen: list[Any] = []

    def dispose(sid: str, session: Any, reason: str) -> None:
        seen.append(store.peek(sid))
        try:
            store.set("other", {})
        except RuntimeError as error:
            seen.append(str(error))

    with Store(memory=2**18, dispose=dispose) as store:
        store.set("a", {"n": 1})
        store.destroy("a")
        assert seen == [{"n": 1}, seen[1]]
        assert "must not write" in seen[1]
        assert store.ids() == []


def test_lowering_max_takes_effect_at_once() -> None:
    with Store(memory=2**18, max=100, recency=0) as store:
        for number in range(100):
            store.set(str(number), {})
        store.change_options(Options.of(max=3, recency=0))
        assert store.ids() == ["99", "98", "97"]


def test_pickling_a_private_store_is_an_error() -> None:
    with Store(memory=2**16) as store, pytest.raises(TypeError, match="StoreManager"):
        pickle.dumps(store)


def test_more_memory_than_available_is_an_error_without_the_oom_killer() -> None:
    with pytest.raises(StoreFull, match="memory="):
        Store(memory=2**37)


def test_an_id_has_one_tombstone_after_any_number_of_removals(clock: Clock) -> None:
    clock.now = 2  # the earliest time of a tombstone: 0 stands for never, and the lowest bit has another meaning
    with Store(memory=2**18, clock=clock, check_period=None) as store:
        others = [sid for sid in map(str, range(5000)) if near(store, sid, "a")][: TOMBSTONE_WAYS - 1]
        assert len(others) == TOMBSTONE_WAYS - 1
        for sid in [*others, "a", "a", "a", "a"]:
            store.set(sid, {})
            store.destroy(sid, tombstone=True)
        assert all(store.gone(sid) for sid in [*others, "a"])


def test_a_tombstone_from_the_future_is_ignored(clock: Clock, tmp_path: Path) -> None:
    clock.now = 10**10
    with Store(memory=2**18, clock=clock, check_period=None) as store:
        store.set("a", {"n": 1})
        snapshot.save(store, tmp_path / "saved")
        store.destroy("a", tombstone=True)
        first, _, times = store.arena.reader.tombstones_of(key_of(b"a"))
        store.arena.cells[first + TOMBSTONE_WAYS + times.index(max(times))] ^= 1 << 62
        assert not store.gone("a")
        assert snapshot.load(store, tmp_path / "saved") == 1
        for sid in [sid for sid in map(str, range(20_000)) if near(store, sid, "a")][:TOMBSTONE_WAYS]:
            store.set(sid, {})
            store.destroy(sid, tombstone=True)
            assert store.gone(sid)
        assert max(store.arena.reader.tombstones_of(key_of(b"a"))[2]) <= clock.now | 1, "its place is not taken again"


def near(store: Store, one: str, other: str) -> bool:
    """Return whether the tombstones of two ids are in one set."""
    places = [store.arena.reader.tombstones_of(key_of(sid.encode()))[0] for sid in (one, other)]
    return one != other and places[0] == places[1]


def test_the_page_on_security_states_the_number_of_tombstones_and_their_loss() -> None:
    """A tombstone is lost if at least as many later ones as a set holds fall into its set: a Poisson distribution."""
    sets = Geometry.plan(Options().memory).tombstone_sets

    def one_in(logouts: int) -> float:
        each = logouts / sets
        kept = (math.exp(-each + n * math.log(each) - math.lgamma(n + 1)) for n in range(TOMBSTONE_WAYS))
        return 1 / (1 - sum(kept))

    page = " ".join(Path(ROOT, "docs", "understand", "security.md").read_text().split())
    said = re.search(
        r"64 MiB has ([\d ]+) places\. If there are ([\d ]+) logouts and changes of ids within these 4 seconds, "
        r"one in ([\d ]+) is forgotten too early; of ([\d ]+), one in ([\d ]+)\.", page,
    )  # fmt: skip
    assert said is not None
    places, some, lost_of_some, many, lost_of_many = (int(number.replace(" ", "")) for number in said.groups())
    assert places == sets * TOMBSTONE_WAYS
    assert lost_of_some == pytest.approx(one_in(some), rel=0.02)
    assert lost_of_many == pytest.approx(one_in(many), rel=0.02)


def test_no_tombstone_is_lost_at_half_the_capacity() -> None:
    """One set of some thousands may overflow: docs/understand/security.md has the figures."""
    with Store(memory=2**22, check_period=None) as store:
        most = store.arena.geometry.tombstone_sets * TOMBSTONE_WAYS
        assert most >= store.arena.geometry.slots / 8
        sids = [f"session {number}" for number in range(most // 2 + 100)]
        for sid in sids:
            store.add(sid, {})
            store.destroy(sid, tombstone=True)
        assert all(map(store.gone, sids[:100]))


@pytest.mark.parametrize("text", ["2M", "2 MiB", "2mb", "2048K", " 2097152 "])
def test_a_size_may_be_text(text: str) -> None:
    with Store(memory=text, max_session="64K") as store:
        assert store.options.memory == 2 * 2**20
        assert store.options.max_session == 2**16


@pytest.mark.parametrize("text", ["", "64X", "-1M", "1.5M", "lots"])
def test_the_error_for_an_invalid_size_shows_valid_ones(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"memory: {text!r} is not a whole number of bytes, such as 67108864, 64M"):
        Store(memory=text)


def test_the_error_for_a_misspelt_option_suggests_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'memmory'; .*; did you mean 'memory'\?"):
        Store(memmory=2**20)
