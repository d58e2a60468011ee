"""
Names and URLs of stores: ``shop``, ``shm://shop``, ``shm:///path/to/store-directory``.

URLs of Redis and Valkey are only recognised here; `shmstore.redis.client` parses them.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from typing import NamedTuple
from urllib.parse import unquote

from shmstore.errors import ConfigError

_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,64}", re.ASCII)
NETWORK = frozenset({
    "redis", "rediss", "valkey", "valkeys", "unix", "redis+unix", "valkey+unix",
    *(f"{base}+{kind}" for base in ("redis", "rediss", "valkey", "valkeys") for kind in ("sentinel", "cluster")),
})  # fmt: skip
"""The schemes of stores on Redis or Valkey."""
_SCHEMES = sorted({"shm", *NETWORK})
_MISSPELT = re.compile(r"([A-Za-z][A-Za-z0-9+]*):/?/?(.*)", re.DOTALL)


class Location(NamedTuple):
    """A store's name, and the directory that contains the store's own directory (None: the user's default)."""

    name: str
    directory: str | None


def is_network(target: object) -> bool:
    """Return whether a target is the URL of a store on Redis or Valkey."""
    return isinstance(target, str) and "://" in target and target.partition("://")[0].lower() in NETWORK


def parse(target: str, directory: str | os.PathLike[str] | None = None) -> Location:
    """
    Parse the name or URL of a store.

    Args:
        target: A bare name, ``shm://name``, or ``shm:///path`` of the store's own directory.
        directory: The directory of a store that is given by its name; not allowed with a path.

    Raises:
        ConfigError: The name or URL is invalid; the message says what is valid.
    """
    if not isinstance(target, str):
        raise ConfigError(f"a store's name must be a str, not {type(target).__name__}")
    base = None if directory is None else os.fspath(directory)
    if not base and base is not None:
        raise ConfigError("directory is empty: omit it, or name a directory in a tmpfs")
    scheme, separator, rest = target.partition("://")
    if not separator:
        return Location(_checked(target, target), base)
    if scheme.lower() in NETWORK:
        raise ConfigError(f"{scheme}:// is the URL of a server; a store of this host is needed: use shm://NAME")
    if scheme.lower() != "shm":
        raise ConfigError(
            f"{safe(target)} is not a store URL{suggestion(target) or '; use shm://NAME or shm:///PATH/OF/STORE'}"
        )
    if "?" in rest or "#" in rest:
        raise ConfigError(f"{target!r}: a store URL has no query; pass options by name")
    if not rest.startswith("/"):
        return Location(_checked(rest, target), base)
    if base is not None:
        raise ConfigError(f"{target!r} already contains the directory: omit directory={base!r}")
    parent, name = os.path.split(unquote(rest).rstrip("/"))
    return Location(_checked(name, target), parent or "/")


def suggestion(target: str) -> str:
    """Return the likely intended URL, as the end of a sentence: ``; did you mean shm://shop?``."""
    found = _MISSPELT.fullmatch(target)
    near = get_close_matches(found[1].lower(), _SCHEMES, 1) if found else []
    if found is None or not near:
        return ""
    rest = found[2]
    if near[0] == "shm" and "/" in rest:
        rest = f"/{rest.lstrip('/')}"
    meant = f"{near[0]}://{rest}"
    return "" if meant == target else f"; did you mean {safe(meant)}?"


def safe(url: str) -> str:
    """
    Return a URL, quoted, without the part before the last @ (which may hold a password) and without its query.

    Of a URL without a colon after its scheme, the scheme is left out too.
    """
    found = _MISSPELT.fullmatch(url)
    scheme, rest = (url[: found.start(2)], found[2]) if found else ("", url)
    _, at, rest = rest.rpartition("@")
    return repr(f"{scheme}{at and '...@'}{rest.partition('?')[0]}"[:200])


def _checked(name: str, target: str) -> str:
    if not _NAME.fullmatch(name):
        hint = f"; did you mean {safe(f'shm://{target}')}?" if target.startswith("/") else suggestion(target)
        raise ConfigError(
            f"{safe(name)} is not a valid store name: use 1 to 64 of A-Z a-z 0-9 . _ - and no leading dot{hint}"
        )
    return name
