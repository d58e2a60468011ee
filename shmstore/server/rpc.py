"""
The control connection: numbered messages over a socket, and the pool of such connections in a process.

No session data passes here unless a proxy works with ``in_place=False``. Connections of multiprocess are not used: they
block gevent's event loop, share one connection among all greenlets of a thread, give the answer of an interrupted call
to the next one, allocate any length that a message announces, and stay shared after a fork.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import re
import select
import socket
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from shmstore.engine import layout
from shmstore.errors import RecordTooLarge, ShmStoreError, StoreTimeout, StoreUnavailable
from shmstore.system import version
from shmstore.system.blocking import before_blocking
from shmstore.system.forks import on_fork
from shmstore.system.signals import pass_on_interruption

# The greeting. Its form never changes, so that processes of any two versions understand each other.
#
# The client sends 16 bytes: b"shmstore", and as big-endian numbers the protocol (2 bytes), the layout of the arena (2)
# and its release (4; see system/version.py). Release 0 means any release of this protocol and layout. The server sends
# - the same 16 bytes, if it serves this client: what follows is of the protocol;
# - b"shmstore" and 8 bytes 00, if it cannot take another connection; then it closes;
# - b"shmstore" and 8 bytes ff, if it is of another version. If processes use it, or the client has sent release 0, it
#   adds a JSON object and closes: "protocol", "layout", "shmstore" (its version), "python", "pid" and "users", the pids
#   of the processes that use it. Otherwise the client has asked it to exit: it saves its snapshot and ends, closing the
#   connection. Until then it sends a space at intervals as a sign of life. If a process starts to use it in the
#   meantime, it stays, adds the JSON object and closes.
MAGIC: Final = b"shmstore"
PROTOCOL: Final = 3
FULL: Final = MAGIC + bytes(8)
OTHER: Final = MAGIC + b"\xff" * 8
_MAX_ANSWER = 65536  # bytes of white space and JSON


def greeting(release: int = 0) -> bytes:
    """Return a client's greeting. A ``release`` (`version.fingerprint`) asks a server of another release to exit."""
    return MAGIC + struct.pack(">HHI", PROTOCOL, layout._VERSION, release)


GREETING: Final = greeting()


def describe_server(users: list[int]) -> bytes:
    """Return the JSON object that a server sends to a client of another version."""
    facts = {"protocol": PROTOCOL, "layout": layout._VERSION, "shmstore": version.VERSION, "python": version.PYTHON}
    return json.dumps({**facts, "pid": os.getpid(), "users": users}).encode()


# What a client can call: the store's own methods, and these of its server. All other calls are refused.
STORE = "store"
STORE_METHODS = frozenset({
    "get", "peek", "load", "set", "add", "replace", "update", "touch", "destroy", "rename", "__contains__",
    "destroy_if_empty", "take_stale", "drop_pending", "gone", "ids", "all", "length", "clear", "prune",
    "start_interval", "stop_interval", "owned_by", "destroy_owned", "stats", "ping",
})  # fmt: skip
SERVER = "server"
SERVER_METHODS = frozenset({"apply", "release", "repair", "shutdown"})

# Seconds in which the next part of a message that has begun must arrive; otherwise the connection is closed.
STALL = 2.0
_MAX_SHOWN = 20  # processes that an error names
_WORD = re.compile(r"[ -~]{1,64}")
_PACE = 10**7  # bytes per second that even a busy machine transfers
REPLY_LIMIT = 1 << 30  # bytes; for `all()` of a large store over the connection

_HEADER = struct.Struct("!IQ")  # number, length
_CREDENTIALS = struct.Struct("3i")
_POLL_INTERVAL = 0.25  # seconds between checks of a deadline, which may be extended meanwhile

Deadline = Callable[[], float]
"""Returns the seconds that are left; 0 or less: the time is up."""


class Peer(NamedTuple):
    """The process at the other end, as the kernel knows it."""

    pid: int
    uid: int
    gid: int


class Disconnected(StoreUnavailable):
    """
    The connection broke in the middle of a call.

    Attributes:
        delivered: False if the request cannot have been carried out.
    """

    def __init__(self, message: str, *, delivered: bool) -> None:
        super().__init__(message)
        self.delivered = delivered


class ConnectionLimitReached(StoreUnavailable):
    """The server runs and cannot take another connection."""


class Unresponsive(StoreTimeout):
    """The server runs and does not react."""


class OtherVersion(StoreUnavailable):
    """
    The server is of another version of shmstore or of Python, and other processes use it.

    Attributes:
        compatible: Whether it serves a client that does not name its release.
        python: The Python that runs it, in the form of `version.PYTHON`.
        users: The processes that use it, as text.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self.compatible = (facts["protocol"], facts["layout"]) == (PROTOCOL, layout._VERSION)
        self.python: str = facts["python"]
        pids = [str(pid) for pid in facts["users"][:_MAX_SHOWN]]
        if more := len(facts["users"]) - len(pids):
            pids.append(f"{more} more")
        several = f"processes {', '.join(pids)} use it"
        self.users = several if len(pids) > 1 else f"{f'process {pids[0]}' if pids else 'no process'} uses it"
        other = f"shmstore {facts['shmstore']} on {self.python}, layout {facts['layout']}"
        super().__init__(
            f"the store's server, process {facts['pid']}, is {other}; this is {version.describe()}, layout "
            f"{layout._VERSION}; {self.users}: stop all processes that use the store, then start them"
        )

    @classmethod
    def parse(cls, data: bytes) -> OtherVersion | None:
        """Return the error for the JSON object from a server of another version; None if it is not such an object."""
        try:
            facts: Any = json.loads(data) if len(data) < _MAX_ANSWER else None
        except (ValueError, RecursionError):
            return None
        # A server of another user may have written it, and a root process shows it in its log.
        valid = (
            isinstance(facts, dict)
            and all(_is_number(facts.get(name)) for name in ("protocol", "layout", "pid"))
            and all(_is_word(facts.get(name)) for name in ("shmstore", "python"))
            and isinstance(facts.get("users"), list)
            and all(map(_is_number, facts["users"]))
        )
        return cls(facts) if valid else None


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32  # excludes bool


def _is_word(value: object) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def peer_of(sock: socket.socket) -> Peer:
    """Return the credentials of the process that connected, or called ``listen``, at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(raw))


def trusted(uid: int) -> bool:
    """
    Return whether this process may unpickle what a process of that user sends: unpickling can run any code.

    All three ids count, because a root process that has only lowered its effective uid can become root again.
    """
    return uid == 0 or os.getresuid() == (uid, uid, uid)


def deadline_in(seconds: float) -> Deadline:
    """Return the deadline that is ``seconds`` from now."""
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


class Channel:
    """
    Numbered messages over a connected socket. One thread or greenlet at a time.

    Attributes:
        peer: The process at the other end.
        limit: Maximum bytes of a message that is accepted.
    """

    def __init__(self, sock: socket.socket, *, limit: int) -> None:
        self.peer = peer_of(sock)
        self.limit = limit
        self.send_limit: float = math.inf  # bytes that the other side accepts
        self._sock = sock
        self._last_number = 0

    @classmethod
    def greet(
        cls, sock: socket.socket, deadline: Deadline, *, limit: int = REPLY_LIMIT, leaving: Deadline | None = None
    ) -> Channel:
        """
        Exchange greetings as a client. The answer proves that the server serves, not only that it listens.

        Args:
            sock: The connection.
            deadline: The deadline for the answer.
            limit: Maximum bytes of a message that is accepted.
            leaving: Ask a server of another version to exit, and wait until this deadline for its end. None: do not
                ask.

        Raises:
            Unresponsive: The server did not answer, or did not exit, in time.
            OtherVersion: The server is of another version.
            Disconnected: The server is exiting.
            ConnectionLimitReached: The server cannot take another connection.
            StoreUnavailable: The answer is not that of a store's server.
        """
        channel, sent = cls(sock, limit=limit), greeting(0 if leaving is None else version.fingerprint())
        try:
            with contextlib.suppress(BrokenPipeError):  # the server may have sent its reason and closed
                sock.sendall(sent)
            answer = channel._read(len(sent), deadline)
            facts = channel._read_until_closed(leaving or deadline) if answer == OTHER else b""
        except TimeoutError as exc:
            pass_on_interruption(exc)
            raise Unresponsive("the store's server does not answer") from exc
        except (EOFError, OSError) as exc:
            pass_on_interruption(exc)
            raise Disconnected("the store's server has just exited", delivered=False) from exc
        if answer == OTHER:
            if len(facts) < _MAX_ANSWER and not facts.strip():
                raise Disconnected("the store's server has just exited", delivered=False)
            if other := OtherVersion.parse(facts):
                raise other
        if answer == FULL:
            raise ConnectionLimitReached("the store's server cannot take another connection: see its log")
        if answer != sent:
            raise StoreUnavailable("the process that listens on the store's socket is not a store's server")
        return channel

    def _read_until_closed(self, deadline: Deadline) -> bytes:
        """Return what a server of another version sends until it closes the connection or exceeds the limit."""
        received, stall = b"", deadline_in(STALL)
        while len(received) < _MAX_ANSWER:
            left = min(deadline(), stall())
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
        number, length = _HEADER.unpack(self._read(_HEADER.size, deadline))
        if length > self.limit:  # before anything is allocated
            raise OSError(f"a message of {length} bytes was announced, {self.limit} are allowed")
        return number, self._read(length, deadline or deadline_in(STALL + length / _PACE))

    def loads(self, payload: bytes | bytearray) -> Any:
        """Return the content of a message."""
        if trusted(self.peer.uid):
            return pickle.loads(payload)  # noqa: S301
        return _PlainUnpickler(io.BytesIO(payload)).load()

    def _read(self, size: int, deadline: Deadline | None) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
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
                deadline = deadline_in(STALL)
        return data

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
        except (OSError, ValueError):  # closed in the meantime
            return None
        finally:
            os.close(null)
        return kept


class _PlainUnpickler(pickle.Unpickler):
    """
    Accepts plain data and known exceptions from a server of another user.

    A root master that serves as another user (Gunicorn's ``--user``) communicates with that user's server, and must not
    run any code that it sends.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in ("shmstore.errors", "builtins") else None
        if isinstance(found, type) and (
            issubclass(found, ShmStoreError) or found in (ValueError, TypeError, AttributeError)
        ):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not accepted from another user")


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
