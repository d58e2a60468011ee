"""The arena alone: exact counters, and invalid files."""

from __future__ import annotations

import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from engines import on_each_engine
from processes import wait_for

from shmstore import ConfigError, Store, StoreFull
from shmstore.codec.ids import key_of, owner_digest
from shmstore.engine import header as at
from shmstore.engine import layout
from shmstore.engine.arena import Arena
from shmstore.engine.core import BUSY, DECLINED
from shmstore.engine.frame import OVERHEAD, body_of, seal
from shmstore.engine.header import NEVER
from shmstore.engine.layout import (
    CELL,
    JOURNAL,
    JOURNAL_CELLS,
    MUTEX,
    ROW_CELLS,
    ROWS,
    RUN,
    STATE_CELLS,
    TEMPORARY,
    ArenaDamaged,
    Geometry,
)
from shmstore.engine.verify import problems, verify

pytestmark = on_each_engine


@pytest.fixture
def path(store_dir: Path) -> Path:
    return store_dir / "arena"


def test_a_geometry_uses_its_memory_and_no_more() -> None:
    for memory in (2**16, 100_000, 2**20, 2**26):
        for most in (None, 1, 50, 10**9):
            geometry = Geometry.plan(memory, most)
            assert memory - memory // 1024 - 3 * 4096 < geometry.size <= memory - memory // 1024
            assert 1 <= geometry.slots <= (most or 10**9)
            assert geometry.blocks >= geometry.slots


def test_max_sessions_fit_without_eviction() -> None:
    with Store(memory=2**20, max=1000, check_period=None) as store:
        for number in range(1000):
            store.set(str(number), {"n": number})
        assert store.stats().evicted == 0
        assert store.length() == 1000


def test_counters_and_free_space_are_exact_after_any_sequence() -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    rnd = random.Random(seed)
    with Store(memory=2**18, max=150, recency=0, check_period=None) as store:
        for step in range(4000):
            sid, other = str(rnd.randrange(200)), str(rnd.randrange(200))
            session = {"x": rnd.randbytes(int(10 * 1000 ** rnd.random()))}
            owner = rnd.choice([None, None, "ada", "bob"])
            ttl = rnd.choice([0, 60, None])
            actions: list[Any] = [
                lambda: store.set(sid, session, ttl, owner),  # noqa: B023 - called in this very turn
                lambda: store.add(sid, session, ttl, owner),  # noqa: B023
                lambda: store.update(sid, session, owner=owner),  # noqa: B023
                lambda: store.rename(sid, other, session),  # noqa: B023
                lambda: store.destroy([sid, other]),  # noqa: B023
                lambda: store.touch(sid),  # noqa: B023
                lambda: store.get(sid),  # noqa: B023
                lambda: store.destroy_owned("ada") if rnd.random() < 0.05 else store.prune(),
            ]
            rnd.choices(actions, [8, 3, 4, 2, 1, 2, 3, 0.2])[0]()
            if step % 100 == 0:
                verify(store.arena)
        store.clear()
        verify(store.arena)
        assert store.arena.cells[at.USED_BLOCKS] == 0


def test_a_record_that_fits_can_be_written_into_scattered_free_blocks() -> None:
    arena = Arena.create(None, Geometry.plan(2**18, max_slots=10**6))

    def put(number: int, length: int) -> None:
        key = key_of(b"%d" % number)
        arena.publish(0, key, seal(key, 0, 0, bytes(length - OVERHEAD)), 0, NEVER, 1)

    try:
        arena.lock(1)
        short = 0
        while arena.fits(RUN - CELL, new=True):
            put(short, RUN - CELL)
            short += 1
        for number in range(0, short, 2):
            arena.drop(arena.find(key_of(b"%d" % number)), at.DESTROYED)
        largest = max(length for length in range(OVERHEAD, 2**18) if arena.fits(length, new=True))
        assert largest > 2**15
        put(0, largest)
    finally:
        arena.unlock()
    verify(arena)
    entry = arena.reader.read(key_of(b"0"), 1)
    assert entry is not None
    assert len(entry[4]) == largest
    arena.close()


def test_slots_of_one_bucket_are_distinguished() -> None:
    arena = Arena.create(None, Geometry.plan(2**18, 100))
    keys = [(7 + number * arena.geometry.buckets, number) for number in range(50)]
    try:
        arena.lock(1)
        for key in keys:
            arena.publish(0, key, seal(key, 0, 0, b"%d" % key[1]), 0, NEVER, 1)
        for key in keys[::2]:
            arena.drop(arena.find(key), at.DESTROYED)
    finally:
        arena.unlock()
    verify(arena)
    for key in keys:
        entry = arena.reader.read(key, 1)
        assert (entry is None) == (key[1] % 2 == 0)
        assert entry is None or body_of(entry[4]) == b"%d" % key[1]
    arena.close()


def test_counter_rows_of_dead_processes_are_reclaimed() -> None:
    arena = Arena.create(None, Geometry.plan(2**16))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    first = arena.geometry.offsets()["counters"] // CELL
    rows = range(first, first + ROWS * ROW_CELLS, ROW_CELLS)
    for row in rows:
        arena.cells[row], arena.cells[row + 1], arena.cells[row + 2] = dead.pid, 1, 2
    arena.cells[rows[-1]] = os.getppid()  # a living process keeps its row
    for _ in range(3):
        arena.counters.hit()
    assert arena.counters.reads() == (ROWS + 3, 2 * ROWS)
    assert [arena.cells[row] for row in rows].count(os.getpid()) == 1
    assert arena.cells[at.PAST : at.PAST + 2].tolist() == [1, 2]
    arena.close()


def test_a_child_of_fork_counts_for_itself() -> None:
    arena = Arena.create(None, Geometry.plan(2**16))
    arena.counters.hit()
    child = os.fork()
    if not child:
        arena.counters.hit()
        os._exit(0)
    os.waitpid(child, 0)
    assert arena.counters.reads() == (2, 0)
    first = arena.geometry.offsets()["counters"] // CELL
    assert {arena.cells[first], arena.cells[first + ROW_CELLS]} == {os.getpid(), child}
    arena.close()


def test_owners_of_one_bucket_are_distinguished() -> None:
    with Store(memory=2**16, check_period=None) as store:
        buckets = store.arena.geometry.owner_buckets
        alike = (name for name in map(str, count()) if owner_digest(name) % buckets == 7)
        ada, bob = next(alike), next(alike)
        for sid, owner in ("1", ada), ("2", bob), ("3", ada):
            store.set(sid, {}, owner=owner)
        for sid, owner in ("3", bob), ("1", bob), ("2", ada), ("2", bob), ("3", ada):  # the first, the last, ...
            store.update(sid, owner=owner)
            verify(store.arena)
        assert (store.owned_by(ada), sorted(store.owned_by(bob))) == (["3"], ["1", "2"])


class Wrong:
    """Ways to make a sound arena unsound: `slot` has an owner, `other` has no owner, `free` is free."""

    def __init__(self, arena: Arena) -> None:
        self.arena, self.cells = arena, arena.cells
        self.slot, self.other = arena.find(key_of(b"5")), arena.find(key_of(b"4"))
        self.free = self.cells[at.FREE_SLOT]

    def add(self, cell: int, by: int = 1) -> None:
        self.cells[cell] += by

    def put(self, cell: int, value: int) -> None:
        self.cells[cell] = value

    @property
    def bucket(self) -> int:
        return self.arena.table.buckets + self.cells[self.arena.table.key_low + self.slot] % self.arena.geometry.buckets

    @property
    def owners(self) -> int:
        return (
            self.arena.table.owners + self.cells[self.arena.table.owner + self.slot] % self.arena.geometry.owner_buckets
        )

    @property
    def first(self) -> int:
        """The first slot of the owner."""
        return self.cells[self.owners]

    @property
    def link(self) -> int:
        return self.arena.table.run_head(self.cells[self.arena.table.record + self.slot] & (2**32 - 1))

    def exchange(self, field: int) -> None:
        one, other = field + self.slot, field + self.other
        self.cells[one], self.cells[other] = self.cells[other], self.cells[one]

    def twin(self) -> None:
        for field in self.arena.table.key_low, self.arena.table.key_high:
            self.cells[field + self.slot] = self.cells[field + self.other]


COMPLAINTS: dict[str, Callable[[Wrong], None]] = {
    "the last slot used": lambda it: it.add(at.TOP_SLOT),
    "a plan is pending": lambda it: it.put(at.PENDING, 1),
    "the index is marked": lambda it: it.add(at.STRUCTURE),
    "live [+] .* free slots": lambda it: it.put(at.FREE_SLOT, 0),
    "live and free": lambda it: it.put(at.FREE_SLOT, it.slot),
    "11 sessions, 10 live": lambda it: it.add(at.SESSIONS),
    "free slots: a cycle": lambda it: it.put(it.arena.table.next + it.free, it.free),
    "bucket .* a cycle": lambda it: it.put(it.arena.table.chain + it.slot, it.slot),
    "bucket .* slots of others": lambda it: it.add(it.arena.table.key_low + it.slot),
    "slots in the index": lambda it: it.put(it.bucket, 0),
    "owners .* a cycle": lambda it: it.add(it.arena.table.owner_head + it.first, it.first),
    "owners .* slots of others": lambda it: it.add(it.arena.table.owner + it.first),
    "owners .*: not a slot": lambda it: it.add(it.owners, 1 << 32),
    "the owner of .* points back wrongly": lambda it: it.put(it.arena.table.owner_links + it.slot, it.slot),
    "the owner of .* not a ring": lambda it: it.put(it.arena.table.owner_links + it.first, it.first),
    "the owner of .* has 6 slots, 5 found": lambda it: it.add(it.arena.table.owner_head + it.first, 1 << 32),
    "the owner of .* has slots of others": lambda it: it.add(it.arena.table.owner + it.slot),
    "index of owners is inconsistent": lambda it: it.put(it.owners, 0),
    "two slots have the same key": lambda it: it.twin(),
    "points back wrongly": lambda it: it.put(it.arena.table.prev + it.slot, it.other),
    "a wrong end": lambda it: it.put(it.arena.table.prev, it.slot),
    "slots in order of use": lambda it: it.put(it.arena.table.next, it.other),
    "later than the last one": lambda it: it.put(it.arena.table.used + it.slot, it.cells[at.TICK] + 1),
    "slot .* run of 0": lambda it: it.put(it.link, 0),
    "slot .* run of 1": lambda it: it.put(it.link, 1 << 32),
    "a block is used twice": lambda it: it.put(
        it.arena.table.record + it.slot, it.cells[it.arena.table.record + it.other]
    ),
    "the length of its chain does not match its record": lambda it: it.add(it.link, 8 << 32),
    "slot .* is marked": lambda it: it.add(it.arena.table.version + it.slot),
    "the record is damaged": lambda it: it.exchange(it.arena.table.record),
    "not the record's": lambda it: it.add(it.arena.table.owner + it.slot),
    "free: run of": lambda it: it.put(at.FREE_RUN, it.arena.geometry.blocks + 1),
    "free blocks !=": lambda it: it.put(at.FREE_RUN, 0),
    "blocks used, .* found": lambda it: it.add(at.USED_BLOCKS),
    "the weight is 11, 10 found": lambda it: it.add(at.WEIGHT),
    "before the earliest": lambda it: it.put(at.EARLIEST, NEVER),
    "the record is outside the memory": lambda it: it.put(it.arena.table.record + it.slot, 100 << 32 | 2**31),
    "free slot .* a deadline": lambda it: it.put(it.arena.table.expires + it.free, 1),
    "free slot .* an owner": lambda it: it.put(it.arena.table.owner + it.free, 1),
}


@pytest.mark.parametrize("complaint", COMPLAINTS)
def test_verify_finds_each_kind_of_damage(complaint: str) -> None:
    with Store(memory=2**16, check_period=None) as store:
        for number in range(12):
            store.set(str(number), {"x": "y" * 300}, ttl=60, owner="ada" if number % 2 else None)
        store.destroy(["8", "9"])
        verify(store.arena)
        COMPLAINTS[complaint](Wrong(store.arena))
        found = problems(store.arena)
        assert any(re.search(complaint, each) for each in found), found
        if complaint != "a plan is pending":  # the next process that takes the lock applies the plan
            with pytest.raises(ArenaDamaged):
                verify(store.arena)


def test_a_damaged_record_is_a_miss_and_no_other_session(path: Path) -> None:
    with Store(memory=2**16, check_period=None, lock_timeout=0.1) as store:
        store.set("a", {"x": "y" * 300})
        store.set("b", {"x": "z"})
        arena: Any = store.arena
        block = arena.cells[arena.table.record + arena.find(key_of(b"a"))] & (2**32 - 1)
        at = arena.table.run_head(block) * CELL + 100
        arena.file.memory[at : at + 1] = b"!"
        assert store.get("a") is None
        assert store.all() == {"b": {"x": "z"}}
        store.set("a", {"x": 1})
        assert store.get("a") == {"x": 1}


# -- the journal: which plans are applied, and which are rejected ------------------------------------------------------

GEOMETRY = Geometry.plan(2**16)
BLOCKS = GEOMETRY.offsets()["blocks"]
CHANGE = [at.TOUCHES, 99]
LONGEST = CHANGE * (JOURNAL_CELLS // 2 - 1)


def settled(plan: list[int], number: int = 7, length: int | None = None) -> tuple[list[int], list[int]]:
    """
    Leave plan 7 pending, write ``plan`` into the journal as plan ``number``, and take the lock.

    Return the cells before and after that, without those of the mutex.
    """
    arena = Arena.create(None, GEOMETRY)
    for cell, value in enumerate([number, len(plan) if length is None else length, *plan], JOURNAL // CELL):
        arena.cells[cell] = value  # a plan that is too long runs into the counters of reads
    before = list(arena.cells)
    arena.cells[at.PENDING] = 7
    try:
        arena.lock(1)
    finally:
        arena.unlock()
    after = list(arena.cells)
    arena.close()
    mutex = slice(MUTEX // CELL, STATE_CELLS)
    del before[mutex], after[mutex]
    return before, after


@pytest.mark.parametrize("plan", [CHANGE, LONGEST, [(BLOCKS + 3 * GEOMETRY.block_size) // CELL, 99]])
def test_a_valid_plan_is_applied(plan: list[int]) -> None:
    before, after = settled(plan)
    assert [new for old, new in zip(before, after, strict=True) if old != new] == [99]


@pytest.mark.parametrize(
    ("plan", "damage"),
    [
        (CHANGE, {"number": 6}),
        (CHANGE + CHANGE, {"length": 3}),
        (LONGEST + CHANGE, {}),
        (CHANGE, {"length": 2**63}),
        ([*CHANGE, 0, 99], {}),
        ([*CHANGE, STATE_CELLS - 1, 99], {}),
        ([*CHANGE, BLOCKS // CELL, 99], {}),
        ([*CHANGE, (BLOCKS + 3 * GEOMETRY.block_size) // CELL + 1, 99], {}),
        ([*CHANGE, GEOMETRY.size // CELL, 99], {}),
        ([*CHANGE, 2**63, 99], {}),
    ],
    ids=[
        "another's", "odd", "too long", "endless", "the head", "the mutex", "block 0", "a record", "the end", "nowhere",
    ],
)  # fmt: skip
def test_an_invalid_plan_changes_nothing(plan: list[int], damage: dict[str, int]) -> None:
    before, after = settled(plan, **damage)
    assert before == after


# -- files -------------------------------------------------------------------------------------------------------------


def made(path: Path) -> Path:
    Arena.create(path, Geometry.plan(2**16)).close()
    return path


def test_an_arena_is_created_complete_without_temporary_files(path: Path) -> None:
    made(path)
    assert os.listdir(path.parent) == ["arena"]
    assert path.stat().st_mode & 0o777 == 0o600
    arena = Arena.open(path)
    assert arena.file.exclusive
    verify(arena)
    second = Arena.open(path)
    assert not second.file.exclusive
    second.close()
    arena.close()


def test_an_arena_that_cannot_be_completed_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSTORE_ENGINE", "fast")
    with pytest.raises(ConfigError, match="SHMSTORE_ENGINE=fast"):
        Arena.create(path, Geometry.plan(2**16))
    assert os.listdir(path.parent) == []


def test_a_chain_of_blocks_that_is_a_ring_is_found() -> None:
    with Store(memory=2**17, check_period=None) as store:
        store.set("a", {"x": bytes(500)})
        store.get("none")
        arena = store.arena
        cells, table = arena.cells, arena.table
        slot = arena.find(key_of(b"a"))
        block = cells[table.record + slot] & (2**32 - 1)
        cells[table.record + slot] = (2**32 - 1) << 32 | block
        cells[table.run_head(block)] = arena.geometry.shortest << 32 | block
        assert arena.reader.try_at(slot) is None
        if (core := arena.file.core) is not None:
            assert core.read(*key_of(b"a")) == BUSY
            assert core.drop("a", False, 1) == core.put("a", None, b"", 1, 1, None, 1) == DECLINED
        with pytest.raises(ArenaDamaged, match="ring"):
            arena.drop(slot, at.DESTROYED)


def test_a_ring_of_an_owner_that_does_not_end_is_found() -> None:
    with Store(memory=2**17, check_period=None) as store:
        for sid in "abc":
            store.set(sid, {}, owner="ada")
        arena = store.arena
        cells, table = arena.cells, arena.table
        newest, middle, oldest = (arena.find(key_of(sid)) for sid in (b"c", b"b", b"a"))
        # Before the first slot is the oldest, and before that the middle one: these two in turn, for ever.
        cells[table.owner_links + middle] = oldest << 32 | oldest
        cells[table.owner_links + oldest] = middle << 32 | newest
        cells[table.owner_head + newest] |= (2**32 - 1) << 32
        with pytest.raises(ArenaDamaged, match="owner's sessions"):
            arena.owned_slots(owner_digest("ada"))


def test_two_attachments_see_the_same(path: Path) -> None:
    first = Arena.create(path, Geometry.plan(2**16))
    second = Arena.open(path)
    try:
        first.lock(1)
        first.publish(0, key_of(b"a"), seal(key_of(b"a"), 0, 0, b"body"), 0, NEVER, 1)
    finally:
        first.unlock()
    entry = second.reader.read(key_of(b"a"), 1)
    assert entry is not None
    assert body_of(entry[4]) == b"body"
    assert first.file.is_at(path)
    first.close()
    second.close()
    path.unlink()


def test_opening_a_missing_arena_is_an_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Arena.open(path)


def damage(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[:-4096])
    elif kind == "short":
        path.write_bytes(data[:40])
    elif kind == "no arena":
        path.write_bytes(b"x" * len(data))
    elif kind == "flipped bit":
        path.write_bytes(data[:20] + bytes([data[20] ^ 4]) + data[21:])
    elif kind == "open to others":
        path.chmod(0o644)
    elif kind == "second link":
        os.link(path, path.with_name("link"))
    elif kind == "symbolic link":
        path.rename(path.with_name("target"))
        path.symlink_to("target")
    else:
        path.unlink()
        path.mkdir() if kind == "directory" else os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    "kind",
    [
        "empty", "truncated", "short", "no arena", "flipped bit", "open to others", "second link", "symbolic link",
        "directory", "fifo",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_trusted_is_refused(path: Path, kind: str) -> None:
    damage(made(path), kind)
    with pytest.raises(ArenaDamaged, match="arena"):
        Arena.open(path)


@pytest.mark.parametrize(
    "sizes",
    [(0, 100, 32), (10, 0, 32), (10, 100, 0), (10, 100, 8), (10, 100, 36), (2**28 + 1, 1, 32), (10, 2**32, 32),
     (2**63, 100, 32), (10, 2**63, 32), (10, 100, 2**63)],
)  # fmt: skip
def test_a_header_with_impossible_sizes_is_refused(path: Path, sizes: tuple[int, int, int]) -> None:
    """The checksum of the header is right, and the file as long as such an arena, where that can be."""
    made(path)
    geometry = Geometry(*sizes)
    with path.open("r+b") as file:
        file.write(layout._identity(geometry, layout.pid_namespace()))
        if geometry.size < 2**40:
            os.truncate(path, geometry.size)
    with pytest.raises(ArenaDamaged, match="damaged header"):
        Arena.open(path)


@pytest.mark.parametrize("field", ["_VERSION", "boot_id"])
def test_an_arena_of_another_layout_or_boot_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    made(path)
    other: Any = 99 if field == "_VERSION" else lambda: b"another boot    "
    monkeypatch.setattr(f"shmstore.engine.layout.{field}", other)
    with pytest.raises(ArenaDamaged, match="layout" if field == "_VERSION" else "last boot"):
        Arena.open(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
def test_another_users_arena_is_refused(path: Path) -> None:
    made(path)
    path.parent.chmod(0o755)
    script = f"import os; os.setuid(65534)\nfrom shmstore.engine.arena import Arena\nArena.open({str(path)!r})"
    # imported before the change of user: its home may not be readable to the other
    code = f"import shmstore.engine.arena; {script}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ArenaDamaged" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small tmpfs")
def test_missing_memory_is_an_error_at_creation(store_dir: Path) -> None:
    mount = store_dir / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(StoreFull, match=r"--shm-size"):
            Arena.create(mount / "arena", Geometry.plan(2**22))
        assert os.listdir(mount) == []
        arena = Arena.create(mount / "arena", Geometry.plan(2**19))
        hog = mount / "hog"
        with hog.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            while True:
                file.write(b"x" * 4096)
        block = arena.geometry.blocks  # the last one: reserved, hence no SIGBUS
        last = arena.table.run_head(block) * CELL
        arena.file.memory[last : last + 4] = b"here"
        arena.close()
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_the_error_for_missing_memory_suggests_a_smaller_size(store_dir: Path) -> None:
    total = shutil.disk_usage(store_dir).total
    with pytest.raises(StoreFull, match=r"smaller memory="):
        Arena.create(store_dir / "arena", Geometry.plan(2 * total, 10))
    assert not [name for name in os.listdir(store_dir) if name.startswith(TEMPORARY)]


def test_too_little_memory_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="64 KiB"):
        Geometry.plan(1000)


def test_an_arena_is_excluded_from_core_files(path: Path) -> None:
    arena = Arena.create(path, Geometry.plan(2**16))
    maps = Path("/proc/self/smaps").read_text()
    arena.close()
    flags = maps.partition(str(path))[2].partition("VmFlags:")[2].partition("\n")[0]
    assert "dd" in flags.split()


def test_cells_are_written_and_read_atomically(figure: Callable[[str], None]) -> None:
    """Reads without the lock depend on this. `struct` with ">Q" writes byte by byte, and some reads would be torn."""
    reads = 2_000_000 if os.environ.get("SHMSTORE_FULL") == "1" else 200_000
    cells = memoryview(mmap.mmap(-1, 4096)).cast("Q")
    patterns = 0x0101010101010101, 0xFEFEFEFEFEFEFEFE
    children = []
    try:
        for pattern in patterns:
            child = os.fork()
            while not child:
                cells[8] = pattern
            children.append(child)
        wait_for(lambda: cells[8], "a writer")
        seen = Counter(cells[8] for _ in range(reads))
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    figure(f"{sum(seen[other] for other in seen if other not in patterns)} of {reads} reads torn")
    assert {*seen} <= {*patterns}


def test_the_largest_space_that_a_record_takes() -> None:
    """Runs of 4 to 7 blocks cannot be split into two: what is too much of one is lost to its record."""
    geometry = Geometry.plan(2**18)
    size, shortest = geometry.block_size, geometry.shortest

    @cache
    def worst(left: int) -> int:
        most = max(-(-(left + CELL) // size), shortest) + shortest - 1
        for run in range(shortest, 3 * shortest):
            if (holds := run * size - CELL) < left:
                most = max(most, run + worst(left - holds))
        return most

    for length in range(50, 3000):
        assert worst(length) <= geometry.takes(length), length
