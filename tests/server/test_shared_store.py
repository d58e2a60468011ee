"""The contract of a store that several processes share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Start, wait_for

from shmstore import StoreTimeout, connect
from shmstore.testing import wait_until


def in_children(count: int, call: Callable[[], object]) -> int:
    """Make a call in ``count`` forked children at the same time; return how many got a true result."""
    start, begin = os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if not child:
            found: object = None
            try:
                os.close(begin)
                os.read(start, 1)  # no process writes: the read ends when the parent closes
                found = call()
            finally:
                os._exit(1 if found else 0)
        children.append(child)
    os.close(start)
    os.close(begin)
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dispose", [None, lambda *_: None], ids=["plain", "with dispose"])
def test_one_of_many_processes_gets_a_stale_session(
    manage: Start, store_dir: Path, in_place: bool, dispose: Any
) -> None:
    with manage(stale=True, dispose=dispose), connect("shop", directory=store_dir, in_place=in_place) as store:
        for number in range(5):
            store.set("a", {"n": number}, ttl=0)
            assert in_children(4, lambda: store.get("a") == {"n": number}) == 1  # noqa: B023 - called at once
        assert store.stats().expired == 5


@pytest.mark.parametrize("in_place", [True, False])
def test_add_destroy_and_rename_succeed_in_one_of_many_processes(
    manage: Start, store_dir: Path, in_place: bool
) -> None:
    with manage(), connect("shop", directory=store_dir, in_place=in_place) as store:
        for _ in range(3):
            assert in_children(4, lambda: store.add("a", {})) == 1
            assert in_children(4, lambda: store.rename("a", f"b {os.getpid()}")) == 1
            assert in_children(4, lambda: store.destroy(store.ids())) == 1
            assert store.length() == 0


@pytest.mark.parametrize("in_place", [True, False])
def test_dispose_reads_the_store_and_writes_nothing_to_it(
    manage: Start, store_dir: Path, tmp_path: Path, in_place: bool
) -> None:
    shop, log = str(store_dir / "shop"), tmp_path / "log"

    def dispose(sid: str, session: Any, reason: str) -> None:
        import json

        from shmstore import connect

        with connect(f"shm://{shop}", in_place=in_place) as store:
            refused = []
            writes: dict[str, list[Any]] = {
                "set": ["x", {}], "add": ["x", {}], "replace": ["b", {}], "update": ["b", {}], "rename": ["b", "x"],
                "touch": ["b"], "destroy": ["b"], "destroy_owned": ["ada"], "clear": [], "prune": [],
                "stop_interval": [],
            }  # fmt: skip
            for name, arguments in writes.items():
                try:
                    getattr(store, name)(*arguments)
                except RuntimeError as error:
                    refused.append([name, str(error)])
            # an expired session that `get` would return and remove counts as well
            read = [store.get(sid), store.get("b"), store.get("old"), sid in store, store.ids(), store.length()]
            read.append(store.gone(sid))
        log.write_text(json.dumps([refused, read]))

    with manage(dispose=dispose, stale=True, recency=0), connect("shop", directory=store_dir) as store:
        store.set("old", {}, ttl=0)
        store.set("b", {"n": 2}, owner="ada")
        store.set("a", {"n": 1})
        assert store.destroy("a") == 1
        refused, read = json.loads(log.read_text())
        assert len(refused) == 11
        assert all("must not write" in message for _, message in refused)
        assert read[:4] == [{"n": 1}, {"n": 2}, None, True]
        assert (sorted(read[4]), *read[5:]) == (["a", "b", "old"], 3, False)
        assert store.stats().dispose_errors == 0
        assert sorted(store.ids()) == ["b", "old"]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_session_of_another_serializer_is_a_counted_miss(manage: Start, store_dir: Path, in_place: bool) -> None:
    with manage() as manager, connect("shop", directory=store_dir) as store:
        store.set("a", {"x": 1}, owner="ada")
        manager.apply(memory=2**20, directory=store_dir, serializer=json)
        with connect("shop", directory=store_dir, in_place=in_place) as other:
            misses = other.stats().misses
            assert other.get("a") is other.peek("a") is None
            assert other.stats().misses == misses + 1
            assert "a" not in other
            assert other.all() == {}
            assert other.update("a", {"x": 2}) is other.rename("a", "b") is False
            assert other.touch("a", {"cookie": {}}) is False
            assert store.get("a") == {"x": 1}
            assert other.ids() == other.owned_by("ada") == ["a"]
            other.set("a", {"x": (2,)})
            assert other.get("a") == {"x": [2]}
            assert store.get("a") == {"x": [2]}  # it knows the new serializer by now


@pytest.mark.parametrize("in_place", [True, False])
def test_a_lock_timeout_names_the_holder(manage: Start, store_dir: Path, in_place: bool) -> None:
    with (
        manage(lock_timeout=0.05),
        connect("shop", directory=store_dir) as holder,
        connect("shop", directory=store_dir, in_place=in_place) as store,
    ):
        store.set("a", {"x": 1})
        child = os.fork()
        if not child:
            try:
                holder.arena.lock(5)  # type: ignore[attr-defined]
                (store_dir / "held").touch()
                wait_for((store_dir / "enough").exists)
                holder.arena.unlock()  # type: ignore[attr-defined]
            finally:
                os._exit(0)
        wait_until((store_dir / "held").exists)
        try:
            for call in (lambda: store.set("a", {}), lambda: store.destroy("a"), lambda: store.touch("a", ttl=1)):
                with pytest.raises(StoreTimeout, match=f"process {child} .* holds it"):
                    call()
            assert store.get("a") == {"x": 1}
        finally:
            (store_dir / "enough").touch()
            os.waitpid(child, 0)
        store.set("a", {"x": 2})
        assert store.get("a") == {"x": 2}
