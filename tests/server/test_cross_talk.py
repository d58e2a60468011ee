"""No caller gets another's answer, in whichever process the store was opened; no greenlet waits for another's."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gunicorns import StartGunicorn
from load import FULL, some_worker_class
from processes import Run, Start, stop, wait_for
from sampling import LONGEST, some

REQUESTS, CLIENTS = 20_000 if FULL else 240, 16

# Both kinds of store are used in the master, by the application's import and by a hook, and inherited by the workers.
APP = """
import json, os
from shmstore.attach import attach_or_start
from shmstore.manager import connect

in_place = attach_or_start("shop")
through = connect("shop", directory=os.environ["STORE_DIR"], in_place=False)

def use(who):
    for store in (in_place, through):
        store.set(who, {"who": who})
        assert store.get(who) == {"who": who}

use("import")

def app(environ, start_response):
    client, n = environ["PATH_INFO"].strip("/").split("/")
    found = []
    for store, sid in ((in_place, f"{client} in place"), (through, f"{client} through")):
        found.append(store.get(sid))
        store.set(sid, {"client": client, "n": int(n)})
    body = json.dumps({"pid": os.getpid(), "found": found}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
"""

CONF = """
import os
os.environ["STORE_DIR"] = {store_dir!r}

def on_starting(server):
    hooks.on_starting(server)
    import app
    app.use("on_starting")
"""


@pytest.mark.timeout(1200)
@some_worker_class
def test_every_client_gets_its_own_answers(
    gunicorn: StartGunicorn, arguments: tuple[str, ...], store_dir: Path, figure: Callable[[str], None]
) -> None:
    """F1: with connections opened before the fork, half of the answers went to another process."""
    g = gunicorn("--preload", "--workers", "4", *arguments, conf=CONF.format(store_dir=str(store_dir))).booted(4)
    wrong, workers = [], set()

    def ask(client: int) -> None:
        before = None
        for n in range(REQUESTS // CLIENTS):
            answer = g.ask(f"/{client}/{n}")
            assert answer.status == 200, (answer, g.log.read_text())
            if answer.json["found"] != [before, before]:
                wrong.append(f"{answer.json['found']} for {before}")
            before = {"client": str(client), "n": n}
            workers.add(answer.json["pid"])

    with ThreadPoolExecutor(CLIENTS) as pool:
        [*pool.map(ask, range(CLIENTS))]
    figure(f"{len(wrong)} wrong answers to {REQUESTS} requests")
    assert wrong == []
    assert len(workers) > 1
    g.signal("TERM")
    assert g.ended() == 0
    assert g.complaints() == []


TIMEOUTS = """
from gevent import monkey
monkey.patch_all()
import sys, traceback
import gevent
from shmstore.manager import connect
from shmstore.ipc.channel import Channel

_, directory, wanted = sys.argv
broken = rounds = calls = 0
over = False

with connect("shop", directory=directory, in_place=False) as store:
    names = ["alice", "bob", *(f"other {n}" for n in range(5))]
    for name in names:
        store.set(name, {"name": name})

    def others(name):
        global calls
        while not over:
            assert store.get(name) == {"name": name}
            calls += 1

    greenlets = [gevent.spawn(others, name) for name in names[2:]]
    while broken < int(wanted):
        rounds += 1
        try:
            with gevent.Timeout(0.0001 * (rounds % 20 + 1)):
                while True:
                    assert store.get("alice") == {"name": "alice"}
        except gevent.Timeout as exc:
            broken += Channel.read.__code__ in [frame.f_code for frame, _ in traceback.walk_tb(exc.__traceback__)]
        assert store.get("bob") == {"name": "bob"}
    over = True
    gevent.joinall(greenlets, raise_error=True)
print(broken, calls)
"""


@pytest.mark.timeout(1200)
def test_the_next_call_after_a_greenlets_timeout_gets_its_own_answer(
    manage: Start, run: Run, store_dir: Path, figure: Callable[[str], None]
) -> None:
    """F2 with a timeout of gevent. For signals, see test_clients."""
    with manage():
        child = run(TIMEOUTS, store_dir, 500 if FULL else 50, stderr=subprocess.STDOUT)
        output, _ = child.communicate(timeout=LONGEST)
    assert child.returncode == 0, output
    broken, calls = map(int, output.split())
    figure(f"{broken} calls given up with the answer on its way, {calls} of other greenlets, 0 answers to another")


GREENLETS = """
import sys, time
_, directory, patched, way = sys.argv
if patched == "first":
    from gevent import monkey
    monkey.patch_all()
from shmstore.client import attachment
from shmstore.manager import connect

attachment.SILENCE = 60  # seconds: the server answers as soon as it is continued,
attachment.LATE = 600  # and no write replaces it
store = connect("shop", directory=directory)
store.set("slow", {})
for n in range(100):
    store.set(f"s{n}", {"n": n})
through = connect("shop", directory=directory, in_place=False)
assert through.get("s1") == {"n": 1}
if patched == "late":
    from gevent import monkey
    monkey.patch_all()
import gevent

def slow():
    begun = time.monotonic()
    if way == "dispose":
        assert store.destroy("slow") == 1
    elif way == "server":
        assert through.get("slow") == {}
    else:
        store.set("slow", {})
    return time.monotonic() - begun

def clock():
    "Return the time in seconds, without that in which this thread was ready to run and waited for a processor."
    while True:
        now = time.monotonic()
        waited = int(open("/proc/thread-self/schedstat").read().split()[1]) / 1e9
        if time.monotonic() - now < 0.05:  # otherwise it may have waited in between
            return now - waited

rounds, gaps = [0] * 100, []

def other(n):
    while not over:
        gevent.sleep(0.02)
        assert store.get(f"s{n}")["n"] == n
        if way != "lock":  # which writers need
            assert store.update(f"s{n}", {"at": rounds[n]})
        rounds[n] += 1

def watch():
    before = clock()
    while not over:
        gevent.sleep(0.01)
        gaps.append((now := clock()) - before)
        before = now

over = False
print("ready", flush=True)
sys.stdin.readline()
call = gevent.spawn(slow)
others = [gevent.spawn(watch), *(gevent.spawn(other, n) for n in range(100))]
while min(rounds) < 10 and not call.ready():
    gevent.sleep(0.01)
print("answered" if call.ready() else "waits", flush=True)
call.join()
over = True
gevent.joinall(others, raise_error=True)
print(call.get(), sum(rounds), max(gaps))
"""

HOLDER = """
import os, signal, sys
from shmstore.manager import connect

store = connect("shop", directory=sys.argv[1])
store.arena.lock(9)
try:
    os.kill(os.getpid(), signal.SIGSTOP)
finally:
    store.arena.unlock()
"""


@pytest.mark.parametrize("patched", ["first", "late"])
@some("way", {"dispose": "dispose", "server": "server", "lock": "lock"})
def test_a_waiting_greenlet_does_not_block_the_others(
    manage: Start,
    run: Run,
    store_dir: Path,
    tmp_path: Path,
    way: str,
    patched: str,
    figure: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it waits for a slow callback, for a stopped server, for a lock whose holder is stopped."""
    monkeypatch.setattr("shmstore.client.watch._MAX_MISSED", 10**9)  # the stopped server is not replaced
    done = tmp_path / "done"

    def dispose(sid: str, session: object, reason: str) -> None:
        end = time.monotonic() + 60
        while sid == "slow" and not done.exists() and time.monotonic() < end:
            time.sleep(0.01)

    options: dict[str, Any] = {"dispose": dispose, "no_dispose_on_set": True} if way == "dispose" else {}
    with manage(lock_timeout=60, **options) as manager:
        child = run(GREENLETS, store_dir, patched, way)
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        stopped = 0
        if way == "server":
            stop(stopped := manager.store().stats().server_pid)
        elif way == "lock":
            stopped = (holder := run(HOLDER, store_dir)).pid
            wait_for(lambda: Path(f"/proc/{holder.pid}/stat").read_text().split()[2] == "T", "the holder's stop")
        child.stdin.write("go\n")
        child.stdin.flush()
        said = child.stdout.readline()
        done.touch()
        if stopped:
            os.kill(stopped, signal.SIGCONT)
        output, _ = child.communicate(timeout=300)
    assert child.returncode == 0, output
    assert said == "waits\n", "not all others made ten calls while one waited"
    took, calls, longest = map(float, output.split())
    figure(
        f"{way}, patched {patched}: one call takes {took:.1f} s, {calls:.0f} calls of others, "
        f"at most {longest * 1000:.0f} ms without one of them"
    )
    assert longest < 0.3, "a wait of one stopped the others"
