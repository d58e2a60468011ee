"""Processes that change their user between start and service: which store they use, and the user of its server.

Run as an ordinary user, the tests check the same with one user, where that is possible.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import pickle
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gunicorns import Gunicorn, StartGunicorn
from other_users import IS_ROOT, NOBODY, as_nobody, in_child, root_only
from processes import ROOT, Run, Start, wait_for

from shmstore import StoreManager, StoreUnavailable, connect
from shmstore.cli import main
from shmstore.client import connection
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.peer import trusted
from shmstore.options import Options
from shmstore.system.processes import CAPABILITY_VERSION
from shmstore.system.throttle import Throttle

SERVES = NOBODY if IS_ROOT else os.geteuid()
pytestmark = pytest.mark.processes("executed")

APP = """
import os
from flask import Flask, request, session
from shmstore.flask import Sessions

app = Flask(__name__)
app.config.update(SESSION_STORE="shm://" + os.environ["SHMSTORE_TEST_STORE"])
sessions = Sessions(app)

@app.get("/login")
def login():
    session["_user_id"] = request.args.get("user", "ada")
    return {}

@app.get("/")
def who():
    with session.lock():
        user = session.get("_user_id")
    sessions.store.prune()  # a call, before which a store that was opened before the reload reads the new options
    store = sessions.store
    return {"uid": os.geteuid(), "user": user, "path": store.arena.file.path, "max": store.options.max}

# Imports what is imported late: the user may be unable to read the modules of this Python.
app.test_client().get("/login?user=import" if os.environ.get("SHMSTORE_TEST_WARM") else "/nothing")
"""

HOOKS = """
import os
workers = 1
graceful_timeout = 60  # the default of the tests is short: a worker that is killed at its end is a complaint
hooks = shmstore.gunicorn.Hooks(os.environ["SHMSTORE_TEST_STORE"], memory=2**20, {options})
on_starting = hooks.on_starting
on_reload = hooks.on_reload
on_exit = hooks.on_exit
"""


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a store that does not exist; it is removed from the default directories afterwards."""
    name = f"test-{secrets.token_hex(8)}"
    monkeypatch.setenv("SHMSTORE_TEST_STORE", name)
    places = [StoreFiles.of(name, uid=uid) for uid in {os.geteuid(), SERVES}]
    yield name
    for files in places:

        def removed(files: StoreFiles = files) -> bool:
            connection.kill(files)
            with contextlib.suppress(OSError):
                shutil.rmtree(files.path)
            return not os.path.lexists(files.path)

        wait_for(removed, "removing the store")  # the directory above it stays: another test may be about to use it


def command(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments)
    return f"{done.exit_code} {done.stdout}{done.stderr}"


def as_server(*arguments: str) -> str:
    """Return the output of a command that runs as the user of the workers."""
    return as_nobody(lambda: command(*arguments)) if IS_ROOT else repr(command(*arguments))


def log_in(g: Gunicorn) -> str:
    answer = g.ask("/login")
    assert answer.status == 200, g.log.read_text()
    return answer.cookies[0].partition("=")[2].partition(";")[0]


@pytest.mark.parametrize("how", ["preload", "preload and use"])
def test_gunicorn_its_workers_and_the_command_line_use_one_store(
    gunicorn: StartGunicorn, name: str, tmp_path: Path, store_dir: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """In the default directory: a directory that is given as an option is the same for all users."""
    if how == "preload and use":
        monkeypatch.setenv("SHMSTORE_TEST_WARM", "1")  # as root, before the workers are forked
    store_dir.chmod(0o755)
    for path in (tmp_path, *tmp_path.parents[:2]):
        with contextlib.suppress(PermissionError):
            path.chmod(0o755)
    user = ["--user", "nobody", "--group", "nogroup"] if IS_ROOT else []
    g = gunicorn("--preload", *user, conf=HOOKS.format(options="max=500")).booted(1)
    arena = f"/dev/shm/shmstore-{SERVES}/{name}/arena"
    cookie = log_in(g)
    answer = g.ask("/", cookie).json
    assert (answer["uid"], answer["user"], answer["path"], answer["max"]) == (SERVES, "ada", arena, 500)
    assert Path(arena).stat().st_uid == SERVES
    assert as_server("logout", name, "ada") == repr("0 1 session ended\n")
    assert g.ask("/", cookie).json["user"] is None
    if IS_ROOT and how != "preload and use":
        told = command("logout", name, "ada")
        assert told.startswith("1 ")
        assert re.search(rf"no store '{name}' in /dev/shm/shmstore-0.*nobody has one.*sudo -u nobody shmstore", told)
    cookie = log_in(g)
    old = g.workers()
    g.configure(conf=HOOKS.format(options="max=400"))
    g.signal("HUP")
    wait_for(lambda: len(g.workers()) == 1 and g.are_gone(old), "a new worker")
    answer = g.ask("/", cookie).json
    assert (answer["user"], answer["path"], answer["max"]) == ("ada", arena, 400)
    g.signal("TERM")
    assert g.process.wait(60) == 0
    assert g.complaints() == []


@root_only
def test_the_hint_for_root_is_a_command_also_if_the_user_has_no_name(name: str) -> None:
    named = {user.pw_uid for user in pwd.getpwall()}
    uid = next(uid for uid in range(54321, 65000) if uid not in named)
    theirs = Path(f"/dev/shm/shmstore-{uid}/{name}")
    theirs.mkdir(parents=True)
    try:
        hint = re.search(r"has one of that name: run this as that user \((sudo .*?)\)", command("stats", name))
        assert hint is not None
        shown = subprocess.run(["sh", "-c", f"sudo() {{ echo $#: $*; }}; {hint[1]}"], capture_output=True, text=True)
        assert shown.stdout == f"5: -u #{uid} shmstore ... {name}\n"
    finally:
        shutil.rmtree(theirs)
        with contextlib.suppress(OSError):
            theirs.parent.rmdir()


LATER = """
import os, sys
import app
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
client = app.app.test_client()
client.get("/login")
print(client.get("/").json["path"])
"""


@root_only
def test_an_application_that_becomes_another_user_after_its_import(run: Run, name: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    manager = StoreManager(name, memory=2**20)
    manager.start(user=(NOBODY, NOBODY))
    with manager:
        process = run(LATER, env=os.environ | {"PYTHONPATH": os.pathsep.join((ROOT, str(tmp_path)))})
        assert process.communicate(timeout=300)[0] == f"/dev/shm/shmstore-{NOBODY}/{name}/arena\n"


@root_only
def test_a_store_that_was_opened_as_another_user_says_what_to_do(manage: Start, store_dir: Path) -> None:
    with manage() as manager, manager.store() as store:
        tries = []
        dial = connection.dial

        def dial_and_count(files: StoreFiles, timeout: float) -> socket.socket:
            tries.append(timeout)
            return dial(files, timeout)

        def use() -> tuple[int, list[str]]:
            connection.dial = dial_and_count
            lines: list[str] = []
            handler = logging.Handler()
            handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
            logging.getLogger("shmstore").addHandler(handler)
            for number in range(16):
                store.set(str(number), {"n": number})
            try:
                store.prune()
            except StoreUnavailable as exc:
                lines.append(str(exc))
            return len(tries), lines

        told = as_nobody(use)
        assert told.startswith("(1, ["), told  # one attempt: a lack of permission does not change
        assert f"was opened as uid 0, and this process is uid {NOBODY} now" in told
        assert "Permission denied" in told
        assert "open it after the change of user" in told
        assert len(store) == 16


@pytest.mark.skipif(IS_ROOT, reason="root may enter any directory")
def test_a_store_whose_directory_becomes_inaccessible_is_unavailable_at_once(manage: Start, store_dir: Path) -> None:
    with manage() as manager, connect("shop", directory=store_dir, in_place=False) as store:
        whole: Any = store
        whole._attachment.pool.close_idle()
        (store_dir / "shop").chmod(0)
        try:
            with pytest.raises(StoreUnavailable, match="Permission denied"):
                store.prune()
        finally:
            (store_dir / "shop").chmod(0o700)
        assert store.prune() == 0
        assert manager.store()


@root_only
def test_a_proxy_pickled_for_another_user_connects_to_that_users_store(name: str) -> None:
    with StoreManager(name, memory=2**20) as manager, manager.store() as store:
        sent = pickle.dumps(store)
        with pickle.loads(sent) as received:
            assert received.arena.file.path == store.arena.file.path
        assert f"/dev/shm/shmstore-{NOBODY}" in as_nobody(lambda: pickle.loads(sent))


# -- the user of a started server ---------------------------------------------------------------------------------

STARTER = """
import multiprocess, os, sys
from shmstore import StoreManager
multiprocess.set_executable(sys.argv[3])
exec(sys.argv[2])
manager = StoreManager("shop", directory=sys.argv[1], memory=2**20, dispose=lambda *_: None)
with manager.store() as store:
    store.set("a", {})
    print(store.stats().server_pid, flush=True)
    sys.stdin.read()
manager.shutdown()
"""


def status(pid: str) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {field: value.split() for field, _, value in (line.partition(":") for line in lines)}


LOWERED = [
    "os.seteuid({0})", "os.setegid({0}); os.seteuid({0})", "os.setresuid(0, {0}, {0})", "os.setresuid({0}, 0, {0})",
]  # fmt: skip


@functools.cache
def python_of_all() -> str:
    """Return a Python of this version that every user can run: that of the tests may be in root's home directory."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        if os.path.exists(python) and as_nobody(lambda: subprocess.run([python, "-c", ""]).returncode) == "0":  # noqa: B023
            return python
    pytest.skip("no Python of this version that every user can run")


@root_only
@pytest.mark.parametrize("become", LOWERED)
def test_a_server_inherits_nothing_from_the_root_process_that_started_it(
    store_dir: Path, run: Run, become: str
) -> None:
    ends_as = 0 if become.endswith("0, {0})") else NOBODY
    os.chown(store_dir, ends_as, ends_as)
    starter = run(STARTER, store_dir, become.format(NOBODY), python_of_all(), stderr=subprocess.PIPE)
    assert starter.stdout is not None
    pid = starter.stdout.readline().strip()
    assert pid, starter.communicate()[1]
    found = status(pid)
    assert found["Uid"] == [str(ends_as)] * 4
    if ends_as:
        assert found["Gid"] == [str(NOBODY)] * 4
        assert found["Groups"] == []
        for kind in ("CapPrm", "CapEff", "CapAmb"):
            assert int(found[kind][0], 16) == 0, kind
    starter.communicate()


@root_only
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not here")
def test_a_server_has_no_capability_of_its_starter(store_dir: Path, run: Run) -> None:
    os.chown(store_dir, NOBODY, NOBODY)
    cap = "+dac_read_search"  # also lets it read this Python, wherever that is
    starter = subprocess.Popen(
        ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", f"--inh-caps={cap}",
         f"--ambient-caps={cap}", sys.executable, "-c", STARTER, store_dir, "", sys.executable],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ROOT},
    )  # fmt: skip
    with starter:
        assert starter.stdout is not None
        pid = starter.stdout.readline().strip()
        assert int(status(str(starter.pid))["CapEff"][0], 16)
        assert {status(pid)[kind][0].strip("0") for kind in ("CapPrm", "CapEff", "CapAmb")} == {""}
        starter.communicate()


@root_only
def test_a_process_that_can_regain_root_runs_no_code_of_the_user(manage: Start, store_dir: Path) -> None:
    def lowered() -> list[bool]:
        os.setresuid(0, NOBODY, 0)
        first = trusted(NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return [first, trusted(NOBODY), trusted(0)]

    assert in_child(lowered) == repr([False, True, True])

    def with_capabilities() -> list[bool]:
        libc = ctypes.CDLL(None)
        assert not libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setresuid(NOBODY, NOBODY, NOBODY)
        found = [trusted(NOBODY)]
        for kept in (1 << 10, 0):  # CAP_NET_BIND_SERVICE, which many services have
            assert not libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)(0, kept))
            found.append(trusted(NOBODY))
        return found

    assert in_child(with_capabilities) == repr([False, True, True])


@root_only
def test_a_process_with_a_capability_has_the_options_of_the_store_or_an_error(name: str) -> None:
    def with_capability(use: Callable[[], object]) -> str:
        def lowered() -> object:
            libc = ctypes.CDLL(None)
            assert not libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            nice = 1 << 23  # CAP_SYS_NICE
            assert not libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)(0, nice))
            assert not trusted(NOBODY)
            return use()

        return in_child(lowered)

    def opened() -> object:
        with connect(name) as store:
            return store.options.ttl, store.get("a")

    def life(options: Options, session: Mapping[Any, Any], sid: str) -> float:
        return 123

    def opened_with_its_function() -> object:
        with StoreManager(name, ttl=life).store() as store:
            return store.options.ttl is life, store.get("a")

    manager = StoreManager(name, memory=2**20, ttl=123)
    manager.start(user=(NOBODY, NOBODY))
    as_nobody(lambda: connect(name).set("a", {"n": 1}))
    assert with_capability(opened) == repr((123, {"n": 1}))
    manager.shutdown()
    manager = StoreManager(name, memory=2**20, ttl=life)
    manager.start(user=(NOBODY, NOBODY))
    as_nobody(lambda: connect(name).set("a", {"n": 1}))
    told = with_capability(opened)
    assert told.startswith("ConfigError"), told
    assert "(ttl)" in told
    assert "give it these options too, or run it without capabilities" in told
    assert with_capability(opened_with_its_function) == repr((True, {"n": 1}))
    manager.shutdown()


@root_only
def test_root_is_told_that_another_user_has_a_store_of_that_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A cron job of root uses a store of its own. That is allowed, but must be reported."""
    theirs = StoreManager(name, memory=2**20)
    theirs.start(user=(NOBODY, NOBODY))
    as_nobody(lambda: connect(name).set("a", {}))
    with pytest.raises(StoreUnavailable, match=r"; nobody has one of that name: run this .*\(sudo -u nobody \.\.\.\)"):
        connect(name)
    assert not caplog.records
    said = f"store '{name}' in /dev/shm/shmstore-0 is not the one that nobody has: to use that one, run this as"
    with StoreManager(name, memory=2**20) as manager:
        assert caplog.text.count(said) == 1
        assert len(manager.store()) == 0
        connect(name).close()
        assert caplog.text.count(said) == 1  # once a minute
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(connection, "_other_users_log", Throttle())
            connect(name).close()
        assert caplog.text.count(said) == 2
        listed = json.loads(CliRunner().invoke(main, ["stores", "--json"]).stdout)["stores"]
        mine = {each["user"]: each for each in listed if each["name"] == name}
        assert mine.keys() == {pwd.getpwuid(0).pw_name, "nobody"}
        assert [mine[each]["sessions"] for each in ("nobody", pwd.getpwuid(0).pw_name)] == [1, 0]
        assert mine["nobody"]["path"] == f"/dev/shm/shmstore-65534/{name}"
        assert mine["nobody"]["server_pid"] == StoreFiles.of(name, uid=NOBODY, gid=NOBODY).server()
        as_they = as_nobody(lambda: command("stores", "--json"))
        assert name in as_they
        assert "/dev/shm/shmstore-0" in as_they.partition("hidden")[2]
    theirs.shutdown()


@root_only
def test_another_user_is_told_that_there_are_stores_it_cannot_see(name: str) -> None:
    with StoreManager(name, memory=2**20):
        for told in (as_nobody(lambda: command("ls", name)), as_nobody(lambda: connect(name))):
            assert re.search("other users have stores in .*/dev/shm/shmstore-0", told), told
