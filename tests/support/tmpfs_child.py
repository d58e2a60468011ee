"""A store in a tmpfs that is too small, or full: `python tmpfs_child.py SCENARIO DIRECTORY`.

A process in a mount namespace of its own: no other process sees what it mounts and fills. It prints each result on
a line, and "done" at the end.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from processes import wait_for

from shmstore import RecordTooLarge, ShmStoreError, StoreFull, StoreManager, StoreUnavailable, connect, snapshot
from shmstore.client import attachment
from shmstore.engine.arena import Arena
from shmstore.engine.layout import TEMPORARY, Geometry
from shmstore.engine.verify import verify
from shmstore.ipc.directory import StoreFiles

MEMORY = 2**20
ATTACH = """
import sys
from shmstore import connect
with connect("shop", directory=sys.argv[1]) as store:
    assert store.get("kept") == {"n": "kept"}
    store.set("from another", {})
    assert store.ping() and store.prune() >= 0
"""

Damage = Callable[[Path], object]


def mount(place: Path, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(["mode=0700", *options]), "tmpfs", str(place)]
    subprocess.run(command, check=True)


def free(place: Path) -> int:
    disk = os.statvfs(place)
    return disk.f_bavail * disk.f_frsize


def fill(place: Path) -> None:
    """Fill the tmpfs to the last byte."""
    fd = os.open(place / "hog", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (2**20, 4096, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(fd, b"x" * size)
    os.close(fd)
    assert free(place) == 0


def fill_inodes(place: Path) -> None:
    """Use up all inodes."""
    with contextlib.suppress(OSError):
        for number in range(10**6):
            (place / f"hog{number}").touch()
    assert not os.statvfs(place).f_ffree


def release(place: Path) -> None:
    for hog in place.glob("hog*"):
        hog.unlink()


def refused(error: type[Exception], text: str, call: Callable[[], Any]) -> str:
    """Make a call that must raise this error; return the message."""
    with pytest.raises(error, match=re.escape(text)) as caught:
        call()
    return str(caught.value)


def killed(place: Path) -> int:
    pid = StoreFiles.of("shop", place).server()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def restarted(place: Path, pid: int) -> None:
    """
    Wait until another server runs and its starter says so in the log, which must be a file.

    A server that answers others and is killed before its starter is connected to it is started once more, and only the
    second one is in the log.
    """
    log = Path(os.readlink("/proc/self/fd/2"))

    def is_connected() -> bool:
        server = StoreFiles.of("shop", place).server()
        said = re.search(rf"started .*process {server}$", log.read_text(), re.M)
        return server not in (None, pid) and said is not None

    wait_for(is_connected, "the restart")


def wait_for_inodes(place: Path, number: int) -> None:
    """Wait until so many inodes are free: the files that a server removes are in use until it exits."""
    wait_for(lambda: os.statvfs(place).f_ffree == number, f"{number} free inodes")


def ended(place: Path) -> None:
    wait_for(lambda: StoreFiles.of("shop", place).server() is None, "the end of the server")


def wait_for_line(text: str, meanwhile: Callable[[], object]) -> None:
    """Wait until the line is in the log, which must be a file, and call a function again and again."""
    log = Path(os.readlink("/proc/self/fd/2"))
    before = log.read_text().count(text)

    def is_there() -> bool:
        meanwhile()
        return log.read_text().count(text) > before

    wait_for(is_there, f"the line: {text}")


def everything(store: Any) -> None:
    """Write more new sessions than the store has room for, in changing sizes, and use every other operation."""
    evicted = store.stats().evicted
    for round_, size in enumerate((700, 40_000, 2_000, 9_000)):
        for number in range(store.stats().memory // (size + 200)):
            sid = f"{round_}.{number}"
            store.set(sid, {"sid": sid, "x": "y" * size}, ttl=0 if number % 9 == 8 else 600, owner=f"o{number % 7}")
            if number % 50 == 0:
                assert store.get(sid) in ({"sid": sid, "x": "y" * size}, None)
                if store.update(sid, {"more": "z" * 1000}):
                    assert store.peek(sid)["more"] == "z" * 1000
                store.touch(sid)
                if store.rename(sid, f"new {sid}"):
                    assert store.peek(f"new {sid}")["sid"] == sid
                assert store.peek("kept") == {"n": "kept"} or not store.set("kept", {"n": "kept"}, owner="k")
        store.prune()
    grown: dict[str, str] = {}
    store.set("growing", {})
    for number in range(12):  # doubles its size each time
        grown[f"{number}"] = "g" * 2**number
        store.set("growing", grown)
        assert store.get("growing") == grown
    refused(RecordTooLarge, "max_session", lambda: store.set("growing", {"x": "y" * 2**21}))
    assert store.get("growing") == grown
    for sid, session in store.all().items():
        assert session.get("sid", sid) in sid
    assert store.destroy("growing") == 1
    assert store.destroy_owned("o3") > 0
    with store.lock("growing"):
        assert store.add("growing", {}) is True
    assert store.stats().evicted > evicted
    verify(store.arena)


def small(place: Path) -> None:
    """C17: 64 MB in 16."""
    mount(place, "size=16m")
    for _ in range(2):
        manager = StoreManager("shop", directory=place, memory=64 * 2**20)
        print(refused(StoreFull, f"in {place}/shop", manager.start))
        assert os.listdir(place) == []
    with StoreManager("shop", directory=place, memory=MEMORY) as manager, manager.store() as store:
        store.set("kept", {"n": "kept"}, owner="k")
        everything(store)


def hogged(place: Path) -> None:
    """Another process fills the tmpfs while a store is in use."""
    mount(place, "size=16m")
    manager = StoreManager("shop", directory=place, memory=MEMORY, check_period=0.2, dispose=lambda *_: None)
    manager.start()
    store, through = manager.store(), connect("shop", directory=place, in_place=False)
    store.set("kept", {"n": "kept"}, owner="k")
    options = (place / "shop" / "options").read_bytes()
    fill(place)
    for each in store, through:
        everything(each)
    attached = subprocess.run([sys.executable, "-c", ATTACH, place], check=False)
    assert attached.returncode == 0

    # A killed server is restarted, also a second time.
    for _ in range(2):
        pid = killed(place)
        with patch.object(attachment, "SILENCE", 60):  # on a busy machine the restart takes more than two seconds
            store.set("meanwhile", {})
            restarted(place, pid)
            assert through.ping()
            assert store.prune() >= 0
        fill(place)
    subprocess.run([sys.executable, "-c", ATTACH, place], check=True)

    # Options that differ cannot be kept for a restart, so they are not taken; equal options are accepted.
    print(refused(StoreUnavailable, "No space left", lambda: manager.apply(max=999)))
    other = StoreManager("shop", directory=place, max=77)
    print(refused(StoreUnavailable, "No space left", other.start))
    assert store.options.max is None
    assert (place / "shop" / "options").read_bytes() == options
    assert sorted(os.listdir(place / "shop")) == ["arena", "lock", "options", "socket"]
    StoreManager("shop", directory=place, memory=MEMORY, check_period=0.2).start()

    # The directory is removed, and cannot be created again for now.
    for path in (place / "shop").iterdir():
        path.unlink()
    (place / "shop").rmdir()
    fill(place)
    wait_for_line("cannot be restored", lambda: store.get("kept"))
    everything(store)
    release(place)
    wait_for((place / "shop" / "socket").exists, "the store's directory")
    with connect("shop", directory=place) as another:
        assert another.get("kept") == {"n": "kept"}
    everything(store)
    assert through.ping()

    # Another size: the old file is kept where both do not fit.
    through.close()
    store.close()
    gc.collect()  # of calls that failed
    manager.shutdown()
    ended(place)
    fill(place)
    refused(StoreFull, "no space left", StoreManager("shop", directory=place, memory=MEMORY + 2**20).start)
    ended(place)
    release(place)
    with StoreManager("shop", directory=place, memory=MEMORY + 2**20) as manager:
        manager.store().close()
    ended(place)
    release(place)
    with StoreManager("shop", directory=place, memory=10 * 2**20) as manager, manager.store() as store:
        assert store.stats().memory > 9 * 2**20, "now there is room"
        assert store.get("kept") == {"n": "kept"}
    ended(place)
    with StoreManager("shop", directory=place, memory=8 * 2**20) as manager, manager.store() as store:
        assert store.stats().memory > 9 * 2**20, "the old one and the new one do not both fit: it stays as it was"
        assert store.get("kept") == {"n": "kept"}


def begun(place: Path) -> None:
    """A store is created where the tmpfs is full, or has no inode left."""
    mount(place, "size=1m", "nr_inodes=30")
    fill(place)
    for _ in range(2):
        print(refused(StoreFull, str(place), StoreManager("shop", directory=place, memory=2**16).start))
        assert os.listdir(place) == ["hog"]
    release(place)
    fill_inodes(place)
    for spare in range(7):  # existing files: none, the directory, the lock, options.new, .arena-, socket.new
        manager = StoreManager("shop", directory=place, memory=2**16)
        try:
            manager.start()
        except ShmStoreError as exc:
            print(exc)
            wait_for_inodes(place, spare)
        else:
            manager.shutdown()
        (place / f"hog{spare}").unlink()
    with StoreManager("shop", directory=place, memory=2**16) as manager, manager.store() as store:
        store.set("a", {"n": 1})
        for number in range(100):
            (place / f"hog again {number}").touch() if os.statvfs(place).f_ffree else None
        assert not os.statvfs(place).f_ffree
        for number in range(400):
            store.set(str(number), {"n": number}, owner="ada")
            assert store.get(str(number)) == {"n": number}
        with connect("shop", directory=place) as other:
            assert other.get("399") == {"n": 399}
        pid = killed(place)
        wait_for_line("its server cannot be started", lambda: store.set("399", {"n": 399}, owner="ada"))
        release(place)
        restarted(place, pid)
        with patch.object(attachment, "SILENCE", 60):  # on a busy machine the restart takes more than two seconds
            assert store.prune() == 0
        assert store.get("399") == {"n": 399}
    ended(place)
    with StoreManager("shop", directory=place, memory=2**16) as manager, manager.store() as store:
        assert store.get("399") == {"n": 399}
    assert not [name for name in os.listdir(place / "shop") if name.startswith(TEMPORARY)]


def saved(path: Path) -> int:
    """Return the number of sessions in a snapshot; fail if it is not whole."""
    return snapshot.restore(Arena.create(None, Geometry.plan(2**22)), path)


def unsaved(place: Path) -> None:
    """The disk of the snapshots is full: the previous snapshot stays, and the store keeps working."""
    mount(place, "size=16m")
    disk = place / "disk"
    disk.mkdir()
    mount(disk, "size=1m")
    path = disk / "shop.snapshot"
    options = {"directory": place, "memory": MEMORY, "persist": False, "snapshot": path, "snapshot_period": 0.1}
    with StoreManager("shop", **options) as manager, manager.store() as store:
        for number in range(300):
            store.set(str(number), {"n": number, "x": "y" * 700})
        wait_for(lambda: path.exists() and saved(path) == 300, "the snapshot")
        before = path.stat()
        fill(disk)
        for number in range(5):
            store.set(f"more {number}", {"n": number})
            assert store.get(f"more {number}") == {"n": number}
        wait_for_line("the snapshot was not saved", lambda: store.get("more 0"))
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert saved(path) == 300
        # An attempt may be in progress.
        wait_for(lambda: sorted(os.listdir(disk)) == ["hog", "shop.snapshot"], "the removal of what was begun")
        release(disk)
        store.set("after", {})
        wait_for(lambda: saved(path) == 306, "the next snapshot")
        fill(disk)
        store.set("lost at the reboot", {})
    ended(place)
    assert not (place / "shop").exists()
    with StoreManager("shop", **options) as manager, manager.store() as store:
        assert len(store) == 306
        assert store.get("299") == {"n": 299, "x": "y" * 700}


SCENARIOS = {"small": small, "hogged": hogged, "begun": begun, "unsaved": unsaved}

if __name__ == "__main__":
    # On a busy machine a server that exits slowly is not killed, and no writer restarts one before its watch does:
    # both would add lines to the log.
    with patch("shmstore.manager._EXIT_TIMEOUT", 60), patch.object(attachment, "LATE", 600):
        SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
    print("done")
