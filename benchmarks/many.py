"""1, 2, 4 and 8 concurrent processes on one store: throughput, p50, p99 and fairness."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time

from benchmarks import adapters, figures
from benchmarks.figures import Plan, Results
from benchmarks.peers import environ, workplace

KINDS = (adapters.OURS, adapters.REDIS, adapters.PYMEMCACHE, adapters.PYLIBMC, "LMDB, bare", "stock manager proxy")
OPERATIONS = ("get raw", "get", "set raw", "set")
SESSIONS = 5000
OWN = 10**9  # from here on, each number belongs to one process
STEP = 50


def run(plan: Plan, kinds: list[str] | None = None) -> Results:
    """Return figures by operation, number of processes and store."""
    sessions = min(SESSIONS, plan.sessions)
    table: Results = {operation: {str(count): {} for count in plan.processes} for operation in OPERATIONS}
    with workplace() as place, adapters.addresses(place, 2 * sessions, kinds or [*KINDS]) as (found, missing):
        for kind, address in found.items():
            store = adapters.KINDS[kind](address)
            for number in range(sessions):
                store.set(number)
                if kind.startswith("stock"):
                    store.set_raw(number)
        rounds = max(1, plan.rounds // 2)
        for count in plan.processes:
            taken: dict[tuple[str, str], list[list[float]]] = {}
            for _ in range(rounds):
                for kind, address in found.items():
                    for operation, row in together(kind, address, count, plan, sessions).items():
                        taken.setdefault((operation, kind), []).append(row)
            for (operation, kind), rows in taken.items():
                names = ("rate", "p50", "p99", "fairness")
                each = {name: figures.figure(values) for name, *values in zip(names, *rows, strict=True)}
                table[operation][str(count)][kind] = each
        for kind, address in found.items():
            verify(adapters.KINDS[kind](address), kind, max(plan.processes))
    return {"operations": table, "missing": missing, "processors": os.cpu_count()}


def verify(store: adapters.Adapter, kind: str, processes: int) -> None:
    """Raise if a write is lost: the last of each process, to a session that no other writes."""
    last = store.session | {"language": "last"}
    lost = [number for number in range(OWN, OWN + processes) if store.get(number) != last]
    if lost:
        raise RuntimeError(f"{kind} has lost writes of processes {lost}")


def together(kind: str, address: str, count: int, plan: Plan, sessions: int) -> dict[str, list[float]]:
    """Return rate, p50, p99 and fairness of each operation in ``count`` concurrent processes."""
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.many", kind, address, str(sessions), str(index)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ(),
        )
        for index in range(count)
    ]  # fmt: skip
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n", f"{kind}: a process did not start"
        result = {}
        for operation in OPERATIONS:
            seconds = max(0.05, plan.seconds)
            start = time.monotonic() + 0.02
            for child in children:
                assert child.stdin is not None
                child.stdin.write(json.dumps([operation, start, start + seconds]) + "\n")
                child.stdin.flush()
            rows = [json.loads(child.stdout.readline()) for child in children if child.stdout is not None]
            rates = [row[0] for row in rows]
            p50, p99 = statistics.median(row[1] for row in rows), max(row[2] for row in rows)
            result[operation] = [sum(rates), p50, p99, min(rates) / max(rates)]
        return result
    finally:
        for child in children:
            child.kill()
            child.communicate()


def write_and_look(store: adapters.Adapter, number: int, value: str) -> None:
    """Write what no other process writes; raise if it is not there then."""
    usual = store.session
    store.session = usual | {"language": value}
    store.set(number)
    found = store.get(number)
    if found != store.session:
        raise RuntimeError(f"a write is lost: {value!r}")
    store.session = usual


def child(kind: str, address: str, sessions: int, index: int) -> None:
    store = adapters.KINDS[kind](address)
    store.get(0)
    rnd = random.Random(index)
    numbers = [rnd.randrange(sessions) for _ in range(10_000)]
    print("ready", flush=True)
    for line in sys.stdin:
        operation, start, end = json.loads(line)
        call = store.operations()[operation]
        clock, taken, at = time.perf_counter, list[float](), 0
        while time.monotonic() < start:
            pass
        while not taken or time.monotonic() < end:  # at least once: on a busy machine the end may have passed
            for number in numbers[at : at + STEP]:
                begin = clock()
                call(number)
                taken.append(clock() - begin)
            at = (at + STEP) % len(numbers)
            if operation == "set" and at % (10 * STEP) == 0:
                write_and_look(store, OWN + index, f"{index} {len(taken)}")
        elapsed = max(end, time.monotonic()) - start
        if operation == "set":
            write_and_look(store, OWN + index, "last")
        taken.sort()
        row = [len(taken) / elapsed, figures.percentile(taken, 0.5) * 1e6, figures.percentile(taken, 0.99) * 1e6]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
