"""One line for each operation on a store, for whoever wonders what happens to a session.

Written while the logger ``shmstore`` is at DEBUG, or from the start with ``DEBUG=shmstore`` (or ``DEBUG=memorystore``)
in the environment: then to stderr, unless the program has set up logging itself. Ids and owners are shown as the first
digits of their digests: a log is no place for what opens a session.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sized
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from shmstore.names import short

__all__ = ["log_to_stderr", "obey_environment", "trace", "traced"]

log = logging.getLogger("shmstore")

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

_READS: Final = frozenset({"get", "peek", "load"})
_FORMAT: Final = "[%(asctime)s] [%(process)d] [%(levelname)s] shmstore: %(message)s"


def trace(operation: str, arguments: tuple[Any, ...], result: object) -> None:
    """Log an operation, what it was about and what came of it."""
    names = arguments[: 2 if operation == "rename" else 1]
    what = [short(name) if isinstance(name, str) else _in_brief(name) for name in names]
    if operation in _READS and not isinstance(result, Exception):
        result = "miss" if result is None else "hit"
    log.debug("%s: %s", " ".join([operation, *what]), _in_brief(result))


def traced(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Return a method of a store that is traced. Costs a fifth of a microsecond: reads do it themselves."""

    @wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not log.isEnabledFor(logging.DEBUG):
            return method(self, *args, **kwargs)
        try:
            result = method(self, *args, **kwargs)
        except Exception as exc:
            trace(method.__name__, args or (*kwargs.values(),), exc)
            raise
        trace(method.__name__, args or (*kwargs.values(),), result)
        return result

    return call


def obey_environment() -> None:
    """Trace if ``DEBUG`` asks for it."""
    if any(
        fnmatchcase(name, pattern)
        for pattern in os.environ.get("DEBUG", "").replace(",", " ").split()
        for name in ("shmstore", "memorystore")
    ):
        log.setLevel(logging.DEBUG)
        # Who sets up logging itself, sooner or later, gets the lines there.
        log_to_stderr().addFilter(lambda _: not logging.root.handlers)


def log_to_stderr() -> logging.Handler:
    """Write what the logger gets to stderr, in the manner of Gunicorn; return the handler."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_FORMAT, "%Y-%m-%d %H:%M:%S %z"))
    log.handlers = [handler]
    return handler


def _in_brief(value: object) -> str:
    if isinstance(value, Exception):
        return f"{type(value).__name__}: {value}"
    if isinstance(value, Sized) and not isinstance(value, str):
        return f"{len(value)} sessions"
    return "done" if value is None else str(value)
