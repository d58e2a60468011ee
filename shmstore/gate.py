"""A lock between the threads of one process that is safe with greenlets and with fork."""

from __future__ import annotations

import os
import threading
import time
import weakref

__all__ = ["Gate"]

_all: weakref.WeakSet[Gate] = weakref.WeakSet()


class Gate:
    """
    One thread or greenlet at a time; a context manager.

    Nobody waits inside the lock: it may be older than gevent's patching, and a greenlet that waited in it would stop
    the thread, and with it the greenlet that has the lock. In a child of fork it is free: who had it is not there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _all.add(self)

    def __enter__(self) -> None:
        while not self._lock.acquire(blocking=False):
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _forked() -> None:
    for gate in _all:
        gate._lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)
