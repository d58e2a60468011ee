"""The page "Your devices": users see where they are logged in, and can log out there."""

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

# The first match counts: most browsers also call themselves Chrome and Safari.
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
    """Return a readable name of a device, from the User-Agent of its browser."""
    browser = next((name for mark, name in BROWSERS.items() if mark in user_agent), "")
    system = next((name for mark, name in SYSTEMS.items() if mark in user_agent), "")
    return " on ".join(part for part in (browser, system) if part) or "Unknown device"


def ago(seconds: float) -> str:
    """Return an age in words."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def owner() -> str:
    """Return the current user as the store's owner: a number in the session is text there."""
    return str(session.get("user") or abort(403, "Log in first."))


def this() -> str:
    """Return the id of this device's session in the store."""
    owner()  # reads the session, or is 403
    session.save()  # if a new id is due, it changes now
    return str(current_app.config.get("SESSION_KEY_PREFIX", "")) + session.sid


def mine() -> Iterator[tuple[str, Row, dict[str, Any]]]:
    """Yield the sessions of the current user only: id, facts from the store, data."""
    store = sessions.store
    for sid in store.owned_by(owner()):  # the most recently used first
        row, data = row_of(store, sid), store.peek(sid)  # neither counts as use
        if row is not None and data is not None:
            yield sid, row, data


@devices.get("/")
def show() -> ResponseReturnValue:
    """List the devices. Pages contain digests of ids, never ids: a digest gives no access."""
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
    """Log out one other device. Only the user's own sessions are searched."""
    wanted, here = request.form.get("device", ""), this()
    for sid, row, _ in mine():
        if row.digest == wanted and sid != here:
            sessions.store.destroy(sid)
            flash("That device is logged out.")
            break
    else:
        flash("That device is not in the list any more: it was logged out, or its id has changed.")
    return redirect(url_for("devices.show"), 303)


@devices.post("/log-out-others")
def log_out_others() -> ResponseReturnValue:
    """Log out all devices but this one."""
    owner()  # or 403
    ended = session.destroy_others()
    flash(f"{ended} other device{'' if ended == 1 else 's'} logged out.")
    return redirect(url_for("devices.show"), 303)
