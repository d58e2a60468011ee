"""Proxies: a store that a server process owns, held by another process of the same user."""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Self, TypeVar, cast

from msgspec import Raw
from multiprocess.managers import BaseProxy, Token

from shmstore.codec.body import Codec
from shmstore.contract import OF_AN_ARENA
from shmstore.engine.arena import Arena
from shmstore.engine.header import BY_FUNCTION, HEARTBEAT, OPTIONS, SERVER_PID, SERVER_STARTED, STATE, TTL
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.options import Duration, Options
from shmstore.server import options_file, spawn
from shmstore.server.directory import StoreFiles
from shmstore.server.rpc import STORE, STORE_METHODS, Disconnected, NoRoom, Patience, Pool, trusted, within
from shmstore.store.dispose import Due, inside, refuse_inside
from shmstore.store.operations import count_unreadable
from shmstore.store.store import Store, request_limit
from shmstore.store.trace import obey_environment, traced
from shmstore.system.clock import boottime_ns
from shmstore.system.greenlet_lock import GreenletLock
from shmstore.system.processes import lives
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle
from shmstore.urls import is_network

if TYPE_CHECKING:
    from shmstore.redis import RedisStore

__all__ = ["StoreProxy", "connect"]

log = logging.getLogger("shmstore")

_STILL: Final = 2.0  # seconds without a heartbeat, or without a connection, after which a call is given up
_LATE: Final = 3.0  # seconds without a heartbeat after which whoever writes starts a new server
_PAUSE: Final = 1.0  # seconds between attempts to read new options
_RETRY: Final = 0.02  # seconds between attempts to reach a server that is being restarted

_LOST: Final = 3  # answers in one call that may be lost; whoever loses more may be what kills the servers

# Carrying these out twice is not the same as once, so they are not repeated when only the answer may be lost.
_ONCE: Final = frozenset({"add", "rename", "clear"})

_READS: Final = frozenset({
    "get", "peek", "load", "gone", "__contains__", "ids", "all", "length", "owned_by", "stats", "ping",
})  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")

Given = Callable[[], Mapping[str, Any]]


def _in_server(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Return a method that calls this one of the server's store."""
    signature = inspect.signature(method)

    @wraps(method)
    def call(self: StoreProxy, /, *args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(self, *args, **kwargs).arguments
        del given["self"]
        result: R = self._callmethod(method.__name__, (), self._as_sent(given))
        return result

    return traced(call)


class StoreProxy(BaseProxy):  # type: ignore[misc] # multiprocess has no types
    """
    A store in a server, with every method carried out there. The contract is that of `Store`.

    Made by `connect` and `StoreManager.store`; what they make works in place unless ``in_place=False`` is asked for:
    it is the same to use, and many times as fast. It can be pickled (it connects again), is inherited by fork, may
    be shared by threads and greenlets, and is a context manager that closes it.

    A call waits for its answer as long as the server's heart beats (at most `_STILL` seconds without a beat), and at
    most as long for a server that is being restarted. Every method may raise `StoreUnavailable` when that ends. If it
    is the answer that was lost, the next server is asked again, but for `add`, `rename` and `clear`: after their
    `StoreUnavailable` they may have been carried out or not.

    Attributes:
        arena: The shared memory.
        options: The options of the store.
        codec: How its sessions are written.
        capabilities: What it can do that not every kind of store can.
        rescues: Whether it starts a server when it writes and finds that there is none any more.
    """

    capabilities = OF_AN_ARENA
    rescues = True
    _exposed_ = tuple(sorted(STORE_METHODS))
    _in_place = False

    arena: Arena
    codec: Codec
    options: Options

    def __init__(self, files: StoreFiles, given: Given = dict, manager: Any = None) -> None:
        obey_environment()
        arena = _attach(files)
        try:
            self._obeyed = arena.cells[OPTIONS]  # looked at before they are read: a change meanwhile is noticed
            options, serializer = _options(files, given())
        except FileNotFoundError:  # removed, and being made again: by the defaults we would read what others did not
            arena.close()
            raise _no_server(files) from None
        except BaseException:
            arena.close()
            raise
        # No references are counted and no key is exchanged: the socket is in a directory that only we can enter.
        super().__init__(Token("Store", files.address, STORE), "pickle", manager, authkey=b"", incref=False)
        self._files = files
        self._given = given
        self._catching_up = GreenletLock()
        self._not_obeyed = 0  # options that could not be read
        self._next_attempt = 0.0
        self._unfollowed = ""  # why nothing can be read or written by the new ones
        self._serializer = serializer
        self._begin(arena, options)
        arena.unblock = partial(spawn.kill_stopped, files)
        self._pool = Pool(partial(spawn.connect, files))
        self._held = arena.cells[SERVER_STARTED]
        try:
            self._connect()
        except BaseException:
            self.close()
            raise
        spawn.say_attached(files, arena.cells[SERVER_PID])

    def _connect(self) -> None:
        """Connect now: an open connection keeps the server alive."""
        self._callmethod("ping")

    def _begin(self, arena: Arena, options: Options) -> None:
        self.arena = arena
        self._obey(options)

    def _obey(self, options: Options) -> None:
        self.options, self.codec = options, Codec(options.serializer, partial(count_unreadable, self.arena))

    get = _in_server(Store.get)
    peek = _in_server(Store.peek)
    load = _in_server(Store.load)
    set = _in_server(Store.set)
    add = _in_server(Store.add)
    replace = _in_server(Store.replace)
    update = _in_server(Store.update)
    gone = _in_server(Store.gone)
    lock = Store.lock  # not in the server, whose lock it would be
    _touch = _in_server(Store.touch)
    destroy = _in_server(Store.destroy)
    destroy_if_empty = _in_server(Store.destroy_if_empty)
    rename = _in_server(Store.rename)
    ids = _in_server(Store.ids)
    all = _in_server(Store.all)
    length = _in_server(Store.length)
    clear = _in_server(Store.clear)
    prune = _in_server(Store.prune)
    start_interval = _in_server(Store.start_interval)
    stop_interval = _in_server(Store.stop_interval)
    owned_by = _in_server(Store.owned_by)
    destroy_owned = _in_server(Store.destroy_owned)
    stats = _in_server(Store.stats)
    ping = _in_server(Store.ping)
    __contains__ = _in_server(Store.__contains__)

    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        """See `Store.touch`."""
        seen = session
        if session is None and ttl is None and self.arena.cells[TTL] == BY_FUNCTION:
            seen = self.peek(sid)
        if isinstance(seen, Mapping) and ttl is None:
            ttl = self._life(seen, sid)
        if isinstance(session, Mapping):  # nothing else of it is stored
            session = {"cookie": session["cookie"]} if "cookie" in session else None
        return self._touch(sid, session, ttl)

    def _as_sent(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments as they travel. A ttl function and a serializer run here, where the call is made."""
        self._catch_up()
        session = given.get("session")
        if isinstance(session, Mapping) and given.get("ttl") is None:
            given["ttl"] = self._life(session, given["sid"])
        for name in ("session", "set"):
            if isinstance(given.get(name), Mapping):
                given[name] = self._encoded(given[name])
        # A generator of ids cannot travel, what it yields can.
        return {name: [*value] if isinstance(value, Iterator) else value for name, value in given.items()}

    def _encoded(self, session: Mapping[Any, Any]) -> dict[Any, Raw]:
        """Return a session with its values as bytes: these can always travel, and are stored as they come."""
        return {name: Raw(value) for name, value in self.codec.fields(self.codec.encode(session)).items()}

    _life = Store._life
    label = Store.label

    def _catch_up(self) -> bool:
        self.arena.keep_up()
        changed = self.arena.cells[OPTIONS]
        if changed == self._obeyed:
            return False
        ticket = self._catching_up.ticket()  # another thread must not go on with the old ones meanwhile
        try:
            ticket.acquire()
            if changed == self._obeyed:
                return True
            if changed != self._not_obeyed or time.monotonic() >= self._next_attempt:
                try:
                    options, serializer = _options(self._files, self._given())
                    self._obey(options)
                except (ConfigError, OSError) as exc:
                    pass_on_interruption(exc)
                    if changed != self._not_obeyed:
                        log.warning("%s has new options that this process cannot follow: %s", self.label, exc)
                    with suppress(ConfigError, OSError):
                        other = options_file.serializer(options_file.read(self._files.options)) != self._serializer
                        self._unfollowed = str(exc) if other else ""
                    self._not_obeyed, self._next_attempt = changed, time.monotonic() + _PAUSE
                else:
                    self._obeyed, self._serializer, self._unfollowed = changed, serializer, ""
                    return True
            if self._unfollowed:
                # The others could not read what this process would write, nor this one what they have written.
                raise StoreUnavailable(f"{self.label} has another serializer now: {self._unfollowed}")
            return False
        finally:
            ticket.release()

    def __len__(self) -> int:
        return self.length()

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.arena.closed

    def close(self) -> None:
        """Let go of the store: of its memory and of the connections. Using it afterwards is `StoreUnavailable`."""
        self._pool.close()
        self.arena.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what makes it a BaseProxy ----------------------------------------------------------------------------

    def _callmethod(self, methodname: str, args: Any = (), kwds: Any = {}) -> Any:  # noqa: B006
        """Call a method of the store in the server."""
        if methodname not in _READS:
            refuse_inside()
        elif methodname == "get" and inside():
            methodname = "peek"  # an expired session that `get` hands out is removed
        patience, reach = self._patience(), within(_STILL)
        lost = 0
        while True:
            try:
                most = request_limit(self.arena)
                left = max(_RETRY, reach())
                return self._pool.call(STORE, methodname, args, kwds, patience=patience, reach=left, most=most)
            except Disconnected as exc:
                lost += exc.delivered
                if lost > _LOST or (exc.delivered and methodname in _ONCE):
                    raise
                if exc.delivered:
                    patience, reach = self._patience(), within(_STILL)  # it was reached: now the next one is looked for
                self._pool.drop()
                if reach() <= _RETRY:
                    raise
            except spawn.NoServer as exc:
                # Killed, and started again within a second by the process that watches it; or ended on purpose. The
                # heartbeat says nothing here: a server may live, and its directory be another one by now.
                if not self.arena.cells[SERVER_STARTED]:
                    raise
                if reach() <= _RETRY:
                    if not lives(self.arena.cells[SERVER_PID]):
                        raise
                    raise spawn.NoServer(
                        f"the server of {self.label} runs, but not at {self._files.address}: the directory was removed "
                        "or replaced; restart the processes that use the store"
                    ) from exc
                time.sleep(_RETRY)

    def _patience(self) -> Patience:
        cells, begun = self.arena.cells, boottime_ns()
        return lambda: _STILL + (max(cells[HEARTBEAT], begun) - boottime_ns()) / 1e9

    def _incref(self) -> None:
        """Do nothing: the store lives as long as its server."""

    def __reduce__(self) -> Any:
        parent, name = os.path.split(self._files.path)
        directory = None if self._files.default else parent  # the default one is that of the user who unpickles it
        return partial(connect, directory=directory, in_place=self._in_place), (name,)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # as with any connection: a copy of what holds it still means the same store

    def __repr__(self) -> str:
        how = "in place" if self._in_place else "through its server"
        return f"<{StoreProxy.__name__} {self._files.name!r} in {os.path.dirname(self._files.path)}, {how}>"

    __str__ = __repr__


class _InPlaceProxy(Store, StoreProxy):
    """The usual proxy: works on the shared memory itself, and calls the server for what is the server's."""

    _in_place = True

    __reduce__ = StoreProxy.__reduce__
    _catch_up = StoreProxy._catch_up
    prune = StoreProxy.prune
    start_interval = StoreProxy.start_interval
    stop_interval = StoreProxy.stop_interval
    ping = StoreProxy.ping

    def __init__(self, files: StoreFiles, given: Given = dict, manager: Any = None) -> None:
        self._writes = 0
        self._next_rescue = 0.0
        self._unserved = Throttle()
        self._moved_out = Throttle()
        StoreProxy.__init__(self, files, given, manager)

    def _connect(self) -> None:
        try:
            self._pool.hold()
        except StoreUnavailable:
            self._held = 0  # just being restarted: nobody who works in place needs to notice

    def close(self) -> None:
        """Let go of the store: of its memory and of the connections. Using it afterwards is `StoreUnavailable`."""
        Store.close(self)
        self._pool.close()

    # Whoever writes looks after the server now and then: should nobody who watches it be left (the process that
    # started it was killed, say), there would be no prune any more. One write in eight, so it costs next to nothing.

    def _before_write(self) -> None:
        refuse_inside()
        cells = self.arena.cells
        if cells[OPTIONS] != self._obeyed or cells[STATE]:
            self._catch_up()
        self._writes += 1
        if not self._writes & 7:
            self.arena.settle()
            self._look_after_server()

    def _after_dispose(self, due: Due, method: Any, arguments: tuple[Any, ...]) -> Any:
        """
        Let the server do what needs a dispose: there is where that runs.

        Who only needs room, or a place that an expired session still has, gets that and goes on here: so what came of
        `add` and `rename` is known, whenever the server dies.
        """
        while method.__name__ in ("_put", "_change") and due.reason != "set":
            slot, version, epoch = due.promise
            entry = self.arena.at(slot, self._timeout)
            if epoch == self.arena.epoch:  # else it is in another file now, and there may be room
                reason = "displace" if due.displaced else due.reason
                self._callmethod("_drop", (slot, version, None if entry is None else entry[3][5], reason))
            try:
                return self._healed(method, arguments)
            except Due as next_due:
                due = next_due
        name, sent = _in_public(self, method.__name__, *arguments)
        return self._callmethod(name, sent)

    def _look_after_server(self) -> None:
        # A system call: not at each look.
        if self._writes & 63 == 8 and os.geteuid() not in (0, self._files.uid) and self._moved_out.due():
            log.warning(
                "%s in %s was opened as uid %d, and this process is uid %d now: the command line and the hooks mean "
                "that user's own store; open it after the change of user, or give its URL (SESSION_STORE)",
                self.label, self._files.path, self._files.uid, os.geteuid(),
            )  # fmt: skip
        cells = self.arena.cells
        started = cells[SERVER_STARTED]
        if started == self._held and boottime_ns() - cells[HEARTBEAT] < _LATE * 1e9:
            return
        # It is late, or another one than we are connected to and so keep alive. `started` is 0 after a shutdown.
        if self.rescues and started and time.monotonic() >= self._next_rescue:
            self._next_rescue = time.monotonic() + _LATE
            try:
                threading.Thread(target=self._rescue, name="shmstore-rescue", daemon=True).start()
            except RuntimeError:
                log.debug("%s: no thread to look after its server", self.label)

    def _rescue(self) -> None:
        try:
            if not self.arena.same_file(self._files.arena):
                return
            channel, restarted = spawn.connect_or_start(self._files)
            self._pool.drop()
            self._pool.adopt(channel)
            self._held = self.arena.cells[SERVER_STARTED]
        except NoRoom:
            self._held = self.arena.cells[SERVER_STARTED]  # there is one; others keep it
            return
        except (StoreUnavailable, ConfigError, OSError) as exc:
            pass_on_interruption(exc)
            if not self.closed and (times := self._unserved.due()):  # meanwhile, by its user
                log.warning("%s has no server, and none can be started (%d attempts): %s", self.label, times, exc)
            return
        if restarted:
            log.warning("%s: its server was gone; started another, process %d", self.label, channel.peer.pid)


def _in_public(store: _InPlaceProxy, method: str, *arguments: Any) -> tuple[str, tuple[Any, ...]]:
    """Return the method of the contract that does the same as one of Store's inner ones, and its arguments."""
    if method == "_put":
        sid, session, ttl, owner, present = arguments
        ttl = store._life(session, sid) if ttl is None else ttl  # a function runs where the call is made
        return "replace" if present else "set", (sid, store._encoded(session), ttl, owner)
    if method == "_clear_batch":
        return "clear", ()
    if method == "_destroy_batch":
        return "destroy_owned", arguments[:2]
    if method == "_take_stale":
        return method, arguments  # not `get`: the miss is counted already
    return {"_destroy": "destroy", "_destroy_if_empty": "destroy_if_empty"}[method], arguments


def connect(name_or_url: str, *, directory: str | os.PathLike[str] | None = None, in_place: bool = True) -> StoreProxy:
    """
    Attach to a running store, from any process of the same user. Never starts a server.

    Args:
        name_or_url: ``"shop"``, ``"shm://shop"``, ``"shm:///path/to/store-directory"``. For the URL of a Redis or
            Valkey server, ``"redis://host"``, it returns a `shmstore.RedisStore`, which connects when it is used.
        directory: Where stores given by their names lie; None: ``/dev/shm/shmstore-<uid>``.
        in_place: Work on the shared memory itself. False: let the server do everything, a debugging aid.

    Raises:
        StoreUnavailable: There is no such store, its server does not run, or its directory is not safe to use.
        ConfigError: The name or URL is not one.
    """
    if is_network(name_or_url):
        if directory is not None:
            raise ConfigError("a server's URL says where the store is; leave out directory")
        return cast(StoreProxy, redis_store(name_or_url))  # they have one contract
    files = StoreFiles.of(name_or_url, directory)
    store = open_proxy(files, in_place=in_place)
    spawn.warn_of_others(files)
    return store


def redis_store(url: str, options: Mapping[str, Any] = {}) -> RedisStore:
    """Return the store on a Redis or Valkey server; imported only here, as it needs a package of its own."""
    from shmstore.redis import RedisStore

    return RedisStore.from_url(url, **options)


def open_proxy(files: StoreFiles, given: Given = dict, manager: Any = None, *, in_place: bool = True) -> StoreProxy:
    """
    Return a proxy of the store in these files; see `connect`.

    Args:
        files: Where.
        given: Returns the options that this process was given itself. Its functions are preferred to their copies.
        manager: What lives as long as the proxy.
        in_place: See `connect`.
    """
    return (_InPlaceProxy if in_place else StoreProxy)(files, given, manager)


def _attach(files: StoreFiles) -> Arena:
    files.check()
    try:
        arena = Arena.open(files.arena)
    except FileNotFoundError:
        raise _no_server(files) from None
    if not arena.cells[HEARTBEAT]:
        arena.close()
        raise _no_server(files)
    return arena


def _options(files: StoreFiles, given: Mapping[str, Any]) -> tuple[Options, str | None]:
    """Return the options of the store, and their serializer as it was saved."""
    if files.uid != os.geteuid() or not trusted(files.uid):
        return Options.of(**given), None  # root, for another user: what that one has written is not for root to run
    packed = options_file.read(files.options)
    saved = options_file.unpack(packed)
    # Functions that came by value are copies, which cannot share a variable with what they were copied from.
    own = {name: given[name] for name in saved.keys() & given.keys() if _foreign(saved[name]) and _foreign(given[name])}
    return Options.of(**saved | own), options_file.serializer(packed)


def _foreign(value: object) -> bool:
    return callable(value) or hasattr(value, "dumps")


def _no_server(files: StoreFiles) -> spawn.NoServer:
    return spawn.NoServer(
        f"no server runs for store {files.name!r} in {os.path.dirname(files.path)}; "
        f"start one with StoreManager({files.name!r}).start(), or with the hooks of shmstore.gunicorn"
        f"{files.elsewhere()}"
    )
