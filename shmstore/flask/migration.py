"""Sessions that the extension Flask-Session has stored, continued here at the next request of each visitor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pickle import PickleError
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from flask import Flask
from itsdangerous import BadSignature, Signer

from shmstore.codec.flask_session import PREFIX, decode, storable
from shmstore.codec.ids import AT_NAVIGATION, ROTATE, digest_of_key, key_of_id
from shmstore.errors import ConfigError, RecordTooLarge, SerializationError, StoreUnavailable, safe_traceback
from shmstore.policy import PERMANENT, Policy
from shmstore.system.signals import pass_on_interruption
from shmstore.system.throttle import Throttle

if TYPE_CHECKING:
    from shmstore.contract import AnyStore

__all__ = ["FlaskSession", "migration"]

log = logging.getLogger("shmstore")

T = TypeVar("T")

_MAX_ID: Final = 128  # characters; memcached takes no longer keys
_TIMEOUT: Final = 2.0  # seconds that a server has for an answer, as without a `lock_timeout`

# What reading a pickle may raise, apart from the errors of a cache.
_UNREADABLE: Final = (
    PickleError, AttributeError, ImportError, LookupError, TypeError, ValueError, EOFError, RecursionError,
)  # fmt: skip

_failing, _partly = Throttle(), Throttle()


class Cache(Protocol):
    """What holds the sessions: a client of a server, or a cache."""

    def get(self, key: str, /) -> Any:
        """Return what is under a key, None if there is nothing."""

    def delete(self, key: str, /) -> object:
        """Remove what is under a key."""


class FlaskSession:
    """
    The sessions that Flask-Session has stored, as `Sessions` takes them::

        Sessions(app, migrate_from=FlaskSession("redis://localhost:6379"))

    Args:
        where: What Flask-Session was given: the client in ``SESSION_REDIS`` or ``SESSION_MEMCACHED``, or the URL of
            that Redis; the cache in ``SESSION_CACHELIB``. Instead of ``SESSION_TYPE = "filesystem"`` it is
            ``cachelib.FileSystemCache(SESSION_FILE_DIR, threshold=0)``.
        prefix: Its ``SESSION_KEY_PREFIX``.
        signed: Its ``SESSION_USE_SIGNER``. Only ids with a signature by the application's ``SECRET_KEY`` count then.
        allow_pickle: Whether to read pickles, as Flask-Session wrote them before 0.7 and caches of cachelib do. Reading
            one executes what is in it: only if no other user and no other program can write there.

    Raises:
        ConfigError: An argument is invalid.
    """

    def __init__(
        self, where: Cache | str, *, prefix: str = PREFIX, signed: bool = False, allow_pickle: bool = False
    ) -> None:
        if not isinstance(prefix, str):
            raise ConfigError(f"prefix must be a str, the SESSION_KEY_PREFIX of Flask-Session, not {prefix!r}")
        opened: Callable[[], Any] = lambda: where  # noqa: E731
        if isinstance(where, str):
            from shmstore.redis.client import Address

            address = Address.of(where, prefix=prefix)
            prefix = address.prefix
            opened = cache(partial(address.open, _TIMEOUT))  # later, because a client of a Cluster connects at once
        elif not (hasattr(where, "get") and hasattr(where, "delete")):
            raise ConfigError(f"FlaskSession takes a client of Redis, a URL of one, or a cache, not {where!r}")
        elif not allow_pickle and any(each.__module__.startswith("cachelib.") for each in type(where).__mro__):
            raise ConfigError(
                "caches of cachelib hold pickles, which execute what is in them when they are read: "
                "FlaskSession(cache, allow_pickle=True), if no other user and no other program can write there"
            )
        self._opened, self._prefix, self._signed, self._allow_pickle = opened, prefix, signed, allow_pickle

    def _genuine(self, app: Flask, cookies: Sequence[str]) -> list[str]:
        """Return the ids in the values of cookies; if ids are signed, only those with a valid signature."""
        if not self._signed:
            return list(cookies)
        if not app.secret_key:
            raise ConfigError("FlaskSession(signed=True) needs the SECRET_KEY that has signed the ids")
        signer, found = Signer(app.secret_key, salt="flask-session", key_derivation="hmac"), []
        for cookie in cookies:
            try:
                found.append(signer.unsign(cookie).decode())
            except (BadSignature, ValueError):
                continue
        return found

    def _move(self, sid: str, store: AnyStore, policy: Policy) -> None:
        """
        Move the session of an id to a store, if there is one.

        It keeps its id there, so of several requests at once one moves it and the others find it. At the next page its
        id changes, as at any rotation.
        """
        key, name = policy.key_prefix + sid, self._prefix + sid
        number = key_of_id(key)
        if number is None or len(sid) > _MAX_ID or self._translated(lambda: self._read(name)) is None:
            return
        with store.lock(f"migration {digest_of_key(number)}"):
            is_stored = False
            if not (key in store or store.gone(key)):  # else another request has moved it
                session = self._translated(lambda: self._read(name))
                if session is None or not self._store(session, key, store, policy):
                    return
                is_stored = True
            try:
                self._translated(lambda: self._remove(name))
            except StoreUnavailable:
                if is_stored:
                    store.destroy(key)  # a logout must end both
                raise

    def _store(self, session: dict[Any, Any], key: str, store: AnyStore, policy: Policy) -> bool:
        session, left_out = storable(store.codec, session)
        if left_out and (times := _partly.due()):
            log.warning(
                "%s: sessions moved without values of types that cannot be stored: %d; the last one without %s",
                store.label, times, ", ".join(map(repr, left_out)),
            )  # fmt: skip
        try:
            return store.add(key, {**session, ROTATE: AT_NAVIGATION}, policy.remaining_ttl(0), policy.owner(session))
        except (RecordTooLarge, SerializationError) as error:
            self._log(error)
            return False

    def _read(self, name: str) -> dict[Any, Any] | None:
        try:
            found = self._opened().get(name)
            session = {} if found is None else decode(found, allow_pickle=self._allow_pickle)
            return session if session.keys() - {PERMANENT} else None
        except (SerializationError, *_UNREADABLE) as error:
            self._log(error)
            return None

    def _remove(self, name: str) -> None:
        where = self._opened()
        where.delete(name)
        if where.get(name) is not None:
            raise OSError("it cannot be removed")

    def _log(self, error: Exception) -> None:
        if times := _failing.due():
            why = str(error) if isinstance(error, (RecordTooLarge, SerializationError)) else safe_traceback(error)
            log.error(
                "unreadable sessions of Flask-Session, whose visitors start new ones: %d; the last: %s", times, why
            )

    def _translated(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except Exception as error:
            pass_on_interruption(error)
            why = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise StoreUnavailable(f"a session of Flask-Session cannot be moved: {why}") from error


def migration(
    source: FlaskSession, app: Flask, cookies: Sequence[str], store: Callable[[], AnyStore], policy: Policy
) -> tuple[list[str], Callable[[str], None]]:
    """Return the ids to look for in a request, and what moves the session of one of them to the store."""
    genuine = source._genuine(app, cookies)

    def migrate(sid: str) -> None:
        if sid in genuine:
            source._move(sid, store(), policy)

    return [*cookies, *(sid for sid in genuine if sid not in cookies)], migrate
