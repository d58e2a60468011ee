"""Session ids and owners: which are valid, and the keys and digests that the store finds them by."""

from __future__ import annotations

import struct
from contextlib import suppress
from hashlib import blake2b
from typing import Final, overload

Key = tuple[int, int]
"""The digest of a session id, 16 bytes as two numbers: it tells nothing about the id."""

_KEY: Final = struct.Struct("<QQ")

ROTATE: Final = "_rotate"
"""Key of a stored session whose id must change as soon as a response can set the cookie. Views never see it."""

AT_NAVIGATION: Final = "navigation"
"""Value of that key: the id need not change in a request that a page makes, beside others that send the old id too."""

MAX_ID_BYTES: Final = 256  # UTF-8 bytes of a session id, and of an owner as it is stored


def key_of(name: bytes) -> Key:
    """Return the key of a name."""
    low, high = _KEY.unpack(blake2b(name, digest_size=16).digest())
    return low, high


def digest_of_key(key: Key) -> str:
    """Return a key as 32 digits; `short_digest` returns the first 8 of them."""
    return _KEY.pack(*key).hex()


def key_of_id(sid: object) -> Key | None:
    """Return the key of a session id, or None if the value is not a valid id."""
    try:
        name = sid.encode() if isinstance(sid, str) else b""
    except UnicodeEncodeError:  # a lone surrogate
        return None
    return key_of(name) if 0 < len(name) <= MAX_ID_BYTES else None


def require_key(sid: object) -> Key:
    """
    Return the key of a session id that is to be written.

    Raises:
        TypeError: The id is not a str.
        ValueError: The id is empty, too long, or has lone surrogates.
    """
    if not isinstance(sid, str):
        raise TypeError(f"a session id must be a str, not {type(sid).__name__}")
    key = key_of_id(sid)
    if key is None:
        raise ValueError(f"a session id must have 1 to {MAX_ID_BYTES} UTF-8 bytes")
    return key


@overload
def stored_owner(owner: str) -> str: ...


@overload
def stored_owner(owner: object) -> str | None: ...


def stored_owner(owner: object) -> str | None:
    """
    Return an owner as it is stored: itself, or a digest if it exceeds 256 UTF-8 bytes or has lone surrogates.

    Raises:
        TypeError: The owner is neither a str nor None.
        ValueError: The owner is empty.
    """
    if owner is None:
        return None
    if type(owner) is str and owner.isascii() and 0 < len(owner) <= MAX_ID_BYTES:
        return owner
    if not isinstance(owner, str):
        raise TypeError(f"an owner must be a str or None, not {type(owner).__name__}")
    if not owner:
        raise ValueError("an owner must not be empty; use None for a session without an owner")
    with suppress(UnicodeEncodeError):  # a lone surrogate
        if len(owner.encode()) <= MAX_ID_BYTES:
            return owner
    return "blake2b:" + blake2b(owner.encode(errors="surrogatepass"), digest_size=32).hexdigest()


def owner_digest(owner: object) -> int:
    """Return the digest that indexes an owner's sessions; 0 without an owner. Raises the errors of `stored_owner`."""
    return stored_owner_digest(stored_owner(owner))


def stored_owner_digest(owner: str | None) -> int:
    """Return the same digest for an owner as `stored_owner` returned it."""
    return 0 if owner is None else int.from_bytes(blake2b(owner.encode(), digest_size=8).digest()) or 1


def short_digest(name: str) -> str:
    """Return how logs and listings show an id or owner: eight digits that identify it and give no access."""
    return blake2b(name.encode(errors="surrogatepass"), digest_size=16).hexdigest()[:8]
