"""The connections of a store's server: which clients it admits, and a thread for each of them."""

from __future__ import annotations

import glob
import logging
import os
import pickle
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from shmstore.errors import StoreUnavailable
from shmstore.ipc.channel import STALL, Channel
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import FULL, GREETING, MAGIC, OTHER, describe_server, greeting
from shmstore.ipc.peer import peer_of, trusted
from shmstore.system import version
from shmstore.system.clock import deadline_in
from shmstore.system.processes import is_running
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

log = logging.getLogger("shmstore")

FIRST_CLIENT_TIMEOUT = 3.0  # seconds that the server waits for the process that started it
IDLE_TIMEOUT = 3.0  # seconds that the server runs without a client
SHORT_IDLE_TIMEOUT = 0.2  # the same after a client has announced that it exits
_MAX_CONNECTIONS = 256
_TRACEBACK = re.compile(r"Traceback .*\n((?: .*\n)*)([\w.]+)")  # the frames, and the error's class


class Listener:
    """
    Accepts connections, checks their greetings, and runs a thread for each client.

    Clients of another version are never served. Each either gets the list of the processes that use this server, or
    waits for its exit, which it does not delay.

    Args:
        files: The files of the store.
        serve: Answers the requests of a client until its connection is closed.
        request_limit: Returns the maximum bytes of a request.

    Attributes:
        idle_timeout: Seconds without a client after which the server is to exit. A new client resets it.
        clients: The clients that have a thread.
        awaiting_exit: Connections of clients of another version that wait for the exit of this server.
    """

    def __init__(self, files: StoreFiles, serve: Callable[[Client], None], request_limit: Callable[[], int]) -> None:
        self.idle_timeout = FIRST_CLIENT_TIMEOUT
        self.clients: set[Client] = set()
        self.awaiting_exit: list[socket.socket] = []
        self._files = files
        self._serve = serve
        self._request_limit = request_limit
        self._greetings: dict[socket.socket, tuple[float, bytes]] = {}  # incomplete ones: deadline, received bytes
        self._started = time.monotonic()
        self._last_used = 0.0  # when a client was last connected; 0: never
        self._warnings = Throttle()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ, lambda _: os.eventfd_read(self._wake))

    def add_listener(self, listener: socket.socket) -> None:
        """Accept connections from this listening socket."""
        self._selector.register(listener, selectors.EVENT_READ, self._accept)

    def remove_listener(self, listener: socket.socket) -> None:
        """Accept no more connections from this listening socket, and close it."""
        self._selector.unregister(listener)
        listener.close()

    def poll(self, timeout: float) -> None:
        """Handle the events of the sockets; wait for one for ``timeout`` seconds at most."""
        for key, _ in self._selector.select(timeout):
            key.data(key.fileobj)
        now = time.monotonic()
        for sock in [sock for sock, (deadline, _) in self._greetings.items() if deadline < now]:
            self._reject(sock)

    def wake(self) -> None:
        """Make a `poll` in progress, or the next one, return at once. Any thread may call this."""
        os.eventfd_write(self._wake, 1)

    def is_idle(self) -> bool:
        """Return whether there has been no client for so long that the server is to exit."""
        now = time.monotonic()
        if self.clients:
            self._last_used = now
            if self.awaiting_exit and (users := self._users()):
                _send_users(self.awaiting_exit, users)
            return False
        for sock in list(self.awaiting_exit):
            if not _send(sock, b" "):  # a sign of life
                sock.close()
                self.awaiting_exit.remove(sock)
        # A server that has had no client yet waits for the process that started it.
        timeout = 0.0 if self.awaiting_exit and self._last_used else self.idle_timeout
        return now - (self._last_used or self._started) >= timeout

    def drain(self, timeout: float) -> None:
        """Wait until the requests in progress are answered, for ``timeout`` seconds at most."""
        deadline = deadline_in(timeout)
        while any(client.busy for client in list(self.clients)) and deadline() > 0:
            time.sleep(0.005)

    def _warn(self, message: str, *arguments: object) -> None:
        """Log a warning that clients can cause at will: once a minute, with the number of times."""
        if times := self._warnings.due(message):
            log.warning(f"store %r: {message}", self._files.name, times, *arguments)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as exc:
            # Out of descriptors. The connection stays in the backlog, so trying again at once would spin.
            self._warn("connections not accepted: %d; the last: %s", exc.strerror)
            time.sleep(0.05)
            return
        uid = peer_of(sock).uid
        if not trusted(uid):
            self._warn("refused connections of other users: %d; the last of uid %d", uid)
            sock.close()
            return
        if len(self._greetings) + len(self.clients) + len(self.awaiting_exit) >= _MAX_CONNECTIONS:
            # Connections without a complete greeting are dropped first.
            if not self._greetings:
                self._warn("refused connections: %d; the limit is %d: use fewer threads or workers", _MAX_CONNECTIONS)
                _refuse(sock)
                return
            oldest = next(iter(self._greetings))
            self._forget(oldest)
            _refuse(oldest)
        sock.setblocking(False)
        self._greetings[sock] = (time.monotonic() + STALL, b"")
        self._selector.register(sock, selectors.EVENT_READ, self._read_greeting)

    def _read_greeting(self, sock: socket.socket) -> None:
        deadline, received = self._greetings[sock]
        try:
            part = sock.recv(len(GREETING) - len(received))
        except OSError:
            part = b""
        received += part
        if part and len(received) < len(GREETING):
            self._greetings[sock] = (deadline, received)
        elif received in (greeting(), greeting(version.fingerprint())):
            with suppress(OSError):
                sock.sendall(received)
            self._forget(sock)
            self._start_client(sock)
        elif len(received) == len(GREETING) and received.startswith(MAGIC):
            self._forget(sock)
            _send(sock, OTHER)
            if any(received[-4:]):  # it names its release: it asks this server to exit
                self.awaiting_exit.append(sock)
            else:
                _send_users([sock], self._users())
        else:
            self._reject(sock)

    def _reject(self, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._greetings[sock]

    def _users(self) -> list[int]:
        """Return the processes that use the store, as far as this process can see them."""
        pids = {client.peer.pid for client in list(self.clients) if not client.is_closed()}
        running = {pid for pid in pids if is_running(pid)}
        if running != pids:
            # Children of an exited process hold its connection; they have the arena mapped too.
            for path in glob.glob("/proc/[0-9]*/maps"):
                with suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape") as maps:
                    if any(line.endswith(f" {self._files.arena}\n") for line in maps):
                        running.add(int(path.split("/")[2]))
        return sorted(running - {os.getpid()} or pids)

    def _start_client(self, sock: socket.socket) -> None:
        client = Client(Channel(sock, limit=self._request_limit()), self._warn)
        self.idle_timeout = IDLE_TIMEOUT
        self._last_used = time.monotonic()
        self.clients.add(client)
        try:
            threading.Thread(target=self._run_client, args=(client,), daemon=True).start()
        except RuntimeError as exc:
            self._warn("refused connections: %d; cannot start a thread: %s", exc)
            self.clients.discard(client)
            client.close()

    def _run_client(self, client: Client) -> None:
        try:
            self._serve(client)
        finally:
            client.close()
            self._last_used = time.monotonic()
            self.clients.discard(client)
            self.wake()


class Client:
    """
    A connected client, in the form that `multiprocessing.managers.Server.serve_client` uses.

    Attributes:
        busy: Whether a request is being executed or answered.
        is_closed: Returns whether the other end is closed; the client's thread may not have noticed yet.
        peer: The process at the other end.
    """

    def __init__(self, channel: Channel, warn: Callable[..., None]) -> None:
        self.busy = False
        self.close = channel.close
        self.is_closed = channel.is_closed
        self.peer = channel.peer
        self._warn = warn
        self._channel = channel
        self._number = 0

    def recv(self) -> Any:
        """Return the next request."""
        self.busy = False
        try:
            self._number, payload = self._channel.recv()
        except OSError as exc:
            raise EOFError from exc  # after an invalid message nothing can be read from the connection
        self.busy = True
        return self._channel.loads(payload)

    def send(self, answer: tuple[str, Any]) -> None:
        """Answer the last request."""
        kind, result = answer
        if kind not in ("#RETURN", "#ERROR"):
            # A traceback: the request is malformed, or its result cannot be pickled. The log gets the frames. The text
            # of the error is dropped: it may quote a session or name a file of the server.
            found = _TRACEBACK.match(result)
            frames, error = found.groups() if found else ("", "an error")
            self._warn("failed requests: %d; the last one with %s\n%s", error, frames.rstrip())
            answer = ("#ERROR", StoreUnavailable(f"the request failed in the server with {error}: see its log"))
        elif kind == "#ERROR":
            answer = (kind, _portable(result))
        try:
            self._channel.send(self._number, answer)
        except OSError:
            sys.exit()  # the client is gone; half of the answer may have been sent, so no other answer may follow


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled: the same, or one with its text, of the nearest base class that allows it."""
    makers: list[Callable[[], Any]] = [lambda: error, *(partial(each, str(error)) for each in type(error).__mro__)]
    for make in makers:
        try:
            found = pickle.loads(pickle.dumps(make()))  # noqa: S301
        except Exception as exc:  # of the user's class
            pass_on_interruption(exc)
            continue
        if isinstance(found, Exception):
            return found
    return Exception(str(error))


def _send(sock: socket.socket, data: bytes) -> bool:
    """Send a few bytes without waiting; return False if the other end is gone."""
    try:
        sock.send(data, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _send_users(sockets: list[socket.socket], users: list[int]) -> None:
    for sock in sockets:
        _send(sock, describe_server(users))
        sock.close()
    sockets.clear()


def _refuse(sock: socket.socket) -> None:
    """Close a connection above the limit. The answer tells the client that the server runs."""
    _send(sock, FULL)
    sock.close()
