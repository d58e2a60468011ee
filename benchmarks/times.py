"""The times to create, attach to, recover and prune a store, and the delay of a writer during a prune."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from typing import Any

from benchmarks import figures
from benchmarks.figures import Plan, Results, sample
from benchmarks.operations import identity
from benchmarks.peers import ROOT, environ, workplace
from shmstore import StoreManager, connect

MEMORY = 2**26


def run(plan: Plan) -> Results:
    """Return milliseconds: median, least and most."""
    return {"create and attach": create_and_attach(plan), "recovery": recovery(plan), "prune": prune(plan)}


def create_and_attach(plan: Plan) -> Results:
    """Start a server with 64 MiB, attach to it as another process does at its start, end it."""
    times: dict[str, list[float]] = {"start the server and make the memory": [], "attach": [], "shut down": []}
    with workplace() as place:
        for _ in range(plan.rounds):
            manager = StoreManager("bench", directory=place, persist=False, memory=MEMORY)
            marks = [time.perf_counter()]
            manager.start()
            marks.append(time.perf_counter())
            connect("bench", directory=place).close()
            marks.append(time.perf_counter())
            manager.shutdown()
            marks.append(time.perf_counter())
            for name, begin, end in zip(times, marks, marks[1:], strict=False):
                times[name].append((end - begin) * 1e3)
    return {name: figures.figure(values) for name, values in times.items()}


def recovery(plan: Plan) -> Results:
    """Return the times of the next writer and of attaching after a writer was killed in the middle of a mutation."""
    results: Results = {}
    for sessions in plan.recovery:
        if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < sessions * 1500:
            results[str(sessions)] = None  # it would not fit
            continue
        # In a process of its own: it forks, and kills its children in the middle of an operation.
        code = (
            "import json, random, sys; from benchmarks import recovery\n"
            f"print(json.dumps(recovery.measure({sessions}, random.Random(1))))"
        )
        out = subprocess.run([sys.executable, "-c", code], env=environ(), cwd=ROOT, capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(out.stderr)
        waits, attaching = json.loads(out.stdout)
        results[str(sessions)] = {
            "next writer": figures.figure(each * 1e3 for each in waits),
            "attach": figures.figure(each * 1e3 for each in attaching),
        }
    return results


def prune(plan: Plan) -> Results:
    """Prune while another process writes, and beside it measure that writer undisturbed."""
    expired, count = plan.prune
    with workplace() as place:
        manager = StoreManager(
            "bench", directory=place, persist=False, memory=count * 500 + 2**22, max=count + 1000, check_period=None
        )
        try:
            store = manager.store()
            session = sample(100)
            numbers = [*range(count)]
            random.Random(1).shuffle(numbers)
            for at, number in enumerate(numbers):
                store.set(identity(number), session, 0 if at < expired else 86400)
            calm = _beside(place, lambda: time.sleep(max(0.2, plan.seconds)))
            took: list[float] = []

            def act() -> None:
                time.sleep(0.1)
                begin = time.perf_counter()
                gone = store.prune()
                took.append(time.perf_counter() - begin)
                assert gone == expired, gone

            disturbed = _beside(place, act)
        finally:
            manager.shutdown()
    return {
        "expired": expired, "sessions": count, "ms": took[0] * 1e3, "us each": took[0] / expired * 1e6,
        "a writer, calm": calm, "a writer, meanwhile": disturbed,
    }  # fmt: skip


def _beside(place: Any, action: Any) -> dict[str, float]:
    """Return the latency of a writer in another process during ``action``, in milliseconds."""
    command = [sys.executable, "-m", "benchmarks.times", str(place)]
    writer = subprocess.Popen(command, env=environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        action()
        out, _ = writer.communicate("", timeout=60)
        result: dict[str, float] = json.loads(out)
        return result
    finally:
        writer.kill()
        writer.wait()


def write_until_told(place: str) -> None:
    store, session, taken = connect("bench", directory=place), sample(100), list[float]()
    rnd = random.Random(2)
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    store.set("writer", session, 86400)
    print("ready", flush=True)
    begun = time.perf_counter()
    while not ended.is_set():
        sid = f"writer{rnd.randrange(500)}"
        begin = time.perf_counter()
        store.set(sid, session, 86400)
        taken.append((time.perf_counter() - begin) * 1e3)
    rate = len(taken) / (time.perf_counter() - begun)
    taken.sort()
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    print(json.dumps({name: figures.percentile(taken, share) for name, share in shares.items()} | {"rate": rate}))


if __name__ == "__main__":
    write_until_told(sys.argv[1])
