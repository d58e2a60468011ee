"""A restart with another size, or another layout: the sessions come along, or stay where they are; they never go."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layout_1
import pytest
from processes import Run, Start

from shmstore import byvalue, connect, launch, layout, server
from shmstore.cells import MOVED
from shmstore.clock import boottime_ns
from shmstore.control import OtherVersion
from shmstore.files import StoreFiles
from shmstore.layout import TEMPORARY, Geometry, OtherLayout
from shmstore.record import Codec
from shmstore.serving import StoreServer
from shmstore.testing import wait_until

SECOND = 10**9
StartHere = Callable[..., StoreServer]

KEPT: dict[str, Any] = {f"s{number}": {"n": number, "x": "z" * 40 * number} for number in range(12) if number != 5}
KEPT |= {
    "renamed": {"n": 5, "x": "z" * 200},
    "long": {"x": "l" * 5000},
    "ünï": {"ö": ["ä", b"\0", (1, 2)]},
}
ORDER = ["s3", "renamed", "expired", "ünï", "long", *(f"s{number}" for number in (11, 10, 9, 8, 7, 6, 4, 2, 1, 0))]
ADAS = {sid for sid in KEPT if sid[0] == "s" and int(sid[1:]) % 3} | {"renamed"}


@pytest.fixture
def files(store_dir: Path) -> StoreFiles:
    files = StoreFiles.of("shop", store_dir)
    files.create()
    return files


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one of a version of shmstore that comes after the present one."""
    monkeypatch.setattr(layout, "_VERSION", 99)


@pytest.fixture
def start_here(files: StoreFiles) -> Iterator[StartHere]:
    """Return a function that starts the store's server in this process, as far as it listens."""
    started = []

    def begin(**options: Any) -> StoreServer:
        one = server.start(files, byvalue.pack({"memory": 2**20, "check_period": None, **options}))
        assert one is not None
        started.append(one)
        return one

    yield begin
    for one in started:
        one._leave()
        one.arena.close()
        os.close(one._place._lock)
        os.close(one._wake)


def refused(files: StoreFiles, memory: int, room: int = resource.RLIM_INFINITY) -> str:
    """Start the store's server in a child, which ends; return what it said when it would not."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
            server.start(files, byvalue.pack({"memory": memory}))
        except Exception as exc:
            os.write(writable, f"{exc!r}".encode())
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable) as said:
        os.waitpid(child, 0)
        return said.read()


def is_all_there(store: Any) -> None:
    assert store.all() == KEPT
    assert store.ids() == ORDER
    assert set(store.owned_by("ada")) == ADAS
    assert store.owned_by("bob") == ["long"]
    loaded = {sid: store.load(sid) for sid in ("s1", "s2")}
    assert loaded["s1"].remaining == math.inf
    now = boottime_ns()
    assert round(loaded["s2"].remaining / 100) == round((SECOND + 43 * 10**6 - now + 10**9 * SECOND) / SECOND / 100)
    assert abs(loaded["s2"].created - (now - SECOND) / SECOND) < 5
    store.arena.check()


def test_what_the_present_layout_wrote_is_read_as_it_is(manage: Start, files: StoreFiles) -> None:
    """Whoever changes the layout, and forgets to give it another number, sees it here."""
    data = bytearray((layout_1.KEPT.parent / f"layout-{layout._VERSION}.arena").read_bytes())
    _, written_by, _, _, slots, blocks, block_size, _ = layout_1.IDENTITY.unpack_from(data)
    assert written_by == layout._VERSION
    head = layout._identity(Geometry(slots, blocks, block_size))  # of this machine and boot
    data[: len(head)] = head
    Path(files.arena).touch(0o600)
    Path(files.arena).write_bytes(data)
    with manage(memory=2**16) as manager, manager.store() as store:
        assert store.arena.geometry.slots == slots, "it was carried over"
        is_all_there(store)


def test_an_arena_of_layout_1_is_carried_over(manage: Start, files: StoreFiles) -> None:
    layout_1.kept(Path(files.arena))
    with manage() as manager, manager.store() as store:
        is_all_there(store)
        assert store.stats().memory > 2**19
    with manage() as manager, manager.store() as store:
        assert store.all() == KEPT
    assert sorted(os.listdir(files.path)) == ["arena", "lock", "options"]


@pytest.mark.usefixtures("later")
def test_a_later_layout_begins_with_it(
    files: StoreFiles, start_here: StartHere, caplog: pytest.LogCaptureFixture
) -> None:
    before = layout_1.kept(Path(files.arena)).stat().st_ino
    with caplog.at_level(logging.INFO, "shmstore"):
        server = start_here()
    is_all_there(server._store)
    assert os.stat(files.arena).st_ino != before
    assert layout.open_file(files.arena)[1] == server.arena.geometry
    assert "carried 15 of 15 sessions over from layout 1" in caplog.text
    assert sorted(os.listdir(files.path)) == ["arena", "lock", "options", "socket"]


@pytest.mark.usefixtures("later")
def test_of_a_smaller_one_the_most_recently_used_stay(
    files: StoreFiles, start_here: StartHere, caplog: pytest.LogCaptureFixture
) -> None:
    layout_1.kept(Path(files.arena))
    with caplog.at_level(logging.INFO, "shmstore"):
        server = start_here(max=4)
    assert server._store.ids() == ORDER[:4]
    assert "carried 4 of 15 sessions over" in caplog.text
    server.arena.check()


@pytest.mark.usefixtures("later")
def test_what_was_left_half_done_is_settled_and_what_is_damaged_stays_behind(
    files: StoreFiles, start_here: StartHere
) -> None:
    path = layout_1.kept(Path(files.arena))
    data = bytearray(path.read_bytes())
    at = data.index(b"l" * 3000)
    data[at + 2000] ^= 1
    # As if its life were just being renewed: the plan is committed, and nothing of it is done.
    low, high = layout_1.key_of("s0")
    slot = data.index(struct.pack("@2Q", low, high)) // 8
    plan = [slot + 3, 7 * 10**9 * SECOND]
    struct.pack_into(f"@{2 + len(plan)}Q", data, layout_1.PAGE, 123, len(plan), *plan)
    struct.pack_into("@Q", data, layout_1.PENDING * 8, 123)
    struct.pack_into("@Q", data, layout_1.STATE * 8, MOVED)  # and as if somebody had died while moving it
    path.write_bytes(data)
    server = start_here()
    assert server._store.ids() == [sid for sid in ORDER if sid != "long"]
    loaded = server._store.load("s0")
    assert loaded is not None
    assert loaded.remaining > 6 * 10**9
    server.arena.check()


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("changes", [{}, {"layout": 42}])
def test_an_arena_that_others_use_is_left_alone(
    changes: dict[str, int], files: StoreFiles, start_here: StartHere
) -> None:
    """As in an upgrade by USR2, while the old workers live: their sessions are theirs."""
    path = layout_1.kept(Path(files.arena), **changes)
    before = path.read_bytes()
    with path.open("rb") as worker:
        fcntl.flock(worker, fcntl.LOCK_SH)
        for _ in range(2):
            assert "StoreUnavailable" in (said := refused(files, 2**20))
            assert "in use by processes of another version of shmstore" in said
            assert f"`fuser {path}`" in said
    assert path.read_bytes() == before
    assert not [name for name in os.listdir(files.path) if name.startswith(TEMPORARY)]
    if not changes:
        is_all_there(start_here()._store)


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layout": 42}, "has layout 42, in a form that cannot be read here"),
        ({"abi": 1}, "was made by another machine"),
        ({"boot": b"x" * 16}, "was made by another machine or container, or before this one was started"),
        ({"pids": 1}, "was made by another machine or container"),
        ({"slots": 5}, "bytes instead of"),
    ],
)
def test_one_that_is_of_no_use_begins_anew_and_says_so(
    changes: dict[str, Any], why: str, files: StoreFiles, start_here: StartHere, caplog: pytest.LogCaptureFixture
) -> None:
    layout_1.kept(Path(files.arena), **changes)
    assert len(start_here()._store) == 0
    [line] = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "begins anew, its sessions are lost" in line
    assert why in line


@pytest.mark.usefixtures("later")
def test_where_there_is_no_room_for_both_it_stays(files: StoreFiles, start_here: StartHere) -> None:
    path = layout_1.kept(Path(files.arena))
    before = path.read_bytes()
    assert "StoreFull" in refused(files, 2**22, room=2**21)
    assert path.read_bytes() == before
    is_all_there(start_here()._store)


@pytest.mark.usefixtures("later")
def test_one_of_no_use_stays_until_another_takes_its_place(files: StoreFiles) -> None:
    path = layout_1.kept(Path(files.arena), layout=42)
    before = path.read_bytes()
    assert "StoreFull" in refused(files, 2**22, room=2**21)
    assert path.read_bytes() == before


def test_the_heart_beats_quickly_until_the_last_who_waits_is_served(
    start_here: StartHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_here()
    turns, waiting = threading.Semaphore(0), []
    monkeypatch.setattr(server._keeper, "save", turns.acquire)
    for number in (1, 2):
        waiting.append(threading.Thread(target=server._save_for_who_waits))
        waiting[-1].start()
        wait_until(lambda: len(server._saving) == number)  # noqa: B023
    turns.release()
    wait_until(lambda: sum(thread.is_alive() for thread in waiting) == 1)
    assert len(server._saving) == 1
    turns.release()
    for thread in waiting:
        thread.join()
    assert not server._saving


def test_who_attaches_to_a_store_of_another_version_is_told_what_to_do(
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


@pytest.mark.usefixtures("later")
def test_a_hundred_thousand_sessions_of_layout_1(
    files: StoreFiles, start_here: StartHere, figure: Callable[[str], None]
) -> None:
    count, now, codec = 100_000, boottime_ns(), Codec()
    sessions = [
        layout_1.Old(
            f"session {number}",
            codec.encode({"n": number, "x": "y" * (number % 300)}),
            f"owner {number % 1000}" if number % 3 else None,
            created=now - number * 1000,
            expires=layout_1.NEVER if number % 2 else now + (number + 3600) * SECOND,
            used=1000 + number * 7919 % count,
        )
        for number in range(count)
    ]
    layout_1.write(Path(files.arena), sessions)
    begun = time.monotonic()
    server = start_here(memory=2**27)
    took = time.monotonic() - begun
    store, arena = server._store, server.arena
    assert len(store) == count
    assert store.ids() == [session.sid for session in sorted(sessions, key=lambda old: old.used, reverse=True)]
    for old in sessions[:: 1 + count // 5000]:
        number = int(old.sid.split()[1])
        assert store.peek(old.sid) == {"n": number, "x": "y" * (number % 300)}
        slot = arena.find(layout_1.key_of(old.sid))
        assert arena.cells[arena.expires + slot] == old.expires
        assert arena.cells[arena.used + slot] == old.used
        loaded = store.load(old.sid)
        assert loaded is not None
        assert loaded.owner == old.owner
    assert sorted(store.owned_by("owner 7")) == sorted(old.sid for old in sessions if old.owner == "owner 7")
    figure(f"{took:.1f} s")


def test_another_max_takes_effect_and_takes_nobody(manage: Start) -> None:
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
        store.arena.check()


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
        assert "keeps the memory it has: another memory takes effect when nobody uses it" in capfd.readouterr().err
    assert worker.communicate("")[0] == "100\n"
    with manage(memory=2**22) as manager, manager.store() as store:
        assert len(store) == 100
        assert store.stats().memory > 2**21


def test_who_waits_for_a_start_waits_for_as_long_as_it_goes_on(
    files: StoreFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_START_TIMEOUT", 1.5)
    ours, theirs = socket.socketpair()

    def carry_over() -> None:
        theirs.makefile("rb").read()
        tell = server._signs_of_life(theirs)
        for number in range(30):
            tell(number)
            time.sleep(0.1)
        theirs.sendall(b'{"ready": true}')
        theirs.close()

    thread = threading.Thread(target=carry_over)
    thread.start()
    try:
        with ours:
            assert launch._tell(ours, files, None) == {"ready": True}
    finally:
        thread.join()
