"""Real servers for the tests of RedisStore: Redis or Valkey, alone or as a Cluster, each in a directory of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis
from processes import wait_for

from benchmarks.peers import Missing, redis_program

T = TypeVar("T")
StartRedis = Callable[..., "RedisServer"]


@cache
def program() -> str:
    """Return the path of a server; without one, the test fails."""
    try:
        return redis_program()
    except Missing as exc:
        pytest.fail(f"no server to test RedisStore on: {exc}; install redis-server or valkey-server")


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def on_free_port(start: Callable[[int], T]) -> T:
    """Start a server on a free port; try again, because another process may take the port in between."""
    for _ in range(4):
        with suppress(AssertionError):
            return start(free_port())
    return start(free_port())


def short_path(factory: pytest.TempPathFactory) -> Path:
    """Return a new directory; the paths of pytest's directories may be too long for a socket."""
    return factory.mktemp("r")


class RedisServer:
    """
    A server without persistence, on a unix socket or a port.

    Attributes:
        pid: The process id.
        url: Where it is.
        bus: The port of the Cluster bus, if it is in a Cluster.
    """

    def __init__(self, place: Path, *options: str, port: int = 0) -> None:
        place.mkdir(exist_ok=True, parents=True)
        self.place, self.port, self.bus = place, port, 0
        self.socket = place / "redis.sock"
        self.url = f"redis://127.0.0.1:{port}/0" if port else f"unix://{self.socket}"
        self._command = [
            program(), "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket), "--save", "",
            "--appendonly", "no", "--dir", str(place), "--daemonize", "no", "--enable-debug-command", "local",
            "--repl-diskless-sync-delay", "0",  # else a replica waits five seconds for others
            *options,
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start it, or restart it after a kill: at the same address, and empty."""
        with open(self.place / "log", "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self.pid = self._process.pid
        wait_for(self.answers, "the start of a Redis server")

    def answers(self) -> bool:
        """Return whether it accepts connections."""
        assert self._process.poll() is None, (self.place / "log").read_text()[-2000:]
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.settimeout(5)
            sock.connect(str(self.socket))
            sock.sendall(b"PING\r\n")
            return bool(sock.recv(100))
        return False

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()

    def replicates(self) -> bool:
        """Return whether it is a replica that has all data of its primary."""
        info: Any = self.client().info("replication")
        return bool(info["role"] == "slave" and info["master_link_status"] == "up")

    def client(self, **settings: Any) -> redis.Redis:
        """Return a client of it."""
        return redis.Redis.from_url(f"unix://{self.socket}", **settings)

    def end(self) -> None:
        """End it, even if it is stopped or has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)
        self.kill()


class RedisSentinel(RedisServer):
    """
    A Sentinel that watches over a primary on a port, and has its replica take over as soon as it is missed.

    Attributes:
        url: The URL of the primary, whichever server that is now.
    """

    def __init__(self, place: Path, primary: RedisServer, port: int) -> None:
        place.mkdir(exist_ok=True, parents=True)
        self.place, self.port, self.bus = place, port, 0
        self.socket = place / "redis.sock"
        self.url = f"redis+sentinel://127.0.0.1:{port}/shop"
        settings = place / "sentinel.conf"  # it writes to this file
        settings.write_text(
            f"port {port}\nbind 127.0.0.1\nunixsocket {self.socket}\ndir {place}\n"
            f"sentinel monitor shop 127.0.0.1 {primary.port} 1\n"
            "sentinel down-after-milliseconds shop 1000\nsentinel failover-timeout shop 5000\n"
        )
        self._command = [program(), str(settings), "--sentinel"]
        self.start()

    def knows_replica(self) -> bool:
        """Return whether it has found the replica."""
        replicas: Any = self.client(decode_responses=True).sentinel_slaves("shop")
        return any(each["master-link-status"] == "ok" for each in replicas)


class RedisCluster:
    """
    Three primaries, and a replica of each if that is asked for.

    Attributes:
        servers: Its servers, primaries first.
        url: Where it is.
    """

    def __init__(self, place: Path, replicas: bool = False) -> None:
        self.servers: list[RedisServer] = []
        try:
            for number in range(6 if replicas else 3):
                self.servers.append(self._server(place / str(number)))
            self._join(replicas)
        except BaseException:
            self.end()
            raise
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in self.servers)

    def _server(self, place: Path) -> RedisServer:
        options = [
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "2000",
            "--cluster-replica-validity-factor",
            "0",
        ]
        attempt = 0
        while True:
            port, bus = free_port(), free_port()
            try:
                server = RedisServer(place / str(attempt), *options, "--cluster-port", str(bus), port=port)
            except AssertionError:  # a port that was free a moment ago may be taken now
                attempt += 1
                if attempt == 5:
                    raise
            else:
                server.bus = bus
                return server

    def _join(self, replicas: bool) -> None:
        clients = [server.client() for server in self.servers]
        third = 16384 // 3
        for number, client in enumerate(clients[:3]):
            last = 16383 if number == 2 else (number + 1) * third - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * third, last)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in self.servers[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port, server.bus)
        wait_for(lambda: all(self._knows(client, len(clients)) for client in clients), "the Cluster", timeout=300)
        if replicas:
            for primary, replica in zip(clients[:3], clients[3:], strict=True):
                replica.execute_command("CLUSTER", "REPLICATE", primary.execute_command("CLUSTER", "MYID"))
            wait_for(lambda: all(server.replicates() for server in self.servers[3:]), "the replicas", timeout=300)

    def _knows(self, client: redis.Redis, count: int) -> bool:
        return b"cluster_state:ok" in _text(client, "INFO") and len(_text(client, "NODES").splitlines()) == count

    def end(self) -> None:
        """End all servers."""
        for server in self.servers:
            server.end()


def _text(client: redis.Redis, about: str) -> bytes:
    """Return the raw answer of CLUSTER."""
    connection: Any = client.connection_pool.get_connection()
    try:
        connection.send_command("CLUSTER", about)
        return bytes(connection.read_response())
    finally:
        client.connection_pool.release(connection)


def patient(call: Callable[[], object], timeout: float = 60) -> object:
    """Repeat a call until it raises no error; return its result."""
    end = time.monotonic() + timeout
    while True:
        try:
            return call()
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
