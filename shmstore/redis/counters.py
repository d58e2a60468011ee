"""
The counters of a store. They are on the server, so they survive the processes that count.

Each process counts in its memory and sends the difference to the server: at most once a second, in a call that counts,
when the store is closed, and at exit. A call that counts costs an addition. A process that is killed loses what it has
not sent. A difference whose answer is lost is sent again, and may count twice.
"""

from __future__ import annotations

import atexit
import math
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.errors import ShmStoreError
from shmstore.redis.link import Link
from shmstore.redis.scripts import COUNT
from shmstore.system.forks import on_fork

__all__ = ["Counters"]

_PERIOD: Final = 1.0  # seconds

_all: weakref.WeakSet[Counters] = weakref.WeakSet()


class Counters:
    """
    The counters.

    Args:
        link: The connection to the server.
        key: The key of the hash that holds them.
        names: The names of the counters.

    Attributes:
        counted: What this process has counted since it began.
        due: The time by ``time.monotonic`` from which `send_due` is to be called.
    """

    def __init__(self, link: Link, key: str, names: Iterable[str]) -> None:
        self._link, self._key, self._lock = link, key, GreenletLock()
        self.counted = dict.fromkeys(names, 0)
        self._sent = dict(self.counted)  # the part that the server has counted too
        self.due = time.monotonic() + _PERIOD
        on_fork(self)
        _all.add(self)

    def send_due(self) -> None:
        """Send what is new. A failure is not reported: the next call sends the same."""
        self.due = math.inf  # other threads need not wait
        try:
            self.send()
        finally:
            self.due = time.monotonic() + _PERIOD

    def send(self) -> None:
        """Do the same, and leave `due` as it is."""
        if self.counted != self._sent:
            with suppress(ShmStoreError):
                self.total()

    def total(self) -> dict[str, int]:
        """
        Send what is new, and return what all processes have counted.

        Raises:
            StoreUnavailable: The server did not answer.
        """
        ticket = self._lock.ticket()
        try:
            ticket.acquire()
            now, sent = dict(self.counted), self._sent
            new = {name: count - sent[name] for name, count in now.items() if count != sent[name]}
            arguments = (part for pair in new.items() for part in pair)
            is_added, *answer = self._link.write(*COUNT.on([self._key], *arguments))
            if is_added:
                self._sent = sent = now
        finally:
            ticket.release()
        there = {name.decode(): int(count) for name, count in zip(answer[::2], answer[1::2], strict=True)}
        return {name: there.get(name, 0) + count - sent[name] for name, count in now.items()}

    def after_fork_in_child(self) -> None:
        self._sent = dict(self.counted)  # the parent sends what it has counted
        self.due = time.monotonic() + _PERIOD  # a thread of the parent may be sending: it has no copy here


@atexit.register
def _at_exit() -> None:
    for each in list(_all):
        each.send()
