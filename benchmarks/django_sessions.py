"""What a Django session costs a request, beside Django's own engines: `python -m benchmarks --only django`.

In one process, through Django's session middleware, without a server: the CPU time of a request beyond that of one
which does not use its session. Redis' own time and the waiting for it are not counted. The session has 750 bytes; the
database is SQLite in a file on tmpfs, the cache is Redis over a unix socket. A login is what
`django.contrib.auth.login` does to a session: `cycle_key`, then three keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import django
from django.conf import settings

from benchmarks import peers
from benchmarks.figures import Plan, Results
from shmstore import StoreManager

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


def run(plan: Plan) -> Results:
    """Measure the engines one after the other in each round; return the fastest round in microseconds."""
    with (
        peers.workplace() as place,
        peers.redis_server(place) as redis,
        StoreManager("bench", directory=place, persist=False),
    ):
        settings.configure(
            INSTALLED_APPS=["django.contrib.sessions"],
            SHMSTORE={"STORE": f"shm://{place}/bench"},
            CACHES={
                "default": {
                    "BACKEND": "django.core.cache.backends.redis.RedisCache",
                    "LOCATION": f"unix://{redis.address}",
                }
            },
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": f"{place}/db.sqlite3"}},
            SECRET_KEY="for benchmarks",
        )
        django.setup()
        from django.core.management import call_command
        from django.db import connections

        call_command("migrate", verbosity=0)
        took: dict[tuple[str, str], list[float]] = {}
        for _ in range(20 * plan.rounds):
            for engine in ENGINES:
                for action in ACTIONS:
                    took.setdefault((engine, action.__name__), []).append(measure(engine, action))
        connections.close_all()
    costs = {
        name: {
            each.__name__: 1e6 * (min(took[engine, each.__name__]) - min(took[engine, "idle"])) for each in ACTIONS[1:]
        }
        for engine, name in ENGINES.items()
    }
    return {"version": django.get_version(), "costs": costs}
