"""A record as it stands in the arena: its head, what it carries, a checksum of both."""

from __future__ import annotations

import struct
import zlib
from hashlib import blake2b
from typing import Final

__all__ = [
    "HEAD",
    "OVERHEAD",
    "RESIDUE",
    "Head",
    "Key",
    "body_of",
    "digest_of_key",
    "head_of",
    "key_of",
    "seal",
    "weight_of",
]

# Length, weight, key, owner, created (may be before the boot); the body; a CRC-32 of all before it.
_HEAD: Final = struct.Struct("<IIQQQq")
_CRC: Final = struct.Struct("<I")
_KEY: Final = struct.Struct("<QQ")

HEAD: Final = _HEAD.size
OVERHEAD: Final = _HEAD.size + _CRC.size  # bytes of a record beyond its body
RESIDUE: Final = 0x2144DF1C  # the CRC of anything with its CRC at its end: checking a record takes one call and no copy
head_of: Final = _HEAD.unpack_from

Key = tuple[int, int]
# length, weight, low and high half of the key, owner, created
Head = tuple[int, int, int, int, int, int]


def key_of(name: bytes) -> Key:
    """Return the key of a name: where its session is looked for tells nothing about the name."""
    low, high = _KEY.unpack(blake2b(name, digest_size=16).digest())
    return low, high


def digest_of_key(key: Key) -> str:
    """Return the 32 digits of a key: what `names.short` shows the first of."""
    return _KEY.pack(*key).hex()


def seal(key: Key, owner: int, created: int, body: bytes, weight: int = 1) -> bytes:
    """Return a record as it stands in the arena."""
    head = _HEAD.pack(OVERHEAD + len(body), weight, *key, owner, created)
    return b"".join((head, body, _CRC.pack(zlib.crc32(body, zlib.crc32(head)))))


def weight_of(record: bytes) -> int:
    """Return how much of ``max`` a record takes; its first `HEAD` bytes are enough."""
    weight: int = head_of(record)[1]
    return weight


def body_of(record: bytes) -> bytes:
    """Return what was sealed."""
    return record[_HEAD.size : -_CRC.size]
