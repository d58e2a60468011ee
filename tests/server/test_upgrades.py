"""Restarts under another version of Python or of shmstore, and processes of two versions at the same time."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from multiprocess.spawn import get_executable, set_executable
from processes import ROOT, Run, Start, wait_for

from shmstore import ConfigError, StoreManager, StoreUnavailable, connect
from shmstore.attach import attach_or_start
from shmstore.client import connection
from shmstore.client.connection import dial
from shmstore.gunicorn import Hooks, _running
from shmstore.ipc import options_file
from shmstore.ipc.channel import Unresponsive
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import OTHER, OtherVersion, greeting
from shmstore.server.single_instance import listen
from shmstore.system import version
from shmstore.system.clock import deadline_in

SLOW = 30.0  # seconds that an answer may take on a busy machine
ANOTHER_PYTHON = 'shmstore.system.version.PYTHON = "cpython 9.9"'
ANOTHER_PROTOCOL = "shmstore.ipc.handshake.PROTOCOL = 99; shmstore.system.version.VERSION = '99.0'"


@pytest.fixture
def other(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which a process and the server that it starts report another version of Python."""
    return environment(tmp_path / "python", ANOTHER_PYTHON)


def environment(place: Path, change: str) -> dict[str, str]:
    place.mkdir()
    (place / "sitecustomize.py").write_text(f"import shmstore.ipc.handshake, shmstore.system.version\n{change}\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(place), ROOT))}


HOLDER = """
import sys
from shmstore import StoreManager
given = {"ttl": lambda options, session, sid: 1000} if sys.argv[2] == "function" else {"ttl": 1000}
store = StoreManager("shop", directory=sys.argv[1], memory=2**20, **given).store()
store.set("ada", {"n": 1})
print("ready", flush=True)
sys.stdin.read()
"""


def hold(store_dir: Path, run: Run, environ: dict[str, str], options: str = "plain") -> subprocess.Popen[str]:
    """Start a process that starts the store and uses it."""
    process = run(HOLDER, store_dir, options, env=environ)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("options", "given"),
    [("plain", {}), ("plain", {"max": 7}), ("function", {}), ("function", {"dispose": print})],
    ids=["plain-nothing", "plain-plain", "function-nothing", "function-function"],
)
def test_a_stop_and_a_start_under_another_python_work_at_once(
    store_dir: Path, run: Run, other: dict[str, str], options: str, given: dict[str, Any], capfd: Any
) -> None:
    kill(hold(store_dir, run, other, options))
    # The server of the other version still lingers.
    store = attach_or_start("shop", {"directory": store_dir, **given}) if given else attach(store_dir)
    with store:
        assert store.get("ada") == {"n": 1}
        assert store.prune() == 0
        saved = json.loads((store_dir / "shop" / "options").read_bytes())
        assert saved.get("python", version.PYTHON) == version.PYTHON
    assert "requested by a process of another version" in capfd.readouterr().err


def attach(store_dir: Path) -> Any:
    return attach_or_start(f"shm://{store_dir}/shop")


@pytest.mark.parametrize("change", [ANOTHER_PYTHON, ANOTHER_PROTOCOL], ids=["python", "protocol"])
def test_processes_of_another_version_that_still_use_it_are_named(
    store_dir: Path, run: Run, tmp_path: Path, change: str
) -> None:
    holder = hold(store_dir, run, environment(tmp_path / "other", change), "function")
    server = StoreFiles.of("shop", store_dir).server()
    for given in (None, {"directory": store_dir, "max": 9}):
        with pytest.raises((ConfigError, OtherVersion), match=rf"process {holder.pid} use.*") as error:
            attach(store_dir) if given is None else attach_or_start("shop", given)
        assert "stop all" in str(error.value)
        assert ("cpython 9.9" if change == ANOTHER_PYTHON else "shmstore 99.0") in str(error.value)
    assert StoreFiles.of("shop", store_dir).server() == server
    kill(holder)
    with attach(store_dir) as store:
        assert store.get("ada") == {"n": 1}


def test_two_pythons_share_a_store_whose_options_are_plain(store_dir: Path, run: Run, other: dict[str, str]) -> None:
    hold(store_dir, run, other)
    with attach_or_start("shop", {"directory": store_dir, "max": 9}) as store:
        assert store.get("ada") == {"n": 1}
        assert store.options.ttl == 1000
        assert store.options.max == 9
    with (
        connect("shop", directory=store_dir) as store,
        pytest.raises(ConfigError, match=r"dispose are functions of cpython 3\.\d+, which cpython 9\.9"),
    ):
        attach_or_start("shop", {"directory": store_dir, "dispose": print})


WRITER = """
import sys
from shmstore import StoreManager
store = StoreManager("shop", directory=sys.argv[1], memory=2**20).store()
store.set("ada", {"n": 1})
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(eval(line), flush=True)
    except Exception as exc:
        print(type(exc).__name__, exc, flush=True)
"""


class Json:
    """A serializer."""

    name = "json"

    def dumps(self, value: object) -> bytes:
        return json.dumps(value).encode()

    def loads(self, data: bytes) -> object:
        return json.loads(data)


def test_a_process_that_cannot_load_a_new_serializer_stops_writing(
    store_dir: Path, run: Run, other: dict[str, str]
) -> None:
    plain = {"directory": store_dir, "memory": 2**20}
    manager = StoreManager("shop", **plain)
    with manager, manager.store() as store:
        writer = run(WRITER, store_dir, env=other)
        orders, answers = writer.stdin, writer.stdout
        assert orders is not None
        assert answers is not None

        def tell(what: str) -> str:
            orders.write(f"{what}\n")
            orders.flush()
            return answers.readline().strip()

        assert answers.readline() == "ready\n"
        manager.apply(**plain, serializer=Json())
        store.set("bob", {"n": 2})
        for what in ("set('bob', {})", "update('bob', {'x': 1})", "get('bob')", "destroy('bob')"):
            answer = tell(f"store.{what}")
            assert answer.startswith("StoreUnavailable store 'shop' has another serializer now"), answer
            assert version.PYTHON in answer
            assert "cpython 9.9" in answer
        assert store.get("bob") == {"n": 2}
        manager.apply(**plain)
        assert tell("store.set('bob', {'n': 3})") == "None"
        assert store.get("bob") == {"n": 3}


def test_options_without_functions_are_plain_data(store_dir: Path, manage: Start) -> None:
    with manage(max=3, snapshot=store_dir / "snapshot"):
        saved = json.loads((store_dir / "shop" / "options").read_bytes())
    assert saved == {
        "options": {"max": 3, "snapshot": str(store_dir / "snapshot"), "memory": 2**20, "directory": str(store_dir)}
    }


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"options": 3}', b'{"options": {}, "functions": 3}', b"\x80"])
def test_damaged_options_are_an_error(damage: bytes) -> None:
    with pytest.raises(ConfigError, match="damaged"):
        options_file.unpack(damage)


# -- the greeting, whose format never changes ---------------------------------------------------------------------


def said(files: StoreFiles, what: bytes) -> bytes:
    """Return the whole answer of a server to some bytes, until it closes the connection."""
    heard = b""
    with dial(files, SLOW) as sock:
        sock.settimeout(SLOW)
        sock.sendall(what)
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(4096):
                heard += part
    return heard


def test_the_bytes_of_the_greeting_never_change(manage: Start, store_dir: Path, capfd: Any) -> None:
    """Future versions depend on these bytes: never edit them."""
    files = StoreFiles.of("shop", store_dir)
    with manage() as manager, manager.store() as store:
        server = store.stats().server_pid
        for asks in (b"\x00\x00\x00\x00", b"\xde\xad\xbe\xef"):  # a release of 0 asks for nothing
            heard = said(files, b"shmstore\xff\xff\xff\xff" + asks)
            assert heard[:16] == b"shmstore\xff\xff\xff\xff\xff\xff\xff\xff"
            told = json.loads(heard[16:])
            assert told.keys() >= {"protocol", "layout", "shmstore", "python", "pid", "users"}
            assert (told["pid"], told["users"]) == (server, [os.getpid()])
        with dial(files, SLOW) as sock:
            sock.settimeout(SLOW)
            ours = b"shmstore" + told["protocol"].to_bytes(2, "big") + told["layout"].to_bytes(2, "big") + bytes(4)
            sock.sendall(ours)
            assert sock.recv(100) == ours == greeting()
        assert (store_dir / "shop" / "lock").read_bytes().split()[0] == str(server).encode()
    # The store is not in use, so the server exits: white space, and no JSON object.
    connection.connect_or_start(files, options_file.pack({"memory": 2**20}))[0].close()
    heard = said(files, b"shmstore\xff\xff\xff\xff\xde\xad\xbe\xef")
    assert heard[:16] == b"shmstore\xff\xff\xff\xff\xff\xff\xff\xff"
    assert not heard[16:].strip()
    wait_for(lambda: files.server() is None, "its leaving")
    assert "requested by a process of another version" in capfd.readouterr().err


# -- answers that no version sends --------------------------------------------------------------------------------


@pytest.fixture
def answering(store_dir: Path) -> Iterator[Callable[[bytes, bool], StoreFiles]]:
    """Return a function that serves a store with one fixed answer, and with signs of life if ``drips``."""
    over = threading.Event()
    threads: list[threading.Thread] = []

    def start(answer: bytes, drips: bool = False) -> StoreFiles:
        files = StoreFiles.of("shop", store_dir)
        files.create()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(files.address)
        threads.append(threading.Thread(target=serve, args=(listen(files), answer, drips)))
        threads[-1].start()
        return files

    def serve(listener: socket.socket, answer: bytes, drips: bool) -> None:
        with listener:
            listener.settimeout(0.05)
            while not over.is_set():
                with contextlib.suppress(OSError):
                    sock, _ = listener.accept()
                    with sock:
                        sock.settimeout(SLOW)
                        sock.recv(16)
                        sock.sendall(OTHER + answer)
                        while drips and not over.wait(0.05):
                            sock.sendall(b" ")

    yield start
    over.set()
    for thread in threads:
        thread.join()


TOLD: dict[str, object] = {
    "protocol": 3,
    "layout": 1,
    "shmstore": "9.9",
    "python": "cpython 9.9",
    "pid": 7,
    "users": [8, 9],
}
CHANGES: list[dict[str, object]] = [
    {"users": 5}, {"users": None}, {"users": ["8"]}, {"users": [True]}, {"users": [-1]}, {"users": [2**40]},
    {"users": [8] * 40000}, {"pid": "7"}, {"pid": 1.5}, {"pid": None}, {"protocol": []}, {"layout": {}},
    {"python": "\x1b[2J"}, {"python": "3\nERROR"}, {"python": 3}, {"shmstore": "9" * 1000}, {"shmstore": None},
]  # fmt: skip
NO_ANSWERS = [
    b"{}", b"[]", b"3", b"null", b"\xff", b'{"users": 5}', b"[" * 60000, b'{"a":' * 12000, b" " * 70000,
    *(json.dumps(TOLD | change).encode() for change in CHANGES),
]  # fmt: skip


def test_an_answer_that_no_version_sends_is_unavailable(answering: Callable[[bytes], StoreFiles]) -> None:
    for answer in NO_ANSWERS:
        files = answering(answer)
        for leaving in (None, deadline_in(SLOW)):
            with pytest.raises(StoreUnavailable, match="is not a store's server"):
                connection.connect(files, SLOW, leaving=leaving)
        os.unlink(files.address)
    files = answering(json.dumps(TOLD | {"users": [*range(100, 130)]}).encode())
    with pytest.raises(OtherVersion, match=r"9\.9 on cpython 9\.9.*processes 100, 101.*119, 10 more use it"):
        connection.connect(files, SLOW)


def test_gunicorn_continues_with_any_answer_of_the_server_at_a_reload(
    answering: Callable[[bytes], StoreFiles], store_dir: Path
) -> None:
    hooks = Hooks("shop", directory=store_dir, memory=2**20)
    warnings: list[str] = []
    log = SimpleNamespace(warning=lambda message, *about: warnings.append(message % about))
    gunicorn = SimpleNamespace(log=log, cfg=SimpleNamespace(uid=os.geteuid(), gid=os.getegid()))
    hooks.on_starting(gunicorn)
    try:
        manager = _running["shop"]
        answering(b'{"users": 5}')
        manager._pool.close_idle()
        hooks.on_reload(gunicorn)
        assert [*map(str, warnings)] == [
            "store 'shop' keeps the options it had: the process that listens on the store's socket is not a store's "
            "server"
        ]
    finally:
        manager._watch.stop()
        hooks.on_exit(gunicorn)


def test_a_caller_waits_no_longer_than_its_timeout(answering: Callable[..., StoreFiles]) -> None:
    """Only a caller that has asked the server to exit accepts signs of life, and not without limit."""
    files = answering(b"", drips=True)
    begun = time.monotonic()
    for leaving in (None, deadline_in(0.4)):
        with pytest.raises(Unresponsive):
            connection.connect(files, 0.3, leaving=leaving)
    assert time.monotonic() - begun < SLOW


@pytest.mark.parametrize(
    "report", ["[1]", "3", "{", "\\377", '{"error": 5, "message": "a\\033b"}', '{"error": [], "message": {}}']
)
def test_a_report_that_no_server_sends_is_unavailable(store_dir: Path, tmp_path: Path, report: str) -> None:
    fake = tmp_path / "python-fake"
    fake.write_text(f"#!/bin/sh\nprintf '{report}' >&0\n")
    fake.chmod(0o755)
    python = get_executable()
    set_executable(str(fake))
    try:
        with pytest.raises(StoreUnavailable) as error:
            connection.connect_or_start(StoreFiles.of("shop", store_dir), options_file.pack({"memory": 2**20}))
    finally:
        set_executable(python)
    assert str(error.value).isprintable()


def test_connection_attempts_of_another_version_do_not_keep_the_server_running(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    connection.connect_or_start(files, options_file.pack({"memory": 2**20}))[0].close()

    def left() -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            said(files, b"shmstore" + b"\xff" * 4 + bytes(4))  # as the command line: it asks for nothing
        return files.server() is None

    wait_for(left, "its leaving")


# -- the command line ---------------------------------------------------------------------------------------------


@functools.cache
def pythons() -> list[str]:
    """Return interpreters of other versions, on PATH or of pyenv, that have what shmstore needs."""
    here = sys.version_info[:2]
    names = [f"python3.{minor}" for minor in range(11, 20) if (3, minor) != here]
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(name) for name in names]
    with contextlib.suppress(PermissionError):  # of another user, as after sudo
        found += [str(path) for name in names for path in root.glob(f"versions/{name[6:]}.*/bin/{name}")]
    return [each for each in dict.fromkeys(found) if each and has_what_is_needed(each)]


def has_what_is_needed(python: str) -> bool:
    needed = "import sys, click, flask, msgspec, multiprocess; sys.exit(sys.version_info < (3, 11))"
    with contextlib.suppress(PermissionError):
        return not subprocess.run([python, "-c", needed], capture_output=True).returncode
    return False


def test_the_command_line_of_another_python(store_dir: Path, other: dict[str, str]) -> None:
    with attach_or_start("shop", {"directory": store_dir, "memory": 2**20, "max": 5}) as store:
        store.set("a", {"n": 1}, owner="ada")
        real = {**os.environ, "PYTHONPATH": ROOT}
        for python, environ in [(sys.executable, other), *((python, real) for python in pythons())]:
            shmstore = [python, "-m", "shmstore"]
            where = ["shop", "--directory", str(store_dir)]
            done = subprocess.run([*shmstore, "stats", *where, "--json"], env=environ, capture_output=True, text=True)
            assert not done.returncode, done.stderr
            assert json.loads(done.stdout)["server_pid"] == store.stats().server_pid
            store.set("b", {}, owner="ada")
            done = subprocess.run([*shmstore, "logout", *where, "ada"], env=environ, capture_output=True, text=True)
            assert done.stdout == "2 sessions ended\n", done.stderr
            store.set("a", {"n": 1}, owner="ada")


def test_functions_that_the_command_line_cannot_read_are_named(
    store_dir: Path, run: Run, other: dict[str, str]
) -> None:
    hold(store_dir, run, other, "function")
    done = subprocess.run(
        [sys.executable, "-m", "shmstore", "stats", "shop", "--directory", store_dir],
        env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"ttl are functions of cpython 9.9, which {version.PYTHON} cannot run" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_version_is_that_of_the_package() -> None:
    assert f'\nversion = "{version.VERSION}"\n' in Path(ROOT, "pyproject.toml").read_text()
