"""Gunicorns that are started, upgraded, killed and replaced, under clients that count acknowledged changes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import load
import psutil
import pytest
from gunicorns import OLDEST, SCRIPT, Gunicorn, StartGunicorn, children
from load import FULL, SLACK, Figure, Load, breaks, seconds, serving, some_worker_class
from processes import HURRY, alive, state, stays, wait_for
from sampling import some

from shmstore import StoreUnavailable
from shmstore.contract import AnyStore
from shmstore.manager import connect
from shmstore.server.listener import SHORT_IDLE_TIMEOUT

APP = load.APP
# Workers that look often whether their master lives; otherwise they do so after half of --timeout.
WATCHFUL = """
def post_fork(arbiter, worker):
    worker.timeout = 0.2
"""
executed = pytest.mark.processes("executed")


class OneServer:
    """
    Polls the server processes of a Gunicorn's store.

    Attributes:
        seen: Every set of servers that existed at one time.
    """

    def __init__(self, gunicorn: Gunicorn) -> None:
        self.seen: set[frozenset[int]] = set()
        self._gunicorn = gunicorn
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:  # on a busy machine one poll may take as long as the whole test
            self.seen.add(frozenset(self._gunicorn.servers()))
            if self._over.wait(0.05 if FULL else 0.2):
                return

    def check(self, server: int | None) -> None:
        wait_for(lambda: self.seen, "the first look")
        assert self.seen == {frozenset({server})}
        assert self._gunicorn.server == server


@pytest.fixture
def port() -> Iterator[int]:
    """Return a TCP port that no other test gets."""
    with socket.socket() as reserved:
        # A socket bound this way reserves the port, and still allows one process that names the port to listen.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def assert_free(port: int) -> None:
    """The threads of a process may still close its descriptors when it already counts as dead."""

    def free() -> bool:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                listener.bind(("127.0.0.1", port))
                listener.listen()
                return True
        return False

    wait_for(free, "the port")


def upgrade(g: Gunicorn, workers: int = 3) -> int:
    """Let the master start another master; return its pid when its workers serve."""
    pid = wait_for(lambda: pid_in(g.place / "pid"), "the pid file")
    assert pid == g.process.pid
    heard = g.heard()
    g.signal("USR2")
    new = wait_for(lambda: pid_in(g.place / "pid.2"), "the new master")
    wait_for(lambda: g.heard() >= heard + workers and len(children(new)) >= workers, "the new workers")
    return int(new)


def pid_in(path: Path) -> int | None:
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text else None


def restarted(g: Gunicorn) -> int:
    """Kill the server; return the pid of its replacement."""
    server = g.server or 0
    os.kill(server, signal.SIGKILL)
    return int(wait_for(lambda: serving(g, server), "the restart"))


# -- upgrades --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@some_worker_class
@some("end", {"QUIT": "QUIT", "TERM": "TERM"})
def test_upgrades_lose_no_session_and_have_one_server(
    gunicorn: StartGunicorn, arguments: tuple[str, ...], end: str, port: int, figure: Figure
) -> None:
    """USR2, then QUIT or TERM to the old master, again and again: each master is replaced by its child."""
    g = gunicorn(*arguments, "--pid", "pid", "--bind", f"127.0.0.1:{port}").booted()
    server, upgrades = g.server, 5 if FULL else 1
    with OneServer(g) as one, Load(g) as clients:
        for _ in range(upgrades):
            new = upgrade(g)
            clients.go_on()
            g.adopt(new, ended_by=end)
            wait_for(lambda: pid_in(g.place / "pid") == new, "the promotion")  # noqa: B023
            clients.go_on()
        one.check(server)
    figure(f"{end}: {upgrades} upgrades, {clients}")
    # Gunicorn documents that TERM lets running requests finish, and that QUIT does not.
    clients.check(broken=upgrades * 3 * breaks(arguments) if end == "QUIT" else 0)
    # The newest master now watches the server.
    assert g.get("/read/client0")["result"] >= clients.latest[0]
    restarted(g)
    g.signal("TERM")
    g.ended()
    g.nothing_left()
    assert_free(port)
    assert g.tracebacks() <= ({"SystemExit: 0"} if end == "QUIT" else set()), "of a request that was broken off"


@pytest.mark.timeout(600)
@some_worker_class
def test_upgrades_can_be_taken_back(
    gunicorn: StartGunicorn, arguments: tuple[str, ...], port: int, figure: Figure
) -> None:
    g = gunicorn(*arguments, "--pid", "pid", "--bind", f"127.0.0.1:{port}").booted()
    server, upgrades = g.server, 5 if FULL else 1
    with OneServer(g) as one, Load(g) as clients:
        for _ in range(upgrades):
            new = upgrade(g)
            clients.go_on()
            os.kill(new, signal.SIGTERM)
            wait_for(lambda: len(g.workers()) == 3 and not alive(new), "the end of the new master")  # noqa: B023
            clients.go_on()
        one.check(server)
    figure(f"{upgrades} upgrades taken back, {clients}")
    clients.check()
    g.signal("TERM")
    assert g.ended() == 0
    g.nothing_left()
    assert_free(port)
    assert g.complaints() == []


# -- crashes of masters ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
@some_worker_class
@pytest.mark.parametrize("server_too", [False, True], ids=["master", "master and server"])
def test_a_new_master_has_all_sessions_after_a_crash(
    gunicorn: StartGunicorn, arguments: tuple[str, ...], server_too: bool, port: int, figure: Figure
) -> None:
    """At once, while the old workers still run and hold the port: Gunicorn tries for five seconds to bind it."""
    g = gunicorn(*arguments, "--timeout", "4", "--bind", f"127.0.0.1:{port}").booted()
    server, crashes, slowest = g.server, 10 if FULL else 1, 0.0
    with OneServer(g) as one, Load(g) as clients:
        for _ in range(crashes):
            old = g.workers()
            if server_too:
                os.kill(g.server or 0, signal.SIGKILL)
            g.crash()
            begun = time.monotonic()
            g.start()
            wait_for(lambda: not any(alive(pid) for pid in old), "the end of the old workers")  # noqa: B023
            slowest = max(slowest, time.monotonic() - begun)
            g.booted()
            clients.go_on()
        if not server_too:
            one.check(server)
    figure(f"{crashes} crashes, {clients}, old workers gone after {slowest:.1f} s at most")
    # The requests of each old worker break, and those not yet accepted when the last old worker ends.
    clients.check(broken=crashes * (3 * breaks(arguments) + 8))
    assert slowest < 4 / 2 + 10 + SLACK
    restarted(g)
    g.signal("TERM")
    assert g.ended() == 0
    g.nothing_left()
    assert_free(port)
    assert "Traceback" not in g.log.read_text()


@pytest.mark.timeout(900)
def test_all_processes_exit_after_a_crash_of_the_master(
    gunicorn: StartGunicorn, port: int, store_dir: Path, figure: Figure
) -> None:
    g = gunicorn("--timeout", "4", "--bind", f"127.0.0.1:{port}", conf="" if FULL else HURRY + WATCHFUL).booted()
    crashes, slowest = 10 if FULL else 1, 0.0

    def attached() -> AnyStore | None:
        """Until its starter is connected, a hurried server exits after a moment, and is started again."""
        with suppress(StoreUnavailable):
            return connect("shop", directory=store_dir, in_place=False)
        return None

    for crash in range(crashes):
        g.get(f"/write/ada/{crash}")
        restarted(g)  # by the master, which holds the port
        with wait_for(attached, "a server that has clients") as store:
            server = store.stats().server_pid
            others = g.members() - {server}
            assert store.get("ada") == {"n": crash}
            g.crash()
            wait_for(lambda: not any(alive(pid) for pid in others), "the end of the workers")  # noqa: B023
            log = g.log.stat().st_size
            g.start().booted()
            assert "in use" not in g.log.read_text()[log:]
            assert g.server == server
            assert g.get("/read/ada")["result"] == crash
        g.crash()
        slowest = max(slowest, seconds(lambda: wait_for(lambda: not g.members(), "the end of all", timeout=300)))
        g.start().booted()
    figure(f"{crashes} crashes, workers and server gone after {slowest:.1f} s at most")
    assert slowest < 4 / 2 + 10 + SLACK
    assert "in use" not in g.log.read_text()
    assert "Traceback" not in g.log.read_text()
    assert g.get("/read/ada")["result"] == crashes - 1
    g.signal("TERM")
    assert g.ended() == 0
    assert_free(port)


# -- signals to the server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["HUP", "USR1 WINCH TTIN TTOU TSTP", "USR2"])
def test_the_server_ignores_signals_to_process_groups(gunicorn: StartGunicorn, names: str) -> None:
    g = gunicorn("--pid", "pid").booted()
    server = g.server or 0
    with OneServer(g) as one, Load(g) as clients:
        for name in names.split():
            number = getattr(signal, f"SIG{name}")
            clients.go_on()
            os.kill(server, number)
            os.killpg(os.getpgid(server), number)
            clients.go_on()
            g.group(name)
            g.group("CONT")  # after TSTP in a terminal; without a terminal, TSTP stops no process
            if name == "USR2":
                new = wait_for(lambda: pid_in(g.place / "pid.2"), "the new master")
                wait_for(lambda: g.heard() >= 6, "the new workers")
                os.kill(new, signal.SIGTERM)
                wait_for(lambda: not alive(new), "the end of the new master")  # noqa: B023
            wait_for(lambda: len(g.hearing()) >= 2, "the workers")
            clients.go_on()
        one.check(server)
    clients.check(broken=3 if names in ("HUP", "USR2") else 0)  # these end a worker to which they are sent


@pytest.mark.parametrize("name", ["INT", "QUIT", "TERM"])
def test_the_server_survives_gunicorn_while_another_process_is_connected(
    gunicorn: StartGunicorn, name: str, store_dir: Path
) -> None:
    g = gunicorn(conf=HURRY).booted()
    g.get("/write/ada/1")
    server, number = g.server or 0, getattr(signal, f"SIG{name}")
    with connect("shop", directory=store_dir, in_place=False) as store:
        os.kill(server, number)
        os.killpg(os.getpgid(server), number)
        g.group(name)
        assert g.process.wait(60) == 0
        wait_for(lambda: g.members() == {server}, "the end of all others")
        stays(store_dir / "shop", 3 * SHORT_IDLE_TIMEOUT)  # else it leaves: the master has said that it goes
        assert serving(g, None) == server
        assert store.get("ada") == {"n": 1}
    g.ended()
    g.nothing_left()


@executed
def test_a_restarted_server_inherits_nothing_from_gunicorn(gunicorn: StartGunicorn, port: int, store_dir: Path) -> None:
    g = gunicorn("-k", "gthread", "--threads", "2", "--bind", f"127.0.0.1:{port}", conf=HURRY).booted()
    g.get("/write/ada/1")
    old = g.server
    server = restarted(g)
    assert server != old
    masters = {connection.laddr for connection in psutil.Process(g.process.pid).net_connections("tcp")}
    assert masters == {("127.0.0.1", port)}, "what could be inherited"
    connections = psutil.Process(server).net_connections("all")
    assert {connection.family for connection in connections} == {socket.AF_UNIX}
    assert str(g.socket) not in {connection.laddr for connection in connections}
    of_gunicorn = {pipe for pid in (g.process.pid, *g.workers()) for pipe in pipes(pid)}
    assert of_gunicorn, "what could be inherited"
    assert not pipes(server) & of_gunicorn
    ignored = {"INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH", "TTIN", "TTOU", "TSTP", "PIPE"}
    assert signals(server, "SigIgn") == {f"SIG{name}" for name in ignored} | {"SIGXFSZ"}, "the last is Python's own"
    assert signals(server, "SigCgt") == set()
    assert signals(server, "SigBlk") == set()
    assert os.getsid(server) != os.getsid(g.process.pid)
    others = g.members() - {server}
    with connect("shop", directory=store_dir, in_place=False):  # which keeps the server
        for pid in others:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(alive(pid) for pid in others), "the end of the others")
        assert alive(server)
        assert_free(port)
    g.process.wait()
    g.ended()


def pipes(pid: int) -> set[str]:
    """Return the pipes that a process has open."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(os.readlink(fd))
    return {target for target in found if target.startswith("pipe:")}


def signals(pid: int, which: str) -> set[str]:
    """Return the signals that a process ignores, catches or blocks."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(which))
    mask = int(line.split()[1], 16)
    return {one.name for one in signal.Signals if mask >> (one - 1) & 1}


# -- ways to run it ----------------------------------------------------------------------------------------------------


def a_hundred_puts(g: Gunicorn) -> None:
    found = [g.get(f"/write/ada/{n}")["result"] for n in range(100)]
    assert found == [None, *range(99)]


@some_worker_class
def test_a_reload_loads_edited_code_and_keeps_the_server(gunicorn: StartGunicorn, arguments: tuple[str, ...]) -> None:
    g = gunicorn(*arguments, "--reload").booted()
    server, old = g.server, g.workers()
    a_hundred_puts(g)
    source = g.place / "app.py"
    source.write_text(APP + "def edited(store): return 1\n")
    status = source.stat()
    os.utime(source, (status.st_atime, status.st_mtime + 2))  # a reloader that polls compares whole seconds
    wait_for(lambda: len(g.hearing()) == 3 and g.are_gone(old), "new workers")
    assert g.get("/edited")["result"] == 1
    assert g.get("/read/ada")["result"] == 99
    assert g.server == server
    g.signal("TERM")
    assert g.ended() == 0
    g.nothing_left()
    assert g.complaints() == []


@executed
def test_a_daemon_leaves_nothing_behind(gunicorn: StartGunicorn, figure: Figure) -> None:
    g = gunicorn("--daemon", "--pid", "pid", "--log-file", "log")
    g.adopt(wait_for(lambda: pid_in(g.place / "pid"), "the daemon"))
    g.booted()
    server = g.server
    a_hundred_puts(g)
    # An upgrade as in Gunicorn's manual: WINCH ends the workers, but only those of a daemon.
    with OneServer(g) as one, Load(g) as clients:
        new = upgrade(g)
        g.signal("WINCH")
        wait_for(lambda: g.workers() == {new}, "the end of the old workers")
        clients.go_on()
        g.adopt(new, ended_by="TERM")
        clients.go_on()
        one.check(server)
    clients.check()
    figure(f"100 puts, an upgrade, {clients}")
    g.signal("WINCH")
    wait_for(lambda: not g.workers(), "the end of the workers")
    assert serving(g, None) == server, "the master's connection keeps it"
    g.signal("HUP")
    wait_for(lambda: len(g.hearing()) == 3, "new workers")
    assert g.get("/read/ada")["result"] == 99
    pid = wait_for(lambda: pid_in(g.place / "pid"), "the pid file")
    os.kill(pid, signal.SIGTERM)
    g.ended()
    g.nothing_left()
    assert not (g.place / "pid").exists()
    assert g.complaints() == []
    assert gunicorn().booted().get("/read/ada")["result"] == 99


NEW_PIDS = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@executed
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a pid namespace just so")
def test_as_pid_1_it_reaps_the_server(gunicorn: StartGunicorn) -> None:
    """As in a container: no other process adopts orphans."""
    try:
        subprocess.run([*NEW_PIDS, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"no pid namespace can be made here: {exc}")
    g = gunicorn("--preload", command=(*NEW_PIDS, *SCRIPT)).booted()
    (master,) = children(g.process.pid)
    assert re.search(r"NSpid:\s+\d+\s+1\n", Path(f"/proc/{master}/status").read_text())
    a_hundred_puts(g)
    for n in range(3):
        (server,) = g.servers()
        assert server in children(master)
        os.kill(server, signal.SIGKILL)
        assert g.get(f"/write/ada/{n}")["result"] == (n - 1) % 100
        wait_for(lambda: g.servers() - {server}, "the restart")  # noqa: B023
        wait_for(lambda: not any(state(pid) == "Z" for pid in children(master)), "the reaping")
        wait_for(lambda: g.ask("/prune").status == 200, "the server")
    worker = g.get("/read/ada")["pid"]
    assert worker < 1000, "as it sees itself"
    os.kill(master, signal.SIGTERM)
    assert g.ended() == 0
    assert not g.members(), "its end is that of all in the namespace"
    assert "Traceback" not in g.log.read_text()
    # That killed the server and left its socket. The next Gunicorn is in another namespace.
    g.start().booted()
    assert g.get("/write/ada/1")["pid"] < 1000
    (master,) = children(g.process.pid)
    os.kill(master, signal.SIGTERM)
    assert g.ended() == 0


@executed
def test_run_as_a_module(gunicorn: StartGunicorn) -> None:
    """
    Except for USR2. The new master is run as a file of Gunicorn's package, where Python finds Gunicorn's own `app` and
    `http` before other packages of these names: the new master exits, and the old one continues.
    """
    g = gunicorn("--pid", "pid", command=(sys.executable, "-m", "gunicorn")).booted()
    server = g.server
    with OneServer(g) as one, Load(g) as clients:
        a_hundred_puts(g)
        for _ in range(2 if FULL else 1):
            old, begun = g.workers(), g.log.stat().st_size
            g.signal("USR2")
            wait_for(lambda: "Starting gunicorn" in g.log.read_text()[begun:], "the new master")  # noqa: B023
            wait_for(lambda: g.workers() == old, "its end")  # noqa: B023
            clients.go_on()
        old = g.workers()
        g.signal("HUP")
        wait_for(lambda: len(g.hearing()) == 3 and g.are_gone(old), "new workers")
        clients.go_on()
        one.check(server)
    clients.check()
    assert g.get("/read/ada")["result"] == 99
    g.signal("TERM")
    assert g.ended() == 0
    g.nothing_left()


@pytest.mark.skipif(not OLDEST.exists(), reason="`make test` installs the oldest Gunicorn that we support")
@some_worker_class
def test_the_oldest_gunicorn(gunicorn: StartGunicorn, arguments: tuple[str, ...], figure: Figure) -> None:
    command = (sys.executable, str(OLDEST / "bin" / "gunicorn"))
    g = gunicorn(*arguments, "--pid", "pid", command=command, path=str(OLDEST)).booted()
    with Load(g, prune_every=10) as clients:
        clients.go_on()
        server, old = g.server, g.workers()
        g.signal("HUP")
        wait_for(lambda: len(g.hearing()) == 3 and g.are_gone(old), "new workers")
        clients.go_on()
        killed = g.workers().pop()
        os.kill(killed, signal.SIGKILL)
        wait_for(lambda: len(g.hearing()) == 3 and g.are_gone({killed}), "another worker")
        clients.go_on()
        assert g.server == server
        restart = seconds(lambda: restarted(g))
        server = g.server
        clients.go_on()
        g.adopt(upgrade(g), ended_by="QUIT")
        clients.go_on()
        assert g.server == server
    figure(str(clients))
    clients.check(broken=(1 + 3) * breaks(arguments), restart=restart)
    g.signal("TERM")
    g.ended()
    g.nothing_left()
    versions = re.findall(r"Starting gunicorn (\d+)", g.log.read_text())
    assert versions == ["23", "23"]
    assert g.tracebacks() <= {"SystemExit: 0"}, "of requests that QUIT breaks off"


@pytest.mark.parametrize("name", ["TERM", "KILL"])
def test_two_gunicorns_share_a_store_by_its_name(gunicorn: StartGunicorn, store_dir: Path, name: str) -> None:
    first, second = gunicorn().booted(), gunicorn("-k", "gthread", "--threads", "2").booted()
    server = first.server
    first.get("/write/ada/1")
    assert second.get("/write/ada/2")["result"] == 1
    assert first.get("/read/ada")["result"] == 2
    assert first.servers() | second.servers() == {server}
    with Load(second) as clients:
        clients.go_on()
        first.group(name)
        first.process.wait(60)
        wait_for(lambda: first.members() <= {server}, "the end of the first")
        clients.go_on()
        stays(store_dir / "shop", 3 * SHORT_IDLE_TIMEOUT)
        assert serving(second, None) == server
        assert restarted(second) != server, "it is the second one's to look after"
        clients.go_on()
    clients.check()
    assert second.get("/read/ada")["result"] == 2
    second.signal("TERM")
    assert second.ended() == 0
    second.nothing_left()
    assert second.complaints() == []
