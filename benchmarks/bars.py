"""The targets: the figure to reach, the measured figure, whether it is reached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import adapters
from benchmarks import applications as apps
from benchmarks.figures import Results

# Times as fast as redis-py.
OPERATIONS = {"get raw": 30, "get": 15, "get, again": 15, "set raw": 10, "set": 8, "create at capacity": 8, "touch": 10}
# Share of the throughput without sessions; times that of the signed cookie, of stash.
WEB = {"read": (0.97, 1.25, 1.7), "write": (0.97, 1.5, 2.1), "login": (0.95, 1.3, 1.5)}
# Times the throughput of Flask-Session on the same Redis.
REDIS_STORE = {"read": 1.5, "write": 1.5}


class Bar(NamedTuple):
    """
    One line: what, how much it must be, what it is.

    Attributes:
        reached: None if it was not measured.
    """

    what: str
    bar: str
    measured: str
    reached: bool | None


def at_least(what: str, bar: float, measured: float | None, unit: str = "x") -> Bar:
    if measured is None:
        return Bar(what, f">= {bar:g}{unit}", "not measured", None)
    return Bar(what, f">= {bar:g}{unit}", f"{measured:.3g}{unit}", measured >= bar)


def at_most(what: str, bar: float, measured: float | None, unit: str = "x") -> Bar:
    if measured is None:
        return Bar(what, f"<= {bar:g}{unit}", "not measured", None)
    return Bar(what, f"<= {bar:g}{unit}", f"{measured:.3g}{unit}", measured <= bar)


def pick(results: Results, *path: str) -> Any:
    """Return the value at a path of nested dicts; None if it is missing."""
    found: Any = results
    for name in path:
        if not isinstance(found, dict) or found.get(name) is None:
            return None
        found = found[name]
    return found


def ratio(over: Any, under: Any) -> float | None:
    """Return the ratio of two figures' medians."""
    if over is None or under is None:
        return None
    over, under = (each[0] if isinstance(each, list | tuple) else each for each in (over, under))
    return float(over / under) if under else None


def bars(results: Results) -> list[Bar]:
    """Return a line for each target of the design."""
    parts = (micro, web, in_process, growth, memory, many, prune, faults)
    return [bar for part in parts for bar in part(results)]


def micro(results: Results) -> Iterator[Bar]:
    table = pick(results, "micro", "operations") or {}
    for operation, bar in OPERATIONS.items():
        row = table.get(operation, {})
        measured = ratio(row.get(adapters.REDIS), row.get(adapters.OURS))
        yield at_least(f"{operation}: times as fast as redis-py", bar, measured)


def web(results: Results) -> Iterator[Bar]:
    for server in ("gunicorn, sync", "gunicorn, gthread"):
        for workload, (bar, cookie, stash) in WEB.items():
            row = pick(results, "web", "servers", server, workload) or {}
            name = f"{server}, {workload}"
            yield at_least(f"{name}: throughput of no session", bar, _first(pick(row, apps.OURS, "of none")))
            yield at_least(f"{name}: times the signed cookie", cookie, _first(pick(row, apps.OURS, "of cookie")))
            mine = pick(row, apps.OURS, "rate")
            yield at_least(f"{name}: times stash", stash, ratio(mine, pick(row, apps.STASH, "rate")))
            for peer in (apps.REDIS, apps.MEMCACHED, apps.FILES):
                yield at_least(f"{name}: times {peer}", 1, ratio(mine, pick(row, peer, "rate")))
            if workload in REDIS_STORE:
                measured = ratio(pick(row, apps.REDIS_STORE, "rate"), pick(row, apps.REDIS, "rate"))
                yield at_least(f"{name}: RedisStore, times {apps.REDIS}", REDIS_STORE[workload], measured)
    for workload in ("read", "write", "login"):
        row = pick(results, "web", "servers", "uwsgi", workload) or {}
        measured = ratio(pick(row, apps.OURS, "of none"), pick(row, apps.UWSGI, "of none"))
        yield at_least(f"uwsgi, {workload}: share of no session, times that of uWSGI's cache", 1, measured)


def _first(figure: Any) -> float | None:
    return None if figure is None else float(figure[0])


def in_process(results: Results) -> Iterator[Bar]:
    costs = pick(results, "in process")
    for workload, bar in (("read", 10), ("write", 10), ("login", 6)):
        measured = None
        if costs:
            base = costs["none"][0]
            theirs, mine = (costs[f"{workload}, {kind}"][0] - base for kind in ("signed cookie", "shmstore"))
            measured = theirs / max(mine, 0.1)
        yield at_least(f"in process, {workload}: cost beyond none, times less than the signed cookie", bar, measured)


def growth(results: Results) -> Iterator[Bar]:
    table = pick(results, "growth", "operations") or {}
    for name, row in table.items():
        least, most = min(row, key=int), max(row, key=int)
        if name.startswith(("bytes", "encode", "decode")) or least == most:
            continue
        note = "" if most == "1000000" else f" (only up to {most})"
        yield at_most(f"growth, {name}: times its cost at {least}{note}", 2, row[most] / row[least])
    if not table:
        yield at_most("growth", 2, None)


def memory(results: Results) -> Iterator[Bar]:
    table = pick(results, "memory", "bytes each") or {}
    for peer in ("Redis", "memcached"):
        measured = ratio(pick(table, "shmstore", "with its process"), pick(table, peer, "with its process"))
        yield at_most(f"memory per session, all in: times {peer}'s RSS", 1.1, measured)


def many(results: Results) -> Iterator[Bar]:
    table = pick(results, "many", "operations") or {}
    for operation, peer, bar in (("set raw", adapters.PYLIBMC, 1.5), ("get raw", adapters.REDIS, 15)):
        row = pick(table, operation, "8") or {}
        yield at_least(
            f"8 processes, {operation}: times {peer}'s total", bar,
            ratio(pick(row, adapters.OURS, "rate"), pick(row, peer, "rate")),
        )  # fmt: skip
        mine = row.get(adapters.OURS)
        yield at_least(f"8 processes, {operation}: slowest of the fastest", 0.5, mine and mine["fairness"][0])
        yield at_most(f"8 processes, {operation}: p99 / p50", 20, mine and ratio(mine["p99"], mine["p50"]))


def prune(results: Results) -> Iterator[Bar]:
    row = pick(results, "times", "prune")
    what = f"prune of {row['expired']} of {row['sessions']}" if row else "prune"
    yield at_most(f"{what}: a writer's p99", 5, row and row["a writer, meanwhile"]["p99"], " ms")


def faults(results: Results) -> Iterator[Bar]:
    yield Bar("server killed under load; worker killed inside a mutation", "0 lost", "proved by `make faults`", None)
    for sessions, bar in (("100000", 200), ("1000000", 2000)):
        row = pick(results, "times", "recovery", sessions)
        yield at_most(
            f"next writer after a kill, {sessions} sessions: longest wait", bar, row and row["next writer"][2], " ms"
        )
