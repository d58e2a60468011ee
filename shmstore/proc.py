"""What the kernel tells of processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final


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


# -- memory ------------------------------------------------------------------------------------------------------------

_FIGURES: Final = {  # by the controllers in /proc/self/cgroup: what its groups call their limit and their use
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
_NO_LIMIT: Final = 2**62  # version 1 of the groups has a very large number for it, version 2 a word


def meminfo(name: str) -> int:
    """Return a figure of ``/proc/meminfo``, in bytes."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


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
