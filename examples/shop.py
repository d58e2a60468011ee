"""A small application with logins, for the servers in this directory: README.md shows how to run each."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, request, session

from shmstore.flask import Sessions

app = Flask(__name__)
app.config.update(
    SESSION_STORE="shm://shop",
    SESSION_OWNER_KEY="user",  # the owner of a session: `shmstore logout shop ada` ends all of ada's sessions
)
app.config.from_prefixed_env()  # FLASK_SESSION_STORE=shm://other
Sessions(app)


@app.get("/")
def index() -> dict[str, Any]:
    """Return the user and the pid of the process."""
    return {"user": session.get("user"), "pid": os.getpid()}


@app.post("/login")
def login() -> dict[str, Any]:
    """Log in with the given name."""
    session["user"] = request.form["user"]
    return index()


@app.post("/logout")
def logout() -> dict[str, Any]:
    """Log out."""
    session.clear()
    return index()
