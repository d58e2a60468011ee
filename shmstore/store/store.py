"""
`Store`: the contract over an arena in the memory of this process.

Each write of one session takes the same steps:

1. ask the upkeep whether it may write (`Upkeep.before_write`), and encode what is written;
2. have the C core do the whole operation, if it runs and this is its common case;
3. else prepare the record, take the lock, and look again: a method that ends in ``_locked`` is called with it, by
   `ArenaHolder._locked`.

`retrying` repeats these steps if the arena was replaced or damaged, or if a ``dispose`` must be called first.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from logging import DEBUG
from typing import Any, Final, Self

from msgspec import Raw

from shmstore.codec.body import content_of, pack, payload_of
from shmstore.codec.ids import Key, key_of_id, require_key, stored_owner, stored_owner_digest
from shmstore.contract import IN_MEMORY, KEEP, AnyStore, Capability, Data, Loaded, NewOwner, Owner, Stats, new_loaded
from shmstore.engine.arena import STAMPS_AHEAD, Arena
from shmstore.engine.core import CHANGED, DECLINED
from shmstore.engine.frame import body_of, head_of, key_of, seal
from shmstore.engine.header import (
    BY_FUNCTION,
    CORRUPT,
    DESTROYED,
    DISPOSES,
    EXPIRED,
    HAS_WEIGHTS,
    LIVE,
    MAX,
    MAX_SESSION,
    NEVER,
    ON,
    OPTIONS_COPY,
    RECENCY,
    REFUSED,
    SERVER_PID,
    SERVER_STARTED,
    SESSIONS,
    SETS,
    STALE,
    STATE,
    TOUCHES,
    TTL,
)
from shmstore.engine.layout import RENAMED, TOMBSTONE_TTL, ArenaDamaged
from shmstore.engine.mapping import ArenaReplaced
from shmstore.engine.named_locks import named_lock
from shmstore.engine.reader import Entry
from shmstore.errors import ConfigError, RecordTooLarge, SerializationError, ShmStoreError, StoreFull
from shmstore.options import Duration, Options, seconds
from shmstore.store import bulk, live_options
from shmstore.store.dispose import Disposal, inside
from shmstore.store.eviction import exceeds_limits
from shmstore.store.expiry import deadline, life_of, nanoseconds
from shmstore.store.holder import ArenaHolder, Upkeep
from shmstore.store.merge import Change, Content, Terms, resealed
from shmstore.store.pruner import Interval
from shmstore.store.retry import retrying
from shmstore.store.stats import stats_of
from shmstore.store.trace import obey_environment, trace, traced
from shmstore.system.clock import NS
from shmstore.system.signals import suppressing

__all__ = ["Store"]

log = logging.getLogger("shmstore")
tracing: Final = log.isEnabledFor

_OPTIMISTIC: Final = 3  # attempts to change a session whose bytes are prepared without the lock
_TTL_AGAIN: Final = OPTIONS_COPY + TTL - MAX
_COOKIE: Final = b"cookie"


class Store(ArenaHolder, AnyStore):
    """
    Sessions in shared memory, with LRU eviction and a deadline for each. It implements `AnyStore`.

    ``Store(**options)`` is private to this process and the children it forks, and ends with them, or when it is closed.
    `StoreManager` makes a store for all processes of a user.

    Args:
        options: The options of `Options`, except those for shared stores: ``directory``, ``persist``, ``snapshot`` and
            ``snapshot_period``.

    Raises:
        ConfigError: An option is unknown or invalid.
        StoreFull: The memory cannot be reserved.
    """

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
        self._begin(Arena.create(None, checked.geometry), checked, Upkeep())
        self.publish_options()
        self.arena.file.cells[SERVER_PID] = os.getpid()
        self.arena.file.cells[SERVER_STARTED] = self._clock()
        self.start_interval()

    @classmethod
    def over(cls, arena: Arena, options: Options, upkeep: Upkeep | None = None) -> Self:
        """
        Return a store over an arena that exists. Nothing is started, no option is published.

        Args:
            arena: The arena.
            options: The options of the store.
            upkeep: What its owner does for the store; None: this process is the owner.
        """
        store = cls.__new__(cls)
        store._begin(arena, options, upkeep or Upkeep())
        return store

    def _begin(self, arena: Arena, options: Options, upkeep: Upkeep, disposal: Disposal | None = None) -> None:
        ArenaHolder.__init__(self, arena, options, upkeep, disposal)
        self._interval = Interval(self)

    # -- the options -------------------------------------------------------------------------------------------------

    def change_options(self, options: Options) -> None:
        """Obey other options from now on, in every process that uses the same memory."""
        self.stop_interval()
        self.apply_options(options)
        try:
            self.publish_options()
        finally:
            self.start_interval()

    def publish_options(self) -> None:
        """Write the options where every process reads them."""
        with suppressing(StoreFull):  # logged: the damage stays until there is room for its repair
            self.sound_arena()
        for name, other in self._options.without_effect():
            log.warning("%s: the option %s has no effect without %s", self.label, name, other)
        ticket = self._reattaching.ticket()
        try:
            ticket.acquire()  # a move of the sessions in progress has copied the previous options
            arena = self._arena
            live_options.publish(arena, self._options)
        finally:
            ticket.release()
        try:
            excess = exceeds_limits(arena)
        except ArenaDamaged:
            excess = True  # unknown: `shrink` logs what it cannot do
        if excess:
            # In a thread: the holder of the lock may be stopped, a dispose slow, and the options are in force already.
            thread = threading.Thread(target=bulk.shrink, args=(self,), name="shmstore-shrink", daemon=True)
            thread.start()
            thread.join(0 if arena.file.cells[DISPOSES] else 1)

    @property
    def capabilities(self) -> frozenset[Capability]:
        return IN_MEMORY

    # -- reading one session -----------------------------------------------------------------------------------------

    def get(self, sid: str) -> dict[Any, Any] | None:
        body = self._find(sid, counted=True)
        if body is not None:
            session = self._decode(body, counted=True)
        else:
            session = self.take_stale(sid) if self.arena.file.cells[STALE] == ON else None
        if tracing(DEBUG):
            trace("get", (sid,), session)
        return session

    def peek(self, sid: str) -> dict[Any, Any] | None:
        body = self._find(sid, counted=False)
        session = None if body is None else self._decode(body, counted=False)
        if tracing(DEBUG):
            trace("peek", (sid,), session)
        return session

    def load(self, sid: str) -> Loaded | None:
        loaded = self._load(sid)
        if tracing(DEBUG):
            trace("load", (sid,), loaded)
        return loaded

    @traced
    def __contains__(self, sid: object) -> bool:
        body = self._find(sid, counted=False)
        try:
            return body is not None and bool(payload_of(body, self._codec.name))
        except SerializationError:
            return False

    def _find(self, sid: object, *, counted: bool) -> bytes | None:
        """Return the body of a live session's record."""
        if (core := self._arena.file.core) is not None:
            found = core.get(sid, self._clock(), counted)
            if not isinstance(found, int):
                return found
        arena, entry, now = self._read(sid)
        if entry is None:
            if counted:
                arena.counters.miss()
            return None
        if counted:
            self._count_use(arena, entry, now)
        return body_of(entry[4])

    def _read(self, sid: object) -> tuple[Arena, Entry | None, int]:
        """Return a live session, or None, the arena that it is in, and the time. Takes no lock."""
        key = key_of_id(sid)
        arena = self._arena if key else self.arena  # reading tells whether the arena was replaced
        try:
            entry = None if key is None else arena.reader.read(key, self._timeout)
        except ArenaReplaced:
            self.reattach()
            return self._read(sid)
        now = self._clock()
        return arena, entry if entry is not None and entry[2] > now else None, now

    def _load(self, sid: str) -> Loaded | None:
        arena, now = self._arena, self._clock()
        core = arena.file.core
        found = DECLINED if core is None else core.load(sid, now)
        if isinstance(found, int):
            arena, read, now = self._read(sid)
            if read is None:
                arena.counters.miss()
                return None
            found = read, arena.file.cells[arena.table.used + read[0]], None, None
            self._count_use(arena, read, now)
        if found is None:
            return None
        entry, used, payload, owner = found
        codec = self._codec
        if payload is None or not codec.is_deterministic:  # only the default codec is
            try:
                payload, owner = content_of(body_of(entry[4]), codec.name)
            except SerializationError:
                arena.counters.uncount_hit()
                if self._upkeep.refresh_options(self):
                    return self._load(sid)
                arena.counters.miss()
                arena.counters.add(CORRUPT)
                return None
        remaining = math.inf if entry[2] >= NEVER else (entry[2] - now) / NS
        handle = arena, codec, sid, entry
        idle = (now - used) / NS if now > used else 0.0
        return new_loaded((payload, (now - entry[3][5]) / NS, idle, remaining, owner, handle))

    def _count_use(self, arena: Arena, entry: Entry, now: int) -> None:
        """Count a hit, and refresh the session's place in the order of use if it is older than ``recency``."""
        arena.counters.hit()
        cells = arena.file.cells
        recency = cells[RECENCY]
        if recency and -STAMPS_AHEAD < now - cells[arena.table.used + entry[0]] < recency:
            return
        try:
            if not recency:
                arena.lock(self._timeout)
            elif not arena.try_lock():
                return  # optional work: while the lock is busy, or its holder stopped, reads continue
            arena.use(entry[0], entry[1], now)
        except ArenaReplaced:
            return  # the next call uses the other file
        except ArenaDamaged as found:
            damage = found
        else:
            return
        finally:
            arena.unlock()
        with contextlib.suppress(ShmStoreError):  # the session was read, and is whole
            self._upkeep.repair(self, arena, damage)

    def _decode(self, body: bytes, *, counted: bool) -> dict[Any, Any] | None:
        try:
            return self._codec.decode(payload_of(body, self._codec.name))
        except SerializationError:
            if self._upkeep.refresh_options(self):
                return self._decode(body, counted=counted)
        try:
            return self._codec.salvage(payload_of(body, self._codec.name))[0]
        except SerializationError:
            # It is of another serializer, or damaged in a way that no checksum tells.
            if counted:
                self.arena.counters.unhit()
                self.arena.counters.add(CORRUPT)
            return None

    @retrying(lambda sid: ("take_stale", {"sid": sid}))
    def take_stale(self, sid: str) -> dict[Any, Any] | None:
        """Hand out an expired session once: the caller that removes it gets it."""
        key = key_of_id(sid)
        if key is None or inside():  # a dispose may read, but remove nothing
            return None
        entry = self._locked(self._arena, self._take_stale_locked, key)
        return None if entry is None else self._decode(body_of(entry[4]), counted=False)

    def _take_stale_locked(self, arena: Arena, now: int, key: Key) -> Entry | None:
        slot = arena.find(key)
        expired = slot and arena.file.cells[arena.table.expires + slot] <= now
        entry = arena.reader.try_at(slot) if expired else None
        if entry is not None:
            self._disposal.drop(arena, slot, EXPIRED)
        return entry

    @traced
    def gone(self, sid: str, within: Duration = 30.0, renamed: bool = False) -> bool:
        key = key_of_id(sid)
        if key is None:
            return False
        when = self.arena.reader.tombstone(key, self._clock(), min(nanoseconds(within), TOMBSTONE_TTL))
        return bool(when & RENAMED if renamed else when)

    # -- writing one session -----------------------------------------------------------------------------------------

    @traced
    def set(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> None:
        self._write(sid, session, ttl, owner, None)

    @traced
    def add(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> bool:
        return self._write(sid, session, ttl, owner, False)

    @traced
    def replace(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> bool:
        return self._write(sid, session, ttl, owner, True)

    @retrying(
        lambda sid, session, ttl, owner, present: (
            "replace" if present else "set",
            {"sid": sid, "session": session, "ttl": ttl, "owner": owner},
        )
    )
    def _write(self, sid: str, session: Data, ttl: Duration | None, owner: Owner, present: bool | None) -> bool:
        """Write a whole session. ``present`` says whether it must be present already; None: that does not matter."""
        self._upkeep.before_write(self)
        owner = stored_owner(owner)
        payload = self._codec.payload(session)
        if ttl is None:
            ttl = self.life_of(self._codec.decode(payload) if isinstance(session, Raw) else session, sid)
        span = nanoseconds(ttl)
        arena = self._arena
        if (core := arena.file.core) is not None and self._usual:
            done = core.put(sid, owner, payload, span, 1, present, self._clock())
            if done >= 0:
                return self._written(arena, done)
        key, digest = require_key(sid), stored_owner_digest(owner)
        weight = self._weigh(arena, payload, sid)
        record = seal(key, digest, self._clock(), pack(sid, owner, self._codec.name, payload), weight)
        return self._locked(arena, self._write_locked, key, record, span, present)

    def _write_locked(self, arena: Arena, now: int, key: Key, record: bytes, span: int, present: bool | None) -> bool:
        slot = arena.find(key)
        if slot and arena.file.cells[arena.table.expires + slot] <= now:
            self._disposal.drop(arena, slot, EXPIRED)
            slot = 0
        if present is not None and bool(slot) != present:
            return False
        self._publish_locked(arena, now, slot, record, deadline(now, span), overwrites=bool(slot))
        return True

    def _publish_locked(
        self,
        arena: Arena,
        now: int,
        slot: int,
        record: bytes,
        expires: int,
        count: int = SETS,
        *,
        tombstone: bool = False,
        overwrites: bool = False,
    ) -> None:
        """
        Make room for a record, and publish it: `Arena.publish` says with which arguments.

        With ``overwrites`` it replaces the whole session in its slot, which a dispose may have to see.
        """
        _, weight, low, high, owner, _ = head_of(record)
        self._eviction.make_room(arena, len(record), weight, slot, owner, now)
        if overwrites:
            self._disposal.overwrite(arena, slot)
        arena.publish(slot, (low, high), record, owner, expires, now, count, tombstone=tombstone)

    def _written(self, arena: Arena, done: int) -> bool:
        """Return whether the core has written a session, and log that it has evicted others for it."""
        if done > 1:
            self._eviction.evicted = True
            self._eviction.report(arena)
        return done > 0

    @traced
    def update(
        self,
        sid: str,
        set: Mapping[Any, Any] = {},
        delete: Iterable[Any] = (),
        ttl: Duration | None = None,
        owner: NewOwner = KEEP,
    ) -> bool:
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
        require_key(old)
        return old != new and self._change(old, new, set, tuple(delete), ttl, owner, SETS, tombstone)

    @retrying()
    def _change(
        self,
        old: str,
        new: str,
        values: Mapping[Any, Any],
        delete: tuple[Any, ...],
        ttl: Duration | None,
        owner: NewOwner,
        count: int = SETS,
        tombstone: bool = False,
    ) -> bool:
        """
        Rewrite a session from what is stored.

        The new record is prepared from a read without the lock, and written if the slot's version is still the same. A
        session that many processes write at once is merged under the lock at last: that calls no foreign code.
        """
        self._upkeep.before_write(self)
        arena = self._arena
        key = require_key(old)
        if new is not old:
            require_key(new)
        change = Change(self._codec, partial(self._weigh, arena), old, new, values, delete, owner)
        terms = None if ttl is None else nanoseconds(ttl), count, tombstone
        # With a `length` without end: it is foreign code, which must not run under the lock.
        for _ in range(_OPTIMISTIC) if self._options.length is None else itertools.count():
            entry = arena.reader.read(key, self._timeout)
            content = None if entry is None or entry[2] <= self._clock() else change.merge(entry)
            if entry is None or content is None:
                return False
            done = self._exchange(arena, entry, content, terms)
            if done is not None:
                return done
        return self._locked(arena, self._merge_locked, change, key, terms)

    def _merge_locked(self, arena: Arena, now: int, change: Change, key: Key, terms: Terms) -> bool:
        slot = arena.find(key)
        entry = arena.reader.try_at(slot) if slot else None
        content = None if entry is None else change.merge(entry)
        if entry is None or content is None:
            return False
        return bool(self._exchange_locked(arena, now, entry, resealed(entry, content), content[0], terms))

    @traced
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
        self._upkeep.before_write(self)
        arena, handle = self._arena, loaded.handle
        if handle is None or handle[:3] != (arena, self._codec, sid) or new == sid:
            return False
        if owner is not KEEP:
            owner = KEEP if owner == loaded.owner else stored_owner(owner)
        span = None if ttl is None else nanoseconds(ttl)
        core = arena.file.core
        # Outside of `retrying`, which costs time at each request: what the core declines has changed nothing.
        if core is not None and self._usual and len(payload) <= arena.file.cells[MAX_SESSION]:
            done = core.exchange(handle[3], new, owner, payload, 1, span, SETS, tombstone, self._clock())
            if done >= 0 or done == CHANGED:
                return done != CHANGED and self._written(arena, done)
        return self._swap(arena, sid, handle[3], payload, owner, new, (span, SETS, tombstone))

    @retrying()
    def _swap(
        self, arena: Arena, sid: str, entry: Entry, payload: bytes, owner: NewOwner, new: str | None, terms: Terms
    ) -> bool:
        """Complete a swap that the core has declined, or that it cannot do alone."""
        if arena is not self._arena:  # it was replaced meanwhile
            return False
        content = new, owner, payload, self._weigh(arena, payload, sid if new is None else new)
        if self._usual:  # the core was tried
            return bool(self._locked(arena, self._exchange_locked, entry, resealed(entry, content), new, terms))
        return bool(self._exchange(arena, entry, content, terms))

    def _exchange(self, arena: Arena, entry: Entry, content: Content, terms: Terms) -> bool | None:
        """
        Write a session in place of the one that was read as ``entry``.

        Returns:
            False if it has expired, or another session has the key. None if it has changed since it was read.
        """
        if (core := arena.file.core) is not None:
            done = core.exchange(entry, *content, *terms, self._clock())
            if done >= 0 or done == CHANGED:
                return None if done == CHANGED else self._written(arena, done)
        return self._locked(arena, self._exchange_locked, entry, resealed(entry, content), content[0], terms)

    def _exchange_locked(
        self, arena: Arena, now: int, entry: Entry, record: bytes, new: str | None, terms: Terms
    ) -> bool | None:
        slot, version, *_ = entry
        span, count, tombstone = terms
        cells, table = arena.file.cells, arena.table
        if cells[table.version + slot] != version:
            return None
        expires = cells[table.expires + slot]
        if expires <= now:
            return False
        if new is not None and (there := arena.find(key_of(record))):
            if cells[table.expires + there] > now:
                return False
            self._disposal.drop(arena, there, EXPIRED)
        if span is not None:
            expires = deadline(now, span)
        self._publish_locked(arena, now, slot, record, expires, count, tombstone=tombstone)
        return True

    @traced
    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        if session is not None:
            if key_of_id(sid) is None:
                return False
            if not isinstance(session, Mapping):
                raise TypeError(f"a session must be a mapping, not {type(session).__name__}")
            if "cookie" in session:
                if ttl is None:
                    ttl = self._touched_life(sid, session)
                return self._change(sid, sid, {"cookie": session["cookie"]}, (), ttl, KEEP, TOUCHES)
        self._upkeep.before_write(self)
        if ttl is None and (ttl := self._touched_life(sid, session)) is None:
            return False
        span = nanoseconds(ttl)
        if (core := self._arena.file.core) is not None and (done := core.touch(sid, span, self._clock())) >= 0:
            return bool(done)
        key = key_of_id(sid)
        return key is not None and self._touch(key, span)

    @retrying()
    def _touched_life(self, sid: str, session: Mapping[Any, Any] | None) -> Duration | None:
        """Return the life that a touch gives a session by the ttl rule; None: the session is absent."""
        rule = self._arena.file.cells[TTL]
        if session is None and rule >= BY_FUNCTION:
            body = self._find(sid, counted=False)
            if body is None:
                return None
            # Decoding costs more than everything else: only for sessions whose life depends on what is in them.
            if rule == BY_FUNCTION or _COOKIE in body:
                session = self._decode(body, counted=False)
        return self.life_of({} if session is None else session, sid)

    @retrying()
    def _touch(self, key: Key, span: int) -> bool:
        return self._locked(self._arena, self._touch_locked, key, span)

    def _touch_locked(self, arena: Arena, now: int, key: Key, span: int) -> bool:
        slot = arena.find(key)
        if not slot or arena.file.cells[arena.table.expires + slot] <= now:
            return False
        arena.retime(slot, deadline(now, span), now)
        return True

    def life_of(self, session: Mapping[Any, Any], sid: str) -> Duration:
        """
        Return the life of a session by the ttl rule of the store.

        Raises:
            ArenaDamaged: The published rule is damaged.
        """
        cells = self._arena.file.cells
        rule = cells[TTL]
        if rule != cells[_TTL_AGAIN]:
            live_options.check(self._arena)
        if rule == BY_FUNCTION and not callable(self._options.ttl):
            self._upkeep.refresh_options(self)
        return life_of(self._options, rule, session, sid)

    def _weigh(self, arena: Arena, payload: bytes, sid: str) -> int:
        """Return how much of ``max`` a session takes; raise an error if it is too large."""
        limit = arena.file.cells[MAX_SESSION]
        if len(payload) > limit:
            live_options.check(arena)
            arena.counters.add(REFUSED)
            raise RecordTooLarge.of(len(payload), limit)
        length = self._options.length
        if length is None:
            return 1
        arena.file.cells[HAS_WEIGHTS] = 1
        weight = length(len(payload), sid)
        if not isinstance(weight, int) or isinstance(weight, bool) or not 0 <= weight < 2**32:
            raise ValueError(f"length must return a whole number of at least 0, not {weight!r}")
        return weight

    # -- removing one session ----------------------------------------------------------------------------------------

    @traced
    def destroy(self, sid: str | Iterable[str], tombstone: bool = False) -> int:
        if isinstance(sid, str):
            return self._destroy(sid, tombstone)
        return sum(self._destroy(each, tombstone) for each in sid) if isinstance(sid, Iterable) else 0

    @retrying(lambda sid, tombstone: ("destroy", {"sid": sid, "tombstone": tombstone}))
    def _destroy(self, sid: str, tombstone: bool) -> int:
        self._upkeep.before_write(self)
        arena = self._arena
        if (core := arena.file.core) is not None and (done := core.drop(sid, tombstone, self._clock())) >= 0:
            return done
        key = key_of_id(sid)
        return 0 if key is None else int(self._locked(arena, self._destroy_locked, key, tombstone))

    def _destroy_locked(
        self, arena: Arena, now: int, key: Key, tombstone: bool, ignore: frozenset[str] | None = None
    ) -> bool:
        """Remove a session, with ``ignore`` only if it has no other keys; return whether a live one was removed."""
        slot = arena.find(key)
        if not slot:
            return False
        live: bool = arena.file.cells[arena.table.expires + slot] > now
        if ignore is not None:
            entry = arena.reader.try_at(slot)
            record = None if entry is None else bulk.record_of(arena, entry)
            if record is None or (live and {*self._codec.fields(record.payload)} - ignore):
                return False
        self._disposal.drop(arena, slot, DESTROYED if live else EXPIRED, now if tombstone and live else None)
        return live

    @traced
    def destroy_if_empty(self, sid: str, ignore: Iterable[str] = (), tombstone: bool = False) -> bool:
        return self._destroy_if_empty(sid, frozenset(ignore), tombstone)

    @retrying(
        lambda sid, ignore, tombstone: ("destroy_if_empty", {"sid": sid, "ignore": ignore, "tombstone": tombstone})
    )
    def _destroy_if_empty(self, sid: str, ignore: frozenset[str], tombstone: bool) -> bool:
        self._upkeep.before_write(self)
        key = key_of_id(sid)
        return key is not None and self._locked(self.arena, self._destroy_locked, key, tombstone, ignore)

    @retrying()
    def drop_pending(self, slot: int, version: int, created: int | None, reason: str) -> None:
        """
        Remove a session for another process, which needs its slot or its space, and cannot call dispose.

        Args:
            slot, version, created: The session; it stays if it has changed meanwhile.
            reason: ``expire`` (it stays if it has not expired), ``displace`` or ``evict``.
        """
        self._upkeep.before_write(self)
        self._locked(self._arena, self._drop_pending_locked, slot, version, created, reason)

    def _drop_pending_locked(
        self, arena: Arena, now: int, slot: int, version: int, created: int | None, reason: str
    ) -> None:
        cells, table = arena.file.cells, arena.table
        if not 0 < slot <= table.last_slot or not cells[table.record + slot] or cells[table.version + slot] != version:
            return
        entry = arena.reader.try_at(slot)
        if (None if entry is None else entry[3][5]) != created:
            return
        if reason == "displace":
            self._eviction.drop_displaced(arena, slot, now)
        elif reason != "expire" or cells[table.expires + slot] <= now:
            self._eviction.evict(arena, slot, now)

    @contextmanager
    def lock(self, sid: str, timeout: Duration = 5.0) -> Iterator[None]:
        taken = False
        try:
            with named_lock(lambda: self.arena.file, require_key(sid)[0], seconds(timeout, "timeout")):
                taken = True
                if tracing(DEBUG):
                    trace("lock", (sid,), None)
                yield
        except Exception as exc:
            if not taken and tracing(DEBUG):
                trace("lock", (sid,), exc)
            raise

    # -- all sessions ------------------------------------------------------------------------------------------------

    def sound_arena(self) -> Arena:
        """Return the memory for a listing of all its sessions; see `ArenaStore.sound_arena`."""
        return bulk.sound_arena(self)

    @traced
    def ids(self) -> list[str]:
        return bulk.ids(self)

    @traced
    def all(self) -> dict[str, dict[Any, Any]]:
        return bulk.sessions(self)

    @traced
    def length(self, live: bool = False) -> int:
        arena = self.sound_arena()
        if not live:
            return arena.file.cells[SESSIONS]
        now, table = self._clock(), arena.table
        slots = table.used_slots()
        deadlines, records = table.column(table.expires, slots), table.column(table.record, slots)
        return sum(1 for deadline, record in zip(deadlines, records, strict=True) if record and deadline > now)

    @traced
    def clear(self) -> None:
        bulk.clear(self)

    @traced
    def owned_by(self, owner: str) -> list[str]:
        return bulk.owned_by(self, owner)

    @traced
    def destroy_owned(self, owner: str, keep: Iterable[str] = ()) -> int:
        return bulk.destroy_owned(self, owner, keep)

    @traced
    def prune(self) -> int:
        return bulk.prune(self)

    @traced
    def start_interval(self, period: Duration | None = None) -> None:
        self.ping()  # raises if the store is closed
        self._interval.start(self._options.check_period if period is None else period)

    @traced
    def stop_interval(self) -> None:
        self._interval.stop()

    # -- the store itself --------------------------------------------------------------------------------------------

    @retrying()
    def stats(self) -> Stats:
        return stats_of(self.arena, self._clock())

    def ping(self) -> bool:
        return self._arena.file.cells[STATE] == LIVE

    @property
    def closed(self) -> bool:
        return self._arena.closed

    def close(self) -> None:
        self._interval.stop()
        self._arena.close()

    def __reduce__(self) -> Any:
        raise TypeError("a private store stays in its process: share one with StoreManager, and send its proxy")
