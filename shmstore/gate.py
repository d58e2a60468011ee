"""A lock between the threads of one process that is safe with signal handlers, greenlets and fork."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

from shmstore.errors import StoreTimeout

__all__ = ["Gate", "Turn"]

_LONGEST_PAUSE = 0.002  # seconds between attempts

_all: weakref.WeakSet[Gate] = weakref.WeakSet()


class Gate:
    """
    A lock that one thread or greenlet holds at a time, in the order in which they ask for it::

        turn = gate.turn()
        try:
            turn.lock()
            ...
        finally:
            turn.unlock()

    It is no context manager, because a signal handler may raise at any bytecode: after ``__enter__`` has taken the lock
    and before ``with`` protects it, or at the start of an ``__exit__`` that is written in Python.

    In a child of fork it is free: the threads that held it or waited for it are not there.
    """

    def __init__(self) -> None:
        # The turns that were asked for, by thread or greenlet. The first one holds the lock: so a turn is taken and
        # given back by one C call each, and a turn that was never taken can be given back as well.
        self._queue: dict[object, int] = {}
        _all.add(self)

    def turn(self) -> Turn:
        """Return a turn, which is neither taken nor asked for yet."""
        return Turn(self._queue)


class Turn:
    """
    A turn at a `Gate`.

    Attributes:
        unlock: Gives the turn back. Does nothing if it was not taken. A C function: Python runs no signal handler
            between the start of a ``finally`` and a call into C.
    """

    __slots__ = ("_queue", "_ticket", "unlock")

    def __init__(self, queue: dict[object, int]) -> None:
        self._queue, self._ticket = queue, object()
        self.unlock: Callable[[], object] = partial(queue.pop, self._ticket, None)

    def lock(self) -> None:
        """
        Take the turn; wait for it as long as that takes. Taking it again changes nothing.

        It polls: the lock may be older than gevent's patching, and a greenlet that waited in a lock of the interpreter
        would stop its thread, and with it the greenlet that holds the lock.

        Raises:
            StoreTimeout: This very thread or greenlet holds the lock, or waits for it, further down its stack: a signal
                handler or a finalizer called the store in the middle of a call to the store.
        """
        queue, me, pause = self._queue, threading.get_ident(), 0.0
        while True:
            queue.setdefault(self._ticket, me)  # each time: in a child of fork the queue is empty
            ahead = []
            for ticket, thread in queue.copy().items():
                if ticket is self._ticket:
                    break
                ahead.append(thread)
            if not ahead:
                return
            if me in ahead:
                raise StoreTimeout("the store was called again from inside one of its own calls (signal handler?)")
            time.sleep(pause)
            pause = min(pause + 0.0001, _LONGEST_PAUSE)


def _forked() -> None:
    for gate in _all:
        gate._queue.clear()


os.register_at_fork(after_in_child=_forked)
