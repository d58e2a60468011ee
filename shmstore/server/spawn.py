"""Reaching the server of a store, and starting it when there is none: from any process, one at a time."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

from multiprocess import spawn

from shmstore import errors
from shmstore.errors import ConfigError, ShmStoreError, StoreUnavailable
from shmstore.server import options_file
from shmstore.server.directory import StoreFiles
from shmstore.server.rpc import Channel, Disconnected, OtherVersion, Patience, Unresponsive, trusted, within
from shmstore.system.processes import PROCESS_LIMIT_ADVICE, Process, status
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")

# Seconds to import, reserve the memory and listen, on a machine that does much else; and from one sign of life to the
# next while it carries sessions over, or restores them.
_START_TIMEOUT = 15.0
_ANSWER_TIMEOUT = 2.0  # seconds for a greeting
_SECOND_CHANCE = 0.5  # seconds for another one, before a server that gave none is killed
_LEAVING = 60.0  # seconds that a server of another version has to save its snapshot
_LONGEST_REPORT = 65536

# What a server's interpreter runs: with this process' sys.path, before its own, as it may be another interpreter.
# PYTHONPATH cannot carry it: a colon parts its entries.
SYS_PATH = "SHMSTORE_SYS_PATH"
BOOT = (
    f"import json, os, sys; sys.path[:0] = json.loads(os.environ.pop({SYS_PATH!r})); "
    "import shmstore.server.main as server; server.main()"
)

# Whether servers started here log to this process' stderr even if that is a pipe: Gunicorn's is its log, and lasts.
keep_stderr = False

# By path and process: a child of fork is another.
_attached, _of_others = Throttle(), Throttle()


class NoServer(StoreUnavailable):
    """Nobody serves the store."""


def connect(files: StoreFiles, timeout: float = _ANSWER_TIMEOUT, *, leaving: Patience | None = None) -> Channel:
    """
    Return a connection to the running server.

    Args:
        files: Where.
        timeout: How long it may take, in seconds.
        leaving: As for `Channel.greet`; it may take as long in addition.

    Raises:
        NoServer: There is none, or it is just leaving.
        StoreUnavailable: This process cannot get at it: the message says why.
        OtherVersion: The server is of another version, and in use.
        Unresponsive: There is one, and it does not answer within ``timeout`` seconds.
    """
    patience = within(timeout)
    try:
        sock = files.dial(timeout)
    except (BlockingIOError, TimeoutError) as exc:
        pass_on_interruption(exc)
        raise Unresponsive(f"the server of store {files.name!r} accepts no connections") from exc
    except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError) as exc:
        raise NoServer(f"no server runs for store {files.name!r} in {files.path}") from exc
    except OSError as exc:
        pass_on_interruption(exc)
        raise StoreUnavailable(
            f"no connection to the server of store {files.name!r}: {exc.strerror}{_advice(files, exc)}"
        ) from exc
    try:
        return Channel.greet(sock, patience, leaving=leaving)
    except Disconnected as exc:
        sock.close()
        raise NoServer(f"the server of store {files.name!r} has just left") from exc
    except BaseException:
        sock.close()
        raise


def _advice(files: StoreFiles, exc: OSError) -> str:
    """Return what to do when the socket cannot be got at; raise `StoreUnavailable` if the directory is the reason."""
    if exc.errno in (errno.EMFILE, errno.ENFILE):
        return ""
    if os.geteuid() not in (files.uid, 0):
        return (
            f" ({files.address}): this process is uid {os.geteuid()} now, and has opened the store as uid {files.uid}; "
            "open it after the change of user, or give its URL (SESSION_STORE), which is opened at the first use"
        )
    files.check()
    return f" ({files.address}): restart the processes that use the store"


def connect_as_starter(
    files: StoreFiles,
    options: bytes | None = None,
    timeout: float = _ANSWER_TIMEOUT,
    leaving: Patience | None = None,
) -> Channel:
    """
    Return a connection to the running server, as a process that can start one: one of another version shall leave.

    If others use it, it stays, and serves this process too if both understand each other.

    Args:
        files: Where.
        options: What it will be given, packed; None: nothing.
        timeout: How long it may take to answer, in seconds.
        leaving: How long one of another version may take to leave; None: `_LEAVING` seconds.

    Raises:
        NoServer: There is none, or not any more.
        ConfigError: One of the two has options that are functions, and they are of different versions of Python.
        StoreUnavailable: As `connect`; `OtherVersion` names the processes that use it.
    """
    try:
        return connect(files, timeout, leaving=leaving or within(_LEAVING))
    except OtherVersion as other:
        if not other.speaks:
            raise
        try:
            if options is not None:
                options_file.check(options, other.python)
            if trusted(files.uid):  # else they are not read
                with suppress(FileNotFoundError):
                    options_file.check(options_file.read(files.options))
        except ConfigError as exc:
            raise ConfigError(f"{exc}; {other.users}") from other
    return connect(files, timeout)


def connect_or_start(
    files: StoreFiles, options: bytes | None = None, *, timeout: float = _ANSWER_TIMEOUT
) -> tuple[Channel, bool]:
    """
    Return a connection to the server, and whether this call started it. One that hangs is replaced, and so is one of
    another version that nobody uses.

    Args:
        files: Where.
        options: What `byvalue.pack` returned, for a first start; None: those the last server left.
        timeout: How long a server that runs has to answer, in seconds.

    Raises:
        StoreUnavailable: It cannot be started; or whatever error it ended with.
        ConfigError, StoreUnavailable: As `connect_as_starter`.
    """
    leaving = within(_LEAVING)  # for both attempts
    try:
        return connect_as_starter(files, options, timeout, leaving), False
    except Unresponsive:
        timeout = min(timeout, _SECOND_CHANCE)
    except NoServer:
        pass
    if options is None:
        files.check()  # a store that was removed meanwhile is not made anew by who only looks after its server
    else:
        files.create()
    with files.starting(_START_TIMEOUT):
        try:
            return connect_as_starter(files, options, timeout, leaving), False  # another process was faster
        except Unresponsive:
            kill(files)
        except NoServer:
            pass
        try:
            _spawn(files, options)
        except OSError as exc:  # no descriptors, no processes, no memory
            pass_on_interruption(exc)
            advice = PROCESS_LIMIT_ADVICE if exc.errno == errno.EAGAIN else ""
            raise StoreUnavailable(f"the server of store {files.name!r} could not be started: {exc}{advice}") from exc
        return connect(files, _START_TIMEOUT), True


def say_attached(files: StoreFiles, pid: int) -> None:
    """Log that this process uses the store that process ``pid`` serves. There are some that attach at each request."""
    if log.isEnabledFor(logging.INFO) and _attached.due((files.path, os.getpid())):
        log.info("store %r: attached; process %d serves it", files.name, pid)


def warn_of_others(files: StoreFiles) -> None:
    """Warn that another user has a store of that name: a cron job of root, say, would work on one of its own."""
    if (others := files.of_others()) and _of_others.due((files.path, os.getpid())):
        log.warning(
            "store %r in %s is not the one that %s has: to use that one, run this as that user (%s ...)",
            files.name, os.path.dirname(files.path), ", ".join(others), shlex.join(["sudo", "-u", others[0]]),
        )  # fmt: skip


def kill(files: StoreFiles, why: str = "it did not answer") -> bool:
    """Kill the server that holds the store, if there is one, and log why. Return whether there was."""
    pid = files.server()
    if pid is None:
        return False
    with suppress(ProcessLookupError), Process(pid) as process:
        # Asked again now that a pidfd pins the process: only the server itself can still be the holder. But what the
        # file says is the word of the store's user, who must not have root kill another's process.
        if files.server() == pid and _is_of(pid, files.uid):
            process.kill()
            process.wait(_ANSWER_TIMEOUT)
            log.warning("store %r: its server, process %d, was killed: %s", files.name, pid, why)
            return True
    return False


def _is_of(pid: int, uid: int) -> bool:
    if os.getresuid() == (uid, uid, uid):
        return True  # then it is our own word; and without being root we cannot kill another's
    with suppress(OSError, KeyError):
        return {int(each) for each in status(pid)["Uid"].split()} == {uid}
    return False


def kill_stopped(files: StoreFiles) -> bool:
    """Kill the server that holds the store if it was stopped, by SIGSTOP: it may hold the store's lock as well."""
    pid = files.server()
    with suppress(OSError, KeyError):
        stopped = pid is not None and status(pid)["State"].startswith("T")
        return stopped and kill(files, "it was stopped, and others waited for the store's lock")
    return False


def _spawn(files: StoreFiles, options: bytes | None) -> None:
    """
    Start a server and wait until it serves. Called with the start lock.

    By exec, so that it has none of the listeners, signal handlers and threads of this process, and never runs the
    user's main program again. It detaches itself: nobody here has a child to reap, to join or to kill.
    """
    # A socket, looked up at call time, and not the pipes of Popen: gevent's would need its own Popen and loop.
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(  # noqa: S603
                [_python(), "-P", "-c", BOOT, files.name],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
                close_fds=True,
                env=os.environ | {SYS_PATH: json.dumps([os.path.abspath(entry) for entry in sys.path])},
            )
        try:
            report = _tell(ours, files, options)
        except OSError as exc:
            pass_on_interruption(exc)
            raise StoreUnavailable(
                f"the server of store {files.name!r} could not be started within {_START_TIMEOUT:g} s ({exc})"
            ) from exc
        finally:
            process.kill()  # it is gone already, but for one that hangs in its first imports
            process.wait()
    if report.get("ready"):
        return
    error = getattr(errors, str(report.get("error")), None)
    if not (isinstance(error, type) and issubclass(error, ShmStoreError)):
        error = StoreUnavailable
    message = report.get("message", f"the server of store {files.name!r} ended while it started: see its log")
    raise error("".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(message)))


def _tell(ours: socket.socket, files: StoreFiles, options: bytes | None) -> dict[str, Any]:
    ours.settimeout(_START_TIMEOUT)
    order = {
        "path": files.path,
        "user": (files.uid, files.gid),
        "default": files.default,
        "restart": options is None,
        "keep_stderr": keep_stderr,
    }
    with suppress(BrokenPipeError):  # it has already ended: its report, if any, says why
        ours.sendall(json.dumps(order).encode() + b"\n" + (options or b""))
        ours.shutdown(socket.SHUT_WR)
    report = b""
    while len(report) < _LONGEST_REPORT and (part := ours.recv(4096)):
        report += part
    # JSON, because a root process starts servers for other users and must not run what they send.
    try:
        told = json.loads(report) if report else {}
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise StoreUnavailable(f"the server of store {files.name!r} gave a report that cannot be read: see its log")
    return told


def _python() -> str:
    """Return the interpreter to run. Embedded in another program (uWSGI, mod_wsgi), ``sys.executable`` is none."""
    chosen = os.fsdecode(spawn.get_executable() or b"")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    beside = os.path.join(sys.exec_prefix, "bin")
    candidates = [os.path.join(beside, f"python{version}"), os.path.join(beside, "python3")]
    if chosen != sys.executable or os.path.basename(chosen).startswith(("python", "pypy")):
        candidates.insert(0, chosen)  # the usual one, or one given to multiprocess.set_executable()
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return candidate
    raise StoreUnavailable(
        f"there is no Python interpreter at {' or '.join(candidates)} to run the store's server; "
        "name one with multiprocess.set_executable(path)"
    )
