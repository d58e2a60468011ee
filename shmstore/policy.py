"""The rules for an application's sessions: how long they live, whose they are, what a new one begins with."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from shmstore.codec.ids import LONGEST, stored_owner
from shmstore.errors import ConfigError
from shmstore.options import check_call

if TYPE_CHECKING:
    from shmstore.store.stats import Loaded

__all__ = ["PERMANENT", "Duration", "OwnerKey", "Policy"]

# Flask's name for "the cookie outlives the browser". It says something about a session and is no data of its
# own: a session that holds nothing else is empty.
PERMANENT: Final = "_permanent"

_OF_AN_ID: Final = re.compile("[A-Za-z0-9_-]*").fullmatch

Duration = float | timedelta
OwnerKey = str | tuple[str, ...] | list[str] | Callable[[Mapping[str, Any]], object] | None


class Policy:
    """
    The rules for an application's sessions. In a Flask config, and in errors, they stand in capitals.

    Args:
        ttl: How long a session lives without being used, in seconds or as a timedelta; more than 0.
        permanent: Whether a new session's cookie outlives the browser.
        key_prefix: What goes before the id in the store, so that several applications can share one. To be of use it
            has a character that no id has, such as a colon at its end.
        id_length: Bytes of entropy in an id, 16 to 96.
        touch_after: How old (seconds or timedelta) a session's last renewal must be before a request that
            changes nothing renews it. A tenth of `ttl` counts if that is less.
        absolute_lifetime: The longest a session can live, however much it is used; seconds or timedelta.
            None: no such limit. Rotation does not extend it.
        on_error: What happens when the store cannot be reached: "raise" the error, or go on with an
            "anonymous" session that is empty and saves nothing.
        owner_key: Whose session it is: the key of the user's id; several, of which the first that is there
            counts; or a function of the session. None: sessions have no owners.

    Raises:
        ConfigError: If a value makes no sense.
    """

    def __init__(
        self,
        *,
        ttl: Duration,
        permanent: bool = False,
        key_prefix: str = "",
        id_length: int = 32,
        touch_after: Duration = 60,
        absolute_lifetime: Duration | None = None,
        on_error: str = "raise",
        owner_key: OwnerKey = "_user_id",
    ) -> None:
        if not isinstance(permanent, bool):
            raise _wrong("permanent", "True or False", permanent)
        if not isinstance(key_prefix, str) or len(key_prefix) > 64 or not key_prefix.isascii():
            raise _wrong("key_prefix", "at most 64 ASCII characters", key_prefix)
        if isinstance(id_length, bool) or not isinstance(id_length, int) or not 16 <= id_length <= 96:
            raise _wrong("id_length", "a number of bytes from 16 to 96", id_length)
        if on_error not in ("raise", "anonymous"):
            raise _wrong("on_error", "'raise' or 'anonymous'", on_error)
        # With none, each request would store a session that is expired already.
        self.ttl = _seconds("ttl", ttl, 0, exclusive=True)
        self.touch_after = min(_seconds("touch_after", touch_after, 0), self.ttl / 10)
        self.absolute_lifetime = (
            math.inf if absolute_lifetime is None else _seconds("absolute_lifetime", absolute_lifetime, 1)
        )
        self.permanent = permanent
        self.key_prefix = key_prefix
        self.id_length = id_length
        self.on_error = on_error
        self._owner_of = _owner_function(owner_key)
        keys = [owner_key] if isinstance(owner_key, str) else owner_key
        self._owner_keys = None if callable(keys) else keys or ()  # None: any
        self.has_owners = bool(owner_key)

    def new_id(self) -> str:
        """Make an id nobody can guess."""
        return secrets.token_urlsafe(self.id_length)

    def is_id(self, text: str) -> bool:
        """Tell whether that can be an id: one with another application's prefix is not, if that ends in a colon."""
        return _OF_AN_ID(text) is not None

    def blank(self) -> dict[str, Any]:
        """Make the data of a session that has none yet."""
        return {PERMANENT: True} if self.permanent else {}

    def owner(self, session: Mapping[str, Any]) -> str | None:
        """Tell whose session this is; None: nobody's."""
        owner = self._owner_of(session)
        if owner is None or owner == "":
            return None
        text = str(owner)
        return text if text.isascii() and len(text) <= LONGEST else stored_owner(text)

    def may_tell_owner(self, key: str) -> bool:
        """Tell whether the owner may depend on the value of a key; with a function it may on any."""
        return self._owner_keys is None or key in self._owner_keys

    def life(self, age: float) -> float:
        """Return how many seconds a session of this age may live on from now."""
        return min(self.ttl, self.absolute_lifetime - age)

    def spent(self, record: Loaded) -> bool:
        """Tell whether a stored session is too old by today's rules; it may be older than they are."""
        return record.created >= self.absolute_lifetime or record.idle >= self.ttl

    def touch_due(self, record: Loaded, life: float) -> bool:
        """Tell whether a stored session's end is so far from where it should be that it is worth a write."""
        return abs(life - record.remaining) >= self.touch_after


def _owner_function(key: OwnerKey) -> Callable[[Mapping[str, Any]], object]:
    if callable(key):
        check_call("OWNER_KEY", key, ("session",))
        return key
    if isinstance(key, str):
        return lambda session: session.get(key)
    keys = () if key is None else key
    if not isinstance(keys, tuple | list) or not all(isinstance(name, str) for name in keys):
        raise _wrong("owner_key", "a key, a list of keys, a function of the session, or None", key)
    return lambda session: next((session[name] for name in keys if session.get(name) is not None), None)


def _seconds(name: str, value: object, least: float, *, exclusive: bool = False) -> float:
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not number >= least
        or (exclusive and number == least)
    ):
        raise _wrong(name, f"seconds or a timedelta, {'more than' if exclusive else 'at least'} {least}", value)
    return number


def _wrong(name: str, needed: str, value: object) -> ConfigError:
    return ConfigError(f"{name.upper()} must be {needed}, not {value!r}")
