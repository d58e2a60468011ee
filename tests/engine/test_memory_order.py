"""
The order of the C core's stores and loads, as a model: each order in which a machine may execute them is tried.

A writer and a reader are lists of steps. A step may be executed before an earlier one of the same thread unless core.c
forbids that: a release store comes after all earlier stores, an acquire load before all later loads, a fence keeps
both sides apart, and what is read through a value that was loaded comes after that load. The model knows no mutex and
no checksum, which make mistakes less likely but not impossible. What core.c forbids is read from its text, and a weaker
order than it has must be found to be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from shmstore.engine import core as core_module
from shmstore.engine import reader
from shmstore.engine.arena import Arena
from shmstore.engine.frame import seal
from shmstore.engine.header import NEVER
from shmstore.engine.layout import Geometry
from shmstore.errors import StoreTimeout

SOURCE = Path(core_module.__file__).with_name("core.c").read_text()

Memory = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Orders:
    """What core.c forbids a machine and a compiler to reorder."""

    release_stores: bool = True
    acquire_first: bool = True
    reader_fence: bool = True
    writer_fence: bool = True


def function(name: str) -> str:
    """Return the text of a function of core.c."""
    found = re.search(rf"^[^\n;]*\b{name}\([^;{{]*\)\n{{\n.*?^}}", SOURCE, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[0]


def written() -> Orders:
    """Return the orders that core.c has."""
    copy, read = function("copy_record"), function("core_read")
    same = r"load\(core, STRUCTURE\) == structure\)"
    fence = "atomic_thread_fence(memory_order_acquire);\n"
    return Orders(
        release_stores="memory_order_release" in function("store"),
        acquire_first="entry->version = load_acquire(" in copy and "structure = load_acquire(" in read
        and "memory_order_acquire" in function("load_acquire"),
        reader_fence=bool(
            re.search(re.escape(fence) + r"\s*if \(get\(core, slot, VERSION\) != entry->version\)", copy)
            and re.search(re.escape(fence) + r"\s*if \(!\(structure & 1\) && " + same, read)
        ),
        writer_fence="atomic_thread_fence(memory_order_release);\n    for (;;)" in function("write_record"),
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A store of a value, or a load into a register. The cell may depend on what was loaded before."""

    cell: Callable[[dict[str, int]], str]
    value: int | None = None
    register: str = ""
    after: frozenset[int] = frozenset()  # the steps of the same thread that must come before


def stores(*steps: tuple[str, int] | str, orders: Orders) -> list[Step]:
    """Return a writer: cells and values; "relaxed:" before a cell that is no release store; "fence"."""
    found: list[Step] = []
    fenced = 0
    for step in steps:
        if isinstance(step, str):  # "fence"
            fenced = len(found) if orders.writer_fence else 0
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
        "fence", ("relaxed:10 a", 3), ("relaxed:10 b", 3),
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


WHOLE = {(1, 1, 1), (2, 2, 2)}


def test_core_c_has_every_order() -> None:
    assert written() == Orders()


def test_no_execution_mixes_sessions_or_misses_one() -> None:
    assert hits(written()) == WHOLE
    assert misses(written()) == 0


@pytest.mark.parametrize("name", ["release_stores", "acquire_first", "reader_fence", "writer_fence"])
def test_a_weaker_order_mixes_sessions(name: str) -> None:
    weaker = replace(Orders(), **{name: False})
    assert hits(weaker) > WHOLE


@pytest.mark.parametrize("name", ["release_stores", "acquire_first", "reader_fence"])
def test_a_weaker_order_misses_a_session(name: str) -> None:
    assert misses(replace(Orders(), **{name: False})) > 0


def test_where_memory_order_is_weak_the_python_engine_reads_under_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader.tries("x86_64") == 8
    assert reader.tries("aarch64") == 0
    monkeypatch.setattr(reader, "_TRIES", reader.tries("aarch64"))
    monkeypatch.setenv("SHMSTORE_ENGINE", "python")
    arena = Arena.create(None, Geometry.plan(2**16))
    key = (1, 2)
    try:
        arena.lock(1)
        slot = arena.publish(0, key, seal(key, 0, 0, b"body"), 0, NEVER, 1)
        with pytest.raises(StoreTimeout):  # this thread holds it already
            arena.reader.read(key, 0)
    finally:
        arena.unlock()
    entry = arena.reader.read(key, 1)
    assert entry is not None
    assert entry == arena.reader.at(slot, 1)
    assert arena.reader.read((3, 4), 1) is None
