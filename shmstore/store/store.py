"""`Store`: the contract over an arena in the memory of this process.

A step that changes sessions reads without the lock, prepares the bytes, takes the lock, looks again, and changes the
arena by one mutation. `retrying` repeats a step whose arena was replaced or damaged, or that has to wait for a
``dispose``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from logging import DEBUG
from typing import Any, Final, Self, TypeVar

from msgspec import Raw

from shmstore.codec.body import DEFAULT_CODEC, Codec, Record, content_of, log_unreadable, pack, payload_of, unpack
from shmstore.codec.ids import Key, key_of_id, owner_digest, require_key, stored_owner, stored_owner_digest
from shmstore.contract import IN_MEMORY, KEEP, AnyStore, Capability, Data, Loaded, NewOwner, Owner, Stats
from shmstore.engine.arena import STAMPS_AHEAD, Arena
from shmstore.engine.capacity import exceeds_limits, live_per_owner, owner_room
from shmstore.engine.core import CHANGED, ODD
from shmstore.engine.frame import body_of, front_of, head_of, seal
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.engine.header import (
    BY_FUNCTION,
    CLEARED,
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
    REBUILDS,
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
from shmstore.engine.layout import RENAMED, TOMBSTONE_TTL, ArenaDamaged, Geometry
from shmstore.engine.mapping import ArenaReplaced
from shmstore.engine.named_locks import named_lock
from shmstore.engine.option_cells import OptionsDamaged
from shmstore.engine.reader import Entry
from shmstore.engine.rebuild import rebuild
from shmstore.errors import ConfigError, RecordTooLarge, SerializationError, ShmStoreError, StoreTimeout
from shmstore.options import Duration, Options, seconds
from shmstore.store.dispose import Disposal, inside, refuse_inside
from shmstore.store.eviction import Eviction
from shmstore.store.expiry import deadline, life_of, nanoseconds
from shmstore.store.live_options import publish
from shmstore.store.pruner import Interval
from shmstore.store.retry import LocalUpkeep, Upkeep, retrying
from shmstore.store.stats import stats_of
from shmstore.store.trace import obey_environment, trace, traced
from shmstore.system.clock import NS
from shmstore.system.throttle import Throttle

__all__ = ["Store", "count_unreadable", "request_limit"]

log = logging.getLogger("shmstore")
tracing: Final = log.isEnabledFor

_OPTIMISTIC: Final = 3  # attempts to change a session whose bytes are prepared without the lock
_BATCH: Final = 8  # sessions that are removed in one hold of the lock
_FEW: Final = 256  # sessions of one owner that are listed in one hold of the lock
_TTL_AGAIN: Final = OPTIONS_COPY + TTL - MAX
_TIMEOUTS: Final = 5  # in a row, after which a removal of many sessions is given up
_LONGEST_PAUSE: Final = 0.002  # seconds between two batches
_COOKIE: Final = b"cookie"

T = TypeVar("T")

# What is written of a session: id and owner as in the body of a record, the payload, the owner's digest, the weight.
Content = tuple[bytes, bytes, int, int]

# A session as it was found: slot, version, key, when it was created; the last two None if its record cannot be read.
Found = tuple[int, int, Key | None, int | None]


class Store(AnyStore):
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
        self._begin(Arena.create(None, checked.geometry), checked, LocalUpkeep())
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
        store._begin(arena, options, upkeep or LocalUpkeep())
        return store

    def _begin(self, arena: Arena, options: Options, upkeep: Upkeep, disposal: Disposal | None = None) -> None:
        self.upkeep = upkeep
        # It may have been replaced: the property `arena` checks that. Reads and the lock check it themselves.
        self._arena = arena
        self.apply_options(options)
        self.disposal = disposal or Disposal()
        self._eviction = Eviction(self.disposal)
        self._interval = Interval(self)
        self._reattaching = GreenletLock()  # held while the arena is replaced by another object
        self._repairs = Throttle()

    # -- the arena and the options -----------------------------------------------------------------------------------

    def adopt(self, arena: Arena) -> None:
        """Continue on another arena, which has the sessions now. Reads in progress finish on the old one."""
        self._arena = arena
        self._codec = self._make_codec()

    def reattach(self) -> None:
        """
        Continue on the arena that has taken the place of this one, unless another thread has done so.

        Raises:
            StoreUnavailable: There is no such arena.
        """
        ticket = self._reattaching.ticket()
        try:
            ticket.acquire()
            if self._arena.file.cells[STATE]:
                self.adopt(self.upkeep.reopen(self))
        finally:
            ticket.release()

    def repair(self, arena: Arena, damage: ArenaDamaged, progress: Callable[[int], object] = lambda _: None) -> None:
        """
        Restore damaged options, or carry all undamaged sessions over to another file. Only the owner may do this.

        Damage is found while a mutation is planned, so nothing has been changed.

        Args:
            arena: Where the damage was found. Nothing is done if another thread has repaired it.
            damage: What was found.
            progress: Called now and then with how many sessions were carried over.
        """
        lost = 0
        ticket = self._reattaching.ticket()
        try:
            ticket.acquire()
            if self._arena is not arena:
                return
            if not arena.option_cells.restore():
                if isinstance(damage, OptionsDamaged) and not arena.option_cells.is_damaged():
                    return
                lost = rebuild(arena, self.adopt, None, self._timeout, progress, self._clock)
            self._arena.counters.add(REBUILDS)
        finally:
            ticket.release()
        if lost or self._repairs.due():
            log.error("%s: its memory was damaged (%s): %d sessions are lost", self.label, damage, lost)

    def move(self, geometry: Geometry | None = None, progress: Callable[[int], object] = lambda _: None) -> int:
        """
        Carry the sessions over to another file at the path of the store. Only the owner may do this.

        Args:
            geometry: The size of that file; None: that of the present one.
            progress: Called now and then with how many sessions were carried over.

        Returns:
            How many sessions stayed behind.

        Raises:
            StoreFull: The memory for another file cannot be reserved. Nothing has changed.
            StoreUnavailable: The other file cannot take the place of this one. Nothing has changed.
        """
        ticket = self._reattaching.ticket()
        try:
            ticket.acquire()
            return rebuild(self._arena, self.adopt, geometry, self._timeout, progress, self._clock)
        finally:
            ticket.release()

    def check_options(self) -> None:
        """Repair the published options if they are damaged. Called now and then, without the lock."""
        arena = self.arena
        try:
            arena.option_cells.check()
        except OptionsDamaged as damage:
            self.upkeep.repair(self, arena, damage)

    def apply_options(self, options: Options) -> None:
        """Obey these options in this object."""
        self._options = options
        self._codec = self._make_codec()
        self._clock = options.clock
        self._timeout = seconds(options.lock_timeout)

    def change_options(self, options: Options) -> None:
        """Obey other options from now on, in every process that uses the same memory."""
        self.stop_interval()
        self.apply_options(options)
        self.publish_options()
        self.start_interval()

    def publish_options(self) -> None:
        """Write the options where every process reads them."""
        arena = self.arena
        publish(arena, self._options)
        if exceeds_limits(arena):
            # In a thread: the holder of the lock may be stopped, a dispose slow, and the options are in force already.
            thread = threading.Thread(target=self._shrink, name="shmstore-shrink", daemon=True)
            thread.start()
            thread.join(0 if arena.file.cells[DISPOSES] else 1)

    def _make_codec(self) -> Codec:
        codec = Codec(self._options.serializer, partial(count_unreadable, self._arena))
        self._usual = codec.name == DEFAULT_CODEC and self._options.length is None  # what the core can write alone
        return codec

    @property
    def arena(self) -> Arena:
        """
        The memory that holds the sessions now.

        Raises:
            StoreUnavailable: The store was closed, or has ended.
        """
        if self._arena.file.cells[STATE]:
            self.reattach()
        return self._arena

    @property
    def options(self) -> Options:
        return self._options

    @property
    def codec(self) -> Codec:
        return self._codec

    @property
    def capabilities(self) -> frozenset[Capability]:
        return IN_MEMORY

    @property
    def label(self) -> str:
        return self._arena.label

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
        key = key_of_id(sid)
        arena = self._arena if key else self.arena  # reading tells whether the arena was replaced
        try:
            entry = None if key is None else arena.reader.read(key, self._timeout)
        except ArenaReplaced:
            self.reattach()
            return self._find(sid, counted=counted)
        now = self._clock()
        if entry is None or entry[2] <= now:
            if counted:
                arena.counters.miss()
            return None
        if counted:
            self._count_use(arena, entry, now)
        return body_of(entry[4])

    def _load(self, sid: str) -> Loaded | None:
        arena, now = self._arena, self._clock()
        core = arena.file.core
        found = ODD if core is None else core.load(sid, now)
        if isinstance(found, int):
            found, arena, now = self._load_by_python(sid)
        if found is None:
            return None
        entry, used, payload, owner = found
        codec = self._codec
        if payload is None or not codec.is_deterministic:  # only the default codec is
            try:
                payload, owner = content_of(body_of(entry[4]), codec.name)
            except SerializationError:
                arena.counters.uncount_hit()
                if self.upkeep.refresh_options(self):
                    return self._load(sid)
                arena.counters.miss()
                arena.counters.add(CORRUPT)
                return None
        remaining = math.inf if entry[2] >= NEVER else (entry[2] - now) / NS
        handle = arena, codec, sid, entry
        idle = (now - used) / NS if now > used else 0.0
        # As `Loaded(...)`, without a call of Python.
        return tuple.__new__(Loaded, (payload, (now - entry[3][5]) / NS, idle, remaining, owner, handle))

    def _load_by_python(self, sid: str) -> tuple[tuple[Entry, int, bytes | None, str | None] | None, Arena, int]:
        """Return what the core returns; where the session is; and the time."""
        key = key_of_id(sid)
        arena = self._arena if key else self.arena  # reading tells whether the arena was replaced
        try:
            entry = None if key is None else arena.reader.read(key, self._timeout)
        except ArenaReplaced:
            self.reattach()
            return self._load_by_python(sid)
        now = self._clock()
        if entry is None or entry[2] <= now:
            arena.counters.miss()
            return None, arena, now
        used = arena.file.cells[arena.table.used + entry[0]]
        self._count_use(arena, entry, now)
        return (entry, used, None, None), arena, now

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
            self.upkeep.repair(self, arena, damage)

    def _decode(self, body: bytes, *, counted: bool) -> dict[Any, Any] | None:
        try:
            return self._codec.decode(payload_of(body, self._codec.name))
        except SerializationError:
            if self.upkeep.refresh_options(self):
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
        arena = self._arena
        try:
            arena.lock(self._timeout)
            slot = arena.find(key)
            expired = slot and arena.file.cells[arena.table.expires + slot] <= self._clock()
            entry = arena.reader.try_at(slot) if expired else None
            if entry is None:
                return None
            self.disposal.drop(arena, slot, EXPIRED)
        finally:
            arena.unlock()
        return self._decode(body_of(entry[4]), counted=False)

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
        self._before_write()
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
        return self._publish(arena, partial(self._overwrite, arena, record, span, present))

    def _overwrite(self, arena: Arena, record: bytes, span: int, present: bool | None, now: int) -> bool:
        """Write a record, whatever its key has now; ``present`` as in `_write`. Called with the lock."""
        _, weight, low, high, owner, _ = head_of(record)
        slot = arena.find((low, high))
        if slot and arena.file.cells[arena.table.expires + slot] <= now:
            self.disposal.drop(arena, slot, EXPIRED)
            slot = 0
        if present is not None and bool(slot) != present:
            return False
        self._eviction.make_room(arena, len(record), weight, slot, owner, now)
        if slot:
            self.disposal.overwrite(arena, slot)
        arena.publish(slot, (low, high), record, owner, deadline(now, span), now)
        return True

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
        changes: Mapping[Any, Any],
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
        self._before_write()
        codec, arena = self._codec, self._arena
        old_key = require_key(old)
        new_key = old_key if new is old else require_key(new)
        if type(changes) is not dict and not isinstance(changes, Mapping):
            raise TypeError(f"what to set must be a mapping, not {type(changes).__name__}")
        # Names as plain str: comparing those of a subclass may run foreign code, which the lock does not allow.
        raw = {
            _plain(name): value if type(value) is Raw else Raw(codec.encode_value(name, value))
            for name, value in changes.items()
        }
        delete = tuple([_plain(name) for name in delete]) if delete else ()
        if owner is not KEEP:
            owner = stored_owner(owner)
        new_digest = None if owner is KEEP else stored_owner_digest(owner)
        span = None if ttl is None else nanoseconds(ttl)

        def prepare(entry: Entry) -> Content | None:
            body = body_of(entry[4])
            try:
                stored = payload_of(body, codec.name)
            except SerializationError:
                return None  # of another serializer, or damaged: it counts as absent
            payload = codec.merge(stored, raw, delete)
            weight = self._weigh(arena, payload, new)
            if owner is KEEP and new is old:
                front = body[: len(body) - len(stored)]  # id and owner stand before the payload, and stay
            else:
                front = pack(new, unpack(body).owner if owner is KEEP else owner, codec.name, b"")
            return front, payload, entry[3][4] if new_digest is None else new_digest, weight

        # With a `length` without end: it is foreign code, which must not run under the lock.
        for _ in range(_OPTIMISTIC) if self._options.length is None else itertools.count():
            entry = arena.reader.read(old_key, self._timeout)
            if entry is None or entry[2] <= self._clock():
                return False
            prepared = prepare(entry)
            if prepared is None:
                return False
            done = self._exchange(arena, entry, new_key, prepared, span, count, tombstone)
            if done is not None:
                return done

        def merge(now: int) -> bool:
            slot = arena.find(old_key)
            entry = arena.reader.try_at(slot) if slot else None
            prepared = None if entry is None else prepare(entry)
            if entry is None or prepared is None:
                return False
            return bool(self._replace(arena, entry, _sealed(entry, new_key, prepared), span, count, tombstone, now))

        return self._publish(arena, merge)

    @traced
    @retrying()
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
        self._before_write()
        arena = self._arena
        if loaded.handle is None or loaded.handle[:3] != (arena, self._codec, sid) or new == sid:
            return False
        entry = loaded.handle[3]
        _, _, _, head, record = entry
        weight = self._weigh(arena, payload, sid if new is None else new)
        key, digest, new_owner = head[2:4], head[4], loaded.owner
        if new is not None:
            key = require_key(new)
        if owner is not KEEP and owner != new_owner:
            new_owner = stored_owner(owner)
            digest = stored_owner_digest(new_owner)
        if new is None and new_owner == loaded.owner:
            front = front_of(record, len(loaded.payload))  # id and owner stand before the payload, and stay
        else:
            front = pack(new or sid, new_owner, self._codec.name, b"")
        span = None if ttl is None else nanoseconds(ttl)
        return bool(self._exchange(arena, entry, key, (front, payload, digest, weight), span, SETS, tombstone))

    def _exchange(
        self, arena: Arena, entry: Entry, key: Key, content: Content, span: int | None, count: int, tombstone: bool
    ) -> bool | None:
        """
        Write a session in place of the one that was read as ``entry``; a ``span`` of None keeps the deadline.

        Returns:
            False if it has expired, or another session has the key. None if it has changed since it was read.
        """
        if (core := arena.file.core) is not None:
            done = core.change(entry, key, *content, span, count, tombstone, self._clock())
            if done >= 0 or done == CHANGED:
                return None if done == CHANGED else self._written(arena, done)
        record = _sealed(entry, key, content)
        return self._publish(arena, partial(self._replace, arena, entry, record, span, count, tombstone))

    def _replace(
        self, arena: Arena, entry: Entry, record: bytes, span: int | None, count: int, tombstone: bool, now: int
    ) -> bool | None:
        """Do what `_exchange` says, with the lock."""
        slot, version, _, head, _ = entry
        _, weight, low, high, owner, _ = head_of(record)
        cells, table = arena.file.cells, arena.table
        if cells[table.version + slot] != version:
            return None
        expires = cells[table.expires + slot]
        if expires <= now:
            return False
        if (low, high) != head[2:4] and (there := arena.find((low, high))):
            if cells[table.expires + there] > now:
                return False
            self.disposal.drop(arena, there, EXPIRED)
        if span is not None:
            expires = deadline(now, span)
        self._eviction.make_room(arena, len(record), weight, slot, owner, now)
        arena.publish(slot, (low, high), record, owner, expires, now, count, tombstone=tombstone)
        return True

    def _publish(self, arena: Arena, write: Callable[[int], T]) -> T:
        """Call a function that writes a record, with the lock and the time; then log what it has evicted."""
        try:
            arena.lock(self._timeout)
            done = write(self._clock())  # not before: while waiting a session may have expired
        finally:
            arena.unlock()
        self._eviction.report(arena)
        return done

    def _written(self, arena: Arena, done: int) -> bool:
        """Return whether the core has written a session, and log that it has evicted others for it."""
        if done > 1:
            self._eviction.report(arena, evicted=True)
        return done > 0

    @traced
    @retrying()
    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        if session is not None and key_of_id(sid) is None:
            return False
        if session is not None and not isinstance(session, Mapping):
            raise TypeError(f"a session must be a mapping, not {type(session).__name__}")
        if session is not None and "cookie" in session:
            if ttl is None:
                ttl = self.life_of(session, sid)
            return self._change(sid, sid, {"cookie": session["cookie"]}, (), ttl, KEEP, TOUCHES)
        self._before_write()
        if ttl is None:
            rule = self._arena.file.cells[TTL]
            if session is None and rule >= BY_FUNCTION:
                body = self._find(sid, counted=False)
                if body is None:
                    return False
                # Decoding costs more than everything else: only for sessions whose life depends on what is in them.
                if rule == BY_FUNCTION or _COOKIE in body:
                    session = self._decode(body, counted=False)
            ttl = self.life_of({} if session is None else session, sid)
        return self._renew(sid, nanoseconds(ttl))

    def _renew(self, sid: str, span: int) -> bool:
        arena = self._arena
        if (core := arena.file.core) is not None and (done := core.touch(sid, span, self._clock())) >= 0:
            return bool(done)
        key = key_of_id(sid)
        if key is None:
            return False
        try:
            arena.lock(self._timeout)
            now = self._clock()  # not before: while waiting the session may have expired
            slot = arena.find(key)
            if not slot or arena.file.cells[arena.table.expires + slot] <= now:
                return False
            arena.retime(slot, deadline(now, span), now)
        finally:
            arena.unlock()
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
            self._arena.option_cells.check()
        if rule == BY_FUNCTION and not callable(self._options.ttl):
            self.upkeep.refresh_options(self)
        return life_of(self._options, rule, session, sid)

    def _before_write(self) -> None:
        refuse_inside()
        self.upkeep.before_write(self)

    def _weigh(self, arena: Arena, payload: bytes, sid: str) -> int:
        """Return how much of ``max`` a session takes; raise an error if it is too large."""
        limit = arena.file.cells[MAX_SESSION]
        if len(payload) > limit:
            arena.option_cells.check()
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
        self._before_write()
        arena = self._arena
        if (core := arena.file.core) is not None and (done := core.drop(sid, tombstone, self._clock())) >= 0:
            return done
        key = key_of_id(sid)
        if key is None:
            return 0
        try:
            arena.lock(self._timeout)
            now = self._clock()
            slot = arena.find(key)
            if not slot:
                return 0
            live = arena.file.cells[arena.table.expires + slot] > now
            self.disposal.drop(arena, slot, DESTROYED if live else EXPIRED, now if tombstone and live else None)
        finally:
            arena.unlock()
        return int(live)

    @traced
    def destroy_if_empty(self, sid: str, ignore: Iterable[str] = (), tombstone: bool = False) -> bool:
        return self._destroy_if_empty(sid, frozenset(ignore), tombstone)

    @retrying(
        lambda sid, ignore, tombstone: ("destroy_if_empty", {"sid": sid, "ignore": ignore, "tombstone": tombstone})
    )
    def _destroy_if_empty(self, sid: str, ignore: frozenset[str], tombstone: bool) -> bool:
        self._before_write()
        key = key_of_id(sid)
        arena = self._arena
        try:
            arena.lock(self._timeout)
            slot = arena.find(key) if key is not None else 0
            entry = arena.reader.try_at(slot) if slot else None
            record = None if entry is None else self._record(arena, entry)
            if entry is None or record is None:
                return False
            now = self._clock()
            live = entry[2] > now
            if live and {*self._codec.fields(record.payload)} - ignore:
                return False
            self.disposal.drop(arena, slot, DESTROYED if live else EXPIRED, now if tombstone and live else None)
        finally:
            arena.unlock()
        return live

    @retrying()
    def drop_pending(self, slot: int, version: int, created: int | None, reason: str) -> None:
        """
        Remove a session for another process, which needs its slot or its space, and cannot call dispose.

        Args:
            slot, version, created: The session; it stays if it has changed meanwhile.
            reason: ``expire`` (it stays if it has not expired), ``displace`` or ``evict``.
        """
        self._before_write()
        arena, evicted = self._arena, False
        table = arena.table
        try:
            arena.lock(self._timeout)
            if (
                0 < slot <= table.last_slot
                and arena.file.cells[table.record + slot]
                and arena.file.cells[table.version + slot] == version
            ):
                entry, now = arena.reader.try_at(slot), self._clock()
                there = None if entry is None else entry[3][5]
                if there == created and (reason != "expire" or arena.file.cells[table.expires + slot] <= now):
                    evict = self._eviction.drop_displaced if reason == "displace" else self._eviction.evict
                    evicted = evict(arena, slot, now)
        finally:
            arena.unlock()
        if evicted:
            self._eviction.report(arena)

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

    @traced
    @retrying()
    def ids(self) -> list[str]:
        return [record.sid for _, record in self._records()]

    @traced
    @retrying()
    def all(self) -> dict[str, dict[Any, Any]]:
        now = self._clock()
        sessions = {}
        for entry, record in self._records():
            if entry[2] > now and record.codec_name == self._codec.name:
                try:
                    sessions[record.sid] = self._codec.readable(record.payload)
                except SerializationError:
                    self.arena.counters.add(CORRUPT)
        return sessions

    def _records(self) -> Iterator[tuple[Entry, Record]]:
        arena = self.arena
        for slot in arena.table.live_slots():
            entry = arena.reader.at(slot, self._timeout)
            if entry is not None and (record := self._record(arena, entry)) is not None:
                yield entry, record

    def _record(self, arena: Arena, entry: Entry) -> Record | None:
        try:
            record = unpack(body_of(entry[4]))
            if key_of_id(record.sid) == entry[3][2:4]:  # else the id in it is another session's
                return record
        except SerializationError:
            pass
        arena.counters.add(CORRUPT)
        return None

    @traced
    def length(self, live: bool = False) -> int:
        arena = self.arena
        if not live:
            return arena.file.cells[SESSIONS]
        now, table = self._clock(), arena.table
        slots = table.used_slots()
        deadlines, records = table.column(table.expires, slots), table.column(table.record, slots)
        return sum(1 for deadline, record in zip(deadlines, records, strict=True) if record and deadline > now)

    def __len__(self) -> int:
        return self.length()

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    @traced
    def clear(self) -> None:
        arena, there = self._all_found()
        for batch in self._batches(there):
            self._clear_batch(arena, batch)

    @retrying()
    def _all_found(self) -> tuple[Arena, list[Found]]:
        arena, there = self.arena, []
        for slot in arena.table.live_slots():
            version = arena.file.cells[arena.table.version + slot]
            entry = arena.reader.at(slot, self._timeout)
            key, created = (None, None) if entry is None else (entry[3][2:4], entry[3][5])
            there.append((slot, version, key, created))
        return arena, there

    @retrying(lambda *_: ("clear", {}))
    def _clear_batch(self, found_in: Arena, batch: list[Found]) -> None:
        self._before_write()
        arena = self._arena
        try:
            arena.lock(self._timeout)
            for slot in self._still_there(arena, found_in, batch):
                self.disposal.drop(arena, slot, CLEARED)
        finally:
            arena.unlock()

    def _still_there(
        self, arena: Arena, found_in: Arena, batch: list[Found], *, overwritten: bool = False
    ) -> Iterator[int]:
        """
        Yield the slots of sessions that were found and are still stored. Called with the lock.

        A session is identified by when it was created: it may have been changed or renamed since. With ``overwritten``
        the session that has its id now counts as well.
        """
        moved = found_in is not arena  # in another file slots and versions are others
        version_at, record_at = arena.table.version, arena.table.record
        for found, version, key, created in batch:
            slot = (arena.find(key) if key else 0) if moved else found
            if not moved and arena.file.cells[version_at + slot] == version:
                if arena.file.cells[record_at + slot]:
                    yield slot
                continue
            entry = arena.reader.try_at(slot)
            if entry is not None and (entry[3][5] == created or (overwritten and entry[3][2:4] == key)):
                yield slot

    # -- owners ------------------------------------------------------------------------------------------------------

    @traced
    def owned_by(self, owner: str) -> list[str]:
        now = self._clock()
        _, owned = self._owned(owner)
        return [record.sid for entry, record in owned if entry[2] > now]

    @traced
    def destroy_owned(self, owner: str, keep: Iterable[str] = ()) -> int:
        self._before_write()
        kept = frozenset([keep] if isinstance(keep, str) else keep)
        arena, owned = self._owned(owner)
        there = [_found(entry) for entry, record in owned if record.sid not in kept]
        removed: list[bool] = []  # for each session whether it was live
        count = timeouts = 0
        for number, batch in enumerate(self._batches(there)):
            while True:
                try:
                    count += self._destroy_batch(owner, kept, arena, batch, removed)
                    break
                except StoreTimeout:
                    timeouts += 1
                    if not number or timeouts >= _TIMEOUTS:  # otherwise it would end half done
                        raise
            timeouts = 0
        return count + sum(removed)

    @retrying(lambda owner, kept, *_: ("destroy_owned", {"owner": owner, "keep": kept}))
    def _destroy_batch(
        self, owner: str, kept: frozenset[str], found_in: Arena, batch: list[Found], removed: list[bool]
    ) -> int:
        """
        Remove sessions of an owner, also those that were renamed meanwhile.

        Append to ``removed`` whether each was live, also if the attempt ends early. Return how many a server has
        removed instead of this process.
        """
        self._before_write()
        arena, digest = self._arena, owner_digest(owner)
        try:
            arena.lock(self._timeout)
            now, table = self._clock(), arena.table
            for slot in self._still_there(arena, found_in, batch, overwritten=True):
                if arena.file.cells[table.owner + slot] == digest:
                    live = arena.file.cells[table.expires + slot] > now
                    self.disposal.drop(arena, slot, DESTROYED if live else EXPIRED)
                    removed.append(live)
        finally:
            arena.unlock()
        return 0

    @retrying()
    def _owned(self, owner: str) -> tuple[Arena, list[tuple[Entry, Record]]]:
        """Return an owner's sessions, last used first, and the arena that they are in."""
        owner = stored_owner(owner)
        arena, digest = self.arena, owner_digest(owner)
        try:
            arena.lock(self._timeout)
            count, few = arena.owned_slots(digest, _FEW)
            slots = None if count > _FEW else arena.table.by_use(few)[::-1]
        finally:
            arena.unlock()
        if slots is None:
            slots = arena.table.slots_of_owner(digest)
        entries = [entry for slot in slots if (entry := arena.reader.at(slot, self._timeout)) is not None]
        records = [(entry, self._record(arena, entry)) for entry in entries]
        # Two owners may share a digest of eight bytes.
        return arena, [(entry, record) for entry, record in records if record and record.owner == owner]

    # -- expired and excess sessions ---------------------------------------------------------------------------------

    @traced
    def prune(self) -> int:
        self.check_options()
        arena, number = self._begin_sweep()
        table, now = arena.table, self._clock()
        pruned = 0
        for batch in self._batches(table.expired_slots(now)):
            pruned += self._expire_batch(batch, now)
        earliest = min(table.column(table.expires, table.used_slots()), default=NEVER)
        with contextlib.suppress(ArenaReplaced):
            self._locked(arena, partial(arena.end_sweep, number, earliest))
        return pruned

    @retrying()
    def _begin_sweep(self) -> tuple[Arena, int]:
        arena = self._arena
        return arena, self._locked(arena, arena.begin_sweep)

    @retrying()
    def _expire_batch(self, batch: list[int], now: int) -> int:
        self._before_write()
        arena = self._arena
        table = arena.table
        pruned = 0
        try:
            arena.lock(self._timeout)
            for slot in batch:
                # The slots may have been found in another file: whatever has expired may be removed.
                if arena.file.cells[table.record + slot] and arena.file.cells[table.expires + slot] <= now:
                    self.disposal.drop(arena, slot, EXPIRED)
                    pruned += 1
        finally:
            arena.unlock()
        return pruned

    @traced
    def start_interval(self, period: Duration | None = None) -> None:
        self.ping()  # raises if the store is closed
        chosen = self._options.check_period if period is None else period
        pause = 0.0 if chosen is None else seconds(chosen, "period")
        if pause < 0:
            raise ValueError(f"period must be at least 0 seconds, not {period!r}")
        self._interval.start(pause)

    @traced
    def stop_interval(self) -> None:
        self._interval.stop()

    def _shrink(self) -> None:
        """
        Remove what exceeds `max` and `max_per_owner` after these were lowered.

        What remains is removed by the next writes, a part of it by each.
        """
        arena = self._arena
        try:
            _repeat(self._trim)
            for owner, live in live_per_owner(arena, self._clock()).items():
                if owner_room(arena, live) < 0:
                    _repeat(partial(self._trim_owner, owner))
        except ShmStoreError as exc:
            if not self.closed:
                log.warning("%s: what is beyond max or max_per_owner stays for now: %s", self.label, exc)

    @retrying()
    def _trim(self) -> bool:
        """Evict some of what exceeds `max`; return whether there is more."""
        arena = self._arena
        return self._locked(arena, lambda: self._eviction.trim(arena, self._batch_size(), self._clock()))

    @retrying()
    def _trim_owner(self, owner: int) -> bool:
        """Remove some of what an owner has beyond `max_per_owner`; return whether there is more."""
        arena = self._arena

        def displace() -> bool:
            self._eviction.expect_options(arena)
            return self._eviction.displace(arena, owner, 0, self._clock())

        return self._locked(arena, displace)

    def _locked(self, arena: Arena, function: Callable[[], T]) -> T:
        try:
            arena.lock(self._timeout)
            return function()
        finally:
            arena.unlock()

    def _batch_size(self) -> int:
        return 1 if self.arena.file.cells[DISPOSES] else _BATCH

    def _batches(self, items: list[T]) -> Iterator[list[T]]:
        size = self._batch_size()
        for at in range(0, len(items), size):
            begun = time.monotonic()
            yield items[at : at + size]
            if 1 < size < len(items) - at:  # between single removals there is a dispose
                _yield_lock(begun)

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def count_unreadable(arena: Arena, key: Any, error: BaseException) -> None:
    """Count and log a value that cannot be read."""
    arena.counters.add(CORRUPT)
    log_unreadable(arena.label, key, error)


def request_limit(arena: Arena) -> int:
    """Return how many bytes a request to the server may have: the largest session, pickled, and more."""
    return 2 * arena.file.cells[MAX_SESSION] + 65536


def _sealed(entry: Entry, key: Key, content: Content) -> bytes:
    """Return the record that takes the place of the one that was read as ``entry``."""
    front, payload, owner, weight = content
    return seal(key, owner, entry[3][5], front + payload, weight)


def _found(entry: Entry) -> Found:
    slot, version, _, head, _ = entry
    return slot, version, head[2:4], head[5]


def _repeat(step: Callable[[], bool]) -> None:
    """Call a function that holds the lock, until it returns False; let other processes have the lock in between."""
    begun = time.monotonic()
    while step():
        _yield_lock(begun)
        begun = time.monotonic()


def _yield_lock(since: float) -> None:
    """
    Leave the lock free for twice as long as it was held, ``since`` that time: two such callers leave it a third of it.

    Retaking the lock at once would starve the waiters, which look for it only now and then.
    """
    time.sleep(min(2 * (time.monotonic() - since), _LONGEST_PAUSE))


def _plain(name: Any) -> Any:
    return str.__str__(name) if type(name) is not str and isinstance(name, str) else name
