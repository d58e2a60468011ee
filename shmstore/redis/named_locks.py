"""
Named locks between hosts: a lock belongs to one holder, and expires unless its holder renews it.

The kernel releases the locks of a process that dies; a server cannot detect the death. Therefore a lock is a lease of
some seconds, and one thread in each process renews the leases of that process.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from shmstore.errors import ShmStoreError, StoreTimeout
from shmstore.redis.link import Link
from shmstore.redis.scripts import RELEASE, RENEW

__all__ = ["NamedLocks"]

_LEASE: Final = 9.0  # seconds that other processes wait for a lock whose holder has died
_RENEWAL_PERIOD: Final = 3.0
_MIN_PAUSE, _MAX_PAUSE = 0.001, 0.05  # seconds between attempts


class NamedLocks:
    """The locks that this process holds on a server."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._pid, self._held = os.getpid(), dict[str, str]()  # the process; its locks: holder -> key
        self._renewer: threading.Thread | None = None

    @contextmanager
    def held(self, key: str, timeout: float) -> Iterator[None]:
        """
        Hold a lock.

        Raises:
            StoreTimeout: The lock was not free for ``timeout`` seconds.
            StoreUnavailable: The server cannot be reached.
        """
        holder, end, pause = secrets.token_hex(8), time.monotonic() + timeout, _MIN_PAUSE
        lease, taken = int(_LEASE * 1000), True
        try:
            try:
                while self._link.write("SET", key, holder, "NX", "PX", lease) is None:
                    if (left := end - time.monotonic()) <= 0:
                        raise StoreTimeout(f"another process or thread has held this session's lock for {timeout:g} s")
                    time.sleep(min(pause, left))
                    pause = min(2 * pause, _MAX_PAUSE)
            except ShmStoreError:
                taken = False  # if only the answer was lost, the lock expires with its lease
                raise
            self._start_renewing(holder, key)
            yield
        finally:
            self._held.pop(holder, None)  # first, and one call into C: the lease expires whatever happens next
            if taken:
                with suppress(ShmStoreError):
                    self._link.write(*RELEASE.on([key], holder))

    def _start_renewing(self, holder: str, key: str) -> None:
        if self._pid != os.getpid():  # a forked child: these locks are its parent's
            self._pid, self._held, self._renewer = os.getpid(), {}, None
        self._held[holder] = key
        if self._renewer is None or not self._renewer.is_alive():
            self._renewer = threading.Thread(target=self._renew, name="shmstore-locks", daemon=True)
            self._renewer.start()

    def _renew(self) -> None:
        while True:
            time.sleep(_RENEWAL_PERIOD)
            if not self._held:
                self._renewer = None  # first: a lock taken from now on starts another thread
                if not self._held:
                    return
            for holder, key in self._held.copy().items():
                with suppress(ShmStoreError):
                    self._link.write(*RENEW.on([key], holder, int(_LEASE * 1000)))
