"""The server for each call, and the retries: a call is repeated only if it has certainly had no effect."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

from redis import RedisCluster
from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    ConnectionError,
    MovedError,
    RedisClusterException,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from shmstore.redis.pool import Pool
from shmstore.system.blocking import before_blocking
from shmstore.system.signals import pass_on_interruption, suppressing

__all__ = ["Command", "PoolExhausted", "Routes", "Unsent", "exchange", "routes_of", "send_repeated"]

Command = tuple[Any, ...]

_MAX_REDIRECTS: Final = 5  # of a call to a Cluster
_PAUSE: Final = 0.001  # seconds between attempts to get a free connection
_REFRESH_PERIOD: Final = 1.0  # seconds between updates of the slot map while servers still redirect


class Unsent(Exception):
    """A call that no server has received completely, so it had no effect. Its cause is the reason."""


class PoolExhausted(TimeoutError):
    """Other calls of this process use all connections that it may have."""


def exchange(pool: Any, commands: Sequence[Command], *, asking: bool = False) -> list[Any]:
    """
    Send commands to a server in one batch and return their answers, which may be errors.

    Raises:
        Unsent: The commands were not sent.
        ConnectionError, TimeoutError: The commands may have been carried out; their answers were not received.
    """
    before_blocking()
    connection = None
    try:
        try:
            connection = _connection(pool)
        except (ConnectionError, TimeoutError, OSError) as exc:
            pass_on_interruption(exc)
            raise Unsent from exc
        try:
            asked = [("ASKING",), *commands] if asking else commands
            connection.send_packed_command(connection.pack_commands(asked))
        except (ConnectionError, TimeoutError, OSError) as exc:
            pass_on_interruption(exc)
            # The end of the command was not sent, so it cannot have been carried out.
            if len(commands) == 1:
                raise Unsent from exc
            raise
        answers = [_answer(connection) for _ in asked]
    except BaseException as exc:  # also from greenlets and signals: the next call must not receive these answers
        if connection is not None:
            try:
                connection.disconnect()
            finally:
                pool.release(connection)
        pass_on_interruption(exc)  # redis-py takes a signal handler's TimeoutError for one of its socket
        raise
    if isinstance(pool, Pool):
        pool.keep(connection)
    else:
        pool.release(connection)
    return answers[1:] if asking else answers


def _connection(pool: Any) -> Any:
    """
    Return a connection of a pool, which reconnects if the server has closed it.

    If ``max_connections`` are in use, wait for a free one as long as for an answer. It polls, because pools of
    Sentinels and Clusters offer no way to wait, and a lock would have to survive forks.
    """
    timeout = pool.connection_kwargs.get("socket_timeout")
    begun = time.monotonic()
    while True:
        try:
            return pool.get_connection()
        except ConnectionError as exc:
            if not str(exc).startswith("Too many connections"):
                raise
            if timeout is not None and time.monotonic() - begun >= timeout:
                raise PoolExhausted(f"all connections were in use for {timeout:g} s: raise max_connections") from exc
        time.sleep(_PAUSE)


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except ResponseError as exc:  # other errors, as of a server that is loading, make redis-py disconnect
        return exc.with_traceback(None)  # a traceback would keep all callers' data until a garbage collection


def send_repeated(pool: Any, commands: Sequence[Command], *, again: bool) -> list[Any]:
    """
    Return the result of `exchange`; repeat it once where that is safe, see `Routes.send`.

    Raises:
        RedisError, OSError: The server does not answer.
    """
    try:
        return exchange(pool, commands)
    except (Unsent, ConnectionError) as exc:
        why = exc.__cause__ if isinstance(exc, Unsent) else exc
        if isinstance(why, (TimeoutError, AuthenticationError)) or not (again or isinstance(exc, Unsent)):
            raise (why or exc) from None
    try:
        return exchange(pool, commands)
    except Unsent as exc:
        raise (exc.__cause__ or exc) from None


class Routes(Protocol):
    """The servers of the sessions."""

    def send(self, key: str, commands: Sequence[Command], *, again: bool) -> list[Any]:
        """
        Return the answers of the server that has a key.

        Args:
            key: One of the keys that the commands name, which are all in one slot.
            commands: Sent together. If there are several, a server of a Cluster may answer some of them with a
                redirection.
            again: Whether they may be repeated even if they may have been carried out, as reads may.

        Raises:
            RedisError, OSError: The server does not answer.
        """

    def pools(self) -> Iterable[Any]:
        """Return the connection pool of each server that has sessions."""

    def pool_of(self, key: str) -> Any:
        """Return the connection pool of the server that has a key, according to the slot map."""

    def refresh(self) -> None:
        """Update the list of servers, because one has failed."""


def routes_of(client: Any) -> Routes:
    """Return the routes of a client of redis-py."""
    return _Cluster(client) if isinstance(client, RedisCluster) else _Single(client.connection_pool)


class _Single:
    """One server, or the primary of a Sentinel, which its connections look up."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def send(self, key: str, commands: Sequence[Command], *, again: bool) -> list[Any]:
        return send_repeated(self._pool, commands, again=again)

    def pools(self) -> Iterable[Any]:
        return [self._pool]

    def pool_of(self, key: str) -> Any:
        return self._pool

    def refresh(self) -> None:
        pass


class _Cluster:
    """The primaries of a Cluster. redis-py knows which of them has a key; this class decides what is repeated."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._refreshed = -_REFRESH_PERIOD

    def send(self, key: str, commands: Sequence[Command], *, again: bool) -> list[Any]:
        pool, asking, failed = self.pool_of(key), False, False
        for _ in range(_MAX_REDIRECTS):
            try:
                answers = exchange(pool, commands, asking=asking)
            except (Unsent, ConnectionError, TimeoutError) as exc:
                why = exc.__cause__ if isinstance(exc, Unsent) else exc
                self.refresh()
                if (
                    failed
                    or isinstance(why, (TimeoutError, AuthenticationError))
                    or not (again or isinstance(exc, Unsent))
                ):
                    raise (why or exc) from None
                pool, asking, failed = self.pool_of(key), False, True
                continue
            answer = next((each for each in answers if isinstance(each, ResponseError)), None)
            if len(commands) > 1:
                if isinstance(answer, (MovedError, ClusterDownError)):
                    self.refresh()
                return answers  # the other commands were carried out, and are in other slots
            if isinstance(answer, MovedError):
                if time.monotonic() - self._refreshed > _REFRESH_PERIOD:
                    self.refresh()
                pool, asking = self._pool_at(answer) or self.pool_of(key), False
            elif isinstance(answer, AskError):
                pool, asking = self._pool_at(answer) or pool, True
            elif isinstance(answer, TryAgainError):
                time.sleep(0.05)
            else:
                if isinstance(answer, ClusterDownError):
                    self.refresh()
                return answers
        raise RedisClusterException("its servers redirected the call too often")

    def pools(self) -> Iterable[Any]:
        return [self._client.get_redis_connection(node).connection_pool for node in self._client.get_primaries()]

    def pool_of(self, key: str) -> Any:
        return self._client.get_redis_connection(self._client.get_node_from_key(key)).connection_pool

    def _pool_at(self, moved: MovedError | AskError) -> Any:
        """Return the connection pool of a server that a redirection names; None if that server is not known yet."""
        node = self._client.get_node(moved.host, moved.port)
        return None if node is None else self._client.get_redis_connection(node).connection_pool

    def refresh(self) -> None:
        """Update the slot map."""
        self._refreshed = time.monotonic()
        with suppressing(RedisClusterException):  # no server answers: keep the slot map; the call reports the error
            self._client.nodes_manager.initialize()
