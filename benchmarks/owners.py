"""The delay that one owner with very many sessions causes for others: `python -m benchmarks.owners [SESSIONS]`.

Two processes run `destroy_owned` of an owner with 100 000 sessions at the same time. Another process writes a session
of another user every millisecond meanwhile. Its latencies are printed, beside those while two processes only compute:
what the scheduler does.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from shmstore import Store
from shmstore.engine.arena import Arena
from shmstore.engine.layout import Geometry
from shmstore.options import Options

BAR = 0.005  # seconds: the 99th percentile of another user's writes
PAUSE = 0.001  # seconds between two of these


def crowd(path: str, sessions: int) -> Options:
    """Create a store in which one owner has this many sessions, and return its options."""
    options = Options.of(memory=2**16 + 1024 * sessions, check_period=None)
    with Store.over(Arena.create(path, Geometry.plan(options.memory)), options) as store:
        store.publish_options()
        for number in range(sessions):
            store.set(str(number), {"user": "eve", "n": number}, owner="eve")
        store.set("bob", {"user": "bob"}, owner="bob")
    return options


def write(path: str, options: Options, ended: Callable[[], bool]) -> list[float]:
    """Write another user's session until that is over; return how long each write took, in seconds."""
    took: list[float] = []
    with Store.over(Arena.open(path), options) as store:
        while not ended():
            begun = time.perf_counter()
            store.set("bob", {"user": "bob", "n": len(took)}, owner="bob")
            took.append(time.perf_counter() - begun)
            time.sleep(PAUSE)
    return took


def forked(action: Callable[[], object]) -> int:
    """Carry out an action in another process, and return its pid. Its status is 0 if all went well."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def destroy(path: str, options: Options) -> None:
    """Log the owner out everywhere."""
    with Store.over(Arena.open(path), options) as store:
        store.destroy_owned("eve")
        if store.owned_by("eve"):
            raise RuntimeError("some of the sessions are still there")


def compute(seconds: float) -> None:
    """Use a processor, and nothing else."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def beside(path: str, options: Options, action: Callable[[], object]) -> tuple[list[float], float]:
    """Return the latencies of another user's writes while two processes act, sorted, and how long those took."""
    begun = time.perf_counter()
    running = {forked(action) for _ in range(2)}

    def ended() -> bool:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                if status:
                    raise RuntimeError("a process did not finish")
        return not running

    return sorted(write(path, options, ended)), time.perf_counter() - begun


def at(share: float, took: list[float]) -> str:
    """Return a quantile in words."""
    return f"{took[int(len(took) * share)] * 1e3:.2f} ms"


def main() -> None:
    """Print the figures."""
    sessions = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = str(Path(directory) / "arena")
        options = crowd(path, sessions)
        took, seconds = beside(path, options, lambda: destroy(path, options))
        idle, _ = beside(path, options, lambda: compute(5))
    print(f"{sessions} sessions of one owner; 2 callers of destroy_owned have finished after {seconds:.1f} s")
    for what, each in (("meanwhile", took), ("while 2 processes only compute", idle)):
        print(
            f"writes of another user {what}: median {at(0.5, each)}, p99 {at(0.99, each)}, longest {at(0.9999, each)}"
        )
    within = took[len(took) * 99 // 100] < BAR
    print(f"p99 is {'within' if within else 'beyond'} the bar of {BAR * 1e3:g} ms")
    sys.exit(not within)


if __name__ == "__main__":
    main()
