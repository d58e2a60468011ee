"""Stores whose file is removed, replaced, damaged or resized: all processes reopen it, and no session is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stress_child
from processes import CHECKS, Start, alive, stays, stop

from shmstore import Store, StoreFull, StoreManager, StoreUnavailable, connect
from shmstore.client import connection
from shmstore.codec.body import Codec
from shmstore.codec.ids import key_of
from shmstore.engine import header as at
from shmstore.engine.arena import Arena
from shmstore.engine.layout import CELL, SLOT, TEMPORARY, Geometry
from shmstore.engine.verify import verify
from shmstore.ipc.directory import StoreFiles
from shmstore.options import Options
from shmstore.testing import wait_until


def filled(store: Any, count: int = 200) -> dict[str, Any]:
    for number in range(count):
        store.set(str(number), {"n": number, "x": "y" * (number * 7 % 900)}, owner="ada" if number % 3 else None)
    content: dict[str, Any] = store.all()
    return content


def vandalise_directory(path: Path) -> None:
    shutil.rmtree(path)


def vandalise_arena(path: Path) -> None:
    (path / "arena").unlink()
    (path / "arena").write_bytes(b"garbage")


def vandalise_socket(path: Path) -> None:
    (path / "socket").unlink()


def vandalise_file(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


@pytest.mark.parametrize(
    "vandalise",
    [vandalise_directory, vandalise_arena, vandalise_socket, *map(vandalise_file, ("arena", "options", "lock"))],
    ids=["directory", "arena replaced", "socket", "arena", "options", "lock"],
)
@pytest.mark.usefixtures("hurried_servers")
def test_files_that_are_removed_under_a_running_store(
    manage: Start, store_dir: Path, vandalise: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    manager = manage()
    manager.start()
    store = manager.store()
    second = connect("shop", directory=store_dir)
    idle, counting = (connect("shop", directory=store_dir) for _ in range(2))
    content = filled(store)
    order = store.ids()
    pid = store.stats().server_pid
    vandalise(store_dir / "shop")
    store.set("meanwhile", {"n": 1})
    wait_until(
        lambda: (
            all((store_dir / "shop" / name).exists() for name in ("socket", "options", "lock", "arena"))
            and (store_dir / "shop" / "arena").stat().st_size > 1000
        )
    )
    assert StoreFiles.of("shop", store_dir).server() == pid
    second.set("later", {"n": 2})
    third: Any = connect("shop", directory=store_dir)
    for each in (store, second, third):
        assert each.all() == content | {"meanwhile": {"n": 1}, "later": {"n": 2}}
        assert each.ids() == ["later", "meanwhile", *order]
        assert each.stats().server_pid == pid  # one server, the same
        assert sorted(each.owned_by("ada")) == sorted(str(n) for n in range(200) if n % 3)
    assert len(counting) == idle.stats().sessions == 202
    third.set("0", {"n": "new"})
    assert store.get("0") == second.get("0") == {"n": "new"}
    assert third.prune() == store.prune() == 0  # the server answers
    verify(third.arena)
    for each in (second, third, idle, counting):
        each.close()
    log = capfd.readouterr().err
    assert log.count("was removed or replaced; the server restores it") == 1, log
    assert "Traceback" not in log


@pytest.mark.parametrize("persist", [True, False])
@pytest.mark.usefixtures("hurried_servers")
def test_a_server_that_cannot_recreate_its_socket_continues(
    manage: Start, store_dir: Path, persist: bool, logged: Callable[[], str]
) -> None:
    with manage(persist=persist) as manager, manager.store() as store:
        store.set("a", {"n": 1})
        pid, socket = store.stats().server_pid, store_dir / "shop" / "socket"
        socket.unlink()
        socket.mkdir()
        wait_until(lambda: "cannot be restored" in logged())
        stays(store_dir / "shop", longer_than=10 * CHECKS)  # it tries again and again
        assert StoreFiles.of("shop", store_dir).server() == pid
        assert store.get("a") == {"n": 1}
        assert store.prune() == 0, "over the connection there is"
        socket.rmdir()
        wait_until(socket.is_socket)
        with connect("shop", directory=store_dir) as another:
            assert another.get("a") == {"n": 1}
            assert another.stats().server_pid == pid
    told = logged()
    assert told.count("cannot be restored") == told.count("the server restores it") == 1
    assert "Traceback" not in told


def test_a_server_that_dies_while_its_socket_is_missing_is_started_again(manage: Start, store_dir: Path) -> None:
    with manage() as manager, manager.store() as store:
        store.set("a", {"n": 1})
        for _ in range(3):
            pid = store.stats().server_pid
            (store_dir / "shop" / "socket").unlink()
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: store.stats().server_pid not in (0, pid))  # noqa: B023
            wait_until((store_dir / "shop" / "socket").exists)
        assert store.get("a") == {"n": 1}


@pytest.mark.parametrize("persist", [True, False])
@pytest.mark.usefixtures("hurried_servers")
def test_a_replaced_server_does_not_touch_the_files_of_its_successor(
    manage: Start, store_dir: Path, persist: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = manage(max=5, persist=persist), manage(max=7)
    first.start()
    first._watch.stop()
    old = StoreFiles.of("shop", store_dir).server() or 0
    stop(old)
    shutil.rmtree(store_dir / "shop")
    with second.store() as store:
        store.set("a", {"n": 1})
        options = (store_dir / "shop" / "options").read_bytes()
        os.kill(old, signal.SIGCONT)
        wait_until(lambda: not alive(old))
        assert (store_dir / "shop" / "options").read_bytes() == options
        assert store.get("a") == {"n": 1}
        assert store.prune() == 0
        with connect("shop", directory=store_dir) as another:
            assert another.options.max == 7
    log = capfd.readouterr().err
    assert "serves it now; this server exits" in log
    assert "was damaged, and is restored" not in log


def test_a_watcher_does_not_create_a_store(manage: Start, store_dir: Path) -> None:
    """The store would be empty and have the default options."""
    with manage() as manager:
        files = StoreFiles.of("shop", store_dir)
        manager._watch.stop()
        assert connection.kill(files)
        (store_dir / "shop" / "arena").unlink()
        with pytest.raises(StoreUnavailable, match="was removed"):
            connection.connect_or_start(files)
        shutil.rmtree(store_dir / "shop")
        with pytest.raises(StoreUnavailable, match="there is no store"):
            connection.connect_or_start(files)
        assert not [*store_dir.iterdir()]


@pytest.mark.usefixtures("hurried_servers")
def test_options_that_others_could_have_written_are_written_again(
    manage: Start, store_dir: Path, logged: Callable[[], str]
) -> None:
    def told(times: int) -> bool:
        return logged().count("options was damaged, and is restored") == times

    with manage(max=5) as manager, manager.store() as store:
        options = store_dir / "shop" / "options"
        before = options.read_bytes()
        options.chmod(0o664)
        wait_until(lambda: options.stat().st_mode & 0o777 == 0o600)
        options.write_bytes(before[:10])
        wait_until(lambda: options.read_bytes() == before)
        wait_until(lambda: told(2))  # it says so afterwards
        pid = store.stats().server_pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: store.stats().server_pid not in (0, pid))
        with connect("shop", directory=store_dir) as another:
            assert another.options.max == 5
    assert told(2)


@pytest.mark.usefixtures("hurried_servers")
def test_a_recreated_arena_has_its_options(manage: Start, store_dir: Path) -> None:
    """With the default options a process would use another serializer than the others."""
    with manage(serializer=json) as manager, manager.store() as store:
        store.set("a", {})
        vandalise_directory(store_dir / "shop")
        while not (store_dir / "shop" / "arena").exists():
            pass
        assert (store_dir / "shop" / "options").exists()
        wait_until((store_dir / "shop" / "socket").exists)
        manager._watch.stop()
        pid = store.stats().server_pid
        stop(pid)  # otherwise it may restore the file first
        (store_dir / "shop" / "options").unlink()
        with pytest.raises(StoreUnavailable, match="no server runs"):
            connect("shop", directory=store_dir)
        os.kill(pid, signal.SIGCONT)
        wait_until((store_dir / "shop" / "options").exists)
        with connect("shop", directory=store_dir) as other:
            assert other.get("a") == {}


def kept(order: list[str], count: int) -> list[str]:
    """Return the ``count`` sessions of `filled` that are kept: those of ada, then the most recently used ones."""
    worth = sorted(order, key=lambda sid: int(sid) % 3 == 0)
    return [sid for sid in order if sid in worth[:count]]


def put(cell: int, value: int) -> Callable[[Arena], None]:
    def damage(arena: Arena) -> None:
        arena.cells[cell] = value

    return damage


def free_slot_in_use(arena: Arena) -> None:
    arena.cells[at.FREE_SLOT] = arena.find(key_of(b"9"))


def free_slot_beyond_the_last(arena: Arena) -> None:
    arena.cells[arena.table.next + arena.cells[at.FREE_SLOT]] = arena.table.last_slot + SLOT


def free_slot_between_two(arena: Arena) -> None:
    """Where the owner of a session without one stands as the record of one that is free."""
    arena.cells[at.FREE_SLOT] = arena.find(key_of(b"0")) + arena.table.owner - arena.table.record


def free_run_of(blocks: int) -> Callable[[Arena], None]:
    def damage(arena: Arena) -> None:
        arena.cells[arena.table.run_head(arena.cells[at.FREE_RUN])] = blocks << 32

    return damage


DAMAGES = {
    "a wild free run": put(at.FREE_RUN, 2**40),
    "a free run of no blocks": free_run_of(0),
    "a free run beyond the last block": free_run_of(2**20),
    "a wild free slot": put(at.FREE_SLOT, 2**40),
    "a free slot between two": free_slot_between_two,
    "a free slot in use": free_slot_in_use,
    "a free slot beyond the last": free_slot_beyond_the_last,
    "too many blocks": put(at.USED_BLOCKS, 2**64 - 1),
    "too many sessions": put(at.SESSIONS, 2**64 - 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_found_by_a_writer_is_repaired(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**18, check_period=None, max=300) as store:
        content = filled(store)
        store.destroy("5")
        del content["5"]
        DAMAGES[damage](store.arena)
        with caplog.at_level(logging.ERROR, "shmstore"):
            store.destroy("7")
            new = {f"new {number}": {"x": "y" * 900} for number in range(5)}
            for sid, session in new.items():
                store.set(sid, session)
        assert "damaged" in caplog.text
        del content["7"]
        assert store.all() == content | new
        verify(store.arena)


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """Let this process and the servers that it starts make only small files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.processes("executed")
@pytest.mark.parametrize("max_per_owner", [None, 500])
def test_a_server_starts_on_damage_whose_repair_has_no_room(
    max_per_owner: int | None, manage: Start, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with manage() as manager, manager.store() as store:
        content = filled(store)
    with contextlib.closing(Arena.open(store_dir / "shop" / "arena")) as left:
        left.cells[at.TOP_SLOT] = 8 * SLOT
    with no_room(), manage(max_per_owner=max_per_owner, max_session=5000) as manager, manager.store() as store:
        assert store.arena.cells[at.MAX_SESSION] == 5000
        assert store.get("1") == content["1"]
        for use in (store.all, store.prune, store.stats):
            with pytest.raises(StoreFull, match="needs room for a second file"):
                use()
        pid = StoreFiles.of("shop", store_dir).server()
        assert pid is not None
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.prune()
        assert store.all() == content
    log = capfd.readouterr().err
    assert log.count("its memory is damaged") == log.count("its memory was damaged") == 1, log
    assert "Traceback" not in log


def test_damage_whose_repair_has_no_room_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**18, check_period=None) as store:
        content = filled(store)
        DAMAGES["too many blocks"](store.arena)
        with no_room():
            for _ in range(2):
                with pytest.raises(StoreFull, match=r"damaged .* needs room for a second file: .*ulimit"):
                    store.set("new", {})
        assert caplog.text.count("needs room for a second file") == 1
        store.set("new", {})
        assert "its memory was damaged" in caplog.text
        assert store.all() == content | {"new": {}}


@pytest.mark.parametrize("max_per_owner", [None, 50])
def test_options_are_in_force_on_damage_whose_repair_has_no_room(max_per_owner: int | None) -> None:
    with Store(memory=2**18, check_period=60) as store:
        content = filled(store)
        store.arena.cells[at.TOP_SLOT] = 8 * SLOT
        with no_room():
            store.change_options(replace(store.options, max=300, max_per_owner=max_per_owner))
            assert store.arena.cells[at.MAX] == 300
            assert not store._interval._stop.is_set()
            assert store.get("1") == content["1"]
        assert store.all() == content


def test_a_change_of_options_that_fails_does_not_end_the_automatic_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise StoreUnavailable

    with Store(memory=2**18, check_period=60) as store:
        monkeypatch.setattr(store, "publish_options", fail)
        with pytest.raises(StoreUnavailable):
            store.change_options(store.options)
        assert not store._interval._stop.is_set()


def test_damage_found_by_several_processes_is_repaired_once_by_their_server(manage: Start, store_dir: Path) -> None:
    with manage(check_period=None) as manager, manager.store() as store:
        content = filled(store)
        others = [connect("shop", directory=store_dir) for _ in range(3)]
        DAMAGES["a wild free slot"](store.arena)
        barrier = threading.Barrier(3)

        def write(number: int) -> None:
            barrier.wait()
            others[number].set(f"new {number}", {"n": number})

        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        new = {f"new {number}": {"n": number} for number in range(3)}
        for each in (store, *others):
            assert each.all() == content | new
            assert each.stats().rebuilds == 1
        verify(store.arena)
        for each in others:
            each.close()


@pytest.mark.processes("executed")
def test_damage_found_without_a_server_is_repaired_by_a_started_server(manage: Start, store_dir: Path) -> None:
    manager = manage(check_period=None)
    manager.start()
    with connect("shop", directory=store_dir) as store:
        content = filled(store)
        manager.detach()  # so that no process watches the server
        pid = store.stats().server_pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not alive(pid))
        arena: Any = getattr(store, "arena")  # noqa: B009 - of a store in memory
        DAMAGES["a wild free slot"](arena)
        store.set("new", {})
        assert store.all() == content | {"new": {}}
        assert store.stats().rebuilds == 1
        assert store.stats().server_pid not in (0, pid)


def least_used_is(where: Callable[[Arena], int]) -> Callable[[Arena], None]:
    def damage(arena: Arena) -> None:
        arena.cells[arena.table.prev] = where(arena)

    return damage


WRONG_ORDERS = {
    "between two": least_used_is(lambda arena: arena.find(key_of(b"0")) + 1),
    "nowhere": least_used_is(lambda arena: arena.table.last_slot + 10 * SLOT),
    "wild": least_used_is(lambda arena: 2**40),
    "free": least_used_is(lambda arena: arena.cells[at.FREE_SLOT]),
}


@pytest.mark.parametrize("damage", WRONG_ORDERS)
def test_damage_found_by_an_eviction_is_repaired(damage: str, caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**18, check_period=None) as store:
        content = filled(store, 20)
        store.destroy("5")
        del content["5"]
        store._options = Options.of(memory=2**18, max=19)
        WRONG_ORDERS[damage](store.arena)
        with caplog.at_level(logging.ERROR, "shmstore"):
            store.change_options(store.options)
            store.set("new", {})
        assert "damaged" in caplog.text
        del content["0"]  # without an owner, and the least recently used
        assert store.all() == content | {"new": {}}
        verify(store.arena)


def into_a_record(arena: Arena, block: int) -> int:
    """A block that is not the head of a run, but looks like the head of a run that extends beyond the last block."""
    inside = arena.geometry.blocks - 100
    arena.cells[arena.table.run_head(inside)] = 1000 << 32
    return inside


def into_a_longer_run(arena: Arena, block: int) -> int:
    """The same, within the arena."""
    inside = arena.geometry.blocks - 100
    arena.cells[arena.table.run_head(inside)] = 99 << 32
    return inside


def in_a_ring(arena: Arena, block: int) -> int:
    """A link to the same run again, which is empty."""
    arena.cells[arena.table.run_head(block)] &= 2**32 - 1
    return block


@pytest.mark.parametrize("leads", [into_a_record, into_a_longer_run, in_a_ring])
@pytest.mark.parametrize("drop", [lambda store: store.destroy("large"), lambda store: store.set("large", {})])
def test_a_damaged_chain_of_blocks_is_not_followed(
    drop: Callable[[Store], object], leads: Callable[[Arena, int], int]
) -> None:
    with Store(memory=2**18, check_period=None) as store:
        content = filled(store, 40)
        for number in range(1, 40, 2):
            store.destroy(str(number))
            del content[str(number)]
        store.set("large", {"x": "y" * 3000})
        arena, low = store.arena, 2**32 - 1
        block = arena.cells[arena.table.record + arena.find(key_of(b"large"))] & low
        assert arena.cells[arena.table.run_head(block)] & low, "it is in one run"
        following = leads(arena, block)
        arena.cells[arena.table.run_head(block)] = arena.cells[arena.table.run_head(block)] & ~low | following
        assert store.get("large") is None
        drop(store)
        verify(store.arena)
        store.destroy("large")
        assert store.all() == content


def test_a_rebuild_keeps_the_counters() -> None:
    with Store(memory=2**18, check_period=None) as store:
        filled(store, 10)
        store.destroy("1")
        store.touch("2")
        store.get("2")
        store.get("1")
        store.arena.cells[at.CORRUPT] += 1
        before = replace(store.stats(), server_uptime=0)
        assert store.move() == 0
        assert replace(store.stats(), server_uptime=0) == before


def test_a_rebuild_keeps_as_many_sessions_as_fit() -> None:
    with Store(memory=2**18, check_period=None) as store:
        filled(store, 20)
        newest = kept(store.ids(), 5)
        assert store.move(Geometry.plan(2**18, max_slots=5)) == 15
        assert store.ids() == newest
        verify(store.arena)


def test_options_that_change_during_a_rebuild_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    adopt = Store.adopt
    with Store(memory=2**18, check_period=None, max=100) as store:
        change = threading.Thread(target=lambda: store.change_options(replace(store.options, max=50)))

        def late(self: Store, arena: Arena) -> None:
            """When the options were copied."""
            change.start()
            wait_until(lambda: not change.is_alive() or len(store._reattaching._queue) > 1)
            adopt(self, arena)

        monkeypatch.setattr(Store, "adopt", late)
        store.move()
        change.join()
        assert store.arena.cells[at.MAX] == 50
        verify(store.arena)


def test_a_rebuild_reports_progress() -> None:
    with Store(memory=2**22, check_period=None) as store:
        for number in range(2100):
            store.set(str(number), {})
        signs: list[int] = []
        assert store.move(progress=signs.append) == 0
        assert signs == [0, 0, 0, 0, 1024, 2048]
        assert len(store) == 2100


def test_a_rebuild_keeps_the_latest_of_two_sessions_with_one_id() -> None:
    with Store(memory=2**16, check_period=None) as store:
        store.set("a", {"n": 1})
        store.arena.cells[store.arena.table.buckets + key_of(b"a")[0] % store.arena.geometry.buckets] = 0
        store.set("a", {"n": 2})
        assert store.length() == 2
        assert store.move() == 1
        assert store.all() == {"a": {"n": 2}}
        verify(store.arena)


def test_a_rebuild_drops_a_damaged_record() -> None:
    with Store(memory=2**18, check_period=None) as store:
        content = filled(store, 20)
        arena: Any = store.arena
        slot = arena.find(key_of(b"7"))
        block = arena.cells[arena.table.record + slot] & (2**32 - 1)
        where = arena.table.run_head(block) * CELL + 60
        arena.file.memory[where : where + 4] = b"oops"
        arena.cells[arena.table.version + arena.find(key_of(b"9"))] += 1  # as if a writer had stopped there
        assert store.move() == 1
        del content["7"]
        assert store.all() == content
        verify(store.arena)


def test_an_unused_store_is_resized(manage: Start, store_dir: Path) -> None:
    first = manage("shop", max=100)
    first.start()
    store = first.store()
    filled(store, 100)
    order, content = store.ids(), store.all()
    store.close()
    first.shutdown()
    for options in ({"memory": 2**21, "max": 5000}, {"memory": 2**20}, {"memory": 2**16}):
        manager = manage("shop", **options)
        manager.start()
        with manager.store() as store:
            found = store.ids()
            assert found == kept(order, len(found))
            assert len(found) == 100 or options["memory"] == 2**16
            assert store.all() == {sid: content[sid] for sid in found}
            geometry = Options.of(**{"memory": 2**20, **options}).geometry
            assert abs(store.arena.geometry.size - geometry.size) < 2**16
            verify(store.arena)
        manager.shutdown()
    assert 10 < len(found) < 100
    assert not [path for path in (store_dir / "shop").iterdir() if path.name.startswith(TEMPORARY)]


@pytest.mark.parametrize("options", [{}, {"max": 20_000}])
def test_a_start_without_a_size_keeps_the_size(
    options: dict[str, int], manage: Start, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """For example, a cron job without options may be the first to start a stopped store."""
    with manage(memory=2**27, max=100) as manager, manager.store() as store:
        content = filled(store, 100)
    with StoreManager("shop", directory=store_dir, **options) as manager, manager.store() as store:
        assert store.arena.geometry.size > 2**27 * 0.99
        assert store.arena.geometry.slots >= options.get("max", 0)
        assert store.all() == content
    assert "WARNING" not in capfd.readouterr().err
    with manage(memory=2**16) as manager, manager.store() as store:
        left = len(store)
    assert left < 100
    assert "[WARNING]" in (said := capfd.readouterr().err)
    assert f"{100 - left} sessions dropped for lack of space" in said


def test_a_store_in_use_keeps_its_size(manage: Start, store_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = manage("shop")
    first.start()
    store = first.store()
    filled(store, 50)
    first.shutdown()
    second = manage("shop", memory=2**22)
    second.start()
    assert len(store) == len(second.store()) == 50
    assert store.arena.geometry == Geometry.plan(2**20)
    assert "keeps the memory" in (said := capfd.readouterr().err)
    assert f"`fuser {store_dir}/shop/arena` lists them" in said
    store.close()


def differs(cells: Any, before: list[int]) -> bool:
    return list(cells) != before


def test_a_rebuild_under_writers_loses_no_acknowledged_write(store_dir: Path) -> None:
    path = str(store_dir / "arena")
    keys = 40
    with open(path + ".acknowledged", "w+b") as file:
        file.truncate(2 * 8 * keys)
        acknowledged = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
    arena = Arena.create(path, Geometry.plan(2**24))
    with Store.over(arena, Options.of(recency=0, lock_timeout=stress_child.PATIENCE)) as store:
        store.change_options(store.options)
        child = subprocess.Popen(
            [sys.executable, stress_child.__file__, "acknowledging", path, "1", str(keys), "100", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            for _ in range(20):
                before = list(acknowledged)
                wait_until(partial(differs, acknowledged, before))
                assert store.move() == 0
        finally:
            child.kill()
            output, _ = child.communicate()
        assert not output, output
        verify(store.arena)
        for key in range(keys):
            tried, done = acknowledged[2 * key], acknowledged[2 * key + 1]
            session = store.get(str(key))
            found = 0 if session is None else session["sequence"]
            assert found in {max(0, tried), max(0, done)}
            assert session is None or stress_child.is_whole(session)
        store.set("after", {"n": 1}, ttl=math.inf)
        assert store.get("after") == {"n": 1}


def test_a_rebuild_of_a_private_store_loses_no_write_of_its_threads() -> None:
    moves = 30
    done: list[int] = []
    with Store(memory=2**18, check_period=None) as store:

        def write(name: str) -> None:
            sequence = 0
            while len(done) < moves:
                sequence += 1
                store.set(name, {"n": sequence})
                assert store.get(name) == {"n": sequence}
            ended.append(name)

        ended: list[str] = []
        threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for number in range(moves):
            assert store.move() == 0
            done.append(number)
        for thread in threads:
            thread.join()
        assert sorted(ended) == ["a", "b", "c"]
        verify(store.arena)


def test_an_update_prepared_on_the_old_file_is_not_written_to_the_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Store(memory=2**16, check_period=None) as store:
        store.set("a", {})
        store.set("a", {})
        merge = Codec.merge

        def overtaken(*arguments: Any) -> bytes:
            monkeypatch.undo()
            slot = store.arena.find(key_of(b"a"))
            version = store.arena.cells[store.arena.table.version + slot]
            store.move()
            store.update("a", {"theirs": 1})
            # By chance all numbers are equal: only the file differs.
            assert store.arena.find(key_of(b"a")) == slot
            assert store.arena.cells[store.arena.table.version + slot] == version
            return merge(*arguments)

        monkeypatch.setattr(Codec, "merge", overtaken)
        store.update("a", {"ours": 1})
        assert store.get("a") == {"theirs": 1, "ours": 1}


def test_a_closed_store_is_unavailable_after_a_rebuild(store_dir: Path) -> None:
    path = store_dir / "arena"
    with Store.over(Arena.create(path, Geometry.plan(2**16)), Options.of(memory=2**16)) as store:
        store.change_options(store.options)
        Arena.open(path).mark_closed()
        for _ in range(2):
            for call in (lambda: store.get("a"), lambda: store.set("a", {}), store.ids):
                with pytest.raises(StoreUnavailable, match="no longer in use"):
                    call()


@pytest.mark.usefixtures("hurried_servers")
def test_a_manager_finds_its_recreated_store(manage: Start, store_dir: Path) -> None:
    manager = manage()
    manager.start()
    assert isinstance(manager, StoreManager)
    shutil.rmtree(store_dir / "shop")
    wait_until((store_dir / "shop" / "socket").exists)
    assert manager.store().ping() is True


def test_a_process_that_reopens_at_its_first_read_counts_in_the_new_file(store_dir: Path) -> None:
    """The read is of an invalid id, so nothing else has made the process reopen the file before it counts."""
    path = str(store_dir / "arena")
    options = Options.of(memory=2**18, check_period=None)
    with Store.over(Arena.create(path, Geometry.plan(2**18)), options) as store:
        store.publish_options()
        store.set("x", {})
        told, tell = os.pipe()
        attached, said = os.pipe()
        child = os.fork()
        if not child:
            try:
                other = Store.over(Arena.open(path), options)
                os.write(said, b"x")
                os.read(told, 1)
                other.get("")
            finally:
                os._exit(0)
        os.read(attached, 1)
        for _ in range(100):
            store.get("x")
        store.move()
        os.write(tell, b"x")
        os.waitpid(child, 0)
        assert (store.stats().hits, store.stats().misses) == (100, 1)
        for descriptor in (told, tell, attached, said):
            os.close(descriptor)
    Path(path).unlink()
