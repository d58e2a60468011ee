"""The session interface of Flask: opens and saves the session of a request by the rules in the config."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from inspect import getattr_static, signature
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, ref

from flask import Flask, Request, Response
from flask.sessions import SessionInterface, SessionMixin
from werkzeug.http import dump_cookie, http_date

from shmstore.errors import ConfigError
from shmstore.flask.session import StoreSession
from shmstore.policy import Policy
from shmstore.session import Session, cookie_of, discard
from shmstore.store.store import Store
from shmstore.system.forks import on_fork
from shmstore.system.platform import geteuid
from shmstore.urls import safe
from shmstore.web.cookie import KEEP_COOKIE, Cookie, SessionCookie, values

if TYPE_CHECKING:
    from shmstore.contract import AnyStore

log = logging.getLogger("shmstore")

_RULES: Final = {rule: f"SESSION_{rule.upper()}" for rule in signature(Policy).parameters if rule != "ttl"}

DEFAULTS: Final[dict[str, Any]] = {
    "SESSION_STORE": None,
    "SESSION_STORE_OPTIONS": None,
    **{key: signature(Policy).parameters[rule].default for rule, key in _RULES.items()},
}
"""The config keys that are read here besides Flask's own, and their defaults."""

# One call into C, because it runs at each request.
_read_settings: Final = itemgetter(*DEFAULTS, "PERMANENT_SESSION_LIFETIME")

WITHOUT_EFFECT: Final = {
    "ttl": "sessions of Flask live for PERMANENT_SESSION_LIFETIME",
    "stale": "an expired session of Flask is a new one",
}
"""Options of a store that have no effect on Flask's sessions, and the reasons."""


_NO_STORE = "{} a store, such as Store() or StoreManager('shop').store(), not {!r}"


class StoreSessionInterface(SessionInterface):
    """
    Keeps the sessions of a Flask application in a store::

        app.session_interface = StoreSessionInterface(store)

    The behaviour of sessions is read from each application's config, with the keys that `Sessions.init_app` documents.
    A change of the config takes effect at the next request.

    Args:
        store: The store, or a function that returns it, called when a session is first accessed.

    Raises:
        ConfigError: The argument is neither.
    """

    session_class = StoreSession

    def __init__(self, store: AnyStore | Callable[[], AnyStore]) -> None:
        # By application: the settings that were read, and the policy made from them. The last one is found faster.
        self._policies: WeakKeyDictionary[Flask, tuple[object, Policy]] = WeakKeyDictionary()
        self._last: tuple[Callable[[], Flask | None], object, Policy | None] = lambda: None, None, None
        self._use(store)
        on_fork(self)

    def _use(self, store: AnyStore | Callable[[], AnyStore]) -> None:
        if isinstance(store, str):
            raise ConfigError(
                f"StoreSessionInterface takes a store, not its name: "
                f"use Sessions(app, store={safe(store)}), which opens it"
            )
        if isinstance(store, Flask) or not (callable(store) or hasattr(store, "load")):
            raise ConfigError(_NO_STORE.format("StoreSessionInterface takes", store))
        self._source = store
        self._opened: AnyStore | None = None
        self._inherited: AnyStore | None = None  # opened before a fork
        self._opened_by = -1  # the effective user that opened it
        self._may_be_private = False  # the store is private, and not known to be the only process' store
        if not callable(store):
            self._inspect(store)

    def _inspect(self, store: AnyStore) -> None:
        """Warn about options of the store that have no effect on Flask's sessions; note whether it is private."""
        options = getattr(store, "options", None)
        for name, reason in WITHOUT_EFFECT.items():
            value = getattr(options, name, None)
            if value is not None and value is not False:
                log.warning("%s: its option %s has no effect here: %s", store.label, name, reason)
        self._may_be_private = isinstance(store, Store)

    def _warn_if_private(self, environ: Mapping[str, Any]) -> None:
        """Warn once if each process of a server has a private store of its own."""
        if not environ.get("wsgi.multiprocess"):
            return
        self._may_be_private = False
        # A store that was created before the fork, under --preload, is shared by all processes.
        if self.store.stats().server_pid == os.getpid():
            log.warning(
                "each process of this server has a private store: a visitor loses the session when another process "
                "answers; use a shared store: SESSION_STORE = 'shm://NAME', on Linux, or 'redis://HOST'"
            )

    @property
    def store(self) -> AnyStore:
        """The store. It is opened if it is not open yet, or has been closed."""
        return self._open()

    def _open(self) -> AnyStore:
        if not callable(self._source):
            return self._source
        store = self._opened
        if store is None or store.closed:
            store = self._inherited
            if store is None or store.closed or self._opened_by != geteuid():
                store = self._source()
                if not hasattr(store, "load"):
                    raise ConfigError(
                        _NO_STORE.format("the function given to StoreSessionInterface must return", store)
                    )
                self._opened_by = geteuid()
                self._inspect(store)
            self._opened = store
        return store

    def policy(self, app: Flask) -> Policy:
        """
        Return the rules for an application's sessions from its current config.

        Raises:
            ConfigError: A setting is invalid.
        """
        config = app.config
        try:
            settings = _read_settings(config)
        except KeyError:
            for key, value in DEFAULTS.items():
                config.setdefault(key, value)
            if "PERMANENT_SESSION_LIFETIME" not in config:
                raise _wrong_lifetime(app) from None
            settings = _read_settings(config)
        last, known, policy = self._last
        if policy is not None and known == settings and last() is app:
            return policy
        return self._policy_of(app, settings)

    def _policy_of(self, app: Flask, settings: tuple[Any, ...]) -> Policy:
        lifetime = _lifetime(app)
        known, policy = self._policies.get(app, (None, None))
        if policy is None or known != (settings, lifetime):
            policy = self._policy_from_config(app)
            # Copies of dicts, so that a change of a dict is noticed.
            settings = tuple(dict(value) if isinstance(value, dict) else value for value in settings)
            self._policies[app] = (settings, lifetime), policy
        if _takes_lifetime_from_config(app):
            self._last = ref(app), settings, policy
        return policy

    def _policy_from_config(self, app: Flask) -> Policy:
        """Create the policy from an application's config."""
        lifetime = _lifetime(app)
        if lifetime <= timedelta(0):
            raise ConfigError(
                f"PERMANENT_SESSION_LIFETIME must be more than 0 seconds, not {lifetime.total_seconds():g}"
            )
        try:
            return Policy(ttl=lifetime, **{rule: app.config[key] for rule, key in _RULES.items()})
        except ConfigError as error:
            raise ConfigError(f"SESSION_{error}") from None

    def open_session(self, app: Flask, request: Request) -> StoreSession:
        """Create the request's session. The store is not used before the first access."""
        environ = request.environ
        if self._may_be_private:
            self._warn_if_private(environ)
        header = environ.get("HTTP_COOKIE")
        sids = values(header, self.get_cookie_name(app)) if header else ()
        return self.session_class(self._open, sids, self.policy(app), request=request)

    def is_null_session(self, obj: object) -> bool:
        """Return whether an object is Flask's substitute for a session that could not be opened."""
        return not isinstance(obj, Session) and super().is_null_session(obj)  # Flask's way alone is slow

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """
        Save the request's changes, and set or delete the cookie. Flask calls this.

        Sessions of other classes are ignored. Flask-SocketIO puts a plain dict into the context of its events.
        """
        if not isinstance(session, Session):
            return
        if session.accessed:  # always true if there is a cookie to send
            _vary_by_cookie(response)
        try:
            session.save(refresh=app.config["SESSION_REFRESH_EACH_REQUEST"], final=True)
        except Exception:
            # Flask creates a 500 response and calls this method again for it, which must not fail or wait again.
            discard(session)
            raise
        cookie, sid = cookie_of(session)
        if cookie is KEEP_COOKIE:
            return
        header = _session_cookie(
            self.get_cookie_name(app), self.get_cookie_path(app), self.get_cookie_domain(app),
            self.get_cookie_secure(app), self.get_cookie_httponly(app), self.get_cookie_samesite(app),
            self.get_cookie_partitioned(app),
        )  # fmt: skip
        if cookie is Cookie.DELETE:
            response.headers.add("Set-Cookie", header.delete)
            return
        expires = self.get_expiration_time(app, session)
        response.headers.add("Set-Cookie", header.set(sid, expires="" if expires is None else http_date(expires)))

    def get_expiration_time(self, app: Flask, session: SessionMixin) -> datetime | None:
        """Return when the cookie expires, or None if it expires with the browser."""
        try:
            return super().get_expiration_time(app, session)
        except OverflowError:  # the lifetime ends after the year 9999
            return datetime.max.replace(tzinfo=UTC)

    def after_fork_in_child(self) -> None:
        # A worker may change its user, and with it the store; its first request checks that. Otherwise it keeps the
        # store: a private store has the sessions of all processes that were forked afterwards.
        self._inherited, self._opened = self._opened or self._inherited, None

    def regenerate(self, session: StoreSession) -> None:
        """
        Give a session a new id and keep its data, as in Flask-Session.

        The same as `session.rotate()`; `session.regenerate()` destroys the data.
        """
        session.rotate()


def _lifetime(app: Flask) -> timedelta:
    try:
        lifetime: object = app.permanent_session_lifetime
    except (TypeError, ValueError, LookupError, OverflowError):
        raise _wrong_lifetime(app) from None
    if not isinstance(lifetime, timedelta) or isinstance(app.config.get("PERMANENT_SESSION_LIFETIME"), bool):
        raise _wrong_lifetime(app)
    return lifetime


def _takes_lifetime_from_config(app: Flask) -> bool:
    name = "permanent_session_lifetime"
    return getattr_static(app, name) is getattr_static(Flask, name)


def _wrong_lifetime(app: Flask) -> ConfigError:
    wrong = app.config.get("PERMANENT_SESSION_LIFETIME")
    return ConfigError(f"PERMANENT_SESSION_LIFETIME must be seconds or a timedelta, not {wrong!r}")


@lru_cache
def _session_cookie(
    name: str, path: str, domain: str | None, secure: bool, httponly: bool, samesite: str | None, partitioned: bool
) -> SessionCookie:
    attributes = dump_cookie(
        "", path=path, domain=domain, secure=secure, httponly=httponly, samesite=samesite, partitioned=partitioned
    )
    # Werkzeug sends a name that is not ASCII as UTF-8 bytes, and a header is decoded as Latin-1.
    return SessionCookie(name.encode().decode("latin-1"), attributes.removeprefix("="))


def _vary_by_cookie(response: Response) -> None:
    headers = response.headers
    for name, _ in headers:
        if name.lower() == "vary":
            response.vary.add("Cookie")
            return
    headers.add("Vary", "Cookie")  # what `vary.add` comes to, but faster: every request that looks needs it
