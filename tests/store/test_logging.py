"""Log lines: their level, that they are written once, and that they contain no id of a session."""

from __future__ import annotations

import ast
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from browsing import look, make_app, visit
from example_servers import Example, commands
from forks import Forker
from gunicorns import StartGunicorn
from processes import CHECKS, ROOT, Run, Start, state, stop, wait_for

from shmstore import Store, StoreTimeout, StoreUnavailable, connect
from shmstore.engine import header as at
from shmstore.engine.core import describe
from shmstore.ipc.directory import StoreFiles
from shmstore.system.throttle import Throttle

EVICTING = "evicting live sessions to make room (1 so far, 0 of them logged in): raise max or memory"

Lines = Callable[[], list[tuple[str, str]]]


@pytest.fixture
def ours(caplog: pytest.LogCaptureFixture) -> Lines:
    """Return a function that returns the log of this process: levels and lines, with N for process ids."""
    caplog.set_level(logging.INFO, "shmstore")
    return lambda: [(record.levelname, plain(record.getMessage())) for record in caplog.records]


@pytest.fixture
def theirs(logged: Callable[[], str]) -> Lines:
    """Return a function that returns the log of the servers started here so far."""

    def lines() -> list[tuple[str, str]]:
        found = re.findall(r"^\[[^]]+\] \[\d+\] \[(\w+)\] shmstore: (.*)$", logged(), re.MULTILINE)
        return [(level, plain(line)) for level, line in found]

    return lines


def plain(line: str) -> str:
    return re.sub(r"process \d+", "process N", line).replace(os.sep + "shop", "").partition("\n")[0]


def of(level: str, lines: Lines) -> list[str]:
    """Return the lines of a level."""
    return [line for each, line in lines() if each == level]


def server_of(store_dir: Path) -> int | None:
    return StoreFiles.of("shop", store_dir).server()


# -- the life of a server ------------------------------------------------------------------------------------------


def test_the_life_of_a_server(manage: Start, store_dir: Path, ours: Lines, theirs: Lines) -> None:
    manager = manage()
    manager.start()
    for _ in range(5):  # as an application that connects at each request
        with connect("shop", directory=store_dir) as store:
            store.set("a", {})
            store.get("b")
    for _ in range(3):
        manager.apply(memory=2**20, ttl=5)
    manager.shutdown()
    manage(memory=2**21, persist=False).store()  # not in use: resized
    with manage(memory=2**30).store() as store:  # in use: waits
        store.get("a")
    assert ours() == [
        ("INFO", "store 'shop': started its server, process N"),
        ("INFO", "store 'shop': attached; process N serves it"),
        ("INFO", "store 'shop': started its server, process N"),
        ("WARNING", "store 'shop' keeps its memory until all processes that use it are stopped and started"),
    ]
    said = theirs()
    assert said[:5] == [
        ("INFO", f"store 'shop': process N serves 0 sessions in 1.0 MiB at {store_dir}; engine: {describe()}"),
        ("INFO", "store 'shop': options changed; given: memory, ttl"),
        ("INFO", "store 'shop': the server, process N, exits: on request; its sessions are kept"),
        ("INFO", "store 'shop': rebuilt with another memory; 0 sessions dropped for lack of space"),
        ("INFO", f"store 'shop': process N serves 1 sessions in 2.0 MiB at {store_dir}; engine: {describe()}"),
    ]
    assert said[5] == ("INFO", "store 'shop': options changed; given: directory, memory, persist")
    assert len(said) == 6


@pytest.mark.parametrize(
    ("persist", "rest"), [(True, "its sessions are kept"), (False, "its sessions are removed (persist=False)")]
)
def test_an_unused_server(manage: Start, store_dir: Path, theirs: Lines, persist: bool, rest: str) -> None:
    manager = manage(persist=persist)
    manager.start()
    manager.detach()
    wait_for(lambda: server_of(store_dir) is None, "its end")
    assert theirs()[1:] == [("INFO", f"store 'shop': the server, process N, exits: no process is connected; {rest}")]


@pytest.mark.usefixtures("hurried_servers")
def test_a_server_that_dies(
    manage: Start, store_dir: Path, ours: Lines, theirs: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.client.watch._CHECK_INTERVAL", 0.2)  # seconds
    with manage() as manager, manager.store() as store:
        for number in range(3):
            store.set(str(number), {})
        server = server_of(store_dir) or 0
        os.kill(server, signal.SIGKILL)
        wait_for(lambda: of("WARNING", ours), "another")
        stop(store.stats().server_pid)
        with monkeypatch.context() as patch:
            patch.setattr("shmstore.client.connection.ANSWER_TIMEOUT", 0.3)  # seconds
            wait_for(lambda: len(of("WARNING", ours)) >= 3, "the word of it")
        assert of("WARNING", ours) == [
            "store 'shop': its server had died; started process N",
            "store 'shop': its server, process N, was killed: it did not answer",
            "store 'shop': its server had died; started process N",
        ]
    assert [line for _, line in theirs()].count(
        f"store 'shop': process N serves 3 sessions in 1.0 MiB at {store_dir}; engine: {describe()}"
    ) == 2  # fmt: skip


STARTER = """
import sys
from shmstore import StoreManager
manager = StoreManager("shop", memory=2**20, directory=sys.argv[1])
manager.start()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_dead_server_that_only_a_writer_notices(
    run: Run, store_dir: Path, ours: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.client.attachment.LATE", 0.01)  # seconds between its attempts too
    starter = run(STARTER, store_dir)
    assert starter.stdout
    starter.stdout.readline()
    with connect("shop", directory=store_dir) as store:
        server = server_of(store_dir) or 0
        starter.kill()
        os.kill(server, signal.SIGKILL)
        monkeypatch.setenv("PYTHONHASHSEED", "none")  # no Python can be started
        attempts = threading.Event()
        due = Throttle.due

        def counted(self: Throttle) -> int:
            if self._times:
                attempts.set()
            return due(self)

        monkeypatch.setattr(Throttle, "due", counted)
        while not attempts.is_set():
            store.set("a", {})
            time.sleep(0.01)
        monkeypatch.setenv("PYTHONHASHSEED", "0")
        while server_of(store_dir) in (None, server):
            store.set("a", {})
            time.sleep(0.01)
        wait_for(lambda: "started another" in of("WARNING", ours)[-1], "the word of it")
    first, *others = of("WARNING", ours)
    assert first.startswith("store 'shop' has no server, and none can be started (attempts: 1): ")
    assert others == ["store 'shop': its server was gone; started another, process N"]


FREEZER = """
import os, signal, sys
from shmstore import connect
store = connect("shop", directory=sys.argv[1])
store.arena.lock(2)
os.kill(os.getpid(), signal.SIGSTOP)
store.arena.unlock()
"""


@pytest.mark.usefixtures("hurried_servers")
def test_a_stopped_holder_of_the_lock_is_logged(
    manage: Start, store_dir: Path, run: Run, ours: Lines, theirs: Lines
) -> None:
    with manage(lock_timeout=0.05) as manager, manager.store() as store:
        frozen = run(FREEZER, store_dir).pid
        wait_for(lambda: state(frozen) == "T", "its stop")
        name = "store 'shop': process N (T (stopped)) holds the store's lock; continue or kill it"

        def write() -> list[str]:
            with suppress(StoreTimeout):
                store.set("a", {})
            return of("ERROR", theirs)

        wait_for(write, "the server's word of it")
        beat = store.stats().server_uptime
        wait_for(lambda: store.stats().server_uptime > beat + 10 * CHECKS, "more checks of the server")
        assert write() == [name]
        # The server too: the process that times out kills it.
        stop(server_of(store_dir) or 0)
        wait_for(lambda: write() and of("WARNING", ours), "its end")
        assert of("WARNING", ours)[0] in (
            "store 'shop': its server, process N, was killed: it was stopped, and other processes waited for the "
            "store's lock",
            "store 'shop': its server, process N, was killed: it did not answer",  # the watch was faster
        )
        os.kill(frozen, signal.SIGKILL)
        wait_for(lambda: store.stats().server_pid != 0 and server_of(store_dir), "another server")


# -- errors that each request may cause --------------------------------------------------------------------------


def failing(sid: str, session: Any, reason: str) -> None:
    raise KeyError(sid, session)


def test_repeated_errors_are_logged_once(manage: Start, store_dir: Path, theirs: Lines) -> None:
    with manage(max=2, dispose=failing) as manager, manager.store() as store:
        for number in range(10):
            store.set(f"secret {number}", {"a": f"secret {number}"})
        assert store.stats().dispose_errors == 8
        through: Any = connect("shop", directory=store_dir, in_place=False)
        for number in range(10):
            with suppress(StoreUnavailable):
                through._callmethod(f"secret {number}")
        through.close()
        told = [(level, line) for level, line in theirs() if level != "INFO"]
    assert sorted(told) == [
        ("ERROR", "store 'shop': failed calls of dispose: 1; the sessions are removed anyway: KeyError"),
        ("WARNING", f"store 'shop': {EVICTING}"),
        ("WARNING", "store 'shop': failed requests: 1; the last one with AttributeError"),
    ]  # fmt: skip


def test_a_writer_logs_evictions_of_live_sessions_once(manage: Start, ours: Lines) -> None:
    with manage(max=2) as manager, manager.store() as store:
        for number in range(100):
            store.set(str(number), {})
        assert of("WARNING", ours) == [f"store 'shop': {EVICTING}"]


def test_damage_is_logged_once_for_all_processes(manage: Start, theirs: Lines) -> None:
    with manage(check_period=None) as manager, manager.store() as store:
        for number in range(10):
            store.set(str(number), {})
        store.arena.cells[at.FREE_SLOT] = 2**40
        for number in range(10):
            store.set(f"new {number}", {})
        (line,) = of("ERROR", theirs)
        assert re.fullmatch(r"store 'shop': its memory was damaged \(.+\): 0 sessions are lost", line)


def test_repeated_failures_of_the_prune(ours: Lines) -> None:
    attempts = 0

    class Counting(Store):
        def prune(self) -> int:
            nonlocal attempts
            attempts += 1
            return super().prune()

    with Counting(memory=2**16, check_period=0.01, lock_timeout=0.01) as store:
        store.set("a", {}, ttl=0)
        store.arena.lock(1)
        try:
            wait_for(lambda: of("WARNING", ours), "its failure")
            before = attempts
            wait_for(lambda: attempts > before + 5, "more of them")
        finally:
            store.arena.unlock()
        wait_for(lambda: not len(store), "the prune")
    (line,) = of("WARNING", ours)
    assert line.startswith(
        "a private store: failed automatic prunes: 1; the next one follows: the store's lock was not"
    )


class Quoting:
    """A serializer whose errors quote the value."""

    name = "quoting"

    def dumps(self, value: object) -> bytes:
        return repr(value).encode()

    def loads(self, data: bytes) -> object:
        raise ValueError(f"cannot read {data!r}")


def test_unreadable_values(ours: Lines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmstore.codec.body._unreadable_log", Throttle())
    with Store(memory=2**18, serializer=Quoting()) as store:
        app = make_app(store)
        for number in range(5):
            store.set(f"{number:043}", {"a": f"secret {number}"})
            client = app.test_client()
            client.set_cookie("session", f"{number:043}")
            assert visit(client, look).text == "{}\n"
    assert of("ERROR", ours) == [
        "a private store: unreadable values omitted from their sessions: 1; the last is 'a': ValueError"
    ]
    assert "in loads" in caplog.text
    assert "secret" not in caplog.text


# -- every operation, in real programs ------------------------------------------------------------------------------

APP = """
import os
from flask import Flask, session
from shmstore.flask import Sessions
app = Flask(__name__)
app.config["SESSION_STORE"] = "shm://shop"
sessions = Sessions(app)

@app.get("/")
def index():
    session["value"] = "secret"
    return {"pid": os.getpid(), "pruned": sessions.store.prune()}
"""
TRACED = r"^\[[^]]+\] \[(\d+)\] \[DEBUG\] shmstore: %s: .+$"


def traced(operation: str, log: str) -> set[int]:
    """Return the processes that have traced an operation."""
    return {int(pid) for pid in re.findall(TRACED % operation, log, re.MULTILINE)}


@pytest.mark.parametrize("documented", [False, True])
def test_gunicorn_and_its_server_trace(
    gunicorn: StartGunicorn, monkeypatch: pytest.MonkeyPatch, documented: bool
) -> None:
    """Also with the configuration of docs/operate/logs.md, which gives the root logger a handler."""
    monkeypatch.setenv("DEBUG", "shmstore")
    page = Path(ROOT, "docs", "operate", "logs.md").read_text()
    conf = re.findall(r"^```python\n(logconfig_dict.*?)^```", page, re.DOTALL | re.MULTILINE)[0] if documented else ""
    g = gunicorn(conf=conf.replace('"INFO"', '"DEBUG"', 1)).booted()
    worker, server = g.get()["pid"], g.server
    wait_for(lambda: server in traced("prune", g.log.read_text()), "the server's line")
    log = g.log.read_text()
    assert worker in traced("add [0-9a-f]{8}", log) & traced("prune", log)
    assert server not in traced("add [0-9a-f]{8}", log), "it is done in place"
    assert len(re.findall(rf"\[{worker}\] .*shmstore: add ", log)) == 1, "once"
    assert "secret" not in log
    g.signal("TERM")
    assert g.ended() == 0
    log = g.log.read_text()
    assert f"the server, process {server}, exits: no process is connected" in log
    assert f"[{g.process.pid}] [INFO] shmstore: store 'shop': started its server, process {server}" in log


def test_flask_run_and_the_command_trace(
    tmp_path: Path, store_dir: Path, forker: Forker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEBUG", "shmstore")
    example = Example(tmp_path, store_dir, forker)
    try:
        flask = example.start(commands("flask run")[0])
        example.ask("8081", user="secret")
        log = example.log.read_text()
        assert traced("add [0-9a-f]{8}", log) == {flask.pid}
        done = subprocess.run(
            [sys.executable, "-m", "shmstore", "prune", example.store],
            env=example.shell.environ, text=True, capture_output=True, timeout=300, check=True,
        )  # fmt: skip
        assert len(traced("prune", done.stderr)) == 1
        server = example.files.server()
        wait_for(lambda: traced("prune", example.log.read_text()) == {server}, "the server's")
        example.end()
        assert "secret" not in example.log.read_text() + done.stderr
    finally:
        example.kill()


# -- the documentation of the log -------------------------------------------------------------------------------------


# Calls whose message is an argument of the function that they are in: that is checked where it is called.
FORWARDED = {"log.warning(line)", "log.error(message, *arguments)"}


def text(node: ast.AST) -> str:
    """Return a string in the code as the documents show it; empty if it is something else."""
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(text(each) or "…" for each in node.values))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[.\d]*[a-z]", "…", node.value)
    return ""


def modules() -> list[ast.AST]:
    return [ast.parse(path.read_text()) for path in Path(ROOT, "shmstore").rglob("*.py")]


def documented(page: str) -> set[str]:
    """Return the messages in the tables of a page. An entry without a space is a name, and is left out."""
    rows = re.findall(r"^\| .*", Path(ROOT, "docs", "operate", page).read_text(), re.MULTILINE)
    cells = [cell for row in rows for cell in row.split("|")[1:-2]]  # the last one says what to do
    return {line for cell in cells for line in re.findall(r"`([^`]+ [^`]+)`", cell)}


TROUBLES = documented("troubleshooting.md")


def test_each_documented_message_is_one_of_the_code() -> None:
    code = [found for module in modules() for node in ast.walk(module) if (found := text(node))]
    assert len(TROUBLES) > 60
    titles = {"open files", "address space", "file size", "private store", "shared store"}  # of doctor, and in the code
    made_up = [line for line in TROUBLES | titles if not any(line.strip("…") in each for each in code)]
    assert not made_up


def test_each_warning_and_error_is_documented() -> None:
    levels = {"warning", "error", "exception", "log", "_warn", "_log_file_error"}
    missing, seen = [], 0
    for module in modules():
        for call in (node for node in ast.walk(module) if isinstance(node, ast.Call) and node.args):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if name not in levels or ast.unparse(call) in FORWARDED:
                continue
            line = text(call.args[name == "log"])
            if line.startswith("store …: …"):  # of the listener's _warn, whose callers are checked
                continue
            seen += 1
            if not any(each.strip("…") in line for each in TROUBLES):
                missing.append(ast.unparse(call))
    assert seen > 50
    assert not missing
