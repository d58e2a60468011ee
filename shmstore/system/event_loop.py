"""Work with a store in the event loop of asyncio or trio."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from shmstore.system.blocking import WouldBlock, without_blocking

__all__ = ["in_thread", "is_running", "run", "sleep"]

T = TypeVar("T")


async def run(work: Callable[[], T]) -> T:
    """Call a function that can be repeated from its start: at once, or in a thread if it would block the loop."""
    try:
        return without_blocking(work)
    except WouldBlock:
        pass
    return await in_thread(work)


async def in_thread(work: Callable[[], T]) -> T:
    """
    Call a function in a thread.

    If the caller is cancelled, the function still runs to its end, also if no thread is free yet. Under trio the caller
    waits for that.
    """
    trio = _trio()
    if trio is not None:
        with trio.CancelScope(shield=True):
            result: T = await trio.to_thread.run_sync(work)
        return result
    call = partial(contextvars.copy_context().run, work)
    return await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, call))


async def sleep(seconds: float) -> None:
    """Let other tasks run for that long."""
    await (_trio() or asyncio).sleep(seconds)


def is_running() -> bool:
    """Return whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _trio() is not None
    return True


def _trio() -> Any:
    """Return trio if it runs the caller."""
    trio = sys.modules.get("trio")
    return trio if trio is not None and trio.lowlevel.in_trio_run() else None
