"""The effects of clients on a store's server, and of a lack of descriptors on both."""

from __future__ import annotations

import os
import resource
import signal
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from processes import Run, Start, wait_for

from shmstore.client.connection import dial
from shmstore.errors import StoreUnavailable
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import GREETING
from shmstore.manager import connect

pytestmark = pytest.mark.processes("executed")

FULL = os.environ.get("SHMSTORE_FULL") == "1"
SLACK = 20.0  # seconds that a busy machine may add to a bound

Figure = Callable[[str], None]


class Interrupted(BaseException):
    pass


# If a signal handler raises before a socket is assigned, the garbage collector closes the socket.
@pytest.mark.timeout(600, method="thread")  # the default method uses the same signal
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_after_an_interrupted_call_the_next_gets_its_own_answer(manage: Start, store_dir: Path, figure: Figure) -> None:
    """F2: the next call got the answer to a call that a signal had interrupted."""
    wanted, broken, rounds = 500 if FULL else 100, 0, 0

    def interrupt(*_: object) -> None:
        nonlocal broken
        broken += any(channel._last_number for channel in whole._attachment.pool._busy)
        raise Interrupted

    with manage(), connect("shop", directory=store_dir, in_place=False) as store:
        whole: Any = store
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
    """Return a number from the kernel's status of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def processor(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def limited(soft: int, pid: int = 0) -> Iterator[None]:
    """Limit the descriptors of a process to this number."""
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


def test_silent_clients_and_clients_that_send_garbage_are_disconnected(
    manage: Start, store_dir: Path, figure: Figure
) -> None:
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
                crowd.append(dial(files, 30))
                with suppress(BrokenPipeError, ConnectionResetError):
                    crowd[-1].sendall(what)
                if len(crowd) % 50 == 0:
                    most = max(most, status(server, "Threads"))
            begun = time.monotonic()
            wait_for(lambda: sum(map(open_yet, crowd)) == 0, "dismissing them all")
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
        f"p99 {slow * 1000:.1f} ms; {most} threads at most, {grown} KiB more; {used:.2f} s of processor time"
    )
    assert not failed
    assert slow < 0.05 + (0.2 if FULL else 2), "the others have to share the processors with the crowd"
    assert most <= 256 + threads
    assert grown < 20 * 1024
    assert dismissed < 3 + SLACK


EXHAUSTED = """
import os, resource, signal, sys, time
from shmstore import StoreUnavailable
from shmstore.manager import StoreManager

manager = StoreManager("shop", directory=sys.argv[1], memory=2**20)
store = manager.store()
server = store.stats().server_pid
store.prune()
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))  # none is free, whatever this process closes
assert store.prune() == 0, "over the connection there is"
try:
    StoreManager("shop", directory=sys.argv[1]).start()
except StoreUnavailable as exc:
    assert "no connection to the server of store 'shop': Too many open files" in str(exc), exc
os.kill(server, signal.SIGKILL)
end = time.monotonic() + 3
errors = set()
n = 0
while time.monotonic() < end:
    n += 1
    store.set("a", {"n": n})
    assert store.get("a") == {"n": n}
    try:
        store.prune()
    except StoreUnavailable as exc:
        errors.add(str(exc))
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_NOFILE, limit)
assert errors
print("exhausted", round(time.process_time(), 1), flush=True)
end = time.monotonic() + 60
while True:
    try:
        store.prune()
        break
    except StoreUnavailable:
        assert time.monotonic() < end
        time.sleep(0.05)
assert store.get("a") == {"n": n}
assert store.stats().server_pid != server
manager.shutdown()
print("recovered", flush=True)
"""


def test_a_process_without_free_descriptors_works_in_place_and_logs_the_limit(store_dir: Path, run: Run) -> None:
    out, err = run(EXHAUSTED, store_dir, stderr=subprocess.PIPE).communicate(timeout=100)
    lines = out.split()
    assert lines[-1:] == ["recovered"], err
    assert float(lines[1]) < 3, "it spins"
    assert "Traceback" not in err
    assert "cannot be started" in err
    assert "Too many open files" in err
    assert len(err.splitlines()) < 30, err


def test_a_server_without_free_descriptors_serves_its_clients(manage: Start, store_dir: Path, figure: Figure) -> None:
    with manage() as manager, connect("shop", directory=store_dir, in_place=False) as store:
        server, files = manager.store().stats().server_pid, StoreFiles.of("shop", store_dir)
        soft, hard = resource.prlimit(server, resource.RLIMIT_NOFILE)
        assert soft == hard
        crowd: list[socket.socket] = []
        # The limit applies only to the server, not to this process.
        with limited(len(os.listdir(f"/proc/{server}/fd")) + 10, server):
            used = processor(server)
            begun = time.monotonic()
            for _ in range(20):
                crowd.append(dial(files, 30))
                with suppress(BrokenPipeError):
                    crowd[-1].sendall(GREETING)
            with pytest.raises(StoreUnavailable):
                connect("shop", directory=store_dir, in_place=False)
            told = time.monotonic() - begun
            assert told < 2 + SLACK
            assert [store.ping() for _ in range(100)] == [True] * 100
            used = processor(server) - used
            for sock in crowd:
                sock.close()
            with connect("shop", directory=store_dir, in_place=False) as another:
                assert another.ping()
        assert manager.store().stats().server_pid == server
    figure(f"a new one is told after {told:.1f} s, {used:.2f} s of processor time")
    assert used < told / 8, "it spins"
