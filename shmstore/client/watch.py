"""
Watching the server of a store from the process of its manager, and starting it again when it has died.

A process without a manager starts a server when a write finds none: see `Attachment._check_server`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from shmstore.client import connection
from shmstore.client.pool import Pool
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.engine.header import HEARTBEAT
from shmstore.engine.layout import CELL
from shmstore.errors import StoreUnavailable
from shmstore.ipc.channel import Unresponsive
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.rpc import STORE
from shmstore.system.clock import deadline_in
from shmstore.system.files import open_nofollow
from shmstore.system.processes import Process

__all__ = ["Watch", "heartbeat"]

log = logging.getLogger("shmstore")

_CHECK_INTERVAL = 1.0  # seconds between checks of the heartbeat
_MAX_MISSED = 3  # checks in a row without a new heartbeat, after which the server counts as hung
_PAUSE, _MAX_PAUSE = 0.1, 30.0  # seconds between attempts to restart the server


class Watch:
    """
    Keeps the server of a store running: detects its exit by a pidfd, and kills it if its heartbeat has stopped and it
    does not answer.

    It runs in a thread, which does not exist in forked children. As a greenlet it does, and returns there.
    """

    def __init__(self, files: StoreFiles, pool: Pool) -> None:
        self.stopped = False
        self._files = files
        self._pool = pool
        self._pid = os.getpid()
        self._restarting = GreenletLock()  # held to kill or restart the server, so that neither happens after `stop`

    def stop(self) -> None:
        """Stop watching. A kill or restart in progress is completed before this returns."""
        self.stopped = True
        self._unless_stopped(lambda: None)

    def run(self) -> None:
        pause = _PAUSE
        while not self._is_stopped():
            try:
                self._wait_for_exit()
            except (StoreUnavailable, ProcessLookupError):
                pass
            except OSError:
                time.sleep(_CHECK_INTERVAL)  # no free file descriptor: an immediate retry would spin
            if self._is_stopped():
                return
            if _has_exited(self._files):
                log.info("store %r: its server has exited normally", self._files.name)
                return
            try:
                self._unless_stopped(self._restart)
                pause = _PAUSE
            except Exception as exc:
                log.warning(
                    "store %r: its server cannot be started: %s; next try in %g s", self._files.name, exc, pause
                )
                time.sleep(pause)
                pause = min(2 * pause, _MAX_PAUSE)

    def _is_stopped(self) -> bool:
        return self.stopped or os.getpid() != self._pid

    def _unless_stopped(self, work: Callable[[], object]) -> None:
        ticket = self._restarting.ticket()
        try:
            ticket.acquire()
            if not self._is_stopped():
                work()
        finally:
            ticket.release()

    def _wait_for_exit(self) -> None:
        """
        Return, or raise `StoreUnavailable`, when the server does not run any more. A hung server is killed.

        A server whose heartbeat stops, or cannot be read, is asked before it is killed. Missed heartbeats are counted
        instead of seconds: after a suspend or a freeze of both processes, the age of the heartbeat says nothing.
        """
        with Process(self._pool.ensure_connected().pid) as process:
            beat = missed = 0
            while not self._is_stopped() and not process.wait(_CHECK_INTERVAL):
                last = beat
                with suppress(OSError):
                    beat = heartbeat(self._files)
                missed = missed + 1 if beat == last else 0
                if missed == _MAX_MISSED:
                    missed = 0
                    try:
                        self._pool.call(STORE, "ping", deadline=deadline_in(connection.ANSWER_TIMEOUT))
                    except Unresponsive:
                        self._unless_stopped(lambda: connection.kill(self._files))

    def _restart(self) -> None:
        self._pool.close_idle()
        channel, started = connection.connect_or_start(self._files)
        self._pool.adopt(channel)
        if started:
            log.warning("store %r: its server had died; started process %d", self._files.name, channel.peer.pid)


def _has_exited(files: StoreFiles) -> bool:
    """Return whether the server has exited normally: it has set its heartbeat to 0, or removed the store."""
    try:
        return not heartbeat(files)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def heartbeat(files: StoreFiles) -> int:
    """Return the boot time of the server's last heartbeat, in nanoseconds; 0: the server has exited normally."""
    # The file is not mapped: it may belong to another user, whose data a root process must not rely on.
    fd = open_nofollow(files.arena)
    try:
        return int.from_bytes(os.pread(fd, CELL, HEARTBEAT * CELL) or b"\1", sys.byteorder)
    finally:
        os.close(fd)
