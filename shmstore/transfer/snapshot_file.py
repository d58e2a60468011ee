"""
The file of a snapshot: it appears whole or not at all, is verified before anything of it is used, and is one store's.

    header   magic, version, the store's name, wall clock, clock of the deadlines at the same instant, how many
             records; CRC-32
    records  each: bytes of the body, weight, key, owner, deadline, last use, created; body; CRC-32 of all of it

Little-endian, the least recently used first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Final, NamedTuple, Self

from shmstore.engine.frame import RESIDUE, Key, body_of, seal
from shmstore.engine.header import NEVER
from shmstore.engine.reader import Entry
from shmstore.engine.rebuild import Carried
from shmstore.errors import SnapshotError
from shmstore.system.clock import NS
from shmstore.system.files import is_same_file
from shmstore.system.signals import pass_on_interruption

__all__ = ["Contents", "Progress", "Saved", "Writer", "in_the_way", "replacing"]

Progress = Callable[[int, int], object]
"""Called now and then: how many sessions are done, of how many."""

_MAGIC: Final = b"shmsaved"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sI64sQQQ")
_RECORD: Final = struct.Struct("<IIQQQQQq")
_CRC: Final = struct.Struct("<I")
_FIRST: Final = _HEADER.size + _CRC.size

_OPENINGS: Final = 100  # attempts to open a file that is renamed meanwhile
_STEP: Final = 1024  # records verified between two signs of life
_BUFFER: Final = 2**20


class Contents(NamedTuple):
    """
    What a snapshot holds.

    Attributes:
        store: The name of the store whose it is; empty: a private one's.
        sessions: How many, those included that have expired since.
        age: Seconds since it was taken, by the wall clock; below 0 if that was set back.
    """

    store: str
    sessions: int
    age: float


# -- writing -----------------------------------------------------------------------------------------------------


class Writer:
    """
    Writes the sessions of a store.

    Attributes:
        count: How many it has written.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.begin(0)

    def begin(self, now: int) -> None:
        """Begin, or begin again: nothing is written; it is ``now`` by the clock of the deadlines."""
        self.count = 0
        self._now, self._walls = now, time.time_ns()
        self._file.seek(0)
        self._file.truncate()
        self._file.write(bytes(_FIRST))

    def add(self, entry: Entry, used: int) -> None:
        """Write a session and when it was used last."""
        _, _, expires, (_, weight, low, high, owner, created), sealed = entry
        body = body_of(sealed)
        head = _RECORD.pack(len(body), weight, low, high, owner, expires, used, created)
        self._file.write(b"".join((head, body, _CRC.pack(zlib.crc32(body, zlib.crc32(head))))))
        self.count += 1

    def end(self) -> None:
        """Write the header: it is a snapshot now."""
        header = _HEADER.pack(_MAGIC, _VERSION, self._name.encode(), self._walls, self._now, self.count)
        self._file.seek(0)
        self._file.write(header + _CRC.pack(zlib.crc32(header)))


@contextlib.contextmanager
def replacing(path: str, name: str) -> Iterator[Writer]:
    """
    Return what writes the file that takes the place of ``path`` when the context ends, and is on the disk then.

    Raises:
        SnapshotError: It cannot be written, or what is there is not to be replaced. It stays.
    """
    temporary = f"{path}.new"
    try:
        if what := in_the_way(path, name):
            raise SnapshotError(f"{path} is {what}, so it is not replaced: name another file, or remove it")
        with _begun(temporary) as file:
            try:
                writer = Writer(file, name)
                yield writer
                writer.end()
                file.flush()
                os.fsync(file.fileno())
                os.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
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


def _begun(temporary: str) -> BinaryIO:
    """Open the file under its temporary name. One that was left by somebody who was killed is used again."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for _ in range(_OPENINGS):
        file = open(os.open(temporary, flags, 0o600), "r+b", _BUFFER)  # noqa: SIM115 # returned
        status = os.fstat(file.fileno())
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink <= 1
        ours = mine and os.pread(file.fileno(), len(_MAGIC), 0) in (b"", bytes(len(_MAGIC)), _MAGIC)
        locked = ours and _locked(file)
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


def _locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def in_the_way(path: str, name: str) -> str:
    """Return what there is at ``path`` if that is no snapshot of this store, so not ours to replace or rename."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return ""
    if not stat.S_ISREG(status.st_mode):
        return "no snapshot"
    if not status.st_size:
        return ""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        header, crc = file.read(_HEADER.size), file.read(_CRC.size)
    if header[: len(_MAGIC)] != _MAGIC:
        return "no snapshot"
    if crc == _CRC.pack(zlib.crc32(header)) and _HEADER.unpack(header)[1] == _VERSION and _name_in(header) != name:
        return f"the snapshot of {_called(_name_in(header))}"
    return ""


def _name_in(header: bytes) -> str:
    name: bytes = _HEADER.unpack(header)[2]
    return name.rstrip(b"\0").decode("ascii", "backslashreplace")


def _called(name: str) -> str:
    return f"store {name!r}" if name else "a private store"


# -- reading -----------------------------------------------------------------------------------------------------


class Saved:
    """
    A snapshot that was found to be whole.

    Attributes:
        path: Where it is.
        contents: What it holds.
        alive: The numbers of the records that have not expired, the least recently used first.
        lengths: The bytes of the body of each record; and so the next two.
        weights: How much of ``max`` it takes.
        owners: The digest of its owner, 0 if it has none.
        lows: The lower half of its key.
        highs: The upper half.
    """

    def __init__(self, path: str | os.PathLike[str], now: int, progress: Progress, of: str | None = None) -> None:
        self.path = os.path.abspath(path)
        self._file = self._open()
        self._now = now
        try:
            self.contents, self._shift = self._read_header(now, of)
            self.lengths, self.weights, self.owners, self.alive = array("Q"), array("Q"), array("Q"), array("Q")
            self.lows, self.highs = array("Q"), array("Q")
            for number, length, weight, key, owner, expires in self._verified():
                if not number % _STEP:
                    progress(0, self.contents.sessions)  # a sign of life: none is there yet
                self.lengths.append(length)
                self.weights.append(weight)
                self.owners.append(owner)
                self.lows.append(key[0])
                self.highs.append(key[1])
                if self._moved(expires) > now:
                    self.alive.append(number)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as exc:
            pass_on_interruption(exc)
            raise SnapshotError(f"{self.path} cannot be opened: {exc.strerror}") from exc
        status = os.fstat(fd)
        self._size = status.st_size
        # Who can write it could log in as anybody.
        if stat.S_ISREG(status.st_mode) and status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022:
            return open(fd, "rb", _BUFFER)
        os.close(fd)
        raise SnapshotError(f"{self.path} is not a file that only this user can write, so nothing of it is used")

    def _read_header(self, now: int, of: str | None) -> tuple[Contents, int]:
        header, crc = self._read(_HEADER.size), self._read(_CRC.size)
        if header[: len(_MAGIC)] != _MAGIC:
            raise SnapshotError(f"{self.path} is no snapshot of a store")
        if _CRC.unpack(crc)[0] != zlib.crc32(header):
            raise self._damaged("its header")
        _, version, _, walls, then, count = _HEADER.unpack(header)
        if version != _VERSION:
            raise SnapshotError(f"{self.path} is a snapshot of version {version}, this is version {_VERSION}")
        name = _name_in(header)
        if of is not None and name != of:
            raise SnapshotError(f"{self.path} is the snapshot of {_called(name)}: give each store a file of its own")
        # What has gone by since; nothing, if the clock was set back: no session lives longer than it had left.
        gone = time.time_ns() - walls
        return Contents(name, count, gone / NS), now - max(0, gone) - then

    def _verified(self) -> Iterator[tuple[int, int, int, Key, int, int]]:
        """Yield number, bytes of the body, weight, key, owner and deadline of each record, if all is as written."""
        for number in range(self.contents.sessions):
            head = self._read(_RECORD.size)
            length, weight, low, high, owner, expires, _, _ = _RECORD.unpack(head)
            if zlib.crc32(self._read(length + _CRC.size), zlib.crc32(head)) != RESIDUE:
                raise self._damaged(f"record {number}")
            yield number, length, weight, (low, high), owner, expires
        if self._file.read(1):
            raise self._damaged("its end")

    def _read(self, length: int) -> bytes:
        try:
            data = self._file.read(min(length, self._size))  # a length may be damaged
        except OSError as exc:
            pass_on_interruption(exc)
            raise SnapshotError(f"{self.path} cannot be read: {exc.strerror}") from exc
        if len(data) < length:
            raise self._damaged("its end")
        return data

    def _damaged(self, where: str) -> SnapshotError:
        return SnapshotError(f"{self.path} is damaged at {where}, so nothing of it is used")

    def _moved(self, expires: int) -> int:
        """Return a deadline by today's clock."""
        return expires if expires >= NEVER else expires + self._shift

    def records(self, numbers: Iterable[int]) -> Iterator[Carried]:
        """Yield the records of these numbers, which grow."""
        chosen, shift = iter(numbers), self._shift
        following = next(chosen, -1)
        self._file.seek(_FIRST)
        for number, length in enumerate(self.lengths):
            data = self._read(_RECORD.size + length + _CRC.size)
            if number == following:
                following = next(chosen, -1)
                _, weight, low, high, owner, expires, used, created = _RECORD.unpack_from(data)
                sealed = seal((low, high), owner, created + shift, data[_RECORD.size : -_CRC.size], weight)
                yield sealed, self._moved(expires), min(max(used + shift, 1), self._now)  # may have been damaged
