"""Files that another process replaces or creates at the moment at which they are opened."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for

from shmstore import Store, StoreUnavailable, snapshot
from shmstore.engine import layout
from shmstore.engine.arena import Arena
from shmstore.engine.header import HEARTBEAT, LIVE, STATE
from shmstore.engine.layout import TEMPORARY, Geometry
from shmstore.engine.verify import verify
from shmstore.ipc import options_file
from shmstore.ipc.directory import StoreFiles
from shmstore.options import Options
from shmstore.server import main
from shmstore.server.server import StoreServer

CONTENT = {str(number): {"n": number} for number in range(30)}


@pytest.fixture
def files(store_dir: Path) -> StoreFiles:
    """The files of a store with sessions whose server was killed."""
    files = StoreFiles.of("shop", store_dir)
    files.create()
    with Store.over(Arena.create(files.arena, Geometry.plan(2**20)), Options.of(memory=2**20)) as store:
        store.publish_options()
        store.arena.cells[HEARTBEAT] = 1
        for sid, session in CONTENT.items():
            store.set(sid, session)
    options_file.save(files.options, options_file.pack({"memory": 2**20, "check_period": None}))
    return files


def attached(files: StoreFiles) -> Store:
    return Store.over(Arena.open(files.arena), Options.of(memory=2**20, check_period=None))


Start = Callable[..., StoreServer]


@pytest.fixture
def start(files: StoreFiles) -> Iterator[Start]:
    """Return a function that starts the store's server in this process, up to the point where it listens."""
    started: list[StoreServer] = []

    def begin(**options: Any) -> StoreServer:
        one = main.start(files, options_file.pack(options) if options else None)
        assert one is not None
        started.append(one)
        return one

    def end(one: StoreServer) -> None:
        one._exit("the test ends")
        one.arena.close()
        os.close(one._instance._lock)
        os.close(one._listener._wake)

    begin.end = end  # type: ignore[attr-defined]
    yield begin
    for one in started:
        if not one._store.closed:
            end(one)


def test_a_flipped_bit_in_the_state_does_not_end_the_server(start: Start) -> None:
    server = start()
    cells = server.arena.cells
    cells[STATE] = 1 << 7
    server._restore_files()
    server._check_lock()
    assert cells[STATE] == LIVE
    assert server.arena.cells is cells
    assert server._store.all() == CONTENT


def meanwhile(monkeypatch: pytest.MonkeyPatch, path: str, action: Callable[[], object], times: int = 1) -> list[int]:
    """Call a function each time a file was opened, before it is checked; return the list of opened files."""
    opened: list[int] = []
    real = os.open

    def hooked(name: Any, *arguments: Any, **more: Any) -> int:
        fd = real(name, *arguments, **more)
        if os.fspath(name) == path and len(opened) < times:
            opened.append(fd)
            action()
        return fd

    monkeypatch.setattr(os, "open", hooked)
    return opened


def test_a_reader_that_opens_the_file_while_it_is_replaced(files: StoreFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with attached(files) as mover:
        opened = meanwhile(monkeypatch, files.arena, mover.move, times=3)
        with attached(files) as store:
            assert store.all() == CONTENT
        assert len(opened) == 3


def test_a_file_that_is_replaced_each_time_it_is_opened(files: StoreFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace() -> None:
        Arena.create(files.arena, Geometry.plan(2**16)).close()

    meanwhile(monkeypatch, files.arena, replace, times=10**9)
    with pytest.raises(StoreUnavailable, match="replaced each time"):
        layout.open_file(files.arena)


def test_a_server_that_starts_while_the_file_is_replaced(
    files: StoreFiles, start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with attached(files) as mover:
        meanwhile(monkeypatch, files.arena, mover.move)
        assert start()._store.all() == CONTENT
        assert mover.all() == CONTENT
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_processes_follow_a_server_that_replaces_a_file_with_a_damaged_head(files: StoreFiles, start: Start) -> None:
    """Otherwise they would continue with sessions that no other process sees."""
    with attached(files) as worker, attached(files) as reader:
        with open(files.arena, "r+b") as file:
            file.write(b"damage")
        server = start()
        assert server._store.ids() == worker.ids() == []
        worker.set("new", {"n": 1})
        assert server._store.get("new") == reader.get("new") == {"n": 1}
        assert worker.arena.file.is_at(files.arena)


def test_a_damaged_file_with_a_second_name_is_not_changed(files: StoreFiles, start: Start, tmp_path: Path) -> None:
    with open(files.arena, "r+b") as file:
        file.write(b"damage")
    other = Path(files.path).parent / "another name"
    os.link(files.arena, other)
    before = other.read_bytes()
    start()
    assert other.read_bytes() == before
    other.unlink()


def test_a_snapshot_whose_temporary_file_is_renamed_while_it_is_opened(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(store_dir / "saved")
    with Store(memory=2**16, check_period=None) as store:
        store.set("a", {})
        Path(f"{path}.new").touch(0o600)
        meanwhile(monkeypatch, f"{path}.new", lambda: os.rename(f"{path}.new", path))
        assert snapshot.save(store, path) == 1
        assert snapshot.describe(path).sessions == 1


# -- files that are being created --------------------------------------------------------------------------------------


def leftovers(files: StoreFiles) -> list[str]:
    return [name for name in os.listdir(files.path) if name.startswith(TEMPORARY)]


def test_a_starting_server_keeps_the_temporary_file_of_a_running_rebuild(files: StoreFiles, start: Start) -> None:
    with attached(files) as worker:
        begun = 0

        def start_meanwhile(_: int) -> None:
            nonlocal begun
            begun += 1
            if begun == 1:
                layout.remove_abandoned(files.path)
                assert len(leftovers(files)) == 1

        assert worker.move(progress=start_meanwhile) == 0
        assert begun
        assert start()._store.all() == CONTENT
        assert leftovers(files) == []


def test_a_temporary_file_removed_before_it_is_locked_is_created_again(
    files: StoreFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is not locked yet: a file of a process that was killed at this point looks the same."""
    real, times = fcntl.flock, list[Any]()

    def overtaken(fd: Any, how: int) -> None:
        if not times:
            times.append(fd)
            layout.remove_abandoned(files.path)
            assert leftovers(files) == []
        real(fd, how)

    with attached(files) as worker:
        monkeypatch.setattr(fcntl, "flock", overtaken)
        assert worker.move() == 0
        monkeypatch.undo()
        assert times
        assert worker.all() == CONTENT
        assert leftovers(files) == []


def killed_while_healing(files: StoreFiles) -> None:
    """Let a process be killed after it has copied the sessions, before the rename of the new file."""
    child = os.fork()
    if not child:
        try:
            with attached(files) as worker:
                worker.move(progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(leftovers(files)) == 1


def test_a_leftover_of_a_killed_rebuild_is_removed_by_the_next_rebuild(files: StoreFiles) -> None:
    killed_while_healing(files)
    with attached(files) as worker:
        assert worker.move() == 0
        assert leftovers(files) == []
        assert worker.all() == CONTENT


def test_a_leftover_of_a_killed_rebuild_is_removed_by_the_server(files: StoreFiles, start: Start) -> None:
    killed_while_healing(files)
    running = start()
    assert leftovers(files) == []
    killed_while_healing(files)
    running._restore_files()
    assert leftovers(files) == []


def test_a_restart_does_not_recreate_a_store_that_the_previous_server_removes_meanwhile(
    files: StoreFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = StoreFiles.claim

    def claim_when_it_has_exited(self: StoreFiles, timeout: float) -> int | None:
        files.remove()
        return claim(self, timeout)

    monkeypatch.setattr(StoreFiles, "claim", claim_when_it_has_exited)
    with files.starting(0), pytest.raises(StoreUnavailable, match="was removed, so its server is not restarted"):
        main.start(files, None)
    assert not os.path.lexists(files.path)


def test_a_temporary_file_removed_during_a_rebuild_is_an_error_of_the_store(files: StoreFiles) -> None:
    def remove(_: int) -> None:
        for name in leftovers(files):
            os.unlink(os.path.join(files.path, name))

    with attached(files) as worker:
        with pytest.raises(StoreUnavailable, match="cannot take the place"):
            worker.move(progress=remove)
        assert worker.all() == CONTENT
        worker.set("new", {})
        verify(worker.arena)


# -- a store keeps its size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max": 10**9}, {"max": 10**9, "memory": 2**20}, {"max": 7}, {"memory": 2**20}])
def test_a_store_keeps_its_size_over_any_number_of_restarts(
    options: dict[str, int], files: StoreFiles, start: Any
) -> None:
    start.end(start(**options))
    status, sizes = os.stat(files.arena), set()
    for _ in range(3):
        running = start(**options)
        sizes.add((running.arena.geometry.size, os.stat(files.arena).st_ino))
        start.end(running)
    assert sizes == {(status.st_size, status.st_ino)}
    assert abs(status.st_size - Geometry.plan(2**20).size) < layout.BLOCK


def test_a_store_keeps_its_size_when_each_restart_raises_max(files: StoreFiles, start: Any) -> None:
    os.unlink(files.arena)
    start.end(start(max=10, memory=2**20))
    size, slots = os.stat(files.arena).st_size, []
    for most in (1000, 1500, 2000):
        running = start(max=most)
        slots.append(running.arena.geometry.slots)
        assert abs(os.stat(files.arena).st_size - size) < layout.BLOCK
        start.end(running)
    assert slots == sorted({*slots})
    wait_for(lambda: not leftovers(files), "nothing left")
