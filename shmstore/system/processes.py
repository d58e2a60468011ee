"""Facts about processes from the kernel, the standard descriptors of this process, and its memory limits."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from shmstore.system.platform import libc_function
from shmstore.system.signals import pass_on_interruption, suppressing

PROCESS_LIMIT_ADVICE: Final = (
    "; the limit of processes and threads is reached: see ulimit -u, LimitNPROC= and TasksMax= of systemd, "
    "--pids-limit of Docker"
)
"""The end of a message where neither a process nor a thread can be started."""
CAPABILITY_VERSION: Final = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3, for `capget` and `capset`."""
_capget = libc_function("capget", ctypes.c_void_p, ctypes.c_void_p)
_NO_PIDFD: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES})  # errors of kernels and sandboxes without pidfd
_NO_PROCESS: Final = frozenset({errno.EINVAL, errno.ENOENT})  # the pid is not positive, or that of a thread
_POLL_INTERVALS: Final = 0.01, 0.25  # seconds between polls, the first and the longest


def open_standard_descriptors() -> None:
    """
    Open the null device at those of the descriptors 0, 1 and 2 that are closed.

    Otherwise the next file or socket gets such a number, and what C code writes to its standard error ends up in it:
    in an arena, for example.
    """
    with suppressing(OSError):  # the root directory has no /dev
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(fd, True)
        os.close(fd)


def status(pid: int | str) -> dict[str, str]:
    """
    Return the fields of ``/proc/PID/status``, also for a thread; "self" is this process.

    Raises:
        OSError: The process does not exist or is not visible.
    """
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def is_running(pid: int) -> bool:
    """Return whether a process runs, as far as this process can see. A zombie does not run."""
    if pid <= 0:
        return False  # the kernel would take it for a process group
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # it belongs to another user
    except (ProcessLookupError, OverflowError):
        return False
    with suppressing(OSError, KeyError):  # /proc is missing or hides processes
        return not status(pid)["State"].startswith(("Z", "X"))
    return True


def permitted_capabilities() -> int:
    """Return the capabilities that this thread has or can take, one bit each; 0 if the kernel does not tell."""
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: 32 bits of each, then 32 more
    _capget((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), sets)
    return sets[1] | sets[4] << 32


class Process:
    """
    A running process. Used as a context manager.

    It is held by a pidfd, which reports the end even if another process reaps it, and never refers to a later process
    with the same pid. If the kernel or a sandbox refuses pidfds, the process is polled by its pid.

    Args:
        pid: The process id.

    Raises:
        ProcessLookupError: The process does not exist.
        OSError: This process has too many open files.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._fd = -1
        try:
            self._fd = os.pidfd_open(pid)
        except AttributeError:  # Python was built for a kernel without pidfd
            pass
        except OSError as exc:
            if exc.errno in _NO_PROCESS:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from exc
            if exc.errno not in _NO_PIDFD:
                raise
        if self._fd < 0 and not is_running(pid):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def wait(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the end of the process; return whether it has ended."""
        if self._fd >= 0:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            return bool(poll.poll(timeout * 1000))
        deadline = time.monotonic() + timeout
        pause, longest = _POLL_INTERVALS
        while is_running(self._pid):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return False
            time.sleep(min(pause, remaining))
            pause = min(2 * pause, longest)
        return True

    def kill(self) -> None:
        """
        Send SIGKILL.

        Raises:
            ProcessLookupError: The process has ended.
            PermissionError: The process belongs to another user.
        """
        if self._fd >= 0:
            try:
                return signal.pidfd_send_signal(self._fd, signal.SIGKILL)
            except OSError as exc:
                if exc.errno not in _NO_PIDFD:
                    raise
        os.kill(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Release the pidfd."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def command_name(pid: int) -> str:
    """Return the kernel's name of a process; "" if it has ended or is not visible."""
    with suppressing(OSError):
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip()
    return ""


def command_title(pid: int) -> str:
    """
    Return a process' command line up to its first colon; "" if it has ended.

    A forked child has the title of its parent, even if both set their own: ``gunicorn: master [app]``.
    """
    with suppressing(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").partition(":")[0]
    return ""


def open_files(filename: str) -> Iterator[tuple[str, int]]:
    """
    Yield the path of each open file with this name (without directory), and the pid of the process that has it open.

    Covers the processes that this user may inspect: the user's own, or all of them for root.
    """
    with suppressing(OSError):
        for pid in sorted(int(each) for each in os.listdir("/proc") if each.isdigit()):
            with suppressing(OSError):  # it has ended, or belongs to another user
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    with suppressing(OSError):
                        path = os.readlink(f"/proc/{pid}/fd/{fd}")
                        if os.path.basename(path) == filename:
                            yield path, pid


# -- memory ------------------------------------------------------------------------------------------------------------

_CGROUP_FILES: Final = {  # by controllers as in /proc/self/cgroup: the files with a group's limit and its use
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
_NO_LIMIT: Final = 2**62  # cgroup v1 has a very large number for "no limit", v2 a word


def meminfo(name: str) -> int:
    """
    Return a value of ``/proc/meminfo``, in bytes.

    Raises:
        OSError: /proc/meminfo is missing or lacks this value.
    """
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    raise FileNotFoundError(errno.ENOENT, f"no {name} in /proc/meminfo")


def memory_left(root: str | os.PathLike[str] = "/") -> float:
    """
    Return how many bytes this process' control groups still allow, including swap; `math.inf`: no limit.

    A page of a tmpfs is charged to the group of the process that touches it first, so a store's memory is charged to
    the process that creates it.
    """
    left = math.inf
    with suppressing(OSError):
        mounts = _group_mounts(root)
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in mounts:
                top, point = mounts[controllers]
                relative = os.path.relpath(path, top)
                group = point if relative.startswith("..") else point / relative
                for each in (group, *group.parents[: len(group.parts) - len(point.parts)]):
                    left = min(left, _left_in_group(each, *_CGROUP_FILES[controllers]))
    return left


def _group_mounts(root: str | os.PathLike[str]) -> dict[str, tuple[str, Path]]:
    """Return, by controllers, where cgroups that limit memory are mounted and which group is the root of the mount."""
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


def _left_in_group(group: Path, limit: str, used: str) -> float:
    def number(name: str) -> int:
        return int((group / name).read_text())

    try:
        maximum = number(limit)
        left = math.inf if maximum >= _NO_LIMIT else maximum - number(used)
    except (OSError, ValueError) as exc:  # the limit is "max", or this is the root group, which has no such file
        pass_on_interruption(exc)
        return math.inf
    with suppressing(OSError, ValueError):
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left += int(facts["inactive_file"]) + int(facts["active_file"])  # page cache: reclaimable
    with suppressing(OSError):
        swap = (group / "memory.swap.max").read_text().strip()
        free = meminfo("SwapFree")
        left += free if swap == "max" else min(free, int(swap) - number("memory.swap.current"))
    return max(0, left)
