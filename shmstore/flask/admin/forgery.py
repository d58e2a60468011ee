"""Protection of the admin page's forms against cross-site request forgery."""

from __future__ import annotations

import secrets
from typing import Final

from flask import abort, request, session

_TOKEN: Final = "_shmstore_token"  # noqa: S105  # a key of the session


def token() -> str:
    """Return the secret that the forms shown to this session contain."""
    if _TOKEN not in session:
        session[_TOKEN] = secrets.token_urlsafe(32)
    return str(session[_TOKEN])


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
