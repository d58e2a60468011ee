"""What tests of the ASGI side share: an application whose views the test brings along, and browsers that visit it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from http.cookies import SimpleCookie
from typing import Any, NamedTuple

from shmstore.asgi import SessionMiddleware
from shmstore.asgi.session import ScopeSession

HOUR = 3600

View = Callable[[ScopeSession], Any]


class Answer(NamedTuple):
    """What a test looks at in a response."""

    headers: list[tuple[str, str]]
    body: Any

    def all(self, name: str) -> list[str]:
        return [value for each, value in self.headers if each.lower() == name]

    @property
    def cookies(self) -> list[str]:
        return self.all("set-cookie")

    @property
    def vary(self) -> str:
        return ", ".join(self.all("vary"))


async def called(view: View | None, session: ScopeSession) -> Any:
    answer = view(session) if view is not None else None
    return await answer if isinstance(answer, Awaitable) else answer


async def respond(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """An application: call the view, answer with what it returns, call what the test brings for later."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await called(scope["view"], scope["session"])
        return
    body = await called(scope.get("view"), scope["session"])
    headers = scope.get("answer_headers", [])
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await called(scope.get("after"), scope["session"])
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def make_app(store: Any, **options: Any) -> SessionMiddleware:
    return SessionMiddleware(respond, store, **{"ttl": HOUR, **options})


async def no_message() -> dict[str, Any]:
    raise AssertionError("the application needs no message")


class Browser:
    """A browser with one cookie. A tab of it is another that has the same cookie, and receives its own."""

    def __init__(self, app: SessionMiddleware, cookie: str = "") -> None:
        self.app, self.cookie = app, cookie

    def tab(self) -> Browser:
        return Browser(self.app, self.cookie)

    async def get(
        self,
        view: View | None = None,
        *,
        after: View | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
        answer_headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> Answer:
        """Make a request whose view is `view`; ``after`` is called when the response has started."""
        sent = [*headers, *([(b"cookie", f"session={self.cookie}".encode())] if self.cookie else [])]
        messages: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)

        scope = {
            "type": "http", "method": "GET", "path": "/", "headers": sent, "view": view, "after": after,
            "answer_headers": list(answer_headers),
        }  # fmt: skip
        await self.app(scope, no_message, send)
        start = next(each for each in messages if each["type"] == "http.response.start")
        answer = Answer(
            [(name.decode(), value.decode()) for name, value in start.get("headers", ())],
            json.loads(b"".join(each.get("body", b"") for each in messages) or b"null"),
        )
        for header in answer.cookies:
            cookie = SimpleCookie(header)["session"]
            self.cookie = "" if cookie["max-age"] == "0" else cookie.value
        return answer

    async def socket(self, view: View) -> None:
        """Open a WebSocket that does what `view` does."""

        async def send(message: dict[str, Any]) -> None:
            assert not message.get("headers"), "no cookie is set"

        cookie = [(b"cookie", f"session={self.cookie}".encode())] if self.cookie else []
        scope = {"type": "websocket", "path": "/", "headers": cookie, "view": view}
        await self.app(scope, no_message, send)


def put(**values: Any) -> View:
    """A view that writes into the session."""
    return lambda session: session.update(values)


def look(session: ScopeSession) -> dict[str, Any]:
    """A view that reads the session."""
    return dict(session)
