"""
Arenas of earlier layouts, as far as it takes to carry their sessions over: one class per layout, none of which changes.

Nothing here is taken from what the present layout is made of: it may have changed since. A new layout adds a class for
the one before it, and an arena of that to tests/data.
"""

from __future__ import annotations

import fcntl
import os
import platform
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from mmap import ACCESS_COPY, mmap
from typing import Final

from shmstore.arena import Arena
from shmstore.errors import StoreUnavailable
from shmstore.layout import ArenaDamaged, boot_id, pid_namespace
from shmstore.lock import LIBC
from shmstore.moving import Carried, fill, fitting
from shmstore.sealed import seal

__all__ = ["EarlierArena"]

_LOW: Final = 2**32 - 1

# The beginning of an arena of any layout: magic, number of the layout, abi.
_ANY: Final = struct.Struct("<8sII")


class EarlierArena:
    """
    The arena of an earlier layout, which nobody uses. Layout 1, the only one there is so far.

    The file is not changed while it is read: what its last writer left half done is settled in a copy.

    Attributes:
        layout: The number of its layout.
        size: Of the file, in bytes.

    Raises:
        FileNotFoundError: There is none.
        ArenaDamaged: It is of no layout that is known, damaged, or not of this user, boot and kind of machine.
        StoreUnavailable: It is in use.
    """

    layout = 1

    _PAGE: Final = 4096
    _IDENTITY: Final = struct.Struct("<8sIIQQQQ16s")  # magic, layout, abi, pids, slots, blocks, block size, boot id
    _HEAD: Final = struct.Struct("<IIQQQQ")  # of a record: length, weight, key, owner, created; at its end is a CRC-32
    # key_low, key_high, record, expires, used, version, prev, next, owner, chain, owner_chain
    _FIELDS: Final = 11
    _RECORD, _EXPIRES, _USED = 2, 3, 4
    _JOURNAL, _JOURNAL_CELLS = 512, 512  # its cells: number, length, then cell and value in turn
    _STATE, _PENDING, _TOP_SLOT = 32, 33, 39
    _MOVED, _CLOSED = 1, 2

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # Who uses it holds it shared. Who comes now waits.
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreUnavailable(
                    f"{path} is in use by processes of another version of shmstore: to go from one to another, stop "
                    f"all of them (`fuser {path}` names them), then start; its sessions are carried over"
                ) from None
            self._read_header()
        except BaseException:
            os.close(self._fd)
            raise
        self._memory = mmap(self._fd, self.size, access=ACCESS_COPY)
        self._cells = memoryview(self._memory).cast("Q")
        self._settle()

    def _read_header(self) -> None:
        """Check what layout 1 checks, by its own rules."""
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o077:
            raise self._unusable("is not a file of this user's alone")
        head = os.pread(self._fd, self._IDENTITY.size + 4, 0)
        _, layout, abi = _ANY.unpack_from(head.ljust(_ANY.size))
        if layout != self.layout:
            raise self._unusable(f"has layout {layout}, in a form that cannot be read here")
        if zlib.crc32(head[:-4]) != int.from_bytes(head[-4:], "little"):
            raise self._unusable("has a damaged header")
        _, _, _, pids, self._slots, self._blocks, self._block_size, boot = self._IDENTITY.unpack_from(head)
        if abi != self._abi() or boot != boot_id() or pids != pid_namespace():
            raise self._unusable("was made by another machine or container, or before this one was started")
        self._place()
        if status.st_size != self.size:
            raise self._unusable(f"has {status.st_size} bytes instead of {self.size}")

    @staticmethod
    def _abi() -> int:
        fields = (
            "key_low", "key_high", "record", "expires", "used", "version", "prev", "next", "owner", "chain",
            "owner_chain",
        )  # fmt: skip
        return zlib.crc32(repr((platform.machine(), LIBC, fields, 4, 48, 128, 8, 4)).encode())

    def _place(self) -> None:
        """Find out where everything is."""
        at = 2 * self._PAGE + 128 * 8 * 8  # header, journal, counters
        self._first_slot = at // 8
        slots = self._slots
        for cells in ((slots + 2) * self._FIELDS, slots + 1, slots // 4 + 1, (slots // 48 + 16) * 4 * 3):
            at += -(-cells * 8 // 64) * 64  # slots, index, index of owners, tombstones
        self._links = at // 8
        at += -(-(self._blocks + 1) * 8 // 64) * 64
        self._data = -(-at // self._PAGE) * self._PAGE
        self.size = self._data + (self._blocks + 1) * self._block_size

    def _unusable(self, why: str) -> ArenaDamaged:
        return ArenaDamaged(f"{self._path} {why}")

    def _settle(self) -> None:
        """Apply what was committed to the journal and not yet done."""
        cells, start = self._cells, self._JOURNAL
        number, length = cells[start], cells[start + 1]
        if cells[self._PENDING] == number and length <= self._JOURNAL_CELLS - 2 and not length & 1:
            plan = cells[start + 2 : start + 2 + length].tolist()
            if all(self._STATE <= cell < self._data // 8 for cell in plan[::2]):
                for cell, value in zip(plan[::2], plan[1::2], strict=True):
                    cells[cell] = value

    def carry_over(self, arena: Arena, progress: Callable[[int], object]) -> tuple[int, int]:
        """
        Put the sessions into an empty arena that nobody else has mapped yet.

        Damaged ones stay behind, and the least recently used if not all fit.

        Returns:
            How many there are, and how many were carried over.
        """
        if self._cells[self._STATE] == self._CLOSED:
            return 0, 0  # its server was killed just before it had removed the store
        slots = self._live_slots()
        lengths = ((self._cells[slot + self._RECORD] >> 32, 0) for slot in slots)
        chosen = slots[: fitting(arena, lengths)]
        return len(slots), fill(arena, self._records(reversed(chosen)), progress)

    def retire(self) -> None:
        """Say to who was about to attach that another file takes its place."""
        os.pwrite(self._fd, struct.pack("@Q", self._MOVED), self._STATE * 8)

    def close(self) -> None:
        """Let go of the file."""
        self._cells.release()
        self._memory.close()
        os.close(self._fd)

    def _live_slots(self) -> list[int]:
        """Return the places of the slots in use, the most recently used first."""
        cells, step = self._cells, self._FIELDS
        first = self._first_slot + step  # slot 0 is none
        last = self._first_slot + min(cells[self._TOP_SLOT], self._slots * step)
        live = [slot for slot in range(first, last + 1, step) if cells[slot + self._RECORD]]
        return sorted(live, key=lambda slot: cells[slot + self._USED], reverse=True)

    def _records(self, slots: Iterator[int]) -> Iterator[Carried]:
        for slot in slots:
            low, high, place, expires, used = self._cells[slot : slot + 5]
            record = self._gather(place & _LOW, place >> 32)
            if len(record) < self._HEAD.size + 4 or zlib.crc32(record[:-4]) != int.from_bytes(record[-4:], "little"):
                continue
            length, weight, *key, owner, created = self._HEAD.unpack_from(record)
            if length == len(record) and key == [low, high]:
                body = record[self._HEAD.size : -4]
                yield seal((low, high), owner, created, body, weight), expires, used

    def _gather(self, block: int, left: int) -> bytes:
        """Return a record from its runs of blocks: the link of a run's first block is its length and the next run."""
        parts = []
        while left > 0 and 0 < block <= self._blocks:
            link = self._cells[self._links + block]
            length = min((link >> 32) * self._block_size, left)
            if not length:
                break
            start = self._data + block * self._block_size
            parts.append(self._memory[start : start + length])
            left -= length
            block = link & _LOW
        return b"".join(parts)
