"""Clients of a Gunicorn that count: each knows what it was told, and sees at each request whether that is still so."""

from __future__ import annotations

import threading
import time
from http.client import HTTPException
from types import TracebackType
from typing import Any, Self

from gunicorns import Gunicorn

from shmstore.manager import connect

# Answers what a session was before it is written, so that each request checks the one before.
APP = """
import json, os, signal, time
from pathlib import Path
from shmstore import ShmStoreError, StoreUnavailable
from shmstore.manager import attach_or_start

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
    time.sleep(1)
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


class Load:
    """
    Clients that change a session of their own each, one request after another, while the context lasts.

    Attributes:
        acknowledged: How many changes were acknowledged.
        failed: Answers of the store that say something else.
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
        self._over = threading.Event()
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

    def _run(self, client: int) -> None:
        n = 0
        try:
            while not self._over.is_set():
                n += 1
                if n % self._prune_every == 0:
                    self._ask("prune")
                result = self._ask(f"write/client{client}/{n}")
                if result is not None:
                    # What came to nothing since the last acknowledged one may have been written or not.
                    if not self.latest[client] <= (result["result"] or 0) < n:
                        self.lost.append(f"client {client} had {self.latest[client]} and finds {result['result']}")
                    self.latest[client] = n
                    self.workers.add(result["pid"])
                time.sleep(0.002)
        except BaseException as exc:
            self.failed.append(repr(exc))
            raise

    def _ask(self, path: str) -> Any:
        try:
            answer = self._gunicorn.ask(f"/{path}")
        except (HTTPException, ConnectionError) as exc:
            self.broken.append(f"{path}: {exc!r}")
            return None
        # Of a worker that is told to abort, Gunicorn says so, be it in the middle of the answer.
        if answer.status == 500 or answer.body.startswith("HTTP/1.1 500"):
            self.broken.append(f"{path}: {answer}")
            return None
        if answer.status != 200:
            self.failed.append(f"{path}: {answer}")
            return None
        return answer.json

    def check(self, broken: int = 0) -> None:
        """Assert that all went well, but for so many requests that the test itself has broken off."""
        assert not self.failed, (self.failed[:5], self._gunicorn.log.read_text()[-5000:])
        assert not self.lost, self.lost[:5]
        assert len(self.broken) <= broken, (self.broken[:5], self._gunicorn.log.read_text()[-5000:])
        assert self.acknowledged
        with connect("shop", directory=self._gunicorn.store_dir) as store:  # as somebody new finds it
            found = [(store.get(f"client{client}") or {"n": 0})["n"] for client in range(len(self.latest))]
        assert all(n >= latest for n, latest in zip(found, self.latest, strict=True)), (found, self.latest)
