"""Many processes read, change and write the same sessions while the server is killed: each change is made once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from engines import BUILT, VARIABLE
from processes import ROOT, Run, Start, wait_for
from sampling import FULL, LONGEST, some

from shmstore.client import connection
from shmstore.errors import StoreUnavailable
from shmstore.ipc.directory import StoreFiles
from shmstore.manager import connect

ENGINES = ["c", "python"] if BUILT else ["python"]  # of the processes, in turn
PROCESSES, ROUNDS, KILLS = (8, 500, 20) if FULL else (4, 30, 2)
KEYS = 10
PAUSE = 0.2 if FULL else 0.05  # seconds between a restart and the next death, at most: so that deaths meet the work

CHANGES = """
import math, random, sys
from shmstore import StoreUnavailable
from shmstore.manager import connect

_, directory, in_place, way, me, rounds, keys, seed = sys.argv
rnd = random.Random(f"{seed} {me}")
version = dict.fromkeys(range(int(keys)), 0)
unknown = 0

def surely(work, *arguments, **more):
    "For what does no harm if it is done twice: on a busy machine a server is longer away than a call waits for it."
    while True:
        try:
            return work(*arguments, **more)
        except StoreUnavailable:
            assert in_place == "0"

def turns(key):
    "By turns: the lock is what makes a change that is sent again the same change."
    sid = f"{key}"
    with store.lock(sid, timeout=60):
        session = surely(store.get, sid)
        changed = {"n": session["n"] + 1, me: session.get(me, 0) + 1}
        if rnd.random() < 0.5:
            assert surely(store.update, sid, changed)
        else:
            surely(store.set, sid, {**session, **changed}, ttl=math.inf)
    return True

def keys_of_ones_own(key):
    "By merging: nobody else writes this key."
    session = surely(store.get, f"{key}")
    assert surely(store.update, f"{key}", {me: session.get(me, 0) + 1})
    return True

def latest(key):
    while (session := surely(store.get, f"{key} {version[key]}")) is None:
        version[key] += 1  # what is not under this id any more is under a later one
    return session

def versions(key):
    "Optimistically: the version is part of the id, so who is late renames nothing."
    global unknown
    session = latest(key)
    old, mine = version[key], session.get(me, 0)
    try:
        return store.rename(f"{key} {old}", f"{key} {old + 1}", {"n": session["n"] + 1, me: mine + 1})
    except StoreUnavailable:  # the answer was lost
        assert in_place == "0"
        unknown += 1
        return latest(key).get(me, 0) > mine

with connect("shop", directory=directory, in_place=in_place == "1") as store:
    print("connected", flush=True)
    sys.stdin.readline()
    for _ in range(int(rounds)):
        key = rnd.randrange(int(keys))
        while not globals()[way](key):
            pass
print(unknown)
"""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "through the server"])
@some("way", {way: way for way in ("turns", "keys_of_ones_own", "versions")})
def test_each_change_is_applied_once(
    manage: Start, run: Run, store_dir: Path, way: str, in_place: bool, seed: int, figure: Callable[[str], None]
) -> None:
    rnd = random.Random(seed)
    with manage(lock_timeout=60), connect("shop", directory=store_dir) as store:  # seconds: the machine may be busy
        for key in range(KEYS):
            store.set(f"{key} 0" if way == "versions" else f"{key}", {"n": 0})
        children = [
            run(
                CHANGES,
                store_dir,
                int(in_place),
                way,
                f"p{number}",
                ROUNDS,
                KEYS,
                seed,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": ROOT, VARIABLE: ENGINES[number % len(ENGINES)]},
            )
            for number in range(PROCESSES)
        ]
        for child in children:
            assert child.stdin
            assert child.stdout
            assert child.stdout.readline() == "connected\n"
        for child in children:
            child.stdin.write("go\n")  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
        for _ in range(KILLS):
            time.sleep(rnd.random() * PAUSE)
            kill_server(StoreFiles.of("shop", store_dir))
        unknown = 0
        for child in children:
            output, _ = child.communicate(timeout=LONGEST)
            assert child.returncode == 0, output
            unknown += int(output.split()[-1])  # a line about a started server may precede it
        sessions = store.all().values()
    assert len(sessions) == KEYS
    changes = [sum(value for name, value in session.items() if name != "n") for session in sessions]
    figure(
        f"{way}, {'in place' if in_place else 'through the server'}: {sum(changes)} of {PROCESSES * ROUNDS} changes, "
        f"{KILLS} kills, {unknown} answers lost"
    )
    assert sum(changes) == PROCESSES * ROUNDS
    if way != "keys_of_ones_own":
        assert [session["n"] for session in sessions] == changes
    if in_place:
        assert unknown == 0


def kill_server(files: StoreFiles) -> None:
    """Kill the server, and wait until another serves."""
    pid = files.server()
    assert pid
    os.kill(pid, signal.SIGKILL)

    def serves() -> bool:
        with suppress(StoreUnavailable):
            connection.connect(files).close()
            return True
        return False

    wait_for(serves, "the restart")
