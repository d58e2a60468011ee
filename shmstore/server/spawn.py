"""Connecting to the server of a store, and starting it if necessary: from any process, one start at a time."""

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

from shmstore import errors
from shmstore.errors import ConfigError, ShmStoreError, StoreUnavailable
from shmstore.server import options_file
from shmstore.server.directory import StoreFiles
from shmstore.server.rpc import Channel, Deadline, Disconnected, OtherVersion, Unresponsive, deadline_in, trusted
from shmstore.system.platform import LACKING
from shmstore.system.processes import PROCESS_LIMIT_ADVICE, Process, status
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")

# Seconds to import, reserve the memory and listen, on a busy machine; and between two signs of life while the server
# copies sessions to a rebuilt file or loads a snapshot.
_START_TIMEOUT = 15.0
_ANSWER_TIMEOUT = 2.0  # seconds for a greeting
_RETRY_TIMEOUT = 0.5  # seconds for a second greeting, before a server that did not answer is killed
_LEAVE_TIMEOUT = 60.0  # seconds for a server of another version to save its snapshot and exit
_MAX_REPORT = 65536

# The program of a server's interpreter. It gets this process' sys.path in front of its own, because it may be another
# interpreter. PYTHONPATH cannot pass it: a colon separates its entries.
SYS_PATH = "SHMSTORE_SYS_PATH"
BOOT = (
    f"import json, os, sys; sys.path[:0] = json.loads(os.environ.pop({SYS_PATH!r})); "
    "import shmstore.server.main as server; server.main()"
)

# Whether servers started here log to this process' stderr even if that is a pipe: Gunicorn's is its log and stays open.
keep_stderr = False

# By path and process, so that a forked child logs its own lines.
_attach_log, _other_users_log = Throttle(), Throttle()


class NoServer(StoreUnavailable):
    """No server runs for the store."""


def connect(files: StoreFiles, timeout: float = _ANSWER_TIMEOUT, *, leaving: Deadline | None = None) -> Channel:
    """
    Return a connection to the running server.

    Args:
        files: The files of the store.
        timeout: Maximum seconds for the connection.
        leaving: As for `Channel.greet`; its time is added to ``timeout``.

    Raises:
        NoServer: No server runs, or it is exiting.
        StoreUnavailable: This process cannot connect; the message says why.
        OtherVersion: The server is of another version and in use.
        Unresponsive: A server runs and does not answer within ``timeout`` seconds.
    """
    if LACKING:
        raise StoreUnavailable(LACKING)
    deadline = deadline_in(timeout)
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
        return Channel.greet(sock, deadline, leaving=leaving)
    except Disconnected as exc:
        sock.close()
        raise NoServer(f"the server of store {files.name!r} has just exited") from exc
    except BaseException:
        sock.close()
        raise


def _advice(files: StoreFiles, exc: OSError) -> str:
    """Return advice on a failed connection; raise `StoreUnavailable` if the store's directory is the reason."""
    if exc.errno in (errno.EMFILE, errno.ENFILE):
        return ""
    if os.geteuid() not in (files.uid, 0):
        return (
            f" ({files.address}): this process is uid {os.geteuid()} now, and opened the store as uid {files.uid}; "
            "open it after the change of user, or pass its URL (SESSION_STORE), which is opened on first use"
        )
    files.check()
    return f" ({files.address}): restart the processes that use the store"


def connect_as_starter(
    files: StoreFiles,
    options: bytes | None = None,
    timeout: float = _ANSWER_TIMEOUT,
    leaving: Deadline | None = None,
) -> Channel:
    """
    Return a connection to the running server, for a process that can start one: a server of another version is asked
    to exit.

    If other processes use that server it stays, and serves this process too if their protocols are compatible.

    Args:
        files: The files of the store.
        options: The packed options that the server will receive; None: no options.
        timeout: Maximum seconds for its answer.
        leaving: The deadline for the exit of a server of another version; None: `_LEAVE_TIMEOUT` seconds.

    Raises:
        NoServer: No server runs, or it has exited.
        ConfigError: One of the two processes has options that are functions, and their Python versions differ.
        StoreUnavailable: As `connect`; `OtherVersion` names the processes that use the server.
    """
    try:
        return connect(files, timeout, leaving=leaving or deadline_in(_LEAVE_TIMEOUT))
    except OtherVersion as other:
        if not other.compatible:
            raise
        try:
            if options is not None:
                options_file.check(options, other.python)
            if trusted(files.uid):  # otherwise the options of this process are not used
                with suppress(FileNotFoundError):
                    options_file.check(options_file.read(files.options))
        except ConfigError as exc:
            raise ConfigError(f"{exc}; {other.users}") from other
    return connect(files, timeout)


def connect_or_start(
    files: StoreFiles, options: bytes | None = None, *, timeout: float = _ANSWER_TIMEOUT
) -> tuple[Channel, bool]:
    """
    Return a connection to the server, and whether this call started it. A server that does not answer is replaced, and
    so is an unused server of another version.

    Args:
        files: The files of the store.
        options: What `options_file.pack` returned, for a first start; None: the options that the last server saved.
        timeout: Seconds for the answer of a running server.

    Raises:
        StoreUnavailable: The server cannot be started, or ended with this error.
        ConfigError, StoreUnavailable: As `connect_as_starter`.
    """
    leaving = deadline_in(_LEAVE_TIMEOUT)  # for both attempts
    try:
        return connect_as_starter(files, options, timeout, leaving), False
    except Unresponsive:
        timeout = min(timeout, _RETRY_TIMEOUT)
    except NoServer:
        pass
    if options is None:
        files.check()  # a restart must not recreate a store that was removed in the meantime
    else:
        files.create()
    with files.starting(_START_TIMEOUT):
        try:
            return connect_as_starter(files, options, timeout, leaving), False  # another process has started it
        except Unresponsive:
            kill(files)
        except NoServer:
            pass
        try:
            _spawn(files, options)
        except OSError as exc:  # out of descriptors, processes or memory
            pass_on_interruption(exc)
            advice = PROCESS_LIMIT_ADVICE if exc.errno == errno.EAGAIN else ""
            raise StoreUnavailable(f"the server of store {files.name!r} could not be started: {exc}{advice}") from exc
        return connect(files, _START_TIMEOUT), True


def log_attached(files: StoreFiles, pid: int) -> None:
    """Log that this process uses the store that process ``pid`` serves. Throttled: some programs attach per request."""
    if log.isEnabledFor(logging.INFO) and _attach_log.due((files.path, os.getpid())):
        log.info("store %r: attached; process %d serves it", files.name, pid)


def warn_of_other_users(files: StoreFiles) -> None:
    """Warn that another user has a store of the same name: root's cron job, for example, would use a separate one."""
    if (others := files.other_owners()) and _other_users_log.due((files.path, os.getpid())):
        log.warning(
            "store %r in %s is not the one that %s has: to use that one, run this as that user (%s ...)",
            files.name, os.path.dirname(files.path), ", ".join(others), shlex.join(["sudo", "-u", others[0]]),
        )  # fmt: skip


def kill(files: StoreFiles, why: str = "it did not answer") -> bool:
    """Kill the server that holds the store and log the reason; return whether a server was killed."""
    pid = files.server()
    if pid is None:
        return False
    with suppress(ProcessLookupError), Process(pid) as process:
        # Checked again now that a pidfd pins the process: if the answer is the same, it is the server. The owner of the
        # store controls the file and must not be able to make root kill another user's process, hence the second check.
        if files.server() == pid and _belongs_to(pid, files.uid):
            process.kill()
            process.wait(_ANSWER_TIMEOUT)
            log.warning("store %r: its server, process %d, was killed: %s", files.name, pid, why)
            return True
    return False


def _belongs_to(pid: int, uid: int) -> bool:
    if os.getresuid() == (uid, uid, uid):
        return True  # the file is this user's, and only root can kill another user's process
    with suppress(OSError, KeyError):
        return {int(each) for each in status(pid)["Uid"].split()} == {uid}
    return False


def kill_stopped(files: StoreFiles) -> bool:
    """Kill the server that holds the store if it is stopped (SIGSTOP), because it may also hold the store's lock."""
    pid = files.server()
    with suppress(OSError, KeyError):
        stopped = pid is not None and status(pid)["State"].startswith("T")
        return stopped and kill(files, "it was stopped, and other processes waited for the store's lock")
    return False


def _spawn(files: StoreFiles, options: bytes | None) -> None:
    """
    Start a server and wait until it serves. Called with the start lock.

    The server is executed as a program, so it inherits none of this process' listeners, signal handlers and threads,
    and never runs the user's main program again. It detaches itself, so this process has no child to reap or kill.
    """
    # A socket, looked up at call time, instead of the pipes of Popen: gevent's need its own Popen and event loop.
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
            report = _exchange(ours, files, options)
        except OSError as exc:
            pass_on_interruption(exc)
            raise StoreUnavailable(
                f"the server of store {files.name!r} could not be started within {_START_TIMEOUT:g} s ({exc})"
            ) from exc
        finally:
            process.kill()  # it has already ended, unless it hangs in its first imports
            process.wait()
    if report.get("ready"):
        return
    error = getattr(errors, str(report.get("error")), None)
    if not (isinstance(error, type) and issubclass(error, ShmStoreError)):
        error = StoreUnavailable
    message = report.get("message", f"the server of store {files.name!r} exited during its start: see its log")
    raise error("".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(message)))


def _exchange(ours: socket.socket, files: StoreFiles, options: bytes | None) -> dict[str, Any]:
    """Send the server its instructions and options, and return its report."""
    ours.settimeout(_START_TIMEOUT)
    instructions = {
        "path": files.path,
        "user": (files.uid, files.gid),
        "default": files.default,
        "restart": options is None,
        "keep_stderr": keep_stderr,
    }
    with suppress(BrokenPipeError):  # it has already ended; its report, if any, says why
        ours.sendall(json.dumps(instructions).encode() + b"\n" + (options or b""))
        ours.shutdown(socket.SHUT_WR)
    report = b""
    while len(report) < _MAX_REPORT and (part := ours.recv(4096)):
        report += part
    # JSON, because a root process starts servers for other users and must not execute what they send.
    try:
        content = json.loads(report) if report else {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise StoreUnavailable(f"the server of store {files.name!r} sent an unreadable report: see its log")
    return content


def _python() -> str:
    """Return the interpreter to run. In a program that embeds Python (uWSGI, mod_wsgi) it is not `sys.executable`."""
    multiprocess = sys.modules.get("multiprocess.spawn")  # a program that has set an executable has imported it
    chosen = os.fsdecode((multiprocess.get_executable() if multiprocess else sys.executable) or b"")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    beside = os.path.join(sys.exec_prefix, "bin")
    candidates = [os.path.join(beside, f"python{version}"), os.path.join(beside, "python3")]
    if chosen != sys.executable or os.path.basename(chosen).startswith(("python", "pypy")):
        candidates.insert(0, chosen)  # the running interpreter, or the one given to multiprocess.set_executable()
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return candidate
    raise StoreUnavailable(
        f"no Python interpreter at {' or '.join(candidates)} to run the store's server; "
        "name one with multiprocess.set_executable(path)"
    )
