"""The processes that the tests fork."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest
from fork_in_c import LIBC, fork_in_c, may_wait
from forks import Forker
from processes import ROOT, alive, wait_for


@pytest.fixture
def switches_late() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(interval)


class Reader:
    """A thread that reads one byte from a pipe. It waits for the GIL if it is woken while another thread has that."""

    def __enter__(self) -> Self:
        self._hears, self._tells = os.pipe()
        self._thread = threading.Thread(target=os.read, args=(self._hears, 1))
        self._thread.start()
        assert self._thread.native_id
        self.id = self._thread.native_id
        return self

    def wake(self) -> None:
        LIBC.write(self._tells, b"-", 1)

    def __exit__(self, *_: object) -> None:
        self.wake()
        self._thread.join()
        os.close(self._hears)
        os.close(self._tells)


def spin(seconds: float) -> None:
    """Pass time with the GIL."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_nothing_outlives_scripts_whose_test_has_ended(forker: Forker, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import signal; signal.pause()")
    environ = os.environ | {"PYTHONPATH": ROOT}
    with open(os.devnull, "wb") as output:
        scripts = [forker.script([str(script)], output, tmp_path, environ) for _ in range(10)]
    for each in scripts:
        each.close()  # its parent cannot report the end any more
        os.kill(each.pid, signal.SIGKILL)
    wait_for(lambda: not any(alive(each.init) for each in scripts), "the end of their parents")


def test_a_thread_that_waits_for_the_gil_is_seen(switches_late: None) -> None:
    with Reader() as reader:
        wait_for(lambda: not may_wait(reader.id), "the thread's call")
        reader.wake()
        for _ in range(10**6):  # without releasing the GIL
            if may_wait(reader.id):
                break
        assert all(may_wait(reader.id) for _ in range(1000))


def test_a_child_forked_beside_threads_that_wait_for_the_gil_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader()) for _ in range(5)]
        forks = 0

        class Libc:
            """Before the first fork threads wait for the GIL, and it was given to one of them, as on a busy machine."""

            def __getattr__(self, name: str) -> Any:
                return getattr(LIBC, name)

            def fork(self) -> int:
                nonlocal forks
                forks += 1
                if forks == 1:
                    for each in readers[1:]:
                        each.wake()
                    spin(0.02)
                    os.stat("/")  # releases the GIL
                    readers[0].wake()
                    spin(0.02)
                child: int = LIBC.fork()
                return child

        monkeypatch.setattr("fork_in_c.LIBC", Libc())
        child = fork_in_c()
        if not child:
            for _ in range(100):
                os.stat("/")
            os._exit(0)
    try:
        wait_for(lambda: not alive(child), "the end of the child")
        assert forks == 2
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
