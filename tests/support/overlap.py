"""An application whose requests overlap under the control of a test, and a browser that sends them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from gunicorns import Answer, Gunicorn
from processes import wait_for

APP = """
import os, time
from pathlib import Path
from flask import Flask, flash, get_flashed_messages, request, session
from shmstore import StoreTimeout
from shmstore.flask import Sessions

app = Flask(__name__)
app.config["SESSION_STORE"] = "shm://shop"
Sessions(app)

def read(): session.get("start")
def write(): session["late"] = True
def nested(): session["cart"].append("late")
def flash_one(): flash("late")
def pop(): session.pop("start", None)
def clear(): session.clear()
def destroy(): session.destroy()
def rotate(): session.rotate()
def login(): session["_user_id"] = "ada"
def logout(): session.pop("_user_id")

@app.get("/do/<action>")
def do(action):
    globals()[action]()
    return {}

@app.get("/slow/<name>/<action>")
def slow(name, action):
    "Look at the session, and go on when the test says so."
    before = dict(session)
    Path(f"{name} looked").touch()
    while not Path(f"{name} go").exists():
        time.sleep(0.002)
    globals()[action]()
    return before

@app.get("/put/<key>/<int:value>")
def put(key, value):
    session[key] = value
    return {}

@app.get("/add/<key>/<int:value>")
def add(key, value):
    session.setdefault(key, []).append(value)
    time.sleep(0.001)  # others come and go
    return {}

@app.get("/look")
def look():
    return dict(session)

@app.get("/flash/<message>")
def flash_message(message):
    flash(message)
    time.sleep(0.001)
    return {}

@app.get("/shown")
def shown():
    return get_flashed_messages()

@app.get("/count")
def count():
    with session.lock(timeout=float(request.args.get("timeout", 60))):
        number = session.get("n", 0)
        time.sleep(0.0005)
        session["n"] = number + 1
    return {}

@app.errorhandler(StoreTimeout)
def too_long(error):
    return {}, 503

@app.get("/hold")
def hold():
    with session.lock():
        Path("holder").write_text(str(os.getpid()))
        while True:
            time.sleep(1)
"""

# Actions of a late request, after another one has ended or renamed its session.
LATE = ["read", "write", "nested", "flash_one", "pop", "clear", "destroy", "rotate", "login"]


class Browser:
    """A browser with any number of tabs: they share its cookie."""

    def __init__(self, gunicorn: Gunicorn) -> None:
        self.gunicorn = gunicorn
        self.cookie = ""

    def ask(self, path: str) -> Answer:
        answer = self.gunicorn.ask(path, self.cookie)
        for cookie in answer.cookies:
            self.cookie = cookie.partition(";")[0].removeprefix("session=")
        return answer

    def get(self, path: str) -> Any:
        answer = self.ask(path)
        assert answer.status == 200, (answer, self.gunicorn.log.read_text())
        return json.loads(answer.body)

    def tabs(self, requests: list[list[str]]) -> list[list[Any]]:
        """Send lists of requests: each list in order, all lists concurrently; return the answers."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(lambda paths: [self.get(path) for path in paths], requests))

    @contextmanager
    def slow(self, name: str, action: str) -> Iterator[Future[Answer]]:
        """Start a request that reads its session and then waits until the context ends."""
        place = self.gunicorn.place
        with ThreadPoolExecutor(1) as pool:
            try:
                answer = pool.submit(self.gunicorn.ask, f"/slow/{name}/{action}", self.cookie)
                wait_for(lambda: answer.done() or (place / f"{name} looked").exists(), "the slow request")
                yield answer
            finally:
                (place / f"{name} go").touch()
