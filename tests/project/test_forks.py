"""The processes that the tests fork."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from fork_in_c import LIBC, fork_in_c, waiting
from forks import Forker
from processes import ROOT, alive, wait_for


def test_nothing_outlives_scripts_whose_test_has_ended(forker: Forker, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import signal; signal.pause()")
    environ = os.environ | {"PYTHONPATH": ROOT}
    with open(os.devnull, "wb") as output:
        scripts = [forker.script([str(script)], output, tmp_path, environ) for _ in range(10)]
    for each in scripts:
        each.close()  # from now on nobody hears that it has ended
        os.kill(each.pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(each.init) for each in scripts), "the end of their parents")


def test_a_thread_that_waits_for_the_gil_is_seen() -> None:
    hears, tells = os.pipe()
    thread = threading.Thread(target=os.read, args=(hears, 1))
    thread.start()
    threads = [str(thread.native_id)]
    wait_for(lambda: not waiting(threads), "the thread's call")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    LIBC.write(tells, b"-", 1)  # without releasing the GIL
    seen = [waiting(threads) for _ in range(1000)]
    sys.setswitchinterval(interval)
    thread.join()
    os.close(hears)
    os.close(tells)
    assert all(seen)


def test_a_fork_in_c_beside_threads_that_wait_for_the_gil() -> None:
    over = threading.Event()

    def often() -> None:
        while not over.is_set():
            time.sleep(0.005)

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    children: list[int] = []
    try:
        for _ in range(50):
            child = fork_in_c()
            if not child:
                for _ in range(100):
                    os.stat("/")  # releases the GIL
                os._exit(0)
            children.append(child)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    try:
        while children:
            wait_for(lambda: os.waitpid(children[-1], os.WNOHANG)[0], "the end of a child")
            children.pop()
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
