"""
The order of the C core's stores and loads, as a model: each order in which a compiler may put them is tried.

They would also do on a machine of weak memory order, if all writers were in C. There both engines read under the lock.

A writer and a reader are lists of steps. A step may be executed before an earlier one of the same thread unless core.c
forbids that: a release store comes after all earlier stores, an acquire load before all later loads, a fence keeps
both sides apart, and what is read through a value that was loaded comes after that load. The model knows no mutex and
no checksum, which make mistakes less likely but not impossible. A writer may also be killed after each of its steps.
What core.c forbids is read from its text, and a weaker order than it has must be found to be wrong.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import built_core
import pytest
from engines import engine, needs_core

from shmstore import Store
from shmstore.codec.ids import key_of
from shmstore.engine import core as core_module
from shmstore.engine import reader
from shmstore.errors import StoreTimeout

SOURCE = Path(core_module.__file__).with_name("core.c").read_text()

Memory = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Orders:
    """What core.c forbids a compiler to reorder."""

    release_stores: bool = True
    acquire_first: bool = True
    reader_fence: bool = True
    writer_fence: bool = True
    commit_fence: bool = True


def function(name: str) -> str:
    """Return the text of a function of core.c."""
    found = re.search(rf"^[^\n;]*\b{name}\([^;{{]*\)\n{{\n.*?^}}", SOURCE, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[0]


def written() -> Orders:
    """Return the orders that core.c has."""
    copy, read, commit = function("copy_record"), function("core_read"), function("commit")
    same = r"load_cell\(core, STRUCTURE\) == structure\)"
    fence = "atomic_thread_fence(memory_order_acquire);\n"
    return Orders(
        release_stores="memory_order_release" in function("store_cell"),
        acquire_first="entry->version = load_cell_acquire(" in copy and "structure = load_cell_acquire(" in read
        and "memory_order_acquire" in function("load_cell_acquire"),
        reader_fence=bool(
            re.search(re.escape(fence) + r"\s*if \(load_field\(core, slot, VERSION\) != entry->version\)", copy)
            and re.search(re.escape(fence) + r"\s*if \(!\(structure & 1\) && " + same, read)
        ),
        writer_fence="atomic_thread_fence(memory_order_release);\n    for (;;)" in function("write_record"),
        commit_fence=commit.find("atomic_signal_fence(memory_order_seq_cst);")
        in range(commit.find("store_cell_relaxed(")),
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A store of a value, or a load into a register. The cell may depend on what was loaded before."""

    cell: Callable[[dict[str, int]], str]
    value: int | None = None
    register: str = ""
    after: frozenset[int] = frozenset()  # the steps of the same thread that must come before


def stores(*steps: tuple[str, int] | str, orders: Orders) -> list[Step]:
    """Return a writer: cells and values; "relaxed:" before a cell that is no release store; the name of a fence."""
    found: list[Step] = []
    fenced = 0
    for step in steps:
        if isinstance(step, str):
            fenced = len(found) if getattr(orders, step) else fenced
            continue
        name, value = step
        release = orders.release_stores and not name.startswith("relaxed:")
        cell = name.removeprefix("relaxed:")
        same = {number for number, each in enumerate(found) if each.cell({}) == cell}  # a cell keeps its order
        after = frozenset(range(len(found) if release else fenced)) | same
        found.append(Step(lambda _, cell=cell: cell, value, after=after))  # type: ignore[misc]
    return found


def loads(*steps: tuple[str, Callable[[dict[str, int]], str], tuple[str, ...]], orders: Orders) -> list[Step]:
    """Return a reader: register, cell, registers that the cell depends on. First the acquire load, last the check."""
    numbers = {name: number for number, (name, _, _) in enumerate(steps)}
    found: list[Step] = []
    for number, (name, cell, needs) in enumerate(steps):
        after = {numbers[need] for need in needs}
        if orders.acquire_first and number:
            after.add(0)
        if number == len(steps) - 1:
            after |= set(range(number)) if orders.reader_fence else {0}  # the same cell keeps its order
        found.append(Step(cell, register=name, after=frozenset(after)))
    return found


def outcomes(memory: dict[str, int], writer: list[Step], reading: list[Step]) -> Iterator[dict[str, int]]:
    """Yield what a reader has in its registers in the end, for every execution."""
    seen = set()
    stack = [(dict(memory), frozenset[int](), frozenset[int](), dict[str, int]())]
    while stack:
        cells, stored, loaded, registers = stack.pop()
        state = tuple(sorted(cells.items())), stored, loaded, tuple(sorted(registers.items()))
        if state in seen:
            continue
        seen.add(state)
        if len(loaded) == len(reading):
            yield registers
            continue
        for number, step in enumerate(writer):
            if number not in stored and step.after <= stored and step.value is not None:
                stack.append((cells | {step.cell(registers): step.value}, stored | {number}, loaded, registers))
        for number, step in enumerate(reading):
            if number not in loaded and step.after <= loaded:
                value = cells[step.cell(registers)]
                stack.append((cells, stored, loaded | {number}, registers | {step.register: value}))


def hits(orders: Orders) -> set[tuple[int, ...]]:
    """
    Return what a reader accepts of a session that is rewritten, and whose blocks are then reused for another.

    The session is 1 and becomes 2: its deadline, and both words of its record. The record is in block 10, then in 20.
    The other session is 3.
    """
    memory = {"version": 0, "record": 10, "expires": 1, "10 a": 1, "10 b": 1, "20 a": 0, "20 b": 0}
    writer = stores(
        ("relaxed:20 a", 2), ("relaxed:20 b", 2),
        ("version", 1), ("record", 20), ("expires", 2), ("version", 2),
        "writer_fence", ("relaxed:10 a", 3), ("relaxed:10 b", 3),
        orders=orders,
    )  # fmt: skip
    reading = loads(
        ("first", lambda _: "version", ()),
        ("record", lambda _: "record", ()),
        ("expires", lambda _: "expires", ()),
        ("a", lambda has: f"{has['record']} a", ("record",)),
        ("b", lambda has: f"{has['record']} b", ("record",)),
        ("last", lambda _: "version", ()),
        orders=orders,
    )
    return {
        (has["expires"], has["a"], has["b"])
        for has in outcomes(memory, writer, reading)
        if has["first"] == has["last"] and not has["first"] & 1
    }


def misses(orders: Orders) -> int:
    """
    Return in how many ways a reader accepts that a session is missing, which is there all the time.

    It is the last of its chain: bucket, 1, 2. The one before it, 1, leaves for another bucket.
    """
    memory = {"structure": 0, "bucket": 1, "chain 1": 2, "chain 2": 0, "other": 0, "chain 0": 0}
    writer = stores(
        ("structure", 1), ("bucket", 2), ("chain 1", 0), ("other", 1), ("structure", 2), orders=orders,
    )  # fmt: skip
    reading = loads(
        ("first", lambda _: "structure", ()),
        ("one", lambda _: "bucket", ()),
        ("two", lambda has: f"chain {has['one']}", ("one",)),
        ("last", lambda _: "structure", ()),
        orders=orders,
    )
    found = outcomes(memory, writer, reading)
    return sum(1 for has in found if 2 not in (has["one"], has["two"]) and has["first"] == has["last"] in (0, 2))


def crashes(orders: Orders) -> set[tuple[int, int]]:
    """
    Return what a process that is killed leaves after recovery, of two cells that two plans in turn set to 1 and to 2.

    The journal is a number and what the plan sets.
    """
    steps: list[tuple[str, int] | str] = []
    for number in (1, 2):
        steps += ["commit_fence", ("relaxed:journal", number), ("relaxed:plan", number), ("pending", number)]
        steps += [("a", number), ("b", number), ("pending", 0)]
    writer = stores(*steps, orders=orders)
    found, seen = set(), set()
    stack = [frozenset[int]()]
    while stack:
        stored = stack.pop()
        if stored in seen:
            continue
        seen.add(stored)
        cells = dict.fromkeys(("journal", "plan", "pending", "a", "b"), 0)
        for number in sorted(stored):  # stores to one cell keep their order, and of others only the last counts
            cells[writer[number].cell({})] = writer[number].value or 0
        if cells["pending"] == cells["journal"] != 0:
            cells["a"] = cells["b"] = cells["plan"]
        found.add((cells["a"], cells["b"]))
        stack += [stored | {number} for number, step in enumerate(writer) if step.after <= stored]
    return found


WHOLE = {(1, 1, 1), (2, 2, 2)}
ATOMIC = {(0, 0), (1, 1), (2, 2)}


def test_core_c_has_every_order() -> None:
    assert written() == Orders()


def test_no_execution_mixes_sessions_or_misses_one() -> None:
    assert hits(written()) == WHOLE
    assert misses(written()) == 0


def test_a_plan_is_applied_or_not_wherever_its_process_is_killed() -> None:
    assert crashes(written()) == ATOMIC


@pytest.mark.parametrize("name", ["release_stores", "commit_fence"])
def test_it_finds_a_weaker_order_of_a_commit(name: str) -> None:
    assert crashes(replace(Orders(), **{name: False})) > ATOMIC


@pytest.mark.parametrize("name", ["release_stores", "acquire_first", "reader_fence", "writer_fence"])
def test_a_weaker_order_mixes_sessions(name: str) -> None:
    weaker = replace(Orders(), **{name: False})
    assert hits(weaker) > WHOLE


@pytest.mark.parametrize("name", ["release_stores", "acquire_first", "reader_fence"])
def test_a_weaker_order_misses_a_session(name: str) -> None:
    assert misses(replace(Orders(), **{name: False})) > 0


# -- where the memory order is weak ------------------------------------------------------------------------------------


@contextmanager
def locked(store: Store) -> Iterator[None]:
    """Hold the lock of a store in another thread."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            store.arena.lock(5)
            held.set()
            done.wait()
        finally:
            store.arena.unlock()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        yield
    finally:
        done.set()
        thread.join()


def test_the_python_engine_reads_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader.tries("x86_64") == 8
    assert reader.tries("aarch64") == 0
    monkeypatch.setattr(reader, "_TRIES", reader.tries("aarch64"))
    with engine("python"), Store(memory=2**16, check_period=None, lock_timeout=0) as store:
        read_under_the_lock(store)


@needs_core
@pytest.mark.skipif(not built_core.can_build(), reason="no C compiler, or no headers of Python")
def test_the_core_reads_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_TRIES", reader.tries("aarch64"))
    monkeypatch.setattr(core_module, "_core", built_core.load(built_core.build(tmp_path, "-O2", "-DCORE_PORTABLE")))
    with engine("c"), Store(memory=2**16, check_period=None, lock_timeout=0) as store:
        read_under_the_lock(store)
        c = store.arena.file.core
        assert c is not None
        key = key_of(b"a")
        with locked(store):
            assert c.read(*key) == core_module.BUSY
        entry = c.read(*key)
        assert not isinstance(entry, int | None)
        assert entry == store.arena.reader.at(entry[0], 1)
        assert c.read(*key_of(b"none")) is None
        assert store.arena.try_lock(), "the core has kept the lock"
        store.arena.unlock()


def read_under_the_lock(store: Store) -> None:
    store.set("a", {"n": 1})
    assert store.get("none") is None  # claims a row of counters
    for read in (store.get, store.peek, store.load):
        with locked(store), pytest.raises(StoreTimeout):
            read("a")
        assert read("a") is not None
        assert read("none") is None
