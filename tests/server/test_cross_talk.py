"""No caller gets another's answer, in whichever process the store was opened; no greenlet waits for another's."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gunicorns import StartGunicorn
from load import FULL, some_worker_class
from processes import Run, Start, stop, wait_for
from sampling import some

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


@pytest.mark.timeout(600)
def test_the_next_call_after_a_greenlets_timeout_gets_its_own_answer(
    manage: Start, run: Run, store_dir: Path, figure: Callable[[str], None]
) -> None:
    """F2 with a timeout of gevent. For signals, see test_clients."""
    with manage():
        child = run(TIMEOUTS, store_dir, 500 if FULL else 50, stderr=subprocess.STDOUT)
        output, _ = child.communicate(timeout=500)
    assert child.returncode == 0, output
    broken, calls = map(int, output.split())
    figure(f"{broken} calls given up with the answer on its way, {calls} of other greenlets, 0 answers to another")


GREENLETS = """
import sys, time
_, directory, patched, way, seconds = sys.argv
if patched == "first":
    from gevent import monkey
    monkey.patch_all()
from shmstore import StoreUnavailable
from shmstore.manager import connect

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
    try:
        if way == "dispose":
            assert store.destroy("slow") == 1
        elif way == "server":
            assert through.get("s1") == {"n": 1}  # perhaps of the next server
        else:
            store.set("slow", {})
    except StoreUnavailable:
        assert way != "dispose"
    return time.monotonic() - begun

late = []

def other(n):
    before = time.monotonic()
    while not over:
        gevent.sleep(0.02)
        assert store.get(f"s{n}")["n"] == n
        if way != "lock":  # which writers need
            assert store.update(f"s{n}", {"at": before})
        now = time.monotonic()
        late.append(now - before - 0.02)
        before = now

over = False
print("ready", flush=True)
sys.stdin.readline()
greenlets = [gevent.spawn(other, n) for n in range(100)]
took = gevent.spawn(slow).get()
over = True
gevent.joinall(greenlets, raise_error=True)
late.sort()
print(took, len(late), late[len(late) * 99 // 100], late[-1])
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
    manage: Start, run: Run, store_dir: Path, way: str, patched: str, figure: Callable[[str], None]
) -> None:
    """For a slow callback, for a stopped server, for a lock whose holder is stopped."""
    seconds = 2.0 if FULL else 0.7

    def dispose(sid: str, session: object, reason: str) -> None:
        if sid == "slow":
            time.sleep(seconds)

    options = {"dispose": dispose, "no_dispose_on_set": True} if way == "dispose" else {"lock_timeout": seconds}
    with manage(**options) as manager:
        child = run(GREENLETS, store_dir, patched, way, seconds)
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        if way == "server":
            stop(manager.store().stats().server_pid)
        elif way == "lock":
            holder = run(HOLDER, store_dir)
            wait_for(lambda: Path(f"/proc/{holder.pid}/stat").read_text().split()[2] == "T", "the holder's stop")
        output, _ = child.communicate("go\n", timeout=300)
        assert child.returncode == 0, output
        if way == "lock":
            holder.kill()
            holder.communicate()
    took, calls, p99, longest = map(float, output.split())
    figure(
        f"{way}, patched {patched}: one call takes {took:.1f} s, p99 of {calls:.0f} others {p99 * 1000:.1f} ms, "
        f"at most {longest * 1000:.0f} ms late"
    )
    assert took > seconds / 2, "it was not slow: this proves nothing"
    assert p99 < (0.3 if FULL else 0.3 + took / 2), "the machine may do much else"
    assert calls > 100 * took / 0.02 / 10
