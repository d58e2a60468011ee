"""The lock that greenlets can wait for and fork leaves free."""

from __future__ import annotations

import os
import signal
import subprocess
import threading

import pytest
from processes import Run

from shmstore.gate import Gate


def test_one_thread_at_a_time() -> None:
    gate, inside, most = Gate(), [0], [0]

    def work() -> None:
        for _ in range(200):
            with gate:
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


def test_an_exception_opens_it() -> None:
    gate = Gate()
    with pytest.raises(ZeroDivisionError), gate:
        raise ZeroDivisionError
    with gate:
        pass


def test_greenlets_wait_for_it_although_it_is_older_than_the_patching(run: Run) -> None:
    """As under Gunicorn: its master imports us, and its workers patch themselves after the fork."""
    process = run(
        """
from shmstore.gate import Gate
gate = Gate()
import gevent.monkey
gevent.monkey.patch_all()
import time, gevent

def work(name):
    with gate:
        print(name, "in")
        time.sleep(0.01)
        print(name, "out")

gevent.joinall([gevent.spawn(work, name) for name in "ab"])
""",
        stderr=subprocess.PIPE,
    )
    output, errors = process.communicate(timeout=30)
    assert output.split("\n")[:-1] == ["a in", "a out", "b in", "b out"], errors


def test_in_a_child_of_fork_it_is_free() -> None:
    gate = Gate()
    with gate:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # the end of a child that waits for ever
            with gate:
                os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
