"""
Options that change while processes use the store: what every process obeys at once, and how the others follow.

`StoreServer.apply` merges and saves options, then `Store.change_options` obeys them and calls `publish`. The numbers
among them are cells of the arena, which each process reads whenever it needs one. The cell `OPTIONS` tells it that
functions and the rest have changed too: it reads these from the options file before its next write
(`Attachment.refresh_options`).
"""

from __future__ import annotations

from shmstore.engine.arena import Arena
from shmstore.engine.header import BY_FUNCTION, NO_TTL, ON, OPTIONS
from shmstore.options import Options
from shmstore.store.expiry import nanoseconds
from shmstore.system.clock import boottime_ns

__all__ = ["publish"]


def publish(arena: Arena, options: Options) -> None:
    """Write the options to the cells that every process reads."""
    arena.cells[OPTIONS] = boottime_ns()  # first: a process that sees one of those below can read the others
    ttl = NO_TTL if options.ttl is None else BY_FUNCTION if callable(options.ttl) else nanoseconds(options.ttl)
    disposes = ON if options.dispose is not None else 0
    arena.option_cells.publish(
        (
            options.max or 0,
            nanoseconds(options.recency),
            ttl,
            min(options.session_limit, arena.geometry.largest_session),
            options.max_per_owner or 0,
            ON if options.stale else 0,
            disposes,
            0 if options.no_dispose_on_set else disposes,
        )
    )
