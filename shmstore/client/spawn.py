"""Starting the process of a server, in an interpreter of its own."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

from shmstore import errors
from shmstore.errors import ShmStoreError, StoreUnavailable
from shmstore.ipc.directory import StoreFiles
from shmstore.system.signals import pass_on_interruption

log = logging.getLogger("shmstore")

# Seconds to import, reserve the memory and listen, on a busy machine; and between two signs of life while the server
# copies sessions to a rebuilt file or loads a snapshot.
START_TIMEOUT = 15.0
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


def start(files: StoreFiles, options: bytes | None) -> None:
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
                f"the server of store {files.name!r} could not be started within {START_TIMEOUT:g} s ({exc})"
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
