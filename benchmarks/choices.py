"""The measurements behind two choices: `python benchmarks/choices.py`, about three minutes.

The lock: the arena's robust mutex against a polled `flock` with an in-process lock, 1, 2 and 8 processes, a few
microseconds of work under the lock and beside it. The block size: 32 to 128 bytes, sessions of 750 bytes, and ones that
grow and shrink.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections.abc import Callable

from shmstore.codec.ids import key_of
from shmstore.engine.arena import Arena
from shmstore.engine.frame import Key, seal
from shmstore.engine.header import NEVER, USED_BLOCKS
from shmstore.engine.layout import CELL, SLOT, Geometry
from shmstore.engine.mutex import Mutex

SECONDS = 1.5
ROUNDS = 3


def mutex(path: str) -> tuple[Callable[[], object], Callable[[], object]]:
    with open(path, "r+b") as file:
        lock = Mutex(mmap.mmap(file.fileno(), 0), 0, fresh=False)
    return lambda: lock.acquire(10), lock.release


def flock(path: str) -> tuple[Callable[[], object], Callable[[], object]]:
    fd, threads = os.open(path, os.O_RDWR), threading.RLock()

    def acquire() -> None:
        tries = 0
        while True:
            if threads.acquire(blocking=False):
                try:
                    return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    threads.release()
            tries += 1
            if tries >= 400:  # as the mutex waits: try, then sleep
                time.sleep(0.000001)

    def release() -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)
        threads.release()

    return acquire, release


def work(count: int) -> None:
    for _ in range(count):
        pass


def child(kind: str, path: str) -> None:
    acquire, release = {"mutex": mutex, "flock": flock}[kind](path)
    sys.stdin.read(1)
    waits = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        begin = time.perf_counter()
        acquire()
        try:
            work(150)
        finally:
            release()
        waits.append(time.perf_counter() - begin)
        work(100)
    waits.sort()
    print(len(waits) / SECONDS, waits[len(waits) * 99 // 100] * 1e6)


def contend(kind: str, processes: int) -> tuple[float, float]:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(4096)
        Mutex(mmap.mmap(file.fileno(), 4096), 0, fresh=True)
        children = [
            subprocess.Popen(
                [sys.executable, __file__, kind, file.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(processes)
        ]
        time.sleep(0.2 * processes + 0.3)  # until all stand at the start
        for each in children:
            assert each.stdin is not None
            each.stdin.write("g")
            each.stdin.flush()
        rows = [[float(field) for field in each.communicate()[0].split()] for each in children]
    return sum(row[0] for row in rows), max(row[1] for row in rows)


def blocks(size: int, sessions: int = 50_000) -> str:
    """Sessions of one size, written once."""
    arena = Arena.create(None, Geometry.plan(sessions * 1500, sessions, size))
    keys = [key_of(b"%043d" % number) for number in range(sessions)]
    body = os.urandom(797)  # 750 bytes, an id of 43, the lengths
    for key in keys:
        put(arena, key, body)
    each = arena.cells[USED_BLOCKS] * size / sessions + 8 * (SLOT + 1) + 2
    reading = get(arena, keys[:: sessions // 5000])
    arena.close()
    return f"{size:4d} bytes: {each:6.0f} bytes of arena per session, get {reading:.2f} us"


def broken_up(size: int, sessions: int = 5000, writes: int = 300_000) -> str:
    """Sessions that are overwritten in other sizes, 200 to 4000 bytes, in an arena that is nine tenths full."""
    rnd, body = random.Random(1), os.urandom(4000)
    arena = Arena.create(None, Geometry.plan(sessions * 2550, sessions, size))
    keys = [key_of(b"%043d" % number) for number in range(sessions)]
    for write in range(writes):
        put(arena, keys[write] if write < sessions else rnd.choice(keys), body[: rnd.randint(200, 4000)])
    some = rnd.choices(keys, k=2000)
    reading = get(arena, some)

    def overwrite() -> None:
        for key in some:
            put(arena, key, body[: rnd.randint(200, 4000)])

    writing = best(overwrite) / len(some) * 1e6
    slots = arena.table.live_slots()
    runs = sum(count_runs(arena, slot) for slot in slots) / len(slots)
    length = sum(arena.cells[arena.table.record + slot] >> 32 for slot in slots)
    more = (arena.cells[USED_BLOCKS] * size - length) / len(slots)
    arena.close()
    return f"{size:4d} bytes: {runs:4.1f} runs each, {more:.0f} bytes more, get {reading:.2f} us, set {writing:.2f}"


def count_runs(arena: Arena, slot: int) -> int:
    record, count = arena.cells[arena.table.record + slot], 0
    block, left = record % 2**32, record >> 32
    while left > 0:
        link = arena.cells[arena.table.run_head(block)]
        block, left, count = link % 2**32, left - (link >> 32) * arena.geometry.block_size + CELL, count + 1
    return count


def put(arena: Arena, key: Key, body: bytes) -> None:
    arena.lock(1)
    arena.publish(arena.find(key), key, seal(key, 0, 0, body), 0, NEVER, 0)
    arena.unlock()


def get(arena: Arena, keys: list[Key]) -> float:
    return best(lambda: [arena.reader.read(key, 1) for key in keys]) / len(keys) * 1e6


def best(call: Callable[[], object]) -> float:
    return min(timeit.repeat(call, number=1, repeat=7))


def main() -> None:
    if len(sys.argv) > 1:
        return child(*sys.argv[1:])
    print("locked sections/s, p99 in us: median of", ROUNDS)
    for processes in (1, 2, 8):
        rounds = [(contend("flock", processes), contend("mutex", processes)) for _ in range(ROUNDS)]
        for at, kind in enumerate(("flock", "mutex")):
            total = statistics.median(each[at][0] for each in rounds)
            p99 = statistics.median(each[at][1] for each in rounds)
            print(f"{processes} x {kind}: {total:9.0f} {p99:8.1f}")
    for measure in (blocks, broken_up):
        for size in (32, 48, 64, 96, 128):
            print(measure(size))
    return None


if __name__ == "__main__":
    main()
