"""The interface of all stores.

`Store` (in the memory of this host), `StoreProxy` (attached to the store of a server process) and `RedisStore` (on a
Redis or Valkey server) implement `AnyStore`. `shmstore.testing.StoreContract` is the same contract as a test suite.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Protocol, Self

from msgspec import Raw

from shmstore.codec.body import Codec
from shmstore.engine.arena import Arena
from shmstore.options import Duration, Options

__all__ = [
    "KEEP",
    "AnyStore",
    "ArenaStore",
    "Capability",
    "Data",
    "Keep",
    "Loaded",
    "NewOwner",
    "Owner",
    "Row",
    "Stats",
]


class Keep(enum.Enum):
    """The type of `KEEP`."""

    KEEP = enum.auto()


KEEP: Final = Keep.KEEP
"""Passed as ``owner``, leaves the owner of the session as it is."""

Data = Mapping[Any, Any] | Raw
"""A session to store. A ``msgspec.Raw`` is already encoded by ``AnyStore.codec``."""

Owner = str | None
"""The user that a session belongs to; None if it has no owner."""

NewOwner = str | None | Literal[Keep.KEEP]
"""A new owner; `KEEP` leaves the owner of the session as it is."""


class AnyStore(Protocol):
    """
    Sessions by id, each with a deadline.

    A session id is a non-empty ``str`` of at most 256 UTF-8 bytes. Any other value is a miss when it is read or
    destroyed, and a ``TypeError`` or ``ValueError`` when it is written. A session is a mapping. A duration is seconds
    (int, float) or a ``timedelta``. An expired session is absent for every method except `ids`, `length` and `prune`.

    Errors are for faults only. Every method may raise `StoreUnavailable` (the store was closed, or cannot be reached)
    and its subclass `StoreTimeout` (another process holds the lock for longer than ``lock_timeout`` seconds, or a
    server does not answer). After any error the session that was stored before is still there.

    A store is a context manager that closes it. ``sid in store`` tells whether a session is present, and does not count
    as use; ``len(store)`` is `length`, ``iter(store)`` iterates over `ids`, and a store is always true.
    """

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this store can do that not every store can."""
        ...

    @property
    def options(self) -> Options:
        """The options of the store."""
        ...

    @property
    def codec(self) -> Codec:
        """Turns sessions into bytes and back."""
        ...

    @property
    def label(self) -> str:
        """The name of the store in log lines."""
        ...

    # -- one session ---------------------------------------------------------------------------------------------

    def get(self, sid: str) -> dict[Any, Any] | None:
        """
        Return the session, None if it is absent. Counts as use; never extends its life.

        A value that cannot be read (its class was renamed, say) is left out, logged, and counted in
        ``stats().corrupt``. Its bytes stay stored until its key is set or deleted, or the whole session is set.
        """
        ...

    def peek(self, sid: str) -> dict[Any, Any] | None:
        """Return the session like `get`, without counting as use."""
        ...

    def load(self, sid: str) -> Loaded | None:
        """Return the session like `get`, undecoded and with what the store knows about it."""
        ...

    def set(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> None:
        """
        Create or overwrite a session.

        Args:
            sid: Its id.
            session: Its data; a ``msgspec.Raw`` is taken as already encoded by `codec`.
            ttl: Its life; None: by the option ``ttl``. Zero or negative: stored expired; ``math.inf``: it never
                expires.
            owner: Its owner; None: it has no owner. An owner with more than 256 UTF-8 bytes is stored as a digest.

        Raises:
            SerializationError: A value cannot be stored; the message names it.
            RecordTooLarge: The session is larger than ``max_session``.
        """
        ...

    def add(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> bool:
        """Create a session if it is absent, as `set` does. Return whether it was created."""
        ...

    def replace(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> bool:
        """Overwrite a session if it is present, as `set` does. Return whether it was present."""
        ...

    def update(
        self,
        sid: str,
        set: Mapping[Any, Any] = {},
        delete: Iterable[Any] = (),
        ttl: Duration | None = None,
        owner: NewOwner = KEEP,
    ) -> bool:
        """
        Change top-level keys of a stored session atomically. Changes of other keys by other processes stay.

        Args:
            sid: Its id.
            set: Keys to set.
            delete: Keys to remove; missing keys are ignored.
            ttl: Its life from now on; None keeps the deadline.
            owner: Its new owner; ``KEEP`` leaves the owner as it is.

        Returns:
            False if the session is absent: then nothing is stored.

        Raises:
            SerializationError, RecordTooLarge: As for `set`.
        """
        ...

    def rename(
        self,
        old: str,
        new: str,
        set: Mapping[Any, Any] = {},
        delete: Iterable[Any] = (),
        ttl: Duration | None = None,
        owner: NewOwner = KEEP,
        tombstone: bool = False,
    ) -> bool:
        """
        Move a session to a new id, with changes as by `update`, in one atomic step.

        Args:
            old: Its id.
            new: Its new id.
            set, delete, ttl, owner: As for `update`.
            tombstone: Leave a tombstone under the old id, in the same step: see `gone`.

        Returns:
            False if ``old`` is absent or ``new`` is present: then nothing has changed.

        Raises:
            SerializationError, RecordTooLarge: As for `set`.
        """
        ...

    def swap(
        self,
        sid: str,
        loaded: Loaded,
        payload: bytes,
        ttl: Duration | None = None,
        owner: NewOwner = KEEP,
        new: str | None = None,
        tombstone: bool = False,
    ) -> bool:
        """
        Compare and swap: change a session as `update` or `rename` does, but as a whole, and only if it is still as it
        was loaded.

        Args:
            sid: Its id.
            loaded: What `load` returned for this id.
            payload: The whole session, encoded by `codec`.
            ttl, owner: As for `update`.
            new: Its new id; None: it keeps its id.
            tombstone: As for `rename`.

        Returns:
            False if the session has changed or is absent, if ``new`` is present, or if the store cannot tell: then
            nothing is stored, and `update` or `rename` can merge the changes.

        Raises:
            RecordTooLarge: As for `set`.
        """
        ...

    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        """
        Renew the life of a session. Its data stays.

        Args:
            sid: Its id.
            session: If it has the key ``"cookie"``, its value replaces the stored one, and the option ``ttl`` depends
                on it.
            ttl: Its new life; None: by the option ``ttl``.

        Returns:
            Whether the session was present.
        """
        ...

    def destroy(self, sid: str | Iterable[str], tombstone: bool = False) -> int:
        """
        Remove one session, or the sessions of several ids. Missing ids are ignored.

        Args:
            sid: The id, or several.
            tombstone: Leave a tombstone under each id, in the same step: see `gone`.

        Returns:
            How many sessions were removed.
        """
        ...

    def destroy_if_empty(self, sid: str, ignore: Iterable[str] = (), tombstone: bool = False) -> bool:
        """Remove a session if it has no keys except those in ``ignore``; return whether it was removed."""
        ...

    def gone(self, sid: str, within: Duration = 30.0, renamed: bool = False) -> bool:
        """
        Return whether a session of this id was removed or renamed a moment ago, and left a tombstone.

        A caller leaves a tombstone if its response changes the cookie of the browser. For a few seconds the browser may
        still send the old id, and must then not get a cookie that replaces the newer one. Call this after a miss. A
        removal without the browser (another device, an administrator, ``destroy_owned``, ``clear``, expiry) leaves no
        tombstone.

        The number of tombstones is fixed; the oldest are overwritten.

        Args:
            sid: An id.
            within: The age that counts; 30 seconds at most.
            renamed: Count only sessions that were renamed, not removed ones.
        """
        ...

    def lock(self, sid: str, timeout: Duration = 5.0) -> AbstractContextManager[None]:
        """
        Return a context that holds the lock of this id, which no other caller in any process holds meanwhile.

        The lock does not stop other callers from reading and writing the session, which need not exist. It is not
        reentrant: taking it twice waits until the timeout. It is released when its process dies.

        Args:
            sid: An id.
            timeout: How long to wait for the lock.

        Raises:
            StoreTimeout: Another caller has held the lock for that long.
        """
        ...

    def __contains__(self, sid: object) -> bool:
        """Return whether the session is present; does not count as use."""
        ...

    # -- all sessions ----------------------------------------------------------------------------------------------

    def ids(self) -> list[str]:
        """Return the ids of all sessions, last used first, including expired sessions that are not pruned yet."""
        ...

    def all(self) -> dict[str, dict[Any, Any]]:
        """Return all live sessions by id, last used first. Sessions that cannot be read are left out and counted."""
        ...

    def length(self, live: bool = False) -> int:
        """
        Return the number of sessions.

        Args:
            live: Leave out expired sessions that are not pruned yet.
        """
        ...

    def clear(self) -> None:
        """Remove every session that exists at the time of the call."""
        ...

    def prune(self) -> int:
        """Remove expired sessions, and nothing else, in small batches. Return how many. The order of use stays."""
        ...

    def start_interval(self, period: Duration | None = None) -> None:
        """
        Prune periodically from now on; this replaces the previous period.

        Args:
            period: None: the option ``check_period``; if that is None or 0, nothing is started.
        """
        ...

    def stop_interval(self) -> None:
        """Stop the automatic prune."""
        ...

    # -- owners ----------------------------------------------------------------------------------------------------

    def owned_by(self, owner: str) -> list[str]:
        """Return the ids of an owner's live sessions, last used first."""
        ...

    def destroy_owned(self, owner: str, keep: Iterable[str] = ()) -> int:
        """
        Remove the sessions that an owner has at the time of the call: log out everywhere.

        A session that is renamed or changed meanwhile is removed too; one that begins after the call stays. Sessions
        are removed a few at a time, so that other writers need not wait. If this raises `StoreTimeout`, the sessions
        removed until then stay removed.

        Args:
            owner: The owner.
            keep: Ids of sessions that stay.

        Returns:
            How many sessions were removed.
        """
        ...

    # -- the store itself ------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return the contents of the store in figures, and the counters of its events."""
        ...

    def ping(self) -> bool:
        """Return True if the store answers."""
        ...

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        ...

    def close(self) -> None:
        """Close the store. Using it afterwards raises `StoreUnavailable`."""
        ...

    def __len__(self) -> int:
        return self.length()

    def __bool__(self) -> bool:
        """A store is true even if it is empty, so that ``if store`` tests whether there is one."""
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ArenaStore(AnyStore, Protocol):
    """A store whose sessions are in the memory of this host."""

    @property
    def arena(self) -> Arena:
        """The memory that holds the sessions now."""
        ...

    def sound_arena(self) -> Arena:
        """
        Return that memory for a listing of all its sessions; it is repaired first if some would be missed.

        Raises:
            StoreUnavailable: It cannot be repaired now.
        """
        ...


class Loaded(NamedTuple):
    """
    A session as it is stored, undecoded.

    Attributes:
        payload: One MessagePack map; the store's ``codec`` reads it.
        created: Seconds since it was created.
        idle: Seconds since it was last used.
        remaining: Seconds it has left to live.
        owner: Its owner, None if it has no owner.
        handle: What identifies this state of the session, for `AnyStore.swap`. Copies and pickles lose it.
    """

    payload: bytes
    created: float
    idle: float
    remaining: float
    owner: str | None
    handle: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Loaded, self[:-1]


new_loaded: Final[Callable[[tuple[bytes, float, float, float, str | None, Any]], Loaded]] = partial(
    tuple.__new__, Loaded
)
"""Return a `Loaded` with these fields, without a call of Python."""


class Row(NamedTuple):
    """
    The facts about a session that may be shown.

    Attributes:
        digest: The digest of its id, 32 hexadecimal digits; logs show the first eight.
        owner: Its owner, None if it has no owner.
        created: Seconds since it was created.
        idle: Seconds since it was last used.
        remaining: Seconds until it expires; 0 or less: it has expired and was not pruned yet.
        size: Bytes of its record; in a store without an arena, of its data.
    """

    digest: str
    owner: str | None
    created: float
    idle: float
    remaining: float
    size: int


@dataclass(frozen=True)
class Stats:
    """
    The contents of a store in figures, and the counters of events since its memory was created.

    Attributes:
        sessions: Sessions stored, including expired ones that are not pruned yet.
        owned: Sessions among them that have an owner.
        bytes: Bytes of ``memory`` in use, by records or by slots, whichever is scarcer.
        memory: Bytes of shared memory.
        gets: Reads that count as use: ``hits`` + ``misses``.
        hits: Reads that found their session.
        misses: Reads whose session was absent.
        sets: Sessions written: created, overwritten, updated, renamed.
        touches: Lives renewed without writing.
        destroyed: Sessions removed on request.
        expired: Expired sessions removed.
        evicted: Live sessions removed to make room; ``evicted_owned`` of them had an owner.
        evicted_owned: See ``evicted``.
        displaced: Live sessions removed because their owner has ``max_per_owner`` newer ones; not among ``evicted``.
        cleared: Sessions removed by ``clear``.
        dispose_errors: Exceptions that ``dispose`` raised.
        corrupt: Records, or values in records, that were left out because they cannot be read.
        refused: Writes refused because the session was too large.
        rebuilds: Times that damage was found, and the undamaged sessions were carried over to another file.
        lock_waits: Times that a caller had to wait for the lock.
        lock_waited: Seconds waited for the lock, in all.
        server_restarts: Server processes that replaced one that had died. A normal exit is not counted.
        server_pid: The process that prunes.
        server_uptime: Seconds since it started; 0 after its normal exit.
        snapshot_age: Seconds since the snapshot was saved, or found to be up to date; None: no snapshot exists.
        snapshot_failures: Failed attempts to save the snapshot since then; 0: the last attempt succeeded.
        engine: What works on the sessions for this process: ``c``, ``python``, or ``redis``.
    """

    sessions: int
    owned: int
    bytes: int
    memory: int
    gets: int
    hits: int
    misses: int
    sets: int
    touches: int
    destroyed: int
    expired: int
    evicted: int
    evicted_owned: int
    displaced: int
    cleared: int
    dispose_errors: int
    corrupt: int
    refused: int
    rebuilds: int
    lock_waits: int
    lock_waited: float
    server_restarts: int
    server_pid: int
    server_uptime: float
    snapshot_age: float | None = None
    snapshot_failures: int = 0
    engine: str = "python"


class Capability(enum.StrEnum):
    """A feature that only some stores have; the value describes it. Programs and the contract suite can query it."""

    USE_ORDER = "ids, all and owned_by follow every use of a session, reads included"
    """Without it they follow writes and touches; which session is evicted first is up to the server."""

    KEEPS_EXPIRED = "expired sessions stay, and count in ids and length, until they are pruned"
    """Without it they are removed when they expire, and no method returns or counts them."""

    MAKES_ROOM = "max, length and memory limit the store, and it decides which session is evicted"
    """Without it these options are refused or have no effect, because the server has its own limits."""

    DISPOSES_OF_ALL = "dispose is called for every session that is removed"
    """Without it only for sessions that a call removes or overwrites, in the process that makes the call."""

    STALE = "an expired session can be handed out once more"
    """Without it the option ``stale`` is refused."""

    SHARED_FIGURES = "stats count what all processes did, exactly and at once, and nothing else"
    """Without it what other processes did is counted later, and some figures are those of a whole server."""

    ATOMIC_RENAME = "a session that is renamed is at no instant under both ids or under neither"
    """Without it it may be under neither for a moment, and is lost if its writer dies then; it is never under both."""

    SEVERAL_HOSTS = "processes of several hosts can share it"
    """Without it only processes of one host can."""


IN_MEMORY: Final = frozenset(Capability) - {Capability.SEVERAL_HOSTS}
"""The capabilities of a store in shared memory."""
