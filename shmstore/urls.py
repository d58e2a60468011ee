"""
Names and URLs of stores: ``shop``, ``shm://shop``, ``shm:///path/to/store-directory``.

Those of Redis and Valkey are only told from them here; `shmstore.redis.client` takes them apart.
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
    """A store's name and the directory its own directory is in (None: the user's default one)."""

    name: str
    directory: str | None


def is_network(target: object) -> bool:
    """Return whether that is the URL of a store on Redis or Valkey."""
    return isinstance(target, str) and "://" in target and target.partition("://")[0].lower() in NETWORK


def parse(target: str, directory: str | os.PathLike[str] | None = None) -> Location:
    """
    Take the name or URL of a store apart.

    Args:
        target: A bare name, ``shm://name``, or ``shm:///path`` of the store's own directory.
        directory: Where a store given by its name is; not allowed together with a path.

    Raises:
        ConfigError: The name or the URL is not one; the message says what would be right.
    """
    if not isinstance(target, str):
        raise ConfigError(f"a store is named by a str, not by {type(target).__name__}")
    base = None if directory is None else os.fspath(directory)
    if not base and base is not None:
        raise ConfigError("directory is empty: leave it out, or name one in a tmpfs")
    scheme, separator, rest = target.partition("://")
    if not separator:
        return Location(_checked(target, target), base)
    if scheme.lower() in NETWORK:
        raise ConfigError(f"{scheme}:// is the URL of a server; this is about stores of this host: use shm://NAME")
    if scheme.lower() != "shm":
        raise ConfigError(
            f"{safe(target)} is no URL of a store{suggestion(target) or '; use shm://NAME or shm:///PATH/OF/STORE'}"
        )
    if "?" in rest or "#" in rest:
        raise ConfigError(f"{target!r}: a store's URL takes no query; give options by their names")
    if not rest.startswith("/"):
        return Location(_checked(rest, target), base)
    if base is not None:
        raise ConfigError(f"{target!r} already says where the store is; leave out directory={base!r}")
    parent, name = os.path.split(unquote(rest).rstrip("/"))
    return Location(_checked(name, target), parent or "/")


def suggestion(target: str) -> str:
    """Return the URL that a misspelt one may have meant, as the end of a sentence: ``; did you mean shm://shop?``."""
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
    """Return a URL, quoted, without what is before the last @ (which may be a password) and without its query."""
    found = _MISSPELT.fullmatch(url)
    if found is None:
        return repr(url[:200])
    _, at, rest = found[2].rpartition("@")
    return repr(f"{url[: found.start(2)]}{at and '...@'}{rest.partition('?')[0]}"[:200])


def _checked(name: str, target: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{safe(name)} cannot name a store: use 1 to 64 of A-Z a-z 0-9 . _ - and no dot in front"
            f"{suggestion(target)}"
        )
    return name
