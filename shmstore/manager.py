"""`StoreManager`: starts the server of a store, keeps it running, and stops it."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from contextlib import suppress
from functools import partial
from typing import Any

from shmstore.client import connection
from shmstore.client.pool import Pool
from shmstore.client.remote_proxy import RemoteProxy
from shmstore.client.store_proxy import StoreProxy, connect
from shmstore.client.watch import Watch, heartbeat
from shmstore.engine.arena import Arena
from shmstore.engine.header import HEARTBEAT, SERVER_STARTED
from shmstore.errors import ShmStoreError, StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.channel import Channel, Unresponsive
from shmstore.ipc.directory import StoreFiles, checked, lacking
from shmstore.ipc.rpc import SERVER
from shmstore.options import Options
from shmstore.store import private
from shmstore.store.trace import obey_environment
from shmstore.system.clock import Deadline, boottime_ns, deadline_in, past
from shmstore.system.import_dill import ProcessError, managers
from shmstore.system.platform import getegid, geteuid
from shmstore.system.processes import PROCESS_LIMIT_ADVICE, Process
from shmstore.system.signals import suppressing
from shmstore.urls import Location

__all__ = ["StoreManager", "StoreProxy", "connect"]

log = logging.getLogger("shmstore")

_EXIT_TIMEOUT = 1.0  # seconds for the exit of a server after the request
_SAVE_TIMEOUT = 60.0  # seconds for the snapshot that a server saves before it ends


class StoreManager(managers.BaseManager):  # type: ignore[misc] # multiprocess has no types
    """
    Controls the server process of a store.

    Each user has one server per store name. `start` starts it, or attaches to it if it runs. Attached processes and
    their forked children keep it running: it exits a few seconds after the last of them. While this manager is
    attached, a server that dies is restarted within a second. The sessions are in shared memory and survive.

    Args:
        name: ``"shop"``, ``"shm://shop"`` or ``"shm:///path/to/store-directory"``.
        options: The options of `Options`. They override the options of a running server.

    Raises:
        ConfigError: The name or an option is invalid.
    """

    def __new__(cls, name: str, /, **options: Any) -> StoreManager:
        default = options.get("directory") is None and not str(name).lower().startswith("shm:///")
        manager: StoreManager = super().__new__(
            _PrivateManager if cls is StoreManager and lacking(default=default) else cls
        )
        return manager

    def __init__(self, name: str, /, **options: Any) -> None:
        super().__init__(authkey=b"")  # not used: the server checks the uid of its clients
        obey_environment()
        self._options, self._location = checked(name, options)
        self._user: tuple[int, int] | None = None
        self._pid = 0  # the process that called start or connect; its forked children must not stop the server
        self._started = False

    @property
    def address(self) -> str:
        """Path of the server's socket."""
        return self._files().address

    def start(self, *, user: tuple[int, int] | None = None) -> None:
        """
        Start the server, or attach to the running server and apply the options of this manager.

        Like `BaseManager.start` it returns None, and can be called once.

        Args:
            user: If this process is root: the uid and gid of the server and of the store's files.

        Raises:
            StoreFull: The shared memory cannot be reserved.
            ConfigError: An option cannot be passed to the server.
            StoreUnavailable: The store's directory is not safe to use, or the server does not start.
            ProcessError: This manager was started already, or shut down.
        """
        self._check_initial(user)
        packed = options_file.pack(self._options.given)
        channel, self._started = connection.connect_or_start(self._files(), packed)
        self._attach(channel)
        connection.warn_of_other_users(self._files())
        if self._started:
            log.info("store %r: started its server, process %d", self._location.name, channel.peer.pid)
            return
        connection.log_attached(self._files(), channel.peer.pid)
        if self._options.given:
            try:
                self._apply(packed, merge=True)
            except BaseException:
                # After a failed start this manager must neither keep the server running nor restart it.
                self._watch.stop()
                self._finalizer()
                self._state.value = managers.State.SHUTDOWN
                raise

    def connect(self) -> None:
        """
        Attach to the running server; never start one.

        Raises:
            StoreUnavailable: The server does not run.
            ProcessError: This manager was started already, or shut down.
        """
        self._check_initial(None)
        self._attach(connection.connect(self._files()))

    def store(self) -> StoreProxy:
        """
        Return a proxy of the store, after `start` if this manager is not attached yet. Raises the errors of `connect`.

        The proxy holds a reference to this manager, which keeps the server running:
        ``StoreManager("shop").store().prune()`` is sufficient.
        """
        self._ensure_started()
        return StoreProxy.attach(self._files(), lambda: self._options.given, self)

    def apply(self, **options: Any) -> list[str]:
        """
        Replace the options of the running store. Options that are not given get their defaults.

        Returns:
            The names of the options that take effect when the store's memory is rebuilt.

        Raises:
            ConfigError: An option is invalid, or no snapshot can be saved at its path; nothing has changed.
            StoreUnavailable: The server cannot be reached, has had no heartbeat for two seconds, or has not answered
                within a minute.
        """
        checked = Options.of(**options)
        waiting = self._apply(options_file.pack(checked.given), merge=False)
        self._options = checked
        return waiting

    def shutdown(self) -> None:
        """
        Stop the server if this manager started it; otherwise only disconnect.

        The sessions stay, unless ``persist=False``. This takes two seconds at most, or as long as the snapshot takes.
        If the server fails to remove a store with ``persist=False``, another server is started to remove it. In a
        forked child this only disconnects.
        """
        if self._state.value == managers.State.STARTED:
            self._watch.stop()
            self._finalizer()
            if self._started and os.getpid() == self._pid:
                self._stop_server()
        self._state.value = managers.State.SHUTDOWN

    def detach(self) -> None:
        """
        Disconnect from the server. It saves its snapshot, and exits at once if no other process is connected.

        A server that does not answer within two seconds is killed, unless it is saving its snapshot.
        """
        if self._state.value == managers.State.STARTED:
            self._watch.stop()
            if os.getpid() == self._pid:
                try:
                    self._pool.call(
                        SERVER, "release", deadline=_deadline_while_beating(self._files(), connection.ANSWER_TIMEOUT)
                    )
                except Unresponsive:
                    connection.kill(self._files())  # it would never exit; other processes that use the store restart it
                    self._remove_store("release")
                except StoreUnavailable:
                    self._remove_store("release")  # it has died, and the watch is stopped
            self._finalizer()
        self._state.value = managers.State.SHUTDOWN

    def join(self, timeout: float | None = None) -> None:
        """Wait for ``timeout`` seconds at most until no server runs."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while self._files().server() is not None and time.monotonic() < end:
            time.sleep(0.02)

    def wait(self, timeout: float | None = None) -> bool:
        """
        Wait for ``timeout`` seconds at most for the normal exit of the server; return whether it has exited.

        A server that dies is restarted, and the wait continues. Call this after `start` or `connect`.
        """
        self._watching.join(timeout)
        return not self._watching.is_alive()

    def get_server(self) -> Any:
        """Raise an error: the server is always a separate process, which can outlive this one."""
        raise ProcessError("the server of a store runs in its own process: call start()")

    def _files(self) -> StoreFiles:
        uid, gid = self._user or (geteuid(), getegid())
        return StoreFiles.of(*self._location, uid=uid, gid=gid)

    def _check_initial(self, user: tuple[int, int] | None) -> None:
        if self._state.value == managers.State.STARTED:
            raise ProcessError("Already started server")
        if self._state.value == managers.State.SHUTDOWN:
            raise ProcessError("Manager has shut down")
        if user is not None and user[0] != geteuid():
            self._user = user

    def _ensure_started(self) -> None:
        if self._state.value == managers.State.INITIAL:
            self.start()
        if self._state.value != managers.State.STARTED:
            raise ProcessError("Manager has shut down")

    def _attach(self, channel: Channel) -> None:
        files = self._files()
        self._pool = Pool(partial(connection.connect, files))
        self._pool.adopt(channel)  # before the watch starts, which would open another connection
        watch = self._watch = Watch(files, self._pool)
        self._watching = threading.Thread(target=watch.run, name=f"shmstore-watch-{files.name}", daemon=True)
        try:
            self._watching.start()
        except RuntimeError as exc:
            self._pool.close()
            raise StoreUnavailable(
                f"store {files.name!r}: its server cannot be watched: {exc}{PROCESS_LIMIT_ADVICE}"
            ) from exc
        # The finalizer sends no signal: it may run in any thread, and in forked children.
        self._finalizer = weakref.finalize(self, _disconnect, watch, self._pool)
        self._finalizer.atexit = False
        self._pid = os.getpid()
        self._state.value = managers.State.STARTED

    def _apply(self, packed: bytes, *, merge: bool) -> list[str]:
        patience = _deadline_while_beating(self._files(), connection.ANSWER_TIMEOUT)
        waiting = self._pool.call(SERVER, "apply", (packed, merge), deadline=patience)
        if not (isinstance(waiting, list) and all(option in ("memory", "max") for option in waiting)):
            raise StoreUnavailable("the store's server sent an invalid answer")
        for option in waiting:
            log.warning(
                "store %r keeps its %s until all processes that use it are stopped and started",
                self._location.name, option,
            )  # fmt: skip
        return waiting

    def _remove_store(self, request: str) -> None:
        """Remove a store with ``persist=False`` that its dead server has left, by a request to another server."""
        # Not in this process: it may be root, and the owner of the directory can put links there.
        files = self._files()
        if not self._options.persist and os.path.lexists(files.arena):
            pool = Pool(partial(connection.connect, files))
            with suppress(ShmStoreError):
                channel, _ = connection.connect_or_start(files, options_file.pack(self._options.given))
                pool.adopt(channel)
                pool.call(SERVER, request, deadline=deadline_in(connection.ANSWER_TIMEOUT))
            pool.close()

    def _stop_server(self) -> None:
        files = self._files()
        if (pid := files.server()) is not None:
            with suppress(ProcessLookupError), Process(pid) as process:
                _request_exit(files)
                if process.wait(_EXIT_TIMEOUT):
                    return
            connection.kill(files, "it did not exit on request")
        # In place of the killed server: processes that still use the arena must not start another server.
        with suppress(StoreUnavailable, FileNotFoundError):
            arena = Arena.open(files.arena)
            arena.cells[SERVER_STARTED] = arena.cells[HEARTBEAT] = 0
            arena.close()
        self._remove_store("shutdown")


class _PrivateManager(StoreManager):
    """
    The manager of a store that processes cannot share: see `shmstore.store.private`.

    What the manager of a server does to it, this one does to a store of this process. That store survives this object,
    as a shared store survives its server.
    """

    def start(self, *, user: tuple[int, int] | None = None) -> None:
        self._check_initial(user)
        given, place = self._options.given, self._place()
        before = private.options(place)
        private.create(place, given, self._why())
        if given and before is not None:
            private.change(place, {**before, **given})
        self._state.value = managers.State.STARTED

    def connect(self) -> None:
        self._check_initial(None)
        private.connect(self._place(), self._why())
        self._state.value = managers.State.STARTED

    def store(self) -> Any:
        self._ensure_started()
        return private.create(self._place(), self._options.given, self._why())

    def apply(self, **options: Any) -> list[str]:
        self._options = Options.of(**options)
        private.create(self._place(), options, self._why())
        private.change(self._place(), options)
        return []

    def shutdown(self) -> None:
        if self._state.value == managers.State.STARTED and not self._options.persist:
            private.end(self._place())
        self._state.value = managers.State.SHUTDOWN

    detach = shutdown

    def join(self, timeout: float | None = None) -> None:
        """Return at once: a private store has no server."""

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def _place(self) -> Location:
        directory = self._location.directory
        return self._location._replace(directory=directory and os.path.abspath(directory))

    def _why(self) -> str:
        return lacking(default=self._location.directory is None)


def _request_exit(files: StoreFiles) -> None:
    pool = Pool(partial(connection.connect, files, _EXIT_TIMEOUT))
    with suppress(StoreUnavailable):
        pool.call(SERVER, "shutdown", deadline=_deadline_while_beating(files, _EXIT_TIMEOUT))
    pool.close()


def _deadline_while_beating(files: StoreFiles, timeout: float) -> Deadline:
    """Return a deadline ``timeout`` seconds after the last heartbeat, at most `_SAVE_TIMEOUT` seconds from now."""
    started, limit = boottime_ns(), deadline_in(_SAVE_TIMEOUT)

    def left() -> float:
        beat = started
        with suppressing(OSError):
            beat = max(beat, past(heartbeat(files)))
        return min(limit(), timeout - (boottime_ns() - beat) / 1e9)

    return left


def _disconnect(watch: Watch, pool: Pool) -> None:
    watch.stopped = True
    pool.close()


StoreManager.register("Store", proxytype=RemoteProxy, create_method=False)
