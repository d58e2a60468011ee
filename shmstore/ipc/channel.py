"""
Numbered messages over a socket between a client and the server of a store.

No session data passes here unless a proxy works with ``in_place=False``. Connections of multiprocess are not used: they
block gevent's event loop, share one connection among all greenlets of a thread, give the answer of an interrupted call
to the next one, allocate any length that a message announces, and stay shared after a fork.
"""

from __future__ import annotations

import math
import os
import pickle
import select
import socket
import struct
from typing import Any

from shmstore.errors import RecordTooLarge, StoreTimeout, StoreUnavailable
from shmstore.ipc import peer
from shmstore.system.clock import Deadline, deadline_in
from shmstore.system.signals import pass_on_interruption

__all__ = ["REPLY_LIMIT", "STALL", "Channel", "Disconnected", "Unresponsive"]

# Seconds in which the next part of a message that has begun must arrive; otherwise the connection is closed.
STALL = 2.0
REPLY_LIMIT = 1 << 30  # bytes; for `all()` of a large store over the connection

_PACE = 10**7  # bytes per second that even a busy machine transfers
_HEADER = struct.Struct("!IQ")  # number, length
_POLL_INTERVAL = 0.25  # seconds between checks of a deadline, which may be extended meanwhile
_LAST_LOOK = 0.1  # seconds in which a message may still arrive after its deadline was found to have passed


class Disconnected(StoreUnavailable):
    """
    The connection broke in the middle of a call.

    Attributes:
        delivered: False if the request cannot have been carried out.
    """

    def __init__(self, message: str, *, delivered: bool) -> None:
        super().__init__(message)
        self.delivered = delivered


class Unresponsive(StoreTimeout):
    """The server runs and does not react."""


class Channel:
    """
    Numbered messages over a connected socket. One thread or greenlet at a time.

    Attributes:
        peer: The process at the other end.
        limit: Maximum bytes of a message that is accepted.
    """

    def __init__(self, sock: socket.socket, *, limit: int = REPLY_LIMIT) -> None:
        self.peer = peer.peer_of(sock)
        self.limit = limit
        self.send_limit: float = math.inf  # bytes that the other side accepts
        self._sock = sock
        self._last_number = 0

    def send(self, number: int, message: object) -> None:
        """
        Send a message.

        Raises:
            RecordTooLarge: The message exceeds what the other side accepts.
            OSError: The message could not be sent completely.
        """
        payload = pickle.dumps(message)
        if len(payload) > self.send_limit:
            raise RecordTooLarge(
                f"{len(payload)} bytes to send: the store's server accepts {self.send_limit}: see max_session"
            )
        self._sock.settimeout(STALL + len(payload) / _PACE)
        self._sock.sendall(b"".join((_HEADER.pack(number, len(payload)), payload)))

    def recv(self, deadline: Deadline | None = None) -> tuple[int, bytearray]:
        """
        Return the number of the next message and its pickled content.

        Args:
            deadline: The deadline for the whole message; None: wait for its beginning without a limit, and for the rest
                up to `STALL` seconds beyond the usual time.

        Raises:
            EOFError: The other side has closed.
            TimeoutError: The message did not arrive in time.
            OSError: The connection broke, or the data is not a message.
        """
        number, length = _HEADER.unpack(self.read(_HEADER.size, deadline))
        if length > self.limit:  # before anything is allocated
            raise OSError(f"a message of {length} bytes was announced, {self.limit} are allowed")
        return number, self.read(length, deadline or deadline_in(STALL + length / _PACE))

    def read(self, size: int, deadline: Deadline | None) -> bytearray:
        """Return the next ``size`` bytes; ``deadline`` and errors as in `recv`."""
        data = bytearray(size)
        view, got = memoryview(data), 0
        deadline = deadline and _with_a_last_look(deadline)
        while got < size:
            left = None if deadline is None else deadline()
            if left is not None and left <= 0:
                raise TimeoutError
            self._sock.settimeout(None if left is None else min(left, _POLL_INTERVAL))
            try:
                n = self._sock.recv_into(view[got:])
            except TimeoutError as exc:
                pass_on_interruption(exc)
                continue
            if not n:
                raise EOFError
            got += n
            if deadline is None:
                deadline = _with_a_last_look(deadline_in(STALL))
        return data

    def read_until_closed(self, limit: int, deadline: Deadline) -> bytes:
        """Return what the other side sends until it closes the connection, or ``limit`` bytes and a little more."""
        received, stall = b"", deadline_in(STALL)
        remaining = _with_a_last_look(lambda: min(deadline(), stall()))
        while len(received) < limit:
            left = remaining()
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(min(left, _POLL_INTERVAL))
            try:
                part = self._sock.recv(4096)
            except TimeoutError as exc:
                pass_on_interruption(exc)
                continue
            if not part:
                break
            received, stall = received + part, deadline_in(STALL)
        return received

    def loads(self, payload: bytes | bytearray) -> Any:
        """Return the content of a message."""
        return peer.loads(payload, self.peer.uid)

    def request(self, message: object, deadline: Deadline) -> Any:
        """
        Send a request and return its answer.

        Raises:
            Disconnected: The connection broke.
            Unresponsive: The answer did not arrive in time.
        """
        self._last_number = number = (self._last_number + 1) & 0xFFFFFFFF
        try:
            self.send(number, message)
        except OSError as exc:
            pass_on_interruption(exc)
            if isinstance(exc, TimeoutError):
                raise Unresponsive("the store's server accepts no requests") from exc
            raise Disconnected("the store's server has exited", delivered=False) from exc
        try:
            answered, payload = self.recv(deadline)
        except (EOFError, OSError) as exc:
            pass_on_interruption(exc)
            if isinstance(exc, TimeoutError):
                raise Unresponsive("the store's server does not answer") from exc
            raise Disconnected("the store's server has exited", delivered=True) from exc
        if answered != number:
            raise Disconnected(f"the answer to call {answered} came for {number}", delivered=True)
        try:
            return self.loads(payload)
        except Exception as exc:
            pass_on_interruption(exc)
            raise StoreUnavailable("the store's server sent an unreadable answer") from exc

    def is_current(self) -> bool:
        """Return whether the socket has the class that new ones have: a socket from before gevent's patching blocks."""
        return type(self._sock) is socket.socket

    def is_closed(self) -> bool:
        """Return whether either side has closed the connection."""
        poll = select.poll()  # not recv(): that would block while the socket has a timeout
        try:
            poll.register(self._sock, select.POLLRDHUP)
        except ValueError:  # closed by this process
            return True
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def detach_after_fork(self) -> socket.socket | None:
        """
        In a forked child: make sure that no byte of the parent's connection is read or written here.

        Returns:
            A socket that keeps the connection open; None if it is closed already.
        """
        # Not close(): a greenlet that was copied in mid-call would then use the next file that gets the descriptor.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            kept = self._sock.dup()
            os.dup2(null, self._sock.fileno(), inheritable=False)
        except (OSError, ValueError) as exc:  # closed in the meantime
            pass_on_interruption(exc)
            return None
        finally:
            os.close(null)
        return kept


def _with_a_last_look(deadline: Deadline) -> Deadline:
    """
    Return a deadline that passes `_LAST_LOOK` seconds after the given one is first found to have passed.

    This process, or the whole machine, may have been stopped in between: the message may have arrived, or be about to.
    """
    last: Deadline | None = None

    def left() -> float:
        nonlocal last
        remaining = deadline()
        if remaining > 0:
            return remaining
        if last is None:
            last = deadline_in(_LAST_LOOK)
        return last()

    return left
