"""What the admin page costs: `python benchmarks/admin_page.py`, half a minute.

One Gunicorn worker, with 100 000 sessions of a store. How long does the page take, and its parts? What does polling
cost the worker, in CPU time, beside a request that reads its session and nothing else?
Ends with 1 if a page takes a second, or polling takes a hundredth of a core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from gunicorns import Gunicorn

from benchmarks.peers import cpu_seconds
from shmstore.manager import StoreManager

POLLS = 500
EVERY = 2  # seconds between two polls of a page that is open
APP = """
import os
from flask import Flask, session
from shmstore.flask import Sessions
from shmstore.flask.admin import admin_blueprint

app = Flask(__name__)
app.config["SESSION_STORE"] = "shm://{directory}/large"
Sessions(app)
describe = lambda data: {{"Address": data["address"], "Device": data["device"]}}
app.register_blueprint(admin_blueprint(authorize=lambda: "user" in session, describe=describe))

@app.get("/")
def pid():
    return {{"pid": os.getpid(), "user": session.get("user")}}
"""
SESSION = {"device": "Mozilla/5.0 " * 8, "address": "192.0.2.1", "cart": ["a thing in it"] * 20}


def milliseconds(ask: Callable[[], object], times: int) -> float:
    """Return the median."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1e3


def measure(sessions: int) -> bool:
    """Print the numbers; return whether they are within the limits."""
    with TemporaryDirectory(dir="/dev/shm", prefix="shmstore-bench-") as directory:
        place = Path(directory)
        with StoreManager("large", directory=directory, memory=sessions * 1200 + 2**22, persist=False) as manager:
            store = manager.store()
            for number in range(sessions):
                user = f"user{number // 2}@example.com"
                store.set(f"s{number}", {"user": user, **SESSION}, owner=user if number % 2 else None)
            gunicorn = Gunicorn(APP.format(directory=directory), place, place, "--workers", "1").booted(1)
            try:
                return report(gunicorn, sessions)
            finally:
                gunicorn.end_all()


def report(gunicorn: Gunicorn, sessions: int) -> bool:
    def ask(path: str) -> None:
        answer = gunicorn.ask(path, "s1")
        assert answer.status == 200, answer

    def cpu(path: str) -> float:
        """Return the milliseconds of CPU that one request costs the worker."""
        before = cpu_seconds([worker])
        for _ in range(POLLS):
            ask(path)
        return (cpu_seconds([worker]) - before) / POLLS * 1e3

    worker = gunicorn.get()["pid"]
    ask("/sessions/")
    slowest = 0.0
    for about, path, times in (
        ("the page", "/sessions/", 20),
        ("the last page of the table", "/sessions/?page=999999", 20),
        ("search for an owner", "/sessions/?q=user7@example.com", 20),
        ("search for a part of a name", "/sessions/?q=nobody", 5),
        ("one poll", "/sessions/figures", 200),
    ):
        took = milliseconds(lambda path=path: ask(path), times)  # type: ignore[misc]
        slowest = max(slowest, took)
        print(f"| {about} | {took:.1f} ms |", flush=True)
    poll, plain = cpu("/sessions/figures"), cpu("/")
    share = poll / 1e3 / EVERY
    print(f"| CPU of one poll; of a request that reads its session | {poll:.2f} ms; {plain:.2f} ms |")
    print(f"| a page left open, every {EVERY} s | {share:.3%} of one core |")
    return slowest < 1000 and share < 0.01


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=100_000)
    sys.exit(not measure(parser.parse_args().sessions))
