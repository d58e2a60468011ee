"""The C core at its boundary: what Python gives it, and what it does when the arena is closed."""

from __future__ import annotations

import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import fault_injection as faults
import pytest
from engines import engine, needs_core, on_each_engine
from msgspec import Raw
from msgspec.msgpack import encode

from shmstore import RecordTooLarge, SerializationError, Store, StoreUnavailable
from shmstore.codec.body import DEFAULT_CODEC, content_of, pack
from shmstore.codec.ids import key_of
from shmstore.engine import core
from shmstore.engine.arena import Arena
from shmstore.engine.frame import seal
from shmstore.engine.header import DESTROYED, STATE
from shmstore.engine.layout import CELL, JOURNAL, MUTEX, PAGE, Geometry
from shmstore.engine.mutex import DEPTH_WORD, LOCKED_ONCE

WRITES: dict[str, Callable[[Store], object]] = {
    "set": lambda store: store.set("a", {"n": 2}),
    "add": lambda store: store.add("b", {"n": 2}),
    "touch": lambda store: store.touch("a", ttl=9),
    "update": lambda store: store.update("a", {"n": 2}),
    "rename": lambda store: store.rename("a", "b"),
    "destroy": lambda store: store.destroy("a"),
}


@on_each_engine
@pytest.mark.parametrize("name", WRITES)
def test_a_call_that_is_in_progress_when_the_store_is_closed_changes_nothing(name: str) -> None:
    """The clock is asked right before the core is called, so this stands for another thread that closes the store."""
    closing = False

    def clock() -> int:
        if closing:
            store.close()
        return faults.Clock.now

    store = Store(memory=2**16, check_period=None, clock=clock)
    store.set("a", {"n": 1})
    store.get("none")  # claims a row of counters
    memory = store.arena.file.memory
    before = faults.image(memory)
    closing = True
    with pytest.raises(StoreUnavailable, match="closed"):
        WRITES[name](store)
    assert faults.image(memory) == before


@needs_core
def test_a_closed_core_uses_no_memory(store_dir: Path) -> None:
    path = store_dir / "arena"
    with engine("c"):
        arena = Arena.create(path, Geometry.plan(2**16))
    subject = arena.file.core
    assert subject is not None
    arena.close()
    assert str(path) not in Path("/proc/self/maps").read_text(), "the file is mapped as long as the core exists"
    key = key_of(b"a")
    entry = 12, 2, 1, (1, 1, *key, 0, 0), seal(key, 0, 0, pack("a", None, DEFAULT_CODEC, b""))
    assert subject.read(*key) == core.DECLINED
    assert subject.get("a", 1, False) == subject.get("a", 1, True) == subject.load("a", 1) == core.DECLINED
    assert subject.put("a", None, b"", 1, 1, None, 1) == core.DECLINED
    assert subject.exchange(entry, None, None, b"", 1, None, DESTROYED, False, 1) == core.DECLINED
    assert subject.touch("a", 1, 1) == subject.drop("a", False, 1) == core.DECLINED
    subject.close()


@needs_core
def test_load_takes_a_damaged_body_apart_as_python_does(seed: int) -> None:
    """The checksum of the record is right, as of one that a faulty program has written."""
    random = Random(seed)
    with engine("c"), Store(memory=2**16, check_period=None, clock=faults.Clock()) as store:
        store.get("none")  # claims a row of counters
        subject, key, now = store.arena.file.core, key_of(b"a"), faults.Clock.now
        assert subject is not None
        outcomes = Counter[str]()
        for _ in range(2000):
            body = bytearray(
                pack("a", random.choice([None, "x", "eve\u0301"]), random.choice(["msgpack", "json"]), b"")
            )
            body += random.randbytes(random.randrange(30))
            for _ in range(random.randrange(3)):
                body[random.randrange(min(len(body), 10))] = random.choice([0, 1, 5, 255, random.randrange(256)])
            body = body[: random.choice([len(body), len(body), random.randrange(len(body))])]
            store._locked(store.arena, store._write_locked, key, seal(key, 0, now, bytes(body), 1), 10**12, None)
            loaded = subject.load("a", now)
            assert not isinstance(loaded, int)
            assert loaded is not None
            expected: tuple[bytes | None, str | None] = None, None
            with suppress(SerializationError):
                expected = content_of(bytes(body), DEFAULT_CODEC)
            assert loaded[2:] == expected, body
            outcomes["damaged" if expected[0] is None else "whole"] += 1
        assert outcomes["damaged"] > 100 < outcomes["whole"]


@needs_core
def test_it_counts_in_rows_only() -> None:
    with engine("c"), Store(memory=2**16, check_period=None) as store:
        subject, table = store.arena.file.core, store.arena.table
        assert subject is not None
        for wrong in (-1, 2**64, STATE, JOURNAL // CELL, table.key_low - 1, table.key_low, 2**63):
            with pytest.raises(ValueError, match="row"):
                subject.count_in(wrong)
        subject.count_in(2 * PAGE // CELL)
        subject.count_in(0)


@needs_core
def test_it_refuses_sizes_that_do_not_fit() -> None:
    """Also sizes whose sums and products overflow, wherever they come from."""
    with engine("c"), Store(memory=2**16, check_period=None) as store:
        subject = store.arena.file.core
        assert subject is not None
        make = type(subject)
        numbers = core.numbers(store.arena.geometry, store.arena.table)
        size = store.arena.geometry.size
    make(bytearray(size), MUTEX, DEPTH_WORD, LOCKED_ONCE, numbers)
    with pytest.raises(ValueError, match="fit"):
        make(bytearray(size - CELL), MUTEX, DEPTH_WORD, LOCKED_ONCE, numbers)
    for place in range(len(numbers)):
        for wrong in (0, 2**32, 2**40 - 1, 2**56, 2**58, 2**61, 2**63, 2**64 - 1, 2**64 - numbers[place]):
            with pytest.raises(ValueError, match="fit"):
                make(bytearray(size), MUTEX, DEPTH_WORD, LOCKED_ONCE, (*numbers[:place], wrong, *numbers[place + 1 :]))


def test_a_change_of_the_calls_is_another_version() -> None:
    """If this fails: raise the version in core.h and core.py, then write both numbers here."""
    calls = zlib.crc32(Path(core.__file__).with_name("_core.pyi").read_bytes())
    assert (core._INTERFACE[0], f"{calls:08x}") == (4, "05835ce4")


@on_each_engine
def test_a_session_that_is_too_large_is_refused_before_its_record_is_built() -> None:
    payload = Raw(encode({"a": bytes(2**23)}))
    with Store(memory=2**25, max_session=1000, check_period=None) as store:
        tracemalloc.start()
        try:
            with pytest.raises(RecordTooLarge):
                store.set("a", payload, ttl=60)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 1.5 * 2**23, "one copy: the payload as bytes"
