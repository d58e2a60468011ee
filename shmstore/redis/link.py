"""
Calls to the server: bounded, repeated at most once, with errors of ours.

What is repeated is one call whose connection broke, as those of a server that was restarted do. That is safe because no
call of this package does another thing the second time: what must be done once bears a tag by which it knows itself
(see `scripts`). A call that took too long is not repeated: who waits has waited long enough.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from redis import RedisCluster
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
)

from shmstore.clock import boottime_ns
from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.redis.scripts import Script

__all__ = ["Link"]

_PAGE: Final = 500  # keys that one SCAN looks at
_BATCH: Final = 200  # commands sent at once
_MEASURED_EVERY: Final = 60 * 10**9  # ns

Command = tuple[Any, ...]
T = TypeVar("T")

_all: weakref.WeakSet[_Connections] = weakref.WeakSet()


class _Connections:
    """
    Connections of a pool, used without the client around them: that would cost as much again as the call itself.

    Each is used by one call at a time. Those that are inherited by fork are left to the parent.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._idle: list[Any] = []
        _all.add(self)

    def use(self, talk: Callable[[Any], T]) -> T:
        """Return what a function returns that is given a connection."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._pool.get_connection()
        try:
            result = talk(connection)
        except ResponseError:  # an answer like any other
            self._idle.append(connection)
            raise
        except BaseException:
            connection.disconnect()
            self._pool.release(connection)
            raise
        self._idle.append(connection)
        return result

    def drop(self) -> None:
        """Close those that nobody uses."""
        while self._idle:
            connection = self._idle.pop()
            connection.disconnect()
            self._pool.release(connection)

    def forked(self) -> None:
        self._idle = []


def _forked() -> None:
    for each in list(_all):
        each.forked()


os.register_at_fork(after_in_child=_forked)


class Link:
    """
    The way to a server, or to a Cluster.

    Args:
        client: Returns the client of redis-py; called once, when it is needed first: one of a Cluster connects then.
        cluster: Whether that is one of a Cluster.
        where: What errors call the server; no password in it.

    Attributes:
        cluster, where: See above.
        closed: Whether it is used no more.
    """

    def __init__(self, client: Callable[[], Any], where: str, *, cluster: bool = False) -> None:
        self._make, self.where = client, where
        self._client: Any = None
        self._connections: _Connections | None = None
        self._offset = self._measured = 0
        self.cluster = cluster
        self.closed = False

    def close(self) -> None:
        """Let go of the connections."""
        self.closed = True
        if self._connections is not None:
            self._connections.drop()

    def check(self) -> None:
        """
        Complain if it was closed.

        Raises:
            StoreUnavailable: It was.
        """
        if self.closed:
            raise StoreUnavailable(f"the store on {self.where} was closed")

    # -- calls -----------------------------------------------------------------------------------------------------

    def call(self, *command: Any) -> Any:
        """
        Return the answer to a command, as it comes: bytes, int, None or a list.

        Raises:
            StoreUnavailable, StoreTimeout: It has none.
        """
        return self._attempt(lambda: self._send(command), command)

    def script(self, script: Script, keys: Sequence[str], *arguments: Any) -> Any:
        """Return the answer of a script. One that the server does not know yet, or no more, is sent to it."""
        try:
            return self._attempt(lambda: self._send(("EVALSHA", script.sha, len(keys), *keys, *arguments)), script)
        except _Unknown:
            return self.call("EVAL", script.text, len(keys), *keys, *arguments)

    def many(self, commands: Sequence[Command]) -> list[Any]:
        """Return the answers to commands that only read, sent together where they go to one server."""
        self._open()
        if self.cluster:
            return [self.call(*command) for command in commands]
        answers: list[Any] = []
        for at in range(0, len(commands), _BATCH):
            batch = commands[at : at + _BATCH]
            answers += self._attempt(lambda: self._send_all(batch), batch)  # noqa: B023 - called at once
        return answers

    def scan(self, pattern: str) -> Iterator[list[bytes]]:
        """Yield the keys that match, page by page, each once. Keys that come or go meanwhile may be missing."""
        self._open()
        seen: set[bytes] = set()
        for page in self._pages(pattern):
            fresh = [key for key in dict.fromkeys(page) if key not in seen]
            seen.update(fresh)
            if fresh:
                yield fresh

    def info(self) -> list[dict[str, Any]]:
        """Return what the server, or each primary of the Cluster, says of itself."""

        def ask() -> list[dict[str, Any]]:
            if self.cluster:
                return list(self._client.info(target_nodes=RedisCluster.PRIMARIES).values())
            return [self._client.info()]

        self._open()
        return self._attempt(ask, "info")

    def now(self) -> int:
        """
        Return the time by the server's clock in microseconds, estimated between two looks at it.

        Hosts whose own clocks differ agree on that one; and no step of a host's clock ages a session.
        """
        here = boottime_ns()
        if here - self._measured > _MEASURED_EVERY or not self._measured:
            seconds, micros = self._time()
            there = boottime_ns()
            self._offset = (int(seconds) * 10**6 + int(micros)) - (here + there) // 2000
            self._measured = here = there
        return here // 1000 + self._offset

    # -- how -------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self.check()
        if self._client is None:
            client = self._translated(self._make)
            if not self.cluster:
                self._connections = _Connections(client.connection_pool)
            self._client = client

    def _send(self, command: Command) -> Any:
        if self._connections is None:
            return self._client.execute_command(*command)

        def talk(connection: Any) -> Any:
            connection.send_command(*command)
            return connection.read_response()

        return self._connections.use(talk)

    def _send_all(self, commands: Sequence[Command]) -> list[Any]:
        def talk(connection: Any) -> list[Any]:
            connection.send_packed_command(connection.pack_commands(commands))
            answers, error = list[Any](), None
            for _ in commands:  # all of them, or the next call would get what is left
                try:
                    answers.append(connection.read_response())
                except ResponseError as exc:
                    error = exc
            if error is not None:
                raise error
            return answers

        assert self._connections is not None  # noqa: S101
        return self._connections.use(talk)

    def _pages(self, pattern: str) -> Iterator[list[bytes]]:
        if self.cluster:
            keys = self._translated(lambda: list(self._client.scan_iter(match=pattern, count=_PAGE)))
            yield from (keys[at : at + _PAGE] for at in range(0, len(keys), _PAGE))
            return
        cursor: Any = 0
        while True:
            cursor, page = self.call("SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE)
            yield page
            if int(cursor) == 0:
                return

    def _time(self) -> tuple[int, int]:
        self._open()
        if self.cluster:
            one = self._client.get_primaries()[0]
            seconds, micros = self._translated(lambda: self._client.time(target_nodes=one))
            return seconds, micros
        seconds, micros = self.call("TIME")
        return int(seconds), int(micros)

    def _attempt(self, send: Callable[[], T], what: object) -> T:
        if self._client is None or self.closed:
            self._open()
        try:
            return send()
        except NoScriptError:
            raise _Unknown from None
        except (ConnectionError, ClusterDownError) as exc:
            if isinstance(exc, AuthenticationError):
                raise self._error(exc) from exc
            if self._connections is not None:
                self._connections.drop()  # they broke together
            if self.closed:
                self._open()
        except (RedisError, OSError) as exc:
            raise self._error(exc) from exc
        return self._translated(send)

    def _translated(self, send: Callable[[], T]) -> T:
        try:
            return send()
        except NoScriptError:
            raise _Unknown from None
        except (RedisError, OSError) as exc:
            raise self._error(exc) from exc

    def _error(self, error: Exception) -> StoreUnavailable:
        if isinstance(error, TimeoutError):
            return StoreTimeout(f"{self.where} does not answer in time")
        if isinstance(error, OutOfMemoryError):
            return StoreUnavailable(
                f"{self.where} is full: set its maxmemory-policy to volatile-lru, so that it makes room, or give it "
                f"more maxmemory"
            )
        if isinstance(error, ReadOnlyError):
            return StoreUnavailable(f"{self.where} is a replica, which takes no writes: name its primary")
        if isinstance(error, (AuthenticationError, ResponseError)) and _refused(str(error)):
            return StoreUnavailable(f"{self.where} does not let us in: {_brief(error)}; look at user and password")
        if isinstance(error, RedisClusterException):
            return StoreUnavailable(f"{self.where} cannot be reached as a Cluster: {_brief(error)}")
        return StoreUnavailable(f"{self.where} cannot be reached: {_brief(error)}")


class _Unknown(Exception):
    """The server does not know a script."""


def _refused(text: str) -> bool:
    words = ("password", "noauth", "wrongpass", "authenticat", "noperm", "permission")
    return any(word in text.lower() for word in words)


def _brief(error: Exception) -> str:
    """Return the first line of what an error says, which is about the connection and quotes no session."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
