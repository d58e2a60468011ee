"""The statistics of a store, read from its arena."""

from __future__ import annotations

import time

from shmstore.contract import Stats
from shmstore.engine import header as at
from shmstore.engine.arena import Arena
from shmstore.system.clock import NS

__all__ = ["stats_of"]


def stats_of(arena: Arena, now: int) -> Stats:
    """Return the statistics of an arena at a time of its clock."""
    cells, geometry = arena.cells, arena.geometry
    hits, misses = arena.counters.reads()
    waited, waits = arena.counters.waits()
    taken = max(cells[at.USED_BLOCKS] / geometry.blocks, cells[at.SESSIONS] / geometry.slots)
    return Stats(
        sessions=cells[at.SESSIONS],
        owned=arena.table.count_owned(),
        bytes=round(taken * geometry.size),
        memory=geometry.size,
        gets=hits + misses,
        hits=hits,
        misses=misses,
        sets=cells[at.SETS],
        touches=cells[at.TOUCHES],
        destroyed=cells[at.DESTROYED],
        expired=cells[at.EXPIRED],
        evicted=cells[at.EVICTED] + cells[at.EVICTED_OWNED],
        evicted_owned=cells[at.EVICTED_OWNED],
        displaced=cells[at.DISPLACED],
        cleared=cells[at.CLEARED],
        dispose_errors=cells[at.DISPOSE_ERRORS],
        corrupt=cells[at.CORRUPT],
        refused=cells[at.REFUSED],
        rebuilds=cells[at.REBUILDS],
        lock_waits=sum(waits),
        lock_waited=waited / NS,
        server_restarts=cells[at.RESTARTS],
        server_pid=cells[at.SERVER_PID],
        server_uptime=max(0, now - (cells[at.SERVER_STARTED] or now)) / NS if cells[at.SERVER_PID] else 0.0,
        snapshot_age=max(0.0, time.time() - cells[at.SNAPSHOT] / NS) if cells[at.SNAPSHOT] else None,
        snapshot_failures=cells[at.SNAPSHOT_FAILURES],
        engine="python" if arena.file.core is None else "c",
    )
