"""The command stores: lists the stores on this host."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import click

from shmstore.cli.output import plain, print_json
from shmstore.cli.target import json_option
from shmstore.engine import layout
from shmstore.engine.header import SESSIONS
from shmstore.engine.layout import CELL
from shmstore.errors import StoreUnavailable
from shmstore.ipc.directory import ARENA, DEFAULT, StoreFiles, user_of
from shmstore.options import format_size
from shmstore.system.files import open_nofollow
from shmstore.system.platform import LACKING
from shmstore.system.processes import open_files

_TITLES = ("STORE", "USER", "SERVER", "SESSIONS", "MEMORY", "PATH")


class Found(NamedTuple):
    """A store: its name, user, server (None: not running), sessions, bytes of memory and the path of its directory."""

    name: str
    user: str
    server_pid: int | None
    sessions: int
    memory: int
    path: str


@click.command()
@json_option
def stores(as_json: bool) -> None:
    """
    List the stores of this host.

    These are your own stores, or those of all users if you are root: all in /dev/shm/shmstore-UID, and those in other
    directories that a process has open.
    """
    if LACKING:
        raise StoreUnavailable(LACKING)
    found = list(_found())
    hidden = [path for path in sorted(glob.glob(f"{DEFAULT}*")) if not os.access(path, os.R_OK | os.X_OK)]
    if as_json:
        print_json({"stores": [each._asdict() for each in found], "hidden": hidden})
        return
    rows = [_TITLES, *map(_row, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, user, *numbers, path in rows:
        shown = [f"{name:<{widths[0]}}", f"{user:<{widths[1]}}"]
        shown += [f"{each:>{width}}" for each, width in zip(numbers, widths[2:5], strict=True)]
        click.echo(" ".join([*shown, path]))  # a path is not cut: it names the store
    for path in hidden:
        click.echo(f"{plain(path)} belongs to another user: only that user and root can read it", err=True)


def _row(found: Found) -> tuple[str, ...]:
    server = str(found.server_pid or "-")
    size = format_size(found.memory)
    # Another user may have named the directories.
    return plain(found.name), plain(found.user), server, str(found.sessions), size, plain(found.path)


def _found() -> Iterator[Found]:
    open_ones = {path for path, _ in open_files(ARENA)}
    for path in sorted({*glob.glob(f"{DEFAULT}*/*/{ARENA}"), *open_ones}):
        # Without Arena.open: root reads files of other users here, and must not trust anything else in them.
        with suppress(OSError):
            fd = open_nofollow(path)
            try:
                status = os.fstat(fd)
                head = os.pread(fd, len(layout._MAGIC), 0)
                count = int.from_bytes(os.pread(fd, CELL, SESSIONS * CELL), sys.byteorder)
            finally:
                os.close(fd)
            if head == layout._MAGIC:
                files = StoreFiles(os.path.dirname(path), status.st_uid, status.st_gid, False)
                yield Found(files.name, user_of(status.st_uid), files.server(), count, status.st_size, files.path)
