"""The connections of a process to the server of a store."""

from __future__ import annotations

import contextlib
import math
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shmstore.errors import StoreUnavailable
from shmstore.ipc.channel import Channel
from shmstore.ipc.peer import Peer
from shmstore.system.blocking import before_blocking
from shmstore.system.clock import Deadline
from shmstore.system.forks import notice_fork, on_fork

__all__ = ["Pool"]


class Pool:
    """
    The connections of one process to one server, each used by one call at a time.

    Not one per thread, because greenlets share threads. The mutable state is the list of idle channels and the set of
    busy ones. Each operation on them is atomic in the interpreter, so there are no locks that a child could inherit.

    An open connection also keeps the server alive. A forked child must not use the connections that it inherits, but it
    keeps them open: the server sees them close when the last process that holds them has ended.

    Args:
        dial: Opens a connection, optionally within a given number of seconds.
    """

    _MAX_IDLE = 4  # idle channels that remain after a burst of threads

    def __init__(self, dial: Callable[..., Channel]) -> None:
        self._dial = dial
        self._idle: list[Channel] = []
        self._busy: set[Channel] = set()
        self._inherited: list[Channel | socket.socket] = []
        self._closed = False
        on_fork(self)
        # For users that do not close: `StoreManager("shop").store().prune()`.
        weakref.finalize(self, _close_all, self._idle, self._inherited).atexit = False

    def adopt(self, channel: Channel) -> None:
        """Add a connection that was opened elsewhere."""
        self._idle.append(channel)
        if self._closed:  # in the meantime; an open connection would keep the server alive
            _close_all(self._idle)

    def ensure_connected(self) -> Peer:
        """
        Make sure that there is a connection; return the process at its other end.

        Raises:
            StoreUnavailable: No connection can be opened.
        """
        with self.channel() as channel:
            return channel.peer

    def call(
        self,
        ident: str,
        method: str,
        args: Any = (),
        kwargs: Any = {},  # noqa: B006
        *,
        deadline: Deadline,
        connect_timeout: float | None = None,
        send_limit: float = math.inf,
    ) -> Any:
        """
        Call a method in the server.

        Args:
            ident: `STORE` or `SERVER`.
            method: The name of the method.
            args: Its arguments.
            kwargs: Its keyword arguments.
            deadline: The deadline for the answer.
            connect_timeout: Maximum seconds for opening a connection; None: the default.
            send_limit: Maximum bytes of a request that the server accepts.

        Raises:
            Exception: The exception that the method raised in the server.
            StoreUnavailable: No server can be reached (`Disconnected`, `Unresponsive` and others).
        """
        with self.channel(connect_timeout) as channel:
            channel.send_limit = send_limit
            answer = channel.request((ident, method, args, kwargs), deadline)
        match answer:
            case ("#RETURN", result):
                return result
            case ("#ERROR", Exception() as error):
                raise error
        raise StoreUnavailable("the store's server sent an answer of an unknown kind")

    @contextmanager
    def channel(self, connect_timeout: float | None = None) -> Iterator[Channel]:
        """Take a channel for one call. It is closed after any exception, because the answer may arrive later."""
        before_blocking()
        channel = None
        try:
            channel = self._take(connect_timeout)
            self._busy.add(channel)
            yield channel
        except BaseException:
            if channel is not None:
                channel.close()
            raise
        finally:
            self._busy.discard(channel)
        if len(self._idle) < self._MAX_IDLE:
            self.adopt(channel)
        else:
            channel.close()

    def _take(self, connect_timeout: float | None) -> Channel:
        notice_fork()
        if self._closed:
            raise StoreUnavailable("this store was closed")
        while True:
            try:
                channel = self._idle.pop()
            except IndexError:
                return self._dial() if connect_timeout is None else self._dial(connect_timeout)
            if channel.is_current():
                return channel
            channel.close()

    def close_idle(self) -> None:
        """Close the idle connections, because their server has ended."""
        _close_all(self._idle)

    def close(self) -> None:
        """Close all connections, also inherited ones. A connection in mid-call is closed at the end of the call."""
        self._closed = True
        _close_all(self._idle, self._inherited)

    def after_fork_in_child(self) -> None:
        # The child starts without connections.
        detached = [channel.detach_after_fork() for channel in self._busy]
        self._busy.clear()
        self._inherited += [*self._idle, *filter(None, detached)]
        self._idle.clear()


def _close_all(*lists: list[Channel] | list[Channel | socket.socket]) -> None:
    for channels in lists:
        with contextlib.suppress(IndexError):  # the list is empty, possibly because another thread took the last one
            while True:
                channels.pop().close()
