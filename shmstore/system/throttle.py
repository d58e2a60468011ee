"""Log lines about what may happen at each request: said at once, then once a minute, with how often it happened."""

from __future__ import annotations

import time
from typing import Final

SILENCE: Final = 60.0  # seconds


class Seldom:
    """Tells when to say something again. Threads that race for it may say it twice."""

    def __init__(self) -> None:
        self._next = 0.0
        self._times = 0

    def due(self) -> int:
        """Count once; return how often it happened since it was said last, 0 if this is not the time to say it."""
        self._times += 1
        now = time.monotonic()
        if now < self._next:
            return 0
        self._next = now + SILENCE
        times, self._times = self._times, 0
        return times
