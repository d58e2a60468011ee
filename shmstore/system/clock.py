"""The clock of deadlines: nanoseconds since boot, including suspend. A change of the wall clock expires no session."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

NS: Final = 10**9
"""Nanoseconds per second."""

Clock = Callable[[], int]

boottime_ns: Clock = partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
