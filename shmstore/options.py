"""The options of a store, with their names, defaults and limits; durations and sizes, parsed and formatted."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from difflib import get_close_matches
from typing import Any, Final, Self

from shmstore.codec.serializers import Serializer
from shmstore.engine.layout import MAX_MEMORY, MIN_MEMORY, Geometry
from shmstore.errors import ConfigError
from shmstore.system.clock import Clock, boottime_ns

__all__ = ["Dispose", "Duration", "LengthFunction", "Options", "TtlFunction"]

Duration = float | timedelta
"""Seconds, as an int or float, or a `timedelta`."""

Dispose = Callable[[str, dict[Any, Any] | None, str], object]
"""Called with id, session and reason, which is ``set``, ``destroy``, ``expire``, ``evict`` or ``clear``."""

LengthFunction = Callable[[int, str], int]
"""Called with the bytes of an encoded session, and its id; returns how much of ``max`` the session takes."""

TtlFunction = Callable[["Options", Mapping[Any, Any], str], Duration]
"""Called with the options of the store, the session and its id; returns the ttl of the session."""

_DURATION_UNITS: Final = (("d", 86400), ("h", 3600), ("m", 60))
_SIZE_FACTORS: Final = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def seconds(value: Duration, name: str = "ttl") -> float:
    """
    Return a duration in seconds.

    Raises:
        TypeError: It is neither a number nor a `timedelta`. A bool is not a number.
        ValueError: It is NaN.
    """
    if isinstance(value, timedelta):
        return value.total_seconds()
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be seconds (int, float) or a timedelta, not {type(value).__name__}")
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{name} must not be NaN")
    return value


def check_duration(name: str, value: Any, minimum: float, *, exclusive: bool = False) -> float:
    """
    Return a configured duration in seconds.

    Args:
        name: The option, for the message.
        value: Seconds or a timedelta.
        minimum: The smallest valid number of seconds; with ``exclusive`` the duration must be longer.
        exclusive: Whether ``minimum`` itself is invalid.

    Raises:
        ConfigError: The value is invalid.
    """
    try:
        number = seconds(value, name)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    if number < minimum or (exclusive and number == minimum):
        raise ConfigError(
            f"{name} must be {'more than' if exclusive else 'at least'} {minimum:g} seconds, not {value!r}"
        )
    return number


def format_duration(seconds: float) -> str:
    """Return a duration as text: ``42s``, ``1.5h``; ``never`` if it is infinite."""
    if math.isinf(seconds):
        return "never"
    for unit, length in _DURATION_UNITS:
        if seconds >= length:
            return f"{seconds / length:.1f}{unit}" if seconds < 100 * length else f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def format_size(count: float) -> str:
    """Return a number of bytes as text: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def parse_size(text: str) -> int:
    """
    Return the number of bytes that a text means: ``67108864``, ``64M``, ``2GiB``.

    Raises:
        ValueError: The text is not a size; the message gives examples.
    """
    found = re.fullmatch(r"\s*([0-9]{1,15})\s*([KMG]?)(?:iB|B)?\s*", text, re.ASCII | re.IGNORECASE)
    if not found:
        raise ValueError(f"{text!r} is not a whole number of bytes, such as 67108864, 64M, 2G")
    return int(found[1]) * _SIZE_FACTORS[found[2].upper()]


@dataclass(frozen=True)
class Options:
    """
    The checked options of a store.

    Attributes:
        max: The maximum number of sessions, or with ``length`` the maximum sum of their lengths; None: as many as fit.
        memory: Bytes of shared memory. For sizes `Options.of` also takes text such as ``"256M"`` or ``"2G"``.
        max_session: Maximum bytes of one session; None: the smaller of 1 MiB and a quarter of ``memory``.
        ttl: Lifetime of a session since it was last set or touched: seconds, `timedelta` or
            ``f(options, session, sid)``; None: the session's own ``cookie["max_age"]``, else one day.
        check_period: Seconds between automatic prunes; None or 0: off.
        dispose: ``f(sid, session, reason)``, called in the server before a session is removed or overwritten, with the
            reason ``set``, ``destroy``, ``expire``, ``evict`` or ``clear``. The session lacks values that cannot be
            read, and is None if its record is damaged.
        stale: Whether the first `get` of an expired session still returns it, and removes it.
        no_dispose_on_set: Whether ``dispose`` is not called when a session is overwritten.
        length: ``f(session_bytes, sid)`` returns how much of ``max`` a session takes; None: each takes 1.
        max_per_owner: The maximum number of sessions of one owner; one more evicts the owner's least recently used.
        serializer: Encodes and decodes values; None: lossless MessagePack.
        recency: Seconds within which further reads of a session do not move it in the order of use; 0: the order is
            exact.
        lock_timeout: Seconds to wait for the lock of the store, after which a call raises `StoreTimeout`.
        persist: Whether the sessions outlive the server.
        snapshot: Absolute path of a file that the server saves the sessions to. An empty store, after a reboot for
            example, is loaded from it. None: no snapshots. Shared stores only.
        snapshot_period: Seconds between snapshots; None or 0: one only when the server exits.
        directory: The directory that contains the stores; None: ``/dev/shm/shmstore-<uid>``.
        clock: Returns monotonic nanoseconds; private stores only.
        given: The options as the caller passed them.
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
        Return the checked options; ``given`` keeps them as they were passed.

        Raises:
            ConfigError: An option is unknown or invalid; the message says what is valid.
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
        """Return each given option that has no effect without another option, and that other option."""
        needs = (("length", "max"), ("no_dispose_on_set", "dispose"), ("snapshot_period", "snapshot"))
        return [(name, other) for name, other in needs if self.given.get(name) and getattr(self, other) is None]

    def __post_init__(self) -> None:
        _check_whole("memory", self.memory, MIN_MEMORY, MAX_MEMORY)
        if self.max is not None:
            _check_whole("max", self.max, 1)
        if self.max_session is not None:
            _check_whole("max_session", self.max_session, 1)
        if self.ttl is not None and not callable(self.ttl):
            check_duration("ttl", self.ttl, -math.inf)
        for name in ("check_period", "snapshot_period"):
            if getattr(self, name) is not None:
                check_duration(name, getattr(self, name), 0)
        check_duration("recency", self.recency, 0)
        check_duration("lock_timeout", self.lock_timeout, 0)
        if self.max_per_owner is not None:
            _check_whole("max_per_owner", self.max_per_owner, 1)
        for name in ("stale", "no_dispose_on_set", "persist"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("dispose", "length"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigError(f"{name} must be a function, not {getattr(self, name)!r}")
        for name, arguments in _CALL_ARGUMENTS.items():
            if callable(getattr(self, name)):
                check_call(name, getattr(self, name), arguments)
        if self.directory is not None and not isinstance(self.directory, (str, os.PathLike)):
            raise ConfigError(f"directory must be a path, not {self.directory!r}")
        if self.snapshot is not None and not (
            isinstance(self.snapshot, (str, os.PathLike)) and os.path.isabs(os.fspath(self.snapshot))
        ):
            raise ConfigError(
                f"snapshot must be an absolute path, not {self.snapshot!r}: the server may run in another directory"
            )
        if not callable(self.clock):
            raise ConfigError("clock must be a function that returns nanoseconds")
        if self.serializer is not None and not (
            callable(getattr(self.serializer, "dumps", None)) and callable(getattr(self.serializer, "loads", None))
        ):
            raise ConfigError(f"serializer must have dumps(value) and loads(bytes); {self.serializer!r} does not")
        if self.serializer is not None:
            check_call("serializer.dumps", self.serializer.dumps, ("value",))
            check_call("serializer.loads", self.serializer.loads, ("bytes",))
        limit = self.geometry.largest_session
        if self.max_session is not None and self.max_session > limit:
            raise ConfigError(
                f"max_session={self.max_session} does not fit memory={self.memory}: the largest possible session has "
                f"{limit} bytes; lower max_session or raise memory"
            )

    @property
    def geometry(self) -> Geometry:
        """The division of the memory by these options."""
        return Geometry.plan(self.memory, None if self.length else self.max)

    @property
    def session_limit(self) -> int:
        """``max_session``, or its default, in bytes."""
        return self.max_session or min(2**20, self.memory // 4, self.geometry.largest_session)


_CALL_ARGUMENTS: Final = {
    "dispose": ("sid", "session", "reason"),
    "length": ("session_bytes", "sid"),
    "ttl": ("options", "session", "sid"),
    "clock": (),
}


def check_call(name: str, function: Callable[..., object], arguments: tuple[str, ...]) -> None:
    """
    Make sure that a function passed by the user accepts the arguments that it will be called with.

    Raises:
        ConfigError: It does not accept them; the message names them.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ConfigError(
            f"{name} is called with ({', '.join(arguments)}), which {function!r} does not accept: {error}"
        ) from None


def _check_whole(name: str, value: object, minimum: int, maximum: int = 2**48) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        raise ConfigError(f"{name} must be a whole number from {minimum} to {maximum}, not {value!r}")
