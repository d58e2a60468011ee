"""The rules for an application's sessions: lifetime, owner, ids, and the initial data of a new session."""

from __future__ import annotations

import math
import re
from binascii import b2a_base64
from collections.abc import Callable, Mapping
from operator import methodcaller
from os import urandom
from types import NoneType
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from shmstore.callbacks import check_call
from shmstore.codec.ids import MAX_ID_BYTES, stored_owner
from shmstore.errors import ConfigError
from shmstore.options import Duration, check_duration

if TYPE_CHECKING:
    from shmstore.contract import Loaded

__all__ = ["OwnerKey", "Policy"]

# Flask's name for "the cookie outlives the browser". It describes the session and is not data: a session that holds
# nothing else is empty.
PERMANENT: Final = "_permanent"

# A request is stale if another request of the same browser removed or changed the id in its cookie less than this many
# seconds ago. It may have been sent before the browser received the newer cookie, and must not overwrite that cookie.
STALE_AFTER: Final = 4.0

_URL_SAFE: Final = bytes.maketrans(b"+/", b"-_")

_IMMUTABLE: Final = (str, int, float, bytes, UUID, NoneType)

OwnerKey = str | tuple[str, ...] | list[str] | Callable[[Mapping[str, Any]], object] | None
"""Determines the owner of a session. `Policy` describes the forms."""


class Policy:
    """
    The rules for an application's sessions. A Flask config and error messages name them in capitals.

    Args:
        ttl: How long a session lives without being used, in seconds or as a timedelta; more than 0.
        permanent: Whether a new session's cookie outlives the browser.
        key_prefix: Prefix of the ids in the store, so that several applications can share it. Its last character must
            be one that ids cannot contain, such as a colon, so that a client cannot name a session of another
            application.
        id_length: Bytes of entropy in an id, 16 to 96.
        touch_after: Age of a session's last renewal (seconds or timedelta) from which a request that changes nothing
            renews it again; at most a tenth of ``ttl``.
        absolute_lifetime: The maximum lifetime of a session, however much it is used, in seconds or as a timedelta.
            None: no limit. Rotation does not extend it.
        on_error: What happens when the store cannot be reached: ``"raise"`` the error, or continue with an
            ``"anonymous"`` session that is empty and saves nothing.
        owner_key: Determines the owner of a session: the key of the user's id; several keys, of which the first one
            present is used; or a function of the session. None: sessions have no owners.

    Raises:
        ConfigError: A value is invalid.
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
        if self.is_id(key_prefix[-1:]):
            raise _wrong(
                "key_prefix", "a text whose last character is one that ids cannot contain, such as ':'", key_prefix
            )
        if isinstance(id_length, bool) or not isinstance(id_length, int) or not 16 <= id_length <= 96:
            raise _wrong("id_length", "a number of bytes from 16 to 96", id_length)
        if on_error not in ("raise", "anonymous"):
            raise _wrong("on_error", "'raise' or 'anonymous'", on_error)
        # A ttl of 0 would store sessions that are already expired.
        self.ttl = check_duration("TTL", ttl, 0, exclusive=True)
        self.touch_after = min(check_duration("TOUCH_AFTER", touch_after, 0), self.ttl / 10)
        self.absolute_lifetime = (
            math.inf if absolute_lifetime is None else check_duration("ABSOLUTE_LIFETIME", absolute_lifetime, 1)
        )
        self.permanent = permanent
        self.key_prefix = key_prefix
        self.id_length = id_length
        self.on_error = on_error
        self._owner_of = _owner_function(owner_key)
        keys = [owner_key] if isinstance(owner_key, str) else owner_key
        self._owner_keys = None if callable(keys) else keys or ()  # None: the owner may depend on any key
        self.has_owners = bool(owner_key)

    #: Whether a text has the form of an id. One with another application's prefix does not.
    is_id = staticmethod(re.compile("[A-Za-z0-9_-]+").fullmatch)

    def new_id(self) -> str:
        """Return a new random id, as `secrets.token_urlsafe` does in eleven calls."""
        return b2a_base64(urandom(self.id_length), newline=False).translate(_URL_SAFE, b"=").decode()

    def initial_data(self) -> dict[str, Any]:
        """Return the data that a new session starts with."""
        return {PERMANENT: True} if self.permanent else {}

    def owner(self, session: Mapping[str, Any]) -> str | None:
        """Return the owner of a session, or None if it has no owner."""
        owner = self._owner_of(session)
        if owner is None or owner == "":
            return None
        text = owner if type(owner) is str else str(owner)
        return text if text.isascii() and len(text) <= MAX_ID_BYTES else stored_owner(text)

    def owner_is_immutable(self, session: Mapping[str, Any]) -> bool:
        """Return whether the owner of a session is known to depend only on values that cannot be changed in place."""
        keys = self._owner_keys
        return keys is not None and all(isinstance(session.get(key), _IMMUTABLE) for key in keys)

    def may_determine_owner(self, key: str) -> bool:
        """Return whether the owner may depend on the value of a key; with an owner function, on any key."""
        return self._owner_keys is None or key in self._owner_keys

    def remaining_ttl(self, age: float) -> float:
        """Return the ttl, in seconds from now, of a session that was created ``age`` seconds ago."""
        most = self.absolute_lifetime - age
        return most if most < self.ttl else self.ttl

    def past_limits(self, record: Loaded) -> bool:
        """Return whether a stored session exceeds the current limits, which may be stricter than when it was stored."""
        return record.created >= self.absolute_lifetime or record.idle >= self.ttl


def _owner_function(key: OwnerKey) -> Callable[[Mapping[str, Any]], object]:
    if callable(key):
        check_call("OWNER_KEY", key, ("session",))
        return key
    if isinstance(key, str):
        return methodcaller("get", key)
    keys = () if key is None else key
    if not isinstance(keys, tuple | list) or not all(isinstance(name, str) for name in keys):
        raise _wrong("owner_key", "a key, a list of keys, a function of the session, or None", key)
    return lambda session: next((session[name] for name in keys if session.get(name) is not None), None)


def _wrong(name: str, needed: str, value: object) -> ConfigError:
    return ConfigError(f"{name.upper()} must be {needed}, not {value!r}")
