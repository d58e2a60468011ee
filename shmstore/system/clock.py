"""The clock of deadlines: nanoseconds since boot, including suspend. A change of the wall clock expires no session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from shmstore.system import platform

NS: Final = 10**9
"""Nanoseconds per second."""

Clock = Callable[[], int]

boottime_ns: Clock = platform.boottime_ns
