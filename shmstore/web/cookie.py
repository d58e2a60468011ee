"""
The session cookie: the ids in the Cookie header of a request, and the Set-Cookie header of a response.

Django reads and sets its cookie itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from enum import Enum
from typing import Final, Self

from shmstore.errors import ConfigError

__all__ = ["KEEP_COOKIE", "Cookie", "SessionCookie", "values"]


class Cookie(Enum):
    """What a response does with the session cookie."""

    KEEP = "keep"  # no header: the browser keeps the cookie it has, if any
    SEND = "send"  # Set-Cookie with the session's id
    DELETE = "delete"  # Set-Cookie that removes the cookie


KEEP_COOKIE: Final = Cookie.KEEP  # looked up at each request: in Python 3.11 that is slow in the class


# -- the request ---------------------------------------------------------------------------------------------------

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


# -- the response --------------------------------------------------------------------------------------------------

_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch  # a token of RFC 9110
_ATTRIBUTE: Final = re.compile(r"[ -:<-~]+").fullmatch  # RFC 6265: neither controls nor semicolons
_DOMAIN: Final = re.compile(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*").fullmatch
_SAME_SITE: Final = ("lax", "strict", "none")
_LONGEST: Final = 400 * 86400  # seconds; RFC 6265bis: browsers keep no cookie for longer


class SessionCookie:
    """
    The cookie that holds the id of a session, as a response sets and deletes it.

    Args:
        name: Its name.
        attributes: What follows its value and its lifetime in the header, as ``; path=/; secure``. Browsers delete a
            cookie only if it is set with the same path, domain and partition.

    Attributes:
        delete: The header that deletes it.
    """

    def __init__(self, name: str, attributes: str) -> None:
        self.name, self._attributes = name, attributes
        self.delete: Final = f"{name}=; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0{attributes}"

    @classmethod
    def checked(
        cls,
        name: str = "session",
        *,
        domain: str | None = None,
        path: str = "/",
        secure: bool = False,
        httponly: bool = True,
        samesite: str | None = "lax",
        partitioned: bool = False,
    ) -> Self:
        """
        Return the cookie with these attributes, the ``cookie_`` ones of `shmstore.asgi.SessionMiddleware`.

        Raises:
            ConfigError: A value is invalid, or browsers would refuse the cookie.
        """
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
        attributes = [
            f"path={path}",
            "httponly" if httponly else "",
            f"samesite={samesite.lower()}" if samesite else "",
            "secure" if secure else "",
            f"domain={domain}" if domain else "",
            "partitioned" if partitioned else "",
        ]
        return cls(name, "".join(f"; {each}" for each in attributes if each))

    def set(self, sid: str, *, max_age: float | None = None, expires: str = "") -> str:
        """
        Return the header that sets it.

        Args:
            sid: The id of the session.
            max_age: The seconds that it lives.
            expires: The date at which it ends. With neither it lives as long as the browser.
        """
        if max_age is not None:
            # Rounded up, because 0 deletes the cookie.
            return f"{self.name}={sid}; Max-Age={math.ceil(min(max_age, _LONGEST))}{self._attributes}"
        return f"{self.name}={sid}{expires and f'; Expires={expires}'}{self._attributes}"
