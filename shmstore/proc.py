"""Processes: what the kernel tells of one, and this one's standard descriptors."""

from __future__ import annotations

import os
from contextlib import suppress


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
