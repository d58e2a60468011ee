"""Snapshots: their content, when they are saved and by which process, and how they are restored."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import snapshot_child
import stress_child
from browsing import Clock
from processes import ROOT, Run, Start, stop, wait_for

from shmstore import ConfigError, SnapshotError, Store, StoreManager, connect, snapshot
from shmstore.codec.ids import require_key
from shmstore.contract import AnyStore
from shmstore.engine.arena import Arena
from shmstore.engine.header import DESTROYED, MAX, SETS
from shmstore.engine.layout import Geometry
from shmstore.engine.verify import verify
from shmstore.ipc.directory import StoreFiles
from shmstore.listing import has_arena
from shmstore.options import Options
from shmstore.server.snapshots import Snapshots
from shmstore.store import endpoint
from shmstore.testing import wait_until
from shmstore.transfer import copy, snapshot_file
from shmstore.transfer.copy import Progress, quiet

GEOMETRY = Options.of(memory=2**20).geometry
FULL = os.environ.get("SHMSTORE_FULL") == "1"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.snapshot"


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A wall clock that advances only when it is set; each read of the boot id returns another boot."""
    clock = Clock()
    monkeypatch.setattr(snapshot_file.time, "time_ns", clock)  # type: ignore[attr-defined]
    monkeypatch.setattr(snapshot_file, "boot_id", lambda: os.urandom(16))
    return clock


@pytest.fixture
def other() -> Iterator[Store]:
    """Another store, with the clock of a machine that was started ten seconds ago."""
    clock = Clock()
    clock.now = 10 * 10**9
    with Store(memory=2**20, clock=clock, check_period=None, recency=0) as store:
        yield store


def fill(store: Any, count: int = 40) -> dict[str, Any]:
    for number in range(count):
        store.set(str(number), {"n": number, "x": "y" * (50 * (number % 20))}, 600, owner="ada" if number % 3 else None)
    content: dict[str, Any] = store.all()
    return content


def test_a_snapshot_restores_everything(store: Store, other: Store, clock: Clock, path: Path, wall: Clock) -> None:
    content = fill(store)
    store.set("for ever", {"ö": ("ü", 1)}, math.inf, owner="bób")
    clock.tick(100)
    store.get("5")
    store.set("expired", {}, 0)
    order = [sid for sid in store.ids() if sid != "expired"]
    steps: list[tuple[int, int]] = []
    assert snapshot.save(store, path, lambda *step: steps.append(step)) == 41
    assert (path.stat().st_mode & 0o777, os.listdir(path.parent)) == (0o600, [path.name])
    assert steps[-1] == (41, 41)
    assert snapshot.load(other, path) == 41
    assert other.all() == content | {"for ever": {"ö": ("ü", 1)}}
    assert other.ids() == order
    assert sorted(other.owned_by("ada")) == sorted(store.owned_by("ada"))
    assert other.owned_by("bób") == ["for ever"]
    verify(other.arena)
    # Created before the machine started, with 500 of 600 seconds left.
    loaded = other.load("7")
    assert loaded is not None
    assert (round(loaded.created), round(loaded.remaining)) == (100, 500)
    assert other.rename("7", "renamed")
    assert round(getattr(other.load("renamed"), "created", 0)) == 100
    forever = other.load("for ever")
    assert forever is not None
    assert forever.remaining == math.inf


def test_a_new_arena_starts_with_the_snapshot(store: Store, path: Path) -> None:
    content, order = fill(store), store.ids()
    snapshot.save(store, path)
    arena = Arena.create(None, store.arena.geometry)
    assert snapshot.restore(arena, path) == 40
    verify(arena)
    assert arena.cells[SETS] == 0
    with Store.over(arena, Options.of(memory=2**20)) as other:
        other.publish_options()
        assert other.all() == content
        assert other.ids() == order
        other.set("new", {})
        assert other.ids()[0] == "new"
        assert other.destroy_owned("ada") == 26
        verify(arena)


def test_a_restore_reports_progress(store: Store, path: Path) -> None:
    for number in range(2100):
        store.set(str(number), {})
    assert snapshot.save(store, path) == 2100
    for restore in (False, True):
        signs: list[tuple[int, int]] = []
        with Store.over(Arena.create(None, store.arena.geometry), Options.of()) as other:
            assert put(path, other, restore, lambda *sign: signs.append(sign)) == 2100  # noqa: B023
        assert signs[:3] == [(0, 2100)] * 3


def test_time_passes_while_the_store_is_down(store: Store, other: Store, path: Path, wall: Clock) -> None:
    fill(store, 3)
    store.set("short", {}, 60)
    snapshot.save(store, path)
    wall.tick(100)
    assert snapshot.load(other, path) == 3
    assert [round(getattr(other.load(str(number)), "remaining", 0)) for number in range(3)] == [500] * 3


def test_a_clock_set_back_extends_no_deadline(store: Store, other: Store, path: Path, wall: Clock) -> None:
    fill(store, 3)
    snapshot.save(store, path)
    wall.tick(-10_000)
    assert snapshot.load(other, path) == 3
    assert [round(getattr(other.load(str(number)), "remaining", 0)) for number in range(3)] == [600] * 3


def put(path: Path, store: Store, restore: bool, progress: Progress = quiet) -> int:
    """Load a snapshot into a store that has not started yet, or is in use."""
    return snapshot.restore(store.arena, path, progress) if restore else snapshot.load(store, path, progress)


def loaded(path: Path) -> int:
    """Return the number of live sessions in a snapshot."""
    with Store(memory=2**16) as store:
        return snapshot.load(store, path)


@pytest.mark.parametrize("restore", [False, True])
def test_sessions_are_dropped_if_not_all_fit(
    restore: bool, store: Store, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, 200)
    order = store.ids()
    snapshot.save(store, path)
    for size, most in ((2**20, 50), (2**16, 0), (2**16 + 300, 0), (2**16 + 5000, 0)):
        arena = Arena.create(None, Geometry.plan(size))
        arena.cells[MAX] = most
        with Store.over(arena, Options.of(memory=size)) as other:
            count = put(path, other, restore)
            worth = sorted(order, key=lambda sid: int(sid) % 3 == 0)  # sessions with an owner first
            assert other.ids() == [sid for sid in order if sid in worth[:count]]
            assert count == most or (most == 0 and 2 < count < 100)
            verify(arena)
        assert f"{200 - count} of 200 sessions in " in caplog.text


@pytest.mark.parametrize("how", ["restore", "load", "move"])
def test_sessions_without_an_owner_are_dropped_first_if_not_all_fit(how: str, path: Path) -> None:
    with Store(memory=2**21, check_period=None) as store:
        for number in range(20):
            store.set(f"user{number}", {}, owner="ada" if number % 2 else "bob")
        store.set("expired", {}, 0, owner="ada")
        for number in range(1000):
            store.set(str(number), {"x": "y" * 500})
        order = [sid for sid in store.ids() if sid != "expired"]
        snapshot.save(store, path)
        if how == "move":
            store.move(Geometry.plan(2**18))
            arena = store.arena
        else:
            arena = Arena.create(None, Geometry.plan(2**18))
            put(path, Store.over(arena, Options()), restore=how == "restore")
        with contextlib.nullcontext(store) if how == "move" else Store.over(arena, Options()) as other:
            verify(arena)
            assert len(other.owned_by("ada")) == len(other.owned_by("bob")) == 10
            strangers = len(other) - 20
            assert 50 < strangers < 500
            assert other.ids() == order[:strangers] + order[-20:]


def test_a_store_takes_its_own_snapshot_whatever_max_says(path: Path) -> None:
    """Small sessions: the free blocks of an empty store are in one piece, so that none takes more than it needs."""
    options: dict[str, Any] = {"memory": 2**20, "max": 100_000, "check_period": None}
    with Store(**options) as store, Store(**options) as other:
        for number in range(store.arena.geometry.blocks // 5):
            store.set(f"{number}", {})
        assert store.stats().evicted == 0
        snapshot.save(store, path)
        assert snapshot.load(other, path) == len(store)
        assert other.all() == store.all()


def test_scattered_room_is_not_overestimated(path: Path, seed: int) -> None:
    """What is chosen fits: the sessions that are left out are the least recently used."""
    choices = random.Random(seed)
    with Store(memory=2**20, check_period=None) as store, Store(memory=2**19, check_period=None) as other:
        for number in range(3000):
            store.set(f"new {number}", {"data": bytes(choices.randrange(2000))})
        order = store.ids()
        snapshot.save(store, path)
        for number in range(1000):
            other.set(f"old {number}", {"data": bytes(choices.randrange(2000))})
        other.destroy(choices.sample(other.ids(), len(other) // 2))
        kept = set(other.ids())
        count = snapshot.load(other, path)
        verify(other.arena)
        assert set(other.ids()) == kept | set(order[:count])
        assert 0 < count < len(order)


def test_sessions_already_in_the_store_need_no_room(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Store(memory=2**20, max=100, check_period=None) as store:
        content = fill(store, 90)
        snapshot.save(store, path)
        store.arena.cells[MAX] = 45  # no room for another session; and no session is missing
        assert snapshot.load(store, path) == 0
        store.arena.cells[MAX] = 100
        for number in range(10):  # the most recently used ones: the rest of the snapshot must not rank before them
            store.arena.drop(store.arena.find(require_key(str(number))), DESTROYED)
        assert snapshot.load(store, path) == 10
        assert store.all() == content
    assert not caplog.records


@pytest.mark.parametrize("damaged", [20, 21, 40])
def test_a_mostly_damaged_store_does_not_replace_its_snapshot(
    damaged: int, store: Store, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store)
    snapshot.save(store, path)
    before, arena = path.read_bytes(), store.arena
    for slot in arena.table.live_slots()[:damaged]:
        arena.cells[arena.table.record + slot] -= 1 << 32  # a byte shorter than its checksum covers
    text = f"{damaged} of 40 sessions are damaged, and cannot be saved"
    if damaged > 20:
        with pytest.raises(SnapshotError, match=f"{text}: the snapshot before stays"):
            snapshot.save(store, path)
        assert path.read_bytes() == before
    else:
        assert snapshot.save(store, path) == 20
        assert text in caplog.text


def test_weights_are_kept(path: Path) -> None:
    with Store(memory=2**20, check_period=None, max=1000, length=lambda size, sid: int(sid)) as store:
        for number in range(1, 20):
            store.set(str(number), {})
        snapshot.save(store, path)
    arena = Arena.create(None, Geometry.plan(2**20))
    arena.cells[MAX] = 19 + 18 + 17
    snapshot.restore(arena, path)
    with Store.over(arena, Options.of(memory=2**20)) as other:
        assert other.ids() == ["19", "18", "17"]
        verify(arena)


def test_a_store_in_use_keeps_what_it_has(
    store: Store, clock: Clock, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (copy, endpoint, snapshot_file):  # the clock of the host advances with the store's
        monkeypatch.setattr(module, "boottime_ns", clock)
    fill(store, 10)
    snapshot.save(store, path)
    store.set("3", {"newer": True})
    store.destroy("4", tombstone=True)  # by a logout of its user
    store.rename("5", "rotated", tombstone=True)
    store.clear()
    store.set("3", {"newer": True})
    store.set("mine", {})
    assert snapshot.load(store, path) == 7
    assert store.get("3") == {"newer": True}
    assert "4" not in store
    assert "5" not in store
    assert store.get("6") == {"n": 6, "x": "y" * 300}
    clock.tick(29)
    assert snapshot.load(store, path) == 0
    clock.tick(2)
    assert snapshot.load(store, path) == 2
    assert "4" in store
    verify(store.arena)


def test_the_later_of_two_records_with_one_id_is_loaded(store: Store, other: Store, path: Path) -> None:
    """During a save, a session may be destroyed and another one created under its id."""
    fill(store, 300)

    def overtake(done: int, _: int) -> None:
        if 0 < done < 200 and store.get("5") != {"again": True}:
            store.destroy(["5", "200"])
            store.set("5", {"again": True})

    assert snapshot.save(store, path, overtake) == 300
    assert snapshot.load(other, path) == 299
    assert other.get("5") == {"again": True}
    arena = Arena.create(None, Geometry.plan(2**20))
    assert snapshot.restore(arena, path) == 299
    with Store.over(arena, Options.of(memory=2**20)) as restored:
        assert restored.get("5") == {"again": True}
        verify(arena)
    verify(other.arena)


# -- files that are not snapshots ----------------------------------------------------------------------------


def flip(data: bytearray, rnd: random.Random) -> None:
    data[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)


def truncate(data: bytearray, rnd: random.Random) -> None:
    del data[rnd.randrange(len(data)) :]


def cut_out(data: bytearray, rnd: random.Random) -> None:
    at = rnd.randrange(len(data) - 1)
    del data[at : at + rnd.randrange(1, 500)]


def overwrite(data: bytearray, rnd: random.Random) -> None:
    at = rnd.randrange(len(data) - 1)
    part = rnd.randbytes(min(rnd.randrange(1, 100), len(data) - at))
    data[at : at + len(part)] = part if data[at : at + len(part)] != part else bytes(byte ^ 1 for byte in part)


def insert(data: bytearray, rnd: random.Random) -> None:
    at = rnd.randrange(len(data) + 1)
    data[at:at] = rnd.randbytes(rnd.randrange(1, 100))


@pytest.mark.parametrize("damage", [flip, truncate, cut_out, overwrite, insert])
def test_a_damaged_snapshot_is_refused_as_a_whole(
    damage: Callable[[bytearray, random.Random], None], store: Store, other: Store, path: Path, seed: int
) -> None:
    fill(store, 20)
    snapshot.save(store, path)
    whole, rnd = path.read_bytes(), random.Random(seed)
    other.set("before", {})
    for _ in range(1000 if FULL else 100):
        data = bytearray(whole)
        damage(data, rnd)
        path.write_bytes(data)
        with pytest.raises(SnapshotError, match=r"is damaged at|is not a snapshot"):
            snapshot.load(other, path)
        assert other.ids() == ["before"]
    path.write_bytes(whole)
    assert snapshot.load(other, path) == 20


def test_a_snapshot_of_another_version_is_refused_by_name(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(snapshot_file, "_VERSION", 2)
        snapshot.save(store, path)
    with pytest.raises(SnapshotError, match="a snapshot of version 2, this is version 1"):
        snapshot.load(store, path)


def test_a_snapshot_describes_its_content(store_dir: Path, path: Path, wall: Clock) -> None:
    wall.now = 10**18
    os.mkdir(store_dir / "shop")
    with Store.over(Arena.create(store_dir / "shop" / "arena", GEOMETRY), Options.of()) as shop:
        shop.publish_options()
        fill(shop, 3)
        snapshot.save(shop, path)
    wall.tick(90)
    assert snapshot.describe(path) == ("shop", 3, 90)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match="damaged"):
        snapshot.describe(path)


def test_max_per_owner_limits_the_restored_sessions(path: Path) -> None:
    with Store(memory=2**20, recency=0) as store:
        for number in range(6):
            store.set(f"a{number}", {}, owner="ada")
            store.set(f"b{number}", {}, owner="bob")
            store.set(f"n{number}", {})
        store.get("a1")
        snapshot.save(store, path)
    with Store(memory=2**20, max_per_owner=3) as other:
        other.set("here", {}, owner="bob")
        assert snapshot.load(other, path) == 3 + 2 + 6
        assert other.owned_by("ada") == ["a1", "a5", "a4"]
        assert other.owned_by("bob") == ["here", "b5", "b4"]
        verify(other.arena)


def test_loading_a_missing_snapshot_is_an_error(store: Store, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        snapshot.load(store, path)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.chmod(0o620),
        lambda path: path.chmod(0o602),
        lambda path: path.rename(path.with_name("real")) and path.symlink_to("real"),
        fifo,
        lambda path: path.unlink() or path.mkdir(),
        lambda path: os.chown(path, 12345, 12345) if os.geteuid() == 0 else path.chmod(0o666),
    ],
    ids=["group", "others", "link", "fifo", "directory", "another user's"],
)
def test_a_snapshot_writable_by_others_is_refused(
    make: Callable[[Path], object], store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, 3)
    snapshot.save(store, path)
    make(path)
    with pytest.raises(SnapshotError, match=r"only this user can write|cannot be opened"):
        snapshot.load(store, path)


@pytest.mark.parametrize("content", [b"my thesis", b"s"])
def test_a_file_that_is_not_a_snapshot_is_not_replaced(content: bytes, store: Store, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match="is not a snapshot, so it is not replaced"):
        snapshot.save(store, path)
    assert path.read_bytes() == content
    assert snapshot_file.set_aside(str(path), "") is None
    path.write_bytes(b"")
    snapshot.save(store, path)


def test_foreign_files_with_its_derived_names_are_kept(store: Store, path: Path) -> None:
    mine = [Path(f"{path}{ending}") for ending in (".new", ".refused", ".refused.2")]
    for file in mine:
        file.write_bytes(b"my thesis")
    with pytest.raises(SnapshotError, match=r"\.new is in the way: move or remove it"):
        snapshot.save(store, path)
    path.write_bytes(b"shmsaved, damaged")
    assert snapshot_file.set_aside(str(path), "") == f"{path}.refused.3"
    assert [file.read_bytes() for file in mine] == [b"my thesis"] * 3
    assert Path(f"{path}.refused.3").read_bytes() == b"shmsaved, damaged"


@pytest.mark.parametrize("begin", [b"\0" * 44, b"shmsaved", b""])
def test_a_leftover_temporary_file_is_reused(begin: bytes, store: Store, path: Path) -> None:
    Path(f"{path}.new").write_bytes(begin and begin + b"x" * 10**6)
    fill(store, 3)
    assert snapshot.save(store, path) == 3
    assert os.listdir(path.parent) == [path.name]
    assert loaded(path) == 3
    assert path.stat().st_mode & 0o777 == 0o600


def test_concurrent_saves_do_not_interfere(store: Store, path: Path) -> None:
    fill(store, 3)

    def save_too(*_: int) -> None:
        with pytest.raises(SnapshotError, match="is being written by another process"):
            snapshot.save(store, path)

    assert snapshot.save(store, path, save_too) == 3


def test_a_save_needs_no_lock(store: Store, path: Path) -> None:
    fill(store)
    locked, over = threading.Event(), threading.Event()

    def hold() -> None:
        try:
            store.arena.lock(2.0)
            locked.set()
            over.wait(60)
        finally:
            store.arena.unlock()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert locked.wait(60)
        assert snapshot.save(store, path) == 40
    finally:
        over.set()
        thread.join()


def test_a_failed_save_leaves_no_file(store: Store, path: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot be written: No such file or directory"):
        snapshot.save(store, path / "nowhere")

    def fail(*_: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        snapshot.save(store, path, fail)
    assert os.listdir(path.parent) == []


def test_a_store_rebuilt_during_a_save_is_saved_from_its_current_file(store: Store, other: Store, path: Path) -> None:
    fill(store, 300)
    store.destroy(str(number) for number in range(100))  # so that the others have other positions there
    content = store.all()
    moved: list[int] = []

    def overtake(done: int, _: int) -> None:
        if done == 128 and not moved:
            moved.append(1)
            store.move(Geometry.plan(2**21))

    assert snapshot.save(store, path, overtake) == 200
    assert snapshot.load(other, path) == 200
    assert other.all() == content


# -- under load ----------------------------------------------------------------------------------------------


def test_each_session_in_a_snapshot_is_whole(store_dir: Path, path: Path, figure: Callable[[str], None]) -> None:
    arena_path = str(store_dir / "arena")
    keys, writers, times = (20_000, 4, 10) if FULL else (600, 3, 4)
    options = Options.of(lock_timeout=stress_child.PATIENCE)
    with Store.over(Arena.create(arena_path, Geometry.plan(keys * 4096)), options) as store:
        store.publish_options()
        for key in range(keys):
            store.set(str(key), snapshot_child.session_of(key, 0, 500))
        share = keys // writers
        processes = [
            subprocess.Popen(
                [sys.executable, snapshot_child.__file__, "writing", arena_path, str(share * number),
                 str(share * (number + 1)), "1500"],
                stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ROOT},
            )
            for number in range(writers)
        ]  # fmt: skip
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "begun\n"
            took: list[float] = []
            changed = 0
            while len(took) < times or changed < 100:  # on a busy machine the writers may hardly run meanwhile
                assert all(process.poll() is None for process in processes)
                begun = time.monotonic()
                assert snapshot.save(store, path) == keys
                took.append(time.monotonic() - begun)
                with Store.over(Arena.create(None, store.arena.geometry), Options.of()) as other:
                    assert snapshot.restore(other.arena, path) == keys
                    saved = other.all()
                torn = [sid for sid, session in saved.items() if not snapshot_child.is_whole(sid, session)]
                assert not torn
                assert len(saved) == keys
                changed = sum(session["a"] > 0 for session in saved.values())
            for process in processes:
                process.terminate()
            said = [process.communicate(timeout=300)[0].split() for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
        verify(store.arena)
    assert all(process.returncode == 0 for process in processes)
    changes = sum(int(number) for number, _ in said)
    slowest = max(float(milliseconds) for _, milliseconds in said)
    figure(f"{len(took)} snapshots of {keys} in {max(took):.2f} s, {changes} changes beside, {slowest:.1f} ms at most")


# -- by the server -------------------------------------------------------------------------------------------


def forget(store_dir: Path) -> None:
    """Do what a reboot does."""
    shutil.rmtree(store_dir / "shop", ignore_errors=True)


@pytest.mark.parametrize("persist", [True, False])
def test_a_store_survives_a_reboot(
    persist: bool, manage: Start, store_dir: Path, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with manage(snapshot=path, persist=persist) as manager, manager.store() as store:
        content, order = fill(store), store.ids()
    assert (store_dir / "shop").exists() == persist
    forget(store_dir)
    with manage(snapshot=path, persist=persist, memory=2**21) as manager, manager.store() as store:
        assert store.all() == content
        assert store.ids() == order
        assert len(store.owned_by("ada")) == 26
        verify(store.arena)
        assert store.prune() == 0
    log = capfd.readouterr().err
    assert "saved 40 sessions" in log
    assert "restored 40 sessions from" in log
    assert "ERROR" not in log


def test_existing_memory_takes_precedence_over_the_snapshot(manage: Start, path: Path) -> None:
    with manage(snapshot=path) as manager, manager.store() as store:
        fill(store)
    with manage() as manager, manager.store() as store:
        store.clear()
        store.set("new", {})
    with manage(snapshot=path) as manager, manager.store() as store:
        assert store.all() == {"new": {}}


def test_changed_sessions_are_saved_periodically(manage: Start, path: Path) -> None:
    with manage(snapshot=path, snapshot_period=0.05) as manager, manager.store() as store:
        wait_until(path.exists)
        store.set("a", {})
        before = path.stat()
        wait_until(lambda: path.stat().st_ino != before.st_ino or path.stat().st_size != before.st_size)
        wait_until(lambda: loaded(path) == 1)
        same = path.stat()
        time.sleep(0.5)
        assert path.stat().st_mtime_ns == same.st_mtime_ns
        path.unlink()
        wait_until(path.exists)  # also without changes, if the file is missing
        store.destroy("a")
        wait_until(lambda: loaded(path) == 0)


@pytest.mark.parametrize("period", [None, 0.05])
def test_a_first_start_without_the_option_keeps_the_snapshot(
    period: float | None, manage: Start, store_dir: Path, path: Path
) -> None:
    with manage(snapshot=path) as manager, manager.store() as store:
        content = fill(store)
    forget(store_dir)
    with manage() as cron, cron.store() as store:
        store.set("new", {})
        with manage(snapshot=path, snapshot_period=period) as manager:
            wait_until(lambda: len(store) == 41)
            assert store.all() == content | {"new": {}}
    assert snapshot_count(path) == 41


def test_a_start_after_one_without_the_option_keeps_the_snapshot(manage: Start, store_dir: Path, path: Path) -> None:
    with manage(snapshot=path) as manager, manager.store() as store:
        content = fill(store)
    forget(store_dir)
    with manage() as cron, cron.store() as store:
        store.set("new", {})
    with manage(snapshot=path) as manager, manager.store() as store:
        wait_until(lambda: len(store) == 41)
        assert store.all() == content | {"new": {}}
    assert snapshot_count(path) == 41


def test_a_snapshot_is_loaded_once(manage: Start, store_dir: Path, path: Path) -> None:
    """Otherwise sessions that were ended since then would be restored."""
    other = path.with_name("other.snapshot")
    with manage(snapshot=path) as manager, manager.store() as store:
        fill(store)
    shutil.copy(path, other)
    saved = path.read_bytes()
    forget(store_dir)
    with manage(snapshot=path) as manager, manager.store() as store:
        store.clear()
        manager.apply(snapshot=str(other))
        wait_until(lambda: len(store) == 40)
        store.clear()
        manager.apply(snapshot=str(path))
    assert snapshot_count(path) == 0
    path.write_bytes(saved)  # as if the server had been killed before it saved
    with manage() as manager, manager.store() as store:
        assert len(store) == 0
    with manage(snapshot=path) as manager, manager.store() as store:
        store.set("new", {})
    assert snapshot_count(path) == 1


@pytest.mark.parametrize("place", ["nowhere/shop.snapshot", "", "locked/shop.snapshot"])
def test_an_unusable_path_is_reported_at_once(
    place: str, manage: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(0o500)
    why = {"n": "there is no directory", "": "is a directory", "l": "cannot be written in"}[place[:1]]
    with manage(persist=False, snapshot=str(tmp_path / place), snapshot_period=None) as manager:
        assert len(manager.store()) == 0
        said = capfd.readouterr().err
        if place[:1] != "l" or os.geteuid():
            assert said.count("no snapshot can be saved") == 1
            assert why in said
        else:
            assert "no snapshot can be saved" not in said  # root may


def test_another_path_that_is_unusable_is_refused_and_the_previous_one_stays(manage: Start, path: Path) -> None:
    with manage(snapshot=path) as manager, manager.store() as store:
        with pytest.raises(ConfigError, match="no snapshot can be saved: there is no directory"):
            manager.apply(snapshot="/nowhere/shop.snapshot", max=2)
        fill(store)
        assert len(store) == 40
    assert snapshot_count(path) == 40


def test_a_missing_snapshot_is_logged(manage: Start, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with manage(snapshot=path) as manager, manager.store():
        assert f"there is no snapshot at {path} yet" in capfd.readouterr().err


def test_a_damaged_snapshot_named_later_is_set_aside(manage: Start, path: Path) -> None:
    path.write_bytes(b"shmsaved but not whole")
    with manage() as manager, manager.store() as store:
        store.set("new", {})
        manager.apply(snapshot=str(path))
    assert Path(f"{path}.refused").read_bytes() == b"shmsaved but not whole"
    assert snapshot_count(path) == 1


@pytest.mark.parametrize("period", [None, 0.05])
def test_a_failed_save_is_retried(
    period: float | None, manage: Start, store_dir: Path, tmp_path: Path, logged: Callable[[], str]
) -> None:
    """It is retried periodically, or once before the server exits, although nothing has changed."""
    place = tmp_path / "disk"
    place.mkdir()
    path = place / "shop.snapshot"
    manager, other = manage(snapshot=path, snapshot_period=period), manage()
    with manager.store() as store:
        other.start()
        place.rename(tmp_path / "away")
        store.set("a", {})  # not earlier: the snapshot would be saved at once, and nothing would be left to retry
        if period is None:
            other.detach()  # asks for it to be saved
        wait_until(lambda: "was not saved" in logged())
        place.mkdir()
        if period is not None:
            wait_until(path.exists)
    other.detach()
    manager.detach()
    wait_for(lambda: StoreFiles.of("shop", store_dir).server() is None, "its end")
    assert snapshot_count(path) == 1


def test_a_failing_save_does_not_keep_the_server_running(manage: Start, store_dir: Path, tmp_path: Path) -> None:
    manager = manage(snapshot=tmp_path / "nowhere" / "shop.snapshot")
    with manager.store() as store:
        store.set("a", {})
    manager.detach()
    wait_for(lambda: StoreFiles.of("shop", store_dir).server() is None, "its end")


def test_snapshot_options_can_be_changed_live(manage: Start, path: Path) -> None:
    with manage() as manager, manager.store() as store:
        store.set("a", {})
        manager.apply(snapshot=str(path), snapshot_period=0.05)
        wait_until(path.exists)
        manager.apply()
        path.unlink()
        store.set("b", {})
    assert not path.exists()


def test_an_unused_server_saves_before_it_exits(run: Run, store_dir: Path, path: Path) -> None:
    code = """
import sys
from shmstore import StoreManager
store = StoreManager("shop", directory=sys.argv[1], snapshot=sys.argv[2], memory=2**20).store()
store.set("a", {"n": 1})
"""
    assert run(code, store_dir, path).wait(30) == 0
    wait_for(lambda: StoreFiles.of("shop", store_dir).server() is None, "its end")
    assert loaded(path) == 1


def test_detaching_saves_the_snapshot(manage: Start, store_dir: Path, path: Path) -> None:
    """As Gunicorn does: as PID 1 of a container nothing of it is left a moment later."""
    manager = manage(snapshot=path)
    with manager.store() as store, connect("shop", directory=store_dir) as another:
        store.set("a", {})
        manager.detach()
        assert loaded(path) == 1
        another.set("b", {})
    wait_for(lambda: StoreFiles.of("shop", store_dir).server() is None, "its end")
    assert loaded(path) == 2


def test_a_damaged_snapshot_is_set_aside_and_the_store_starts_empty(
    manage: Start, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with manage(snapshot=path, persist=False) as manager, manager.store() as store:
        fill(store)
    data = path.read_bytes()[:-5]
    path.write_bytes(data)
    with manage(snapshot=path, persist=False) as manager, manager.store() as store:
        assert len(store) == 0
        store.set("new", {})
    assert Path(f"{path}.refused").read_bytes() == data
    assert loaded(path) == 1
    log = capfd.readouterr().err
    assert log.count("[ERROR]") == 1
    assert "begins without its snapshot" in log
    assert "is damaged at its end, so nothing of it is used; it is kept as" in log


def test_the_snapshot_of_another_store_is_neither_read_nor_replaced(
    manage: Start, store_dir: Path, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with manage(snapshot=path).store() as store:
        store.set("a", {"shop": True})
        snapshot.save(store, path)
    before = path.read_bytes()
    other = StoreManager("other", directory=store_dir, memory=2**20, snapshot=path, persist=False)
    other.start()
    try:
        with other.store() as store:
            assert store.ids() == []
            store.set("b", {"other": True})
            with pytest.raises(SnapshotError, match="is the snapshot of store 'shop', so it is not replaced"):
                snapshot.save(store, path)
            assert snapshot.load(store, path) == 1  # an explicit request loads it
            with pytest.raises(SnapshotError, match="give each store a file of its own"):
                snapshot.load(store, path, of="other")
    finally:
        other.shutdown()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    said = capfd.readouterr().err
    assert f"begins without its snapshot: {path} is the snapshot of store 'shop'" in said
    assert "the snapshot was not saved" in said


def test_the_server_leaves_a_file_that_is_not_a_snapshot_alone(
    manage: Start, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(b"my thesis" * 100)
    with manage(snapshot=path, snapshot_period=0.05, persist=False) as manager, manager.store() as store:
        for number in range(5):
            store.set(str(number), {})
            time.sleep(0.1)
    assert path.read_bytes() == b"my thesis" * 100
    assert os.listdir(path.parent) == [path.name]
    log = capfd.readouterr().err
    assert log.count("is not a snapshot of a store") == log.count("is not a snapshot, so it is not replaced") == 1


def test_a_save_that_is_killed_leaves_the_previous_snapshot(
    manage: Start, path: Path, figure: Callable[[str], None]
) -> None:
    kills, counts = (30 if FULL else 5), []
    unfinished = Path(f"{path}.new")

    def is_saving(store: AnyStore) -> bool:
        store.set("0", {"changed": time.monotonic()})  # a save may begin and end unseen: then another one follows
        return unfinished.exists()

    def is_stopped_while_saving(store: AnyStore, pid: int) -> bool:
        if is_saving(store):
            stop(pid)
            if unfinished.exists():
                return True
            os.kill(pid, signal.SIGCONT)
        return False

    with manage(snapshot=path, snapshot_period=0.01, memory=2**23) as manager, manager.store() as store:
        for number in range(3000):
            store.set(str(number), {"x": "y" * 700}, 600)
        wait_until(path.exists)
        store.set("0", {"n": 0})
        wait_until(lambda: snapshot_count(path) == 3000)
        for _ in range(kills):
            pid = store.stats().server_pid
            wait_until(lambda: not is_saving(store))  # the file of the previous one has been replaced
            wait_until(lambda: is_stopped_while_saving(store, pid))  # noqa: B023
            os.kill(pid, signal.SIGKILL)
            counts.append(snapshot_count(path))
            wait_until(lambda: store.stats().server_pid not in (0, pid))  # noqa: B023
    assert counts == [3000] * kills
    figure(f"{kills} kills in the middle")
    assert snapshot_count(path) == 3000
    assert not unfinished.exists()


def snapshot_count(path: Path) -> int:
    with Store.over(Arena.create(None, Geometry.plan(2**23)), Options.of()) as store:
        return snapshot.restore(store.arena, path)


def test_a_stopped_store_is_saved_and_loaded_through_its_arena(manage: Start, store_dir: Path, path: Path) -> None:
    with manage() as manager, manager.store() as store:
        content = fill(store)
        assert snapshot.save(store, path) == 40
        with connect("shop", directory=store_dir, in_place=False) as through:
            assert has_arena(through)
            assert snapshot.save(through, path) == 40
    with Store.over(Arena.open(store_dir / "shop" / "arena"), Options.of()) as stopped:
        assert snapshot.save(stopped, path) == 40
    with manage() as manager, manager.store() as store:
        store.clear()
    with Store.over(Arena.open(store_dir / "shop" / "arena"), Options.of()) as stopped:
        assert snapshot.load(stopped, path) == 40
    with manage() as manager, manager.store() as store:
        assert store.all() == content
        store.clear()
        assert snapshot.load(store, path) == 40
        assert store.all() == content


@pytest.mark.parametrize("wrong", ["relative/path", 5])
def test_a_relative_path_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="snapshot must be an absolute path"):
        StoreManager("shop", snapshot=wrong)
    with pytest.raises(ConfigError, match="snapshot_period"):
        StoreManager("shop", snapshot="/x", snapshot_period=-1)


def test_a_private_store_has_no_server_to_save_it(path: Path) -> None:
    with pytest.raises(ConfigError, match="snapshot is for shared stores"):
        Store(memory=2**16, snapshot=path)


def test_ids_and_owners_are_not_logged(
    manage: Start, path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, "shmstore"), manage(snapshot=path, persist=False) as manager:
        manager.store().set("secret-id", {}, owner="secret-owner")
    with manage(snapshot=path, persist=False) as manager:
        assert manager.store().length() == 1
    assert "secret" not in capfd.readouterr().err


def test_the_end_of_a_save_to_another_file_does_not_mark_this_one_as_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options name another file during a save: it must be saved too, whether or not sessions change."""
    options = [Options.of(snapshot=tmp_path / name, snapshot_period=None) for name in ("a", "b")]
    saves: list[str] = []

    def save_and_change(held: Any, path: str) -> int:
        saved = save(held, path)
        saves.append(os.path.basename(path))
        if len(saves) == 1:
            schedule.apply_options(options[1])
        return saved

    save = snapshot.save
    monkeypatch.setattr(snapshot, "save", save_and_change)
    with Store(memory=2**20) as store:
        store.set("ada", {})
        schedule = Snapshots("shop", store)
        schedule.apply_options(options[0])
        schedule.save()
        assert store.stats().snapshot_age is None
        schedule.save()
        assert saves == ["a", "b"]
        assert store.stats().snapshot_age is not None


def test_a_store_that_is_closed_during_a_save_ends_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a server that exits without persistence while the disk is full."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)

    def close_and_fail(*_: object) -> int:
        store.arena.mark_closed()
        raise SnapshotError("the disk is full")

    monkeypatch.setattr(snapshot, "save", close_and_fail)
    with Store(memory=2**20) as store:
        schedule = Snapshots("shop", store)
        schedule.apply_options(Options.of(snapshot=tmp_path / "a", snapshot_period=0.001))
        wait_until(lambda: "the disk is full" in caplog.text)
        for thread in [each for each in threading.enumerate() if each.name == "shmstore-snapshot"]:
            thread.join(60)
            assert not thread.is_alive()
    assert failed == []


def test_stats_show_the_age_and_failures_of_the_snapshot(manage: Start, store_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    path = place / "shop.snapshot"
    with manage(snapshot=path, snapshot_period=0.02) as manager, manager.store() as store:

        def told() -> tuple[bool, int]:
            stats = store.stats()
            return stats.snapshot_age is not None, stats.snapshot_failures

        wait_for(lambda: told() == (True, 0), "the first one")
        with connect("shop", directory=store_dir, in_place=False) as through_the_server:
            assert through_the_server.stats().snapshot_age is not None
        first = age = store.stats().snapshot_age or 0
        while age >= first:  # nothing has changed, so it still holds everything: it does not age
            first, age = age, store.stats().snapshot_age or 0
        place.rename(tmp_path / "away")
        store.set("a", {})
        wait_for(lambda: store.stats().snapshot_failures > 1, "attempts that fail")
        assert store.stats().snapshot_age is not None
        (tmp_path / "away").rename(place)
        wait_for(lambda: told() == (True, 0), "success")
        os.utime(path, (1, 1))
        manager.apply(memory=2**20)
        assert told() == (False, 0)
    with Store(memory=2**20) as private:
        assert (private.stats().snapshot_age, private.stats().snapshot_failures) == (None, 0)


def test_a_starting_server_reports_the_age_of_the_snapshot(manage: Start, path: Path) -> None:
    with manage(snapshot=path, snapshot_period=None) as manager, manager.store() as store:
        store.set("a", {})
        assert store.stats().snapshot_age is None
    hour_ago = time.time() - 3600
    os.utime(path, (hour_ago, hour_ago))
    with manage(snapshot=path, snapshot_period=None) as manager, manager.store() as store:
        wait_for(lambda: store.stats().snapshot_age, "its beginning")
        assert 3600 <= (store.stats().snapshot_age or 0) < 4200
