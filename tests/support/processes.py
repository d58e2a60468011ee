"""Shared by tests of processes: waiting for conditions, and finding the processes of the suite."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import shmstore
from shmstore.client import spawn
from shmstore.engine.arena import Arena
from shmstore.engine.header import HEARTBEAT
from shmstore.manager import StoreManager
from shmstore.system.clock import boottime_ns
from shmstore.system.processes import command_name

ROOT = str(Path(shmstore.__file__).parent.parent)

# All descendants inherit this mark, which is how they are found. Each xdist worker has its own.
MARK = f"SHMSTORE_TEST_RUN={secrets.token_hex(8)}"


def mark_descendants() -> None:
    """Give the mark to all processes that are started from now on."""
    name, _, value = MARK.partition("=")
    os.environ[name] = value


def wait_for(condition: Callable[[], Any], what: str = "the condition", timeout: float = 120.0) -> Any:
    """Return the result of ``condition`` as soon as it is true."""
    deadline, pause = time.monotonic() + timeout, 0.005
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true in {timeout:g} s"
        time.sleep(pause)
        pause = min(1.5 * pause, 0.1)  # most conditions examine all processes, or read a log
    return result


LINGERS = 0.3  # seconds that a server which is started by `HURRIED` runs without a client
CHECKS = 0.1  # seconds between its checks of its files and of the store's lock
HURRIED = spawn.BOOT.replace(
    "; server.main()",
    f"; from shmstore.server import listener, server as loop; listener.IDLE_TIMEOUT = {LINGERS}; "
    f"loop._HEARTBEAT_INTERVAL = {CHECKS}; server.main()",
)
assert HURRIED != spawn.BOOT
# The beginning of a script, or of a configuration, whose servers neither linger nor wait long between checks.
HURRY = f"from shmstore.client import spawn; spawn.BOOT = {HURRIED!r}\n"


def stays(directory: Path, longer_than: float) -> None:
    """Wait until the server of a store has looked at its clients for that long, by its own account."""
    begun = boottime_ns()
    arena = Arena.open(directory / "arena")
    wait_for(lambda: arena.cells[HEARTBEAT] > begun + longer_than * 1e9, "the heartbeats")
    arena.close()


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    return state(pid) not in ("Z", "X", "")


def stop(pid: int) -> None:
    """Stop a process, and wait for that: a thread could run on for a moment, and be stopped with the store's lock."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: state(pid) == "T", "the stop")


def state(pid: int) -> str:
    """Return the letter for a process' state; an empty string if the process does not exist."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def marked(mark: str) -> set[int]:
    """Return the processes, but for zombies, that have this ``NAME=value`` in their environment."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return found


def command(pid: int) -> str:
    """Return a process' command line; an empty one if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def servers() -> dict[int, str]:
    """Return the command lines of the servers that this run of the suite has started and that still run."""
    return {pid: command(pid) for pid in marked(MARK) if is_server(pid)}


def is_server(pid: int) -> bool:
    return "shmstore.server" in command(pid) or command_name(pid) == "shmstore"


class Start(Protocol):
    """The type of the fixture ``start``."""

    def __call__(self, name: str = "shop", **options: Any) -> StoreManager: ...


class Run(Protocol):
    """The type of the fixture ``run``."""

    def __call__(self, code: str, *arguments: object, **popen: Any) -> subprocess.Popen[str]: ...
