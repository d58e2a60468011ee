"""
What is kept under a session's key: a head of fixed size, then the record's body as in an arena (`shmstore.codec.body`).

    8s   tag: other bytes with each write, so a writer finds out whether what it has read is still there
    u64  deadline, u64 last written or touched, u64 until when its owner's index knows it, u64 created
    8s   digest of its owner, zeros if it has none

Big-endian; times are microseconds of the server's clock. The scripts know this layout, see `scripts`.
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from shmstore.codec.body import Record, unpack
from shmstore.codec.ids import owner_digest

__all__ = ["FOREVER", "HEAD", "LONGEST_HEAD", "NOBODY", "Value", "known_until", "new_tag", "owner_bytes", "parse"]

HEAD: Final = struct.Struct(">8sQQQQ8s")
LONGEST_HEAD: Final = HEAD.size + 4 + 256 + 255 + 256  # with all of the body that stands before the payload
FOREVER: Final = 2**62  # a deadline that does not come
NOBODY: Final = bytes(8)


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
        """Return it as it is stored."""
        return HEAD.pack(*self[:6]) + self.body

    def record(self) -> Record:
        """
        Return what the body says.

        Raises:
            SerializationError: It is damaged.
        """
        return unpack(self.body)


def new_tag() -> bytes:
    """Return a tag that no other write has."""
    return os.urandom(8)


def owner_bytes(owner: str | None) -> bytes:
    """Return what stands for an owner in a head; raises as `owner_digest`."""
    return owner_digest(owner).to_bytes(8)


def known_until(now: int, deadline: int) -> int:
    """Return until when an owner's index shall know a session: long enough that it need not be told of each touch."""
    return FOREVER if deadline >= FOREVER else deadline + max(0, deadline - now)


def parse(data: bytes | None) -> Value | None:
    """Return what is stored; None for nothing, and for a head alone, which only keeps a place."""
    if data is None or len(data) <= HEAD.size:
        return None
    tag, deadline, used, indexed, created, owner = HEAD.unpack_from(data)
    return Value(tag, deadline, used, indexed, created, owner, data[HEAD.size :])
