"""The session object Flask's views see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from flask.sessions import SessionMixin

from shmstore.session import Session


class StoreSession(Session, SessionMixin):  # type: ignore[override]  # its attributes are properties here
    """A `shmstore.session.Session` that Flask accepts as its own; of `flash` no message is lost."""

    lists = frozenset({"_flashes"})

    # After a logout Flask-Login and Flask-Security remove a cookie of theirs when they find this in the session, at the
    # end of the request. Were it lost, the remember-me cookie would log the user in again.
    _messages: ClassVar[Mapping[str, object]] = {"_remember": "clear", "fs_cc": "clear"}

    def _logs_in(self, owner: str | None) -> bool:
        # With Flask-Login, who is not fresh was only remembered, by a cookie that a logout may have revoked since.
        return super()._logs_in(owner) and self.get("_fresh") is not False
