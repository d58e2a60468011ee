"""The application under load: the same for all kinds of sessions."""

from __future__ import annotations

from typing import Any

from flask import Flask, request, session

from benchmarks import backends
from benchmarks.figures import sample

NONE, COOKIE, OURS, STASH, STOCK = "no session", "signed cookie", "shmstore", "stash", "stock manager proxy"
REDIS_STORE = "shmstore, RedisStore"
REDIS, MEMCACHED, FILES = "Flask-Session, Redis", "Flask-Session, memcached", "Flask-Session, files"
UWSGI = "uWSGI cache"
UNDER_GUNICORN = (NONE, COOKIE, OURS, REDIS_STORE, REDIS, MEMCACHED, FILES, STASH, STOCK)
UNDER_UWSGI = (NONE, COOKIE, OURS, UWSGI)

_samples: dict[int, dict[str, Any]] = {}


def filler(size: int) -> dict[str, Any]:
    """Return a session of that size, cached: creating it is not measured."""
    if size not in _samples:
        _samples[size] = sample(size)
    return _samples[size]


def make_app(kind: str, place: str) -> Flask:
    """
    Return the application.

    Each route answers with whose session it has seen, which the caller compares. Without sessions it is the same
    routes with the number from the address.
    """
    app = Flask(__name__)
    configure(app, kind, place)

    if kind == NONE:

        @app.get("/read")
        @app.get("/write")
        @app.get("/login")
        def plain() -> str:
            return f"{request.args['who']} -"

        return app

    @app.get("/read")
    def read() -> str:
        return f"{session['who']} {request.args['who']}"

    @app.get("/write")
    def write() -> str:
        session["count"] += 1
        return f"{session['who']} {session['count']} {request.args['who']}"

    @app.get("/login")
    def login() -> str:
        who = int(request.args["who"])
        session.update(filler(int(request.args["size"])))
        session["who"], session["count"] = who, 0
        return f"{who}"

    @app.get("/fill")
    def fill() -> list[str]:
        """Log in many visitors, and return their cookies."""
        first, count = int(request.args["first"]), int(request.args["count"])
        cookies = []
        for who in range(first, first + count):
            answer = app.test_client(use_cookies=False).get(f"/login?who={who}&size={request.args['size']}")
            assert answer.status_code == 200
            cookies.append(answer.headers["Set-Cookie"].partition(";")[0])
        return cookies

    return app


def configure(app: Flask, kind: str, place: str) -> None:
    """Give an application its kind of sessions, each configured as its documentation says, else by its defaults."""
    if kind == COOKIE:
        app.secret_key = "benchmark"
    elif kind in (OURS, REDIS_STORE):
        from shmstore.flask import Sessions

        app.config["SESSION_STORE"] = place
        Sessions(app)
    elif kind == STASH:
        app.session_interface = backends.stash()
    elif kind == STOCK:
        app.session_interface = backends.stock_proxy(place)
    elif kind == UWSGI:
        app.session_interface = backends.uwsgi_cache()
    elif kind != NONE:
        flask_session(app, kind, place)


def flask_session(app: Flask, kind: str, place: str) -> None:
    from flask_session import Session

    if kind == REDIS:
        import redis

        app.config.update(SESSION_TYPE="redis", SESSION_REDIS=redis.Redis(unix_socket_path=place))
    elif kind == MEMCACHED:
        from pylibmc import Client, ThreadMappedPool

        pool = ThreadMappedPool(Client([place], binary=False))  # a client is not thread-safe

        class Pooled:
            def get(self, key: str) -> Any:
                with pool.reserve() as client:
                    return client.get(key)

            def set(self, key: str, value: Any, timeout: int) -> bool:
                with pool.reserve() as client:
                    return bool(client.set(key, value, timeout))

            def delete(self, key: str) -> bool:
                with pool.reserve() as client:
                    return bool(client.delete(key))

        app.config.update(SESSION_TYPE="memcached", SESSION_MEMCACHED=Pooled())
    else:
        from cachelib.file import FileSystemCache

        # By default it deletes files beyond 500.
        app.config.update(SESSION_TYPE="cachelib", SESSION_CACHELIB=FileSystemCache(place, threshold=1_000_000))
    Session(app)
