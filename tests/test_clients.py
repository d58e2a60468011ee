"""What clients can do to a store's server, and what a process can do for want of descriptors: nothing to others."""

from __future__ import annotations

import os
import resource
import signal
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from processes import Start, wait_for

from shmstore.control import GREETING
from shmstore.files import StoreFiles
from shmstore.manager import connect

FULL = os.environ.get("SHMSTORE_FULL") == "1"
SLACK = 3.0  # seconds that a machine that does much else may add to a bound

Figure = Callable[[str], None]


class Interrupted(BaseException):
    pass


# A socket that an exception of a signal handler catches before anybody holds it is closed by the garbage collector.
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_after_an_interrupted_call_the_next_gets_its_own_answer(manage: Start, store_dir: Path, figure: Figure) -> None:
    """F2: the answer of a call that a signal broke off was the answer to the next one."""
    wanted, broken, rounds = 500 if FULL else 100, 0, 0

    def interrupt(*_: object) -> None:
        nonlocal broken
        broken += any(channel._sends for channel in store._pool._busy)
        raise Interrupted

    with manage(), connect("shop", directory=store_dir, in_place=False) as store:
        store.set("alice", {"name": "alice"})
        store.set("bob", {"name": "bob"})
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            while broken < wanted:
                rounds += 1
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.00002 * (rounds % 20 + 1))
                    while True:
                        store.get("alice")
                except Interrupted:
                    pass
                assert store.get("bob") == {"name": "bob"}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    figure(f"{broken} calls broken off with their request under way, 0 answers to another")


def status(pid: int, name: str) -> int:
    """Return a number in what the kernel tells of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def processor(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def limited(soft: int, pid: int = 0) -> Iterator[None]:
    """Let a process have no more descriptors than these, or more than now."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    hard = before[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def open_yet(sock: socket.socket) -> bool:
    try:
        return sock.recv(100, socket.MSG_DONTWAIT) == GREETING
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


def test_a_crowd_that_is_silent_or_talks_nonsense_is_dismissed(manage: Start, store_dir: Path, figure: Figure) -> None:
    silent, garbage, half = (500, 500, 100) if FULL else (150, 150, 30)
    files, took, failed = StoreFiles.of("shop", store_dir), [], []
    over = threading.Event()

    def work(store: object) -> None:
        while not over.is_set():
            begun = time.monotonic()
            if not store.ping():  # type: ignore[attr-defined]
                failed.append("ping")
            took.append(time.monotonic() - begun)

    with limited(4096), manage() as manager, connect("shop", directory=store_dir, in_place=False) as store:
        store.ping()
        server = manager.store().stats().server_pid
        memory, threads, used = status(server, "VmRSS"), status(server, "Threads"), processor(server)
        other = threading.Thread(target=work, args=(store,))
        other.start()
        crowd: list[socket.socket] = []
        most = 0
        try:
            for what in (
                [b""] * silent + [os.urandom(100)] * garbage + [GREETING + struct.pack("!IQ", 1, 1 << 30)[:6]] * half
            ):
                crowd.append(files.dial(30))
                with suppress(BrokenPipeError, ConnectionResetError):
                    crowd[-1].sendall(what)
                if len(crowd) % 50 == 0:
                    most = max(most, status(server, "Threads"))
            begun = time.monotonic()
            wait_for(lambda: not any(map(open_yet, crowd)), "dismissing them all")
            dismissed = time.monotonic() - begun
            used = processor(server) - used
            wait_for(lambda: status(server, "Threads") <= threads + 1, "the end of their threads")
        finally:
            over.set()
            other.join()
            for sock in crowd:
                sock.close()
        assert manager.store().stats().server_pid == server
        grown = status(server, "VmRSS") - memory
    slow = statistics.quantiles(took, n=100)[98]
    figure(
        f"{len(crowd)} clients dismissed {dismissed:.1f} s after the last; meanwhile {len(took)} calls of another, "
        f"p99 {slow * 1000:.1f} ms; {most} threads at most, {grown} KiB more"
    )
    assert not failed
    assert slow < 0.05 + 0.2, "the others have to share the processors with the crowd"
    assert most <= 256 + threads
    assert grown < 20 * 1024
    assert dismissed < 3 + SLACK
