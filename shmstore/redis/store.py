"""The store on a Redis or Valkey server: it implements the contract of `shmstore.contract`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from logging import DEBUG, getLogger
from typing import Any, Final, Self

from redis import RedisCluster

from shmstore.codec.body import Codec, content_of, payload_of
from shmstore.codec.ids import require_key
from shmstore.contract import KEEP, AnyStore, Capability, Data, Loaded, NewOwner, Owner, Stats
from shmstore.engine.header import BY_FUNCTION, NO_TTL
from shmstore.errors import ConfigError, SerializationError
from shmstore.options import Duration, Options, seconds
from shmstore.redis import client as clients
from shmstore.redis.link import Link
from shmstore.redis.named_locks import NamedLocks
from shmstore.redis.operations import COUNTED, Operations
from shmstore.redis.value import FOREVER, Value
from shmstore.store.dispose import refuse_inside
from shmstore.store.expiry import nanoseconds
from shmstore.store.pruner import Interval
from shmstore.store.trace import obey_environment, trace, traced

__all__ = ["RedisStore"]

log: Final = getLogger("shmstore")
tracing: Final = log.isEnabledFor

_INDEX_PRUNE_PERIOD: Final = 3600.0  # seconds, unless `check_period` is given
_SECOND: Final = 10**6  # microseconds

# Options that the server decides or cannot have, and what to do instead.
_REFUSED: Final = {
    "max": "limit the server's maxmemory, with maxmemory-policy volatile-lru",
    "length": "limit the server's maxmemory, with maxmemory-policy volatile-lru",
    "stale": "the server removes an expired session at once",
    "snapshot": "let the server save its data (save, appendonly)",
    "clock": "deadlines follow the server's clock",
}


class RedisStore(Operations, AnyStore):
    """
    Sessions by id on a Redis or Valkey server (6.2 or newer), for processes of any number of hosts.

    It implements `AnyStore`; each method documents its differences. A call is one round trip unless its method says
    otherwise. It waits at most ``lock_timeout`` for an answer and then raises `StoreTimeout`. A change of one session
    is one step of the server. It is never repeated if it may have been carried out: if its answer is lost, the call
    raises `StoreUnavailable`.

    The store can be created before a fork, and shared by threads and greenlets.

    Args:
        client: A client of redis-py: ``Redis``, also one from ``Sentinel``, or ``RedisCluster``. It must return bytes
            (``decode_responses=False``); its ``socket_timeout`` limits the duration of a call.
        prefix: The prefix of all keys of this store, by default ``shmstore:``.
        options: The options of `Options`. ``max``, ``length``, ``stale``, ``snapshot``, ``clock`` and
            ``persist=False`` are refused, because the server decides about them; ``memory``, ``recency``,
            ``directory`` and ``snapshot_period`` have no effect, and a WARNING line says so. ``dispose`` is called in
            the calling process for sessions that a call removes or overwrites, but not for sessions that the server
            expires or evicts. ``max_per_owner`` is enforced at each login.

    Raises:
        ConfigError: An option is unknown, invalid or refused.
    """

    def __init__(self, client: Any, /, *, prefix: str = clients.PREFIX, **options: Any) -> None:
        if client.get_connection_kwargs().get("decode_responses"):
            raise ConfigError("RedisStore needs a client that returns bytes: omit decode_responses=True")
        cluster = isinstance(client, RedisCluster)
        self._prepare(
            Link(lambda: client, clients.where(client), clock=f"{prefix}clock", cluster=cluster),
            prefix,
            options,
            given=True,
        )

    @classmethod
    def from_url(cls, url: str, /, **options: Any) -> Self:
        """
        Return the store at a URL. It connects on first use. The forms are::

            redis://[[user]:password@]host[:port][/db]
            unix://[user:password@]/path/of/socket[?db=0]
            redis+sentinel://[user:password@]host[:26379][,host...]/name-of-the-primary[/db]
            redis+cluster://[user:password@]host[:port][,host...]

        ``rediss`` instead of ``redis`` uses TLS. ``valkey`` and ``valkeys`` are the same as ``redis`` and ``rediss``,
        ``redis+unix`` and ``valkey+unix`` the same as ``unix``. The query may contain settings of redis-py, such as
        ``?ssl_ca_certs=/path&socket_timeout=1``, and ``prefix``, the prefix of all keys.

        Args:
            url: A URL such as ``redis://localhost:6379/0``.
            options: As for the class; ``lock_timeout`` limits the duration of a call, in seconds.

        Raises:
            ConfigError: The URL or an option is invalid.
        """
        store = cls.__new__(cls)
        timeout = seconds(Options.of(**options).lock_timeout)
        address = clients.Address.of(url)
        link = Link(
            partial(address.open, timeout), address.where, clock=f"{address.prefix}clock", cluster=address.cluster
        )
        store._prepare(link, address.prefix, options, given=False)
        return store

    def _prepare(self, link: Link, prefix: str, options: Mapping[str, Any], *, given: bool) -> None:
        obey_environment()
        checked = Options.of(**options)
        for name, instead in _REFUSED.items():
            if name in options and options[name] not in (None, False):
                raise ConfigError(f"{name} is not supported by a store on Redis: {instead}")
        if not checked.persist:
            raise ConfigError("persist=False is not supported by a store on Redis: use a separate prefix, and clear()")
        for name in ("memory", "recency", "directory", "snapshot_period"):
            if options.get(name) is not None:
                log.warning("the option %s has no effect on a store on Redis", name)
        clients.check_prefix(prefix)
        ttl = checked.ttl
        rule = NO_TTL if ttl is None else BY_FUNCTION if callable(ttl) else nanoseconds(ttl)
        self._begin(link, prefix, checked, rule)
        self._given = given
        self._locks = NamedLocks(link)
        self._interval = Interval(self)
        self.start_interval()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The capabilities beyond those of every store."""
        atomic = frozenset[Capability]() if self._link.cluster else frozenset({Capability.ATOMIC_RENAME})
        return atomic | {Capability.SEVERAL_HOSTS}

    @property
    def options(self) -> Options:
        return self._options

    @property
    def codec(self) -> Codec:
        return self._codec

    @property
    def label(self) -> str:
        return self._label

    # -- one session -----------------------------------------------------------------------------------------------

    def get(self, sid: str) -> dict[Any, Any] | None:
        """See `AnyStore.get`. It counts as use for the server's own eviction."""
        value = self._read(sid)
        session = None if value is None else self._decode(value, counted=True)
        self._count("misses" if session is None else "hits")
        if tracing(DEBUG):
            trace("get", (sid,), session)
        return session

    def peek(self, sid: str) -> dict[Any, Any] | None:
        """See `AnyStore.peek`. For the server's own eviction it counts as use."""
        value = self._read(sid)
        session = None if value is None else self._decode(value, counted=False)
        if tracing(DEBUG):
            trace("peek", (sid,), session)
        return session

    def load(self, sid: str) -> Loaded | None:
        """See `AnyStore.load`. ``idle`` is the time since the last write or touch."""
        key = self._engine.key_of(sid)
        value = None if key is None else self._engine.read(key)
        loaded = None
        if key is not None and value is not None:
            try:
                payload, owner = content_of(value.body, self._codec.name)
            except SerializationError:
                self._count("corrupt")
            else:
                now = self._link.now()
                remaining = math.inf if value.deadline >= FOREVER else max(0, value.deadline - now) / _SECOND
                ages = max(0, now - value.created) / _SECOND, max(0, now - value.used) / _SECOND
                loaded = Loaded(payload, *ages, remaining, owner, value)
        self._count("misses" if loaded is None else "hits")
        if tracing(DEBUG):
            trace("load", (sid,), loaded)
        return loaded

    @traced
    def set(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> None:
        """See `AnyStore.set`. Two more round trips with a ``dispose``, and another in a Cluster with an owner."""
        self._put(sid, session, ttl, owner, None)

    @traced
    def add(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> bool:
        """See `AnyStore.add`. Another round trip in a Cluster with an owner."""
        return self._put(sid, session, ttl, owner, False)

    @traced
    def replace(self, sid: str, session: Data, ttl: Duration | None = None, owner: Owner = None) -> bool:
        """See `AnyStore.replace`. Two more round trips with a ``dispose``, and another in a Cluster with an owner."""
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
        See `AnyStore.update`. The server changes the session, so only the changes are sent.

        In a Cluster it is three round trips if the owner changes, or if the entry in the owner's index must be
        extended: about once in the session's ttl.
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
        See `AnyStore.rename`.

        In a Cluster the ids are on different servers, and it is four round trips, or five with an owner: the session is
        read, the new id reserved, the old session removed, the new one written. If the process or a server dies between
        the last two, the session is lost; it is never stored twice.
        """
        require_key(old)
        return old != new and self._change(old, new, set, tuple(delete), ttl, owner, "sets", tombstone)

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
        """See `AnyStore.swap`. In a Cluster the result is False for a ``new`` id: its server may be another one."""
        refuse_inside()
        if not isinstance(loaded.handle, Value) or new == sid or (new is not None and self._link.cluster):
            return False
        return self._swap(sid, loaded, payload, ttl, owner, new, tombstone)

    @traced
    def touch(self, sid: str, session: Mapping[Any, Any] | None = None, ttl: Duration | None = None) -> bool:
        """See `AnyStore.touch`. Another round trip without ``ttl`` if the ttl depends on the session."""
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
        return self._retime(key, ttl)

    @traced
    def destroy(self, sid: str | Iterable[str], tombstone: bool = False) -> int:
        """See `AnyStore.destroy`. One round trip for each id, three with a ``dispose``."""
        refuse_inside()
        if isinstance(sid, str):
            return self._destroy(sid, tombstone)
        return sum(self._destroy(each, tombstone) for each in sid) if isinstance(sid, Iterable) else 0

    def _destroy(self, sid: str, tombstone: bool) -> int:
        key = self._engine.key_of(sid)
        return 0 if key is None else int(self._drop(key, "destroy", tombstone=tombstone))

    @traced
    def destroy_if_empty(self, sid: str, ignore: Iterable[str] = (), tombstone: bool = False) -> bool:
        """See `AnyStore.destroy_if_empty`. Two round trips, three with a ``dispose``."""
        refuse_inside()
        key, ignored = self._engine.key_of(sid), frozenset(ignore)

        def is_empty(value: Value) -> bool:
            try:
                return not frozenset(self._codec.fields(payload_of(value.body, self._codec.name))) - ignored
            except SerializationError:
                return False

        return key is not None and self._drop(key, "destroy", tombstone=tombstone, only=is_empty)

    @traced
    def gone(self, sid: str, within: Duration = 30.0, renamed: bool = False) -> bool:
        """See `AnyStore.gone`. A tombstone is a separate key, which the server removes after 30 seconds."""
        age, key = nanoseconds(within) // 10**6, self._engine.key_of(sid)
        return key is not None and self._engine.gone(key, age, renamed)

    @contextmanager
    def lock(self, sid: str, timeout: Duration = 5.0) -> Iterator[None]:
        """
        See `AnyStore.lock`.

        If its holder dies, the lock is free after at most 9 seconds. A holder that is stopped for longer than that has
        lost the lock without noticing: a value that must not be written twice has to be checked when it is written.
        """
        key = self._engine.key(require_key(sid))
        with self._locks.held(f"{key}lock", seconds(timeout, "timeout")):
            if tracing(DEBUG):
                trace("lock", (sid,), None)
            yield

    @traced
    def __contains__(self, sid: object) -> bool:
        """See `AnyStore.__contains__`."""
        value = self._read(sid)
        try:
            return value is not None and bool(payload_of(value.body, self._codec.name))
        except SerializationError:
            return False

    # -- all sessions ----------------------------------------------------------------------------------------------

    @traced
    def ids(self) -> list[str]:
        """
        See `AnyStore.ids`. The most recently written or touched first; reads do not change the order.

        It scans all keys of the server, some hundreds per round trip, and so do `all`, `length`, `clear` and `stats`.
        Expired sessions are not included.
        """
        found = [(value.used, record.sid) for value in self._heads() if (record := self._record(value)) is not None]
        return [sid for _, sid in sorted(found, key=lambda each: each[0], reverse=True)]

    @traced
    def all(self) -> dict[str, dict[Any, Any]]:
        """See `AnyStore.all`. In the order of `ids`."""
        found = []
        for page in self._engine.pages():
            for value in self._engine.read_all(page):
                record = None if value is None else self._record(value)
                if value is not None and record is not None and record.codec_name == self._codec.name:
                    session = self._decode(value, counted=True)
                    if session is not None:
                        found.append((value.used, record.sid, session))
        return {sid: session for _, sid, session in sorted(found, key=lambda each: each[0], reverse=True)}

    @traced
    def length(self, live: bool = False) -> int:
        """See `AnyStore.length`. The result is the same with and without ``live``."""
        return sum(map(len, self._engine.pages()))

    @traced
    def clear(self) -> None:
        """See `AnyStore.clear`. It repeats until all sessions that existed at the call are removed."""
        refuse_inside()
        begun = self._link.now(fresh=True)
        while sum(self._clear_page(page, begun) for page in self._engine.pages()):
            pass  # a scan can miss a session that is renamed meanwhile

    @traced
    def prune(self) -> int:
        """
        Remove outdated entries from the indexes of owners, and return 0: the server itself removes expired sessions.

        Outdated entries are harmless and only use memory.
        """
        refuse_inside()
        self._engine.prune_indexes(self._link.now())
        return 0

    @traced
    def start_interval(self, period: Duration | None = None) -> None:
        """See `AnyStore.start_interval`. Without a ``check_period`` it is an hour: little is left to remove."""
        self._link.check()
        refuse_inside()
        chosen = self._options.check_period if period is None else period
        if period is None and chosen and "check_period" not in self._options.given:
            chosen = _INDEX_PRUNE_PERIOD
        self._interval.start(chosen)

    @traced
    def stop_interval(self) -> None:
        """See `AnyStore.stop_interval`."""
        refuse_inside()
        self._interval.stop()

    # -- owners ----------------------------------------------------------------------------------------------------

    @traced
    def owned_by(self, owner: str) -> list[str]:
        """See `AnyStore.owned_by`. The most recently written or touched first. Two round trips."""
        return [sid for _, sid in self._owned(owner)]

    @traced
    def destroy_owned(self, owner: str, keep: Iterable[str] = ()) -> int:
        """
        See `AnyStore.destroy_owned`.

        One round trip for each 1 000 sessions; in a Cluster, and with a ``dispose``, two or three for each session. It
        repeats until all sessions that existed at the call are removed, including sessions renamed meanwhile.

        Raises:
            StoreTimeout: The sessions were renamed again and again.
        """
        count = self._destroy_owned(owner, frozenset([keep] if isinstance(keep, str) else keep))
        self._check_policy()
        return count

    # -- the store itself ------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """
        Return the figures of the store.

        The counters are those of all processes; other processes send theirs about once a second.
        ``bytes``, ``memory`` (0: no limit), ``expired``, ``evicted``, ``server_pid`` and ``server_uptime`` are figures
        of the whole server since its start, including other data; of a Cluster they are sums, and the pid of one
        server. It scans all keys, as `ids` does.
        """
        sessions = owned = 0
        for value in self._heads():
            sessions += 1
            owned += value.indexed > 0
        servers = self._link.info()

        def total(name: str) -> int:
            return sum(int(server.get(name, 0)) for server in servers)

        counted = self._counters.total()
        return Stats(
            **{name: counted[name] for name in COUNTED},
            sessions=sessions,
            owned=owned,
            bytes=total("used_memory"),
            memory=total("maxmemory"),
            gets=counted["hits"] + counted["misses"],
            expired=total("expired_keys"),
            evicted=total("evicted_keys"),
            evicted_owned=0,
            displaced=counted["evict"],
            rebuilds=0,
            lock_waits=0,
            lock_waited=0.0,
            server_restarts=0,
            server_pid=int(servers[0].get("process_id", 0)),
            server_uptime=float(min(int(server.get("uptime_in_seconds", 0)) for server in servers)),
            engine="redis",
        )

    def ping(self) -> bool:
        """Return True if the server answers."""
        return bool(self._link.read("EXISTS", self._engine.key((0, 0))) in (0, 1))

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._link.closed

    def close(self) -> None:
        """Close the connections, unless the client was given. A later call raises `StoreUnavailable`."""
        self._interval.stop()
        self._counters.send()
        self._link.close(disconnect=not self._given)

    def __reduce__(self) -> Any:
        raise TypeError("a store on Redis cannot be pickled: pass its URL instead")

    def __deepcopy__(self, memo: object) -> Self:
        return self  # like any connection: a copy of an object that has the store uses the same store

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._label}>"

    def _decode(self, value: Value, *, counted: bool) -> dict[Any, Any] | None:
        try:
            return self._codec.readable(payload_of(value.body, self._codec.name))
        except SerializationError:
            if counted:
                self._count("corrupt")
            return None
