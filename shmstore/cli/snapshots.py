"""Commands about snapshots: save, load."""

from __future__ import annotations

import click

from shmstore import snapshot
from shmstore.cli.output import print_json, progress, sessions
from shmstore.cli.target import Target, json_option, on_store


class _Done:
    """How far a snapshot is."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, done: int, total: int) -> None:
        self.done = done


@click.command()
@on_store
@click.argument("path", type=click.Path(dir_okay=False))
@json_option
def save(target: Target, path: str, as_json: bool) -> None:
    """
    Save all sessions to a file, which appears whole or not at all.

    Nobody waits for it. It opens every session that is in it, so only this user may read it.
    """
    at = _Done()
    with progress("saving", target.store.length(), lambda: at.done):
        count = snapshot.save(target.store, path, at)
    if as_json:
        print_json({"saved": count, "path": path})
    else:
        click.echo(f"{sessions(count)} saved to {path}")


@click.command()
@on_store
@click.argument("path", type=click.Path(dir_okay=False))
@json_option
def load(target: Target, path: str, as_json: bool) -> None:
    """
    Put the sessions of a snapshot into a store.

    Those that are there already stay as they are, and nobody is evicted. Who logged out after the snapshot was taken is
    logged in again.
    """
    with progress("loading"):
        count = snapshot.load(target.store, path)
    if as_json:
        print_json({"loaded": count, "path": path})
    else:
        click.echo(f"{sessions(count)} loaded from {path}")
