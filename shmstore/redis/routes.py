"""Which server a call goes to, and how often it is sent: once, unless it is certain that nothing was done."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
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

from shmstore.system.signals import pass_on_interruption

__all__ = ["Command", "Crowded", "Routes", "Unsent", "exchange", "repeated", "routes_of"]

Command = tuple[Any, ...]

_REDIRECTED: Final = 5  # times at most, of a call to a Cluster
_PAUSE: Final = 0.001  # seconds between two looks for a connection that is free
_LOOKED_UP_AGAIN: Final = 1.0  # seconds between two looks at who serves which slots, while servers still redirect


class Unsent(Exception):
    """A call that no server has had as a whole, so that nothing was done. Its cause says why."""


class Crowded(TimeoutError):
    """Other calls of this process have used all connections that it may have."""


def exchange(pool: Any, commands: Sequence[Command], *, asking: bool = False) -> list[Any]:
    """
    Send commands to a server at once and return their answers, errors that are answers among them.

    Raises:
        Unsent: They did not get there.
        ConnectionError, TimeoutError: They may have got there, and been carried out: the answers have not come.
    """
    connection = None
    try:
        try:
            connection = _connection(pool)
        except (ConnectionError, TimeoutError, OSError) as exc:
            raise Unsent from exc
        try:
            asked = [("ASKING",), *commands] if asking else commands
            connection.send_packed_command(connection.pack_commands(asked))
        except (ConnectionError, TimeoutError, OSError) as exc:
            # The end of a command is missing, which cannot have been carried out then.
            if len(commands) == 1:
                raise Unsent from exc
            raise
        answers = [_answer(connection) for _ in asked]
    except BaseException as exc:  # also of greenlets and signals: the next call must not get these answers
        if connection is not None:
            connection.disconnect()
        pass_on_interruption(exc)  # redis-py takes the TimeoutError of a signal handler for one of its socket
        raise
    finally:
        if connection is not None:
            pool.release(connection)
    return answers[1:] if asking else answers


def _connection(pool: Any) -> Any:
    """
    Return a connection of a pool, which connects again if its server has closed it.

    If ``max_connections`` are in use, wait for one as long as for an answer. By asking again: pools of Sentinels and
    Clusters have no way to wait, and a lock would have to survive forks.
    """
    patience = pool.connection_kwargs.get("socket_timeout")
    begun = time.monotonic()
    while True:
        try:
            return pool.get_connection()
        except ConnectionError as exc:
            if not str(exc).startswith("Too many connections"):
                raise
            if patience is not None and time.monotonic() - begun >= patience:
                raise Crowded(f"all connections were in use for {patience:g} s: raise max_connections") from exc
        time.sleep(_PAUSE)


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except ResponseError as exc:  # a server that is loading is one that is not there, and redis-py leaves it
        return exc


def repeated(pool: Any, commands: Sequence[Command], *, again: bool) -> list[Any]:
    """
    Return what `exchange` does; try once more where that is safe, see `Routes.send`.

    Raises:
        RedisError, OSError: It does not answer.
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
    """The way to each session."""

    def send(self, key: str, commands: Sequence[Command], *, again: bool) -> list[Any]:
        """
        Return the answers of the server that has a key.

        Args:
            key: One of all the keys that the commands name, which are in one slot.
            commands: Sent together. If there are several, a Cluster's server may answer some of them that their key is
                elsewhere by now.
            again: Whether they may be sent again also if they may have been carried out, as reads may.

        Raises:
            RedisError, OSError: It does not answer.
        """

    def pools(self) -> Iterable[Any]:
        """Return the connections to each server that has sessions."""

    def pool_of(self, key: str) -> Any:
        """Return the connections to the server that has a key, as far as is known."""

    def look_again(self) -> None:
        """Find out which servers there are, for one has failed."""


def routes_of(client: Any) -> Routes:
    """Return the ways of a client of redis-py."""
    return _Cluster(client) if isinstance(client, RedisCluster) else _Single(client.connection_pool)


class _Single:
    """One server, or the primary of a Sentinel: its connections find out which that is."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def send(self, key: str, commands: Sequence[Command], *, again: bool) -> list[Any]:
        return repeated(self._pool, commands, again=again)

    def pools(self) -> Iterable[Any]:
        return [self._pool]

    def pool_of(self, key: str) -> Any:
        return self._pool

    def look_again(self) -> None:
        pass


class _Cluster:
    """The primaries of a Cluster. Which of them has a key is redis-py's knowledge; what is sent again is ours."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._looked = -_LOOKED_UP_AGAIN

    def send(self, key: str, commands: Sequence[Command], *, again: bool) -> list[Any]:
        pool, asking, failed = self.pool_of(key), False, False
        for _ in range(_REDIRECTED):
            try:
                answers = exchange(pool, commands, asking=asking)
            except (Unsent, ConnectionError, TimeoutError) as exc:
                why = exc.__cause__ if isinstance(exc, Unsent) else exc
                self.look_again()
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
                    self.look_again()
                return answers  # the others were carried out, and have slots of their own
            if isinstance(answer, MovedError):
                if time.monotonic() - self._looked > _LOOKED_UP_AGAIN:
                    self.look_again()
                pool, asking = self._pool_at(answer) or self.pool_of(key), False
            elif isinstance(answer, AskError):
                pool, asking = self._pool_at(answer) or pool, True
            elif isinstance(answer, TryAgainError):
                time.sleep(0.05)
            else:
                if isinstance(answer, ClusterDownError):
                    self.look_again()
                return answers
        raise RedisClusterException("its servers redirect each other for too long")

    def pools(self) -> Iterable[Any]:
        return [self._client.get_redis_connection(node).connection_pool for node in self._client.get_primaries()]

    def pool_of(self, key: str) -> Any:
        return self._client.get_redis_connection(self._client.get_node_from_key(key)).connection_pool

    def _pool_at(self, moved: MovedError | AskError) -> Any:
        """Return the connections to a server that another has named; None if that is not known yet."""
        node = self._client.get_node(moved.host, moved.port)
        return None if node is None else self._client.get_redis_connection(node).connection_pool

    def look_again(self) -> None:
        """Ask who serves which slots."""
        self._looked = time.monotonic()
        with suppress(RedisClusterException):  # nobody can tell just now: as before, and the call says what is wrong
            self._client.nodes_manager.initialize()
