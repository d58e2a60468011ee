"""The targets: the figure to reach, the measured figure, whether it is reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import adapters, engines
from benchmarks import applications as apps
from benchmarks.figures import Results

WORKLOADS = ("read", "write", "login")
NOT_OPERATIONS = ("bytes", "encode", "decode")  # how these rows of benchmarks/operations.py begin


def short(value: float) -> str:
    """Return a number with three digits, or more if it is larger."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Bar(NamedTuple):
    """
    One figure of a target.

    Attributes:
        least: Whether the figure must be at least that much; else it must be at most that much.
        measured: None if it was not measured: the run was too small, or a peer is missing.
    """

    bar: float
    measured: float | None
    least: bool = True
    unit: str = ""

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bar if self.least else self.measured <= self.bar


class Target(NamedTuple):
    """What is measured, and its figures."""

    what: str
    bars: list[Bar]

    @property
    def wanted(self) -> str:
        signs = [">=" if bar.least else "<=" for bar in self.bars]
        if len(set(signs)) == 1:
            signs[1:] = [""] * (len(signs) - 1)
        return " / ".join(f"{sign} {bar.bar:g}{bar.unit}".strip() for sign, bar in zip(signs, self.bars, strict=True))

    @property
    def found(self) -> str:
        return " / ".join("-" if bar.measured is None else f"{short(bar.measured)}{bar.unit}" for bar in self.bars)

    @property
    def verdict(self) -> str:
        words = [{None: "-", True: "yes", False: "NO"}[bar.reached] for bar in self.bars]
        return words[0] if len(set(words)) == 1 else " / ".join(words)


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


def targets(results: Results) -> list[Target]:
    """Return all targets, each with what was measured of it."""
    operations = pick(results, "micro", "operations") or {}
    writers, readers = (pick(results, "many", "operations", name, "8") or {} for name in ("set raw", "get raw"))
    mine = writers.get(adapters.OURS)
    bytes_each = pick(results, "memory", "bytes each") or {}

    def faster(names: Sequence[str], bars: Sequence[float]) -> list[Bar]:
        rows = [operations.get(name, {}) for name in names]
        times = [ratio(row.get(adapters.REDIS), row.get(adapters.OURS)) for row in rows]
        return [Bar(bar, each) for bar, each in zip(bars, times, strict=True)]

    def served(
        server: str, bars: Sequence[float], mine: str, peer: str, figure: str, *, least: bool = True
    ) -> list[Bar]:
        rows = [pick(results, "web", "servers", server, workload) or {} for workload in WORKLOADS]
        times = [ratio(pick(row, mine, figure), pick(row, peer, figure)) for row in rows]
        return [Bar(bar, each, least) for bar, each in zip(bars, times, strict=True)]

    return [
        Target(
            "`get` of bytes, `set` of bytes, `touch`: times as fast as redis-py",
            faster(("get raw", "set raw", "touch"), (40, 40, 40)),
        ),
        Target(
            "`get`, `set`, a new session in a full store: times as fast as redis-py",
            faster(("get", "set", "create at capacity"), (12, 12, 10)),
        ),
        Target(
            "Flask in one process, CPU for the session: times less than a signed cookie; read, write, login",
            in_process(results, (12, 12, 6)),
        ),
        Target(
            "Flask under Gunicorn, throughput: share of that without a session; read, write, login",
            served("gunicorn, sync", (0.98, 0.96, 0.93), apps.OURS, apps.NONE, "of none"),
        ),
        Target(
            "Flask under uWSGI, throughput: times that with uWSGI's own cache; read, write, login",
            served("uwsgi", (1.03, 1.03, 1.0), apps.OURS, apps.UWSGI, "of none"),
        ),
        Target(
            "Starlette under Uvicorn, CPU for the session: times less than a signed cookie; read, write, login",
            [Bar(bar, ratio(_cost(results, "signed", name), _cost(results, "shmstore", name)))
             for name, bar in zip(WORKLOADS, (5, 5, 3), strict=True)],
        ),
        Target(
            "`RedisStore`, CPU for the session: of that of Flask-Session on the same Redis; read, write, login",
            served("gunicorn, sync", (0.5, 0.9, 0.9), apps.REDIS_STORE, apps.REDIS, "cost", least=False),
        ),
        Target(
            "8 processes write on 2 cores: times memcached's total; p99 by p50; slowest by fastest process",
            [
                Bar(6, ratio(pick(writers, adapters.OURS, "rate"), pick(writers, adapters.PYLIBMC, "rate"))),
                Bar(10, mine and ratio(mine["p99"], mine["p50"]), least=False),
                Bar(0.7, mine and mine["fairness"][0]),
            ],
        ),
        Target(
            "8 processes read on 2 cores: times Redis' total",
            [Bar(25, ratio(pick(readers, adapters.OURS, "rate"), pick(readers, adapters.REDIS, "rate")))],
        ),
        Target(
            "memory for a session of 750 bytes, processes included: of memcached's",
            [Bar(1, ratio(pick(bytes_each, "shmstore", "with its process"),
                          pick(bytes_each, "memcached", "with its process")), least=False)],
        ),
        Target(
            "any operation, from the fewest sessions to the most: grows by",
            [Bar(2, growth(results), least=False)],
        ),
        Target(
            "next writer after a process was killed inside a change: waits",
            [Bar(1, recovery(results), least=False, unit=" ms")],
        ),
        Target(
            f"Python engine, any operation: times its cost at commit {engines.BASELINE}",
            [Bar(1.2, engine_growth(results), least=False)],
        ),
    ]  # fmt: skip


def in_process(results: Results, bars: Sequence[float]) -> list[Bar]:
    costs = pick(results, "in process")
    if not costs:
        return [Bar(bar, None) for bar in bars]
    beyond = {name: figure[0] - costs["none"][0] for name, figure in costs.items()}
    return [
        Bar(bar, beyond[f"{workload}, signed cookie"] / max(beyond[f"{workload}, shmstore"], 0.1))
        for workload, bar in zip(WORKLOADS, bars, strict=True)
    ]


def _cost(results: Results, kind: str, workload: str) -> Any:
    return pick(results, "asgi", "costs", kind, workload)


def growth(results: Results) -> float | None:
    """Return by how much the operation grows that grows most."""
    table = pick(results, "growth", "operations") or {}
    rows = [row for name, row in table.items() if not name.startswith(NOT_OPERATIONS) and len(row) > 1]
    return max((row[max(row, key=int)] / row[min(row, key=int)] for row in rows), default=None)


def recovery(results: Results) -> float | None:
    rows = (pick(results, "times", "recovery") or {}).values()
    return max((row["next writer"][0] for row in rows if row), default=None)


def engine_growth(results: Results) -> float | None:
    table = pick(results, "engines", "earlier") or {}
    return max((value for name, value in table.items() if not name.startswith(NOT_OPERATIONS)), default=None)
