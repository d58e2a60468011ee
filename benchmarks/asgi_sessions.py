"""What a session costs a request under Uvicorn, beside others: `python -m benchmarks --only asgi`.

The application is Starlette's, with one worker for each middleware; the CPU time of the worker beyond that of a worker
without any. Redis' own time and the waiting for it are not counted. The session has 750 bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path
from socket import AF_UNIX, socket

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from benchmarks import peers
from benchmarks.figures import Plan, Results
from benchmarks.operations import session_of
from shmstore import StoreManager

REQUESTS = 300  # of one action and middleware in a round

NONE = "none"
KINDS = {
    "signed": "Starlette's signed cookie",
    "starsessions": "starsessions (Redis)",
    "shmstore": "shmstore",
    "shmstore-redis": "shmstore (Redis)",
}
ACTIONS = ("read", "write", "login")


async def idle(request: Request) -> PlainTextResponse:
    """Do not use the session."""
    return PlainTextResponse("hello")


async def login(request: Request) -> PlainTextResponse:
    request.session.update(session_of(750))
    return PlainTextResponse("hello")


async def read(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(request.session["language"]))


async def write(request: Request) -> PlainTextResponse:
    request.session["last_seen"] += 1
    return PlainTextResponse("hello")


async def cpu(request: Request) -> PlainTextResponse:
    """Return the seconds of CPU that this process has used."""
    return PlainTextResponse(str(time.process_time()))


def middlewares(kind: str) -> list[Middleware]:
    """Return the middlewares that a kind of session needs."""
    url = os.environ["REDIS"]
    if kind == NONE:
        return []
    if kind == "signed":
        from starlette.middleware.sessions import SessionMiddleware as Signed

        return [Middleware(Signed, secret_key="not a secret")]
    if kind == "starsessions":
        from redis.asyncio import Redis
        from starsessions import SessionAutoloadMiddleware
        from starsessions import SessionMiddleware as Starsessions
        from starsessions.stores.redis import RedisStore

        store = RedisStore(connection=Redis.from_url(url))
        return [
            Middleware(Starsessions, store=store, cookie_https_only=False, lifetime=3600),
            Middleware(SessionAutoloadMiddleware),
        ]
    from shmstore.asgi import SessionMiddleware

    return [Middleware(SessionMiddleware, store=os.environ["STORE"] if kind == "shmstore" else url)]


def app() -> Starlette:
    """Return the application of the kind that the environment names."""
    return Starlette(
        routes=[Route(f"/{view.__name__}", view) for view in (idle, login, read, write, cpu)],
        middleware=middlewares(os.environ["KIND"]),
    )


class Visitor:
    """Visits a Uvicorn of its own, over one connection, with a cookie."""

    def __init__(self, kind: str, place: Path, stack: ExitStack, **environment: str) -> None:
        self._path, self._cookie = str(place / f"{kind}.sock"), ""
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "--factory", "--no-access-log", "--log-level", "warning",
             "--timeout-keep-alive", "600", "--uds",
             self._path, "benchmarks.asgi_sessions:app"],
            env=os.environ | environment | {"KIND": kind},
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.terminate)
        while True:
            assert process.poll() is None, f"{kind}: Uvicorn has ended"
            with suppress(OSError):
                self._connection = HTTPConnection("localhost")
                self._connection.sock = socket(AF_UNIX)
                self._connection.sock.connect(self._path)
                break
            time.sleep(0.05)
        if kind != NONE:
            self.get("login")

    def get(self, action: str) -> str:
        headers = {"Cookie": self._cookie} if self._cookie and action != "login" else {}
        self._connection.request("GET", f"/{action}", headers=headers)
        response = self._connection.getresponse()
        text = response.read().decode()
        assert response.status == 200, text
        if sent := response.headers.get("Set-Cookie"):
            self._cookie = sent.partition(";")[0]
        return text

    def measure(self, action: str) -> float:
        """Return the microseconds of CPU of a request."""
        begun = float(self.get("cpu"))
        for _ in range(REQUESTS):
            self.get(action)
        return (float(self.get("cpu")) - begun) / REQUESTS * 1e6


def run(plan: Plan) -> Results:
    """Measure all kinds, in turns within each round; return the fastest rounds in microseconds."""
    peers.needs("starsessions", "uvicorn")
    taken: dict[tuple[str, str], list[float]] = {}
    with (
        peers.workplace() as place,
        peers.redis_server(place) as redis,
        StoreManager("bench", directory=place, persist=False),
        ExitStack() as stack,
    ):
        places = {"REDIS": f"unix://{redis.address}", "STORE": f"shm://{place}/bench"}
        visitors = {kind: Visitor(kind, place, stack, **places) for kind in (NONE, *KINDS)}
        for _ in range(2 * plan.rounds):
            for kind, visitor in visitors.items():
                for action in ACTIONS if kind != NONE else ("idle",):
                    taken.setdefault((kind, action), []).append(visitor.measure(action))
    base = min(taken[NONE, "idle"])
    costs = {kind: {action: min(taken[kind, action]) - base for action in ACTIONS} for kind in KINDS}
    return {"base": base, "costs": costs}
