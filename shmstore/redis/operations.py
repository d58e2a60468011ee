"""The operations of a store on a server: the calls for each, and their order where one call is not enough."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any, Final

from msgspec import Raw

from shmstore.codec.body import DEFAULT_CODEC, Codec, Record, log_unreadable, pack
from shmstore.codec.ids import require_key, stored_owner
from shmstore.codec.serializers import dumps
from shmstore.contract import KEEP, Data, Loaded, NewOwner, Owner
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.engine.header import NEVER
from shmstore.errors import RecordTooLarge, SerializationError, ShmStoreError, StoreTimeout, StoreUnavailable
from shmstore.options import Duration, Options
from shmstore.redis.counters import Counters
from shmstore.redis.engine import CHANGED, Changes, Engine, TooLarge, Unmergeable
from shmstore.redis.link import Link
from shmstore.redis.scripts import RENAMED
from shmstore.redis.value import FOREVER, NO_OWNER, Value, index_until, new_tag, owner_bytes
from shmstore.store.dispose import announce, refuse_inside
from shmstore.store.expiry import life_of, nanoseconds
from shmstore.system.throttle import Throttle

__all__ = ["COUNTED", "Operations"]

log = logging.getLogger("shmstore")

_ATTEMPTS: Final = 100  # to change a session that other processes change at the same time, where it is not one step
_PASSES: Final = 1000  # over an owner's sessions that other processes move at the same time
_CLOCK_TOLERANCE: Final = 2 * 10**6  # microseconds by which processes' estimates of the server's time may differ

COUNTED: Final = (
    "hits", "misses", "sets", "touches", "destroyed", "cleared", "dispose_errors", "corrupt", "refused",
)  # fmt: skip
"""The counters of a store."""


class Operations:
    """The operations on the sessions of a server, for `RedisStore`."""

    def _begin(self, link: Link, prefix: str, options: Options, rule: int) -> None:
        self._options, self._rule = options, rule
        self._codec = Codec(options.serializer, partial(_unreadable, weakref.ref(self)))
        self._label = f"store {prefix} on {link.where}"
        self._link, self._engine = link, Engine(link, prefix)
        self._dispose_lock = GreenletLock()  # held from a dispose to the removal that it announces
        self._failing = Throttle()
        self._counters = Counters(link, f"{prefix}counters", (*COUNTED, "evict"))
        self._checked_policy = False

    # -- writing ---------------------------------------------------------------------------------------------------

    def _put(self, sid: str, session: Data, ttl: Duration | None, owner: Owner, present: bool | None) -> bool:
        """Write a session if ``present`` matches whether it is stored; None: in any case. Return whether it did."""
        refuse_inside()
        key = self._engine.key(require_key(sid))
        owner = stored_owner(owner)
        payload = self._codec.payload(session)
        if ttl is None:
            ttl = self._life(self._codec.decode(payload) if isinstance(session, Raw) else session, sid)
        span = _micros(nanoseconds(ttl))
        if len(payload) > self._options.session_limit:
            raise self._too_large(len(payload))
        now = self._link.now()
        value = self._value(now, now + min(span, FOREVER), now, sid, owner, payload)
        if self._options.dispose is None or self._options.no_dispose_on_set or present is False:
            done = self._engine.put(key, value, present)
        else:
            done = self._overwrite(key, value, present)
        if done:
            self._count("sets")
            if span:
                self._limit(owner)
        return done

    def _value(self, now: int, deadline: int, created: int, sid: str, owner: Owner, payload: bytes) -> Value:
        deadline = min(deadline, FOREVER)
        indexed = 0 if owner is None else index_until(now, deadline)
        body = pack(sid, owner, self._codec.name, payload)
        return Value(new_tag(), deadline, now, indexed, created, owner_bytes(owner), body)

    def _overwrite(self, key: str, value: Value, present: bool | None) -> bool:
        """Write a session after the dispose of the stored one."""
        engine, ticket = self._engine, self._dispose_lock.ticket()
        try:
            stored = engine.read(key)
            while True:
                if stored is None:
                    if present or engine.put(key, value, False):
                        return not present
                    stored = engine.read(key)
                    continue
                ticket.acquire()
                if (found := engine.read(key)) != stored:
                    stored = found  # another process has changed it
                    continue
                self._announce(stored, "set")
                result = engine.replace(key, stored.tag, value)
                if result is True:
                    return True
                stored = result or None
        finally:
            ticket.release()

    def _change(
        self,
        old: str,
        new: str,
        changes: Mapping[Any, Any],
        delete: tuple[Any, ...],
        ttl: Duration | None,
        owner: NewOwner,
        count: str = "sets",
        tombstone: bool = False,
    ) -> bool:
        """Change a stored session, and its id if ``new`` differs; return False if it is missing, or ``new`` exists."""
        refuse_inside()
        codec, engine = self._codec, self._engine
        key, target = engine.key(require_key(old)), engine.key(require_key(new))
        if not isinstance(changes, Mapping):
            raise TypeError(f"what to set must be a mapping, not {type(changes).__name__}")
        raw = {
            name: value if type(value) is Raw else Raw(codec.encode_value(name, value))
            for name, value in changes.items()
        }
        if owner is not KEEP:
            owner = stored_owner(owner)
        span = None if ttl is None else _micros(nanoseconds(ttl))
        if target != key and self._link.cluster:
            done = self._move(key, target, new, raw, delete, span, owner, tombstone)
        else:
            done = self._change_in_place(
                key, None if target == key else (target, new.encode()), raw, delete, span, owner, tombstone
            )
        if done:
            self._count(count)
            if span != 0 and owner is not KEEP:
                self._limit(owner)
        return done

    def _change_in_place(
        self,
        key: str,
        to: tuple[str, bytes] | None,
        changes: dict[Any, Raw],
        delete: tuple[Any, ...],
        span: int | None,
        owner: NewOwner,
        tombstone: bool,
    ) -> bool:
        """
        Change a session on the server, in one step.

        The server compares keys by their bytes. That is sufficient for strings. Other keys may be equal without being
        the same (`1` and `True`, a string and a `Markup`), so a session with such keys is changed in this process, and
        written if it is still the one that was read.
        """
        codec, engine = self._codec, self._engine
        name = b"" if codec.name == DEFAULT_CODEC else codec.name.encode()
        plain = all(type(each) is str for each in (*changes, *delete))
        for _ in range(_ATTEMPTS):
            wanted = Changes(
                self._link.now(),
                span,
                name,
                self._options.session_limit,
                {dumps(each): bytes(value) for each, value in changes.items()} if plain else {},
                [encoded for each in delete if (encoded := _key(each)) is not None] if plain else [],
                owner is KEEP,
                None if owner is KEEP else owner,
            )
            if not plain:
                whole = self._merged(engine.read(key), changes, delete)
                if whole is None:
                    return False
                wanted = wanted._replace(whole=whole)
            try:
                return bool(engine.change(key, wanted, to, tombstone=tombstone))
            except TooLarge as exc:
                raise self._too_large(exc.args[0]) from None
            except Unmergeable:
                plain = False
        raise StoreTimeout(f"{self._label}: other processes kept changing this session")

    def _swap(
        self,
        sid: str,
        loaded: Loaded,
        payload: bytes,
        ttl: Duration | None,
        owner: NewOwner,
        new: str | None,
        tombstone: bool,
    ) -> bool:
        """Write a whole session if the stored one is still the one that was loaded; return whether it did."""
        key, value, now = self._engine.key(require_key(sid)), loaded.handle, self._link.now()
        if len(payload) > self._options.session_limit:
            raise self._too_large(len(payload))
        new_owner = loaded.owner if owner is KEEP else stored_owner(owner)
        keeps_owner = new_owner == loaded.owner
        span = None if ttl is None else _micros(nanoseconds(ttl))
        deadline = 0 if span is None else min(now + span, FOREVER)
        if span and new is None and keeps_owner and (value.owner == NO_OWNER or deadline <= value.indexed):
            # Nothing but the value changes.
            body = value.body[: len(value.body) - len(loaded.payload)] + payload
            done = self._engine.swap(
                key, value.tag, value._replace(tag=new_tag(), deadline=deadline, used=now, body=body)
            )
        elif span and not self._link.cluster:
            after = self._value(now, deadline, value.created, sid if new is None else new, new_owner, payload)
            to = None if new is None else self._engine.key(require_key(new))
            done = self._engine.exchange(key, value, after, to, tombstone=tombstone)
        else:
            # The server knows what may have changed since the read: the deadline, and in a Cluster the owner's index.
            name = b"" if self._codec.name == DEFAULT_CODEC else self._codec.name.encode()
            to_key = None if new is None else (self._engine.key(require_key(new)), new.encode())
            limit = self._options.session_limit
            wanted = Changes(now, span, name, limit, {}, (), keeps_owner, new_owner, (value.tag, payload))
            try:
                done = bool(self._engine.change(key, wanted, to_key, tombstone=tombstone))
            except Unmergeable:  # it has changed
                return False
        if done:
            self._count("sets")
            if span != 0 and not keeps_owner:
                self._limit(new_owner)
        return done

    def _merged(
        self, value: Value | None, changes: dict[Any, Raw], delete: tuple[Any, ...]
    ) -> tuple[bytes, bytes] | None:
        """Return the tag of a session and its payload with changes; None if it is not stored or unreadable."""
        record = None if value is None else self._record(value)
        if value is None or record is None or record.codec_name != self._codec.name:
            return None
        try:
            return value.tag, self._codec.merge(record.payload, changes, delete)
        except SerializationError:
            return None

    def _move(
        self,
        key: str,
        target: str,
        new: str,
        changes: dict[Any, Raw],
        delete: tuple[Any, ...],
        span: int | None,
        owner: NewOwner,
        tombstone: bool,
    ) -> bool:
        """
        Move a session between two servers, which is not atomic: reserve the new key, remove the old one, write.

        A process that dies in between leaves a reservation, which expires; at worst the session is lost. It is never
        stored under both keys.
        """
        engine, value = self._engine, self._engine.read(key)
        for _ in range(_ATTEMPTS):
            moved = None if value is None else self._moved(value, new, changes, delete, span, owner)
            if value is None or moved is None or (tag := engine.reserve(target, key)) is None:
                return False
            dropped: object = CHANGED
            try:
                engine.index_before_write(target, moved)
                dropped = engine.drop(key, value.tag, tombstone=tombstone, why=RENAMED)
            finally:
                if dropped is not True:
                    with suppress(ShmStoreError):  # the reservation then expires by itself
                        engine.release(target, tag)
            if dropped is True:
                return engine.swap(target, tag, moved)  # False: the reservation is lost
            value = engine.read(key)
        raise StoreTimeout(f"{self._label}: other processes kept changing this session")

    def _moved(
        self,
        value: Value,
        new: str,
        changes: dict[Any, Raw],
        delete: tuple[Any, ...],
        span: int | None,
        owner: NewOwner,
    ) -> Value | None:
        """Return the session for its new id; None if it is another serializer's, or damaged."""
        record, merged = self._record(value), self._merged(value, changes, delete)
        if record is None or merged is None:
            return None
        payload = merged[1]
        if len(payload) > self._options.session_limit:
            raise self._too_large(len(payload))
        now = self._link.now()
        deadline = value.deadline if span is None else now + span
        return self._value(now, deadline, value.created, new, record.owner if owner is KEEP else owner, payload)

    def _retime(self, key: str, ttl: Duration) -> bool:
        done = self._engine.touch(key, self._link.now(), _micros(nanoseconds(ttl)))
        if done:
            self._count("touches")
        return done

    # -- removing --------------------------------------------------------------------------------------------------

    def _drop(
        self, key: str, reason: str, *, tombstone: bool = False, only: Callable[[Value], bool] | None = None
    ) -> bool:
        """
        Remove a session, after its dispose.

        Args:
            key: The key of the session.
            reason: The reason, for the dispose and the counters.
            tombstone: Whether to leave a tombstone for its id.
            only: Returns whether to remove the session in its current state; None: remove it in any case.
        """
        engine, disposes, tag = self._engine, self._options.dispose is not None, b""
        dropped: object = CHANGED
        ticket = self._dispose_lock.ticket()
        try:
            while dropped == CHANGED:
                if only is not None or disposes:
                    value = engine.read(key)
                    if value is None or (only is not None and not only(value)):
                        return False
                    if disposes:
                        ticket.acquire()
                        if engine.read(key) != value:
                            continue  # another process has changed it
                    tag = value.tag
                    self._announce(value, reason)
                dropped = engine.drop(key, tag, tombstone=tombstone)
        finally:
            ticket.release()
        if dropped is None:
            return False
        self._count({"destroy": "destroyed", "clear": "cleared"}.get(reason, reason))
        return True

    def _clear_page(self, keys: list[str], begun: int) -> bool:
        """Remove the sessions of a page that existed at a time; return whether there was one."""

        def is_old(value: Value) -> bool:
            return value.created <= begun

        old = {
            key: value
            for key, value in zip(keys, self._engine.heads(keys), strict=True)
            if value is not None and is_old(value)
        }
        if self._options.dispose is not None:
            return sum(self._drop(key, "clear", only=is_old) for key in old) > 0
        dropped = self._engine.drop_all(list(old), [value.tag for value in old.values()])
        self._count("cleared", dropped.count(True))
        return True in dropped or CHANGED in dropped

    def _destroy_owned(self, owner: str, kept: frozenset[str]) -> int:
        refuse_inside()
        owner = stored_owner(owner)
        engine = self._engine
        if not self._link.cluster and self._options.dispose is None:
            keep = (key for sid in kept if (key := engine.key_of(sid)) is not None)
            count = engine.drop_owned(owner, keep)
            self._count("destroyed", count)
            return count

        # Only sessions that existed at the call, so that later logins cannot keep it from ending. The estimates of the
        # time differ between processes; the tolerance makes sure that no session is spared.
        begun = self._link.now(fresh=True) + _CLOCK_TOLERANCE

        def is_theirs(value: Value) -> bool:
            record = self._record(value) if value.created <= begun else None
            return record is not None and record.owner == owner and record.sid not in kept

        # A migrating session may appear under both keys; it is counted once.
        ended, known, keys, all_keys, quiet = set[str](), set[str](), engine.indexed(owner), True, False
        for _ in range(_PASSES):
            # In this order: a session that is moving at the first call is stopped, or has arrived at the second.
            stopped = engine.cancel_moves(keys)
            values = engine.heads(keys)
            theirs = [key for key, value in zip(keys, values, strict=True) if value is not None and is_theirs(value)]
            ended.update(stopped, (key for key in theirs if self._drop(key, "destroy", only=is_theirs)))
            # A key that was just listed, and has no session: the session has ended or moved on.
            # A new key without a session: that has just ended, or moved on.
            left = any(value is None and key not in known for key, value in zip(keys, values, strict=True))
            known.update(keys)
            # A session that was renamed meanwhile is under a key that was added to the index first. The next pass then
            # checks only such keys; checking all keys each time could not catch up with a session that keeps moving.
            indexed = engine.indexed(owner)
            fresh = [key for key in indexed if key not in known]
            # The loop ends when a pass over all keys has found no session, and a pass over the keys added since has not
            # either.
            found = bool(theirs or stopped or left)
            quiet = not found and (all_keys or quiet)
            if quiet and not (all_keys and fresh):
                return len(ended)
            all_keys = not (fresh and (found or quiet))
            keys = indexed if all_keys else fresh
        raise StoreTimeout(f"{self._label}: the sessions of this owner kept moving to other ids")

    def _check_policy(self) -> None:
        """At the first use of an owner, warn if the server may evict the index of an owner's sessions."""
        if self._checked_policy:
            return
        self._checked_policy = True
        with suppress(StoreUnavailable):  # this user may not be allowed to ask
            for server in self._link.info():
                policy = server.get("maxmemory_policy", "")
                if policy.startswith("allkeys") and int(server.get("maxmemory", 0)):
                    log.warning(
                        "%s: the server's maxmemory-policy is %s: it may evict the index of an owner's sessions, and "
                        "destroy_owned, owned_by and max_per_owner then miss some; set it to volatile-lru",
                        self._label, policy,
                    )  # fmt: skip
                    return

    def _limit(self, owner: str | None) -> None:
        """Drop the sessions beyond `max_per_owner` of an owner who has just got another one."""
        most = self._options.max_per_owner
        if owner is not None:
            self._check_policy()
        if most is None or owner is None:
            return

        def is_theirs(value: Value) -> bool:
            record = self._record(value)
            return record is not None and record.owner == owner

        # One order for all processes: after two logins at once both drop the same session, not each the other's.
        for each, _ in self._owned(owner)[most:]:
            self._drop(each, "evict", only=is_theirs)

    def _announce(self, value: Value, reason: str) -> None:
        record, dispose = self._record(value), self._options.dispose
        if dispose is None or record is None:
            return
        if announce(dispose, record, self._codec, reason, self._label, self._failing):
            self._count("dispose_errors")

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self, sid: object) -> Value | None:
        key = self._engine.key_of(sid)
        if key is None:
            self._link.check()
            return None
        return self._engine.read(key)

    def _record(self, value: Value) -> Record | None:
        try:
            return value.record()
        except SerializationError:
            self._count("corrupt")
            return None

    def _heads(self) -> Iterator[Value]:
        for page in self._engine.pages():
            yield from (value for value in self._engine.heads(page) if value is not None)

    def _owned(self, owner: str) -> list[tuple[str, str]]:
        """Return key and id of an owner's sessions, the most recently written or touched first."""
        owner = stored_owner(owner)
        keys = self._engine.indexed(owner)
        found = []
        for key, value in zip(keys, self._engine.heads(keys), strict=True):
            record = None if value is None else self._record(value)
            if value is not None and record is not None and record.owner == owner:
                found.append((value.used, key, record.sid))
        found.sort(reverse=True)
        return [(key, sid) for _, key, sid in found]

    # -- shared helpers --------------------------------------------------------------------------------------------

    def _life(self, session: Mapping[Any, Any], sid: str) -> Duration:
        return life_of(self._options, self._rule, session, sid)

    def _too_large(self, size: int) -> RecordTooLarge:
        self._count("refused")
        return RecordTooLarge.of(size, self._options.session_limit)

    def _count(self, name: str, number: int = 1) -> None:
        counters = self._counters
        counters.counted[name] += number  # without a call or a jump, so no other thread or signal handler interrupts
        if monotonic() >= counters.due:
            counters.send_due()


def _micros(span: int) -> int:
    """Return a duration in nanoseconds as microseconds, rounded up."""
    return FOREVER if span >= NEVER else -(-span // 1000)


def _key(name: Any) -> bytes | None:
    """Return the encoded form of a session's key, None if it cannot be encoded."""
    try:
        return dumps(name)
    except SerializationError:
        return None


def _unreadable(store: weakref.ref[Operations], key: Any, error: BaseException) -> None:
    """Count a value that cannot be read."""
    if (counting := store()) is not None:
        counting._count("corrupt")
        log_unreadable(counting._label, key, error)
