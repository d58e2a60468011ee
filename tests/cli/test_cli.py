"""The command line: real processes, piped and in a terminal, on running and on stopped stores."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import re
import resource
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
from click.shell_completion import BashComplete
from command_line import invoke
from forks import Forked, Forker
from processes import ROOT, Run, Start, alive, stop, wait_for
from sampling import some
from shell import BIN

from shmstore import ConfigError, Store, StoreManager, StoreUnavailable, connect, snapshot
from shmstore.cli import _EXAMPLES, main
from shmstore.cli.doctor import remove_ipc
from shmstore.cli.findings import OK
from shmstore.cli.output import _SLOW, columns, plain
from shmstore.cli.sessions import _remove_store
from shmstore.cli.stats import _cells, _rates
from shmstore.cli.target import open_target
from shmstore.client import connection
from shmstore.codec.ids import require_key, short_digest
from shmstore.engine import header as at
from shmstore.engine.arena import Arena
from shmstore.engine.verify import problems, verify
from shmstore.ipc.directory import StoreFiles
from shmstore.listing import ORDERS, Listing, has_arena
from shmstore.options import Options, format_duration, format_size

NOBODY = 65534
HOSTILE_OWNER = "eve\x1b[31m\x07\nroot"

CONSOLE_SCRIPT = """
import sys
from importlib.metadata import entry_points
[main] = entry_points(group="console_scripts", name="shmstore")
sys.exit(main.load()())
"""

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def new_id() -> str:
    return secrets.token_urlsafe(32)


class Shop:
    """A store with some sessions, and their ids, which no output may contain."""

    def __init__(self, manager: StoreManager, directory: Path) -> None:
        self.manager = manager
        self.path = directory / "shop"
        self.files = StoreFiles.of("shop", directory)
        self.ada, self.ada_too, self.eve, self.guest, self.late = (new_id() for _ in range(5))
        with manager.store() as store:
            store.set(self.late, {"n": 0}, ttl=-1)
            store.set(self.ada, {"cart": ["tea"], "secret": "xyzzy"}, owner="ada")
            store.set(self.eve, {"n": 3}, owner=HOSTILE_OWNER, ttl=float("inf"))
            store.set(self.guest, {"n": 1, 2: b"bytes"})
            store.set(self.ada_too, {"n": 2}, owner="ada")
        self.ids = [self.ada_too, self.guest, self.eve, self.ada, self.late]

    def stop(self) -> None:
        self.manager.shutdown()
        assert self.files.server() is None

    def holds(self) -> set[str]:
        target = open_target(self.files)
        try:
            return set(target.store.ids())
        finally:
            target.store.close()


@pytest.fixture(params=["running", "stopped"])
def shop(request: pytest.FixtureRequest, manage: Start, store_dir: Path) -> Shop:
    shop = Shop(manage(check_period=None), store_dir)
    if request.param == "stopped":
        shop.stop()
    return shop


@pytest.fixture
def running(manage: Start, store_dir: Path) -> Shop:
    return Shop(manage(check_period=None), store_dir)


@pytest.fixture
def stopped(running: Shop) -> Shop:
    running.stop()
    return running


class Call(Protocol):
    def __call__(self, *arguments: object, **how: Any) -> subprocess.CompletedProcess[str]: ...


def environment(**more: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return ours | {"PYTHONPATH": ROOT} | more


@pytest.fixture
def cli(request: pytest.FixtureRequest) -> Call:
    """
    Return a function that runs a command to its end. No output of it may contain an id.

    In this process, but for a call that says how its process is to be.
    """

    def call(*arguments: object, answer: str = "", **process: Any) -> subprocess.CompletedProcess[str]:
        if process:
            done = subprocess.run(
                [sys.executable, "-m", "shmstore", *map(str, arguments)],
                text=True, capture_output=True, timeout=300, input=answer, **{"env": environment(), **process},
            )  # fmt: skip
        else:
            done = invoke(*arguments, answer=answer)
        for name in ("shop", "running", "stopped"):
            if name in request.fixturenames:
                told = (done.stdout or "") + (done.stderr or "")
                assert not [sid for sid in request.getfixturevalue(name).ids if sid in told], told
        assert "Traceback" not in (done.stderr or ""), done.stderr
        return done

    return call


def told(done: subprocess.CompletedProcess[str]) -> Any:
    """Return the JSON output of a command that succeeded."""
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout)


def one_line(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """Return the only line of output of a command that failed."""
    assert done.returncode == code, done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# -- figures -------------------------------------------------------------------------------------------------------


def test_stats(shop: Shop, cli: Call) -> None:
    shown = cli("stats", shop.path).stdout
    assert re.search(r"^sessions +5$", shown, re.MULTILINE)
    figures = told(cli("stats", "shop", "--directory", shop.path.parent, "--json"))
    assert (figures["sessions"], figures["owned"], figures["sets"]) == (5, 3, 5)
    assert (figures["name"], figures["path"]) == ("shop", str(shop.path))
    server = shop.files.server()
    assert (figures["running"], figures["server_pid"]) == (server is not None, server)
    assert ("not running" in shown) == (server is None)


def test_a_store_is_named_by_name_url_or_path(running: Shop, cli: Call) -> None:
    for name in (running.path, f"shm://{running.path}", os.path.relpath(running.path)):
        assert told(cli("stats", name, "--json"))["path"] == str(running.path)
    assert told(cli("stats", "shm://shop", "--directory", running.path.parent, "--json"))["sessions"] == 5


def test_ls(shop: Shop, cli: Call) -> None:
    lines = cli("ls", shop.path).stdout.splitlines()
    assert lines[0].split() == ["SESSION", "CREATED", "USED", "EXPIRES", "SIZE", "OWNER"]
    assert [line[:8] for line in lines[1:]] == [short_digest(sid) for sid in shop.ids], (
        "most recent first, as in the log"
    )
    assert [line.split()[3] for line in lines[1:]] == ["24.0h", "24.0h", "never", "24.0h", "expired"]
    assert lines[3].endswith(r"eve\x1b[31m\x07\nroot")
    rows = told(cli("ls", shop.path, "--json"))
    assert rows["total"] == 5
    assert [row["digest"][:8] for row in rows["sessions"]] == [short_digest(sid) for sid in shop.ids]
    assert [row["owner"] for row in rows["sessions"]] == ["ada", None, HOSTILE_OWNER, "ada", None]
    assert rows["sessions"][2]["remaining"] is None
    assert [row["expired"] for row in rows["sessions"]] == [False] * 4 + [True]


def test_ls_filters(shop: Shop, cli: Call) -> None:
    def listed(*arguments: object) -> list[str]:
        return [row["digest"][:8] for row in told(cli("ls", shop.path, "--json", *arguments))["sessions"]]

    assert listed("--owner", "ada") == [short_digest(shop.ada_too), short_digest(shop.ada)]
    assert listed("--owner", HOSTILE_OWNER) == [short_digest(shop.eve)]
    assert listed("--owner", "nobody") == []
    assert listed("--expired") == [short_digest(shop.late)]
    assert listed("--idle", "100000") == []
    assert len(listed("--idle", "0.001")) == 5
    assert listed("--owner", "ada", "--expired") == []
    few = cli("ls", shop.path, "--limit", 2)
    assert few.stdout.count("\n") == 3
    assert few.stderr == "2 of 5 sessions: --limit 0 shows all\n"
    assert cli("ls", shop.path, "--owner", "").returncode == 2


def test_show(shop: Shop, cli: Call) -> None:
    digest = short_digest(shop.ada)
    shown = cli("show", shop.path, digest).stdout
    assert "cart" in shown
    assert "xyzzy" not in shown
    facts = told(cli("show", shop.path, digest.upper(), "--json"))
    assert facts["owner"] == "ada"
    assert list(facts["keys"]) == ["cart", "secret"]
    assert "xyzzy" not in json.dumps(facts)
    assert "'xyzzy'" in cli("show", shop.path, digest, "--values").stdout
    values = told(cli("show", shop.path, short_digest(shop.guest), "--values", "--json"))["values"]
    assert values == {"n": 1, "2": "b'bytes'"}
    assert cli("ls", shop.path).stdout.splitlines()[1][:8] == short_digest(shop.ada_too), "showing is no use"
    assert "expired" in cli("show", shop.path, short_digest(shop.late)).stdout


# -- removing --------------------------------------------------------------------------------------------------------


def test_show_unusual_keys_and_values(running: Shop, cli: Call) -> None:
    huge, sid = 10**5000, new_id()
    with running.manager.store() as store:
        store.set(sid, {1: "one", "1": "another", "n": huge, "list": [huge, {"x": -huge}], "k" * 200: 0, "茶" * 30: 0})
    facts = told(cli("show", running.path, short_digest(sid), "--values", "--json"))
    assert (facts["values"]["1"], facts["values"]["(1)"]) == ("another", "one")
    assert sorted(facts["keys"]) == sorted(["1", "(1)", "n", "list", "k" * 200, "茶" * 30])
    assert facts["values"]["n"] == hex(huge)
    assert facts["values"]["list"] == [hex(huge), {"x": hex(-huge)}]
    text = cli("show", running.path, short_digest(sid), "--values")
    assert (text.returncode, text.stderr) == (0, "")
    assert re.search(r"^  n +\d.* <int: ", text.stdout, re.MULTILINE)
    assert re.search(r"^  1 {39}\d", text.stdout, re.MULTILINE), "one long name pads no other"
    code, lines = terminal("-m", "shmstore", "show", running.path, short_digest(sid), columns=40)
    assert code == 0
    assert max(map(columns, lines)) == 40


def test_rm_counts_the_removed_sessions(shop: Shop, cli: Call) -> None:
    """An expired session is counted; one that is removed already is not."""
    assert told(
        cli("rm", shop.path, short_digest(shop.ada), short_digest(shop.late), short_digest(shop.ada), "--json")
    ) == {"removed": 2}


def test_rm_sessions(shop: Shop, cli: Call) -> None:
    assert cli("rm", shop.path, short_digest(shop.ada), short_digest(shop.late)).stdout == "2 sessions removed\n"
    assert shop.holds() == {shop.ada_too, shop.guest, shop.eve}
    assert "no sessions" in one_line(cli("rm", shop.path, short_digest(shop.guest), short_digest(shop.ada)))
    assert shop.holds() == {shop.ada_too, shop.guest, shop.eve}
    assert told(cli("rm", shop.path, short_digest(shop.guest), "--json")) == {"removed": 1}


def test_an_ambiguous_digest(running: Shop, cli: Call) -> None:
    seen: dict[str, str] = {}
    for sid in map(str, itertools.count()):
        if (other := seen.setdefault(short_digest(sid)[:4], sid)) != sid:
            break
    with running.manager.store() as store:
        store.set(sid, {})
        store.set(other, {})
    before = running.holds()
    assert "2 sessions" in one_line(cli("rm", running.path, short_digest(running.ada), short_digest(sid)[:4]))
    assert running.holds() == before
    with running.manager.store() as store:  # also if one of them is unreadable
        arena = store.arena
        version = arena.table.version + arena.find(require_key(other))
        arena.cells[version] += 1
        try:
            with pytest.raises(LookupError, match="2 sessions"):
                Listing.one(store, short_digest(sid)[:4])
        finally:
            arena.cells[version] -= 1
    assert cli("rm", running.path, short_digest(sid)).returncode == 0
    assert running.holds() == before - {sid}


@pytest.mark.parametrize(
    "digest",
    ["", " ", "abc", "zzzz", "a" * 33, "../arena", "%s%n%x", "\x1b[31mabcd", "٣٣٣٣", "0x12", "-1234", "abcd\n", "*"],
)
def test_a_hostile_digest(stopped: Shop, cli: Call, digest: str) -> None:
    done = cli("rm", stopped.path, digest, "--yes", "--json")
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert len(stopped.holds()) == 5
    assert cli("show", stopped.path, digest).returncode == 2


def test_logout(shop: Shop, cli: Call) -> None:
    assert cli("logout", shop.path, "ada").stdout == "2 sessions ended\n"
    assert shop.holds() == {shop.guest, shop.eve, shop.late}
    assert told(cli("logout", shop.path, "ada", "--json")) == {"ended": 0}
    assert cli("logout", shop.path, "").returncode == 2


def test_prune(shop: Shop, cli: Call) -> None:
    assert cli("prune", shop.path).stdout == "1 session pruned\n"
    assert shop.holds() == set(shop.ids) - {shop.late}
    assert told(cli("prune", shop.path, "--json")) == {"pruned": 0}


def test_clear_asks(shop: Shop, cli: Call) -> None:
    for answer in ("", "n\n", "\n"):
        done = cli("clear", shop.path, answer=answer)
        assert (done.returncode, done.stdout.strip()) == (1, ""), "click before 8.3 writes a space"
        assert f"Remove 5 sessions of store shop in {shop.path}? [y/N]" in done.stderr
    assert len(shop.holds()) == 5
    assert cli("clear", shop.path, answer="y\n", env=environment()).stdout.strip() == "5 sessions removed"
    assert shop.holds() == set()
    assert told(cli("clear", shop.path, "--yes", "--json")) == {"removed": 0}


def test_save_and_load(shop: Shop, cli: Call, tmp_path: Path) -> None:
    kept, ids = tmp_path / "shop.snapshot", shop.holds()
    assert cli("save", shop.path, kept).stdout == f"4 sessions saved to {kept}\n"  # one has expired
    assert cli("clear", shop.path, "--yes").returncode == 0
    assert cli("load", shop.path, kept).stdout == f"4 sessions loaded from {kept}\n"
    ids.remove(shop.late)
    assert shop.holds() == ids
    assert told(cli("load", shop.path, kept, "--json")) == {"loaded": 0, "refused": 0, "path": str(kept)}
    assert told(cli("save", shop.path, kept, "--json")) == {"saved": 4, "path": str(kept)}
    kept.write_bytes(kept.read_bytes()[:-1])
    assert str(kept) in one_line(cli("load", shop.path, kept))
    assert shop.holds() == ids
    (tmp_path / "notes").write_text("not a snapshot")
    assert "snapshot" in one_line(cli("save", shop.path, tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "not a snapshot"
    one_line(cli("load", shop.path, tmp_path / "nothing"))


def test_a_load_that_lacks_room_fails(shop: Shop, cli: Call, tmp_path: Path) -> None:
    kept = tmp_path / "shop.snapshot"
    with Store(memory=2**23, check_period=None) as store:
        for number in range(3000):
            store.set(f"{number}", {"data": bytes(1000)})
        snapshot.save(store, kept)
    done = cli("load", shop.path, kept, "--json")
    loaded = json.loads(done.stdout)
    assert done.returncode == 1
    assert loaded["loaded"] + loaded["refused"] == 3000
    assert 0 < loaded["loaded"] < 3000
    assert f"{loaded['refused']} sessions refused, no room: " in done.stderr


def test_dispose_is_called_in_the_server(manage: Start, store_dir: Path, tmp_path: Path, cli: Call) -> None:
    trace = str(tmp_path / "trace")

    def dispose(sid: str, session: object, reason: str) -> None:
        with open(trace, "a") as file:
            print(os.getpid(), sid, reason, file=file)

    manager = manage(dispose=dispose)
    with manager.store() as store:
        store.set("a", {}, owner="ada")
        store.set("b", {}, owner="ada")
        server = store.stats().server_pid
    assert cli("rm", store_dir / "shop", short_digest("a")).returncode == 0
    manager.shutdown()
    assert cli("logout", store_dir / "shop", "ada").stdout == "1 session ended\n"
    (first, *destroyed), (second, *logged_out) = (line.split() for line in Path(trace).read_text().splitlines())
    assert (destroyed, logged_out) == (["a", "destroy"], ["b", "destroy"])
    assert int(first) == server != int(second)


# -- the store itself ------------------------------------------------------------------------------------------------


def test_a_dispose_of_a_server_that_starts_meanwhile_is_called(manage: Start, store_dir: Path, tmp_path: Path) -> None:
    shop = Shop(manage(check_period=None), store_dir)
    shop.stop()
    target = open_target(shop.files)
    try:
        notes = tmp_path / "notes"
        manager = manage(check_period=None, dispose=lambda sid, *_: notes.write_text(sid))
        manager.start()
        with pytest.raises(StoreUnavailable, match="has a server now, and with it a dispose: call this command again"):
            target.store.destroy(shop.ada)
        assert shop.ada in shop.holds()
        assert not notes.exists()
    finally:
        target.store.close()


def test_options_of_the_application_are_found_in_the_working_directory(
    manage: Start, store_dir: Path, tmp_path: Path, installed: str
) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "shopmod.py").write_text("def life(options, session, sid):\n    return 60\n")
    start = f"""
from shmstore import StoreManager
from shopmod import life
with StoreManager("shop", directory={str(store_dir)!r}, memory=2**20, ttl=life) as manager:
    manager.store().set("a", {{}})
"""
    env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path / 'app'}")
    subprocess.run([sys.executable, "-c", start], check=True, env=env, timeout=300)

    def stats(cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-c", CONSOLE_SCRIPT, "stats", str(store_dir / "shop")],
            text=True, capture_output=True, cwd=cwd, env=environment(PYTHONPATH=installed), timeout=300,
        )  # fmt: skip

    assert "No module named 'shopmod'" in one_line(stats(tmp_path))
    assert stats(tmp_path / "app").returncode == 0


def test_rm_the_store(stopped: Shop, cli: Call) -> None:
    refused = cli("rm", stopped.path, answer="n\n")
    assert refused.returncode == 1
    assert len(stopped.holds()) == 5
    assert cli("rm", stopped.path, "--yes").stdout == "store shop removed\n"
    assert list(stopped.path.parent.iterdir()) == []
    assert "there is no store" in one_line(cli("rm", stopped.path, "--yes"))


def test_a_store_in_use_is_not_removed(running: Shop, cli: Call, run: Run) -> None:
    refusal = one_line(cli("rm", running.path, "--yes"))
    assert "is in use" in refusal
    assert f"its server, process {running.files.server()}, exits some seconds after the last of them" in refusal
    assert len(running.holds()) == 5
    # A worker whose server has ended continues in place.
    worker = run(
        "import sys, shmstore\nstore = shmstore.connect(sys.argv[1])\n"
        "print('ready', flush=True)\nsys.stdin.readline()\nprint(len(store), flush=True)",
        f"shm://{running.path}",
    )
    assert worker.stdout
    assert worker.stdin
    assert worker.stdout.readline() == "ready\n"
    running.stop()
    refusal = one_line(cli("rm", running.path, "--yes"))
    assert f"is in use: used by process {worker.pid} (" in refusal
    assert f"kill {worker.pid}" in refusal
    assert running.files.server() is None
    worker.stdin.write("\n")
    worker.stdin.flush()
    assert worker.stdout.readline() == "5\n"
    worker.wait()
    assert cli("rm", running.path, "--yes").returncode == 0


@pytest.mark.parametrize("usable", [True, False])
def test_rm_waits_for_a_user_that_is_exiting(usable: bool, stopped: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    user = Arena.open(stopped.files.arena)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: user.close())
    for module in ("shmstore.engine.mapping", "shmstore.system.files"):
        monkeypatch.setattr(f"{module}.time", clock)
    if not usable:
        monkeypatch.setattr("shmstore.engine.layout._VERSION", 99)
    _remove_store(stopped.files, yes=True)
    assert user.file.closed
    assert not stopped.path.exists()


def test_rm_removes_a_damaged_store(stopped: Shop, cli: Call) -> None:
    (stopped.path / "arena").write_bytes(b"garbage")
    assert "is not an arena" in one_line(cli("stats", stopped.path))
    assert cli("rm", stopped.path, "--yes").returncode == 0
    assert not stopped.path.exists()


def test_rm_leaves_a_directory_that_is_not_a_store(tmp_path: Path, cli: Call) -> None:
    path = tmp_path / "thesis"
    path.mkdir(mode=0o700)
    (path / "options").write_text("precious")
    one_line(cli("rm", path, "--yes"))
    assert [each.name for each in path.iterdir()] == ["options"]


def test_check(shop: Shop, cli: Call) -> None:
    assert cli("check", shop.path).stdout == "store shop is sound: 5 sessions\n"
    arena = Arena.open(shop.files.arena)
    arena.cells[at.SESSIONS] += 1
    arena.close()
    done = cli("check", shop.path)
    assert done.returncode == 1
    assert "with 6 sessions" in done.stdout
    assert done.stderr.startswith("store shop is damaged: 1 problem; ")
    assert f"`shmstore rm {shop.path}`" in done.stderr
    found = cli("check", shop.path, "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["sound"] is False


def test_a_copy_of_the_memory_is_consistent_and_blocks_no_writer() -> None:
    with Store(memory=2**20) as store:
        store.set("a", {"n": 1})
        copy = store.arena.duplicate(1.0)
        try:
            for number in range(100):
                store.set(str(number), {})
            assert copy.cells[at.SESSIONS] == 1
            verify(copy)
            copy.cells[at.SESSIONS] = 7
            assert len(store) == 101
            verify(store.arena)
        finally:
            copy.close()


COMMANDS = [
    ("stats",), ("top", "--count", "1"), ("ls",), ("show", "abcd1234"), ("rm", "abcd1234"), ("rm", "--yes"),
    ("logout", "ada"), ("prune",), ("clear", "--yes"), ("check",), ("doctor",),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_missing_store(store_dir: Path, cli: Call, command: tuple[str, ...]) -> None:
    name, *rest = command
    assert "there is no store 'shop'" in one_line(cli(name, "shop", *rest, "--directory", store_dir))
    (store_dir / "shop").mkdir(mode=0o700)
    assert "there is no store 'shop'" in one_line(cli(name, "shop", *rest, "--directory", store_dir))
    assert list((store_dir / "shop").iterdir()) == []


@pytest.mark.parametrize("name", ["re/../dis", "redis://x", "a b", "", ".x", "shm://x?y", "x\x1b[31m"])
def test_a_wrong_name(cli: Call, name: str) -> None:
    assert "\x1b" not in one_line(cli("stats", name))


def test_no_command_starts_a_server(running: Shop, cli: Call) -> None:
    with running.manager.store() as store:
        for _ in range(20):
            store.set(new_id(), {}, owner="many")
    running.manager._watch.stop()
    assert connection.kill(running.files)  # its heartbeat looks recent, as after any kill -9
    for name, *rest in COMMANDS:
        if rest != ["--yes"] or name == "clear":
            cli(name, running.path, *rest)
        assert running.files.server() is None, name
    assert "many" not in cli("logout", running.path, "many").stdout
    assert running.files.server() is None


def test_a_command_never_starts_a_server_later(running: Shop) -> None:
    target = open_target(running.files)
    running.manager._watch.stop()
    assert connection.kill(running.files)
    target.store.arena.cells[at.HEARTBEAT] = 1  # late by now
    for _ in range(32):
        target.store.set("a", {})
    time.sleep(1)
    assert running.files.server() is None
    target.store.close()


WRITER = """
import os, sys
from shmstore.cli.target import open_target
from shmstore.ipc.directory import StoreFiles
files, kinds, number = StoreFiles.of(sys.argv[1]), set(), 0
print("ready", flush=True)
while os.path.exists(sys.argv[2]):
    target = open_target(files)
    for _ in range(5):
        target.store.set(f"{sys.argv[3]}-{number}", {})
        number += 1
    kinds.add(target.running)
    target.store.close()
print(number, len(kinds))
"""


def test_commands_work_while_the_server_ends_and_restarts(
    manage: Start, store_dir: Path, tmp_path: Path, run: Run
) -> None:
    manage().start()
    go_on = tmp_path / "go on"
    go_on.touch()
    writers = [run(WRITER, f"shm://{store_dir}/shop", go_on, name) for name in "abc"]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline()
    files = StoreFiles.of("shop", store_dir)
    for turn in range(6):
        manager = manage()
        manager.start()
        if turn % 2:
            connection.kill(files)
        manager.shutdown()
        time.sleep(0.2)
    go_on.unlink()
    done = [writer.communicate(timeout=300)[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], done
    target = open_target(files)
    written = sum(int(count) for count, _ in done)
    assert any(kinds == "2" for _, kinds in done), "with a server and without"
    stats = target.store.stats()
    assert (stats.sets, len(target.store.ids()) + stats.evicted) == (written, written)
    verify(target.store.arena)
    target.store.close()


def test_a_server_that_does_not_answer(running: Shop, cli: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection.connect, "__defaults__", (0.1,))  # seconds; otherwise each command waits 2
    monkeypatch.setattr("shmstore.client.attachment.SILENCE", 0.1)
    pid = running.files.server()
    assert pid
    running.manager._watch.stop()
    stop(pid)
    assert told(cli("stats", running.path, "--json"))["sessions"] == 5
    assert cli("ls", running.path).stdout.count("\n") == 6
    assert "does not answer" in one_line(cli("prune", running.path))
    done = cli("doctor", running.path)
    assert done.returncode == 1
    assert re.search(rf"^broken +server: .*\n +kill -9 {pid}", done.stdout, re.MULTILINE)
    os.kill(pid, signal.SIGCONT)


@root_only
def test_stores_of_other_users(store_dir: Path, manage: Start, cli: Call) -> None:
    store_dir.chmod(0o755)
    theirs = manage("theirs")
    theirs.start(user=(NOBODY, NOBODY))
    mine = Shop(manage(), store_dir)
    assert "use the store as its owner" in one_line(cli("ls", store_dir / "theirs"))

    def as_nobody(*arguments: object) -> subprocess.CompletedProcess[str]:
        # Root imports the package: the user nobody may not be allowed to read Python's directory.
        become = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
        code = f"import os; from shmstore.cli import main; {become}; main({[*map(str, arguments)]})"
        return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment())

    assert "belongs to uid 0" in one_line(as_nobody("ls", mine.path))
    assert "belongs to uid 0" in one_line(as_nobody("rm", mine.path, "--yes"))
    assert told(as_nobody("ls", store_dir / "theirs", "--json"))["total"] == 0
    assert len(mine.holds()) == 5


# -- text in the command line, and columns ---------------------------------------------------------------------------


@pytest.mark.parametrize("locale", [{"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}])
def test_an_owner_argument_is_utf8_in_every_locale(running: Shop, cli: Call, locale: dict[str, str]) -> None:
    with connect(f"shm://{running.path}") as store:
        store.set("z", {}, owner="Zoë")
    env = environment(LC_ALL="C", **locale)
    assert told(cli("ls", running.path, "--owner", "Zoë", "--json", env=env))["total"] == 1
    wrong = cli("ls", running.path, "--owner", os.fsdecode(b"Zo\xeb"), env=env)
    assert (wrong.returncode, "is not UTF-8" in wrong.stderr) == (2, True)
    assert told(cli("logout", running.path, "Zoë", "--json", env=env)) == {"ended": 1}


def test_values_of_all_sizes_are_in_one_column(running: Shop, cli: Call) -> None:
    sizes = (1, 96, 97, 1020, 5000)
    with connect(f"shm://{running.path}") as store:
        store.set("sizes", {f"key{number}": "v" * number for number in sizes})
        assert has_arena(store)
        digest = Listing(store).rows(0, 1)
        first = next(iter(digest)).digest
    rows = [line for line in cli("show", running.path, first, "--values").stdout.splitlines() if "key" in line]
    assert len(rows) == len(sizes)
    assert len({line.index("'v") for line in rows}) == 1


# -- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor(shop: Shop, cli: Call) -> None:
    report = told(cli("doctor", shop.path, "--json"))
    assert not report["broken"]
    levels = {each["about"]: each["level"] for each in report["findings"]}
    assert levels["store"] == levels["options"] == levels["msgspec"] == "ok"
    assert levels["server"] == ("ok" if shop.files.server() else "warning")
    assert {"python", "gunicorn", "open files", "memory", "directory", "RemoveIPC"} <= levels.keys()
    assert cli("doctor").returncode == 0, "also without a store"
    (shop.path / "arena").chmod(0o644)
    done = cli("doctor", shop.path)
    assert done.returncode == 1
    assert re.search(r"^broken +permissions: .*/arena .*0644\n +.*chmod 600", done.stdout, re.MULTILINE)


def test_doctor_finds_faults(stopped: Shop, cli: Call) -> None:
    def findings(*arguments: object, **how: Any) -> dict[str, dict[str, str]]:
        done = cli("doctor", *arguments, "--json", **how)
        report = json.loads(done.stdout)
        assert done.returncode == int(report["broken"])
        return {each["about"]: each for each in report["findings"]}

    of_another = {"options": {}, "python": "cpython 2.7", "functions": {"dispose": ""}}
    (stopped.path / "options").write_text(json.dumps(of_another))
    assert "2.7" in findings(stopped.path)["options"]["text"]
    (stopped.path / "arena").write_bytes(b"garbage")
    assert findings(stopped.path)["store"]["level"] == "broken"
    stopped.path.chmod(0o755)
    assert "chmod 700" in findings(stopped.path)["store"]["text"]
    few = findings(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))["open files"]
    assert (few["level"], "LimitNOFILE" in few["advice"]) == ("warning", True)
    disk = findings("--directory", "/proc/sys")["directory"]
    assert (disk["level"], disk["text"]) == ("broken", "/proc/sys is not writable")


@pytest.mark.parametrize("place", ["no store", "a store"])
def test_doctor_reports_a_wrong_engine(place: str, stopped: Shop, cli: Call) -> None:
    arguments = [stopped.path] if place == "a store" else []
    done = cli("doctor", *arguments, env=environment(SHMSTORE_ENGINE="fast"))
    assert done.returncode == 1
    assert re.search(
        r"^broken +engine: SHMSTORE_ENGINE=fast is neither .*\n +unset SHMSTORE_ENGINE", done.stdout, re.MULTILINE
    )


def test_doctor_checks_the_snapshot(manage: Start, store_dir: Path, tmp_path: Path, cli: Call) -> None:
    path = tmp_path / "shop.snapshot"
    shop = Shop(manage(check_period=None, snapshot=path), store_dir)

    def found() -> tuple[str, str]:
        report = json.loads(cli("doctor", shop.path, "--json").stdout)
        return next((each["level"], each["text"]) for each in report["findings"] if each["about"] == "snapshot")

    assert found() == ("ok", f"not yet at {path}")
    shop.stop()
    level, text = found()
    assert level == "ok"
    assert re.fullmatch(f"{re.escape(str(path))}, 4 sessions, \\ds old", text)
    tmp_path.chmod(0o777)
    assert found()[0] == "warning"
    tmp_path.chmod(0o700)
    with Store(memory=2**18) as other:
        path.unlink()
        snapshot.save(other, path)
    assert found() == ("broken", f"{path} is the snapshot of store ''")
    path.write_bytes(path.read_bytes()[:-1])
    level, text = found()
    assert (level, "damaged" in text) == ("broken", True)
    path.unlink()
    path.mkdir()
    assert found()[0] == "broken"


def test_doctor_reports_failing_snapshots(manage: Start, store_dir: Path, tmp_path: Path, cli: Call) -> None:
    path = tmp_path / "shop.snapshot"
    Path(f"{path}.new").mkdir()  # the temporary file: this cannot be detected beforehand
    shop = Shop(manage(check_period=None, snapshot=path, snapshot_period=0.02), store_dir)
    with shop.manager.store() as store:
        wait_for(lambda: store.stats().snapshot_failures > 1, "attempts that fail")
        report = json.loads(cli("doctor", shop.path, "--json").stdout)
        found = next(each for each in report["findings"] if each["about"] == "snapshot")
        assert report["broken"]
        assert found["level"] == "broken"
        assert re.fullmatch(rf"{path} could not be saved \(\d+ attempts\); none exists", found["text"])
        assert f"shmstore save shop {path}" in found["advice"]
        assert told(cli("stats", shop.path, "--json"))["snapshot_age"] is None
        Path(f"{path}.new").rmdir()
        wait_for(lambda: store.stats().snapshot_failures == 0, "success")
        assert cli("doctor", shop.path).returncode == 0
        assert 0 <= told(cli("stats", shop.path, "--json"))["snapshot_age"] < 600


LOGIND = "etc/systemd/logind.conf"
DROP_IN = "etc/systemd/logind.conf.d/9.conf"
VENDORS_DROP_IN = "usr/lib/systemd/logind.conf.d/9.conf"


@pytest.mark.parametrize(
    ("files", "uid", "safe"),
    [
        ({}, 1000, False),
        ({}, 33, True),
        ({LOGIND: "[Login]\n#RemoveIPC=no\n"}, 1000, False),
        ({LOGIND: "[Login]\nRemoveIPC=no\n"}, 1000, True),
        ({"usr/lib/systemd/logind.conf": "RemoveIPC=no\n", LOGIND: ""}, 1000, False),
        ({LOGIND: "RemoveIPC=no", "run/systemd/logind.conf.d/9.conf": "RemoveIPC = yes"}, 1000, False),
        ({VENDORS_DROP_IN: "RemoveIPC=yes", DROP_IN: "RemoveIPC=0"}, 1000, True),
    ],
)
def test_remove_ipc(tmp_path: Path, files: dict[str, str], uid: int, safe: bool) -> None:
    assert remove_ipc(uid, str(tmp_path)).level == OK, "no systemd here"
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert (remove_ipc(uid, str(tmp_path)).level == OK) == safe


# -- serve -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def serving(tmp_path: Path) -> Path:
    """Return the file with what ``shmstore serve`` prints."""
    return tmp_path / "serving"


@pytest.fixture
def serve(store_dir: Path, serving: Path, forker: Forker) -> Iterator[Callable[..., Forked]]:
    """Return a function that runs ``shmstore serve shop`` and waits until it serves; the test kills it at its end."""
    with ExitStack() as processes:

        def start(*arguments: str, **more: str) -> Forked:
            command = [str(BIN / "shmstore"), "serve", "shop", "--directory", str(store_dir), *arguments]
            with serving.open("wb") as output:
                process = processes.enter_context(forker.script(command, output, Path(ROOT), environment(**more)))

            def serves() -> bool:
                assert process.poll() is None, serving.read_text()
                return "serving the store" in serving.read_text()

            wait_for(serves, "shmstore serve")
            return process

        yield start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_exits_on_request_and_keeps_the_sessions(
    serve: Callable[..., Forked], serving: Path, store_dir: Path, cli: Call, number: int
) -> None:
    process = serve("--memory", "1M", "--max", "2", "--ttl", "inf")
    with connect("shop", directory=store_dir) as store:
        assert (store.options.max, store.options.memory) == (2, 2**20)
        server = store.stats().server_pid
        for name in "abc":
            store.set(name, {})
        assert store.ids() == ["c", "b"]
        os.kill(server, signal.SIGKILL)
        wait_for(lambda: store.stats().server_pid != server, "another server")
        server = store.stats().server_pid
        process.send_signal(number)
        assert process.wait(20) == 0
        assert not alive(server)
    log = serving.read_text()
    assert re.search(r"INFO\] shmstore: .*asked to end", log), log
    assert "Traceback" not in log
    assert told(cli("ls", store_dir / "shop", "--json"))["total"] == 2


def test_serve_without_persistence_removes_the_store(serve: Callable[..., Forked], store_dir: Path) -> None:
    process = serve("--memory", "1M", "--no-persist")
    assert (store_dir / "shop" / "arena").exists()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    wait_for(lambda: not (store_dir / "shop").exists())


def test_serve_attaches_to_a_running_server(serve: Callable[..., Forked], running: Shop, store_dir: Path) -> None:
    pid = running.files.server()
    process = serve("--max", "3")
    with running.manager.store() as store:
        assert store.options.max == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert running.files.server() == pid, "it is not its own"


def test_serve_exits_when_another_process_shuts_the_server_down(serve: Callable[..., Forked], running: Shop) -> None:
    process = serve()
    running.manager.shutdown()
    assert process.wait(20) == 0


def test_serve_notifies_systemd(serve: Callable[..., Forked], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(20)
        serve("--memory", "1M", NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    ("option", "code"), [("--memory=1", 1), ("--memory=lots", 2), ("--max=0", 1), ("--ttl=nan", 1), ("--dispose=x", 2)]
)
def test_serve_refuses_wrong_options(store_dir: Path, cli: Call, option: str, code: int) -> None:
    done = cli("serve", "shop", "--directory", store_dir, option)
    assert done.returncode == code
    assert list(store_dir.iterdir()) == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_the_unit_of_systemd(tmp_path: Path) -> None:
    unit = Path(ROOT, "deploy", "shmstore.service").read_text()
    here = unit.replace("/srv/shop/.venv/bin/shmstore", sys.executable).replace("=www-data", "=root")
    assert here.count(sys.executable) == here.count("=root") == 1
    path = tmp_path / "shmstore.service"
    for text, sound in ((here, True), (here.replace("KillMode=mixed", "KillMode=mexed"), False)):
        path.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", path], text=True, capture_output=True)
        if sound:
            assert done.returncode == 0, done.stderr
        assert (path.name not in done.stderr) == sound, done.stderr


def test_the_options_of_the_unit_are_options(cli: Call, store_dir: Path) -> None:
    unit = Path(ROOT, "deploy", "shmstore.service").read_text()
    arguments = re.findall(r"^ExecStart=\S+ (.*)$", unit, re.MULTILINE)[0].split()
    assert arguments[:2] == ["serve", "shop"]
    done = cli(*arguments, "--directory", store_dir, "--memory=1")  # the last one counts
    assert "memory must be" in one_line(done)


# -- paths that are not stores ---------------------------------------------------------------------------------------


def test_a_store_may_be_named_by_its_arena(stopped: Shop, cli: Call) -> None:
    assert told(cli("ls", stopped.files.arena, "--json"))["total"] == len(stopped.ids)


def test_stores_are_listed_in_all_directories(running: Shop, cli: Call) -> None:
    server = running.files.server()
    listed = {each["path"]: each for each in told(cli("stores", "--json"))["stores"]}
    found = listed[str(running.path)]
    assert (found["name"], found["sessions"], found["server_pid"]) == ("shop", 5, server)
    assert re.search(rf"^shop +\S+ +{server} +5 .*{running.path}$", cli("stores").stdout, re.MULTILINE)


def test_control_sequences_in_names_of_directories_do_not_reach_the_terminal(
    cli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user can make such directories, and root lists them."""
    module = sys.modules["shmstore.cli.stores"]  # its name in the package is that of the command
    monkeypatch.setattr(module, "DEFAULT", f"{tmp_path}/shmstore-")
    place = tmp_path / "shmstore-\x1b[2J" / "shop\x1b[31m"
    place.mkdir(parents=True)
    Arena.create(place / "arena", Options.of(memory=2**16).geometry).close()
    done = cli("stores")
    assert r"shop\x1b[31m " in done.stdout
    assert "\x1b" not in done.stdout
    monkeypatch.setattr(os, "access", lambda *_: False)
    done = cli("stores")
    assert r"shmstore-\x1b[2J belongs to another user" in done.stderr
    assert "\x1b" not in done.stderr


def test_without_a_store_the_error_suggests_no_change(cli: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("/etc", "/dev/shm", tmp_path / "file", tmp_path / "file" / "shop"):
        for command in ("stats", "doctor", "check"):
            assert one_line(cli(command, path)).startswith("Error: there is no store ")


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_path_that_is_not_an_arena_is_neither_removed_nor_changed(kind: str, cli: Call, store_dir: Path) -> None:
    place, secret = store_dir / "shop", store_dir / "secret"
    place.mkdir(mode=0o700)
    secret.write_text("secret")
    arena = place / "arena"
    if kind == "link":
        arena.symlink_to(secret)
    else:
        arena.mkdir()
    done = cli("doctor", place)
    assert done.returncode == 1
    assert f"{arena} is not a file" in done.stdout
    assert "chmod" not in done.stdout
    done = cli("rm", place, "--yes")
    assert (done.returncode, arena.exists()) == ((0, False) if kind == "link" else (1, True))
    assert secret.read_text() == "secret"


def test_an_empty_directory_name_is_refused(cli: Call) -> None:
    assert "directory is empty" in one_line(cli("stats", "shop", "--directory", ""))


# -- in a terminal ---------------------------------------------------------------------------------------------------


def without_escapes(drawn: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)


def in_terminal(
    *command: object, columns: int = 80, steps: Sequence[tuple[str, bytes]] = (), **more: str
) -> tuple[int, str]:
    """
    Run a command in a terminal of so many columns.

    Args:
        command: The program and its arguments.
        columns: The width of the terminal.
        steps: What to wait for in that which it has drawn since the last step, and the keys to press then.
        more: Variables of its environment.

    Returns:
        Its exit code, and all that it drew.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [*map(str, command)],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 # so that Ctrl-C is a signal
        env=environment(**{"TERM": "xterm", **more}),
    )  # fmt: skip
    os.close(theirs)
    drawn, seen, steps = b"", 0, [*steps]
    try:
        with suppress(OSError):  # EIO: no process has the terminal open any more
            while part := os.read(ours, 65536):
                drawn += part
                if steps and steps[0][0] in without_escapes(drawn[seen:].decode(errors="replace")):
                    seen = len(drawn)
                    os.write(ours, steps.pop(0)[1])
        code = process.wait(30)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert not steps, drawn.decode()
    return code, drawn.decode()


def terminal(
    *arguments: object, columns: int = 80, keys: bytes = b"", until: str = "", **more: str
) -> tuple[int, list[str]]:
    """Run Python in a terminal of so many columns; return its exit code and the lines that it drew."""
    steps = [(until, keys)] if keys else []
    code, drawn = in_terminal(sys.executable, *arguments, columns=columns, steps=steps, **more)
    lines = without_escapes(drawn).replace("^C", "").replace("\r", "\n")
    return code, lines.splitlines()


# Runs commands one after the other, with a line before each: to import all of it takes longer than a command.
ONE_BY_ONE = """
import json, sys
from shmstore.cli import main
for command in json.loads(sys.argv[1]):
    print(">>>", *command, flush=True)
    try:
        main(command, prog_name="shmstore")
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_ls_in_a_terminal_keeps_to_its_width_and_piped_it_does_not(running: Shop, cli: Call) -> None:
    owner = "a.person.with.a.long.name@department.example.org"
    with running.manager.store() as store:
        store.set(new_id(), {}, owner=owner)
    for width in (60, 120):
        code, lines = terminal("-m", "shmstore", "ls", running.path, columns=width)
        lines = [line for line in lines if line]
        assert code == 0
        assert len(lines) == 7
        assert max(map(len, lines)) <= width
        assert lines[1].endswith("…" if width == 60 else owner)
        assert not any(sid in line for sid in running.ids for line in lines)
    assert owner in cli("ls", running.path).stdout
    ascii_only = cli("ls", running.path, env=environment(PYTHONIOENCODING="ascii"))
    assert ascii_only.returncode == 0


def test_ls_into_a_pipe_that_is_closed(running: Shop) -> None:
    with running.manager.store() as store:
        for _ in range(1000):
            store.set(new_id(), {})
    done = subprocess.run(
        f"{sys.executable} -m shmstore ls {running.path} --limit 0 | head -1",
        shell=True, capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


WIDE_OWNERS = (
    "a.person.with.a.long.name@department.example.org",
    "茶" * 40,
    "e\u0301" * 60,
    "\u260e\ufe0f" * 60,
    "\U0001f468\u200d\U0001f469" * 9,
    HOSTILE_OWNER * 9,
)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_commands_print_fits_a_terminal(running: Shop, no_rich: str, width: int, encoding: str) -> None:
    """Except for paths: they are not cut."""
    with running.manager.store() as store:
        for owner in WIDE_OWNERS:
            store.set(new_id(), {"茶" * 50: "x"}, owner=owner)
        digest = short_digest(store.ids()[1])
    path = f"./{os.path.relpath(running.path, ROOT)}"
    commands = [
        ("ls", path), ("show", path, digest, "--values"), ("top", path, "--interval", "0.1", "--count", "2"),
        ("check", path), ("stats", path), ("--help",), ("serve", "--help"),
    ]  # fmt: skip
    code, drawn = terminal(
        "-c", ONE_BY_ONE, json.dumps(commands), columns=width, PYTHONPATH=no_rich, PYTHONIOENCODING=encoding
    )
    assert code == 0, drawn
    begun = [number for number, line in enumerate(drawn) if line.startswith(">>> ")]
    assert len(begun) == len(commands)
    for command, first, end in zip(commands, begun, [*begun[1:], len(drawn)], strict=True):
        lines = [line for line in drawn[first + 1 : end] if line]
        assert lines, command
        wide = [line for line in lines if columns(line) > width and str(running.path) not in line]
        assert not wide, command
        if command[0] == "ls" and encoding == "utf-8":
            rows = lines[1:]
            assert len({columns(line[:44]) for line in rows}) == 1, "the owners begin in the same column"
            assert [columns(line) for line in rows if line.endswith("…")], "some are cut"


def test_findings_of_doctor_are_wrapped_in_a_terminal(running: Shop) -> None:
    code, lines = terminal("-m", "shmstore", "doctor", running.path, columns=60)
    assert code == 0, lines
    words = {line for line in lines for word in line.split() if len(word) > 40}  # paths
    assert not [line for line in lines if columns(line) > 60 and line not in words]
    assert {line[:9].strip() for line in lines} <= {"ok", "warning", ""}


def test_no_color(running: Shop) -> None:
    """No command has colours, with or without it: the table of rich is bold and italic."""
    path = str(running.path)
    commands = [["ls", path], ["stats", path], ["top", path, "--interval", "0.1", "--count", "1"], ["--help"]]
    code, drawn = in_terminal(sys.executable, "-c", ONE_BY_ONE, json.dumps(commands), NO_COLOR="1")
    assert code == 0, drawn
    assert drawn.count(">>> ") == len(commands)
    assert "\x1b[" in drawn, "top draws"
    assert not re.search(r"\x1b\[[0-9;]*\b(3[0-8]|4[0-8]|9[0-7])[;m]", drawn)


def test_top_in_a_terminal_that_cannot_move_its_cursor(running: Shop) -> None:
    code, drawn = in_terminal(
        sys.executable, "-m", "shmstore", "top", running.path, "--interval", "0.1", "--count", "2", TERM="dumb"
    )
    assert code == 0
    assert [line.split()[0] for line in drawn.splitlines()] == ["sessions", "5", "5"]


@pytest.fixture
def no_rich(tmp_path: Path) -> str:
    """Return a path on which rich cannot be imported."""
    (tmp_path / "without" / "rich").mkdir(parents=True)
    (tmp_path / "without" / "rich" / "__init__.py").write_text("raise ImportError")
    return f"{tmp_path / 'without'}:{ROOT}"


@pytest.mark.parametrize("columns", [60, 120])
@pytest.mark.parametrize("rich", [True, False])
def test_top_in_a_terminal(running: Shop, no_rich: str, columns: int, rich: bool) -> None:
    code, lines = terminal(
        "-m", "shmstore", "top", running.path, "--interval", "0.1",
        columns=columns, keys=b"\x03", until="evict/s", **{} if rich else {"PYTHONPATH": no_rich},
    )  # fmt: skip
    text = "\n".join(lines)
    assert code == 0, text
    assert "Traceback" not in text
    assert max(map(len, lines)) <= columns
    for name in ("sessions", "memory", "gets/s", "hits", "sets/s"):
        assert name in text
    assert ("shop" in text) == rich, "a table has a title"


def test_top_piped(shop: Shop, cli: Call) -> None:
    lines = cli("top", shop.path, "--interval", "0.1", "--count", "3").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["sessions", "5", "5", "5"]
    samples = cli("top", shop.path, "--interval", "0.1", "--count", "2", "--json").stdout.splitlines()
    assert [json.loads(sample)["sessions"] for sample in samples] == [5, 5]


@pytest.mark.parametrize("interval", ["nan", "inf", "0", "-1", "soon"])
def test_top_and_impossible_intervals(running: Shop, cli: Call, interval: str) -> None:
    done = cli("top", running.path, "--interval", interval, "--count", "1")
    assert (done.returncode, done.stdout) == (2, "")


def test_top_counts(running: Shop, run: Run, cli: Call) -> None:
    load = run(
        "import sys, shmstore\nstore = shmstore.connect(sys.argv[1])\nprint('ready', flush=True)\n"
        "while True:\n    store.get('missing')\n    store.set('here', {})\n    store.get('here')",
        f"shm://{running.path}",
    )
    assert load.stdout
    assert load.stdout.readline()

    def sample() -> dict[str, float]:
        [line] = cli("top", running.path, "--count", "1", "--json").stdout.splitlines()
        return dict(json.loads(line))

    def counted() -> bool:
        rates = sample()
        if rates["gets_per_second"] <= 10 or rates["sets_per_second"] <= 10:
            return False  # on a busy machine the load may not have run in this second
        assert 0.3 < rates["hit_rate"] < 0.7
        return True

    wait_for(counted, "a second in which the load runs")


def test_top_shows_rates() -> None:
    with Store(memory=2**20) as store:
        stats = store.stats()
    now = replace(stats, sets=40, lock_waits=6)
    columns = {each.title: value for each, value in _cells(_rates(stats, now, 2.0, on_server=False)).items()}
    assert columns["sets/s"] == "20"
    assert columns["waits/s"] == "3"


# With this, a script shows its progress after 0.2 s.
SOON = "from shmstore.cli import output; output._SLOW /= 5"
STEPS = """
import time
from shmstore.cli.output import steps
with steps("checking") as at:
    time.sleep(0.4)
    at(5, 10)
    time.sleep(0.5)
"""
PROGRESS = """
import time
from shmstore.cli.output import progress
with progress("working", 10, lambda: 5):
    time.sleep(0.7)
"""


def test_progress_is_shown_after_a_second_on_a_terminal_only(run: Run) -> None:
    assert _SLOW == 1
    code, lines = terminal("-c", SOON + PROGRESS)
    assert code == 0
    assert re.search(r"working .*50%", "\n".join(lines))
    piped = run(SOON + PROGRESS, stderr=subprocess.STDOUT)
    assert piped.communicate()[0] == ""
    code, lines = terminal("-c", PROGRESS.replace("0.7", "0.1"))
    assert lines == []
    code, lines = terminal("-c", SOON + STEPS)
    assert code == 0
    assert re.search(r"checking .*50%", "\n".join(lines))


def test_verify_reports_progress() -> None:
    with Store(memory=2**20) as store:
        for number in range(1500):
            store.set(str(number), {})
        told: list[tuple[int, int]] = []
        assert problems(store.arena, lambda *step: told.append(step)) == []
        assert told == [(0, 1500), (1024, 1500)]


# Each command runs in a fork of one Python that has started with these streams.
EACH = """
import os, sys
from shmstore.cli import main
store, report, *commands = sys.argv[1:]
codes = []
for command in commands:
    if not os.fork():
        name, *rest = command.split()
        main([name, store, *rest], prog_name="shmstore")
    codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
with open(report, "w") as file:
    print(*codes, file=file)
"""


@some("closed", {each or "none": each for each in ("", ">&-", "2>&-", ">&- 2>&-", "<&-")}, 2)
def test_streams_that_are_closed(running: Shop, closed: str, tmp_path: Path) -> None:
    commands = ["stats", "ls", "ls --json", "top --count 1 --interval 0.1", "check", "prune", "doctor", "clear --yes"]
    report = tmp_path / "report"
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "$@" {closed}', sys.executable, EACH, running.path, report, *commands],
        capture_output=True, text=True, env=environment(), timeout=300,
    )  # fmt: skip
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done
    assert report.read_text().split() == ["0"] * len(commands), done


# -- entry points ----------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path) -> str:
    """Return a path on which this tree is an installed distribution, with the entry points of pyproject.toml."""
    project = tomllib.loads(Path(ROOT, "pyproject.toml").read_text())["project"]
    place = tmp_path / "site" / f"shmstore-{project['version']}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: shmstore\nVersion: {project['version']}\n")
    groups = project["entry-points"] | {"console_scripts": project["scripts"]}
    (place / "entry_points.txt").write_text(
        "\n".join(f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in names.items()) for group, names in groups.items())
    )
    return f"{place.parent}:{ROOT}"


def test_flask_has_the_same_commands(running: Shop, installed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flask", "shmstore", "stats", running.path, "--json"],
        text=True, capture_output=True, env=environment(PYTHONPATH=installed),
    )  # fmt: skip
    assert told(done)["sessions"] == 5
    missing = subprocess.run(
        [sys.executable, "-m", "flask", "shmstore", "stats", running.path.with_name("nope")],
        text=True, capture_output=True, env=environment(PYTHONPATH=installed),
    )  # fmt: skip
    assert "there is no store" in one_line(missing)


def test_the_console_script(running: Shop, installed: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONSOLE_SCRIPT, "stats", running.path, "--json"],
        text=True, capture_output=True, env=environment(PYTHONPATH=installed),
    )  # fmt: skip
    assert told(done)["sessions"] == 5


def test_help_and_version(cli: Call) -> None:
    assert re.match(r"shmstore, version \S+", cli("--version").stdout)
    shown = cli("-h", env=environment()).stdout
    names = re.findall(r"^  (\w+) +[A-Z]", shown.partition("Options:")[2], re.MULTILINE)
    all_of_them = "serve stats stores top ls show rm logout prune clear save load copy check doctor"
    assert sorted(names) == sorted(all_of_them.split())
    assert "..." not in shown.partition("Options:")[2], "no description is cut"
    for name in names:
        text = cli(name, "--help").stdout
        assert text.startswith(f"Usage: shmstore {name} "), name
        assert not re.search("UTF8_TEXT|RANGE|SIZE_ARGUMENT|ABSOLUTE_PATH", text), "the name of a Python function"
    assert not [line for line in shown.splitlines() if len(line) > 80]


def test_the_examples_of_the_help_are_valid() -> None:
    for example, _ in _EXAMPLES:
        words = example.removeprefix("sudo -u www-data ").split()
        assert words[0] == "shmstore"
        command = main.commands[words[1]]
        command.make_context(words[1], words[2:])


# -- completion ------------------------------------------------------------------------------------------------------


def test_completion_knows_commands_options_and_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(*words: str) -> list[str]:
        complete = BashComplete(main, {}, "shmstore", "_SHMSTORE_COMPLETE")
        return [each.value for each in complete.get_completions([*words[:-1]], words[-1])]

    monkeypatch.setattr("shmstore.cli.target.DEFAULT", f"{tmp_path}/shmstore-")
    (tmp_path / f"shmstore-{os.geteuid()}" / "shop").mkdir(parents=True)
    assert completed("st") == ["stats", "stores"]
    assert completed("copy", "--al") == ["--allow-pickle"]
    for command in ("ls", "doctor", "serve"):
        assert completed(command, "s") == ["shop"]
        assert completed(command, "x") == []


@pytest.mark.parametrize(
    ("shell", "prepare"),
    [
        ("bash --noprofile --norc -i", "true"),
        ("zsh -f -i", "autoload -Uz compinit && compinit -D"),
    ],
    ids=["bash", "zsh"],
)
def test_completion_in_a_shell(shell: str, prepare: str, tmp_path: Path) -> None:
    """With the line of docs/operate/command-line.md, at a terminal."""
    name = shell.partition(" ")[0]
    if not shutil.which(name):
        pytest.skip(f"there is no {name} here")
    page = Path(ROOT, "docs", "operate", "command-line.md").read_text()
    [line] = re.findall(rf"^(eval .*={name}_source .*)$", page, re.MULTILINE)
    program = tmp_path / "shmstore"
    program.write_text(f"#!{sys.executable}\nfrom shmstore.cli import main\nmain()\n")
    program.chmod(0o700)
    steps = [
        ("$ ", f"{prepare}; {line}; echo re''ady\n".encode()),
        ("ready", b"shmstore cop\t"),
        ("copy ", b"--allow-p\t"),
        ("ickle", b"\x15exit\n"),
    ]
    path = f"{tmp_path}:{os.environ['PATH']}"
    in_terminal(*shell.split(), steps=steps, PATH=path, HOME=str(tmp_path), PS1="$ ")  # each step is awaited


# -- the listing -----------------------------------------------------------------------------------------------------


def test_pages_of_a_listing() -> None:
    with Store(memory=2**20, recency=0) as store:
        for number in range(30):
            store.set(str(number), {}, owner="ada" if number % 3 else None)
        order = [short_digest(sid) for sid in store.ids()]
        listing = Listing(store)
        assert len(listing) == 30
        assert [row.digest[:8] for row in listing.rows(10, 20)] == order[10:20]
        owned = Listing(store, owner="ada")
        assert (len(owned), {row.owner for row in owned.rows()}) == (20, {"ada"})
        # A session that was removed, or changed its owner, after it was chosen is left out.
        store.destroy("29")
        store.set("28", {}, owner="bob")
        store.set("new", {}, owner="eve")
        assert [row.digest[:8] for row in owned.rows(0, 3)] == [short_digest("26")]
        assert [row.digest[:8] for row in Listing(store, expired=True).rows()] == []


def test_an_unknown_order_of_a_listing_is_an_error() -> None:
    with Store(memory=2**20) as store, pytest.raises(ConfigError, match="order must be one of -used, used, -created"):
        Listing(store, order="owner")


@pytest.mark.parametrize("order", ORDERS)
def test_a_listing_takes_no_lock(order: str) -> None:
    with Store(memory=2**20) as store:
        store.set("a", {})
        arena = store.arena
        arena.lock(1)
        try:
            assert [row.digest[:8] for row in Listing(store, order=order).rows()] == [short_digest("a")]
        finally:
            arena.unlock()


def test_human_readable_formats() -> None:
    assert [format_duration(each) for each in (0, 59.4, 60, 5400, 86400 * 3, float("inf"))] == [
        "0s", "59s", "1.0m", "1.5h", "3.0d", "never",
    ]  # fmt: skip
    assert [format_size(each) for each in (0, 1023, 1024, 5 * 2**20, 2**41)] == [
        "0 B", "1023 B", "1.0 KiB", "5.0 MiB", "2048.0 GiB",
    ]  # fmt: skip
    assert plain("a\x1b\n\ud800é") == "a\\x1b\\n\\ud800é"


def test_a_command_does_not_repair_a_store_that_has_no_server(stopped: Shop, cli: Call) -> None:
    arena = Arena.open(stopped.files.arena)
    arena.cells[at.FREE_SLOT] = 2**40
    before = arena.file.identity()
    arena.close()
    failed = cli("logout", stopped.path, "ada")
    assert failed.returncode == 1
    assert "is damaged" in failed.stderr
    assert "start its server, which repairs it" in failed.stderr
    arena = Arena.open(stopped.files.arena)
    assert arena.file.identity() == before
    arena.close()
