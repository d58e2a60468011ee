"""The C core killed between any two stores, and read there; and proof that this finds bugs.

A build of the core logs each store. Each prefix of the stores of an operation, applied to a copy of the memory from
before it, is what a killed process leaves.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fault_injection as faults
import pytest
from built_core import CORE, LoggedCore, build_logged, can_build
from engines import engine
from fault_injection import SITUATIONS, Moment, Situation
from sampling import FULL, some

from shmstore import Store
from shmstore.codec.ids import key_of
from shmstore.engine import core
from shmstore.engine.layout import CELL, STATE_CELLS
from shmstore.engine.verify import verify

MOST = 25  # prefixes of each operation in the short version

pytestmark = pytest.mark.skipif(not can_build(), reason="no C compiler, or no headers of Python")

# Operations that the core completes alone. The Python engine does the rest: see test_faults.py.
ALONE = [
    "create", "overwrite longer", "overwrite shorter", "overwrite scattered", "update", "change of owner",
    "loss of owner", "touch", "get", "destroy", "destroy the last one made", "rename with changes",
    "add over an expired one", "evict for a place", "evict for room", "grow into others' room",
    "destroy with a tombstone", "rename with a tombstone", "destroy the first of a ring",
    "destroy one in the middle of a ring", "destroy the last of a ring", "touch one in the middle of a ring",
    "overwrite the last of a ring", "from a ring to an owner in its bucket", "from an owner to a ring in its bucket",
    "destroy the first in a bucket",
]  # fmt: skip
BY_NAME = {situation.name: situation for situation in SITUATIONS}


@pytest.fixture(autouse=True)
def on_the_core() -> Iterator[None]:
    with engine("c"):
        yield


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> LoggedCore:
    """Return the core that logs; the first process of pytest-xdist that needs it builds it for all."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    directory = place / "logged"
    with open(place / "logged.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            building = Path(tempfile.mkdtemp(dir=place))
            build_logged(building)
            building.rename(directory)
    return LoggedCore(directory / CORE)


class Replay:
    """An operation of the core, and the memory after each of its stores."""

    def __init__(self, situation: Situation, logged: LoggedCore) -> None:
        self.situation = situation
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(core, "_core", logged.module)
            with situation.store() as store:
                assert isinstance(store.arena.file.core, logged.module.Core)
                store.get("none")  # claims a row of counters
                self.content = faults.content(store)
                self.memory = bytearray(faults.image(store.arena.file.memory))
                logged.clear()
                situation.operation(store)
                self.stores = logged.stores()
                self.result = faults.image(store.arena.file.memory)
                verify(store.arena)
                self.after = faults.content(store)

    def moments(self) -> Iterator[bytes]:
        """Yield the memory before each store, and at the end."""
        memory = bytearray(self.memory)
        for cell, value in self.stores:
            yield bytes(memory)
            struct.pack_into("@Q", memory, (cell - STATE_CELLS) * CELL, value)
        yield bytes(memory)

    def check(self, chosen: list[int] | None = None) -> None:
        """Recover from a kill at each moment, and read at each moment."""
        with self.situation.store() as like:
            for number, memory in enumerate(self.moments()):
                if chosen is not None and number not in chosen:
                    continue
                moment = Moment(memory, set())
                try:
                    with faults.restored(like, moment) as store:
                        self.read(store)
                    with faults.restored(like, moment) as store:
                        faults.check_outcome(store, self.content, self.after, atomic=self.situation.atomic)
                except BaseException:
                    print(f"{self.situation.name}: before store {number} of {len(self.stores)}")
                    raise

    def read(self, store: Store) -> None:
        """Read everything without the lock: whole, old or new; only sessions that change may be refused."""
        reader = store.arena.file.core
        assert reader is not None
        seen = False
        touched = {sid for sid in self.content.keys() | self.after.keys() if not self.same(sid)}
        for sid in self.content.keys() | self.after.keys():
            if sid.startswith("gone "):
                continue
            entry = reader.read(*key_of(sid.encode()))
            possible = faults.possible(sid, self.content, self.after)
            seen |= entry is not None and sid in touched
            if isinstance(entry, int):
                assert entry == core.BUSY
                assert sid in touched, f"{sid} cannot be read while another session changes"
            elif entry is None:
                assert None in possible, f"{sid} is missed"
            else:
                record = faults.record_of(entry)
                found = store.codec.decode(record.payload), record.owner, entry[2]
                assert found in possible, f"{sid}: {found}"
        assert seen or not self.situation.name.startswith("rename"), "missed under both ids"

    def same(self, sid: str) -> bool:
        return self.content.get(sid) == self.after.get(sid)


def some_of(count: int, seed: int) -> list[int] | None:
    """Return random moments to check in the short version; most are in the plan, at the end."""
    if FULL:
        return None
    rnd = random.Random(seed)
    late = range(max(0, count - 60), count + 1)
    return rnd.sample(range(count + 1), min(MOST // 2, count)) + rnd.sample(late, min(MOST, len(late)))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ALONE)
def test_killed_and_read_between_any_two_stores(name: str, logged: LoggedCore, seed: int) -> None:
    replay = Replay(BY_NAME[name], logged)
    *_, last = replay.moments()
    assert last == replay.result, "the Python engine has stored something"
    assert len(replay.stores) > 10
    replay.check(some_of(len(replay.stores), seed))


# -- the harness finds bugs --------------------------------------------------------------------------------------------

JOURNAL = "    store_cell(core, PENDING, number);\n"
CLEARED = "    store_cell(core, PENDING, 0);\n"
LOOP = "    for (unsigned i = 0; i < plan->length; i += 2)\n"
BUMP = "    plan_field(core, &plan, slot, VERSION, version);\n    if (renamed) {\n        /* A plan"
FREED = """        plan_set(&plan, last, (load_cell(core, last) & ~LOW) | rest);
        plan_set(&plan, FREE_RUN, old & LOW);
"""
NUMBER = "    store_cell_relaxed(core, JOURNAL, number);\n"
ODD_STRUCTURE = """, now, RENAMED);
        plan_set(&plan, STRUCTURE, structure);"""

BROKEN = {
    "a skipped journal": ("overwrite longer", (JOURNAL, "")),
    "a journal that is committed before it is written": ("create", (NUMBER, JOURNAL + NUMBER)),
    "a journal that is cleared too early": ("destroy", (LOOP, CLEARED + LOOP)),
    "a missing version": ("overwrite longer", (BUMP, BUMP[BUMP.index("    if") :])),
    "blocks that are freed outside the plan": (
        "overwrite longer",
        (FREED, FREED.replace("plan_set(&plan,", "store_cell(core,")),
    ),
    "a structure that stays even": ("rename with changes", (ODD_STRUCTURE, ODD_STRUCTURE.partition("\n")[0])),
}


@some("name", {name: name for name in BROKEN}, 2)
def test_the_replay_finds_a_broken_core(name: str, tmp_path: Path) -> None:
    situation, *replace = BROKEN[name]
    logged = LoggedCore(build_logged(tmp_path, tuple(replace)))
    with pytest.raises(Exception):  # noqa: B017, PT011 - which check finds it depends on what is broken
        Replay(BY_NAME[situation], logged).check()
