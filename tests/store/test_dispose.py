"""Changes while a dispose runs without the lock: its session is removed all the same, and no other."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from functools import partial
from typing import Any

import pytest

from shmstore import Store
from shmstore.engine.verify import verify
from shmstore.system.blocking import before_blocking
from shmstore.system.event_loop import run


@pytest.mark.parametrize("way", ["evict", "set"])
def test_a_rebuild_during_a_dispose_drops_no_other_session(way: str) -> None:
    """In the new file, another session may have the slot and the version of the one that dispose was called for."""
    announced: list[str] = []

    def dispose(sid: str, session: Any, reason: str) -> None:
        announced.append(sid)
        if len(announced) == 1:
            store.move()

    with Store(memory=2**18, max=3, dispose=dispose, check_period=None, recency=0) as store:
        for sid in "xyz":
            store.set(sid, {"sid": sid})
        store.get("x")
        if way == "evict":
            store.set("new", {})
        else:
            store.set("y", {"sid": "other"})
        verify(store.arena)
        assert set(announced) == {"y"}
        assert {"x", "z"} <= set(store.ids())
        assert store.peek("y") == ({"sid": "other"} if way == "set" else None)


def test_in_an_event_loop_dispose_is_called_once_although_the_lock_is_busy_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What would block the loop is repeated in a thread."""
    announced: list[str] = []
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            store.arena.lock(5)
            held.set()
            free.wait(60)
        finally:
            store.arena.unlock()

    def dispose(sid: str, session: Any, reason: str) -> None:
        announced.append(sid)
        if len(announced) == 1:
            holder.start()
            held.wait(60)

    def wait() -> None:
        before_blocking()  # raises in the event loop
        free.set()

    monkeypatch.setattr("shmstore.engine.mutex.before_blocking", wait)
    holder = threading.Thread(target=hold)
    with Store(memory=2**18, dispose=dispose, check_period=None) as store:
        store.set("a", {})
        assert asyncio.run(run(partial(store.destroy, "a"))) == 1
        assert announced == ["a"]
        holder.join()


def test_a_child_forked_during_a_dispose_can_call_its_own() -> None:
    begun, done = threading.Event(), threading.Event()

    def dispose(sid: str, session: Any, reason: str) -> None:
        if sid == "a":
            begun.set()
            done.wait(60)

    with Store(memory=2**18, dispose=dispose, check_period=None) as store:
        store.set("a", {})
        store.set("b", {})
        thread = threading.Thread(target=store.destroy, args=("a",))
        thread.start()
        begun.wait()
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # the end of a child that waits for ever
            os._exit(store.destroy("b"))
        status = os.waitpid(child, 0)[1]
        done.set()
        thread.join()
        assert os.waitstatus_to_exitcode(status) == 1
        assert store.ids() == []
