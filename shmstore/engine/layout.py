"""The file of an arena: where everything lies in it, how it is made, and what is checked before one is believed.

    page 0      what the arena is (constant, checksummed), the mutex, the cells of its state
    page 1      the journal: the mutation being applied
    page 2 ..   one row of counters per attached process
    slots       one row of 8-byte cells per session; a slot is known by the place of its row, so by a multiple of SLOT
    buckets     one cell each: the first slot of a chain of the index
    owners      the same for the index of owners: the first slot of the first owner in a chain of owners
    tombstones  keys of which a request of their own browser has lately removed or renamed the session, and when
    blocks      records, and what is free, in runs of blocks: a cell with its length and the next run, then bytes

An all-zero file with this header is an empty arena but for three cells: slot 0 and block 0 mean "none", so nothing has
to be filled in beforehand however large it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import stat
import struct
import tempfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from shmstore.engine.mutex import LIBC
from shmstore.errors import ConfigError, StoreFull, StoreUnavailable
from shmstore.system.processes import meminfo, memory_left, open_standard_descriptors
from shmstore.system.signals import pass_on_interruption

PAGE: Final = 4096
CELL: Final = 8
BLOCK: Final = 32  # bytes, some cells; measured, see CONTRIBUTING.md
RUN: Final = 128  # bytes of the shortest run: sessions that grow and shrink break them up this far and no further
ROWS: Final = 128  # processes with counters of their own
ROW_CELLS: Final = 8  # one cache line: neighbours do not slow each other down
SMALLEST: Final = 64 * 1024
LARGEST: Final = 128 * 2**30  # block numbers have 32 bits
_MOST: Final = 2**28  # slots: the place of one has 32 bits
_USUAL: Final = 256  # bytes of blocks for each slot
_LEAST: Final = 128  # if more slots are asked for than that gives
TEMPORARY: Final = ".arena-"
# The mutex knows its owner by a thread id, which means another thread in another namespace.
_ELSEWHERE: Final = (
    "{} is in use in another container: the users of a store must see each other's pids (Kubernetes: "
    "shareProcessNamespace: true; Docker: --pid=container:NAME), or give each container a store of its own"
)
_OPENINGS: Final = 100  # attempts to open a file that is replaced meanwhile

_VERSION: Final = 5
_MAGIC: Final = b"shmstore"
_IDENTITY: Final = struct.Struct("<8sIIQQQQ16s")  # magic, version, abi, pids, slots, blocks, block size, boot id
_UNKNOWN_BOOT: Final = bytes(16)
_MEMORY: Final = frozenset({0x01021994, 0x858458F6})  # linux/magic.h: TMPFS_MAGIC, RAMFS_MAGIC
_CRC: Final = struct.Struct("<I")

MUTEX: Final = 128  # byte offset in page 0; the cells of the state start at byte 256
STATE_CELLS: Final = 256 // CELL
JOURNAL: Final = PAGE
JOURNAL_CELLS: Final = PAGE // CELL

# The cells of a slot, in their order. A row, and not a column per field: in a large arena a session is then one or two
# cache lines and one page away instead of ten (get, overwrite and touch cost a tenth less at 100 000 sessions, a sixth
# less at 1 000 000), and scanning one field with a stride costs next to nothing more.
FIELDS: Final = (
    "key_low", "key_high", "record", "expires", "used", "version", "prev", "next", "owner", "chain",
    "owner_links",  # the slots before and after it among those of its owner, which are a ring; two halves of a cell
    "owner_head",  # only in the first of them: how many they are, and the first slot of the next owner in the bucket
)  # fmt: skip
SLOT: Final = len(FIELDS)
# The cells of the state, with what they mean, are in header.py; a change there is a change of this number.
CELL_NAMES: Final = 7
OWNER_SHARE: Final = 4  # slots per bucket of the index of owners
# A tombstone is the high half of a key, in a set that the low half chooses, and when; 0 stands for never. A set is so
# many of the former, then as many of the latter: both are searched in C. Large sets fill evenly: see docs/security.md
# for what follows.
TOMBSTONE: Final = 2  # cells
TOMBSTONE_WAYS: Final = 32  # per set; the oldest is overwritten
TOMBSTONE_SHARE: Final = 256  # slots per set
RENAMED: Final = 1  # in the time of a tombstone: its session was renamed, not removed
_TOMBSTONES: Final = (TOMBSTONE, TOMBSTONE_WAYS, TOMBSTONE_SHARE, RENAMED)

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT})


class ArenaDamaged(StoreUnavailable):
    """The file is not an arena that can be used; the message says why."""


class OtherLayout(ArenaDamaged):
    """The file is an arena of another version of shmstore, or of another kind of machine."""


@dataclass(frozen=True)
class Geometry:
    """
    The size of everything in one arena, fixed for its life.

    Attributes:
        slots: How many sessions fit at most.
        blocks: How many blocks their records share.
        block_size: Bytes of one block.
    """

    slots: int
    blocks: int
    block_size: int = BLOCK

    @classmethod
    def plan(cls, memory: int, most: int | None = None, block_size: int = BLOCK) -> Geometry:
        """
        Divide ``memory`` bytes among slots and blocks.

        With ``most`` there is a slot for each of that many sessions; without, one for every 256 bytes of blocks: a
        session of a web application with an id of 43 characters seldom takes less.

        Raises:
            ConfigError: ``memory`` is too small to be of use.
        """
        if memory < SMALLEST:
            raise ConfigError(f"memory={memory} is too small: at least {SMALLEST} bytes (64 KiB), 64 MiB is usual")
        # A thousandth is left for the store's other files: 64 MiB go into the 64 MB that Docker gives a container.
        return cls.of_size(memory - memory // 1024, most, block_size)

    @classmethod
    def of_size(cls, size: int, most: int | None = None, block_size: int = BLOCK) -> Geometry:
        """Divide a file of that size as `plan` does. It is used up to its last whole block, so the size stays."""
        tombstones = CELL * TOMBSTONE * TOMBSTONE_WAYS // TOMBSTONE_SHARE
        per_slot = CELL * (SLOT + 1) + CELL // OWNER_SHARE + tombstones  # and its share of the buckets
        # Each region starts on a cache line, two slots and one block are never used, the blocks start on a page.
        room = size - cls(0, 0, block_size).size - PAGE
        slots = room // (per_slot + _USUAL)
        if most is not None:
            slots = min(most, room // (per_slot + _LEAST))
        slots = min(slots, _MOST)
        return cls(slots, (size - cls(slots, 0, block_size).offsets()["blocks"]) // block_size - 1, block_size)

    def offsets(self) -> dict[str, int]:
        """Return where each region starts, in bytes."""
        at = 2 * PAGE + ROWS * ROW_CELLS * CELL
        result = {"counters": 2 * PAGE}
        sizes = {"slots": (self.slots + 2) * SLOT, "buckets": self.buckets, "owners": self.owner_buckets}
        sizes["tombstones"] = self.tombstone_sets * TOMBSTONE_WAYS * TOMBSTONE
        for name, cells in sizes.items():
            result[name] = at
            at += -(-cells * CELL // 64) * 64
        result["blocks"] = -(-at // PAGE) * PAGE
        return result

    @property
    def buckets(self) -> int:
        """How many chains the index has: one session each on average when full."""
        return self.slots + 1

    @property
    def owner_buckets(self) -> int:
        """The same for owners, who are fewer."""
        return self.slots // OWNER_SHARE + 1

    @property
    def tombstone_sets(self) -> int:
        """How many sets of tombstones there are; a key's tombstone is in one of them."""
        return self.slots // TOMBSTONE_SHARE + 1

    @cached_property  # each write asks for it
    def shortest(self) -> int:
        """Blocks of the shortest run."""
        return -(-RUN // self.block_size)

    def takes(self, length: int) -> int:
        """Return how many blocks a record of so many bytes takes at most: in shortest runs, the last ones longer."""
        return -(-length // (self.shortest * self.block_size - CELL)) * self.shortest + 2 * (self.shortest - 1)

    def holds(self, blocks: int) -> int:
        """Return how many bytes of a record so many blocks hold at least, however many runs they are."""
        return blocks * self.block_size - blocks * CELL // self.shortest

    @property
    def largest_session(self) -> int:
        """Bytes of the largest session that can be written beside its predecessor, ids and headers included."""
        return self.holds(self.blocks) // 2 - 1024

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.offsets()["blocks"] + (self.blocks + 1) * self.block_size


def create(directory: str | os.PathLike[str] | None, geometry: Geometry) -> tuple[int, str]:
    """
    Reserve the file of an empty arena.

    Args:
        directory: Where, or None for memory that is gone with its last user.
        geometry: Its size.

    Returns:
        A descriptor and the temporary path: the caller finishes the arena, then renames it into place, so that it
        appears whole or not at all.

    Raises:
        StoreFull: The memory cannot be had.
        StoreUnavailable: No file can be made there.
    """
    open_standard_descriptors()
    if directory is None:
        fd, path = os.memfd_create("shmstore", os.MFD_CLOEXEC), ""
    else:
        try:
            remove_abandoned(directory)
            fd, path = _temporary(directory)
        except OSError as error:
            pass_on_interruption(error)
            kind = StoreFull if error.errno in _NO_SPACE else StoreUnavailable
            raise kind(f"no file can be made in {os.fspath(directory)}: {error.strerror}") from error
    try:
        if path:
            _check_boot(fd, path)
        _reserve(fd, geometry.size, path)
        os.pwrite(fd, _identity(geometry, pid_namespace() if path else 0), 0)
    except BaseException:
        os.close(fd)
        if path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        raise
    return fd, path


# A process that makes an arena holds a flock on its temporary file, later a shared one as on any arena. So a temporary
# file that can be locked was left by a process that was killed.


def _temporary(directory: str | os.PathLike[str]) -> tuple[int, str]:
    while True:
        fd, path = tempfile.mkstemp(prefix=TEMPORARY, dir=directory)
        if _lock(fd) and os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)  # `remove_abandoned` of another process has met it before it was locked
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def remove_abandoned(directory: str | os.PathLike[str]) -> None:
    """
    Remove the files of processes that were killed while they made an arena; those that are being made stay.

    Raises:
        OSError: The directory cannot be read.
    """
    for name in os.listdir(directory):
        if not name.startswith(TEMPORARY):
            continue
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                if _lock(fd):
                    os.unlink(path)
            finally:
                os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reserve(fd: int, size: int, path: str) -> None:
    # Beyond either of them the OOM killer would come. What a tmpfs may hold is also limited by its own size.
    if not path and size > (there := available()):
        raise StoreFull(f"cannot reserve {size} bytes: {there} are available, give a smaller memory=")
    if path and size > (left := memory_left()):
        raise StoreFull(
            f"cannot reserve {size} bytes: the control group of this process allows {left} more; give a smaller "
            f"memory=, or raise the limit (Docker: --memory; systemd: MemoryMax=)"
        )
    # All of it now: a full tmpfs is an error here and never a SIGBUS in the middle of somebody's request.
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        if error.errno == errno.EFBIG:
            most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
            raise StoreFull(
                f"cannot reserve {size} bytes: a file of this process may have {most} bytes (ulimit -f, LimitFSIZE= of "
                "systemd); raise that, or give a smaller memory="
            ) from error
        where, free = "memory", ""
        if path:
            disk = os.statvfs(path)
            where, free = os.path.dirname(path), f" ({disk.f_bavail * disk.f_frsize} bytes are free)"
        raise StoreFull(
            f"cannot reserve {size} bytes in {where}{free}: give a smaller memory=, or make it larger "
            f"(Docker: --shm-size; otherwise: mount -o remount,size=... /dev/shm)"
        ) from error


def open_file(path: str | os.PathLike[str]) -> tuple[int, Geometry]:
    """
    Open the arena at ``path`` after checking everything that can be checked from outside.

    Returns:
        A descriptor and the geometry that the file itself states.

    Raises:
        FileNotFoundError: There is none.
        ArenaDamaged: It is not an arena, not of this user, not of this boot or not of this version.
        StoreUnavailable: Processes of another pid namespace use it; or another file took its place at each attempt.
    """
    open_standard_descriptors()
    for _ in range(_OPENINGS):
        try:
            # NONBLOCK: opening a FIFO must not wait for its other end.
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as error:
            pass_on_interruption(error)
            raise ArenaDamaged(f"{path} cannot be opened: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            if status.st_nlink:
                return fd, _check(fd, status, path)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another file has taken its place since it was opened
    raise StoreUnavailable(f"{path} is replaced each time it is opened")


def _check(fd: int, status: os.stat_result, path: str | os.PathLike[str]) -> Geometry:
    me = os.geteuid()
    if not stat.S_ISREG(status.st_mode):
        raise ArenaDamaged(f"{path} is not a regular file")
    if status.st_uid != me and me != 0:
        raise ArenaDamaged(f"{path} belongs to user {status.st_uid}, this process is user {me}")
    if status.st_mode & 0o077 or status.st_nlink != 1:
        raise ArenaDamaged(f"{path} is open to others (mode {status.st_mode & 0o777:o}, {status.st_nlink} links)")
    head = os.pread(fd, _IDENTITY.size + _CRC.size, 0)
    if len(head) < _IDENTITY.size + _CRC.size or head[:8] != _MAGIC:
        raise ArenaDamaged(f"{path} is not an arena")
    if _CRC.unpack_from(head, _IDENTITY.size)[0] != zlib.crc32(head[: _IDENTITY.size]):
        raise ArenaDamaged(f"{path} has a damaged header")
    _, version, abi, pids, slots, blocks, block_size, boot = _IDENTITY.unpack_from(head)
    if version == _VERSION and abi != _abi():
        raise OtherLayout(
            f"{path} was made by another machine or C library, this is {platform.machine()} with {LIBC}: "
            "all processes of a store must use the same"
        )
    if version != _VERSION:
        raise OtherLayout(
            f"{path} has layout {version}, this is {_VERSION}: to go from one version of shmstore to another, "
            "stop all processes that use the store, then start them; its sessions are lost, unless it has a snapshot"
        )
    if boot != boot_id() and not (_UNKNOWN_BOOT in (boot, boot_id()) and in_memory(fd)):
        raise ArenaDamaged(f"{path} was made before this machine was started")
    geometry = Geometry(slots, blocks, block_size)
    if status.st_size != geometry.size:
        raise ArenaDamaged(f"{path} has {status.st_size} bytes instead of {geometry.size}")
    if pids != pid_namespace():
        # For example, its container was restarted. If no process uses the file, none holds its mutex, and a new mutex
        # is made. The lock is kept until then: a process that checked the head before cannot begin to use the file.
        if not _lock(fd):
            raise StoreUnavailable(_ELSEWHERE.format(path))
        os.pwrite(fd, _identity(geometry, pid_namespace()), 0)
    return geometry


def check_namespace(fd: int, path: str | os.PathLike[str]) -> None:
    """
    Make sure once more that the users of an arena see each other's pids; called when the shared lock on it is held.

    Raises:
        StoreUnavailable: Processes of another pid namespace have begun to use it since it was opened.
    """
    if _IDENTITY.unpack(os.pread(fd, _IDENTITY.size, 0))[3] != pid_namespace():
        raise StoreUnavailable(_ELSEWHERE.format(path))


def _identity(geometry: Geometry, pids: int) -> bytes:
    """Return the constant head of an arena's first page."""
    head = _IDENTITY.pack(
        _MAGIC, _VERSION, _abi(), pids, geometry.slots, geometry.blocks, geometry.block_size, boot_id()
    )
    return head + _CRC.pack(zlib.crc32(head))


def available() -> int:
    """Return how much memory there is for this process, in bytes; where it is not told, all that the machine has."""
    try:
        free = meminfo("MemAvailable")
    except OSError:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(free, memory_left()))


def _abi() -> int:
    # Cells and the mutex are in the machine's own form: a file that another machine or C library wrote is not ours.
    # The places of the fields and cells are in it too, so that no change of them can be forgotten in _VERSION.
    return zlib.crc32(
        repr((platform.machine(), LIBC, FIELDS, OWNER_SHARE, _TOMBSTONES, ROWS, ROW_CELLS, CELL_NAMES, RUN)).encode()
    )


def pid_namespace() -> int:
    """
    Return what tells the set of processes that this one can see, by their pids, from others: containers'.

    Where there is no /proc, processes with one root directory count as one set. No namespace
    has the number that is returned then.

    Raises:
        StoreUnavailable: The mounted /proc belongs to another pid namespace.
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        if os.path.isdir("/proc/1"):
            raise StoreUnavailable(
                "/proc belongs to another pid namespace: mount one for this namespace (unshare --mount-proc)"
            ) from None
        root = os.stat("/")
        return zlib.crc32(repr((root.st_dev, root.st_ino)).encode()) & 0x7FFFFFFF


def boot_id() -> bytes:
    """Return the 16 bytes that identify this boot: deadlines are counted from it. Zeros if they cannot be read."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return _UNKNOWN_BOOT


def _check_boot(fd: int, path: str) -> None:
    """Make sure that an arena in that file will be known to be of this boot, or of another."""
    if boot_id() == _UNKNOWN_BOOT and not in_memory(fd):
        raise StoreUnavailable(
            f"{os.path.dirname(path)} is on a disk, and /proc/sys/kernel/random/boot_id cannot be read "
            "(ProcSubset=pid?): a store there could not be told from one of another boot; name a directory in a tmpfs"
        )


def in_memory(file: int | str) -> bool:
    """Return whether a file, by its descriptor or path, is in a file system that no boot outlasts."""
    status = (ctypes.c_long * 64)()  # a struct statfs begins with its f_type
    failed = _libc.fstatfs(file, status) if isinstance(file, int) else _libc.statfs(os.fsencode(file), status)
    return not failed and status[0] in _MEMORY


_libc: Final = ctypes.CDLL(None)
