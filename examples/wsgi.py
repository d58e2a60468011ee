"""
Sessions for any WSGI application, without a framework: the session object is the base class of Flask's.

An application finds its session in `environ["shmstore.session"]`. Changes are saved when the application has produced
the first part of its response, so that the cookie can be sent with the headers. An application that streams and changes
the session later must call `save` itself, and cannot start a session then.

`gunicorn --chdir examples wsgi:app`, then visit http://127.0.0.1:8000 a few times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from http.cookies import SimpleCookie
from typing import Any

from shmstore.attach import attach_or_start
from shmstore.contract import AnyStore
from shmstore.policy import Policy
from shmstore.session import Cookie, Session, cookie_of
from shmstore.web.cookie import values

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class SessionMiddleware:
    """
    Add a session to each request of an application.

    Args:
        app: The application.
        store: Returns the store; called when a session is first accessed.
        policy: The rules for sessions: lifetime, owner and others.
        name: The name of the cookie.
    """

    def __init__(self, app: Application, store: Callable[[], AnyStore], policy: Policy, name: str = "session") -> None:
        self.app, self.store, self.policy, self.name = app, store, policy, name

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        sids = values(environ.get("HTTP_COOKIE", ""), self.name)
        session = Session(self.store, sids, self.policy)
        environ["shmstore.session"] = session
        head: list[Any] = []
        written: list[bytes] = []
        sent = False

        def begin(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
            if sent:  # too late: the server raises the error that the application reports
                start_response(status, headers, exc_info)
            head[:] = status, headers, exc_info
            return written.append

        parts = self.app(environ, begin)
        try:
            answer = iter(parts)
            first = next(answer, b"")  # an application that is a generator calls `begin` only now
            session.save(final=True)
            status, headers, exc_info = head
            start_response(status, headers + self._headers(session), exc_info)
            sent = True
            yield b"".join(written) + first
            yield from answer
        finally:
            if hasattr(parts, "close"):
                parts.close()

    def _headers(self, session: Session) -> list[tuple[str, str]]:
        headers = [("Vary", "Cookie")] if session.accessed else []
        action, sid = cookie_of(session)
        if action is not Cookie.KEEP:
            sends = action is Cookie.SEND
            cookie = SimpleCookie({self.name: sid if sends else ""})[self.name]
            cookie.update({"path": "/", "httponly": "yes", "samesite": "Lax"})
            if not sends or session.permanent:
                cookie["max-age"] = f"{self.policy.ttl if sends else 0:.0f}"
            headers.append(("Set-Cookie", cookie.OutputString()))
        return headers


def count(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Count the visits of a visitor."""
    session = environ["shmstore.session"]
    session["visits"] = session.get("visits", 0) + 1
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"Visit %d\n" % session["visits"]]


app = SessionMiddleware(count, lambda: attach_or_start("demo"), Policy(ttl=3600))
