"""Comparison of files by device and inode."""

from __future__ import annotations

import os


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
