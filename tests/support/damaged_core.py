"""The C core on damaged arenas: `python damaged_core.py CORE SEED COUNT`, with a sanitizer in the core at CORE.

The arena is in a heap block of its own, so that AddressSanitizer sees each access outside of it.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import built_core
import fault_injection as faults

from shmstore.codec.ids import key_of
from shmstore.contract import KEEP
from shmstore.engine import core
from shmstore.engine._core import Core
from shmstore.engine.header import SETS
from shmstore.engine.layout import CELL, JOURNAL_CELLS, MUTEX, SLOT, STATE_CELLS
from shmstore.engine.mutex import DEPTH_WORD, LOCKED_ONCE, Mutex
from shmstore.store.store import Store

SIDS = ["a", "b", "c", "d", "scattered", "r0", "r1", "r3", "t", "old 1", "gap 1", "new", "none"]


def interesting_cells(store: Store) -> list[int]:
    """Return the cells that point to others: those of the header, of slots and indexes, and the heads of runs."""
    table, geometry = store.arena.table, store.arena.geometry
    slots = range(table.key_low, table.buckets)
    heads = range(
        table.heads, table.heads + (geometry.blocks + 1) * geometry.block_size // CELL, geometry.block_size // CELL
    )
    state = range(STATE_CELLS, STATE_CELLS + 96)
    return [*state, *range(512, 512 + JOURNAL_CELLS, 8), *slots, *range(table.buckets, table.heads, 2), *heads]


def operate(subject: Core, rnd: random.Random, now: int) -> Counter[str]:
    """Use every operation of the core; return how often it refused."""
    results: Counter[str] = Counter()

    def note(result: object) -> None:
        results[str(result) if isinstance(result, int) and result < 0 else "done"] += 1

    for sid in rnd.sample(SIDS, 6):
        key = key_of(sid.encode())
        entry = subject.read(*key)
        note(entry)
        note(subject.get(sid, now, True))
        note(subject.load(sid, now))
        if entry is not None and not isinstance(entry, int):
            new, owner = rnd.choice([None, "other"]), rnd.choice([None, KEEP, "ring"])
            size = rnd.choice([0, 100, 3000])
            note(subject.exchange(entry, new, owner, bytes(size), 1, None, SETS, True, now))
        owner = rnd.choice([None, "ring", "ada", "else"])
        note(
            subject.put(
                sid, owner, bytes(rnd.choice([1, 300, 2000, 9000])), 10**12, 1, rnd.choice([None, True, False]), now
            )
        )
        note(subject.touch(sid, 10**12, now))
        if rnd.random() < 0.3:
            note(subject.drop(sid, True, now))
    return results


def main() -> None:
    path, seed, count = sys.argv[1:]
    module = built_core.load(Path(path))
    rnd = random.Random(int(seed))
    results: Counter[str] = Counter()
    for full in (False, True):
        store = faults.populated(full)
        store.get("none")
        image, numbers, row = (
            bytes(store.arena.file.memory),
            core.numbers(store.arena.geometry, store.arena.table),
            store.arena.counters._row,
        )
        cells = interesting_cells(store)
        for number in range(int(count) // 2):
            memory = bytearray(image)
            mutex = Mutex(memory, MUTEX, fresh=True)  # type: ignore[arg-type]
            for _ in range(rnd.choice([1, 1, 1, 2, 5]) if number else 0):
                cell, value = rnd.choice(cells), memoryview(memory).cast("Q")
                match rnd.randrange(4):
                    case 0:
                        value[cell] = rnd.choice([0, 1, 2**32 - 1, 2**63, 2**64 - 1, rnd.getrandbits(64)])
                    case 1:
                        value[cell] = rnd.randrange(numbers[0]) * SLOT  # another slot
                    case _:
                        value[cell] ^= 1 << rnd.randrange(64)
                value.release()
            subject = module.Core(memory, MUTEX, DEPTH_WORD, LOCKED_ONCE, numbers)
            subject.count_in(row)
            results += operate(subject, rnd, store.options.clock())
            assert bytes(memory[:MUTEX]) == image[:MUTEX], "the identity was overwritten"
            assert not mutex.acquire(-1), "it kept the lock"
            mutex.release()
            del subject, mutex
    assert results["done"] > 0
    assert results[str(core.DECLINED)] > 0
    print(dict(results))


if __name__ == "__main__":
    main()
