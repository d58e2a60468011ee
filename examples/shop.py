"""A small application with logins, for the servers of this directory: README.md says how to run each."""

from __future__ import annotations

import os
from typing import Any

from flask import Flask, request, session

from shmstore.flask import Sessions

app = Flask(__name__)
app.config.update(
    SESSION_STORE="shm://shop",
    SESSION_OWNER_KEY="user",  # whose session it is: `shmstore logout shop ada` ends all of hers
)
app.config.from_prefixed_env()  # FLASK_SESSION_STORE=shm://other
Sessions(app)


@app.get("/")
def index() -> dict[str, Any]:
    """Say who is logged in, and which process says so."""
    return {"user": session.get("user"), "pid": os.getpid()}


@app.post("/login")
def login() -> dict[str, Any]:
    """Log in as whoever the visitor says."""
    session["user"] = request.form["user"]
    return index()


@app.post("/logout")
def logout() -> dict[str, Any]:
    """Forget the visitor."""
    session.clear()
    return index()
