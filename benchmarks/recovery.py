"""The delay that the death of a writer causes for the next one: `python benchmarks/recovery.py`, about a minute.

A writer is killed inside a mutation, at a random step of it between taking the lock and giving it back, 20 times. The
next one was attached before: how long does it take to write one session? And how long to attach and read one?
Ends with 1 if a wait is longer than it may be.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from fault_injection import Steps, stepping

from shmstore.engine.arena import Arena
from shmstore.engine.layout import Geometry
from shmstore.engine.verify import verify
from shmstore.options import Options
from shmstore.store.store import Store

ROUNDS = 20
SESSION = {"user": 4711, "token": "5d41402abc4b2a76b9719d911017c592ae2f3a7c"}
BOUNDS = {1_000: 0.2, 100_000: 0.2, 1_000_000: 2.0}  # seconds that a writer may wait


@contextmanager
def full_store(sessions: int) -> Iterator[tuple[Store, str]]:
    memory = sessions * 500 + 2**20
    options = Options.of(memory=memory, max=sessions, check_period=None)
    with TemporaryDirectory(dir="/dev/shm", prefix="shmstore-bench-") as directory:
        path = str(Path(directory) / "arena")
        with Store.over(Arena.create(path, Geometry.plan(memory, sessions)), options) as store:
            store.change_options(options)
            for number in range(sessions):
                store.set(str(number), SESSION, ttl=math.inf)
            yield store, path


def overwrite(store: Store, sid: str) -> None:
    store.set(sid, {"n": 1}, ttl=math.inf, owner="ada")


def steps_of(store: Store, sid: str) -> int:
    """Return how many steps a mutation has."""
    steps = Steps(0, lambda: None)
    with stepping(store.arena, steps):
        overwrite(store, sid)
    return steps.count


def died_inside(store: Store, sid: str, step: int) -> bool:
    """Fork a writer that dies before this step of a mutation; return whether the mutation has that step."""
    child = os.fork()
    if not child:
        try:
            with stepping(store.arena, Steps(step, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                overwrite(store, sid)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status == 1 << 8:
        raise RuntimeError("the writer failed")
    return os.WIFSIGNALED(status)


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def attach(path: str, options: Options, sid: str) -> None:
    with Store.over(Arena.open(path), options) as store:
        store.get(sid)


def measure(sessions: int, rnd: random.Random) -> tuple[list[float], list[float]]:
    """Return the seconds that the next writer takes, and that attaching takes."""
    waits, attachments = [], []
    with full_store(sessions) as (store, path):
        last = steps_of(store, str(sessions - 1))
        for _ in range(ROUNDS):
            victim, other, read = (str(number) for number in rnd.sample(range(sessions - 1), 3))
            while not died_inside(store, victim, rnd.randrange(2, last)):
                pass  # that write had fewer steps
            waits.append(timed(lambda other=other: overwrite(store, other)))  # type: ignore[misc]
            attachments.append(timed(lambda read=read: attach(path, store.options, read)))  # type: ignore[misc]
        if sessions <= 100_000:
            verify(store.arena)
    return waits, attachments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="*", default=[*BOUNDS])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}; ms, median and max of {ROUNDS}", flush=True)
    rnd = random.Random(arguments.seed)
    late = False
    for sessions in arguments.sessions:
        waits, attachments = measure(sessions, rnd)
        bound = BOUNDS.get(sessions, math.inf)
        late = late or max(waits) > bound
        print(
            f"{sessions:9d} sessions: the next writer {statistics.median(waits) * 1e3:8.3f} {max(waits) * 1e3:8.3f}"
            f"   attaching {statistics.median(attachments) * 1e3:8.3f} {max(attachments) * 1e3:8.3f}"
            f"   {'FAILED' if max(waits) > bound else 'ok'}",
            flush=True,
        )
    sys.exit(late)


if __name__ == "__main__":
    main()
