"""Starting the process of a server, in an interpreter of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from shmstore import errors
from shmstore.errors import ShmStoreError, StoreUnavailable
from shmstore.ipc.directory import StoreFiles
from shmstore.system.signals import pass_on_interruption, suppressing

log = logging.getLogger("shmstore")

# Seconds to import, reserve the memory and listen, on a busy machine; and between two signs of life while the server
# copies sessions to a rebuilt file or loads a snapshot.
START_TIMEOUT = 15.0
_MAX_REPORT = 65536
_MAX_FD = 4096  # where /proc does not tell which descriptors are open

# The program of a server's interpreter. It gets this process' sys.path in front of its own, because it may be another
# interpreter. PYTHONPATH cannot pass it: a colon separates its entries.
SYS_PATH = "SHMSTORE_SYS_PATH"
BOOT = (
    f"import json, os, sys; sys.path[:0] = json.loads(os.environ.pop({SYS_PATH!r})); "
    "import shmstore.server.main as server; server.main()"
)

# Whether servers started here log to this process' stderr even if that is a pipe: Gunicorn's is its log and stays open.
keep_stderr = False


def start(files: StoreFiles, options: bytes | None) -> None:
    """
    Start a server and wait until it serves. Called with the start lock.

    The server is executed as a program, so it inherits none of this process' listeners, signal handlers and threads,
    and never runs the user's main program again. It detaches itself, so it does not stay a child of this process.
    """
    # Looked up at call time, because gevent may have patched it after the import.
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            end = _execute(
                [_python(), "-P", "-c", BOOT, files.name],
                theirs.fileno(),
                os.environ | {SYS_PATH: json.dumps([os.path.abspath(entry) for entry in sys.path])},
            )
        try:
            report = _exchange(ours, files, options)
        except OSError as exc:
            pass_on_interruption(exc)
            raise StoreUnavailable(
                f"the server of store {files.name!r} could not be started within {START_TIMEOUT:g} s ({exc})"
            ) from exc
        finally:
            with suppressing(OSError):  # the server does not wait for more, even if a forked worker has a copy of this
                ours.shutdown(socket.SHUT_RDWR)
            end()  # the program has already ended, unless it hangs in its first imports
    if report.get("ready"):
        return
    error = getattr(errors, str(report.get("error")), None)
    if not (isinstance(error, type) and issubclass(error, ShmStoreError)):
        error = StoreUnavailable
    message = report.get("message", f"the server of store {files.name!r} exited during its start: see its log")
    raise error("".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(message)))


def _execute(argv: list[str], stdin: int, env: Mapping[str, str]) -> Callable[[], None]:
    """
    Execute a program in a process group of its own; return a function that ends it.

    Not by `subprocess`, which waits until a pipe is closed: a worker that another thread forks at this moment keeps a
    copy of that pipe open, for its whole life.
    """
    pid = os.posix_spawn(
        argv[0],
        argv,
        env,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, stdin, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            *((os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable()),
        ],
        setpgroup=0,  # so that a terminal sends it no signals
    )
    return partial(_end, pid)


def _inheritable() -> Iterator[int]:
    """Yield the descriptors above 2 that a program would inherit, such as Gunicorn's listeners."""
    limit = os.sysconf("SC_OPEN_MAX")  # posix_spawn refuses a descriptor from before the limit was lowered
    fds: Iterable[int] = range(_MAX_FD)
    with suppressing(OSError):  # /proc is missing, or no descriptor is free
        fds = map(int, os.listdir("/proc/self/fd"))
    for fd in fds:
        with suppressing(OSError):  # it is not open
            if 2 < fd < limit and os.get_inheritable(fd):
                yield fd


def _end(pid: int) -> None:
    # Another thread may reap all children of this process.
    with suppress(ChildProcessError, ProcessLookupError):
        if os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _exchange(ours: socket.socket, files: StoreFiles, options: bytes | None) -> dict[str, Any]:
    """Send the server its instructions and options, and return its report, which is a line."""
    ours.settimeout(START_TIMEOUT)
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
    # Up to the end of the line, not of the stream: a worker that is forked meanwhile may keep a copy of it open.
    while len(report) < _MAX_REPORT and not report.endswith(b"\n") and (part := ours.recv(4096)):
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
