"""The command serve: runs the server of a store in the foreground."""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import Any

import click

from shmstore.cli.target import complete, directory_option, files_of, url_of
from shmstore.client import spawn
from shmstore.options import parse_size
from shmstore.store.trace import log_to_stderr

log = logging.getLogger("shmstore")


def size_argument(value: str) -> int:
    """Return the number of bytes that an argument means: 67108864, 64M, 2GiB."""
    try:
        return parse_size(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


def absolute_path(value: str) -> str:
    """Return a path that does not depend on the working directory."""
    return os.path.abspath(value) if value else value  # an empty path is refused later


@click.command()
@click.argument("store", metavar="STORE", shell_complete=complete)
@directory_option
@click.option(
    "--memory", metavar="SIZE", type=size_argument, help="Shared memory, reserved at the start: 64M, 2G.  [64M]"
)
@click.option("--max", metavar="N", type=int, help="Maximum number of sessions.  [as many as fit]")
@click.option("--max-session", metavar="SIZE", type=size_argument, help="Maximum size of one session.")
@click.option("--max-per-owner", metavar="N", type=int, help="Maximum number of sessions of one owner.")
@click.option(
    "--ttl",
    metavar="SECONDS",
    type=float,
    help="How long an unused session lives; inf: forever.  [its cookie's max_age, else a day]",
)
@click.option("--check-period", metavar="SECONDS", type=float, help="Time between automatic prunes; 0: off.  [60]")
@click.option("--recency", metavar="SECONDS", type=float, help="How often reads refresh the order of use.  [1]")
@click.option("--lock-timeout", metavar="SECONDS", type=float, help="Maximum wait for the store's lock.  [2]")
@click.option("--stale", is_flag=True, default=None, help="Return an expired session once, at its first read.")
@click.option(
    "--snapshot",
    metavar="PATH",
    type=absolute_path,
    help="File to save sessions to, and to load them from after a reboot.",
)
@click.option(
    "--snapshot-period", metavar="SECONDS", type=float, help="Time between snapshots; 0: only at the end.  [300]"
)
@click.option("--no-persist", "persist", flag_value=False, default=None, help="Remove the store at the end.")
def serve(store: str, **options: Any) -> None:
    """
    Run the server of a store in the foreground.

    It is for systemd, and for applications whose own server cannot start a store: uWSGI, waitress.
    TERM and INT end it, and with it the store's server if this command started it; the sessions stay, unless
    --no-persist. If the store already has a server, that server gets these options and is supervised. Options that are
    functions (dispose, length, serializer) need Python: StoreManager, or shmstore.gunicorn.
    """
    files_of(store, options.get("directory"))  # a private store needs no server
    log_to_stderr()
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    spawn.keep_stderr = True
    from shmstore.manager import StoreManager  # only now: it takes as long to import as all else

    manager = StoreManager(url_of(store), **{name: value for name, value in options.items() if value is not None})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        manager.start()
        log.info("serving the store at %s", manager.address)
        _notify("READY=1")
        while not manager.wait(60):
            pass
    except KeyboardInterrupt:
        log.info("asked to end")
    finally:
        for each in (signal.SIGTERM, signal.SIGINT):  # the shutdown takes a bounded time
            signal.signal(each, signal.SIG_IGN)
        manager.shutdown()


def _notify(state: str) -> None:
    """Notify systemd, if it has started this process (Type=notify)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(state.encode())
