"""The check that threads exclude each other, for each kind of lock of an arena."""

from __future__ import annotations

import time

from shmstore.engine.arena import Arena
from shmstore.testing.base import at_once

_TURNS, _THREADS = 300, 4


def check_mutual_exclusion(arena: Arena) -> None:
    """Assert that the lock of the arena lets one thread in at a time, and each thread in the end."""
    inside, entered, overlaps = [], [], []

    def work() -> None:
        for _ in range(_TURNS):
            try:
                arena.lock(30)
                inside.append(1)
                entered.append(1)
                if len(inside) > 1:
                    overlaps.append(1)
                time.sleep(0)  # lets another thread try
                inside.pop()
            finally:
                arena.unlock()

    at_once([work] * _THREADS)
    assert (len(entered), overlaps) == (_TURNS * _THREADS, [])
