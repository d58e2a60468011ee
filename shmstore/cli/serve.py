"""The command serve: a store without Gunicorn, in the foreground."""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import Any

import click

from shmstore.cli.target import directory_option, url_of
from shmstore.manager import StoreManager
from shmstore.options import parse_size
from shmstore.server import spawn
from shmstore.store.trace import log_to_stderr

log = logging.getLogger("shmstore")


def size_argument(value: str) -> int:
    """Return a number of bytes, as an option gives it: 67108864, 64M, 2GiB."""
    try:
        return parse_size(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


def absolute(value: str) -> str:
    """Return a path as it is from anywhere."""
    return os.path.abspath(value) if value else value  # which is refused


@click.command()
@click.argument("store", metavar="STORE")
@directory_option
@click.option("--memory", type=size_argument, help="Shared memory, reserved at the start: 64M, 2G.  [64M]")
@click.option("--max", type=int, help="The most sessions kept.  [as many as fit]")
@click.option("--max-session", type=size_argument, help="Size of one session at most.")
@click.option("--max-per-owner", type=int, help="The most sessions of one owner.")
@click.option("--ttl", type=float, help="Seconds of life without use; inf: for ever.  [the session's own, else a day]")
@click.option("--check-period", type=float, help="Seconds between automatic prunes; 0: none.  [60]")
@click.option("--recency", type=float, help="Seconds within which reads do not refresh the order of use.  [1]")
@click.option("--lock-timeout", type=float, help="Seconds that waiting for the store's lock may take.  [2]")
@click.option("--stale", is_flag=True, default=None, help="The first read of an expired session still gets it.")
@click.option("--snapshot", type=absolute, help="File that sessions are saved to, and come back from after a reboot.")
@click.option("--snapshot-period", type=float, help="Seconds between snapshots; 0: only at the end.  [300]")
@click.option("--no-persist", "persist", flag_value=False, default=None, help="Remove the store at the end.")
def serve(store: str, **options: Any) -> None:
    """
    Run the server of a store, in the foreground: for systemd, or beside servers that cannot start one.

    It ends on TERM and INT, and so does the store's server if it was started here; the sessions stay, unless
    --no-persist. If the store has a server, that gets these options and is looked after. Options that are functions
    (dispose, length, serializer) need Python: StoreManager, or shmstore.gunicorn.
    """
    log_to_stderr()
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)
    spawn.keep_stderr = True
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
        for each in (signal.SIGTERM, signal.SIGINT):  # what follows is bounded
            signal.signal(each, signal.SIG_IGN)
        manager.shutdown()


def _notify(state: str) -> None:
    """Tell systemd, if that has started us (Type=notify)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(state.encode())
