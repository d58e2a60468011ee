"""The processes of the concurrency tests: `python stress_child.py MODE PATH SEED KEYS SECONDS`."""

from __future__ import annotations

import math
import mmap
import random
import sys
import time
from typing import Any

from shmstore.engine.arena import Arena
from shmstore.options import Options
from shmstore.store.store import Store

SMALLEST, LARGEST = 40, 64 * 1024
OPERATIONS = 500  # of each process at least, however slow the machine is
PATIENCE = 60.0  # seconds for the lock: on a busy machine a check of the whole arena holds it for more than two


def session_of(key: int, sequence: int, size: int) -> dict[str, Any]:
    """Return a session in which every byte can be checked."""
    return {"key": key, "sequence": sequence, "size": size, "data": filler(key, sequence, size)}


def filler(key: int, sequence: int, size: int) -> bytes:
    return (b"%d.%d," % (key, sequence) * (size // 4 + 1))[:size]


def is_whole(session: dict[str, Any]) -> bool:
    return bool(session["data"] == filler(session["key"], session["sequence"], session["size"]))


def size_of(rnd: random.Random) -> int:
    """Return a size between 40 bytes and 64 KB, with equal shares of all orders of magnitude."""
    return int(SMALLEST * (LARGEST / SMALLEST) ** rnd.random())


def open_store(path: str, **options: Any) -> Store:
    return Store.over(Arena.open(path), Options.of(memory=2**20, **{"lock_timeout": PATIENCE, **options}))


def mixed(store: Store, rnd: random.Random, keys: int, seconds: float) -> None:
    """Write and read sessions that are never removed; exit with 1 at the first wrong answer."""
    end = time.monotonic() + seconds
    wrong = misses = operations = 0
    while time.monotonic() < end or operations < OPERATIONS:
        for _ in range(50):
            key = rnd.randrange(keys)
            operations += 1
            if rnd.random() < 0.4:
                store.set(str(key), session_of(key, operations, size_of(rnd)), ttl=math.inf)
            else:
                session = store.get(str(key))
                if session is None:
                    misses += 1
                elif session["key"] != key or not is_whole(session):
                    wrong += 1
    print(f"{operations} operations, {wrong} wrong, {misses} missed")
    sys.exit(bool(wrong or misses))


def acknowledging(store: Store, rnd: random.Random, keys: int, acknowledged: Any) -> None:
    """
    Change sessions of one's own for ever, and note each change before and after it was made.

    `acknowledged` has two cells for each key: the sequence number tried, and the one acknowledged; negative: removed.
    """
    first = keys * int(sys.argv[6])
    sequence = max(abs(number) for number in acknowledged) + 1
    while True:
        key = first + rnd.randrange(keys)
        sequence += 1
        sid, at = str(key), 2 * key
        gone = acknowledged[at + 1] <= 0
        kind = rnd.randrange(5)
        if kind == 0 and not gone:
            acknowledged[at] = -sequence
            store.destroy(sid)
            acknowledged[at + 1] = -sequence
        elif kind == 1 and not gone:
            acknowledged[at] = sequence
            size = size_of(rnd)
            assert store.update(sid, session_of(key, sequence, size))
            acknowledged[at + 1] = sequence
        elif kind == 2 and not gone:
            assert store.touch(sid, ttl=math.inf)
        else:
            acknowledged[at] = sequence
            store.set(sid, session_of(key, sequence, size_of(rnd)), ttl=math.inf, owner=sid if sequence % 2 else None)
            acknowledged[at + 1] = sequence


def main() -> None:
    mode, path, seed, keys, seconds = sys.argv[1:6]
    rnd = random.Random(int(seed))
    with open_store(path, recency=0) as store:
        if mode == "mixed":
            mixed(store, rnd, int(keys), float(seconds))
        else:
            with open(path + ".acknowledged", "r+b") as file:
                acknowledged = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
            acknowledging(store, rnd, int(keys), acknowledged)


if __name__ == "__main__":
    main()
