"""The schedule of a store's snapshot: when it is saved, and when it is loaded."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from shmstore import snapshot
from shmstore.contract import ArenaStore
from shmstore.engine.arena import Arena
from shmstore.engine.header import EVENTS, SNAPSHOT, SNAPSHOT_FAILURES, TICK
from shmstore.errors import ShmStoreError, SnapshotError
from shmstore.options import Options, seconds
from shmstore.system.throttle import Throttle
from shmstore.transfer.snapshot_file import set_aside

__all__ = ["Keeper", "obstacle", "restore"]

log = logging.getLogger("shmstore")


class Keeper:
    """
    Saves a store's sessions to the file that its options name, periodically and when it is asked to.

    Args:
        name: Of the store, for the log.
        store: The store.
    """

    def __init__(self, name: str, store: ArenaStore) -> None:
        self._name = name
        self._store = store
        self._path: str | None = None
        self._saving = threading.Lock()
        self._stop = threading.Event()
        self._last: threading.Thread | None = None
        self._seen: object = None  # what the store was when it was last saved
        self._tried: object = None  # and when that was tried in order to leave
        self._failing = Throttle()
        self._known: set[str | None] = set()  # the paths whose snapshot is older than what the store holds

    def obey(self, options: Options) -> None:
        """Save where and as often as these say, from now on."""
        path = None if options.snapshot is None else os.path.abspath(options.snapshot)
        period = 0.0 if options.snapshot_period is None else seconds(options.snapshot_period, "snapshot_period")
        if path != self._path:
            self._path, self._seen, self._tried = path, None, None
            self._note(0 if path is None else _written(path))
            if path is not None and (problem := obstacle(path)):
                log.error("store %r: no snapshot can be saved: %s", self._name, problem)
                self._note_failure()
        if not self._known:
            self._known = {None, path}  # the server begins: new memory has begun with it, other memory is newer
        self._stop.set()
        if path is not None and (period > 0 or path not in self._known):
            stop = self._stop = threading.Event()
            threading.Thread(target=self._run, args=(stop, period), name="shmstore-snapshot", daemon=True).start()

    def _run(self, stop: threading.Event, period: float) -> None:
        with self._saving:
            self._catch_up(self._path)
        while period > 0 and not stop.wait(min(period, threading.TIMEOUT_MAX)):
            self.save()

    def _catch_up(self, path: str | None) -> bool:
        """
        Add the sessions of a snapshot that was configured while the server runs; return whether it may be replaced.

        The store may have begun without it: started by a cron job after a reboot, say.
        """
        if path not in self._known and path is not None:
            try:
                _read(self._name, path, lambda: snapshot.load(self._store, path, of=self._name))
            except ShmStoreError as exc:
                log.error("store %r: the snapshot was not loaded: %s", self._name, exc)  # noqa: TRY400
                self._note_failure()
                return False
            self._known.add(path)
        return True

    def save(self) -> None:
        """
        Save now, unless nothing has changed since and the file is there.

        What goes wrong is logged: the snapshot before stays.
        """
        with self._saving:
            path = self._path
            if path is None or not self._catch_up(path):
                return
            now, wall = self._state(), time.time_ns()
            if now == self._seen and os.path.exists(path):
                self._note(wall)
                return
            begun = time.monotonic()
            try:
                count = snapshot.save(self._store, path)
            except ShmStoreError as exc:
                if self._failing.due(str(exc)):
                    log.error("store %r: the snapshot was not saved: %s", self._name, exc)  # noqa: TRY400
                self._note_failure()
            except Exception:
                log.exception("store %r: the snapshot was not saved", self._name)
                self._note_failure()
            else:
                self._seen = now
                self._failing.reset()
                self._note(wall)
                log.info("store %r: saved %d sessions in %.1f s", self._name, count, time.monotonic() - begun)

    def saved(self, then: Callable[[], None]) -> bool:
        """
        Return whether nothing is left to be saved; else that is begun, and ``then`` is called when it is over.

        What cannot be saved is tried once more, and then given up.
        """
        if self._path is None or (self._state() in (self._seen, self._tried) and not self._saving.locked()):
            return True
        if self._last is None or not self._last.is_alive():
            self._last = threading.Thread(target=self._save_last, args=(then,), name="shmstore-snapshot", daemon=True)
            self._last.start()
        return False

    def _save_last(self, then: Callable[[], None]) -> None:
        self._tried = self._state()
        self.save()
        then()

    def _note(self, when: int) -> None:
        """Tell all processes that the snapshot holds what was stored at that time; 0: there is no snapshot."""
        cells = self._store.arena.cells
        cells[SNAPSHOT], cells[SNAPSHOT_FAILURES] = when, 0

    def _note_failure(self) -> None:
        self._store.arena.cells[SNAPSHOT_FAILURES] += 1

    def _state(self) -> object:
        arena = self._store.arena
        return arena, arena.cells[TICK], arena.cells[EVENTS.start : EVENTS.stop].tolist()


def _written(path: str) -> int:
    """Return when a file was written, in nanoseconds of the wall clock; 0 if there is none."""
    with suppress(OSError):
        return os.stat(path).st_mtime_ns
    return 0


def obstacle(path: str) -> str | None:
    """Return why nothing can be saved there, as far as that can be seen without writing."""
    directory = os.path.dirname(path)
    if os.path.isdir(path):
        return f"{path} is a directory; name a file in it"
    if not os.path.isdir(directory):
        return f"there is no directory {directory}; make it"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory} cannot be written in by uid {os.geteuid()}; let it, or name another one"
    return None


def restore(name: str, arena: Arena, options: Options, progress: Callable[[int], object]) -> None:
    """Put the sessions of the snapshot, if it exists, into an empty arena that no other process has mapped yet."""
    if options.snapshot is None:
        return
    path = os.path.abspath(options.snapshot)
    _read(name, path, lambda: snapshot.restore(arena, path, lambda done, _: progress(done), of=name))


def _read(name: str, path: str, read: Callable[[], int]) -> None:
    begun = time.monotonic()
    try:
        count = read()
    except FileNotFoundError:
        log.info("store %r: there is no snapshot at %s yet", name, path)
    except SnapshotError as exc:
        aside = set_aside(path, name)
        kept = f"; it is kept as {aside}" if aside else ""
        log.error("store %r begins without its snapshot: %s%s", name, exc, kept)  # noqa: TRY400
    else:
        log.info("store %r: restored %d sessions from %s in %.1f s", name, count, path, time.monotonic() - begun)
