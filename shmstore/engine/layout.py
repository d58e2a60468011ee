"""
The file of an arena: its layout, its creation, and the checks before an existing file is used.

    page 0      identity of the arena (constant, checksummed), the mutex, the cells of its state
    page 1      the journal: the mutation being applied
    page 2 ..   one row of counters per attached process
    slots       one row of 8-byte cells per session; a slot is named by the index of its row's first cell, a multiple
                of SLOT
    buckets     one cell each: the first slot of a chain of the index
    owners      the same for the index of owners: the first slot of the first owner in a chain of owners
    tombstones  keys of sessions that a request of the same browser has recently removed or renamed, and the time
    blocks      records and free space, in runs of blocks: a cell with the run's length and the next run, then bytes

An all-zero file with this header is an empty arena except for three cells: slot 0 and block 0 mean "none", so creating
an arena need not fill it, however large it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import stat
import struct
import tempfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from shmstore.errors import ConfigError, StoreFull, StoreUnavailable
from shmstore.system.files import open_nofollow, try_lock
from shmstore.system.platform import LIBC, file_system, physical_memory, resource
from shmstore.system.processes import meminfo, memory_left, open_standard_descriptors
from shmstore.system.signals import pass_on_interruption, suppressing

PAGE: Final = 4096
CELL: Final = 8
LOW_HALF: Final = 2**32 - 1  # of a cell that holds two numbers
BLOCK: Final = 32  # bytes, a multiple of CELL; measured, see CONTRIBUTING.md
RUN: Final = 128  # bytes of the shortest run: the limit of fragmentation by sessions that grow and shrink
ROWS: Final = 128  # processes with counters of their own
ROW_CELLS: Final = 8  # one cache line, so that neighbours do not slow each other down
MIN_MEMORY: Final = 64 * 1024
MAX_MEMORY: Final = 128 * 2**30  # block numbers have 32 bits
_MAX_SLOTS: Final = 2**28  # a slot's index has 32 bits
_USUAL_BLOCKS: Final = 256  # bytes of blocks for each slot
_MIN_BLOCKS: Final = 128  # the minimum if more slots are requested
TEMPORARY: Final = ".arena-"
# The mutex identifies its owner by a thread id, which means a different thread in another pid namespace.
_OTHER_NAMESPACE: Final = (
    "{} is in use in another container: the users of a store must see each other's pids (Kubernetes: "
    "shareProcessNamespace: true; Docker: --pid=container:NAME), or give each container a store of its own"
)
_OPEN_ATTEMPTS: Final = 100  # to open a file that other processes replace in the meantime

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

# The cells of a slot, in order. They form a row instead of a column per field: in a large arena a session is then one
# or two cache lines and one page away instead of ten (get, overwrite and touch cost a tenth less at 100 000 sessions, a
# sixth less at 1 000 000), and scanning one field with a stride costs hardly more.
FIELDS: Final = (
    "key_low", "key_high", "record", "expires", "used", "version", "prev", "next", "owner", "chain",
    "owner_links",  # the slots before and after it in the ring of its owner's slots; two halves of a cell
    "owner_head",  # only in the ring's first slot: the number of slots, and the first slot of the bucket's next owner
)  # fmt: skip
SLOT: Final = len(FIELDS)
# header.py defines the cells of the state; a change there needs a new number here.
CELL_NAMES: Final = 7
OWNER_SHARE: Final = 4  # slots per bucket of the index of owners
# A tombstone is the high half of a key and a time; 0 means empty. The low half selects the set. A set is an array of
# key halves followed by an array of times: both are searched in C. Large sets fill evenly; see
# docs/understand/security.md for the consequences.
TOMBSTONE: Final = 2  # cells
TOMBSTONE_WAYS: Final = 32  # per set; the oldest is overwritten
TOMBSTONE_SHARE: Final = 256  # slots per set
TOMBSTONE_TTL: Final = 30 * 10**9  # nanoseconds for which a tombstone counts
RENAMED: Final = 1  # flag in the time of a tombstone: the session was renamed, not removed
_TOMBSTONES: Final = (TOMBSTONE, TOMBSTONE_WAYS, TOMBSTONE_SHARE, RENAMED)

_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT})


class ArenaDamaged(StoreUnavailable):
    """The file is not a usable arena; the message says why."""


class OtherLayout(ArenaDamaged):
    """The file is an arena of another version of shmstore, or of another kind of machine."""


@dataclass(frozen=True)
class Geometry:
    """
    The sizes in one arena, fixed for its lifetime.

    Attributes:
        slots: The maximum number of sessions.
        blocks: The number of blocks that their records share.
        block_size: Bytes of one block.
    """

    slots: int
    blocks: int
    block_size: int = BLOCK

    @classmethod
    def plan(cls, memory: int, max_slots: int | None = None, block_size: int = BLOCK) -> Geometry:
        """
        Divide ``memory`` bytes among slots and blocks.

        With ``max_slots`` there are at most that many slots; without it, one for every 256 bytes of blocks: a session
        of a web application with an id of 43 characters seldom takes less.

        Raises:
            ConfigError: ``memory`` is too small.
        """
        if memory < MIN_MEMORY:
            raise ConfigError(f"memory={memory} is too small: at least {MIN_MEMORY} bytes (64 KiB), 64 MiB is usual")
        # A thousandth is left for the store's other files, so that 64 MiB fit into the 64 MB that Docker provides.
        return cls.of_size(memory - memory // 1024, max_slots, block_size)

    @classmethod
    def of_size(cls, size: int, max_slots: int | None = None, block_size: int = BLOCK) -> Geometry:
        """Divide a file of ``size`` bytes like `plan`, up to its last whole block, so that the size stays the same."""
        tombstones = CELL * TOMBSTONE * TOMBSTONE_WAYS // TOMBSTONE_SHARE
        per_slot = CELL * (SLOT + 1) + CELL // OWNER_SHARE + tombstones  # and its share of the buckets
        # Each region starts on a cache line; two slots and one block are never used; the blocks start on a page.
        room = size - cls(0, 0, block_size).size - PAGE
        slots = room // (per_slot + _USUAL_BLOCKS)
        if max_slots is not None:
            slots = min(max_slots, room // (per_slot + _MIN_BLOCKS))
        slots = min(slots, _MAX_SLOTS)
        return cls(slots, (size - cls(slots, 0, block_size).offsets()["blocks"]) // block_size - 1, block_size)

    def offsets(self) -> dict[str, int]:
        """Return the offset of each region, in bytes."""
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
        """The number of chains in the index: one per session on average when full."""
        return self.slots + 1

    @property
    def owner_buckets(self) -> int:
        """The number of chains in the index of owners, which are fewer than sessions."""
        return self.slots // OWNER_SHARE + 1

    @property
    def tombstone_sets(self) -> int:
        """The number of sets of tombstones. A key's tombstone is in one of them."""
        return self.slots // TOMBSTONE_SHARE + 1

    @property
    def possible(self) -> bool:
        """Whether an arena can have these sizes. They may come from a file; the C core checks the same."""
        return (
            0 < self.slots <= _MAX_SLOTS
            and 0 < self.blocks < 2**32 - 1
            and 2 * CELL <= self.block_size < 2**32
            and not self.block_size % CELL
        )

    @cached_property  # used by each write
    def shortest(self) -> int:
        """The length of the shortest run, in blocks."""
        return -(-RUN // self.block_size)

    def takes(self, length: int) -> int:
        """Return the maximum number of blocks for a record of ``length`` bytes: shortest runs, and longer last ones."""
        return -(-length // (self.shortest * self.block_size - CELL)) * self.shortest + 2 * (self.shortest - 1)

    def holds(self, blocks: int) -> int:
        """Return the minimum number of bytes of a record in that many blocks, however many runs they form."""
        return blocks * self.block_size - blocks * CELL // self.shortest

    @property
    def largest_session(self) -> int:
        """Bytes of the largest session that can be written while its previous version is stored, with id and head."""
        return self.holds(self.blocks) // 2 - 1024

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.offsets()["blocks"] + (self.blocks + 1) * self.block_size


def create(directory: str | os.PathLike[str] | None, geometry: Geometry) -> tuple[int, str]:
    """
    Reserve the file of an empty arena.

    Args:
        directory: The directory of the file; None: anonymous memory that is freed with its last user.
        geometry: The size of the arena.

    Returns:
        A descriptor and the temporary path. The caller completes the arena and then renames the file into place, so
        that it appears complete or not at all.

    Raises:
        StoreFull: The memory is not available.
        StoreUnavailable: No file can be created in the directory.
    """
    open_standard_descriptors()
    if directory is None:
        fd, path = os.memfd_create("shmstore", os.MFD_CLOEXEC), ""
    else:
        try:
            remove_abandoned(directory)
            fd, path = _create_temporary(directory)
        except OSError as error:
            pass_on_interruption(error)
            kind = StoreFull if error.errno in _NO_SPACE else StoreUnavailable
            raise kind(f"no file can be created in {os.fspath(directory)}: {error.strerror}") from error
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


# A process that creates an arena holds a flock on its temporary file, and later a shared one as on any arena. A
# temporary file that can be locked was therefore left by a process that was killed.


def _create_temporary(directory: str | os.PathLike[str]) -> tuple[int, str]:
    while True:
        fd, path = tempfile.mkstemp(prefix=TEMPORARY, dir=directory)
        if try_lock(fd) and os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)  # `remove_abandoned` of another process found it before it was locked
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def remove_abandoned(directory: str | os.PathLike[str]) -> None:
    """
    Remove the files of processes that were killed while they created an arena. Files being created stay.

    Raises:
        OSError: The directory cannot be read.
    """
    for name in os.listdir(directory):
        if not name.startswith(TEMPORARY):
            continue
        path = os.path.join(directory, name)
        with suppressing(OSError):
            fd = open_nofollow(path, os.O_RDWR)
            try:
                if try_lock(fd):
                    os.unlink(path)
            finally:
                os.close(fd)


def _reserve(fd: int, size: int, path: str) -> None:
    # Beyond either limit the OOM killer would act. The size of the tmpfs is a further limit.
    if not path:
        check_available(size)
    elif size > (left := memory_left()):
        raise StoreFull(
            f"cannot reserve {size} bytes: the control group of this process allows {left} more; give a smaller "
            f"memory=, or raise the limit (Docker: --memory; systemd: MemoryMax=)"
        )
    # All of it at once: a full tmpfs is an error here, and never a SIGBUS in the middle of a request.
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        if error.errno == errno.EFBIG:
            maximum, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
            raise StoreFull(
                f"cannot reserve {size} bytes: a file of this process may have {maximum} bytes (ulimit -f, LimitFSIZE= "
                "of systemd); raise that limit, or give a smaller memory="
            ) from error
        where, free = "memory", ""
        if path:
            disk = os.statvfs(path)
            where, free = os.path.dirname(path), f" ({disk.f_bavail * disk.f_frsize} bytes are free)"
        raise StoreFull(
            f"cannot reserve {size} bytes in {where}{free}: give a smaller memory=, or enlarge the file system "
            f"(Docker: --shm-size; otherwise: mount -o remount,size=... {_mount_point(path)})"
        ) from error


def _mount_point(path: str) -> str:
    point = os.path.realpath(path) if path else "/dev/shm"  # noqa: S108
    while not os.path.ismount(point) and path:
        point = os.path.dirname(point)
    return point


def open_file(path: str | os.PathLike[str]) -> tuple[int, Geometry]:
    """
    Open the arena at ``path`` after checking everything that can be checked without mapping it.

    Returns:
        A descriptor, and the geometry that the file itself states.

    Raises:
        FileNotFoundError: The file does not exist.
        ArenaDamaged: The file is not an arena, or not of this user, this boot or this version.
        StoreUnavailable: Processes in another pid namespace use it, or another file replaced it at each attempt.
    """
    open_standard_descriptors()
    for _ in range(_OPEN_ATTEMPTS):
        try:
            fd = open_nofollow(path, os.O_RDWR)
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
        os.close(fd)  # another file has replaced it since it was opened
    raise StoreUnavailable(f"{path} is replaced each time it is opened")


def _check(fd: int, status: os.stat_result, path: str | os.PathLike[str]) -> Geometry:
    user = os.geteuid()
    if not stat.S_ISREG(status.st_mode):
        raise ArenaDamaged(f"{path} is not a regular file")
    if status.st_uid != user and user != 0:
        raise ArenaDamaged(f"{path} belongs to user {status.st_uid}, this process is user {user}")
    if status.st_mode & 0o077 or status.st_nlink != 1:
        raise ArenaDamaged(
            f"{path} is accessible to other users (mode {status.st_mode & 0o777:o}, {status.st_nlink} links)"
        )
    head = os.pread(fd, _IDENTITY.size + _CRC.size, 0)
    if len(head) < _IDENTITY.size + _CRC.size or head[:8] != _MAGIC:
        raise ArenaDamaged(f"{path} is not an arena")
    if _CRC.unpack_from(head, _IDENTITY.size)[0] != zlib.crc32(head[: _IDENTITY.size]):
        raise ArenaDamaged(f"{path} has a damaged header")
    _, version, abi, pids, slots, blocks, block_size, boot = _IDENTITY.unpack_from(head)
    if version == _VERSION and abi != _abi():
        raise OtherLayout(
            f"{path} was created on another machine or with another C library, this is {platform.machine()} with "
            f"{LIBC}: all processes of a store must use the same"
        )
    if version != _VERSION:
        raise OtherLayout(
            f"{path} has layout {version}, this is {_VERSION}: to change the version of shmstore, "
            "stop all processes that use the store, then start them; its sessions are lost, unless it has a snapshot"
        )
    if boot != boot_id() and not (_UNKNOWN_BOOT in (boot, boot_id()) and in_memory(fd)):
        raise ArenaDamaged(f"{path} was created before the last boot of this machine")
    geometry = Geometry(slots, blocks, block_size)
    if not geometry.possible:
        raise ArenaDamaged(f"{path} has a damaged header: {slots} slots, {blocks} blocks of {block_size} bytes")
    if status.st_size != geometry.size:
        raise ArenaDamaged(f"{path} has {status.st_size} bytes instead of {geometry.size}")
    if pids != pid_namespace():
        # For example, its container was restarted. If no process uses the file, its mutex is free and can be recreated.
        # This lock is kept until then, so a process that has already checked the header cannot start to use the file.
        if not try_lock(fd):
            raise StoreUnavailable(_OTHER_NAMESPACE.format(path))
        os.pwrite(fd, _identity(geometry, pid_namespace()), 0)
    return geometry


def check_namespace(fd: int, path: str | os.PathLike[str]) -> None:
    """
    Check again that the users of an arena see each other's pids; called while the shared lock on it is held.

    Raises:
        StoreUnavailable: Processes in another pid namespace have started to use it since it was opened.
    """
    if _IDENTITY.unpack(os.pread(fd, _IDENTITY.size, 0))[3] != pid_namespace():
        raise StoreUnavailable(_OTHER_NAMESPACE.format(path))


def _identity(geometry: Geometry, pids: int) -> bytes:
    """Return the constant start of an arena's first page."""
    head = _IDENTITY.pack(
        _MAGIC, _VERSION, _abi(), pids, geometry.slots, geometry.blocks, geometry.block_size, boot_id()
    )
    return head + _CRC.pack(zlib.crc32(head))


def check_available(size: int) -> None:
    """
    Make sure that this process can get memory of a size.

    Raises:
        StoreFull: It cannot.
    """
    if size > (there := available()):
        raise StoreFull(f"cannot reserve {size} bytes: {there} are available, give a smaller memory=")


def available() -> float:
    """Return how much memory this process can get, in bytes; if unknown, the physical memory of the machine."""
    try:
        free: float = meminfo("MemAvailable")
    except OSError as error:
        pass_on_interruption(error)
        free = physical_memory()
    return min(free, memory_left())


def _abi() -> int:
    # Cells and the mutex have the machine's native format, so a file from another machine or C library is unusable.
    # The layout constants are included, so that a change of them takes effect even if _VERSION is not changed.
    return zlib.crc32(
        repr((platform.machine(), LIBC, FIELDS, OWNER_SHARE, _TOMBSTONES, ROWS, ROW_CELLS, CELL_NAMES, RUN)).encode()
    )


def pid_namespace() -> int:
    """
    Return a number that identifies the set of processes that this one sees by their pids, such as a container's.

    Without /proc, processes with the same root directory count as one set. The number returned then is not used by any
    namespace.

    Raises:
        StoreUnavailable: The mounted /proc belongs to another pid namespace.
    """
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError as error:
        pass_on_interruption(error)
        if os.path.isdir("/proc/1"):
            raise StoreUnavailable(
                "/proc belongs to another pid namespace: mount one for this namespace (unshare --mount-proc)"
            ) from None
        root = os.stat("/")
        return zlib.crc32(repr((root.st_dev, root.st_ino)).encode()) & 0x7FFFFFFF


def boot_id() -> bytes:
    """Return the 16 bytes that identify this boot, since which deadlines are counted; zeros if they are unreadable."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    except (OSError, ValueError) as error:
        pass_on_interruption(error)
        return _UNKNOWN_BOOT


def _check_boot(fd: int, path: str) -> None:
    """Make sure that a later process can tell whether the arena in this file is from the same boot."""
    if boot_id() == _UNKNOWN_BOOT and not in_memory(fd):
        raise StoreUnavailable(
            f"{os.path.dirname(path)} is on a disk, and /proc/sys/kernel/random/boot_id cannot be read "
            "(ProcSubset=pid?): a store there could not be distinguished from one of another boot; name a directory "
            "in a tmpfs"
        )


def in_memory(file: int | str) -> bool:
    """Return whether a file, given by its descriptor or path, is in a file system that does not survive a reboot."""
    return file_system(file) in _MEMORY
