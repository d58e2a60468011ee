"""One interface for every measured store. Each is called as its users call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

import shmstore
from benchmarks import peers, stock
from benchmarks.figures import sample
from benchmarks.operations import identity
from benchmarks.peers import Missing
from shmstore.codec.body import pack
from shmstore.codec.ids import key_of
from shmstore.engine.frame import body_of, seal
from shmstore.engine.header import NEVER
from shmstore.system.clock import boottime_ns

DAY = 86400
CHANGE = {"language": "de"}

encode = msgspec.msgpack.encode
decode = msgspec.msgpack.Decoder(dict[str, Any]).decode

Operations = dict[str, Callable[[int], object]]


class Adapter:
    """
    A store; operations that it does not have are left out of `operations`.

    Attributes:
        session: The session to store.
        body: The same as bytes.
    """

    def __init__(self) -> None:
        self.session = sample()
        self.body: bytes = encode(self.session)

    def get(self, number: int) -> Any:
        raise NotImplementedError

    def set(self, number: int) -> object:
        raise NotImplementedError

    def operations(self) -> Operations:
        names = {
            "get": "get",
            "get, again": "get",
            "set": "set",
            "get raw": "get_raw",
            "set raw": "set_raw",
            "update": "update",
        }
        names |= {"touch": "touch", "destroy": "destroy"}
        return {name: getattr(self, method) for name, method in names.items() if hasattr(self, method)}

    def fill_up(self, first: int) -> int:
        """Make the store full, so that one more session evicts another. Return the number after the last."""
        raise Missing("has no limit")


class Ours(Adapter):
    """The store, in place."""

    in_place = True

    def __init__(self, address: str) -> None:
        super().__init__()
        self.store: Any = shmstore.connect(address, in_place=self.in_place)

    def get(self, number: int) -> Any:
        return self.store.get(identity(number))

    def set(self, number: int) -> object:
        return self.store.set(identity(number), self.session, DAY)

    def update(self, number: int) -> object:
        return self.store.update(identity(number), CHANGE)

    def touch(self, number: int) -> object:
        return self.store.touch(identity(number), None, DAY)

    def destroy(self, number: int) -> object:
        return self.store.destroy(identity(number))

    def fill_up(self, first: int) -> int:
        while not self.store.stats().evicted:
            for number in range(first, first + 1000):
                self.set(number)
            first += 1000
        return first


class InPlace(Ours):
    """With operations on raw bytes too, which only users of an arena have."""

    def get_raw(self, number: int) -> Any:
        sid, arena = identity(number), self.store.arena
        if (core := arena.file.core) is not None:
            return core.get(sid, boottime_ns(), True)
        entry = arena.reader.read(key_of(sid.encode()), 2)
        return None if entry is None else body_of(entry[4])

    def set_raw(self, number: int) -> object:
        sid = identity(number)
        core = self.store.arena.file.core
        if core is not None and core.put(sid, None, self.body, NEVER, 1, None, boottime_ns()) >= 0:
            return True
        key = key_of(sid.encode())
        sealed = seal(key, 0, 0, pack(sid, None, self.store.codec.name, self.body))
        arena = self.store.arena
        try:
            arena.lock(2)
            return arena.publish(arena.find(key), key, sealed, 0, NEVER, boottime_ns())
        finally:
            arena.unlock()


class ThroughServer(Ours):
    """The store with each call executed by its server."""

    in_place = False


class Encoded(Adapter):
    """A store of bytes: sessions are encoded by msgspec, as in Flask-Session; an update reads, changes and writes."""

    def get_raw(self, number: int) -> Any:
        raise NotImplementedError

    def put(self, number: int, body: bytes) -> object:
        raise NotImplementedError

    def get(self, number: int) -> Any:
        body = self.get_raw(number)
        return None if body is None else decode(body)

    def set_raw(self, number: int) -> object:
        return self.put(number, self.body)

    def set(self, number: int) -> object:
        return self.put(number, encode(self.session))

    def update(self, number: int) -> object:
        return self.put(number, encode(self.get(number) | CHANGE))


class Redis(Encoded):
    """redis-py with hiredis: GET, SET EX, EXPIRE, DEL."""

    def __init__(self, address: str) -> None:
        import redis

        super().__init__()
        self.client = redis.Redis(unix_socket_path=address)

    def get_raw(self, number: int) -> Any:
        return self.client.get(identity(number))

    def put(self, number: int, body: bytes) -> object:
        return self.client.set(identity(number), body, ex=DAY)

    def touch(self, number: int) -> object:
        return self.client.expire(identity(number), DAY)

    def destroy(self, number: int) -> object:
        return self.client.delete(identity(number))

    def fill_up(self, first: int) -> int:
        client: Any = self.client
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", client.info("memory")["used_memory"])
        for number in range(first, first + 1000):
            self.set(number)
        return first + 1000


class Pymemcache(Encoded):
    def __init__(self, address: str) -> None:
        from pymemcache.client.base import Client

        super().__init__()
        self.client = Client(f"unix:{address}", default_noreply=False)

    def get_raw(self, number: int) -> Any:
        return self.client.get(identity(number))

    def put(self, number: int, body: bytes) -> object:
        return self.client.set(identity(number), body, expire=DAY)

    def touch(self, number: int) -> object:
        return self.client.touch(identity(number), DAY)

    def destroy(self, number: int) -> object:
        return self.client.delete(identity(number))

    def evicted(self) -> int:
        return int(self.client.stats()[b"evictions"])

    def fill_up(self, first: int) -> int:
        for _ in range(500):
            if self.evicted():
                return first
            for number in range(first, first + 1000):
                self.set(number)
            first += 1000
        raise Missing("did not fill up")


class Pylibmc(Pymemcache):
    def __init__(self, address: str) -> None:
        import pylibmc

        Encoded.__init__(self)
        self.client = pylibmc.Client([address], binary=False)

    def put(self, number: int, body: bytes) -> object:
        return self.client.set(identity(number), body, time=DAY)

    def evicted(self) -> int:
        return int(self.client.get_stats()[0][1]["evictions"])


class Diskcache(Encoded):
    """On tmpfs, evicting by least recent use."""

    def __init__(self, address: str) -> None:
        import diskcache

        super().__init__()
        self.client = diskcache.Cache(address, eviction_policy="least-recently-used", size_limit=2**32)

    def get_raw(self, number: int) -> Any:
        return self.client.get(identity(number))

    def put(self, number: int, body: bytes) -> object:
        return self.client.set(identity(number), body, expire=DAY)

    def touch(self, number: int) -> object:
        return self.client.touch(identity(number), expire=DAY)

    def destroy(self, number: int) -> object:
        return self.client.delete(identity(number))

    def fill_up(self, first: int) -> int:
        self.client.reset("size_limit", self.client.volume())
        return first


class Lmdb(Encoded):
    """On tmpfs, never synced: without expiry and eviction, which an application would have to write itself."""

    def __init__(self, address: str) -> None:
        import lmdb

        super().__init__()
        self.env = lmdb.open(address, map_size=2**31, sync=False, metasync=False, writemap=True, max_readers=64)

    def get_raw(self, number: int) -> Any:
        with self.env.begin() as reading:
            return reading.get(identity(number).encode())

    def put(self, number: int, body: bytes) -> object:
        with self.env.begin(write=True) as writing:
            return writing.put(identity(number).encode(), body)

    def destroy(self, number: int) -> object:
        with self.env.begin(write=True) as writing:
            return writing.delete(identity(number).encode())


class Stock(Adapter):
    """A stock manager's proxy of a dict with deadlines; sessions travel by pickle."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.table = stock.connect(address)

    def get(self, number: int) -> Any:
        return self.table.get(identity(number))

    def set(self, number: int) -> object:
        return self.table.set(identity(number), self.session, DAY)

    def set_raw(self, number: int) -> object:
        return self.table.set(f"raw{identity(number)}", self.body, DAY)

    def get_raw(self, number: int) -> Any:
        return self.table.get(f"raw{identity(number)}")

    def update(self, number: int) -> object:
        return self.table.update(identity(number), CHANGE)

    def touch(self, number: int) -> object:
        return self.table.touch(identity(number), DAY)

    def destroy(self, number: int) -> object:
        return self.table.destroy(identity(number))


OURS, SERVED, REDIS = "shmstore", "shmstore, through its server", "Redis"
PYMEMCACHE, PYLIBMC = "memcached, pymemcache", "memcached, pylibmc"
KINDS: dict[str, type[Any]] = {
    OURS: InPlace, SERVED: ThroughServer, REDIS: Redis, PYMEMCACHE: Pymemcache, PYLIBMC: Pylibmc,
    "diskcache": Diskcache, "LMDB, bare": Lmdb, "stock manager proxy": Stock,
}  # fmt: skip
MODULES = {PYMEMCACHE: ["pymemcache"], PYLIBMC: ["pylibmc"], "diskcache": ["diskcache"], "LMDB, bare": ["lmdb"]}
NO_PEERS = (OURS, SERVED, "stock manager proxy")


@contextmanager
def addresses(
    place: Path, sessions: int, kinds: list[str], megabytes: int = 64
) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Start what the stores need; return the address of each, and those that are missing with the reason."""
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        servers: dict[str, str] = {}

        def address(kind: str) -> str:
            peers.needs(*MODULES.get(kind, []))
            base = kind.partition(",")[0]
            if base in ("diskcache", "LMDB"):
                return str(place / base)
            if base not in servers:
                if base == "shmstore":
                    options = {"max": sessions, "memory": sessions * 2500 + 2**20, "check_period": None}
                    manager = shmstore.StoreManager("bench", directory=place, persist=False, **options)
                    stack.callback(manager.shutdown)
                    manager.start()
                    servers[base] = f"shm://{place}/bench"
                elif base == "Redis":
                    servers[base] = stack.enter_context(peers.redis_server(place)).address
                elif base == "memcached":
                    servers[base] = stack.enter_context(peers.memcached_server(place, megabytes)).address
                else:
                    servers[base] = stack.enter_context(peers.stock_server(place)).address
            return servers[base]

        for kind in kinds:
            try:
                found[kind] = address(kind)
            except Missing as exc:
                missing[kind] = str(exc)
        yield found, missing
