"""
The least that a session can cost in Python: `python -m benchmarks.floor`, about a minute. Microseconds of CPU.

First the parts that an operation is made of, each in a loop. Then the barest Flask interface there can be, which loads
and decodes before the view, encodes and compares after it, beside shmstore's: the difference is what a session does
beyond storing (it is lazy, has owners, ages and limits, merges, rotates its id, may be shared by threads).
"""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Callable

import msgspec
from flask import Flask, Request, Response
from flask.sessions import SessionInterface, SessionMixin
from msgspec import Raw

from benchmarks.requests import ROUNDS, SESSION, Browser, make_app, measure
from shmstore import StoreManager, StoreProxy
from shmstore.codec.body import pack
from shmstore.codec.ids import require_key
from shmstore.contract import Loaded
from shmstore.engine.frame import seal
from shmstore.engine.header import NEVER, TICK
from shmstore.flask import StoreSessionInterface

SID = "0" * 43


def parts(store: StoreProxy, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the cost of each part of an operation on 750 bytes, alone in a loop."""
    arena, codec = store.arena, store.codec
    store.set(SID, SESSION, math.inf)
    key, payload = require_key(SID), codec.encode(SESSION)
    body = pack(SID, None, codec.name, payload)
    record, slot = seal(key, 0, 0, body), arena.find(key)

    def lock() -> None:
        try:
            arena.lock(1)
        finally:
            arena.unlock()

    work: dict[str, Callable[[], object]] = {
        "digest of an id": lambda: require_key(SID),
        "find, copy and check a record": lambda: arena.reader.read(key, 1),
        "decode": lambda: codec.decode(payload),
        "count a hit": arena.counters.hit,
        "get": lambda: store.get(SID),
        "encode": lambda: codec.encode(SESSION),
        "encode by msgspec alone, which loses types": lambda: msgspec.msgpack.encode(SESSION),
        "pack and seal": lambda: seal(key, 0, 0, pack(SID, None, codec.name, payload)),
        "take and free the lock": lock,
        "plan, journal and apply": lambda: arena.publish(slot, key, record, 0, NEVER, arena.cells[TICK]),
        "set": lambda: store.set(SID, SESSION, math.inf),
    }
    return {name: least for name, (_, least, _) in measure(work, rounds).items()}


class _None(SessionInterface):
    """No session at all."""

    def open_session(self, app: Flask, request: Request) -> None:
        return None

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        pass


class _Bare(dict[str, object], SessionMixin):
    sid = ""
    loaded: Loaded | None = None


class _BareInterface(SessionInterface):
    """Loads before each view, and encodes after it: a session that is new or has changed is stored as a whole."""

    def __init__(self, store: StoreProxy) -> None:
        self._store = store

    def open_session(self, app: Flask, request: Request) -> _Bare:
        sid = request.environ.get("HTTP_COOKIE", "").partition("=")[2]
        loaded = self._store.load(sid) if sid else None
        session = _Bare(self._store.codec.decode(loaded.payload) if loaded else {})
        session.sid, session.loaded = sid, loaded
        return session

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        assert isinstance(session, _Bare)
        response.headers.add("Vary", "Cookie")
        payload = self._store.codec.encode(dict(session))
        if session.loaded is None:
            sid = secrets.token_urlsafe(32)
            response.headers.add("Set-Cookie", f"session={sid}; Path=/; HttpOnly")
            self._store.add(sid, Raw(payload), 3600)
        elif payload != session.loaded.payload:
            self._store.swap(session.sid, session.loaded, payload, 3600)


def requests(store: StoreProxy, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Return the cost of requests beyond those of an application without sessions."""
    kinds = ("read", "write", "login")
    interfaces = {"barest": _BareInterface(store), "shmstore": StoreSessionInterface(store), "signed cookie": None}
    none = make_app()
    none.session_interface = _None()
    nobody = Browser(none)
    work: dict[str, Callable[[], object]] = {"none": lambda: nobody.get("/unused")}
    for name, interface in interfaces.items():
        app = make_app()
        if interface is not None:
            app.session_interface = interface
        browser = Browser(app)
        browser.get("/login")
        for kind in kinds:
            work[f"{kind}, {name}"] = lambda browser=browser, kind=kind: browser.get(  # type: ignore[misc]
                f"/{kind}", cookie=kind != "login"
            )
    medians = {name: median for name, (median, _, _) in measure(work, rounds).items()}
    return {name: {kind: medians[f"{kind}, {name}"] - medians["none"] for kind in kinds} for name in interfaces}


def main(rounds: int = ROUNDS) -> None:
    """Print both."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as directory,
        StoreManager("benchmark", directory=directory, persist=False) as manager,
        manager.store() as store,
    ):
        for name, taken in parts(store, rounds).items():
            print(f"{name:44}{taken:6.1f}")
        print(f"\n{'beyond no session at all':24}{'read':>8}{'write':>8}{'login':>8}")
        for name, costs in requests(store, rounds).items():
            print(f"{name:24}" + "".join(f"{cost:>8.0f}" for cost in costs.values()))


if __name__ == "__main__":
    main()
