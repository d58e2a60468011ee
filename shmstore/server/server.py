"""The server of a store once it runs: its event loop, and what its clients can ask of it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.managers import Server
from typing import Any

from shmstore.engine.arena import Arena
from shmstore.engine.core import describe
from shmstore.engine.header import HEARTBEAT, MOVED, RESTARTS, SERVER_PID, SERVER_STARTED, SESSIONS, STATE
from shmstore.engine.layout import MIN_MEMORY, ArenaDamaged, Geometry, remove_abandoned
from shmstore.engine.mapping import ArenaReplaced
from shmstore.errors import ConfigError, ShmStoreError, StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.rpc import SERVER, SERVER_METHODS, STORE, STORE_METHODS, request_limit
from shmstore.options import Options
from shmstore.server.listener import SHORT_IDLE_TIMEOUT, Client, Listener
from shmstore.server.single_instance import SingleInstance
from shmstore.server.snapshots import Snapshots, obstacle
from shmstore.store.holder import ArenaHolder, Upkeep
from shmstore.store.live_options import OptionsDamaged
from shmstore.store.store import Store
from shmstore.system.clock import boottime_ns
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")

_HEARTBEAT_INTERVAL = 1.0  # seconds
_FAST_HEARTBEAT_INTERVAL = 0.25  # while a process waits for a snapshot, or for the exit of this server


class _ServerUpkeep(Upkeep):
    """The upkeep of the server's arena, which no other process replaces while this one is the server."""

    def reopen(self, store: ArenaHolder) -> Arena:
        arena = store._arena
        try:
            arena.lock(store._timeout)  # if the file is still at its path, only `STATE` was damaged, and is restored
        except ArenaReplaced as replaced:
            raise StoreUnavailable("another server has replaced this one") from replaced
        finally:
            arena.unlock()
        return arena

    def repair(self, store: ArenaHolder, arena: Arena, damage: ArenaDamaged) -> None:
        store.repair(arena, damage, lambda _: _beat(arena))


class StoreServer(Server):
    """
    Serves one store to the processes of one user.

    `multiprocessing.managers.Server` dispatches the requests of a client (``serve_client``); `Listener` admits the
    clients. It is Python's own, because multiprocess, whose managers are the clients, would import dill.

    Args:
        files: The files of the store.
        lock: The descriptor of the single-instance lock.
        arena: The memory of the store.
        packed: The packed options.
    """

    # No method of the base class can be called by clients: no creation, no reference counts, no debug_info.
    public: list[str] = []  # noqa: RUF012
    fallback_mapping: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, files: StoreFiles, lock: int, arena: Arena, packed: bytes) -> None:
        # Not super().__init__(): it would listen at a path of 107 bytes at most, and authenticate with a key.
        self.files = files
        self.options = options = Options.of(**options_file.unpack(packed))
        self._packed = packed
        self.address = files.address
        self.stop_event = threading.Event()
        self.mutex = threading.Lock()  # guards options and the store made from them
        self.id_to_local_proxy_obj: dict[str, Any] = {}
        self.id_to_obj: dict[str, Any] = {SERVER: (self, SERVER_METHODS, None)}
        self._store = Store.over(arena, options, _ServerUpkeep())
        died = arena.cells[HEARTBEAT]  # the previous server
        self._store.publish_options()  # a repair may give the store another arena
        self.id_to_obj[STORE] = (self._store, STORE_METHODS, None)
        self._snapshots = Snapshots(files.name, self._store)
        self._save_requests: set[object] = set()  # one for each client that waits for a snapshot
        self._file_errors = Throttle()
        self._lock_holder, self._holder_reported = "", False  # at the last check of the store's lock
        self._listener = Listener(files, self._serve_until_closed, lambda: request_limit(self.arena))
        if died:
            self.arena.counters.add(RESTARTS)
        _beat(self.arena)  # from now on, 0 means that the server has exited on purpose
        self._instance = SingleInstance(files, lock)

    @property
    def arena(self) -> Arena:
        """The memory of the store."""
        return self._store.arena

    # -- requests of clients --------------------------------------------------------------------------------------

    def apply(self, packed: bytes, merge: bool) -> list[str]:
        """
        Change the options.

        Args:
            packed: The options, packed by `options_file.pack`.
            merge: Keep the current values of all other options; otherwise they get their defaults.

        Returns:
            The names of the options that take effect when the store gets another arena.

        Raises:
            ConfigError: No snapshot can be saved at another path; only without ``merge``. Nothing has changed.
            StoreUnavailable: The options cannot be saved for the next server. Nothing has changed.
        """
        given = options_file.unpack(packed)
        with self.mutex:
            options = Options.of(**{**self.options.given, **given} if merge else given)
            path = None if merge or options.snapshot == self.options.snapshot else options.snapshot
            if path is not None and (problem := obstacle(os.path.abspath(path))):
                raise ConfigError(f"no snapshot can be saved: {problem}")
            try:
                packed = options_file.pack(options.given)
                changed = options_file.save(self.files.options, packed)
            except OSError as exc:
                raise StoreUnavailable(
                    f"store {self.files.name!r} keeps the options it had: new ones cannot be saved: {exc.strerror}"
                ) from exc
            self.options, self._packed = options, packed
            self._store.change_options(options)
            self._snapshots.apply_options(options)
            if changed:
                names = ", ".join(sorted(options.given)) or "defaults only"
                log.info("store %r: options changed; given: %s", self.files.name, names)
            return waiting(self.arena, options)

    def repair(self, identity: Sequence[int], damage: str, options: bool) -> None:
        """
        Repair the memory for a process that has found damage.

        Args:
            identity: Device and inode of the damaged file. Nothing is done if the sessions are in another file.
            damage: The description of the damage.
            options: Whether the damage is in the cells of the options.

        Raises:
            StoreUnavailable: The memory cannot be repaired now.
        """
        arena = self.arena
        if arena.file.identity() == tuple(identity):
            self._store._upkeep.repair(self._store, arena, (OptionsDamaged if options else ArenaDamaged)(damage))

    def release(self) -> None:
        """
        Shorten the idle timeout for a client that exits, because often no other client follows.

        The snapshot is saved before the answer: in a container, all processes may be killed right after it.
        """
        self._save_snapshot()
        self._listener.idle_timeout = SHORT_IDLE_TIMEOUT
        self._listener.wake()

    def shutdown(self) -> None:  # type: ignore[override]
        """Save the snapshot, and exit after the answer."""
        self._save_snapshot()
        self.stop_event.set()
        self.arena.cells[SERVER_STARTED] = 0  # tells processes that still use the arena not to start another server
        self._listener.wake()

    def _save_snapshot(self) -> None:
        request = object()
        self._save_requests.add(request)
        self._listener.wake()
        try:
            self._snapshots.save()
        finally:
            self._save_requests.discard(request)

    def _serve_until_closed(self, client: Client) -> None:
        with suppress(SystemExit):  # raised by serve_client when the connection is closed
            self.serve_client(client)  # type: ignore[arg-type] # it has what is used of a connection

    # -- the event loop -------------------------------------------------------------------------------------------

    def serve_forever(self) -> None:
        """Serve until `shutdown` is called, or until no client has been connected for the idle timeout."""
        connections, cells = self._listener, self.arena.cells
        _beat(self.arena)
        cells[SERVER_PID] = os.getpid()
        cells[SERVER_STARTED] = boottime_ns()
        self._store.start_interval()
        self._snapshots.apply_options(self.options)
        log.info(
            "store %r: process %d serves %d sessions in %.1f MiB at %s; engine: %s",
            self.files.name, os.getpid(), cells[SESSIONS], self.arena.geometry.size / 2**20, self.files.path,
            describe(),
        )  # fmt: skip
        connections.add_listener(self._instance.listener)
        last_check = time.monotonic()
        # No `finally`: after an unexpected error, as after a kill, the files stay and another server takes over.
        while not self.stop_event.is_set():
            in_demand = self._save_requests or connections.awaiting_exit
            interval = _FAST_HEARTBEAT_INTERVAL if in_demand else _HEARTBEAT_INTERVAL
            connections.poll(min(interval, connections.idle_timeout / 2))
            now = time.monotonic()
            if now - last_check >= _HEARTBEAT_INTERVAL:
                last_check = now
                self._restore_files()
                if self.stop_event.is_set():
                    break
                self._check_lock()
                with suppress(ShmStoreError):
                    self._store.check_options()
                    self.arena.counters.flush()  # this process waits for the lock too, and no read flushes its counters
            _beat(self.arena)
            if connections.is_idle() and self._snapshots.is_saved(connections.wake):
                upgrade = "requested by a process of another version"
                self._exit(upgrade if connections.awaiting_exit else "no process is connected")
                return
        self._exit("on request")

    def _restore_files(self) -> None:
        """Restore the store's files if they were removed or replaced: the arena in use, the options, the socket."""
        files, instance = self.files, self._instance
        try:
            with suppress(OSError):
                remove_abandoned(files.path)
            intact = self.arena.file.is_at(files.arena) and os.path.lexists(files.options)
            if not (intact and instance.owns_socket() and instance.holds_lock()):
                self._log_file_error(
                    "store %r: its directory, or a file in it, was removed or replaced; the server restores it",
                    files.name,
                )
                files.create()
                # The lock is restored too: it prevents a second server, and it names the process to kill if it hangs.
                if not instance.retake_lock():
                    # Another server was started in the meantime. The processes that use this one change to that one.
                    log.error("store %r: process %s serves it now; this server exits", files.name, files.server())
                    self.arena.cells[STATE] = MOVED
                    self.stop_event.set()
                    return
                self._replace_files()
            with self.mutex:
                if options_file.save(files.options, self._packed):
                    log.warning("store %r: the file of its options was damaged, and is restored", files.name)
            self._file_errors.reset()
        except (ShmStoreError, OSError) as exc:
            self._log_file_error("store %r: its files in %s cannot be restored: %s", files.name, files.path, exc)

    def _replace_files(self) -> None:
        files, instance = self.files, self._instance
        with self.mutex:
            options_file.save(files.options, self._packed)  # first: a process that opens the arena reads them
        if not self.arena.file.is_at(files.arena):
            arena = self.arena
            self._store.move(progress=lambda _: _beat(arena))
        if not instance.owns_socket():
            old = instance.listener
            instance.listen()
            self._listener.remove_listener(old)
            self._listener.add_listener(instance.listener)

    def _check_lock(self) -> None:
        """Log the process that holds the store's lock if it is stopped at two checks in a row: all writers wait."""
        holder = self.arena.file.mutex.holder()
        if holder != self._lock_holder:
            self._lock_holder, self._holder_reported = holder, False
        elif "(T (" in holder and not self._holder_reported:
            log.error("store %r: %s holds the store's lock; continue or kill it", self.files.name, holder)
            self._holder_reported = True

    def _log_file_error(self, message: str, *arguments: object) -> None:
        """Log an error that may recur each second, when `_restore_files` tries again."""
        if self._file_errors.due(message):
            log.error(message, *arguments)

    def _exit(self, reason: str) -> None:
        owns_store = self._instance.holds_lock()  # otherwise another server runs
        self._instance.close()  # first, so that no client connects any more
        self._store.stop_interval()
        if owns_store:
            self.arena.cells[HEARTBEAT] = self.arena.cells[SERVER_PID] = 0
            rest = "its sessions are kept" if self.options.persist else "its sessions are removed (persist=False)"
            log.info("store %r: the server, process %d, exits: %s; %s", self.files.name, os.getpid(), reason, rest)
            if not self.options.persist:
                self.arena.mark_closed()  # tells processes that still use the arena not to write into it
                self.files.remove()
        self._listener.drain(0.5)  # the client of `shutdown` waits for its answer too


def _beat(arena: Arena) -> None:
    """Show the other processes that this server is alive."""
    arena.cells[HEARTBEAT] = boottime_ns()


def waiting(arena: Arena, options: Options) -> list[str]:
    """Return the names of the given options that need an arena of another size or division."""
    names = []
    # The sizes are compared and not the geometries: another `max` divides the same memory a little differently.
    if "memory" in options.given and abs(options.geometry.size - arena.geometry.size) >= MIN_MEMORY // 2:
        names.append("memory")
    # Only if another arena of this size has more slots: for a very large `max`, the memory may limit their number.
    if options.max is not None and arena.geometry.slots < min(options.max, _of_same_size(options, arena).slots):
        names.append("max")
    return names


def geometry_for(options: Options, arena: Arena) -> Geometry:
    """Return the geometry for these options; without a given ``memory``, the arena's size stays."""
    return options.geometry if "memory" in options.given else _of_same_size(options, arena)


def _of_same_size(options: Options, arena: Arena) -> Geometry:
    return Geometry.of_size(arena.geometry.size, None if options.length else options.max)
