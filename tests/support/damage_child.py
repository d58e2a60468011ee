"""Damage the file of a store and use it: `python damage_child.py DIRECTORY REGION SEED COUNT`; REGION may be "all".

Each of the COUNT files of a region is used by a child of its own, so that a crash or a hang is that child's. One line
is printed for each kind of failure. A process of its own, because forking needs one without threads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import logging
import math
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import stress_child
from fault_injection import Steps, stepping

from shmstore import ShmStoreError
from shmstore.engine.arena import Arena
from shmstore.engine.layout import CELL, PAGE, SLOT, Geometry
from shmstore.engine.verify import verify
from shmstore.options import Options
from shmstore.store.store import Store

MEMORY = 2**17
SESSIONS = 60
ALL = "all"  # regions
HANGS = 30.0  # seconds after which a child prints its stack and is killed
OWNERS = (None, "ada", "bob")

Region = tuple[int, int]


class Cut(BaseException):
    """Interrupts a mutation."""


def cut() -> None:
    raise Cut


def session_of(key: int, sequence: int, rnd: random.Random) -> dict[str, Any]:
    size = int(20 * 200 ** rnd.random())
    return stress_child.session_of(key, sequence, size) | {"owner": OWNERS[key % len(OWNERS)]}


def make(path: str, rnd: random.Random) -> None:
    """Create a store with each kind of content; every other store is left in the middle of a mutation."""
    options = Options.of(memory=MEMORY, recency=0, check_period=None)
    with Store.over(Arena.create(path, Geometry.plan(MEMORY)), options) as store:
        store.change_options(options)
        for key in range(SESSIONS):
            ttl = 0 if key % 10 == 9 else 3600
            store.set(str(key), session_of(key, 0, rnd), ttl=ttl, owner=OWNERS[key % len(OWNERS)])
            if key % 4 == 1:
                store.destroy(str(key - 1))
        with contextlib.suppress(Cut), stepping(store.arena, Steps(rnd.randrange(1, 80), cut)):
            key = rnd.choice([1, 2, 3, 4])
            store.set(str(key), session_of(key, 1, rnd), ttl=3600, owner=OWNERS[key % len(OWNERS)])


def regions() -> dict[str, Region]:
    """Return the bounds of the used regions of a file."""
    geometry = Geometry.plan(MEMORY)
    at = geometry.offsets()
    return {
        "file": (0, geometry.size),
        "header": (0, 640),
        "journal": (PAGE, PAGE + 400),
        "counters": (at["counters"], at["counters"] + 256),
        "slots": (at["slots"], at["slots"] + (SESSIONS + 1) * SLOT * CELL),
        "buckets": (at["buckets"], at["blocks"]),
        "blocks": (at["blocks"], geometry.size),
    }


def damage(path: str, region: Region, rnd: random.Random) -> str:
    """Change something in a region of the file; return a description."""
    data = bytearray(Path(path).read_bytes())
    begin, end = region
    at = rnd.randrange(begin, end)
    span = slice(at, min(at + int(2 ** rnd.uniform(0, 8)), end))
    size = span.stop - span.start
    kind = rnd.choice(["flip", "flips", "zero", "ones", "random", "number", "exchange"])
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else 8):
            data[rnd.randrange(begin, end)] ^= 1 << rnd.randrange(8)
    elif kind in ("zero", "ones"):
        data[span] = (b"\0" if kind == "zero" else b"\xff") * size
    elif kind == "random":
        data[span] = rnd.randbytes(size)
    elif kind == "number":  # a plausible value
        cell = at // CELL * CELL
        data[cell : cell + CELL] = rnd.randrange(100).to_bytes(CELL, "little")
    else:
        cells = at // CELL * CELL, rnd.randrange(begin, end) // CELL * CELL
        one, other = (slice(cell, cell + CELL) for cell in cells)
        data[one], data[other] = data[other], data[one]
    Path(path).write_bytes(data)
    return f"{kind} at {span.start}"


def right(sid: str, session: dict[str, Any] | None) -> None:
    if session is not None:
        assert session["key"] == int(sid), f"{sid} is given the session of {session['key']}"
        assert stress_child.is_whole(session), f"{sid} is torn"


def actions(store: Store, rnd: random.Random) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every operation of a store, with its invariants; each is tried even if others have failed."""
    sids = [str(key) for key in range(SESSIONS)]
    some = rnd.sample(sids, 12)

    def put(key: int, sequence: int) -> None:
        owner = OWNERS[key % len(OWNERS)]
        store.set(str(key), session_of(key, sequence, rnd), ttl=math.inf, owner=owner)
        found = store.get(str(key))
        right(str(key), found)
        assert found is None or found["sequence"] == sequence, f"{key}: {found['sequence']} is there, not {sequence}"

    def everything() -> None:
        for sid, session in store.all().items():
            right(sid, session)

    def owned(owner: str) -> None:
        for sid in store.owned_by(owner):
            session = store.get(sid)
            right(sid, session)
            assert session is None or session["owner"] == owner, f"{sid} is not {owner}'s"

    def rename(sid: str) -> None:
        key = int(sid) + 300 * len(OWNERS)
        if store.rename(sid, str(key), session_of(key, 2, rnd)):
            right(str(key), store.get(str(key)))

    def update(sid: str) -> None:
        if store.update(sid, {"more": "m" * 200}):
            right(sid, store.get(sid))

    yield "stats", store.stats
    yield "ids", store.ids
    yield "all", everything
    yield "length", lambda: store.length(live=True)
    for sid in sids:
        yield "get", lambda sid=sid: right(sid, store.get(sid))  # type: ignore[misc]
    for sid in some:
        yield "peek", lambda sid=sid: right(sid, store.peek(sid))  # type: ignore[misc]
    for owner in ("ada", "bob"):
        yield "owned_by", lambda owner=owner: owned(owner)  # type: ignore[misc]
    yield "check", lambda: verify(store.arena)
    for sid in some:
        yield "set", lambda sid=sid: put(int(sid), 2)  # type: ignore[misc]
        yield "touch", lambda sid=sid: store.touch(sid, ttl=60)  # type: ignore[misc]
        yield "update", lambda sid=sid: update(sid)  # type: ignore[misc]
    for sid in some[:4]:
        yield "rename", lambda sid=sid: rename(sid)  # type: ignore[misc]
        yield "destroy", lambda sid=sid: store.destroy(sid)  # type: ignore[misc]
    yield "prune", store.prune
    yield "destroy_owned", lambda: store.destroy_owned("ada")
    for key in range(1000, 1400):
        yield "evict", lambda key=key: put(key, 3)  # type: ignore[misc]
    for sid in sids:
        yield "get", lambda sid=sid: right(sid, store.get(sid))  # type: ignore[misc]
    yield "all", everything
    yield "check", lambda: verify(store.arena)
    yield "clear", store.clear
    yield "close", store.close


def where(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/shmstore/" in frame.filename]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[:-4:-1])


def use(path: str, rnd: random.Random) -> set[str]:
    """Use every operation on a damaged file, as a server with a dispose or as a worker; return the failures."""
    wrong: set[str] = set()

    def attempt(name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except ShmStoreError:
            pass
        except AssertionError as error:
            wrong.add(f"{name}: {re.sub('[0-9]+', 'N', str(error))}")
        except Exception as error:
            wrong.add(f"{name}: {type(error).__name__} at {where(error)}")

    def dispose(sid: str, session: dict[str, Any] | None, reason: str) -> None:
        attempt(f"dispose, {reason}", lambda: right(sid, session))

    serving = rnd.random() < 0.5
    options = Options.of(memory=MEMORY, lock_timeout=0.05, check_period=None, dispose=dispose if serving else None)
    stores: list[Store] = []
    attempt("open", lambda: stores.append(Store.over(Arena.open(path), options)))
    for store in stores:
        if serving:
            attempt("apply", lambda: store.change_options(options))  # noqa: B023 - called at once
        for name, action in actions(store, rnd):
            attempt(name, action)
    return wrong


def in_a_child(path: str, rnd: random.Random) -> set[str]:
    """Use a damaged file in a child; return the failures."""
    report = Path(path + ".report")
    child = os.fork()
    if not child:
        with report.open("w") as file:
            faulthandler.enable(file)
            faulthandler.register(signal.SIGUSR1, file)
            file.write("\n".join(sorted(use(path, rnd))))
        os._exit(0)
    deadline = time.monotonic() + HANGS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.001)
    what = ""
    if ended == (0, 0):
        what = f"a hang of {HANGS:g} s"
        os.kill(child, signal.SIGUSR1)  # it prints its stack
        time.sleep(0.5)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    elif ended[1]:
        what = f"status {ended[1]}"
    else:
        return set(report.read_text().splitlines())
    stack = re.findall(r'/shmstore/(\w+\.py)", line (\d+) in (\w+)', report.read_text())
    return {f"{what} at {' < '.join(f'{file}:{line} {name}' for file, line, name in stack[:4])}"}


def main() -> None:
    directory, region, seed, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    path = str(Path(directory) / "arena")
    logging.disable()
    cases: dict[str, list[str]] = {}
    chosen = regions() if region == ALL else {region: regions()[region]}
    for name, number in itertools.product(chosen, range(seed, seed + count)):
        rnd = random.Random(f"{name} {number}")
        make(path, rnd)
        done = damage(path, chosen[name], rnd)
        for failure in in_a_child(path, rnd):
            cases.setdefault(failure, []).append(f"{number} in {name} ({done})")
    for failure, found in sorted(cases.items(), key=lambda each: -len(each[1])):
        print(f"{len(found)}x {failure}; e.g. seed {found[0]}")
    sys.exit(bool(cases))


if __name__ == "__main__":
    main()
