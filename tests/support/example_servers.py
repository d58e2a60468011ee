"""The commands of `examples/README.md` at work, on a store and at ports of the test's own."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from forks import Forked, Forker
from processes import ROOT, wait_for
from shell import Shell

from shmstore.ipc.directory import StoreFiles

EXAMPLES = Path(ROOT, "examples")
PORT = r"\b80\d\d\b"


def commands(heading: str) -> list[list[str]]:
    """Return the commands under a heading of the page."""
    text = (EXAMPLES / "README.md").read_text()
    section = re.split(r"^## ", text.partition(f"## {heading}\n")[2], flags=re.MULTILINE)[0]
    found = [line.split() for line in re.findall(r"^\$ (.*)$", section, re.MULTILINE)]
    assert found
    return found


class Example:
    """
    The commands of one example at work, on a store and at ports of the test's own.

    Attributes:
        shell: Runs the commands.
        processes: The servers that run.
        store: The URL of the store.
    """

    def __init__(self, place: Path, store_dir: Path, forker: Forker) -> None:
        self.files = StoreFiles.of("shop", store_dir)
        self.log = place / "log"
        self._ports: dict[str, str] = {}
        self.processes: list[subprocess.Popen[bytes] | Forked] = []
        self.store = f"shm://{self.files.path}"
        self.shell = Shell(
            place, forker, VIRTUAL_ENV=sys.prefix, FLASK_SESSION_STORE=self.store, SHOP_STORE=self.store,
            SHOP_DATABASE=str(place / "shop.sqlite3"),
        )  # fmt: skip

    def command(self, words: list[str]) -> list[str]:
        """Return a command for this test: another store, less memory, free ports."""
        ours = {"shop": self.store, "256M": "1M"} if words[0] != "flask" else {}  # its `shop` is the module
        return [ours.get(word) or re.sub(PORT, lambda port: self._free(port[0]), word) for word in words]

    def _free(self, port: str) -> str:
        if port not in self._ports:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                self._ports[port] = str(sock.getsockname()[1])
        return self._ports[port]

    def start(self, words: list[str]) -> subprocess.Popen[bytes] | Forked:
        """Start a command; return when it serves."""
        if not shutil.which(words[0], path=self.shell.environ["PATH"]):
            pytest.skip(f"{words[0]} is not installed")
        begun = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            process = self.shell.start(self.command(words), EXAMPLES, log)
        self.processes.append(process)
        port = next((self._ports[port] for word in words for port in re.findall(PORT, word)), None)

        def serves() -> bool:
            assert process.poll() is None, self.log.read_text()
            if port is None:
                return b"serving" in self.log.read_bytes()[begun:]
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(port))):
                return True
            return False

        wait_for(serves, " ".join(words))
        return process

    def ask(self, port: str, cookie: str = "", user: str | None = None) -> tuple[dict[str, Any], str]:
        """Return an answer of the application and the next cookie; with a user, log in."""
        connection = HTTPConnection("127.0.0.1", int(self._ports[port]), timeout=300)
        headers = {"Cookie": cookie} if cookie else {}
        if user is None:
            connection.request("GET", "/", headers=headers)
        else:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            connection.request("POST", "/login", urlencode({"user": user}), headers)
        with connection.getresponse() as response:
            assert response.status == 200, self.log.read_text()
            answer, sent = json.load(response), response.headers.get("Set-Cookie", "")
        connection.close()
        return answer, sent.partition(";")[0] or cookie

    def run(self, words: list[str]) -> None:
        """Run a command to its end."""
        with self.log.open("ab") as log:
            assert self.shell.start(self.command(words), EXAMPLES, log).wait(300) == 0, self.log.read_text()

    def end(self) -> None:
        """End the commands, the last one first, as systemd does; afterwards no process of them is left."""
        while self.processes:
            process = self.processes.pop()
            process.send_signal(signal.SIGTERM)
            # Flask's development server and waitress leave TERM as it is.
            assert process.wait(30) in (0, -signal.SIGTERM), self.log.read_text()
        # An exiting process has no environment any more, so no mark, but still holds the lock of its store.
        wait_for(lambda: not self.shell.members() and self.files.server() is None, "the end of all")
        assert Path(self.files.arena).exists(), "the sessions stay"
        assert "Traceback" not in self.log.read_text(), self.log.read_text()

    def kill(self) -> None:
        self.shell.kill()
