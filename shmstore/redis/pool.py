"""The connections to one server."""

from __future__ import annotations

from typing import Any

import redis
from redis.exceptions import ConnectionError, TimeoutError

from shmstore.system.forks import on_fork

__all__ = ["Pool"]


class Pool(redis.ConnectionPool):
    """
    A pool that keeps its idle connections checked out.

    redis-py's pool records events and metrics each time it hands out a connection or takes it back. That takes longer
    than a command.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._kept: list[Any] = []  # the last one is used first
        on_fork(self)

    def get_connection(self, *_: Any, **__: Any) -> Any:
        try:
            connection = self._kept.pop()
        except IndexError:
            return super().get_connection()
        try:
            usable = not connection.can_read()  # nothing is to be read, not even the end of the connection
        except (ConnectionError, TimeoutError, OSError):
            usable = False
        if usable:
            return connection
        connection.disconnect()
        self.release(connection)
        return super().get_connection()  # connects it again

    def keep(self, connection: Any) -> None:
        """Take back a connection whose last command was answered."""
        self._kept.append(connection)

    def after_fork_in_child(self) -> None:
        self._kept = []  # the parent uses them
