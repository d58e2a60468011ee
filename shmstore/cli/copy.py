"""The command copy: sessions from any store to any other."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from typing import Any

import click

from shmstore.cli.output import Steps, plain, print_json, sessions, steps
from shmstore.cli.target import directory_option, json_option, open_target, url_of
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.server.directory import StoreFiles
from shmstore.transfer.copy import Copied, Source, copy
from shmstore.transfer.memory import MemoryEndpoint
from shmstore.transfer.snapshot_file import SnapshotSource, writing
from shmstore.urls import is_network

_NAMED = 5  # digests of sessions that are shown for each reason
_PATIENCE = 10.0  # seconds that a server has for an answer


@click.command("copy")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@directory_option
@json_option
def copy_sessions(source: str, target: str, directory: str | None, as_json: bool) -> None:
    """
    Copy all live sessions from one store to another.

    FROM and TO are stores as above, URLs of Redis or Valkey (redis://host/0?prefix=shop:), or files of snapshots. FROM
    does not change. If both have a session, the one that was used more recently counts. No live session is evicted.
    The copy may be repeated.
    """
    with ExitStack() as stack, steps("copying") as at:
        origin, name = _source(source, directory, stack, at)
        path = _file(target, new=True)
        sink = (
            _store(target, directory, stack, to=True)[0] if path is None else stack.enter_context(writing(path, name))
        )
        copied = copy(origin, sink, at)
        stack.close()  # puts a file in its place
    if as_json:
        print_json({each: getattr(copied, each) for each in ("copied", "skipped", "refused", "missing", "total")})
    else:
        click.echo(f"{sessions(copied.copied)} copied, {copied.skipped} skipped, {copied.refused} refused")
    _complain(copied)


def _complain(copied: Copied) -> None:
    """Say what is not there now, and end with 1 if there is such."""
    for reason, digests in copied.reasons.items():
        named = ", ".join(each[:12] for each in digests[:_NAMED]) + (", ..." if len(digests) > _NAMED else "")
        click.echo(f"{sessions(len(digests))} refused, {plain(reason)}: {named}", err=True)
    if copied.missing:
        click.echo(f"{sessions(copied.missing)} copied, but not there any more: evicted meanwhile", err=True)
    if copied.refused or copied.missing:
        raise click.exceptions.Exit(1)


def _source(text: str, directory: str | None, stack: ExitStack, at: Steps) -> tuple[Source, str]:
    """Return a source and the name of its store, as a snapshot of it has it."""
    path = _file(text, new=False)
    if path is None:
        return _store(text, directory, stack, to=False)
    if not os.path.exists(path):
        raise StoreUnavailable(f"there is no store and no snapshot at {path}")
    snapshot = stack.enter_context(SnapshotSource(path, at))
    return snapshot, snapshot.contents.store


def _file(text: str, *, new: bool) -> str | None:
    """Return the path of a snapshot, None if it is a store that is meant: what is not there yet may be either."""
    if is_network(text):
        return None
    if "@" in text and not os.path.lexists(text):
        shown = re.sub(r".*@", "...@", text, flags=re.DOTALL)  # it may be a URL with a password, misspelt
        raise ConfigError(f"{plain(shown)} is not a store, a URL or a file; a URL begins with redis:// or the like")
    if "/" not in text or "://" in text or os.path.isdir(text):
        return None
    absent_store = new and not os.path.lexists(text) and os.path.abspath(text).startswith("/dev/shm/")  # noqa: S108
    return None if absent_store else text


def _store(text: str, directory: str | None, stack: ExitStack, *, to: bool) -> tuple[Any, str]:
    if is_network(text):
        return _on_server(text, stack), ""
    url = url_of(text)
    files = StoreFiles.of(url, None if url.startswith("shm:///") else directory)
    try:
        opened = open_target(files)
    except StoreUnavailable as exc:
        if not to or os.path.exists(files.arena):
            hint = f"; the file is ./{text}" if os.path.isfile(text) else ""
            raise StoreUnavailable(f"{exc}{hint}") from None
        raise StoreUnavailable(
            f"{exc}; start it first, with its application or `shmstore serve {files.name}`; a file is named with a /"
        ) from None
    stack.callback(opened.store.close)
    return MemoryEndpoint(opened.store, f"store {files.name!r}"), files.name


def _on_server(url: str, stack: ExitStack) -> Any:
    try:
        from shmstore.redis import RedisStore
        from shmstore.redis.client import Address
        from shmstore.redis.endpoint import RedisEndpoint
    except ImportError as exc:
        raise click.ClickException(str(exc)) from None
    store = stack.enter_context(RedisStore.from_url(url, check_period=None, lock_timeout=_PATIENCE))
    return RedisEndpoint(store, Address.of(url).prefix)
