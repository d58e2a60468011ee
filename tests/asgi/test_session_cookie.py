"""The Set-Cookie header of a session: no browser refuses it, and none deletes the cookie of a session that lives."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shmstore import ConfigError
from shmstore.web.cookie import SessionCookie

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"samesite": "none"}, "COOKIE_SAMESITE='none' needs COOKIE_SECURE=True"),
    ({"name": "__Secure-id"}, "needs COOKIE_SECURE=True"),
    ({"name": "__secure-id"}, "needs COOKIE_SECURE=True"),
    ({"name": "__Host-id"}, "needs COOKIE_SECURE=True"),
    ({"name": "__Host-id", "secure": True, "path": "/shop"}, "needs COOKIE_PATH='/' and no COOKIE_DOMAIN"),
    ({"name": "__Host-id", "secure": True, "domain": "example.org"}, "needs COOKIE_PATH='/' and no COOKIE_DOMAIN"),
    *(
        ({"domain": domain}, "COOKIE_DOMAIN must be a host name")
        for domain in (
            "https://example.org",
            "example.org:443",
            "example.org/shop",
            "a b.org",
            "exämple.org",
            "",
            "a..b",
        )
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_browsers_refuse_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SessionCookie.checked(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"samesite": "None", "secure": True}, {"samesite": "none", "partitioned": True},
        {"name": "__Secure-id", "secure": True, "domain": "example.org", "path": "/shop"},
        {"name": "__Host-id", "partitioned": True}, {"domain": ".example.org"}, {"domain": "localhost"},
    ],
)  # fmt: skip
def test_what_browsers_take_is_allowed(options: dict[str, Any]) -> None:
    assert SessionCookie.checked(**options).set("x").startswith(f"{options.get('name', 'session')}=x; ")


@pytest.mark.parametrize(
    ("seconds", "sent"), [(0.2, 1), (0.5, 1), (1, 1), (1.2, 2), (60.0, 60), (math.inf, 400 * 86400)]
)
def test_the_life_of_a_cookie_is_rounded_up(seconds: float, sent: int) -> None:
    assert f"; Max-Age={sent};" in SessionCookie.checked().set("x", max_age=seconds)
