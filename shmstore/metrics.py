"""
Metrics of stores for Prometheus (extra ``metrics``). All processes read the same shared memory and export the same
values, so no directory of files has to be summed up, and any worker may answer the scrape.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Final, TypeAlias

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("shmstore.metrics needs prometheus-client: pip install 'shmstore[metrics]'") from error

from shmstore.engine.counters import WAITS
from shmstore.engine.header import USED_BLOCKS
from shmstore.errors import ShmStoreError
from shmstore.system.signals import pass_on_interruption

if TYPE_CHECKING:
    from shmstore.contract import AnyStore, Stats
    from shmstore.engine.arena import Arena

    Given: TypeAlias = AnyStore | Callable[[], AnyStore]

__all__ = ["StoreCollector"]

log = logging.getLogger("shmstore")

_COUNTERS: Final[dict[str, tuple[str, Callable[[Stats], float]]]] = {
    "hits": ("Reads that found their session.", lambda stats: stats.hits),
    "misses": ("Reads whose session was missing or expired.", lambda stats: stats.misses),
    "sets": ("Sessions written: created, overwritten, updated, renamed.", lambda stats: stats.sets),
    "touches": ("Renewals of a ttl without a write.", lambda stats: stats.touches),
    "destroys": ("Sessions removed on request, also by clear.", lambda stats: stats.destroyed + stats.cleared),
    "expired": ("Expired sessions removed.", lambda stats: stats.expired),
    "refused": ("Writes refused because the session was too large.", lambda stats: stats.refused),
    "unreadable": (
        "Times that a record, or a value in a record, was omitted because it cannot be read.",
        lambda stats: stats.corrupt,
    ),
    "dispose_errors": ("Exceptions that dispose raised.", lambda stats: stats.dispose_errors),
    "displaced": (
        "Live sessions removed because their owner has max_per_owner newer ones.",
        lambda stats: stats.displaced,
    ),
    "rebuilds": ("Times that damaged memory was rebuilt into another file.", lambda stats: stats.rebuilds),
    "server_restarts": ("Server processes that replaced one that had died.", lambda stats: stats.server_restarts),
}
_GAUGES: Final[dict[str, tuple[str, Callable[[Stats], float]]]] = {
    "owned_sessions": ("Sessions that have an owner.", lambda stats: stats.owned),
    "used_bytes": ("Bytes of shared memory in use.", lambda stats: stats.bytes),
    "memory_bytes": ("Bytes of shared memory in total.", lambda stats: stats.memory),
    "server_uptime_seconds": ("Seconds since the server started.", lambda stats: stats.server_uptime),
}


class StoreCollector(Collector):
    """
    Exports `AnyStore.stats` as metrics whose names begin with ``shmstore_``::

        registry = CollectorRegistry()
        registry.register(StoreCollector(sessions.store, "shop"))

    Counters start with the memory of the store and survive a restart of Gunicorn. An unavailable store exports only
    ``shmstore_up 0``. A registry takes one collector, and a collector any number of stores:
    ``StoreCollector({"shop": shop, "intranet": intranet})``. Of a `RedisStore`, ``expired``, ``evicted`` and the bytes
    are figures of the whole server, and the metrics of shared memory are missing.

    Args:
        store: The store, or a function that returns it and is called at each scrape, or a mapping of names to either.
        name: The label ``store`` of all metrics if ``store`` is a single store.
    """

    def __init__(self, store: Given | Mapping[str, Given], name: str = "sessions") -> None:
        self._stores: dict[str, Given] = dict(store) if isinstance(store, Mapping) else {name: store}

    def describe(self) -> list[Metric]:
        """Return the metrics without values: registering a collector opens no store."""
        return [*_Families()]

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with their current values."""
        families = _Families()
        for name, given in self._stores.items():
            try:
                families.add_store(name, given() if callable(given) else given)
            except ShmStoreError:
                families.add_value("up", [name], 0)
            except Exception as exc:  # the function of one store failed: the other stores must still be exported
                pass_on_interruption(exc)
                log.exception("store %r: the function that returns it for its metrics failed", name)
                families.add_value("up", [name], 0)
        yield from families


class _Families:
    """The metrics of one scrape."""

    def __init__(self) -> None:
        self._named: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        self._gauge("up", "Whether the store could be read.")
        for name, (about, _) in _COUNTERS.items():
            self._counter(name, about)
        self._counter("evicted", "Live sessions removed to make room.", "owned")
        self._waits = HistogramMetricFamily(
            "shmstore_lock_wait_seconds", "Waiting times for the lock, if it was not free.", labels=["store"]
        )
        self._gauge("sessions", "Sessions stored.", "state")
        for name, (about, _) in _GAUGES.items():
            self._gauge(name, about)
        self._gauge("used_blocks", "Blocks of memory in use.")
        self._gauge("blocks", "Blocks of memory in total.")
        self._gauge("snapshot_age_seconds", "Seconds since the snapshot was complete; absent without one.")
        self._gauge("snapshot_failures", "Failed attempts to save the snapshot since the last successful one.")

    def _gauge(self, name: str, about: str, *labels: str) -> None:
        self._named[name] = GaugeMetricFamily(f"shmstore_{name}", about, labels=["store", *labels])

    def _counter(self, name: str, about: str, *labels: str) -> None:
        self._named[name] = CounterMetricFamily(f"shmstore_{name}", about, labels=["store", *labels])

    def add_value(self, name: str, labels: list[str], value: float) -> None:
        """Add a value to a metric."""
        self._named[name].add_metric(labels, value)

    def __iter__(self) -> Iterator[Metric]:
        yield from self._named.values()
        yield self._waits

    def add_store(self, name: str, store: AnyStore) -> None:
        """
        Add the values of a store.

        Raises:
            ShmStoreError: The store cannot be read; no value is added.
        """
        stats, arena, expired = store.stats(), getattr(store, "arena", None), 0
        if arena is not None:
            # Other processes may have removed sessions since `stats`.
            expired = min(len(arena.table.expired_slots(store.options.clock())), stats.sessions)
        self.add_value("up", [name], 1)
        for metric, (_, value) in (_COUNTERS | _GAUGES).items():
            self.add_value(metric, [name], value(stats))
        self.add_value("evicted", [name, "no"], stats.evicted - stats.evicted_owned)
        self.add_value("evicted", [name, "yes"], stats.evicted_owned)
        self.add_value("sessions", [name, "live"], stats.sessions - expired)
        self.add_value("sessions", [name, "expired"], expired)  # not pruned yet
        if arena is not None:
            self._add_memory(name, arena)
            self.add_value("snapshot_failures", [name], stats.snapshot_failures)
        if stats.snapshot_age is not None:
            self.add_value("snapshot_age_seconds", [name], stats.snapshot_age)

    def _add_memory(self, name: str, arena: Arena) -> None:
        waited, counts = arena.counters.waits()
        self.add_value("used_blocks", [name], arena.cells[USED_BLOCKS])
        self.add_value("blocks", [name], arena.geometry.blocks)
        upper = ["+Inf" if bound == float("inf") else str(bound) for bound in WAITS]
        self._waits.add_metric([name], [*zip(upper, accumulate(counts), strict=True)], waited / 1e9)
