"""The middleware that puts a session into the scope of each request and WebSocket."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from datetime import timedelta
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from shmstore.asgi.session import ScopePolicy, ScopeSession, header
from shmstore.attach import attach_or_start, check, detach
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.options import Duration
from shmstore.policy import OwnerKey
from shmstore.session import cookie_of, discard, end_response, is_unannounced, load, save, unsaved
from shmstore.system.blocking import before_blocking
from shmstore.system.event_loop import in_thread
from shmstore.system.forks import on_fork
from shmstore.system.signals import suppressing
from shmstore.web.cookie import Cookie, SessionCookie, values
from shmstore.web.stored_session import STORE_ERRORS

if TYPE_CHECKING:
    from shmstore.contract import AnyStore

log = logging.getLogger("shmstore")

Message = MutableMapping[str, Any]  # also a scope
# Each framework has its own types for what ASGI passes.
App = Callable[[Any, Any, Any], Awaitable[None]]

_WITHOUT_EFFECT: Final = {
    "ttl": "sessions live for the ttl of SessionMiddleware",
    "stale": "an expired session is a new one",
}

# An attempt to open a store can take seconds, and each request would make one.
_RETRY_AFTER: Final = 1.0  # seconds


class SessionMiddleware:
    """
    Keeps the sessions of an ASGI application in a store: ``scope["session"]``, which is ``request.session``::

        app.add_middleware(SessionMiddleware, store="shm://shop")  # FastAPI, Starlette
        app = SessionMiddleware(app, store="shm://shop")  # any ASGI application

    The session is a `shmstore.session.Session`. It is saved when the response starts, or when the WebSocket ends; what
    is changed after the start of a response needs a call of `Session.save`. The store is opened for the first request
    that needs it, once in each process for all applications that use the same URL, and closed at the end of the last
    one's lifespan.

    Args:
        app: The application.
        store: A store, or its URL: ``shm://name``, ``shm:///path``, or a URL of `RedisStore.from_url`.
        store_options: The options for opening a URL's store.
        ttl: How long a session lives without being used, in seconds or as a timedelta.
        permanent: Whether the cookies of new sessions outlive the browser; ``session.permanent`` changes it for one.
        refresh_each_request: Send the cookie of a permanent session with each response that looked at it.
        absolute_lifetime, touch_after, key_prefix, id_length, owner_key, on_error: See `shmstore.policy.Policy`.
        cookie_name: The name of the cookie.
        cookie_domain: The domain whose hosts get the cookie; None: only the host that sets it.
        cookie_path: The path below which the cookie is sent.
        cookie_secure: Send the cookie only over HTTPS.
        cookie_httponly: Hide the cookie from JavaScript.
        cookie_samesite: ``"lax"``, ``"strict"`` or ``"none"``; None: leave it to the browser.
        cookie_partitioned: Keep a cookie for each top-level site. It then needs HTTPS.

    Raises:
        ConfigError: A value is invalid; the message says what is valid.
    """

    def __init__(
        self,
        app: App,
        store: str | AnyStore,
        *,
        store_options: Mapping[str, Any] | None = None,
        ttl: Duration = timedelta(days=31),
        permanent: bool = False,
        refresh_each_request: bool = True,
        absolute_lifetime: Duration | None = None,
        touch_after: Duration = 60,
        key_prefix: str = "",
        id_length: int = 32,
        owner_key: OwnerKey = "_user_id",
        on_error: str = "raise",
        cookie_name: str = "session",
        cookie_domain: str | None = None,
        cookie_path: str = "/",
        cookie_secure: bool = False,
        cookie_httponly: bool = True,
        cookie_samesite: str | None = "lax",
        cookie_partitioned: bool = False,
    ) -> None:
        self.app = app
        self._source = _source(store, dict(store_options or {}), self)
        self._closes = isinstance(store, str)
        self._store: AnyStore | None = None
        self._opening = threading.Lock()
        self._ended = False  # by the server; until the next connection
        self._failure: Exception | None = None  # of the last attempt to open it
        self._retry_at = 0.0  # time.monotonic()
        self._policy = ScopePolicy(
            ttl=ttl, permanent=permanent, key_prefix=key_prefix, id_length=id_length, touch_after=touch_after,
            absolute_lifetime=absolute_lifetime, on_error=on_error, owner_key=owner_key,
        )  # fmt: skip
        self._refresh = refresh_each_request
        self._cookie = SessionCookie.checked(
            cookie_name, domain=cookie_domain, path=cookie_path, secure=cookie_secure, httponly=cookie_httponly,
            samesite=cookie_samesite, partitioned=cookie_partitioned,
        )  # fmt: skip
        on_fork(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection; servers and other middlewares call this."""
        kind = scope["type"]
        if kind not in ("http", "websocket"):

            async def closing(message: Message) -> None:
                if message["type"].startswith("lifespan.shutdown"):
                    await self._close()  # before the server learns of it, which then ends everything
                await send(message)

            await self.app(scope, receive, closing)
            return

        self._ended = False
        session = await self._session(scope)
        litestar = scope.get("litestar_app")
        if "session" in scope:  # of a middleware around this one, which is going to save what it finds there
            scope = dict(scope)
        scope["session"] = session

        started = False

        async def answering(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                if litestar is not None:
                    _adopt(scope, session, litestar)
                message = await self._answer(session, message)
                started = True
            await send(message)

        try:
            await self.app(scope, receive, answering)
        except Exception:
            if kind == "http" and not started and is_unannounced(session):
                with suppressing(Exception):  # the client may be gone
                    await self._answer_error(session, send)
            raise
        finally:
            end_response(session)
            if kind == "websocket":  # it often ends by an exception
                if litestar is not None:
                    _adopt(scope, session, litestar)
                if unsaved(session):
                    await save(session)

    async def _session(self, scope: Message) -> ScopeSession:
        """Create the session of a connection."""
        headers = scope["headers"]
        cookie = header(headers, b"cookie", b"; ")
        sids = values(cookie, self._cookie.name) if cookie else ()
        request = headers if scope["type"] == "http" else None
        session = ScopeSession(self._opened, sids, self._policy, request=request)
        await load(session)
        return session

    async def _answer(self, session: ScopeSession, message: Message) -> Message:
        """Save a session; return the start of the response with the headers that follow from it."""
        try:
            await save(session, refresh=self._refresh, final=True)
        except Exception:
            discard(session)  # the page that reports the error must not fail too
            raise
        if not session.accessed:
            return message
        return {**message, "headers": self._headers(session, message.get("headers", ()))}

    async def _answer_error(self, session: ScopeSession, send: Any) -> None:
        """Answer in the place of Starlette's page for errors, which would not tell the browser the new id."""
        headers = self._headers(session, [(b"content-type", b"text/plain; charset=utf-8")])
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})

    def _headers(self, session: ScopeSession, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers of a response with those that follow from a session that was saved."""
        headers = _vary_by_cookie(headers)
        cookie, sid = cookie_of(session)
        if cookie is Cookie.SEND:
            value = self._cookie.set(sid, max_age=self._policy.ttl if session.permanent else None)
            headers.append((b"set-cookie", value.encode()))
        elif cookie is Cookie.DELETE:
            headers.append((b"set-cookie", self._cookie.delete.encode()))
        return headers

    def _opened(self) -> AnyStore:
        """Return the store. It is opened for the first request that needs it."""
        store = self._store
        if store is None or store.closed:
            before_blocking()
            store = self._open()
        return store

    def _open(self) -> AnyStore:
        with self._opening:
            if self._store is not None and not self._store.closed:
                return self._store
            if self._ended:
                raise StoreUnavailable("the application has ended")  # and no one would close the store
            if self._failure is not None and time.monotonic() < self._retry_at:
                raise self._failure.with_traceback(None)
            try:
                store = self._source()
            except STORE_ERRORS as error:
                self._failure, self._retry_at = error, time.monotonic() + _RETRY_AFTER
                raise
            for option, reason in _WITHOUT_EFFECT.items():
                if getattr(store.options, option) not in (None, False):
                    log.warning("%s: its option %s has no effect here: %s", store.label, option, reason)
            self._store, self._failure = store, None
            return store

    async def _close(self) -> None:
        self._ended = True
        await in_thread(self._detach)

    def _detach(self) -> None:
        with self._opening:
            store, self._store = self._store, None
        if store is not None and self._closes:
            detach(store, self)

    def after_fork_in_child(self) -> None:
        self._store, self._opening = None, threading.Lock()


def _source(store: str | AnyStore, options: dict[str, Any], user: object) -> Callable[[], AnyStore]:
    """Return a function that opens a store."""
    if isinstance(store, str):
        for option, reason in _WITHOUT_EFFECT.items():
            if options.get(option) not in (None, False):
                raise ConfigError(f"store_options: {option} has no effect here: {reason}")
        check(store, options)
        return partial(attach_or_start, store, options, user)
    if not hasattr(store, "load"):
        raise ConfigError(f"store must be 'shm://<name>', 'redis://<host>', or a store such as Store(), not {store!r}")
    if options:
        raise ConfigError("store_options are for a URL: pass the options to the store when you create it")
    return lambda: store


def _adopt(scope: Message, session: ScopeSession, litestar: object) -> None:
    """Take over what Litestar's ``set_session`` or ``clear_session`` has put in the place of the session."""
    value = scope.get("session", session)
    # Below a mount, another application's middleware may have put its own session there.
    if value is session or scope["app"] is not litestar:
        return
    if type(value) is dict:
        session.clear()
        session.update(value)
    elif value is None or isinstance(value, Enum):  # Litestar's `Empty`
        session.clear()
    elif not isinstance(value, dict):
        raise TypeError(f"scope['session'] must be a dict, not {type(value).__name__}")
    else:  # the session of another middleware, nearer to the application
        return
    scope["session"] = session


def _vary_by_cookie(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return a copy of a response's headers, with Cookie in Vary."""
    result = list(headers)
    for at, (name, value) in enumerate(result):
        if name.lower() == b"vary":
            if not {b"*", b"cookie"}.intersection(each.strip() for each in value.lower().split(b",")):
                result[at] = name, value + b", Cookie"
            return result
    result.append((b"vary", b"Cookie"))
    return result
