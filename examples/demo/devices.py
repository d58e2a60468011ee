"""Your devices: users see where they are logged in, and log out there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import flask
from flask import Blueprint, abort, current_app, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from shmstore.flask import Sessions
from shmstore.flask.session import StoreSession
from shmstore.listing import Row, row_of

sessions = Sessions()  # in the application: sessions.init_app(app)
session = cast(StoreSession, flask.session)  # Flask's types know only what all sessions have
devices = Blueprint("devices", __name__, url_prefix="/devices")

# The first that is in the name counts: most browsers say that they are Chrome and Safari too.
BROWSERS = {"Edg": "Edge", "OPR": "Opera", "CriOS": "Chrome", "FxiOS": "Firefox"}
BROWSERS |= {name: name for name in ("Firefox", "Chrome", "Safari", "curl")}
SYSTEMS = {
    "Android": "Android",
    "iPhone": "iPhone",
    "iPad": "iPad",
    "Windows": "Windows",
    "Mac OS": "macOS",
    "Linux": "Linux",
}


def name_of(user_agent: str) -> str:
    """Return what people call a device, by what its browser says of itself."""
    browser = next((name for mark, name in BROWSERS.items() if mark in user_agent), "")
    system = next((name for mark, name in SYSTEMS.items() if mark in user_agent), "")
    return " on ".join(part for part in (browser, system) if part) or "Unknown device"


def ago(seconds: float) -> str:
    """Return how long ago something was, in words."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def owner() -> str:
    """Return who asks, as the store writes it: a number in the session is text there."""
    return str(session.get("user") or abort(403, "Log in first."))


def this() -> str:
    """Return the id that the store has this device's session under."""
    owner()  # reads the session, or is 403
    session.save()  # if a new id is due, it changes now
    return str(current_app.config.get("SESSION_KEY_PREFIX", "")) + session.sid


def mine() -> Iterator[tuple[str, Row, dict[str, Any]]]:
    """Yield the sessions of the user who asks, and of nobody else: id, what the store knows, what is in it."""
    store = sessions.store
    for sid in store.owned_by(owner()):  # the most recently used first
        row, data = row_of(store, sid), store.peek(sid)  # neither counts as use
        if row is not None and data is not None:
            yield sid, row, data


@devices.get("/")
def show() -> ResponseReturnValue:
    """List them. A page never has an id in it, only its digest: that tells them apart, and opens nothing."""
    here = this()
    listed = [
        {
            "digest": row.digest,
            "name": name_of(data.get("device", "")),
            "address": data.get("address", ""),
            "used": ago(row.idle),
            "this": sid == here,
        }
        for sid, row, data in mine()
    ]
    return render_template("devices.html", devices=listed)


@devices.post("/log-out")
def log_out() -> ResponseReturnValue:
    """Log out one other device. It is looked for among the user's own, so nobody else's can be meant."""
    wanted, here = request.form.get("device", ""), this()
    for sid, row, _ in mine():
        if row.digest == wanted and sid != here:
            sessions.store.destroy(sid)
            flash("That device is logged out.")
            break
    else:
        flash("It is not here any more: it was logged out, or has got a new id; look again.")
    return redirect(url_for("devices.show"), 303)


@devices.post("/log-out-others")
def log_out_others() -> ResponseReturnValue:
    """Log out all devices but this one."""
    owner()  # or 403
    ended = session.destroy_others()
    flash(f"{ended} other device{'' if ended == 1 else 's'} logged out.")
    return redirect(url_for("devices.show"), 303)
