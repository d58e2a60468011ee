"""
Live sessions on their way from one store to another: in shared memory, on a server, or in a file.

What travels is the record as it is, with its times told by the clock of this process (`boottime_ns`): one look at the
clock of each end says how far that is away, so the two need not agree. Nothing is taken from where it was, and what is
newer where it comes to stays there, so it may be done again: after a failure to complete it, or to bring what is new.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from shmstore.codec.body import Codec, unpack
from shmstore.codec.ids import digest_of_key, key_of_id, owner_digest
from shmstore.engine.frame import Key
from shmstore.errors import ConfigError, SerializationError
from shmstore.system.clock import NS, boottime_ns
from shmstore.transfer.snapshot_file import Progress

__all__ = ["COPIED", "CROWDED", "FULL", "SKIPPED", "Copied", "Found", "Moving", "Sink", "Source", "copy", "is_newer"]

COPIED: Final = "copied"
SKIPPED: Final = "skipped"
"""It is there already, as new or newer; or it was, and has just been ended there."""

FULL: Final = "no room"
LARGE: Final = "too large"
CROWDED: Final = "its owner has max_per_owner sessions"
DAMAGED: Final = "damaged"

_BATCH: Final = 100  # sessions on their way at once ...
_BYTES: Final = 2**20  # ... or so many bytes
_SLACK: Final = NS  # two lives that differ by less are the same: clocks are looked at one after the other


class Found(NamedTuple):
    """A session that may travel: its key, bytes of its record, weight, digest of its owner."""

    key: Key
    size: int
    weight: int
    owner: int


class Moving(NamedTuple):
    """
    A session on its way.

    Attributes:
        key, owner, weight, body: As in a record.
        created, used: When it was, nanoseconds by the clock of this process.
        expires: Its deadline, by that too; `NEVER`: it has none.
    """

    key: Key
    owner: int
    weight: int
    body: bytes
    created: int
    used: int
    expires: int


class Source(Protocol):
    """
    Where sessions come from.

    Attributes:
        label: What to call it.
        places: What it is that this leads to, as far as can be told; nothing of another one is among them.
    """

    label: str
    places: frozenset[object]

    def survey(self, progress: Progress) -> list[Found]:
        """Return all live sessions, the least recently used first."""

    def read(self, wanted: Sequence[Found]) -> list[Moving]:
        """Return some of those, in that order, without those that have gone meanwhile. Called in that order, once."""


class Sink(Protocol):
    """
    Where sessions come to.

    Attributes:
        label, places: As of a `Source`.
        codec: The name of its serializer; None: it takes records of any.
        limit: Bytes of the largest session that it takes; 0: any.
    """

    label: str
    places: frozenset[object]
    codec: str | None
    limit: int

    def choose(self, found: Sequence[Found]) -> dict[Key, str]:
        """Return those that it will not take, and why: of too many those that were used last are taken."""

    def put(self, sessions: Sequence[Moving]) -> list[str]:
        """Take sessions in; return what became of each: `COPIED`, `SKIPPED`, or why it was refused."""

    def missing(self, keys: Sequence[Key]) -> set[Key]:
        """Return which of the sessions that it has taken in it does not have, though nobody has ended them."""


class Copied(NamedTuple):
    """
    What became of the sessions.

    Attributes:
        copied: How many are there now, as they were.
        skipped: How many were there already, or had been ended there a moment ago.
        refused: How many could not be taken.
        missing: How many of those that were taken were not there in the end: evicted, say.
        total: The first three together.
        reasons: The digests of the refused, by the reason.
    """

    copied: int
    skipped: int
    refused: int
    missing: int
    total: int
    reasons: dict[str, list[str]]


def _unseen(done: int, total: int) -> None:
    """Take note of no progress."""


def copy(source: Source, sink: Sink, progress: Progress = _unseen) -> Copied:
    """
    Copy all live sessions, and look in the end whether they are there.

    Of a session that both have, the one that was used last counts. No session is evicted, and none comes back that was
    ended there in the last 30 seconds.

    Args:
        source: Where they are. It does not change.
        sink: Where they come to.
        progress: Called now and then with how many are done, and of how many.

    Raises:
        ConfigError: Both are the same.
        ShmStoreError: One of them cannot be used, or not any longer. What was copied until then stays; do it again.
    """
    if source.places & sink.places:
        raise ConfigError(f"{source.label} cannot be copied to itself: name another store")
    found = source.survey(progress)
    reasons: dict[str, list[str]] = defaultdict(list)
    unwanted = sink.choose(found)
    for key, reason in unwanted.items():
        reasons[reason].append(digest_of_key(key))
    counts: Counter[str] = Counter()
    until: dict[Key, int] = {}  # when those end that were taken
    done = 0
    for batch in _batches(found):
        travelling = []
        for session in source.read([each for each in batch if each.key not in unwanted]):
            if fault := _fault(session, sink):
                reasons[fault].append(digest_of_key(session.key))
            else:
                travelling.append(session)
        for session, outcome in zip(travelling, sink.put(travelling), strict=True):
            if outcome in (COPIED, SKIPPED):
                counts[outcome] += 1
            else:
                reasons[outcome].append(digest_of_key(session.key))
            if outcome == COPIED:
                until[session.key] = session.expires
        done += len(batch)
        progress(done, len(found))
    missing = sink.missing(list(until))
    lost = sum(until[key] > boottime_ns() + _SLACK for key in missing)
    refused = sum(map(len, reasons.values()))
    return Copied(
        counts[COPIED], counts[SKIPPED], refused, lost, counts[COPIED] + counts[SKIPPED] + refused, dict(reasons)
    )


def is_newer(session: Moving, body: bytes, used: int, expires: int) -> bool:
    """Return whether a session takes the place of what is there under its key: was used later, and is not the same."""
    return session.used > used and (session.body != body or abs(session.expires - expires) > _SLACK)


def _batches(found: Sequence[Found]) -> Iterator[list[Found]]:
    batch: list[Found] = []
    size = 0
    for each in found:
        if batch and (len(batch) == _BATCH or size + each.size > _BYTES):
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += each.size
    if batch:
        yield batch


def _fault(session: Moving, sink: Sink) -> str:
    """Return why a session cannot travel; nothing if it can. A record is believed only if it is one."""
    try:
        record = unpack(session.body)
        Codec().raws(bytes(record.payload))
        if key_of_id(record.sid) != session.key or owner_digest(record.owner) != session.owner:
            return DAMAGED
    except (SerializationError, ValueError):
        return DAMAGED
    if sink.codec not in (None, record.codec_name):
        return f"written by the serializer {record.codec_name!r}, not by {sink.codec!r}"
    return LARGE if sink.limit and len(record.payload) > sink.limit else ""
