"""
The command ``shmstore``, which is also ``flask shmstore``: inspect, administer and serve a store.

Only ``serve`` starts the server of a store; ``doctor`` starts one for a small store of its own. Commands never show
session ids, only the first digits of their digests.
"""

from __future__ import annotations

import errno
import io
import sys
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any, Final

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

_GROUPS: Final = {
    "Look at stores": (stores, stats, top, ls, show),
    "Change sessions": (logout, rm, prune, clear),
    "Save and move sessions": (save, load, copy_sessions),
    "Find problems": (doctor, check),
    "Run a server": (serve,),
}
_EXAMPLES: Final = (
    ("shmstore ls shop --owner ada", "the sessions of a user"),
    ("shmstore logout shop ada", "log that user out everywhere"),
    ("shmstore stats shop --json", "figures for a script"),
    ("sudo -u www-data shmstore top shop", "a store of another user"),
    ("shmstore doctor", "can a store run on this machine?"),
)


class _Group(click.Group):
    """Commands by what they are for, whose expected errors are one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ShmStoreError, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno == errno.EPIPE:
                raise  # the reader has closed the pipe: click handles that
            raise click.ClickException(plain(" ".join(str(exc).split()))) from exc

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, group in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{each.name:<{width}}", each.get_short_help_str(limit=200)) for each in group])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            formatter.write_dl(_EXAMPLES, col_max=40)
        formatter.write_paragraph()
        formatter.write_text("`shmstore COMMAND --help` describes a command.")
        formatter.write_text(f"Documentation: {_metadata().get('Documentation', 'docs/index.md of the sources')}")


def _metadata() -> dict[str, str]:
    """Return the version of the installed package, and its URLs by their labels."""
    try:
        found = metadata("shmstore")
    except PackageNotFoundError:  # run from the source tree
        return {"Version": "unknown"}
    urls = [each.split(", ", 1) for each in found.get_all("Project-URL") or ()]
    return {"Version": found["Version"], **dict(urls)}


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_metadata()["Version"], prog_name="shmstore")
def main() -> None:
    """
    Inspect, administer and serve stores of sessions.

    STORE is the name of a store (shop), its URL (shm://shop), the path of its directory, or the URL of a store on
    Redis or Valkey (redis://host/0?prefix=shop:). Only the user that owns a store of this host can open it.
    """
    obey_environment()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an owner's name may be impossible to encode in this locale


for _commands in _GROUPS.values():
    for _command in _commands:
        main.add_command(_command)
