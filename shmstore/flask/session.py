"""The session object that Flask's views use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flask import Request
from flask.sessions import SessionMixin

from shmstore.contract import Loaded
from shmstore.session import Session


class StoreSession(Session, SessionMixin):  # type: ignore[override]  # its attributes are properties here
    """A `shmstore.session.Session` with Flask's session interface. Concurrent `flash` calls lose no message."""

    _merged_lists = frozenset({"_flashes"})

    # After a logout Flask-Login and Flask-Security remove their own cookie if they find these values in the session at
    # the end of the request. If a value were lost, the remember-me cookie would log the user in again.
    _markers: ClassVar[Mapping[str, object]] = {"_remember": "clear", "fs_cc": "clear"}

    _request: Request | None

    def __repr__(self) -> str:
        # Reads the session, so that printing shows its data as with Flask's own. Tools do not print it with an environ.
        self._look()
        return super().__repr__()

    def _can_set_cookie(self) -> bool:
        return not (self._response_sent or (self._request is not None and _is_on_a_socket(self._request)))

    def _header(self, name: str) -> str | None:
        return None if self._request is None else self._request.environ.get(f"HTTP_{name.upper().replace('-', '_')}")

    def _is_logout(self, data: dict[str, Any], record: Loaded) -> bool:
        # Flask-Login removes the user's key only if it is in the session, which an unreadable key is not. These values
        # show that it tried.
        hidden = self._unreadable | data.keys()
        removed = "_fresh" not in hidden and "_fresh" in self._store().codec.raws(record.payload)
        return removed or any(data.get(key) == value for key, value in self._markers.items())

    def _is_login(self, owner: str | None) -> bool:
        # With Flask-Login, a user whose login is not fresh was only remembered, by a cookie that may have been revoked.
        return super()._is_login(owner) and self.get("_fresh") is not False


def _is_on_a_socket(request: Request) -> bool:
    """Return whether this is a WebSocket handshake or an event: neither has a response with a cookie."""
    environ = request.environ
    return (
        # All parts of the handshake are required, because clients and proxies add Upgrade to any request.
        (
            "HTTP_SEC_WEBSOCKET_KEY" in environ
            and environ["REQUEST_METHOD"] == "GET"
            and "upgrade" in [each.strip().lower() for each in environ.get("HTTP_CONNECTION", "").split(",")]
            and "websocket" in environ.get("HTTP_UPGRADE", "").lower()
        )
        or environ.get("wsgi.websocket") is not None
        # An event of Flask-SocketIO, over any transport: it saves the session with a response that is not sent.
        or (hasattr(request, "event") and hasattr(request, "namespace"))
    )
