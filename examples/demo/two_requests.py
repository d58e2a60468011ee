"""Two requests at once, each with a change of its own to the session: neither undoes the other's change."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from devices import session
from flask import Blueprint, current_app, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

overlap = Blueprint("overlap", __name__, url_prefix="/overlap")

KEYS = ("a", "b")
HOLD = 1.0  # seconds between reading the session and changing it


def outcome() -> dict[str, Any] | None:
    """Return what the last two requests left in the session; None: nothing yet."""
    # Copies: what is added to them is for the page, and not stored.
    changes = {key: dict(session[key]) for key in KEYS if key in session}
    if not changes:
        return None
    start = min(change["read"] for change in changes.values())
    total = max(change["changed"] for change in changes.values()) - start
    for change in changes.values():
        change.update(after=change["read"] - start, held=change["changed"] - change["read"], total=total or 1)
    both = len(changes) == len(KEYS) and len({change["run"] for change in changes.values()}) == 1
    overlapped = max(change["read"] for change in changes.values()) < min(
        change["changed"] for change in changes.values()
    )
    return {"changes": changes, "both": both, "overlapped": overlapped}


@overlap.get("/")
def show() -> ResponseReturnValue:
    """Return the outcome as a part of the page, for its script."""
    return render_template("overlap.html", outcome=outcome())


@overlap.post("/<any(a, b):key>")
def change(key: str) -> ResponseReturnValue:
    """Read the session, wait, and change one key of it."""
    session.get(key)  # from here on, this request has its own copy
    read = time.time()
    time.sleep(HOLD)
    run = request.form.get("run", "")[:32]
    session[key] = {"run": run, "pid": os.getpid(), "read": read, "changed": time.time()}
    return "", 204


@overlap.post("/")
def both() -> ResponseReturnValue:
    """Send both requests, for a browser without JavaScript: this worker answers them in two threads."""
    app: Any = current_app
    app, cookie, run = app._get_current_object(), request.headers.get("Cookie", ""), str(time.time_ns())
    root = request.root_url  # with the prefix below which a proxy serves the application

    def send(key: str) -> None:
        client = app.test_client(use_cookies=False)
        client.post(f"{overlap.url_prefix}/{key}", base_url=root, data={"run": run}, headers={"Cookie": cookie})

    with ThreadPoolExecutor(len(KEYS)) as threads:
        list(threads.map(send, KEYS))
    return redirect(url_for("index", _anchor="overlap"), 303)
