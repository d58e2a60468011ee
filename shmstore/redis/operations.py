"""What a store on a server does with sessions: by which calls, and in which order where one call is not enough."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from msgspec import Raw

from shmstore.codec.body import DEFAULT_CODEC, Codec, Record, log_unreadable, pack
from shmstore.codec.ids import require_key, stored_owner
from shmstore.codec.serializers import dumps
from shmstore.contract import KEEP, NewOwner, Owner
from shmstore.engine.header import NEVER
from shmstore.errors import RecordTooLarge, SerializationError, ShmStoreError, StoreTimeout, StoreUnavailable
from shmstore.options import Duration, Options
from shmstore.redis.engine import CHANGED, Changes, Engine, Odd, TooLarge
from shmstore.redis.link import Link
from shmstore.redis.scripts import RENAMED
from shmstore.redis.value import FOREVER, Value, known_until, new_tag, owner_bytes
from shmstore.store.dispose import announce, refuse_inside
from shmstore.store.expiry import life_of, nanoseconds
from shmstore.system.greenlet_lock import GreenletLock
from shmstore.system.throttle import Throttle

__all__ = ["COUNTED", "Operations"]

log = logging.getLogger("shmstore")

_ATTEMPTS: Final = 100  # to change a session that others write at the same time, where it is not one step
_LOOKS: Final = 1000  # at an owner's sessions, which others move at the same time
_CLOCKS_DIFFER: Final = 2 * 10**6  # microseconds: the time of the server, as processes estimate it

COUNTED: Final = (
    "hits", "misses", "sets", "touches", "destroyed", "cleared", "dispose_errors", "corrupt", "refused",
)  # fmt: skip
"""What a store counts."""


class Operations:
    """
    The operations on the sessions of a server, as `RedisStore` needs them.

    Attributes:
        options: The options of the store.
        codec: How its sessions are written.
        label: What the log calls the store.
    """

    options: Options
    codec: Codec
    label: str

    def _begin(self, link: Link, prefix: str, options: Options, rule: int) -> None:
        self.options, self._rule = options, rule
        self.codec = Codec(options.serializer, partial(_unreadable, weakref.ref(self)))
        self.label = f"store {prefix} on {link.where}"
        self._link, self._engine = link, Engine(link, prefix)
        self._one_at_a_time = GreenletLock()  # held from a dispose to the drop that it announces
        self._failing = Throttle()
        self._counts = dict.fromkeys((*COUNTED, "evict"), 0)
        self._owners_met = False

    # -- writing ---------------------------------------------------------------------------------------------------

    def _put(
        self, sid: str, session: Mapping[Any, Any], ttl: Duration | None, owner: Owner, present: bool | None
    ) -> bool:
        """Write a whole session; ``present`` says whether it must be there already, None that it does not matter."""
        refuse_inside()
        key = self._engine.key(require_key(sid))
        if not isinstance(session, Mapping):
            raise TypeError(f"a session must be a mapping, not {type(session).__name__}")
        owner = stored_owner(owner)
        span = _micros(nanoseconds(self._life(session, sid) if ttl is None else ttl))
        payload = self.codec.encode(session)
        if len(payload) > self.options.session_limit:
            raise self._too_large(len(payload))
        now = self._link.now()
        value = self._value(now, now + min(span, FOREVER), now, sid, owner, payload)
        if self.options.dispose is None or self.options.no_dispose_on_set or present is False:
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
        indexed = 0 if owner is None else known_until(now, deadline)
        body = pack(sid, owner, self.codec.name, payload)
        return Value(new_tag(), deadline, now, indexed, created, owner_bytes(owner), body)

    def _overwrite(self, key: str, value: Value, present: bool | None) -> bool:
        """Write a session after the dispose of the one that is there."""
        engine, ticket = self._engine, self._one_at_a_time.ticket()
        try:
            there = engine.read(key)
            while True:
                if there is None:
                    if present or engine.put(key, value, False):
                        return not present
                    there = engine.read(key)
                    continue
                ticket.acquire()
                if (found := engine.read(key)) != there:
                    there = found  # another has been faster
                    continue
                self._announce(there, "set")
                result = engine.replace(key, there.tag, value)
                if result is True:
                    return True
                there = result or None
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
        """Change a stored session, and its id if ``new`` is another one; False: it is not there, or ``new`` is."""
        refuse_inside()
        codec, engine = self.codec, self._engine
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
        Let the server change a session, in one step.

        Keys are compared there by their bytes. That is enough for strings; others may be equal without being the same
        (`1` and `True`, a string and a `Markup`), so a session with such keys is changed here, and written if it is
        still the one that was read.
        """
        codec, engine = self.codec, self._engine
        name = b"" if codec.name == DEFAULT_CODEC else codec.name.encode()
        plain = all(type(each) is str for each in (*changes, *delete))
        for _ in range(_ATTEMPTS):
            wanted = Changes(
                self._link.now(),
                span,
                name,
                self.options.session_limit,
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
            except Odd:
                plain = False
        raise StoreTimeout(f"{self.label}: others have changed this session again and again for too long")

    def _merged(
        self, value: Value | None, changes: dict[Any, Raw], delete: tuple[Any, ...]
    ) -> tuple[bytes, bytes] | None:
        """Return the tag of a session, and its payload with changes; None if there is none that can be read."""
        record = None if value is None else self._record(value)
        if value is None or record is None or record.codec_name != self.codec.name:
            return None
        try:
            return value.tag, self.codec.merge(record.payload, changes, delete)
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
        Move a session between two servers, which no step can do at once: take the new key, end the old, write.

        Who dies in between leaves a key that expires, and at worst has lost the session: it is never under both.
        """
        engine, value = self._engine, self._engine.read(key)
        for _ in range(_ATTEMPTS):
            moved = None if value is None else self._moved(value, new, changes, delete, span, owner)
            if value is None or moved is None or (tag := engine.reserve(target, key)) is None:
                return False
            dropped: object = CHANGED
            try:
                engine.expect(target, moved)
                dropped = engine.drop(key, value.tag, tombstone=tombstone, why=RENAMED)
            finally:
                if dropped is not True:
                    with suppress(ShmStoreError):  # then it goes by itself
                        engine.release(target, tag)
            if dropped is True:
                return engine.arrive(target, tag, moved)
            value = engine.read(key)
        raise StoreTimeout(f"{self.label}: others have changed this session again and again for too long")

    def _moved(
        self,
        value: Value,
        new: str,
        changes: dict[Any, Raw],
        delete: tuple[Any, ...],
        span: int | None,
        owner: NewOwner,
    ) -> Value | None:
        """Return a session as it is to be under its new id; None if it is another serializer's, or damaged."""
        record, merged = self._record(value), self._merged(value, changes, delete)
        if record is None or merged is None:
            return None
        payload = merged[1]
        if len(payload) > self.options.session_limit:
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
            key: Of the session.
            reason: For the dispose, and the figures.
            tombstone: Whether it leaves one under its id.
            only: Whether it is to go, as it is now; None: in any case.
        """
        engine, disposes, tag = self._engine, self.options.dispose is not None, b""
        dropped: object = CHANGED
        ticket = self._one_at_a_time.ticket()
        try:
            while dropped == CHANGED:
                if only is not None or disposes:
                    value = engine.read(key)
                    if value is None or (only is not None and not only(value)):
                        return False
                    if disposes:
                        ticket.acquire()
                        if engine.read(key) != value:
                            continue  # another has been faster
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
        """Remove those sessions that were there at a time; return whether there was one."""

        def is_old(value: Value) -> bool:
            return value.created <= begun

        old = {
            key: value
            for key, value in zip(keys, self._engine.heads(keys), strict=True)
            if value is not None and is_old(value)
        }
        if self.options.dispose is not None:
            return sum(self._drop(key, "clear", only=is_old) for key in old) > 0
        dropped = self._engine.drop_all(list(old), [value.tag for value in old.values()])
        self._count("cleared", dropped.count(True))
        return True in dropped or CHANGED in dropped

    def _destroy_owned(self, owner: str, kept: frozenset[str]) -> int:
        refuse_inside()
        owner = stored_owner(owner)
        engine = self._engine
        if not self._link.cluster and self.options.dispose is None:
            keep = (key for sid in kept if (key := engine.key_of(sid)) is not None)
            count = engine.drop_owned(owner, keep)
            self._count("destroyed", count)
            return count

        # Sessions that were there at the call: later logins must not keep it from ending. What processes take for the
        # time differs a little, and no session must be spared for that.
        begun = self._link.now(fresh=True) + _CLOCKS_DIFFER

        def is_theirs(value: Value) -> bool:
            record = self._record(value) if value.created <= begun else None
            return record is not None and record.owner == owner and record.sid not in kept

        # A session that is stopped on its way to another key may be met where it comes from too: it is counted once.
        ended, known, keys, whole, quiet = set[str](), set[str](), engine.indexed(owner), True, False
        for _ in range(_LOOKS):
            # In this order: a session on its way at the first look is stopped, or has arrived at the second.
            arriving = engine.intercept(keys)
            values = engine.heads(keys)
            theirs = [key for key, value in zip(keys, values, strict=True) if value is not None and is_theirs(value)]
            ended.update(arriving, (key for key in theirs if self._drop(key, "destroy", only=is_theirs)))
            # A new key without a session: that has just ended, or moved on.
            left = any(value is None and key not in known for key, value in zip(keys, values, strict=True))
            known.update(keys)
            # A session that was renamed meanwhile is under a key that the index was told first. Then only those keys
            # are looked at next: looking at all of them each time would fall behind a session that moves on and on.
            indexed = engine.indexed(owner)
            fresh = [key for key in indexed if key not in known]
            # It ends when a look at all keys has met none, nor one at the keys that came meanwhile.
            met = bool(theirs or arriving or left)
            quiet = not met and (whole or quiet)
            if quiet and not (whole and fresh):
                return len(ended)
            whole = not (fresh and (met or quiet))
            keys = indexed if whole else fresh
        raise StoreTimeout(f"{self.label}: the sessions of this owner have moved again and again for too long")

    def _meet_owner(self) -> None:
        """Warn, after the first use of an owner, of a server that may forget which sessions are an owner's."""
        if self._owners_met:
            return
        self._owners_met = True
        with suppress(StoreUnavailable):  # a user may be forbidden to ask
            for server in self._link.info():
                policy = server.get("maxmemory_policy", "")
                if policy.startswith("allkeys") and int(server.get("maxmemory", 0)):
                    log.warning(
                        "%s: the server's maxmemory-policy is %s: it may evict the index of an owner's sessions, and "
                        "destroy_owned, owned_by and max_per_owner then miss some; set it to volatile-lru",
                        self.label, policy,
                    )  # fmt: skip
                    return

    def _limit(self, owner: str | None) -> None:
        """Drop what an owner has beyond `max_per_owner`, who has just got another session."""
        most = self.options.max_per_owner
        if owner is not None:
            self._meet_owner()
        if most is None or owner is None:
            return

        def is_theirs(value: Value) -> bool:
            record = self._record(value)
            return record is not None and record.owner == owner

        # One order for all: of two who log in at once, both drop the same one, and not each that of the other.
        for each, _ in self._owned(owner)[most:]:
            self._drop(each, "evict", only=is_theirs)

    def _announce(self, value: Value, reason: str) -> None:
        record, dispose = self._record(value), self.options.dispose
        if dispose is None or record is None:
            return
        if announce(dispose, record, self.codec, reason, self.label, self._failing):
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

    # -- what they share -------------------------------------------------------------------------------------------

    def _life(self, session: Mapping[Any, Any], sid: str) -> Duration:
        return life_of(self.options, self._rule, session, sid)

    def _too_large(self, size: int) -> RecordTooLarge:
        self._count("refused")
        return RecordTooLarge.of(size, self.options.session_limit)

    def _count(self, name: str, number: int = 1) -> None:
        self._counts[name] += number  # no call and no jump back: no other thread and no signal handler runs in between


def _micros(span: int) -> int:
    """Return a life in nanoseconds as a server counts it, no part of one lost."""
    return FOREVER if span >= NEVER else -(-span // 1000)


def _key(name: Any) -> bytes | None:
    """Return a key of a session as it stands there, None if no session can have it."""
    try:
        return dumps(name)
    except SerializationError:
        return None


def _unreadable(store: weakref.ref[Operations], key: Any, error: BaseException) -> None:
    """Count a value that cannot be read."""
    if (counting := store()) is not None:
        counting._count("corrupt")
        log_unreadable(counting.label, key, error)
