"""The frame of a record in the arena: a head, the body, and a checksum of both."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from operator import itemgetter
from typing import Final

__all__ = [
    "HEAD",
    "OVERHEAD",
    "RESIDUE",
    "Head",
    "Key",
    "TimedRecord",
    "body_of",
    "head_of",
    "key_of",
    "seal",
    "weight_of",
]

# Length, weight, key, owner, created (may be before the boot); the body; a CRC-32 of everything before it.
_HEAD: Final = struct.Struct("<IIQQQq")
_CRC: Final = struct.Struct("<I")

HEAD: Final = _HEAD.size
OVERHEAD: Final = _HEAD.size + _CRC.size  # bytes of a record beyond its body
RESIDUE: Final = 0x2144DF1C  # the CRC of any data followed by its own CRC: one call checks a record without a copy
head_of: Final = _HEAD.unpack_from
body_of: Final[Callable[[bytes], bytes]] = itemgetter(slice(_HEAD.size, -_CRC.size))
"""Returns the body of a record."""

Key = tuple[int, int]
"""What a record is found by: 16 bytes, as two numbers."""

# length, weight, low and high half of the key, owner, created
Head = tuple[int, int, int, int, int, int]

TimedRecord = tuple[bytes, int, int]
"""A record, its deadline, when it was used last."""


def seal(key: Key, owner: int, created: int, body: bytes, weight: int = 1) -> bytes:
    """Return the record that contains a body."""
    head = _HEAD.pack(OVERHEAD + len(body), weight, *key, owner, created)
    return b"".join((head, body, _CRC.pack(zlib.crc32(body, zlib.crc32(head)))))


def key_of(record: bytes) -> Key:
    """Return the key of a record."""
    _, _, low, high, _, _ = head_of(record)
    return low, high


def weight_of(record: bytes) -> int:
    """Return the share of ``max`` that a record takes; its first `HEAD` bytes are sufficient."""
    weight: int = head_of(record)[1]
    return weight
