"""Stop a mutation, or a reader, at every single step: each access to the arena and each use of its lock."""

from __future__ import annotations

import dis
import gc
import linecache
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from mmap import mmap
from types import CodeType, FrameType
from typing import Any

import shmstore
from shmstore.codec.body import Record, unpack
from shmstore.codec.ids import owner_digest
from shmstore.engine import journal
from shmstore.engine.arena import Arena
from shmstore.engine.frame import body_of
from shmstore.engine.header import NEVER
from shmstore.engine.layout import CELL, STATE_CELLS
from shmstore.engine.mapping import MappedFile
from shmstore.engine.reader import Entry
from shmstore.engine.verify import verify
from shmstore.store import bulk
from shmstore.store.store import Store

Action = Callable[[], None]
PLANS = journal._PLANS
CELL_OF_PLAN = struct.Struct("@Q")
PACKAGE = os.path.dirname(shmstore.__file__)


class Steps:
    """Counts steps and acts before the chosen one. With ``reads``, reading a cell is a step too."""

    def __init__(self, chosen: int, action: Action, *, reads: bool = False) -> None:
        self.chosen, self.action, self.reads = chosen, action, reads
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.chosen:
            self.action()


class Relentless(Steps):
    """Acts before every step, except the steps of the action itself: plans of all arenas count as steps."""

    acting = False

    def __call__(self) -> None:
        if self.acting:
            return
        self.count += 1
        self.acting = True
        try:
            self.action()
        finally:
            self.acting = False


class Interrupted(BaseException):
    """An exception that a signal handler may raise at any instruction, like SystemExit in Gunicorn's."""


def interrupt() -> None:
    raise Interrupted


def line_of(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip()  # some instructions have no line


# A line that makes a system call, or marks a file as out of use for other processes.
SYSTEM = re.compile(r"\b(os|fcntl|tempfile|socket|listener)\.|open\(|flock\(|mmap\(|\[STATE\] =|fresh=").search


@cache
def unprotected(code: CodeType) -> frozenset[int]:
    """
    Return where a function has left a `try` and has called nothing since: the positions of these instructions.

    Python runs no signal handler there. It does so at the end of calls, and raises an exception where the call is: in
    the `try`. Examples: a `finally` up to its first call, a `return` without a value, and the line of a nested `try:`.
    """
    bytecode = dis.Bytecode(code)
    entries: list[Any] = bytecode.exception_entries  # type: ignore[attr-defined]

    def handlers(at: int) -> Iterator[int]:
        for entry in entries:
            if entry.start <= at < entry.end:
                yield entry.target
                yield from handlers(entry.target)

    targets = {entry.target for entry in entries}
    found, last = set(), set[int]()  # the handler of the last call
    for instruction in bytecode:
        here = list(handlers(instruction.offset))
        if instruction.offset in targets:
            last = {instruction.offset}
        if not last.issubset(here):
            found.add(instruction.offset)
        if instruction.opname.startswith(("CALL", "BEFORE_WITH", "RESUME", "JUMP_BACKWARD")):
            last = set(here[:1])
    return frozenset(found)


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep cyclic garbage, with all that it refers to, until the end of the block."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def tracing(step: Steps, *, instructions: bool = False, system: bool = False) -> Iterator[None]:
    """Make each executed line of the package a step; or each instruction; or each line with a system call."""

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = instructions
        if event == ("opcode" if instructions else "line"):
            spared = step.action is interrupt and frame.f_lasti in unprotected(frame.f_code)
            if not spared and (not system or SYSTEM(line_of(frame))):
                step()
        return trace

    with uncollected():  # otherwise what other tests have left is finalised here, step by step
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)


class SteppedCells:
    def __init__(self, cells: Any, step: Steps) -> None:
        self._cells, self._step = cells, step

    def __getitem__(self, index: Any) -> Any:
        if self._step.reads:
            self._step()
        return self._cells[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._step()
        self._cells[index] = value


class SteppedMemory(mmap):
    step: Steps

    def __setitem__(self, index: Any, value: Any) -> None:
        self.step()
        super().__setitem__(index, value)

    def __getitem__(self, index: Any) -> Any:
        if self.step.reads:
            self.step()
        return super().__getitem__(index)


@dataclass
class SteppedPlan:
    plan: struct.Struct
    step: Steps

    def pack_into(self, buffer: Any, offset: int, *numbers: int) -> None:
        """Cell by cell: a process may also be killed in the middle of this one call."""
        packed = self.plan.pack(*numbers)
        for at in range(0, len(packed), CELL):
            self.step()
            CELL_OF_PLAN.pack_into(buffer, offset + at, *CELL_OF_PLAN.unpack_from(packed, at))


@dataclass
class SteppedLock:
    mutex: Any
    step: Steps
    taken: bool = field(default=False)

    def acquire(self, timeout: float) -> None:
        self.step()
        self.mutex.acquire(timeout)
        self.step()

    def release(self) -> int:
        result: int = self.mutex.release()
        self.step()
        return result


@contextmanager
def stepping(arena: Arena, step: Steps) -> Iterator[None]:
    """Make every access that ``arena`` does a step; the C core does nothing meanwhile: no step can be taken in it."""
    whole: Any = arena
    file = whole.file
    kept = file.cells, file.memory, file.mutex, whole.unlock
    core, file.core = file.core, None
    memory = SteppedMemory(file._descriptor.fd, arena.geometry.size)
    memory.step = step
    lock = SteppedLock(file.mutex, step)
    file.cells, file.memory, file.mutex = SteppedCells(file.cells, step), memory, lock
    whole.unlock = whole.writers.release = lock.release
    journal._PLANS[:] = [SteppedPlan(plan, step) for plan in PLANS_KEPT]  # type: ignore[misc]
    try:
        yield
    finally:
        file.cells, file.memory, file.mutex, whole.unlock = kept
        file.core = core
        whole.writers.release = whole.unlock
        journal._PLANS[:] = PLANS_KEPT


PLANS_KEPT = list(PLANS)


def second_view(store: Store) -> Store:
    """Another process' view of a store, without the process."""
    fd = os.open(store.arena.file.reopen_path(), os.O_RDWR)
    return Store.over(Arena(MappedFile(fd, store.arena.geometry)), store.options)


class Noting:
    """A `dispose` that records its calls in a place that the parent of a killed process can read."""

    def __init__(self, noted: Iterable[str] = ()) -> None:
        self._fd = os.memfd_create("disposed")
        for sid in noted:
            self(sid, None, "")

    def __call__(self, sid: str, session: object, reason: str) -> None:
        os.write(self._fd, f"{sid}\n".encode())

    def noted(self) -> set[str]:
        return set(os.pread(self._fd, 2**16, 0).decode().splitlines())

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._fd)


@dataclass(frozen=True)
class Situation:
    """A store before an operation, and the operation."""

    name: str
    operation: Callable[[Store], object]
    atomic: bool = True  # otherwise it is a sequence of atomic steps, one session each
    full: bool = False  # the store is at its limit
    stale: bool = False
    disposing: bool = False
    limited: bool = False  # the owner "ring" has as many sessions as an owner may have

    def store(self) -> Store:
        return populated(self.full, stale=self.stale, disposing=self.disposing, limited=self.limited)


def body(size: int, mark: str) -> dict[str, Any]:
    return {"mark": mark, "data": mark * size}


def swap(store: Store, sid: str, session: dict[str, Any], **options: Any) -> bool:
    loaded = store.load(sid)
    return loaded is not None and store.swap(sid, loaded, store.codec.encode(session), **options)


SITUATIONS = [
    Situation("create", lambda store: store.set("new", body(300, "n"), ttl=50, owner="ada")),
    Situation("overwrite longer", lambda store: store.set("b", body(900, "n"), ttl=50)),
    Situation("overwrite shorter", lambda store: store.set("c", body(1, "n"), ttl=50, owner="new")),
    Situation("overwrite scattered", lambda store: store.set("scattered", body(1500, "n"), ttl=50)),
    Situation("update", lambda store: store.update("a", {"more": "m" * 200}, delete=["mark"])),
    Situation("change of owner", lambda store: store.update("a", owner="bob")),
    Situation("loss of owner", lambda store: store.update("b", {}, owner=None)),
    Situation("touch", lambda store: store.touch("a", ttl=77)),
    Situation("get", lambda store: store.get("a")),
    Situation("destroy", lambda store: store.destroy("b")),
    Situation("destroy the last one made", lambda store: store.destroy("scattered")),
    Situation("rename with changes", lambda store: store.rename("a", "z", {"more": 1}, ["data"], owner="eve")),
    Situation("rename onto an expired one", lambda store: store.rename("a", "old 1"), atomic=False),
    Situation("add over an expired one", lambda store: store.add("old 1", body(5, "n"), ttl=50), atomic=False),
    Situation("evict for a place", lambda store: store.set("new", body(3, "n"), ttl=50), atomic=False, full=True),
    Situation("evict for room", lambda store: store.set("new", body(7000, "n"), ttl=50), atomic=False, full=True),
    Situation("grow into others' room", lambda store: store.update("a", body(7000, "n")), atomic=False, full=True),
    Situation("clear", lambda store: store.clear(), atomic=False),
    Situation("prune", lambda store: store.prune(), atomic=False),
    Situation("destroy of an owner", lambda store: store.destroy_owned("ada"), atomic=False),
    Situation("stale get", lambda store: store.get("old 1"), stale=True),
    Situation("stale get, disposed", lambda store: store.get("old 1"), stale=True, disposing=True),
    Situation("destroy, disposed", lambda store: store.destroy("b"), disposing=True),
    Situation("overwrite, disposed", lambda store: store.set("b", body(900, "n"), ttl=50), disposing=True),
    Situation(
        "evict, disposed",
        lambda store: store.set("new", body(7000, "n"), ttl=50),
        atomic=False,
        full=True,
        disposing=True,
    ),
    Situation("destroy with a tombstone", lambda store: store.destroy("b", tombstone=True)),
    Situation("destroy with a tombstone, disposed", lambda store: store.destroy("b", tombstone=True), disposing=True),
    Situation("destroy if empty", lambda store: store.destroy_if_empty("empty", tombstone=True)),
    Situation("rename with a tombstone", lambda store: store.rename("a", "z", {"more": 1}, tombstone=True)),
    Situation("swap", lambda store: swap(store, "b", body(900, "n"), ttl=50)),
    Situation("swap with an owner", lambda store: swap(store, "b", {}, owner="cleo")),
    Situation("swap to another id", lambda store: swap(store, "b", {}, owner="cleo", new="z", tombstone=True)),
    Situation("displace", lambda store: store.set("new", body(3, "n"), owner="ring"), atomic=False, limited=True),
    Situation("destroy the first of a ring", lambda store: store.destroy("r3")),
    Situation("destroy one in the middle of a ring", lambda store: store.destroy("r1")),
    Situation("destroy the last of a ring", lambda store: store.destroy("r0")),
    Situation("touch one in the middle of a ring", lambda store: store.touch("r1", ttl=77)),
    Situation("overwrite the last of a ring", lambda store: store.set("r0", body(900, "n"), ttl=50, owner="ring")),
    Situation("from a ring to an owner in its bucket", lambda store: store.update("r1", owner=twin(store))),
    Situation("from an owner to a ring in its bucket", lambda store: store.update("t", owner="ring")),
    Situation("destroy the first in a bucket", lambda store: store.destroy("t")),
    Situation("clear, disposed", lambda store: store.clear(), atomic=False, disposing=True),
    Situation("prune, disposed", lambda store: store.prune(), atomic=False, disposing=True),
]


class Clock:
    now = 10**9

    def __call__(self) -> int:
        return self.now


def twin(store: Store) -> str:
    """Return an owner that is in the same bucket as the owner "ring"."""
    buckets = store.arena.geometry.owner_buckets
    bucket = owner_digest("ring") % buckets
    return next(owner for owner in map(str, count()) if owner_digest(owner) % buckets == bucket)


@cache
def template(full: bool, stale: bool, disposing: bool, limited: bool) -> Store:
    clock = Clock()
    store = Store(
        memory=2**16, max=40 if full else None, clock=clock, recency=0, check_period=None, stale=stale,
        dispose=Noting() if disposing else None, max_per_owner=4 if limited else None,
    )  # fmt: skip
    for number in range(4):
        store.set(f"old {number}", body(100, "o"), ttl=-1)
    for number in range(12):
        store.set(f"gap {number}", body(100 + 40 * number, "g"), ttl=60)
    for number in range(0, 12, 2):
        store.destroy(f"gap {number}")
    store.set("scattered", body(2000, "s"), ttl=60)
    store.set("a", body(600, "a"), ttl=60, owner="ada")
    store.set("b", body(400, "b"), ttl=60, owner="bob")
    store.set("c", body(500, "c"), ttl=60)
    store.set("d", body(1, "d"), ttl=60, owner="ada")
    store.set("empty", {}, ttl=60)
    for number in range(4):
        store.set(f"r{number}", body(1, "r"), ttl=60, owner="ring")
    store.set("t", body(1, "t"), ttl=60, owner=twin(store))
    number = 0
    while full and store.stats().evicted == 0:
        store.set(f"fill {number}", body(200, "f"), ttl=60)
        number += 1
    clock.now += 10**9
    return store


def populated(full: bool = False, *, stale: bool = False, disposing: bool = False, limited: bool = False) -> Store:
    """A small store with each kind of session: owned, expired, scattered over runs of blocks."""
    return copy_of(template(full, stale, disposing, limited))


def copy_of(store: Store) -> Store:
    return restored(store, Moment(image(store.arena.file.memory), set()))


@dataclass(frozen=True)
class Moment:
    """
    What outlives the process: the memory, but for whose it is and its lock, and what `Noting` has noted.

    A process that is killed at a step leaves what there is at that step: nothing else of it is looked at afterwards.
    """

    memory: bytes
    noted: set[str]


_STATE = STATE_CELLS * CELL


def image(memory: mmap) -> bytes:
    return bytes(memoryview(memory)[_STATE:])


def restored(like: Store, moment: Moment) -> Store:
    """Return a store with the options of another one, in the state of this moment."""
    arena, _ = Arena.prepare(None, like.arena.geometry)
    memoryview(arena.file.memory)[_STATE:] = moment.memory
    clock = Clock()
    clock.now = like.options.clock()
    dispose = Noting(moment.noted) if like.options.dispose else None
    return Store.over(arena, replace(like.options, clock=clock, dispose=dispose))


def moments(situation: Situation) -> list[Moment]:
    """Return the state at each step of an operation; steps without a change share one `Moment`."""
    found: list[Moment] = []
    with situation.store() as store:
        memory, dispose = store.arena.file.memory, store.options.dispose

        def note() -> None:
            moment = Moment(image(memory), dispose.noted() if isinstance(dispose, Noting) else set())
            found.append(found[-1] if found and found[-1] == moment else moment)

        with stepping(store.arena, Relentless(0, note)):
            situation.operation(store)
    return found


Content = dict[str, tuple[Any, ...]]


def content(store: Store) -> Content:
    """Everything a store holds: session, owner and deadline by id; and what it returns for ids that were removed."""
    arena = store.arena
    held: Content = {}
    for entry, record in bulk.records(store):
        session = store.codec.decode(record.payload)
        held[record.sid] = (session, record.owner, arena.cells[arena.table.expires + entry[0]])
    for sid in ("a", "b", "empty"):
        if gone := store.gone(sid):
            held[f"gone {sid}"] = (gone, None, NEVER)
    return held


def check_outcome(store: Store, before: Content, after: Content, *, atomic: bool) -> None:
    """Check a store after an interrupted operation: everything old or new, nothing mixed, all counters exact."""
    found = content(store)  # recovers nothing: reading needs no recovery
    verify(store.arena)  # takes the lock, which applies a pending plan
    found = content(store)
    if atomic:
        assert found in (before, after), differences(found, before, after)
    for sid in before.keys() | after.keys() | found.keys():
        assert found.get(sid) in possible(sid, before, after), f"{sid}: {found.get(sid)}"
    if isinstance(dispose := store.options.dispose, Noting):
        dropped = {sid for sid in before if found.get(sid) != before[sid]}
        assert dropped <= dispose.noted(), "dropped without a dispose"
    # and the store still works
    store.set("afterwards", body(400, "z"), ttl=60)
    assert store.get("afterwards") == body(400, "z")
    assert store.destroy("afterwards") == 1
    verify(store.arena)


def possible(sid: str, before: Content, after: Content) -> list[tuple[Any, ...] | None]:
    """What may be found under an id in the middle of an operation: old, new, and nothing if the old one is expired."""
    old = before.get(sid)
    expired = old is not None and old[2] <= Clock.now
    return [old, after.get(sid), *([None] if expired else [])]


def differences(found: Content, before: Content, after: Content) -> str:
    lines = []
    for sid in sorted(before.keys() | after.keys() | found.keys()):
        parts = [repr(part.get(sid)) for part in (found, before, after)]
        if len(set(parts)) > 1:
            lines.append("{}: {:.80} found, {:.80} before, {:.80} after".format(sid, *parts))
    return "; ".join(lines)[:1000]


def outcome(situation: Situation) -> tuple[Content, Content, int]:
    """Return the content before and after an undisturbed operation, and the number of steps that it takes."""
    with situation.store() as store:
        before = content(store)
        steps = Steps(0, lambda: None)
        with stepping(store.arena, steps):
            situation.operation(store)
        verify(store.arena)
        return before, content(store), steps.count


def record_of(entry: Entry) -> Record:
    return unpack(body_of(entry[4]))
