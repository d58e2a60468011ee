"""Small session interfaces for peers without one: one read of the store, and one write of what changed."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Any

import msgspec
from flask import Flask, Request, Response
from flask.sessions import SessionInterface, SessionMixin
from werkzeug.datastructures import CallbackDict

DAY = 86400

_decode = msgspec.msgpack.Decoder(dict[str, Any]).decode


class Session(CallbackDict[str, Any], SessionMixin):
    """A dict with its id and whether it was changed."""

    def __init__(self, initial: dict[str, Any] | None, sid: str) -> None:
        def changed(session: CallbackDict[str, Any]) -> None:
            session.modified = True  # type: ignore[attr-defined]

        super().__init__(initial, changed)
        self.new = initial is None
        self.sid = sid
        self.modified = False


class ByKey(SessionInterface):
    """
    Sessions in any object with `get` and `set`.

    An unchanged session is not written, which favours the peer: Flask-Session by default writes at each request.
    """

    def __init__(
        self, get: Callable[[str], dict[str, Any] | None], put: Callable[[str, dict[str, Any]], object]
    ) -> None:
        self._get = get
        self._put = put

    def open_session(self, app: Flask, request: Request) -> Session:
        sid = request.cookies.get("session")
        stored: dict[str, Any] | None = self._get(sid) if sid else None
        return Session(None, secrets.token_urlsafe(32)) if stored is None or not sid else Session(stored, sid)

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        assert isinstance(session, Session)
        response.headers["Vary"] = "Cookie"
        if session.modified:
            self._put(session.sid, dict(session))
            if session.new:
                response.set_cookie("session", session.sid, httponly=True)


def stock_proxy(address: str) -> ByKey:
    """Sessions in a stock manager's dict."""
    from benchmarks import stock

    local = threading.local()

    def table() -> Any:
        if not hasattr(local, "table"):
            local.table = stock.connect(address)
        return local.table

    return ByKey(lambda sid: table().get(sid), lambda sid, session: table().set(sid, session, DAY))


def stash() -> ByKey:
    """Sessions in Gunicorn's own table for workers: no deadlines, no limit."""
    from gunicorn.dirty import stash

    return ByKey(lambda sid: stash.get("sessions", sid), lambda sid, session: stash.put("sessions", sid, session))


def uwsgi_cache() -> ByKey:
    """Sessions in uWSGI's cache, as bytes by msgspec."""
    import uwsgi

    def get(sid: str) -> dict[str, Any] | None:
        body = uwsgi.cache_get(sid, "sessions")
        return None if body is None else _decode(body)

    def put(sid: str, session: dict[str, Any]) -> object:
        return uwsgi.cache_update(sid, msgspec.msgpack.encode(session), DAY, "sessions")

    return ByKey(get, put)
