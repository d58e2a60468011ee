"""The control connection: a channel of numbered messages over a socket, and the pool of them a process holds.

No session passes here unless a proxy works with ``in_place=False``. Why not multiprocess' own connections: they
read the descriptor behind gevent's back, share one connection among all greenlets of a thread, hand the answer of an
interrupted call to the next one, allocate whatever length a message announces, and are shared after a fork.
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

from multiprocess.reduction import ForkingPickler

from shmstore.engine import layout
from shmstore.errors import RecordTooLarge, ShmStoreError, StoreTimeout, StoreUnavailable
from shmstore.system import version
from shmstore.system.forks import on_fork
from shmstore.system.signals import pass_on_interruption

# What is said first. Its form never changes: by it processes of any two versions understand each other.
#
# The client sends 16 bytes: b"shmstore", and as big-endian numbers the protocol (2 bytes), the layout of the arena (2)
# and its release (4; see system/version.py). Release 0 means any release of this protocol and layout. The server sends
# - the same 16 bytes, if it serves this client: what follows is of the protocol;
# - b"shmstore" and 8 bytes 00, if it has no room for another connection; then it closes;
# - b"shmstore" and 8 bytes ff, if it is of another version. If processes use it, or the client has sent release 0, it
#   adds a JSON object and closes: "protocol", "layout", "shmstore" (its version), "python", "pid" and "users", the pids
#   of the processes that use it. If not, the client has asked it to leave: it saves its snapshot and ends, which closes
#   the connection. Until then it sends a space now and then, as a sign of life; should a process begin to use it
#   meanwhile, it stays, adds the JSON object and closes.
MAGIC: Final = b"shmstore"
PROTOCOL: Final = 3
FULL: Final = MAGIC + bytes(8)
OTHER: Final = MAGIC + b"\xff" * 8
_LONGEST_ANSWER = 65536  # bytes of white space and JSON


def greeting(number: int = 0) -> bytes:
    """Return what a client says first. ``number`` is its `release.number` if a server of another one shall leave."""
    return MAGIC + struct.pack(">HHI", PROTOCOL, layout._VERSION, number)


GREETING: Final = greeting()


def about(users: list[int]) -> bytes:
    """Return what a server tells a client of another version."""
    told = {"protocol": PROTOCOL, "layout": layout._VERSION, "shmstore": version.VERSION, "python": version.PYTHON}
    return json.dumps({**told, "pid": os.getpid(), "users": users}).encode()


# What a client can call: the store's own methods, and these of its server. Nothing else, whatever it asks for.
STORE = "store"
STORE_METHODS = frozenset({
    "get", "peek", "load", "set", "add", "replace", "update", "touch", "destroy", "rename", "__contains__",
    "destroy_if_empty", "take_stale", "drop_pending", "gone", "ids", "all", "length", "clear", "prune",
    "start_interval", "stop_interval", "owned_by", "destroy_owned", "stats", "ping",
})  # fmt: skip
SERVER = "server"
SERVER_METHODS = frozenset({"apply", "release", "repair", "shutdown"})

# A message that has begun must go on: whoever stops in the middle of one is cut off.
STALL = 2.0
_SHOWN = 20  # processes that an error names
_WORD = re.compile(r"[ -~]{1,64}")
_PACE = 10**7  # bytes per second that even a busy machine moves
REPLY_LIMIT = 1 << 30  # bytes; `all()` of a large store, asked for over the connection

_HEADER = struct.Struct("!IQ")  # number, length
_CREDENTIALS = struct.Struct("3i")
_SLICE = 0.25  # seconds between looks at a patience that may have been renewed

Patience = Callable[[], float]
"""Tells how many more seconds to wait."""


class Peer(NamedTuple):
    """Who is at the other end, as the kernel knows it."""

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


class NoRoom(StoreUnavailable):
    """The server is there, and has no room for another connection."""


class Unresponsive(StoreTimeout):
    """The server is there and does not move."""


class OtherVersion(StoreUnavailable):
    """
    The server is of another version of shmstore or of Python, and other processes use it.

    Attributes:
        speaks: Whether it serves a client that does not name its release.
        python: The Python it runs, as `release.PYTHON`.
        users: Which processes use it, in words.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        self.speaks = (told["protocol"], told["layout"]) == (PROTOCOL, layout._VERSION)
        self.python: str = told["python"]
        pids = [str(pid) for pid in told["users"][:_SHOWN]]
        if more := len(told["users"]) - len(pids):
            pids.append(f"{more} more")
        several = f"processes {', '.join(pids)} use it"
        self.users = several if len(pids) > 1 else f"{f'process {pids[0]}' if pids else 'no process'} uses it"
        theirs = f"shmstore {told['shmstore']} on {self.python}, layout {told['layout']}"
        super().__init__(
            f"the store's server, process {told['pid']}, is of {theirs}, this is {version.describe()}, layout "
            f"{layout._VERSION}; {self.users}: stop all processes that use the store, then start them"
        )

    @classmethod
    def told(cls, said: bytes) -> OtherVersion | None:
        """Return what the JSON object of another version means; None if it is not such an object."""
        try:
            told: Any = json.loads(said) if len(said) < _LONGEST_ANSWER else None
        except (ValueError, RecursionError):
            return None
        # A server of another user may have written it, and a root process shows it in its log.
        sound = (
            isinstance(told, dict)
            and all(_is_number(told.get(name)) for name in ("protocol", "layout", "pid"))
            and all(isinstance(told.get(name), str) and _WORD.fullmatch(told[name]) for name in ("shmstore", "python"))
            and isinstance(told.get("users"), list)
            and all(map(_is_number, told["users"]))
        )
        return cls(told) if sound else None


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**32  # no bool


def peer_of(sock: socket.socket) -> Peer:
    """Return the credentials of the process that connected, or called ``listen``, at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(raw))


def trusted(uid: int) -> bool:
    """
    Return whether this process may run what a process of that user sends: unpickling is running.

    All three ids count: a root process that has only lowered its effective one can become root again.
    """
    return uid == 0 or os.getresuid() == (uid, uid, uid)


def within(seconds: float) -> Patience:
    """Return a patience that ends ``seconds`` from now."""
    deadline = time.monotonic() + seconds
    return lambda: deadline - time.monotonic()


class Channel:
    """
    Numbered messages over a connected socket. One thread or greenlet at a time.

    Attributes:
        peer: Who is at the other end.
        limit: The most bytes of a message that is accepted.
    """

    def __init__(self, sock: socket.socket, *, limit: int) -> None:
        self.peer = peer_of(sock)
        self.limit = limit
        self.most: float = math.inf  # bytes that the other side accepts
        self._sock = sock
        self._sends = 0

    @classmethod
    def greet(
        cls, sock: socket.socket, patience: Patience, *, limit: int = REPLY_LIMIT, leaving: Patience | None = None
    ) -> Channel:
        """
        As a client: exchange greetings. The answer proves that the server serves, not only that it listens.

        Args:
            sock: The connection.
            patience: How long to wait for the answer.
            limit: The most bytes of a message that is accepted.
            leaving: Ask a server of another version to leave, and wait so long for its end. None: do not ask.

        Raises:
            Unresponsive: It did not answer in time, or did not leave.
            OtherVersion: It is of another version.
            Disconnected: It is leaving.
            NoRoom: It has no room for another connection.
            StoreUnavailable: Its answer is none that a server of a store gives.
        """
        channel, said = cls(sock, limit=limit), greeting(0 if leaving is None else version.fingerprint())
        try:
            with contextlib.suppress(BrokenPipeError):  # it may have said why, and closed
                sock.sendall(said)
            answer = channel._read(len(said), patience)
            told = channel._until_closed(leaving or patience) if answer == OTHER else b""
        except TimeoutError as exc:
            pass_on_interruption(exc)
            raise Unresponsive("the store's server does not answer") from exc
        except (EOFError, OSError) as exc:
            pass_on_interruption(exc)
            raise Disconnected("the store's server has just left", delivered=False) from exc
        if answer == OTHER:
            if len(told) < _LONGEST_ANSWER and not told.strip():
                raise Disconnected("the store's server has just left", delivered=False)
            if other := OtherVersion.told(told):
                raise other
        if answer == FULL:
            raise NoRoom("the store's server has no room for another connection: see its log")
        if answer != said:
            raise StoreUnavailable("what listens at the store's socket is no server of a store")
        return channel

    def _until_closed(self, patience: Patience) -> bytes:
        """Return what a server of another version says until it closes the connection, or too much if it says more."""
        said, silence = b"", within(STALL)
        while len(said) < _LONGEST_ANSWER:
            left = min(patience(), silence())
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(min(left, _SLICE))
            try:
                part = self._sock.recv(4096)
            except TimeoutError as exc:
                pass_on_interruption(exc)
                continue
            if not part:
                break
            said, silence = said + part, within(STALL)
        return said

    def send(self, number: int, message: object) -> None:
        """
        Send a message.

        Raises:
            RecordTooLarge: The other side does not accept so much.
            OSError: Not all of it could be sent.
        """
        # Released at once: the pickler is a cycle, and its buffer must not be exported when that is collected.
        with ForkingPickler.dumps(message) as view:
            payload = bytes(view)
        if len(payload) > self.most:
            raise RecordTooLarge(
                f"{len(payload)} bytes to send: the store's server accepts {self.most}: see max_session"
            )
        self._sock.settimeout(STALL + len(payload) / _PACE)
        self._sock.sendall(b"".join((_HEADER.pack(number, len(payload)), payload)))

    def recv(self, patience: Patience | None = None) -> tuple[int, bytearray]:
        """
        Return the number of the next message, and what `loads` makes it of.

        Args:
            patience: How long to wait for all of it; None: for ever, but `STALL` for the rest of one begun.

        Raises:
            EOFError: The other side has closed.
            TimeoutError: It did not come.
            OSError: The connection broke, or what came is no message.
        """
        number, length = _HEADER.unpack(self._read(_HEADER.size, patience))
        if length > self.limit:  # before anything is allocated
            raise OSError(f"a message of {length} bytes was announced, {self.limit} are allowed")
        return number, self._read(length, patience or within(STALL + length / _PACE))

    def loads(self, payload: bytes | bytearray) -> Any:
        """Return the message that was sent."""
        if trusted(self.peer.uid):
            return ForkingPickler.loads(payload)
        return _PlainUnpickler(io.BytesIO(payload)).load()

    def _read(self, size: int, patience: Patience | None) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            left = None if patience is None else patience()
            if left is not None and left <= 0:
                raise TimeoutError
            self._sock.settimeout(None if left is None else min(left, _SLICE))
            try:
                n = self._sock.recv_into(view[got:])
            except TimeoutError as exc:
                pass_on_interruption(exc)
                continue
            if not n:
                raise EOFError
            got += n
            if patience is None:
                patience = within(STALL)
        return data

    def request(self, message: object, patience: Patience) -> Any:
        """
        Send a request and return its answer.

        Raises:
            Disconnected: The connection broke.
            Unresponsive: The answer did not come in time.
        """
        self._sends = number = (self._sends + 1) & 0xFFFFFFFF
        try:
            self.send(number, message)
        except OSError as exc:
            pass_on_interruption(exc)
            if isinstance(exc, TimeoutError):
                raise Unresponsive("the store's server takes no requests") from exc
            raise Disconnected("the store's server is gone", delivered=False) from exc
        try:
            answered, payload = self.recv(patience)
        except (EOFError, OSError) as exc:
            pass_on_interruption(exc)
            if isinstance(exc, TimeoutError):
                raise Unresponsive("the store's server does not answer") from exc
            raise Disconnected("the store's server is gone", delivered=True) from exc
        if answered != number:
            raise Disconnected(f"the answer to call {answered} came for {number}", delivered=True)
        try:
            return self.loads(payload)
        except Exception as exc:
            pass_on_interruption(exc)
            raise StoreUnavailable("the store's server gave an answer that cannot be read") from exc

    def fresh(self) -> bool:
        """Return whether the socket is of the kind made now: one from before gevent's patching blocks."""
        return type(self._sock) is socket.socket

    def ended(self) -> bool:
        """Return whether the other side has closed."""
        poll = select.poll()  # not a look at what comes: that would wait if there is a timeout just now
        try:
            poll.register(self._sock, select.POLLRDHUP)
        except ValueError:  # closed here
            return True
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def void(self) -> socket.socket | None:
        """
        In a child of fork: make sure that not a byte of the parent's conversation is read or written here.

        Returns:
            What keeps the connection open; None if it is closed already.
        """
        # Not close(): a greenlet that was copied in mid-call would then use whatever gets the descriptor next.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            kept = self._sock.dup()
            os.dup2(null, self._sock.fileno(), inheritable=False)
        except (OSError, ValueError):  # closed meanwhile
            return None
        finally:
            os.close(null)
        return kept


class _PlainUnpickler(pickle.Unpickler):
    """
    Takes data, and the exceptions we know, from a server of another user.

    A root master that serves as somebody else (Gunicorn's ``--user``) talks to that user's server, and must not
    run what that sends.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in ("shmstore.errors", "builtins") else None
        if isinstance(found, type) and (
            issubclass(found, ShmStoreError) or found in (ValueError, TypeError, AttributeError)
        ):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not accepted from another user")


# Every pool of this process, for the child of a fork.


class Pool:
    """
    The connections of one process to one server, each used by one call at a time.

    Not one per thread: greenlets share threads. The mutable state is the list of idle channels and the set of
    busy ones; each operation on them is one the interpreter does not interrupt, so there is no lock to inherit.

    An open connection is also what keeps the server alive. A child of fork must not speak over the connections it
    inherits, but it keeps them open: the server sees them close when the last who holds them is gone.

    Args:
        dial: Makes a connection; it may be given the seconds that this may take.
    """

    _KEEP = 4  # idle channels; a burst of threads leaves no more behind

    def __init__(self, dial: Callable[..., Channel]) -> None:
        self._dial = dial
        self._idle: list[Channel] = []
        self._busy: set[Channel] = set()
        self._inherited: list[Channel | socket.socket] = []
        self._closed = False
        on_fork(self)
        # For who does not close: `StoreManager("shop").store().prune()`.
        weakref.finalize(self, _close_all, self._idle, self._inherited).atexit = False

    def adopt(self, channel: Channel) -> None:
        """Take over a connection made elsewhere."""
        self._idle.append(channel)
        if self._closed:  # meanwhile; left open, it would keep the server alive
            _close_all(self._idle)

    def hold(self) -> Peer:
        """
        Make sure that there is a connection, and return who is at its other end.

        Raises:
            StoreUnavailable: None can be made.
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
        patience: Patience,
        reach: float | None = None,
        most: float = math.inf,
    ) -> Any:
        """
        Call a method in the server.

        Args:
            ident: `STORE` or `SERVER`.
            method: Its name.
            args: Its arguments.
            kwargs: Those by name.
            patience: How long to wait for the answer.
            reach: How long making a connection may take, in seconds; None: as long as is usual.
            most: How many bytes of a request the server accepts.

        Raises:
            Exception: What the method raised there.
            StoreUnavailable: No server can be reached (`Disconnected`, `Unresponsive` and others).
        """
        with self.channel(reach) as channel:
            channel.most = most
            answer = channel.request((ident, method, args, kwargs), patience)
        match answer:
            case ("#RETURN", result):
                return result
            case ("#ERROR", Exception() as error):
                raise error
        raise StoreUnavailable("the store's server gave an answer of an unknown kind")

    @contextmanager
    def channel(self, reach: float | None = None) -> Iterator[Channel]:
        """Take a channel out for one call. After any exception it is closed: the answer may be yet to come."""
        channel = None
        try:
            channel = self._take(reach)
            self._busy.add(channel)
            yield channel
        except BaseException:
            if channel is not None:
                channel.close()
            raise
        finally:
            self._busy.discard(channel)
        if len(self._idle) < self._KEEP:
            self.adopt(channel)
        else:
            channel.close()

    def _take(self, reach: float | None) -> Channel:
        if self._closed:
            raise StoreUnavailable("this store was closed")
        while True:
            try:
                channel = self._idle.pop()
            except IndexError:
                return self._dial() if reach is None else self._dial(reach)
            if channel.fresh():
                return channel
            channel.close()

    def drop(self) -> None:
        """Close the idle connections: their server is gone."""
        _close_all(self._idle)

    def close(self) -> None:
        """Close all connections, those inherited included. What is in mid-call is closed at its end."""
        self._closed = True
        _close_all(self._idle, self._inherited)

    def after_fork_in_child(self) -> None:
        # The child starts without connections.
        voided = [channel.void() for channel in self._busy]
        self._busy.clear()
        self._inherited += [*self._idle, *filter(None, voided)]
        self._idle.clear()


def _close_all(*lists: list[Channel] | list[Channel | socket.socket]) -> None:
    for channels in lists:
        with contextlib.suppress(IndexError):  # that is the end, also if another thread took the last one
            while True:
                channels.pop().close()
