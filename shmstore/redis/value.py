"""
The value under a session's key: a head of fixed size, then the record's body as in an arena (`shmstore.codec.body`).

    8s   tag: random bytes that change with each write, so that a writer detects a write since its read
    u64  deadline, u64 last write or touch, u64 time until which the owner's index lists it, u64 created
    8s   digest of its owner, zeros without an owner

Big-endian; times are microseconds of the server's clock. The scripts use this layout, see `scripts`.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from shmstore.codec.body import Record, unpack
from shmstore.codec.ids import owner_digest

__all__ = ["FOREVER", "HEAD", "MAX_HEAD", "NO_OWNER", "Value", "index_until", "new_tag", "owner_bytes", "parse"]

HEAD: Final = struct.Struct(">8sQQQQ8s")
MAX_HEAD: Final = HEAD.size + 4 + 256 + 255 + 256  # including the parts of the body in front of the payload
FOREVER: Final = 2**62  # a deadline that is never reached
NO_OWNER: Final = bytes(8)


class Value(NamedTuple):
    """A stored session."""

    tag: bytes
    deadline: int
    used: int
    indexed: int
    created: int
    owner: bytes
    body: bytes

    def pack(self) -> bytes:
        """Return the bytes to store."""
        return HEAD.pack(*self[:6]) + self.body

    def record(self) -> Record:
        """
        Return the parts of the body.

        Raises:
            SerializationError: The body is damaged.
        """
        return unpack(self.body)


def new_tag() -> bytes:
    """Return a random tag."""
    return os.urandom(8)


def owner_bytes(owner: str | None) -> bytes:
    """Return the digest of an owner as in a head; raises the errors of `owner_digest`."""
    return owner_digest(owner).to_bytes(8)


def index_until(now: int, deadline: int) -> int:
    """Return the time until which an owner's index lists a session: late enough that few touches need to extend it."""
    return FOREVER if deadline >= FOREVER else deadline + max(0, deadline - now)


def parse(data: bytes | None) -> Value | None:
    """Return a stored session; None for no data, and for a head without a body, which reserves a key."""
    if data is None or len(data) <= HEAD.size:
        return None
    tag, deadline, used, indexed, created, owner = HEAD.unpack_from(data)
    return Value(tag, deadline, used, indexed, created, owner, data[HEAD.size :])
