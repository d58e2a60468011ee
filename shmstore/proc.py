"""What the kernel tells of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def status(pid: int | str) -> dict[str, str]:
    """
    Return the fields of ``/proc/PID/status``, also of a thread; "self" is this process.

    Raises:
        OSError: There is none that can be seen from here.
    """
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


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
