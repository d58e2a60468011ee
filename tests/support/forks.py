"""
Processes forked by a process that has imported everything: this saves a second of CPU time per Gunicorn.

A store's server runs the same `server.main`, with the same order at its standard input, and detaches itself as always.
A Gunicorn runs its script, with the same arguments. How both are executed, and what they inherit, is shown by the tests
that are marked ``processes("executed")``, and by all that start a program.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NoReturn, Self

_PR_SET_CHILD_SUBREAPER = 36


class Forker:
    """The client that orders forks, from the process at the other end of a socket."""

    def __init__(self, orders: socket.socket) -> None:
        self._orders = orders

    def server(self, argv: list[str], stdin: int, env: Mapping[str, str]) -> Callable[[], None]:
        """Replace `shmstore.client.spawn._execute`."""
        from shmstore.client.spawn import BOOT

        python, *code, name = argv
        assert (python, code) == (sys.executable, ["-P", "-c", BOOT])
        self._order([stdin, 2], [BOOT, name], os.getcwd(), env)
        return lambda: None

    def script(self, command: Sequence[str], output: IO[bytes], directory: Path, env: Mapping[str, str]) -> Forked:
        """Run a Python script in a session of its own; servers of stores that are started in it are forked too."""
        ours, theirs = socket.socketpair()
        with theirs, open(os.devnull) as nothing:
            self._order([nothing.fileno(), output.fileno(), theirs.fileno()], command, str(directory), env)
        return Forked(ours)

    def _order(self, fds: list[int], argv: Sequence[str], directory: str, env: Mapping[str, str]) -> None:
        umask = os.umask(0)
        os.umask(umask)
        order = {"argv": [*argv], "env": dict(env), "directory": directory, "umask": umask}
        socket.send_fds(self._orders, [json.dumps(order).encode()], fds)


class ForkingProcess(Forker):
    """The process that forks; `end` stops it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        super().__init__(ours)

    def end(self) -> None:
        self._orders.close()
        self._process.wait()


class Forked:
    """
    A process that was forked for this one, with the interface of `subprocess.Popen`.

    Attributes:
        init: Its parent, which adopts its orphans.
    """

    def __init__(self, reports: socket.socket) -> None:
        with reports:
            self._reports = reports.makefile("r")
        self.init, self.pid = map(int, self._reports.readline().split())
        self.returncode: int | None = None
        self._lock = threading.Lock()  # some tests order forks in several threads

    def poll(self, timeout: float = 0.0) -> int | None:
        ended = select.select([self._reports], [], [], timeout)[0]
        with self._lock:
            if self.returncode is None and ended:
                self.returncode = int(self._reports.readline())
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll(0.05)) is None:  # not for longer: another thread may have read the report
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        self._reports.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it if it still runs."""
        self.kill()
        self.close()

    def descendants(self) -> set[int]:
        """Return itself and its descendants, without zombies."""
        parents = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    state, parent, *_ = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                parents[int(entry)] = int(parent), state
        found = {self.init}
        while more := {pid for pid, (parent, _) in parents.items() if parent in found} - found:
            found |= more
        return {pid for pid in found - {self.init} if parents[pid][1] not in "ZX"}


def main() -> None:
    import gunicorn.app.wsgiapp
    import gunicorn.workers.ggevent
    import gunicorn.workers.gthread
    import gunicorn.workers.sync  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] == "gunicorn"]:
        del sys.modules[name]  # it reads its directory when it is imported; modules that it imports itself stay

    import shmstore.flask
    import shmstore.gunicorn
    import shmstore.server.main  # noqa: F401

    # For each of the many events of its patching, gevent looks through all packages that are installed.
    entry_points = [entry for package in metadata.distributions() for entry in package.entry_points]
    vars(metadata)["entry_points"] = metadata.EntryPoints(entry_points).select

    assert "redis" not in sys.modules, "it changes ssl in a way that gevent cannot patch any more"

    gc.freeze()  # a collection in a child would copy the pages of all imported modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no process waits for the children
    orders = socket.socket(fileno=int(sys.argv[1]))
    while received := receive(orders):
        order, fds = received
        if not os.fork():
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if len(fds) == 2:
                serve(order, fds)
            init(order, fds)
        for fd in fds:
            os.close(fd)


def receive(orders: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    data, fds, _, _ = socket.recv_fds(orders, 2**20, 3)
    return (json.loads(data), fds) if data else None


def init(order: dict[str, Any], fds: list[int]) -> NoReturn:
    """Fork the script, adopt its orphans as process 1 does, and fork the servers that it orders."""
    reports = socket.socket(fileno=fds.pop())
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = os.fork()
    if not script:
        orders.close()
        reports.close()
        become(order, [*fds, os.dup(fds[1])])
        from shmstore.client import spawn

        vars(spawn)["_execute"] = Forker(theirs).server
        sys.path.insert(0, os.path.dirname(sys.argv[0]))
        end_with(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    theirs.close()
    for fd in fds:
        os.close(fd)
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())

    def report(line: str) -> None:
        with suppress(BrokenPipeError):  # the test may have ended
            reports.sendall(f"{line}\n".encode())

    report(f"{os.getpid()} {script}")
    os.kill(os.getpid(), signal.SIGCHLD)  # the script may have ended before there was a handler
    heard = [orders, woken]
    while True:
        for ready in select.select(heard, [], [])[0]:
            if ready is woken:
                woken.recv(4096)
            elif (received := receive(orders)) is None:
                heard.remove(orders)
            else:
                if not os.fork():
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for ours in (reports, orders, woken, wakes):
                        ours.close()
                    serve(*received)
                for fd in received[1]:
                    os.close(fd)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == script:
                    report(f"{os.waitstatus_to_exitcode(ended[1])}")
        except ChildProcessError:
            os._exit(0)


def serve(order: dict[str, Any], fds: list[int]) -> NoReturn:
    """Run the program of a server of a store, as `spawn` asked for it."""
    become(order, [fds[0], os.open(os.devnull, os.O_WRONLY), fds[1]])
    end_with(lambda: exec(sys.argv[0], {}))


def end_with(main: Callable[[], object]) -> NoReturn:
    """
    Run it, and exit as Python does, but without freeing the imported modules, which takes as long as importing them.

    A process that ``main`` forks ends here too.
    """
    status: object = 1
    try:
        main()
        status = 0
    except SystemExit as exc:
        status = exc.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    assert isinstance(status, int)
    os._exit(status & 0xFF)


def become(order: dict[str, Any], fds: list[int]) -> None:
    """Take over the descriptors, the directory and the environment of an order."""
    from shmstore.client.spawn import SYS_PATH

    os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(order["directory"])
    vars(multiprocessing.process)["ORIGINAL_DIR"] = order["directory"]  # what it spawns finds modules relative to that
    os.umask(order["umask"])
    os.environ.clear()
    os.environ.update(order["env"])
    if SYS_PATH not in order["env"]:  # else it is a server, which takes that
        sys.path[:] = [*order["env"]["PYTHONPATH"].split(os.pathsep), *sys.path[1:]]  # after the packages
    sys.argv[:] = order["argv"]


if __name__ == "__main__":
    main()
