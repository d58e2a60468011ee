"""Commands about snapshots: save, load."""

from __future__ import annotations

import click

from shmstore import snapshot
from shmstore.cli.copy import fail_if_incomplete
from shmstore.cli.output import print_json, sessions, steps
from shmstore.cli.target import Target, json_option, on_arena
from shmstore.contract import ArenaStore
from shmstore.store.endpoint import MemoryEndpoint
from shmstore.transfer.copy import copy
from shmstore.transfer.snapshot_file import SnapshotSource


@click.command()
@on_arena("shmstore copy URL FILE saves its sessions")
@click.argument("path", type=click.Path(dir_okay=False))
@json_option
def save(target: Target[ArenaStore], path: str, as_json: bool) -> None:
    """
    Save the live sessions to a snapshot file.

    The file appears whole or not at all, and no request waits for it. Whoever can read it can use every session in
    it, so only this user may read it.
    """
    with steps("saving") as at:
        count = snapshot.save(target.store, path, at)
    if as_json:
        print_json({"saved": count, "path": path})
    else:
        click.echo(f"{sessions(count)} saved to {path}")


@click.command()
@on_arena("shmstore copy FILE URL puts sessions there")
@click.argument("path", type=click.Path(dir_okay=False))
@json_option
def load(target: Target[ArenaStore], path: str, as_json: bool) -> None:
    """
    Add the sessions of a snapshot file to a store.

    The snapshot may be of this store or of another one.
    If both have a session, the one that was used more recently counts. No live session is evicted. A user who
    logged out after the snapshot was taken is logged in again, except in the last 30 seconds.
    """
    with steps("loading") as at, SnapshotSource(path, at) as source:
        copied = copy(source, MemoryEndpoint(target.store), at)
    if as_json:
        print_json({"loaded": copied.copied, "refused": copied.refused, "path": path})
    else:
        click.echo(f"{sessions(copied.copied)} loaded from {path}")
    fail_if_incomplete(copied)
