"""
Copies sessions from a source to a sink: the engine under `shmstore copy`, snapshots and the start of a server.

A source and a sink may be a store in shared memory (`memory`), a store on a server (`shmstore.redis.endpoint`) or the
file of a snapshot (`snapshot_file`). Records travel as they are stored, with all times told by the clock of this
process (`boottime_ns`), so the clocks of the two ends may differ. The source does not change. A copy can be repeated:
after an interruption, or to copy what has changed since.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple, Protocol

from shmstore.codec.ids import digest_of_key
from shmstore.engine.frame import Key, TimedRecord, body_of, key_of
from shmstore.errors import ConfigError
from shmstore.system.clock import NS, boottime_ns

__all__ = [
    "COPIED", "CROWDED", "DAMAGED", "FULL", "SAME", "SKIPPED", "Copied", "Progress", "Sink", "Source", "Survey", "copy",
    "is_stored", "quiet",
]  # fmt: skip

Progress = Callable[[int, int], object]
"""Called now and then: how many sessions are done, of how many."""

COPIED: Final = "copied"
SKIPPED: Final = "skipped"
"""The session of the sink stays, or it was ended there a moment ago: see `is_stored`."""

FULL: Final = "no room"
CROWDED: Final = "its owner has max_per_owner sessions"
DAMAGED: Final = "damaged"

SAME: Final = NS
"""Deadlines that differ by less are equal: the clocks of two ends are read one after the other."""

_BATCH: Final = 128  # sessions that are copied at once ...
_BYTES: Final = 2**20  # ... or fewer, if they have this many bytes


def is_stored(record: TimedRecord, there: TimedRecord | None, was_ended: Callable[[], object]) -> bool:
    """
    Return whether a sink stores a record: the rule for conflicts, the same in every sink.

    - The session that was used more recently wins, so that no user loses the last action. If both were used at the
      same time, the one at the sink stays.
    - A later use without a change replaces nothing.
    - A session that was logged out at the sink, or has got another id there, in the last 30 seconds stays gone.

    Expired sessions do not travel, and one that has expired at the sink counts as absent. A sink in shared memory also
    refuses what its limits have no room for: no live session is evicted by a copy. The script `STORE` in
    `shmstore.redis.scripts` states the same rule for a server.

    Args:
        record: The record that comes.
        there: The record of a live session that the sink has under the same key, None without one.
        was_ended: Returns whether that key has a tombstone at the sink.
    """
    if there is None:
        return not was_ended()
    (sealed, deadline, used), (sealed_there, deadline_there, used_there) = record, there
    is_same = abs(deadline - deadline_there) <= SAME and body_of(sealed) == body_of(sealed_there)
    return used > used_there and not is_same


class Survey(NamedTuple):
    """The live sessions of a source, a column for each property; the least recently used first."""

    lows: array[int]
    highs: array[int]
    sizes: array[int]
    weights: array[int]
    owners: array[int]

    def key(self, number: int) -> Key:
        """Return the key of a session."""
        return self.lows[number], self.highs[number]


class Source(Protocol):
    """
    The end that sessions come from.

    Attributes:
        label: Its name in messages.
        places: What identifies the store, whatever name it has; no other store has any of these in common with it.
        damaged: The keys of the sessions that could not be read.
    """

    label: str
    places: frozenset[object]
    damaged: list[Key]

    def survey(self, progress: Progress) -> Survey:
        """Return the properties of all live sessions. Called once, first."""

    def read(self, numbers: Sequence[int]) -> list[TimedRecord]:
        """Return the records of sessions in the survey, in this order, without those that have gone meanwhile."""


class Sink(Protocol):
    """
    The end that sessions go to.

    Attributes:
        label, places: As those of a `Source`.
        shared: Whether other processes can remove what it has stored: then `missing` is called.
    """

    label: str
    places: frozenset[object]
    shared: bool

    def choose(self, survey: Survey) -> dict[int, str]:
        """Return the numbers of the sessions that do not fit or are not allowed, each with the reason."""

    def put(self, records: Sequence[TimedRecord]) -> list[str]:
        """Store records by the rule `is_stored`; return for each `COPIED`, `SKIPPED` or why it was refused."""

    def missing(self, keys: AbstractSet[Key]) -> set[Key]:
        """Return the keys whose sessions are gone although no user has ended them."""


class Copied(NamedTuple):
    """
    The outcome of a copy.

    Attributes:
        copied: Sessions that were stored.
        skipped: Sessions that the sink had already, or that were ended there a moment ago.
        refused: Sessions that could not be stored.
        missing: Sessions that were stored, but were gone at the end: evicted, for example.
        total: The sum of the first three.
        reasons: The digests of the refused sessions, by reason.
    """

    copied: int
    skipped: int
    refused: int
    missing: int
    total: int
    reasons: dict[str, list[str]]


def quiet(done: int, total: int) -> None:
    """Report no progress."""


def copy(source: Source, sink: Sink, progress: Progress = quiet) -> Copied:
    """
    Copy all live sessions.

    Args:
        source: Where they are.
        sink: Where they are to be stored.
        progress: Called now and then.

    Raises:
        ConfigError: Both ends are the same store.
        ShmStoreError: One of the ends has failed. What was copied until then stays; the copy can be repeated.
    """
    if source.places & sink.places:
        raise ConfigError(f"{source.label} cannot be copied to itself: name another store")
    survey = source.survey(progress)
    unwanted = sink.choose(survey)
    reasons: dict[str, list[str]] = defaultdict(list)
    for number, reason in unwanted.items():
        reasons[reason].append(digest_of_key(survey.key(number)))
    counts = {COPIED: 0, SKIPPED: 0}
    deadlines: dict[Key, int] = {}  # of what was stored
    done, total = len(unwanted), len(survey.sizes)
    progress(done, total)
    for batch in _batches([number for number in range(total) if number not in unwanted], survey):
        records = source.read(batch)
        for (sealed, deadline, _), outcome in zip(records, sink.put(records), strict=True):
            if outcome in counts:
                counts[outcome] += 1
            else:
                reasons[outcome].append(digest_of_key(key_of(sealed)))
            if outcome == COPIED and sink.shared:
                deadlines[key_of(sealed)] = deadline
        done += len(batch)
        progress(done, total)
    if source.damaged:
        reasons[DAMAGED] += map(digest_of_key, source.damaged)
    missing = sink.missing(deadlines.keys()) if deadlines else set()
    lost = sum(deadlines[key] > boottime_ns() + SAME for key in missing)
    refused = sum(map(len, reasons.values()))
    stored, skipped = counts.values()
    return Copied(stored, skipped, refused, lost, stored + skipped + refused, dict(reasons))


def _batches(numbers: Sequence[int], survey: Survey) -> Iterator[list[int]]:
    batch: list[int] = []
    size = 0
    for number in numbers:
        if batch and (len(batch) == _BATCH or size + survey.sizes[number] > _BYTES):
            yield batch
            batch, size = [], 0
        batch.append(number)
        size += survey.sizes[number]
    if batch:
        yield batch
