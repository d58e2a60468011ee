"""Two engines, one file: the same operations leave the same bytes, and processes with either share one store."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import built_core
import pytest
from engines import engine, needs_core
from fault_injection import Clock
from sampling import FULL

from shmstore import RecordTooLarge, Store
from shmstore.contract import Loaded
from shmstore.engine import core
from shmstore.engine.arena import Arena
from shmstore.engine.header import OPTIONS
from shmstore.engine.layout import CELL, STATE_CELLS
from shmstore.engine.verify import verify

OPERATIONS = 100_000 if FULL else 3000


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
    a, b = bytes(one.file.memory), bytes(other.file.memory)
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
    except RecordTooLarge as error:
        return type(error), str(error)


def random_operation(rnd: random.Random) -> tuple[str, tuple[Any, ...]]:
    """Return a method and its arguments."""
    sid, other = str(rnd.randrange(160)), str(rnd.randrange(160))
    session = {"x": rnd.randbytes(int(10 * 1500 ** rnd.random())), "n": rnd.randrange(100)}
    owner = rnd.choice([None, None, None, *"abcdefgh"])
    ttl = rnd.choice([0, 1, 60, 1000, 5000, None])
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
            ("touch", (sid, None, 50)),
            ("get", (sid,)),
            ("get", (sid,)),
            ("peek", (sid,)),
            ("load", (sid,)),
            ("swap", (sid, session, ttl)),
            ("swap", (sid, session, None, owner)),
            ("destroy", (sid,)),
            ("destroy", (sid, True)),
            ("destroy_owned", (owner or "a",)) if rnd.random() < 0.05 else ("gone", (sid,)),
            ("prune", ()) if rnd.random() < 0.05 else ("owned_by", (owner or "a",)),
        ]
    )


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "memory": {"memory": 2**17, "recency": 0},
    "max": {"memory": 2**18, "max": 25, "recency": 0},
    "recency": {"memory": 2**18, "max": 100, "recency": 1},
    "owners": {"memory": 2**18, "max": 80, "recency": 0, "max_per_owner": 3},
    "length": {"memory": 2**18, "max": 50_000, "length": lambda size, sid: size, "recency": 0},
    "max_session": {"memory": 2**18, "max": 100, "recency": 0, "max_session": 4000},
    "one slot": {"memory": 2**16, "max": 1, "recency": 0},
}


@needs_core
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_both_engines_leave_the_same_bytes(name: str, seed: int) -> None:
    rnd = random.Random(seed)
    clock = Clock()
    one, other = on_both(clock=clock, **CONFIGURATIONS[name])
    history: list[object] = []
    with one, other:
        for _ in range(OPERATIONS):
            clock.now += rnd.choice([0, 1, 10**6, 10**9 // 2])
            method, arguments = random_operation(rnd)
            history = [*history[-20:], (method, str(arguments)[:100])]
            assert outcome(one, method, arguments) == outcome(other, method, arguments), history
            assert not (difference := first_difference(one.arena, other.arena)), (difference, history)
        verify(one.arena)


@needs_core
@pytest.mark.skipif(not built_core.can_build(), reason="no C compiler, or no headers of Python")
@pytest.mark.parametrize("flags", [(), ("-DCORE_PORTABLE",)], ids=["native", "portable"])
def test_digests_and_checksums_are_those_of_python(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the core writes is read by the Python engine, and the other way round: for each length of each part."""
    monkeypatch.setattr(core, "_core", built_core.load(built_core.build(tmp_path, "-O2", *flags)))
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
