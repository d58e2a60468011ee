"""That a form was sent from our own page, by the person who was shown it."""

from __future__ import annotations

import secrets
from typing import Final

from flask import abort, request, session

_TOKEN: Final = "_shmstore_token"  # noqa: S105  # a key of the session


def token() -> str:
    """Return the secret of the session of who asks, which our forms carry."""
    if _TOKEN not in session:
        session[_TOKEN] = secrets.token_urlsafe(32)
    return str(session[_TOKEN])


def refuse_forgery() -> None:
    """
    Let a request pass only if its form has the token of its session, and its browser does not say that another site,
    or another origin of this one, has sent it.

    Raises:
        werkzeug.exceptions.Forbidden: It may be forged.
    """
    expected, given = str(session.get(_TOKEN, "")), request.form.get("token", "")
    known = bool(expected) and secrets.compare_digest(expected.encode(), given.encode(errors="replace"))
    if not known or request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        abort(403, "Nothing was done: this form is not one that you were shown lately. Open the page again.")
