"""Commands about a store as a whole: stats, top, check."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import click

from shmstore.cli.output import is_terminal, line, pairs, print_json, sessions, steps
from shmstore.cli.target import Seconds, Target, json_option, on_arena, on_store
from shmstore.contract import AnyStore, ArenaStore, Stats
from shmstore.engine.header import SESSIONS
from shmstore.engine.verify import problems
from shmstore.listing import has_arena
from shmstore.options import format_duration, format_size

_HEADER_EVERY = 20  # lines of `top` on a terminal
_MAX_PROBLEMS = 20  # that are printed
_ADVICE = (
    "sessions whose record is damaged are lost, and their visitors start new ones; for other damage stop all processes "
    "that use the store, run `shmstore rm {}`, and start them: the store begins with its snapshot, or empty"
)


_NOT_ON_SERVERS = (
    "evicted_owned", "rebuilds", "lock_waits", "lock_waited", "server_restarts", "snapshot_age", "snapshot_failures",
)  # fmt: skip
_OF_WHOLE_SERVER = ("bytes", "expired", "evicted")


@click.command()
@on_store
@json_option
def stats(target: Target[AnyStore], as_json: bool) -> None:
    """
    Show what a store holds, and count what has happened to it.

    The counts begin when the memory of the store is created. On Redis or Valkey the bytes, and what expired or was
    evicted, are figures of the whole server.
    """
    figures: dict[str, Any] = asdict(target.store.stats())
    on_server = not has_arena(target.store)
    if on_server:
        figures |= dict.fromkeys(_NOT_ON_SERVERS)
    if not target.running:
        figures["server_pid"] = figures["server_uptime"] = None
    if as_json:
        place = "server" if on_server else "path"
        print_json({"name": target.name, place: target.place, "running": target.running, **figures})
        return
    shown = dict(figures)
    shown["bytes"] = format_size(figures["bytes"])
    if figures["memory"]:
        shown["bytes"] += f" ({figures['bytes'] / figures['memory']:.0%})"
    shown["memory"] = format_size(figures["memory"]) if figures["memory"] else "no limit"
    if figures["gets"]:
        shown["hits"] = f"{figures['hits']} ({figures['hits'] / figures['gets']:.1%})"
    if target.running:
        shown["server_uptime"] = format_duration(figures["server_uptime"])
    else:
        shown["server_pid"], shown["server_uptime"] = "not running", "-"
    if on_server:
        for name in _NOT_ON_SERVERS:
            del shown[name]
        for name in _OF_WHOLE_SERVER:
            shown[name] = f"{shown[name]}, of the whole server"
    else:
        age = figures["snapshot_age"]
        shown["snapshot_age"] = "-" if age is None else format_duration(age)
        shown["lock_waited"] = f"{figures['lock_waited']:.3f}s"
    place = f"{target.name} on {target.place}" if on_server else target.place
    pairs([("store", place), *((name.replace("_", " "), value) for name, value in shown.items())])


# -- top -------------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of `top`: its title, its name in JSON, its width and its format."""

    title: str
    name: str
    width: int
    shown: Callable[[float], str]


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


_COLUMNS = (
    Column("sessions", "sessions", 8, _whole),
    Column("memory", "memory_used", 6, _percent),
    Column("gets/s", "gets_per_second", 6, _whole),
    Column("hits", "hit_rate", 4, _percent),
    Column("sets/s", "sets_per_second", 6, _whole),
    Column("evict/s", "evicted_per_second", 7, _whole),
    Column("expire/s", "expired_per_second", 8, _whole),
    Column("waits/s", "lock_waits_per_second", 7, _whole),
)


def _rates(before: Stats, now: Stats, seconds: float, *, on_server: bool) -> dict[str, float | None]:
    was, is_ = asdict(before), asdict(now)
    counted = ("gets", "sets", "evicted", "expired", "lock_waits")
    # A recreated arena counts from zero.
    grown = {name: max(0, is_[name] - was[name]) for name in counted}
    hits = max(0, now.hits - before.hits)
    return {
        "sessions": now.sessions,
        "memory_used": now.bytes / now.memory if now.memory else None,
        "hit_rate": hits / grown["gets"] if grown["gets"] else None,
        **{f"{name}_per_second": count / seconds for name, count in grown.items()},
        **({"lock_waits_per_second": None} if on_server else {}),
    }


def _samples(target: Target[AnyStore], interval: float, count: int) -> Iterator[dict[str, float | None]]:
    store, on_server = target.store, not has_arena(target.store)
    before, then = store.stats(), time.monotonic()
    while True:
        time.sleep(interval)
        now, at = store.stats(), time.monotonic()
        yield _rates(before, now, at - then, on_server=on_server)
        before, then = now, at
        count -= 1
        if not count:
            return


@click.command()
@on_store
@click.option(
    "--interval", metavar="SECONDS", type=Seconds(min=0.1), default=1.0, show_default=True, help="Time between samples."
)
@click.option(
    "--count", metavar="N", type=click.IntRange(min=0), default=0, help="End after N samples.  [0: when interrupted]"
)
@json_option
def top(target: Target[AnyStore], interval: float, count: int, as_json: bool) -> None:
    """Watch a store: sessions, memory, and events per second."""
    samples = _samples(target, interval, count)
    try:
        if as_json:
            for sample in samples:
                print_json(sample)
        elif not (is_terminal(sys.stdout) and _live(target, samples)):
            _lines(samples)
    except KeyboardInterrupt:
        pass  # the usual way to end it


def _cells(sample: dict[str, float | None]) -> dict[Column, str]:
    return {each: "-" if (value := sample[each.name]) is None else each.shown(value) for each in _COLUMNS}


def _lines(samples: Iterator[dict[str, float | None]]) -> None:
    """Print one line per sample, as vmstat does."""
    for number, sample in enumerate(samples):
        cells = _cells(sample)
        if number % _HEADER_EVERY == 0 and (not number or is_terminal(sys.stdout)):
            line(" ".join(f"{each.title:>{each.width}}" for each in cells))
        line(" ".join(f"{value:>{each.width}}" for each, value in cells.items()))


def _live(target: Target[AnyStore], samples: Iterator[dict[str, float | None]]) -> bool:
    """Draw a table that changes in place, if rich is installed; return whether it is."""
    try:
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table
    except ImportError:
        return False
    console = Console()
    if console.is_dumb_terminal:  # it cannot move the cursor
        return False
    with Live(console=console, auto_refresh=False, screen=False) as live:
        for sample in samples:
            table = Table(title=f"{target.name}  {time.strftime('%H:%M:%S')}", min_width=30)
            table.add_column("")
            table.add_column("now", justify="right")
            for each, value in _cells(sample).items():
                table.add_row(each.title, value)
            live.update(table, refresh=True)
    return True


# -- check -----------------------------------------------------------------------------------------------------------


@click.command()
@on_arena("shmstore doctor checks that server")
@json_option
def check(target: Target[ArenaStore], as_json: bool) -> None:
    """
    Verify the memory of a store.

    It verifies a copy, so it needs as much memory again, and blocks writers only while the copy is made: up to 0.2 s
    for each GiB. The exit code is 1 if the memory is damaged.
    """
    with steps("checking") as at:
        copy = target.store.arena.duplicate(10.0)
        try:
            found, count = problems(copy, at), copy.cells[SESSIONS]
        finally:
            copy.close()
    if as_json:
        print_json({"sound": not found, "sessions": count, "problems": found})
    elif not found:
        click.echo(f"store {target.name} is sound: {sessions(count)}")
    else:
        for problem in found[:_MAX_PROBLEMS]:
            click.echo(problem)
        count_of_problems = f"{len(found)} problem{'s' * (len(found) != 1)}"
        click.echo(
            f"store {target.name} is damaged: {count_of_problems}; {_ADVICE.format(shlex.quote(target.place))}",
            err=True,
        )
    if found:
        sys.exit(1)
