"""`StoreManager`, its server process and its proxies: start, restart, connection and end."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import kinds
import pytest
from engines import VARIABLE
from multiprocess import ProcessError, get_context
from multiprocess.managers import BaseManager, BaseProxy
from processes import HURRY, LINGERS, ROOT, Run, Start, alive, servers, state, stays, stop, wait_for

from shmstore import manager as manager_module
from shmstore.attach import attach_or_start
from shmstore.client import attachment, connection, spawn, watch
from shmstore.client.pool import Pool
from shmstore.engine.header import HEARTBEAT
from shmstore.engine.verify import verify
from shmstore.errors import ConfigError, StoreFull, StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.channel import Channel
from shmstore.ipc.directory import StoreFiles
from shmstore.manager import StoreManager, StoreProxy, connect
from shmstore.server.listener import SHORT_IDLE_TIMEOUT
from shmstore.system.processes import command_name
from shmstore.testing import StoreContract


def server_of(store_dir: Path, name: str = "shop") -> int | None:
    return StoreFiles.of(name, store_dir).server()


# -- the contract, in place and through the server ----------------------------------------------------------------


@pytest.mark.processes("forked")
class _OverAManager(StoreContract):
    kind = kinds.IN_PLACE

    @pytest.fixture(autouse=True)
    def _managers(self, manage: Start) -> None:
        self.manage = manage

    def make_store(self, **options: Any) -> Any:
        return kinds.make_store(self.kind, self.manage, **options)


class TestInPlace(_OverAManager):
    """On the engine that is there: `store/test_store.py` runs the contract on each."""


class TestThroughTheServer(_OverAManager):
    kind = kinds.THROUGH_THE_SERVER


# -- starting and attaching ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hurried_servers")
def test_a_manual_prune_is_one_line(store_dir: Path) -> None:
    assert StoreManager("shop", directory=store_dir, memory=2**20).store().prune() == 0
    wait_for(lambda: server_of(store_dir) is None, "the exit of the server that has no user")


def test_it_is_a_manager_and_its_stores_are_proxies(manage: Start) -> None:
    with manage() as manager:
        assert isinstance(manager, BaseManager)
        with manager.store() as store:
            assert isinstance(store, StoreProxy)
        with connect(f"shm://{Path(manager.address).parent}", in_place=False) as plain:
            assert isinstance(plain, BaseProxy)


def test_start_is_as_idempotent_as_a_base_managers(manage: Start) -> None:
    manager = manage()
    assert manager.start() is None  # type: ignore[func-returns-value]
    with pytest.raises(ProcessError, match="Already started"):
        manager.start()
    manager.shutdown()
    manager.shutdown()
    with pytest.raises(ProcessError, match="shut down"):
        manager.start()
    with pytest.raises(ProcessError, match="shut down"):
        manager.store()


def test_a_starter_that_was_stopped_for_long_starts_another_server(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first server has exited, since no process has connected to it."""
    unused = "; from shmstore.server import listener; listener.FIRST_CLIENT_TIMEOUT = 0.1; server.main()"
    start = spawn.start
    starts: list[int | None] = []

    def start_and_stop(files: StoreFiles, options: bytes | None) -> None:
        with monkeypatch.context() as patch:
            if not starts:
                patch.setattr(spawn, "BOOT", spawn.BOOT.replace("; server.main()", unused))
            start(files, options)
        starts.append(files.server())
        if len(starts) == 1:
            wait_for(lambda: files.server() is None, "the exit of the unused server")

    monkeypatch.setattr(spawn, "start", start_and_stop)
    with StoreManager("shop", directory=store_dir, memory=2**20) as manager:
        manager.store().set("a", {"n": 1})
        assert server_of(store_dir) == starts[1]


def test_connect_attaches_and_never_starts(manage: Start, store_dir: Path) -> None:
    with pytest.raises(StoreUnavailable):
        manage().connect()
    assert server_of(store_dir) is None
    manage().start()
    another = manage()
    another.connect()
    assert another.store().ping()


def test_another_process_sees_the_same_sessions(manage: Start, store_dir: Path, run: Run) -> None:
    with manage() as manager:
        store = manager.store()
        store.set("mine", {"n": 1})
        other = run(
            "import sys; from shmstore.manager import connect\n"
            "with connect(sys.argv[1]) as store:\n"
            "    store.set('theirs', {'n': store.get('mine')['n'] + 1}); print(store.stats().server_pid)",
            f"shm://{store_dir}/shop",
        )
        assert int(other.communicate(timeout=300)[0]) == server_of(store_dir)
        assert store.get("theirs") == {"n": 2}


def test_two_managers_have_one_server_and_only_its_starter_ends_it(manage: Start, store_dir: Path) -> None:
    first, second = manage(), manage()
    first.start()
    second.start()
    pid = server_of(store_dir)
    second.store().set("a", {"x": 1})
    second.shutdown()
    assert server_of(store_dir) == pid
    assert first.store().get("a") == {"x": 1}
    first.shutdown()
    assert server_of(store_dir) is None


def test_starting_at_once_from_many_processes_starts_one_server(store_dir: Path, run: Run) -> None:
    code = (
        "import sys; from shmstore.manager import StoreManager\n"
        "m = StoreManager('shop', directory=sys.argv[1], memory=2**20); m.start()\n"
        "print(m.store().stats().server_pid, flush=True); sys.stdin.read()"
    )
    processes = [run(code, store_dir) for _ in range(6)]
    pids = {process.stdout.readline() for process in processes if process.stdout}
    assert pids == {f"{server_of(store_dir)}\n"}


def test_stores_of_different_names_are_separate(manage: Start) -> None:
    with manage("a") as a, manage("b") as b:
        a.store().set("x", {"in": "a"})
        assert b.store().get("x") is None


def test_an_unguarded_script_does_not_start_itself_again(store_dir: Path, run: Run) -> None:
    script = run(
        "import sys; print('begun', flush=True)\n"
        "from shmstore.manager import StoreManager\n"
        "with StoreManager('shop', directory=sys.argv[1], memory=2**20, ttl=lambda o, s, i: 60) as m:\n"
        "    m.store().set('a', {}); print(len(m.store()))",
        store_dir,
    )
    assert script.communicate(timeout=300)[0] == "begun\n1\n"


@pytest.mark.processes("executed")
def test_the_server_inherits_nothing_and_is_detached(manage: Start, store_dir: Path) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)  # as Gunicorn's listeners are
    manage().start()
    os.close(writer)
    assert os.read(reader, 1) == b"", "the server has the other end"
    os.close(reader)
    pid = server_of(store_dir)
    assert pid
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    assert os.getsid(pid) != os.getsid(0)


LOWERED = """
import os, resource, sys
from shmstore import StoreManager
os.dup2(1, 500, inheritable=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
with StoreManager("shop", memory=2**20, directory=sys.argv[1]) as manager:
    print(manager.store().ping())
"""


def test_a_process_that_has_lowered_its_limit_below_a_descriptor_starts_a_server(store_dir: Path, run: Run) -> None:
    assert run(LOWERED, store_dir).communicate(timeout=300)[0] == "True\n"


def test_a_server_that_gets_no_order_exits_although_a_worker_has_a_copy_of_the_connection(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, kept = StoreFiles.of("orderless", store_dir), list[socket.socket]()

    def waiting() -> list[int]:
        return [pid for pid, words in servers().items() if "orderless" in words and command_name(pid) == "shmstore"]

    def fail(ours: socket.socket, *_: object) -> None:
        kept.append(ours.dup())
        wait_for(waiting, "the server")
        raise OSError("it is stopped")

    monkeypatch.setattr(spawn, "_exchange", fail)
    with pytest.raises(StoreUnavailable, match="it is stopped"):
        spawn.start(files, b"")
    wait_for(lambda: not waiting(), "its exit")
    kept[0].close()


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", "", ".hidden", "x" * 65, "a b"])
def test_a_name_with_path_characters_is_refused(name: str, store_dir: Path) -> None:
    with pytest.raises(ConfigError, match="is not a valid store name"):
        StoreManager(name, directory=store_dir)
    with pytest.raises(ConfigError, match="is not a valid store name"):
        connect(name, directory=store_dir)
    assert list(store_dir.iterdir()) == []


def test_wrong_options_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="unknown option 'maximum'"):
        StoreManager("shop", maximum=3)
    with pytest.raises(ConfigError, match="memory"):
        StoreManager("shop", memory=10)
    with pytest.raises(ConfigError, match="private stores"):
        StoreManager("shop", clock=time.monotonic_ns)


def test_unavailable_memory_is_the_same_error_through_a_manager(manage: Start) -> None:
    with pytest.raises(StoreFull, match="cannot reserve"):
        manage(memory=2**37).start()


def test_an_option_that_cannot_be_pickled_is_named(manage: Start) -> None:
    lock = threading.Lock()
    with (
        socket_like() as sock,
        pytest.raises(ConfigError, match="ttl="),
    ):
        manage(ttl=lambda o, s, i: 5 if lock and sock else 6).start()


class socket_like:
    """An object that refuses to be pickled."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __reduce__(self) -> Any:
        raise TypeError("not this one")


def test_connect_without_a_store_fails_at_once_with_advice(store_dir: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store 'shop'"):
        connect("shop", directory=store_dir)
    with pytest.raises(ConfigError, match="a store of this host is needed"):
        StoreManager("redis://localhost")


def test_connect_after_the_end_fails_at_once_with_advice(manage: Start, store_dir: Path) -> None:
    with manage():
        pass
    with pytest.raises(StoreUnavailable, match="start one with"):
        connect("shop", directory=store_dir)


def test_a_file_that_is_not_an_arena_is_replaced_by_an_empty_store(manage: Start, store_dir: Path) -> None:
    with manage() as manager:
        manager.store().set("a", {})
    (store_dir / "shop" / "arena").write_bytes(b"something else")
    with manage() as manager:
        assert len(manager.store()) == 0


# -- functions travel ---------------------------------------------------------------------------------------------

LIFE = 50


def test_functions_are_sent_by_value_and_kept_for_a_restarted_server(manage: Start, store_dir: Path) -> None:
    extra = 7
    with manage(ttl=lambda options, session, sid: LIFE + extra):
        for _ in range(2):
            with connect("shop", directory=store_dir, in_place=False) as store:
                store.set("a", {})
                loaded = store.load("a")
                assert loaded is not None
                assert 50 < loaded.remaining <= 57
                os.kill(server_of(store_dir) or 0, signal.SIGKILL)


# -- options of a running store -----------------------------------------------------------------------------------


def test_given_options_override_those_of_a_running_server_and_defaults_do_not(manage: Start, store_dir: Path) -> None:
    with manage(max=3, recency=0) as first:
        manage().start()
        store = first.store()
        for i in range(5):
            store.set(str(i), {})
        assert len(store) == 3
        manage(max=2).start()
        store.set("5", {})
        assert len(store) == 2


def test_applied_options_replace_all_and_survive_a_restart(manage: Start, store_dir: Path) -> None:
    with manage(max=3) as manager, manager.store() as store:
        assert manager.apply(memory=2**20, directory=store_dir, max=1) == []
        pid = server_of(store_dir)
        os.kill(pid or 0, signal.SIGKILL)
        wait_for(lambda: server_of(store_dir) not in (None, pid), "the restart")
        store.ping()
        store.set("a", {})
        store.set("b", {})
        assert len(store) == 1
        manager.apply(memory=2**20, directory=store_dir)
        store.set("a", {})
        assert len(store) == 2


def test_a_wrong_option_changes_nothing(manage: Start) -> None:
    with manage(max=1) as manager, manager.store() as store:
        with pytest.raises(ConfigError):
            manager.apply(max=0)
        store.set("a", {})
        store.set("b", {})
        assert len(store) == 1


def test_a_changed_memory_waits_for_a_restart_and_keeps_the_sessions(manage: Start, store_dir: Path) -> None:
    with manage() as manager:
        manager.store().set("a", {"x": 1})
        assert manager.apply(memory=2**22, directory=store_dir) == ["memory"]
        assert manager.store().stats().memory <= 2**20
        holder = connect("shop", directory=store_dir)
    with manage(memory=2**22) as manager, manager.store() as store:  # another process still uses the old memory
        assert store.get("a") == {"x": 1}
        assert store.stats().memory <= 2**20
        holder.close()
        for i in range(100):  # nor is a session accepted that the smaller memory cannot hold
            with pytest.raises(Exception, match="max_session"):
                store.set(str(i), {"x": "y" * 900_000})


# -- life and death -----------------------------------------------------------------------------------------------


def test_the_server_ignores_signals_to_its_process_group(manage: Start, store_dir: Path) -> None:
    with manage() as manager, manager.store() as store:
        pid = server_of(store_dir) or 0
        for name in ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH", "TTIN", "TTOU", "TSTP", "PIPE"):
            os.killpg(os.getpgid(pid), getattr(signal, f"SIG{name}"))
        assert store.prune() == 0
        assert server_of(store_dir) == pid


def test_a_killed_server_is_restarted_at_once_and_nothing_is_lost(manage: Start, store_dir: Path) -> None:
    with manage(max=1000) as manager, manager.store() as store:
        for round_ in range(3):
            pid = server_of(store_dir) or 0
            store.set("a", {"round": round_})
            os.kill(pid, signal.SIGKILL)
            assert store.get("a") == {"round": round_}
            assert store.prune() == 0, "a call waits for the next server"
            assert store.stats().server_pid == server_of(store_dir) != pid


def test_a_server_whose_starter_dies_early_exits_silently() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        command = [sys.executable, "-P", "-m", "shmstore.server.main", "shop"]
        server = subprocess.run(
            command,
            stdin=theirs.fileno(),
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"PYTHONPATH": ROOT},
        )
    assert server.stdout + server.stderr == ""


# A process of its own: it reaps all children.
REAPER = """
import os, signal, sys, time
from contextlib import suppress
from shmstore import StoreManager

manager = StoreManager("shop", directory=sys.argv[1], memory=2**20)
with manager, manager.store() as store:
    for _ in range(2):
        pid = store.stats().server_pid
        os.kill(pid, signal.SIGKILL)
        while store.stats().server_pid == pid:
            with suppress(ChildProcessError):  # but for the process that starts the next server
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.001)
        assert store.prune() == 0
print("done")
"""


def test_a_waitpid_for_all_children_by_other_code_does_no_harm(store_dir: Path, run: Run) -> None:
    """For example, Gunicorn's master reaps all its children."""
    process = run(REAPER, store_dir, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=300)
    assert output == "done\n", errors


def test_a_hanging_server_is_replaced_without_delaying_requests(
    manage: Start, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.client.watch._CHECK_INTERVAL", 0.1)  # seconds; a silent server is asked, as ever
    with manage() as manager, manager.store() as store:
        pid = server_of(store_dir) or 0
        os.kill(pid, signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr("shmstore.client.connection.ANSWER_TIMEOUT", 0.3)  # seconds
            store.set("a", {"x": 1})
            assert store.get("a") == {"x": 1}
            begun = time.monotonic()
            with suppress(StoreUnavailable):  # unless it was replaced before it was asked
                store.prune()
            assert time.monotonic() - begun < 30
            wait_for(lambda: not alive(pid), "the end of the server that hangs")
        wait_for(lambda: server_of(store_dir), "its replacement")
        assert store.prune() == 0


@pytest.mark.parametrize(
    ("instead", "says", "at_once"),
    [("directory", "was removed or replaced; restart", False), ("file", "is not a directory", True)],
)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.usefixtures("hurried_servers")
def test_calls_that_cannot_reach_a_running_server_fail(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool, instead: str, says: str, at_once: bool
) -> None:
    """Its heartbeat is in mapped memory and still advances, but no process listens at its socket's path."""
    monkeypatch.setattr("shmstore.client.attachment.SILENCE", 0.3)
    files, shop = StoreFiles.of("shop", store_dir), store_dir / "shop"
    channel, _ = connection.connect_or_start(files, options_file.pack({"memory": 2**20}))
    tries = []
    dial = connection.dial

    def dial_and_count(files: StoreFiles, timeout: float) -> socket.socket:
        tries.append(timeout)
        return dial(files, timeout)

    monkeypatch.setattr(connection, "dial", dial_and_count)
    with connect("shop", directory=store_dir, in_place=in_place) as store:
        assert store.prune() == 0
        whole: Any = store
        whole._attachment.pool.close_idle()
        shop.rename(store_dir / "away")
        if instead == "file":
            shop.touch()
        else:
            shop.mkdir(0o777)
            shop.chmod(0o777)  # so that the server cannot create its files there: the directory is not safe
        tries.clear()
        with pytest.raises(StoreUnavailable, match=says):
            store.prune()
        assert (len(tries) == 1) == at_once
        assert all(each <= 0.3 for each in tries)
    channel.close()
    wait_for(lambda: StoreFiles.of("away", store_dir).server() is None, "the server's leaving")


def test_the_watch_begins_after_the_connection_is_adopted(manage: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it may find no store and create another one, which stays."""
    adopt, watched, manager = Pool.adopt, [], manage()

    def adopt_and_look(pool: Pool, channel: Channel) -> None:
        watched.append(hasattr(manager, "_watching"))
        adopt(pool, channel)

    monkeypatch.setattr(Pool, "adopt", adopt_and_look)
    with manager:
        assert watched[0] is False


def test_shutdown_of_a_hanging_server_is_bounded(
    manage: Start, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.manager._EXIT_TIMEOUT", 0.2)  # seconds
    manager = manage()
    manager.start()
    pid = server_of(store_dir) or 0
    os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    manager.shutdown()
    assert time.monotonic() - begun < 30
    assert not alive(pid)


HOLDER = (
    HURRY
    + """
import os, signal, sys, threading, time
from shmstore.manager import StoreManager
from shmstore.ipc.rpc import STORE
from shmstore.system.clock import deadline_in
m = StoreManager("shop", directory=sys.argv[1], memory=2**20, persist=sys.argv[2] == "True")
m.start()
m.store().set("a", {"x": 1})
if "in mid-call" in sys.argv:
    server = m.store().stats().server_pid
    os.kill(server, signal.SIGSTOP)
    threading.Thread(target=m._pool.call, args=(STORE, "ping"), kwargs={"deadline": deadline_in(60)}).start()
    while m._pool._idle or not m._pool._busy:
        time.sleep(0.01)
child = os.fork() if len(sys.argv) > 3 else -1
if "in mid-call" in sys.argv and child:
    os.kill(server, signal.SIGCONT)
if child == 0:
    sys.stdin.read()
    os._exit(0)
print("ready" if child < 0 else child, flush=True)
sys.stdin.read()
"""
)


def test_the_server_exits_after_its_last_user_was_killed(store_dir: Path, run: Run, manage: Start) -> None:
    holder = run(HOLDER, store_dir, True)
    assert holder.stdout
    assert holder.stdout.readline() == "ready\n"
    pid = server_of(store_dir) or 0
    holder.kill()
    wait_for(lambda: not alive(pid), "the server's leaving")
    assert not (store_dir / "shop" / "socket").exists()
    with pytest.raises(StoreUnavailable):
        connect("shop", directory=store_dir)
    with manage() as manager:
        assert manager.store().get("a") == {"x": 1}, "sessions outlive their server"


def test_a_server_without_a_new_heartbeat_is_asked_before_it_is_killed(
    manage: Start, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arena's file may have been removed, or the server may be moving many sessions."""
    asked, call = [], Pool.call

    def count(pool: Pool, target: str, method: str, *args: Any, **kwargs: Any) -> Any:
        answer = call(pool, target, method, *args, **kwargs)
        asked.extend([method] * (method == "ping"))
        return answer

    monkeypatch.setattr(Pool, "call", count)
    monkeypatch.setattr(watch, "_CHECK_INTERVAL", 0.01)  # the heartbeat is written once a second
    with manage():
        pid = server_of(store_dir)
        wait_for(lambda: len(asked) > 3, "questions")
        assert server_of(store_dir) == pid


@pytest.mark.parametrize("when", ["at rest", "in mid-call"])
def test_a_forked_child_keeps_the_server(store_dir: Path, run: Run, when: str) -> None:
    holder = run(HOLDER, store_dir, True, when)
    assert holder.stdout
    child = int(holder.stdout.readline())
    pid = server_of(store_dir) or 0
    os.kill(holder.pid, signal.SIGKILL)
    stays(store_dir / "shop", 3 * LINGERS)
    assert server_of(store_dir) == pid
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: not alive(pid), "the server's leaving")


def test_without_persistence_no_files_are_left(store_dir: Path, run: Run, manage: Start) -> None:
    holder = run(HOLDER, store_dir, False)
    assert holder.stdout
    assert holder.stdout.readline() == "ready\n"
    pid = server_of(store_dir) or 0
    holder.kill()
    wait_for(lambda: not alive(pid), "the server's leaving")
    assert list(store_dir.iterdir()) == []
    with manage(persist=False) as manager:
        assert manager.store().get("a") is None
    wait_for(lambda: list(store_dir.iterdir()) == [], "the removal")


@pytest.mark.parametrize("beat", [0, 2**62, 2**64 - 1], ids=["", "a heartbeat in the future", "a later one"])
@pytest.mark.usefixtures("hurried_servers")
def test_a_writer_starts_a_server_without_a_watcher(
    store_dir: Path, run: Run, monkeypatch: pytest.MonkeyPatch, beat: int
) -> None:
    monkeypatch.setattr("shmstore.client.attachment.LATE", 0.5)  # seconds
    holder = run(HOLDER, store_dir, True)
    assert holder.stdout
    assert holder.stdout.readline() == "ready\n"
    pid = server_of(store_dir) or 0
    with connect("shop", directory=store_dir) as store:
        holder.kill()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid), "its end")
        whole: Any = store
        whole.arena.cells[HEARTBEAT] = beat or whole.arena.cells[HEARTBEAT]  # 0: it is not damaged

        def rescued() -> bool:
            for _ in range(8):  # one of them checks the server
                store.set("b", {})
            assert store.get("a") == {"x": 1}
            return server_of(store_dir) not in (None, pid)

        wait_for(rescued, "the rescue")
        wait_for(lambda: store.prune() == 0)
    wait_for(lambda: server_of(store_dir) is None, "the server's leaving")


@pytest.mark.parametrize("beat", [0, 2**62], ids=["", "a heartbeat in the future"])
def test_a_writer_replaces_a_hanging_server(
    store_dir: Path, run: Run, monkeypatch: pytest.MonkeyPatch, beat: int
) -> None:
    monkeypatch.setattr("shmstore.client.attachment.LATE", 0.5)  # seconds
    holder = run(HOLDER, store_dir, True)
    assert holder.stdout
    assert holder.stdout.readline() == "ready\n"
    pid = server_of(store_dir) or 0
    with connect("shop", directory=store_dir) as store:
        holder.kill()
        stop(pid)
        whole: Any = store
        whole.arena.cells[HEARTBEAT] = beat or whole.arena.cells[HEARTBEAT]
        assert whole._attachment._answer_deadline()() <= attachment.SILENCE
        assert manager_module._deadline_while_beating(whole._attachment.files, 1)() <= 1

        def replaced() -> bool:
            for _ in range(8):  # one of them checks the server
                store.set("b", {})
            return server_of(store_dir) not in (None, pid)

        wait_for(replaced, "the replacement")
        assert not alive(pid)
        assert store.get("a") == {"x": 1}


def test_a_server_that_was_shut_down_is_not_restarted(manage: Start, store_dir: Path) -> None:
    manager = manage()
    store = manager.store()
    manager.shutdown()
    for i in range(100):
        store.set(str(i), {})
    store._attachment._check_server()
    assert server_of(store_dir) is None
    with pytest.raises(StoreUnavailable):
        store.prune()
    store.close()


def test_a_shutdown_in_a_forked_child_only_detaches(manage: Start, store_dir: Path) -> None:
    manager = manage()
    manager.start()
    pid = server_of(store_dir)
    child = os.fork()
    if not child:
        try:
            manager.shutdown()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert server_of(store_dir) == pid
    assert manager.store().ping()


def test_detach_leaves_the_server_to_others(manage: Start, store_dir: Path) -> None:
    first, second = manage(), manage()
    first.start()
    second.start()
    pid = server_of(store_dir)
    first.detach()
    stays(store_dir / "shop", 3 * SHORT_IDLE_TIMEOUT)
    assert server_of(store_dir) == pid
    second.detach()
    wait_for(lambda: server_of(store_dir) is None, "the server's leaving")


def test_a_store_without_persistence_is_removed_with_a_stopped_server(
    manage: Start, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.client.connection.ANSWER_TIMEOUT", 0.3)  # seconds
    manager = manage(persist=False)
    manager.start()
    pid = server_of(store_dir) or 0
    stop(pid)
    manager.detach()
    wait_for(lambda: not (store_dir / "shop").exists(), "the removal")
    assert not alive(pid)


def test_a_store_without_persistence_is_removed_with_a_killed_server(manage: Start, store_dir: Path) -> None:
    manager = manage(persist=False)
    manager.start()
    manager._watch.stop()  # as `detach` does, when the watch has just killed a server that did not answer
    os.kill(server_of(store_dir) or 0, signal.SIGKILL)
    wait_for(lambda: server_of(store_dir) is None, "its end")
    manager.detach()
    wait_for(lambda: not (store_dir / "shop").exists(), "the removal")


# A process that forks workers all the time while a thread starts servers, as Gunicorn's master may after a crash.
FORKS_MEANWHILE = """
import os, sys, threading
from shmstore import StoreManager

def start():
    try:
        for n in range(5):
            with StoreManager(f"shop{n}", memory=2**20, directory=sys.argv[1]) as manager:
                started.append(manager.store().ping())
    finally:
        over.set()

started, over = [], threading.Event()
waits, ends = os.pipe()
thread = threading.Thread(target=start)
thread.start()
for _ in range(200):
    if over.wait(0.001):
        break
    if not os.fork():
        os.close(ends)
        os.read(waits, 1)
        os._exit(0)
thread.join()
print(started)
"""


def test_a_worker_that_is_forked_meanwhile_does_not_delay_the_start_of_a_server(store_dir: Path, run: Run) -> None:
    script = run(FORKS_MEANWHILE, store_dir)
    assert script.communicate(timeout=300)[0] == f"{[True] * 5}\n"


# The program of a server that stops itself in its first write.
STOPS_WITH_THE_LOCK = (
    spawn.BOOT.removesuffix("server.main()")
    + """
import signal, threading
from shmstore.engine.journal import Journal
commit = Journal.commit
def stop_and_commit(journal, plan):
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread takes no further step, whatever others do
    commit(journal, plan)
Journal.commit = stop_and_commit
server.main()
"""
)


def test_the_lock_of_a_stopped_server_is_taken_over(
    manage: Start, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing watches the server here: the process that waits for the lock ends it."""
    manager = manage(check_period=None, lock_timeout=0.5)
    with monkeypatch.context() as patched:
        patched.setattr(spawn, "BOOT", STOPS_WITH_THE_LOCK)
        patched.setenv(VARIABLE, "python")
        manager.start()
    manager._watch.stop()
    pid, store = server_of(store_dir) or 0, manager.store()

    def write() -> None:
        with suppress(StoreUnavailable), connect("shop", directory=store_dir, in_place=False) as through:
            through.set("b", {})

    thread = threading.Thread(target=write)
    thread.start()
    try:
        wait_for(lambda: state(pid) == "T", "its stop")
        monkeypatch.setattr("shmstore.client.attachment.SILENCE", 0.3)  # seconds that `write` waits for another server
        assert f"process {pid} " in store.arena.file.mutex.holder()
        store.set("a", {"x": 1})
        assert not alive(pid)
        assert store.get("a") == {"x": 1}
        verify(store.arena)
    finally:
        thread.join()


# -- proxies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_a_proxy_is_pickled_as_a_connection(manage: Start, store_dir: Path, in_place: bool) -> None:
    with manage(), connect("shop", directory=store_dir, in_place=in_place) as store:
        store.set("a", {"x": 1})
        with pickle.loads(pickle.dumps(store)) as again:
            assert type(again) is type(store)
            assert again.get("a") == {"x": 1}
        assert copy.deepcopy(store) is store
        assert "'shop'" in str(store) == repr(store)


def visit(store: Any) -> None:
    store.set("from the child", {"pid": os.getpid()})
    assert store.prune() == 0


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_proxy_can_be_passed_to_a_process(manage: Start, method: str) -> None:
    with manage() as manager, manager.store() as store:
        process = get_context(method).Process(target=visit, args=(store,))
        process.start()
        process.join()
        assert process.exitcode == 0
        process.close()
        assert store.get("from the child") is not None


@pytest.mark.parametrize("in_place", [True, False])
def test_a_call_on_a_closed_proxy_is_an_error(manage: Start, store_dir: Path, in_place: bool) -> None:
    with manage():
        store = connect("shop", directory=store_dir, in_place=in_place)
        store.close()
        store.close()
        with pytest.raises(StoreUnavailable, match="closed"):
            store.get("a")
        with pytest.raises(StoreUnavailable, match="closed"):
            store.prune()


def test_parent_and_forked_children_never_get_each_others_answers(
    manage: Start, store_dir: Path, fork: Callable[[], int]
) -> None:
    """F1: connections shared over fork gave half the answers to the wrong process."""
    with manage(), connect("shop", directory=store_dir, in_place=False) as store:
        for me in range(5):
            store.set(str(me), {"me": me})

        def right(me: int) -> bool:
            for _ in range(200):
                store.set(f"another of {me}", {})
                if store.destroy(f"another of {me}") != 1 or store.get(str(me)) != {"me": me}:
                    return False
            return True

        assert right(4)
        children = []
        for me in range(4):
            child = fork()
            if not child:
                ok = False
                try:
                    ok = right(me)
                finally:
                    os._exit(not ok)
            children.append(child)
        assert right(4)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]


def test_threads_share_a_proxy(manage: Start, store_dir: Path) -> None:
    with manage(), connect("shop", directory=store_dir, in_place=False) as store:
        wrong = []

        def work(me: int) -> None:
            for i in range(50):
                store.set(str(me), {"i": i})
                if store.get(str(me)) != {"i": i}:
                    wrong.append(me)

        threads = [threading.Thread(target=work, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_errors_are_the_same_through_the_server(manage: Start, store_dir: Path) -> None:
    with manage(), connect("shop", directory=store_dir, in_place=False) as store:
        with pytest.raises(TypeError):
            store.set(3, {})  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            store.set("a")  # type: ignore[call-arg]
        assert store.ping()


def test_a_manager_with_refused_options_detaches_from_the_server(
    manage: Start, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmstore.client.watch._CHECK_INTERVAL", 0.1)  # seconds, after which the watch may end
    with manage("refusing", memory=2**20):
        other = StoreManager("refusing", directory=store_dir, max_session=2**22)  # too large for the memory there is
        with pytest.raises(ConfigError, match="max_session"):
            other.start()
        with pytest.raises(ProcessError):
            other.store()
        wait_for(lambda: not other._watching.is_alive(), "the end of its watch")


def test_attach_or_start_gives_one_store_per_process(store_dir: Path) -> None:
    options = {"directory": store_dir, "memory": 2**20}
    store = attach_or_start("once", options)
    assert attach_or_start("once", options) is store
    assert attach_or_start("shm://once", options) is store
    store.close()
    again = attach_or_start("once", options)
    assert again is not store
    again.close()


def test_killing_a_missing_server_returns_false(store_dir: Path) -> None:
    assert connection.kill(StoreFiles.of("never", store_dir)) is False
