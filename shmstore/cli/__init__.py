"""
The command ``shmstore``, which is also ``flask shmstore``: inspect, administer and serve a store.

Only ``serve`` starts the server of a store; ``doctor`` starts one for a small store of its own. Commands never show
session ids, only the first digits of their digests.
"""

from __future__ import annotations

import errno
import io
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from shmstore.cli.copy import copy_sessions
from shmstore.cli.doctor import doctor
from shmstore.cli.output import plain
from shmstore.cli.serve import serve
from shmstore.cli.sessions import clear, logout, ls, prune, rm, show
from shmstore.cli.snapshots import load, save
from shmstore.cli.stats import check, stats, top
from shmstore.cli.stores import stores
from shmstore.errors import ShmStoreError
from shmstore.store.trace import obey_environment

__all__ = ["main"]


class _Group(click.Group):
    """Commands whose expected errors are one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ShmStoreError, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno == errno.EPIPE:
                raise  # the reader has closed the pipe: click handles that
            raise click.ClickException(plain(" ".join(str(exc).split()))) from exc


def _version() -> str:
    try:
        return version("shmstore")
    except PackageNotFoundError:  # run from the source tree
        return "unknown"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="shmstore")
def main() -> None:
    """
    Inspect, administer and serve stores of sessions.

    STORE is a name (shop), a URL (shm://shop) or the path of its directory; or the URL of a store on Redis or Valkey
    (redis://host/0?prefix=shop:), where a command says what it cannot do there.
    """
    obey_environment()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an owner's name may be impossible to encode in this locale


for _command in (
    serve, stores, stats, top, ls, show, rm, logout, prune, clear, save, load, copy_sessions, check, doctor,
):  # fmt: skip
    main.add_command(_command)
