"""The lock that greenlets can wait for and fork leaves free."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from processes import Run, wait_for

from shmstore import StoreTimeout
from shmstore.engine import greenlet_lock
from shmstore.engine.greenlet_lock import GreenletLock


@contextmanager
def held(lock: GreenletLock) -> Iterator[None]:
    ticket = lock.ticket()
    try:
        ticket.acquire()
        yield
    finally:
        ticket.release()


def test_one_thread_at_a_time() -> None:
    lock, inside, most = GreenletLock(), [0], [0]

    def work() -> None:
        for _ in range(200):
            with held(lock):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                os.sched_yield()
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_an_exception_releases_the_lock() -> None:
    lock = GreenletLock()
    with pytest.raises(ZeroDivisionError), held(lock):
        raise ZeroDivisionError
    with held(lock):
        pass


def test_greenlets_wait_for_a_lock_created_before_gevent_patching(run: Run) -> None:
    """As under Gunicorn: the master imports shmstore, and the workers patch themselves after the fork."""
    process = run(
        """
from shmstore.engine.greenlet_lock import GreenletLock
lock = GreenletLock()
import gevent.monkey
gevent.monkey.patch_all()
import time, gevent

def work(name):
    ticket = lock.ticket()
    try:
        ticket.acquire()
        print(name, "in")
        time.sleep(0.01)
        print(name, "out")
    finally:
        ticket.release()

gevent.joinall([gevent.spawn(work, name) for name in "ab"])
""",
        stderr=subprocess.PIPE,
    )
    output, errors = process.communicate(timeout=300)
    assert output.split("\n")[:-1] == ["a in", "a out", "b in", "b out"], errors


def test_the_lock_is_free_in_a_forked_child() -> None:
    lock = GreenletLock()
    with held(lock):
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # the end of a child that waits for ever
            with held(lock):
                os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_releasing_an_unacquired_ticket_does_nothing() -> None:
    lock = GreenletLock()
    with held(lock):
        lock.ticket().release()
        with pytest.raises(StoreTimeout, match="called again from inside"), held(lock):
            pass
        held_still: list[bool] = []
        thread = threading.Thread(target=lambda: held_still.append(bool(lock._queue)))
        thread.start()
        thread.join()
        assert held_still == [True]
    with held(lock):
        pass


def test_acquiring_a_ticket_twice_acquires_it_once() -> None:
    lock = GreenletLock()
    ticket = lock.ticket()
    ticket.acquire()
    ticket.acquire()
    ticket.release()
    with held(lock):
        pass


class Left(BaseException):
    """The exception of a signal handler in a waiting thread."""


def test_a_waiting_thread_is_woken_and_does_not_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenlet_lock, "_MAX_WAIT", 600)
    monkeypatch.setattr(greenlet_lock, "time", None)  # which is what polling needs
    lock, order = GreenletLock(), list[int]()

    def work(number: int) -> None:
        with held(lock):
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(3)]
    with held(lock):
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(lambda: len(lock._queue) == number + 2, timeout=10)  # noqa: B023 - at once
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2]


def test_a_waiter_that_gives_up_wakes_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenlet_lock, "_MAX_WAIT", 600)
    lock, leave = GreenletLock(), threading.Event()

    def hold() -> None:
        with held(lock):
            leave.wait(30)

    def behind() -> None:
        wait_for(lambda: len(lock._queue) == 2)
        threads[2].start()
        wait_for(lambda: len(lock._queue) == 3)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def work() -> None:
        with held(lock):
            pass

    def handle(*_: object) -> None:
        raise Left

    threads = [threading.Thread(target=each, daemon=True) for each in (hold, behind, work)]
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        threads[0].start()
        wait_for(lambda: bool(lock._queue))
        threads[1].start()
        with pytest.raises(Left), held(lock):
            pass
        leave.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        leave.set()
        signal.signal(signal.SIGUSR1, before)
