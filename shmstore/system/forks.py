"""What happens at fork: the one place where this package registers with the interpreter.

Not multiprocess' ``register_after_fork``: Gunicorn forks with plain ``os.fork``, which does not run it.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """An object that does not mean the same in a child of fork as in its parent."""

    def after_fork_in_child(self) -> None:
        """Give up what belongs to the parent: its locks, its connections, its place in shared memory."""


_registered: weakref.WeakSet[ForkAware] = weakref.WeakSet()

on_fork = _registered.add
"""Have ``after_fork_in_child`` of an object called in each child of fork, for as long as the object lives."""


def _in_child() -> None:
    for each in list(_registered):
        each.after_fork_in_child()


os.register_at_fork(after_in_child=_in_child)
