"""Real ASGI servers on unix sockets, for tests of what happens under them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from http.client import HTTPConnection
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from processes import ROOT, marked, wait_for
from websockets.sync.client import unix_connect

COMMANDS = {
    "uvicorn": "uvicorn --workers 4 --uds {socket} {app}",
    "gunicorn": "gunicorn --workers 2 --worker-class uvicorn_worker.UvicornWorker --bind unix:{socket} {app}",
    "hypercorn": "hypercorn --workers 2 --bind unix:{socket} {app}",
    "granian": "granian --interface asgi --workers 2 --uds {socket} {app}",
}


class AsgiServer:
    """
    A server of this suite's applications, in a session of its own.

    Attributes:
        socket: Where it listens.
        log: What it and its children write.
        process: The process that was started.
    """

    def __init__(self, command: str, app: str = "asgi_frameworks:app", path: str = "") -> None:
        self.place = Path(tempfile.mkdtemp(prefix="shmstore-test-", dir="/dev/shm"))
        self.socket, self.log = self.place / "http", self.place / "log"
        self.mark = f"SHMSTORE_TEST_PLACE={self.place}"
        name, _, value = self.mark.partition("=")
        words = command.format(socket=self.socket, app=app).split()
        paths = [path, ROOT, str(Path(__file__).parent)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name(words[0])), *words[1:]],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=path or self.place,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(paths), "STORE": f"shm://{self.place}/shop", name: value},
            )  # fmt: skip

    def wait(self, framework: str = "starlette") -> None:
        """Return when it answers."""

        def answers() -> bool:
            assert self.process.poll() is None, self.text
            with suppress(OSError):
                return self.get(framework)[0] == 200
            return False

        wait_for(answers, f"an answer\n{self.text}")

    @property
    def text(self) -> str:
        return self.log.read_text()

    def get(self, framework: str, cookie: str = "", **query: object) -> tuple[int, Any, str]:
        """Return the status of an answer, its content, and the cookie to go on with."""
        connection = HTTPConnection("localhost", timeout=120)
        connection.sock = socket.socket(socket.AF_UNIX)
        with connection.sock:
            connection.sock.settimeout(120)
            connection.sock.connect(str(self.socket))
            connection.request("GET", f"/{framework}?{urlencode(query)}", headers={"Cookie": f"session={cookie}"})
            with connection.getresponse() as response:
                body = response.read()
                sent = SimpleCookie(response.headers.get("Set-Cookie", "")).get("session")
        assert response.status == 200, f"{body.decode()}\n{self.text}"
        return response.status, json.loads(body), cookie if sent is None else sent.value

    def talk(self, framework: str, cookie: str, **query: object) -> Any:
        """Return the first message of a WebSocket."""
        uri = f"ws://localhost/{framework}?{urlencode(query)}"
        with unix_connect(str(self.socket), uri, additional_headers={"Cookie": f"session={cookie}"}) as client:
            return json.loads(client.recv(timeout=120))

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it as users do. All that it and its children have started is gone then."""
        self.process.send_signal(how)
        self.process.wait(60)
        wait_for(lambda: not marked(self.mark), f"the end of all\n{self.text}")

    def kill(self) -> None:
        for pid in marked(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.place)
