"""The connections to one server."""

from __future__ import annotations

import os
from typing import Any

import redis
from redis.exceptions import ConnectionError, TimeoutError

from shmstore.system.forks import notice_fork, on_fork
from shmstore.system.signals import pass_on_interruption

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
        notice_fork()
        try:
            connection = self._kept.pop()
        except IndexError:
            return super().get_connection()
        usable = False
        try:
            usable = not connection.can_read()  # nothing is to be read, not even the end of the connection
        except (ConnectionError, TimeoutError, OSError) as exc:
            pass_on_interruption(exc)
        finally:
            if not usable:
                connection.disconnect()
                self.release(connection)
        return connection if usable else super().get_connection()  # which connects it again

    def keep(self, connection: Any) -> None:
        """Take back a connection whose last command was answered."""
        if connection.pid == os.getpid():
            self._kept.append(connection)
        else:  # a greenlet continues in a forked child
            self.release(connection)

    def after_fork_in_child(self) -> None:
        self._kept = []  # the parent uses them
