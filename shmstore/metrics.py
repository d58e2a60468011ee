"""
Metrics of a store for Prometheus (extra ``metrics``). All processes read the same shared memory, so each of them tells
the same numbers: no directory of files to be added up, and any worker may answer the scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from shmstore.cells import USED_BLOCKS
from shmstore.clock import boottime_ns
from shmstore.counters import WAITS
from shmstore.errors import ShmStoreError

if TYPE_CHECKING:
    from shmstore.arena import Arena
    from shmstore.proxy import StoreProxy
    from shmstore.redis import RedisStore
    from shmstore.stats import Stats
    from shmstore.store import Store

    AnyStore = Store | StoreProxy | RedisStore

__all__ = ["StoreCollector"]

_COUNTERS: Final[dict[str, tuple[str, Callable[[Stats], float]]]] = {
    "hits": ("Reads that found their session.", lambda stats: stats.hits),
    "misses": ("Reads that found none, or an expired one.", lambda stats: stats.misses),
    "sets": ("Sessions written: created, overwritten, updated, renamed.", lambda stats: stats.sets),
    "touches": ("Lives renewed without writing.", lambda stats: stats.touches),
    "destroys": ("Sessions removed on request, by clear too.", lambda stats: stats.destroyed + stats.cleared),
    "expired": ("Expired sessions removed.", lambda stats: stats.expired),
    "refused": ("Writes refused because the session was too large.", lambda stats: stats.refused),
    "unreadable": ("Times that a record was left out because it cannot be read.", lambda stats: stats.corrupt),
    "dispose_errors": ("Exceptions that dispose raised.", lambda stats: stats.dispose_errors),
    "rebuilds": ("Times that damaged memory was carried over to another file.", lambda stats: stats.rebuilds),
    "server_restarts": ("Server processes that took over from one that was gone.", lambda stats: stats.server_restarts),
}


class StoreCollector(Collector):
    """
    What `Store.stats` tells, as metrics whose names begin with ``shmstore_``.

    ```python
    registry = CollectorRegistry()
    registry.register(StoreCollector(sessions.store, "shop"))
    ```

    Counters begin with the memory of the store, which a restart of Gunicorn leaves as it is. While the store cannot be
    reached there is only ``shmstore_up 0``. Of a `RedisStore` each process tells its own, see `RedisStore.stats`.

    Args:
        store: The store, or a function that gives it, which is called at each scrape.
        name: The label ``store`` of all of them.
    """

    def __init__(self, store: AnyStore | Callable[[], AnyStore], name: str = "sessions") -> None:
        self._store = store
        self._name = name

    def describe(self) -> list[Metric]:
        """Return nothing, so that registering a collector opens no store."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        try:
            store = self._store() if callable(self._store) else self._store
            found = [*self._figures(store)]
        except ShmStoreError:
            found = []
        yield self._gauge("up", "Whether the store could be read.", float(bool(found)))
        yield from found

    def _figures(self, store: AnyStore) -> Iterator[Metric]:
        stats = store.stats()
        for name, (about, value) in _COUNTERS.items():
            yield self._counter(name, about, {(): value(stats)})
        by_owner = {("no",): stats.evicted - stats.evicted_owned, ("yes",): stats.evicted_owned}
        yield self._counter("evicted", "Live sessions removed to make room.", by_owner, "owned")
        arena: Arena | None = getattr(store, "arena", None)
        expired = 0
        if arena is not None:
            expired = min(len(arena.expired_slots(boottime_ns())), stats.sessions)  # others go on meanwhile
            yield from self._of_memory(arena)
        sessions = GaugeMetricFamily("shmstore_sessions", "Sessions stored.", labels=["store", "state"])
        sessions.add_metric([self._name, "live"], stats.sessions - expired)
        sessions.add_metric([self._name, "expired"], expired)  # and not pruned yet
        yield sessions
        yield self._gauge("owned_sessions", "Sessions that have an owner.", stats.owned)
        yield self._gauge("used_bytes", "Bytes of the memory that are taken.", stats.bytes)
        yield self._gauge("memory_bytes", "Bytes of shared memory in all.", stats.memory)
        yield self._gauge("server_uptime_seconds", "Seconds since the server began.", stats.server_uptime)

    def _of_memory(self, arena: Arena) -> Iterator[Metric]:
        waited, counts = arena.waits()
        upper = ["+Inf" if bound == float("inf") else str(bound) for bound in WAITS]
        waits = HistogramMetricFamily(
            "shmstore_lock_wait_seconds", "How long it took to get the lock, if it was not free.", labels=["store"]
        )
        waits.add_metric([self._name], [*zip(upper, accumulate(counts), strict=True)], waited / 1e9)
        yield waits
        yield self._gauge("used_blocks", "Blocks of memory that are taken.", arena.cells[USED_BLOCKS])
        yield self._gauge("blocks", "Blocks of memory in all.", arena.geometry.blocks)

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"shmstore_{name}", about, labels=["store"])
        metric.add_metric([self._name], value)
        return metric

    def _counter(self, name: str, about: str, values: Mapping[Any, float], *labels: str) -> Metric:
        metric = CounterMetricFamily(f"shmstore_{name}", about, labels=["store", *labels])
        for label, value in values.items():
            metric.add_metric([self._name, *label], value)
        return metric
