"""The output of commands: lines that fit the terminal, or JSON."""

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

_SLOW = 1.0  # seconds after which a command shows its progress
_MAX_DECIMAL_BITS = 8192  # of an integer that is written in decimal digits
_MAX_NAME_COLUMNS = 40  # that the names in front of values may take


def plain(text: object) -> str:
    """Return text without control sequences, because owners and keys may come from users' input."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def sessions(count: int) -> str:
    """Return a number of sessions as text."""
    return "1 session" if count == 1 else f"{count} sessions"


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one pair per line."""
    listed = [(name, plain(value)) for name, value in rows]
    width = min(max((columns(name) for name, _ in listed), default=0), _MAX_NAME_COLUMNS)
    for name, value in listed:
        line(f"{name}{' ' * (width - columns(name))}  {value}")


def line(text: str) -> None:
    """Print a line; on a terminal, cut it to the width of the terminal."""
    if is_terminal(sys.stdout):
        text, more = _encodable(text), "…" if _encodable("…") == "…" else ">"
        if columns(text) > (width := shutil.get_terminal_size().columns):
            while columns(text) > width - 1:
                text = text[:-1]
            text += more
    click.echo(text.rstrip())


def _encodable(text: str) -> str:
    """Return text as standard output shows it, which escapes what its encoding lacks."""
    encoding = sys.stdout.encoding
    return text.encode(encoding, "backslashreplace").decode(encoding)


def columns(text: str) -> int:
    """Return the number of terminal columns that a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        2 if unicodedata.east_asian_width(each) in "WF" else unicodedata.category(each) not in ("Mn", "Me", "Cf")
        for each in text
    )


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal. It is None if the caller has closed it (``>&-``)."""
    return stream is not None and stream.isatty()


def shown(value: object) -> str:
    """Return a value as a Python literal."""
    try:
        return repr(value)
    except ValueError as exc:  # an integer with more digits than Python converts
        return f"<{type(value).__name__}: {exc}>"


def print_json(value: object) -> None:
    """Print a value as one line of JSON."""
    click.echo(to_json(value))


def to_json(value: object) -> str:
    """Return a value as JSON: a type that JSON lacks as its Python literal, infinity (``math.inf``) as null."""
    return json.dumps(_jsonable(value), default=shown, allow_nan=False)


def _jsonable(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and value.bit_length() > _MAX_DECIMAL_BITS:
        return hex(value)
    if isinstance(value, Mapping):
        result = {name: _jsonable(each) for name, each in value.items() if isinstance(name, str)}
        for name, each in value.items():
            if not isinstance(name, str):
                text = shown(name)
                while text in result:  # 1 beside "1"
                    text = f"({text})"
                result[text] = _jsonable(each)
        return result
    return [_jsonable(each) for each in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def progress(label: str, total: int | Callable[[], int], done: Callable[[], int]) -> Iterator[None]:
    """
    Show a progress bar on a terminal, once the block has taken a second.

    Args:
        label: The label of the bar.
        total: The amount of work; 0: not known yet.
        done: Returns the amount that is done.
    """
    if not is_terminal(sys.stderr):
        yield
        return
    finished = threading.Event()
    thread = threading.Thread(target=_draw, args=(finished, label, total, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _draw(finished: threading.Event, label: str, total: int | Callable[[], int], done: Callable[[], int]) -> None:
    if finished.wait(_SLOW):
        return
    with suppress(ShmStoreError):  # the block gets the same error and reports it
        while not (length := total() if callable(total) else total):
            if finished.wait(0.1):
                return
        bar: Any
        with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
            while not finished.wait(0.1):
                bar.update(min(done(), length) - bar.pos)
            bar.update(min(done(), length) - bar.pos)


class Steps:
    """
    A progress callback that remembers its last arguments.

    Attributes:
        done: The amount of work that is done.
        total: The amount of work; 0: not known yet.
    """

    def __init__(self) -> None:
        self.done = self.total = 0

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total


@contextmanager
def steps(label: str) -> Iterator[Steps]:
    """Yield a progress callback for the block's work, and show its progress as `progress` does."""
    at = Steps()
    with progress(label, lambda: at.total, lambda: at.done):
        yield at
