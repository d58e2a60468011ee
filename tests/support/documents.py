"""
The documents as programs: what is in their blocks, and a place where that is run as a reader would run it.

A block is found by Markdown's own rules, so none escapes. Its language says what becomes of it:

- `python`: together with the page's others it is one program. If its first line is a file's name (`# app.py`), it is
  that file instead, as is a block of any other language that begins so.
- `console`: each `$ ` line is run by a `Shell`, and `shmstore` in this process, in the order of the page, in a
  directory with those files and a copy of `examples` and `deploy`; what stands below is what it must print, but for
  numbers, dates, digests and widths. A line `...` stands for any lines.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tomllib
from collections.abc import Callable
from contextlib import chdir
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from command_line import invoke
from forks import Forked, Forker
from markdown_it import MarkdownIt
from processes import ROOT, wait_for
from shell import Shell, words_of

from shmstore.ipc.directory import StoreFiles

DOCUMENTS = [
    *(
        Path(ROOT, name)
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")
    ),
    *sorted(Path(ROOT, "docs").rglob("*.md")),
]

# The Redis server of the documents.
REDIS = "redis://localhost:6379"

# Commands that run until they are ended, and what they print when they serve.
SERVERS = re.compile(
    r"^(\w+=\S* )*(gunicorn(?! --check-config)|flask (\S+ )*run|waitress-serve|uvicorn|"
    r"python \S*manage\.py runserver|shmstore serve|make run|docker run)\b"
)
SERVING = re.compile(
    r"Application startup complete|Booting worker|Starting development server|Running on|Serving on|serving the store"
)

# Commands that are not run here, and why; `unrun` checks them.
NOT_RUN = {
    r"shmstore stores": "lists what else is on this host",
    r"make (?!run\b)": "is this suite, or takes minutes: that there is such a target",
    r"\.ci/run": "is what runs this suite: that it is there",
    r"pip install ": "would change the environment of the tests: that the extras and packages are ours",
    r"\.venv/bin/python -m (pytest|benchmarks) ": "is this suite, or takes minutes: that the files are there",
    r"python benchmarks/": "takes minutes, and is run by test_benchmarks.py: that the file is there",
    r"kubectl ": "needs a cluster: that the manifests are sound",
    r"uwsgi ": "must be compiled; test_examples.py runs it where it is installed: that the file is there",
    r"docker (?!run)": "needs a daemon, and images from elsewhere: that Dockerfile is sound. Its CMD is run",
    r"(sudo .*|systemctl |journalctl )": "needs systemd as process 1: that systemd-analyze finds no fault in the unit",
}


# Documents whose commands need the files of another document.
CONTINUED = {"docs/guides/testing.md": "docs/start/fastapi.md"}


class Block(NamedTuple):
    """A block of code in a document."""

    document: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """The name of the file, if the block is one."""
        found = re.match(r"[#;] ((?:[\w.-]+/)*(?:[\w-]+(?:\.[\w-]+)+|Dockerfile))\n", self.text)
        return found[1] if found and self.language != "console" else ""

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command, and the lines that it prints."""

    place: str
    text: str
    output: list[str]


@cache
def blocks(document: Path) -> list[Block]:
    """Return all blocks of code of a document, wherever they stand in it."""
    tokens = MarkdownIt().parse(document.read_text())
    return [
        Block(document, (token.map or [0])[0] + 1, token.info.split()[0] if token.info else "", token.content)
        for token in tokens
        if token.type in ("fence", "code_block")
    ]


def program(document: Path) -> str:
    """Return the Python blocks of a document that are not files, each on the lines that it has in the document."""
    lines = [""] * len(document.read_text().splitlines())
    for block in blocks(document):
        if block.language == "python" and not block.name:
            code = block.text.splitlines()
            lines[block.line : block.line + len(code)] = code
    return "\n".join(lines)


def commands(document: Path) -> list[Command]:
    """Return the commands in the console blocks of a document."""
    found: list[Command] = []
    for block in blocks(document):
        if block.language == "console":
            for number, line in enumerate(block.text.splitlines(), block.line + 1):
                if line.startswith("$ "):
                    found.append(Command(f"{document.relative_to(ROOT)}:{number}", line[2:], []))
                elif line.startswith("> ") or (found and found[-1].text.endswith("\\")):
                    found[-1] = found[-1]._replace(text=f"{found[-1].text}\n{line.removeprefix('> ')}")
                else:
                    assert found, f"{block.place}: begins with no command"
                    found[-1].output.append(line)
    return found


def why_not_run(command: str) -> str:
    """Return why a command is not run here; an empty string if it is."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)), "")


def check_unrun(command: str) -> None:
    """Check a command that is not run, as far as possible."""
    words = command.partition(" #")[0].split()
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", Path(ROOT, "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"there is no make {words[1]}"
    elif words[0] == "pip":
        project = tomllib.loads(Path(ROOT, "pyproject.toml").read_text())
        known = {"flask", "pytest", *project["project"]["optional-dependencies"]}
        groups = project["dependency-groups"]
        known |= {re.split("[<>=]", each)[0] for group in groups.values() for each in group if isinstance(each, str)}
        for word in (each for each in words[2:] if not each.startswith("--")):
            name, _, extras = word.strip("'").rstrip("]").partition("[")
            name = re.sub(r"/path/to/(shmstore)(-[\w.-]+\.whl)?", r"\1", name)
            assert name in known | {"shmstore"}, name
            assert set(filter(None, extras.split(","))) <= known, extras
    else:
        files = [
            word
            for word in words
            if re.match(r"(\.ci|tests|benchmarks|deploy|examples)/", word) and "results" not in word
        ]
        assert all(Path(ROOT, file).exists() for file in files), files


def shape(text: str) -> str:
    """Return what is the same in two runs: no dates, numbers, units, digests, engine; one space for any."""
    text = re.sub(r"engine: \w+", "engine: #", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?( ?[+-]\d{4})?", "#", text)
    text = re.sub(r"\b[0-9a-f]{8,32}\b|(?<!\S)-(?!\S)", "#", text)
    text = re.sub(r"\d+([.,:]\d+)*( ?([KMG]i)?B|ms|us|[smhd%])?(?!\w)", "#", text)
    return re.sub(r"\s+", " ", text).strip()


def differs(command: Command, printed: str) -> str:
    """Return the difference between the output of a command and its document; an empty string if they are equal."""
    expected = [shape(line) for line in command.output]
    if re.match("shmstore doctor", command.text):  # depends on the machine: compare what it looks at
        printed = "\n".join(re.findall(r"^(?:ok|warning|broken) +(.*?):", printed, re.MULTILINE))
        expected = [found[1] for line in command.output if (found := re.match(r"(?:ok|warning|broken) +(.*?):", line))]
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in expected)
    shapes = [shape(line) for line in printed.splitlines()]
    if re.fullmatch(pattern, "".join(f"{line}\n" for line in shapes)):
        return ""
    return f"{command.place}: {command.text}\nprints\n{printed}\nwhich is not\n" + "\n".join(command.output)


class Place:
    """
    A directory in which the files and commands of a document are tried, on a small store of the test's own.

    Attributes:
        path: The directory.
        files: The files of the store that the documents call `shop`.
        url: The URL of the store.
        redis: The URL of a Redis server, for a document that has one at localhost.
    """

    def __init__(self, path: Path, store_dir: Path, forker: Forker) -> None:
        self.path = path
        self.files = StoreFiles.of("shop", store_dir)
        self.url = f"shm://{self.files.path}"
        self.redis = REDIS
        self._ports: dict[str, str] = {}
        self._servers: list[tuple[Command, subprocess.Popen[bytes] | Forked, Path]] = []
        # A reader has no plugins of pytest for what we use ourselves: to import them takes 2 seconds.
        self._shell = Shell(
            path, forker, PORT=self.port("8000"), HOME=str(path), XDG_RUNTIME_DIR=str(path),
            GUNICORN_CMD_ARGS=f"--bind 127.0.0.1:{self.port('8000')}", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        )  # fmt: skip
        for directory in ("examples", "deploy"):
            shutil.copytree(Path(ROOT, directory), path / directory, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (*path.rglob("*.py"),):
            file.write_text(self.ours(file.read_text().replace('"demo"', '"shop"').replace("shm://demo", "shm://shop")))

    def port(self, port: str) -> str:
        """Return a free port for one that a document names."""
        if port not in self._ports:
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", 0))
                self._ports[port] = str(sock.getsockname()[1])
        return self._ports[port]

    def ours(self, code: str) -> str:
        """Return Python code with the test's store, little memory and free ports instead of the document's."""
        code = re.sub(r"\bmemory=[^,)\n]+", "memory=2**20", code)
        code = re.sub(r'((?:Hooks|StoreManager)\("shop")(?![^)]*memory=)', r"\1, memory=2**20", code)
        code = code.replace('"shm://shop"', '"shop"').replace('"shop"', repr(self.url)).replace(REDIS, self.redis)
        return re.sub(r"\b(80\d\d|5000)\b", lambda port: self.port(port[0]), code)

    def our_command(self, command: str) -> str:
        """Return a command with the test's store and ports."""
        if command.startswith("make run"):
            recipe = re.search(r"^run:.*\n\t\$\(BIN\)/(.*)$", Path(ROOT, "Makefile").read_text(), re.MULTILINE)
            assert recipe
            command = recipe[1]
        if command.startswith("docker run"):
            run = re.search(r"^CMD (.*)$", (self.path / "Dockerfile").read_text(), re.MULTILINE)
            assert run
            command = shlex.join(json.loads(run[1]))
        # Nothing is installed into it, and installing pip takes seconds.
        command = command.replace("-m venv", "-m venv --without-pip")
        command = re.sub(r"(?<![\w/.:-])(?<!--app )(shm://)?shop(?![\w/.:-])", self.url, command)
        command = re.sub(r"--memory \S+", "--memory 1M", command).replace(REDIS, self.redis)
        return re.sub(r"\b(80\d\d|5000)\b", lambda port: self.port(port[0]), command)

    def write(self, document: Path) -> None:
        """Write the files that a document has, and those of the document that it continues."""
        if before := CONTINUED.get(str(document.relative_to(ROOT))):
            self.write(Path(ROOT, before))
        for block in blocks(document):
            if block.name:
                file = self.path / block.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(self.ours(block.text) if file.suffix == ".py" else block.text)

    def run(self, command: Command) -> str:
        """Run a command to its end, or start a server; return an error, or an empty string."""
        if SERVERS.match(command.text):
            self._start(command)
            return ""
        ours = self.our_command(command.text)
        if re.match("shmstore top", ours):
            ours += " --interval 0.2 --count 2"
        asked = [line for line in command.output if line.endswith("[y/N]: y")]
        answers = "y\n" * len(asked)
        words = words_of(ours)
        if words[0] == "shmstore":
            with chdir(self.path), patch.dict(os.environ, self._shell.environ, clear=True):
                done = invoke(*words[1:], answer=answers, together=True)
            printed, status = done.stdout, done.returncode
        else:
            log = self.path / "log"
            with log.open("wb") as out:
                status = self._shell.start(words, self.path, out).wait(300)
            printed = log.read_text()
        printed = printed.replace("[y/N]: ", "[y/N]: y\n") if asked else printed
        printed = printed.replace(self.url, "shop").replace(str(Path(self.files.path).parent), "/dev/shm/shmstore-1")
        printed = printed.replace(self.redis.partition("://")[2], REDIS.partition("://")[2])
        if status:
            return f"{command.place}: {command.text} ended with {status}:\n{printed}{self.logs()}"
        return differs(command, printed) if command.output else ""

    def _start(self, command: Command) -> None:
        log = self.path / f"log{len(self._servers)}"
        with log.open("wb") as out:
            process = self._shell.start(words_of(self.our_command(command.text)), self.path, out)
        self._servers.append((command, process, log))

        def serves() -> bool:
            assert process.poll() is None, f"{command.place}: {log.read_text()}"
            return bool(SERVING.search(log.read_text()))

        wait_for(serves, command.text, 300)

    def logs(self) -> str:
        return "".join(f"\n{command.text}\n{log.read_text()}" for command, _, log in self._servers)

    def end(self, wrong: Callable[[str], None]) -> None:
        """End the servers, the last one first; return their errors."""
        while self._servers:
            command, process, log = self._servers.pop()
            process.send_signal(signal.SIGTERM)
            if process.wait(300) not in (0, -signal.SIGTERM):  # Flask's development server leaves TERM as it is
                wrong(f"{command.place}: ended with {process.returncode}: {log.read_text()}")
            text = log.read_text().replace(self.url, "shop")
            text = text.replace(str(Path(self.files.path).parent), "/dev/shm/shmstore-1")
            said = {shape(line) for line in text.splitlines()}
            if "Traceback" in text or not {shape(line) for line in command.output if line != "..."} <= said:
                wrong(f"{command.place}: {command.text} says\n{text}, not\n" + "\n".join(command.output))
        wait_for(lambda: not self._shell.members(), "the end of all")

    def kill(self) -> None:
        self._shell.kill()
