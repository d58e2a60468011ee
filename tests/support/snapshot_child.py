"""The processes of the snapshot tests: `python snapshot_child.py writing ARENA FIRST LAST SIZE`."""

from __future__ import annotations

import random
import signal
import sys
import time
from typing import Any

from stress_child import PATIENCE, filler

from shmstore.engine.arena import Arena
from shmstore.options import Options
from shmstore.store.store import Store


def session_of(key: int, number: int, size: int) -> dict[str, Any]:
    """Return a session with two values that must agree, and bytes that show whether each of them belongs to it."""
    return {"a": number, "data": filler(key, number, size), "b": number}


def is_whole(sid: str, session: dict[str, Any]) -> bool:
    number, data = session["a"], session["data"]
    return bool(session["b"] == number and data == filler(int(sid), number, len(data)))


def writing(path: str, first: int, last: int, size: int) -> None:
    """Overwrite and change the sessions of these keys until TERM; print the number of changes and the longest time."""
    store = Store.over(Arena.open(path), Options.of(lock_timeout=PATIENCE))
    over: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: over.append(1))
    print("begun", flush=True)
    slowest, number, rnd = 0, 0, random.Random(first)
    while not over:
        number += 1
        key = rnd.randrange(first, last)
        session = session_of(key, number, rnd.randrange(size))
        begun = time.perf_counter_ns()
        if number % 4:
            store.set(str(key), session)
        elif not store.update(str(key), session):
            sys.exit(f"{key} is gone")
        slowest = max(slowest, time.perf_counter_ns() - begun)
    print(number, slowest / 1e6)


if __name__ == "__main__":
    writing(sys.argv[2], *map(int, sys.argv[3:]))
