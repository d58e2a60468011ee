"""
The demo: a page that counts its visitor's visits, whichever worker answers.

`make run` serves it under Gunicorn; `flask --app examples/demo/app.py run` works too.
"""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, abort, flash, jsonify, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue

from shmstore.flask import Sessions

app = Flask(__name__)
app.config.update(
    SESSION_STORE="shm://demo",
    SESSION_OWNER_KEY="user",  # whose session it is; at login and logout the session's id changes by itself
    SESSION_COOKIE_SAMESITE="Lax",  # other sites' forms come without the cookie: they can do nothing for you
)
app.config.from_prefixed_env()  # FLASK_SESSION_STORE=shm://other flask run
sessions = Sessions(app)


def visit() -> dict[str, Any]:
    """
    Count a visit, and tell about it.

    The session is saved before the sessions are counted: a first visitor's own is one of them.
    """
    session["visits"] = session.get("visits", 0) + 1
    session.save()  # type: ignore[attr-defined]  # Flask's types know only what all sessions have
    return {
        "visits": session["visits"],
        "pid": os.getpid(),
        "user": session.get("user"),
        "sessions": sessions.store.length(live=True),
    }


def done(message: str, **facts: Any) -> ResponseReturnValue:
    """Answer a form: with JSON to those who ask for it, else by showing the page again, with a message."""
    if request.accept_mimetypes.best == "application/json":
        return jsonify(facts)
    flash(message)
    return redirect(url_for("index"), 303)


@app.get("/")
def index() -> ResponseReturnValue:
    """Show the page."""
    return render_template("index.html", **visit())


@app.get("/api")
def api() -> ResponseReturnValue:
    """Answer as JSON what the page shows."""
    return jsonify(visit())


@app.post("/login")
def login() -> ResponseReturnValue:
    """Log in as whoever the visitor says. The visits so far stay; the session's id does not."""
    user = request.form.get("user", "").strip()
    if not 0 < len(user) <= 50:
        abort(400, "Please say who you are, in 1 to 50 characters.")
    session["user"] = user
    return done(f"Hello {user}.", user=user)


@app.post("/logout")
def logout() -> ResponseReturnValue:
    """Forget the visitor, visits and all."""
    session.clear()
    return done("You are logged out, and your visits are forgotten.", user=None)


@app.post("/prune")
def prune() -> ResponseReturnValue:
    """Remove all expired sessions now. The server does so by itself, every minute."""
    pruned = sessions.store.prune()
    return done(f"{pruned} expired session{'' if pruned == 1 else 's'} removed.", pruned=pruned)
