"""The lock: bounded, owned by threads, freed by death, indifferent to fork, threads, signals and gevent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from engines import on_each_engine
from fault_injection import Interrupted, Steps, interrupt, tracing
from mutual_exclusion import check_mutual_exclusion
from sampling import FULL, LONGEST

from shmstore.codec.ids import key_of
from shmstore.engine import mutex as lock_module
from shmstore.engine.arena import Arena
from shmstore.engine.frame import seal
from shmstore.engine.layout import ROW_CELLS, Geometry
from shmstore.errors import StoreTimeout, StoreUnavailable
from shmstore.testing import wait_until

KEY = key_of(b"a")


@pytest.fixture
def path(store_dir: Path) -> str:
    path = str(store_dir / "arena")
    arena = Arena.create(path, Geometry.plan(2**16))
    try:
        arena.lock(1)
        arena.publish(0, KEY, seal(KEY, 0, 0, b"body"), 0, 2**62, 1)
    finally:
        arena.unlock()
    arena.close()
    return path


def run(code: str, *arguments: str, before: str = "") -> subprocess.Popen[str]:
    """Start a process that has an `arena` and runs `code`; ``before`` it imports anything."""
    head = before + (
        "import os, sys, time, signal, threading\n"
        "from shmstore.engine.arena import Arena\narena = Arena.open(sys.argv[1])\n"
    )
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", head + textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


HOLD = """
    arena.lock(1)
    print("held", flush=True)
    time.sleep(100)
"""


def holding(path: str) -> subprocess.Popen[str]:
    child = run(HOLD, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


@on_each_engine  # their readers differ
def test_waiting_is_bounded_and_names_the_holder(path: str) -> None:
    child = holding(path)
    arena = Arena.open(path)
    for action in (None, signal.SIGSTOP):
        if action:
            child.send_signal(action)
        begin = time.monotonic()
        with pytest.raises(StoreTimeout, match=rf"process {child.pid}\b"):
            arena.lock(0.2)
        arena.unlock()  # as a finally does: this process does not hold it, so nothing happens
        assert 0.2 <= time.monotonic() - begin < 60
        assert not arena.try_lock()
        entry = arena.reader.read(KEY, 0.1)  # reads still succeed
        assert entry is not None
    end(child)
    arena.lock(5)
    arena.unlock()
    arena.close()


def test_a_negative_timeout_does_not_wait(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    child = holding(path)
    arena = Arena.open(path)
    with monkeypatch.context() as patched:
        patched.setattr("shmstore.engine.mutex.before_blocking", lambda: pytest.fail("it waits"))
        assert not arena.try_lock()
    end(child)
    arena.close()


def test_a_short_wait_needs_no_event_loop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback in gevent's hub can call the store, but nothing there may call the patched `time.sleep`."""
    child = holding(path)
    arena = Arena.open(path)
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", lambda _: pytest.fail("it sleeps in the hub"))
        with pytest.raises(StoreTimeout) as refused:
            arena.lock(0)
    assert refused.value.waited >= 0.005, "this is long enough for most operations of others"
    end(child)
    arena.close()


def test_a_holder_that_continues_after_others_gave_up(path: str) -> None:
    code = """
        arena.lock(1)
        print("held", flush=True)
        while not os.path.exists(sys.argv[1] + ".go"): time.sleep(0.01)
        arena.unlock()
        print("freed", flush=True)
    """
    child = run(code, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    arena = Arena.open(path)
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(StoreTimeout):
        arena.lock(0.1)
    arena.unlock()
    assert not arena.try_lock()
    Path(path + ".go").touch()
    child.send_signal(signal.SIGCONT)
    assert child.stdout.readline() == "freed\n"
    arena.lock(5)
    arena.unlock()
    arena.close()
    end(child)


def test_the_death_of_its_holder_frees_the_mutex(path: str) -> None:
    arena = Arena.open(path)
    for _ in range(5):
        end(holding(path))
        arena.lock(5)
        arena.unlock()
    arena.close()


def held_by_the_dead(arena: Arena) -> None:
    """Let a thread take the lock and end."""
    thread = threading.Thread(target=arena.lock, args=(1,))
    thread.start()
    thread.join()
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):  # `join` does not wait for the kernel
        pass


def test_the_end_of_a_thread_frees_the_mutex(path: str) -> None:
    arena = Arena.open(path)
    held_by_the_dead(arena)
    arena.lock(5)
    arena.unlock()
    arena.close()


def test_an_exception_at_any_instruction_of_the_takeover_from_a_dead_holder(path: str) -> None:
    arena = Arena.open(path)
    for chosen in count(1):
        held_by_the_dead(arena)
        steps = Steps(chosen, interrupt)
        with suppress(Interrupted):
            try:
                with tracing(steps, instructions=True):
                    arena.lock(5)
            finally:
                arena.unlock()
        assert arena.try_lock(), f"instruction {chosen}"
        arena.unlock()
        if steps.count < chosen:
            break
    assert chosen > 30, "nothing was stepped"
    arena.close()


def test_a_wait_that_is_broken_off_during_the_takeover_leaves_the_lock_to_its_new_owner(path: str) -> None:
    child = run(
        """
        from shmstore.engine import mutex
        from shmstore.system.blocking import WouldBlock, without_blocking

        dying = threading.Thread(target=arena.lock, args=(1,))
        dying.start()
        dying.join()
        while os.path.exists(f"/proc/self/task/{dying.native_id}"):
            pass
        taken, go_on, lock = threading.Event(), threading.Event(), arena.file.mutex._mutex

        def take_over():
            print(mutex._try_lock(lock), flush=True)
            taken.set()
            go_on.wait()
            print(mutex._make_consistent(lock), mutex._unlock(lock), flush=True)

        thread = threading.Thread(target=take_over)
        thread.start()
        taken.wait()
        try:
            without_blocking(lambda: arena.lock(5))
        except WouldBlock:
            print("broken off", flush=True)
        finally:
            arena.unlock()
        go_on.set()
        thread.join()
        print(arena.try_lock())
        """,
        path,
    )
    assert child.communicate(timeout=60)[0] == f"{errno.EOWNERDEAD}\nbroken off\n0 0\nTrue\n"


def test_a_call_inside_the_takeover_is_refused_without_harm(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the handler of a signal that arrives when the death of the owner was reported, and nothing was done yet."""
    arena = Arena.open(path)
    held_by_the_dead(arena)
    try_lock = lock_module._try_lock
    refused: list[StoreTimeout] = []

    def interrupted(mutex: Any) -> int:
        code = try_lock(mutex)
        if code == errno.EOWNERDEAD:
            try:
                arena.lock(5)
            except StoreTimeout as error:
                refused.append(error)
                raise
            finally:
                arena.unlock()
        return code

    monkeypatch.setattr(lock_module, "_try_lock", interrupted)
    with pytest.raises(StoreTimeout, match="called again"):
        try:
            arena.lock(5)
        finally:
            arena.unlock()
    assert len(refused) == 1
    monkeypatch.undo()
    assert arena.try_lock()
    arena.unlock()
    arena.close()


def test_an_unrecoverable_lock_is_reported_as_damaged(path: str) -> None:
    arena: Any = Arena.open(path)
    held_by_the_dead(arena)
    lock_module._try_lock(arena.file.mutex._mutex)  # EOWNERDEAD, then no recovery
    arena.unlock()
    with pytest.raises(StoreUnavailable, match="damaged"):
        arena.lock(1)
    arena.unlock()
    arena.close()
    arena = Arena.open(path)  # the only user creates a new mutex
    assert arena.try_lock()
    arena.unlock()
    arena.close()


class Jumping:
    """A clock that advances by many seconds in each sleep, as when the machine is suspended; acts after some sleeps."""

    def __init__(self, naps: int, action: Callable[[], None]) -> None:
        self.now, self.naps = 0.0, 0
        self.last_nap, self.action = naps, action

    def monotonic(self) -> float:
        self.now += 0.0001
        return self.now

    def sleep(self, _: float) -> None:
        self.now += 60
        self.naps += 1
        if self.naps == self.last_nap:
            self.action()


def test_a_suspended_machine_is_not_mistaken_for_a_stopped_holder(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena.open(path)
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        arena.lock(1)
        held.set()
        free.wait()
        arena.unlock()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()

    def let_go() -> None:
        free.set()
        thread.join()

    clock = Jumping(10**6, let_go)
    with monkeypatch.context() as patched:
        patched.setattr(lock_module, "time", clock)
        with pytest.raises(StoreTimeout):
            arena.lock(2)  # it ends, though each nap counts little
        assert 10 < clock.naps < 100
        patched.setattr(lock_module, "time", Jumping(10, let_go))
        arena.lock(2)
    arena.unlock()
    arena.close()


def test_threads_exclude_each_other(path: str) -> None:
    arena = Arena.open(path)
    check_mutual_exclusion(arena)
    arena.close()


def test_a_reentrant_call_is_refused_without_harm(path: str) -> None:
    arena = Arena.open(path)
    try:
        arena.lock(1)
        try:
            with pytest.raises(StoreTimeout, match="inside"):
                arena.lock(1)
        finally:
            arena.unlock()
        outsider = run("print(arena.try_lock()); arena.unlock()", path)
        assert outsider.communicate()[0] == "False\n"  # still ours
    finally:
        arena.unlock()
    outsider = run("print(arena.try_lock()); arena.unlock()", path)
    assert outsider.communicate()[0] == "True\n"
    arena.close()


@pytest.mark.parametrize("where", ["fork_and_look()", "threading.Thread(target=fork_and_look).start()"])
def test_a_forked_child_neither_holds_nor_frees_its_parents_lock(path: str, where: str) -> None:
    child = run(
        f"""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what this is about
        def fork_and_look():
            arena.lock(1)
            pid = os.fork()
            if not pid:
                arena.unlock()
                os._exit(arena.try_lock())
            _, status = os.waitpid(pid, 0)
            print(os.waitstatus_to_exitcode(status), arena.file.mutex.holder().split()[1] == str(os.getpid()))
            arena.unlock()
            pid = os.fork()
            if not pid:
                os._exit(arena.try_lock())
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        {where}
        """,
        path,
    )
    assert child.communicate(timeout=300)[0] == "0 True\n1\n"


def test_fork_while_another_thread_holds_it(path: str) -> None:
    child = run(
        """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what this is about
        held, done = threading.Event(), threading.Event()
        def hold():
            arena.lock(1); held.set(); done.wait(); arena.unlock()
        thread = threading.Thread(target=hold); thread.start(); held.wait()
        pid = os.fork()
        if not pid:
            arena.lock(30)  # as soon as the parent's thread lets go
            arena.unlock()
            os._exit(7)
        time.sleep(0.1); done.set(); thread.join()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """,
        path,
    )
    assert child.communicate(timeout=300)[0] == "7\n"


def test_a_signal_handler_that_raises_leaves_the_mutex_free(path: str) -> None:
    child = run(
        """
        class Alarm(Exception): pass
        def ring(*_): raise Alarm
        signal.signal(signal.SIGALRM, ring)
        rung = 0
        for round in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 + round * 1e-6)
                while True:
                    try:
                        arena.lock(5)
                    finally:
                        arena.unlock()
            except Alarm:
                rung += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        pid = os.fork()
        if not pid:
            os._exit(arena.try_lock())
        print(rung, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """,
        path,
    )
    assert child.communicate(timeout=300)[0] == "300 1\n"


@pytest.mark.parametrize("order", ["before", "after"])
def test_waiting_lets_other_greenlets_run(path: str, order: str) -> None:
    pytest.importorskip("gevent")
    patch = "from gevent import monkey; monkey.patch_all()"
    head = (
        "import gevent, sys, time\nfrom shmstore.engine.arena import Arena\nfrom shmstore.errors import StoreTimeout\n"
    )
    code = (patch + "\n" + head if order == "before" else head + patch + "\n") + textwrap.dedent(
        """
        arena = Arena.open(sys.argv[1])
        ticks = []
        def tick():
            while True:
                ticks.append(1); gevent.sleep(0.01)
        gevent.spawn(tick)
        try:
            arena.lock(0.5)
        except StoreTimeout:
            print(len(ticks) > 5)
        """
    )
    child = holding(path)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=300)
    end(child)
    assert done.stdout == "True\n", done.stderr


def test_a_wait_ends_as_soon_as_the_mutex_is_free(path: str) -> None:
    child = holding(path)
    arena = Arena.open(path)
    taken: list[bool] = []

    def take() -> None:
        arena.lock(60)
        taken.append(True)
        arena.unlock()

    thread = threading.Thread(target=take)
    thread.start()
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: taken)
    thread.join()
    end(child)
    arena.close()


# -- mutual exclusion: no change is lost, even if processes die --------------------------------------------------------

TURNS = 200 if FULL else 100
COUNT = """
    total = arena.counters._rows.start + ROW - 1  # of all, and of each: a cell that nothing else uses
    def work(number):
        for _ in range(TURNS):
            try:
                arena.lock(60)
                own = total + ROW * number
                plan = [total, arena.cells[total] + 1, own, arena.cells[own] + 1]
                os.sched_yield()  # somebody else may try now
                arena.commit(plan)
            finally:
                arena.unlock()
    numbers = range(int(sys.argv[2]), int(sys.argv[2]) + 4)
""".replace("ROW", str(ROW_CELLS)).replace("TURNS", str(TURNS))  # fmt: skip
THREADS = """
    threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
    for thread in threads: thread.start()
"""
FORKS = """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    thread = threading.Thread(target=work, args=(numbers[0],)); thread.start()
    for number in numbers[1:]:
        if not os.fork():
            work(number)
            os._exit(0)
    for _ in numbers[1:]:
        assert os.wait()[1] == 0
    thread.join()
"""
GREENLETS = """
    from gevent import monkey; monkey.patch_all()
    import gevent
    other = __import__("threading").Thread(target=work, args=(numbers[0],)); other.start()
    gevent.joinall([gevent.spawn(work, number) for number in numbers[1:]], raise_error=True)
    other.join()
"""
FOR_EVER = "    while True: work(numbers[0])\n"


@pytest.mark.timeout(1200)
def test_the_lock_excludes_other_holders(path: str) -> None:
    pytest.importorskip("gevent")
    patch = "from gevent import monkey; monkey.patch_all()\n"
    crowd = [
        run(COUNT + THREADS, path, "1"),
        run(COUNT + FORKS, path, "5"),
        run(COUNT + GREENLETS, path, "9"),
        run(COUNT + GREENLETS, path, "13", before=patch),
    ]
    arena = Arena.open(path)
    total = arena.counters._rows.start + ROW_CELLS - 1
    try:
        victim = total + ROW_CELLS * 17
        for _ in range(8 if FULL else 3):
            begun = arena.cells[victim]
            doomed = run(COUNT + FOR_EVER, path, "17")
            wait_until(lambda: arena.cells[victim] > begun)  # noqa: B023 - called at once
            end(doomed)
        for child in crowd:
            output, _ = child.communicate(timeout=LONGEST)
            assert (child.returncode, output) == (0, "")
        assert arena.try_lock()
        arena.unlock()
        each = [arena.cells[total + ROW_CELLS * number] for number in range(1, 18)]
        assert each[:16] == 16 * [TURNS]
        assert arena.cells[total] == sum(each)
    finally:
        for child in crowd:
            end(child)
        arena.close()
