"""Randomly damaged files: sessions are found, missed or refused; no wrong session, other error, crash or hang."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import damage_child
import pytest
from engines import on_each_engine
from sampling import FULL, LONGEST

from shmstore import RecordTooLarge, Store, snapshot
from shmstore.codec.ids import key_of
from shmstore.engine.header import CORRUPT, EVICTED, OPTION_CELLS, REBUILDS, REFUSED, SESSIONS, TOP_SLOT
from shmstore.engine.layout import CELL, SLOT
from shmstore.engine.verify import verify
from shmstore.listing import Listing
from shmstore.options import Options
from shmstore.store.live_options import OptionsDamaged

pytestmark = on_each_engine

COUNT = 200 if FULL else 3


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("region", damage_child.regions() if FULL else [damage_child.ALL])
def test_a_damaged_file_never_returns_wrong_sessions(
    region: str, store_dir: Path, seed: int, figure: Callable[[str], None]
) -> None:
    # The short version checks the same files each time, so its result depends only on the code.
    first = seed if FULL else 1
    done = subprocess.run(
        [sys.executable, damage_child.__file__, str(store_dir), region, str(first), str(COUNT)],
        capture_output=True, text=True, timeout=LONGEST,
    )  # fmt: skip
    assert done.returncode == 0, f"tests/support/damage_child.py DIRECTORY {region} SEED 1:\n{done.stdout}{done.stderr}"
    figure(f"{COUNT} files" + " of each region" * (not FULL))


def overwrite(store: Store) -> None:
    store.set("a", {})
    assert store.get("a") == {}
    store.destroy("a")


def evict(store: Store) -> None:
    for number in range(3):
        store.set(str(number), {}, owner="bob")


DROPS: dict[str, tuple[Callable[[Store], object], int]] = {
    "destroy": (lambda store: store.destroy("a"), 1),
    "overwrite": (overwrite, 1),
    "evict": (evict, 3),
    "clear": (lambda store: store.clear(), 0),
}


@pytest.mark.parametrize("dispose", [None, lambda *_: None], ids=["without dispose", "with dispose"])
@pytest.mark.parametrize("drop", DROPS)
def test_an_unreadable_session_is_evicted_like_any_other(drop: str, dispose: Any) -> None:
    with Store(memory=2**16, max=3, check_period=None, recency=0, dispose=dispose) as store:
        store.set("a", {"x": "y" * 300}, owner="ada")
        arena: Any = store.arena
        slot = arena.find(key_of(b"a"))
        block = arena.cells[arena.table.record + slot] & (2**32 - 1)
        at = arena.table.run_head(block) * CELL + 200
        arena.file.memory[at : at + 1] = b"!"
        assert store.get("a") is None
        store.set("b", {}, owner="bob")
        action, left = DROPS[drop]
        action(store)
        assert store.length() == left
        verify(store.arena)


def test_a_cycle_in_a_bucket_does_not_loop_forever() -> None:
    with Store(memory=2**16, check_period=None, lock_timeout=0.1) as store:
        store.set("a", {})
        arena = store.arena
        slot, bucket = arena.find(key_of(b"a")), key_of(b"a")[0] % arena.geometry.buckets
        arena.cells[arena.table.chain + slot] = slot
        there = (str(number) for number in count() if key_of(b"%d" % number)[0] % arena.geometry.buckets == bucket)
        assert store.get(next(there)) is None
        assert store.get("a") == {}


def test_a_counter_overflow_is_repaired() -> None:
    told = []
    with Store(memory=2**16, max=2, check_period=None, dispose=lambda *drop: told.append(drop)) as store:
        store.set("a", {})
        store.set("b", {})
        store.arena.cells[EVICTED] = 2**64 - 1
        store.set("c", {})
        assert store.ids() == ["c", "b"]
        assert {drop for drop, *_ in told} == {"a"}
        assert store.stats().evicted == 1


@pytest.mark.parametrize("ask", ["owned_by", "destroy_owned"])
@pytest.mark.parametrize("wild", ["a ring", "out of the arena"])
def test_a_damaged_owner_index_is_rebuilt(ask: str, wild: str) -> None:
    with Store(memory=2**16, check_period=None) as store:
        store.set("a", {}, owner="ada")
        store.set("b", {}, owner="ada")
        arena: Any = store.arena
        first = arena.find(key_of(b"b"))
        arena.cells[arena.table.owner_links + first] = first << 32 | first if wild == "a ring" else 2**63 + 2**31
        assert getattr(store, ask)("ada") in (["b", "a"], 2)
        verify(store.arena)


LISTINGS: dict[str, Callable[[Store, Path], int]] = {
    "ids": lambda store, _: len(store.ids()),
    "all": lambda store, _: len(store.all()),
    "length": lambda store, _: store.length(live=True),
    "owned_by": lambda store, _: len(store.owned_by("ada")),
    "destroy_owned": lambda store, _: store.destroy_owned("ada"),
    "clear": lambda store, _: store.clear() or MANY - store.length(),
    "stats": lambda store, _: store.stats().owned,
    "listing": lambda store, _: len(Listing(store)),
    "snapshot": snapshot.save,
}
MANY = 300  # so many of one owner that they are not found by its list
TOPS = pytest.mark.parametrize("top", [8 * SLOT, MANY * SLOT ^ 2**11], ids=["too few", "a flipped bit"])


@TOPS
@pytest.mark.parametrize("how", LISTINGS)
def test_no_session_is_missed_because_the_last_slot_is_damaged(how: str, top: int, tmp_path: Path) -> None:
    with Store(memory=2**20, check_period=None) as store:
        for number in range(MANY):
            store.set(str(number), {}, owner="ada")
        store.arena.cells[TOP_SLOT] = top
        assert LISTINGS[how](store, tmp_path / "saved") == MANY
        assert store.arena.cells[REBUILDS] == 1
        verify(store.arena)


@TOPS
def test_no_expired_session_is_missed_because_the_last_slot_is_damaged(top: int) -> None:
    with Store(memory=2**20, check_period=None) as store:
        for number in range(MANY):
            store.set(str(number), {}, ttl=0)
        store.arena.cells[TOP_SLOT] = top
        assert store.prune() == MANY


@TOPS
@pytest.mark.parametrize("how", ["options", "snapshot"])
def test_what_is_given_to_a_store_whose_last_slot_is_damaged(how: str, top: int, tmp_path: Path) -> None:
    with Store(memory=2**20, check_period=None) as store:
        for number in range(MANY):
            store.set(str(number), {})
        snapshot.save(store, tmp_path / "saved")
        store.arena.cells[TOP_SLOT] = top
        if how == "options":
            store.change_options(Options.of(memory=2**20, check_period=None, max_per_owner=1))
        else:
            assert snapshot.load(store, tmp_path / "saved") == 0
        assert store.arena.cells[REBUILDS] == 1
        assert len(store) == MANY


def test_a_damaged_number_of_sessions_is_not_returned() -> None:
    with Store(memory=2**16, check_period=None) as store:
        store.set("a", {})
        store.arena.cells[SESSIONS] = 2**63 + 1
        assert len(store) == 1


@pytest.mark.parametrize("count", [*range(1, 8)])
def test_a_counter_of_a_process_with_the_largest_number_wraps(count: int) -> None:
    """One of hits, misses, the time waited, and the waits by their length."""
    with Store(memory=2**18) as store:
        arena: Any = store.arena
        store.set("a", {})
        store.get("a")
        row = arena.counters._row
        for claimed in True, False:
            arena.cells[row + count] = 2**64 - 1
            if not claimed:
                arena.counters.after_fork_in_child()
            for wait in 0.0001, 0.005, 0.05, 1:
                arena.counters._waited(wait)
            assert store.get("a") == {}
            assert store.get("b") is None
            assert store.load("b") is None
            assert arena.counters._row == row
            assert arena.cells[row + count] < 2**63


@pytest.mark.parametrize("counter", [REBUILDS, REFUSED, CORRUPT], ids=["rebuilds", "refused", "corrupt"])
def test_a_counter_with_the_largest_number_wraps(counter: int) -> None:
    with Store(memory=2**18) as store:
        cells = store.arena.cells
        cells[counter] = 2**64 - 1
        if counter == REBUILDS:
            cells[OPTION_CELLS.start] ^= 1
            store.repair(store.arena, OptionsDamaged("an option"))
        elif counter == REFUSED:
            with pytest.raises(RecordTooLarge):
                store.set("a", {"n": "x" * 2**18})
        else:
            Store.over(store.arena, Options.of(serializer=json)).set("a", {"n": 1})
            assert store.get("a") is None
        assert store.arena.cells[counter] == 0
