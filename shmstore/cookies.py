"""The header of a request that has its cookies."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SPACE = " \t"  # all the white space that RFC 9110 allows; `str.strip` alone also takes what may be part of a name
_VALUE = re.compile(r"[ \t]*=([^;,]*)").match


def values(header: str, name: str) -> Sequence[str]:
    """
    Return the values of all cookies of one name, in the order in which they are to be tried.

    Cookies are separated by semicolons, with nothing but spaces and tabs around them (RFC 6265, RFC 9110). A value in
    double quotes is returned without them. Quotes protect no semicolon, and nothing is decoded.

    Several headers are one by the time that an application sees them: Gunicorn and Werkzeug join them with commas. But
    a comma can also be part of a value, so whoever can set some cookie can write `a=b,name=value`. What comes after a
    comma is therefore tried last; and not at all if the name begins with two underscores, as `__Host-` and `__Secure-`
    do, by which browsers vouch for who has set a cookie.

    Args:
        header: The header as WSGI has it: bytes that are decoded as Latin-1.
        name: The name of the cookies. Upper and lower case differ.
    """
    # The usual case at once: one cookie of that name, as browsers write it.
    before, found, after = header.partition(name + "=")
    if found and (not before or before[-2:] == "; "):
        value, _, after = after.partition(";")
        if not (name in after or "," in value or '"' in value or " " in value or "\t" in value):
            return (value,)
    return _all_values(header, name)


def _all_values(header: str, name: str) -> list[str]:
    if not name.isascii():
        name = name.encode().decode("latin-1")  # as it stands in the header
    sure: list[str] = []
    doubtful: list[str] = []
    at = header.find(name)
    while at >= 0:
        end = at + len(name)
        while at and header[at - 1] in _SPACE:
            at -= 1
        separator = header[at - 1] if at else ";"
        into = sure if separator == ";" else doubtful if separator == "," and not name.startswith("__") else None
        if into is not None and (match := _VALUE(header, end)):
            value = match[1].strip(_SPACE)
            into.append(value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value)
        at = header.find(name, end)
    return sure + doubtful
