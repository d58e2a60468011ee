"""A lock for the threads of one process that is safe with signal handlers, greenlets and fork."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

from shmstore.errors import StoreTimeout
from shmstore.system.forks import on_fork

__all__ = ["GreenletLock", "Ticket"]

_MAX_WAIT = 0.05  # seconds until a waiting thread checks the queue again without having been woken
_MAX_PAUSE = 0.002  # seconds between the attempts of the first waiting greenlet
_MAX_PAUSE_BEHIND = 0.02  # seconds between the attempts of the greenlets behind it

# The identifier of the waiting thread or greenlet. A set, because it is fast to create and can be weakly referenced.
_Place = set[int]


class GreenletLock:
    """
    A fair lock: one thread or greenlet holds it at a time, in the order of their calls::

        ticket = lock.ticket()
        try:
            ticket.acquire()
            ...
        finally:
            ticket.release()

    It is not a context manager, because a signal handler may raise at any bytecode: after ``__enter__`` has taken the
    lock and before ``with`` protects it, or at the start of an ``__exit__`` written in Python.

    In a forked child it is free, because the threads that held it or waited for it do not exist there.
    """

    def __init__(self) -> None:
        # The first ticket in the queue holds the lock, so acquiring and releasing are one C call each, and releasing a
        # ticket that was never queued is harmless. A place is destroyed when it leaves the queue. The next thread holds
        # a weak reference to it, whose callback wakes that thread within the same C call.
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
        release: Releases the lock; has no effect if it was not acquired. It is a C function, because Python runs no
            signal handler between the start of a ``finally`` and a call into C.
    """

    __slots__ = ("_queue", "_token", "release")

    def __init__(self, queue: dict[object, _Place]) -> None:
        self._queue, self._token = queue, object()
        self.release: Callable[[], object] = partial(queue.pop, self._token, None)

    def acquire(self) -> None:
        """
        Acquire the lock, waiting without a limit. Acquiring it again has no effect.

        Raises:
            StoreTimeout: The same thread or greenlet already holds the lock or waits for it, further up its stack: a
                signal handler or a finalizer called the store in the middle of a call to the store.
        """
        me, pause = threading.get_ident(), 0.0
        while True:
            self._queue.setdefault(self._token, {me})  # repeated because a fork clears the queue in the child
            if len(self._queue) == 1 or not (ahead := self._ahead(me)):
                return
            # Looked up at each call, because gevent may have patched it after the import.
            bell = threading.Lock()
            if type(bell).__module__ == "_thread":
                bell.acquire()
                # Only C code runs in the callback, so no signal handler can raise there, where the exception is lost.
                waking = weakref.ref(ahead[-1], partial(bell.__exit__, None, None))
                ahead.clear()  # a remaining reference would keep the place alive
                bell.acquire(timeout=_MAX_WAIT)
                del waking
            else:
                # A greenlet that waits for an interpreter lock blocks its thread, including the greenlet that holds the
                # lock. gevent's lock cannot be used either: releasing it is not one C call.
                time.sleep(min(pause * len(ahead), _MAX_PAUSE_BEHIND))
                pause = min(pause + 0.0001, _MAX_PAUSE)

    def _ahead(self, me: int) -> list[_Place]:
        """Return the places before this one. Raises the same errors as `acquire`."""
        ahead: list[_Place] = []
        for token, place in self._queue.copy().items():
            if token is self._token:
                break
            if me in place:
                raise StoreTimeout("the store was called again from inside one of its own calls (signal handler?)")
            ahead.append(place)
        return ahead
