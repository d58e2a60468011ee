"""Flask under real Gunicorns and uWSGI, each kind of session under the same load, taking turns."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import applications as apps
from benchmarks import figures, peers
from benchmarks.figures import SIZE, Plan, Results
from benchmarks.load import Load, Visitor, Wrong, log_in
from benchmarks.peers import Missing, environ
from shmstore import StoreManager

WORKLOADS = ("read", "write", "login", "mixed")
SERVERS = ("gunicorn, sync", "gunicorn, gthread", "uwsgi")
COOKIE_LIMIT = 4093  # of what a browser keeps of one cookie; Flask warns above
FEW = 200  # visitors of the workloads that are not about many

CONF = """
bind = {address!r}
workers = 2
worker_class = {worker!r}
threads = {threads}
keepalive = 30
timeout = 120
backlog = 2048
{more}
"""
STASH = """
dirty_apps = ["benchmarks.dirty:Nothing"]
dirty_workers = 1
"""


@dataclass
class Contestant:
    """
    One kind of session under a server.

    Attributes:
        kind: The name of the kind.
        address: The unix socket of the application.
        pids: All processes whose work counts: the workers and the store's server.
        hangs_up: Whether the server hangs up after each answer.
        visitors: Those with the usual session; the first `FEW` are enough for all workloads but the mixed one.
    """

    kind: str
    address: str
    pids: list[int]
    hangs_up: bool = False
    visitors: list[Visitor] = field(default_factory=list)

    def log(self) -> str:
        """Return the end of the server's log."""
        path = Path(self.address)
        return path.with_name(f"{path.name}.log").read_text(errors="replace")[-3000:]

    def load(self, visitors: list[Visitor], size: int = SIZE) -> Load:
        """Return a load of requests by these visitors."""
        counted = self.kind != apps.NONE
        return Load(self.address, visitors, size, counted=counted, hangs_up=self.hangs_up, seed=random.randrange(2**32))

    def visit(self, workload: str, seconds: float, visitors: list[Visitor], size: int = SIZE) -> dict[str, float]:
        """Return the figures of a load of ``seconds``."""
        load = self.load(visitors, size)
        before = peers.cpu_seconds(self.pids)
        try:
            outcome = load.run(workload, seconds)
        except Wrong as exc:
            raise RuntimeError(f"{self.kind}: {exc}; {self.log()}") from exc
        time.sleep(0.005)  # the work of a worker after its answer counts too
        spent = peers.cpu_seconds(self.pids) - before
        return {
            "rate": outcome.requests / outcome.seconds,
            "p50": figures.percentile(outcome.times, 0.5) * 1e3,
            "p99": figures.percentile(outcome.times, 0.99) * 1e3,
            "cpu": spent / outcome.requests * 1e6,
        }


@contextmanager
def backing(place: Path, kinds: tuple[str, ...]) -> Iterator[tuple[dict[str, tuple[str, list[int]]], dict[str, str]]]:
    """Start the stores; return the address and the processes of each kind, and what is missing."""
    found: dict[str, tuple[str, list[int]]] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:

        @cache
        def redis() -> peers.Server:
            return stack.enter_context(peers.redis_server(place))

        def start(kind: str) -> tuple[str, list[int]]:
            if kind == apps.OURS:
                manager = StoreManager("bench", directory=place, persist=False, memory=2**28)
                stack.callback(manager.shutdown)
                return f"shm://{place}/bench", [manager.store().stats().server_pid]
            if kind == apps.FILES:
                peers.needs("flask_session", "cachelib")
                (place / "files").mkdir()
                return str(place / "files"), []
            if kind == apps.REDIS_STORE:
                return f"unix://{redis().address}", [redis().pid]
            if kind == apps.REDIS:  # the same server, in its turn
                peers.needs("flask_session")
                return redis().address, [redis().pid]
            if kind == apps.MEMCACHED:
                peers.needs("flask_session", "pylibmc")
                running = stack.enter_context(peers.memcached_server(place))
                return running.address, [running.pid]
            if kind == apps.STOCK:
                running = stack.enter_context(peers.stock_server(place))
                return running.address, peers.descendants(running.pid)
            if kind == apps.STASH:
                peers.needs("gunicorn.dirty")
            return "-", []

        for kind in kinds:
            try:
                found[kind] = start(kind)
            except Missing as exc:
                missing[kind] = str(exc)
        yield found, missing


def command(server: str, kind: str, place: Path, address: str) -> list[str | Path]:
    """Return the command that runs the application under a server."""
    if server == "uwsgi":
        binary = peers.program("uwsgi")
        if binary is None:
            raise Missing("uwsgi: not on PATH")
        return [
            binary, "--http-socket", address, "--home", sys.prefix, "--module", "benchmarks.wsgi:app",
            "--pythonpath", peers.ROOT, "--processes", "2", "--master", "--enable-threads", "--lazy-apps",
            "--need-app", "--die-on-term", "--disable-logging", "--listen", "100",
            "--buffer-size", "16384", "--cache2", "name=sessions,items=40000,blocksize=2048",
        ]  # fmt: skip
    peers.needs("gunicorn")
    worker = server.rpartition(" ")[2]
    conf = place / f"{Path(address).name}.conf.py"
    more = STASH if kind == apps.STASH else ""
    if peers.versions().get("gunicorn", "0") >= "25":
        more += "control_socket_disable = True\n"
    threads = 4 if worker == "gthread" else 1
    conf.write_text(CONF.format(address=f"unix:{address}", worker=worker, threads=threads, more=more))
    return [sys.executable, "-m", "gunicorn", "-c", conf, "benchmarks.wsgi:app"]


@contextmanager
def contestants(server: str, place: Path, stores: dict[str, tuple[str, list[int]]]) -> Iterator[list[Contestant]]:
    """Run the application once for each kind."""
    with ExitStack() as stack:
        found, processes = [], []
        for kind, (store, pids) in stores.items():
            address = str(place / f"http-{len(list(place.iterdir()))}")
            env = environ(BENCH_KIND=kind, BENCH_PLACE=store)
            how = command(server, kind, place, address)
            process = stack.enter_context(peers.running(how, address, place, env, wait=False))
            processes.append(process)
            found.append(Contestant(kind, address, [process.pid, *pids], server == "uwsgi"))
        for process in processes:  # called first, so that all end concurrently
            stack.callback(process.terminate)
        for each in found:  # all import meanwhile
            warm_up(each)
        yield found


def warm_up(contestant: Contestant) -> None:
    """Let each worker start, and note all processes."""
    visitors = [Visitor(who) for who in range(FEW)]
    deadline = time.monotonic() + 60
    while True:
        try:
            contestant.load(visitors).run("login", 0.3)
            break
        except (OSError, Wrong) as exc:
            if time.monotonic() > deadline or not Path(f"/proc/{contestant.pids[0]}/fd").exists():
                raise RuntimeError(f"{contestant.kind}: {exc}; {contestant.log()}") from exc
            time.sleep(0.2)
    contestant.pids = list(dict.fromkeys([*peers.descendants(contestant.pids[0]), *contestant.pids[1:]]))


def rounds(
    found: list[Contestant], count: int, visit: Callable[[Contestant], dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Measure all in turn, ``count`` times; return figures, with ratios to the baselines of the same round."""
    taken: dict[str, list[dict[str, float]]] = {each.kind: [] for each in found}
    for round_ in range(count):
        for at in range(len(found)):
            each = found[(at + round_) % len(found)]
            taken[each.kind].append(visit(each))
    for base, ratio in ((apps.NONE, "of none"), (apps.COOKIE, "of cookie")):
        for kind in taken if base in taken else ():
            for row, other in zip(taken[kind], taken[base], strict=True):
                row[ratio] = row["rate"] / other["rate"]
                if base == apps.NONE:
                    row["cost"] = row["cpu"] - other["cpu"]
    return {kind: {name: figures.figure(row[name] for row in rows) for name in rows[0]} for kind, rows in taken.items()}


def run(plan: Plan, only: tuple[str, ...] | None = None) -> Results:
    """Return figures by server, workload and kind; those of other sizes by workload and size; what is missing."""
    results: Results = {"servers": {}, "sizes": {}, "missing": {}, "cannot": {}}
    every = tuple(dict.fromkeys(apps.UNDER_GUNICORN + apps.UNDER_UWSGI))
    with peers.workplace() as place, backing(place, only or every) as (stores, missing):
        results["missing"] |= missing
        for server in SERVERS:
            kinds = apps.UNDER_UWSGI if server == "uwsgi" else apps.UNDER_GUNICORN
            here = {kind: store for kind, store in stores.items() if kind in kinds}
            try:
                command(server, apps.NONE, place, str(place / "trial"))
            except Missing as exc:
                results["missing"][server] = str(exc)
                continue
            with contestants(server, place, here) as found:
                results["servers"][server] = under_load(found, plan)
                if server == SERVERS[0]:
                    results["sizes"], results["cannot"] = other_sizes(found, plan)
            for path in (place / "files").glob("*"):
                path.unlink()
    return results


def under_load(found: list[Contestant], plan: Plan) -> Results:
    for each in found:
        each.visitors = admitted(each, plan.visitors, SIZE)

    def visitors(each: Contestant, workload: str) -> list[Visitor]:
        return each.visitors if workload == "mixed" else each.visitors[:FEW]

    return {
        workload: rounds(
            found,
            plan.rounds,
            lambda each, w=workload: each.visit(w, plan.seconds, visitors(each, w)),  # type: ignore[misc]
        )
        for workload in WORKLOADS
    }


def other_sizes(found: list[Contestant], plan: Plan) -> tuple[Results, dict[str, str]]:
    """Return figures of reading and writing larger and smaller sessions, and the kinds that cannot hold them."""
    results: Results = {"read": {}, "write": {}}
    cannot: dict[str, str] = {}
    for size in plan.sizes:
        crowd = {each.kind: admitted(each, 50, size) for each in found}
        able = []
        for each in found:
            longest = max(len(visitor.cookie) for visitor in crowd[each.kind])
            if longest > COOKIE_LIMIT:
                cannot[f"{each.kind}, {size} bytes"] = (
                    f"a cookie of {longest} bytes; browsers keep {COOKIE_LIMIT}, the user would be logged out"
                )
            else:
                able.append(each)
        for workload, by_size in results.items():
            by_size[str(size)] = rounds(
                able,
                max(1, plan.rounds - 3),
                lambda each, w=workload, s=size, c=crowd: each.visit(w, plan.seconds, c[each.kind], s),  # type: ignore[misc]
            )
    return results, cannot


def admitted(contestant: Contestant, count: int, size: int) -> list[Visitor]:
    """Return visitors, logged in if there are sessions."""
    if contestant.kind == apps.NONE:
        return [Visitor(who) for who in range(count)]
    return log_in(contestant.address, count, size)
