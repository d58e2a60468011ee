"""The session object in the scope of an ASGI connection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shmstore.policy import PERMANENT, Policy
from shmstore.session import Session
from shmstore.system.event_loop import is_running

__all__ = ["Headers", "ScopePolicy", "ScopeSession", "header"]

Headers = Iterable[tuple[bytes, bytes]]


class ScopePolicy(Policy):
    """The rules for sessions that do not have the key `PERMANENT` among their data."""

    def initial_data(self) -> dict[str, Any]:
        return {}


class ScopeSession(Session):
    """
    A `shmstore.session.Session` of an ASGI connection.

    Its request is the headers of an HTTP request, None for a WebSocket. It is not the scope, which refers to the
    session: each request would leave a cycle to the garbage collector.

    Its data has no key for being permanent. Concurrent appends to the list of flash messages (Quart) are merged.
    """

    _merged_lists = frozenset({"_flashes"})
    _is_permanent: bool | None = None  # None: as the policy says
    _request: Headers | None

    @property
    def permanent(self) -> bool:
        """Whether the cookie outlives the browser."""
        self._look()
        return self._policy.permanent if self._is_permanent is None else self._is_permanent

    @permanent.setter
    def permanent(self, value: bool) -> None:
        if self.permanent is not bool(value):
            self._is_permanent = bool(value)
            self._modified = True  # so that the cookie is sent again

    def clear(self) -> None:
        """Remove all data. If the session is still empty when it is saved, it is destroyed."""
        super().clear()
        self._is_permanent = None

    def _fetch(self, sid: str) -> dict[str, Any] | None:
        data = super()._fetch(sid)
        if data is not None:
            self._is_permanent = bool(data.pop(PERMANENT, False))
        return data

    def _content(self) -> dict[str, Any]:
        data = self.copy()
        if self._policy.permanent if self._is_permanent is None else self._is_permanent:
            data[PERMANENT] = True
        return data

    def _reset(self) -> None:
        self._is_permanent = None
        super()._reset()

    def _can_set_cookie(self) -> bool:
        return self._request is not None and super()._can_set_cookie()

    def _header(self, name: str) -> str | None:
        return header(self._request or (), name.encode())

    def _may_block(self) -> bool:
        return not is_running()


def header(headers: Headers, name: bytes, separator: bytes = b", ") -> str | None:
    """Return a header of a request, joined if it is repeated; None: absent."""
    values = [value for each, value in headers if each == name]
    return separator.join(values).decode("latin-1") if values else None
