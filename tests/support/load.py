"""Clients of a Gunicorn that count: each knows the acknowledged state, and checks it at each request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from types import TracebackType
from typing import Any, Self

from gunicorns import Gunicorn
from processes import wait_for
from sampling import FULL as FULL
from sampling import some

from shmstore.client import connection
from shmstore.errors import StoreUnavailable
from shmstore.manager import connect

# Answers with the session before the write, so that each request checks the previous one.
APP = """
import json, os, signal, time
from pathlib import Path
from shmstore import ShmStoreError, StoreUnavailable
from shmstore.attach import attach_or_start

def read(store, sid):
    return (store.get(sid) or {"n": None})["n"]

def write(store, sid, n):
    before = read(store, sid)
    store.set(sid, {"n": int(n)})
    return before

def prune(store):
    return store.prune()

def freeze(store):
    "Stand still with the lock of the store."
    store.arena.lock(9)
    try:
        os.kill(os.getpid(), signal.SIGSTOP)
    finally:
        store.arena.unlock()

def late(store, sid):
    Path(f"{sid} arrived").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    store.set(sid, {"n": 1})

def app(environ, start_response):
    action, *arguments = environ["PATH_INFO"].strip("/").split("/")
    try:
        status, result = "200 OK", globals()[action](attach_or_start("shop"), *arguments)
    except ShmStoreError as exc:
        status, result = "503 Service Unavailable", [isinstance(exc, StoreUnavailable), str(exc)]
    body = json.dumps({"pid": os.getpid(), "result": result}).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
"""


PAUSE = 0.002 if FULL else 0.04  # seconds between two requests of a client

SLACK = 20.0  # what a busy machine may add to a bound; the report of `make faults` has the bare figures

Figure = Callable[[str], None]

WORKERS = {"sync": ("-k", "sync"), "gthread": ("-k", "gthread", "--threads", "4"), "gevent": ("-k", "gevent")}
some_worker_class = some("arguments", WORKERS)  # in the full version each


def seconds(work: Callable[[], Any]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def serving(g: Gunicorn, but: int | None) -> int | None:
    """Return the pid of the store's server if it answers and is another process."""
    with suppress(StoreUnavailable):
        channel = connection.connect(g.files)
        channel.close()
        return channel.peer.pid if channel.peer.pid != but else None
    return None


def breaks(arguments: tuple[str, ...], clients: int = 8) -> int:
    """
    Return how many requests the sudden end of one worker breaks at most.

    A sync worker has one at a time. The others accept whatever comes: one from each client.
    """
    return 1 if "sync" in arguments else clients


class Load:
    """
    Clients that change a session of their own each, one request after another, while the context lasts.

    Attributes:
        acknowledged: The number of acknowledged changes.
        failed: Answers that disagree with that.
        broken: Requests without an answer, or with Gunicorn's own: their worker was stopped in the middle of them.
        lost: Answers of a session that is not as it was acknowledged.
        workers: The processes that answered.
    """

    def __init__(self, gunicorn: Gunicorn, clients: int = 8, prune_every: int = 10**9) -> None:
        self.acknowledged = 0
        self.failed: list[str] = []
        self.broken: list[str] = []
        self.lost: list[str] = []
        self.workers: set[int] = set()
        self.latest = [0] * clients  # acknowledged, of each client
        self._gunicorn = gunicorn
        self._prune_every = prune_every
        self._over, self._wanted = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(client,)) for client in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self.acknowledged = sum(self.latest)

    def __str__(self) -> str:
        return (
            f"{sum(self.latest)} changes, {len(self.lost)} lost, {len(self.failed)} failed, "
            f"{len(self.broken)} broken off"
        )

    def _run(self, client: int) -> None:
        n = 0
        try:
            while not self._over.is_set():
                n += 1
                if n % self._prune_every == 0:
                    self._ask("prune")
                result = self._ask(f"write/client{client}/{n}")
                if result is not None:
                    # Failed changes since the last acknowledged one may have been written or not.
                    if not self.latest[client] <= (result["result"] or 0) < n:
                        self.lost.append(f"client {client} had {self.latest[client]} and finds {result['result']}")
                    self.latest[client] = n
                    self.workers.add(result["pid"])
                self._wanted.wait(PAUSE)
        except BaseException as exc:
            self.failed.append(repr(exc))
            raise

    def _ask(self, path: str) -> Any:
        try:
            answer = self._gunicorn.ask(f"/{path}")
        except (HTTPException, ConnectionError) as exc:
            self.broken.append(f"{path}: {exc!r}")
            return None
        # A worker that is told to abort sends an error page, even in the middle of an answer.
        if answer.status == 500 or answer.body.startswith("HTTP/1.1 500"):
            self.broken.append(f"{path}: {answer}")
            return None
        if answer.status != 200:
            self.failed.append(f"{path}: {answer}")
            return None
        return answer.json

    def go_on(self, changes: int = 50) -> None:
        """Wait for some further requests. The clients do not pause meanwhile."""
        before = sum(self.latest)
        self._wanted.set()
        wait_for(lambda: sum(self.latest) >= before + changes, "answers")
        self._wanted.clear()

    def check(self, broken: int = 0, restart: float = 0) -> None:
        """
        Assert that every request succeeded.

        Args:
            broken: How many requests the test itself has broken off.
            restart: The longest restart of the server, in seconds. `prune` waits two seconds for a server.
        """
        failed = [each for each in self.failed if restart < 1.5 or not each.startswith("prune")]
        assert not failed, (failed[:5], self._gunicorn.log.read_text()[-5000:])
        assert not self.lost, self.lost[:5]
        assert len(self.broken) <= broken, (self.broken[:5], self._gunicorn.log.read_text()[-5000:])
        assert self.acknowledged
        with connect("shop", directory=self._gunicorn.store_dir) as store:  # as a new process finds it
            found = [(store.get(f"client{client}") or {"n": 0})["n"] for client in range(len(self.latest))]
        assert all(n >= latest for n, latest in zip(found, self.latest, strict=True)), (found, self.latest)
