"""The load: one process, raw sockets, several connections at once; every answer is checked."""

from __future__ import annotations

import json
import random
import re
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.figures import zipf

CONNECTIONS = 8
REQUESTS_EACH = 100  # then a connection is replaced: otherwise all connections may stay with one worker

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_COOKIE = re.compile(rb"\r\nset-cookie: *([^;\r]+)", re.IGNORECASE)


class Wrong(Exception):
    """An answer is not what it must be."""


@dataclass
class Visitor:
    """A visitor: a number, a cookie, and how often its counter was incremented."""

    who: int
    cookie: bytes = b""
    count: int = 0


@dataclass
class Outcome:
    """The result of a load: requests, seconds, the time of each request in seconds."""

    requests: int = 0
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)


def request(path: str, cookie: bytes) -> bytes:
    line = b"Cookie: " + cookie + b"\r\n" if cookie else b""
    return b"GET " + path.encode() + b" HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n"


def dial(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    for _ in range(200):
        try:
            sock.connect(address)
        except BlockingIOError:  # the queue of a listening unix socket is full
            time.sleep(0.005)
        else:
            return sock
    raise Wrong(f"{address} does not accept")


def whole(buffer: bytes, closed: bool) -> int:
    """Return the length of the answer at the start of the buffer; 0 if it is incomplete."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return 0
    length = _LENGTH.search(buffer, 0, end)
    if length is None:
        return len(buffer) if closed else 0
    size = end + 4 + int(length[1])
    return size if len(buffer) >= size else 0


def ask(address: str, path: str, cookie: bytes = b"") -> tuple[bytes, bytes]:
    """Return the head and the body of one answer."""
    with dial(address) as sock:
        sock.settimeout(60)
        sock.sendall(request(path, cookie))
        buffer, size = b"", 0
        while not size:
            part = sock.recv(1 << 20)
            buffer += part
            size = whole(buffer, not part)
            if not part and not size:
                raise Wrong(f"{path}: {buffer[:200]!r}")
    head, _, body = buffer.partition(b"\r\n\r\n")
    if b" 200 " not in head[:20]:
        raise Wrong(f"{path}: {head[:200]!r} {body[:500]!r}")
    return head, body


def log_in(address: str, count: int, size: int) -> list[Visitor]:
    """Return visitors with sessions."""
    visitors = []
    for first in range(0, count, 250):
        some = min(250, count - first)
        _, body = ask(address, f"/fill?first={first}&count={some}&size={size}")
        visitors += [Visitor(first + at, cookie.encode()) for at, cookie in enumerate(json.loads(body))]
    return visitors


def plan(workload: str, visitors: list[Visitor], rnd: random.Random) -> Iterator[tuple[Visitor, str]]:
    """Yield pairs of a visitor and a kind of request, without end."""
    count = len(visitors)
    if workload == "mixed":
        while True:
            for at in zipf(count, rnd, 2000):
                yield visitors[at], "write" if rnd.random() < 0.1 else "read"
    while True:
        for visitor in visitors:
            yield visitor, workload


class _Connection:
    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = dial(address)
        self.left = REQUESTS_EACH
        self.buffer = b""
        self.begun = 0.0
        self.visitor = Visitor(0)
        self.kind = ""


class Load:
    """
    Some requests at once, each from another visitor.

    Args:
        address: The server's unix socket.
        visitors: The visitors that send the requests; without sessions they have no cookie.
        size: The size of a new session.
        counted: Whether the sessions have a counter to check.
        hangs_up: Whether the server hangs up after each answer without saying so, as uWSGI does.
        seed: The seed of the random choices.
    """

    def __init__(
        self, address: str, visitors: list[Visitor], size: int, *, counted: bool, hangs_up: bool = False, seed: int = 1
    ) -> None:
        self._address = address
        self._visitors = visitors
        self._size = size
        self._counted = counted
        self._hangs_up = hangs_up
        self._rnd = random.Random(seed)

    def run(self, workload: str, seconds: float) -> Outcome:
        """Send requests for ``seconds``; wait for the last answers."""
        outcome = Outcome()
        work = plan(workload, self._visitors, self._rnd)
        busy: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for _ in range(min(CONNECTIONS, max(1, len(self._visitors) // 2))):
                connection = _Connection(self._address)
                selector.register(connection.sock, selectors.EVENT_READ, connection)
                self._send(connection, work, busy)
            begin = time.perf_counter()
            end = begin + seconds
            while busy:
                ready = selector.select(30)
                if not ready:
                    raise Wrong(f"{self._address} answers no more")
                for key, _ in ready:
                    connection = key.data
                    part = connection.sock.recv(1 << 17)
                    connection.buffer += part
                    size = whole(connection.buffer, not part)
                    if not size:
                        if not part:
                            raise Wrong(f"/{connection.kind}: the server hung up: {connection.buffer[:300]!r}")
                        continue
                    now = time.perf_counter()
                    outcome.times.append(now - connection.begun)
                    self._check(connection, connection.buffer[:size], workload)
                    busy.discard(connection.visitor.who)
                    if now >= end:
                        selector.unregister(connection.sock)
                        connection.sock.close()
                        continue
                    connection.left -= 1
                    closing = self._hangs_up or not part or b"onnection: close" in connection.buffer[:size]
                    if closing or not connection.left:
                        selector.unregister(connection.sock)
                        connection.sock.close()
                        connection = _Connection(self._address)
                        selector.register(connection.sock, selectors.EVENT_READ, connection)
                    self._send(connection, work, busy)
        outcome.seconds = time.perf_counter() - begin
        outcome.requests = len(outcome.times)
        outcome.times.sort()
        return outcome

    def _send(self, connection: _Connection, work: Iterator[tuple[Visitor, str]], busy: set[int]) -> None:
        visitor, kind = next(work)
        while visitor.who in busy:  # its counter could not be compared
            visitor, kind = next(work)
        busy.add(visitor.who)
        connection.visitor, connection.kind, connection.buffer = visitor, kind, b""
        path = f"/{kind}?who={visitor.who}"
        if kind == "login":
            path += f"&size={self._size}"
        connection.begun = time.perf_counter()
        connection.sock.sendall(request(path, b"" if kind == "login" else visitor.cookie))

    def _check(self, connection: _Connection, answer: bytes, workload: str) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        visitor = connection.visitor
        words = body.split()
        cookie = _COOKIE.search(head)
        right = b" 200 " in head[:20] and bool(words) and words[0] == b"%d" % visitor.who
        if right and self._counted:
            if connection.kind == "write":
                visitor.count += 1
                right = words[1] == b"%d" % visitor.count
            elif connection.kind == "login":
                right = cookie is not None
                visitor.count = 0
        if not right:
            raise Wrong(f"/{connection.kind} of {visitor}: {answer[:600]!r}")
        if cookie is not None:
            visitor.cookie = cookie[1]
