"""
What happens at a fork. The child drops what belongs to its parent:

- the queue of threads in a `GreenletLock`, and the locks of a private store in a `ThreadMutex` and a `PrivateMemory`;
- the locks on other descriptors, `_LockFile` and `_StartLock`: it closes these without unlocking;
- its row in shared memory, in `engine.counters.Counters`: it claims another row when it counts;
- what its parent has counted and sends itself, in `redis.counters.Counters`;
- the connections of a `client.pool.Pool`: they stay open, unused, so that the server sees when the last of these
  processes ends; and those of a `redis.pool.Pool`;
- the opened store of a face, in `StoreSessionInterface`, `SessionMiddleware` and Django's `_Process`: a worker that
  becomes another user opens the store of that user.

The memory stays mapped, so a proxy works in the child too. ``multiprocess.util.register_after_fork`` is not enough:
Gunicorn forks by ``os.fork``, which does not run its hooks.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

from shmstore.system.platform import register_at_fork


class ForkAware(Protocol):
    """An object whose state is not valid in a forked child."""

    def after_fork_in_child(self) -> None:
        """Drop the parent's resources: its locks, its connections, its row in shared memory."""


_registered: weakref.WeakSet[ForkAware] = weakref.WeakSet()

on_fork = _registered.add
"""Call ``after_fork_in_child`` of an object in each forked child, for as long as the object lives."""


_pid = os.getpid()
_noticing = threading.Lock()


def notice_fork() -> None:
    """
    Do what follows a fork, if the program has forked in C without Python's hooks, as uWSGI does by default.

    Called before a connection is used: two processes on one connection would receive each other's answers.
    """
    if os.getpid() != _pid:
        with _noticing:  # another thread of the child must not continue before all is done
            if os.getpid() != _pid:
                _in_child()


def _in_child() -> None:
    global _pid  # noqa: PLW0603
    for each in list(_registered):
        each.after_fork_in_child()
    _pid = os.getpid()


register_at_fork(after_in_child=_in_child)
