"""Parsing of the Cookie header of a request."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
