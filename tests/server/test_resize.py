"""A restart with another size: the sessions are copied, or the file is kept. With another layout they are lost."""

from __future__ import annotations

import fcntl
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import Run, Start

from shmstore import Store, connect, snapshot
from shmstore.client import spawn
from shmstore.engine import layout
from shmstore.engine.arena import Arena
from shmstore.engine.layout import TEMPORARY, Geometry, OtherLayout
from shmstore.engine.verify import verify
from shmstore.ipc import options_file
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import OtherVersion
from shmstore.options import Options
from shmstore.server import main
from shmstore.server.server import StoreServer
from shmstore.testing import wait_until

StartHere = Callable[..., StoreServer]


@pytest.fixture
def files(store_dir: Path) -> StoreFiles:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    return files


@pytest.fixture
def start_here(files: StoreFiles) -> Iterator[StartHere]:
    """Return a function that starts the store's server in this process, up to the point where it listens."""
    started = []

    def begin(**options: Any) -> StoreServer:
        one = main.start(files, options_file.pack({"memory": 2**20, "check_period": None, **options}))
        assert one is not None
        started.append(one)
        return one

    yield begin
    for one in started:
        one._exit("the test ends")
        one.arena.close()
        os.close(one._instance._lock)
        os.close(one._listener._wake)


def refused(files: StoreFiles, memory: int, room: int = resource.RLIM_INFINITY) -> str:
    """Start the store's server in a child, which exits; return the error if it refused."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            main.start(files, options_file.pack({"memory": memory}))
        except Exception as exc:
            os.write(writable, f"{exc!r}".encode())
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable) as said:
        os.waitpid(child, 0)
        return said.read()


def left_by_an_earlier_version(files: StoreFiles) -> Path:
    """Create an arena with sessions, in the layout version that is set now."""
    with Store.over(Arena.create(files.arena, Geometry.plan(2**16)), Options.of(memory=2**16)) as store:
        store.publish_options()
        store.set("a", {"n": 1})
    return Path(files.arena)


def test_a_store_of_another_layout_is_replaced_and_logged_once(
    files: StoreFiles, start_here: StartHere, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_VERSION", 98)
    left_by_an_earlier_version(files)
    monkeypatch.setattr(layout, "_VERSION", 99)
    main = start_here()
    assert len(main._store) == 0
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "its memory cannot be used, its sessions are lost" in line
    assert "has layout 98, this is 99" in line
    assert sorted(os.listdir(files.path)) == ["arena", "lock", "options", "socket"]


def test_a_store_of_another_layout_is_replaced_by_its_snapshot(
    files: StoreFiles, start_here: StartHere, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.over(Arena.open(left_by_an_earlier_version(files)), Options.of(memory=2**16)) as store:
        snapshot.save(store, store_dir / "saved")
    monkeypatch.setattr(layout, "_VERSION", 99)
    assert start_here(snapshot=store_dir / "saved")._store.all() == {"a": {"n": 1}}


def test_a_store_of_another_layout_in_use_is_left_alone(
    files: StoreFiles, start_here: StartHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an upgrade by USR2 while the old workers live: they keep their sessions."""
    path = left_by_an_earlier_version(files)
    before = path.read_bytes()
    monkeypatch.setattr(layout, "_VERSION", 99)
    monkeypatch.setattr(main, "LEAVING", 0.1)
    with path.open("rb") as worker:
        fcntl.flock(worker, fcntl.LOCK_SH)
        assert "StoreUnavailable" in (said := refused(files, 2**20))
        assert "in use by processes of another version of shmstore" in said
        assert f"`fuser {path}`" in said
    assert path.read_bytes() == before
    assert not [name for name in os.listdir(files.path) if name.startswith(TEMPORARY)]
    assert "StoreFull" in refused(files, 2**22, room=2**21)
    assert path.read_bytes() == before, "it stays until another takes its place"
    assert len(start_here()._store) == 0


def test_a_store_of_another_layout_whose_last_user_is_exiting_is_replaced(
    files: StoreFiles, start_here: StartHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start follows a stop at once; and a child between fork and exec has the descriptors of its parent."""
    path = left_by_an_earlier_version(files)
    monkeypatch.setattr(layout, "_VERSION", 99)
    with path.open("rb") as worker:
        fcntl.flock(worker, fcntl.LOCK_SH)
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: worker.close())
        monkeypatch.setattr("shmstore.system.files.time", clock)
        assert len(start_here()._store) == 0
        assert worker.closed


def test_the_heartbeat_is_fast_until_the_last_waiter_is_served(
    start_here: StartHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = start_here()
    turns, waiting = threading.Semaphore(0), []
    monkeypatch.setattr(main._snapshots, "save", turns.acquire)
    for number in (1, 2):
        waiting.append(threading.Thread(target=main._save_snapshot))
        waiting[-1].start()
        wait_until(lambda: len(main._save_requests) == number)  # noqa: B023
    turns.release()
    wait_until(lambda: sum(thread.is_alive() for thread in waiting) == 1)
    assert len(main._save_requests) == 1
    turns.release()
    for thread in waiting:
        thread.join()
    assert not main._save_requests


def test_attaching_to_another_version_says_what_to_do(
    manage: Start, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manage(max=5) as manager, manager.store() as store:
        store.set("a", {})
        monkeypatch.setattr(layout, "_VERSION", 99)
        for attach in (lambda: connect("shop", directory=store_dir), manage(max=7).start):
            with pytest.raises(
                (OtherLayout, OtherVersion), match="stop all processes that use the store, then start them"
            ):
                attach()
        monkeypatch.undo()
        assert store.get("a") == {}
        assert store.options.max == 5
        with connect("shop", directory=store_dir) as another:
            assert another.options.max == 5


def test_a_raised_max_takes_effect_and_drops_no_session(manage: Start) -> None:
    with manage(max=10) as manager, manager.store() as store:
        for number in range(10):
            store.set(str(number), {"n": number}, owner="ada" if number % 2 else None)
        order = store.ids()
    with manage(max=500) as manager, manager.store() as store:
        assert store.ids() == order
        for number in range(10, 400):
            store.set(str(number), {})
        assert len(store) == 400
        assert store.get("3") == {"n": 3}
        verify(store.arena)


IN_USE = """
import sys
from shmstore import connect
store = connect("shop", directory=sys.argv[1])
print("attached", flush=True)
sys.stdin.read()
print(len(store), flush=True)
"""


def test_a_store_in_use_keeps_its_size_and_gets_the_new_one_at_the_next_start(
    manage: Start, store_dir: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    first = manage()
    with first.store() as store:
        for number in range(100):
            store.set(str(number), {"n": number})
    worker = run(IN_USE, store_dir)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "attached\n"
    first.shutdown()
    with manage(memory=2**22) as manager, manager.store() as store:
        assert len(store) == 100
        assert store.stats().memory < 2**21
        assert "keeps the memory it has: another memory takes effect at a start without users" in capfd.readouterr().err
    assert worker.communicate("")[0] == "100\n"
    with manage(memory=2**22) as manager, manager.store() as store:
        assert len(store) == 100
        assert store.stats().memory > 2**21


def test_a_start_is_awaited_while_it_makes_progress(files: StoreFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "START_TIMEOUT", 1.5)
    ours, theirs = socket.socketpair()

    def carry_over() -> None:
        theirs.makefile("rb").read()
        tell = main._progress_reporter(theirs)
        for number in range(30):
            tell(number)
            time.sleep(0.1)
        theirs.sendall(b'{"ready": true}')
        theirs.close()

    thread = threading.Thread(target=carry_over)
    thread.start()
    try:
        with ours:
            assert spawn._exchange(ours, files, None) == {"ready": True}
    finally:
        thread.join()
