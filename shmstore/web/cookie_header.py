"""
The Cookie header of a request, the Set-Cookie header of a response, and the headers that say what a request is.

Flask's Set-Cookie header comes from Werkzeug, see `StoreSessionInterface.save_session`; Django sets its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

from shmstore.errors import ConfigError

__all__ = ["SessionCookie", "is_navigation", "values"]

_SPACE = " \t"  # all white space that RFC 9110 allows; `str.strip` alone also strips characters that may be in a name
_VALUE = re.compile(r"[ \t]*=([^;,]*)").match


def values(header: str, name: str) -> Sequence[str]:
    """
    Return the values of all cookies with one name, in the order in which they should be tried.

    Cookies are separated by semicolons, with only spaces and tabs around them (RFC 6265, RFC 9110). A value in double
    quotes is returned without them. Quotes do not protect a semicolon, and nothing is decoded.

    Several Cookie headers reach the application as one: Gunicorn and Werkzeug join them with commas. A comma can also
    be part of a value, so anyone who can set some cookie can write `a=b,name=value`. A value after a comma is therefore
    tried last. It is ignored if the name begins with two underscores, as `__Host-` and `__Secure-` do: browsers
    guarantee who has set these cookies.

    Args:
        header: The header as in the WSGI environ: bytes decoded as Latin-1.
        name: The name of the cookies, case-sensitive.
    """
    # Fast path for the usual case: one cookie with that name, formatted as browsers do.
    before, found, after = header.partition(name + "=")
    if found and (not before or before[-2:] == "; "):
        value, _, after = after.partition(";")
        if not (name in after or "," in value or '"' in value or " " in value or "\t" in value):
            return (value,)
    return _all_values(header, name)


def _all_values(header: str, name: str) -> list[str]:
    if not name.isascii():
        name = name.encode().decode("latin-1")  # as in the header
    trusted: list[str] = []
    doubtful: list[str] = []
    at = header.find(name)
    while at >= 0:
        end = at + len(name)
        while at and header[at - 1] in _SPACE:
            at -= 1
        separator = header[at - 1] if at else ";"
        target = trusted if separator == ";" else doubtful if separator == "," and not name.startswith("__") else None
        if target is not None and (match := _VALUE(header, end)):
            value = match[1].strip(_SPACE)
            target.append(value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value)
        at = header.find(name, end)
    return trusted + doubtful


_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch  # a token of RFC 9110
_ATTRIBUTE: Final = re.compile(r"[ -:<-~]+").fullmatch  # RFC 6265: neither controls nor semicolons
_DOMAIN: Final = re.compile(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*").fullmatch
_SAME_SITE: Final = ("lax", "strict", "none")
_LONGEST: Final = 400 * 86400  # seconds; RFC 6265bis: browsers keep no cookie for longer


class SessionCookie:
    """
    The cookie that holds the id of a session, as a response sets and deletes it.

    Its arguments are the ``cookie_`` ones of `shmstore.asgi.SessionMiddleware`.

    Raises:
        ConfigError: A value is invalid, or browsers would refuse the cookie.
    """

    def __init__(
        self,
        name: str = "session",
        *,
        domain: str | None = None,
        path: str = "/",
        secure: bool = False,
        httponly: bool = True,
        samesite: str | None = "lax",
        partitioned: bool = False,
    ) -> None:
        for option, value in {"secure": secure, "httponly": httponly, "partitioned": partitioned}.items():
            if not isinstance(value, bool):
                raise ConfigError(f"COOKIE_{option.upper()} must be True or False, not {value!r}")
        if not isinstance(name, str) or not _NAME(name):
            raise ConfigError(f"COOKIE_NAME must be letters, digits and some of !#$%&'*+-.^_`|~, not {name!r}")
        if not isinstance(path, str) or not _ATTRIBUTE(path):
            raise ConfigError(f"COOKIE_PATH must be ASCII without semicolons, not {path!r}")
        if not path.startswith("/"):
            raise ConfigError(f"COOKIE_PATH must begin with a slash, not {path!r}")
        if domain is not None and not (isinstance(domain, str) and _DOMAIN(domain)):
            raise ConfigError(
                f"COOKIE_DOMAIN must be a host name in ASCII such as example.org, without scheme, port and path, not "
                f"{domain!r}"
            )
        if samesite is not None and (not isinstance(samesite, str) or samesite.lower() not in _SAME_SITE):
            raise ConfigError(f"COOKIE_SAMESITE must be 'lax', 'strict', 'none' or None, not {samesite!r}")
        secure = secure or partitioned
        # Browsers refuse cookies that break these rules (RFC 6265bis), and a session would begin at every request.
        if samesite is not None and samesite.lower() == "none" and not secure:
            raise ConfigError("COOKIE_SAMESITE='none' needs COOKIE_SECURE=True: browsers refuse the cookie without it")
        if name.lower().startswith(("__host-", "__secure-")) and not secure:
            raise ConfigError(f"COOKIE_NAME={name!r} needs COOKIE_SECURE=True, or another prefix")
        if name.lower().startswith("__host-") and (domain is not None or path != "/"):
            raise ConfigError(f"COOKIE_NAME={name!r} needs COOKIE_PATH='/' and no COOKIE_DOMAIN, or another prefix")
        self.name = name
        attributes = [
            "httponly" if httponly else "",
            f"samesite={samesite.lower()}" if samesite else "",
            "secure" if secure else "",
            f"domain={domain}" if domain else "",
            "partitioned" if partitioned else "",
        ]
        # Browsers delete a cookie only if it is set with the same path, domain and partition.
        self._path, self._attributes = f"; path={path}", "".join(f"; {each}" for each in attributes if each)
        self.delete: Final = f"{name}={self._path}; Max-Age=0{self._attributes}"

    def set(self, value: str, max_age: float | None) -> str:
        """Return the header that sets it; ``max_age``: the seconds that it lives, None: as long as the browser."""
        # Rounded up, because 0 deletes the cookie.
        lifetime = "" if max_age is None else f"; Max-Age={math.ceil(min(max_age, _LONGEST))}"
        return f"{self.name}={value}{self._path}{lifetime}{self._attributes}"


def is_navigation(mode: str | None, destination: str | None, purpose: str | None) -> bool:
    """
    Return whether a request is a navigation: for a whole page that replaces the displayed one.

    A navigation in a frame, or a prefetch, does not cancel another request.

    Args:
        mode, destination, purpose: The headers Sec-Fetch-Mode, Sec-Fetch-Dest and Sec-Purpose; None: absent.
    """
    return mode == "navigate" and destination in ("document", None) and purpose is None
