"""Session ids and owners: what is allowed, and what they are found by."""

from __future__ import annotations

from hashlib import blake2b
from typing import Final, overload

from shmstore.engine.frame import Key, key_of

LONGEST: Final = 256  # UTF-8 bytes, of a session id and of an owner as it is stored


def key_of_id(sid: object) -> Key | None:
    """Return the key of an id, None if no session can have it."""
    name = _utf8(sid) if isinstance(sid, str) else b""
    return key_of(name) if name else None


def key_to_write(sid: object) -> Key:
    if not isinstance(sid, str):
        raise TypeError(f"a session id must be a str, not {type(sid).__name__}")
    key = key_of_id(sid)
    if key is None:
        raise ValueError(f"a session id must have 1 to {LONGEST} UTF-8 bytes")
    return key


@overload
def stored_owner(owner: str) -> str: ...


@overload
def stored_owner(owner: object) -> str | None: ...


def stored_owner(owner: object) -> str | None:
    """
    Return an owner as it is stored: itself, or a digest if it has more than 256 UTF-8 bytes or lone surrogates.

    Raises:
        TypeError: It is no str.
        ValueError: It is empty.
    """
    if owner is None:
        return None
    if type(owner) is str and owner.isascii() and 0 < len(owner) <= LONGEST:
        return owner
    if not isinstance(owner, str):
        raise TypeError(f"an owner must be a str or None, not {type(owner).__name__}")
    if not owner:
        raise ValueError("an owner must not be empty; use None for a session without an owner")
    if _utf8(owner):
        return owner
    return "blake2b:" + blake2b(owner.encode(errors="surrogatepass"), digest_size=32).hexdigest()


def digest_of(owner: object) -> int:
    """Return what an owner's sessions are found by; 0 for nobody. Raises as `stored_owner`."""
    return digest_of_stored(stored_owner(owner))


def digest_of_stored(owner: str | None) -> int:
    """Return the same of an owner as `stored_owner` returned it."""
    return 0 if owner is None else int.from_bytes(blake2b(owner.encode(), digest_size=8).digest()) or 1


def _utf8(name: str) -> bytes:
    """Return a name as bytes, none if they are too many or cannot be had."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return b""
    return encoded if len(encoded) <= LONGEST else b""


def short(name: str) -> str:
    """Return what an id or owner is called where people read it: it tells them apart, and opens nothing."""
    return blake2b(name.encode(errors="surrogatepass"), digest_size=16).hexdigest()[:8]
