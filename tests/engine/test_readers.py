"""Readers interrupted by a writer between any two instructions, and beside writers that are stopped or killed."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

import fault_injection as faults
import pytest
import stopping_child
import stress_child
from engines import on_each_engine
from fault_injection import Clock, Relentless, Steps, body, stepping

from shmstore import Store, StoreTimeout
from shmstore.codec.ids import key_of
from shmstore.engine import header as at
from shmstore.engine.arena import Arena
from shmstore.engine.frame import Key, body_of, seal
from shmstore.engine.header import NEVER
from shmstore.engine.layout import Geometry
from shmstore.engine.mapping import MappedFile
from shmstore.engine.verify import verify
from shmstore.options import Options

FULL = os.environ.get("SHMSTORE_FULL") == "1"
STOPS = 2000 if FULL else 50

Figure = Callable[[str], None]


# -- overtaken between any two instructions ----------------------------------------------------------------------------
# The reader is the one in Python, which can be stepped; the writer is of the engine that is there.


Seen = tuple[Any, int] | None  # a session and its deadline


@dataclass
class Scene:
    """A store, the session that is read, the change by a writer meanwhile, and the results that a reader may return."""

    make: Callable[[], Store]
    sid: str
    change: Callable[[Store], None]
    allowed: list[Seen]

    def read(self, steps: Steps) -> None:
        """Read with the writer let in as `steps` say."""
        with faults.copy_of(self.make()) as store, faults.second_view(store) as writer:

            def act() -> None:
                with contextlib.suppress(StoreTimeout):  # the reader holds the lock by now: a writer waits
                    self.change(writer)

            steps.action = act
            with stepping(store.arena, steps):
                found = store.arena.reader.read(key_of(self.sid.encode()), 1)
            seen = None if found is None else (store.codec.decode(faults.record_of(found).payload), found[2])
            assert seen in self.allowed, f"step {steps.chosen}: {str(seen)[:200]}"


def overtake_everywhere(read: Callable[[Steps], None], seed: int) -> int:
    """
    Let the writer in before each step of a reader in turn; return how many there are.

    In the short version, of a reader that takes many steps, before some of them: the same loop takes them for each run
    and each slot.
    """
    rnd = random.Random(seed)
    chosen = 0
    while True:
        chosen += 1 if FULL or chosen < 40 else rnd.randint(1, 25)
        steps = Steps(chosen, lambda: None, reads=True)
        read(steps)
        if steps.count < chosen:
            return steps.count


def overtake_until_it_takes_the_lock(read: Callable[[Steps], None]) -> None:
    """Let the writer in before every step of a reader."""
    read(Relentless(0, lambda: None, reads=True))


LARGE = 64 * 1024
BEFORE, AFTER = 60, 30  # lives: no session may be seen with another's deadline


def until(ttl: int) -> int:
    return Clock.now + ttl * 10**9 + 1


@cache
def in_many_runs() -> Store:
    """A store whose free blocks are scattered, with a session of 64 KB."""
    store = Store(memory=2**19, max=300, max_session=2**17, clock=Clock(), recency=0, check_period=None)
    for number in range(200):
        store.set(str(number), body(300, "g"), BEFORE)
    for number in range(0, 200, 2):
        store.destroy(str(number))
    store.set("large", body(LARGE, "l"), BEFORE)
    return store


@cache
def in_one_block() -> Store:
    store = Store(memory=2**16, clock=Clock(), recency=0, check_period=None)
    for sid in "abc":
        store.set(sid, {"mark": sid}, BEFORE)
    return store


def recycle_large(store: Store) -> None:
    store.destroy("large")
    store.set("other", body(LARGE, "o"), AFTER)


def rewrite_large(store: Store) -> None:
    store.set("large", body(LARGE, "m"), AFTER)
    store.set("other", body(LARGE // 2, "o"), AFTER)


def shrink_large(store: Store) -> None:
    store.set("large", body(1, "m"), AFTER)
    store.set("other", body(LARGE, "o"), AFTER)


def recycle_small(store: Store) -> None:
    store.destroy("b")
    store.set("x", {"mark": "x"}, AFTER)


def rewrite_small(store: Store) -> None:
    """Twice: the record is where it was, and of the same length."""
    store.set("b", {"mark": "y"}, AFTER)
    store.set("b", {"mark": "z"}, AFTER)


def renew_small(store: Store) -> None:
    """Only the part that the reader has already copied is unchanged."""
    store.set("b", {"mark": "y"}, AFTER)


def away_and_back(store: Store) -> None:
    store.rename("b", "away")
    store.set("x", {"mark": "x"}, AFTER)
    store.rename("away", "b")


LARGE_BEFORE = body(LARGE, "l"), until(BEFORE)
SMALL_BEFORE = {"mark": "b"}, until(BEFORE)
SCENES = [
    Scene(in_many_runs, "large", recycle_large, [LARGE_BEFORE, None]),
    Scene(in_many_runs, "large", rewrite_large, [LARGE_BEFORE, (body(LARGE, "m"), until(AFTER))]),
    Scene(in_many_runs, "large", shrink_large, [LARGE_BEFORE, (body(1, "m"), until(AFTER))]),
    Scene(in_one_block, "b", recycle_small, [SMALL_BEFORE, None]),
    Scene(in_one_block, "b", renew_small, [SMALL_BEFORE, ({"mark": "y"}, until(AFTER))]),
    Scene(in_one_block, "b", rewrite_small, [SMALL_BEFORE, *(({"mark": mark}, until(AFTER)) for mark in "yz")]),
    Scene(in_one_block, "b", away_and_back, [SMALL_BEFORE]),
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.change.__name__)
def test_a_reader_interrupted_by_a_writer_between_any_two_instructions(scene: Scene, seed: int, figure: Figure) -> None:
    steps = overtake_everywhere(scene.read, seed)
    overtake_until_it_takes_the_lock(scene.read)
    assert steps > (100 if scene.make is in_many_runs else 10), "nothing was stepped"
    figure(f"{steps} instructions")


CHAIN = 50


@cache
def one_bucket() -> tuple[Arena, list[Key]]:
    """Return an arena with 50 slots in one bucket, and their keys."""
    arena = Arena.create(None, Geometry.plan(2**16, 2 * CHAIN))
    keys = [(7 + number * arena.geometry.buckets, number) for number in range(CHAIN)]
    for key in keys:
        put(arena, key, b"old %d" % key[1])
    return arena, keys


def put(arena: Arena, key: Key, content: bytes) -> None:
    try:
        arena.lock(1)
        arena.publish(arena.find(key), key, seal(key, 0, 0, content), 0, NEVER, 1)
    finally:
        arena.unlock()


def drop(arena: Arena, key: Key) -> None:
    try:
        arena.lock(1)
        if slot := arena.find(key):
            arena.drop(slot, at.DESTROYED)
    finally:
        arena.unlock()


def moved(keys: list[Key]) -> list[Key]:
    """Return the keys that may be absent for a moment, the first and the next to last in the chain among them."""
    return keys[1::8]


def divert(arena: Arena, keys: list[Key]) -> None:
    """Some slots move to the chain of another bucket."""
    for key in moved(keys):
        drop(arena, key)
        put(arena, (key[0] + 1, key[1]), b"diverted")


def reorder(arena: Arena, keys: list[Key]) -> None:
    """Some slots leave the chain and return elsewhere in it, with swapped keys."""
    for key in moved(keys):
        drop(arena, key)
    for key in moved(keys):
        put(arena, key, b"new %d" % key[1])


def renew(arena: Arena, keys: list[Key]) -> None:
    for key in keys:
        put(arena, key, b"new %d" % key[1])


@pytest.mark.parametrize("change", [divert, reorder, renew])
def test_a_reader_interrupted_by_a_writer_in_a_bucket_of_fifty(
    change: Callable[[Arena, list[Key]], None], seed: int, figure: Figure
) -> None:
    like, keys = one_bucket()

    def read(number: int, steps: Steps) -> None:
        arena = like.duplicate(1)
        writer = Arena(MappedFile(os.open(arena.file.reopen_path(), os.O_RDWR), arena.geometry))

        def act() -> None:
            with contextlib.suppress(StoreTimeout):
                change(writer, keys)

        steps.action = act
        with stepping(arena, steps):
            entry = arena.reader.read(keys[number], 1)
        arena.close()
        writer.close()
        stays = change is renew or keys[number] not in moved(keys)
        allowed = {b"old %d" % number, b"new %d" % number} | (set() if stays else {None})
        seen = None if entry is None else body_of(entry[4])
        assert seen in allowed, f"key {number}, step {steps.chosen}: {seen!r}"

    # The last one in the chain, the next to last, and the first one.
    numbers = (0, 1, CHAIN - 1)
    total = sum(overtake_everywhere(partial(read, number), seed) for number in numbers)
    for number in numbers if FULL else numbers[:1]:
        overtake_until_it_takes_the_lock(partial(read, number))
    assert total > CHAIN, "nothing was stepped"
    figure(f"{total} instructions")


# -- beside another process that is stopped or killed inside a mutation ------------------------------------------------

KEYS = 25


@dataclass
class Writer:
    """A `stopping_child`, and the changes that it announces."""

    path: str
    seed: int
    process: subprocess.Popen[bytes] = field(init=False)
    output: IO[bytes] = field(init=False)
    changing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        arguments = [stopping_child.__file__, self.path, str(self.seed), str(KEYS)]
        self.process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        os.set_blocking(self.output.fileno(), False)

    def stopped(self) -> None:
        """Wait until the writer is stopped, and read what it was about to change."""
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the writer ended with status {status}"
        if text := self.output.read():
            self.changing = text.decode().splitlines()[-1].split("\t")

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            self.process.wait()
        self.output.close()


@pytest.fixture
def path(store_dir: Path) -> str:
    return str(store_dir / "arena")


@pytest.fixture
def store(path: str) -> Iterator[Store]:
    """A store of whole sessions of all sizes that other processes can open, with room for all they may do."""
    memory = 2**23
    options = Options.of(memory=memory, lock_timeout=0.05)
    with Store.over(Arena.create(path, Geometry.plan(memory)), options) as store:
        store.change_options(options)
        for key in range(KEYS):
            size = stopping_child.SIZES[key % len(stopping_child.SIZES)]
            store.set(str(key), stress_child.session_of(key, 0, size), ttl=math.inf)
        store.get("0")  # the first hit is checked in another test
        yield store


@pytest.fixture
def writers(path: str) -> Iterator[Callable[[int], Writer]]:
    started = []

    def start(seed: int) -> Writer:
        started.append(Writer(path, seed))
        return started[-1]

    yield start
    for writer in started:
        writer.kill()


def read_all(store: Store, writer: Writer) -> tuple[int, int]:
    """Read everything beside a stopped writer; return the numbers of hits and of waits."""
    hits = waits = 0
    for key in range(KEYS):
        sid, session, waited = str(key), None, ""
        try:
            session = store.get(sid)
        except StoreTimeout as error:
            waited = str(error)
        if session is None:
            assert sid in writer.changing, f"{sid} cannot be read while {writer.changing} change"
            assert not waited or re.search(rf"process {writer.process.pid}\b", waited), waited
            waits += bool(waited)
        else:
            assert session["key"] == key
            assert stress_child.is_whole(session), f"{sid} is torn"
            hits += 1
    return hits, waits


def everything_is_whole(store: Store, writer: Writer) -> None:
    """The state that the next writer finds after a death."""
    try:
        store.arena.lock(60)
    finally:
        store.arena.unlock()
    verify(store.arena)
    for key in range(KEYS):
        session = store.get(str(key))
        assert session is not None or str(key) in writer.changing
        assert session is None or (session["key"] == key and stress_child.is_whole(session))
    # An interrupted session may be absent or under the other id: the next writer starts with all of them.
    store.destroy(writer.changing)
    for sid in writer.changing[:1]:
        store.set(sid, stress_child.session_of(int(sid), 0, 300), ttl=math.inf)


@on_each_engine
def test_readers_beside_a_stopped_process(
    store: Store, writers: Callable[[int], Writer], seed: int, figure: Figure
) -> None:
    rnd = random.Random(seed)
    writer = writers(seed)
    hits = waits = kills = 0
    for _ in range(STOPS):
        writer.stopped()
        found = read_all(store, writer)
        hits, waits = hits + found[0], waits + found[1]
        if rnd.random() < 0.05:
            kills += 1
            writer.kill()
            everything_is_whole(store, writer)
            writer = writers(seed + kills)
        else:
            writer.go_on()
    assert hits >= STOPS * (KEYS - 1) * 0.99
    assert store.stats().evicted == 0  # else a miss would prove nothing
    figure(f"{STOPS} stops, {kills} kills, {hits} hits, {waits} bounded waits")


@on_each_engine
def test_a_first_read_beside_a_stopped_process(
    store: Store, path: str, writers: Callable[[int], Writer], seed: int
) -> None:
    writer = writers(seed)
    for _ in range(1000):
        writer.stopped()
        if not store.arena.try_lock():
            break
        store.arena.unlock()
        writer.go_on()
    else:
        pytest.fail("it was never stopped with the lock")
    other = next(str(key) for key in range(KEYS) if str(key) not in writer.changing)
    code = "import sys, stress_child; print(stress_child.open_store(sys.argv[1], lock_timeout=0.05).get(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", code, path, other],
        capture_output=True,
        text=True,
        cwd=Path(stopping_child.__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    assert "'sequence'" in done.stdout
