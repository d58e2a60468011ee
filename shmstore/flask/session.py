"""The session object Flask's views see."""

from __future__ import annotations

from flask.sessions import SessionMixin

from shmstore.session import Session


class StoreSession(Session, SessionMixin):  # type: ignore[override]  # its attributes are properties here
    """A `shmstore.session.Session` that Flask accepts as its own; of `flash` no message is lost."""

    lists = frozenset({"_flashes"})

    def _logs_in(self, owner: str | None) -> bool:
        # With Flask-Login, who is not fresh was only remembered, by a cookie that a logout may have revoked since.
        return super()._logs_in(owner) and self.get("_fresh") is not False
