"""
Calls to the server, or to the servers of a Cluster: with bounded waits and shmstore's own errors.

A call is repeated only if the first attempt has certainly had no effect: its connection could not be opened or broke
while the call was being sent, or the answer says so. A write whose answer was lost raises `StoreUnavailable`, and may
have been carried out once. A read is also repeated if its connection broke. Timeouts are not retried.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NoReturn, TypeVar

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
)

from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.redis.routes import Command, PoolExhausted, Routes, Unsent, routes_of, send_repeated
from shmstore.redis.scripts import CLOCK_PERIOD, TEXTS, TICK
from shmstore.system.blocking import before_blocking
from shmstore.system.clock import boottime_ns
from shmstore.system.signals import pass_on_interruption

__all__ = ["COMMANDS", "Link"]

_PAGE: Final = 500  # keys that one SCAN examines
_BATCH: Final = 200  # commands per round trip
COMMANDS: Final = frozenset({
    "del", "eval", "evalsha", "exists", "get", "getrange", "hgetall", "hincrby", "info", "persist", "pexpire", "pttl",
    "scan", "set", "setrange", "strlen", "time", "type", "zadd", "zrange", "zrem", "zremrangebyscore",
})  # fmt: skip
"""All commands that a store uses, also in scripts."""
_FAILURES: Final = (RedisError, RedisClusterException, OSError)  # in redis-py the second does not inherit the first

T = TypeVar("T")


class Link:
    """
    The connection to a server, or to a Cluster.

    Args:
        client: Returns the client of redis-py. Called once, at the first use; a client of a Cluster then connects.
        cluster: Whether it is a client of a Cluster.
        where: A description of the server for errors, without the password.
        clock: The key that keeps the clock from going back.

    Attributes:
        cluster, where: See above.
        closed: Whether `close` was called.
    """

    def __init__(self, client: Callable[[], Any], where: str, *, clock: str, cluster: bool = False) -> None:
        self._make, self.where, self.cluster, self._clock = client, where, cluster, clock
        self._client: Any = None
        self._routes: Routes | None = None
        self._offset = self._ahead = self._measured = 0
        self.closed = False

    def close(self, *, disconnect: bool) -> None:
        """Stop using the connection, and close it unless other users share the client."""
        self.closed = True
        if disconnect and self._client is not None:
            self._client.close()

    def check(self) -> None:
        """
        Raise an error if it was closed.

        Raises:
            StoreUnavailable: It was closed.
        """
        if self.closed:
            raise StoreUnavailable(f"the store on {self.where} was closed")

    # -- calls -----------------------------------------------------------------------------------------------------

    def read(self, *command: Any) -> Any:
        """
        Return the answer to a command that changes nothing, as redis-py returns it: bytes, int, None or a list.

        Raises:
            StoreUnavailable, StoreTimeout: The server did not answer.
        """
        return self._one(command, again=True)

    def write(self, *command: Any) -> Any:
        """Return the answer to a command that is carried out at most once; raises the errors of `read`."""
        return self._one(command, again=False)

    def many(self, commands: Sequence[Command], *, again: bool) -> list[Any]:
        """Return the answers to commands, sent in batches to each server; ``again``: they are reads."""
        routes = self._open()
        batches: dict[Any, list[int]] = defaultdict(list)
        for number, command in enumerate(commands):
            batches[self._translated(lambda: routes.pool_of(_key_of(command)))].append(number)  # noqa: B023 - at once
        answers: list[Any] = [None] * len(commands)
        for numbers in batches.values():
            if commands[numbers[0]][0] == "EVALSHA":  # sent alone first: the server may not have the script yet
                answers[numbers[0]] = self._one(commands[numbers[0]], again=again)
                del numbers[0]
            for at in range(0, len(numbers), _BATCH):
                batch = numbers[at : at + _BATCH]
                found = self._sent(_key_of(commands[batch[0]]), [commands[number] for number in batch], again=again)
                for number, answer in zip(batch, found, strict=True):
                    refused = isinstance(answer, Exception)  # for example, the key has moved to another server
                    answers[number] = self._one(commands[number], again=again) if refused else answer
        return answers

    def scan(self, pattern: str) -> Iterator[list[bytes]]:
        """Yield the matching keys in pages, each once. Keys that are added or removed meanwhile may be missing."""
        seen: set[bytes] = set()
        for pool in self._translated(self._open().pools):
            cursor: Any = 0
            while True:
                cursor, page = self._ask(pool, ("SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE))
                fresh = [key for key in dict.fromkeys(page) if key not in seen]
                seen.update(fresh)
                if fresh:
                    yield fresh
                if int(cursor) == 0:
                    break

    def info(self) -> list[dict[str, str]]:
        """Return the information of the server, or of each primary of the Cluster."""
        texts = [self._ask(pool, ("INFO",)).decode() for pool in self._translated(self._open().pools)]
        return [dict(line.split(":", 1) for line in text.splitlines() if ":" in line) for text in texts]

    def now(self, *, fresh: bool = False) -> int:
        """
        Return the time of the store in microseconds, estimated between two requests for it.

        ``fresh``: ask the server. An estimate may be up to `CLOCK_PERIOD` behind that of a process which has asked
        since the server's clock went back.

        It is the server's clock, except that it never goes back, because it determines the order of eviction. It is the
        same for hosts whose own clocks differ, and a step of a host's clock does not affect sessions.
        """
        here, estimated = boottime_ns(), 0
        if fresh or here - self._measured > CLOCK_PERIOD * 1000 or not self._measured:
            if self._measured:
                estimated = here // 1000 + self._offset
            there = self._time(estimated)
            self._measured = here = boottime_ns()
            # Measured from the arrival of the answer, not from the middle of the round trip: an estimate may then be
            # late by the time of the answer's transfer, but is never ahead. A write before a call thus has an earlier
            # time than the call.
            self._offset = there - here // 1000
        return max(here // 1000 + self._offset, estimated)  # the two hosts' clocks may differ in speed

    def _time(self, estimated: int) -> int:
        try:
            now, of_server = self._one(TICK.on([self._clock], estimated), again=True)
        except StoreTimeout:
            raise
        except StoreUnavailable:
            if not self.cluster:
                raise
            return self._time_of_any() + self._ahead  # the server with the key may be the one that has just died
        self._ahead = int(now) - int(of_server)
        return int(now)

    def _time_of_any(self) -> int:
        """Return the time of any server of the Cluster."""
        failed: StoreUnavailable | None = None
        for pool in self._translated(self._open().pools):
            try:
                seconds, micros = self._ask(pool, ("TIME",))
            except StoreTimeout:
                raise
            except StoreUnavailable as exc:
                failed = exc
            else:
                return int(seconds) * 10**6 + int(micros)
        raise failed or StoreUnavailable(f"{self.where} has no servers")

    # -- sending ---------------------------------------------------------------------------------------------------

    def _open(self) -> Routes:
        self.check()
        if self._routes is None:
            before_blocking()  # a client of a Cluster connects when it is made
            self._client = self._translated(self._make)
            self._routes = routes_of(self._client)
        return self._routes

    def _one(self, command: Command, *, again: bool) -> Any:
        key = _key_of(command)
        (answer,) = self._sent(key, [command], again=again)
        if isinstance(answer, NoScriptError):  # the server lost or never had the script: send its text
            _, sha, *rest = command
            (answer,) = self._sent(key, [("EVAL", TEXTS[sha], *rest)], again=again)
        if isinstance(answer, Exception):
            self._fail(answer)
        return answer

    def _sent(self, key: str, commands: Sequence[Command], *, again: bool) -> list[Any]:
        routes = self._open() if self._routes is None or self.closed else self._routes
        try:
            return routes.send(key, commands, again=again)
        except _FAILURES as exc:
            self._fail(exc)

    def _ask(self, pool: Any, command: Command) -> Any:
        """Return the answer of a particular server to a command that changes nothing."""
        routes = self._open()
        try:
            (answer,) = send_repeated(pool, [command], again=True)
        except _FAILURES as exc:
            routes.refresh()
            self._fail(exc)
        if isinstance(answer, Exception):
            self._fail(answer)
        return answer

    def _translated(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except Unsent as exc:
            self._fail(exc.__cause__ if isinstance(exc.__cause__, Exception) else exc)
        except _FAILURES as exc:
            self._fail(exc)

    def _fail(self, error: Exception) -> NoReturn:
        pass_on_interruption(error)
        raise self._error(error) from error

    def _error(self, error: Exception) -> StoreUnavailable:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]  # about the connection; contains no session
        if isinstance(error, PoolExhausted):
            return StoreTimeout(f"{self.where}: {text}")
        if isinstance(error, TimeoutError):
            return StoreTimeout(f"{self.where} does not answer in time")
        if isinstance(error, BusyLoadingError):
            return StoreUnavailable(f"{self.where} is still loading its data")
        if isinstance(error, OutOfMemoryError):
            return StoreUnavailable(
                f"{self.where} is full: set its maxmemory-policy to volatile-lru, so that it evicts sessions, or raise "
                f"its maxmemory"
            )
        if isinstance(error, ReadOnlyError):
            return StoreUnavailable(f"{self.where} is a replica, which accepts no writes: name its primary")
        if isinstance(error, ResponseError) and (denied := _denied(error, text)):
            return StoreUnavailable(f"{self.where} {denied}")
        if isinstance(error, (AuthenticationError, ResponseError)) and _is_authentication_error(text):
            return StoreUnavailable(f"{self.where} refuses the login: {text}; check user and password")
        if isinstance(error, RedisClusterException):
            return StoreUnavailable(f"{self.where} cannot be reached as a Cluster: {text}")
        if isinstance(error, ResponseError):
            return StoreUnavailable(f"{self.where} refuses: {text}{_advice(text)}")
        return StoreUnavailable(f"{self.where} cannot be reached: {text}")


def _key_of(command: Command) -> str:
    """Return the first key of a command."""
    return str(command[3] if command[0] in ("EVALSHA", "EVAL") else command[1])


def _is_authentication_error(text: str) -> bool:
    words = ("password", "noauth", "wrongpass", "authenticat")
    return any(word in text.lower() for word in words)


def _denied(error: ResponseError, text: str) -> str:
    """Return what a user's ACL lacks, if that is the reason of a refusal, also inside a script; else ""."""
    words = ("permission", "ACL failure", "can't run this command", "can't access at least one of the keys")
    if not isinstance(error, NoPermissionError) and not any(word in text for word in words):
        return ""
    if found := re.search(r"the '([\w|]+)' command", text):
        return f"does not let this user run {found[1].upper()}: allow it, with ACL SETUSER <user> +{found[1].lower()}"
    if "key" in text:
        return "does not let this user use the keys of the store: allow them, with ACL SETUSER <user> ~<prefix>*"
    return f"does not let this user run a command: allow +{' +'.join(sorted(COMMANDS))}"


def _advice(text: str) -> str:
    """Return advice for the answer of a server that is part of a Cluster and was used as a single server."""
    in_cluster = text.startswith(("MOVED", "CROSSSLOT")) or "non local key" in text
    return "; it belongs to a Cluster: use redis+cluster://" if in_cluster else ""
