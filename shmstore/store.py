"""The store: sessions in, sessions out. The text of the contract that every kind of store keeps is here."""

from __future__ import annotations

import enum
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from logging import DEBUG
from typing import Any, Concatenate, Final, Literal, ParamSpec, Self, TypeVar

from msgspec import Raw

from shmstore.arena import Arena
from shmstore.cells import (
    BY_FUNCTION,
    CLEARED,
    CORRUPT,
    DESTROYED,
    DISPOSE_ERRORS,
    DISPOSES,
    DISPOSES_ON_SET,
    EVICTED,
    EVICTED_OWNED,
    EXPIRED,
    LIVE,
    MAX,
    MAX_PER_OWNER,
    MAX_SESSION,
    NEVER,
    NO_TTL,
    OPTIONS,
    OWNED,
    RECENCY,
    SERVER_PID,
    SERVER_STARTED,
    SESSIONS,
    SETS,
    STALE,
    STATE,
    TOUCHES,
    TTL,
    USED_BLOCKS,
    WEIGHING,
    WEIGHT,
)
from shmstore.clock import boottime_ns
from shmstore.dispose import Disposal, Due, inside, refuse_inside
from shmstore.errors import RecordTooLarge, SerializationError, ShmStoreError
from shmstore.eviction import Eviction
from shmstore.interval import Interval
from shmstore.layout import ArenaDamaged
from shmstore.life import NS, deadline, life_of, nanoseconds
from shmstore.moving import move
from shmstore.names import digest_of, key_of_id, key_to_write
from shmstore.options import Duration, Options, seconds
from shmstore.reading import Entry
from shmstore.record import Codec, Record, pack, payload_of, unpack
from shmstore.sealed import body_of, key_of, seal
from shmstore.stats import Loaded, Stats
from shmstore.trace import trace, traced
from shmstore.turns import held

__all__ = ["KEEP", "Keep", "Loaded", "Stats", "Store", "request_limit"]

log = logging.getLogger("shmstore")
tracing: Final = log.isEnabledFor

_OPTIMISTIC: Final = 3  # attempts to change a session without holding the lock while thinking
_BATCH: Final = 64  # drops per hold of the lock: nobody waits for a prune
_COOKIE: Final = b"cookie"
_REMEMBERED: Final = 30 * NS  # how long an id that was destroyed or rotated away

T = TypeVar("T")
P = ParamSpec("P")


class Keep(enum.Enum):
    """The type of `KEEP`."""

    KEEP = enum.auto()


KEEP: Final = Keep.KEEP
"""As ``owner``: leave the owner as it is."""

Owner = str | None
NewOwner = str | None | Literal[Keep.KEEP]


def _retried(method: Callable[Concatenate[Store, P], T]) -> Callable[Concatenate[Store, P], T]:
    """Return a method that is attempted again: after a dispose, if a drop needs one, and after damage is healed."""

    @wraps(method)
    def call(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return self._healed(method, args)
        except Due as due:
            return self._after_dispose(due, method, args)

    return call


class Store:
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
    """

    arena: Arena
    codec: Codec
    options: Options

    def __init__(self, /, **options: Any) -> None:
        checked = Options.of(**options)
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
        self.arena = arena
        self._obey(options)
        self._interval = Interval(self)
        self._disposal = Disposal(arena)
        self._eviction = Eviction(arena, self._disposal)

    def _obey(self, options: Options) -> None:
        self.options = options
        self.codec = Codec(options.serializer)
        self._clock = options.clock
        self._timeout = seconds(options.lock_timeout)

    def apply(self, options: Options) -> None:
        """Obey other options from now on, and let every process obey them that uses the same memory."""
        self.stop_interval()
        self._obey(options)
        self.lay_down()
        self.start_interval()

    def lay_down(self) -> None:
        """Write this store's options where every process looks."""
        cells, options = self.arena.cells, self.options
        cells[OPTIONS] = boottime_ns()  # first: who sees one of those below can read the others
        cells[MAX] = options.max or 0
        cells[RECENCY] = nanoseconds(options.recency)
        if options.ttl is None:
            cells[TTL] = NO_TTL
        else:
            cells[TTL] = BY_FUNCTION if callable(options.ttl) else nanoseconds(options.ttl)
        cells[MAX_SESSION] = min(options.session_limit, self.arena.geometry.largest_session)
        cells[MAX_PER_OWNER] = options.max_per_owner or 0
        cells[STALE] = options.stale
        cells[DISPOSES] = options.dispose is not None
        cells[DISPOSES_ON_SET] = options.dispose is not None and not options.no_dispose_on_set
        if cells[MAX] and cells[WEIGHT] > cells[MAX]:
            # In a thread: the lock's holder may be frozen, a dispose slow, and the options are laid down all the same.
            thread = threading.Thread(target=self._shrink, name="shmstore-shrink", daemon=True)
            thread.start()
            thread.join(0 if cells[DISPOSES] else 1)

    def _shrink(self) -> None:
        """Evict what is beyond `max`, after that was lowered. What is left, the next write of a new session evicts."""
        try:
            while self._trim():
                pass
        except ShmStoreError as exc:
            if not self.closed:
                log.warning("what is beyond max stays for now: %s", exc)

    # -- one session -----------------------------------------------------------------------------------------------

    def get(self, sid: str) -> dict[Any, Any] | None:
        """Return the session, None if there is none. Counts as use; never extends its life."""
        body = self._find(sid, counted=True)
        if body is not None:
            session = self._decode(body, counted=True)
        else:
            session = self._take_stale(sid) if self.arena.cells[STALE] else None
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
            owner: Whose it is, at most 256 UTF-8 bytes; None: nobody's.

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
        key_to_write(sid)
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
    ) -> bool:
        """
        Move a session to a new id, with changes as by `update`, in one step: at no instant it is under both or neither.

        Returns:
            False, and nothing is changed, if ``old`` is gone or ``new`` is there.
        """
        key_to_write(old)
        key_to_write(new)
        return old != new and self._change(old, new, set, tuple(delete), ttl, owner)

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
        span = nanoseconds(ttl)
        try:
            arena.lock(self._timeout)
            now = self._clock()  # not before: while waiting the session may have expired
            slot = arena.find(key)
            if not slot or arena.cells[arena.expires + slot] <= now:
                return False
            arena.retime(slot, deadline(now, span), now)
        finally:
            arena.unlock()
        return True

    @traced
    def destroy(self, sid: str | Iterable[str]) -> int:
        """Remove one session, or those of several ids. Return how many were there; missing ones are ignored."""
        if isinstance(sid, str):
            return self._destroy(sid)
        return sum(self._destroy(each) for each in sid) if isinstance(sid, Iterable) else 0

    @traced
    def destroy_if_empty(self, sid: str, ignore: Iterable[str] = ()) -> bool:
        """Remove a session if it has no keys but those of ``ignore``. Return whether it was removed."""
        return self._destroy_if_empty(sid, frozenset(ignore))

    @traced
    def gone(self, sid: str) -> bool:
        """
        Return whether a session of this id was destroyed by it or renamed in the last 30 seconds.

        To be asked after a miss: who comes with such an id is late, and may hold a newer one already. Those that went
        by the dozen, by ``destroy_owned`` and ``clear``, do not count, for nobody has told their browsers.
        """
        key = key_of_id(sid)
        when = 0 if key is None else self.arena.buried_at(key)
        return bool(when) and self._clock() - when < _REMEMBERED

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
        with ExitStack() as stack:
            outcome: object = None
            try:
                stack.enter_context(held(self.arena, key_to_write(sid)[0], seconds(timeout, "timeout")))
            except Exception as exc:
                outcome = exc
                raise
            finally:
                if tracing(DEBUG):
                    trace("lock", (sid,), outcome)
            yield

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
        """Return all live sessions by id, the most recently used first. Records that cannot be read are left out."""
        now = self._clock()
        sessions = {}
        for entry, record in self._records():
            if entry[2] > now and record.codec_name == self.codec.name:
                try:
                    sessions[record.sid] = self.codec.decode(record.payload)
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
        there = []
        for slot in arena.live_slots():
            version = arena.cells[arena.version + slot]
            entry = arena.at(slot, self._timeout)
            there.append((slot, version, None if entry is None else entry[3][5]))
        for batch in _batches(there, self._batch_size()):
            self._clear_batch(batch)

    @traced
    def prune(self) -> int:
        """Remove what has expired, and nothing else. Return how many; the order of use stays."""
        arena = self.arena
        sweep = self._locked(arena.begin_sweep)
        now = self._clock()
        pruned = 0
        for batch in _batches(arena.expired_slots(now), self._batch_size()):
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
        """Remove all sessions of an owner but those of the ids in ``keep``. Return how many."""
        kept = frozenset([keep] if isinstance(keep, str) else keep)
        count = 0
        while (live := self._destroy_next(owner, kept)) is not None:
            count += live
        return count

    # -- the store itself ------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Return what the store holds and what happened to it."""
        arena = self.arena
        arena.keep_up()  # who only looks at the numbers follows nobody by itself
        cells, geometry = arena.cells, arena.geometry
        hits, misses = arena.reads()
        taken = max(cells[USED_BLOCKS] / geometry.blocks, cells[SESSIONS] / geometry.slots)
        return Stats(
            sessions=cells[SESSIONS],
            owned=cells[OWNED],
            bytes=round(taken * geometry.size),
            memory=geometry.size,
            gets=hits + misses,
            hits=hits,
            misses=misses,
            sets=cells[SETS],
            touches=cells[TOUCHES],
            destroyed=cells[DESTROYED],
            expired=cells[EXPIRED],
            evicted=cells[EVICTED] + cells[EVICTED_OWNED],
            evicted_owned=cells[EVICTED_OWNED],
            cleared=cells[CLEARED],
            dispose_errors=cells[DISPOSE_ERRORS],
            corrupt=cells[CORRUPT],
            server_pid=cells[SERVER_PID],
            server_uptime=max(0, self._clock() - cells[SERVER_STARTED]) / NS,
        )

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

    # -- how -------------------------------------------------------------------------------------------------------

    def _find(self, sid: object, *, counted: bool) -> bytes | None:
        """Return the body of a live session's record."""
        key = key_of_id(sid)
        arena = self.arena
        entry = None if key is None else arena.read(key, self._timeout)
        now = self._clock()
        if entry is None or entry[2] <= now:
            if counted:
                arena.miss()
            return None
        if counted:
            self._used(entry, now)
        return body_of(entry[4])

    def _load(self, sid: str) -> Loaded | None:
        key = key_of_id(sid)
        entry = None if key is None else self.arena.read(key, self._timeout)
        now = self._clock()
        if entry is None or entry[2] <= now:
            self.arena.miss()
            return None
        try:
            record = unpack(body_of(entry[4]))
        except SerializationError:
            record = None
        if record is not None and record.codec_name != self.codec.name and self._catch_up():
            return self._load(sid)
        if record is None or record.codec_name != self.codec.name:
            self.arena.miss()
            return None
        idle = max(0, now - self.arena.cells[self.arena.used + entry[0]])
        self._used(entry, now)
        remaining = math.inf if entry[2] >= NEVER else (entry[2] - now) / NS
        created = entry[3][5]
        return Loaded(bytes(record.payload), (now - created) / NS, idle / NS, remaining, record.owner)

    def _used(self, entry: Entry, now: int) -> None:
        """Count a hit, and refresh the place in the order of use if it is older than ``recency``."""
        arena = self.arena
        arena.hit()
        slot, version, _, _, _ = entry
        recency = arena.cells[RECENCY]
        if recency and now - arena.cells[arena.used + slot] < recency:
            return
        try:
            if not recency:
                arena.lock(self._timeout)
            elif not arena.lock_now():
                return  # optional work: while a holder is busy, or frozen, hits go on
            arena.use(slot, version, now)
        finally:
            arena.unlock()

    def _decode(self, body: bytes, *, counted: bool) -> dict[Any, Any] | None:
        try:
            return self.codec.decode(payload_of(body, self.codec.name))
        except SerializationError:
            if self._catch_up():
                return self._decode(body, counted=counted)
            # Another serializer's, or damaged in a way no checksum tells: nobody can be served from it.
            if counted:
                self.arena.unhit()
                self.arena.cells[CORRUPT] += 1
            return None

    def _catch_up(self) -> bool:
        """Obey the options of the store if they have changed; return whether they had. Whoever owns it knows them."""
        return False

    def _before_write(self) -> None:
        refuse_inside()

    @_retried
    def _put(
        self, sid: str, session: Mapping[Any, Any], ttl: Duration | None, owner: Owner, present: bool | None
    ) -> bool:
        """Write a whole session; ``present`` says whether it must be there already, None that it does not matter."""
        self._before_write()
        key = key_to_write(sid)
        if not isinstance(session, Mapping):
            raise TypeError(f"a session must be a mapping, not {type(session).__name__}")
        digest = digest_of(owner)
        span = nanoseconds(self._life(session, sid) if ttl is None else ttl)
        payload = self.codec.encode(session)
        self._check_size(payload)
        weight = self._weigh(payload, sid)
        record = seal(key, digest, self._clock(), pack(sid, owner, self.codec.name, payload), weight)
        arena = self.arena
        evicted = 0
        try:
            arena.lock(self._timeout)
            now = self._clock()  # not before: while waiting a session may have expired
            slot = arena.find(key)
            if slot and arena.cells[arena.expires + slot] <= now:
                self._disposal.drop(slot, EXPIRED)
                slot = 0
            if present is not None and bool(slot) != present:
                return False
            evicted = self._eviction.make_room(len(record), weight, slot, digest, now)
            if slot:
                self._disposal.overwrite(slot)
            arena.publish(slot, key, record, digest, deadline(now, span), now)
        finally:
            arena.unlock()
        if evicted:
            self._eviction.report()
        return True

    @_retried
    def _change(
        self,
        old: str,
        new: str,
        changes: Mapping[Any, Any],
        delete: tuple[Any, ...],
        ttl: Duration | None,
        owner: NewOwner,
        count: int = SETS,
    ) -> bool:
        """
        Rewrite a session from what is stored.

        The new record is prepared from a read without the lock, and written if the slot's version is still the same. A
        session that many write at once gets its turn under the lock: merging bytes calls nothing foreign.
        """
        self._before_write()
        codec, arena = self.codec, self.arena
        new_key = key_of(new.encode())
        old_key = new_key if old == new else key_of(old.encode())
        if not isinstance(changes, Mapping):
            raise TypeError(f"what to set must be a mapping, not {type(changes).__name__}")
        # Names as plain str: comparing those of a subclass may run foreign code, which the lock does not allow.
        raw = {_plain(name): Raw(codec.encode_value(name, value)) for name, value in changes.items()}
        delete = tuple(_plain(name) for name in delete)
        new_digest = None if owner is KEEP else digest_of(owner)
        span = None if ttl is None else nanoseconds(ttl)

        def prepare(entry: Entry) -> tuple[bytes, int, int] | None:
            stored = unpack(body_of(entry[4]))
            if stored.codec_name != codec.name:
                return None  # another serializer's: as good as none
            payload = codec.merge(stored.payload, raw, delete)
            self._check_size(payload)
            whose = stored.owner if owner is KEEP else owner
            digest = digest_of(whose) if new_digest is None else new_digest
            weight = self._weigh(payload, new)
            return seal(new_key, digest, entry[3][5], pack(new, whose, codec.name, payload), weight), digest, weight

        # Not only a few times with a `length`: that is foreign, and not to be called under the lock.
        optimistic = _OPTIMISTIC if self.options.length is None else sys.maxsize
        for attempt in range(optimistic + 1):
            entry = None
            prepared = None
            epoch = arena.epoch
            if attempt < optimistic:
                entry = arena.read(old_key, self._timeout)
                if entry is None or entry[2] <= self._clock():
                    return False
                prepared = prepare(entry)
                if prepared is None:
                    return False
            evicted = 0
            try:
                arena.lock(self._timeout)
                now = self._clock()
                slot = arena.find(old_key)
                if not slot or arena.cells[arena.expires + slot] <= now:
                    return False
                if entry is None:
                    entry = arena.under_lock(slot)
                    prepared = None if entry is None else prepare(entry)
                elif (entry[0], entry[1], epoch) != (slot, arena.cells[arena.version + slot], arena.epoch):
                    continue
                if prepared is None:
                    return False
                if new_key != old_key and (there := arena.find(new_key)):
                    if arena.cells[arena.expires + there] > now:
                        return False
                    self._disposal.drop(there, EXPIRED)
                expires = arena.cells[arena.expires + slot] if span is None else deadline(now, span)
                record, digest, weight = prepared
                evicted = self._eviction.make_room(len(record), weight, slot, digest, now)
                arena.publish(slot, new_key, record, digest, expires, now, count)
            finally:
                arena.unlock()
            if evicted:
                self._eviction.report()
            return True
        raise AssertionError  # the last attempt holds the lock

    @_retried
    def _destroy(self, sid: str) -> int:
        self._before_write()
        key = key_of_id(sid)
        if key is None:
            return 0
        arena = self.arena
        try:
            arena.lock(self._timeout)
            now = self._clock()
            slot = arena.find(key)
            if not slot:
                return 0
            live = arena.cells[arena.expires + slot] > now
            self._disposal.drop(slot, DESTROYED if live else EXPIRED, now)
        finally:
            arena.unlock()
        return int(live)

    @_retried
    def _take_stale(self, sid: str) -> dict[Any, Any] | None:
        """Hand out an expired session once: whoever removes it has it."""
        key = key_of_id(sid)
        if key is None or inside():  # a dispose may read, but remove nothing
            return None
        arena = self.arena
        try:
            arena.lock(self._timeout)
            slot = arena.find(key)
            entry = arena.under_lock(slot) if slot and arena.cells[arena.expires + slot] <= self._clock() else None
            if entry is None:
                return None
            self._disposal.drop(slot, EXPIRED)
        finally:
            arena.unlock()
        return self._decode(body_of(entry[4]), counted=False)

    @_retried
    def _clear_batch(self, batch: list[tuple[int, int, int | None]]) -> None:
        self._before_write()
        arena = self.arena
        try:
            arena.lock(self._timeout)
            for slot, version, created in batch:
                entry = arena.under_lock(slot)
                same = arena.cells[arena.version + slot] == version and arena.cells[arena.record + slot]
                if same or (entry is not None and entry[3][5] == created):
                    self._disposal.drop(slot, CLEARED)
        finally:
            arena.unlock()

    @_retried
    def _trim(self) -> bool:
        """Evict some of what is beyond `max`, after that was lowered; return whether there is more."""
        return self._locked(lambda: self._eviction.trim(self._batch_size(), self._clock()))

    @_retried
    def _expire_batch(self, batch: list[int], now: int) -> int:
        self._before_write()
        arena = self.arena
        dropped = 0
        try:
            arena.lock(self._timeout)
            for slot in batch:
                # A slot that was never used has no deadline: after a move there are other slots than were scanned.
                if arena.cells[arena.record + slot] and arena.cells[arena.expires + slot] <= now:
                    self._disposal.drop(slot, EXPIRED)
                    dropped += 1
        finally:
            arena.unlock()
        return dropped

    def _healed(self, method: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """Make an attempt; if that meets damage, carry what is whole over to a new file, and make it again."""
        try:
            return method(self, *arguments)
        except ArenaDamaged as damage:  # found while planning, so nothing was changed yet
            left = move(self.arena, timeout=self._timeout)
            log.error("the store's memory was damaged (%s): %d sessions are lost", damage, left)  # noqa: TRY400
        return method(self, *arguments)

    def _after_dispose(self, due: Due, method: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """Carry out what was interrupted: here, if this process owns the store. A proxy asks the server."""
        return self._disposal.carry_out(due, lambda: self._healed(method, arguments), self.options, self.codec)

    def _batch_size(self) -> int:
        return 1 if self.arena.cells[DISPOSES] else _BATCH

    def _weigh(self, payload: bytes, sid: str) -> int:
        length = self.options.length
        if length is None:
            return 1
        self.arena.cells[WEIGHING] = 1
        weight = length(len(payload), sid)
        if not isinstance(weight, int) or isinstance(weight, bool) or not 0 <= weight < 2**32:
            raise ValueError(f"length must return a whole number of at least 0, not {weight!r}")
        return weight

    @_retried
    def _destroy_if_empty(self, sid: str, ignore: frozenset[str]) -> bool:
        self._before_write()
        key = key_of_id(sid)
        arena = self.arena
        try:
            arena.lock(self._timeout)
            slot = arena.find(key) if key is not None else 0
            entry = arena.under_lock(slot) if slot else None
            record = None if entry is None else self._record(entry)
            if entry is None or record is None:
                return False
            now = self._clock()
            live = entry[2] > now
            if live and set(self.codec.fields(record.payload)) - ignore:
                return False
            self._disposal.drop(slot, DESTROYED if live else EXPIRED, now)
        finally:
            arena.unlock()
        return live

    def _records(self) -> Iterator[tuple[Entry, Record]]:
        for slot in self.arena.live_slots():
            entry = self.arena.at(slot, self._timeout)
            if entry is not None and (record := self._record(entry)) is not None:
                yield entry, record

    def _record(self, entry: Entry) -> Record | None:
        try:
            return unpack(body_of(entry[4]))
        except SerializationError:
            self.arena.cells[CORRUPT] += 1
            return None

    @_retried
    def _owned_by(self, owner: str) -> list[str]:
        arena = self.arena
        digest = digest_of(owner)
        try:
            arena.lock(self._timeout)
            now = self._clock()
            entries = [arena.under_lock(slot) for slot in arena.owned_slots(digest)]
        finally:
            arena.unlock()
        found = (self._record(entry) for entry in entries if entry is not None and entry[2] > now)
        # eight bytes of digest may be shared by two
        return [record.sid for record in found if record is not None and record.owner == owner]

    @_retried
    def _destroy_next(self, owner: str, kept: frozenset[str]) -> bool | None:
        """Drop one session of an owner, wherever it has been renamed to; return whether it was alive, None: no more."""
        self._before_write()
        arena = self.arena
        digest = digest_of(owner)
        try:
            arena.lock(self._timeout)
            now = self._clock()
            for slot in arena.owned_slots(digest):
                entry = arena.under_lock(slot)
                record = None if entry is None else self._record(entry)
                if record is not None and record.owner == owner and record.sid not in kept:
                    live = arena.cells[arena.expires + slot] > now
                    self._disposal.drop(slot, DESTROYED if live else EXPIRED)
                    return live
        finally:
            arena.unlock()
        return None

    def _locked(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            self.arena.lock(self._timeout)
            return function(*arguments)
        finally:
            self.arena.unlock()

    def _check_size(self, payload: bytes) -> None:
        limit = self.arena.cells[MAX_SESSION]
        if len(payload) > limit:
            raise RecordTooLarge(
                f"the session has {len(payload)} bytes, max_session allows {limit}: keep large things in a "
                f"database and their ids in the session, or raise max_session"
            )

    def _life(self, session: Mapping[Any, Any], sid: str) -> Duration:
        rule = self.arena.cells[TTL]
        if rule == BY_FUNCTION and not callable(self.options.ttl):
            self._catch_up()
        return life_of(self.options, rule, session, sid)


def request_limit(arena: Arena) -> int:
    """Return how many bytes a request may have: as many as the largest session needs, pickled."""
    return 2 * arena.cells[MAX_SESSION] + 65536


def _plain(name: Any) -> Any:
    return str.__str__(name) if isinstance(name, str) else name


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]
