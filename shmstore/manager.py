"""`StoreManager`: starts the server of a store, keeps it alive, ends it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from multiprocess import ProcessError
from multiprocess.managers import BaseManager, State

from shmstore import urls
from shmstore.contract import AnyStore
from shmstore.engine.arena import Arena
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.engine.header import HEARTBEAT, SERVER_STARTED
from shmstore.engine.layout import CELL
from shmstore.errors import ConfigError, ShmStoreError, StoreUnavailable
from shmstore.options import Options
from shmstore.server import options_file, spawn
from shmstore.server.client import ServerProxy, StoreProxy, connect, open_proxy, redis_store
from shmstore.server.directory import StoreFiles
from shmstore.server.rpc import (
    SERVER,
    Channel,
    ConnectionLimitReached,
    Deadline,
    Pool,
    Unresponsive,
    deadline_in,
)
from shmstore.store.trace import obey_environment
from shmstore.system.clock import boottime_ns
from shmstore.system.processes import PROCESS_LIMIT_ADVICE, Process

if TYPE_CHECKING:
    pass

__all__ = ["StoreManager", "StoreProxy", "attach_or_start", "connect", "register"]

log = logging.getLogger("shmstore")

_END_TIMEOUT = 1.0  # seconds for the end of a server that was asked to end
_ANSWER_TIMEOUT = 2.0  # seconds for an answer
_SAVE_TIMEOUT = 60.0  # seconds for the snapshot that a server saves before it ends
_LOOK_INTERVAL = 1.0  # seconds between looks at the heartbeat
_SILENT_LOOKS = 3  # looks without a new heartbeat, after which the server counts as hung
_PAUSE, _LONGEST_PAUSE = 0.1, 30.0  # seconds between attempts to start it again


class StoreManager(BaseManager):  # type: ignore[misc] # multiprocess has no types
    """
    The server process of a store, seen from a process that needs it to run.

    There is one server per name and user. `start` starts it, or attaches to the one that runs; whoever attached, and
    the children it forks, keep it alive: it leaves a few seconds after the last of them is gone, and nothing else
    about them matters to it. While this manager lives, a server that dies is started again within a second; the
    sessions are in shared memory and do not notice.

    Args:
        name: ``"shop"``, ``"shm://shop"`` or ``"shm:///path/to/store-directory"``.
        options: Those of `Options`. What is given wins over what a running server was started with.

    Raises:
        ConfigError: The name or an option is wrong.
    """

    def __init__(self, name: str, /, **options: Any) -> None:
        super().__init__(authkey=b"")  # there is none: see StoreServer
        obey_environment()
        self._options = Options.of(**options)
        if "clock" in options:
            raise ConfigError("clock is for private stores: the processes of a shared one need the same")
        directory = self._options.directory
        self._location = urls.parse(name, None if directory is None else os.fspath(directory))
        self._user: tuple[int, int] | None = None
        self._pid = 0  # the process that started or attached; its children only share the connection
        self._started = False

    @property
    def address(self) -> str:
        """Path of the server's socket."""
        return self._files().address

    def start(self, *, user: tuple[int, int] | None = None) -> None:
        """
        Start the server, or attach to the one that runs and give it the options given here.

        Like `BaseManager.start` it returns None, and may be called once.

        Args:
            user: As root: the uid and gid that the server runs as and that the store belongs to.

        Raises:
            StoreFull: The shared memory cannot be reserved.
            ConfigError: An option cannot be handed to the server.
            StoreUnavailable: The store's directory is not safe to use, or the server does not start.
            ProcessError: It was started already, or shut down.
        """
        self._begin(user)
        packed = options_file.pack(self._options.given)
        channel, self._started = spawn.connect_or_start(self._files(), packed)
        self._attach(channel)
        spawn.warn_of_other_users(self._files())
        if self._started:
            log.info("store %r: started its server, process %d", self._location.name, channel.peer.pid)
            return
        spawn.log_attached(self._files(), channel.peer.pid)
        if self._options.given:
            try:
                self._apply(packed, merge=True)
            except BaseException:  # a manager that was not started must not keep the server alive, nor restart it
                self._watch.stop()
                self._finalizer()
                self._state.value = State.SHUTDOWN
                raise

    def connect(self) -> None:
        """
        Attach to the running server; never start one.

        Raises:
            StoreUnavailable: None runs.
            ProcessError: This manager was started already, or shut down.
        """
        self._begin(None)
        self._attach(spawn.connect(self._files()))

    def store(self) -> StoreProxy:
        """
        Return a proxy of the store; see `connect` for what it may raise. Starts the server if that was not done yet.

        The proxy keeps this manager alive, and so the server: ``StoreManager("shop").store().prune()`` is enough.
        """
        if self._state.value == State.INITIAL:
            self.start()
        if self._state.value != State.STARTED:
            raise ProcessError("Manager has shut down")
        return open_proxy(self._files(), lambda: self._options.given, self)

    def apply(self, **options: Any) -> list[str]:
        """
        Make these the options of the running store, all others defaults again.

        Returns:
            The names of those that have to wait until the store's memory is made anew.

        Raises:
            ConfigError: An option is wrong; nothing has changed then.
            StoreUnavailable: The server cannot be reached.
        """
        checked = Options.of(**options)
        waiting = self._apply(options_file.pack(checked.given), merge=False)
        self._options = checked
        return waiting

    def shutdown(self) -> None:
        """
        End the server if this manager started it, else just let go of it. Takes two seconds at most, and a moment more
        if a server that could not do so has to have a store removed that does not persist; or as long as the snapshot
        takes.

        The sessions stay, unless ``persist=False``. A process forked from the one that started the server lets go.
        """
        if self._state.value == State.STARTED:
            self._watch.stop()
            self._finalizer()
            if self._started and os.getpid() == self._pid:
                self._end()
        self._state.value = State.SHUTDOWN

    def detach(self) -> None:
        """
        Let go of the server, whoever started it. It saves its snapshot, and leaves at once if nobody else is connected.

        One that does not answer within two seconds is killed, unless it is saving.
        """
        if self._state.value == State.STARTED:
            self._watch.stop()
            if os.getpid() == self._pid:
                try:
                    self._pool.call(SERVER, "release", deadline=_deadline_while_beating(self._files(), _ANSWER_TIMEOUT))
                except Unresponsive:
                    self._replace()
                except StoreUnavailable:
                    self._remove("release")  # it died, or was killed by the watch, which starts no other one now
            self._finalizer()
        self._state.value = State.SHUTDOWN

    def join(self, timeout: float | None = None) -> None:
        """Wait until no server runs, for ``timeout`` seconds at most."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while self._files().server() is not None and time.monotonic() < end:
            time.sleep(0.02)

    def wait(self, timeout: float | None = None) -> bool:
        """
        Wait until the server has ended on purpose, for ``timeout`` seconds at most; return whether it has.

        One that dies is started again, and waited for. To be called after `start` or `connect`.
        """
        self._watching.join(timeout)
        return not self._watching.is_alive()

    def get_server(self) -> Any:
        """Refuse: the server is a process of its own, so that it outlives this one."""
        raise ProcessError("the server of a store runs in its own process: call start()")

    def _files(self) -> StoreFiles:
        uid, gid = self._user or (os.geteuid(), os.getegid())
        return StoreFiles.of(*self._location, uid=uid, gid=gid)

    def _begin(self, user: tuple[int, int] | None) -> None:
        if self._state.value == State.STARTED:
            raise ProcessError("Already started server")
        if self._state.value == State.SHUTDOWN:
            raise ProcessError("Manager has shut down")
        if user is not None and user[0] != os.geteuid():
            self._user = user

    def _attach(self, channel: Channel) -> None:
        files = self._files()
        self._pool = Pool(partial(spawn.connect, files))
        self._pool.adopt(channel)  # before the watch begins, which would make another connection
        watch = self._watch = _Watch(files, self._pool)
        self._watching = threading.Thread(target=watch.run, name=f"shmstore-watch-{files.name}", daemon=True)
        try:
            self._watching.start()
        except RuntimeError as exc:
            self._pool.close()
            raise StoreUnavailable(
                f"store {files.name!r}: its server cannot be watched: {exc}{PROCESS_LIMIT_ADVICE}"
            ) from exc
        # Lets go, and sends no signal: run by a garbage collector somewhere, or in a child of fork, it harms nobody.
        self._finalizer = weakref.finalize(self, _let_go, watch, self._pool)
        self._finalizer.atexit = False
        self._pid = os.getpid()
        self._state.value = State.STARTED

    def _apply(self, packed: bytes, *, merge: bool) -> list[str]:
        waiting = self._pool.call(SERVER, "apply", (packed, merge), deadline=deadline_in(_ANSWER_TIMEOUT))
        if not (isinstance(waiting, list) and all(option in ("memory", "max") for option in waiting)):
            raise StoreUnavailable("the store's server gave an answer of an unknown kind")
        for option in waiting:
            log.warning("store %r keeps its %s until its memory is made anew", self._location.name, option)
        return waiting

    def _replace(self) -> None:
        """End a server that does not answer, so would never leave. Who else needs one starts another."""
        spawn.kill(self._files())
        self._remove("release")

    def _remove(self, how: str) -> None:
        """Have a store that does not persist removed after its server could not do so; by another server."""
        # Not by this process: it may be root, and the directory another user's, who can put links there.
        files = self._files()
        if not self._options.persist and os.path.lexists(files.arena):
            pool = Pool(partial(spawn.connect, files))
            with suppress(ShmStoreError):
                channel, _ = spawn.connect_or_start(files, options_file.pack(self._options.given))
                pool.adopt(channel)
                pool.call(SERVER, how, deadline=deadline_in(_ANSWER_TIMEOUT))
            pool.close()

    def _end(self) -> None:
        files = self._files()
        if (pid := files.server()) is not None:
            with suppress(ProcessLookupError), Process(pid) as process:
                _ask_to_end(files)
                if process.wait(_END_TIMEOUT):
                    return
            spawn.kill(files, "it did not end when it was asked to")
        # It could not do so itself: who still works in place is not to start another, nor to write into what goes.
        with suppress(StoreUnavailable, FileNotFoundError):
            arena = Arena.open(files.arena)
            arena.cells[SERVER_STARTED] = arena.cells[HEARTBEAT] = 0
            arena.close()
        self._remove("shutdown")


def _ask_to_end(files: StoreFiles) -> None:
    pool = Pool(partial(spawn.connect, files, _END_TIMEOUT))
    with suppress(StoreUnavailable):
        pool.call(SERVER, "shutdown", deadline=_deadline_while_beating(files, _END_TIMEOUT))
    pool.close()


class _Watch:
    """
    Keeps the server of a store running: waits for its end by pidfd, and kills it when its heartbeat stops.

    A forked child has no such thread. If it is a greenlet, it exists in the child too, and ends there.
    """

    def __init__(self, files: StoreFiles, pool: Pool) -> None:
        self.stopped = False
        self._files = files
        self._pool = pool
        self._pid = os.getpid()
        self._restarting = GreenletLock()  # held to kill and to restart, so that neither comes after `stop`

    def stop(self) -> None:
        """Watch no more: nothing is killed or started any more, what is just being is waited for."""
        self.stopped = True
        self._unless_over(lambda: None)

    def run(self) -> None:
        pause = _PAUSE
        while not self._over():
            try:
                self._until_it_ends()
            except (StoreUnavailable, ProcessLookupError):
                pass
            except OSError:
                time.sleep(_LOOK_INTERVAL)  # no descriptor to watch by: trying again at once would spin
            if self._over():
                return
            if _has_left(self._files):
                log.info("store %r: its server has ended on purpose", self._files.name)
                return
            try:
                self._unless_over(self._restart)
                pause = _PAUSE
            except Exception as exc:
                log.warning(
                    "store %r: its server cannot be started: %s; next try in %g s", self._files.name, exc, pause
                )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _over(self) -> bool:
        return self.stopped or os.getpid() != self._pid

    def _unless_over(self, work: Callable[[], object]) -> None:
        ticket = self._restarting.ticket()
        try:
            ticket.acquire()
            if not self._over():
                work()
        finally:
            ticket.release()

    def _until_it_ends(self) -> None:
        """
        Return, or raise `StoreUnavailable`, when the server does not run any more. A hung server is killed.

        Looks are counted instead of seconds: after a suspend, or a freeze of both processes, the first heartbeat is
        late through no fault of the server.
        """
        with Process(self._pool.ensure_connected().pid) as process:
            beat = silent = 0
            while not self._over() and not process.wait(_LOOK_INTERVAL):
                last = beat
                with suppress(OSError):
                    beat = _heartbeat(self._files)
                silent = silent + 1 if beat == last else 0
                if silent == _SILENT_LOOKS:
                    return self._unless_over(lambda: spawn.kill(self._files))

    def _restart(self) -> None:
        self._pool.close_idle()
        channel, started = spawn.connect_or_start(self._files)
        self._pool.adopt(channel)
        if started:
            log.warning("store %r: its server had died; started process %d", self._files.name, channel.peer.pid)


def _has_left(files: StoreFiles) -> bool:
    """Return whether the server has ended on purpose: then it has stopped its heart, or removed the store."""
    try:
        return not _heartbeat(files)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _heartbeat(files: StoreFiles) -> int:
    """Return when the server's heart beat last, by the clock of deadlines; 0: it has left."""
    # By hand: root may look at it for another user, and must believe nothing else that is in it.
    fd = os.open(files.arena, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return int.from_bytes(os.pread(fd, CELL, HEARTBEAT * CELL) or b"\1", sys.byteorder)
    finally:
        os.close(fd)


def _deadline_while_beating(files: StoreFiles, timeout: float) -> Deadline:
    """Return a deadline ``timeout`` seconds after the last heartbeat, at most `_SAVE_TIMEOUT` seconds from now."""
    begun, limit = boottime_ns(), deadline_in(_SAVE_TIMEOUT)

    def left() -> float:
        beat = begun
        with suppress(OSError):
            beat = max(beat, _heartbeat(files))
        return min(limit(), timeout - (boottime_ns() - beat) / 1e9)

    return left


def _let_go(watch: _Watch, pool: Pool) -> None:
    watch.stopped = True
    pool.close()


StoreManager.register("Store", proxytype=ServerProxy, create_method=False)


# -- for the faces: one store per process, started by whoever comes first --------------------------------------------

# Options by the name of their store, from Gunicorn's configuration file: that is executed before the application is
# imported, and again at each HUP. Not by path: the default directory is that of the user who serves the requests, which
# is another one than who has read the file if Gunicorn is started as root with --user.
_registered: dict[urls.Location, dict[str, Any]] = {}
_attached: dict[str, StoreProxy] = {}
_on_servers: list[tuple[str, dict[str, Any], AnyStore]] = []  # URL, options
_attaching = GreenletLock()  # guards both


def register(name: str, options: Mapping[str, Any]) -> None:
    """Remember the options with which the store of that name is to be started in this process, if it is."""
    _registered[_location(name, options)] = dict(options)


def _location(name: str, options: Mapping[str, Any]) -> urls.Location:
    directory = options.get("directory")
    found = urls.parse(name, directory)
    return found if found.directory is None else found._replace(directory=os.path.abspath(found.directory))


def _url(place: urls.Location) -> str:
    return f"shm://{place.name}" if place.directory is None else f"shm://{os.path.join(place.directory, place.name)}"


def attach_or_start(url: str, options: Mapping[str, Any] | None = None) -> AnyStore:
    """
    Return this process' proxy of a store, the same at each call; start the server if none runs.

    Made before a fork it serves the children too: they inherit the memory, and connect for themselves. A process that
    has become another user since gets that user's store.

    Args:
        url: Name or URL of the store. That of a Redis or Valkey server is one more kind of store, and starts nothing.
        options: Those of `Options`; they win over a running server's. None or empty: as registered by Gunicorn's
            hooks, else the defaults.

    Raises:
        ConfigError, StoreFull, StoreUnavailable: As `StoreManager.start`.
    """
    if urls.is_network(url):
        return _on_network(url, options or {})
    place = _location(url, options or {})
    if not options and place not in _registered and place.directory is None:
        # Hooks given a name and a directory, and an application that gives the same name.
        place = next((each for each in _registered if each.name == place.name), place)
    given = dict(options or _registered.get(place, {}))
    given.pop("directory", None)
    path = StoreFiles.of(*place).path
    ticket = _attaching.ticket()
    try:
        ticket.acquire()
        store = _attached.get(path)
        if store is None or store.closed:
            if _registered and place not in _registered:
                log.warning(
                    "%s is not among the stores of Gunicorn's hooks, whose options do not apply to it: %s; "
                    "is the name the same in both places?",
                    _url(place), ", ".join(sorted(map(_url, _registered))),
                )  # fmt: skip
            store = _attached[path] = _attach_or_start(place, given, explicit=bool(options))
        elif options:
            _manager(place, given).start()  # attaches, and gives the running server these options
        return store
    finally:
        ticket.release()


def _on_network(url: str, options: Mapping[str, Any]) -> AnyStore:
    ticket = _attaching.ticket()
    try:
        ticket.acquire()
        _on_servers[:] = [each for each in _on_servers if not each[2].closed]
        for named, given, store in _on_servers:
            if (named, given) == (url, options):
                return store
        store = redis_store(url, options)
        _on_servers.append((url, dict(options), store))
        return store
    finally:
        ticket.release()


def _attach_or_start(place: urls.Location, given: Mapping[str, Any], *, explicit: bool) -> StoreProxy:
    if not explicit:
        files = StoreFiles.of(*place)
        with suppress(StoreUnavailable):
            # What is done in place needs no connection, so a server that is just being restarted is not waited for.
            with suppress(spawn.NoServer, ConnectionLimitReached, Unresponsive):
                spawn.connect_as_starter(files).close()  # a server of another version that nobody uses leaves
            # Looked up when it is needed: at a HUP the configuration registers what it gives now.
            return open_proxy(files, lambda: _registered.get(place, given))
    return _manager(place, given).store()


def _manager(place: urls.Location, given: Mapping[str, Any]) -> StoreManager:
    return StoreManager(place.name, **{**given, "directory": place.directory})
