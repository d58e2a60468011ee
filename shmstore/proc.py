"""What the kernel tells of a process."""

from __future__ import annotations


def status(pid: int | str) -> dict[str, str]:
    """
    Return the fields of ``/proc/PID/status``, also of a thread; "self" is this process.

    Raises:
        OSError: There is none that can be seen from here.
    """
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as lines:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
