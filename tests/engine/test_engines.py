"""Two engines, one file: the same operations leave the same bytes, and processes with either share one store."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import built_core
import pytest
from engines import engine, needs_core
from fault_injection import Clock
from flask.json.tag import TaggedJSONSerializer
from sampling import FULL

from shmstore import ShmStoreError, Store
from shmstore.codec.serializers import MsgpackSerializer
from shmstore.contract import Loaded
from shmstore.engine import core, reader
from shmstore.engine.arena import Arena
from shmstore.engine.header import OPTIONS
from shmstore.engine.layout import CELL, STATE_CELLS
from shmstore.engine.verify import verify

OPERATIONS = 30_000 if FULL else 600


def on_both(**options: Any) -> tuple[Store, Store]:
    """Return a store on the C core, and the same on the Python engine."""
    stores = []
    for name in ("c", "python"):
        with engine(name):
            stores.append(Store(check_period=None, **options))
    core_store, reference = stores
    assert core_store.arena.file.core is not None
    assert reference.arena.file.core is None
    return core_store, reference


def first_difference(one: Arena, other: Arena) -> str:
    """Return the cells that differ, except those with times and pids; "" if all are equal."""
    state, options = STATE_CELLS * CELL, OPTIONS * CELL
    a, b = one.file.memory, other.file.memory
    parts = [slice(state, options), slice(options + CELL, None)]
    if all(a[part] == b[part] for part in parts):
        return ""
    differ = [cell for cell in range(STATE_CELLS, len(a) // CELL) if a[cell * CELL :][:8] != b[cell * CELL :][:8]]
    differ.remove(OPTIONS)
    return ", ".join(f"cell {cell}: {one.cells[cell]:x} {other.cells[cell]:x}" for cell in differ[:8])


def outcome(store: Store, method: str, arguments: tuple[Any, ...]) -> object:
    try:
        if method == "swap":
            sid, session, *rest = arguments
            loaded = store.load(sid)
            return loaded and store.swap(sid, loaded, store.codec.encode(session), *rest)
        found = getattr(store, method)(*arguments)
        # The handle also contains the arena, which differs.
        return (*found[:-1], found.handle[-1]) if isinstance(found, Loaded) else found
    except (ShmStoreError, ValueError) as error:
        return type(error), str(error)


def random_operation(rnd: random.Random) -> tuple[str, tuple[Any, ...]]:
    """Return a method and its arguments."""
    sid, other = str(rnd.randrange(160)), str(rnd.randrange(160))
    if rnd.random() < 0.03:
        sid = "é" * rnd.choice([1, 127, 128, 129])  # 256 bytes is the longest
    size = int(10 * 1500 ** rnd.random())
    session = {"x": rnd.choice([rnd.randbytes(size), "x" * size]), "n": rnd.randrange(100)}
    owner = rnd.choice([None, None, None, *"abcdefgh", "ö" * 140])
    ttl = rnd.choice([-1, 0, 0.5, 60, 1000, 5000, math.inf, timedelta(minutes=1), None])
    return rnd.choice(
        [
            ("set", (sid, session, ttl, owner)),
            ("set", (sid, session, ttl, owner)),
            ("add", (sid, session, ttl, owner)),
            ("replace", (sid, session, ttl, owner)),
            ("update", (sid, session, ("n",), ttl)),
            ("update", (sid, {"m": 1}, (), None, owner)),
            ("rename", (sid, other, {"m": 2}, ("x",), ttl)),
            ("rename", (sid, other, {}, (), None, owner, True)),
            ("touch", (sid, None, ttl)),
            ("touch", (sid, {"cookie": {"max_age": 50}})),
            ("touch", (sid, None, 50)),
            ("get", (sid,)),
            ("get", (sid,)),
            ("peek", (sid,)),
            ("load", (sid,)),
            ("load", (sid,)),
            ("swap", (sid, session, ttl)),
            ("swap", (sid, session, None, owner)),
            ("swap", (sid, session, ttl, owner, other, rnd.random() < 0.5)),
            ("destroy", (sid,)),
            ("destroy", (sid, True)),
            ("gone", (sid, 30, rnd.random() < 0.5)),
            rnd.choice(
                [
                    ("destroy_owned", (owner or "a",)), ("owned_by", (owner or "a",)), ("prune", ()), ("ids", ()),
                    ("length", (True,)), ("destroy_if_empty", (sid, ["n", "x", "m"], True)),
                ]
            ),
        ]
    )  # fmt: skip


FORWARD = [0, 1, 10**6, 10**9 // 2]
ANYWHERE = [*FORWARD, -1, -(10**6), -2 * 10**9]  # nanoseconds
LEAPS = [-70 * 10**9, 100 * 10**9, -(10**13)]  # further back than stamps may be ahead

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "memory": {"memory": 2**17, "recency": 0},
    "max": {"memory": 2**18, "max": 25, "recency": 0},
    "recency": {"memory": 2**18, "max": 100, "recency": 1},
    "owners": {"memory": 2**18, "max": 80, "recency": 0, "max_per_owner": 3},
    "length": {"memory": 2**18, "max": 50_000, "length": lambda size, sid: size, "recency": 0},
    "max_session": {"memory": 2**18, "max": 100, "recency": 0, "max_session": 4000},
    "one slot": {"memory": 2**16, "max": 1, "recency": 0},
    "stale": {"memory": 2**17, "stale": True, "recency": 0.1},
}
# What an option may become while the store is in use.
CHANGES: dict[str, list[Any]] = {
    "serializer": [None, None, json, MsgpackSerializer(), TaggedJSONSerializer()],
    "max": [None, 5, 20, 60],
    "max_per_owner": [None, None, 2, 5],
    "recency": [0, 0.1, 1],
    "max_session": [None, 300, 3000],
    "stale": [False, True],
    "length": [None, lambda size, sid: size // 10 + len(sid)],
}


def change(store: Store, option: str, value: Any) -> None:
    store.change_options(replace(store.options, **{option: value}))
    for thread in threading.enumerate():
        if thread.name == "shmstore-shrink":
            thread.join()


def compare(one: Store, other: Store, clock: Clock, rnd: random.Random, steps: list[int], options: list[str]) -> None:
    """Do the same with both stores, with this clock, and change these options now and then."""
    history: list[object] = []
    for _ in range(OPERATIONS):
        clock.now = max(1, clock.now + rnd.choice(steps if rnd.random() < 0.99 or steps is FORWARD else LEAPS))
        if options and rnd.random() < 0.02:
            option = rnd.choice(options)
            value = rnd.choice(CHANGES[option])
            history.append((option, value))
            change(one, option, value)
            change(other, option, value)
        else:
            method, arguments = random_operation(rnd)
            history = [*history[-20:], (method, str(arguments)[:100])]
            assert outcome(one, method, arguments) == outcome(other, method, arguments), history
        assert not (difference := first_difference(one.arena, other.arena)), (difference, history)
    verify(one.arena)


@needs_core
@pytest.mark.parametrize("steps", [FORWARD, ANYWHERE], ids=["forward", "anywhere"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_both_engines_leave_the_same_bytes(name: str, steps: list[int], seed: int) -> None:
    clock = Clock()
    one, other = on_both(clock=clock, **CONFIGURATIONS[name])
    with one, other:
        compare(one, other, clock, random.Random(seed), steps, [])


@needs_core
@pytest.mark.parametrize(
    "options",
    [["serializer"], ["max", "recency", "stale", "max_session"], [*CHANGES]],
    ids=["serializers", "some", "all"],
)
def test_they_do_so_while_options_change(options: list[str], seed: int) -> None:
    clock = Clock()
    one, other = on_both(clock=clock, memory=2**17)
    with one, other:
        compare(one, other, clock, random.Random(seed), ANYWHERE, options)


def portable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a core without the instructions of a processor."""
    if not built_core.can_build():
        pytest.skip("no C compiler, or no headers of Python")
    built = built_core.build(tmp_path, "-O2", "-DCORE_PORTABLE")
    monkeypatch.setattr(core, "_core", built_core.load(built))


@needs_core
def test_they_do_so_where_reads_take_the_lock(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    portable(tmp_path, monkeypatch)
    monkeypatch.setattr(reader, "_TRIES", 0)
    clock = Clock()
    one, other = on_both(clock=clock, memory=2**17, recency=0)
    with one, other:
        compare(one, other, clock, random.Random(seed), ANYWHERE, ["serializer"])


@needs_core
@pytest.mark.parametrize("take", [lambda *_: None, portable], ids=["native", "portable"])
def test_digests_and_checksums_equal_those_of_python(
    take: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each engine reads records of the other, for each length of each part."""
    take(tmp_path, monkeypatch)
    with engine("c"), Store(memory=2**20, check_period=None) as store:
        c = store.arena.file.core
        assert c is not None
        for length in [*range(1, 257), 1000, 20_000]:
            sid, owner, session = "i" * min(length, 256), "o" * min(length, 300), {"x": bytes(length)}
            store.arena.file.core = c
            store.set(sid, session, owner=owner)
            store.arena.file.core = None
            assert store.get(sid) == session
            assert sid in store.owned_by(owner)
            store.set(sid, session | {"by": "python"}, owner=owner)
            store.arena.file.core = c
            assert store.get(sid) == session | {"by": "python"}
        verify(store.arena)
