"""Concurrent and killed processes: no session is torn, and no acknowledged write is lost."""

from __future__ import annotations

import math
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stress_child
from engines import BUILT, VARIABLE
from sampling import FULL

from shmstore.engine.arena import Arena
from shmstore.engine.layout import Geometry
from shmstore.engine.verify import verify
from shmstore.options import Options
from shmstore.store.store import Store
from shmstore.testing import wait_until

# The engines that the processes use, in turn. Two of each meet those of their own kind and of the other.
ALONE = [["python"], ["c"]] if BUILT else [["python"]]
MIXED = [["c", "python"]] if BUILT else []
pytestmark = pytest.mark.parametrize("engines", MIXED + ALONE if FULL else (MIXED or ALONE), ids=" and ".join)

SECONDS = float(os.environ.get("SHMSTORE_STRESS_SECONDS", "1"))
KILLS = int(os.environ.get("SHMSTORE_STRESS_KILLS", "6"))


@pytest.fixture
def path(store_dir: Path) -> str:
    return str(store_dir / "arena")


@pytest.fixture
def seed() -> int:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return seed


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def start(mode: str, path: str, seed: int, keys: int, engines: list[str], number: int) -> subprocess.Popen[str]:
    arguments = [mode, path, str(seed + number), str(keys), str(SECONDS), str(number)]
    return subprocess.Popen(
        [sys.executable, stress_child.__file__, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {VARIABLE: engines[number % len(engines)]},
    )  # fmt: skip


def make_store(path: str, memory: int, **options: object) -> Store:
    options = {"memory": memory, "lock_timeout": stress_child.PATIENCE, **options}
    store = Store.over(Arena.create(path, Geometry.plan(memory)), Options.of(**options))
    store.change_options(store.options)
    return store


def test_four_processes_on_the_same_sessions(
    path: str, seed: int, engines: list[str], children: list[subprocess.Popen[str]]
) -> None:
    keys = 2000
    with make_store(path, 64 * 2**20) as store:
        rnd = random.Random(seed)
        for key in range(keys):
            store.set(str(key), stress_child.session_of(key, 0, stress_child.size_of(rnd)), ttl=math.inf)
        children += [start("mixed", path, seed, keys, engines, number) for number in range(4)]
        for child in children:
            output, _ = child.communicate(timeout=SECONDS + 300)
            assert child.returncode == 0, output
            assert int(output.split()[0]) >= stress_child.OPERATIONS, output
        verify(store.arena)
        assert store.length() == keys
        assert store.stats().evicted == 0  # else a miss would prove nothing


def test_writers_killed_at_random_lose_nothing_acknowledged(
    path: str, seed: int, engines: list[str], children: list[subprocess.Popen[str]]
) -> None:
    keys, writers = 40, 2
    rnd = random.Random(seed)
    with open(path + ".acknowledged", "w+b") as file:
        file.truncate(2 * 8 * keys * writers)
        acknowledged = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
    with make_store(path, 16 * 2**20, recency=0) as store:
        children += [start("acknowledging", path, seed, keys, engines, number) for number in range(writers)]
        interrupted = 0
        for round_ in range(KILLS):
            victim = round_ % writers
            own = slice(2 * victim * keys, 2 * (victim + 1) * keys)
            before = list(acknowledged[own])
            wait_until(lambda: list(acknowledged[own]) != before or children[victim].poll() is not None)  # noqa: B023
            time.sleep(rnd.random() * 0.02)
            children[victim].kill()
            output, _ = children[victim].communicate()
            assert not output, output  # it did not end by itself
            # This takes the lock, which applies a plan left in the journal; until then readers get the previous state.
            verify(store.arena)
            for key in range(victim * keys, (victim + 1) * keys):
                tried, done = acknowledged[2 * key], acknowledged[2 * key + 1]
                interrupted += tried != done
                session = store.get(str(key))
                found = 0 if session is None else session["sequence"]
                allowed = {max(0, tried), max(0, done)}
                assert found in allowed, f"key {key}: {found} is there, {done} was acknowledged, {tried} tried"
                assert session is None or stress_child.is_whole(session)
                # Pending changes are now applied or dropped: the next round starts with the stored state.
                acknowledged[2 * key] = acknowledged[2 * key + 1] = found or -1
            children[victim] = start("acknowledging", path, seed + 100 + round_, keys, engines, victim)
        print(f"{interrupted} changes were in doubt")
        assert store.stats().evicted == 0
