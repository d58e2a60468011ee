"""Which engine runs: the C core (`core.c`) if it was built at installation, else Python.

The Python engine is complete. The core does whole operations of the common case in one call, and leaves everything else
to the Python engine. Both work on the same file at the same time. ``SHMSTORE_ENGINE=python`` or ``c`` forces one.

A call of the core returns a result, or one of the numbers below: it has changed nothing, and Python does the whole
operation. So it is with each call after the arena was closed. The core takes the lock only if it is free within
microseconds; waiting is left to Python, so that other threads and greenlets run.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from shmstore.engine import frame, header, layout
from shmstore.engine.mutex import DEPTH_WORD, LOCKED_ONCE, Mutex
from shmstore.errors import ConfigError
from shmstore.system.platform import LACKING

if TYPE_CHECKING:
    from shmstore.engine._core import Core
    from shmstore.engine.layout import Geometry
    from shmstore.engine.mapping import MappedFile
    from shmstore.engine.table import Table

__all__ = [
    "BUSY", "CHANGED", "DECLINED", "DUE", "ENGINES", "attach", "describe", "engine", "is_plain", "numbers", "problem",
]  # fmt: skip

BUSY: Final = -1
"""The lock is taken, or the session is being changed."""
DUE: Final = -2
"""A dispose may have to be called."""
DECLINED: Final = -3
"""Something rare: the limit of an owner, an option, a half-done mutation, damage."""
CHANGED: Final = -4
"""The session is not what the caller has read."""

ENGINES: Final = ("python", "c")

# What core.c must agree on, in its order; first CORE_VERSION of core.h, which grows with each change of what a call
# takes, returns or does. A core that was built from other sources is not used.
_INTERFACE: Final = (
    4,
    layout.SLOT,
    *range(layout.SLOT),
    header.STATE, header.PENDING, header.STRUCTURE, header.TICK, header.SESSIONS, header.EARLIEST_COPY,
    header.USED_BLOCKS, header.TOP_SLOT, header.FREE_SLOT, header.FREE_RUN, header.EARLIEST, header.RECENT_EARLIEST,
    header.HAND, header.WEIGHT, header.SETS, header.TOUCHES, header.DESTROYED, header.EXPIRED, header.EVICTED,
    header.EVICTED_OWNED, header.MAX, header.RECENCY, header.MAX_SESSION, header.MAX_PER_OWNER, header.DISPOSES,
    header.DISPOSES_ON_SET, header.HAS_WEIGHTS, header.OPTIONS_SUM, layout.JOURNAL // layout.CELL,
    layout.JOURNAL_CELLS, frame.HEAD, frame.OVERHEAD, layout.RUN, layout.TOMBSTONE_WAYS,
)  # fmt: skip

is_plain: Callable[[object, int], bool] | None = None
"""What the C core exports under this name; None: there is no core."""
_problem = ""  # why there is no core, and what to do
try:
    from shmstore.engine import _core
except ImportError as _error:
    _problem = f"the C core was not built when shmstore was installed ({_error})"
else:
    if getattr(_core, "INTERFACE", None) != _INTERFACE:
        _problem = f"the C core was built from other sources; remove {_core.__file__} and install shmstore again"
    else:
        is_plain = _core.is_plain

if LACKING:
    _problem = "the C core is for stores that processes share"


def _how() -> str:
    """Return how to get the C core, or why it cannot be had."""
    if LACKING:
        return LACKING
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "there is none for free-threaded Python"
    # pip would take the wheel without the core that it has kept.
    return (
        "to build it, install a C compiler and Python's headers (Debian: gcc python3-dev), then shmstore again: "
        "pip install --no-cache-dir --force-reinstall"
    )


def engine() -> str:
    """
    Return the engine that arenas opened from now on use: ``c`` or ``python``.

    Raises:
        ConfigError: `SHMSTORE_ENGINE` is not one of `ENGINES`, or ``c`` and there is no core.
    """
    forced = os.environ.get("SHMSTORE_ENGINE", "")
    if forced and forced not in ENGINES:
        raise ConfigError(f"SHMSTORE_ENGINE={forced} is neither python nor c")
    if forced == "c" and _problem:
        raise ConfigError(f"SHMSTORE_ENGINE=c, but {problem()}")
    return "python" if _problem or forced == "python" else "c"


def problem() -> str:
    """Return why there is no C core, and how to get it; "" if there is one."""
    return f"{_problem}; {_how()}" if _problem else ""


def describe() -> str:
    """Return which engine runs, and if it is not the C core, why."""
    chosen = engine()
    return chosen if chosen == "c" else f"python ({problem() or 'SHMSTORE_ENGINE=python'})"


def attach(file: MappedFile, table: Table) -> Core | None:
    """Return the core of a mapped arena; None: the Python engine works alone."""
    if engine() == "python" or not isinstance(file.mutex, Mutex):  # the core takes no other lock
        return None
    return _core.Core(file.memory, layout.MUTEX, DEPTH_WORD, LOCKED_ONCE, numbers(file.geometry, table))


def numbers(geometry: Geometry, table: Table) -> tuple[int, ...]:
    """Return the sizes and places in an arena, as the core takes them."""
    return (
        geometry.slots, geometry.blocks, geometry.block_size, geometry.shortest, geometry.buckets,
        geometry.owner_buckets, geometry.tombstone_sets, table.key_low, table.buckets, table.owners,
        table.tombstones, table.heads, geometry.block_size // layout.CELL, table.last_slot, table.owned_list,
    )  # fmt: skip
