"""
Metrics of stores for Prometheus (extra ``metrics``). All processes read the same shared memory, so each of them tells
the same numbers: no directory of files to be added up, and any worker may answer the scrape.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Final, TypeAlias

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("shmstore.metrics needs prometheus-client: pip install 'shmstore[metrics]'") from error

from shmstore.contract import Capability
from shmstore.engine.counters import WAITS
from shmstore.engine.header import USED_BLOCKS
from shmstore.errors import ShmStoreError

if TYPE_CHECKING:
    from shmstore.contract import AnyStore, Stats
    from shmstore.engine.arena import Arena

    Given: TypeAlias = AnyStore | Callable[[], AnyStore]

__all__ = ["StoreCollector"]

log = logging.getLogger("shmstore")

_COUNTERS: Final[dict[str, tuple[str, Callable[[Stats], float]]]] = {
    "hits": ("Reads that found their session.", lambda stats: stats.hits),
    "misses": ("Reads that found none, or an expired one.", lambda stats: stats.misses),
    "sets": ("Sessions written: created, overwritten, updated, renamed.", lambda stats: stats.sets),
    "touches": ("Lives renewed without writing.", lambda stats: stats.touches),
    "destroys": ("Sessions removed on request, by clear too.", lambda stats: stats.destroyed + stats.cleared),
    "expired": ("Expired sessions removed.", lambda stats: stats.expired),
    "refused": ("Writes refused because the session was too large.", lambda stats: stats.refused),
    "unreadable": (
        "Times that a record, or a value in one, was left out because it cannot be read.",
        lambda stats: stats.corrupt,
    ),
    "dispose_errors": ("Exceptions that dispose raised.", lambda stats: stats.dispose_errors),
    "displaced": (
        "Live sessions removed because their owner has max_per_owner newer ones.",
        lambda stats: stats.displaced,
    ),
    "rebuilds": ("Times that damaged memory was carried over to another file.", lambda stats: stats.rebuilds),
    "server_restarts": ("Server processes that took over from one that was gone.", lambda stats: stats.server_restarts),
}
_OF_SERVER: Final = {"expired", "rebuilds", "server_restarts"}
"""Counters that a store without `Capability.SHARED_FIGURES` has of the whole server."""
_GAUGES: Final[dict[str, tuple[str, Callable[[Stats], float]]]] = {
    "owned_sessions": ("Sessions that have an owner.", lambda stats: stats.owned),
    "used_bytes": ("Bytes of the memory that are taken.", lambda stats: stats.bytes),
    "memory_bytes": ("Bytes of shared memory in all.", lambda stats: stats.memory),
    "server_uptime_seconds": ("Seconds since the server began.", lambda stats: stats.server_uptime),
}


class StoreCollector(Collector):
    """
    What `Store.stats` tells, as metrics whose names begin with ``shmstore_``.

    ```python
    registry = CollectorRegistry()
    registry.register(StoreCollector(sessions.store, "shop"))
    ```

    Counters begin with the memory of the store, which a restart of Gunicorn leaves as it is. Of a store that cannot be
    reached there is only ``shmstore_up 0``. A registry takes one collector, and a collector any number of stores:
    ``StoreCollector({"shop": shop, "intranet": intranet})``. Of a `RedisStore` each process counts what it did itself:
    these counters have the label ``process``, its pid, and are to be summed up. There are no figures of shared memory.

    Args:
        store: The store; or a function that gives it, which is called at each scrape; or several of either, by name.
        name: The label ``store`` of all metrics of the one store.
    """

    def __init__(self, store: Given | Mapping[str, Given], name: str = "sessions") -> None:
        self._stores: dict[str, Given] = dict(store) if isinstance(store, Mapping) else {name: store}

    def describe(self) -> list[Metric]:
        """Return the metrics without a figure: registering a collector opens no store."""
        return [*_Families()]

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        families = _Families()
        for name, given in self._stores.items():
            try:
                families.add(name, given() if callable(given) else given)
            except ShmStoreError:
                families.say("up", [name], 0)
            except Exception:  # in the function of one of several: it must not cost the others
                log.exception("store %r: the function that gives it to its metrics failed", name)
                families.say("up", [name], 0)
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
            "shmstore_lock_wait_seconds", "How long it took to get the lock, if it was not free.", labels=["store"]
        )
        self._gauge("sessions", "Sessions stored.", "state")
        for name, (about, _) in _GAUGES.items():
            self._gauge(name, about)
        self._gauge("used_blocks", "Blocks of memory that are taken.")
        self._gauge("blocks", "Blocks of memory in all.")
        self._gauge("snapshot_age_seconds", "Seconds since the snapshot held all that is stored; absent without one.")
        self._gauge("snapshot_failures", "Attempts to save the snapshot that have failed since the last that did not.")

    def _gauge(self, name: str, about: str, *labels: str) -> None:
        self._named[name] = GaugeMetricFamily(f"shmstore_{name}", about, labels=["store", *labels])

    def _counter(self, name: str, about: str, *labels: str) -> None:
        self._named[name] = CounterMetricFamily(f"shmstore_{name}", about, labels=["store", *labels])

    def say(self, name: str, labels: list[str], value: float) -> None:
        """Add a figure."""
        self._named[name].add_metric(labels, value)

    def __iter__(self) -> Iterator[Metric]:
        yield from self._named.values()
        yield self._waits

    def add(self, name: str, store: AnyStore) -> None:
        """
        Add the figures of a store.

        Raises:
            ShmStoreError: It cannot be read; none is added.
        """
        stats, arena, expired = store.stats(), getattr(store, "arena", None), 0
        if arena is not None:
            expired = min(
                len(arena.table.expired_slots(store.options.clock())), stats.sessions
            )  # others go on meanwhile
        self.say("up", [name], 1)
        # What each process counts for itself is a series of its own: together they would look like one that is reset.
        own = () if Capability.SHARED_FIGURES in store.capabilities else _COUNTERS.keys() - _OF_SERVER
        for figure, (_, value) in (_COUNTERS | _GAUGES).items():
            if figure in own:
                labels = {"store": name, "process": str(os.getpid())}
                self._named[figure].add_sample(f"shmstore_{figure}_total", labels, value(stats))
            else:
                self.say(figure, [name], value(stats))
        self.say("evicted", [name, "no"], stats.evicted - stats.evicted_owned)
        self.say("evicted", [name, "yes"], stats.evicted_owned)
        self.say("sessions", [name, "live"], stats.sessions - expired)
        self.say("sessions", [name, "expired"], expired)  # and not pruned yet
        if arena is not None:
            self._add_memory(name, arena)
            self.say("snapshot_failures", [name], stats.snapshot_failures)
        if stats.snapshot_age is not None:
            self.say("snapshot_age_seconds", [name], stats.snapshot_age)

    def _add_memory(self, name: str, arena: Arena) -> None:
        waited, counts = arena.counters.waits()
        self.say("used_blocks", [name], arena.cells[USED_BLOCKS])
        self.say("blocks", [name], arena.geometry.blocks)
        upper = ["+Inf" if bound == float("inf") else str(bound) for bound in WAITS]
        self._waits.add_metric([name], [*zip(upper, accumulate(counts), strict=True)], waited / 1e9)
