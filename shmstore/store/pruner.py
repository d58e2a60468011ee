"""The automatic prune: a thread that calls ``prune`` periodically and holds only a weak reference to the store."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Protocol

from shmstore.errors import ShmStoreError, StoreUnavailable, safe_traceback
from shmstore.options import Duration, seconds
from shmstore.system.processes import PROCESS_LIMIT_ADVICE
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")


class Prunable(Protocol):
    """An object with a ``prune``, and a name for the log."""

    @property
    def label(self) -> str: ...

    def prune(self) -> int:
        """Remove the expired sessions; return their number."""


class Interval:
    """Calls ``store.prune()`` periodically, in a daemon thread that ends with the store."""

    def __init__(self, store: Prunable) -> None:
        self._store = weakref.ref(store)
        self._stop = threading.Event()
        self._finalizer = weakref.finalize(store, self._stop.set)

    def start(self, period: Duration | None) -> None:
        """
        Prune every ``period`` from now on; None or 0: never.

        Raises:
            ValueError: The period is negative.
            StoreUnavailable: No thread can be started.
        """
        pause = 0.0 if period is None else seconds(period, "period")
        if pause < 0:
            raise ValueError(f"period must be at least 0 seconds, not {period!r}")
        self.stop()
        if pause > 0:
            stop = self._stop = threading.Event()
            self._finalizer.detach()
            if (store := self._store()) is not None:
                self._finalizer = weakref.finalize(store, stop.set)
            arguments = (self._store, stop, pause)
            try:
                threading.Thread(target=_run, args=arguments, name="shmstore-prune", daemon=True).start()
            except RuntimeError as exc:
                raise StoreUnavailable(f"no automatic prune: {exc}{PROCESS_LIMIT_ADVICE}") from exc

    def stop(self) -> None:
        """Stop pruning. A prune in progress is completed."""
        self._stop.set()


def _run(reference: weakref.ref[Prunable], stop: threading.Event, period: float) -> None:
    failing = Throttle()
    # A longer wait than threading.TIMEOUT_MAX, some centuries, raises an error.
    while not stop.wait(min(period, threading.TIMEOUT_MAX)):
        store = reference()
        if store is None:
            return
        try:
            pruned = store.prune()
        except Exception as exc:
            if stop.is_set():
                return  # the store was closed meanwhile
            if times := failing.due():
                level, why = (
                    (logging.WARNING, exc) if isinstance(exc, ShmStoreError) else (logging.ERROR, safe_traceback(exc))
                )
                log.log(level, "%s: failed automatic prunes: %d; the next one follows: %s", store.label, times, why)
        else:
            if pruned:
                log.debug("%s: pruned %d expired sessions", store.label, pruned)
        del store
