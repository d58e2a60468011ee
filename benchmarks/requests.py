"""The cost of a session in a Flask request: `python -m benchmarks.requests`, about a minute. Microseconds of CPU.

The applications are called in this process (no network, no Gunicorn), in turns within each round; medians. The store is
a shared one with a server, used in place, as in a worker of Gunicorn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec
from flask import Flask, session
from flask.json.tag import TaggedJSONSerializer
from werkzeug.test import EnvironBuilder

from benchmarks.operations import session_of
from benchmarks.peers import workplace
from shmstore import StoreManager, StoreProxy
from shmstore.codec.body import Codec
from shmstore.flask import StoreSessionInterface

ROUNDS = 15
CALLS = 400
SESSION = session_of(750)


def make_app() -> Flask:
    app = Flask(__name__)
    app.secret_key = "not a secret"

    @app.get("/unused")
    def unused() -> str:
        return "hello"

    @app.get("/login")
    def login() -> str:
        session.update(SESSION)
        return "hello"

    @app.get("/read")
    def read() -> str:
        return str(session["language"])

    @app.get("/write")
    def write() -> str:
        session["last_seen"] += 1
        return "hello"

    return app


class Browser:
    """Calls an application as a server would; keeps its cookie."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._cookie = ""

    def get(self, path: str, *, cookie: bool = True) -> None:
        environ = EnvironBuilder(path).get_environ()
        if cookie and self._cookie:
            environ["HTTP_COOKIE"] = self._cookie
        for chunk in self._app.wsgi_app(environ, self._start):
            assert chunk

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        assert status == "200 OK", status
        for name, value in headers:
            if name == "Set-Cookie":
                self._cookie = value.partition(";")[0]
        return lambda _: None


def measure(work: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, tuple[float, float, float]]:
    """Return the median, least and most microseconds of CPU of each call."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            begin = time.process_time()
            for _ in range(CALLS):
                call()
            taken[name].append((time.process_time() - begin) / CALLS * 1e6)
    return {name: (statistics.median(times), min(times), max(times)) for name, times in taken.items()}


def costs(store: StoreProxy, rounds: int = ROUNDS) -> dict[str, tuple[float, float, float]]:
    """Return the cost of requests without a session, with Flask's signed cookie and with shmstore."""
    ours = make_app()
    ours.session_interface = StoreSessionInterface(store)
    browsers = {"signed cookie": Browser(make_app()), "shmstore": Browser(ours)}
    for browser in browsers.values():
        browser.get("/login")
    work: dict[str, Callable[[], object]] = {"none": lambda: Browser(plain).get("/unused")}
    plain = make_app()
    for name, browser in browsers.items():
        work |= {
            f"unused, {name}": lambda browser=browser: browser.get("/unused"),  # type: ignore[misc]
            f"read, {name}": lambda browser=browser: browser.get("/read"),  # type: ignore[misc]
            f"write, {name}": lambda browser=browser: browser.get("/write"),  # type: ignore[misc]
            f"login, {name}": lambda browser=browser: browser.get("/login", cookie=False),  # type: ignore[misc]
        }
    return measure(work, rounds)


def in_process(rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return these costs with a store of their own."""
    with workplace() as place, StoreManager("benchmark", directory=place, persist=False) as manager:
        return costs(manager.store(), rounds)


def requests(store: StoreProxy) -> None:
    """Print these costs."""
    result = costs(store)
    base = result["none"][0]
    print(f"a request without a cookie that never looks at its session: {base:.0f} us")
    print(f"\n{'beyond that, us':24}{'signed cookie':>22}{'shmstore':>22}{'ratio':>8}")
    for kind in ("unused", "read", "write", "login"):
        pair = [[value - base for value in result[f"{kind}, {name}"]] for name in ("signed cookie", "shmstore")]
        cells = "".join(f"{f'{m:.1f} ({low:.1f} - {high:.1f})':>22}" for m, low, high in pair)
        print(f"{kind:24}{cells}{pair[0][0] / pair[1][0]:>8.1f}")


def serializers() -> None:
    """Print the cost of encoding and decoding a session."""
    codec, tagged = Codec(), TaggedJSONSerializer()
    packed, text, bare = codec.encode(SESSION), tagged.dumps(SESSION), msgspec.msgpack.encode(SESSION)
    result = measure(
        {
            "ours, encode": lambda: codec.encode(SESSION),
            "ours, decode": lambda: codec.decode(packed),
            "TaggedJSONSerializer, encode": lambda: tagged.dumps(SESSION),
            "TaggedJSONSerializer, decode": lambda: tagged.loads(text),
            "msgspec alone (loses types), encode": lambda: msgspec.msgpack.encode(SESSION),
            "msgspec alone (loses types), decode": lambda: msgspec.msgpack.decode(bare),
        }
    )
    print(f"\na session of {len(packed)} bytes, us")
    for name, (median, low, high) in result.items():
        print(f"{name:40}{median:6.1f} ({low:.1f} - {high:.1f})")


if __name__ == "__main__":
    with workplace() as place, StoreManager("benchmark", directory=place, persist=False) as manager:
        requests(manager.store())
    serializers()
