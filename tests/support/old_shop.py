"""A shop that keeps its sessions by Flask-Session, as it is, and browsers that take their cookies to another."""

from __future__ import annotations

import warnings
from typing import Any

import flask
import flask_login
import flask_session
from flask import Flask
from flask.testing import FlaskClient
from flask_wtf.csrf import CSRFProtect, generate_csrf

SECRET = "the same before and after"


class User(flask_login.UserMixin):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        self.id = name


def shop(**config: Any) -> Flask:
    """An application with logins, carts and forms, which knows nothing of how its sessions are kept."""
    app = Flask(__name__)
    app.config.update(SECRET_KEY=SECRET, TESTING=True, **config)
    manager = flask_login.LoginManager(app)
    manager.user_loader(User)
    CSRFProtect(app)

    @app.get("/form")
    def form() -> str:
        return str(generate_csrf())

    @app.post("/login")
    def login() -> str:
        flask_login.login_user(User(flask.request.form["user"]))
        return ""

    @app.post("/logout")
    def logout() -> str:
        flask_login.logout_user()
        flask.session.clear()
        return ""

    @app.post("/cart")
    def buy() -> str:
        flask.session.setdefault("cart", []).append(flask.request.form["what"])
        flask.session.modified = True
        return ""

    @app.get("/")
    def show() -> dict[str, Any]:
        user = flask_login.current_user
        return {"user": user.get_id() if user.is_authenticated else None, "cart": flask.session.get("cart")}

    return app


def old_shop(**config: Any) -> Flask:
    app = shop(**config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the filesystem, and of signatures
        flask_session.Session(app)
    return app


def customer(app: Flask) -> tuple[FlaskClient, str]:
    """Return a browser that is logged in and has a cart, and the token of a form that it shows."""
    browser = app.test_client()
    token = browser.get("/form").text
    assert browser.post("/login", data={"user": "ada", "csrf_token": token}).status_code == 200
    assert browser.post("/cart", data={"what": "tea", "csrf_token": token}).status_code == 200
    return browser, token


def cookie(browser: FlaskClient) -> str:
    found = browser.get_cookie("session")
    assert found is not None
    return found.value


def goes_on(old: FlaskClient, app: Flask) -> FlaskClient:
    """Return the same browser at the application as it is now."""
    browser = app.test_client()
    browser.set_cookie("session", cookie(old))
    return browser
