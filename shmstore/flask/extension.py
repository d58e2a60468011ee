"""Sessions configured the Flask way."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from flask import Flask, current_app

from shmstore.errors import ConfigError
from shmstore.flask.interface import DEFAULTS, WITHOUT_EFFECT, StoreSessionInterface
from shmstore.manager import StoreManager, attach_or_start
from shmstore.policy import Policy
from shmstore.server.client import redis_store
from shmstore.urls import is_network, parse, safe

if TYPE_CHECKING:
    from shmstore.contract import AnyStore

log = logging.getLogger("shmstore")

# Of Flask-Session, without effect here: what begins with these, and its keys that are not ours.
_OF_FLASK_SESSION: Final = (
    "SESSION_TYPE", "SESSION_REDIS", "SESSION_MEMCACHED", "SESSION_FILE_", "SESSION_CACHELIB", "SESSION_MONGODB",
    "SESSION_SQLALCHEMY", "SESSION_DYNAMODB", "SESSION_USE_SIGNER", "SESSION_SERIALIZATION_FORMAT",
    "SESSION_CLEANUP_N_REQUESTS",
)  # fmt: skip

_OF_OTHERS: Final = ("SESSION_PROTECTION",)  # Flask-Login

_OF_FLASK: Final = tuple(key for key in Flask.default_config if "SESSION" in key)

# What people write who remember the name of another session store.
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
    Keep the sessions of Flask applications in a store.

    ```python
    app.config["SESSION_STORE"] = "shm://shop"
    sessions = Sessions(app)            # or: sessions = Sessions(); later: sessions.init_app(app)
    ```

    One object serves any number of applications; what belongs to one of them lives in its
    `app.extensions["shmstore"]`, the application's `StoreSessionInterface`.

    Args:
        app: An application to begin with.
        store: What `SESSION_STORE` says, for those who hold it; it goes before the config.
    """

    def __init__(self, app: Flask | None = None, *, store: str | AnyStore | None = None) -> None:
        if isinstance(app, str) or hasattr(app, "load"):
            shown = safe(app) if isinstance(app, str) else "..."
            raise ConfigError(f"Sessions takes the application first: use Sessions(app, store={shown})")
        self._given = store
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """
        Keep an application's sessions in the store its config names. Nothing is opened yet.

        The config is checked now. A change of it, the store's included, takes effect at the next request.

        These keys are read, besides all of Flask's own for sessions and their cookies:

        - `SESSION_STORE`: `shm://name`, `shm:///path`, `redis://host` and what else `shmstore.redis.client`
          knows, or a store. A URL's store is opened, and its server
          started if there is none, when a session is first looked at: once in each process, for all
          applications that name it alike.
        - `SESSION_STORE_OPTIONS`: the options a URL's store is opened with, a dict.
        - `SESSION_PERMANENT` (False): whether new sessions are permanent, as if `session.permanent` were set.
        - `SESSION_KEY_PREFIX` (""): what goes before the ids in the store, if applications share one;
          end it in a colon.
        - `SESSION_ID_LENGTH` (32): the bytes of entropy in an id.
        - `SESSION_TOUCH_AFTER` (60): a request that changes nothing renews the session's life if that was
          last done so many seconds ago; or a tenth of `PERMANENT_SESSION_LIFETIME` ago, if that is less.
        - `SESSION_ABSOLUTE_LIFETIME` (None): the seconds after which a session ends, however much it is used.
        - `SESSION_ON_ERROR` ("raise"): or "anonymous", to serve visitors without sessions while there is no
          store.
        - `SESSION_OWNER_KEY` ("_user_id"): the key of the user's id; several keys; or a function of the
          session.

        `PERMANENT_SESSION_LIFETIME` is how long any session lives in the store without being used. A key that is
        none of these, and resembles one, is a WARNING line in the log.

        Raises:
            ConfigError: If one of them is wrong; the message says what would be right.
        """
        if not isinstance(app, Flask):
            raise ConfigError(f"Sessions takes a Flask application, not {app!r}: use Sessions(app)")
        if "shmstore" in app.extensions:
            raise ConfigError(
                "This application has its sessions already: call Sessions(app) or init_app(app) only once"
            )
        for line in _misspelt(app.config):
            log.warning(line)
        interface = _Configured(app, self._given)
        interface.policy(app)  # complains now, not at the first request
        app.extensions["shmstore"] = app.session_interface = interface

    @property
    def store(self) -> AnyStore:
        """The store of the current application; also when a test has given that another one since."""
        interface = current_app.session_interface
        if not isinstance(interface, StoreSessionInterface):
            raise ConfigError("This application's sessions are kept elsewhere: call init_app(app) first")
        return interface.store


class _Configured(StoreSessionInterface):
    """The interface of an application whose config names the store."""

    def __init__(self, app: Flask, given: str | AnyStore | None) -> None:
        self._given = given
        self._named = _named(app.config)
        super().__init__(_source(given, app.config))

    def _policy_of(self, app: Flask) -> Policy:
        policy = super()._policy_of(app)
        named = _named(app.config)
        if named != self._named:
            self._use(_source(self._given, app.config))
            self._named = named
        return policy


def _named(config: Mapping[str, Any]) -> tuple[object, object]:
    options = config.get("SESSION_STORE_OPTIONS")
    return config.get("SESSION_STORE"), dict(options) if isinstance(options, dict) else options


def _source(given: str | AnyStore | None, config: Mapping[str, Any]) -> Any:
    """Return the store, or a function that opens it."""
    named, options = _named(config)
    store = named if given is None else given
    if given is not None and named is not None and named != given:
        log.warning("SESSION_STORE=%r has no effect: Sessions(store=...) goes before it", named)
    options = options or {}
    if not isinstance(options, dict):
        raise ConfigError(f"SESSION_STORE_OPTIONS must be a dict, not {options!r}")
    for name, reason in WITHOUT_EFFECT.items():
        if options.get(name) is not None and options[name] is not False:
            raise ConfigError(f"SESSION_STORE_OPTIONS: {name} has no effect here: {reason}")
    if isinstance(store, str):
        if is_network(store):
            try:
                redis_store(store, options).close()  # connects to nothing
            except ConfigError as error:
                raise ConfigError(f"SESSION_STORE, SESSION_STORE_OPTIONS: {error}") from None
            return partial(_open, store, options)
        try:
            parse(store)
        except ConfigError as error:
            raise ConfigError(f"SESSION_STORE: {error}") from None
        try:
            StoreManager(store, **options)  # starts nothing
        except ConfigError as error:
            raise ConfigError(f"SESSION_STORE_OPTIONS: {error}") from None
        return partial(_open, store, options)
    if not hasattr(store, "load"):
        raise ConfigError(
            f"SESSION_STORE must be set to 'shm://<name>', 'redis://<host>', or to a store such as Store(), "
            f"not {store!r}"
        )
    if options:
        raise ConfigError("SESSION_STORE_OPTIONS go with a URL: give a store its own when you make it")
    return store


def _open(url: str, options: dict[str, Any]) -> AnyStore:
    store: AnyStore = attach_or_start(url, options)
    return store


def _misspelt(config: Mapping[str, Any]) -> Iterator[str]:
    """Say of each key that nothing reads which one may be meant."""
    ours = (*DEFAULTS, *_OF_FLASK)
    for key in config:
        if not isinstance(key, str) or "SESSION" not in key or key in ours or key in _OF_OTHERS:
            continue
        if key.startswith(_OF_FLASK_SESSION):
            yield f"{key} is a key of Flask-Session and has no effect here: remove it; SESSION_STORE names the store"
        elif meant := _ALIASES.get(key) or next(iter(get_close_matches(key, ours, 1, 0.8)), None):
            yield f"{key} is no key of the configuration and has no effect: is {meant} meant?"
