"""Flask's side of a session: the cookie in, the cookie out, the rules from the config."""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from flask import Flask, Request, Response
from flask.sessions import SessionInterface, SessionMixin

from shmstore import cookies
from shmstore.errors import ConfigError
from shmstore.flask.session import StoreSession
from shmstore.policy import Policy
from shmstore.session import Cookie, Session
from shmstore.urls import safe

if TYPE_CHECKING:
    from shmstore.session import AnyStore

_RULES = {rule: f"SESSION_{rule.upper()}" for rule in signature(Policy).parameters if rule != "ttl"}


_NO_STORE = "{} a store, such as Store() or StoreManager('shop').store(), not {!r}"


class StoreSessionInterface(SessionInterface):
    """
    Keep a Flask application's sessions in a store.

    ```python
    app.session_interface = StoreSessionInterface(store)
    ```

    How sessions behave is read from each application's config: the names are those of
    `shmstore.flask.Sessions`.

    Args:
        store: The store, or a function that gives it: then called when a session is first looked at.

    Raises:
        ConfigError: It is neither.
    """

    session_class = StoreSession

    def __init__(self, store: AnyStore | Callable[[], AnyStore]) -> None:
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
        self._user = -1  # the effective user that opened it
        self._policies: WeakKeyDictionary[Flask, tuple[object, Policy]] = WeakKeyDictionary()
        _all.add(self)

    @property
    def store(self) -> AnyStore:
        """The store, opened if it was not open yet, or was closed by somebody."""
        if not callable(self._source):
            return self._source
        store = self._opened
        if store is None or store.closed:
            store = self._inherited
            if store is None or store.closed or self._user != os.geteuid():
                store = self._source()
                if not hasattr(store, "load"):
                    raise ConfigError(
                        _NO_STORE.format("the function given to StoreSessionInterface must return", store)
                    )
                self._user = os.geteuid()
            self._opened = store
        return store

    def policy(self, app: Flask) -> Policy:
        """
        Return the rules for an application's sessions.

        They are read from its config once, and again whenever `PERMANENT_SESSION_LIFETIME` has changed, which
        Flask allows at any time.

        Raises:
            ConfigError: If one of them is wrong.
        """
        try:
            lifetime = app.permanent_session_lifetime
            read, policy = self._policies.get(app, (None, None))
            if policy is not None and read == lifetime:
                return policy
            ttl = lifetime.total_seconds()
        except (TypeError, AttributeError, OverflowError):
            wrong = app.config["PERMANENT_SESSION_LIFETIME"]
            raise ConfigError(f"PERMANENT_SESSION_LIFETIME must be seconds or a timedelta, not {wrong!r}") from None
        rules = {rule: app.config[key] for rule, key in _RULES.items() if key in app.config}
        try:
            policy = Policy(ttl=ttl, **rules)
        except ConfigError as error:
            raise ConfigError(f"SESSION_{error}") from None
        self._policies[app] = lifetime, policy
        return policy

    def open_session(self, app: Flask, request: Request) -> StoreSession:
        """Make the request's session. The store is left alone until somebody looks at it."""
        header = request.environ.get("HTTP_COOKIE")
        sids = cookies.values(header, self.get_cookie_name(app)) if header else ()
        return self.session_class(lambda: self.store, sids, self.policy(app), request=request)

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """
        Write what the request has changed, and tell the browser what it must know. Flask calls this.

        A session of another kind (Flask-SocketIO puts a plain dict into the context of its events) is not
        ours to save.
        """
        if not isinstance(session, Session):
            return
        if session.accessed:  # always so if there is a cookie to send
            _vary_by_cookie(response)
        try:
            session.save(refresh=app.config["SESSION_REFRESH_EACH_REQUEST"], final=True)
        except Exception:
            # Flask makes a 500 of this and calls us again, for that response: which shall not fail or wait too.
            session.abandon()
            raise
        cookie = session.cookie  # once: another thread may still use the session
        if cookie is Cookie.KEEP:
            return
        name = self.get_cookie_name(app)
        domain, path = self.get_cookie_domain(app), self.get_cookie_path(app)
        secure, httponly = self.get_cookie_secure(app), self.get_cookie_httponly(app)
        samesite, partitioned = self.get_cookie_samesite(app), self.get_cookie_partitioned(app)
        # Browsers only let go of a cookie when told so with the attributes it was set with.
        if cookie is Cookie.DELETE:
            response.delete_cookie(name, path, domain, secure, httponly, samesite, partitioned)
        else:
            response.set_cookie(
                name,
                session._stored_sid,  # whatever another thread may be about to make of it
                expires=self.get_expiration_time(app, session),
                path=path,
                domain=domain,
                secure=secure,
                httponly=httponly,
                samesite=samesite,
                partitioned=partitioned,
            )

    def regenerate(self, session: StoreSession) -> None:
        """Give a session a new id and keep its data, as in Flask-Session. The same as `session.rotate()`."""
        session.rotate()


_all: WeakSet[StoreSessionInterface] = WeakSet()


def _forked() -> None:
    # A worker may become another user, whose store is another one: its first request looks whether it did. If not, it
    # goes on with the store: a private one has the sessions of all processes that have forked since it was opened.
    for interface in _all:
        interface._inherited, interface._opened = interface._opened or interface._inherited, None


os.register_at_fork(after_in_child=_forked)


# For what every request needs, Werkzeug has a more general way, which takes longer than the rest of a read.


def _vary_by_cookie(response: Response) -> None:
    if any(name.lower() == "vary" for name, _ in response.headers):
        response.vary.add("Cookie")
    else:
        response.headers.add("Vary", "Cookie")
