"""Shared by the Flask tests: an application whose view is passed with the request, and browsers that visit it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import flask
from flask import Flask, Response, request
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from shmstore import RedisStore, Store
from shmstore.flask import StoreSessionInterface
from shmstore.flask.session import StoreSession

HOUR = 3600

session = cast(StoreSession, flask.session)  # Flask's types know only what all sessions have in common


class Clock:
    """A clock that advances only when it is set."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += int(seconds * 10**9)


def make_app(store: Store | RedisStore, **config: Any) -> Flask:
    app = Flask(__name__)
    app.config.update(TESTING=True, PERMANENT_SESSION_LIFETIME=HOUR, **config)
    app.session_interface = StoreSessionInterface(store)

    @app.get("/")
    def act() -> Any:
        answer = request.environ["test.action"]()
        return "" if answer is None else answer

    return app


def visit(client: FlaskClient, action: Callable[[], Any], **headers: str) -> TestResponse:
    """Make a request whose view is `action`; underscores stand for the hyphens of a header's name."""
    return client.get("/", environ_overrides={"test.action": action}, headers=headers)


def put(**values: Any) -> Callable[[], None]:
    """A view that writes into the session."""
    return lambda: session.update(values)


def look() -> dict[str, Any]:
    """A view that reads the session."""
    return {key: str(value) for key, value in session.items()}


def cookies(response: TestResponse | Response) -> list[str]:
    return response.headers.getlist("Set-Cookie")


def sid_of(client: FlaskClient) -> str:
    cookie = client.get_cookie("session")
    assert cookie is not None
    return cookie.value


def twin(client: FlaskClient) -> FlaskClient:
    """A second tab of the same browser for the server; cookies that it gets are not shared."""
    other = client.application.test_client()
    other.set_cookie("session", sid_of(client))
    return other


def meanwhile(work: Callable[[], Any]) -> Any:
    """Run other requests to their end in another thread, while the view that calls this waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
