"""Arenas of layout 1, as its code wrote them: one that it did write, and others as large as needed."""

from __future__ import annotations

import platform
import struct
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from shmstore.layout import boot_id, pid_namespace
from shmstore.lock import LIBC
from shmstore.record import DEFAULT_CODEC, pack

KEPT = Path(__file__).parent / "data" / "layout-1.arena"

PAGE, FIELDS, NEVER = 4096, 11, 2**63 - 1
IDENTITY = struct.Struct("<8sIIQQQQ16s")
FIELD_NAMES = (
    "key_low", "key_high", "record", "expires", "used", "version", "prev", "next", "owner", "chain", "owner_chain",
)  # fmt: skip
STATE, PENDING, TOP_SLOT = 32, 33, 39  # cells


def identity(geometry: tuple[int, int], **changes: object) -> bytes:
    """Return the head of an arena that was made here, since the last boot."""
    abi = zlib.crc32(repr((platform.machine(), LIBC, FIELD_NAMES, 4, 48, 128, 8, 4)).encode())
    values = {
        "magic": b"shmstore", "layout": 1, "abi": abi, "pids": pid_namespace(), "slots": geometry[0],
        "blocks": geometry[1], "block_size": 128, "boot": boot_id(),
    }  # fmt: skip
    head = IDENTITY.pack(*(values | changes).values())
    return head + struct.pack("<I", zlib.crc32(head))


def kept(path: Path, **changes: object) -> Path:
    """
    Put the arena of tests/data at ``path``, as if it had been written here.

    Its head names the machine, the boot and the pid namespace that it was written in; these three are replaced, and the
    checksum of the head with them. Everything else is as it was written.
    """
    data = bytearray(KEPT.read_bytes())
    _, _, _, _, slots, blocks, _, _ = IDENTITY.unpack_from(data)
    head = identity((slots, blocks), **changes)
    data[: len(head)] = head
    path.touch(0o600)
    path.write_bytes(data)
    return path


class Old(NamedTuple):
    """A session; times are those of the arena's clock."""

    sid: str
    payload: bytes
    owner: str | None
    created: int
    expires: int
    used: int


def write(path: Path, sessions: list[Old]) -> None:
    """Write an arena with these sessions, as far as anything of it is read: no index, no lists, no counters."""
    slots = len(sessions) + 10
    records = [sealed(session) for session in sessions]
    sizes = [-(-len(record) // 128) for record in records]
    blocks = sum(sizes) + 10
    at = 2 * PAGE + 128 * 8 * 8
    first_slot = at
    for cells in ((slots + 2) * FIELDS, slots + 1, slots // 4 + 1, (slots // 48 + 16) * 12):
        at += -(-cells * 8 // 64) * 64
    links = at
    at += -(-(blocks + 1) * 8 // 64) * 64
    data = -(-at // PAGE) * PAGE
    path.touch(0o600)
    with path.open("wb") as file:
        file.truncate(data + (blocks + 1) * 128)
        head = identity((slots, blocks))
        file.write(head)
        file.seek(TOP_SLOT * 8)
        file.write(struct.pack("@Q", len(sessions) * FIELDS))
        file.seek(first_slot + FIELDS * 8)
        block = 1
        for session, record, size in zip(sessions, records, sizes, strict=True):
            row = [*key_of(session.sid), len(record) << 32 | block, session.expires, session.used, 2, 0, 0, 0, 0, 0]
            file.write(struct.pack("@11Q", *row))
            block += size
        table = bytearray((blocks + 1) * 8)
        block = 1
        for size in sizes:
            struct.pack_into("@Q", table, block * 8, size << 32)
            block += size
        file.seek(links)
        file.write(table)
        file.seek(data + 128)
        file.write(b"".join(record.ljust(size * 128, b"\0") for record, size in zip(records, sizes, strict=True)))


def key_of(name: str) -> tuple[int, int]:
    """Return the two halves of the key of a session, or the digest of an owner in both."""
    low, high = struct.unpack("<QQ", blake2b(name.encode(), digest_size=16).digest())
    return low, high


def sealed(session: Old) -> bytes:
    body = pack(session.sid, session.owner, DEFAULT_CODEC, session.payload)
    owner = 0 if session.owner is None else owner_digest(session.owner)
    record = struct.pack("<IIQQQQ", 44 + len(body), 1, *key_of(session.sid), owner, session.created) + body
    return record + struct.pack("<I", zlib.crc32(record))


def owner_digest(owner: str) -> int:
    return int.from_bytes(blake2b(owner.encode(), digest_size=8).digest()) or 1
