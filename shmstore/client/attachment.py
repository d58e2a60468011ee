"""What a process holds of a store that a server owns: the arena, the options, connections to the server."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from msgspec import Raw

from shmstore.client import connection
from shmstore.client.pool import Pool
from shmstore.engine.arena import Arena
from shmstore.engine.header import HEARTBEAT, OPTIONS, SERVER_PID, SERVER_STARTED
from shmstore.engine.layout import ArenaDamaged
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.channel import Disconnected
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import ConnectionLimitReached
from shmstore.ipc.peer import trusted
from shmstore.ipc.rpc import SERVER, STORE, request_limit
from shmstore.options import Options, seconds
from shmstore.store.dispose import DisposeRequired, inside, refuse_inside
from shmstore.store.holder import ArenaHolder, Remote, Upkeep, reopen
from shmstore.store.live_options import FollowedOptions, OptionsDamaged
from shmstore.store.store import Store
from shmstore.system.clock import Deadline, boottime_ns, deadline_in, past
from shmstore.system.processes import is_running
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

__all__ = ["Attachment", "Given"]

log = logging.getLogger("shmstore")

SILENCE: Final = 2.0  # seconds without a heartbeat, or without a connection, after which a call is given up
LATE: Final = 3.0  # seconds without a heartbeat after which a writer starts another server
_RETRY: Final = 0.02  # seconds between attempts to reach a server that is being restarted
_LOST: Final = 3  # answers that one call may lose; a call that loses more may be what kills the servers

# Repeating these changes the result, so they are not repeated when only the answer may be lost.
_ONCE: Final = frozenset({"add", "rename", "clear"})

_READS: Final = frozenset({
    "get", "peek", "load", "gone", "__contains__", "ids", "all", "length", "owned_by", "stats", "ping",
})  # fmt: skip

Given = Callable[[], Mapping[str, Any]]
"""Returns the options that this process was given. Its functions are preferred to their copies in the options file."""

T = TypeVar("T")


class Attachment(Upkeep):
    """
    An attachment to the store in these files: the `Upkeep` of a store that works on its arena in place.

    Attributes:
        files: The files of the store.
        store: The store, which works in place.
        pool: Connections to the server.
        rescues: Whether a write that finds no server starts one.

    Raises:
        StoreUnavailable: The store does not exist, no server runs, or the directory is not safe to use.
        ConfigError: Its options cannot be read by this process.
    """

    def __init__(self, files: StoreFiles, given: Given) -> None:
        self.files = files
        self.rescues = True
        files.check()
        try:
            arena = self._ready(Arena.open(files.arena))
        except FileNotFoundError:
            raise no_server(files) from None
        if not arena.file.cells[HEARTBEAT]:
            arena.close()
            raise no_server(files)
        try:
            self._followed = FollowedOptions(arena, lambda: _options(files, given()), lambda: _serializer(files))
        except FileNotFoundError:  # removed, and being written again: the defaults could not read the sessions
            arena.close()
            raise no_server(files) from None
        except BaseException:
            arena.close()
            raise
        # No cycle: when a proxy is dropped, its connections close, and the server may end.
        self.store = Store.over(arena, self._followed.first, weakref.proxy(self))
        self.pool = Pool(partial(connection.connect, files))
        self._server = arena.file.cells[SERVER_STARTED]  # the server that this process is connected to, and keeps alive
        self._writes = 0
        self._next_rescue = 0.0
        self._unserved, self._user_changed = Throttle(), Throttle()

    def _ready(self, arena: Arena) -> Arena:
        arena.writers.on_timeout = partial(connection.kill_stopped, self.files)
        return arena

    def hold(self) -> None:
        """Connect, which keeps the server alive. Work in place does not depend on it."""
        try:
            self.pool.ensure_connected()
        except StoreUnavailable:
            self._server = 0  # it is being restarted

    def close(self) -> None:
        """Close the store and the connections."""
        self.store.close()
        self.pool.close()

    # -- calls to the server -----------------------------------------------------------------------------------------

    def call_store(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """
        Call a method of the server's store. A ttl function and a serializer run here, where the call is made.

        Raises:
            StoreUnavailable: As `call`; or this process cannot read the options of the store.
            RuntimeError: The method writes, and this thread is inside a dispose.
        """
        if method not in _READS:
            refuse_inside()
        elif method == "get" and inside():
            method = "peek"  # an expired session that `get` hands out is removed
        store = self.store
        self._followed.refresh(store)
        session = kwargs.get("session")
        if isinstance(session, Mapping) and kwargs.get("ttl") is None:
            kwargs["ttl"] = store.life_of(session, kwargs["sid"])
        for name in ("session", "set"):
            if isinstance(kwargs.get(name), Mapping):
                # Values as bytes can always be sent, and are stored as they are.
                fields = store.codec.fields(store.codec.encode(kwargs[name]))
                kwargs[name] = {name: Raw(value) for name, value in fields.items()}
        # Not every iterable of ids can be sent, as a generator or a view of keys; what it yields can.
        kwargs = {
            name: [*value] if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else value
            for name, value in kwargs.items()
        }
        return self.call(STORE, method, args, kwargs)

    def call(self, target: str, method: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}) -> Any:
        """
        Call a method of the server or of its store.

        The call waits until `SILENCE` seconds after the server's last heartbeat, and as long for a server that is being
        restarted. If only the answer is lost, the next server is asked again, except
        for the methods in `_ONCE`.

        Raises:
            StoreUnavailable: The server does not answer, or cannot be reached.
        """
        store = self.store
        deadline, connect_deadline = self._answer_deadline(), deadline_in(SILENCE)
        lost = 0
        while True:
            try:
                limit, left = request_limit(store.arena), max(_RETRY, connect_deadline())
                return self.pool.call(
                    target, method, args, kwargs, deadline=deadline, connect_timeout=left, send_limit=limit
                )
            except Disconnected as exc:
                lost += exc.delivered
                if lost > _LOST or (exc.delivered and method in _ONCE):
                    raise
                if exc.delivered:
                    # The server was reached: the time starts again for its successor.
                    deadline, connect_deadline = self._answer_deadline(), deadline_in(SILENCE)
                self.pool.close_idle()
                if connect_deadline() <= _RETRY:
                    raise
            except connection.NoServer as exc:
                # The server was killed, and its watch restarts it within a second; or it has exited normally. Its
                # heartbeat does not distinguish these: it may run in a directory that was replaced.
                cells = store.arena.file.cells
                if not cells[SERVER_STARTED]:
                    raise
                if connect_deadline() <= _RETRY:
                    if not is_running(cells[SERVER_PID]):
                        raise
                    raise connection.NoServer(
                        f"the server of {store.label} runs, but not at {self.files.address}: the directory was "
                        "removed or replaced; restart the processes that use the store"
                    ) from exc
                time.sleep(_RETRY)

    def _answer_deadline(self) -> Deadline:
        store, begun = self.store, boottime_ns()
        # The arena of each moment: while the answer is waited for, the server may move the sessions to another file.
        return lambda: SILENCE + (max(past(store.arena.file.cells[HEARTBEAT]), begun) - boottime_ns()) / 1e9

    # -- the upkeep of the arena -------------------------------------------------------------------------------------

    def reopen(self, store: ArenaHolder) -> Arena:
        return self._ready(reopen(self.files.arena))

    def repair(self, store: ArenaHolder, arena: Arena, damage: ArenaDamaged) -> None:
        arguments = (arena.file.identity(), str(damage), isinstance(damage, OptionsDamaged))
        try:
            self.call(SERVER, "repair", arguments)
        except connection.NoServer:
            if not self.rescues:
                raise
            self._start_server()
            self.call(SERVER, "repair", arguments)
        store.reattach()

    def dispose(
        self, store: ArenaHolder, required: DisposeRequired, attempt: Callable[[], T], remote: Remote | None
    ) -> T:
        # If only space is needed, or the slot of an expired session, the server removes what is in the way, and the
        # step is repeated here: so the result of `add` and `rename` is known whenever the server dies.
        while remote is None or (remote[0] in ("set", "replace") and required.reason != "set"):
            arena, slot, version = required.pending
            entry = arena.reader.at(slot, seconds(store.options.lock_timeout))
            if arena is store.arena:  # otherwise the sessions are in another file, which may have space
                reason = "displace" if required.displaced else required.reason
                self.call(STORE, "drop_pending", (slot, version, None if entry is None else entry[3][5], reason))
            try:
                return attempt()
            except DisposeRequired as another:
                required = another
        method, arguments = remote
        result: T = self.call_store(method, **arguments)
        return result

    def before_write(self, store: ArenaHolder) -> None:
        refuse_inside()
        if store._arena.file.cells[OPTIONS] != self._followed.applied:
            self._followed.refresh(store)
        # One write in eight checks the server: if the process that watches it has died, no other process restarts it.
        self._writes += 1
        if not self._writes & 7:
            store.arena.counters.flush()
            self._check_server()

    def refresh_options(self, store: ArenaHolder) -> bool:
        return self._followed.refresh(store)

    # -- a server that is gone ---------------------------------------------------------------------------------------

    def _check_server(self) -> None:
        files = self.files
        # A system call: not at each check.
        if self._writes & 63 == 8 and os.geteuid() not in (0, files.uid) and self._user_changed.due():
            log.warning(
                "%s in %s was opened as uid %d, and this process is uid %d now: the command line and the hooks mean "
                "that user's own store; open it after the change of user, or give the application its URL",
                self.store.label, files.path, files.uid, os.geteuid(),
            )  # fmt: skip
        cells = self.store.arena.file.cells
        started = cells[SERVER_STARTED]
        if started == self._server and boottime_ns() - past(cells[HEARTBEAT]) < LATE * 1e9:
            return
        # The heartbeat is late, or another server has replaced the known one. `started` is 0 after a shutdown.
        if self.rescues and started and time.monotonic() >= self._next_rescue:
            self._next_rescue = time.monotonic() + LATE
            try:
                threading.Thread(target=self._rescue, name="shmstore-rescue", daemon=True).start()
            except RuntimeError:
                log.debug("%s: cannot start a thread that restarts its server", self.store.label)

    def _rescue(self) -> None:
        try:
            if self.store.arena.file.is_at(self.files.arena):
                self._start_server()
        except ConnectionLimitReached:
            self._server = self.store.arena.file.cells[
                SERVER_STARTED
            ]  # it runs; the connections of other processes keep it running
        except (StoreUnavailable, ConfigError, OSError) as exc:
            pass_on_interruption(exc)
            if not self.store.closed and (times := self._unserved.due()):  # it may have been closed meanwhile
                log.warning(
                    "%s has no server, and none can be started (attempts: %d): %s", self.store.label, times, exc
                )

    def _start_server(self) -> None:
        channel, started = connection.connect_or_start(self.files)
        self.pool.close_idle()
        self.pool.adopt(channel)
        self._server = self.store.arena.file.cells[SERVER_STARTED]
        if started:
            log.warning("%s: its server was gone; started another, process %d", self.store.label, channel.peer.pid)


def _options(files: StoreFiles, given: Mapping[str, Any]) -> tuple[Options, str | None]:
    """Return the options of the store, and their serializer as it was saved."""
    if files.uid != os.geteuid():
        return Options.of(**given), None  # root must not run the functions of another user
    if not trusted(files.uid):
        return _options_without_code(files, given)
    packed = options_file.read(files.options)
    saved = options_file.unpack(packed)
    # The unpickled functions are copies, which do not share variables with this process' own functions.
    own = {name: given[name] for name in saved.keys() & given.keys() if _is_code(saved[name]) and _is_code(given[name])}
    return Options.of(**saved | own), options_file.serializer(packed)


def _options_without_code(files: StoreFiles, given: Mapping[str, Any]) -> tuple[Options, str | None]:
    """Return the same without unpickling a function: this process has to be given each that the store has."""
    packed = options_file.read(files.options, run=False)
    names = options_file.functions(packed).keys()
    own = {name: given[name] for name in names & given.keys() if _is_code(given[name])}
    if missing := names - own.keys():
        raise ConfigError(
            f"store {files.name!r} has options that are functions or objects ({', '.join(sorted(missing))}), and this "
            "process does not unpickle them, because it has capabilities or can become another user: give it these "
            "options too, or run it without capabilities and with one user id"
        )
    return Options.of(**options_file.plain(packed) | own), options_file.serializer(packed)


def _serializer(files: StoreFiles) -> str | None:
    return options_file.serializer(options_file.read(files.options, run=False))


def _is_code(value: object) -> bool:
    return callable(value) or hasattr(value, "dumps")


def no_server(files: StoreFiles) -> connection.NoServer:
    """Return the error that says how to start the server of a store."""
    return connection.NoServer(
        f"no server runs for store {files.name!r} in {os.path.dirname(files.path)}; "
        f"start one with StoreManager({files.name!r}).start(), or with the hooks of shmstore.gunicorn"
        f"{files.elsewhere()}"
    )
