"""The examples of other servers: the commands of examples/README.md, run as they stand there but for addresses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from processes import ROOT, marked, wait_for

from shmstore import connect
from shmstore.server.directory import StoreFiles

EXAMPLES = Path(ROOT, "examples")
PORT = r"\b80\d\d\b"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def commands(heading: str) -> list[list[str]]:
    """Return the commands that the page has under a heading."""
    text = (EXAMPLES / "README.md").read_text()
    section = re.split(r"^## ", text.partition(f"## {heading}\n")[2], flags=re.MULTILINE)[0]
    found = [line.split() for line in re.findall(r"^\$ (.*)$", section, re.MULTILINE)]
    assert found
    return found


class Example:
    """
    The commands of one example at work, on a store and at ports of the test's own.

    Attributes:
        environ: Their environment.
        mark: What everything that they start has in it.
        processes: Those that were started, and not ended yet.
        store: The URL of the store.
    """

    def __init__(self, place: Path, store_dir: Path) -> None:
        self.files = StoreFiles.of("shop", store_dir)
        self.mark = f"SHMSTORE_TEST_PLACE={place}"
        self.log = place / "log"
        self._ports: dict[str, str] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.store = f"shm://{self.files.path}"
        name, _, value = self.mark.partition("=")
        self.environ = os.environ | {
            "PYTHONPATH": ROOT, "PATH": PATH, "FLASK_SESSION_STORE": self.store, "VIRTUAL_ENV": sys.prefix, name: value,
        }  # fmt: skip

    def command(self, words: list[str]) -> list[str]:
        """Return a command for this test: another store, less memory, ports that are free."""
        ours = {"shop": self.store, "256M": "1M"} if words[0] != "flask" else {}  # its `shop` is the module
        return [ours.get(word) or re.sub(PORT, lambda port: self._free(port[0]), word) for word in words]

    def _free(self, port: str) -> str:
        if port not in self._ports:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                self._ports[port] = str(sock.getsockname()[1])
        return self._ports[port]

    def start(self, words: list[str]) -> subprocess.Popen[bytes]:
        """Start a command; return when it serves."""
        if not shutil.which(words[0], path=PATH):
            pytest.skip(f"{words[0]} is not installed")
        begun = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command(words), cwd=EXAMPLES, env=self.environ, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
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
        """Return an answer of the application and the cookie to go on with; with a user, log in."""
        connection = HTTPConnection("127.0.0.1", int(self._ports[port]), timeout=60)
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

    def end(self) -> None:
        """End the commands, the last one first, as systemd does; all they have started is gone then."""
        while self.processes:
            process = self.processes.pop()
            process.send_signal(signal.SIGTERM)
            # Flask's development server and waitress leave TERM as it is.
            assert process.wait(30) in (0, -signal.SIGTERM), self.log.read_text()
        # A process on its way out has no environment any more, so no mark, and still the lock that says it serves.
        wait_for(lambda: not marked(self.mark) and self.files.server() is None, "the end of all")
        assert Path(self.files.arena).exists(), "the sessions stay"
        assert "Traceback" not in self.log.read_text(), self.log.read_text()

    def kill(self) -> None:
        for pid in marked(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


@pytest.fixture
def example(tmp_path: Path, store_dir: Path) -> Iterator[Example]:
    example = Example(tmp_path, store_dir)
    yield example
    example.kill()


def test_flask_run_starts_the_store_with_the_first_session(example: Example, store_dir: Path) -> None:
    first, second = (example.start(words) for words in commands("flask run"))
    assert example.files.server() is None, "nobody has looked at a session"
    here, cookie = example.ask("8081", user="ada")
    server = example.files.server()
    there, _ = example.ask("8082", cookie)
    assert (here, there) == ({"user": "ada", "pid": first.pid}, {"user": "ada", "pid": second.pid})
    assert server is not None
    assert example.files.server() == server, "there is one"
    first.kill()  # who started it is nothing to it
    assert example.ask("8082", cookie)[0]["user"] == "ada"
    assert example.files.server() == server
    first.wait()
    with connect("shop", directory=store_dir) as store:
        assert len(store.owned_by("ada")) == 1
    example.processes.remove(first)
    example.end()


def test_waitress_beside_a_store_that_is_served(example: Example) -> None:
    serve, *servers = commands("waitress")
    example.start(serve)
    server = example.files.server()
    pids = [example.start(words).pid for words in servers]
    here, cookie = example.ask("8081", user="ada")
    answers = [example.ask(port, cookie)[0] for port in ("8082", "8081") * 4]
    assert here == {"user": "ada", "pid": pids[0]}
    assert answers == [{"user": "ada", "pid": pid} for pid in (pids[1], pids[0])] * 4
    assert example.ask("8082")[0]["user"] is None, "another browser"
    assert example.files.server() == server
    example.end()


def test_uwsgi_beside_a_store_that_is_served(example: Example, store_dir: Path) -> None:
    serve, uwsgi = commands("uWSGI")
    example.start(serve)
    example.start(uwsgi)
    _, cookie = example.ask("8081", user="ada")
    seen: set[int] = set()

    def several() -> bool:
        answer, _ = example.ask("8081", cookie)
        assert answer["user"] == "ada"
        seen.add(answer["pid"])
        return len(seen) >= 2

    wait_for(several, "the answer of another worker")
    server = example.files.server()
    assert server is not None
    with connect("shop", directory=store_dir) as store:
        assert (store.options.max, store.options.memory) == (100_000, 2**20)
    os.kill(server, signal.SIGKILL)  # `shmstore serve` starts another one; the workers' own threads find that
    assert example.ask("8081", cookie)[0]["user"] == "ada"
    wait_for(lambda: example.files.server() not in (None, server), "another server")
    assert example.ask("8081", user="eve")[0]["user"] == "eve"
    example.end()


def test_a_cron_job_prunes_and_reports(example: Example, store_dir: Path) -> None:
    (job,) = commands("cron")
    again = re.findall(r"^\d+ \d.*python \S*/(\S+ \S+) >>", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert again == [" ".join(job[1:])], "the crontab runs the same"

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            example.command(job), cwd=EXAMPLES, env=example.environ, text=True, capture_output=True, timeout=60
        )

    nothing = run()
    assert (nothing.returncode, nothing.stdout, nothing.stderr.count("\n")) == (1, "", 1)
    assert "there is no store 'shop'" in nothing.stderr
    assert not Path(example.files.path).exists(), "it starts no store"
    serve, *_ = commands("waitress")
    example.start([*serve, "--check-period", "0"])
    with connect("shop", directory=store_dir) as store:
        for number in range(5):
            store.set(f"old {number}", {}, ttl=0)
        for number in range(3):
            store.set(f"new {number}", {}, owner="ada" if number else None)
        done = run()
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(
            rf"\S+ \S+ store {example.store}: 5 pruned, 3 sessions, 2 logged in, \d+% of its memory, "
            "0 ever logged out for want of room\n", done.stdout,
        )  # fmt: skip
        assert store.length() == 3
    example.end()
