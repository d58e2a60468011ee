"""Comparison of files by device and inode."""

from __future__ import annotations

import os
from contextlib import suppress


def identity_of(path: str | None) -> frozenset[object]:
    """Return what identifies a file, whatever path leads to it; an empty set if the file does not exist."""
    with suppress(OSError, TypeError):
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
