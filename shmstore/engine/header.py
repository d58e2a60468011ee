"""
The header words of an arena: names for the cells of its state, by their index in the file.

Cells are written under the lock and through the journal, unless stated otherwise.
"""

from __future__ import annotations

from typing import Final

from shmstore.engine.layout import STATE_CELLS

NEVER: Final = 2**63 - 1  # a deadline that is never reached

STATE: Final = STATE_CELLS + 0  # LIVE, or the reason why this file is not in use any more
PENDING: Final = STATE_CELLS + 1  # the number of the journal's plan while the plan is being applied, else 0
STRUCTURE: Final = STATE_CELLS + 2  # odd while index chains change
TICK: Final = STATE_CELLS + 3  # no stamp of use is later; those of uses here are unique and increase
SESSIONS: Final = STATE_CELLS + 4
USED_BLOCKS: Final = STATE_CELLS + 6
TOP_SLOT: Final = STATE_CELLS + 7  # the highest slot that was ever used
FREE_SLOT: Final = STATE_CELLS + 8  # chained through `next`
FREE_RUN: Final = STATE_CELLS + 9  # first run of free blocks; the runs are chained through their heads
EARLIEST: Final = STATE_CELLS + 10  # no session expires before this time
EARLIEST_COPY: Final = STATE_CELLS + 5  # the same: a flipped bit can make one of the two too late, not both
RECENT_EARLIEST: Final = STATE_CELLS + 11  # the same for deadlines set since the last prune started
HAND: Final = STATE_CELLS + 12  # where eviction searches next for expired sessions; not journaled, any value is valid
WEIGHT: Final = STATE_CELLS + 13  # sum of the weights of all records, which `max` limits
SWEEP: Final = STATE_CELLS + 14  # number of the prune that started last
# Counters of events since the arena was created
SETS: Final = STATE_CELLS + 16
TOUCHES: Final = STATE_CELLS + 17
DESTROYED: Final = STATE_CELLS + 18
EXPIRED: Final = STATE_CELLS + 19
EVICTED: Final = STATE_CELLS + 20
EVICTED_OWNED: Final = STATE_CELLS + 21
CLEARED: Final = STATE_CELLS + 22
DISPOSE_ERRORS: Final = STATE_CELLS + 23  # plain stores by the process that calls `dispose`
CORRUPT: Final = STATE_CELLS + 24  # plain stores: records that were skipped
REBUILDS: Final = STATE_CELLS + 25  # repairs of damage: plain stores by the process that repairs
RESTARTS: Final = STATE_CELLS + 26  # servers that replaced one that had died: plain stores by these servers
REFUSED: Final = STATE_CELLS + 27  # writes that were too large: plain stores
DISPLACED: Final = STATE_CELLS + 28  # live sessions removed for newer ones of the same owner, see MAX_PER_OWNER
EVENTS: Final = range(SETS, DISPLACED + 1)
# The counters of processes that have ended, in the order of a row of counters
PAST: Final = STATE_CELLS + 64
# Options that every process applies at once: plain stores by the server
MAX: Final = STATE_CELLS + 32  # 0: as many as fit
RECENCY: Final = STATE_CELLS + 33  # nanoseconds
TTL: Final = STATE_CELLS + 34  # nanoseconds, or BY_FUNCTION, or NO_TTL: the session's own or one day
MAX_SESSION: Final = STATE_CELLS + 35  # bytes
MAX_PER_OWNER: Final = STATE_CELLS + 36  # 0: no limit
STALE: Final = STATE_CELLS + 37  # ON or 0, like the next two
DISPOSES: Final = STATE_CELLS + 38  # `dispose` must be called before a session is removed
DISPOSES_ON_SET: Final = STATE_CELLS + 39  # and before a session is overwritten
OPTION_CELLS: Final = slice(MAX, DISPOSES_ON_SET + 1)
# A copy of these eight cells and its checksum: see `store/live_options.py`
OPTIONS_COPY: Final = STATE_CELLS + 49
OPTIONS_SUM: Final = STATE_CELLS + 57  # 0: not set yet
HAS_WEIGHTS: Final = STATE_CELLS + 48  # records may have a weight other than 1: set once, by a process with a `length`
OPTIONS: Final = STATE_CELLS + 47  # time of the last change of an option: a process that sees another time reloads them
# The server: plain stores by the server
SERVER_PID: Final = STATE_CELLS + 40
SERVER_STARTED: Final = STATE_CELLS + 41
HEARTBEAT: Final = STATE_CELLS + 42
SNAPSHOT: Final = STATE_CELLS + 43  # wall clock, ns: the file contains all that was stored at this time; 0: no file
SNAPSHOT_FAILURES: Final = STATE_CELLS + 44  # failed attempts to save it since then
SNAPSHOT_PATH: Final = STATE_CELLS + 45  # digest of the path that a server last loaded or saved a snapshot at; 0: none

LIVE: Final = 0
ON: Final = 2**64 - 1  # not 0 whichever bit flips
# Far from each other and from 0, so a flipped bit produces neither of them.
MOVED: Final = int.from_bytes(b"is moved")
CLOSED: Final = int.from_bytes(b"is ended")
BY_FUNCTION: Final = 2**64 - 2
NO_TTL: Final = 2**64 - 1
