"""Work with a store in the event loop of asyncio or trio."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from shmstore.system.blocking import WouldBlock, without_blocking

__all__ = ["in_thread", "is_running", "run", "sleep", "take_turn"]

T = TypeVar("T")

# The lock of each event loop and name. It lasts as long as a task has it or waits for it.
_turns: Final[WeakValueDictionary[tuple[object, Hashable], Any]] = WeakValueDictionary()


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


async def take_turn(name: Hashable, timeout: float) -> Callable[[], None]:
    """
    Wait until all other tasks of this event loop that came earlier with the same name have ended their turns.

    Returns:
        The function that ends the turn.

    Raises:
        TimeoutError: That took longer than ``timeout`` seconds.
    """
    trio = _trio()
    if trio is None:
        key = asyncio.get_running_loop(), name
        turn = _turns.setdefault(key, asyncio.Lock())
        async with asyncio.timeout(timeout):
            await turn.acquire()
    else:
        key = trio.lowlevel.current_trio_token(), name
        turn = _turns.setdefault(key, trio.Semaphore(1))  # any task may release it
        try:
            turn.acquire_nowait()  # with a timeout of 0, `acquire` never succeeds
        except trio.WouldBlock:
            with trio.move_on_after(max(timeout, 0)) as limit:
                await turn.acquire()
            if limit.cancelled_caught:
                raise TimeoutError from None
    release: Callable[[], None] = turn.release
    return release


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
    if trio is not None:
        try:
            trio.lowlevel.current_trio_token()
        except (AttributeError, RuntimeError):  # it is being imported; it does not run the caller
            return None
    return trio
