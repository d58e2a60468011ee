"""`shmstore copy`: real processes, between stores in shared memory, real servers and files."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import invoke
from processes import Run, Start, wait_for
from redis_servers import RedisCluster, RedisServer, StartRedis

from shmstore import ConfigError, RedisStore, Store, StoreUnavailable, snapshot
from shmstore.codec.ids import digest_of_key, key_of_id, owner_digest
from shmstore.engine.arena import Arena
from shmstore.engine.frame import TimedRecord
from shmstore.engine.header import MOVED, STATE
from shmstore.engine.layout import Geometry
from shmstore.engine.reader import Entry
from shmstore.engine.verify import verify
from shmstore.redis.endpoint import RedisEndpoint
from shmstore.redis.value import HEAD
from shmstore.store import endpoint
from shmstore.store.endpoint import MemoryEndpoint
from shmstore.transfer.copy import COPIED, SKIPPED, Copied, copy, quiet
from shmstore.transfer.snapshot_file import SnapshotSource, writing

_numbers = itertools.count()
SESSIONS: dict[str, tuple[dict[str, Any], float, str | None]] = {
    secrets.token_urlsafe(32): ({"n": 0}, 3600, None),
    secrets.token_urlsafe(32): ({"cart": ["tea"], "bytes": b"\0\xff"}, 86400, "ada"),
    secrets.token_urlsafe(32): ({}, float("inf"), "eve\x1b[31m\n"),
    secrets.token_urlsafe(32): ({"text": "ä" * 5000}, 60.5, "ada"),
}
SIDS = list(SESSIONS)
LATE = secrets.token_urlsafe(32)

Stores = Any  # a Store, a proxy or a RedisStore: what they have in common is the contract
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def url(redis_server: RedisServer) -> Callable[[], str]:
    """Return a function that returns the URL of a new store on a server."""
    return lambda: f"{redis_server.url}?prefix=c{os.getpid()}.{next(_numbers)}:"


@pytest.fixture
def cli() -> Call:
    """Return a function that runs a command to its end. No output of it may contain an id."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        done = invoke(*arguments)
        said = done.stdout + done.stderr
        assert not [sid for sid in (*SIDS, LATE) if sid in said], said
        assert "Traceback" not in said, said
        return done

    return call


def told(done: subprocess.CompletedProcess[str]) -> tuple[int, int, int]:
    """Return copied, skipped and refused of a successful command, called with --json."""
    assert (done.returncode, done.stderr) == (0, ""), done
    counts = json.loads(done.stdout)
    assert counts["missing"] == 0
    assert counts["total"] == counts["copied"] + counts["skipped"] + counts["refused"]
    return counts["copied"], counts["skipped"], counts["refused"]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def fill(store: Stores) -> None:
    for sid, (session, ttl, owner) in SESSIONS.items():
        store.set(sid, session, ttl=ttl, owner=owner)


def assert_same(store: Stores) -> None:
    """Check that a store has all sessions of `fill`, unchanged."""
    assert list(store.ids()) == SIDS[::-1], "the order of use"
    for sid, (session, ttl, owner) in SESSIONS.items():
        loaded = store.load(sid)
        assert store.peek(sid) == session
        assert loaded is not None
        assert loaded.owner == owner
        assert loaded.remaining == ttl or ttl - 60 < loaded.remaining < ttl + 5
        assert 0 <= loaded.created < 60
    assert set(store.owned_by("ada")) == {SIDS[1], SIDS[3]}


def state(store: Stores) -> list[Any]:
    return [(sid, store.peek(sid)) for sid in store.ids()]


# -- from any to any -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_from_memory_to_a_server_and_back(
    running: bool, manage: Start, store_dir: Path, url: Callable[[], str], cli: Call
) -> None:
    one, two, where = manage("one", check_period=None), manage("two", check_period=None), url()
    with one.store() as store:
        fill(store)
        store.set(LATE, {}, ttl=-1)
        before = state(store)
    two.store().close()
    if not running:
        one.shutdown()
    assert told(cli("copy", store_dir / "one", where, "--json")) == (4, 0, 0)
    with RedisStore.from_url(where) as store:
        assert_same(store)
    assert told(cli("copy", where, f"shm://{store_dir}/two", "--json")) == (4, 0, 0)
    assert told(cli("copy", where, "two", "--directory", store_dir, "--json")) == (0, 4, 0)
    with manage("two").store() as store:
        assert_same(store)
    with manage("one").store() as store:
        assert state(store) == before, "FROM is as it was"


def test_through_a_file(manage: Start, store_dir: Path, url: Callable[[], str], tmp_path: Path, cli: Call) -> None:
    where, file, again = url(), tmp_path / "shop.snapshot", tmp_path / "again"
    with manage("shop").store() as store:
        fill(store)
        done = cli("copy", store_dir / "shop", file)
    assert done.stdout == "4 sessions copied, 0 skipped, 0 refused\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert snapshot.describe(file).store == "shop"
    assert told(cli("copy", file, where, "--json")) == (4, 0, 0)
    assert told(cli("copy", where, again, "--json")) == (4, 0, 0)
    assert told(cli("copy", where, again, "--json")) == (4, 0, 0), "a file is written anew"
    with RedisStore.from_url(where) as store:
        assert_same(store)
    with Store(memory=2**20) as store:
        assert snapshot.load(store, again) == 4
        assert_same(store)


def test_to_a_cluster_and_on_to_a_server(redis_cluster: RedisCluster, url: Callable[[], str], cli: Call) -> None:
    cluster, where = f"{redis_cluster.url}/?prefix=c{os.getpid()}:", url()
    with RedisStore.from_url(cluster) as store:
        fill(store)
        assert told(cli("copy", cluster, where, "--json")) == (4, 0, 0)
        store.clear()
        assert told(cli("copy", where, cluster, "--json")) == (4, 0, 0)
        assert told(cli("copy", where, cluster, "--json")) == (0, 4, 0)
        assert_same(store)
        assert store.destroy_owned("ada") == 2
    with RedisStore.from_url(where) as store:
        assert_same(store)


def test_a_copy_between_stores_in_memory_keeps_the_ages() -> None:
    now = [10**15]
    with (
        Store(memory=2**20, clock=lambda: now[0], check_period=None) as one,
        Store(memory=2**20, clock=lambda: now[0] + 10**12, check_period=None) as two,
    ):
        one.set("a", {"n": 1}, ttl=100)
        now[0] += 40 * 10**9
        one.touch("a", ttl=100)
        now[0] += 30 * 10**9
        assert copied(one, two)[:2] == (1, 0)
        loaded = two.load("a")
        assert loaded is not None
        assert (loaded.created, loaded.idle, loaded.remaining) == pytest.approx((70, 30, 70), abs=5), (
            "whatever their clocks say"
        )


# -- repeated copies -----------------------------------------------------------------------------------------------


def copied(one: Stores, two: Stores) -> Copied:
    return copy(end(one), end(two))


def end(store: Stores) -> Any:
    if isinstance(store, RedisStore):
        return RedisEndpoint(store, store._engine._prefix)
    return MemoryEndpoint(store, "store")


@pytest.fixture(params=["memory", "server", "cluster"])
def other(request: pytest.FixtureRequest, url: Callable[[], str]) -> Iterator[Stores]:
    """Return a store to copy to."""
    if request.param == "memory":
        with Store(memory=2**20, recency=0) as store:
            yield store
        return
    if request.param == "cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        where = f"{cluster.url}/?prefix=o{os.getpid()}.{next(_numbers)}:"
    else:
        where = url()
    with RedisStore.from_url(where) as store:
        yield store


@pytest.fixture
def shop() -> Iterator[Store]:
    with Store(memory=2**20, recency=0) as store:
        fill(store)
        yield store


def test_a_second_copy_brings_only_newer_sessions(shop: Store, other: Stores) -> None:
    assert copied(shop, other) == (4, 0, 0, 0, 4, {})
    before = state(other)
    shop.get(SIDS[0])  # reading it does not change the session
    assert copied(shop, other)[:2] == (0, 4)
    assert state(other) == before

    other.update(SIDS[0], {"n": "newer there"})
    shop.update(SIDS[1], {"cart": ["newer here"]}, owner="bob")
    shop.touch(SIDS[3], ttl=3000)
    shop.set(LATE, {"new": True})
    assert copied(shop, other)[:2] == (3, 2)
    assert other.peek(SIDS[0]) == {"n": "newer there"}
    assert other.peek(SIDS[1])["cart"] == ["newer here"]
    assert other.owned_by("bob") == [SIDS[1]]
    assert other.owned_by("ada") == [SIDS[3]]
    assert 2900 < other.load(SIDS[3]).remaining < 3005
    assert other.peek(LATE) == {"new": True}
    assert copied(shop, other)[:2] == (0, 5)


def test_a_second_copy_brings_sessions_changed_during_the_read(
    shop: Store, other: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = shop.arena.reader.try_at

    def change_after(slot: int) -> Entry | None:
        entry = read(slot)
        monkeypatch.undo()
        shop.update(SIDS[0], {"n": "newer"})
        return entry

    monkeypatch.setattr(shop.arena.reader, "try_at", change_after)
    assert copied(shop, other)[:2] == (4, 0)
    assert other.peek(SIDS[0]) == {"n": 0}
    assert copied(shop, other)[:2] == (1, 3)
    assert other.peek(SIDS[0]) == {"n": "newer"}


def test_a_second_copy_brings_sessions_changed_while_the_sink_was_in_use(shop: Store, other: Stores) -> None:
    source, sink = end(shop), end(other)
    survey = source.survey(quiet)
    records = source.read(range(len(survey.sizes)))
    shop.update(SIDS[0], {"n": "newer"})
    other.set(LATE, {})
    assert sink.put(records) == [COPIED] * 4
    assert other.ids() == [LATE, *SIDS[::-1]]
    assert copied(shop, other)[:2] == (1, 3)
    assert other.peek(SIDS[0]) == {"n": "newer"}


def test_a_session_ended_at_the_sink_is_not_copied_again(shop: Store, other: Stores) -> None:
    copied(shop, other)
    other.destroy(SIDS[1], tombstone=True)  # as at a logout and at a login
    new = secrets.token_urlsafe(32)
    assert other.rename(SIDS[2], new, tombstone=True)
    assert copied(shop, other)[:2] == (0, 4)
    assert other.peek(SIDS[1]) is None
    assert other.peek(SIDS[2]) is None
    assert other.gone(SIDS[2])
    assert set(other.ids()) == {SIDS[0], SIDS[3], new}


def record_of(session: dict[str, Any]) -> TimedRecord:
    """Return the record of a session with the id `LATE`, which was used now and lives for an hour."""
    with Store(memory=2**16) as store:
        store.set(LATE, session, ttl=3600)
        source = MemoryEndpoint(store)
        source.survey(quiet)
        (record,) = source.read([0])
        return record


DECISIONS = {
    # the sink's session: content, and by how many seconds its use and its deadline are later than the copied session's
    "nothing": (None, COPIED),
    "used earlier": (({"n": 2}, -5, 0), COPIED),
    "used later": (({"n": 2}, 5, 0), SKIPPED),
    "used at the same time": (({"n": 2}, 0, 0), SKIPPED),
    "the same, used earlier": (({"n": 1}, -5, 0), SKIPPED),
    "the same, and the deadline nearly": (({"n": 1}, -5, 0.5), SKIPPED),
    "the same with an earlier deadline": (({"n": 1}, -5, -5), COPIED),
    "the same with a later deadline": (({"n": 1}, -5, 5), COPIED),
    "the same, used later, with another deadline": (({"n": 1}, 5, -5), SKIPPED),
    "expired": (({"n": 2}, 5, -3600), COPIED),
}


def there(record: TimedRecord, has: tuple[dict[str, Any], float, float]) -> TimedRecord:
    session, used, deadline = has
    return record_of(session)[0], record[1] + int(deadline * 10**9), record[2] + int(used * 10**9)


@pytest.mark.parametrize("case", DECISIONS)
def test_all_sinks_resolve_conflicts_alike(case: str, other: Stores) -> None:
    has, expected = DECISIONS[case]
    sealed, deadline, used = record_of({"n": 1})
    record = sealed, deadline, used - 10 * 10**9  # no use at the sink is in the future
    sink = end(other)
    if has is not None:
        assert sink.put([there(record, has)]) == [COPIED]
        if case == "expired":
            wait_for(lambda: other.peek(LATE) is None, "its end")
    assert sink.put([record]) == [expected]
    assert other.peek(LATE) == ({"n": 1} if has is None or expected == COPIED else has[0])


@pytest.mark.parametrize("renamed", [False, True])
def test_all_sinks_respect_tombstones(renamed: bool, other: Stores) -> None:
    other.set(LATE, {"n": 2})
    if renamed:
        assert other.rename(LATE, SIDS[0], tombstone=True)
    else:
        assert other.destroy(LATE, tombstone=True)
    assert end(other).put([record_of({"n": 1})]) == [SKIPPED]
    assert other.peek(LATE) is None


def test_both_ends_may_be_rebuilt_during_a_copy(shop: Store) -> None:
    for number in range(300):
        shop.set(f"{number}", {"n": number})
    before = state(shop)
    with Store(memory=2**20, recency=0) as other:

        def progress(done: int, _: int) -> None:
            if 0 < done < 200:
                assert len(shop)
                shop.move(Geometry.plan(2**21))
                shop.clear()
                other.move(Geometry.plan(2**21))

        assert copy(end(shop), end(other), progress)[:5] == (304, 0, 0, 0, 304)
        assert state(other) == before
        verify(other.arena)


def test_an_arena_that_is_replaced_again_and_again_is_an_error(shop: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_REPLACED", 0.05)
    before = state(shop)
    with Store(memory=2**20) as other:

        def replaced(_: Store) -> Arena:
            arena = Arena.create(None, Geometry.plan(2**16))
            arena.cells[STATE] = MOVED
            return arena

        sink, record = end(other), record_of({"n": 1})
        monkeypatch.setattr(Store, "arena", property(replaced))
        with pytest.raises(StoreUnavailable, match=r"replaced again and again.*repeat the copy"):
            sink.put([record])
        monkeypatch.undo()
        assert (len(other), state(shop)) == (0, before)


KILLED = """
import os, signal, sys
from shmstore import RedisStore
from shmstore.cli.target import open_target
from shmstore.redis.endpoint import RedisEndpoint
from shmstore.ipc.directory import StoreFiles
from shmstore.transfer.copy import copy
from shmstore.store.endpoint import MemoryEndpoint
from shmstore.transfer.snapshot_file import writing

def progress(done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

one = MemoryEndpoint(open_target(StoreFiles.of("shm://" + sys.argv[1])).store, "one")
to = sys.argv[2]
if "?" in to:
    sink = RedisEndpoint(RedisStore.from_url(to), to.partition("prefix=")[2])
elif to.endswith("two"):
    sink = MemoryEndpoint(open_target(StoreFiles.of("shm://" + to)).store, "two")
else:
    file = writing(to, "one")
    sink = file.__enter__()
copy(one, sink, progress)
"""


@pytest.mark.parametrize("kind", ["memory", "server", "file"])
def test_a_killed_copy_can_be_repeated(
    kind: str, manage: Start, store_dir: Path, url: Callable[[], str], tmp_path: Path, run: Run, cli: Call
) -> None:
    to = {"memory": str(store_dir / "two"), "server": url(), "file": str(tmp_path / "kept")}[kind]
    with manage("one").store() as store:
        for number in range(700):
            store.set(f"{number}", {"n": number}, owner=f"{number % 10}")
        if kind == "memory":
            manage("two").store().close()
        assert run(KILLED, store_dir / "one", to).wait(60) == -signal.SIGKILL
        if kind == "file":
            assert not os.path.exists(to), "a file is whole, or not there"
            assert told(cli("copy", store_dir / "one", to, "--json")) == (700, 0, 0)
            assert snapshot.describe(to).sessions == 700
            return
        new, skipped, _ = told(cli("copy", store_dir / "one", to, "--json"))
        assert new + skipped == 700
        assert new
        assert skipped
    with RedisStore.from_url(to) if kind == "server" else manage("two").store() as other:
        expected = [(f"{number}", {"n": number}) for number in range(699, -1, -1)]
        there = state(other)
        if kind == "server":  # two readings of its clock differ by more than the times of these sessions
            there.sort(key=lambda each: -int(each[0]))
        assert there == expected
        assert len(other.owned_by("3")) == 70


# -- refused copies ------------------------------------------------------------------------------------------------


def test_the_most_recently_used_sessions_are_copied_if_not_all_fit(
    manage: Start, store_dir: Path, url: Callable[[], str], cli: Call
) -> None:
    where = url()
    with RedisStore.from_url(where) as store, manage("small", memory=2**16, max_session=4000).store() as small:
        small.set("there", {}, owner="ada")
        for number in range(200):
            store.set(f"{number}", {"data": bytes(1000)})
        store.set("large", {"data": bytes(5000)})
        for _ in range(2):
            done = cli("copy", where, store_dir / "small")
            assert done.returncode == 1
            counts = re.fullmatch(r"(\d+) sessions? copied, (\d+) skipped, (\d+) refused\n", done.stdout)
            assert counts
            assert sum(map(int, counts.groups())) == 201
            assert re.search(r"^1 session refused, too large: [0-9a-f]{12}$", done.stderr, re.MULTILINE), done.stderr
            assert re.search(r"^\d+ sessions refused, no room: ([0-9a-f]{12}, ){5}\.\.\.$", done.stderr, re.MULTILINE)
            assert small.stats().evicted == 0, "nobody is evicted"
            taken = set(small.ids()) - {"there"}
            assert len(taken) == int(counts[1]) + int(counts[2]) > 10
            assert taken == {f"{number}" for number in range(200 - len(taken), 200)}
        assert store.length() == 201


def test_a_full_server_refuses_sessions(shop: Store, start_redis: StartRedis, store_dir: Path) -> None:
    server = start_redis("--maxmemory-policy", "noeviction")
    with RedisStore.from_url(server.url) as store, server.client() as client:
        client.config_set("maxmemory", "1")
        full = copied(shop, store)
        assert (full.copied, full.refused, list(full.reasons)) == (0, 4, ["no room"])
        client.config_set("maxmemory", "0")
        assert copied(shop, store)[:3] == (4, 0, 0)


def test_sessions_evicted_by_the_server_are_reported(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory-policy", "allkeys-lru")
    with Store(memory=2**25) as shop, RedisStore.from_url(server.url) as store, server.client() as client:
        for number in range(3000):
            shop.set(f"{number}", {"data": bytes(2000)})
        info: Any = client.info("memory")
        client.config_set("maxmemory", str(info["used_memory"] + 3_000_000))
        found = copied(shop, store)
        assert found.copied + found.refused == 3000
        assert 0 < found.missing <= found.copied - store.length() < found.missing + 50, "some may go after the look"


def test_max_per_owner_limits_the_copied_sessions(shop: Store) -> None:
    with Store(memory=2**20, max_per_owner=1) as other:
        assert list(copied(shop, other).reasons) == ["its owner has max_per_owner sessions"]
        assert other.owned_by("ada") == [SIDS[3]], "the one that was used last"


def test_sessions_of_another_serializer_are_refused(shop: Store) -> None:
    with Store(memory=2**20, serializer=json) as other:
        found = copied(shop, other)
        assert (found.copied, found.refused) == (0, 4)
        assert list(found.reasons) == ["written by the serializer 'msgpack', not by 'json'"]


def test_the_weight_is_that_of_the_sink(shop: Store) -> None:
    with Store(memory=2**20, max=3, length=lambda size, sid: 1 + (sid == SIDS[3])) as other:
        assert copied(shop, other)[:3] == (3, 0, 1)
        assert len(other) == 3


def test_hostile_records_are_refused(redis_server: RedisServer, url: Callable[[], str], cli: Call) -> None:
    where = url()
    prefix, to = where.partition("prefix=")[2], url()
    with RedisStore.from_url(where) as store, redis_server.client() as client, RedisStore.from_url(to) as other:
        fill(store)
        key = store._engine.key_of(SIDS[0])
        assert key
        good = client.get(key)
        assert isinstance(good, bytes)
        hostile = {
            "another's": good,  # a record that contains another id
            "no body": good[: HEAD.size + 1],
            "no session": good[: HEAD.size] + os.urandom(100),
            "another's owner": good[: HEAD.size - 8] + owner_digest("ada").to_bytes(8) + good[HEAD.size :],
            "no map": good[:-1] + b"\xc1",
        }
        for name, data in hostile.items():
            sid = name.ljust(len(SIDS[0]))
            found = key_of_id(sid)
            assert found
            ours = data if name == "another's" else data.replace(SIDS[0].encode(), sid.encode())
            client.set(f"{prefix}{{{digest_of_key(found)}}}", ours)
        done = cli("copy", where, to)
        assert done.returncode == 1
        assert done.stdout == "4 sessions copied, 0 skipped, 5 refused\n"
        assert "5 sessions refused, damaged: " in done.stderr
        assert_same(other)
        client.set(f"{prefix}{{\xff}}".encode("latin-1"), b"x" * 100)
        assert "prefix of its own" in one_line(cli("copy", where, to))


def test_missing_sources_and_sinks(
    manage: Start, store_dir: Path, redis_server: RedisServer, url: Callable[[], str], tmp_path: Path, cli: Call
) -> None:
    manage("shop").store().set(LATE, {}, ttl=-1)
    shop, kept, where = store_dir / "shop", tmp_path / "kept", url()
    assert told(cli("copy", shop, kept, "--json")) == (0, 0, 0)
    nowhere = [
        ("absent", where, "no store 'absent'"),
        (store_dir / "absent", where, "no store and no snapshot"),
        (where, "absent", "shmstore serve absent"),
        (where, store_dir / "absent", "shmstore serve absent"),
        (where, tmp_path / "no" / "file", "cannot be"),
        (where, tmp_path, "shmstore serve"),
        (__file__, where, "snapshot"),
        (where, __file__, "not replaced"),
        (shop, shop, "itself"),
        (where, where, "itself"),
        (kept, kept, "itself"),
        (kept, f"{tmp_path}/../{tmp_path.name}/kept", "itself"),
        (f"{where}x\0", kept, "prefix"),
        (where, "http://example.com", "not a store URL"),
        (where, "redis://:xyzzy@127.0.0.1:1/0", "127.0.0.1:1"),
        (where, "redis://user:xyzzy/1@127.0.0.1:1/0", "127.0.0.1:1"),
        ("redis//user:xyzzy@127.0.0.1:1/0", where, "a URL begins with"),
        (where, "http://user:xyzzy@127.0.0.1", "a URL begins with"),
        ("shop\x1b[31m", where, "is not a valid store name"),
    ]
    for one, two, why in nowhere:
        directory = () if "/" in str(one) and "/" in str(two) else ("--directory", store_dir)
        said = one_line(cli("copy", one, two, *directory)) if "\0" not in str(one) else why
        assert why in said, (one, two, said)
        assert "xyzzy" not in said
        assert "\x1b" not in said
    assert sorted(os.listdir(store_dir)) == ["shop"], "nothing was started or made"
    assert sorted(os.listdir(tmp_path)) == ["kept"]
    redis_server.client()  # two URLs of one store
    prefix = where.partition("?")[2]
    assert "itself" in one_line(cli("copy", where, f"redis+unix://{redis_server.socket}?{prefix}"))


def test_a_hard_link_is_the_same_file(tmp_path: Path, shop: Store) -> None:
    snapshot.save(shop, tmp_path / "kept")
    os.link(tmp_path / "kept", tmp_path / "linked")
    with (
        SnapshotSource(tmp_path / "kept") as one,
        pytest.raises(ConfigError, match="itself"),
        writing(tmp_path / "linked", "") as two,
    ):
        copy(one, two)


def test_a_server_that_dies_during_a_copy(shop: Store, start_redis: StartRedis, cli: Call, tmp_path: Path) -> None:
    server = start_redis()
    snapshot.save(shop, tmp_path / "kept")
    server.kill()
    assert "cannot be reached" in one_line(cli("copy", tmp_path / "kept", server.url))
    server.start()
    wait_for(lambda: told(cli("copy", tmp_path / "kept", server.url, "--json")) == (4, 0, 0), "the server", timeout=300)
