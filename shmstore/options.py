"""The options of a store: one place that knows their names, defaults and limits."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from typing import Any, Final, Self

from shmstore.codec.serializers import Serializer
from shmstore.engine.layout import LARGEST, SMALLEST, Geometry
from shmstore.errors import ConfigError
from shmstore.system.clock import Clock, boottime_ns
from shmstore.system.units import parse_size

Duration = float | timedelta
"""Seconds, as int or float, or a `timedelta`."""

Dispose = Callable[[str, dict[Any, Any] | None, str], object]
"""Called with id, session and reason: ``set``, ``destroy``, ``expire``, ``evict`` or ``clear``."""

LengthFunction = Callable[[int, str], int]
TtlFunction = Callable[["Options", Mapping[Any, Any], str], Duration]


def seconds(value: Duration, name: str = "ttl") -> float:
    """
    Return a duration in seconds.

    Raises:
        TypeError: It is neither a number nor a `timedelta` (a bool is no number).
        ValueError: It is NaN.
    """
    if isinstance(value, timedelta):
        return value.total_seconds()
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be seconds (int, float) or a timedelta, not {type(value).__name__}")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} must not be NaN")
    return value


@dataclass(frozen=True)
class Options:
    """
    The options of a store, checked.

    Attributes:
        max: The most sessions kept, or with ``length`` the most of what that sums up to; None: as many as fit.
        memory: Bytes of shared memory; `Options.of` also takes text such as ``"256M"`` or ``"2G"`` for a size.
        max_session: Bytes of one session at most; None: the smaller of 1 MiB and a quarter of ``memory``.
        ttl: Life of a session since it was last set or touched: seconds, `timedelta` or
            ``f(options, session, sid)``; None: the session's own ``cookie["max_age"]``, else one day.
        check_period: Seconds between automatic prunes; None or 0: none.
        dispose: ``f(sid, session, reason)``, called in the server before a session is removed or overwritten; reason:
            ``set``, ``destroy``, ``expire``, ``evict`` or ``clear``. A value that cannot be read is
            left out; a session that is damaged is None.
        stale: Whether the first `get` of an expired session still hands it out, and removes it.
        no_dispose_on_set: Whether overwriting a session calls no ``dispose``.
        length: ``f(session_bytes, sid)``, how much of ``max`` a session takes; None: 1.
        max_per_owner: The most sessions of one owner; one more drops the least recently used of them.
        serializer: Turns values into bytes and back; None: lossless MessagePack.
        recency: Seconds within which further reads of a session do not refresh its place in the order of use; 0: the
            order is exact.
        lock_timeout: Seconds after which waiting for the store's lock is given up.
        persist: Whether the sessions outlive the server.
        snapshot: Absolute path of a file that the server saves the sessions to, and that new memory begins with, after
            a reboot say. None: there is none. Shared stores only.
        snapshot_period: Seconds between two of them; None or 0: only when the server leaves.
        directory: Where stores lie; None: ``/dev/shm/shmstore-<uid>``.
        clock: Nanoseconds, only ever growing; private stores only.
    """

    max: int | None = None
    memory: int = 64 * 1024 * 1024
    max_session: int | None = None
    ttl: Duration | TtlFunction | None = None
    check_period: Duration | None = 60.0
    dispose: Dispose | None = None
    stale: bool = False
    no_dispose_on_set: bool = False
    length: LengthFunction | None = None
    max_per_owner: int | None = None
    serializer: Serializer | None = None
    recency: Duration = 1.0
    lock_timeout: Duration = 2.0
    persist: bool = True
    snapshot: str | os.PathLike[str] | None = None
    snapshot_period: Duration | None = 300.0
    directory: str | os.PathLike[str] | None = None
    clock: Clock = boottime_ns
    given: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, /, **options: Any) -> Self:
        """
        Check options as a caller gave them; ``given`` remembers which these were.

        Raises:
            ConfigError: One is unknown or wrong; the message says what would be right.
        """
        known = {entry.name for entry in fields(cls)} - {"given"}
        if unknown := sorted(options.keys() - known):
            near = get_close_matches(unknown[0], known, 1)
            raise ConfigError(
                f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}"
                f"{f'; did you mean {near[0]!r}?' if near else ''}"
            )
        for name in ("memory", "max_session"):
            if isinstance(options.get(name), str):
                try:
                    options[name] = parse_size(options[name])
                except ValueError as exc:
                    raise ConfigError(f"{name}: {exc}") from None
        return cls(**options, given=options)

    def without_effect(self) -> list[tuple[str, str]]:
        """Return each option that was given and does nothing without another one, and that one."""
        needs = (("length", "max"), ("no_dispose_on_set", "dispose"), ("snapshot_period", "snapshot"))
        return [(name, other) for name, other in needs if self.given.get(name) and getattr(self, other) is None]

    def __post_init__(self) -> None:
        _whole("memory", self.memory, SMALLEST, LARGEST)
        if self.max is not None:
            _whole("max", self.max, 1)
        if self.max_session is not None:
            _whole("max_session", self.max_session, 1)
        if self.ttl is not None and not callable(self.ttl):
            _duration("ttl", self.ttl, -math.inf)
        for name in ("check_period", "snapshot_period"):
            if getattr(self, name) is not None:
                _duration(name, getattr(self, name), 0)
        _duration("recency", self.recency, 0)
        _duration("lock_timeout", self.lock_timeout, 0)
        if self.max_per_owner is not None:
            _whole("max_per_owner", self.max_per_owner, 1)
        for name in ("stale", "no_dispose_on_set", "persist"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("dispose", "length"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigError(f"{name} must be a function, not {getattr(self, name)!r}")
        for name, arguments in _CALLED_WITH.items():
            if callable(getattr(self, name)):
                check_call(name, getattr(self, name), arguments)
        if self.directory is not None and not isinstance(self.directory, (str, os.PathLike)):
            raise ConfigError(f"directory must be a path, not {self.directory!r}")
        if self.snapshot is not None and not (
            isinstance(self.snapshot, (str, os.PathLike)) and os.path.isabs(os.fspath(self.snapshot))
        ):
            raise ConfigError(f"snapshot must be an absolute path, not {self.snapshot!r}: the server may run elsewhere")
        if not callable(self.clock):
            raise ConfigError("clock must be a function that returns nanoseconds")
        if self.serializer is not None and not (
            callable(getattr(self.serializer, "dumps", None)) and callable(getattr(self.serializer, "loads", None))
        ):
            raise ConfigError(f"serializer must have dumps(value) and loads(bytes), {self.serializer!r} has not")
        if self.serializer is not None:
            check_call("serializer.dumps", self.serializer.dumps, ("value",))
            check_call("serializer.loads", self.serializer.loads, ("bytes",))
        limit = self.geometry.largest_session
        if self.max_session is not None and self.max_session > limit:
            raise ConfigError(
                f"max_session={self.max_session} does not go with memory={self.memory}: "
                f"the largest possible session has {limit} bytes, or give more memory"
            )

    @property
    def geometry(self) -> Geometry:
        """How these options divide their memory."""
        return Geometry.plan(self.memory, None if self.length else self.max)

    @property
    def session_limit(self) -> int:
        """``max_session``, or its default, in bytes."""
        return self.max_session or min(2**20, self.memory // 4, self.geometry.largest_session)


_CALLED_WITH: Final = {
    "dispose": ("sid", "session", "reason"),
    "length": ("session_bytes", "sid"),
    "ttl": ("options", "session", "sid"),
    "clock": (),
}


def check_call(name: str, function: Callable[..., object], arguments: tuple[str, ...]) -> None:
    """
    Make sure that a function of the user's takes the arguments that it will be given.

    Raises:
        ConfigError: It does not; the message names them.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{name} is called with ({', '.join(arguments)}), which {function!r} does not take: {error}"
        ) from None


def _whole(name: str, value: object, least: int, most: int = 2**48) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def _duration(name: str, value: Any, least: float) -> None:
    try:
        enough = seconds(value, name) >= least
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if not enough:
        raise ConfigError(f"{name} must be at least {least:g} seconds, not {value!r}")
