"""What each operation costs: `python benchmarks/operations.py`, about a minute. Microseconds, median of 9 rounds.

The operations take turns within each round, so that a noisy machine is noisy for all of them.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from shmstore import Store
from shmstore.codec.ids import key_of
from shmstore.engine.header import USED_BLOCKS
from shmstore.engine.layout import SLOT
from shmstore.engine.verify import verify
from shmstore.system.clock import boottime_ns

ROUNDS = 9
CALLS = 2000


def session_of(size: int) -> dict[str, Any]:
    """A session like those of web applications, of `size` encoded bytes."""
    session: dict[str, Any] = {
        "_user_id": "4711",
        "_fresh": True,
        "csrf_token": "5d41402abc4b2a76b9719d911017c592ae2f3a7c",
        "language": "en",
        "cart": [{"id": 1000 + n, "name": f"article number {n}", "price": 9.99, "count": 1} for n in range(6)],
        "last_seen": 1_790_000_000,
        "history": "",
    }
    from shmstore.codec.body import Codec

    session["history"] = "h" * (size - len(Codec().encode(session)) - 2)
    return session


def identity(number: int) -> str:
    return f"{number:043d}"


def measure(operations: dict[str, Callable[[int], object]], numbers: list[int], calls: int = CALLS) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in operations}
    for round_ in range(ROUNDS):
        chosen = numbers[round_ * calls : (round_ + 1) * calls]
        for name, operation in operations.items():
            begin = time.perf_counter()
            for number in chosen:
                operation(number)
            taken[name].append((time.perf_counter() - begin) / len(chosen) * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


def one_process(sessions: int, size: int) -> dict[str, float]:
    session = session_of(size)
    rnd = random.Random(1)
    with Store(memory=sessions * 2500 + 2**20, max=sessions, check_period=None) as store:
        order = list(range(sessions))
        rnd.shuffle(order)
        for number in order:
            store.set(identity(number), session, ttl=math.inf)
        arena = store.arena
        # its blocks, its slot, its share of the two indexes
        per_session = arena.cells[USED_BLOCKS] * arena.geometry.block_size / sessions + 8 * (SLOT + 1) + 2
        numbers = [rnd.randrange(sessions) for _ in range(ROUNDS * CALLS)]
        keys = {number: key_of(identity(number).encode()) for number in set(numbers)}
        ids = {number: identity(number) for number in set(numbers)}
        payload, core = store.codec.encode(session), arena.file.core

        def raw(number: int) -> object:
            return arena.reader.read(keys[number], 1) if core is None else core.get(ids[number], boottime_ns(), True)

        results = measure(
            {
                "get, as bytes": raw,
                "get": lambda number: store.get(ids[number]),
                "set": lambda number: store.set(ids[number], session, math.inf),
                "update one key": lambda number: store.update(ids[number], {"language": "de"}),
                "touch": lambda number: store.touch(ids[number], None, 3600),
                "encode alone": lambda _: store.codec.encode(session),
                "decode alone": lambda _: store.codec.decode(payload),
            },
            numbers,
        )
        fresh = iter(range(sessions, 10**9))
        results |= measure({"add at capacity": lambda _: store.add(identity(next(fresh)), session, math.inf)}, numbers)
        newest = store.ids()
        gone = iter(newest)
        few = min(CALLS, sessions // 2 // ROUNDS)
        results |= measure({"destroy": lambda _: store.destroy(next(gone))}, numbers, few)
        for sid in store.ids()[: sessions // 5]:
            store.touch(sid, ttl=0)
        begin = time.perf_counter()
        pruned = store.prune()
        results["prune, each expired"] = (time.perf_counter() - begin) / pruned * 1e6
        results["bytes of arena each"] = per_session
    return results


CHILD = """
import os, random, sys, time
sys.path.insert(0, sys.argv[1])
from operations import identity, session_of
from shmstore.engine.arena import Arena
from shmstore.engine.frame import key_of, seal
from shmstore.engine.header import NEVER
arena = Arena.open(sys.argv[2])
writing, seconds = sys.argv[3] == "write", float(sys.argv[4])
rnd = random.Random(os.getpid())
keys = [key_of(identity(number).encode()) for number in range(10_000)]
record = os.urandom(797)
sys.stdin.read(1)
end = time.monotonic() + seconds
count, slowest = 0, []
while time.monotonic() < end:
    for key in rnd.choices(keys, k=50):
        begin = time.perf_counter()
        if writing:
            sealed = seal(key, 0, 0, record)
            try:
                arena.lock(2)
                arena.publish(arena.find(key), key, sealed, 0, NEVER, 0)
            finally:
                arena.unlock()
        else:
            arena.reader.read(key, 2)
        slowest.append(time.perf_counter() - begin)
        count += 1
slowest.sort()
print(count / seconds, slowest[len(slowest) // 2] * 1e6, slowest[len(slowest) * 99 // 100] * 1e6)
"""


def processes(count: int, kind: str, seconds: float = 2.0) -> str:
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from shmstore.engine.arena import Arena
    from shmstore.engine.frame import seal
    from shmstore.engine.header import NEVER
    from shmstore.engine.layout import Geometry

    with TemporaryDirectory(dir="/dev/shm", prefix="shmstore-bench-") as directory:
        path = str(Path(directory) / "arena")
        arena = Arena.create(path, Geometry.plan(32 * 2**20, 10_000))
        for number in range(10_000):
            key = key_of(identity(number).encode())
            arena.lock(1)
            arena.publish(0, key, seal(key, 0, 0, os.urandom(797)), 0, NEVER, 0)
            arena.unlock()
        here = str(Path(__file__).parent)
        children = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD, here, path, kind, str(seconds)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(count)
        ]  # fmt: skip
        time.sleep(0.3 * count)  # until all stand at the start
        for child in children:
            assert child.stdin is not None
            child.stdin.write("g")
            child.stdin.flush()
        rows = [[float(field) for field in child.communicate()[0].split()] for child in children]
        verify(arena)
        arena.close()
    total = sum(row[0] for row in rows)
    fairness = min(row[0] for row in rows) / max(row[0] for row in rows)
    p50, p99 = statistics.median(row[1] for row in rows), max(row[2] for row in rows)
    return f"{total:10.0f}/s, slowest/fastest {fairness:.2f}, p50 {p50:6.1f} us, p99 {p99:7.1f} us"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="*", default=[1000, 100_000])
    parser.add_argument("--size", type=int, default=750, help="bytes of one session")
    arguments = parser.parse_args()
    tables = {sessions: one_process(sessions, arguments.size) for sessions in arguments.sessions}
    print(f"one process, {arguments.size} bytes" + "".join(f"{sessions:>12d}" for sessions in tables))
    for name in next(iter(tables.values())):
        print(f"{name:22s}" + "".join(f"{table[name]:12.2f}" for table in tables.values()))
    print(f"\n{arguments.size} bytes raw, several processes at once on {os.cpu_count()} cores")
    for kind in ("write", "read"):
        for count in (1, 2, 8):
            print(f"{count} x {kind:5s} {processes(count, kind)}")


if __name__ == "__main__":
    main()
