"""A flipped bit in each kind of cell: operations work, it is repaired at most once, other sessions are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from engines import on_each_engine
from processes import Start
from sampling import sample

from shmstore import Store, snapshot
from shmstore.codec.ids import key_of
from shmstore.engine import header as at
from shmstore.engine.arena import Arena
from shmstore.engine.layout import FIELDS, SLOT
from shmstore.engine.verify import verify
from shmstore.options import Options
from shmstore.system.clock import boottime_ns
from shmstore.testing import wait_until

pytestmark = on_each_engine

BITS = (0, 1, 2, 4, 9, 20, 31, 32, 40, 50, 62, 63)
OWNERS = {"0": "ada", "1": "ada", "2": "ada", "3": "bob"}
OTHERS = [str(number) for number in range(4, 12)]
MAX = 30


@contextmanager
def filled() -> Iterator[Store]:
    """A store with each kind of content: owners with three sessions and one, no owner, expired ones, free slots."""
    with Store(memory=2**17, max=MAX, check_period=None, recency=0, lock_timeout=0.5) as store:
        for sid in [*OWNERS, *OTHERS]:
            store.set(sid, {"sid": sid, "x": "y" * 100}, owner=OWNERS.get(sid))
        for number in range(4):
            store.set(f"free {number}", {})
        store.destroy([f"free {number}" for number in range(4)])
        store.set("expired", {}, ttl=0)
        yield store


@pytest.fixture
def bits(request: pytest.FixtureRequest) -> list[int]:
    """Return the bits that are flipped one after another; in the short version, some of them."""
    return sample(BITS, 3, request.node.nodeid)


@pytest.fixture
def heals(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of repairs."""
    repair, found = Store.repair, list[str]()

    def noted(self: Store, arena: Any, damage: Any) -> None:
        found.append(str(damage))
        repair(self, arena, damage)

    monkeypatch.setattr(Store, "repair", noted)
    return found


def is_its_own(store: Store, sid: str) -> bool:
    """Verify that an id never returns the session of another id; return whether it returns one."""
    session = store.get(sid)
    assert session is None or session["sid"] == sid
    return session is not None


def work(store: Store, lost: set[str]) -> None:
    """Use every operation; sessions that were reported as lost may be missing."""
    for sid in [*OWNERS, *OTHERS]:
        assert is_its_own(store, sid) or sid in lost, f"{sid} is lost"
    for name in ("new", "another"):
        store.set(name, {"sid": name})
        assert is_its_own(store, name)
    for sid in ("4", "0", "1", "3"):
        assert store.update(sid, {"changed": 1}) or sid in lost
        assert store.touch(sid) or sid in lost
    assert store.rename("5", "renamed", {"sid": "renamed"}) or "5" in lost
    for sid in ("3", "6"):
        store.set(sid, {"sid": sid}, owner="bob")
        assert is_its_own(store, sid)
    assert {*store.owned_by("ada")} | lost >= {"0", "1", "2"}
    store.set("login", {"sid": "login"}, owner="ada")
    assert store.destroy("7") or "7" in lost
    assert 4 - len(lost & {"0", "1", "2"}) <= store.destroy_owned("ada") <= 4
    assert store.owned_by("ada") == []
    store.prune()
    store.all()
    store.stats()
    for number in range(MAX + 5):
        store.set(f"flood {number}", {"sid": f"flood {number}"})
        assert is_its_own(store, f"flood {number}")
    assert {*store.owned_by("bob")} == {"3", "6"}, "who is logged in was evicted"


def flip(arena: Arena, cell: int, bit: int) -> None:
    arena.cells[cell] ^= 1 << bit


STATE_CELLS = {
    name: getattr(at, name)
    for name in (
        "PENDING", "STRUCTURE", "TICK", "SESSIONS", "USED_BLOCKS", "TOP_SLOT", "FREE_SLOT", "FREE_RUN",
        "EARLIEST", "EARLIEST_COPY", "RECENT_EARLIEST", "HAND", "WEIGHT", "SWEEP", "SETS", "DESTROYED", "EXPIRED",
        "EVICTED", "DISPLACED", "TOUCHES", "HAS_WEIGHTS", "OPTIONS",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", STATE_CELLS)
def test_a_cell_of_the_state(name: str, bits: list[int], heals: list[str]) -> None:
    for bit in bits:
        heals.clear()
        with filled() as store:
            flip(store.arena, STATE_CELLS[name], bit)
            try:
                work(store, set())
            except Exception as error:
                raise AssertionError(f"bit {bit}: {heals}") from error
            assert len(heals) <= 1, f"bit {bit}: {heals}"


def test_options_that_are_applied_evict_nothing_because_of_a_wrong_weight(bits: list[int], heals: list[str]) -> None:
    for bit in bits:
        heals.clear()
        with filled() as store:
            content = store.all()
            store.arena.cells[at.WEIGHT] = MAX + 1 + (1 << bit)
            store.change_options(store.options)
            wait_until(lambda: store.stats().rebuilds == 1)
            assert store.all() == content
            assert (store.stats().evicted, len(heals)) == (0, 1)
            verify(store.arena)


def test_a_lost_note_that_sessions_have_weights_is_repaired_once(heals: list[str]) -> None:
    with Store(memory=2**17, max=200, check_period=None, length=lambda *_: 10) as store:
        for number in range(20):
            store.set(str(number), {})
        store.change_options(Options.of(memory=2**17, max=200, check_period=None))
        flip(store.arena, at.HAS_WEIGHTS, 0)
        for number in range(30):
            store.set(f"new {number}", {})
        assert len(heals) == 1
        assert len(store) == 47
        verify(store.arena)


SLOTS: dict[str, Callable[[Arena], int]] = {
    "of one of three": lambda arena: arena.find(key_of(b"1")),
    "of an only one": lambda arena: arena.find(key_of(b"3")),
    "of a stranger": lambda arena: arena.find(key_of(b"8")),
    "that is free": lambda arena: arena.cells[at.FREE_SLOT],
    "none": lambda arena: 0,
    "the anchor": lambda arena: arena.table.owned_list,
}


@pytest.mark.parametrize("which", SLOTS)
@pytest.mark.parametrize("field", range(SLOT), ids=FIELDS)
def test_a_cell_of_a_slot(which: str, field: int, bits: list[int], heals: list[str]) -> None:
    lost = {"of one of three": {"1"}, "of an only one": {"3"}, "of a stranger": {"8"}}.get(which, set())
    if FIELDS[field] == "chain":
        lost = {*OWNERS, *OTHERS}  # a chain leads to others too
    for bit in bits:
        heals.clear()
        with filled() as store:
            arena = store.arena
            flip(arena, arena.table.key_low + field + SLOTS[which](arena), bit)
            try:
                work(store, lost)
            except Exception as error:
                raise AssertionError(f"bit {bit}: {heals}") from error
            assert len(heals) <= 1, f"bit {bit}: {heals}"


@pytest.mark.parametrize("sid", ["1", "3"])
def test_a_bucket_of_the_owner_index(sid: str, bits: list[int], heals: list[str]) -> None:
    for bit in bits:
        heals.clear()
        with filled() as store:
            arena = store.arena
            owner = arena.cells[arena.table.owner + arena.find(key_of(sid.encode()))]
            flip(arena, arena.table.owners + owner % arena.geometry.owner_buckets, bit)
            store.set(sid, {"sid": sid}, owner="eve")  # the missing list is detected
            assert store.owned_by("eve") == [sid]
            assert len(heals) == 1, f"bit {bit}: {heals}"
            verify(store.arena)


@pytest.mark.parametrize("later", [False, True], ids=["", "and a write later"])
@pytest.mark.parametrize("name", ["EARLIEST", "EARLIEST_COPY", "RECENT_EARLIEST"])
def test_expired_sessions_are_evicted_before_live_ones(name: str, later: bool, bits: list[int]) -> None:
    """For any stored value of the earliest deadline."""
    for bit in bits:
        now = [10**9]
        with Store(memory=2**16, max=20, check_period=None, clock=lambda now=now: now[0]) as store:
            store.set("live", {}, ttl=3600)
            for number in range(19):
                store.set(str(number), {}, ttl=60)
            flip(store.arena, STATE_CELLS[name], bit)
            if later:
                store.set("0", {}, ttl=50)  # a deadline before all others
            now[0] += 65 * 10**9
            for number in range(19):
                store.set(f"new {number}", {}, ttl=3600)
            assert (store.stats().expired, store.stats().evicted) == (19, 0), f"bit {bit}"
            store.prune()
            assert store.arena.cells[at.EARLIEST] == store.arena.cells[at.EARLIEST_COPY]
            verify(store.arena)


# -- options -----------------------------------------------------------------------------------------------------------

OPTION_CELLS = {
    name: getattr(at, name)
    for name in (
        "MAX", "MAX_PER_OWNER", "MAX_SESSION", "TTL", "RECENCY", "STALE", "DISPOSES", "DISPOSES_ON_SET",
        "OPTIONS_COPY", "OPTIONS_SUM",
    )
}  # fmt: skip


@pytest.mark.parametrize("given", [False, True], ids=["no limits", "limits"])
@pytest.mark.parametrize("name", OPTION_CELLS)
def test_an_option(name: str, given: bool, bits: list[int], heals: list[str]) -> None:
    """The damaged option removes, expires, returns or refuses no session, and it is restored."""
    disposed: list[str] = []
    options: dict[str, Any] = {}
    if given:
        options = {
            "max": 12, "max_per_owner": 3, "max_session": 1000, "ttl": 60, "stale": True,
            "dispose": lambda sid, session, reason: disposed.append(f"{sid} {reason}"),
        }  # fmt: skip
    for bit in bits:
        heals.clear()
        disposed.clear()
        with Store(memory=2**17, check_period=None, recency=0, **options) as store:
            for sid in [*OWNERS, *OTHERS[:4]]:
                store.set(sid, {"sid": sid}, owner=OWNERS.get(sid))
            store.set("expired", {"sid": "expired"}, ttl=0)
            laid = store.arena.cells[at.OPTION_CELLS].tolist()
            flip(store.arena, OPTION_CELLS[name], bit)
            assert (store.get("expired") is not None) <= given
            store.set("new", {"sid": "new", "x": "y" * 500}, owner="bob")
            store.set("4", {"sid": "4"})
            assert {*OWNERS, *OTHERS[:4], "new"} <= {*store.ids()}, f"bit {bit}"
            assert all(is_its_own(store, sid) for sid in [*OWNERS, *OTHERS[:4], "new"]), f"bit {bit}"
            remaining = store.load("new")
            assert remaining is not None
            assert remaining.remaining <= (60 if given else 86400)
            assert remaining.remaining > (50 if given else 86000), f"bit {bit}"
            stats = store.stats()
            assert (stats.evicted, stats.displaced, stats.refused) == (0, 0, 0), f"bit {bit}"
            store.destroy("5")
            assert ("5 destroy" in disposed) == given, f"bit {bit}"
            store.prune()
            assert store.arena.cells[at.OPTION_CELLS].tolist() == laid, f"bit {bit}"
            verify(store.arena)
            if given:
                store.set("1 more", {}, owner="ada")
                assert store.stats().displaced == 1
                assert len(store.owned_by("ada")) == 3
            assert len(heals) <= 1


@pytest.mark.parametrize("step", ["set", "move"])
def test_options_with_two_damaged_cells(step: str, heals: list[str]) -> None:
    """Also if the copy is of no use: the store evicts nothing, and obeys the options that it was given."""
    with filled() as store:
        content, laid = store.all(), store.arena.cells[at.OPTION_CELLS].tolist()
        store.arena.cells[at.MAX] = 2
        flip(store.arena, at.OPTIONS_SUM, 5)
        if step == "move":
            store.move()
        store.set("new", {})
        assert store.arena.cells[at.OPTION_CELLS].tolist() == laid
        assert store.all() == content | {"new": {}}
        assert len(heals) == 1
        verify(store.arena)


def test_options_of_a_store_with_a_server(manage: Start) -> None:
    """The server checks and restores all of them, even those that no operation verifies."""
    manager = manage(memory=2**20, check_period=None, recency=5)
    with manager.store() as store:
        laid = store.arena.cells[at.OPTION_CELLS].tolist()
        for cell in range(at.MAX, at.DISPOSES_ON_SET + 1):
            flip(store.arena, cell, 1)
        wait_until(lambda: store.arena.cells[at.OPTION_CELLS].tolist() == laid)
        assert store.stats().rebuilds == 1


# -- stamps of use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stamp", [2**64 - 1, 2**63, 2**63 + 1, 2**62])
def test_a_last_stamp_in_the_future_is_repaired_once(
    stamp: int, heals: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with filled() as store:
        store.arena.cells[at.TICK] = stamp
        store.arena.cells[store.arena.table.used + store.arena.find(key_of(b"4"))] = stamp
        for _ in range(3):
            store.set("new", {})
            store.get("5")
            assert store.ids()[0] == "5"
        assert len(heals) == 1
        assert store.arena.cells[at.TICK] < boottime_ns()
        verify(store.arena)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_session_with_a_stamp_in_the_future_can_be_used() -> None:
    with Store(memory=2**16, max=3, check_period=None, recency=3600) as store:
        for sid in "abc":
            store.set(sid, {})
        store.arena.cells[store.arena.table.used + store.arena.find(key_of(b"a"))] = 2**63
        store.get("a")
        store.set("d", {})
        assert store.ids() == ["d", "a", "c"]


@pytest.mark.parametrize("stamp", [2**64 - 1, 2**63, 0])
def test_a_snapshot_with_a_stamp_in_the_future_is_used(stamp: int, tmp_path: Any) -> None:
    with filled() as store:
        store.arena.cells[store.arena.table.used + store.arena.find(key_of(b"4"))] = stamp
        content = store.all()
        snapshot.save(store, tmp_path / "saved")
    with Store(memory=2**17, check_period=None) as other:
        snapshot.restore(other.arena, tmp_path / "saved")
        assert other.all() == content
        other.set("new", {})
        assert other.ids()[0] == "new"
        assert other.arena.cells[at.TICK] < boottime_ns()
        verify(other.arena)
        snapshot.load(other, tmp_path / "saved")
        verify(other.arena)


def test_damage_is_logged_once_a_minute_unless_sessions_are_lost(caplog: pytest.LogCaptureFixture) -> None:
    with filled() as store:
        for _ in range(3):
            store.arena.cells[at.TICK] = 2**63
            store.set("new", {})
        assert len(caplog.records) == 1
        assert store.stats().rebuilds == 3
        low, high = store.arena.table.key_at(store.arena.find(key_of(b"4")))
        assert low != high
        store.arena.cells[store.arena.table.key_high + store.arena.find((low, high))] ^= 1
        store.arena.cells[at.TICK] = 2**63
        store.set("new", {})
        assert caplog.messages[-1].endswith("1 sessions are lost")
