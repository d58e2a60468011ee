"""Callbacks and pruning under a real Gunicorn continue although the server, which runs them, is killed repeatedly."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from gunicorns import Gunicorn, StartGunicorn
from load import FULL, serving, some_worker_class
from processes import wait_for

from shmstore.contract import AnyStore
from shmstore.manager import connect

MAX, CLIENTS = 60, 6

APP = """
import json, os
from shmstore import StoreUnavailable
from shmstore.attach import attach_or_start

def create(store, sid, life):
    return store.add(sid, {"sid": sid}, ttl=float(life))

def write(store, sid):
    store.set(sid, {"sid": sid, "written": True}, ttl=60)

def update(store, sid):
    return store.update(sid, {"updated": True})

def destroy(store, sid):
    return store.destroy(sid)

def app(environ, start_response):
    action, *arguments = environ["PATH_INFO"].strip("/").split("/")
    try:
        status, result = "200 OK", globals()[action](attach_or_start("shop"), *arguments)
    except StoreUnavailable as exc:
        status, result = "503 Service Unavailable", str(exc)
    body = json.dumps(result).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
"""

CONF = """
from shmstore.client import attachment
attachment.SILENCE = 50  # on a busy machine a restart takes more than two seconds,
attachment._LOST = 100  # and one call may meet many of the kills

def note(sid, session, reason):  # closed at each call: what a server has told before it was killed is there
    with open({path!r}, "a") as notes:
        notes.write(f"{{sid}} {{reason}} {{session['sid']}}\\n")
"""


class Sessions:
    """
    Clients that start sessions and end them in every possible way.

    Attributes:
        there: Sessions that were started, unless a request to end one has failed.
        overwritten: How often each was overwritten, acknowledged.
        unavailable: Errors of calls: those that need the server wait for it.
    """

    def __init__(self, g: Gunicorn, seed: int) -> None:
        self.there: set[str] = set()
        self.overwritten: Counter[str] = Counter()
        self.calls = 0
        self.unavailable: Counter[str] = Counter()
        self.failed: list[str] = []
        self._g = g
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n, seed)) for n in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, client: int, seed: int) -> None:
        rnd, n = random.Random(f"{seed} {client}"), 0
        try:
            while not self._over.is_set():
                n += 1
                sid = f"c{client}-{n}"
                if not self._ask(f"create/{sid}/{rnd.choice([0.05, 60, 60])}"):
                    continue
                self.there.add(sid)
                if rnd.random() < 0.3 and self._ask(f"write/{sid}"):
                    self.overwritten[sid] += 1
                if rnd.random() < 0.3:
                    self._ask(f"update/{sid}")
                if rnd.random() < 0.3:
                    self._ask(f"destroy/{sid}")
        except BaseException as exc:
            self.failed.append(repr(exc))
            raise

    def _ask(self, path: str) -> bool:
        answer = self._g.ask(f"/{path}")
        self.calls += 1
        if answer.status == 503:
            self.unavailable[answer.json] += 1
        if answer.status not in (200, 503):
            self.failed.append(f"{path}: {answer}")
        return answer.status == 200


def is_one_to_expire(store: AnyStore) -> bool:
    """Return whether there is a session of the short kind, expired or not."""
    return any((seen := store.load(sid)) is None or seen.remaining < 1 for sid in store.ids())


@pytest.mark.timeout(1200)
@some_worker_class
def test_dispose_is_called_for_each_removal_although_the_server_is_killed(
    gunicorn: StartGunicorn,
    arguments: tuple[str, ...],
    tmp_path: Path,
    seed: int,
    figure: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At least once; more than once only if a kill came between the call and the removal."""
    monkeypatch.setattr("shmstore.client.attachment.SILENCE", 50)  # seconds, of the calls of this process
    rnd = random.Random(seed)
    notes = tmp_path / "notes"
    g = gunicorn(
        *arguments,
        "--timeout",
        "120",
        options=f"check_period=0.2, lock_timeout=60, max={MAX}, dispose=lambda *drop: note(*drop)",
        conf=CONF.format(path=str(notes)),
    ).booted()
    sessions, kills = Sessions(g, seed), 50 if FULL else 2
    sessions.start()
    try:
        for _ in range(kills):
            time.sleep(rnd.random() * 0.3)
            server = g.server
            os.kill(server or 0, signal.SIGKILL)
            wait_for(lambda: serving(g, server), "the restart")  # noqa: B023
        time.sleep(0.3)
    finally:
        sessions.stop()
    assert not sessions.failed, (sessions.failed[:5], g.log.read_text()[-5000:])
    with connect("shop", directory=g.store_dir) as store:
        # Until then some of the last sessions have yet to expire, so the number that is left is unknown.
        wait_for(lambda: not is_one_to_expire(store), "the automatic prune")
        left = {*store.ids()}
        assert len(left) <= MAX
        told = [line.split() for line in notes.read_text().splitlines()]
        assert all(sid == whose for sid, _, whose in told)
        dropped = Counter(sid for sid, reason, _ in told if reason != "set")
        overwritten = Counter(sid for sid, reason, _ in told if reason == "set")
        missing = [sid for sid in sessions.there - left if not dropped[sid]]
        unwritten = [sid for sid, n in sessions.overwritten.items() if overwritten[sid] + dropped[sid] < n]
        twice = sum(n - 1 for n in dropped.values())
        figure(
            f"{kills} kills, {sessions.calls} calls; "
            f"{len(dropped)} dropped, {len(missing)} untold, {twice} told once more"
        )
        assert dropped
        assert not sessions.unavailable, sessions.unavailable
        assert missing == []
        assert unwritten == []
        # The server runs one dispose at a time, so a kill causes one more call; so does a write in between.
        assert twice <= 2 * kills + 5
        store.clear()
        cleared = {sid for sid, reason, _ in map(str.split, notes.read_text().splitlines()) if reason == "clear"}
        assert cleared == left
    g.signal("TERM")
    assert g.ended() == 0
    assert g.complaints() == []
