"""What a store tells about a session and about itself."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple, Self

from shmstore.engine import header as at
from shmstore.engine.arena import Arena
from shmstore.store.expiry import NS


class Loaded(NamedTuple):
    """
    A session as it is stored, undecoded.

    Attributes:
        payload: One MessagePack map; the store's ``codec`` reads it.
        created: Seconds since it was created.
        idle: Seconds since it was last used.
        remaining: Seconds it has left to live.
        owner: Its owner, None if it has none.
    """

    payload: bytes
    created: float
    idle: float
    remaining: float
    owner: str | None


@dataclass(frozen=True)
class Stats:
    """
    What a store holds and what happened to it since its memory was made.

    Attributes:
        sessions: Sessions stored, expired ones that are not pruned yet included.
        owned: Those of them that have an owner.
        bytes: Bytes of ``memory`` that are taken, by records or by places for sessions, whichever is scarcer.
        memory: Bytes of shared memory in all.
        gets: Reads that count as use: ``hits`` + ``misses``.
        hits: Reads that found their session.
        misses: Reads that found none, or an expired one.
        sets: Sessions written: created, overwritten, updated, renamed.
        touches: Lives renewed without writing.
        destroyed: Sessions removed on request.
        expired: Expired sessions removed.
        evicted: Live sessions removed to make room; ``evicted_owned`` of them had an owner.
        evicted_owned: See ``evicted``.
        displaced: Live sessions removed because their owner has ``max_per_owner`` newer ones; not among ``evicted``.
        cleared: Sessions removed by ``clear``.
        dispose_errors: Exceptions that ``dispose`` raised.
        corrupt: Times that a record, or a value in one, was left out because it cannot be read.
        refused: Writes refused because the session was too large.
        rebuilds: Times that damage was found, and what was whole carried over to another file.
        lock_waits: Times that somebody had to wait for the lock.
        lock_waited: Seconds waited for it, all together.
        server_restarts: Server processes that took over from one that had died; one that ends on purpose is none.
        server_pid: The process that prunes.
        server_uptime: Seconds since that began; 0 once it has ended on purpose.
        snapshot_age: Seconds since the snapshot was saved, or found to hold all that is stored; None: there is none.
        snapshot_failures: Attempts to save it that have failed since then; 0: the last one did not.
    """

    sessions: int
    owned: int
    bytes: int
    memory: int
    gets: int
    hits: int
    misses: int
    sets: int
    touches: int
    destroyed: int
    expired: int
    evicted: int
    evicted_owned: int
    displaced: int
    cleared: int
    dispose_errors: int
    corrupt: int
    refused: int
    rebuilds: int
    lock_waits: int
    lock_waited: float
    server_restarts: int
    server_pid: int
    server_uptime: float
    snapshot_age: float | None = None
    snapshot_failures: int = 0

    @classmethod
    def of(cls, arena: Arena, now: int) -> Self:
        """Read them from an arena at a time of its clock."""
        arena.keep_up()  # who only looks at the numbers follows nobody by itself
        cells, geometry = arena.cells, arena.geometry
        hits, misses = arena.reads()
        waited, waits = arena.waits()
        taken = max(cells[at.USED_BLOCKS] / geometry.blocks, cells[at.SESSIONS] / geometry.slots)
        return cls(
            sessions=cells[at.SESSIONS],
            owned=arena.owned(),
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
        )
