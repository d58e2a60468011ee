"""Protection of the admin page's forms against cross-site request forgery."""

from __future__ import annotations

import secrets
from typing import Final

from flask import abort, current_app, request, session

_TOKEN: Final = "_shmstore_token"  # noqa: S105  # a key of the session


def fields() -> dict[str, str]:
    """Return the hidden fields of the page's forms: the secret of this session, and what the application requires."""
    if _TOKEN not in session:
        session[_TOKEN] = secrets.token_urlsafe(32)
    return {"token": str(session[_TOKEN]), **application_fields()}


def application_fields() -> dict[str, str]:
    """Return the hidden field that Flask-WTF's ``CSRFProtect`` requires of each form, if the application uses it."""
    generate = current_app.jinja_env.globals.get("csrf_token")
    if "csrf" not in current_app.extensions or not callable(generate):
        return {}
    return {current_app.config.get("WTF_CSRF_FIELD_NAME", "csrf_token"): generate()}


def check_token() -> None:
    """
    Accept a request only if its form has the token of its session, and its browser does not report that another site,
    or another origin of this site, has sent it.

    Raises:
        werkzeug.exceptions.Forbidden: The request may be forged.
    """
    expected, given = str(session.get(_TOKEN, "")), request.form.get("token", "")
    matches = bool(expected) and secrets.compare_digest(expected.encode(), given.encode(errors="replace"))
    if not matches or request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        abort(403, "Nothing was done: this form is not from a page shown to you recently. Open the page again.")
