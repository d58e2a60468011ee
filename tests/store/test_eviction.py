"""The order of eviction, and that space can always be made: floods, changing sizes, a prune beside a writer."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator

import fault_injection as faults
import pytest
import stress_child
from engines import on_each_engine
from fault_injection import Clock, Steps, body, stepping

from shmstore import Store, StoreTimeout
from shmstore.engine.arena import Arena
from shmstore.engine.verify import verify

FULL = os.environ.get("SHMSTORE_FULL") == "1"
PART = 1 if FULL else 10
PHASE = 4000 if FULL else 1200  # sessions; the largest of a phase fill the memory several times
NS = 10**9

Figure = Callable[[str], None]


@on_each_engine
def test_a_flood_of_visitors_logs_no_user_out(figure: Figure) -> None:
    most, users, visitors = 10_000 // PART, 1000 // PART, 50_000 // PART
    with Store(memory=2**25, max=most, check_period=None) as store:
        for number in range(users):
            store.set(f"user {number}", {"user": number}, owner=str(number))
        for number in range(visitors):
            store.set(f"visitor {number}", {"visitor": number})
        left = [number for number in range(users) if store.get(f"user {number}") == {"user": number}]
        stats = store.stats()
        assert len(left) == stats.owned == users
        assert (stats.sessions, stats.evicted) == (most, users + visitors - most)
        newest = range(visitors - 1, visitors - 1 - (most - users), -1)
        assert [sid for sid in store.ids() if sid[0] == "v"] == [f"visitor {number}" for number in newest]
        verify(store.arena)
    figure(f"{len(left)} of {users} users left after {visitors} visitors")


def phases(rnd: random.Random, total: int) -> Iterator[tuple[int, int]]:
    """Return numbers and the sizes of their sessions: phases of small sessions, of all sizes, and of 64 KB."""
    sizes: list[Callable[[], int]] = [
        lambda: stress_child.SMALLEST,
        lambda: stress_child.size_of(rnd),
        lambda: stress_child.LARGEST,
    ]
    for number in range(total):
        yield number, sizes[number // PHASE % 3]()


@on_each_engine
def test_there_is_room_for_all_mixes_of_sizes(seed: int, figure: Figure) -> None:
    total = 50 * PHASE if FULL else 3 * PHASE
    lowest, full = math.inf, False
    with Store(memory=2**23, max_session=2**17, check_period=None) as store:
        for number, size in phases(random.Random(seed), total):
            # Half of them overwrite a session, often in another size.
            key = number if number % 2 else number // 3
            store.set(str(key), stress_child.session_of(key, number, size), owner="ada" if number % 7 == 0 else None)
            if number % 10 == 0:
                found = store.peek(str(key))
                assert found is not None
                assert (found["sequence"], stress_child.is_whole(found)) == (number, True)
                stats = store.stats()
                full = full or stats.evicted > 0
                lowest = min(lowest, stats.bytes / stats.memory if full else 1)
            if number % PHASE == PHASE - 1:
                verify(store.arena)
                assert all(map(stress_child.is_whole, store.all().values()))
        stats = store.stats()
        assert stats.sets == total
        assert full
        assert lowest >= 0.95
    figure(f"{total} sets, none refused, at least {lowest:.1%} of the memory in use")


@on_each_engine
def test_the_victims_are_the_least_recently_used(seed: int) -> None:
    rnd, clock, most = random.Random(seed), Clock(), 50
    used: dict[str, None] = {}  # the least recently used first
    with Store(memory=2**18, max=most, clock=clock, recency=0, check_period=None) as store:
        for number in range(200_000 // PART):
            clock.now += rnd.choice([0, 1, NS])
            sid = str(rnd.randrange(3 * most))
            if rnd.random() < 0.6:
                if store.get(sid) is not None:
                    used[sid] = used.pop(sid)
            else:
                store.set(sid, {})
                if sid not in used and len(used) == most:
                    del used[next(iter(used))]
                used.pop(sid, None)
                used[sid] = None
            if number % 100 == 0:
                assert store.ids() == list(reversed(used))
        assert store.ids() == list(reversed(used))


@on_each_engine
def test_the_victims_are_among_the_least_recently_used_within_recency(seed: int) -> None:
    rnd, clock, most, recency = random.Random(seed), Clock(), 50, 2
    used: dict[str, int] = {}
    with Store(memory=2**18, max=most, clock=clock, recency=recency, check_period=None) as store:
        for _ in range(50_000 // PART):
            clock.now += rnd.randrange(NS // 10)
            sid = str(rnd.randrange(3 * most))
            if rnd.random() < 0.8:
                if store.get(sid) is not None:
                    used[sid] = clock.now
            else:
                store.set(sid, {})
                used[sid] = clock.now
                left = set(store.ids())
                oldest = min(used[survivor] for survivor in left)
                for victim in used.keys() - left:
                    assert used.pop(victim) <= oldest + recency * NS


@on_each_engine
def test_an_owner_keeps_the_most_recently_used_sessions(seed: int, figure: Figure) -> None:
    rnd, clock, most = random.Random(seed), Clock(), 3
    actions, users, visitors = 100_000 // PART, 1000 // PART, 500 // PART
    used: dict[str, dict[str, None]] = {str(user): {} for user in range(users)}  # the least recently used first
    with Store(memory=2**23, max_per_owner=most, clock=clock, recency=0, check_period=None) as store:
        for number in range(visitors):
            store.set(f"visitor {number}", {})
        for number in range(actions):
            user = rnd.choice(list(used))
            theirs = used[user]
            if theirs and rnd.random() < 0.5:
                sid = rnd.choice(list(theirs))
                assert store.get(sid) == {"user": user}
            else:
                sid = f"{user} at {number}"
                store.set(sid, {"user": user}, owner=user)
            theirs.pop(sid, None)
            theirs[sid] = None
            if len(theirs) > most:
                del theirs[next(iter(theirs))]
            if number % 100 == 0:
                assert store.owned_by(user) == list(reversed(theirs))
        assert {user: store.owned_by(user) for user in used} == {user: [*reversed(used[user])] for user in used}
        stats = store.stats()
        assert stats.sessions == visitors + stats.owned
        assert (stats.displaced, stats.evicted) == (stats.sets - stats.sessions, 0)
        verify(store.arena)
    figure(f"{stats.sets - visitors} logins of {users} users, each keeps the last {most}")


# -- a prune and a clear beside a writer -------------------------------------------------------------------------------
# They are stepped in Python; the writer is of the engine that is there.


def renew(store: Store) -> None:
    """A login under an id whose session has expired."""
    store.set("old 1", body(50, "n"), ttl=60)


def reuse(store: Store) -> None:
    """The slot of an expired session is reused for another session."""
    store.destroy("old 1")
    store.set("new", body(50, "n"), ttl=60)


def shorten(store: Store) -> None:
    """A deadline that the prune may have checked already becomes earlier."""
    store.touch("a", ttl=1)
    store.set("short", {}, ttl=0.5)


def living(store: Store) -> faults.Content:
    return {sid: each for sid, each in faults.content(store).items() if each[2] > store.options.clock()}


@pytest.mark.parametrize("change", [renew, reuse, shorten])
def test_a_prune_keeps_sessions_that_are_renewed_meanwhile(change: Callable[[Store], None], seed: int) -> None:
    """Let a writer run before each step of a prune; in the short version, before some of them."""
    rnd, chosen, let_in = random.Random(seed), 0, 0
    while True:
        chosen += 1 if FULL else rnd.randint(1, 8)
        with faults.populated() as store, faults.second_view(store) as writer:
            expected = living(store)

            def write(writer: Store = writer, expected: faults.Content = expected) -> None:
                with contextlib.suppress(StoreTimeout):  # the prune holds the lock: a writer waits
                    change(writer)
                    expected.clear()
                    expected |= living(writer)

            before = dict(expected)
            steps = Steps(chosen, write, reads=True)
            with stepping(store.arena, steps):
                store.prune()
            let_in += expected != before
            assert faults.content(store) == expected, f"step {chosen}"
            verify(store.arena)
            clock = store.options.clock
            assert isinstance(clock, Clock)
            clock.now += 3600 * NS
            assert store.prune() == len(expected), f"step {chosen}: a deadline is overlooked ever after"
            if steps.count < chosen:
                assert let_in >= (5 if FULL else 1), "the writer was hardly let in"
                return


@on_each_engine
def test_a_session_is_evicted_when_slots_run_out_before_blocks(caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**16, check_period=None) as store, caplog.at_level(logging.ERROR, "shmstore"):
        slots = store.arena.geometry.slots
        for number in range(slots + 10):
            store.set(str(number), {})
        assert store.ids() == [str(number) for number in reversed(range(10, slots + 10))]
        assert store.stats().bytes <= store.arena.geometry.size
        verify(store.arena)
    assert not caplog.records


def test_evictions_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Store(memory=2**16, max=2, check_period=None) as store, caplog.at_level(logging.WARNING, "shmstore"):
        for minute in range(3):
            for number in range(10):
                store.set(f"{minute} {number}", {})
            assert len(caplog.records) == minute + 1
            now += 61


@on_each_engine
def test_a_write_that_is_done_does_not_fail_because_the_store_is_closed_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread may close it, after the lock is released and before the eviction is logged."""
    with Store(memory=2**20, max=1, check_period=None) as store, faults.second_view(store) as other:
        store.set("a", {})
        report = store._eviction.report

        def close_and_report(arena: Arena) -> None:
            store.close()
            report(arena)

        monkeypatch.setattr(store._eviction, "report", close_and_report)
        store.set("b", {"n": 1})
        assert store.closed
        assert other.all() == {"b": {"n": 1}}


def test_a_clear_keeps_sessions_that_are_created_meanwhile(seed: int) -> None:
    """Replace an old session by a new one before each step of a clear; in the short version, before some steps."""
    rnd, chosen, stayed = random.Random(seed), 0, 0
    while True:
        chosen += 1 if FULL else rnd.randint(1, 8)
        with faults.populated() as store, faults.second_view(store) as writer:
            came: list[bool] = []

            def come(writer: Store = writer, came: list[bool] = came) -> None:
                with contextlib.suppress(StoreTimeout):  # the clear holds the lock: a writer waits
                    reuse(writer)
                    came.append(True)

            steps = Steps(chosen, come, reads=True)
            with stepping(store.arena, steps):
                store.clear()
            left = store.ids()
            # A session that is added while the list of victims is made may be on it; one that is added later is not.
            assert left == ["new"] or not (left or (came and stayed)), f"step {chosen}: {left}"
            stayed += len(left)
            verify(store.arena)
            if steps.count < chosen:
                assert stayed >= (5 if FULL else 1), "no newcomer stayed"
                return
