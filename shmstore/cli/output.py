"""How commands say things: to people in lines of their terminal's width, to machines as JSON."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import click

from shmstore.errors import ShmStoreError

_SLOW = 1.0  # seconds after which a command says that it is still at work


def plain(text: object) -> str:
    """Return text that cannot do anything to a terminal: an owner, or a key, is what somebody has typed in."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def sessions(count: int) -> str:
    """Return how many sessions, in words."""
    return "1 session" if count == 1 else f"{count} sessions"


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one of each a line."""
    listed = [(name, plain(value)) for name, value in rows]
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        line(f"{name:<{width}}  {value}")


def line(text: str) -> None:
    """Print a line; on a terminal no more of it than fits."""
    if sys.stdout.isatty() and len(text) > (columns := shutil.get_terminal_size().columns):
        text = f"{text[: columns - 1]}…"
    click.echo(text.rstrip())


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    click.echo(to_json(value))


def to_json(value: object) -> str:
    """Return a value as JSON; what that has no word for as Python shows it, no end (``math.inf``) as null."""
    return json.dumps(_told(value), default=repr, allow_nan=False)


def _told(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else repr(name): _told(each) for name, each in value.items()}
    return [_told(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def progress(label: str, total: int = 0, done: Callable[[], int] = int) -> Iterator[None]:
    """
    Show, on a terminal, how far the block is once it has taken a second.

    Args:
        label: What it does.
        total: How much there is to do; 0: not known, then the time is shown.
        done: How much of that is done.
    """
    if not sys.stderr.isatty():
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_draw, args=(over, label, total, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _draw(over: threading.Event, label: str, total: int, done: Callable[[], int]) -> None:
    begun = time.monotonic()
    if over.wait(_SLOW):
        return
    with suppress(ShmStoreError):  # the block meets it too, and says so
        if not total:
            while not over.wait(0.5):
                click.echo(f"\r{label} {time.monotonic() - begun:.0f} s", err=True, nl=False)
            click.echo(err=True)
            return
        bar: Any
        with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
            while not over.wait(0.1):
                bar.update(min(done(), total) - bar.pos)
            bar.update(min(done(), total) - bar.pos)
