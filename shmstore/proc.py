"""Processes: what the kernel tells of one, and this one's standard descriptors."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from contextlib import suppress
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
