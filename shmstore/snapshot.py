"""A store's sessions in a file that survives a reboot.

    header   magic, version, wall clock, clock of the deadlines at the same instant, how many records; CRC-32
    records  each: bytes of the body, weight, key, owner, deadline, last use, created; body; CRC-32 of all of it

Little-endian, the least recently used first. It is a picture without an instant: each session in it is whole, and as it
was at some moment while the picture was taken. Nobody waits for it: it is read without the lock, a few at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from typing import BinaryIO, Final, Protocol

from shmstore.arena import Arena
from shmstore.cells import MAX, NEVER, WEIGHING, WEIGHT
from shmstore.clock import Clock, boottime_ns
from shmstore.errors import SnapshotError
from shmstore.life import REMEMBERED
from shmstore.moving import Carried, fill, fitting
from shmstore.options import Options
from shmstore.reading import Entry
from shmstore.sealed import OVERHEAD, RESIDUE, Key, body_of, head_of, seal

__all__ = ["load", "restore", "save", "set_aside"]

log = logging.getLogger("shmstore")

Progress = Callable[[int, int], object]
"""Called now and then: how many sessions are done, of how many."""


class Held(Protocol):
    """A store, or a proxy of one."""

    arena: Arena
    options: Options


_MAGIC: Final = b"shmsaved"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sIQQQ")
_RECORD: Final = struct.Struct("<IIQQQQQq")
_CRC: Final = struct.Struct("<I")
_FIRST: Final = _HEADER.size + _CRC.size

# So many at a time, and then a pause: who writes sessions gets the processor, whoever else wants it.
_BATCH: Final = 32
_PAUSE: Final = 0.0005  # seconds
_LOCKED: Final = 16  # records per hold of the lock
_STEP: Final = 1024  # records verified between two signs of life
_BUFFER: Final = 2**20


def _unseen(done: int, total: int) -> None:
    """Take note of no progress."""


def save(store: Held | Arena, path: str | os.PathLike[str], progress: Progress = _unseen) -> int:
    """
    Write all sessions of a store to a file, which appears whole or not at all, and return how many.

    Args:
        store: A store of this process, a proxy, or the arena of a store that is stopped.
        path: Where. What is there is replaced if it is a snapshot, and can be read by this user only.
        progress: Called now and then with how many are written, and of how many.

    Raises:
        SnapshotError: It cannot be written, or something else than a snapshot is there. What is there stays.
        StoreTimeout: A session was in the middle of a change for too long: its writer stands still.
    """
    arena, clock = _of(store)
    with _replacing(os.path.abspath(path)) as file:
        while True:
            epoch = arena.epoch
            file.seek(0)
            file.truncate()
            file.write(bytes(_FIRST))
            walls, now = time.time_ns(), clock()
            try:
                written = 0
                for record in _paced(arena, progress):
                    file.write(record)
                    written += 1
            except IndexError:
                if epoch == arena.epoch:
                    raise
            if epoch == arena.epoch:
                break
            # Else it has moved to another file meanwhile, and the rest of what was read are other sessions.
        header = _HEADER.pack(_MAGIC, _VERSION, walls, now, written)
        file.seek(0)
        file.write(header + _CRC.pack(zlib.crc32(header)))
    return written


def load(store: Held | Arena, path: str | os.PathLike[str], progress: Progress = _unseen) -> int:
    """
    Put the sessions of a snapshot into a store that may be in use, and return how many.

    A session that is there is newer and stays, and so does room that others have: of those that do not fit, the most
    recently used are taken. An id that was destroyed or renamed in the last 30 seconds stays gone. Those that are put
    there are the most recently used ones then, in their old order. Time since the snapshot was taken counts as life.

    Args:
        store: As for `save`.
        path: Of the snapshot.
        progress: Called now and then with how many have been looked at, and of how many.

    Raises:
        FileNotFoundError: There is none.
        SnapshotError: It is damaged, not a snapshot, or could have been written by another user. Nothing was changed.
    """
    arena, clock = _of(store)
    with _Snapshot(path, clock(), progress) as snapshot:
        records = snapshot.records(arena, scattered=True)
        loaded: set[Key] = set()
        done = 0
        while batch := list(islice(records, _LOCKED)):
            try:
                arena.lock(2.0)
                for record, expires, used in batch:
                    if _is_welcome(arena, record, loaded, clock()):
                        _, weight, low, high, owner, _ = head_of(record)
                        if weight != 1:
                            arena.cells[WEIGHING] = 1
                        arena.publish(arena.find((low, high)), (low, high), record, owner, expires, used)
                        loaded.add((low, high))
            finally:
                arena.unlock()
            done += len(batch)
            if not done % _BATCH:
                progress(done, snapshot.chosen)
                time.sleep(_PAUSE)
    return len(loaded)


def _is_welcome(arena: Arena, record: bytes, loaded: set[Key], now: int) -> bool:
    _, weight, low, high, _, _ = head_of(record)
    key, slot, most = (low, high), arena.find((low, high)), arena.cells[MAX]
    if key not in loaded:
        buried = arena.buried_at(key)
        if slot or (buried and now - buried < REMEMBERED):
            return False
    return arena.fits(len(record), new=not slot) and (not most or arena.cells[WEIGHT] + weight <= most)


def restore(arena: Arena, path: str | os.PathLike[str], progress: Progress = _unseen) -> int:
    """Put the sessions of a snapshot into an empty arena that nobody else has mapped yet; otherwise like `load`."""
    with _Snapshot(path, boottime_ns(), progress) as snapshot:
        return fill(arena, snapshot.records(arena), lambda done: progress(done, snapshot.chosen))


def set_aside(path: str) -> str | None:
    """
    Rename a snapshot that cannot be read, so that the next one does not replace it; return its new name.

    What is no snapshot at all stays where it is, and `save` will refuse to replace it: that is None.
    """
    try:
        if _is_another(path):
            return None
        names = chain([f"{path}.refused"], (f"{path}.refused.{number}" for number in count(2)))
        aside = next(name for name in names if not os.path.lexists(name))  # what is there is somebody's
        os.rename(path, aside)
    except OSError:
        return None
    return aside


def _of(store: Held | Arena) -> tuple[Arena, Clock]:
    return (store, boottime_ns) if isinstance(store, Arena) else (store.arena, store.options.clock)


# -- writing -----------------------------------------------------------------------------------------------------


def _paced(arena: Arena, progress: Progress) -> Iterator[bytes]:
    slots = arena.live_slots()
    cells = arena.cells
    changing: list[int] = []
    for number, slot in enumerate(reversed(slots)):
        if not number % _BATCH:
            time.sleep(_PAUSE)
            progress(number, len(slots))
        entry = arena.under_lock(slot)  # which it is not: what is just being changed is looked at again
        if entry is not None:
            yield _packed(entry, cells[arena.used + slot])
        elif cells[arena.record + slot]:
            changing.append(slot)
    for slot in changing:
        entry = arena.at(slot, 2.0)
        if entry is not None:
            yield _packed(entry, cells[arena.used + slot])
    progress(len(slots), len(slots))


def _packed(entry: Entry, used: int) -> bytes:
    _, _, expires, (_, weight, low, high, owner, created), sealed = entry
    body = body_of(sealed)
    head = _RECORD.pack(len(body), weight, low, high, owner, expires, used, created)
    return b"".join((head, body, _CRC.pack(zlib.crc32(body, zlib.crc32(head)))))


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Return a file that takes the place of what is at ``path`` when the context ends, and is on the disk then."""
    temporary = f"{path}.new"
    try:
        if _is_another(path):
            raise SnapshotError(f"{path} is no snapshot, so it is not replaced: name another file, or remove it")
        with _begun(temporary) as file:
            try:
                yield file
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
        raise SnapshotError(f"{path} cannot be written: {exc.strerror}") from exc


def _begun(temporary: str) -> BinaryIO:
    """Open the file under its temporary name. One that was left by somebody who was killed is used again."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = open(os.open(temporary, flags, 0o600), "r+b", _BUFFER)  # noqa: SIM115 # returned
    status = os.fstat(file.fileno())
    mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
    ours = mine and os.pread(file.fileno(), len(_MAGIC), 0) in (b"", bytes(len(_MAGIC)), _MAGIC)
    if ours and _locked(file) and _leads_to(temporary, file):
        os.fchmod(file.fileno(), 0o600)
        return file
    file.close()
    raise SnapshotError(
        f"{temporary} is being written by another process" if ours else f"{temporary} is in the way: move or remove it"
    )


def _locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leads_to(path: str, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_another(path: str) -> bool:
    """Return whether there is something at ``path`` that is no snapshot, so not ours to replace or rename."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode):
        return True
    if not status.st_size:
        return False
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        return file.read(len(_MAGIC)) != _MAGIC


# -- reading -----------------------------------------------------------------------------------------------------


class _Snapshot:
    """
    A snapshot that was found to be whole.

    Attributes:
        chosen: How many of its records `records` yields.
    """

    def __init__(self, path: str | os.PathLike[str], now: int, progress: Progress) -> None:
        self._path = os.path.abspath(path)
        self.chosen = 0
        self._file = self._open()
        try:
            self._count, self._shift = self._read_header(now)
            self._lengths, self._weights = array("Q"), array("Q")  # of the body; of `max`
            self._alive = array("Q")  # the numbers of those that have not expired
            for number, length, weight, expires in self._verified():
                if not number % _STEP:
                    progress(0, self._count)  # a sign of life: none is there yet
                self._lengths.append(length)
                self._weights.append(weight)
                if self._moved(expires) > now:
                    self._alive.append(number)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self) -> BinaryIO:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise SnapshotError(f"{self._path} cannot be opened: {exc.strerror}") from exc
        status = os.fstat(fd)
        self._size = status.st_size
        # Who can write it could log in as anybody.
        if stat.S_ISREG(status.st_mode) and status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022:
            return open(fd, "rb", _BUFFER)
        os.close(fd)
        raise SnapshotError(f"{self._path} is not a file that only this user can write, so nothing of it is used")

    def _read_header(self, now: int) -> tuple[int, int]:
        header, crc = self._read(_HEADER.size), self._read(_CRC.size)
        if header[: len(_MAGIC)] != _MAGIC:
            raise SnapshotError(f"{self._path} is no snapshot of a store")
        if _CRC.unpack(crc)[0] != zlib.crc32(header):
            raise self._damaged("its header")
        _, version, walls, then, count = _HEADER.unpack(header)
        if version != _VERSION:
            raise SnapshotError(f"{self._path} is a snapshot of version {version}, this is version {_VERSION}")
        # What has gone by since; nothing, if the clock was set back: no session lives longer than it had left.
        gone = max(0, time.time_ns() - walls)
        return count, now - gone - then

    def _verified(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield number, bytes of the body, weight and deadline of each record, if all is as it was written."""
        for number in range(self._count):
            head = self._read(_RECORD.size)
            length, weight, _, _, _, expires, _, _ = _RECORD.unpack(head)
            if zlib.crc32(self._read(length + _CRC.size), zlib.crc32(head)) != RESIDUE:
                raise self._damaged(f"record {number}")
            yield number, length, weight, expires
        if self._file.read(1):
            raise self._damaged("its end")

    def _read(self, length: int) -> bytes:
        try:
            data = self._file.read(min(length, self._size))  # a length may be damaged
        except OSError as exc:
            raise SnapshotError(f"{self._path} cannot be read: {exc.strerror}") from exc
        if len(data) < length:
            raise self._damaged("its end")
        return data

    def _damaged(self, where: str) -> SnapshotError:
        return SnapshotError(f"{self._path} is damaged at {where}, so nothing of it is used")

    def _moved(self, expires: int) -> int:
        """Return a deadline by today's clock."""
        return expires if expires >= NEVER else expires + self._shift

    def records(self, arena: Arena, *, scattered: bool = False) -> Iterator[Carried]:
        """Yield those that are alive, the least recently used first; of too many for an arena the last ones."""
        alive, lengths, weights, shift = self._alive, self._lengths, self._weights, self._shift
        sizes = ((OVERHEAD + lengths[number], weights[number]) for number in reversed(alive))
        self.chosen = fitting(arena, sizes, scattered=scattered)
        left = len(alive) - self.chosen
        if left:
            log.warning("%s: the %d least recently used sessions of %d find no room", self._path, left, len(alive))
        chosen = iter(alive[left:])
        following = next(chosen, self._count)
        self._file.seek(_FIRST)
        for number, length in enumerate(lengths):
            data = self._read(_RECORD.size + length + _CRC.size)
            if number == following:
                following = next(chosen, self._count)
                _, weight, low, high, owner, expires, used, created = _RECORD.unpack_from(data)
                sealed = seal((low, high), owner, created + shift, data[_RECORD.size : -_CRC.size], weight)
                yield sealed, self._moved(expires), max(used + shift, 1)
