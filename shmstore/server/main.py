"""The start of a store's server process; `spawn` runs this module."""

from __future__ import annotations

import ctypes
import errno
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
from shmstore.engine.header import CLOSED, HEARTBEAT, LIVE, MOVED, STATE
from shmstore.engine.layout import CELL, ArenaDamaged, OtherLayout, remove_abandoned
from shmstore.errors import ConfigError, ShmStoreError, StoreFull, StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.directory import StoreFiles
from shmstore.options import Options
from shmstore.server.server import StoreServer, geometry_for, waiting
from shmstore.server.snapshots import restore
from shmstore.store import live_options
from shmstore.store.rebuild import rebuild
from shmstore.store.trace import log_to_stderr, obey_environment
from shmstore.system.files import LEAVING, open_nofollow, try_lock
from shmstore.system.processes import CAPABILITY_VERSION, PROCESS_LIMIT_ADVICE, open_standard_descriptors

log = logging.getLogger("shmstore")

# The signals that a terminal, a process manager or `pkill gunicorn` may send to a whole process group. The server exits
# on a request over its socket, or when no process is connected; it may also be killed at any time.
_IGNORED = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH", "TTIN", "TTOU", "TSTP", "PIPE")

_NOGROUP = 65534  # the kernel's overflow group, to which no process belongs


def start(
    files: StoreFiles, given: bytes | None, progress: Callable[[int], object] = lambda _: None
) -> StoreServer | None:
    """
    Return a server that listens; None if another server of the store runs.

    Args:
        files: The files of the store.
        given: The packed options; None: the options of the previous server.
        progress: Called at intervals while sessions are moved or restored.

    Raises:
        StoreFull: The file system has no space for the memory, or for the small files. No incomplete file stays.
        StoreUnavailable: Processes of another version of shmstore use the store, or it was removed before a restart.
    """
    if given is None:
        if not os.path.lexists(files.arena):
            raise _removed(files)
        files.check()
    else:
        files.create()
    try:
        return _start(files, given, progress)
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if not os.path.lexists(files.arena):
            files.remove(starting=True)
        raise StoreFull(f"{files.path}: no space left, not even for small files; give it a larger tmpfs") from exc


def _removed(files: StoreFiles) -> StoreUnavailable:
    return StoreUnavailable(f"store {files.name!r} was removed, so its server is not restarted")


def _start(files: StoreFiles, given: bytes | None, progress: Callable[[int], object]) -> StoreServer | None:
    # The lock is held until this process ends, however it ends. The timeout lets a previous server finish its exit.
    lock = files.claim(timeout=5.0)
    if lock is None:
        return None
    existed = os.path.lexists(files.arena)
    if given is None and not existed:  # the previous server has removed the store during the wait
        files.remove(starting=True)
        raise _removed(files)
    remove_abandoned(files.path)
    arena = _open_existing(files)
    packed = packed_options(files, given, arena)
    options = Options.of(**options_file.unpack(packed))
    try:
        options_file.save(files.options, packed)
        if arena is None:
            arena = _create(files, options, progress)
        elif asked := waiting(arena, options):
            arena = _resize(files, arena, options, asked, progress)
        return StoreServer(files, lock, arena, packed)
    except BaseException:
        if not existed:
            files.remove(starting=True)
        raise


def packed_options(files: StoreFiles, given: bytes | None, arena: Arena | None) -> bytes:
    """
    Return the packed options of a server that starts.

    Defaults do not replace the options of a server that was killed: a start that gives none uses the saved ones. A
    `directory` is not counted, because it only says where the store is. Saved options that cannot be read, as functions
    of another Python version, are replaced if no process uses the store.

    Args:
        files: The files of the store.
        given: The packed options of the start; None: a restart with the saved options.
        arena: The arena of the previous server, if there is one.

    Raises:
        ConfigError: The saved options cannot be read, and processes that use the store may depend on them.
    """
    killed = arena is not None and arena.cells[HEARTBEAT]
    if given is not None and (not killed or options_file.unpack(given).keys() - {"directory"}):
        return given
    own = options_file.pack({}) if given is None else given
    try:
        saved = options_file.read(files.options)
        Options.of(**options_file.unpack(saved))
    except FileNotFoundError:
        return own
    except ConfigError as exc:
        if arena is None or not arena.file.is_alone():
            raise
        log.error("store %r starts without the options that it had: %s", files.name, exc)  # noqa: TRY400
        return own
    return saved


def _open_existing(files: StoreFiles) -> Arena | None:
    """
    Return the arena of the previous server; None if a new one must be created.

    Raises:
        StoreUnavailable: The arena has another layout, and processes use it.
    """
    try:
        arena = Arena.open(files.arena)
    except FileNotFoundError:
        return None
    except OtherLayout as exc:
        if _in_use(files.arena):
            raise StoreUnavailable(
                f"{files.arena} is in use by processes of another version of shmstore: to change the version, "
                f"stop all of them (`fuser {files.arena}` lists them), then start"
            ) from exc
        log.error("store %r: its memory cannot be used, its sessions are lost: %s", files.name, exc)  # noqa: TRY400
        return None
    except ArenaDamaged as exc:
        if isinstance(exc.__cause__, IsADirectoryError):
            log.error("store %r is not started: %s", files.name, exc)  # noqa: TRY400
            raise  # a directory with files that the store did not create is not removed
        log.error("store %r: its memory cannot be used, its sessions are lost: %s", files.name, exc)  # noqa: TRY400
        return None
    state = arena.cells[STATE]
    if state == LIVE:
        return arena
    if state != CLOSED and arena.file.is_at(files.arena):
        arena.cells[STATE] = LIVE  # a server that was replacing the file died before the new file took its place
        return arena
    arena.close()
    # Closed: the server was killed before it had removed the store. Otherwise another file has just replaced this one.
    return None if state == CLOSED else _open_existing(files)


def _in_use(path: str) -> bool:
    """Return whether a process uses this file as its arena. The layout does not matter."""
    with open(open_nofollow(path), "rb") as file:
        return not try_lock(file.fileno(), LEAVING)


def _create(files: StoreFiles, options: Options, progress: Callable[[int], object]) -> Arena:
    """Create an arena with the sessions of the snapshot. Its file appears when it is complete."""
    arena, temporary = Arena.prepare(files.arena, options.geometry)
    try:
        live_options.publish(arena, options)  # before its file appears: processes that follow to it obey at once
        restore(files.name, arena, options, progress)
        _publish(temporary, files.arena)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return arena


def _publish(temporary: str, path: str) -> None:
    """
    Rename a new arena to its path.

    A file at this path that could not be opened as an arena is marked as moved, so that the processes that use it open
    the new one. Otherwise they would continue with sessions that no other process sees.
    """
    old = -1
    with suppress(OSError):
        old = open_nofollow(path, os.O_RDWR)
    try:
        os.rename(temporary, path)
        if old >= 0:
            status = os.fstat(old)
            if stat.S_ISREG(status.st_mode) and not status.st_nlink:  # a file that has another name too is not changed
                os.pwrite(old, MOVED.to_bytes(CELL, sys.byteorder), STATE * CELL)
    finally:
        if old >= 0:
            os.close(old)


def _resize(
    files: StoreFiles, arena: Arena, options: Options, asked: list[str], progress: Callable[[int], object]
) -> Arena:
    """Rebuild the arena for these options if no other process uses it; return the arena that holds the sessions."""
    names = " and ".join(asked)
    if not arena.file.exclusive:
        log.warning(
            "store %r keeps the memory it has: another %s takes effect at a start without users; `fuser %s` lists them",
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
        log.log(
            level, "store %r: rebuilt with another %s; %d sessions dropped for lack of space", files.name, names, left
        )
    return adopted[0] if adopted else arena


def main() -> None:
    """Run a server. Standard input is a socket: it supplies the order and takes the report."""
    open_standard_descriptors()  # otherwise the copy of 0 may become 2
    for name in _IGNORED:
        signal.signal(getattr(signal, f"SIG{name}"), signal.SIG_IGN)
    starter = socket.socket(fileno=os.dup(0))
    starter.settimeout(None)  # the starter's gevent may have made it non-blocking
    try:
        if os.fork():
            os._exit(0)  # the server gets another parent, so that the starter does not reap or signal it by mistake
    except OSError as exc:
        message = f"the store's server cannot start: {exc.strerror}{PROCESS_LIMIT_ADVICE}"
        _tell(starter, {"error": "StoreUnavailable", "message": message})
        os._exit(1)
    os.setsid()  # after the fork: the first process leads a group, so it cannot
    os.umask(0o077)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each thread of each worker may have a connection
    with suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write("shmstore")  # otherwise `pkill gunicorn` matches the server
    with suppress(OSError), open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(2, 1)  # the output of callbacks goes to the log
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
                sys.exit(1)  # the starter was killed before it sent the order
            order, given = json.loads(line), stream.read()
        if not order["keep_stderr"] and stat.S_ISFIFO(os.fstat(2).st_mode):
            # A reader waits for the end of the starter's output: `$(...)`, a pager, cron. The server must not delay it.
            quiet = True
        _change_user(*order["user"])
        files = StoreFiles(order["path"], os.geteuid(), os.getegid(), order["default"])
        server = start(files, None if order["restart"] else given, _progress_reporter(starter))
        if server is None:
            owner = f"process {files.server() or 'of another container, or one that is about to exit,'}"
            report = {"error": "StoreUnavailable", "message": f"{owner} serves store {files.name!r}"}
        else:
            report = {"ready": True}
    except ShmStoreError as exc:
        report = {"error": type(exc).__name__, "message": str(exc)}
    except Exception as exc:
        log.exception("store %r: the server cannot start", sys.argv[-1])
        report = {"error": "StoreUnavailable", "message": f"the store's server cannot start: {exc!r}"}
    with suppress(OSError):  # the starter may have died; other processes find this server
        _tell(starter, report)
    starter.close()
    if quiet:
        with suppress(OSError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
    if server is None:
        sys.exit(1)
    server.serve_forever()


def _tell(starter: socket.socket, report: dict[str, Any]) -> None:
    starter.sendall(json.dumps(report).encode() + b"\n")


def _progress_reporter(starter: socket.socket) -> Callable[[int], object]:
    """Return a function that shows progress to the starter: it sends a space before the report, once a second."""
    last = time.monotonic()

    def report(_: int) -> None:
        nonlocal last
        if time.monotonic() - last > 1:
            last = time.monotonic()
            with suppress(OSError):
                starter.send(b" ", socket.MSG_DONTWAIT)

    return report


def _change_user(uid: int, gid: int) -> None:
    """
    Become the store's user irrevocably, before a file of the store is opened.

    Processes of that user can make the server run their code. So the server keeps nothing that they do not have: no
    other real or saved id, no group of root, no capability.

    Raises:
        StoreUnavailable: The kernel refuses the change.
    """
    try:
        if os.getresuid() != (uid, uid, uid):
            _import_dill()
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
    """Return the primary group of a user, because the starter named only root's group."""
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_gid or _NOGROUP
    return _NOGROUP


def _drop_capabilities() -> None:
    # The service has capabilities by systemd's AmbientCapabilities=; other processes of its user do not.
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    failed = libc.capget(header, held)
    if any(held):
        _import_dill()
        failed = failed or libc.capset(header, (ctypes.c_uint32 * 6)())
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _import_dill() -> None:
    """Import dill while this process may read Python's modules; functions among the options need it later."""
    import shmstore.system.import_dill  # noqa: F401


if __name__ == "__main__":
    main()
