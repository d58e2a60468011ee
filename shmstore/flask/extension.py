"""Sessions configured by an application's config."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from flask import Flask, Request, current_app

from shmstore.attach import attach_or_start, check
from shmstore.errors import ConfigError
from shmstore.flask.interface import DEFAULTS, WITHOUT_EFFECT, StoreSessionInterface
from shmstore.flask.migration import FlaskSession, migration
from shmstore.flask.session import StoreSession
from shmstore.policy import Policy
from shmstore.urls import is_network, parse, safe

if TYPE_CHECKING:
    from shmstore.contract import AnyStore

log = logging.getLogger("shmstore")

# Keys of Flask-Session that have no effect here: prefixes, and keys that are not used here.
_OF_FLASK_SESSION: Final = (
    "SESSION_TYPE", "SESSION_REDIS", "SESSION_MEMCACHED", "SESSION_FILE_", "SESSION_CACHELIB", "SESSION_MONGODB",
    "SESSION_SQLALCHEMY", "SESSION_DYNAMODB", "SESSION_USE_SIGNER", "SESSION_SERIALIZATION_FORMAT",
    "SESSION_CLEANUP_N_REQUESTS",
)  # fmt: skip

_OF_OTHERS: Final = ("SESSION_PROTECTION",)  # Flask-Login

_OF_FLASK: Final = tuple(key for key in Flask.default_config if "SESSION" in key)

# Likely keys from other session stores.
_ALIASES: Final = {
    "SESSION_TTL": "PERMANENT_SESSION_LIFETIME",
    "SESSION_TIMEOUT": "PERMANENT_SESSION_LIFETIME",
    "SESSION_LIFETIME": "PERMANENT_SESSION_LIFETIME",
    "SESSION_PERMANENT_LIFETIME": "PERMANENT_SESSION_LIFETIME",
    "SESSION_COOKIE_AGE": "PERMANENT_SESSION_LIFETIME",
    "SESSION_URL": "SESSION_STORE",
    "SESSION_PREFIX": "SESSION_KEY_PREFIX",
}


class Sessions:
    """
    Keeps the sessions of Flask applications in a store::

        app.config["SESSION_STORE"] = "shm://shop"
        sessions = Sessions(app)  # or: sessions = Sessions(); later: sessions.init_app(app)

    One object serves any number of applications. Each application's state is in its ``app.extensions["shmstore"]``, the
    application's `StoreSessionInterface`.

    Args:
        app: An application to configure at once.
        store: The value of `SESSION_STORE`, if it is passed here instead; it takes precedence over the config.
        migrate_from: The sessions that Flask-Session has stored. A visitor who has such a session, and none here,
            continues it: it is moved to the store and gets another id.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        store: str | AnyStore | None = None,
        migrate_from: FlaskSession | None = None,
    ) -> None:
        if isinstance(app, str) or hasattr(app, "load"):
            shown = safe(app) if isinstance(app, str) else "..."
            raise ConfigError(f"Sessions takes the application first: use Sessions(app, store={shown})")
        if migrate_from is not None and not isinstance(migrate_from, FlaskSession):
            raise ConfigError(f"migrate_from takes a shmstore.flask.FlaskSession, not {migrate_from!r}")
        self._given, self._migrate_from = store, migrate_from
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """
        Keep an application's sessions in the store that its config names. The store is not opened yet.

        The config is checked now. A change of it, also of the store, takes effect at the next request.

        These keys are read, besides all of Flask's own for sessions and their cookies:

        - `SESSION_STORE`: a store, or its URL: ``shm://name``, ``shm:///path``, or a URL of `RedisStore.from_url`. A
          URL's store is opened, and its server started if necessary, when a session is first accessed: once in each
          process, for all applications that use the same URL.
        - `SESSION_STORE_OPTIONS`: the options for opening a URL's store, a dict.
        - `SESSION_PERMANENT` (False): whether new sessions are permanent, as if ``session.permanent`` were set.
        - `SESSION_KEY_PREFIX` (``""``): the prefix of ids in the store, if applications share it; it should end in a
          colon.
        - `SESSION_ID_LENGTH` (32): the bytes of entropy in an id.
        - `SESSION_TOUCH_AFTER` (60): the age of a session's last renewal, in seconds, from which a request that changes
          nothing renews it again; at most a tenth of `PERMANENT_SESSION_LIFETIME`.
        - `SESSION_ABSOLUTE_LIFETIME` (None): the seconds after which a session ends, however much it is used.
        - `SESSION_ON_ERROR` (``"raise"``): or ``"anonymous"``, to serve visitors without sessions while the store is
          unavailable.
        - `SESSION_OWNER_KEY` (``"_user_id"``): the key of the user's id; several keys; or a function of the session.

        `PERMANENT_SESSION_LIFETIME` is how long any session lives in the store without being used. For an unknown key
        that resembles one of these, a WARNING line is logged.

        Raises:
            ConfigError: A setting is invalid; the message says what is valid.
        """
        if not isinstance(app, Flask):
            raise ConfigError(f"Sessions takes a Flask application, not {app!r}: use Sessions(app)")
        if "shmstore" in app.extensions:
            raise ConfigError(
                "This application has its sessions already: call Sessions(app) or init_app(app) only once"
            )
        for line in _misspelt(app.config):
            log.warning(line)
        interface = (
            _Configured(app, self._given)
            if self._migrate_from is None
            else _Migrating(app, self._given, self._migrate_from)
        )
        interface.policy(app)  # an invalid setting is reported now, not at the first request
        app.extensions["shmstore"] = app.session_interface = interface

    @property
    def store(self) -> AnyStore:
        """The current application's store, also if a test has since replaced the session interface."""
        interface = current_app.session_interface
        if not isinstance(interface, StoreSessionInterface):
            raise ConfigError("This application's sessions are not kept in a store: call init_app(app) first")
        return interface.store


class _Configured(StoreSessionInterface):
    """The interface of an application whose config names the store."""

    def __init__(self, app: Flask, given: str | AnyStore | None) -> None:
        self._given = given
        self._settings = _store_settings(app.config)
        super().__init__(_source(given, app.config))

    def _policy_from_config(self, app: Flask) -> Policy:
        policy = super()._policy_from_config(app)
        settings = _store_settings(app.config)
        if settings != self._settings:
            self._use(_source(self._given, app.config))
            self._settings = settings
        return policy


class _Migrating(_Configured):
    """The interface of an application that continues the sessions of Flask-Session."""

    def __init__(self, app: Flask, given: str | AnyStore | None, source: FlaskSession) -> None:
        super().__init__(app, given)
        self._migrate_from = source

    def open_session(self, app: Flask, request: Request) -> StoreSession:
        session = super().open_session(app, request)
        session._cookie_sids, session._migrate = migration(
            self._migrate_from, app, session._cookie_sids or (), self._open, session._policy
        )
        return session


def _store_settings(config: Mapping[str, Any]) -> tuple[object, object]:
    options = config.get("SESSION_STORE_OPTIONS")
    return config.get("SESSION_STORE"), dict(options) if isinstance(options, dict) else options


def _source(given: str | AnyStore | None, config: Mapping[str, Any]) -> Any:
    """Return the store, or a function that opens it."""
    named, options = _store_settings(config)
    store = named if given is None else given
    if given is not None and named is not None and named != given:
        log.warning("SESSION_STORE=%r has no effect: Sessions(store=...) takes precedence over it", named)
    options = options or {}
    if not isinstance(options, dict):
        raise ConfigError(f"SESSION_STORE_OPTIONS must be a dict, not {options!r}")
    for name, reason in WITHOUT_EFFECT.items():
        if options.get(name) is not None and options[name] is not False:
            raise ConfigError(f"SESSION_STORE_OPTIONS: {name} has no effect here: {reason}")
    if isinstance(store, str):
        keys = "SESSION_STORE, SESSION_STORE_OPTIONS"
        try:
            if not is_network(store):
                keys = "SESSION_STORE"
                parse(store)
                keys = "SESSION_STORE_OPTIONS"
            check(store, options)
        except ConfigError as error:
            raise ConfigError(f"{keys}: {error}") from None
        return partial(_open, store, options)
    if not hasattr(store, "load"):
        raise ConfigError(
            f"SESSION_STORE must be set to 'shm://<name>', 'redis://<host>', or to a store such as Store(), "
            f"not {store!r}"
        )
    if options:
        raise ConfigError("SESSION_STORE_OPTIONS are for a URL: pass the options to the store when you create it")
    return store


def _open(url: str, options: dict[str, Any]) -> AnyStore:
    store: AnyStore = attach_or_start(url, options)
    return store


def _misspelt(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield a warning for each key without effect, with the key that is probably meant."""
    known = (*DEFAULTS, *_OF_FLASK)
    for key in config:
        if not isinstance(key, str) or "SESSION" not in key or key in known or key in _OF_OTHERS:
            continue
        if key.startswith(_OF_FLASK_SESSION):
            yield f"{key} is a key of Flask-Session and has no effect here: remove it; SESSION_STORE names the store"
        elif meant := _ALIASES.get(key) or next(iter(get_close_matches(key, known, 1, 0.8)), None):
            yield f"{key} is not a known key and has no effect: is {meant} meant?"
