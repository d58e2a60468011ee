"""
The sessions of a store in a file that survives a reboot.

A snapshot is fuzzy: each session is whole, and as it was at some moment while the snapshot was taken. No other process
waits for it.
"""

from __future__ import annotations

import logging
import os

from shmstore.contract import ArenaStore
from shmstore.engine.arena import Arena
from shmstore.errors import SnapshotError
from shmstore.store.endpoint import MemoryEndpoint, UnmappedArena
from shmstore.transfer.copy import DAMAGED, FULL, Progress, Sink, copy, quiet
from shmstore.transfer.snapshot_file import Contents, SnapshotSource, writing

__all__ = ["Contents", "describe", "load", "save"]

log = logging.getLogger("shmstore")


def save(store: ArenaStore, path: str | os.PathLike[str], progress: Progress = quiet) -> int:
    """
    Write all live sessions of a store to a file, which appears whole or not at all, and return how many.

    Args:
        store: A store of this process, or a proxy.
        path: The file. A snapshot of a store of this name is replaced. Only this user can read the file.
        progress: Called now and then with how many are written, and of how many.

    Raises:
        SnapshotError: The file cannot be written, or something else is there, another store's snapshot for example; or
            more sessions cannot be read than can, because the memory is damaged. The file that is there stays.
        StoreTimeout: A session was being changed for too long: its writer is stopped.
    """
    name = store.arena.file.name
    with writing(path, name) as sink:
        copied = copy(MemoryEndpoint(store), sink, progress)
        damaged = len(copied.reasons.get(DAMAGED, ()))
        if damaged > copied.copied:  # the snapshot before has probably more
            text = f"{damaged} of {copied.total} sessions are damaged, and cannot be saved: the snapshot before stays"
            raise SnapshotError(f"{text}; shmstore check {name} tells more")
        if damaged:
            log.error("store %r: %d of %d sessions are damaged, and cannot be saved", name, damaged, copied.total)
    return copied.copied


def load(store: ArenaStore, path: str | os.PathLike[str], progress: Progress = quiet, *, of: str | None = None) -> int:
    """
    Add the sessions of a snapshot to a store that may be in use, and return how many were stored.

    If both have a session, the one that was used more recently is kept, and the store's if both were used at the same
    time. A session that a request of its browser has ended, or given another id, in the last 30 seconds stays gone. No
    live session is evicted: if not all fit, those with an owner are stored first, then the most recently used, and of
    one owner no more than ``max_per_owner`` allows. The sessions that are stored keep the time of their last use;
    eviction takes them after all others. The time since the snapshot was taken counts as life. Each session counts in
    ``stats().sets``.

    Args:
        store: As for `save`.
        path: The file.
        progress: Called now and then with how many are done, and of how many.
        of: The name of the store that the snapshot must belong to; None: any store.

    Raises:
        FileNotFoundError: There is no such file.
        SnapshotError: The file is damaged, not a snapshot, another store's, or another user could have written it.
            Nothing was changed.
    """
    with SnapshotSource(path, progress, of) as source:
        return _added(source, MemoryEndpoint(store), progress, store.arena.file.name)


def restore(arena: Arena, path: str | os.PathLike[str], progress: Progress = quiet, *, of: str | None = None) -> int:
    """Put the sessions of a snapshot into an empty arena that no other process has mapped yet. See `load`."""
    with SnapshotSource(path, progress, of) as source:
        return _added(source, UnmappedArena(arena), progress, arena.file.name)


def describe(path: str | os.PathLike[str]) -> Contents:
    """Verify a snapshot, and return what it holds; raises as `load`."""
    with SnapshotSource(path) as source:
        return source.contents


def _added(source: SnapshotSource, sink: Sink, progress: Progress, name: str) -> int:
    """Copy, and warn of sessions that did not fit; return how many were stored."""
    copied = copy(source, sink, progress)
    if left := len(copied.reasons.get(FULL, ())):
        log.warning("store %r: %d of %d sessions in %s find no room", name, left, copied.total, source.label)
    return copied.copied
