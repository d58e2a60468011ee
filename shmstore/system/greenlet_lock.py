"""A lock between the threads of one process that is safe with signal handlers, greenlets and fork."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

from shmstore.errors import StoreTimeout
from shmstore.system.forks import on_fork

__all__ = ["GreenletLock", "Ticket"]

_LONGEST_WAIT = 0.05  # seconds until a waiting thread looks at the queue again, although nobody has woken it
_LONGEST_PAUSE = 0.002  # seconds between the attempts of the first greenlet that waits
_LONGEST_OF_ALL = 0.02  # and of those that wait behind it

# The thread or greenlet that asked, in a set: that is made fast, and there can be weak references to it.
_Place = set[int]


class GreenletLock:
    """
    A lock that one thread or greenlet holds at a time, in the order in which they ask for it::

        ticket = lock.ticket()
        try:
            ticket.acquire()
            ...
        finally:
            ticket.release()

    It is no context manager, because a signal handler may raise at any bytecode: after ``__enter__`` has taken the lock
    and before ``with`` protects it, or at the start of an ``__exit__`` that is written in Python.

    In a child of fork it is free: the threads that held it or waited for it are not there.
    """

    def __init__(self) -> None:
        # The first one in the queue holds the lock. So it is acquired and released by one C call each, and a ticket
        # that never was in the queue can be released as well. A place ends as soon as it is taken out; the
        # thread behind it has a weak reference to it, which wakes the thread within the same C call.
        self._queue: dict[object, _Place] = {}
        on_fork(self)

    def ticket(self) -> Ticket:
        """Return a ticket that is not in the queue yet."""
        return Ticket(self._queue)

    def after_fork_in_child(self) -> None:
        self._queue.clear()


class Ticket:
    """
    One caller's place in the queue of a `GreenletLock`.

    Attributes:
        release: Releases the lock. Does nothing if it was not acquired. A C function: Python runs no signal handler
            between the start of a ``finally`` and a call into C.
    """

    __slots__ = ("_queue", "_token", "release")

    def __init__(self, queue: dict[object, _Place]) -> None:
        self._queue, self._token = queue, object()
        self.release: Callable[[], object] = partial(queue.pop, self._token, None)

    def acquire(self) -> None:
        """
        Acquire the lock; wait for it as long as that takes. Acquiring it again changes nothing.

        Raises:
            StoreTimeout: This very thread or greenlet holds the lock, or waits for it, further down its stack: a signal
                handler or a finalizer called the store in the middle of a call to the store.
        """
        me, pause = threading.get_ident(), 0.0
        while True:
            self._queue.setdefault(self._token, {me})  # each time: in a child of fork the queue is empty
            if len(self._queue) == 1 or not (ahead := self._ahead(me)):
                return
            # Looked up at each call: gevent may have been patched in since the import.
            bell = threading.Lock()
            if type(bell).__module__ == "_thread":
                bell.acquire()
                # All of it is C, so no signal handler runs in the callback, where its exception would be lost.
                waking = weakref.ref(ahead[-1], partial(bell.__exit__, None, None))
                ahead.clear()  # which would keep the place from ending
                bell.acquire(timeout=_LONGEST_WAIT)
                del waking
            else:
                # A greenlet that waited in a lock of the interpreter would stop its thread, and with it the greenlet
                # that holds the lock. Releasing a lock of gevent's is not one C call.
                time.sleep(min(pause * len(ahead), _LONGEST_OF_ALL))
                pause = min(pause + 0.0001, _LONGEST_PAUSE)

    def _ahead(self, me: int) -> list[_Place]:
        """Return the places before this one. Raises as `acquire`."""
        ahead: list[_Place] = []
        for token, place in self._queue.copy().items():
            if token is self._token:
                break
            if me in place:
                raise StoreTimeout("the store was called again from inside one of its own calls (signal handler?)")
            ahead.append(place)
        return ahead
