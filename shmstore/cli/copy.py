"""The command copy: sessions from any store to any other."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from typing import Any

import click

from shmstore.cli.output import Steps, plain, print_json, sessions, steps
from shmstore.cli.target import (
    PATIENCE,
    directory_option,
    files_of,
    json_option,
    open_on_server,
    open_target,
    refuse_misspelt_url,
    url_of,
)  # fmt: skip
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.policy import Policy
from shmstore.store.endpoint import MemoryEndpoint
from shmstore.transfer.copy import Copied, Source, copy
from shmstore.transfer.snapshot_file import SnapshotSource, writing
from shmstore.urls import is_network

_FLASK_SESSION = "flask-session+"  # before the URL of a server
_NAMED = 5  # digests of sessions that are shown for each reason


@click.command("copy")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@directory_option
@click.option("--allow-pickle", is_flag=True, help="Read what Flask-Session has pickled, which executes it.")
@click.option(
    "--key-prefix", default="", help="SESSION_KEY_PREFIX of the application: begin ids of Flask-Session with it."
)
@json_option
def copy_sessions(
    source: str, target: str, directory: str | None, allow_pickle: bool, key_prefix: str, as_json: bool
) -> None:
    """
    Copy the live sessions of one store to another.

    FROM and TO are names of stores, URLs of Redis or Valkey (redis://host/0?prefix=shop:), or files of snapshots. FROM
    may also be a server where Flask-Session keeps sessions (flask-session+redis://host/0?prefix=session:). FROM does
    not change. If both have a session, the one that was used more recently counts. No live session in shared
    memory is evicted. The copy may be repeated.
    """
    if target.startswith(_FLASK_SESSION):
        raise ConfigError("sessions are copied from Flask-Session, not to it")
    if allow_pickle and not source.startswith(_FLASK_SESSION):
        raise ConfigError(f"--allow-pickle is for sessions of Flask-Session: {_FLASK_SESSION}redis://...")
    if key_prefix:
        if not source.startswith(_FLASK_SESSION):
            raise ConfigError(f"--key-prefix is for sessions of Flask-Session: {_FLASK_SESSION}redis://...")
        Policy(ttl=math.inf, key_prefix=key_prefix)  # checks it
    with ExitStack() as stack, steps("copying") as at:
        origin, name = _source(source, directory, stack, at, allow_pickle=allow_pickle, key_prefix=key_prefix)
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
    if left_out := getattr(origin, "left_out", 0):
        values = "1 value left out, of a type" if left_out == 1 else f"{left_out} values left out, of types"
        click.echo(f"{values} that cannot be stored", err=True)
    fail_if_incomplete(copied)


def fail_if_incomplete(copied: Copied) -> None:
    """Print which sessions the copy lacks; if there are any, exit with 1."""
    for reason, digests in copied.reasons.items():
        named = ", ".join(each[:12] for each in digests[:_NAMED]) + (", ..." if len(digests) > _NAMED else "")
        click.echo(f"{sessions(len(digests))} refused, {plain(reason)}: {named}", err=True)
    if copied.missing:
        click.echo(f"{sessions(copied.missing)} copied, but not there any more: evicted meanwhile", err=True)
    if copied.refused or copied.missing:
        raise click.exceptions.Exit(1)


def _source(
    text: str, directory: str | None, stack: ExitStack, at: Steps, *, allow_pickle: bool, key_prefix: str
) -> tuple[Source, str]:
    """Return a source and the name of its store, as a snapshot of it has it."""
    if text.startswith(_FLASK_SESSION):
        return _flask_session(text.removeprefix(_FLASK_SESSION), allow_pickle, key_prefix, stack), ""
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
    refuse_misspelt_url(text)
    if "/" not in text or "://" in text or os.path.isdir(text):
        return None
    absent_store = new and not os.path.lexists(text) and os.path.abspath(text).startswith("/dev/shm/")  # noqa: S108
    return None if absent_store else text


def _store(text: str, directory: str | None, stack: ExitStack, *, to: bool) -> tuple[Any, str]:
    if is_network(text):
        return _on_server(text, stack), ""
    url = url_of(text)
    files = files_of(url, None if url.startswith("shm:///") else directory)
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


def _flask_session(url: str, allow_pickle: bool, key_prefix: str, stack: ExitStack) -> Any:
    try:
        from shmstore.redis.flask_session import FlaskSessionSource
    except ImportError as exc:
        raise ConfigError(str(exc)) from None
    found = FlaskSessionSource(url, PATIENCE, allow_pickle=allow_pickle, key_prefix=key_prefix)
    stack.callback(found.close)
    return found


def _on_server(url: str, stack: ExitStack) -> Any:
    target = open_on_server(url)
    stack.callback(target.store.close)
    from shmstore.redis.endpoint import RedisEndpoint

    return RedisEndpoint(target.store, target.name)
