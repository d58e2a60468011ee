"""The demo's kill buttons: they kill only its own workers and the server of its store."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flask import request


def workers() -> list[int]:
    """Return the pids of this Gunicorn's workers; under another server, that of this process alone."""
    if not request.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        return [os.getpid()]
    return sorted(pid for pid in _children(os.getppid()) if pid == os.getpid() or _is_worker(pid))


def kill_a_worker() -> int | None:
    """Kill another worker of the same Gunicorn with SIGKILL; return its pid, or None without another worker."""
    others = [pid for pid in workers() if pid != os.getpid()]
    random.shuffle(others)
    return next((pid for pid in others if _kill(pid, _is_worker)), None)


def kill_the_server(store: Any) -> tuple[int | None, int | None]:
    """Kill the server of a store; return its pid and the pid of its successor, None for a missing one."""
    pid = store.stats().server_pid
    if not pid or not _kill(pid, _is_server):
        return None, None
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        successor = store.stats().server_pid
        if successor not in (0, pid):
            return pid, successor
        time.sleep(0.05)
    return pid, None


def _kill(pid: int, is_meant: Callable[[int], bool]) -> bool:
    """Kill a process and wait for its end, if it is the intended one: another process may have got its pid."""
    with suppress(ProcessLookupError, PermissionError):
        process = os.pidfd_open(pid)
        try:
            if not is_meant(pid):
                return False
            signal.pidfd_send_signal(process, signal.SIGKILL)
            return bool(select.select([process], [], [], 5)[0])
        finally:
            os.close(process)
    return False


def _is_worker(pid: int) -> bool:
    """Return whether a process is another worker of the same master: a child of it with the same command line."""
    return pid != os.getpid() and pid in _children(os.getppid()) and _command(pid) == _command(os.getpid()) != b""


def _is_server(pid: int) -> bool:
    return pid != os.getpid() and b"shmstore.server" in _command(pid)


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
