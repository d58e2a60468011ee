"""Processes: what the kernel tells of one, and this one's standard descriptors."""

from __future__ import annotations

import errno
import math
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

NO_PROCESS: Final = (
    "; there are as many processes and threads as there may be: see ulimit -u, LimitNPROC= and TasksMax= of systemd, "
    "--pids-limit of Docker"
)
"""What to do where neither a process nor a thread can be started."""
_NO_PIDFD: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES})  # what sandboxes answer
_POLL: Final = 0.01, 0.25  # seconds between two looks, the first and the longest


def open_standard_descriptors() -> None:
    """
    Open the null device at those of the descriptors 0, 1 and 2 that are closed.

    Else the next file or socket gets such a number, and what C code writes to its standard error goes there: into an
    arena, say.
    """
    with suppress(OSError):  # a root directory without /dev
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)


def status(pid: int | str) -> dict[str, str]:
    """
    Return the fields of ``/proc/PID/status``, also of a thread; "self" is this process.

    Raises:
        OSError: There is none that can be seen from here.
    """
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def lives(pid: int) -> bool:
    """Return whether a process runs, as far as that can be seen from here. A zombie does not."""
    if pid <= 0:
        return False  # for the system it would be a group of processes
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # another user's
    except (ProcessLookupError, OverflowError):
        return False
    with suppress(OSError, KeyError):  # there is no /proc, or it hides processes
        return not status(pid)["State"].startswith(("Z", "X"))
    return True


class Process:
    """
    A running process. Used as a context manager.

    Held by a pidfd, which tells of the end also when another process reaps it, and never means a process that got its
    number later. Where the kernel or a sandbox refuses pidfds, the number is all there is: then the process is polled.

    Args:
        pid: Its number.

    Raises:
        ProcessLookupError: There is none.
        OSError: This process has too many files open.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._fd = -1
        try:
            self._fd = os.pidfd_open(pid)
        except AttributeError:  # Python was built where the kernel had none
            pass
        except OSError as exc:
            if exc.errno not in _NO_PIDFD:
                raise
        if self._fd < 0 and not lives(pid):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def ended(self, timeout: float) -> bool:
        """Wait for the end of the process, for ``timeout`` seconds; return whether it has ended."""
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return bool(poll.poll(timeout * 1000))
        deadline = time.monotonic() + timeout
        pause, longest = _POLL
        while lives(self._pid):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, longest)
        return True

    def kill(self) -> None:
        """
        Send SIGKILL.

        Raises:
            ProcessLookupError: It has ended.
            PermissionError: It is another user's.
        """
        if self._fd >= 0:
            try:
                return signal.pidfd_send_signal(self._fd, signal.SIGKILL)
            except OSError as exc:
                if exc.errno not in _NO_PIDFD:
                    raise
        os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def name(pid: int) -> str:
    """Return what a process is called; "" if it has ended, or cannot be seen from here."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip()
    return ""


def title(pid: int) -> str:
    """
    Return a process' command line up to its first colon; "" if it has ended.

    A forked child has that of its parent, also if they name themselves: ``gunicorn: master [app]``.
    """
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").partition(":")[0]
    return ""


def open_files(last: str) -> Iterator[tuple[str, int]]:
    """
    Yield the files of that name, without its directory, that processes have open, and each of these processes.

    Only of processes that this user may look into: its own; for root all of them.
    """
    with suppress(OSError):
        for pid in sorted(int(each) for each in os.listdir("/proc") if each.isdigit()):
            with suppress(OSError):  # it has ended, or is another user's
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    with suppress(OSError):
                        path = os.readlink(f"/proc/{pid}/fd/{fd}")
                        if os.path.basename(path) == last:
                            yield path, pid


# -- memory ------------------------------------------------------------------------------------------------------------

_FIGURES: Final = {  # by the controllers in /proc/self/cgroup: what its groups call their limit and their use
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
_NO_LIMIT: Final = 2**62  # version 1 of the groups has a very large number for it, version 2 a word


def meminfo(name: str) -> int:
    """
    Return a figure of ``/proc/meminfo``, in bytes.

    Raises:
        OSError: It is not told here.
    """
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    raise FileNotFoundError(errno.ENOENT, f"no {name} in /proc/meminfo")


def memory_left(root: str | os.PathLike[str] = "/") -> float:
    """
    Return how many bytes the control groups of this process still allow it, swap included; `math.inf`: any number.

    A page of a tmpfs is charged to the group of the process that is the first to touch it: of a store, as it is made.
    """
    left = math.inf
    with suppress(OSError):
        mounts = _group_mounts(root)
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in mounts:
                top, point = mounts[controllers]
                within = os.path.relpath(path, top)
                group = point if within.startswith("..") else point / within
                for each in (group, *group.parents[: len(group.parts) - len(point.parts)]):
                    left = min(left, _left(each, *_FIGURES[controllers]))
    return left


def _group_mounts(root: str | os.PathLike[str]) -> dict[str, tuple[str, Path]]:
    """Return where groups that limit memory are mounted, by their controllers, and which group is on top there."""
    found = {}
    for line in Path(root, "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        top, point = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2":
            found[""] = top, Path(root, point.lstrip("/"))
        elif kind == "cgroup" and "memory" in options.split(","):
            found["memory"] = top, Path(root, point.lstrip("/"))
    return found


def _left(group: Path, limit: str, used: str) -> float:
    def number(name: str) -> int:
        return int((group / name).read_text())

    try:
        most = number(limit)
        left = math.inf if most >= _NO_LIMIT else most - number(used)
    except (OSError, ValueError):  # "max"; the group of all groups has no file
        return math.inf
    with suppress(OSError, ValueError):
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left += int(facts["inactive_file"]) + int(facts["active_file"])  # the kernel gives these up
    with suppress(OSError):
        swap = (group / "memory.swap.max").read_text().strip()
        free = meminfo("SwapFree")
        left += free if swap == "max" else min(free, int(swap) - number("memory.swap.current"))
    return max(0, left)
