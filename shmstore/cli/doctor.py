"""The command doctor: checks whether this machine and a store on it are healthy, and gives advice."""

from __future__ import annotations

import glob
import os
import platform
import re
import secrets
import shlex
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import click

from shmstore import snapshot
from shmstore.cli.findings import BROKEN, NOTE, OK, Finding, report
from shmstore.cli.output import sessions
from shmstore.cli.server_checks import check_server
from shmstore.cli.target import complete, directory_option, exists, files_of, json_option, open_on_server
from shmstore.client import connection
from shmstore.contract import AnyStore
from shmstore.engine import core, layout
from shmstore.engine.arena import Arena
from shmstore.engine.header import CLOSED, SNAPSHOT_FAILURES, STATE
from shmstore.engine.layout import ArenaDamaged, OtherLayout
from shmstore.errors import ConfigError, ShmStoreError, SnapshotError, StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.channel import Unresponsive
from shmstore.ipc.directory import ARENA, StoreFiles
from shmstore.ipc.handshake import PROTOCOL, ConnectionLimitReached
from shmstore.options import Options, format_duration, format_size
from shmstore.server.snapshots import obstacle
from shmstore.store.store import Store
from shmstore.system.platform import LACKING, LIBC, pwd, resource
from shmstore.system.processes import memory_left
from shmstore.urls import is_network

_ADVICE: Final = 'docs/understand/what-survives-what.md, "Restricted environments", says what may be missing'
_USUAL: Final = Options().memory
_DOCKER: Final = 64 * 10**6 + 2**22  # bytes; a little more than Docker's default
_DESCRIPTORS: Final = 512  # twice the number of connections that a server accepts
_PACKAGES: Final = ("shmstore", "multiprocess", "msgspec", "flask", "gunicorn")
_MIN_GUNICORN: Final = 23
_SYSTEM_USERS: Final = 999  # systemd's SYS_UID_MAX
_LOGIND: Final = ("usr/lib", "run", "etc")


@click.command()
@click.argument("store", metavar="[STORE]", required=False, shell_complete=complete)
@directory_option
@json_option
def doctor(store: str | None, directory: str | None, as_json: bool) -> None:
    """
    Check this machine and a store; say what to do about problems.

    Without STORE a small store is started, used and removed, to test whether a store can run. For a store on Redis or
    Valkey the server is checked, and a session of doctor's own is written, read and removed.

    The exit code is 1 if something is broken or the store does not exist; warnings do not count.
    """
    if store is not None and is_network(store):
        target = open_on_server(store)
        with target.store:
            report([*_software((*_PACKAGES, "redis", "hiredis")), *check_server(target)], as_json)
        return
    if store is not None:
        files = files_of(store, directory)
        exists(files)
    else:
        files = StoreFiles.of("any", directory)
    findings = [*_software(_PACKAGES), *([] if LACKING else [*_limits(), *_place(files)])]
    findings += _trial(files) if store is None else _store(files)
    report(findings, as_json)


def _software(packages: Sequence[str]) -> Iterator[Finding]:
    machine = platform.machine()
    text = f"{platform.python_implementation()} {platform.python_version()} on {machine}, {LIBC or sys.platform}"
    tested = machine in ("x86_64", "AMD64")
    yield Finding("python", OK if tested else NOTE, text, "" if tested else "only x86-64 is tested")
    try:
        yield Finding("engine", NOTE if core.problem() else OK, core.engine(), core.problem())
    except ConfigError as exc:
        yield Finding("engine", BROKEN, str(exc), "unset SHMSTORE_ENGINE: then the C core runs if there is one")
    for name in packages:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(name, OK, "not installed" if name in ("gunicorn", "hiredis") else "version not known")
            continue
        old = name == "gunicorn" and int(found.partition(".")[0]) < _MIN_GUNICORN
        yield Finding(name, NOTE if old else OK, found, f"upgrade to {_MIN_GUNICORN} or newer" if old else "")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard != resource.RLIM_INFINITY and hard < _DESCRIPTORS  # the server raises its soft limit to the hard one
    yield Finding(
        "open files",
        NOTE if few else OK,
        f"{_limit(soft)}, at most {_limit(hard)}",
        f"allow {_DESCRIPTORS}: LimitNOFILE= of systemd, or ulimit -n" if few else "",
    )
    for name, kind in (("address space", resource.RLIMIT_AS), ("file size", resource.RLIMIT_FSIZE)):
        least = resource.getrlimit(kind)[0]
        low = least != resource.RLIM_INFINITY and least < 4 * _USUAL
        advice = "a store is one file, mapped into each process: raise it, or give a small memory=" if low else ""
        yield Finding(name, NOTE if low else OK, _limit(least, format_size), advice)
    with suppress(OSError, ValueError, StopIteration):
        free = layout.available()
        low = free < _USUAL
        advice = f"a store has {format_size(_USUAL)} if no memory= is given" if low else ""
        limited = " to this process' control group" if free == memory_left() else ""
        yield Finding("memory", NOTE if low else OK, f"{format_size(free)} available{limited}", advice)


def _limit(value: int, shown: Any = str) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else shown(value)


def _place(files: StoreFiles) -> Iterator[Finding]:
    parent = os.path.dirname(files.path)
    there = parent
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if files.default and not os.path.isdir("/dev/shm"):  # noqa: S108
        advice = "name another directory, in a tmpfs if possible: directory=PATH"
        yield Finding("directory", BROKEN, "no directory /dev/shm", advice)
        return
    kind = _file_system(there)
    disk = os.statvfs(there)
    whole, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    text = f"{there} is on {kind}, {format_size(whole)}, {format_size(free)} free"
    if not os.access(there, os.W_OK | os.X_OK):
        advice = "name a directory that this user can write, in a tmpfs if possible: directory=PATH"
        yield Finding("directory", BROKEN, f"{there} is not writable", advice)
    elif kind != "tmpfs":
        yield Finding(
            "directory", NOTE, text, "the kernel writes sessions to a disk there: use a tmpfs, as /dev/shm is"
        )
    elif whole <= _DOCKER:
        advice = "one store of the usual size fills it: docker run --shm-size=256m, or give a small memory="
        yield Finding("directory", NOTE, text, advice)
    elif free < _USUAL:
        advice = (
            f"no room for a store of the usual {format_size(_USUAL)}: mount -o remount,size=... {_mount_point(there)}"
        )
        yield Finding("directory", NOTE, text, advice)
    else:
        yield Finding("directory", OK, text)
    if disk.f_files and disk.f_favail < 16:
        yield Finding("inodes", NOTE, f"{disk.f_favail} free", f"remove files: {there} is short of inodes")
    if kind == "tmpfs" and parent.startswith("/dev/shm/"):  # noqa: S108
        yield remove_ipc(files.uid)


def _trial(files: StoreFiles) -> Iterator[Finding]:
    """Use a private store and a shared one, as an application of this user would, to find out what prevents it."""

    def use(store: AnyStore) -> None:
        store.set("doctor", {"ill": False}, ttl=60)
        if store.get("doctor") != {"ill": False}:
            raise StoreUnavailable("a session that was written could not be read")

    try:
        with Store(memory=layout.MIN_MEMORY) as private:
            use(private)
        yield Finding("private store", OK, "works")
    except (ShmStoreError, OSError) as exc:
        yield Finding("private store", BROKEN, str(exc), _ADVICE)
    if LACKING:
        advice = "develop here with private stores or Redis, and run on Linux: see docs/start/platforms.md"
        yield Finding("shared store", NOTE, LACKING, advice)
        return
    name = f"doctor-{os.getpid()}-{secrets.token_hex(4)}"
    directory = None if files.default else os.path.dirname(files.path)
    with _captured_stderr() as said:
        try:
            from shmstore.manager import StoreManager  # only now: it takes as long to import as all else

            manager = StoreManager(name, memory=layout.MIN_MEMORY, persist=False, directory=directory)
            with manager, manager.store() as shared:
                use(shared)
                shared.ping()
            yield Finding("shared store", OK, "starts, works and ends")
        except (ShmStoreError, OSError) as exc:
            logged = said().splitlines()[-1:]
            yield Finding("shared store", BROKEN, "; ".join([str(exc), *logged]), _ADVICE)


@contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Capture the log of a server that is started; yield a function that returns it."""
    with open(os.memfd_create("stderr"), "r+b") as memory:
        kept = os.dup(2)
        try:
            os.dup2(memory.fileno(), 2)
            yield lambda: os.pread(memory.fileno(), 2**16, 0).decode(errors="replace")
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _mounts() -> list[tuple[str, str]]:
    """Return the mount points and the types of their file systems."""
    found = []
    with (
        suppress(FileNotFoundError),
        open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts,
    ):
        for mount in mounts:
            before, _, after = mount.partition(" - ")
            point = re.sub(r"\\([0-7]{3})", lambda each: chr(int(each[1], 8)), before.split()[4])
            found.append((point, after.split()[0]))
    return found


def _mount_point(path: str) -> str:
    path = os.path.realpath(path)
    points = [point for point, _ in _mounts() if path == point or path.startswith(f"{point.rstrip('/')}/")]
    return max(points, key=len, default="/")


def _file_system(path: str) -> str:
    point = _mount_point(path)
    if layout.in_memory(path):
        return "tmpfs"  # without /proc, which lists other file systems, this one is still recognised
    return next((kind for where, kind in reversed(_mounts()) if where == point), "an unknown file system")


def remove_ipc(uid: int, root: str = "/") -> Finding:
    """Report whether systemd removes a user's files in /dev/shm when the user's last session ends."""
    about = "RemoveIPC"
    if not os.path.isdir(os.path.join(root, "run/systemd/system")):
        return Finding(about, OK, "systemd does not run here")
    if uid <= _SYSTEM_USERS:
        return Finding(about, OK, f"uid {uid} is a system user, whose files systemd keeps")
    with suppress(KeyError):
        if os.path.exists(os.path.join(root, "var/lib/systemd/linger", pwd.getpwuid(uid).pw_name)):
            return Finding(about, OK, f"uid {uid} lingers: its user manager is never stopped")
    if not _removes_ipc(root):
        return Finding(about, OK, "disabled in logind.conf")
    advice = "set RemoveIPC=no in /etc/systemd/logind.conf and restart systemd-logind, or use a system user"
    return Finding(about, NOTE, f"systemd removes the stores of uid {uid} when that user logs out", advice)


def _removes_ipc(root: str) -> bool:
    files = {}
    for base in _LOGIND:  # of drop-ins with the same name the last one counts; they apply in the order of their names
        for path in glob.glob(os.path.join(glob.escape(root), base, "systemd/logind.conf.d/*.conf")):
            files[os.path.basename(path)] = path
    main = [os.path.join(root, base, "systemd/logind.conf") for base in reversed(_LOGIND)]
    setting = "yes"
    for path in [*[each for each in main if os.path.exists(each)][:1], *(files[name] for name in sorted(files))]:
        with suppress(OSError):
            for found in re.finditer(
                r"^\s*RemoveIPC\s*=\s*(\w+)", Path(path).read_text(errors="replace"), re.MULTILINE
            ):
                setting = found[1]
    return setting.lower() not in ("no", "false", "off", "0")


def _store(files: StoreFiles) -> Iterator[Finding]:
    try:
        files.check()
    except StoreUnavailable as exc:
        yield Finding("store", BROKEN, str(exc))
        return
    for name in (ARENA, "options", "lock"):
        with suppress(FileNotFoundError):
            path = os.path.join(files.path, name)
            status = os.lstat(path)
            if not stat.S_ISREG(status.st_mode):
                yield Finding("store", BROKEN, f"{path} is not a file", "check what it is, and move it away")
                return
            if status.st_uid not in (files.uid, 0) or status.st_mode & 0o077:
                text = f"{path} belongs to uid {status.st_uid} and has mode {status.st_mode & 0o7777:04o}"
                yield Finding("permissions", BROKEN, text, f"chown {files.uid} {path}; chmod 600 {path}")
    try:
        arena = Arena.open(files.arena)
    except OtherLayout as exc:
        yield Finding("store", NOTE, str(exc))
        return
    except ArenaDamaged as exc:
        yield Finding("store", BROKEN, str(exc), "the next server starts with an empty store: its sessions are lost")
        return
    except ShmStoreError as exc:
        yield Finding("store", BROKEN, str(exc))
        return
    try:
        if arena.cells[STATE] == CLOSED:
            yield Finding("store", BROKEN, f"store {files.name!r} was just removed")
            return
        text = f"{files.path}, {format_size(arena.geometry.size)}, layout {layout._VERSION}"
        yield Finding("store", OK, text)
        failures = arena.cells[SNAPSHOT_FAILURES]
        if "(T (" in (holder := arena.file.mutex.holder()):
            yield Finding("lock", BROKEN, f"held by {holder}", "continue or kill it: other processes wait for the lock")
    finally:
        arena.close()
    yield from _options(files, failures)
    yield _server(files)


def _options(files: StoreFiles, failures: int) -> Iterator[Finding]:
    try:
        given = options_file.load(files.options)
    except FileNotFoundError:
        yield Finding("options", OK, "not saved")
    except ConfigError as exc:
        yield Finding("options", BROKEN, str(exc))
    else:
        yield Finding("options", OK, ", ".join(sorted(given)) or "defaults")
        if (path := given.get("snapshot")) is not None:
            yield _snapshot(files, os.path.abspath(path), failures)


def _snapshot(files: StoreFiles, path: str, failures: int) -> Finding:
    about = "snapshot"
    if problem := obstacle(path):
        return Finding(about, BROKEN, f"cannot be saved: {problem}")
    try:
        found = snapshot.describe(path)
    except FileNotFoundError:
        found = None
    except SnapshotError as exc:
        return Finding(about, BROKEN, str(exc), "a store that loses its memory starts without it: move it away")
    if failures:
        since = "none exists" if found is None else f"the last one is {format_duration(max(0, found.age))} old"
        advice = f"see the log of its server for the reason, or run: shmstore save {files.name} {shlex.quote(path)}"
        return Finding(about, BROKEN, f"{path} could not be saved ({failures} attempts); {since}", advice)
    if found is None:
        return Finding(about, OK, f"not yet at {path}")
    if found.store != files.name:
        advice = "it is neither read nor replaced: name another file"
        return Finding(about, BROKEN, f"{path} is the snapshot of store {found.store!r}", advice)
    text = f"{path}, {sessions(found.sessions)}, {format_duration(max(0, found.age))} old"
    mode = os.stat(os.path.dirname(path)).st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        advice = "an older snapshot put there would log in users who have logged out: keep it elsewhere"
        return Finding(about, NOTE, f"{text}; other users can write in its directory", advice)
    return Finding(about, OK, text)


def _server(files: StoreFiles) -> Finding:
    try:
        channel = connection.connect(files)
    except ConnectionLimitReached as exc:
        return Finding("server", NOTE, str(exc), "close connections: each thread of each worker may hold one")
    except Unresponsive as exc:
        pid = files.server()
        return Finding(
            "server", BROKEN, str(exc), f"kill -9 {pid}: no session is lost, another server starts" if pid else ""
        )
    except connection.NoServer:
        advice = "the next user starts one (Gunicorn's hooks, Flask, StoreManager), or: shmstore serve"
        return Finding("server", NOTE, "not running", advice)
    except StoreUnavailable as exc:
        return Finding("server", BROKEN, str(exc), "stop all processes that use the store, then start them again")
    pid = channel.peer.pid
    channel.close()
    return Finding("server", OK, f"process {pid} answers, protocol {PROTOCOL}")
