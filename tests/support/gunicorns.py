"""Real Gunicorns, for tests of what happens under them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPResponse
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from forks import Forked, Forker
from processes import ROOT, alive, is_server, marked, wait_for

from shmstore.ipc.directory import StoreFiles

CONF = """
import shmstore.gunicorn
workers = 3
control_socket_disable = True
graceful_timeout = 5
DAY = 100
def life(options, session, sid):
    return DAY
hooks = shmstore.gunicorn.Hooks(
    "shop", memory=2**20, directory={directory!r}, ttl=lambda o, s, i: life(o, s, i), {options}
)
on_starting = hooks.on_starting
on_reload = hooks.on_reload
on_exit = hooks.on_exit

def post_worker_init(worker):
    worker.log.info("This worker hears signals")
"""


# The script, not `python -m gunicorn`: that cannot execute itself again at USR2.
SCRIPT = (str(Path(sys.executable).with_name("gunicorn")),)
# The oldest supported version: `make test` installs it there.
OLDEST = Path(sys.prefix, "oldest")


class Answer(NamedTuple):
    """The parts of a response that tests check."""

    status: int
    cookies: list[str]
    body: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def answer_over(sock: socket.socket, path: str, cookie: str) -> Answer:
    """Return the answer to one request over a connection."""
    sock.sendall(f"GET {path} HTTP/1.0\r\nCookie: session={cookie}\r\n\r\n".encode())
    with HTTPResponse(sock) as response:
        response.begin()
        return Answer(response.status, response.headers.get_all("Set-Cookie", []), response.read().decode())


class Gunicorn:
    """
    A Gunicorn in a session of its own, listening on a unix socket.

    Attributes:
        mark: A mark in the environment of all its processes.
        process: The master: a child of this process, one that was forked for it, or an `Adopted` one.
        pids: The processes that answered.
    """

    def __init__(
        self,
        app: str,
        place: Path,
        store_dir: Path,
        *arguments: str,
        options: str = "",
        conf: str = "",
        command: Sequence[str] = SCRIPT,
        path: str = "",
        forker: Forker | None = None,
    ) -> None:
        self._forker, self._forks = forker, list[Forked]()
        self.place = place
        self.store_dir = store_dir
        self.socket = store_dir / f"http-{place.name}"
        self.files = StoreFiles.of("shop", store_dir)
        self.log = place / "log"
        self.pids: set[int] = set()
        self._command = [
            *command, "-c", str(place / "gunicorn.conf.py"), "--bind", f"unix:{self.socket}", *arguments, "app:app"
        ]  # fmt: skip
        self.mark = f"SHMSTORE_TEST_PLACE={place}"
        name, _, value = self.mark.partition("=")
        paths = [part for part in (path, ROOT, str(place)) if part]
        self._environ = os.environ | {name: value, "PYTHONPATH": os.pathsep.join(paths)}
        (place / "app.py").write_text(app)
        self.configure(options, conf)
        self.start()

    def start(self) -> Gunicorn:
        """Start it, or start it again if it has ended; the log is appended to."""
        self._before = self.heard() if self.log.exists() else 0
        self.process: subprocess.Popen[bytes] | Forked | Adopted
        with open(self.log, "ab") as log:
            if self._forker is not None:
                self.process = self._forker.script(self._command, log, self.place, self._environ)
                self._forks.append(self.process)
            else:
                self.process = subprocess.Popen(
                    self._command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=self.place,
                    env=self._environ,
                )  # fmt: skip
        self._replaced = False
        self.pids.add(self.process.pid)
        return self

    def crash(self) -> None:
        """Kill the master; requests wait for the next `start`."""
        self._replaced = True
        self.process.kill()
        self.process.wait()

    def adopt(self, pid: int, ended_by: str | None = None) -> None:
        """Continue with a master that the previous one has started, which ends by itself or by that signal."""
        self._replaced = True
        if ended_by:
            self.signal(ended_by)
        assert self.process.wait(60) == 0
        self.process = Adopted(pid)
        self._replaced = False

    def members(self) -> set[int]:
        """Return all its running descendants, the store's server too."""
        return marked(self.mark).union(*(forked.descendants() for forked in self._forks))

    def servers(self) -> set[int]:
        """Return the server processes among them."""
        return {pid for pid in self.members() if is_server(pid)}

    def end_all(self) -> None:
        """Kill everything that it has started."""

        def ended() -> bool:
            members = self.members()
            for pid in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not members

        wait_for(ended, "the end of all")
        self.process.wait()
        for forked in self._forks:
            forked.close()

    def nothing_left(self) -> None:
        wait_for(lambda: not self.members(), "the end of all")
        assert not self.socket.exists()
        assert not Path(self.files.address).exists()

    def _check_it_runs(self) -> None:
        process = self.process
        ended = process.poll() is not None
        assert not ended or self._replaced or self.process is not process, self.log.read_text()

    def configure(self, options: str = "", conf: str = "") -> None:
        self.write_configuration(CONF.format(directory=str(self.store_dir), options=options) + conf)

    def write_configuration(self, text: str) -> None:
        file = self.place / "gunicorn.conf.py"
        file.write_text(text)
        # Python would use the compiled file again for a text of equal length that was written within the same second.
        Path(cache_from_source(file)).unlink(missing_ok=True)

    def booted(self, workers: int = 3) -> Self:
        """Wait for the first workers: a signal that meets one in the middle of its fork is lost, in Gunicorn."""

        def all_hear() -> bool:
            self._check_it_runs()
            return self.heard() - self._before >= workers

        wait_for(all_hear, "the boot")
        return self

    def ask(self, path: str, cookie: str = "") -> Answer:
        """Return the answer to a request with a session cookie; wait while no process listens."""

        def listening() -> socket.socket | None:
            self._check_it_runs()
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(60)
            try:
                sock.connect(os.fspath(self.socket))
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                return None
            return sock

        with wait_for(listening, "the listener") as sock:
            return answer_over(sock, path, cookie)

    def get(self, path: str = "/") -> dict[str, Any]:
        """Return the JSON of the test's application; fail on an error."""
        answer = self.ask(path)
        assert answer.status == 200, (answer, self.log.read_text())
        result: dict[str, Any] = json.loads(answer.body)
        self.pids.add(result["pid"])
        return result

    @property
    def server(self) -> int | None:
        return self.files.server()

    def signal(self, name: str) -> None:
        self.process.send_signal(getattr(signal, f"SIG{name}"))

    def group(self, name: str) -> None:
        os.killpg(self.process.pid, getattr(signal, f"SIG{name}"))

    def heard(self) -> int:
        """Return how many workers have booted, of this and all previous masters."""
        return self.log.read_text().count("hears signals")

    def hearing(self) -> set[int]:
        """
        Return the workers that have booted and run. Before that, a signal is lost or ends the worker at once.

        A dead worker may stay in the list of children for a while: newer Gunicorns reap none while they start others.
        """
        latest = dict(re.findall(r"\[(\d+)\] .*(Booting|hears signals)", self.log.read_text()))  # a pid may come back
        return {pid for pid in self.workers() if latest.get(str(pid)) == "hears signals" and alive(pid)}

    def workers(self) -> set[int]:
        return children(self.process.pid)

    def are_gone(self, workers: set[int]) -> bool:
        """Return whether these have ended. The list of children is not enough: during a fork it may be incomplete."""
        return bool(workers) and not any(os.path.lexists(f"/proc/{pid}") for pid in workers)

    def killed(self) -> Counter[tuple[int, str]]:
        """Return the workers that were ended by a signal, with its name, and that the master has reaped."""
        found = re.findall(r"Worker \(pid:(\d+)\) was sent (.+)!", self.log.read_text())
        return Counter((int(pid), name) for pid, name in found)

    def ended(self) -> int:
        """Wait until the master and the store's server have ended; return the exit status."""
        status = self.process.wait(timeout=300)
        wait_for(lambda: self.server is None, "the server's leaving")
        return status

    def complaints(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if re.search("Traceback|Error|ERROR|CRITICAL", line)]

    def tracebacks(self) -> set[str]:
        """Return the exceptions, each as a traceback's last line."""
        # Python writes a traceback in pieces, so lines of other processes may be in between.
        text = re.sub(r"^\[\d{4}-.*\n", "", self.log.read_text(), flags=re.M)
        # The end of gevent's loop in a worker that SIGABRT interrupted, perhaps while a greenlet held logging's lock.
        ended = (
            r"^Exception ignored in(?:: <module 'threading'| atexit callback: <function shutdown) .*\nTraceback .*\n"
            r"(?: .*\n)* .*/gevent/.*\n(?: .*\n)*(?:AssertionError: ?|gevent\.exceptions\.LoopExit: .*)\n"
        )
        text = re.sub(ended, "", text, flags=re.M)
        return {*re.findall(r"^Traceback .*\n(?: .*\n)*(\S.*)\n(?!\nDuring handling)", text, re.M)}


class Adopted:
    """A process that is not a child of this one, with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        return None if alive(self.pid) else 0

    def wait(self, timeout: float = 60) -> int:
        wait_for(lambda: not alive(self.pid), "the end of the process", timeout)
        return 0

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


class StartGunicorn(Protocol):
    """The type of the fixture ``gunicorn``."""

    def __call__(
        self, *arguments: str, options: str = "", conf: str = "", command: Sequence[str] = SCRIPT, path: str = ""
    ) -> Gunicorn: ...
