"""The names of the cells that hold the state of an arena, by their place in the file.

Written under the lock and through the journal, unless stated otherwise.
"""

from __future__ import annotations

from typing import Final

from shmstore.engine.layout import STATE_CELLS

NEVER: Final = 2**63 - 1  # a deadline that does not come

STATE: Final = STATE_CELLS + 0  # LIVE, or why this file is no longer in use
PENDING: Final = STATE_CELLS + 1  # number of the journal's plan while it is being applied, else 0
STRUCTURE: Final = STATE_CELLS + 2  # odd while index chains change
TICK: Final = STATE_CELLS + 3  # the last stamp of use given: stamps are unique and grow
SESSIONS: Final = STATE_CELLS + 4
USED_BLOCKS: Final = STATE_CELLS + 6
TOP_SLOT: Final = STATE_CELLS + 7  # slots above it were never used
FREE_SLOT: Final = STATE_CELLS + 8  # chained through `next`
FREE_RUN: Final = STATE_CELLS + 9  # first run of free blocks, chained through their heads
EARLIEST: Final = STATE_CELLS + 10  # no deadline is before it
EARLIEST_AGAIN: Final = STATE_CELLS + 5  # the same: a flipped bit may make one of them too late, not both
RECENT_EARLIEST: Final = STATE_CELLS + 11  # the same for deadlines given since the last prune began
HAND: Final = STATE_CELLS + 12  # where eviction looks for expired sessions next; not journaled, any value will do
WEIGHT: Final = STATE_CELLS + 13  # sum of the weights of all records: what `max` limits
SWEEP: Final = STATE_CELLS + 14  # number of the prune that began last
# What happened since the arena was made
SETS: Final = STATE_CELLS + 16
TOUCHES: Final = STATE_CELLS + 17
DESTROYED: Final = STATE_CELLS + 18
EXPIRED: Final = STATE_CELLS + 19
EVICTED: Final = STATE_CELLS + 20
EVICTED_OWNED: Final = STATE_CELLS + 21
CLEARED: Final = STATE_CELLS + 22
DISPOSE_ERRORS: Final = STATE_CELLS + 23  # plain stores by who disposes
CORRUPT: Final = STATE_CELLS + 24  # plain stores: records that were skipped
REBUILDS: Final = STATE_CELLS + 25  # damage healed: plain stores by who does that
RESTARTS: Final = STATE_CELLS + 26  # that took over from one that had died: plain stores by them
REFUSED: Final = STATE_CELLS + 27  # writes, as too large: plain stores
DISPLACED: Final = STATE_CELLS + 28  # live sessions, by newer ones of their owner, see MAX_PER_OWNER
EVENTS: Final = range(SETS, DISPLACED + 1)
# What processes that are gone have counted, in the order of a row of counters
PAST: Final = STATE_CELLS + 64
# Options that every process obeys at once: plain stores by the server
MAX: Final = STATE_CELLS + 32  # 0: as many as fit
RECENCY: Final = STATE_CELLS + 33  # nanoseconds
TTL: Final = STATE_CELLS + 34  # nanoseconds, or BY_FUNCTION, or NO_TTL: the session's own or one day
MAX_SESSION: Final = STATE_CELLS + 35  # bytes
MAX_PER_OWNER: Final = STATE_CELLS + 36  # 0: as many as there are
STALE: Final = STATE_CELLS + 37  # ON or 0, as the next two
DISPOSES: Final = STATE_CELLS + 38  # a `dispose` must be called before a session is dropped
DISPOSES_ON_SET: Final = STATE_CELLS + 39  # and before one is overwritten
OPTION_CELLS: Final = slice(MAX, DISPOSES_ON_SET + 1)
# What those eight were set to, and the checksum of that: see `Arena.options_damaged`
OPTIONS_AGAIN: Final = STATE_CELLS + 49
OPTIONS_SUM: Final = STATE_CELLS + 57  # 0: not set yet
WEIGHING: Final = STATE_CELLS + 48  # records may weigh other than 1: set once, by whoever has a `length`
OPTIONS: Final = STATE_CELLS + 47  # when they, or any other option, changed last: who sees another time reads them anew
# The server: plain stores by it
SERVER_PID: Final = STATE_CELLS + 40
SERVER_STARTED: Final = STATE_CELLS + 41
HEARTBEAT: Final = STATE_CELLS + 42
SNAPSHOT: Final = STATE_CELLS + 43  # nanoseconds of the wall clock: all that was stored then is in the file; 0: none
SNAPSHOT_FAILURES: Final = STATE_CELLS + 44  # attempts to save it since then

LIVE: Final = 0
ON: Final = 2**64 - 1  # however a bit flips in it, it is not 0
# Far from each other, and from 0: a flipped bit makes neither of them.
MOVED: Final = int.from_bytes(b"is moved")
CLOSED: Final = int.from_bytes(b"is ended")
BY_FUNCTION: Final = 2**64 - 2
NO_TTL: Final = 2**64 - 1
