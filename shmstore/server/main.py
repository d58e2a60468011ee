"""The server process of a store: how it begins. Run by `launch`."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import os
import pwd
import resource
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from shmstore.engine.arena import Arena
from shmstore.engine.header import CLOSED, HEARTBEAT, LIVE, MAX, MAX_PER_OWNER, MOVED, STATE
from shmstore.engine.layout import CELL, ArenaDamaged, OtherLayout, remove_abandoned
from shmstore.engine.rebuild import rebuild
from shmstore.errors import ShmStoreError, StoreFull, StoreUnavailable
from shmstore.options import Options
from shmstore.server import options_file
from shmstore.server.directory import StoreFiles
from shmstore.server.server import StoreServer, geometry_for, waiting
from shmstore.server.snapshot_schedule import restore
from shmstore.store.trace import log_to_stderr, obey_environment
from shmstore.system.processes import PROCESS_LIMIT_ADVICE, open_standard_descriptors

log = logging.getLogger("shmstore")

# All that a terminal, a process manager or `pkill gunicorn` may send to a whole group. The server ends when it is
# asked to over its socket, or when nobody is connected any more; it may also be killed at any time.
_IGNORED = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH", "TTIN", "TTOU", "TSTP", "PIPE")

_NOGROUP = 65534  # the kernel's own number for a group that is nobody's
_CAPABILITY_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3


def start(
    files: StoreFiles, given: bytes | None, progress: Callable[[int], object] = lambda _: None
) -> StoreServer | None:
    """
    Return a server that listens, None if the store has one.

    Args:
        files: Where.
        given: The packed options; None: those of the server before.
        progress: Called now and then while many sessions are moved, or restored.

    Raises:
        StoreFull: There is no room for the memory, or for the small files beside it. Nothing half-made stays.
        StoreUnavailable: Processes of another version of shmstore use the store.
    """
    if given is None and not os.path.lexists(files.arena):
        raise StoreUnavailable(f"store {files.name!r} was removed, so there is nothing that a server could go on with")
    files.create()
    try:
        return _start(files, given, progress)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if not os.path.lexists(files.arena):
            files.remove(starting=True)
        raise StoreFull(f"{files.path}: no space left, not even for small files; give it a larger tmpfs") from exc


def _start(files: StoreFiles, given: bytes | None, progress: Callable[[int], object]) -> StoreServer | None:
    # Held until this process ends, however it ends. A server that is just leaving gets time to do so.
    lock = files.claim(timeout=5.0)
    if lock is None:
        return None
    remove_abandoned(files.path)
    existed = os.path.lexists(files.arena)
    arena = _there(files)
    packed = options_file.pack({}) if given is None else given
    if given is None or (not options_file.unpack(given) and arena is not None and arena.cells[HEARTBEAT]):
        with suppress(FileNotFoundError):
            # The last server was killed: defaults do not override its options.
            packed = options_file.read(files.options)
    options = Options.of(**options_file.unpack(packed))
    try:
        options_file.save(files.options, packed)
        if arena is None:
            arena = _make(files, options, progress)
        elif asked := waiting(arena, options):
            arena = _resize(files, arena, options, asked, progress)
        return StoreServer(files, lock, arena, packed)
    except BaseException:
        if not existed:
            files.remove(starting=True)
        raise


def _there(files: StoreFiles) -> Arena | None:
    """
    Return the arena that a server before has left.

    Raises:
        StoreUnavailable: It is of another layout, and processes use it.
    """
    try:
        arena = Arena.open(files.arena)
    except FileNotFoundError:
        return None
    except OtherLayout as exc:
        if _in_use(files.arena):
            raise StoreUnavailable(
                f"{files.arena} is in use by processes of another version of shmstore: to go from one to another, "
                f"stop all of them (`fuser {files.arena}` names them), then start"
            ) from exc
        log.error("store %r begins anew, its sessions are lost: %s", files.name, exc)  # noqa: TRY400
        return None
    except ArenaDamaged as exc:
        if isinstance(exc.__cause__, IsADirectoryError):
            log.error("store %r is not started: %s", files.name, exc)  # noqa: TRY400
            raise  # what is in it is somebody's, and not for us to remove
        log.error("store %r begins anew, its sessions are lost: %s", files.name, exc)  # noqa: TRY400
        return None
    state = arena.cells[STATE]
    if state == LIVE:
        return arena
    if state != CLOSED and arena.file.is_at(files.arena):
        arena.cells[STATE] = LIVE  # a server that was replacing the file died before the new file took its place
        return arena
    arena.close()
    # Closed: its server was killed before it had removed the store. Otherwise another file has just taken its place.
    return None if state == CLOSED else _there(files)


def _in_use(path: str) -> bool:
    """Return whether a process has this file open as its arena, of whatever layout."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _make(files: StoreFiles, options: Options, progress: Callable[[int], object]) -> Arena:
    """Make an arena with the sessions of the snapshot. Its file appears when it is complete."""
    arena, temporary = Arena.prepare(files.arena, options.geometry)
    try:
        arena.cells[MAX], arena.cells[MAX_PER_OWNER] = options.max or 0, options.max_per_owner or 0
        restore(files.name, arena, options, progress)
        _put_in_place(temporary, files.arena)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return arena


def _put_in_place(temporary: str, path: str) -> None:
    """
    Rename a new arena to its path. If a file was there that could not be opened as an arena, the processes that use it
    are told to open the new one: otherwise they would go on with sessions that no other process sees.
    """
    old = -1
    with suppress(OSError):
        old = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.rename(temporary, path)
        if old >= 0:
            status = os.fstat(old)
            if stat.S_ISREG(status.st_mode) and not status.st_nlink:  # a file with another name is not changed
                os.pwrite(old, MOVED.to_bytes(CELL, sys.byteorder), STATE * CELL)
    finally:
        if old >= 0:
            os.close(old)


def _resize(
    files: StoreFiles, arena: Arena, options: Options, asked: list[str], progress: Callable[[int], object]
) -> Arena:
    """Carry the sessions over to memory of the size asked for if no other process uses them; return where they are."""
    names = " and ".join(asked)
    if not arena.file.exclusive:
        log.warning(
            "store %r keeps the memory it has: another %s takes effect when nobody uses it; `fuser %s` tells who does",
            files.name, names, files.arena,
        )  # fmt: skip
        return arena
    adopted: list[Arena] = []
    try:
        left = rebuild(arena, adopted.append, geometry_for(options, arena), progress=progress)
    except ShmStoreError as exc:
        log.warning("store %r keeps the memory it has: %s", files.name, exc)
    else:
        level = logging.WARNING if left else logging.INFO
        log.log(level, "store %r has another %s; %d sessions found no room in it", files.name, names, left)
    return adopted[0] if adopted else arena


def main() -> None:
    """Run a server: the order comes in over standard input, which is a socket, and the answer goes out there."""
    open_standard_descriptors()  # else the copy of 0 made below may be 2
    for name in _IGNORED:
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
    starter = socket.socket(fileno=os.dup(0))
    starter.settimeout(None)  # gevent makes its sockets non-blocking, this end too
    try:
        if os.fork():
            os._exit(0)  # so that the server is nobody's child: nobody reaps it, joins it or signals it by mistake
    except OSError as exc:
        message = f"the store's server cannot start: {exc.strerror}{PROCESS_LIMIT_ADVICE}"
        starter.sendall(json.dumps({"error": "StoreUnavailable", "message": message}).encode())
        os._exit(1)
    os.umask(0o077)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for each thread of each worker
    with suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write("shmstore")  # `pkill gunicorn` is not for us
    with suppress(OSError), open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(2, 1)  # what a callback prints goes to the log
    obey_environment()
    log_to_stderr()
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    server, quiet = None, False
    report: dict[str, Any] = {}
    try:
        with starter.makefile("rb") as stream:
            line = stream.readline()
            if not line:
                sys.exit(1)  # the starter was killed before it had said what to start
            order, given = json.loads(line), stream.read()
        if not order["keep_stderr"] and stat.S_ISFIFO(os.fstat(2).st_mode):
            # Somebody is reading the starter's output to its end: `$(...)`, a pager, cron. It ends with the starter.
            quiet = True
        _become(*order["user"])
        files = StoreFiles(order["path"], os.geteuid(), os.getegid(), order["default"])
        server = start(files, None if order["restart"] else given, _signs_of_life(starter))
        if server is None:
            keeper = f"process {files.server() or 'of another container, or one that is just leaving,'}"
            report = {"error": "StoreUnavailable", "message": f"{keeper} keeps store {files.name!r}"}
        else:
            report = {"ready": True}
    except ShmStoreError as exc:
        report = {"error": type(exc).__name__, "message": str(exc)}
    except Exception as exc:
        log.exception("store %r: the server cannot start", sys.argv[-1])
        report = {"error": "StoreUnavailable", "message": f"the store's server cannot start: {exc!r}"}
    with suppress(OSError):  # the starter may have died; who needs a server will find this one
        starter.sendall(json.dumps(report).encode())
    starter.close()
    if quiet:
        with suppress(OSError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
    if server is None:
        sys.exit(1)
    server.serve_forever()


def _signs_of_life(starter: socket.socket) -> Callable[[int], object]:
    """Return what tells the starter, now and then, that this takes long but goes on: a space in front of the report."""
    last = time.monotonic()

    def tell(_: int) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            with suppress(OSError):
                starter.send(b" ", socket.MSG_DONTWAIT)

    return tell


def _become(uid: int, gid: int) -> None:
    """
    Be the store's user wholly and for good, before a file of the store is opened: its processes can have code run here.

    Nothing is left by which that code could get at more than they: no other real or saved id, no group of root's, no
    capability.

    Raises:
        StoreUnavailable: That cannot be done.
    """
    try:
        if uid and 0 in os.getresuid():
            os.seteuid(0)  # if the starter has only lowered its effective uid
            os.setgroups([])
            gid = gid or _group_of(uid)
        if os.getresgid() != (gid, gid, gid):
            os.setresgid(gid, gid, gid)
        if os.getresuid() != (uid, uid, uid):
            os.setresuid(uid, uid, uid)
        if uid:
            _drop_capabilities()
    except OSError as exc:
        raise StoreUnavailable(
            f"the store's server cannot become uid {uid}, gid {gid} ({exc.strerror}): its starter has the uids "
            f"{os.getresuid()} and gids {os.getresgid()}; start it as the store's user"
        ) from exc


def _group_of(uid: int) -> int:
    """Return the group of a user whose starter names none but root's."""
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_gid or _NOGROUP
    return _NOGROUP


def _drop_capabilities() -> None:
    # What systemd's AmbientCapabilities= gives a service, its user's other processes have not.
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, held) or (any(held) and libc.capset(header, (ctypes.c_uint32 * 6)())):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main()
