"""The clock of sessions: nanoseconds since boot with suspend, which no step of the wall clock changes. Deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from shmstore.system import platform

NS: Final = 10**9
"""Nanoseconds per second."""

Clock = Callable[[], int]

boottime_ns: Clock = platform.boottime_ns

Deadline = Callable[[], float]
"""Returns the seconds that are left; 0 or less: the time is up."""


def deadline_in(seconds: float) -> Deadline:
    """Return the deadline that is ``seconds`` from now."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


def past(stored: int) -> int:
    """Return a time that another process has stored; 0 if it is in the future, so that the memory must be damaged."""
    return stored if stored <= boottime_ns() + NS else 0
