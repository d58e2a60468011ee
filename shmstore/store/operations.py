"""What a store does with one session, or a batch of them: read without the lock, changed under it, in one step."""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar

from msgspec import Raw

from shmstore.codec import unreadable
from shmstore.codec.body import Codec, Record, content_of, pack, payload_of, unpack
from shmstore.codec.ids import digest_of, digest_of_stored, key_of_id, key_to_write, stored_owner
from shmstore.engine.arena import STAMPS_AHEAD, Arena
from shmstore.engine.frame import Key, body_of, seal
from shmstore.engine.header import (
    BY_FUNCTION,
    CLEARED,
    CORRUPT,
    DESTROYED,
    DISPOSES,
    EXPIRED,
    MAX,
    MAX_PER_OWNER,
    MAX_SESSION,
    NEVER,
    OPTIONS_AGAIN,
    REBUILDS,
    RECENCY,
    REFUSED,
    SETS,
    TTL,
    WEIGHING,
)
from shmstore.engine.layout import ArenaDamaged
from shmstore.engine.reader import Entry
from shmstore.engine.rebuild import move
from shmstore.errors import RecordTooLarge, SerializationError, ShmStoreError, StoreTimeout
from shmstore.options import Duration, Options, seconds
from shmstore.store.dispose import Disposal, Due, inside, refuse_inside
from shmstore.store.eviction import Eviction
from shmstore.store.expiry import NS, deadline, life_of, nanoseconds
from shmstore.store.stats import Loaded
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")

_OPTIMISTIC: Final = 3  # attempts to change a session without holding the lock while thinking
_BATCH: Final = 8  # drops in one hold of the lock
_FEW: Final = 256  # sessions of one owner that are listed in one hold of the lock
_TTL_AGAIN: Final = OPTIONS_AGAIN + TTL - MAX
_TIMEOUTS: Final = 5  # in a row, after which what has begun is given up
_LONGEST_PAUSE: Final = 0.002  # seconds between two batches

T = TypeVar("T")
P = ParamSpec("P")

# A session as it was seen: slot, version, key, when it was created; the latter two None if its record cannot be read.
Seen = tuple[int, int, Key | None, int | None]


class Keep(enum.Enum):
    """The type of `KEEP`."""

    KEEP = enum.auto()


KEEP: Final = Keep.KEEP
"""As ``owner``: leave the owner as it is."""

Owner = str | None
NewOwner = str | None | Literal[Keep.KEEP]


def _retried(method: Callable[Concatenate[Operations, P], T]) -> Callable[Concatenate[Operations, P], T]:
    """Return a method that is attempted again: after a dispose, if a drop needs one, and after damage is healed."""

    @wraps(method)
    def call(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            try:  # as `_healed`, which would cost each operation a call more
                return method(self, *args, **kwargs)
            except ArenaDamaged as damage:
                self._heal(damage)
            return method(self, *args, **kwargs)
        except Due as due:
            return self._after_dispose(due, method, args)

    return call


class Operations:
    """
    The operations on the sessions of an arena, as `Store` needs them.

    Attributes:
        arena: The shared memory.
        options: The options of the store.
        codec: How its sessions are written.
    """

    arena: Arena
    codec: Codec
    options: Options

    @property
    def label(self) -> str:
        """What the log calls the store."""
        return self.arena.label

    def _begin(self, arena: Arena, options: Options) -> None:
        self.arena = arena
        self._obey(options)
        self._loaded: tuple[str, Key, Entry, int] | None = None
        self._disposal = Disposal(arena)
        self._eviction = Eviction(arena, self._disposal)
        self._healing = Throttle()

    def _obey(self, options: Options) -> None:
        self.options = options
        self.codec = Codec(options.serializer, partial(count_unreadable, self.arena))
        self._clock = options.clock
        self._timeout = seconds(options.lock_timeout)

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
        epoch = self.arena.epoch
        entry = None if key is None else self.arena.read(key, self._timeout)
        now = self._clock()
        if key is None or entry is None or entry[2] <= now:
            self.arena.miss()
            return None
        try:
            payload, owner = content_of(body_of(entry[4]), self.codec.name)
        except SerializationError:
            if self._catch_up():
                return self._load(sid)
            self.arena.miss()
            self.arena.cells[CORRUPT] += 1
            return None
        idle = max(0, now - self.arena.cells[self.arena.used + entry[0]])
        self._used(entry, now)
        self._loaded = sid, key, entry, epoch
        remaining = math.inf if entry[2] >= NEVER else (entry[2] - now) / NS
        return Loaded(payload, (now - entry[3][5]) / NS, idle / NS, remaining, owner)

    def _used(self, entry: Entry, now: int) -> None:
        """Count a hit, and refresh the place in the order of use if it is older than ``recency``."""
        arena = self.arena
        arena.hit()
        slot, version, _, _, _ = entry
        recency = arena.cells[RECENCY]
        if recency and -STAMPS_AHEAD < now - arena.cells[arena.used + slot] < recency:
            return
        try:
            if not recency:
                arena.lock(self._timeout)
            elif not arena.lock_now():
                return  # optional work: while a holder is busy, or frozen, hits go on
            arena.use(slot, version, now)
        except ArenaDamaged as found:
            damage = found
        else:
            return
        finally:
            arena.unlock()
        with contextlib.suppress(ShmStoreError):  # what was read is whole; if this fails, the next write says so
            self._heal(damage)

    def _decode(self, body: bytes, *, counted: bool) -> dict[Any, Any] | None:
        try:
            return self.codec.decode(payload_of(body, self.codec.name))
        except SerializationError:
            if self._catch_up():
                return self._decode(body, counted=counted)
        try:
            return self.codec.salvage(payload_of(body, self.codec.name))[0]
        except SerializationError:
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
        if type(session) is not dict and not isinstance(session, Mapping):
            raise TypeError(f"a session must be a mapping, not {type(session).__name__}")
        owner = stored_owner(owner)
        digest = digest_of_stored(owner)
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
        tombstone: bool = False,
    ) -> bool:
        """
        Rewrite a session from what is stored.

        The new record is prepared from a read without the lock, and written if the slot's version is still the same. A
        session that many write at once gets its turn under the lock: merging bytes calls nothing foreign.
        """
        self._before_write()
        codec, arena, loaded = self.codec, self.arena, self._loaded
        self._loaded = None
        if loaded is not None and loaded[0] != old:
            loaded = None
        old_key = key_to_write(old) if loaded is None else loaded[1]
        new_key = old_key if new is old else key_to_write(new)
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
        new_digest = None if owner is KEEP else digest_of_stored(owner)
        span = None if ttl is None else nanoseconds(ttl)

        def prepare(entry: Entry) -> tuple[bytes, int, int] | None:
            body = body_of(entry[4])
            digest, created = entry[3][4:]
            try:
                stored = payload_of(body, codec.name)
            except SerializationError:
                return None  # another serializer's, or damaged: as good as none
            payload = codec.merge(stored, raw, delete)
            self._check_size(payload)
            weight = self._weigh(payload, new)
            if owner is KEEP and new is old:
                body = body[: len(body) - len(stored)] + payload  # whose it is stands before it, and stays
            else:
                body = pack(new, unpack(body).owner if owner is KEEP else owner, codec.name, payload)
            if new_digest is not None:
                digest = new_digest
            return seal(new_key, digest, created, body, weight), digest, weight

        # Not only a few times with a `length`: that is foreign, and not to be called under the lock.
        optimistic = _OPTIMISTIC if self.options.length is None else sys.maxsize
        for attempt in range(optimistic + 1):
            entry = None
            prepared = None
            epoch = arena.epoch
            if loaded is not None and self._is_current(*loaded[2:]):
                # Who changes a session has nearly always just loaded it.
                entry, loaded = loaded[2], None
                prepared = prepare(entry)
            elif attempt < optimistic:
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
                arena.publish(slot, new_key, record, digest, expires, now, count, tombstone=tombstone)
            finally:
                arena.unlock()
            if evicted:
                self._eviction.report()
            return True
        raise AssertionError  # the last attempt holds the lock

    def _is_current(self, entry: Entry, epoch: int) -> bool:
        """Return whether what was read then is still what is stored, as far as can be seen without the lock."""
        slot, version, expires, _, _ = entry
        arena = self.arena
        # The epoch first: in another file a slot means nothing, and may be none.
        return epoch == arena.epoch and arena.cells[arena.version + slot] == version and expires > self._clock()

    @_retried
    def _retime(self, key: Key, span: int) -> bool:
        arena = self.arena
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

    @_retried
    def _destroy(self, sid: str, tombstone: bool) -> int:
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
            self._disposal.drop(slot, DESTROYED if live else EXPIRED, now if tombstone and live else None)
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
    def _clear_batch(self, batch: list[Seen], epoch: int) -> None:
        self._before_write()
        arena = self.arena
        try:
            arena.lock(self._timeout)
            for slot in self._still_there(batch, epoch):
                self._disposal.drop(slot, CLEARED)
        finally:
            arena.unlock()

    def _still_there(self, batch: list[Seen], epoch: int, *, overwritten: bool = False) -> Iterator[int]:
        """
        Yield the slots of sessions that were seen and are still there. Called with the lock.

        A session is what began at one time: it may have been changed or renamed since. With ``overwritten`` it is also
        what has the id that it had.
        """
        arena = self.arena
        moved = epoch != arena.epoch  # to another file, where slots and versions are others
        for seen, version, key, created in batch:
            slot = (arena.find(key) if key else 0) if moved else seen
            if not moved and arena.cells[arena.version + slot] == version:
                if arena.cells[arena.record + slot]:
                    yield slot
                continue
            entry = arena.under_lock(slot)
            if entry is not None and (entry[3][5] == created or (overwritten and entry[3][2:4] == key)):
                yield slot

    @_retried
    def _drop(self, slot: int, version: int, created: int | None, reason: str) -> None:
        """Drop a session that another process must get rid of, if it is still the one, and there is still a reason."""
        self._before_write()
        arena, evicted = self.arena, False
        try:
            arena.lock(self._timeout)
            if (
                0 < slot <= arena.last_slot
                and arena.cells[arena.record + slot]
                and arena.cells[arena.version + slot] == version
            ):
                entry, now = arena.under_lock(slot), self._clock()
                there = None if entry is None else entry[3][5]
                if there == created and (reason != "expire" or arena.cells[arena.expires + slot] <= now):
                    evict = self._eviction.drop_displaced if reason == "displace" else self._eviction.evict
                    evicted = evict(slot, now)
        finally:
            arena.unlock()
        if evicted:
            self._eviction.report()

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
        """Make an attempt, and if that meets damage, another one."""
        try:
            return method(self, *arguments)
        except ArenaDamaged as damage:
            self._heal(damage)
        return method(self, *arguments)

    def _heal(self, damage: ArenaDamaged) -> None:
        """
        Restore damaged options, or carry what is whole over to a new file.

        Damage is found while planning, so nothing was changed yet.
        """
        left = 0
        if not self.arena.restore_options():
            left = move(self.arena, timeout=self._timeout, clock=self._clock)
        self.arena.cells[REBUILDS] += 1
        if left or self._healing.due():
            log.error("%s: its memory was damaged (%s): %d sessions are lost", self.label, damage, left)

    def _after_dispose(self, due: Due, method: Callable[..., T], arguments: tuple[Any, ...]) -> T:
        """Carry out what was interrupted: here, if this process owns the store. A proxy asks the server."""
        return self._disposal.carry_out(due, lambda: self._healed(method, arguments), self.options, self.codec)

    @_retried
    def _trim_owner(self, owner: int) -> bool:
        """Drop some of what an owner has beyond a `max_per_owner` that was lowered; return whether there is more."""

        def displace() -> bool:
            self._eviction.expect_options()
            most = self.arena.cells[MAX_PER_OWNER]
            return bool(most) and self._eviction.displace(owner, most, self._clock())

        return self._locked(displace)

    def _batch_size(self) -> int:
        return 1 if self.arena.cells[DISPOSES] else _BATCH

    def _batches(self, items: list[T]) -> Iterator[list[T]]:
        size = self._batch_size()
        for at in range(0, len(items), size):
            begin = time.monotonic()
            yield items[at : at + size]
            if 1 < size < len(items) - at:  # single drops are a dispose apart
                let_others_in(begin)

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
    def _destroy_if_empty(self, sid: str, ignore: frozenset[str], tombstone: bool) -> bool:
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
            self._disposal.drop(slot, DESTROYED if live else EXPIRED, now if tombstone and live else None)
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
            record = unpack(body_of(entry[4]))
            if key_of_id(record.sid) == entry[3][2:4]:  # else it says of itself that it is another one
                return record
        except SerializationError:
            pass
        self.arena.cells[CORRUPT] += 1
        return None

    def _owned(self, owner: str) -> tuple[list[tuple[Entry, Record]], int]:
        """Return an owner's sessions, the most recently used first, and the epoch of the arena that they are in."""
        owner = stored_owner(owner)
        arena, digest = self.arena, digest_of(owner)
        while True:
            epoch, found = self._few_of(digest)
            slots = arena.scan_owned(digest) if found is None else found
            entries = [arena.at(slot, self._timeout) for slot in slots]
            if epoch == arena.epoch:  # else it has moved to another file meanwhile
                records = [(entry, self._record(entry)) for entry in entries if entry is not None]
                # Eight bytes of digest may be shared by two.
                return [(entry, record) for entry, record in records if record and record.owner == owner], epoch

    @_retried
    def _few_of(self, digest: int) -> tuple[int, list[int] | None]:
        """
        Return the epoch of the arena, and an owner's slots in it, the most recently used first.

        None stands for more slots than are listed in one hold of the lock.
        """
        arena = self.arena
        try:
            arena.lock(self._timeout)
            count, slots = arena.owned_slots(digest, _FEW)
            return arena.epoch, None if count > _FEW else arena.by_use(slots)[::-1]
        finally:
            arena.unlock()

    def _owned_by(self, owner: str) -> list[str]:
        now = self._clock()
        return [record.sid for entry, record in self._owned(owner)[0] if entry[2] > now]

    def _destroy_owned(self, owner: str, kept: frozenset[str]) -> int:
        self._before_write()
        owned, epoch = self._owned(owner)
        there = [_as_seen(entry) for entry, record in owned if record.sid not in kept]
        gone: list[bool] = []
        count = timeouts = 0
        for number, batch in enumerate(self._batches(there)):
            while True:
                try:
                    count += self._destroy_batch(owner, kept, batch, epoch, gone)
                    break
                except StoreTimeout:
                    timeouts += 1
                    if not number or timeouts >= _TIMEOUTS:  # else it would end half done
                        raise
            timeouts = 0
        return count + sum(gone)

    @_retried
    def _destroy_batch(self, owner: str, kept: frozenset[str], batch: list[Seen], epoch: int, gone: list[bool]) -> int:
        """
        Drop sessions of an owner, wherever they have been renamed to.

        Append to ``gone`` whether each was alive, also if the attempt ends in the middle. Return how many another
        process has dropped instead of this one.
        """
        self._before_write()
        arena, digest = self.arena, digest_of(owner)
        try:
            arena.lock(self._timeout)
            now = self._clock()
            for slot in self._still_there(batch, epoch, overwritten=True):
                if arena.cells[arena.owner + slot] == digest:
                    alive = arena.cells[arena.expires + slot] > now
                    self._disposal.drop(slot, DESTROYED if alive else EXPIRED)
                    gone.append(alive)
        finally:
            arena.unlock()
        return 0

    def _locked(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            self.arena.lock(self._timeout)
            return function(*arguments)
        finally:
            self.arena.unlock()

    def _check_size(self, payload: bytes) -> None:
        limit = self.arena.cells[MAX_SESSION]
        if len(payload) > limit:
            if self.arena.options_damaged():
                raise ArenaDamaged("an option")
            self.arena.cells[REFUSED] += 1
            raise RecordTooLarge.of(len(payload), limit)

    def _life(self, session: Mapping[Any, Any], sid: str) -> Duration:
        cells = self.arena.cells
        rule = cells[TTL]
        if rule != cells[_TTL_AGAIN] and self.arena.restore_options():
            cells[REBUILDS] += 1
            log.error("%s: an option in its memory was damaged, and is restored", self.label)
            rule = cells[TTL]
        if rule == BY_FUNCTION and not callable(self.options.ttl):
            self._catch_up()
        return life_of(self.options, rule, session, sid)


def count_unreadable(arena: Arena, key: Any, error: BaseException) -> None:
    """Count a value that cannot be read."""
    arena.cells[CORRUPT] += 1
    unreadable.report(arena.label, key, error)


def request_limit(arena: Arena) -> int:
    """Return how many bytes a request may have: as many as the largest session needs, pickled."""
    return 2 * arena.cells[MAX_SESSION] + 65536


def _as_seen(entry: Entry) -> Seen:
    slot, version, _, head, _ = entry
    return slot, version, head[2:4], head[5]


def let_others_in(since: float) -> None:
    """
    Leave the lock free for twice as long as it was held, ``since`` that time: two such callers leave a third of it.

    A process that has waited for long looks for the lock only now and then: it never meets it free if that is taken
    again at once.
    """
    time.sleep(min(2 * (time.monotonic() - since), _LONGEST_PAUSE))


def _plain(name: Any) -> Any:
    return str.__str__(name) if type(name) is not str and isinstance(name, str) else name
