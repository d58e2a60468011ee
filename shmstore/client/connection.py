"""
How a process finds the server of a store: by the socket in the store's directory. If none answers, it starts one.

Several processes may do so at once: the start lock of the directory lets one of them start it, and the others connect.
"""

from __future__ import annotations

import errno
import logging
import os
import shlex
import socket
import time
from contextlib import suppress

from shmstore.client import spawn
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.channel import Channel, Disconnected, Unresponsive
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import OtherVersion, greet
from shmstore.ipc.peer import trusted
from shmstore.system.clock import Deadline, deadline_in
from shmstore.system.files import socket_address
from shmstore.system.platform import LACKING
from shmstore.system.processes import PROCESS_LIMIT_ADVICE, Process, status
from shmstore.system.signals import pass_on_interruption, suppressing
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")

ANSWER_TIMEOUT = 2.0  # seconds for an answer
_RETRY_TIMEOUT = 0.5  # seconds for a second greeting, before a server that did not answer is killed
_LEAVE_TIMEOUT = 60.0  # seconds for a server of another version to save its snapshot and exit

# By path and process, so that a forked child logs its own lines.
_attach_log, _other_users_log = Throttle(), Throttle()


class NoServer(StoreUnavailable):
    """No server runs for the store."""


def dial(files: StoreFiles, timeout: float) -> socket.socket:
    """
    Return a socket connected to the server.

    Raises:
        OSError: No process listens (FileNotFoundError, ConnectionRefusedError), or the server accepted no
            connection for ``timeout`` seconds (BlockingIOError).
    """
    # `socket.socket` is looked up at each call, because gevent may have patched it after the import.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + timeout
    try:
        sock.settimeout(timeout)
        with socket_address(files.address) as path:
            while True:
                try:
                    sock.connect(path)
                except BlockingIOError:  # the backlog is full: many clients connect, or the server is stuck
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.01)
                else:
                    return sock
    except BaseException:
        sock.close()
        raise


def connect(files: StoreFiles, timeout: float = ANSWER_TIMEOUT, *, leaving: Deadline | None = None) -> Channel:
    """
    Return a connection to the running server.

    Args:
        files: The files of the store.
        timeout: Maximum seconds for the connection.
        leaving: As for `greet`; its time is added to ``timeout``.

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
        sock = dial(files, timeout)
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
        return greet(sock, deadline, leaving=leaving)
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
            "open it after the change of user, or give the application its URL, which is opened on first use"
        )
    files.check()
    return f" ({files.address}): restart the processes that use the store"


def connect_as_starter(
    files: StoreFiles,
    options: bytes | None = None,
    timeout: float = ANSWER_TIMEOUT,
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
    files: StoreFiles, options: bytes | None = None, *, timeout: float = ANSWER_TIMEOUT
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
    first = options is not None  # a restart must not recreate a store that was removed in the meantime
    if first:
        files.create()
    else:
        files.check()
    with files.starting(spawn.START_TIMEOUT, recreate=first):
        try:
            return connect_as_starter(files, options, timeout, leaving), False  # another process has started it
        except Unresponsive:
            kill(files)
        except NoServer:
            pass
        return _start(files, options), True


def _start(files: StoreFiles, options: bytes | None) -> Channel:
    """Start the server and return a connection to it. Called with the start lock; raises as `connect_or_start`."""
    deadline = deadline_in(spawn.START_TIMEOUT)
    while True:
        try:
            spawn.start(files, options)
        except OSError as exc:  # out of descriptors, processes or memory
            pass_on_interruption(exc)
            advice = PROCESS_LIMIT_ADVICE if exc.errno == errno.EAGAIN else ""
            raise StoreUnavailable(f"the server of store {files.name!r} could not be started: {exc}{advice}") from exc
        try:
            return connect(files, spawn.START_TIMEOUT)
        except NoServer:  # it has exited without a client: this process was stopped for seconds in between
            if deadline() <= 0:
                raise


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
            process.wait(ANSWER_TIMEOUT)
            log.warning("store %r: its server, process %d, was killed: %s", files.name, pid, why)
            return True
    return False


def _belongs_to(pid: int, uid: int) -> bool:
    if trusted(uid):
        return True  # this process can kill only processes of that user, or the file is root's
    with suppressing(OSError, KeyError):
        return {int(each) for each in status(pid)["Uid"].split()} == {uid}
    return False


def kill_stopped(files: StoreFiles) -> bool:
    """Kill the server that holds the store if it is stopped (SIGSTOP), because it may also hold the store's lock."""
    pid = files.server()
    with suppressing(OSError, KeyError):
        stopped = pid is not None and status(pid)["State"].startswith("T")
        return stopped and kill(files, "it was stopped, and other processes waited for the store's lock")
    return False
