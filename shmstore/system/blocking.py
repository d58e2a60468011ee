"""
Keeps calls from blocking an event loop.

Whatever waits (for a lock, for a server) calls `before_blocking` first. Inside `without_blocking` that raises
`WouldBlock`, and the caller repeats the call in a thread. So a call that need not wait costs no thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["WouldBlock", "before_blocking", "blocking_allowed", "without_blocking"]

T = TypeVar("T")


class WouldBlock(Exception):
    """A call cannot be completed without waiting. Nothing has changed."""


class _Thread(threading.local):
    must_not_block = False


_thread = _Thread()


def before_blocking() -> None:
    """
    Say that the caller is about to wait.

    Raises:
        WouldBlock: The call must not block this thread.
    """
    if _thread.must_not_block:
        raise WouldBlock


def without_blocking(work: Callable[[], T]) -> T:
    """
    Call a function that can be repeated from its start.

    Raises:
        WouldBlock: It would have had to wait.
    """
    _thread.must_not_block = True
    try:
        return work()
    finally:
        _thread.must_not_block = False


@contextmanager
def blocking_allowed() -> Iterator[None]:
    """Let the block wait, because what was done before it cannot be repeated."""
    before, _thread.must_not_block = _thread.must_not_block, False
    try:
        yield
    finally:
        _thread.must_not_block = before
