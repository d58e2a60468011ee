"""
The fork hooks of the package, registered with the interpreter in one place.

Each object that calls `on_fork` says in ``after_fork_in_child`` what a child drops: the locks that threads of its
parent hold, the row of counters, the connections of a `Pool`, the stores that a face has opened.

``multiprocess.util.register_after_fork`` is not enough: Gunicorn forks by ``os.fork``, which does not run its hooks.
"""

from __future__ import annotations

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


def _in_child() -> None:
    for each in list(_registered):
        each.after_fork_in_child()


register_at_fork(after_in_child=_in_child)
