"""A writer that stops itself (SIGSTOP) inside its mutations: `python stopping_child.py PATH SEED KEYS`.

Before each operation it prints the ids that this may change; a stop can come at any step of it.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys

import stress_child
from fault_injection import Steps, stepping

from shmstore.store.store import Store

SIZES = 30, 300, 3000, 64 * 1024


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def change(store: Store, rnd: random.Random, keys: int, sequence: int) -> None:
    """Change one or two sessions so that all exist again afterwards; evict and expire nothing."""
    key = rnd.randrange(keys)
    sid, size = str(key), rnd.choice(SIZES)
    session = stress_child.session_of(key, sequence, size)
    kind = rnd.choice(["set", "set", "update", "touch", "replace by another", "away and back"])
    away = f"away {os.getpid()}"
    print(sid, away, sep="\t", flush=True)
    if kind == "set":
        store.set(sid, session, ttl=math.inf, owner="ada" if sequence % 2 else None)
    elif kind == "update":
        store.update(sid, session)
    elif kind == "touch":
        store.touch(sid, ttl=math.inf)
    elif kind == "away and back":
        store.rename(sid, away)
        store.rename(away, sid)
    else:  # the slot and the blocks pass to another session and back
        store.destroy(sid)
        store.set(away, stress_child.session_of(-1, sequence, size), ttl=math.inf)
        store.destroy(away)
        store.set(sid, session, ttl=math.inf)


def main() -> None:
    path, seed, keys = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rnd = random.Random(seed)
    with stress_child.open_store(path) as store:
        steps = Steps(rnd.randrange(1, 60), stop)
        sequence = seed
        with stepping(store.arena, steps):
            while True:
                sequence += 1
                change(store, rnd, keys, sequence)
                if steps.count >= steps.chosen:
                    steps.chosen = steps.count + rnd.randrange(1, 60)


if __name__ == "__main__":
    main()
