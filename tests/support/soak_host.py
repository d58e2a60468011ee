"""The Gunicorn of the soak, whose master changes, and functions that examine the descendants of this process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

from gunicorns import Adopted, Gunicorn
from processes import wait_for
from soak_visitors import MAX, PER_OWNER

CONF = """
import shmstore.gunicorn
workers = 2
worker_class = "gthread"
threads = 4
preload_app = True
pidfile = "pid"
control_socket_disable = True
graceful_timeout = 5
hooks = shmstore.gunicorn.Hooks(
    "shop", memory=4 * 2**20, directory={directory!r}, max={max}, max_per_owner={per_owner}, check_period=1, stale=True
)
on_starting = hooks.on_starting
on_reload = hooks.on_reload
on_exit = hooks.on_exit

def post_worker_init(worker):
    worker.log.info("This worker hears signals")
"""


class Sample(NamedTuple):
    """The resources of a process."""

    pid: int
    files: int
    threads: int
    memory: int  # KiB, without shared memory


def sample(pid: int) -> Sample | None:
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        threads, memory = (re.search(rf"^{name}:\s+(\d+)", status, re.M) for name in ("Threads", "RssAnon"))
        if threads and memory:  # a process that is ending has neither
            return Sample(pid, len(os.listdir(f"/proc/{pid}/fd")), int(threads[1]), int(memory[1]))
    return None


def descendants() -> dict[int, tuple[int, str]]:
    """Return the descendants of this process, with their parents and states."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                parents[int(entry.name)] = (int(parent), state)
    found: dict[int, tuple[int, str]] = {}
    level = {os.getpid()}
    while level:
        level = {pid for pid, (parent, _) in parents.items() if parent in level}
        found |= {pid: parents[pid] for pid in level}
    return found


def reap(but: int | None = None) -> None:
    """Reap orphans that were adopted when their parents died."""
    for pid, (parent, state) in descendants().items():
        if parent == os.getpid() and state == "Z" and pid != but:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def kill_all() -> None:
    """Kill all descendants of this process, also those that a dying one has just started."""

    def none_left() -> bool:
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap()
        return not descendants()

    wait_for(none_left, "the end of all processes")


class Host(Gunicorn):
    """The Gunicorn of the soak. Its master changes."""

    def configure(self, options: str = "", conf: str = "") -> None:
        self.limit(MAX)

    def limit(self, most: int) -> None:
        self.write_configuration(CONF.format(directory=str(self.store_dir), max=most, per_owner=PER_OWNER))

    @property
    def master(self) -> int:
        return self.process.pid

    def children_of(self, pid: int) -> set[int]:
        with contextlib.suppress(OSError):
            return {int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
        return set()

    def workers(self) -> set[int]:
        return self.children_of(self.master)


class Successor(Adopted):
    """A master that another master has started; it becomes a child of this process when that master ends."""

    def wait(self, timeout: float = 60) -> int:
        super().wait(timeout)
        with contextlib.suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return 0
