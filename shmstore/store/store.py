"""The store: sessions in, sessions out. The text of the contract that every kind of store keeps is here."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from logging import DEBUG
from typing import Any, Final, Self

from shmstore.codec.body import payload_of
from shmstore.codec.ids import key_of_id, key_to_write
from shmstore.contract import OF_AN_ARENA
from shmstore.engine.arena import Arena
from shmstore.engine.header import (
    BY_FUNCTION,
    CORRUPT,
    DISPOSES,
    LIVE,
    MAX,
    MAX_PER_OWNER,
    NEVER,
    NO_TTL,
    ON,
    OPTIONS,
    SERVER_PID,
    SERVER_STARTED,
    SESSIONS,
    SETS,
    STALE,
    STATE,
    TOUCHES,
    TTL,
    WEIGHT,
)
from shmstore.engine.layout import RENAMED, ArenaDamaged
from shmstore.engine.named_locks import held
from shmstore.errors import ConfigError, SerializationError, ShmStoreError
from shmstore.options import Duration, Options, seconds
from shmstore.store.expiry import REMEMBERED, nanoseconds
from shmstore.store.operations import KEEP, Keep, NewOwner, Operations, Owner, Seen, let_others_in, request_limit
from shmstore.store.pruner import Interval
from shmstore.store.stats import Loaded, Stats
from shmstore.store.trace import obey_environment, trace, traced
from shmstore.system.clock import boottime_ns

__all__ = ["KEEP", "Keep", "Loaded", "Stats", "Store", "request_limit"]

log = logging.getLogger("shmstore")
tracing: Final = log.isEnabledFor

_COOKIE: Final = b"cookie"


class Store(Operations):
    """
    Sessions by id in shared memory, least recently used out first, each with a deadline.

    ``Store(**options)`` is private to this process and the children it forks, and gone when it is closed or they end.
    The options are those of `Options`.

    A session id is a non-empty ``str`` of at most 256 UTF-8 bytes. Anything else is a plain miss when read or
    destroyed, ``TypeError`` or ``ValueError`` when written. A session is a mapping. An expired session is absent for
    every method but ``ids``, ``length`` and ``prune``. After any error what was stored before is still there.

    Every method may raise `StoreTimeout` (another process holds the lock and does not move) and `StoreUnavailable`
    (the store was closed).

    Raises:
        ConfigError: An option is unknown or wrong.
        StoreFull: The memory cannot be reserved.

    Attributes:
        capabilities: What it can do that not every kind of store can.
    """

    capabilities = OF_AN_ARENA

    def __init__(self, /, **options: Any) -> None:
        obey_environment()
        checked = Options.of(**options)
        if checked.snapshot is not None:
            raise ConfigError(
                "snapshot is for shared stores, whose server saves it: use StoreManager, or snapshot.save"
            )
        for name in ("directory", "persist", "snapshot_period"):
            if options.get(name):
                raise ConfigError(f"{name} is for shared stores: a private one is in no directory and ends with it")
        self._begin(Arena.create(None, checked.geometry), checked)
        self.lay_down()
        self.arena.cells[SERVER_PID] = os.getpid()
        self.arena.cells[SERVER_STARTED] = self._clock()
        self.start_interval()

    @classmethod
    def over(cls, arena: Arena, options: Options) -> Self:
        """Return a store on an arena that another owns: nothing is started, no option is laid down."""
        store = cls.__new__(cls)
        store._begin(arena, options)
        return store

    def _begin(self, arena: Arena, options: Options) -> None:
        super()._begin(arena, options)
        self._interval = Interval(self)

    def apply(self, options: Options) -> None:
        """Obey other options from now on, and let every process obey them that uses the same memory."""
        self.stop_interval()
        self._obey(options)
        self.lay_down()
        self.start_interval()

    def lay_down(self) -> None:
        """Write this store's options where every process looks."""
        cells, options = self.arena.cells, self.options
        for name, other in options.without_effect():
            log.warning("%s: the option %s has no effect without %s", self.label, name, other)
        cells[OPTIONS] = boottime_ns()  # first: who sees one of those below can read the others
        ttl = NO_TTL if options.ttl is None else BY_FUNCTION if callable(options.ttl) else nanoseconds(options.ttl)
        disposes = ON if options.dispose is not None else 0
        self.arena.set_options(
            (
                options.max or 0,
                nanoseconds(options.recency),
                ttl,
                min(options.session_limit, self.arena.geometry.largest_session),
                options.max_per_owner or 0,
                ON if options.stale else 0,
                disposes,
                0 if options.no_dispose_on_set else disposes,
            )
        )
        if (cells[MAX] and cells[WEIGHT] > cells[MAX]) or 0 < cells[MAX_PER_OWNER] < self.arena.owned():
            # In a thread: the lock's holder may be frozen, a dispose slow, and the options are laid down all the same.
            thread = threading.Thread(target=self._shrink, name="shmstore-shrink", daemon=True)
            thread.start()
            thread.join(0 if cells[DISPOSES] else 1)

    def _keep_options(self) -> None:
        """Restore the options in the shared memory if these are damaged. Called now and then, without the lock."""
        if self.arena.options_damaged():
            self._heal(ArenaDamaged("an option"))

    def _shrink(self) -> None:
        """
        Drop what is beyond `max` and `max_per_owner`, after these were lowered.

        What is left goes when the next sessions come, a part of it with each.
        """
        arena = self.arena
        try:
            _repeat(self._trim)
            most = arena.cells[MAX_PER_OWNER]
            counts = Counter(arena.column(arena.owner, arena.used_slots())) if most else {}
            for owner in [owner for owner, count in counts.items() if owner and count > most]:
                _repeat(partial(self._trim_owner, owner))
        except ShmStoreError as exc:
            if not self.closed:
                log.warning("%s: what is beyond max or max_per_owner stays for now: %s", self.label, exc)

    # -- one session -----------------------------------------------------------------------------------------------

    def get(self, sid: str) -> dict[Any, Any] | None:
        """
        Return the session, None if there is none. Counts as use; never extends its life.

        A value that cannot be read (its class was renamed, say) is left out, logged and counted in
        ``stats().corrupt``. What is stored of it stays until its key is set or deleted, or all of the session is set.
        """
        body = self._find(sid, counted=True)
        if body is not None:
            session = self._decode(body, counted=True)
        else:
            session = self._take_stale(sid) if self.arena.cells[STALE] == ON else None
        if tracing(DEBUG):
            trace("get", (sid,), session)
        return session

    def peek(self, sid: str) -> dict[Any, Any] | None:
        """Return the session like `get`, without counting as use."""
        body = self._find(sid, counted=False)
        session = None if body is None else self._decode(body, counted=False)
        if tracing(DEBUG):
            trace("peek", (sid,), session)
        return session

    def load(self, sid: str) -> Loaded | None:
        """Return the session like `get`, undecoded and with what the store knows about it."""
        loaded = self._load(sid)
        if tracing(DEBUG):
            trace("load", (sid,), loaded)
        return loaded

    @traced
    def set(self, sid: str, session: Mapping[Any, Any], ttl: Duration | None = None, owner: Owner = None) -> None:
        """
        Create or overwrite a session.

        Args:
            sid: Its id.
            session: What to keep.
            ttl: Its life; None: by the store's rule. Zero or negative: stored expired; ``math.inf``: for ever.
            owner: Whose it is; None: nobody's. Of one with more than 256 UTF-8 bytes a digest is stored; it is found
                by itself.

        Raises:
            SerializationError: A value cannot be stored; the message names it.
            RecordTooLarge: The session is larger than ``max_session``.
        """
        self._put(sid, session, ttl, owner, None)

    @traced
    def add(self, sid: str, session: Mapping[Any, Any], ttl: Duration | None = None, owner: Owner = None) -> bool:
        """Create a session only if there is none. Return whether it was created."""
        return self._put(sid, session, ttl, owner, False)

    @traced
    def replace(self, sid: str, session: Mapping[Any, Any], ttl: Duration | None = None, owner: Owner = None) -> bool:
        """Overwrite a session only if it is there. Return whether it was."""
        return self._put(sid, session, ttl, owner, True)

    @traced
    def update(
        self,
        sid: str,
        set: Mapping[Any, Any] = {},
        delete: Iterable[Any] = (),
        ttl: Duration | None = None,
        owner: NewOwner = KEEP,
    ) -> bool:
        """
        Change some top-level keys of a stored session, atomically; what others changed meanwhile stays.

        Args:
            sid: Its id.
            set: Keys to set.
            delete: Keys to remove; missing ones are ignored.
            ttl: Its new life from now on; None keeps the deadline.
            owner: Its new owner; ``KEEP`` leaves the old one.

        Returns:
            False, and nothing is stored, if the session is gone.
        """
        return self._change(sid, sid, set, tuple(delete), ttl, owner)

    @traced
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
        Move a session to a new id, with changes as by `update`, in one step: at no instant it is under both or neither.

        Args:
            old: Its id.
            new: Its new id.
            set, delete, ttl, owner: As for `update`.
            tombstone: Leave a tombstone under the old id, in the same step: see `gone`.

        Returns:
            False, and nothing is changed, if ``old`` is gone or ``new`` is there.
        """
        key_to_write(old)
        return old != new and self._change(old, new, set, tuple(delete), ttl, owner, SETS, tombstone)

    @traced
    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        """
        Renew the life of a session. Its data stays.

        Args:
            sid: Its id.
            session: If it has a ``"cookie"``, that replaces the stored one, and the ttl rule looks at it.
            ttl: Its new life; None: by the store's rule.

        Returns:
            Whether the session was there.
        """
        key = key_of_id(sid)
        if key is None:
            return False
        if session is not None and not isinstance(session, Mapping):
            raise TypeError(f"a session must be a mapping, not {type(session).__name__}")
        arena = self.arena
        if session is not None and "cookie" in session:
            if ttl is None:
                ttl = self._life(session, sid)
            return self._change(sid, sid, {"cookie": session["cookie"]}, (), ttl, KEEP, TOUCHES)
        self._before_write()
        if ttl is None:
            if session is None and arena.cells[TTL] >= BY_FUNCTION:
                body = self._find(sid, counted=False)
                if body is None:
                    return False
                # Decoding costs more than all the rest: only for those whose life depends on what is in it.
                if arena.cells[TTL] == BY_FUNCTION or _COOKIE in body:
                    session = self._decode(body, counted=False)
            ttl = self._life({} if session is None else session, sid)
        return self._retime(key, nanoseconds(ttl))

    @traced
    def destroy(self, sid: str | Iterable[str], tombstone: bool = False) -> int:
        """
        Remove one session, or those of several ids. Return how many were there; missing ones are ignored.

        Args:
            sid: The id, or several.
            tombstone: Leave a tombstone under the id, in the same step: see `gone`.
        """
        if isinstance(sid, str):
            return self._destroy(sid, tombstone)
        return sum(self._destroy(each, tombstone) for each in sid) if isinstance(sid, Iterable) else 0

    @traced
    def destroy_if_empty(self, sid: str, ignore: Iterable[str] = (), tombstone: bool = False) -> bool:
        """Remove a session if it has no keys but those of ``ignore``; return whether it was. Else as `destroy`."""
        return self._destroy_if_empty(sid, frozenset(ignore), tombstone)

    @traced
    def gone(self, sid: str, within: Duration = 30.0, renamed: bool = False) -> bool:
        """
        Return whether a session of this id was removed or renamed a moment ago, and left a tombstone.

        A caller leaves one if it is about to tell the browser: for a few seconds the browser may still send the old id,
        and must then not get a cookie in place of the newer one. To be asked after a miss. What removes a session
        without its browser (another device, an administrator, ``destroy_owned``, ``clear``, expiry) leaves none.

        A tombstone is one of a fixed number, and the oldest make room: docs/security.md says how many that is.

        Args:
            sid: An id.
            within: The age that counts, in seconds or as a timedelta; 30 seconds at most.
            renamed: Count only a session that was renamed, not one that was removed.
        """
        key = key_of_id(sid)
        if key is None:
            return False
        when = self.arena.tombstone(key, self._clock(), min(nanoseconds(within), REMEMBERED))
        return bool(when & RENAMED if renamed else when)

    @contextmanager
    def lock(self, sid: str, timeout: Duration = 5.0) -> Iterator[None]:
        """
        Return a context in which no other has the lock of this id, in any process: for those who must take turns.

        It stops nobody from reading and writing the session, and need not be that of one that is there. Taking it
        twice waits for oneself. It goes with the process that holds it.

        Args:
            sid: An id.
            timeout: How long to wait for it, in seconds.

        Raises:
            StoreTimeout: Another has it for longer than that.
        """
        taken = False
        try:
            with held(self.arena, key_to_write(sid)[0], seconds(timeout, "timeout")):
                taken = True
                if tracing(DEBUG):
                    trace("lock", (sid,), None)
                yield
        except Exception as exc:
            if not taken and tracing(DEBUG):
                trace("lock", (sid,), exc)
            raise

    @traced
    def __contains__(self, sid: object) -> bool:
        """Return whether there is such a session; does not count as use."""
        body = self._find(sid, counted=False)
        try:
            return body is not None and bool(payload_of(body, self.codec.name))
        except SerializationError:
            return False

    # -- all sessions ----------------------------------------------------------------------------------------------

    @traced
    def ids(self) -> list[str]:
        """Return the ids of all sessions, the most recently used first, expired ones not pruned yet included."""
        return [record.sid for _, record in self._records()]

    @traced
    def all(self) -> dict[str, dict[Any, Any]]:
        """Return all live sessions by id, the most recently used first. What cannot be read is left out."""
        now = self._clock()
        sessions = {}
        for entry, record in self._records():
            if entry[2] > now and record.codec_name == self.codec.name:
                try:
                    sessions[record.sid] = self.codec.readable(record.payload)
                except SerializationError:
                    self.arena.cells[CORRUPT] += 1
        return sessions

    @traced
    def length(self, live: bool = False) -> int:
        """Return how many sessions there are, expired ones not pruned yet included unless ``live`` is asked for."""
        arena = self.arena
        arena.keep_up()
        if not live:
            return arena.cells[SESSIONS]
        now = self._clock()
        slots = arena.used_slots()
        deadlines, records = arena.column(arena.expires, slots), arena.column(arena.record, slots)
        return sum(1 for deadline, record in zip(deadlines, records, strict=True) if record and deadline > now)

    def __len__(self) -> int:
        return self.length()

    def __bool__(self) -> bool:
        """A store is true, also when it is empty: ``if store`` asks whether there is one."""
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    @traced
    def clear(self) -> None:
        """Remove every session that is there at the call."""
        # A session is what began at one time: it may be renamed or changed meanwhile, and still goes.
        arena = self.arena
        epoch, there = -1, list[Seen]()
        while epoch != arena.epoch:  # else it has moved to another file meanwhile
            epoch, there = arena.epoch, []
            for slot in arena.live_slots():
                version = arena.cells[arena.version + slot]
                entry = arena.at(slot, self._timeout)
                key, created = (None, None) if entry is None else (entry[3][2:4], entry[3][5])
                there.append((slot, version, key, created))
        for batch in self._batches(there):
            self._clear_batch(batch, epoch)

    @traced
    def prune(self) -> int:
        """Remove what has expired, and nothing else. Return how many; the order of use stays."""
        arena = self.arena
        self._keep_options()
        sweep = self._locked(arena.begin_sweep)
        now = self._clock()
        pruned = 0
        for batch in self._batches(arena.expired_slots(now)):
            pruned += self._expire_batch(batch, now)
        earliest = min(arena.column(arena.expires, arena.used_slots()), default=NEVER)
        self._locked(arena.end_sweep, sweep, earliest)
        return pruned

    @traced
    def start_interval(self, period: Duration | None = None) -> None:
        """
        Prune every ``period`` seconds from now on, instead of as before.

        Args:
            period: None: the option ``check_period``; if that is None or 0, nothing is started.
        """
        self.ping()  # says so if the store is closed
        chosen = self.options.check_period if period is None else period
        pause = 0.0 if chosen is None else seconds(chosen, "period")
        if pause < 0:
            raise ValueError(f"period must be at least 0 seconds, not {period!r}")
        self._interval.start(pause)

    @traced
    def stop_interval(self) -> None:
        """Stop pruning automatically."""
        self._interval.stop()

    # -- owners ----------------------------------------------------------------------------------------------------

    @traced
    def owned_by(self, owner: str) -> list[str]:
        """Return the ids of an owner's live sessions, the most recently used first."""
        return self._owned_by(owner)

    @traced
    def destroy_owned(self, owner: str, keep: Iterable[str] = ()) -> int:
        """
        Remove the sessions that an owner has at the call, but those of the ids in ``keep``. Return how many.

        A session that is renamed or changed meanwhile goes all the same; one that begins after the call stays. They go
        a few at a time, so that other writers need not wait. If another process holds the lock for so long that it
        raises `StoreTimeout`, those removed until then are gone.
        """
        return self._destroy_owned(owner, frozenset([keep] if isinstance(keep, str) else keep))

    # -- the store itself ------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return what the store holds and what happened to it."""
        return Stats.of(self.arena, self._clock())

    def ping(self) -> bool:
        """Return True if the store answers."""
        return self.arena.cells[STATE] == LIVE

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.arena.closed

    def close(self) -> None:
        """Let go of the store. Using it afterwards is a `StoreUnavailable`."""
        self._interval.stop()
        self.arena.close()

    def __reduce__(self) -> Any:
        raise TypeError("a private store stays in its process: share one with StoreManager, and send its proxy")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _repeat(step: Callable[[], bool]) -> None:
    """Call a function that holds the lock, until it returns False; let others in between."""
    begun = time.monotonic()
    while step():
        let_others_in(begun)
        begun = time.monotonic()
