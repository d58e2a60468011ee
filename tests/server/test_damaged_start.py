"""A server that finds an invalid file of its store: it starts empty or refuses, and logs that once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import damage_child
import pytest
from processes import Start, wait_for

from shmstore import ConfigError, ShmStoreError, Store, StoreManager, StoreUnavailable
from shmstore.engine import layout
from shmstore.engine.arena import Arena
from shmstore.engine.header import HEARTBEAT, MAX_SESSION, MOVED, PENDING, STATE, TOP_SLOT
from shmstore.engine.verify import verify
from shmstore.ipc import options_file
from shmstore.ipc.directory import StoreFiles
from shmstore.options import Options
from shmstore.server import main
from shmstore.store import live_options

FULL = os.environ.get("SHMSTORE_FULL") == "1"
FILES = 25 if FULL else 2
NOBODY = 65534

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make another user's files")
Damage = Callable[[Path], object]


@pytest.fixture
def arena(manage: Start, store_dir: Path) -> Path:
    """The file that a server has left, with sessions."""
    with manage() as manager, manager.store() as store:
        for number in range(30):
            store.set(str(number), {"key": number, "data": "x" * 20 * number}, owner="ada" if number % 3 else None)
    return store_dir / "shop" / "arena"


def with_identity(**changes: object) -> Damage:
    """Return a damage to the constant head of a file, with a valid checksum."""
    names = "magic", "version", "abi", "pids", "slots", "blocks", "block_size", "boot_id"

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        values = dict(zip(names, layout._IDENTITY.unpack_from(data), strict=True)) | changes
        head = layout._IDENTITY.pack(*values.values())
        data[: len(head) + 4] = head + struct.pack("<I", zlib.crc32(head))
        path.write_bytes(data)

    return damage


def by_another(make: Damage) -> Damage:
    """Return a damage that replaces the file by something else."""

    def damage(path: Path) -> None:
        path.rename(path.with_name("kept"))
        make(path)

    return damage


def flip_in_the_head(path: Path) -> None:
    """One slot more or less: the file keeps a valid size, and all regions are shifted a little."""
    data = bytearray(path.read_bytes())
    data[struct.calcsize("<8sIIQ")] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Damage] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - layout.PAGE),
    "truncated to the head": lambda path: os.truncate(path, layout.PAGE),
    "longer": lambda path: os.truncate(path, path.stat().st_size + layout.PAGE),
    "empty": lambda path: os.truncate(path, 0),
    "no arena": lambda path: path.write_bytes(b"x" * path.stat().st_size),
    "flipped bit in the head": flip_in_the_head,
    "other layout": with_identity(version=99),
    "other machine": with_identity(abi=99),
    "other boot": with_identity(boot_id=b"another boot    "),
    "other size": with_identity(slots=99),
    "wrong mode": lambda path: path.chmod(0o640),
    "unreadable": lambda path: path.chmod(0o044),
    "hard link": lambda path: os.link(path, path.with_name("kept")),
    "symbolic link": by_another(lambda path: path.symlink_to("kept")),
    "link to a directory": by_another(lambda path: path.symlink_to("..")),
    "dangling link": by_another(lambda path: path.symlink_to("nowhere")),
    "fifo": by_another(lambda path: os.mkfifo(path, 0o600)),
}  # fmt: skip


def errors_in(log: str) -> list[str]:
    return [line for line in log.splitlines() if "[ERROR]" in line]


def it_works(manager: StoreManager, store_dir: Path) -> None:
    """Verify that the server works and continues to work."""
    with manager.store() as store:
        pid = StoreFiles.of("shop", store_dir).server()
        for number in range(20):
            store.set(str(number), {"new": number})
            assert store.get(str(number)) == {"new": number}
        assert store.ping()
        assert store.prune() == 0
        verify(store.arena)
        assert StoreFiles.of("shop", store_dir).server() == pid


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_server_starts_empty_on_a_damaged_file_and_logs_it_once(
    kind: str, arena: Path, manage: Start, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    DAMAGES[kind](arena)
    kept = arena.with_name("kept")
    before = kept.read_bytes() if kept.exists() else None
    capfd.readouterr()
    with manage() as manager, manager.store() as store:
        assert len(store) == 0
        assert store.all() == {}
        it_works(manager, store_dir)
    log = capfd.readouterr().err
    assert len(errors_in(log)) == 1, log
    assert "its sessions are lost" in errors_in(log)[0]
    assert "Traceback" not in log
    # The link's target was not changed.
    assert (kept.read_bytes() if kept.exists() else None) == before


def set_cell(cell: int, value: int) -> Damage:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(cell * layout.CELL)
            file.write(struct.pack("@Q", value))

    return damage


HEALED = {
    "a state that there is not": set_cell(STATE, 8),
    "as if it were being moved": set_cell(STATE, MOVED),
    "as if a mutation were pending": set_cell(PENDING, 2**63),
    "a mutex that is none": set_cell(layout.MUTEX // layout.CELL, 2**64 - 1),
}


@pytest.mark.parametrize("kind", HEALED)
def test_a_server_repairs_a_slightly_damaged_file(
    kind: str, arena: Path, manage: Start, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    HEALED[kind](arena)
    with manage() as manager, manager.store() as store:
        assert len(store.all()) == 30
        verify(store.arena)
        it_works(manager, store_dir)
    assert errors_in(capfd.readouterr().err) == []


@root_only
@pytest.mark.parametrize("mode", [0o600, 0o666])
def test_another_users_file_is_not_used(
    mode: int, manage: Start, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store_dir.chmod(0o755)
    arena = store_dir / "shop" / "arena"
    for expected in 0, 1:
        capfd.readouterr()
        manager = manage()
        manager.start(user=(NOBODY, NOBODY))
        with manager.store() as store:
            assert len(store) == 0
            store.set("a", {})
        assert arena.stat().st_uid == NOBODY
        manager.shutdown()
        assert len(errors_in(capfd.readouterr().err)) == expected
        os.chown(arena, 1, 1)
        arena.chmod(mode)


@pytest.mark.parametrize("content", [[], ["precious"]])
def test_a_directory_in_place_of_the_arena_is_left_alone(
    content: list[str], arena: Path, manage: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    arena.unlink()
    arena.mkdir(0o700)
    for name in content:
        (arena / name).touch()
    for _ in range(2):
        capfd.readouterr()
        with pytest.raises(StoreUnavailable, match="arena cannot be opened: Is a directory"):
            manage().start()
        log = capfd.readouterr().err
        assert len(errors_in(log)) == 1, log
        assert "Traceback" not in log
    assert os.listdir(arena) == content
    wait_for(lambda: StoreFiles.of("shop", arena.parent.parent).server() is None, "the end of the server")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("region", damage_child.regions())
def test_a_server_on_a_randomly_damaged_file(
    region: str, manage: Start, store_dir: Path, seed: int, capfd: pytest.CaptureFixture[str],
    figure: Callable[[str], None],
) -> None:  # fmt: skip
    """It works, or starts empty, or repairs the file; it neither exits nor returns another user's session."""
    path = store_dir / "shop" / "arena"
    logs = []
    for number in range(FILES):
        rnd = random.Random(f"{region} {seed if FULL else number}")
        seed += 1
        path.parent.mkdir(0o700, exist_ok=True)
        path.unlink(missing_ok=True)
        damage_child.make(str(path), rnd)
        done = damage_child.damage(str(path), damage_child.regions()[region], rnd)
        capfd.readouterr()
        with manage(memory=damage_child.MEMORY) as manager, manager.store() as store:
            pid = StoreFiles.of("shop", store_dir).server()
            assert pid is not None
            for name, action in damage_child.actions(store, rnd):
                with contextlib.suppress(ShmStoreError):
                    action()
                assert StoreFiles.of("shop", store_dir).server() == pid, f"{done}: the server ended at {name}"
        logs.append(capfd.readouterr().err)
        assert len(errors_in(logs[-1])) <= 1, f"{done}: {logs[-1]}"
        assert "Traceback" not in logs[-1], f"{done}: {logs[-1]}"
    figure(f"{FILES} files, {sum(bool(errors_in(log)) for log in logs)} of them with a word in the log")


def test_a_start_that_repairs_is_no_restart(arena: Path, manage: Start) -> None:
    with contextlib.closing(Arena.open(arena)) as left:
        left.cells[TOP_SLOT] = 8 * layout.SLOT
    with manage() as manager, manager.store() as store:
        assert len(store) == 30
        stats = store.stats()
        assert (stats.rebuilds, stats.server_restarts) == (1, 0)


def test_damaged_options_do_not_hide_other_damage(arena: Path, manage: Start) -> None:
    """The first repair restores the options, the second one the rest."""
    with contextlib.closing(Arena.open(arena)) as left:
        left.cells[MAX_SESSION] ^= 1
        left.cells[TOP_SLOT] = 2**64 - 1
        assert live_options.are_damaged(left)
    with manage() as manager, manager.store() as store:
        assert len(store) == 30
        assert store.stats().rebuilds == 2


def test_a_file_that_appears_has_its_options(store_dir: Path) -> None:
    """Processes that follow from a damaged file use it before its server does."""
    files = StoreFiles.of("shop", os.fspath(store_dir), uid=os.geteuid(), gid=os.getegid())
    files.create()
    with contextlib.closing(main._create(files, Options.of(memory=2**20, max_session=50), lambda _: None)) as made:
        assert made.cells[MAX_SESSION] == 50
        assert not live_options.are_damaged(made)


# -- the options that a killed server has left ------------------------------------------------------------------------

SAVED = {"memory": 2**20, "max": 5, "max_per_owner": 2}
UNREADABLE: dict[str, Damage] = {
    "damaged": lambda path: path.write_bytes(bytes(10)),
    "functions of another Python": lambda path: path.write_text(
        json.dumps({"options": {}, "python": "cpython 9.9", "functions": {"ttl": ""}})
    ),
    "an option of another version": lambda path: path.write_bytes(options_file.pack({"turbo": True})),
    "writable by others": lambda path: path.chmod(0o666),
}


@pytest.fixture
def killed(store_dir: Path) -> StoreFiles:
    """The files of a store whose server and users were killed."""
    files = StoreFiles.of("shop", store_dir)
    files.create()
    with Store.over(Arena.create(files.arena, Options.of(**SAVED).geometry), Options.of(**SAVED)) as store:
        store.publish_options()
        store.arena.cells[HEARTBEAT] = 1
        store.set("a", {"n": 1})
    options_file.save(files.options, options_file.pack(SAVED))
    return files


def options_of_a_start(files: StoreFiles, given: Mapping[str, Any] | None, *, exited: bool = False) -> dict[str, Any]:
    with contextlib.closing(Arena.open(files.arena)) as arena:
        if exited:
            arena.cells[HEARTBEAT] = 0
        packed = None if given is None else options_file.pack(given)
        return options_file.unpack(main.packed_options(files, packed, arena))


def test_a_start_without_options_continues_with_those_of_a_killed_server(killed: StoreFiles, store_dir: Path) -> None:
    place = {"directory": str(store_dir)}
    for little in (None, {}, place):
        assert options_of_a_start(killed, little) == SAVED
    for given in ({"max": 9}, {**place, "max": 9}):
        assert options_of_a_start(killed, given) == given
    assert options_of_a_start(killed, None, exited=True) == SAVED
    for little in ({}, place):
        assert options_of_a_start(killed, little) == little
    os.unlink(killed.options)
    assert options_of_a_start(killed, None) == {}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_options_that_cannot_be_read_are_replaced_if_no_process_uses_the_store(
    kind: str,
    killed: StoreFiles,
    store_dir: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    UNREADABLE[kind](Path(killed.options))
    monkeypatch.setattr("shmstore.engine.mapping.LEAVING", 0.1)
    place = {"directory": str(store_dir)}
    with contextlib.closing(Arena.open(killed.arena)):
        for given in (None, place):
            with pytest.raises(ConfigError):  # this process may depend on them
                options_of_a_start(killed, given)
    assert not caplog.records
    assert options_of_a_start(killed, place) == place
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_options_that_cannot_be_read_are_replaced_if_the_last_user_of_the_store_is_exiting(
    killed: StoreFiles, store_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    UNREADABLE["damaged"](Path(killed.options))
    user = Arena.open(killed.arena)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: user.close())
    monkeypatch.setattr("shmstore.engine.mapping.time", clock)
    place = {"directory": str(store_dir)}
    assert options_of_a_start(killed, place) == place
    assert user.file.closed
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_start_on_damaged_options_of_a_killed_server_keeps_the_sessions(
    killed: StoreFiles, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    UNREADABLE["damaged"](Path(killed.options))
    with StoreManager(f"shm://{store_dir}/shop") as manager, manager.store() as store:
        assert store.all() == {"a": {"n": 1}}
    log = capfd.readouterr().err
    assert len(errors_in(log)) == 1, log
    assert "Traceback" not in log
