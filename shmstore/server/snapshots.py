"""Loads and saves the snapshot of a store: when its server starts, periodically, on request, and at the exit."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from shmstore import snapshot
from shmstore.codec.ids import key_of
from shmstore.contract import ArenaStore
from shmstore.engine.arena import Arena
from shmstore.engine.header import EVENTS, SNAPSHOT, SNAPSHOT_FAILURES, SNAPSHOT_PATH, TICK
from shmstore.errors import ShmStoreError, SnapshotError, StoreUnavailable
from shmstore.options import Options, seconds
from shmstore.system.throttle import Throttle
from shmstore.transfer.snapshot_file import set_aside

__all__ = ["Snapshots", "obstacle", "restore"]

log = logging.getLogger("shmstore")


class Snapshots:
    """
    Saves the sessions of a store to the file in its options, periodically and on request.

    Args:
        name: The store's name, for the log.
        store: The store.
    """

    def __init__(self, name: str, store: ArenaStore) -> None:
        self._name = name
        self._store = store
        self._path: str | None = None
        self._saving = threading.Lock()
        self._changing = threading.Lock()  # guards the path, and the outcome of the saves to it
        self._stop = threading.Event()
        self._final_save: threading.Thread | None = None
        self._saved_state: object = None  # the store's state at the last successful save
        self._final_state: object = None  # the same at the last attempt before an exit
        self._save_errors = Throttle()
        self._loaded: set[str] = set()  # paths of snapshots that contain nothing that the store lacks

    def apply_options(self, options: Options) -> None:
        """Change the path and the period of the snapshots."""
        path = None if options.snapshot is None else os.path.abspath(options.snapshot)
        period = 0.0 if options.snapshot_period is None else seconds(options.snapshot_period, "snapshot_period")
        with self._changing:
            changed = path != self._path
            if changed:
                self._path, self._saved_state, self._final_state = path, None, None
                self._publish_time(0 if path is None else _modified_ns(path))
        if changed and path is not None and (problem := obstacle(path)):
            log.error("store %r: no snapshot can be saved: %s", self._name, problem)
            self._count_failure(path)
        self._stop.set()
        if path is not None and (not self._is_loaded(path) or period > 0):
            stop = self._stop = threading.Event()
            threading.Thread(target=self._run, args=(stop, period), name="shmstore-snapshot", daemon=True).start()

    def _run(self, stop: threading.Event, period: float) -> None:
        with suppress(StoreUnavailable):  # the server exits, and has closed the store
            with self._saving:
                if (path := self._path) is not None:
                    self._load_once(path)
            while period > 0 and not stop.wait(min(period, threading.TIMEOUT_MAX)):
                self.save()

    def _is_loaded(self, path: str) -> bool:
        """Return whether a server of this memory has loaded a snapshot at this path, or saved one there."""
        if self._store.arena.cells[SNAPSHOT_PATH] == _digest(path):
            self._loaded.add(path)
        return path in self._loaded

    def _load_once(self, path: str) -> bool:
        """
        Load a snapshot that the memory was created without, and return whether it may be overwritten.

        After a reboot, for example, a cron job that does not set the option may be the first process to use the store.
        """
        if not self._is_loaded(path):
            try:
                _read(self._name, path, lambda: snapshot.load(self._store, path, of=self._name))
            except ShmStoreError as exc:
                log.error("store %r: the snapshot was not loaded: %s", self._name, exc)  # noqa: TRY400
                self._count_failure(path)
                return False
            self._loaded.add(path)
        self._store.arena.cells[SNAPSHOT_PATH] = _digest(path)
        return True

    def save(self) -> None:
        """
        Save now, unless the file exists and nothing has changed since the last save.

        Errors are logged and not raised; the previous snapshot stays.
        """
        with self._saving:
            path = self._path
            if path is None or not self._load_once(path):
                return
            state, wall = self._state(), time.time_ns()
            if state == self._saved_state and os.path.exists(path):
                self._set_saved(path, state, wall)
                return
            started = time.monotonic()
            try:
                count = snapshot.save(self._store, path)
            except ShmStoreError as exc:
                if self._save_errors.due(str(exc)):
                    log.error("store %r: the snapshot was not saved: %s", self._name, exc)  # noqa: TRY400
                self._count_failure(path)
            except Exception:
                log.exception("store %r: the snapshot was not saved", self._name)
                self._count_failure(path)
            else:
                self._save_errors.reset()
                self._set_saved(path, state, wall)
                log.info("store %r: saved %d sessions in %.1f s", self._name, count, time.monotonic() - started)

    def is_saved(self, on_done: Callable[[], None]) -> bool:
        """
        Return whether the server may exit without another save; otherwise start one in a thread.

        A state that cannot be saved is tried once more before the exit, and then given up.

        Args:
            on_done: Called in that thread when the save has ended.
        """
        done = self._state() in (self._saved_state, self._final_state) and not self._saving.locked()
        if self._path is None or done:
            return True
        if self._final_save is None or not self._final_save.is_alive():
            self._final_save = threading.Thread(
                target=self._save_before_exit, args=(on_done,), name="shmstore-snapshot", daemon=True
            )
            self._final_save.start()
        return False

    def _save_before_exit(self, on_done: Callable[[], None]) -> None:
        self._final_state = self._state()
        self.save()
        on_done()

    def _set_saved(self, path: str, state: object, wall: int) -> None:
        """Record that a snapshot holds this state, unless the options have named another file meanwhile."""
        with self._changing:
            if path == self._path:
                self._saved_state = state
                self._publish_time(wall)

    def _publish_time(self, wall: int) -> None:
        """Store the time of the snapshot's contents in the arena, for `Store.stats`; 0: no snapshot exists."""
        cells = self._store.arena.cells
        cells[SNAPSHOT], cells[SNAPSHOT_FAILURES] = wall, 0

    def _count_failure(self, path: str) -> None:
        with self._changing:
            if path == self._path:
                self._store.arena.counters.add(SNAPSHOT_FAILURES)

    def _state(self) -> object:
        arena = self._store.arena
        return arena, arena.cells[TICK], arena.cells[EVENTS.start : EVENTS.stop].tolist()


def _digest(path: str) -> int:
    """Return a digest of a path that fits in a cell."""
    return key_of(os.fsencode(path))[0]


def _modified_ns(path: str) -> int:
    """Return when a file was last modified, in nanoseconds of the wall clock; 0 if it does not exist."""
    with suppress(OSError):
        return os.stat(path).st_mtime_ns
    return 0


def obstacle(path: str) -> str | None:
    """Return why no snapshot can be saved at this path, as far as that can be found out without writing."""
    directory = os.path.dirname(path)
    if os.path.isdir(path):
        return f"{path} is a directory; name a file in it"
    if not os.path.isdir(directory):
        return f"there is no directory {directory}; create it"
    if not os.access(directory, os.W_OK | os.X_OK):
        return (
            f"{directory} cannot be written in by uid {os.geteuid()}; change its permissions, or name another directory"
        )
    return None


def restore(name: str, arena: Arena, options: Options, progress: Callable[[int], object]) -> None:
    """Restore the snapshot, if it exists, into an empty arena that no process has mapped yet."""
    if options.snapshot is None:
        return
    path = os.path.abspath(options.snapshot)
    _read(name, path, lambda: snapshot.restore(arena, path, lambda done, _: progress(done), of=name))
    arena.cells[SNAPSHOT_PATH] = _digest(path)


def _read(name: str, path: str, read: Callable[[], int]) -> None:
    started = time.monotonic()
    try:
        count = read()
    except FileNotFoundError:
        log.info("store %r: there is no snapshot at %s yet", name, path)
    except SnapshotError as exc:
        aside = set_aside(path, name)
        kept = f"; it is kept as {aside}" if aside else ""
        log.error("store %r begins without its snapshot: %s%s", name, exc, kept)  # noqa: TRY400
    else:
        log.info("store %r: restored %d sessions from %s in %.1f s", name, count, path, time.monotonic() - started)
