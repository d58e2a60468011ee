"""Rate limit for log lines about events that may happen at each request: one line at once, then one a minute."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Final

INTERVAL: Final = 60.0  # seconds


class Throttle:
    """
    Decides when a log line is due. Threads that race for a line may both write it::

        if times := throttle.due():
            log.warning("failures: %d", times)
    """

    def __init__(self) -> None:
        self._next: dict[Hashable, float] = {}
        self._times: dict[Hashable, int] = {}

    def due(self, topic: Hashable = None) -> int:
        """
        Count an event; return the number of events since the last line, or 0 if no line is due.

        Args:
            topic: Events of different topics are counted separately.
        """
        times = self._times[topic] = self._times.get(topic, 0) + 1
        now = time.monotonic()
        if now < self._next.get(topic, 0.0):
            return 0
        self._next[topic] = now + INTERVAL
        self._times[topic] = 0
        return times

    def reset(self) -> None:
        """Start over because the condition has ended: the next event is logged at once."""
        self._next.clear()
        self._times.clear()
