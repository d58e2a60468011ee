"""No call of the middleware stops other tasks, however long the store takes to answer."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from asgi_browsing import Browser, View, look, make_app, put
from fault_injection import uncollected
from processes import Start, stop
from redis_servers import RedisServer, StartRedis

from shmstore import RedisStore, Store, StoreTimeout
from shmstore.asgi.session import ScopeSession
from shmstore.codec.serializers import dumps, loads
from shmstore.session import SessionLock
from shmstore.system.blocking import WouldBlock, before_blocking, blocking_allowed, without_blocking
from shmstore.system.event_loop import run

VIEWS: dict[str, View] = {
    "a change": put(b=2),
    "a login": put(_user_id="ann"),
    "a logout": lambda session: session.clear(),
    "a renewal": lambda session: setattr(session, "modified", True),
}


async def while_other_tasks_run(work: Any, let_go: Callable[[], object]) -> None:
    """Do what cannot go on before `let_go`, which another task calls after some turns of its own."""

    async def other() -> None:
        for _ in range(10):
            await asyncio.sleep(0.002)
        assert not task.done()
        let_go()

    task = asyncio.ensure_future(work)
    await asyncio.gather(task, other())


@contextmanager
def busy(store: Store) -> Iterator[Callable[[], None]]:
    """Hold the lock of the memory, until the given function is called."""
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        store.arena.lock(1)
        held.set()
        free.wait()
        store.arena.unlock()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        yield free.set
    finally:
        free.set()
        holder.join()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_busy_lock_of_the_memory(view: View) -> None:
    with Store(memory=2**20, lock_timeout=100) as store:
        browser = Browser(make_app(store, touch_after=0))
        asyncio.run(browser.get(put(a=1)))
        with busy(store) as let_go:
            asyncio.run(while_other_tasks_run(browser.get(view), let_go))
        answer = asyncio.run(browser.get(look))
        assert answer.body == {
            "a change": {"a": 1, "b": 2}, "a login": {"a": 1, "_user_id": "ann"}, "a logout": {}, "a renewal": {"a": 1},
        }[next(name for name, each in VIEWS.items() if each is view)]  # fmt: skip


@pytest.mark.parametrize("no_thread_is_free", [False, True])
def test_a_cancelled_task_keeps_its_lock_until_its_changes_are_saved(no_thread_is_free: bool) -> None:
    occupied = threading.Event()
    with Store(memory=2**20, lock_timeout=100) as store, ThreadPoolExecutor(1) as threads, ExitStack() as at_end:
        at_end.callback(occupied.set)
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(items=["tea"])))

        async def main() -> None:
            asyncio.get_running_loop().set_default_executor(threads)
            leaving = asyncio.Event()
            with busy(store) as let_go:

                async def add(session: ScopeSession) -> None:
                    async with session.lock():
                        session["items"].append("milk")
                        if no_thread_is_free:
                            threads.submit(occupied.wait)
                        leaving.set()

                task = asyncio.create_task(browser.tab().get(add))
                await leaving.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                with pytest.raises(StoreTimeout), store.lock(browser.cookie, timeout=0):
                    pass
                occupied.set()
                let_go()
                await browser.tab().get(add)

        asyncio.run(main())
        assert asyncio.run(browser.get(look)).body == {"items": ["tea", "milk", "milk"]}


def test_a_cancelled_task_keeps_its_lock_until_its_changes_are_saved_under_trio() -> None:
    with Store(memory=2**20, lock_timeout=100) as store:
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(items=["tea"])))

        async def main() -> None:
            leaving, threads = trio.Event(), trio.to_thread.current_default_thread_limiter()
            threads.total_tokens = 1
            threads.acquire_on_behalf_of_nowait(store)

            async def add(session: ScopeSession) -> None:
                async with session.lock():
                    session["items"].append("milk")
                    leaving.set()

            with busy(store) as let_go:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(browser.tab().get, add)
                    await leaving.wait()
                    nursery.cancel_scope.cancel()
                    threads.release_on_behalf_of(store)
                    let_go()

        trio.run(main)
        assert asyncio.run(browser.get(look)).body == {"items": ["tea", "milk"]}
        with store.lock(browser.cookie, timeout=0):
            pass


@pytest.mark.parametrize(
    "log_out", [lambda session: session.clear(), lambda session: session.pop("a")], ids=["clear", "pop"]
)
def test_a_callback_in_the_server(manage: Start, tmp_path: Path, log_out: View) -> None:
    go_on = tmp_path / "go on"

    def dispose(sid: str, session: Any, reason: str) -> None:
        import time  # it travels to the server by its source

        while not go_on.exists():
            time.sleep(0.001)

    manager = manage(dispose=dispose)
    manager.start()
    store = manager.store()
    browser = Browser(make_app(store))
    asyncio.run(browser.get(put(a=1)))
    asyncio.run(while_other_tasks_run(browser.get(log_out), go_on.touch))
    assert store.ids() == []
    assert browser.cookie == ""


@pytest.mark.parametrize("view", [look, *VIEWS.values()], ids=["a look", *VIEWS])
def test_a_server_that_does_not_answer(start_redis: StartRedis, view: View) -> None:
    server = start_redis()
    with RedisStore.from_url(server.url, lock_timeout=100) as store:
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(a=1)))
        stop(server.pid)
        asyncio.run(while_other_tasks_run(browser.get(view), lambda: os.kill(server.pid, signal.SIGCONT)))
        assert asyncio.run(browser.get(lambda session: session.get("a", "-"))).body in (1, "-")


def test_a_lock_on_a_server(redis_server: RedisServer) -> None:
    with RedisStore.from_url(f"{redis_server.url}?prefix=asgi-lock-") as store:
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(n=0)))

        async def count(session: ScopeSession) -> None:
            async with session.lock(timeout=60):
                n = session["n"]
                await asyncio.sleep(0)
                session["n"] = n + 1

        async def main() -> None:
            await asyncio.gather(*(browser.tab().get(count) for _ in range(5)))

        asyncio.run(main())
        assert asyncio.run(browser.get(look)).body == {"n": 5}
        with store.lock(browser.cookie, timeout=0):
            pass


class Littering:
    """Leaves garbage that refers to the frames of all callers."""

    dumps = staticmethod(dumps)

    @staticmethod
    def loads(data: bytes) -> Any:
        frame = sys._getframe()  # noqa: F841 - a cycle
        return loads(data)


def test_a_cancelled_wait_for_a_server_leaves_no_lock(start_redis: StartRedis) -> None:
    """The thread that waits for the server takes the lock later, and releases it at once: not only as garbage."""
    server = start_redis()
    with RedisStore.from_url(server.url, lock_timeout=100, serializer=Littering()) as store:
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(n=0)))

        async def main() -> None:
            begun = asyncio.Event()

            async def view(session: ScopeSession) -> None:
                assert session["n"] == 0
                stop(server.pid)
                begun.set()
                async with session.lock(timeout=60):
                    raise AssertionError

            task = asyncio.create_task(browser.tab().get(view))
            await begun.wait()
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            os.kill(server.pid, signal.SIGCONT)
            # run() waits for its threads to end

        with uncollected():
            asyncio.run(main())
            with store.lock(browser.cookie, timeout=0):
                pass


def test_a_task_that_is_cancelled_at_any_time_leaves_no_lock(redis_server: RedisServer, seed: int) -> None:
    rnd, outcomes = random.Random(seed), set[type]()
    with RedisStore.from_url(f"{redis_server.url}?prefix=asgi-cancel-", serializer=Littering()) as store:
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(n=0)))

        async def view(session: ScopeSession) -> str:
            async with session.lock(timeout=60):
                return "held"

        async def main() -> None:
            task = asyncio.create_task(browser.tab().get(view))
            for _ in range(rnd.randrange(40)):
                await asyncio.sleep(rnd.choice([0, 0.0001]))
            task.cancel()
            outcomes.update(map(type, await asyncio.gather(task, return_exceptions=True)))

        with uncollected():
            for _ in range(200):
                asyncio.run(main())
                with store.lock(browser.cookie, timeout=0):
                    pass
    assert asyncio.CancelledError in outcomes


@pytest.mark.parametrize("ended", ["cancelled", "closed"])
def test_a_lock_that_a_thread_has_just_taken_is_released(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    begin, calls, done = SessionLock._begin_for_task, [], threading.Event()

    def noting(*args: Any) -> None:
        calls.append(args)
        begin(*args)
        done.set()

    async def view(session: ScopeSession) -> None:
        async with session.lock(timeout=60):
            raise AssertionError

    monkeypatch.setattr(SessionLock, "_begin_for_task", noting)
    with RedisStore.from_url(f"{redis_server.url}?prefix=asgi-{ended}-", serializer=Littering()) as store:
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(n=0)))
        coroutine = browser.tab().get(view)

        async def main() -> None:
            task = asyncio.create_task(coroutine)
            while len(calls) < 2:  # in the event loop, and in a thread
                await asyncio.sleep(0)
            assert done.wait(60)  # this blocks the event loop: the task does not see the end of the thread
            if ended == "cancelled":
                task.cancel()
            else:
                coroutine.close()
            await asyncio.gather(task, return_exceptions=True)

        with uncollected():
            asyncio.run(main())
            with store.lock(browser.cookie, timeout=0):
                pass


def test_a_coroutine_that_is_closed_after_its_event_loop_releases_its_lock(redis_server: RedisServer) -> None:
    holding = []

    async def view(session: ScopeSession) -> None:
        async with session.lock(timeout=60):
            holding.append(session)
            await asyncio.Event().wait()

    with RedisStore.from_url(f"{redis_server.url}?prefix=asgi-ended-", serializer=Littering()) as store:
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(n=0)))
        coroutine = browser.tab().get(view)

        async def main() -> None:
            while not holding:
                await asyncio.sleep(0)

        loop = asyncio.new_event_loop()
        try:
            task: Any = loop.create_task(coroutine)
            loop.run_until_complete(main())
        finally:
            loop.close()
        with uncollected():
            coroutine.close()
            task._log_destroy_pending = False
            with store.lock(browser.cookie, timeout=0):
                pass


def test_a_look_at_a_network_store_is_read_before_the_application_is_called(redis_server: RedisServer) -> None:
    """The look itself happens in the event loop, which must not wait for a server."""
    with RedisStore.from_url(f"{redis_server.url}?prefix=asgi-early-") as store:
        browser = Browser(make_app(store))
        asyncio.run(browser.get(put(a=1)))
        assert asyncio.run(browser.get(lambda session: without_blocking(lambda: dict(session)))).body == {"a": 1}
        answer = asyncio.run(browser.get())
        assert answer.headers == [], "it is no look of the application"


# -- without_blocking -----------------------------------------------------------------------------------------


def test_work_that_would_block_is_repeated_in_a_thread() -> None:
    threads = []

    def work() -> str:
        threads.append(threading.get_ident())
        with blocking_allowed():
            before_blocking()
        before_blocking()
        return "done"

    assert asyncio.run(run(work)) == "done"
    here, there = threads
    assert here == threading.get_ident() != there
    with pytest.raises(WouldBlock):
        without_blocking(work)
    assert work() == "done"
