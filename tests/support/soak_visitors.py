"""The visitors of the soak: each knows the acknowledged state, and checks every later answer against it."""

from __future__ import annotations

import json
import random
import secrets
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any

from gunicorns import answer_over

MAX, PER_OWNER, LIFE, BRIEF = 400, 3, 120, 0.4

APP = f"""
import time, zlib
from flask import Flask, flash, get_flashed_messages, session
from shmstore import StoreTimeout, StoreUnavailable
from shmstore.flask import Sessions

app = Flask(__name__)
app.config.update(
    SESSION_STORE="shm://shop", SESSION_OWNER_KEY="user", PERMANENT_SESSION_LIFETIME={LIFE}, SESSION_TOUCH_AFTER=1
)
sessions = Sessions(app)

def seen():
    blob = session.get("blob", b"")
    return {{"user": session.get("user"), "token": session.get("token"), "n": session.get("n"), "c": session.get("c"),
             "blob": [len(blob), zlib.crc32(blob)]}}

def filler(token, n, size):
    return (f"{{token}} {{n}} " * (size // 8))[:size].encode()

@app.get("/login/<user>/<token>")
def login(user, token):
    session.update(user=user, token=token, n=0, c=0)
    return {{}}

@app.get("/look")
def look():
    return seen()

@app.get("/put/<int:n>")
def put(n):
    before = seen()
    session["n"] = n
    return before

@app.get("/big/<int:n>/<int:size>")
def big(n, size):
    before = seen()
    session.update(n=n, blob=filler(session["token"], n, size))
    return before

@app.get("/count")
def count():
    with session.lock(timeout=30):
        session["c"] += 1
        return {{"c": session["c"]}}

@app.get("/flash/<message>")
def flash_message(message):
    flash(message)
    return {{}}

@app.get("/shown")
def shown():
    return get_flashed_messages()

@app.get("/touch")
def touch():
    return {{"held": session.touch(), **seen()}}

@app.get("/rotate")
def rotate():
    session.rotate()
    return seen()

@app.get("/logout")
def logout():
    before = seen()
    session.destroy()
    return before

@app.get("/everywhere/<user>")
def everywhere(user):
    return {{"ended": sessions.store.destroy_owned(user)}}

@app.get("/visit/<token>/<int:size>")
def visit(token, size):
    session.update(token=token, n=size, blob=filler(token, size, size))
    return {{}}

@app.get("/brief/<token>")
def brief(token):
    session["token"] = token
    session.save()
    sessions.store.touch(session.sid, ttl={BRIEF})
    return {{}}

@app.get("/stale/<sid>")
def stale(sid):
    return sessions.store.get(sid) or {{}}

@app.get("/prune")
def prune():
    try:
        return {{"pruned": sessions.store.prune()}}
    except StoreUnavailable as exc:  # it is the server's work
        return {{"pruned": None}}

@app.get("/length")
def length():
    return {{"length": len(sessions.store)}}

@app.errorhandler(Exception)
def failed(error):
    return {{"error": repr(error)}}, 503
"""


def filled(token: str, n: int, size: int) -> list[int]:
    """Return the application's description of a large value."""
    blob = (f"{token} {n} " * (size // 8))[:size].encode()
    return [len(blob), zlib.crc32(blob)]


class Broken(Exception):
    """No answer, because the process was killed in the middle. The request may have been executed or not."""


class Ledger:
    """
    The results of all visitors together.

    Attributes:
        counts: Counts by kind of action or event.
        wrong: Answers that disagree with the acknowledged state.
        failed: Errors of the store, and requests without an answer.
        slowest: The longest requests: seconds, path, time.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self.slowest: list[tuple[float, str, float]] = []
        self.took: list[float] = []
        self._lock = threading.Lock()

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def answered(self, path: str, begun: float) -> None:
        now = time.monotonic()
        with self._lock:
            self.counts["requests"] += 1
            self.took.append(now - begun)
            self.slowest = sorted([*self.slowest, (now - begun, path, now)], reverse=True)[:5]


class Visitor(threading.Thread):
    """
    A browser that sends one request after another until it is stopped.

    Args:
        at: The socket of Gunicorn.
        ledger: The ledger for its results.
        seed: The seed of its random choices.
    """

    def __init__(self, name: str, at: Path, ledger: Ledger, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.ledger = ledger
        self.rnd = random.Random(f"{seed} {name}")
        self.over = threading.Event()
        self.cookie = ""
        self._at = at

    def run(self) -> None:
        while not self.over.is_set():
            try:
                self.visit()
                time.sleep(self.rnd.random() * 0.02)
            except Broken:
                pass
            except Exception as exc:
                self.ledger.failed.append(f"{self.name}: {exc!r}")
                time.sleep(1)

    def visit(self) -> None:
        raise NotImplementedError

    def ask(self, path: str, cookie: str | None = None) -> Any:
        """Return the answer, and keep its cookie unless the request was sent with a given cookie."""
        with self._connect() as sock:
            begun = time.monotonic()
            try:
                answer = answer_over(sock, path, self.cookie if cookie is None else cookie)
                # A worker that is told to abort sends an error page in HTML, even in the middle of an answer.
                found = json.loads(answer.body)
            except TimeoutError:
                self.ledger.failed.append(f"{self.name}: {path}: no answer")
                raise Broken from None
            except (HTTPException, ConnectionError, ValueError):
                self.ledger.count("broken off")
                self.over.wait(1)  # a worker that was told to abort may still finish its request
                raise Broken from None
        self.ledger.answered(path, begun)
        if answer.status != 200:
            self.ledger.failed.append(f"{self.name}: {path}: {answer}")
            raise Broken
        if cookie is None:
            for line in answer.cookies:
                self.cookie = line.partition(";")[0].removeprefix("session=")
        return found

    def _connect(self) -> socket.socket:
        """Return a connection; wait while no process listens."""
        end = time.monotonic() + 60
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(60)
            try:
                sock.connect(str(self._at))
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                sock.close()
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
            else:
                return sock

    def wrong(self, what: str) -> None:
        self.ledger.wrong.append(f"{self.name}, {self.cookie[:8]}: {what}")


class Customer(Visitor):
    """Logged in: each session is as it was acknowledged until it is logged out, and then never again."""

    def __init__(self, name: str, at: Path, ledger: Ledger, seed: int) -> None:
        super().__init__(name, at, ledger, seed)
        self.user = ""
        self.token = ""
        self.may: dict[str, list[Any]] = {}  # the possible values by key: several after a lost answer
        self.there = False  # whether the session must exist
        self.left: list[str] = []  # users who may have a session whose id is unknown
        self.ended: list[str] = []  # cookies of sessions that were logged out
        self._n = 0

    def visit(self) -> None:
        if not self.there:
            self.begin()
        if self.left:
            self.ask(f"/everywhere/{self.left[-1]}", "")
            self.left.pop()
        choices: dict[Callable[[], None], int] = {
            self.look: 30, self.put: 30, self.big: 6, self.count: 6, self.flashes: 3, self.touch: 3, self.rotate: 3,
            self.logout: 2, self.everywhere: 1, self.ghost: 10,
        }  # fmt: skip
        self.rnd.choices([*choices], [*choices.values()])[0]()

    def begin(self) -> None:
        if self.user:
            self.left.append(self.user)
        self._n += 1
        self.user, self.token, self.cookie = f"{self.name}-{self._n}", secrets.token_hex(8), ""
        self.may = {"user": [self.user], "token": [self.token], "n": [0], "c": [0], "blob": [filled("", 0, 0)]}
        self.ask(f"/login/{self.user}/{self.token}")
        self.there = True
        self.ledger.count("logins")

    def check(self, found: dict[str, Any], may: dict[str, list[Any]]) -> dict[str, Any]:
        """Record values that are wrong; return what the application reported about the session."""
        for key, allowed in may.items():
            if found[key] not in allowed:
                self.wrong(f"{key} is {found[key]!r}, and must be {' or '.join(map(repr, allowed))}")
                self.there = False
        return {key: found[key] for key in may}

    def look(self) -> None:
        found = self.check(self.ask("/look"), self.may)
        self.may = {key: [value] for key, value in found.items()}
        self.ledger.count("reads")

    def change(self, path: str, **new: Any) -> None:
        old = self.may
        self.may = {key: [*values, new[key]] if key in new else values for key, values in old.items()}
        found = self.check(self.ask(path), old)
        self.may = {key: [value] for key, value in (found | new).items()}
        self.ledger.count("changes")

    def put(self) -> None:
        self._n += 1
        self.change(f"/put/{self._n}", n=self._n)

    def big(self) -> None:
        self._n += 1
        size = self.rnd.choice([10, 1000, 20_000, 60_000])
        self.change(f"/big/{self._n}/{size}", n=self._n, blob=filled(self.token, self._n, size))

    def count(self) -> None:
        """Count in two concurrent requests, which take the lock in turn."""
        self.look()
        before = self.may["c"][0]
        self.may["c"] = [before, before + 1, before + 2]
        with ThreadPoolExecutor(2) as pool:
            counts = [answer.result()["c"] for answer in [pool.submit(self.ask, "/count") for _ in range(2)]]
        if sorted(counts) != [before + 1, before + 2]:
            self.wrong(f"two counts of {before} are {counts}")
        self.may["c"] = [before + 2]
        self.ledger.count("changes", 2)

    def flashes(self) -> None:
        self.ask("/shown")
        messages = [secrets.token_hex(4) for _ in range(self.rnd.randint(1, 3))]
        for message in messages:
            self.ask(f"/flash/{message}")
        shown = self.ask("/shown")
        if shown != messages:
            self.wrong(f"the messages {messages} are shown as {shown}")
        self.ledger.count("messages", len(messages))

    def touch(self) -> None:
        answer = self.ask("/touch")
        if not answer["held"]:
            self.wrong("there is nothing to touch")
        self.check(answer, self.may)

    def rotate(self) -> None:
        self.there, old = False, self.cookie  # without an answer the new id is unknown
        found = self.ask("/rotate")
        self.there = True
        self.check(found, self.may)
        self.ended.append(old)
        if self.cookie == old:
            self.wrong("the id is the same")
        self.ledger.count("rotations")

    def logout(self) -> None:
        self.there, old = False, self.cookie  # the answer deletes the cookie
        self.check(self.ask("/logout"), self.may)
        self.ended.append(old)
        self.ledger.count("logouts")
        self.ghost()

    def everywhere(self) -> None:
        """Log in a second time, then log out everywhere."""
        first, self.there = self.cookie, False
        token = secrets.token_hex(8)
        self.cookie = ""
        self.ask(f"/login/{self.user}/{token}")
        if self.ask("/look")["token"] != token or self.ask("/look", first)["token"] != self.token:
            self.wrong("one of two sessions of a user is not there")
        ended = self.ask(f"/everywhere/{self.user}")["ended"]
        if ended != 2:
            self.wrong(f"{ended} of two sessions of a user were ended")
        self.ended += [first, self.cookie]
        self.ledger.count("logouts", 2)
        self.ghost()

    def ghost(self) -> None:
        """Try the cookie of a session that has ended."""
        self.ended = self.ended[-50:]
        if self.ended:
            cookie = self.rnd.choice([self.ended[-1], self.rnd.choice(self.ended)])
            found = self.ask("/look", cookie)
            if found["user"] or found["token"]:
                self.wrong(f"the session {cookie[:8]} that was ended is {found}")
            self.ledger.count("ghosts")


class Crowd(Visitor):
    """Users who exceed the limit of logins: the latest sessions of each exist, the earlier ones do not."""

    def visit(self) -> None:
        user = f"{self.name}-{secrets.token_hex(4)}"
        tokens = {}
        for _ in range(PER_OWNER + 2):
            token, self.cookie = secrets.token_hex(8), ""
            self.ask(f"/login/{user}/{token}")
            tokens[self.cookie] = token
        found = [self.ask("/look", cookie)["token"] for cookie in tokens]
        if found != [None, None, *[*tokens.values()][2:]]:
            self.wrong(f"{found} are there of {[*tokens.values()]}")
        ended = self.ask(f"/everywhere/{user}")["ended"]
        if ended != PER_OWNER:
            self.wrong(f"{ended} of {PER_OWNER} were ended")
        self.ledger.count("logins", len(tokens))


class Strangers(Visitor):
    """More visitors without a login than there is room for: their sessions may be evicted, but never mixed up."""

    def __init__(self, name: str, at: Path, ledger: Ledger, seed: int) -> None:
        super().__init__(name, at, ledger, seed)
        self._known: list[tuple[str, str, int]] = []

    def visit(self) -> None:
        self.rnd.choices([self.come, self.again, self.brief, self.prune], [20, 10, 1, 1])[0]()

    def come(self) -> None:
        token, size, self.cookie = secrets.token_hex(8), self.rnd.choice([0, 100, 2000, 50_000]), ""
        self.ask(f"/visit/{token}/{size}")
        self._known = [*self._known[-500:], (self.cookie, token, size)]
        self.ledger.count("visits")

    def again(self) -> None:
        if self._known:
            cookie, token, size = self.rnd.choice(self._known)
            found = self.ask("/look", cookie)
            if found["token"] is None:
                self.ledger.count("evicted")
            elif (found["token"], found["n"], found["blob"]) != (token, size, filled(token, size, size)):
                self.wrong(f"{found} for {token}, {size}")

    def brief(self) -> None:
        """A session that expires: it is absent, except that a request for stale ones gets it at most once."""
        token, self.cookie = secrets.token_hex(8), ""
        self.ask(f"/brief/{token}")
        time.sleep(BRIEF + 0.1)
        if (found := self.ask("/look", self.cookie))["token"] is not None:
            self.wrong(f"{found} has expired")
        stale = [answer["token"] for _ in range(2) if (answer := self.ask(f"/stale/{self.cookie}", ""))]
        if stale not in ([], [token]):
            self.wrong(f"{stale} for what has expired of {token}")
        self.ledger.count("expired")

    def prune(self) -> None:
        if self.ask("/prune", "")["pruned"] is None:
            self.ledger.count("not pruned")
        if (length := self.ask("/length", "")["length"]) > MAX:
            self.wrong(f"{length} sessions, {MAX} are allowed")
