"""What a Django session costs a request, beside Django's own engines: `python -m benchmarks.django_sessions [ROUNDS]`.

In one process, through Django's session middleware, without a server: the CPU time of a request beyond that of one
which does not use its session. Redis' own time and the waiting for it are not counted. The session has 750 bytes; the
database is SQLite in a file on tmpfs, the cache is Redis over a unix socket. A login is what
`django.contrib.auth.login` does to a session: `cycle_key`, then three keys.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django
from django.conf import settings

from benchmarks import peers
from shmstore import StoreManager

ROUNDS = 100
REQUESTS = 20  # of one action and engine in a round

OURS = "shmstore.django"
ENGINES = {
    OURS: "shmstore",
    "django.contrib.sessions.backends.cache": "cache (Redis)",
    "django.contrib.sessions.backends.cached_db": "cached_db (Redis, SQLite)",
    "django.contrib.sessions.backends.db": "db (SQLite)",
    "django.contrib.sessions.backends.signed_cookies": "signed_cookies",
}
DATA = {"cart": [{"item": f"book {number}", "price": 100 + number} for number in range(16)], "name": "Ada" * 20}


def idle(session: Any) -> None:
    """Do not use the session."""


def read(session: Any) -> None:
    session["cart"]


def write(session: Any) -> None:
    session["visits"] = session.get("visits", 0) + 1


def login(session: Any) -> None:
    session.cycle_key()
    session.update({"_auth_user_id": "1", "_auth_user_backend": "b" * 40, "_auth_user_hash": "h" * 64})


ACTIONS: tuple[Callable[[Any], None], ...] = (idle, read, write, login)


def measure(engine: str, action: Callable[[Any], None]) -> float:
    """Return the seconds of a request."""
    from django.contrib.sessions.middleware import SessionMiddleware
    from django.http import HttpRequest, HttpResponse
    from django.test import override_settings

    def view(request: HttpRequest) -> HttpResponse:
        action(request.session)
        return HttpResponse()

    with override_settings(SESSION_ENGINE=engine):
        middleware = SessionMiddleware(view)
        session = middleware.SessionStore()
        session.update(DATA)
        session.save()
        key, took = session.session_key, 0.0
        for _ in range(REQUESTS):
            request = HttpRequest()
            request.COOKIES[settings.SESSION_COOKIE_NAME] = key
            begun = time.process_time()
            response = middleware(request)
            took += time.process_time() - begun
            if settings.SESSION_COOKIE_NAME in response.cookies:
                key = response.cookies[settings.SESSION_COOKIE_NAME].value
        middleware.SessionStore(key).delete()
    return took / REQUESTS


def main(rounds: int) -> None:
    """Measure all of it, the engines one after the other in each round; print the fastest round in microseconds."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="shmstore-bench-") as directory,
        peers.redis_server(Path(directory)) as redis,
        StoreManager("bench", directory=directory),
    ):
        settings.configure(
            INSTALLED_APPS=["django.contrib.sessions"],
            SHMSTORE={"STORE": f"shm://{directory}/bench"},
            CACHES={
                "default": {
                    "BACKEND": "django.core.cache.backends.redis.RedisCache",
                    "LOCATION": f"unix://{redis.address}",
                }
            },
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{directory}/db.sqlite3"}},
            SECRET_KEY="for benchmarks",
        )
        django.setup()
        from django.core.management import call_command
        from django.db import connections

        call_command("migrate", verbosity=0)
        took: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds):
            for engine in ENGINES:
                for action in ACTIONS:
                    took.setdefault((engine, action.__name__), []).append(measure(engine, action))
        connections.close_all()
    print(f"Django {django.get_version()}, microseconds of CPU time: read, write, login")
    for engine, name in ENGINES.items():
        costs = [1e6 * (min(took[engine, each]) - min(took[engine, "idle"])) for each in ("read", "write", "login")]
        print(f"{name:28}", *(f"{cost:8.0f}" for cost in costs))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
