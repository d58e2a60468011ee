"""A write of the C core stopped at every machine instruction: the state of the memory there, and real kills."""

from __future__ import annotations

import ctypes
import os
import random
import signal
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from typing import Any

import fault_injection as faults
import pytest
from engines import needs_core
from fault_injection import Moment, body
from sampling import FULL

from shmstore import Store

MOMENTS = 10**9 if FULL else 30
KILLS = 200 if FULL else 5

TRACEME, SINGLESTEP = 0, 9  # sys/ptrace.h

Figure = Callable[[str], None]
pytestmark = needs_core


def ptrace(request: int, pid: int) -> None:
    """
    Call ptrace.

    Raises:
        OSError: The system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, pid, None, None) == -1:
        raise OSError(ctypes.get_errno(), "ptrace")


def may_trace() -> bool:
    pid = os.fork()
    if not pid:
        try:
            ptrace(TRACEME, 0)
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def instructions(store: Store, put: tuple[Any, ...]) -> Generator[None, None, None]:
    """Let a child process write a session; yield after each instruction of the call. Closing this kills the child."""
    core = store.arena.file.core
    assert core is not None
    pid = os.fork()
    if not pid:
        me = os.getpid()
        ptrace(TRACEME, 0)
        os.kill(me, signal.SIGSTOP)
        core.put(*put)
        os.kill(me, signal.SIGSTOP)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSTOPPED(status)
    try:
        while True:
            ptrace(SINGLESTEP, pid)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
                break
            yield
    finally:
        if not os.WIFSIGNALED(status):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert os.WSTOPSIG(status) == signal.SIGSTOP, "it did not come to the end of the call"


def arguments(store: Store) -> tuple[Any, ...]:
    """Return the arguments of the core for the write of the situation "overwrite longer"."""
    return "b", None, store.codec.encode(body(900, "n")), 50 * 10**9, 1, None, store.options.clock()


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> tuple[faults.Content, faults.Content]:
    """Return the content before and after; skip where processes may not trace others."""
    if not may_trace():
        pytest.skip("this system does not allow ptrace")
    monkeypatch.setenv("SHMSTORE_ENGINE", "c")
    with faults.populated() as store:
        before = faults.content(store)
        store.set("b", body(900, "n"), ttl=50)
        return before, faults.content(store)


@pytest.mark.timeout(1200)
def test_stopped_at_every_instruction(
    contents: tuple[faults.Content, faults.Content], seed: int, figure: Figure
) -> None:
    moments: list[bytes] = []
    count = 0
    with faults.populated() as store:
        memory, put = store.arena.file.memory, arguments(store)
        for _ in instructions(store, put):
            count += 1
            image = faults.image(memory)
            if not moments or moments[-1] != image:
                moments.append(image)
        assert len(moments) > 100, "nothing was stepped"
        rnd = random.Random(seed)
        for image in moments if len(moments) <= MOMENTS else rnd.sample(moments, MOMENTS):
            with faults.restored(store, Moment(image, set())) as copy:
                faults.check_outcome(copy, *contents, atomic=True)
    figure(f"{count} instructions, {len(moments)} states of the memory")


@pytest.mark.timeout(1200)
def test_killed_at_an_instruction(contents: tuple[faults.Content, faults.Content], seed: int, figure: Figure) -> None:
    rnd = random.Random(seed)
    with faults.populated() as store:
        total = sum(1 for _ in instructions(store, arguments(store)))
    for _ in range(KILLS):
        chosen = rnd.randrange(1, total)
        with faults.populated() as store:
            with closing(instructions(store, arguments(store))) as stepped:
                next(islice(stepped, chosen, None), None)  # `closing` kills it there; this run may be shorter
            try:
                faults.check_outcome(store, *contents, atomic=True)
            except BaseException:
                print(f"killed at instruction {chosen} of {total}")
                raise
    figure(f"{KILLS} kills among {total} instructions")
