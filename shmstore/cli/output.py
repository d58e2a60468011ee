"""How commands say things: to people in lines of their terminal's width, to machines as JSON."""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import click

from shmstore.errors import ShmStoreError

_SLOW = 1.0  # seconds after which a command says that it is still at work
_LONGEST = 8192  # bits of a whole number that is written in decimal digits
_NAMES = 40  # columns that the longest of names in front of values may take


def plain(text: object) -> str:
    """Return text that cannot do anything to a terminal: an owner, or a key, is what somebody has typed in."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def sessions(count: int) -> str:
    """Return how many sessions, in words."""
    return "1 session" if count == 1 else f"{count} sessions"


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one of each a line."""
    listed = [(name, plain(value)) for name, value in rows]
    width = min(max((columns(name) for name, _ in listed), default=0), _NAMES)
    for name, value in listed:
        line(f"{name}{' ' * (width - columns(name))}  {value}")


def line(text: str) -> None:
    """Print a line; on a terminal no more of it than fits."""
    if is_terminal(sys.stdout) and columns(text) > (most := shutil.get_terminal_size().columns):
        while columns(text) > most - 1:
            text = text[:-1]
        text += "…"
    click.echo(text.rstrip())


def columns(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else not unicodedata.combining(each) for each in text)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal. None is one that was closed by who called us (``>&-``)."""
    return stream is not None and stream.isatty()


def shown(value: object) -> str:
    """Return a value as Python writes it."""
    try:
        return repr(value)
    except ValueError as exc:  # a whole number of more digits than Python is willing to write
        return f"<{type(value).__name__}: {exc}>"


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    click.echo(to_json(value))


def to_json(value: object) -> str:
    """Return a value as JSON; what that has no word for as Python shows it, no end (``math.inf``) as null."""
    return json.dumps(_told(value), default=shown, allow_nan=False)


def _told(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and value.bit_length() > _LONGEST:
        return hex(value)
    if isinstance(value, Mapping):
        told = {name: _told(each) for name, each in value.items() if isinstance(name, str)}
        for name, each in value.items():
            if not isinstance(name, str):
                text = shown(name)
                while text in told:  # 1 beside "1"
                    text = f"({text})"
                told[text] = _told(each)
        return told
    return [_told(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def progress(label: str, total: int | Callable[[], int], done: Callable[[], int]) -> Iterator[None]:
    """
    Show, on a terminal, how far the block is once it has taken a second.

    Args:
        label: What it does.
        total: How much there is to do; 0: that is not known yet.
        done: How much of that is done.
    """
    if not is_terminal(sys.stderr):
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


def _draw(over: threading.Event, label: str, total: int | Callable[[], int], done: Callable[[], int]) -> None:
    if over.wait(_SLOW):
        return
    with suppress(ShmStoreError):  # the block meets it too, and says so
        while not (length := total() if callable(total) else total):
            if over.wait(0.1):
                return
        bar: Any
        with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
            while not over.wait(0.1):
                bar.update(min(done(), length) - bar.pos)
            bar.update(min(done(), length) - bar.pos)


class Steps:
    """
    How far something is that calls this as it goes on.

    Attributes:
        done: How much of it is done.
        total: How much there is to do; 0: that is not known yet.
    """

    def __init__(self) -> None:
        self.done = self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total


@contextmanager
def steps(label: str) -> Iterator[Steps]:
    """Return what the block's work is to call as it goes on, so that it is shown as by `progress`."""
    at = Steps()
    with progress(label, lambda: at.total, lambda: at.done):
        yield at
