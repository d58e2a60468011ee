"""
Taking turns between hosts: a lock by name that belongs to one holder, and goes if that does not renew it.

The kernel frees a lock of a process that dies; a server cannot know of that. So a lock lasts for some seconds, and one
thread in each process renews those that are held there.
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

__all__ = ["Turns"]

_LEASE: Final = 9.0  # seconds: so long the others wait for one who has died
_RENEWED_EVERY: Final = 3.0
_SHORTEST, _LONGEST = 0.001, 0.05  # seconds between attempts


class Turns:
    """The locks that this process holds on a server."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._pid, self._held = os.getpid(), dict[str, str]()  # in which process; holder -> key
        self._renewer: threading.Thread | None = None

    @contextmanager
    def held(self, key: str, timeout: float) -> Iterator[None]:
        """
        Hold a lock.

        Raises:
            StoreTimeout: Another has it for longer than that.
            StoreUnavailable: The server cannot be asked.
        """
        holder, end, pause = secrets.token_hex(8), time.monotonic() + timeout, _SHORTEST
        lease, taken = int(_LEASE * 1000), True
        try:
            try:
                while self._link.write("SET", key, holder, "NX", "PX", lease) is None:
                    if (left := end - time.monotonic()) <= 0:
                        raise StoreTimeout(f"somebody else has had the lock of this session for {timeout:g} s")
                    time.sleep(min(pause, left))
                    pause = min(2 * pause, _LONGEST)
            except ShmStoreError:
                taken = False  # if only the answer was lost, the lock ends with its lease
                raise
            self._renew_from_now(holder, key)
            yield
        finally:
            self._held.pop(holder, None)  # first, and by a call into C: whatever happens next, the lease ends
            if taken:
                with suppress(ShmStoreError):
                    self._link.write(*RELEASE.on([key], holder))

    def _renew_from_now(self, holder: str, key: str) -> None:
        if self._pid != os.getpid():  # a child of fork: those locks are its parent's
            self._pid, self._held, self._renewer = os.getpid(), {}, None
        self._held[holder] = key
        if self._renewer is None or not self._renewer.is_alive():
            self._renewer = threading.Thread(target=self._renew, name="shmstore-turns", daemon=True)
            self._renewer.start()

    def _renew(self) -> None:
        while True:
            time.sleep(_RENEWED_EVERY)
            if not self._held:
                self._renewer = None  # first: a lock that is taken from now on starts another thread
                if not self._held:
                    return
            for holder, key in self._held.copy().items():
                with suppress(ShmStoreError):
                    self._link.write(*RENEW.on([key], holder, int(_LEASE * 1000)))
