"""Options that change while processes are attached take effect in all of them at once."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import Run, Start, wait_for

from shmstore.client import connection
from shmstore.contract import AnyStore
from shmstore.errors import RecordTooLarge
from shmstore.ipc.directory import StoreFiles
from shmstore.manager import StoreManager, connect

OF_ANOTHER_PYTHON = json.dumps({"options": {}, "python": "cpython 2.7", "functions": {"dispose": ""}})


@pytest.fixture(params=[True, False], ids=["in place", "through the server"])
def attached(request: pytest.FixtureRequest, manage: Start, store_dir: Path) -> Iterator[AnyStore]:
    """Return a proxy that was attached before any change of options, by a manager without options."""
    with manage(), connect("shop", directory=store_dir, in_place=request.param) as store:
        yield store


@pytest.fixture
def other(attached: AnyStore, manage: Start) -> Iterator[StoreManager]:
    """Return another user of the same store."""
    with manage() as manager:
        yield manager


def remaining(store: AnyStore, sid: str = "a") -> float:
    loaded = store.load(sid)
    assert loaded is not None
    return round(loaded.remaining)


def change(manager: StoreManager, directory: Path, **options: Any) -> None:
    assert manager.apply(memory=2**20, directory=directory, **options) == []


def test_numeric_options_take_effect(attached: AnyStore, other: StoreManager, store_dir: Path) -> None:
    for sid in "abc":
        attached.set(sid, {"x": 1}, owner="ada")
    change(other, store_dir, max=2, ttl=30, max_session=50, max_per_owner=1)
    wait_for(lambda: attached.ids() == ["c"], "the limits that were lowered")
    attached.set("c", {})
    assert remaining(attached, "c") == 30
    with pytest.raises(RecordTooLarge, match="max_session allows 50"):
        attached.set("c", {"x": "y" * 50})
    attached.set("d", {}, owner="ada")
    assert attached.owned_by("ada") == ["d"]
    change(other, store_dir, ttl=timedelta(minutes=1))
    attached.touch("d")
    assert remaining(attached, "d") == 60
    attached.set("e", {}, owner="ada")
    attached.set("f", {}, owner="ada")
    assert len(attached) == 4


def test_recency_and_stale(attached: AnyStore, other: StoreManager, store_dir: Path) -> None:
    attached.set("a", {"x": 1})
    attached.set("b", {})
    attached.get("a")
    assert attached.ids() == ["b", "a"]
    change(other, store_dir, recency=0, stale=True)
    attached.get("a")
    assert attached.ids() == ["a", "b"]
    attached.set("a", {"x": 1}, ttl=0)
    assert attached.get("a") == {"x": 1}
    assert attached.get("a") is None
    change(other, store_dir)
    attached.set("a", {"x": 1}, ttl=0)
    assert attached.get("a") is None


def test_a_ttl_by_function(attached: AnyStore, other: StoreManager, store_dir: Path) -> None:
    change(other, store_dir, ttl=lambda options, session, sid: session["life"] + len(sid))
    attached.set("a", {"life": 10})
    assert remaining(attached) == 11
    change(other, store_dir, ttl=lambda options, session, sid: 2 * session["life"])
    assert attached.touch("a")
    assert remaining(attached) == 20
    change(other, store_dir, ttl=5)
    assert attached.touch("a")
    assert remaining(attached) == 5
    change(other, store_dir)
    attached.touch("a")
    assert remaining(attached) == 24 * 3600


def test_a_length_function_takes_effect(attached: AnyStore, other: StoreManager, store_dir: Path) -> None:
    change(other, store_dir, max=10, length=lambda size, sid: 5)
    for sid in "abc":
        attached.set(sid, {})
    assert attached.ids() == ["c", "b"]


class Hexadecimal:
    """A serializer."""

    @staticmethod
    def dumps(value: object) -> bytes:
        return json.dumps(value).encode().hex().encode()

    @staticmethod
    def loads(data: bytes) -> object:
        return json.loads(bytes.fromhex(data.decode()))


def test_a_serializer(attached: AnyStore, other: StoreManager, store_dir: Path) -> None:
    """A process that only reads finds a record of the new serializer before it has checked the options."""
    attached.set("old", {"x": (1, 2)})
    with other.store() as writer:
        change(other, store_dir, serializer=Hexadecimal())
        writer.set("new", {"x": (1, 2)})
        assert attached.get("new") == {"x": [1, 2]}
        assert attached.get("old") is None
        loaded = attached.load("new")
        assert loaded is not None
        misses = attached.stats().misses
        assert attached.load("old") is None
        assert attached.stats().misses == misses + 1


def test_dispose(attached: AnyStore, other: StoreManager, store_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def dispose(sid: str, session: Any, reason: str) -> None:
        with log.open("a") as file:
            file.write(f"{sid} {session} {reason}\n")

    def disposed() -> list[str]:
        text = log.read_text() if log.exists() else ""
        log.unlink(missing_ok=True)
        return text.splitlines()

    attached.set("a", {"x": 1})
    attached.set("a", {"x": 2})
    assert disposed() == []
    change(other, store_dir, dispose=dispose)
    attached.set("a", {"x": 3})
    assert disposed() == ["a {'x': 2} set"]
    change(other, store_dir, dispose=dispose, no_dispose_on_set=True)
    attached.set("a", {"x": 4})
    assert disposed() == []
    attached.destroy("a")
    assert disposed() == ["a {'x': 4} destroy"]
    change(other, store_dir)
    attached.set("a", {})
    attached.destroy("a")
    assert disposed() == []


def test_check_period(attached: AnyStore, other: StoreManager, store_dir: Path) -> None:
    attached.set("a", {}, ttl=0)
    change(other, store_dir, check_period=0.05)
    wait_for(lambda: attached.length() == 0, "the prune")


def test_functions_of_this_process_are_preferred_to_copies(manage: Start, store_dir: Path) -> None:
    """A copy sent by value cannot write to the caller's list. Options of others and a new server change nothing."""
    seen = []

    def ttl(options: Any, session: Any, sid: str) -> float:
        seen.append(sid)
        return 10

    with manage(ttl=ttl) as manager, manager.store() as store, manage(max=100):
        store.set("a", {})
        assert seen == ["a"]
        files = StoreFiles.of("shop", store_dir)
        pid = files.server()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: files.server() not in (None, pid), "the restart")
        store.ping()
        store.set("b", {})
        assert seen == ["a", "b"]
        with manage(ttl=7):
            store.set("c", {})
            assert seen == ["a", "b"]
            assert remaining(store, "c") == 7


def test_unreadable_options_leave_the_old_ones_in_effect(
    manage: Start, store_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For example, options of another Python: no write is lost."""
    with manage(ttl=30) as manager, connect("shop", directory=store_dir) as store:
        change(manager, store_dir, ttl=30)
        Path(StoreFiles.of("shop", store_dir).options).write_text(OF_ANOTHER_PYTHON)
        store.set("a", {})
        store.set("b", {})
        assert remaining(store, "b") == 30
    assert caplog.text.count("cannot follow: the store's options dispose are functions of cpython 2.7") == 1


def test_options_that_become_readable_take_effect(manage: Start, store_dir: Path) -> None:
    with manage(ttl=30) as manager, connect("shop", directory=store_dir) as store:
        change(manager, store_dir, ttl=lambda options, session, sid: 77)
        options = Path(StoreFiles.of("shop", store_dir).options)
        data = options.read_bytes()
        options.write_text(OF_ANOTHER_PYTHON)
        store.set("a", {})
        assert remaining(store) == 30  # as before, not the default ttl
        options.write_bytes(data)

        def obeyed() -> bool:
            store.set("a", {})
            return remaining(store) == 77

        wait_for(obeyed, "another attempt to read the options")


class SlowToLoad:
    """A serializer that loads slowly in a process whose id is in the name of a file."""

    dumps = staticmethod(Hexadecimal.dumps)
    loads = staticmethod(Hexadecimal.loads)

    def __init__(self, file: str) -> None:
        self.file = file

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        while os.path.exists(f"{self.file}{os.getpid()}"):
            with open(f"{self.file}-loading", "w"):
                time.sleep(0.001)


def test_no_thread_uses_old_options_while_another_loads_new_ones(
    attached: AnyStore, other: StoreManager, store_dir: Path, tmp_path: Path
) -> None:
    loading, slowly = tmp_path / "file-loading", tmp_path / f"file{os.getpid()}"
    change(other, store_dir, serializer=SlowToLoad(str(tmp_path / "file")))
    slowly.touch()
    threads = [threading.Thread(target=attached.set, args=(sid, {"x": sid})) for sid in "ab"]
    threads[0].start()
    wait_for(loading.exists)
    threads[1].start()
    threads[1].join(0.3)
    slowly.unlink()
    for thread in threads:
        thread.join()
    assert [attached.get(sid) for sid in "ab"] == [{"x": "a"}, {"x": "b"}]


@pytest.mark.usefixtures("hurried_servers")
def test_a_server_that_loads_options_slowly_is_waited_for(manage: Start, store_dir: Path, tmp_path: Path) -> None:
    """A healthy server on a busy machine may need longer than `ANSWER_TIMEOUT`. Its heartbeat shows that it works."""
    with manage() as manager, connect("shop", directory=store_dir) as store:
        slowly = tmp_path / f"file{store.stats().server_pid}"
        slowly.touch()
        threading.Timer(connection.ANSWER_TIMEOUT + 0.5, slowly.unlink).start()
        change(manager, store_dir, serializer=SlowToLoad(str(tmp_path / "file")))
        assert not slowly.exists()


def test_workers_that_write_while_options_change(manage: Start, store_dir: Path, run: Run) -> None:
    """Each write uses the options that were published before it began, never a mixture, and is never refused."""
    with manage(ttl=lambda options, session, sid: 1000) as manager:
        worker = run(
            "import sys\nfrom shmstore import connect\n"
            "store = connect('shop', directory=sys.argv[1])\n"
            "print('ready', flush=True)\n"
            "for n in range(10**9):\n"
            "    store.set('a', {'n': n}, owner='ada')\n"
            "    print(round(store.load('a').remaining), flush=True)\n",
            store_dir,
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        for life in range(1001, 1030):
            if life % 2:
                change(manager, store_dir, ttl=lambda options, session, sid, life=life: life)
            else:
                change(manager, store_dir, ttl=life)
            deadline = time.monotonic() + 30
            while (line := worker.stdout.readline()) != f"{life}\n":  # what it had printed before
                assert line == f"{life - 1}\n"
                assert time.monotonic() < deadline


def test_lowering_max_does_not_wait_for_dispose(manage: Start, store_dir: Path, tmp_path: Path) -> None:
    """Neither an `apply` nor a start waits: sessions beyond it are removed as fast as dispose allows."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)

    def dispose(sid: str, session: Any, reason: str) -> None:
        with open(fifo) as file:  # until the test opens the other end
            file.read()

    def go_on(session_count: int) -> None:
        while len(store) > session_count:
            with suppress(OSError):
                os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
            time.sleep(0.001)

    with manage() as manager:
        store = manager.store()
        for sid in "abcd":
            store.set(sid, {})
        change(manager, store_dir, max=3, dispose=dispose)
        assert len(store) == 4
        go_on(3)
        change(manager, store_dir)
    with manage(max=2, dispose=dispose) as manager:
        store = manager.store()
        assert len(store) == 3
        go_on(2)
        assert store.ids() == ["d", "c"]
