"""The session object Flask's views see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flask import Request
from flask.sessions import SessionMixin

from shmstore.session import Session


class StoreSession(Session, SessionMixin):  # type: ignore[override]  # its attributes are properties here
    """A `shmstore.session.Session` that Flask accepts as its own; of `flash` no message is lost."""

    _merged_lists = frozenset({"_flashes"})

    # After a logout Flask-Login and Flask-Security remove a cookie of theirs when they find this in the session, at the
    # end of the request. Were it lost, the remember-me cookie would log the user in again.
    _markers: ClassVar[Mapping[str, object]] = {"_remember": "clear", "fs_cc": "clear"}

    _request: Request | None

    def __repr__(self) -> str:
        # Reads it, so that printing shows what is in it, as with Flask's own. It is in no environ that tools print.
        self._load()
        return super().__repr__()

    def _can_set_cookie(self) -> bool:
        return super()._can_set_cookie() and not (self._request is not None and _is_on_a_socket(self._request))

    def _is_navigation(self) -> bool:
        if self._request is None:
            return False
        said = self._request.environ.get
        # One in a frame, or one that is made in advance, cancels no other.
        return (
            said("HTTP_SEC_FETCH_MODE") == "navigate"
            and said("HTTP_SEC_FETCH_DEST", "document") == "document"
            and "HTTP_SEC_PURPOSE" not in self._request.environ
        )

    def _is_logout(self, data: dict[str, Any]) -> bool:
        # Flask-Login removes only what it finds: the user's key not, if that cannot be read, but these marks.
        removed = "_fresh" in self._maybe_dirty and "_fresh" not in data
        return removed or any(data.get(key) == value for key, value in self._markers.items())

    def _is_login(self, owner: str | None) -> bool:
        # With Flask-Login, who is not fresh was only remembered, by a cookie that a logout may have revoked since.
        return super()._is_login(owner) and self.get("_fresh") is not False


def _is_on_a_socket(request: Request) -> bool:
    """Tell whether this is the handshake of a WebSocket, or an event: neither has a response with a cookie."""
    environ = request.environ
    return (
        # Of the handshake all is needed, as clients and proxies add an Upgrade to any request: a login, say.
        (
            "HTTP_SEC_WEBSOCKET_KEY" in environ
            and environ["REQUEST_METHOD"] == "GET"
            and "upgrade" in [each.strip().lower() for each in environ.get("HTTP_CONNECTION", "").split(",")]
            and "websocket" in environ.get("HTTP_UPGRADE", "").lower()
        )
        or environ.get("wsgi.websocket") is not None
        # An event of Flask-SocketIO, whichever way it came: it saves the session with a response that nobody gets.
        or (hasattr(request, "event") and hasattr(request, "namespace"))
    )
