"""
The file of a snapshot: it appears whole or not at all, is verified before any of it is used, and belongs to one store.

    header   magic, version, the store's name, boot id, wall clock, clock of the deadlines at the same moment, number of
             records; CRC-32
    records  each: bytes of the body, weight, key, owner, deadline, last use, created; body; CRC-32 of all of it

Little-endian, the least recently used first. The clock of the deadlines is the one since the boot: within the same boot
all times are exact. In another boot the wall clock tells how much time has passed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time
import zlib
from array import array
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from itertools import count
from typing import BinaryIO, Final, NamedTuple, Self

from shmstore.engine.frame import OVERHEAD, RESIDUE, Key, TimedRecord, body_of, head_of, seal
from shmstore.engine.header import NEVER
from shmstore.engine.layout import boot_id
from shmstore.errors import SnapshotError
from shmstore.system.clock import NS, boottime_ns
from shmstore.system.files import identity_of, is_same_file, open_nofollow, try_lock
from shmstore.system.platform import LACKING
from shmstore.system.signals import pass_on_interruption, suppressing
from shmstore.transfer.copy import COPIED, Progress, Survey, quiet

__all__ = ["Contents", "SnapshotSink", "SnapshotSource", "set_aside", "writing"]

_MAGIC: Final = b"shmsaved"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sI64s16sQQQ")
_RECORD: Final = struct.Struct("<IIQQQQQq")
_CRC: Final = struct.Struct("<I")
_FIRST: Final = _HEADER.size + _CRC.size

_OPENINGS: Final = 100  # attempts to open a file that is renamed meanwhile
_STEP: Final = 1024  # records verified between two calls of `progress`
_BUFFER: Final = 2**20
_PAUSE: Final = 0.0005  # seconds between two batches: others get the processor


class Contents(NamedTuple):
    """
    What a snapshot holds.

    Attributes:
        store: The name of the store that it belongs to; empty: a private one.
        sessions: How many sessions it has, including those that have expired since.
        age: Seconds since it was taken, by the wall clock; below 0 if that was set back.
    """

    store: str
    sessions: int
    age: float


# -- writing -----------------------------------------------------------------------------------------------------


class SnapshotSink:
    """A snapshot that is being written: a `shmstore.transfer.copy.Sink`. It replaces the earlier one as a whole."""

    shared = False

    def __init__(self, file: BinaryIO, path: str, name: str) -> None:
        self.label, self.places = path, identity_of(path)
        self._file, self._name, self._count = file, name, 0
        self._walls, self._now = time.time_ns(), boottime_ns()
        file.truncate()
        file.write(bytes(_FIRST))

    def choose(self, survey: Survey) -> dict[int, str]:
        return {}

    def put(self, records: Sequence[TimedRecord]) -> list[str]:
        for sealed, deadline, used in records:
            _, weight, low, high, owner, created = head_of(sealed)
            body = body_of(sealed)
            head = _RECORD.pack(len(body), weight, low, high, owner, deadline, max(1, used), created)
            self._file.write(b"".join((head, body, _CRC.pack(zlib.crc32(body, zlib.crc32(head))))))
        self._count += len(records)
        time.sleep(_PAUSE)
        return [COPIED] * len(records)

    def missing(self, keys: AbstractSet[Key]) -> set[Key]:
        return set()

    def finish(self) -> None:
        """Write the header: the file is a snapshot now."""
        header = _HEADER.pack(
            _MAGIC, _VERSION, self._name.encode(), boot_id(), self._walls, self._now, self._count
        )  # fmt: skip
        self._file.seek(0)
        self._file.write(header + _CRC.pack(zlib.crc32(header)))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], name: str) -> Iterator[SnapshotSink]:
    """
    Return a sink whose file replaces ``path`` when the context ends without an error, and is on the disk then.

    Raises:
        SnapshotError: The file cannot be written, or ``path`` is not to be replaced, which stays as it is.
    """
    _check_platform()
    path = os.path.abspath(path)
    temporary = f"{path}.new"
    try:
        if what := in_the_way(path, name):
            raise SnapshotError(f"{path} is {what}, so it is not replaced: name another file, or remove it")
        with _begun(temporary) as file:
            try:
                sink = SnapshotSink(file, path, name)
                yield sink
                sink.finish()
                file.flush()
                os.fsync(file.fileno())
                os.rename(temporary, path)
            except BaseException:
                with suppressing(OSError):
                    os.unlink(temporary)
                raise
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as exc:
        pass_on_interruption(exc)
        raise SnapshotError(f"{path} cannot be written: {exc.strerror}") from exc


def _check_platform() -> None:
    if LACKING:
        raise SnapshotError(f"there are no snapshots on this platform: {LACKING}")


def _begun(temporary: str) -> BinaryIO:
    """Open the file under its temporary name. A file that a killed process has left is used again."""
    for _ in range(_OPENINGS):
        file = open(open_nofollow(temporary, os.O_RDWR | os.O_CREAT), "r+b", _BUFFER)  # noqa: SIM115 # returned
        status = os.fstat(file.fileno())
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink <= 1
        ours = mine and os.pread(file.fileno(), len(_MAGIC), 0) in (b"", bytes(len(_MAGIC)), _MAGIC)
        locked = ours and try_lock(file.fileno())
        if locked and is_same_file(temporary, file.fileno()):
            os.fchmod(file.fileno(), 0o600)
            return file
        file.close()
        if not ours:
            raise SnapshotError(f"{temporary} is in the way: move or remove it")
        if not locked:
            break
        # Else another process has just finished, and has renamed it since it was opened.
    raise SnapshotError(f"{temporary} is being written by another process")


def in_the_way(path: str, name: str) -> str:
    """Return what is at ``path`` if it is not a snapshot of this store, and so must not be replaced or renamed."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return ""
    if not stat.S_ISREG(status.st_mode):
        return "not a snapshot"
    if not status.st_size:
        return ""
    with open(open_nofollow(path), "rb") as file:
        header, crc = file.read(_HEADER.size), file.read(_CRC.size)
    if header[: len(_MAGIC)] != _MAGIC:
        return "not a snapshot"
    if crc == _CRC.pack(zlib.crc32(header)) and _HEADER.unpack(header)[1] == _VERSION and _name_in(header) != name:
        return f"the snapshot of {_called(_name_in(header))}"
    return ""


def set_aside(path: str, name: str) -> str | None:
    """
    Rename a snapshot that cannot be read, so that the next one does not replace it; return its new path.

    A file that is not a snapshot of the store ``name`` stays where it is, and is never replaced: None.
    """
    try:
        if in_the_way(path, name):
            return None
        paths = (f"{path}.refused" if number == 1 else f"{path}.refused.{number}" for number in count(1))
        aside = next(each for each in paths if not os.path.lexists(each))  # another file of that name stays
        os.rename(path, aside)
    except OSError as exc:
        pass_on_interruption(exc)
        return None
    return aside


def _name_in(header: bytes) -> str:
    name: bytes = _HEADER.unpack(header)[2]
    return name.rstrip(b"\0").decode("ascii", "backslashreplace")


def _called(name: str) -> str:
    return f"store {name!r}" if name else "a private store"


# -- reading -----------------------------------------------------------------------------------------------------


class SnapshotSource:
    """
    A snapshot that was found to be whole: a `shmstore.transfer.copy.Source`. Time since it was taken counts as life.

    Args:
        path: Its file.
        progress: Called now and then while it is verified.
        of: The name of the store that it must belong to; None: any store.

    Attributes:
        contents: What it holds.

    Raises:
        FileNotFoundError: There is no such file.
        SnapshotError: The file is damaged, not a snapshot, another store's, or another user could have written it.
    """

    def __init__(self, path: str | os.PathLike[str], progress: Progress = quiet, of: str | None = None) -> None:
        self.label = os.path.abspath(path)
        self.damaged: list[Key] = []
        self._file = self._open()
        self.places = identity_of(self.label)
        try:
            self.contents, self._shift = self._read_header(of)
            self._survey, self._offsets = self._verify(progress)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        _check_platform()
        try:
            fd = open_nofollow(self.label)
        except FileNotFoundError:
            raise
        except OSError as exc:
            pass_on_interruption(exc)
            raise SnapshotError(f"{self.label} cannot be opened: {exc.strerror}") from exc
        status = os.fstat(fd)
        self._size = status.st_size
        # A user who can write it could log in as any other.
        if stat.S_ISREG(status.st_mode) and status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022:
            return open(fd, "rb", _BUFFER)
        os.close(fd)
        raise SnapshotError(f"{self.label} is not a file that only this user can write, so nothing of it is used")

    def _read_header(self, of: str | None) -> tuple[Contents, int]:
        header, crc = self._read(_HEADER.size), self._read(_CRC.size)
        if header[: len(_MAGIC)] != _MAGIC:
            raise SnapshotError(f"{self.label} is not a snapshot of a store")
        if _CRC.unpack(crc)[0] != zlib.crc32(header):
            raise self._damage("its header")
        _, version, _, boot, walls, then, sessions = _HEADER.unpack(header)
        if version != _VERSION:
            raise SnapshotError(f"{self.label} is a snapshot of version {version}, this is version {_VERSION}")
        name = _name_in(header)
        if of is not None and name != of:
            raise SnapshotError(f"{self.label} is the snapshot of {_called(name)}: give each store a file of its own")
        age = time.time_ns() - walls
        contents = Contents(name, sessions, age / NS)
        if any(boot) and boot == boot_id():
            return contents, 0
        # If the wall clock was set back, no time has passed: no session lives longer than it had left.
        return contents, boottime_ns() - max(0, age) - then

    def _verify(self, progress: Progress) -> tuple[Survey, array[int]]:
        """Read all of the file, and return the live sessions and the offsets of their records; raises if damaged."""
        now, offset = boottime_ns(), _FIRST
        rows = array("Q")
        for number in range(self.contents.sessions):
            if not number % _STEP:
                progress(0, self.contents.sessions)  # a sign of life: none is copied yet
            head = self._read(_RECORD.size)
            length, weight, low, high, owner, deadline, _, _ = _RECORD.unpack(head)
            if zlib.crc32(self._read(length + _CRC.size), zlib.crc32(head)) != RESIDUE:
                raise self._damage(f"record {number}")
            if self._shifted(deadline) > now:
                rows.extend((low, high, OVERHEAD + length, weight, owner, offset))
            offset += _RECORD.size + length + _CRC.size
        if self._file.read(1):
            raise self._damage("its end")
        columns = [rows[at::6] for at in range(6)]
        lows, highs, *_ = columns
        if len(set(lows)) < len(lows):
            # The last of several records with one key counts: its session was ended and begun again during the save.
            last = sorted(dict(zip(zip(lows, highs, strict=True), range(len(lows)), strict=True)).values())
            columns = [array("Q", [column[at] for at in last]) for column in columns]
        return Survey(*columns[:5]), columns[5]

    def _read(self, length: int) -> bytes:
        try:
            data = self._file.read(min(length, self._size))  # a length may be damaged
        except OSError as exc:
            pass_on_interruption(exc)
            raise SnapshotError(f"{self.label} cannot be read: {exc.strerror}") from exc
        if len(data) < length:
            raise self._damage("its end")
        return data

    def _damage(self, where: str) -> SnapshotError:
        return SnapshotError(f"{self.label} is damaged at {where}, so nothing of it is used")

    def _shifted(self, deadline: int) -> int:
        """Return a deadline by the clock of this boot."""
        return deadline if deadline >= NEVER else deadline + self._shift

    def survey(self, progress: Progress) -> Survey:
        return self._survey

    def read(self, numbers: Sequence[int]) -> list[TimedRecord]:
        records, now, shift = list[TimedRecord](), boottime_ns(), self._shift
        for number in numbers:
            self._file.seek(self._offsets[number])
            data = self._read(self._survey.sizes[number] - OVERHEAD + _RECORD.size + _CRC.size)
            _, weight, low, high, owner, deadline, used, created = _RECORD.unpack_from(data)
            if (deadline := self._shifted(deadline)) > now:
                sealed = seal((low, high), owner, created + shift, data[_RECORD.size : -_CRC.size], weight)
                records.append((sealed, deadline, min(max(used + shift, 1), now)))
        return records
