"""Commands about sessions: ls, show, rm, logout, prune, clear."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import click

from shmstore.cli.output import (
    is_terminal,
    line,
    pairs,
    plain,
    print_json,
    progress,
    sessions,
    shown,
    to_json,
)
from shmstore.cli.target import (
    Seconds,
    Target,
    files_of,
    json_option,
    no_store,
    on_store,
    open_store,
    store_argument,
)
from shmstore.codec.body import Record
from shmstore.contract import AnyStore, Capability
from shmstore.engine.arena import Arena
from shmstore.engine.layout import ArenaDamaged
from shmstore.errors import ConfigError, StoreUnavailable
from shmstore.ipc.directory import ARENA, StoreFiles
from shmstore.listing import Listing, Row
from shmstore.options import format_duration, format_size
from shmstore.system.files import LEAVING, open_nofollow, try_lock
from shmstore.system.processes import command_name, command_title, open_files, status
from shmstore.urls import is_network

_SHOWN = 12  # digits of a digest; logs show the first eight of them
_MAX_NAMED = 5  # processes that an error names
_LINE = "{:<12} {:>7} {:>7} {:>7} {:>10} {}"

yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def digest(value: str) -> str:
    """Return the first digits of a session's digest, as given in an argument."""
    if not re.fullmatch(r"[0-9a-fA-F]{4,32}", value, re.ASCII):
        raise click.BadParameter(f"'{plain(value[:40])}' is not 4 to 32 digits of a digest, as ls shows them")
    return value.lower()


def utf8_text(value: str) -> str:
    """Return an argument as text. If Python takes the locale for ASCII, UTF-8 bytes arrive as surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        pass
    else:
        return value
    try:
        return os.fsencode(value).decode()
    except UnicodeError:
        raise click.BadParameter(f"'{plain(value)}' is not UTF-8") from None


def _find_one(target: Target[AnyStore], prefix: str) -> tuple[Row, Record]:
    try:
        return Listing.one(target.store, prefix)
    except LookupError as exc:
        raise click.ClickException(f"store {target.name!r}: {exc}") from exc


def _listing(target: Target[AnyStore], owner: str | None, idle: float = 0, expired: bool | None = None) -> Listing:
    try:
        return Listing(target.store, owner=owner, idle=idle, expired=expired)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc


def _facts(row: Row) -> dict[str, object]:
    return row._asdict() | {"expired": row.remaining <= 0}


def _expires(row: Row) -> str:
    if row.remaining <= 0:
        return "expired"
    return "never" if math.isinf(row.remaining) else format_duration(row.remaining)


@click.command()
@on_store
@click.option("--owner", metavar="NAME", type=utf8_text, help="Only the sessions of this owner.")
@click.option("--idle", metavar="SECONDS", type=Seconds(min=0), default=0, help="Only sessions not used for so long.")
@click.option("--expired", is_flag=True, help="Only sessions that have expired and are not pruned yet.")
@click.option(
    "--limit", metavar="N", type=click.IntRange(min=0), default=100, show_default=True, help="Maximum number; 0: all."
)
@json_option
def ls(target: Target[AnyStore], owner: str | None, idle: float, expired: bool, limit: int, as_json: bool) -> None:
    """
    List sessions, the most recently used first.

    They are named by the first digits of their digests, never by their ids. Expired sessions stay until a prune.
    """
    listing = _listing(target, owner, idle, expired or None)
    total = len(listing)
    printed = 0
    # On a terminal the rows themselves show the progress.
    bar = progress("listing", min(total, limit or total), lambda: printed)
    with nullcontext() if is_terminal(sys.stdout) else bar:
        if as_json:
            click.echo(f'{{"total": {total}, "sessions": [', nl=False)
        else:
            line(_LINE.format("SESSION", "CREATED", "USED", "EXPIRES", "SIZE", "OWNER"))
        for row in listing.rows(0, limit or None):
            if as_json:
                click.echo((",\n" if printed else "\n") + to_json(_facts(row)), nl=False)
            else:
                ages = format_duration(row.created), format_duration(row.idle), _expires(row)
                line(_LINE.format(row.digest[:_SHOWN], *ages, format_size(row.size), plain(row.owner or "-")))
            printed += 1
        if as_json:
            click.echo("]}")
    if limit and total > limit:
        click.echo(f"{printed} of {sessions(total)}: --limit 0 shows all", err=True)


@click.command()
@on_store
@click.argument("session", metavar="DIGEST", type=digest)
@click.option("--values", is_flag=True, help="Show the values too.")
@json_option
def show(target: Target[AnyStore], session: str, values: bool, as_json: bool) -> None:
    """Show a session: its ages, its keys and their sizes. This does not count as use."""
    row, record = _find_one(target, session)
    codec = target.store.codec
    if values and record.codec_name != codec.name:
        raise click.ClickException(f"its values were written by the serializer {plain(record.codec_name)}")
    raw = codec.fields(record.payload)
    content = codec.readable(record.payload) if values else {}
    if as_json:
        facts = _facts(row) | {"serializer": record.codec_name, "keys": {name: len(raw[name]) for name in raw}}
        print_json(facts | ({"values": content} if values else {}))
        return
    sizes = {name: format_size(len(value)) for name, value in raw.items()}
    width = max(map(len, sizes.values()), default=0)
    pairs(
        [
            ("session", row.digest),
            ("owner", row.owner or "-"),
            ("created", f"{format_duration(row.created)} ago"),
            ("used", f"{format_duration(row.idle)} ago"),
            ("expires", f"in {format_duration(row.remaining)}" if 0 < row.remaining < math.inf else _expires(row)),
            ("size", format_size(row.size)),
            ("serializer", record.codec_name),
            *(
                (f"  {plain(name)}", f"{taken:<{width}}  {_shown(content, name)}" if values else taken)
                for name, taken in sizes.items()
            ),
        ]
    )


def _shown(content: dict[Any, Any], name: Any) -> str:
    return shown(content[name]) if name in content else "(unreadable)"


@click.command()
@store_argument
@click.argument("chosen", metavar="[DIGEST]...", nargs=-1, type=digest)
@yes_option
@json_option
def rm(store: str, directory: str | None, chosen: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """
    Remove sessions, or an unused store.

    With digests it removes those sessions. A digest may be shortened as long as it is unique; otherwise nothing is
    removed. Without a digest it removes the store and all its sessions, after a confirmation. It does not remove a
    store that is in use, or one on Redis or Valkey: remove the sessions of that with clear.
    """
    if not chosen:
        if is_network(store):
            raise ConfigError(
                "a store on a server cannot be removed, because its users are not known: shmstore clear removes its "
                "sessions"
            )
        files = files_of(store, directory)
        _remove_store(files, yes)
        if as_json:
            print_json({"store": files.name, "removed": True})
        else:
            click.echo(f"store {files.name} removed")
        return
    target = open_store(store, directory)
    try:
        found = {record.sid: row.remaining > 0 for row, record in (_find_one(target, each) for each in chosen)}
        # Expired sessions are removed as well, but `destroy` does not count them.
        removed = target.store.destroy(found) + list(found.values()).count(False)
    finally:
        target.store.close()
    _report("removed", removed, as_json)


def _in_use(files: StoreFiles) -> StoreUnavailable:
    """Return the error for removing a store in use: it names the users and how to stop them."""
    server = files.server()
    users = sorted({_program(pid) for path, pid in open_files(ARENA) if path == files.arena and pid != server})
    others = [pid for pid in users if pid != os.getpid()]
    if others:
        shown = ", ".join(f"{pid} ({command_name(pid)})" for pid in others[:_MAX_NAMED])
        more = f" and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
        stop = " ".join(map(str, others[:_MAX_NAMED]))
        text = f"used by process {shown}{more}: stop that, by its service manager or with kill {stop}"
    elif server is None:
        text = f"used by processes that are not visible here: stop them (as root, fuser {files.arena} names them)"
    else:
        text = "used by no process that is visible here: stop the programs that use it"
    after = f"; its server, process {server}, exits some seconds after the last of them" if server else ""
    return StoreUnavailable(f"store {files.name!r} in {files.path} is in use: {text}{after}")


def _program(pid: int) -> int:
    """Return the process to stop in place of a user: the master, if the user is a forked worker it would replace."""
    with suppress(OSError, KeyError, ValueError):
        while (parent := int(status(pid)["PPid"])) > 1 and command_title(parent) == command_title(pid):
            pid = parent
    return pid


@contextmanager
def _exclusive_use(files: StoreFiles) -> Iterator[None]:
    """Refuse to continue if a process has the unusable arena open: each user of an arena holds a shared flock."""
    try:
        fd = open_nofollow(files.arena)
    except OSError:  # a link, for example
        yield
        return
    try:
        if not try_lock(fd, LEAVING):
            raise _in_use(files)
        yield
    finally:
        os.close(fd)


def _remove_store(files: StoreFiles, yes: bool) -> None:
    """Remove an unused store, as its server would."""
    files.check()
    if not os.path.lexists(files.arena):
        raise no_store(files)
    if not yes:
        click.confirm(f"Remove store {files.name} in {files.path}, and all its sessions?", abort=True, err=True)
    lock = files.claim(0)  # so that no server starts in the meantime
    if lock is None:
        raise _in_use(files)
    try:
        try:
            arena = Arena.open(files.arena)
        except FileNotFoundError:
            files.remove()
        except ArenaDamaged:  # possibly of another version, whose processes may have it open
            with _exclusive_use(files):
                files.remove()
        else:
            try:
                if not arena.file.is_alone():
                    raise _in_use(files)
                arena.mark_closed()
            finally:
                arena.close()
            files.remove()
        if os.path.lexists(files.arena):
            raise StoreUnavailable(f"{files.arena} cannot be removed by this user: check what it is")
    finally:
        os.close(lock)


@click.command()
@on_store
@click.argument("owner", metavar="OWNER", type=utf8_text)
@json_option
def logout(target: Target[AnyStore], owner: str, as_json: bool) -> None:
    """End all sessions of a user, without a confirmation."""
    store, total = target.store, len(_listing(target, owner))
    before = store.stats()
    with progress("logging out", total, lambda: store.stats().destroyed - before.destroyed):
        ended = store.destroy_owned(owner)
    _report("ended", ended, as_json)


@click.command()
@on_store
@json_option
def prune(target: Target[AnyStore], as_json: bool) -> None:
    """
    Remove the expired sessions now.

    Redis and Valkey remove expired sessions by themselves; for a store there this tidies the indexes of owners.
    """
    store, total = target.store, len(_listing(target, None, expired=True))
    before = store.stats()
    with progress("pruning", total, lambda: store.stats().expired - before.expired):
        pruned = store.prune()
    if Capability.KEEPS_EXPIRED not in store.capabilities:
        click.echo("the server removes expired sessions by itself; the indexes of owners are tidy", err=True)
    _report("pruned", pruned, as_json)


@click.command()
@on_store
@yes_option
@json_option
def clear(target: Target[AnyStore], yes: bool, as_json: bool) -> None:
    """Remove all sessions, after a confirmation. The store stays."""
    store = target.store
    total = store.length()
    if not yes:
        question = f"Remove {sessions(total)} of store {target.name} in {target.place}?"
        click.confirm(question, abort=True, err=True)
    before = store.stats()
    with progress("clearing", total, lambda: store.stats().cleared - before.cleared):
        store.clear()
    _report("removed", store.stats().cleared - before.cleared, as_json)


def _report(done: str, count: int, as_json: bool) -> None:
    if as_json:
        print_json({done: count})
    else:
        click.echo(f"{sessions(count)} {done}")
