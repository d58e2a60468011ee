"""Files: opened with care, compared by device and inode, locked; addresses of sockets."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from shmstore.system.platform import fcntl
from shmstore.system.signals import suppressing

LEAVING: Final = 1.0
"""Seconds to wait for the last users of a file: a process that is exiting, a child between fork and exec."""


def open_nofollow(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a file where another user may have put a link, or a FIFO, which would wait for its other end."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)


def identity_of(path: str | None) -> frozenset[object]:
    """Return what identifies a file, whatever path leads to it; an empty set if the file does not exist."""
    with suppressing(OSError, TypeError):
        status = os.stat(path)  # type: ignore[arg-type] # None is a TypeError
        return frozenset({(status.st_dev, status.st_ino)})
    return frozenset()


def is_same_file(path: str | os.PathLike[str], file: int | os.stat_result) -> bool:
    """
    Return whether a path, without following a symbolic link at its end, leads to a given file.

    Args:
        path: May lead to another file, or to no file at all.
        file: An open descriptor of the file, or its status.

    Raises:
        OSError: The path cannot be resolved for another reason than that it does not exist.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(file) if isinstance(file, int) else file)


def try_lock(fd: int, timeout: float = 0.0) -> bool:
    """
    Take the exclusive flock of an open file; return False if other descriptors have a lock on it.

    Args:
        fd: The open file.
        timeout: Seconds to wait for those descriptors to be closed.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
        else:
            return True


def open_directory(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


@contextmanager
def socket_address(path: str) -> Iterator[str]:
    """Make a path fit into an AF_UNIX address, which is limited to 107 bytes, through a descriptor of its directory."""
    # Only if necessary: a process that was root and gave that up (a worker under --user) cannot use its own /proc.
    if len(os.fsencode(path)) <= 107:
        yield path
        return
    directory, name = os.path.split(path)
    if not os.path.exists("/proc/self/fd"):
        raise OSError(errno.ENAMETOOLONG, "without /proc the path of a socket is limited to 107 bytes", path)
    fd = open_directory(directory)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
