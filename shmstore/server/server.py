"""What a store's server does once it runs: who may connect, what they may call, when it leaves."""

from __future__ import annotations

import glob
import logging
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from multiprocess.managers import Server

from shmstore.engine.arena import Arena
from shmstore.engine.header import HEARTBEAT, MOVED, RESTARTS, SERVER_PID, SERVER_STARTED, SESSIONS, STATE
from shmstore.engine.layout import MIN_MEMORY, ArenaDamaged, Geometry, remove_abandoned
from shmstore.engine.option_cells import OptionsDamaged
from shmstore.errors import ShmStoreError, StoreUnavailable
from shmstore.options import Options
from shmstore.server import options_file
from shmstore.server.directory import StoreFiles
from shmstore.server.rpc import (
    FULL,
    GREETING,
    MAGIC,
    OTHER,
    SERVER,
    SERVER_METHODS,
    STALL,
    STORE,
    STORE_METHODS,
    Channel,
    deadline_in,
    describe_server,
    greeting,
    peer_of,
    trusted,
)
from shmstore.server.single_instance import SingleInstance
from shmstore.server.snapshot_schedule import Keeper
from shmstore.store.retry import LocalUpkeep, Retryable
from shmstore.store.store import Store, request_limit
from shmstore.system import version
from shmstore.system.clock import boottime_ns
from shmstore.system.processes import is_running
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")

LINGER = 3.0  # seconds that the server stays when nobody is connected any more
_HURRY = 0.2  # the same, when the last one has said that it goes
_CONNECTIONS = 256
_BEAT = 1.0
_QUICK_BEAT = 0.25  # while a process waits for a snapshot, or for the end of this server
_TRACEBACK = re.compile(r"Traceback .*\n((?: .*\n)*)([\w.]+)")  # the frames, and the error's class
_REMOVED = "the directory of store %r, or a file in it, was removed or replaced: it is made again"


class _ServerUpkeep(LocalUpkeep):
    """The upkeep of the server's arena, which no other process replaces while this one is the server."""

    def reopen(self, store: Retryable) -> Arena:
        raise StoreUnavailable("another server has taken the place of this one")

    def repair(self, store: Retryable, arena: Arena, damage: ArenaDamaged) -> None:
        store.repair(arena, damage, lambda _: _beat(arena))


class StoreServer(Server):  # type: ignore[misc] # multiprocess has no types
    """
    Serves one store to the processes of one user.

    `multiprocess.managers.Server` does the dispatch (``serve_client``); who may connect, how long and how many is
    decided here, before a byte is parsed or a thread is started.
    """

    # No creating, no reference counts, no debug_info, no `repr` or pickle of the objects themselves.
    public: ClassVar[list[str]] = []
    fallback_mapping: ClassVar[dict[str, Any]] = {}

    def __init__(self, files: StoreFiles, lock: int, arena: Arena, packed: bytes) -> None:
        # Not super().__init__(): it would listen, at a path of 107 bytes at most, and authenticate with a key.
        self.files = files
        self.options = options = Options.of(**options_file.unpack(packed))
        self._packed = packed
        self.address = files.address
        self.stop_event = threading.Event()
        self.mutex = threading.Lock()  # guards options and the store made from them
        self.id_to_local_proxy_obj: dict[str, Any] = {}
        self.id_to_obj: dict[str, Any] = {SERVER: (self, SERVER_METHODS, None)}
        self._store = Store.over(arena, options, _ServerUpkeep())
        self._store.publish_options()
        self.id_to_obj[STORE] = (self._store, STORE_METHODS, None)
        self._keeper = Keeper(files.name, self._store)
        self._linger = LINGER
        self._saving: set[object] = set()  # one for each who waits for a snapshot
        self._place_errors = Throttle()
        self._seen, self._told = "", False  # who held the store's lock at the last look
        self._client_errors = Throttle()
        self._waiting: dict[socket.socket, tuple[float, bytes]] = {}  # not greeted yet: deadline, what they sent
        self._served: set[_Client] = set()
        self._used = 0.0  # when a client was there last; 0: none has come yet
        self._asking: list[socket.socket] = []  # clients of other versions that wait for the end of this server
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if arena.cells[HEARTBEAT]:
            arena.cells[RESTARTS] += 1  # the one before has died
        _beat(arena)  # from here on, zero means that the server has left on purpose
        self._instance = SingleInstance(files, lock)

    @property
    def arena(self) -> Arena:
        """The memory of the store."""
        return self._store.arena

    # -- what a client may ask ------------------------------------------------------------------------------------

    def apply(self, packed: bytes, merge: bool) -> list[str]:
        """
        Follow these options from now on.

        Args:
            packed: What `byvalue.pack` made of them.
            merge: Leave the others as they are, instead of giving them back their defaults.

        Returns:
            Those that have to wait for a new arena.

        Raises:
            StoreUnavailable: They cannot be kept for a restart. Nothing has changed.
        """
        given = options_file.unpack(packed)
        with self.mutex:
            options = Options.of(**{**self.options.given, **given} if merge else given)
            try:
                packed = options_file.pack(options.given)
                changed = options_file.save(self.files.options, packed)
            except OSError as exc:
                raise StoreUnavailable(
                    f"store {self.files.name!r} keeps the options it had: new ones cannot be saved: {exc.strerror}"
                ) from exc
            self.options, self._packed = options, packed
            self._store.change_options(options)
            self._keeper.obey(options)
            if changed:
                names = ", ".join(sorted(options.given)) or "defaults only"
                log.info("store %r follows other options from now on: %s", self.files.name, names)
            return waiting(self.arena, options)

    def repair(self, identity: Sequence[int], damage: str, options: bool) -> None:
        """
        Repair the memory for a process that has met damage.

        Args:
            identity: Device and inode of the damaged file. Nothing is done if the sessions are in another file.
            damage: What was found.
            options: Whether it is in the cells of the options.

        Raises:
            StoreUnavailable: That cannot be done now.
        """
        arena = self.arena
        if arena.file.identity() == tuple(identity):
            self._store.upkeep.repair(self._store, arena, (OptionsDamaged if options else ArenaDamaged)(damage))

    def release(self) -> None:
        """
        Do not linger: the process that asks is going, and if it is the last one nobody will follow.

        The snapshot is saved before this is answered: in a container nothing may be left of us a moment later.
        """
        self._save_for_who_waits()
        self._linger = _HURRY
        self._awake()

    def shutdown(self) -> None:
        """Save the snapshot, and end after this has been answered."""
        self._save_for_who_waits()
        self.stop_event.set()
        self.arena.cells[SERVER_STARTED] = 0  # on purpose: who still works in place is not to start another one
        self._awake()

    def _save_for_who_waits(self) -> None:
        waits = object()
        self._saving.add(waits)
        self._awake()
        try:
            self._keeper.save()
        finally:
            self._saving.discard(waits)

    def _awake(self) -> None:
        os.eventfd_write(self._wake, 1)

    # -- the loop -------------------------------------------------------------------------------------------------

    def serve_forever(self) -> None:
        """Serve until `shutdown`, or until nobody has been connected for a while."""
        cells = self.arena.cells
        _beat(self.arena)
        cells[SERVER_PID] = os.getpid()
        cells[SERVER_STARTED] = boottime_ns()
        self._store.start_interval()
        self._keeper.obey(self.options)
        log.info(
            "store %r: process %d serves %d sessions in %.1f MiB at %s",
            self.files.name, os.getpid(), cells[SESSIONS], self.arena.geometry.size / 2**20, self.files.path,
        )  # fmt: skip
        selector = self._selector = selectors.DefaultSelector()
        selector.register(self._instance.listener, selectors.EVENT_READ, self._accept)
        selector.register(self._wake, selectors.EVENT_READ, lambda _: os.eventfd_read(self._wake))
        begun = last_look = time.monotonic()
        # No `finally`: an error of ours is like being killed. Another server goes on, and nothing is removed.
        while not self.stop_event.is_set():
            beat = _QUICK_BEAT if self._saving or self._asking else _BEAT
            events = selector.select(min(beat, self._linger / 2))
            for key, _ in events:
                key.data(key.fileobj)
            now = time.monotonic()
            if now - last_look >= _BEAT:
                last_look = now
                self._restore_files()
                if self.stop_event.is_set():
                    break
                self._look_at_lock()
                with suppress(ShmStoreError):
                    self._store.check_options()
                    self.arena.counters.flush()  # this process waits for the lock as well, and reads nothing
            _beat(self.arena)
            for sock in [sock for sock, (deadline, _) in self._waiting.items() if deadline < now]:
                self._dismiss(sock)
            if self._served:
                self._used = now
                if self._asking and (users := self._users()):
                    _tell(self._asking, users)
            elif now - (self._used or begun) >= self._idle_timeout() and self._keeper.saved(self._awake):
                asked = "a process of another version asked for it"
                self._leave(asked if self._asking else "nobody is connected any more")
                return
        self._leave()

    def _restore_files(self) -> None:
        """See to it that the store's path leads to the memory in use, its socket to this server."""
        files, instance = self.files, self._instance
        try:
            with suppress(OSError):
                remove_abandoned(files.path)
            there = self.arena.file.is_at(files.arena) and os.path.lexists(files.options)
            if not (there and instance.owns_socket() and instance.holds_lock()):
                self._complain(_REMOVED, files.name)
                files.create()
                # The lock too: by it a server that hangs is found and ended, and there is no second one.
                if not instance.retake_lock():
                    # Somebody has started a server there in this second. There must not be two: ours follow that one.
                    log.error("store %r: process %s has taken the place: this one ends", files.name, files.server())
                    self.arena.cells[STATE] = MOVED
                    self.stop_event.set()
                    return
                self._make_place_again()
            with self.mutex:
                if options_file.save(files.options, self._packed):
                    log.warning("store %r: the file of its options was damaged; it is written again", files.name)
            self._place_errors.reset()
        except (ShmStoreError, OSError) as exc:
            self._complain("store %r cannot be kept at %s: %s", files.name, files.path, exc)

    def _make_place_again(self) -> None:
        files, instance = self.files, self._instance
        with self.mutex:
            options_file.save(files.options, self._packed)  # first: who finds the arena needs them
        if not self.arena.file.is_at(files.arena):
            arena = self.arena
            self._store.move(progress=lambda _: _beat(arena))
        if not instance.owns_socket():
            old = instance.listener
            instance.listen()
            self._selector.unregister(old)
            old.close()
            self._selector.register(instance.listener, selectors.EVENT_READ, self._accept)

    def _look_at_lock(self) -> None:
        """Say who holds the store's lock and stands still: those who wait for it get errors."""
        holder = self.arena.file.mutex.holder()
        if "(T (" in holder and holder == self._seen and not self._told:
            log.error("store %r: %s has been holding its lock; continue it, or kill it", self.files.name, holder)
            self._told = True
        if holder != self._seen:
            self._seen, self._told = holder, False

    def _complain(self, message: str, *about: object) -> None:
        """Log an error that lasts: each second there is another attempt."""
        if self._place_errors.due(message):
            log.error(message, *about)

    def _annoyed(self, message: str, *about: object) -> None:
        """Warn of what each connection or request may bring about, once a minute, with how often it did."""
        if times := self._client_errors.due(message):
            log.warning(f"store %r: {message}", self.files.name, times, *about)

    def _leave(self, why: str = "it was asked to") -> None:
        ours = self._instance.holds_lock()  # else another server keeps the store
        self._instance.close()  # first
        self._store.stop_interval()
        if ours:
            self.arena.cells[HEARTBEAT] = self.arena.cells[SERVER_PID] = 0
            rest = "its sessions stay" if self.options.persist else "its sessions go with it, as persist=False says"
            log.info("store %r: the server, process %d, ends: %s; %s", self.files.name, os.getpid(), why, rest)
        if ours and not self.options.persist:
            self.arena.mark_closed()  # who still works in place is not to write into what nobody will find
            self.files.remove()
        deadline = deadline_in(0.5)  # for the answers under way, that to `shutdown` among them
        while any(client.busy for client in list(self._served)) and deadline() > 0:
            time.sleep(0.005)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as exc:
            # Out of descriptors. The connection stays in the backlog, so trying again at once would spin.
            self._annoyed("%d connections could not be accepted: %s", exc.strerror)
            time.sleep(0.05)
            return
        uid = peer_of(sock).uid
        if not trusted(uid):
            self._annoyed("refused %d connections of other users, the last of uid %d", uid)
            sock.close()
            return
        if len(self._waiting) + len(self._served) + len(self._asking) >= _CONNECTIONS:
            # Those who do not even greet make room first.
            if not self._waiting:
                self._annoyed("refused %d connections, %d is the most: use fewer threads or workers", _CONNECTIONS)
                _refuse(sock)
                return
            oldest = next(iter(self._waiting))
            self._forget(oldest)
            _refuse(oldest)
        sock.setblocking(False)
        self._waiting[sock] = (time.monotonic() + STALL, b"")
        self._selector.register(sock, selectors.EVENT_READ, self._greet)

    def _greet(self, sock: socket.socket) -> None:
        deadline, said = self._waiting[sock]
        try:
            part = sock.recv(len(GREETING) - len(said))
        except OSError:
            part = b""
        said += part
        if part and len(said) < len(GREETING):
            self._waiting[sock] = (deadline, said)
            return
        if said in (greeting(), greeting(version.fingerprint())):
            with suppress(OSError):
                sock.sendall(said)
            self._forget(sock)
            self._serve(sock)
        elif len(said) == len(GREETING) and said.startswith(MAGIC):
            self._forget(sock)
            self._answer_other(sock, asks=any(said[-4:]))
        else:
            self._dismiss(sock)

    # A client of another version is no use of this server: however often one comes, the server leaves when it is due.

    def _answer_other(self, sock: socket.socket, *, asks: bool) -> None:
        """Tell a client of another version which processes use this server; or let it wait for the end, if it asks."""
        _sent(sock, OTHER)
        if asks:
            self._asking.append(sock)
        else:
            _tell([sock], self._users())

    def _idle_timeout(self) -> float:
        """Return how many seconds more this server stays without a client."""
        for sock in list(self._asking):
            if not _sent(sock, b" "):  # a sign of life
                sock.close()
                self._asking.remove(sock)
        # One that has had no client yet waits for the process that has started it.
        return 0.0 if self._asking and self._used else self._linger

    def _users(self) -> list[int]:
        """Return the processes that use the store, as far as they can be seen from here."""
        pids = {client.peer.pid for client in list(self._served) if not client.is_closed()}
        there = {pid for pid in pids if is_running(pid)}
        if there != pids:
            # Their children hold the connections; these have the arena mapped too.
            for path in glob.glob("/proc/[0-9]*/maps"):
                with suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape") as maps:
                    if any(line.endswith(f" {self.files.arena}\n") for line in maps):
                        there.add(int(path.split("/")[2]))
        return sorted(there - {os.getpid()} or pids)

    def _dismiss(self, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._waiting[sock]

    def _serve(self, sock: socket.socket) -> None:
        client = _Client(Channel(sock, limit=request_limit(self.arena)), self._annoyed)
        self._linger = LINGER
        self._used = time.monotonic()
        self._served.add(client)
        try:
            threading.Thread(target=self._serve_until_closed, args=(client,), daemon=True).start()
        except RuntimeError as exc:
            self._annoyed("refused %d connections: there is no thread for another: %s", exc)
            self._served.discard(client)
            client.close()

    def _serve_until_closed(self, client: _Client) -> None:
        try:
            self.serve_client(client)
        except SystemExit:
            pass  # how serve_client ends with its connection
        finally:
            client.close()
            self._used = time.monotonic()
            self._served.discard(client)
            self._awake()


class _Client:
    """
    A connected client, as `Server.serve_client` wants it.

    Attributes:
        busy: Whether a request is being carried out or answered.
        ended: Returns whether the other end has closed; its thread may not have noticed yet.
        peer: The process at the other end.
    """

    def __init__(self, channel: Channel, annoyed: Callable[..., None]) -> None:
        self.busy = False
        self._annoyed = annoyed
        self.close = channel.close
        self.is_closed = channel.is_closed
        self.peer = channel.peer
        self._channel = channel
        self._number = 0

    def recv(self) -> Any:
        self.busy = False
        try:
            self._number, payload = self._channel.recv()
        except OSError as exc:
            raise EOFError from exc  # what came is no message, so nothing after it is
        self.busy = True
        return self._channel.loads(payload)

    def send(self, answer: tuple[str, Any]) -> None:
        kind, result = answer
        if kind not in ("#RETURN", "#ERROR"):
            # Tracebacks come of malformed requests and of results that cannot be pickled. Their frames are for our log,
            # their texts for nobody: one may quote a session, or name a file of ours.
            found = _TRACEBACK.match(result)
            frames, error = found.groups() if found else ("", "an error")
            self._annoyed("%d requests failed, the last one with %s\n%s", error, frames.rstrip())
            answer = ("#ERROR", StoreUnavailable(f"the request failed in the server with {error}: see its log"))
        try:
            self._channel.send(self._number, answer)
        except OSError:
            sys.exit()  # who asked has gone; half an answer may be out, so there must not be another one


def _beat(arena: Arena) -> None:
    """Show the other processes that this server is alive."""
    arena.cells[HEARTBEAT] = boottime_ns()


def _sent(sock: socket.socket, what: bytes) -> bool:
    """Send some bytes, as they are few, without waiting; return False if the other end is gone."""
    try:
        sock.send(what, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _tell(clients: list[socket.socket], users: list[int]) -> None:
    for sock in clients:
        _sent(sock, describe_server(users))
        sock.close()
    clients.clear()


def _refuse(sock: socket.socket) -> None:
    """Close a connection that there is no room for; it is not to take us for gone, and start another server."""
    with suppress(OSError):
        sock.send(FULL, socket.MSG_DONTWAIT)
    sock.close()


def waiting(arena: Arena, options: Options) -> list[str]:
    """Return the options asked for that this arena cannot follow: its size is fixed."""
    names = []
    # Not simply another geometry: the same memory is divided a little differently for another `max`.
    if "memory" in options.given and abs(options.geometry.size - arena.geometry.size) >= MIN_MEMORY // 2:
        names.append("memory")
    # Only if that would help: of a very large `max` there may be as many places as go into the memory.
    if options.max is not None and arena.geometry.slots < min(options.max, geometry_for(options, arena).slots):
        names.append("max")
    return names


def geometry_for(options: Options, arena: Arena) -> Geometry:
    """Return the geometry that these options ask for; if they say nothing about memory, an arena keeps its size."""
    if "memory" in options.given:
        return options.geometry
    return Geometry.of_size(arena.geometry.size, None if options.length else options.max)
