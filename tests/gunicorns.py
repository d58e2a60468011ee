"""Real Gunicorns, for tests of what happens under them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from processes import ROOT, wait_for

from shmstore.files import StoreFiles

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


class Answer(NamedTuple):
    """What a test looks at in a response."""

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
    """A Gunicorn in a session of its own, listening on a unix socket."""

    def __init__(
        self, app: str, place: Path, store_dir: Path, *arguments: str, options: str = "", conf: str = ""
    ) -> None:
        self.place = place
        self.store_dir = store_dir
        self.socket = store_dir / "http"
        self.files = StoreFiles.of("shop", store_dir)
        self.log = place / "log"
        (place / "app.py").write_text(app)
        self.configure(options, conf)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                # The script, not `python -m gunicorn`: that cannot execute itself again at USR2.
                [Path(sys.executable).with_name("gunicorn"),
                 "-c", place / "gunicorn.conf.py", "--bind", f"unix:{self.socket}", *arguments, "app:app"],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=place,
                env=os.environ | {"PYTHONPATH": os.pathsep.join((ROOT, str(place)))},
            )  # fmt: skip
        self.pids = {self.process.pid}

    def configure(self, options: str = "", conf: str = "") -> None:
        (self.place / "gunicorn.conf.py").write_text(CONF.format(directory=str(self.store_dir), options=options) + conf)

    def booted(self, workers: int = 3) -> Self:
        """Wait for the first workers: a signal that meets one in the middle of its fork is lost, in Gunicorn."""

        def all_hear() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return self.log.read_text().count("hears signals") >= workers

        wait_for(all_hear, "the boot")
        return self

    def ask(self, path: str, cookie: str = "") -> Answer:
        """Return the answer to a request with a session cookie; wait while nobody listens."""

        def listening() -> socket.socket | None:
            assert self.process.poll() is None, self.log.read_text()
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
        """Return the JSON that the test's application answers with; take no failure."""
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

    def hearing(self) -> set[int]:
        """Return the workers that have booted: a signal that meets one before is lost, or its end."""
        return self.workers() & {int(pid) for pid in re.findall(r"\[(\d+)\] .*hears signals", self.log.read_text())}

    def workers(self) -> set[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}

    def ended(self) -> int:
        """Wait for its end and that of the store's server; return the exit status."""
        status = self.process.wait(timeout=60)
        wait_for(lambda: self.server is None, "the server's leaving")
        return status

    def complaints(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if re.search("Traceback|Error|ERROR|CRITICAL", line)]


class StartGunicorn(Protocol):
    def __call__(self, *arguments: str, options: str = "", conf: str = "") -> Gunicorn: ...
