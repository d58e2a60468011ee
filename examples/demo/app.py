"""
The demo: a page that counts visits in the session, whichever worker answers and whatever process is killed.

`make run` serves it under Gunicorn; `flask --app examples/demo/app.py run` works too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from devices import devices, name_of, session, sessions
from flask import Flask, Response, abort, flash, jsonify, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from guard import same_machine, same_origin
from kill import kill_a_worker, kill_the_server, workers
from two_requests import outcome, overlap
from werkzeug.exceptions import Forbidden, HTTPException, ServiceUnavailable

from shmstore import StoreUnavailable
from shmstore.flask.admin import admin_blueprint

ADMIN, PASSWORD = "admin", "demo"  # shown on the page: every visitor of the demo can be the admin
HEADINGS = {403: "That is not for you", 404: "There is no such page", 503: "The store cannot be reached"}


def about(data: Mapping[str, Any]) -> dict[str, object]:
    """Return the admin page's columns: what the login stored in a session."""
    return {"Device": name_of(data.get("device", "")), "Address": data.get("address", "")}


app = Flask(__name__)
app.config.update(
    SESSION_STORE="shm://demo",
    SESSION_OWNER_KEY="user",  # the owner of a session; its id changes at login and logout
    SESSION_COOKIE_SAMESITE="Lax",  # forms of other sites are sent without the cookie
)
app.config.from_prefixed_env()  # FLASK_SESSION_STORE=shm://other flask run
sessions.init_app(app)
app.before_request(same_origin)
app.register_blueprint(devices)
app.register_blueprint(overlap)
app.register_blueprint(
    admin_blueprint(lambda: session.get("user") == ADMIN, describe=about, home="index", logout="logout"),
    url_prefix="/admin",
)


def visit() -> dict[str, Any]:
    """
    Count a visit, and return the facts about it.

    The session is saved before the sessions are counted, so that a first visitor's session is included.
    """
    lost = session.new and app.config["SESSION_COOKIE_NAME"] in request.cookies
    session["visits"] = session.get("visits", 0) + 1
    session.save()
    return {
        "visits": session["visits"],
        "pid": os.getpid(),
        "workers": workers(),
        "user": session.get("user"),
        "sessions": sessions.store.length(live=True),
        "server": sessions.store.stats().server_pid,
        "lost": lost,
    }


def done(message: str, /, kind: str = "message", **facts: Any) -> ResponseReturnValue:
    """Answer a form: with JSON if the client asks for it, otherwise with a redirect to the page and a message."""
    if wants_json():
        return jsonify(facts)
    flash(message, kind)
    return redirect(url_for("index"), 303)


def wants_json() -> bool:
    """Return whether the client asks for JSON."""
    return request.accept_mimetypes.best == "application/json"


@app.get("/")
def index() -> ResponseReturnValue:
    """Show the page."""
    return render_template("index.html", **visit(), outcome=outcome(), admin=ADMIN, password=PASSWORD)


@app.get("/api")
def api() -> ResponseReturnValue:
    """Count a visit, and return what a client of the demo may want to know."""
    facts = visit()
    return jsonify({name: facts[name] for name in ("visits", "pid", "user", "sessions")})


@app.get("/live")
def live() -> ResponseReturnValue:
    """Count a visit, and return all figures of the page, for its script."""
    return jsonify(visit())


@app.post("/login")
def login() -> ResponseReturnValue:
    """Log in with the given name; only the admin needs a password. The count of visits stays; the id changes."""
    user = request.form.get("user", "").strip()
    if not 0 < len(user) <= 50:
        abort(400, "Please say who you are, in 1 to 50 characters.")
    if user == ADMIN and request.form.get("password") != PASSWORD:
        abort(403, f"The password of {ADMIN} is {PASSWORD}.")
    session["user"] = user
    session["device"] = request.user_agent.string[:200]  # for the user's list of devices, and the admin
    session["address"] = request.remote_addr
    return done(f"Hello {user}.", user=user)


@app.post("/logout")
def logout() -> ResponseReturnValue:
    """Log out and remove all data."""
    session.clear()
    return done("You are logged out, and your visits are forgotten.", user=None)


@app.post("/prune")
def prune() -> ResponseReturnValue:
    """Remove all expired sessions now. The server does this every minute."""
    pruned = sessions.store.prune()
    return done(f"{pruned} expired session{'' if pruned == 1 else 's'} removed.", pruned=pruned)


@app.post("/kill-a-worker")
def kill_worker() -> ResponseReturnValue:
    """Kill another worker, as the kernel does when memory runs out. Gunicorn replaces it."""
    same_machine()
    killed = kill_a_worker()
    if killed is None:
        message = "No other worker to kill: start the demo with make run."
        return done(message, killed=None, message=message)
    message = f"Worker {killed} was killed after your visit {session.get('visits', 0)}."
    return done(message, "killed", killed=killed, message=message)


@app.post("/kill-the-server")
def kill_server() -> ResponseReturnValue:
    """Kill the store's server process. Requests do not need it, and it is replaced within about a second."""
    same_machine()
    visits = session.get("visits", 0)
    killed, successor = kill_the_server(sessions.store)
    if killed is None:
        message = "The store has no server process to kill."
        return done(message, killed=None, message=message)
    after = f"{successor} has taken over" if successor else "another one is being started"
    message = f"Server {killed} was killed after your visit {visits}, and {after}."
    return done(message, "killed", killed=killed, message=message)


@app.errorhandler(HTTPException)
def failed(error: HTTPException) -> ResponseReturnValue:
    """Show an error in the style of the page. The page does not read the session: the store may be the reason."""
    code, headers = error.code or 500, [header for header in error.get_headers() if header[0] != "Content-Type"]
    if wants_json():
        return jsonify(message=error.description), code, headers
    for_admin = request.blueprint == "shmstore_admin" and error.description == Forbidden.description
    page = render_template(
        "error.html",
        error=error,
        heading=HEADINGS.get(code, "That did not work"),
        for_admin=for_admin,
        admin=ADMIN,
        password=PASSWORD,
    )
    return page, code, headers


@app.errorhandler(StoreUnavailable)
def unavailable(error: StoreUnavailable) -> ResponseReturnValue:
    """Report that the store cannot be reached. The log has the reason, which may name files."""
    app.logger.error("%s", error)
    return failed(ServiceUnavailable("Sessions are not available at the moment. Try again in a few seconds."))


@app.after_request
def only_our_files(response: Response) -> Response:
    """Restrict pages to their own files and forbid framing. The admin page sets its own policy."""
    policy = "default-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    response.headers.setdefault("Content-Security-Policy", policy)
    return response
