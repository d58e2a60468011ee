"""Bytes of memory per session of 750 bytes, ids included, in shmstore, Redis and memcached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import adapters, peers
from benchmarks.adapters import DAY
from benchmarks.figures import Plan, Results, sample
from benchmarks.operations import identity
from benchmarks.peers import Missing, workplace
from shmstore import StoreManager
from shmstore.engine.header import USED_BLOCKS
from shmstore.engine.layout import SLOT


def run(plan: Plan, only: tuple[str, ...] = ("shmstore", "Redis", "memcached")) -> Results:
    """Return bytes by store and way of counting, and what is missing."""
    results: Results = {"sessions": plan.memory, "bytes each": {}, "missing": {}}
    measures = {"shmstore": ours, "Redis": redis, "memcached": memcached}
    for kind in only:
        with workplace() as place:
            try:
                results["bytes each"][kind] = measures[kind](place, plan.memory)
            except Missing as exc:
                results["missing"][kind] = str(exc)
    return results


def ours(place: Path, count: int) -> dict[str, float]:
    """Return the used share of the arena, and the private memory of the server process."""
    session = sample()
    manager = StoreManager(
        "bench", directory=place, persist=False, memory=count * 1500 + 2**20, max=count, check_period=None
    )
    try:
        store = manager.store()
        before = store.stats()
        anonymous = peers.status_bytes(before.server_pid, "RssAnon")
        for number in range(count):
            store.set(identity(number), session, DAY)
        cells, geometry = store.arena.cells, store.arena.geometry
        # Its blocks, its slot, its share of the two indexes.
        arena = cells[USED_BLOCKS] * geometry.block_size / count + 8 * (SLOT + 1) + 2
        server = peers.status_bytes(before.server_pid, "RssAnon")
        assert store.length() == count
        own, before_all = server / count, anonymous / count
        return {"counted by itself": arena, "with its process": arena + own, "growth": arena + own - before_all}
    finally:
        manager.shutdown()


def redis(place: Path, count: int) -> dict[str, float]:
    with peers.redis_server(place) as server:
        import redis as package

        client: Any = package.Redis(unix_socket_path=server.address)
        body = adapters.encode(sample())
        with grown(server.pid, count, lambda: client.info("memory")["used_memory"]) as result:
            for first in range(0, count, 1000):
                pipe = client.pipeline(transaction=False)
                for number in range(first, min(count, first + 1000)):
                    pipe.set(identity(number), body, ex=DAY)
                pipe.execute()
        assert client.dbsize() == count
        return result


def memcached(place: Path, count: int) -> dict[str, float]:
    with peers.memcached_server(place, 4096) as server:
        peers.needs("pymemcache")
        from pymemcache.client.base import Client

        client = Client(f"unix:{server.address}")
        body = adapters.encode(sample())
        with grown(server.pid, count, lambda: client.stats()[b"bytes"]) as result:
            for number in range(count):
                client.set(identity(number), body, expire=DAY, noreply=number % 100 != 0)
        assert client.stats()[b"curr_items"] == count
        return result


@contextmanager
def grown(pid: int, count: int, counted: Callable[[], int]) -> Iterator[dict[str, float]]:
    """Fill in by how much a server has grown per session; in total, with its size before."""
    result: dict[str, float] = {}
    size, used = peers.status_bytes(pid, "VmRSS"), counted()
    yield result
    now = peers.status_bytes(pid, "VmRSS")
    result["counted by itself"] = (counted() - used) / count
    result["with its process"] = now / count
    result["growth"] = (now - size) / count
