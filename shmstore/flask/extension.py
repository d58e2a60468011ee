"""Sessions configured the Flask way."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from flask import Flask, current_app

from shmstore.errors import ConfigError
from shmstore.flask.interface import StoreSessionInterface
from shmstore.manager import StoreManager, attach_or_start
from shmstore.proxy import redis_store
from shmstore.urls import is_network, parse, safe

if TYPE_CHECKING:
    from shmstore.session import AnyStore


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

        `PERMANENT_SESSION_LIFETIME` is how long any session lives in the store without being used.

        Raises:
            ConfigError: If one of them is wrong; the message says what would be right.
        """
        if not isinstance(app, Flask):
            raise ConfigError(f"Sessions takes a Flask application, not {app!r}: use Sessions(app)")
        if "shmstore" in app.extensions:
            raise ConfigError(
                "This application has its sessions already: call Sessions(app) or init_app(app) only once"
            )
        interface = StoreSessionInterface(self._source(app.config))
        interface.policy(app)  # complains now, not at the first request
        app.extensions["shmstore"] = app.session_interface = interface

    @property
    def store(self) -> AnyStore:
        """The store of the current application; also when a test has given that another one since."""
        interface = current_app.session_interface
        if not isinstance(interface, StoreSessionInterface):
            raise ConfigError("This application's sessions are kept elsewhere: call init_app(app) first")
        return interface.store

    def _source(self, config: dict[str, Any]) -> Any:
        """Return the store, or a function that opens it."""
        store = config.get("SESSION_STORE") if self._given is None else self._given
        options = config.get("SESSION_STORE_OPTIONS") or {}
        if not isinstance(options, dict):
            raise ConfigError(f"SESSION_STORE_OPTIONS must be a dict, not {options!r}")
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
