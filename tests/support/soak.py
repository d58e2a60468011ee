"""
The program of `make soak`: Gunicorn with visitors that count, while its processes are killed at random.

In the first half of the time everything is, in the next quarter everything but the master, and in the last one
everything but the master and the store's server: whoever is left in peace must not grow. Ends with 1 if a verdict is
bad.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from processes import wait_for
from soak_host import Host, Sample, Successor, descendants, kill_all, reap, sample
from soak_visitors import APP, MAX, Crowd, Customer, Ledger, Strangers, Visitor

from shmstore.client import connection
from shmstore.engine.arena import Arena
from shmstore.engine.layout import ArenaDamaged
from shmstore.engine.verify import verify
from shmstore.errors import ShmStoreError, StoreUnavailable

SUBREAPER = 36
GROWTH = 0.05  # of memory, between a beginning and an end
ROOM = 1024  # KiB of it that are never growth
SPARE = 4  # descriptors and threads: a connection pool may be full or empty


def main() -> None:
    parser = argparse.ArgumentParser(description="Sessions while everything is killed at random.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=5, help="seconds between deaths")
    parser.add_argument("--report", type=float, default=10, help="seconds between reports")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    # Orphans become children of this process: none gets out of sight, and none stays a zombie for want of an init.
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
    # A KeyboardInterrupt would be lost if it came within a finalizer.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    place = Path(tempfile.mkdtemp(prefix="shmstore-soak-"))
    store_dir = Path(tempfile.mkdtemp(prefix="shmstore-soak-", dir="/dev/shm"))
    print(f"seed {arguments.seed}, store in {store_dir}", flush=True)
    verdicts: list[Verdict] = []
    try:
        soak = Soak(place, store_dir, arguments.seed, signals)
        soak.run(arguments.minutes * 60, arguments.every, arguments.report)
        verdicts = soak.verdicts()
    finally:
        kill_all()
        shutil.rmtree(store_dir, ignore_errors=True)
        if verdicts and all(verdict.good for verdict in verdicts):
            shutil.rmtree(place, ignore_errors=True)
        else:
            print(f"the logs are in {place}")
    for name, figure, good in verdicts:
        print(f"{name:<44} {figure:<60} {'ok' if good else 'FAILED'}")
    sys.exit(130 if signals else not verdicts or not all(verdict.good for verdict in verdicts))


class Verdict(NamedTuple):
    name: str
    figure: str
    good: bool


class Soak:
    """One run: visitors, deaths, measurements; until its time is over, or it was sent a signal."""

    def __init__(self, place: Path, store_dir: Path, seed: int, signals: list[int]) -> None:
        self.signals = signals
        self.ledger = Ledger()
        self.deaths: Counter[str] = Counter()
        self.zombies: set[int] = set()
        self.unsound: list[str] = []
        self.left: list[str] | None = None  # None: the run did not finish
        self.back: list[float] = []
        self.peace = dict.fromkeys(("master", "server", "worker"), float("inf"))  # since when it is not killed any more
        self.samples: dict[str, list[tuple[float, Sample]]] = {role: [] for role in self.peace}
        self.begun = time.monotonic()
        self.duration = 0.0
        self.events: list[tuple[float, str]] = []
        self._rnd = random.Random(seed)
        self._ghosts: set[int] = set()  # zombies at the last look
        self.host = Host(APP, place, store_dir)
        at = self.host.socket
        self.visitors: list[Visitor] = [
            *(Customer(f"customer{n}", at, self.ledger, seed) for n in range(6)),
            *(Crowd(f"crowd{n}", at, self.ledger, seed) for n in range(2)),
            *(Strangers(f"strangers{n}", at, self.ledger, seed) for n in range(2)),
        ]
        self.host.booted(2)

    def run(self, duration: float, every: float, report: float) -> None:
        for visitor in self.visitors:
            visitor.start()
        try:
            begun, next_death, next_report = time.monotonic(), every, report
            self.duration = duration
            while not self.signals and (at := time.monotonic() - begun) < duration:
                part = at / duration
                if part >= 0.5:
                    self.peace["master"] = min(self.peace["master"], time.monotonic())
                if part >= 0.7:
                    self.peace["server"] = min(self.peace["server"], time.monotonic())
                if part >= 0.85:
                    self.peace["worker"] = min(self.peace["worker"], time.monotonic())
                elif at >= next_death:
                    next_death += every
                    self.kill()
                if at >= next_report:
                    next_report += report
                    self.report(at)
                self.measure()
                time.sleep(min(0.5, every / 2))
        finally:
            for visitor in self.visitors:
                visitor.over.set()
        if self.signals:
            return
        for visitor in self.visitors:
            visitor.join()
        self.finish()

    # -- deaths ----------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        ways: list[Callable[[], None]] = [self.kill_worker, self.abort_worker, self.hup, self.more_and_fewer]
        if self.peace["server"] == float("inf"):
            ways += [self.kill_server, self.stop_server]
        if self.peace["master"] == float("inf"):
            ways += [self.kill_master, self.upgrade]
        way = self._rnd.choice(ways)
        self.events.append((time.monotonic(), way.__name__))
        self.deaths[way.__name__.replace("_", " ")] += 1
        way()

    def kill_worker(self, name: str = "KILL") -> None:
        workers = wait_for(self.host.hearing, "a worker that hears")
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._rnd.choice(sorted(workers)), getattr(signal, f"SIG{name}"))

    def abort_worker(self) -> None:
        self.kill_worker("ABRT")

    def hup(self) -> None:
        self._all_hear()
        self.host.limit(self._rnd.choice([MAX, MAX // 3]))
        self.host.signal("HUP")

    def more_and_fewer(self) -> None:
        self._all_hear()
        self.host.signal("TTIN")
        wait_for(lambda: len(self.host.hearing()) >= 3, "one worker more")
        self.host.signal("TTOU")

    def kill_server(self) -> None:
        if server := self.host.server:
            os.kill(server, signal.SIGKILL)
            self._until_served(server)

    def stop_server(self) -> None:
        if server := self.host.server:
            os.kill(server, signal.SIGSTOP)  # perhaps while it holds the lock
            self._until_served(server)

    def _until_served(self, but: int) -> None:
        begun = time.monotonic()

        def served() -> bool:
            with contextlib.suppress(StoreUnavailable):
                channel = connection.connect(self.host.files)
                channel.close()
                return channel.peer.pid != but
            return False

        wait_for(served, "another server")
        self.back.append(time.monotonic() - begun)

    def kill_master(self) -> None:
        self.host.crash()
        self.host.start().booted(2)

    def upgrade(self) -> None:
        self._all_hear()
        host = self.host
        heard, old = host.heard(), host.process
        host.signal("USR2")
        second = host.place / "pid.2"
        new = int(wait_for(lambda: second.exists() and second.read_text().strip(), "the new master"))
        wait_for(lambda: host.heard() >= heard + 2, "the new master's workers")
        host.signal("QUIT")
        old.wait(timeout=300)
        host.process = Successor(new)
        # Until the new master has noticed, it considers itself the second one, and would ignore another upgrade.
        wait_for(lambda: (host.place / "pid").exists() and not second.exists(), "the new master's taking over")

    def _all_hear(self) -> None:
        wait_for(lambda: len(self.host.hearing()) >= 2, "all workers")

    # -- measurements ----------------------------------------------------------------------------------------------

    def measure(self) -> None:
        now = time.monotonic()
        workers = self.host.hearing() if self.peace["worker"] <= now else set()
        for role, pid in (
            ("master", self.host.master),
            ("server", self.host.server),
            ("worker", min(workers, default=0)),
        ):
            if pid and (found := sample(pid)):
                self.samples[role].append((now, found))
        reap(but=self.host.master)
        # A process counts as a zombie if it is seen twice: the first time, its parent may be about to reap it.
        zombies = {pid for pid, (parent, state) in descendants().items() if state == "Z" and parent != os.getpid()}
        self.zombies |= zombies & self._ghosts
        self._ghosts = zombies

    def check(self) -> None:
        """Verify the memory between two changes."""
        try:
            arena = Arena.open(self.host.files.arena)
        except ShmStoreError as exc:
            self.unsound.append(f"no arena: {exc}")
            return
        try:
            verify(arena)
        except ArenaDamaged as exc:
            self.unsound.append(str(exc))
        except StoreUnavailable:
            self.ledger.count("not checked")  # the lock is held by a server that was stopped
        finally:
            arena.close()

    def report(self, at: float) -> None:
        self.check()
        counts, (master, server) = self.ledger.counts, (self.samples["master"], self.samples["server"])
        sizes = "; ".join(
            f"{role} {last.files} files {last.threads} threads {last.memory // 1024} MB"
            for role, found in (("master", master), ("server", server))
            for _, last in found[-1:]
        )
        print(
            f"{at:6.0f} s: {counts['requests']} requests, {counts['changes']} changes, {counts['logins']} logins, "
            f"{len(self.ledger.wrong)} wrong, {len(self.ledger.failed)} failed, {counts['broken off']} broken off, "
            f"{self.deaths.total()} deaths; {sizes}",
            flush=True,
        )

    def finish(self) -> None:
        """Check that everything acknowledged is there, and what is left after the end."""
        self._all_hear()
        for visitor in self.visitors:
            if isinstance(visitor, Customer) and visitor.there:
                visitor.look()
        files = self.host.files
        self.host.signal("TERM")
        self.host.process.wait(timeout=300)
        wait_for(lambda: self.host.server is None, "the server's leaving")

        def none_left() -> bool:
            reap()
            return not descendants()

        with contextlib.suppress(AssertionError):
            wait_for(none_left, "the end of all processes", timeout=10)
        self.left = [f"process {pid}" for pid in descendants()]
        self.check()
        kept = {files.arena, files.options, os.path.join(files.path, "lock"), os.path.join(files.path, "start")}
        for path in self.host.store_dir.rglob("*"):
            if not path.is_dir() and str(path) not in kept:
                self.left.append(str(path))

    # -- verdicts --------------------------------------------------------------------------------------------------

    def verdicts(self) -> list[Verdict]:
        return [*self._verdicts()]

    def _verdicts(self) -> Iterator[Verdict]:
        ledger, counts = self.ledger, self.ledger.counts
        for text in [*ledger.wrong[:10], *ledger.failed[:10], *self.unsound[:10], *(self.left or [])[:10]]:
            print(f"  {text}")
        # Only the death of a worker breaks a request: a kill, SIGQUIT, SIGABRT, or the death of its master.
        deadly = ("kill worker", "abort worker", "kill master", "upgrade", "hup", "more and fewer")
        allowed = sum(self.deaths[name] for name in deadly) * len(self.visitors)
        yield Verdict("deaths", ", ".join(f"{name} {n}" for name, n in sorted(self.deaths.items())), True)
        did = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()) if name != "requests")
        yield Verdict("what was done", did, counts["changes"] > 0 and counts["logins"] > 0)
        yield Verdict("wrong answers", f"{len(ledger.wrong)} of {counts['requests']}", not ledger.wrong)
        yield Verdict("failed requests", str(len(ledger.failed)), not ledger.failed)
        broken = counts["broken off"]
        yield Verdict("requests broken off by deaths", f"{broken}, {allowed} at most", broken <= allowed)
        if self.back:
            yield Verdict(
                "the server is back", f"{statistics.median(self.back):.1f} s, {max(self.back):.1f} s at most", True
            )
        if len(ledger.took) > 100:
            cuts = statistics.quantiles(ledger.took, n=1000)
            figure = ", ".join(f"p{name} {cuts[at] * 1000:.1f} ms" for name, at in (("50", 499), ("99", 989)))
            yield Verdict("requests take", f"{figure}, p99.9 {cuts[998] * 1000:.0f} ms", True)
        for seconds, path, when in ledger.slowest:
            before = [f"{when - at:.1f} s after {name}" for at, name in self.events if at <= when][-2:]
            yield Verdict("  the slowest", f"{seconds:.2f} s: {path}, {', '.join(before)}", seconds < 30)
        for role in self.samples:
            yield from self._flat(role)
        told = self.host.tracebacks() - {"SystemExit: 1"}  # Gunicorn's of a worker that was told to abort
        yield Verdict("tracebacks in the log", ", ".join(told) or "none", not told)
        yield Verdict("zombies", str(len(self.zombies)), not self.zombies)
        yield Verdict("memory of the store is sound", f"{len(self.unsound)} complaints", not self.unsound)
        left = "it was not stopped" if self.left is None else f"{len(self.left)} things"
        yield Verdict("left in the end", left, not self.left)

    def _flat(self, role: str) -> Iterator[Verdict]:
        """Compare the least resources of a process at the start of the time without kills and at the end."""
        found = [(at, each) for at, each in self.samples[role] if at >= self.peace[role]]
        end = found[-1][1].pid if found else 0
        found = [(at, each) for at, each in found if each.pid == end]  # the last killed process may still have existed
        if len(found) < 6:
            yield Verdict(f"{role} does not grow", "not measured, it takes minutes", self.duration < 100)
            return
        third = len(found) // 3
        first, last = (
            [[each[field] for _, each in part] for field in (1, 2, 3)] for part in (found[:third], found[-third:])
        )
        for name, before, after in zip(("descriptors", "threads", "KiB"), first, last, strict=True):
            room = max(ROOM, GROWTH * min(before)) if name == "KiB" else SPARE
            yield Verdict(
                f"{role}: {name}",
                f"{min(before)}, then {min(after)} in {found[-1][0] - found[0][0]:.0f} s",
                min(after) <= min(before) + room,
            )


if __name__ == "__main__":
    main()
