"""The store on a Redis or Valkey server: the contract of `shmstore.store`, with the server as its engine."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from logging import DEBUG
from typing import Any, Final, Self

from msgspec import Raw
from redis import RedisCluster

from shmstore.capabilities import Capability
from shmstore.cells import BY_FUNCTION, NEVER, NO_TTL
from shmstore.dispose import announce, refuse_inside
from shmstore.errors import ConfigError, RecordTooLarge, SerializationError, StoreTimeout
from shmstore.gate import Gate
from shmstore.interval import Interval
from shmstore.life import life_of, nanoseconds
from shmstore.names import digest_of, key_to_write
from shmstore.operations import KEEP, NewOwner, Owner
from shmstore.options import Duration, Options, seconds
from shmstore.record import Codec, content_of, pack, payload_of
from shmstore.redis import client as clients
from shmstore.redis import scripts
from shmstore.redis.engine import CHANGED, Engine
from shmstore.redis.link import Link
from shmstore.redis.turns import Turns
from shmstore.redis.value import FOREVER, Value, new_tag, parse
from shmstore.seldom import Seldom
from shmstore.stats import Loaded, Stats
from shmstore.trace import trace, traced

__all__ = ["RedisStore"]

log = logging.getLogger("shmstore")
tracing: Final = log.isEnabledFor

_TIDY_EVERY: Final = 3600.0  # seconds, unless `check_period` is given
_SECOND: Final = 10**6  # microseconds

_stores: weakref.WeakSet[RedisStore] = weakref.WeakSet()

# What can only be asked of a store that decides itself who goes, and what to do instead.
_REFUSED: Final = {
    "max": "limit the server's maxmemory, with maxmemory-policy volatile-lru",
    "length": "limit the server's maxmemory, with maxmemory-policy volatile-lru",
    "stale": "an expired session is gone there at once",
    "snapshot": "let the server save what it holds (save, appendonly)",
    "clock": "its deadlines go by the server's clock",
}


class RedisStore:
    """
    Sessions by id on a Redis or Valkey server (6.2 or newer), for processes of any number of hosts.

    The methods, and what they raise, are those of `shmstore.Store`; where the server makes a difference, the method
    says so. A call is one round trip, or as many as its method says. It waits ``lock_timeout`` for an answer at most,
    and then is a `StoreTimeout`; it is repeated only if its connection broke, and never does something twice.

    It can be made before a fork, and be shared by threads and greenlets. It is a context manager that closes it.

    Args:
        client: A client of redis-py: ``Redis``, also one of ``Sentinel``, or ``RedisCluster``. It returns bytes
            (``decode_responses=False``), and how long a call takes is its ``socket_timeout``.
        prefix: What all keys of this store begin with.
        options: Those of `Options`. ``max``, ``length``, ``stale``, ``snapshot``, ``clock`` and ``persist=False`` are
            refused, for they are the server's business; ``memory``, ``recency``, ``directory`` and ``snapshot_period``
            mean nothing. ``dispose`` is called, in the process that makes the call, for sessions that a call removes or
            overwrites; what expires there or is evicted there goes without. ``max_per_owner`` is kept at each login.

    Attributes:
        options: The options of the store.
        codec: How its sessions are written.

    Raises:
        ConfigError: An option is unknown, wrong or refused.
    """

    def __init__(self, client: Any, /, *, prefix: str = clients.PREFIX, **options: Any) -> None:
        if client.get_connection_kwargs().get("decode_responses"):
            raise ConfigError("RedisStore needs a client that returns bytes: leave out decode_responses=True")
        cluster = isinstance(client, RedisCluster)
        self._begin(Link(lambda: client, clients.where(client), cluster=cluster), prefix, options)

    @classmethod
    def from_url(cls, url: str, /, **options: Any) -> Self:
        """
        Return the store that a URL names; see `shmstore.redis.client` for what it may look like. Connects when used.

        Args:
            url: Such as ``redis://localhost:6379/0``.
            options: As above; ``lock_timeout`` is how long a call may take.

        Raises:
            ConfigError: The URL or an option is wrong.
        """
        store = cls.__new__(cls)
        timeout = seconds(Options.of(**options).lock_timeout)
        address = clients.Address.of(url)
        link = Link(partial(address.open, timeout), address.where, cluster=address.cluster)
        store._begin(link, address.prefix, options)
        return store

    def _begin(self, link: Link, prefix: str, options: Mapping[str, Any]) -> None:
        self.options = Options.of(**options)
        for name, instead in _REFUSED.items():
            if name in options and options[name] not in (None, False):
                raise ConfigError(f"{name} is not for a store on Redis: {instead}")
        if not self.options.persist:
            raise ConfigError("persist=False is not for a store on Redis: use a prefix of its own, and clear()")
        clients.check_prefix(prefix)
        self.codec = Codec(self.options.serializer)
        self.label = f"store {prefix} on {link.where}"
        self._link, self._engine = link, Engine(link, prefix)
        self._turns = Turns(link)
        ttl = self.options.ttl
        self._rule = NO_TTL if ttl is None else BY_FUNCTION if callable(ttl) else nanoseconds(ttl)
        self._patience = seconds(self.options.lock_timeout)
        self._loaded: tuple[str, str, Value] | None = None
        self._one_at_a_time = threading.RLock()  # held from a dispose to the drop that it announces
        self._failing = Seldom()
        self._counts: Counter[str] = Counter()
        self._counting = Gate()
        self._interval = Interval(self)
        _stores.add(self)
        self.start_interval()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can do that not every store can."""
        atomic = frozenset[Capability]() if self._link.cluster else frozenset({Capability.ATOMIC_RENAME})
        return atomic | {Capability.SEVERAL_HOSTS}

    # -- one session -----------------------------------------------------------------------------------------------

    def get(self, sid: str) -> dict[Any, Any] | None:
        """See `Store.get`. That it counts as use is known to the server, which evicts by it."""
        value = self._read(sid)
        session = None if value is None else self._decode(value, counted=True)
        self._count("misses" if session is None else "hits")
        if tracing(DEBUG):
            trace("get", (sid,), session)
        return session

    def peek(self, sid: str) -> dict[Any, Any] | None:
        """See `Store.peek`. For the server it is a use."""
        value = self._read(sid)
        session = None if value is None else self._decode(value, counted=False)
        if tracing(DEBUG):
            trace("peek", (sid,), session)
        return session

    def load(self, sid: str) -> Loaded | None:
        """See `Store.load`. ``idle`` is counted from the last write or touch."""
        key = self._engine.key_of(sid)
        value = None if key is None else self._engine.read(key)
        loaded = None
        if key is not None and value is not None:
            try:
                payload, owner = content_of(value.body, self.codec.name)
            except SerializationError:
                pass
            else:
                now = self._link.now()
                remaining = math.inf if value.deadline >= FOREVER else max(0, value.deadline - now) / _SECOND
                ages = max(0, now - value.created) / _SECOND, max(0, now - value.used) / _SECOND
                loaded = Loaded(payload, *ages, remaining, owner)
                self._loaded = sid, key, value
        self._count("misses" if loaded is None else "hits")
        if tracing(DEBUG):
            trace("load", (sid,), loaded)
        return loaded

    @traced
    def set(self, sid: str, session: Mapping[Any, Any], ttl: Duration | None = None, owner: Owner = None) -> None:
        """See `Store.set`. Another round trip with an owner, and one with a ``dispose``."""
        self._put(sid, session, ttl, owner, None)

    @traced
    def add(self, sid: str, session: Mapping[Any, Any], ttl: Duration | None = None, owner: Owner = None) -> bool:
        """See `Store.add`. Another round trip with an owner."""
        return self._put(sid, session, ttl, owner, False)

    @traced
    def replace(self, sid: str, session: Mapping[Any, Any], ttl: Duration | None = None, owner: Owner = None) -> bool:
        """See `Store.replace`. Another round trip with an owner, and one with a ``dispose``."""
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
        See `Store.update`.

        The session is merged here and written if it is still as it was read. So it is one round trip after a `load` of
        the same session, else two; one more if another was faster, and if the owner changes.
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
    ) -> bool:
        """
        See `Store.rename`. As many round trips as `update`.

        In a Cluster the ids are on different servers: the new one is taken, the old session removed, the new one
        written. If the process, or a server, dies between the last two, the session is lost; it is never there twice.
        """
        key_to_write(old)
        return old != new and self._change(old, new, set, tuple(delete), ttl, owner)

    @traced
    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        """See `Store.touch`. One round trip with ``ttl`` and without a cookie, else as many as `update`."""
        key = self._engine.key_of(sid)
        if key is None:
            return False
        if session is not None and not isinstance(session, Mapping):
            raise TypeError(f"a session must be a mapping, not {type(session).__name__}")
        refuse_inside()
        if session is not None and "cookie" in session:
            if ttl is None:
                ttl = self._life(session, sid)
            return self._change(sid, sid, {"cookie": session["cookie"]}, (), ttl, KEEP, "touches")
        if ttl is None:
            if session is None and self._rule >= BY_FUNCTION:
                session = self.peek(sid)
                if session is None:
                    return False
            ttl = self._life({} if session is None else session, sid)
        now = self._link.now()
        span = nanoseconds(ttl)
        deadline = _deadline(now, span)
        indexed = self._engine.touch(key, deadline, now, _life(span))
        if indexed is None:
            return False
        if span and 0 < indexed < deadline:  # its owner's index would forget it too soon
            return self._change(sid, sid, {}, (), ttl, KEEP, "touches")
        self._count("touches")
        return True

    @traced
    def destroy(self, sid: str | Iterable[str]) -> int:
        """See `Store.destroy`. A round trip for each id, two if it has an owner or there is a ``dispose``."""
        refuse_inside()
        if isinstance(sid, str):
            return self._destroy(sid)
        return sum(self._destroy(each) for each in sid) if isinstance(sid, Iterable) else 0

    def _destroy(self, sid: str) -> int:
        key = self._engine.key_of(sid)
        return 0 if key is None else int(self._drop(key, "destroy", remember=True))

    @traced
    def destroy_if_empty(self, sid: str, ignore: Iterable[str] = ()) -> bool:
        """See `Store.destroy_if_empty`. Two round trips."""
        refuse_inside()
        key, ignored = self._engine.key_of(sid), frozenset(ignore)

        def is_empty(value: Value) -> bool:
            try:
                return not frozenset(self.codec.fields(payload_of(value.body, self.codec.name))) - ignored
            except SerializationError:
                return False

        return key is not None and self._drop(key, "destroy", remember=True, only=is_empty)

    @traced
    def gone(self, sid: str) -> bool:
        """See `Store.gone`."""
        key = self._engine.key_of(sid)
        if key is None:
            return False
        return self._engine.gone(key)

    @contextmanager
    def lock(self, sid: str, timeout: Duration = 5.0) -> Iterator[None]:
        """
        See `Store.lock`.

        If its holder dies it is free after 9 seconds at most. A holder that stands still for longer than that (a
        stopped process) has lost it, and does not know: what must not be written twice is checked when it is written.
        """
        key = self._engine.key(key_to_write(sid))
        with self._turns.held(f"{key}lock", seconds(timeout, "timeout")):
            if tracing(DEBUG):
                trace("lock", (sid,), None)
            yield

    @traced
    def __contains__(self, sid: object) -> bool:
        """See `Store.__contains__`."""
        value = self._read(sid)
        try:
            return value is not None and bool(payload_of(value.body, self.codec.name))
        except SerializationError:
            return False

    # -- all sessions ----------------------------------------------------------------------------------------------

    @traced
    def ids(self) -> list[str]:
        """
        See `Store.ids`. The most recently written or touched first; reads change no order.

        It looks at all keys of the server, some hundreds in a round trip, and so do `all`, `length`, `clear` and
        `stats`. Expired sessions are not among them.
        """
        found = [(value.used, record.sid) for value in self._heads() if (record := self._record(value)) is not None]
        return [sid for _, sid in sorted(found, key=lambda each: each[0], reverse=True)]

    @traced
    def all(self) -> dict[str, dict[Any, Any]]:
        """See `Store.all`. In the order of `ids`."""
        found = []
        for page in self._engine.pages():
            for value in self._engine.read_all(page):
                record = None if value is None else self._record(value)
                if value is not None and record is not None and record.codec_name == self.codec.name:
                    try:
                        found.append((value.used, record.sid, self.codec.decode(record.payload)))
                    except SerializationError:
                        self._count("corrupt")
        return {sid: session for _, sid, session in sorted(found, key=lambda each: each[0], reverse=True)}

    @traced
    def length(self, live: bool = False) -> int:
        """See `Store.length`. With and without ``live`` the same."""
        return sum(map(len, self._engine.pages()))

    def __len__(self) -> int:
        return self.length()

    def __bool__(self) -> bool:
        """A store is true, also when it is empty: ``if store`` asks whether there is one."""
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids())

    @traced
    def clear(self) -> None:
        """See `Store.clear`. Looks again until there is none left that was there at the call."""
        refuse_inside()
        begun = self._link.now()
        dropped = True
        while dropped:  # one that was renamed meanwhile may have been passed by
            dropped = False
            for page in self._engine.pages():
                for key, value in zip(page, self._engine.heads(page), strict=True):
                    if value is not None and value.created <= begun:
                        dropped |= self._drop(key, "clear", only=lambda value: value.created <= begun)

    @traced
    def prune(self) -> int:
        """
        Tidy up the indexes of owners, and return 0: the server itself removes sessions when they expire.

        What an index still names after that has been harmless; it just takes room.
        """
        refuse_inside()
        self._engine.tidy(self._link.now())
        return 0

    @traced
    def start_interval(self, period: Duration | None = None) -> None:
        """See `Store.start_interval`. Without a ``check_period`` it is an hour: there is little to do."""
        self._link.check()
        refuse_inside()
        chosen = self.options.check_period if period is None else period
        if period is None and chosen and "check_period" not in self.options.given:
            chosen = _TIDY_EVERY
        pause = 0.0 if chosen is None else seconds(chosen, "period")
        if pause < 0:
            raise ValueError(f"period must be at least 0 seconds, not {period!r}")
        self._interval.start(pause)

    @traced
    def stop_interval(self) -> None:
        """See `Store.stop_interval`."""
        refuse_inside()
        self._interval.stop()

    # -- owners ----------------------------------------------------------------------------------------------------

    @traced
    def owned_by(self, owner: str) -> list[str]:
        """See `Store.owned_by`. The most recently written or touched first. Two round trips."""
        return [record for _, _, record in self._owned(owner)]

    @traced
    def destroy_owned(self, owner: str, keep: Iterable[str] = ()) -> int:
        """
        See `Store.destroy_owned`.

        Not one step: it looks again until there is none left, so one that is renamed meanwhile goes as well.
        """
        refuse_inside()
        kept = frozenset([keep] if isinstance(keep, str) else keep)

        def is_theirs(value: Value) -> bool:
            record = self._record(value)
            return record is not None and record.owner == owner and record.sid not in kept

        count, dropped = 0, 1
        while dropped:
            keys = [key for key, _, sid in self._owned(owner) if sid not in kept]
            dropped = sum(self._drop(key, "destroy", only=is_theirs) for key in keys)
            count += dropped
        return count

    # -- the store itself ------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """
        Return what the store holds, and what this object has done since it was made.

        ``bytes``, ``memory`` (0: no limit), ``expired``, ``evicted``, ``server_pid`` and ``server_uptime`` are those of
        the whole server since that began, whatever else it holds; of a Cluster the sums, and the pid of one. It looks
        at all keys, as `ids` does.
        """
        sessions = owned = 0
        for value in self._heads():
            sessions += 1
            owned += value.indexed > 0
        servers = self._link.info()

        def total(name: str) -> int:
            return sum(int(server.get(name, 0)) for server in servers)

        with self._counting:
            counts = dict(self._counts)
        counted = {name: counts.get(name, 0) for name in _COUNTED}
        return Stats(
            **counted,
            sessions=sessions,
            owned=owned,
            bytes=total("used_memory"),
            memory=total("maxmemory"),
            gets=counted["hits"] + counted["misses"],
            expired=total("expired_keys"),
            evicted=total("evicted_keys"),
            evicted_owned=0,
            rebuilds=0,
            lock_waits=0,
            lock_waited=0.0,
            server_restarts=0,
            server_pid=int(servers[0].get("process_id", 0)),
            server_uptime=float(min(int(server.get("uptime_in_seconds", 0)) for server in servers)),
        )

    def ping(self) -> bool:
        """Return True if the server answers."""
        return bool(self._link.call("EXISTS", self._engine.key((0, 0))) in (0, 1))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._link.closed

    def close(self) -> None:
        """Let go of the connections, but not of a client that was given. Used afterwards it is `StoreUnavailable`."""
        self._interval.stop()
        self._link.close()

    def __reduce__(self) -> Any:
        raise TypeError("a store on Redis stays in its process: send its URL instead")

    def __deepcopy__(self, memo: object) -> Self:
        return self  # as with any connection: a copy of what holds it still means the same store

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- how -------------------------------------------------------------------------------------------------------

    def _read(self, sid: object) -> Value | None:
        key = self._engine.key_of(sid)
        if key is None:
            self._link.check()
            return None
        return self._engine.read(key)

    def _decode(self, value: Value, *, counted: bool) -> dict[Any, Any] | None:
        try:
            return self.codec.decode(payload_of(value.body, self.codec.name))
        except SerializationError:
            if counted:
                self._count("corrupt")
            return None

    def _record(self, value: Value) -> Any:
        try:
            return value.record()
        except SerializationError:
            self._count("corrupt")
            return None

    def _heads(self) -> Iterator[Value]:
        for page in self._engine.pages():
            yield from (value for value in self._engine.heads(page) if value is not None)

    def _put(
        self, sid: str, session: Mapping[Any, Any], ttl: Duration | None, owner: Owner, present: bool | None
    ) -> bool:
        refuse_inside()
        key = self._engine.key(key_to_write(sid))
        if not isinstance(session, Mapping):
            raise TypeError(f"a session must be a mapping, not {type(session).__name__}")
        digest_of(owner)  # complains
        span = nanoseconds(self._life(session, sid) if ttl is None else ttl)
        payload = self.codec.encode(session)
        self._check_size(payload)
        now = self._link.now()
        deadline = _deadline(now, span)
        body = pack(sid, owner, self.codec.name, payload)
        value = Value(new_tag(), deadline, now, 0, now, body)
        if owner is not None and span:
            value = value._replace(indexed=_indexed(now, deadline))
            self._engine.index(owner, key, value.indexed, now)
        if self.options.dispose is None or self.options.no_dispose_on_set or present is False:
            done = self._engine.put(key, value, _life(span), present)
        else:
            done = self._overwrite(key, value, _life(span), present)
        if done:
            self._count("sets")
            if owner is not None and span:
                self._limit(owner, key)
        return done

    def _overwrite(self, key: str, value: Value, life: str, present: bool | None) -> bool:
        """Write a session after the dispose of the one that is there."""
        with ExitStack() as turn:
            there = self._engine.read(key)
            if there is not None:
                turn.enter_context(self._one_at_a_time)
                there = self._engine.read(key)  # another may have been faster
            while True:
                if there is None:
                    if present:
                        return False
                    if self._engine.put(key, value, life, False):
                        return True
                    return self._overwrite(key, value, life, present)
                self._announce(there, "set")
                result = self._engine.change(key, there.tag, value, life)
                if result is True:
                    return True
                there = result

    def _change(
        self,
        old: str,
        new: str,
        changes: Mapping[Any, Any],
        delete: tuple[Any, ...],
        ttl: Duration | None,
        owner: NewOwner,
        count: str = "sets",
    ) -> bool:
        """Write a session anew from what is stored, unless another was faster: then from what that one has stored."""
        refuse_inside()
        codec, engine, loaded = self.codec, self._engine, self._loaded
        self._loaded = None
        key = engine.key(key_to_write(old))
        new_key = key if new is old else engine.key(key_to_write(new))
        if not isinstance(changes, Mapping):
            raise TypeError(f"what to set must be a mapping, not {type(changes).__name__}")
        raw = {
            name: value if type(value) is Raw else Raw(codec.encode_value(name, value))
            for name, value in changes.items()
        }
        if owner is not KEEP:
            digest_of(owner)  # complains
        span = None if ttl is None else nanoseconds(ttl)
        life = scripts.KEEP if span is None else _life(span)
        # Who changes a session has nearly always just loaded it.
        value = loaded[2] if loaded is not None and loaded[1] == key else engine.read(key)
        end = time.monotonic() + self._patience
        while value is not None:
            try:
                payload, owner_before = content_of(value.body, codec.name)
            except SerializationError:
                return False  # another serializer's, or damaged: as good as none
            payload = codec.merge(payload, raw, delete)
            self._check_size(payload)
            now = self._link.now()
            deadline = value.deadline if span is None else _deadline(now, span)
            owner_now = owner_before if owner is KEEP else owner
            indexed = value.indexed
            if owner_now is None:
                indexed = 0
            elif owner_now != owner_before or deadline > indexed:
                indexed = _indexed(now, deadline)
            if owner_now is not None and (new_key != key or indexed != value.indexed) and span != 0:
                engine.index(owner_now, new_key, indexed, now)
            body = pack(new, owner_now, codec.name, payload)
            after = Value(new_tag(), deadline, now, indexed, value.created, body)
            if new_key == key:
                result: bool | Value | None = engine.change(key, value.tag, after, life)
            else:
                result = engine.move(key, new_key, value.tag, after, life)
            if result is True:
                if owner_before is not None and (owner_now != owner_before or new_key != key):
                    engine.forget(owner_before, key, value.indexed)
                self._count(count)
                if owner_now is not None and owner_now != owner_before:
                    self._limit(owner_now, new_key)
                return True
            if result is False:
                return False
            if time.monotonic() > end:
                raise StoreTimeout(f"{self.label}: others have changed this session again and again for too long")
            value = result
        return False

    def _drop(
        self, key: str, reason: str, *, remember: bool = False, only: Callable[[Value], bool] | None = None
    ) -> bool:
        """
        Remove a session, after its dispose.

        Args:
            key: Of the session.
            reason: For the dispose, and the figures.
            remember: Whether its id is to be known as gone for a while.
            only: Whether it is to go, as it is now; None: in any case.
        """
        engine, disposes, tag, turns = self._engine, self.options.dispose is not None, b"", 0
        head: bytes | str | None = CHANGED
        with ExitStack() as turn:
            while head == CHANGED:
                if only is not None or disposes:
                    value = engine.read(key)
                    if value is None or (only is not None and not only(value)):
                        return False
                    tag = value.tag
                    if disposes and not turns:
                        turn.enter_context(self._one_at_a_time)
                        turns = 1
                        continue  # another may have been faster
                    self._announce(value, reason)
                head = engine.drop(key, tag, remember=remember)
                if head is None:
                    return False
        assert isinstance(head, bytes)  # noqa: S101
        was = parse(head)
        if was is not None and was.indexed and (record := self._record(was)) is not None and record.owner:
            engine.forget(record.owner, key, was.indexed)
        self._count({"destroy": "destroyed", "clear": "cleared"}.get(reason, reason))
        return True

    def _announce(self, value: Value, reason: str) -> None:
        record, dispose = self._record(value), self.options.dispose
        if dispose is None or record is None:
            return
        if announce(dispose, record, self.codec, reason, self.label, self._failing):
            self._count("dispose_errors")

    def _owned(self, owner: str) -> list[tuple[str, Value, str]]:
        """Return key, head and id of an owner's sessions, the most recently written or touched first."""
        digest_of(owner)
        keys = self._engine.indexed(owner)
        found = []
        for key, value in zip(keys, self._engine.heads(keys), strict=True):
            record = None if value is None else self._record(value)
            if value is not None and record is not None and record.owner == owner:
                found.append((key, value, record.sid))
        return sorted(found, key=lambda each: each[1].used, reverse=True)

    def _limit(self, owner: str, key: str) -> None:
        """Drop what an owner has beyond `max_per_owner`, who has just got the session at this key."""
        most = self.options.max_per_owner
        if most is None:
            return
        for each, _, _ in [found for found in self._owned(owner) if found[0] != key][most - 1 :]:
            self._drop(each, "evict")

    def _life(self, session: Mapping[Any, Any], sid: str) -> Duration:
        return life_of(self.options, self._rule, session, sid)

    def _check_size(self, payload: bytes) -> None:
        limit = self.options.session_limit
        if len(payload) > limit:
            self._count("refused")
            raise RecordTooLarge(
                f"the session has {len(payload)} bytes, max_session allows {limit}: keep large things in a "
                f"database and their ids in the session, or raise max_session"
            )

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] += 1


_COUNTED: Final = (
    "hits", "misses", "sets", "touches", "destroyed", "cleared", "dispose_errors", "corrupt", "refused",
)  # fmt: skip


def _deadline(now: int, span: int) -> int:
    """Return when a session ends, in microseconds, that lives for so many nanoseconds from now on."""
    return FOREVER if span >= NEVER else now + span // 1000


def _indexed(now: int, deadline: int) -> int:
    """Return until when an owner's index shall know a session: long enough that it need not be told of each touch."""
    return FOREVER if deadline >= FOREVER else deadline + (deadline - now)


def _life(span: int) -> str:
    """Return a life in nanoseconds as scripts want it: milliseconds, no part of one lost."""
    return scripts.NEVER if span >= NEVER else scripts.NOW if not span else str(-(-span // 10**6))


def _forked() -> None:
    for store in _stores:  # who was in the middle of a dispose is not there
        store._one_at_a_time = threading.RLock()


os.register_at_fork(after_in_child=_forked)
