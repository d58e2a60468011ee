"""Limits log lines about what may happen at each request: at once, then once a minute, with how often it happened."""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Final

SILENCE: Final = 60.0  # seconds


class Throttle:
    """
    Says when a line is due. Threads that race for a line may both write it::

        if times := throttle.due():
            log.warning("it failed %d times", times)
    """

    def __init__(self) -> None:
        self._next: dict[Hashable, float] = {}
        self._times: dict[Hashable, int] = {}

    def due(self, topic: Hashable = None) -> int:
        """
        Count an event; return how many there were since the last line, 0 if no line is due.

        Args:
            topic: Events of different topics are counted apart.
        """
        times = self._times[topic] = self._times.get(topic, 0) + 1
        now = time.monotonic()
        if now < self._next.get(topic, 0.0):
            return 0
        self._next[topic] = now + SILENCE
        self._times[topic] = 0
        return times

    def reset(self) -> None:
        """The condition is over: the next event is logged at once."""
        self._next.clear()
        self._times.clear()
