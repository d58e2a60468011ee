"""Particular to RedisStore: scripts on the server, round trips, keys, which commands are sent again."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from fault_injection import uncollected
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from processes import ROOT, stop, wait_for
from redis_servers import RedisCluster, RedisServer, StartRedis
from redis_wire import Wire
from sampling import FULL, some

from shmstore import ConfigError, RecordTooLarge, RedisStore, Store, StoreUnavailable
from shmstore.codec.ids import digest_of_key, key_of_id, owner_digest
from shmstore.contract import KEEP, Capability
from shmstore.engine.frame import body_of
from shmstore.listing import digest, row_of
from shmstore.redis.scripts import DROP_OWNED
from shmstore.redis.value import HEAD

_numbers = itertools.count()


@pytest.fixture
def prefix() -> str:
    return f"p{os.getpid()}.{next(_numbers)}:"


@pytest.fixture
def store(redis_server: RedisServer, prefix: str) -> Iterator[RedisStore]:
    with RedisStore.from_url(f"{redis_server.url}?prefix={prefix}") as store:
        yield store


@pytest.fixture
def in_cluster(redis_cluster: RedisCluster, prefix: str) -> Iterator[RedisStore]:
    with RedisStore.from_url(f"{redis_cluster.url}?prefix={prefix}") as store:
        yield store


@pytest.fixture
def wire(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    wire = Wire(tmp_path_factory.mktemp("w") / "wire", redis_server.socket)
    yield wire
    wire.end()


@pytest.fixture
def wired(wire: Wire, prefix: str) -> Iterator[RedisStore]:
    with RedisStore.from_url(f"{wire.url}?prefix={prefix}") as store:
        store._counters.due = math.inf  # else they may be sent at any call
        yield store


# Operations on the sessions a and b, whose owner is Ada, and c, which has no owner.
OPERATIONS: dict[str, Callable[[RedisStore], object]] = {
    "get": lambda store: store.get("a"),
    "peek": lambda store: store.peek("a"),
    "load": lambda store: store.load("a"),
    "in": lambda store: "a" in store,
    "gone": lambda store: store.gone("a"),
    "set": lambda store: store.set("c", {"x": 2}),
    "set with an owner": lambda store: store.set("c", {"x": 2}, owner="bob"),
    "add": lambda store: store.add("d", {"x": 2}),
    "add with an owner": lambda store: store.add("d", {"x": 2}, owner="bob"),
    "replace": lambda store: store.replace("a", {"x": 2}),
    "replace with an owner": lambda store: store.replace("c", {"x": 2}, owner="bob"),
    "update": lambda store: store.update("a", {"x": 2}, ["y"]),
    "update with a life": lambda store: store.update("a", {"x": 2}, ttl=10**6),
    "update with an owner": lambda store: store.update("a", {"x": 2}, owner="bob"),
    "update after a load of something else": lambda store: store.update("c", {"x": 2}, ttl=math.inf),
    "rename": lambda store: store.rename("a", "e", {"x": 2}),
    "rename with an owner": lambda store: store.rename("c", "e", owner="bob", ttl=60),
    "touch": lambda store: store.touch("a", ttl=10**7),
    "destroy": lambda store: store.destroy("a"),
    "destroy_owned": lambda store: store.destroy_owned("ada"),
    "destroy_owned but one": lambda store: store.destroy_owned("ada", keep=["a"]),
}
READS = ("get", "peek", "load", "in", "gone")


def fill(store: RedisStore) -> None:
    """Store the sessions, and load each script into the server."""
    for operation in OPERATIONS.values():
        for sid in "abcde":
            store.destroy(sid)
        for sid in "ab":
            store.set(sid, {"x": 1, "y": [1, 2]}, owner="ada")
        store.set("c", {"x": 1})
        operation(store)
    for sid in "abcde":
        store.destroy(sid)
    for sid in "ab":
        store.set(sid, {"x": 1, "y": [1, 2]}, owner="ada")
    store.set("c", {"x": 1})


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_one_round_trip(wired: RedisStore, wire: Wire, name: str) -> None:
    fill(wired)
    before = wire.trips
    assert OPERATIONS[name](wired) is not False or name == "gone"
    assert wire.trips - before == 1, wire.requests[before:]


@pytest.mark.parametrize("new", [None, "new"])
@pytest.mark.parametrize("owner", [KEEP, None, "bob"])
def test_a_swap_is_one_round_trip(wired: RedisStore, wire: Wire, owner: Any, new: str | None) -> None:
    fill(wired)
    first, loaded = wired.load("b"), wired.load("a")
    assert first is not None
    assert loaded is not None
    to = None if new is None else "other"
    wired.swap("b", first, wired.codec.encode({}), 60, owner, to)  # this loads the script
    for swapped in (True, False):
        before = wire.trips
        assert wired.swap("a", loaded, wired.codec.encode({"x": 2}), 60, owner, new, True) is swapped
        assert wire.trips - before == 1, wire.requests[before:]


def test_round_trips_for_many_sessions(wired: RedisStore, wire: Wire) -> None:
    for number in range(1000):
        wired.set(str(number), {"n": number}, owner="ada" if number % 2 else None)
    for call, most in (
        (wired.ids, 60), (wired.all, 60), (wired.length, 20), (wired.stats, 60),
        (lambda: wired.owned_by("ada"), 12), (lambda: wired.destroy_owned("ada"), 2), (wired.clear, 60),
    ):  # fmt: skip  # what is answered before the rest of a batch has come makes that count as one more
        before = wire.trips
        call()
        assert wire.trips - before <= most, call


def monitored(server: RedisServer, call: Callable[[], object]) -> list[str]:
    """Return the commands that a server has executed during a call, scripts' own included."""
    client = server.client()
    with client.monitor() as monitor:
        call()
        client.echo("the end")
        commands = []
        while "the end" not in (command := str(monitor.next_command()["command"])):
            commands.append(command)
    client.close()
    return commands


def test_no_keys_command_and_no_id_or_owner_in_a_key(start_redis: StartRedis) -> None:
    server = start_redis()
    with RedisStore.from_url(server.url) as store:

        def everything() -> None:
            store.set("secret id", {"x": 1}, owner="the owner")
            assert store.update("secret id", {"x": 2}, owner="another owner")
            assert store.rename("secret id", "other id")
            assert store.touch("other id", ttl=60)
            assert store.ids() == ["other id"]
            assert store.owned_by("another owner") == ["other id"]
            with store.lock("other id"):
                assert len(store.all()) == store.length() == 1
            store.prune()
            store.stats()
            assert store.destroy_owned("another owner") == 1
            store.set("secret id", {})
            store.clear()

        commands = monitored(server, everything)
        names = {command.split()[0].upper() for command in commands}
        assert "KEYS" not in names
        assert {"SCAN", "EVALSHA", "GETRANGE"} <= names
        assert all("COUNT" in command for command in commands if command.upper().startswith("SCAN"))
        store.set("secret id", {"x": 1}, owner="the owner")
        store.destroy("other id")
        with store.lock("secret id"):
            keys = [key.decode() for key in server.client().scan_iter()]
    digest = digest_of_key(key_of_id("secret id") or (0, 0))
    assert f"shmstore:{{{digest}}}" in keys
    assert f"shmstore:{{{digest}}}lock" in keys
    assert f"shmstore:owner:{owner_digest('the owner'):016x}" in keys
    assert not [key for key in keys if "secret" in key or "owner:the" in key]


def test_all_keys_of_a_session_are_in_one_slot(in_cluster: RedisStore, redis_cluster: RedisCluster) -> None:
    slot = redis_cluster.servers[0].client().cluster
    for sid in ("a", "b", "é"):
        key = in_cluster._engine.key_of(sid)
        assert len({slot("KEYSLOT", f"{key}{what}") for what in ("", "gone", "lock")}) == 1


def test_the_record_equals_that_of_an_arena(store: RedisStore, redis_server: RedisServer) -> None:
    session = {"x": 1, "y": [1, 2.5, "three"], "z": b"4"}
    with Store(memory=2**18) as here:
        for each in (store, here):
            each.set("a", session, owner="ada")
            each.update("a", {"y": None, "new": 1}, ["x"])
        entry = here.arena.reader.at(here.arena.table.live_slots()[0], 1)
        assert entry is not None
        body = bytes(body_of(entry[4]))
    found = redis_server.client().get(store._engine.key_of("a") or "")
    assert isinstance(found, bytes)
    assert found[HEAD.size :] == body


# -- the server changes sessions --------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=10),
    st.integers(0, 70_000).map(lambda size: "x" * size), st.integers(0, 70_000).map(bytes), st.datetimes(),
    st.decimals(allow_nan=False), st.integers(0, 70_000).map(lambda size: [None] * size),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
keys = st.one_of(st.sampled_from("abcdefgh"), st.text(max_size=5), st.integers(-(2**40), 2**40))
sessions = st.dictionaries(keys, values, max_size=18)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # sessions are large here
@settings(
    max_examples=1000 if FULL else 15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(sessions, sessions, st.lists(keys, max_size=8), st.booleans())
def test_the_server_changes_a_session_as_an_arena_does(
    store: RedisStore, session: dict[Any, Any], change: dict[Any, Any], delete: list[Any], rename: bool
) -> None:
    with Store(memory=2**20) as here:
        assume(sum(len(here.codec.encode(each)) for each in (session, change)) < 250_000)  # more is refused
        loaded = []
        for each in (store, here):
            each.destroy("b")
            each.set("a", session, owner="ada")
            assert each.rename("a", "b", change, delete) if rename else each.update("a", change, delete)
            loaded.append(each.load("b" if rename else "a"))
    assert loaded[0] is not None
    assert loaded[1] is not None
    assert loaded[0].payload == loaded[1].payload
    assert loaded[0].owner == loaded[1].owner == "ada"


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 300, 65535, 65536])
def test_a_session_of_many_keys(store: RedisStore, count: int) -> None:
    session: dict[str, Any] = {f"k{number}": number for number in range(count)}
    store.set("a", session)
    assert store.update("a", {"more": [[]], "k0": {}}, ["k1", "missing"])
    session |= {"more": [[]], "k0": {}}
    session.pop("k1", None)
    assert store.get("a") == session


def test_a_large_session_is_changed_and_one_too_large_refused(redis_server: RedisServer, prefix: str) -> None:
    url = f"{redis_server.url}?prefix={prefix}"
    with RedisStore.from_url(url, max_session=1000) as small, RedisStore.from_url(url) as store:
        store.set("a", {"x": "y" * 500_000, "n": 1})
        assert store.update("a", {"n": 2, "m": ["z" * 70_000]})
        assert store.get("a") == {"x": "y" * 500_000, "n": 2, "m": ["z" * 70_000]}
        with pytest.raises(RecordTooLarge, match="570"):
            small.update("a", {"n": 3})
        assert small.update("a", {"n": 3}, ["x", "m"])
        assert store.get("a") == {"n": 3}


def test_a_damaged_session_is_a_miss(store: RedisStore, redis_server: RedisServer) -> None:
    key = store._engine.key_of("a") or ""
    client = redis_server.client()
    rnd = random.Random(7)
    store.set("a", {"x": [1, 2, {"y": "z"}], "t": "text"}, owner="ada")
    whole = client.get(key)
    assert isinstance(whole, bytes)
    for _ in range(300 if FULL else 60):
        data = bytearray(whole[: rnd.randrange(HEAD.size + 1, len(whole) + 1)])
        data[rnd.randrange(HEAD.size, len(data))] = rnd.randrange(256)
        client.set(key, bytes(data))
        store.get("a")
        store.load("a")
        store.update("a", {"new": 1})  # any content is harmless
        store.ids()
        store.owned_by("ada")
    client.set(key, whole)
    assert store.get("a") == {"x": [1, 2, {"y": "z"}], "t": "text"}


def test_concurrent_writes_lose_nothing(store: RedisStore, in_cluster: RedisStore) -> None:
    for each in (store, in_cluster):
        each.set("a", {}, owner="ada")

        def write(who: int, each: RedisStore = each) -> None:
            for number in range(40):
                assert each.update("a", {f"{who}.{number}": number})

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        assert len(each.get("a") or {}) == 320


def test_one_of_many_concurrent_renames_succeeds(store: RedisStore, in_cluster: RedisStore) -> None:
    for each in (store, in_cluster):
        for turn in range(20):
            each.set("a", {"turn": turn}, owner="ada")
            with ThreadPoolExecutor(4) as pool:
                done = list(pool.map(lambda new, each=each: each.rename("a", new), "bcde"))
            assert done.count(True) == 1
            assert each.ids() == each.owned_by("ada") == ["bcde"[done.index(True)]]
            assert each.destroy_owned("ada") == 1


# -- owners -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["store", "in_cluster"])
def test_logging_out_everywhere_misses_no_migrating_session(request: pytest.FixtureRequest, kind: str) -> None:
    """Not even a session that changes its id as fast as possible: the search follows it."""
    each: RedisStore = request.getfixturevalue(kind)
    for turn in range(5):
        first, moving, stop = f"{turn} 0", threading.Event(), threading.Event()
        each.set(first, {}, owner="ada", ttl=60)

        def move(turn: int = turn, moving: threading.Event = moving, stop: threading.Event = stop) -> None:
            for number in itertools.count():
                if stop.is_set() or not each.rename(f"{turn} {number}", f"{turn} {number + 1}", ttl=60):
                    return
                moving.set()

        thread = threading.Thread(target=move, daemon=True)
        thread.start()
        try:
            assert moving.wait(60)
            count = each.destroy_owned("ada")
        finally:
            stop.set()
            thread.join(60)
        assert count == 1, turn
        assert each.owned_by("ada") == each.ids() == []


def between_steps(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[int], object]
) -> list[list[int]]:
    """Let a step remove 10 sessions, and call a function after each; return the list of the steps' answers."""
    answers: list[list[int]] = []
    write = store._link.write

    def writing(*command: Any) -> Any:
        answer = write(*command)
        if command[1] == DROP_OWNED.sha:
            answers.append(answer)
            meanwhile(len(answers))
        return answer

    monkeypatch.setattr("shmstore.redis.engine._AT_ONCE", 10)
    monkeypatch.setattr(store._link, "write", writing)
    return answers


def test_logging_out_everywhere_is_many_small_steps(
    store: RedisStore, prefix: str, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server serves others between two steps. A session that changes its id between two steps is found."""
    for number in range(45):
        store.set(str(number), {}, owner="ada", ttl=1000 + number)
    for sid in ("kept", "also kept"):
        store.set(sid, {}, owner="ada", ttl=500)
    store.set("bob", {}, owner="bob")
    index, client = f"{prefix}owner:{owner_digest('ada'):016x}", redis_server.client()
    # Of sessions that have expired; and of another owner, as if both had the same digest.
    client.zadd(index, {f"{number:032x}": 1 for number in range(25)})
    client.zadd(index, {store._engine.digest_of(store._engine.key_of("bob") or ""): 2})

    def rename(step: int) -> None:
        if step < 6:
            assert store.rename("44" if step == 1 else f"renamed {step - 1}", f"renamed {step}", ttl=10**6)

    answers = between_steps(store, monkeypatch, rename)
    assert store.destroy_owned("ada", keep=["kept", "also kept"]) == 45
    assert max(dropped for dropped, _ in answers) <= 10
    assert answers[-1][1] == 0
    assert 7 <= len(answers) <= 9
    assert sorted(store.ids()) == ["also kept", "bob", "kept"]
    assert sorted(store.owned_by("ada")) == ["also kept", "kept"]
    assert client.zcard(index) == 3


def test_logging_out_everywhere_ends_although_sessions_begin_between_its_steps(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_in(step: int) -> None:
        for number in range(10):
            store.set(f"{step} {number}", {}, owner="ada")

    log_in(-1)
    log_in(0)
    answers = between_steps(store, monkeypatch, log_in)
    assert store.destroy_owned("ada") == 40
    assert answers == [[10, 10], [10, 10], [20, 0]]  # the third one is larger


def test_an_owner_index_lives_as_long_as_its_sessions(store: RedisStore, in_cluster: RedisStore) -> None:
    for each in (store, in_cluster):
        now = each._link.now()
        each.set("a", {}, owner="ada", ttl=10)
        changes: list[Callable[[RedisStore], bool]] = [
            lambda store: store.touch("a", ttl=10**6),
            lambda store: store.update("a", {"x": 1}, ttl=10**7),
            lambda store: store.touch("a", {"cookie": {"max_age": 10**8}}),
            lambda store: store.rename("a", "b", ttl=10**9),
            lambda store: store.update("b", ttl=math.inf),
        ]
        for change in changes:
            assert change(each)
            value = each._engine.read(each._engine.key_of("b" if "b" in each else "a") or "")
            assert value is not None
            assert value.indexed >= value.deadline
            each._engine.prune_indexes(min(value.deadline, now + 10**15))
            assert len(each.owned_by("ada")) == 1
        assert each.destroy_owned("ada") == 1


def test_prune_removes_expired_sessions_from_the_indexes(store: RedisStore, redis_server: RedisServer) -> None:
    for number in range(5):
        store.set(str(number), {}, owner="ada", ttl=0.01)
    store.set("long", {}, owner="ada")
    index = f"{store._engine._indexes}{owner_digest('ada'):016x}"
    client = redis_server.client()
    assert client.zcard(index) == 6

    def forgotten() -> bool:
        assert store.prune() == 0
        return client.zcard(index) == 1

    wait_for(forgotten, "the end of five lives")
    assert store.owned_by("ada") == ["long"]


# -- which commands are sent again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_write_whose_answer_is_lost_is_not_sent_again(
    wired: RedisStore, wire: Wire, store: RedisStore, name: str
) -> None:
    fill(wired)
    before, wire.lose = wire.trips, 1
    if name in READS:
        found = OPERATIONS[name](wired)
        assert found == OPERATIONS[name](store) or name == "load"
        assert sum(b"SETINFO" not in each for each in wire.requests[before:]) == 2
        return
    with pytest.raises(StoreUnavailable, match="cannot be reached"):
        OPERATIONS[name](wired)
    assert wire.trips - before == 1
    assert wire.lose == 0
    fill(wired)  # the next ones work


def test_a_connection_that_its_server_has_closed_is_replaced(store: RedisStore, redis_server: RedisServer) -> None:
    store.set("a", {"n": 0})
    for number in range(1, 10):
        killer: Any = redis_server.client()
        killer.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert store.update("a", {"n": number})
    assert store.get("a") == {"n": 9}


def test_an_answer_that_is_an_error_leaves_no_garbage(redis_server: RedisServer, prefix: str) -> None:
    """Its traceback would keep the frames of all callers, with their data, until the next garbage collection."""

    class Data:
        pass

    def call(store: RedisStore) -> weakref.ref[Data]:
        data = Data()
        redis_server.client().script_flush()
        assert store.touch("s1")
        return weakref.ref(data)

    with RedisStore.from_url(f"{redis_server.url}?prefix={prefix}") as store:
        store.set("s1", {"a": 1})
        with uncollected():
            assert call(store)() is None


def test_scripts_are_loaded_again_after_a_flush(store: RedisStore, redis_server: RedisServer) -> None:
    for number in range(5):
        redis_server.client().script_flush()
        store.set("a", {"n": number}, owner="ada")
        assert store.update("a", {"x": 1})
        redis_server.client().script_flush()
        assert store.destroy_owned("ada") == 1
        for sid in "bcd":
            store.set(sid, {})
        redis_server.client().script_flush()
        store.clear()
        assert store.ids() == []


# -- counters ---------------------------------------------------------------------------------------------------------


def counted(store: RedisStore) -> tuple[int, int, int]:
    stats = store.stats()
    assert stats.gets == stats.hits + stats.misses
    return stats.hits, stats.misses, stats.sets


def test_what_processes_have_counted_stays_when_they_end(store: RedisStore, redis_server: RedisServer) -> None:
    store.set("a", {})
    store.get("a")
    code = """
import sys
from shmstore import RedisStore
store = RedisStore.from_url(sys.argv[1])
for _ in range(3):
    store.get("a")
store.get("b")
"""
    url = f"{redis_server.url}?prefix={store._engine._prefix}"
    for number in range(1, 3):
        subprocess.run([sys.executable, "-c", code, url], check=True, timeout=300, cwd=ROOT)
        assert counted(store) == (1 + 3 * number, number, 1)
    with RedisStore.from_url(url) as other:
        other.set("b", {})
    assert counted(store) == (7, 2, 2)
    store.clear()
    assert (counted(store), store.stats().cleared) == ((7, 2, 2), 2)


def test_a_forked_process_counts_only_what_it_did(store: RedisStore) -> None:
    store._counters.due = math.inf
    store.set("a", {})
    for _ in range(5):
        store.get("a")
    child = os.fork()
    if not child:
        store.get("a")
        store.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert counted(store) == (6, 0, 1)


def test_counters_are_sent_at_a_call_when_they_are_due(wired: RedisStore, wire: Wire, store: RedisStore) -> None:
    wired.get("a")
    assert counted(store)[1] == 0
    wired._counters.due, before = 0, wire.trips
    wired.get("a")
    assert (wire.trips - before, counted(store)[1]) == (2, 2)
    assert time.monotonic() < wired._counters.due < math.inf


def test_a_child_of_fork_sends_what_it_counts_although_a_thread_of_its_parent_was_sending(
    start_redis: StartRedis,
) -> None:
    server = start_redis()
    with RedisStore.from_url(server.url, lock_timeout=100) as store:
        store.set("a", {})
        stop(server.pid)
        store._counters.due = 0
        sender = threading.Thread(target=store._counters.send_due)
        sender.start()
        wait_for(lambda: store._counters.due == math.inf, "the sender")
        child = os.fork()
        if child == 0:
            os._exit(0 if store._counters.due < math.inf else 1)
        _, status = os.waitpid(child, 0)
        os.kill(server.pid, signal.SIGCONT)
        sender.join()
    assert os.waitstatus_to_exitcode(status) == 0


def test_threads_count_exactly_while_counters_are_sent(store: RedisStore) -> None:
    def read(_: int) -> None:
        for _ in range(100):
            store._counters.due = 0
            store.get("a")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, range(4)))
    assert counted(store) == (0, 400, 0)


def test_counters_that_the_server_does_not_take_are_sent_later(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory-policy", "noeviction")
    with RedisStore.from_url(server.url) as store:
        store._counters.due = math.inf
        store.set("a", {})
        assert counted(store) == (0, 0, 1)
        server.client().config_set("maxmemory", 1)
        store.get("a")
        assert counted(store) == (1, 0, 1)
        assert int(server.client().hget("shmstore:counters", "hits") or 0) == 0
        server.client().config_set("maxmemory", 0)
        assert counted(store) == (1, 0, 1)
        assert int(server.client().hget("shmstore:counters", "hits") or 0) == 1
        server.client().set("shmstore:counters", "of another program")
        store.get("a")
        assert counted(store)[0] >= 1
        server.kill()
        store._counters.due = 0
        with pytest.raises(StoreUnavailable):
            store.get("a")
        with pytest.raises(StoreUnavailable):
            store.stats()
        server.start()
        store.get("b")
        assert counted(store)[1] == 1


# -- processes that die between two commands --------------------------------------------------------------------------

DIES = """
import os, signal, sys
from shmstore import RedisStore
url, step = sys.argv[1], int(sys.argv[2])
store = RedisStore.from_url(url)
store._counters.due = float("inf")
store.load("old")
link = store._link
send, sent = link.write, 0
def write(*command):
    global sent
    if sent == step:
        os.kill(os.getpid(), signal.SIGKILL)
    sent += 1
    return send(*command)
link.write = write
assert store.rename("old", f"new {step}", {"x": 2})
print(sent, flush=True)
os._exit(0)  # without the counters, which are sent at the end of a process
"""


@some("owner", {"no owner": None, "ada": "ada"})
def test_a_process_that_dies_during_a_rename_in_a_cluster_leaves_one_session_or_none(
    in_cluster: RedisStore, redis_cluster: RedisCluster, prefix: str, owner: str | None
) -> None:
    url, outcomes = f"{redis_cluster.url}?prefix={prefix}", []
    for step in itertools.count():
        in_cluster.clear()
        in_cluster.set("old", {"x": 1}, owner=owner)
        new = f"new {step}"
        child = subprocess.run(
            [sys.executable, "-c", DIES, url, str(step)], capture_output=True, text=True, timeout=300, cwd=ROOT
        )
        if child.returncode == 0:
            assert int(child.stdout) == step
            break
        assert child.returncode == -signal.SIGKILL, child.stderr
        there = in_cluster.all()
        outcomes.append(list(there))
        assert there in ({"old": {"x": 1}}, {}), "never doubled, never half"
        assert in_cluster.owned_by("ada") == (list(there) if owner else [])
        assert not in_cluster.gone(new)
        kept = in_cluster._link.read("PTTL", in_cluster._engine.key_of(new))
        assert -2 <= kept <= 10_000, "a place that is kept is free again soon"
    assert in_cluster.all() == {new: {"x": 2}}
    assert in_cluster.owned_by("ada") == ([new] if owner else [])
    # before the new id is stored, before the owner's index has it, before the old id is removed, and afterwards
    assert outcomes == [["old"], *([["old"]] if owner else []), ["old"], []]


# -- when the server is full ------------------------------------------------------------------------------------------


def test_a_full_server_is_an_error_and_keeps_its_sessions(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory-policy", "noeviction")
    with RedisStore.from_url(server.url) as store, server.client() as client:
        store.set("a", {"x": 1}, owner="ada")
        client.config_set("maxmemory", "1")  # below its current use: at the limit it would have room now and then
        for write in (
            lambda: store.set("b", {"x": 2}),
            lambda: store.set("a", {"x": "y" * 10_000}, owner="ada"),
            lambda: store.update("a", {"x": "y" * 10_000}),
            lambda: store.rename("a", "b", {"x": "y" * 10_000}),
        ):
            with pytest.raises(StoreUnavailable, match="is full: set its maxmemory-policy"):
                write()
        assert store.get("a") == {"x": 1}
        assert store.owned_by("ada") == ["a"]
        assert store.destroy("a") == 1


def test_a_server_that_evicts_keeps_the_owner_indexes(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory", "6mb", "--maxmemory-policy", "volatile-lru")
    with RedisStore.from_url(server.url) as store:
        for number in range(300):
            store.set(f"ada {number}", {"x": 1}, owner="ada")
        for number in range(5000):
            store.set(str(number), {"x": "y" * 1000})
        assert store.stats().evicted > 0
        for number in range(20):  # which of them it evicts is random: its clock has a resolution of a second
            store.set(f"ada now {number}", {}, owner="ada")
        # A server at its limit may evict at any command, these too.
        before = {sid for sid in store.ids() if sid.startswith("ada")}
        owned = {*store.owned_by("ada")}
        left = {sid for sid in store.ids() if sid.startswith("ada")}
        assert left <= owned <= before
        assert len(left) >= store.destroy_owned("ada") >= 1
        assert not [sid for sid in store.ids() if sid.startswith("ada")]


# -- clients ----------------------------------------------------------------------------------------------------------


def test_closing_the_store_leaves_a_given_client_open(redis_server: RedisServer, prefix: str) -> None:
    with redis.Redis.from_url(f"unix://{redis_server.socket}") as client:
        with RedisStore(client, prefix=prefix) as store:
            store.set("a", {"x": 1})
            assert store.get("a") == {"x": 1}
            assert prefix in repr(store)
        with pytest.raises(StoreUnavailable, match="was closed"):
            store.get("a")
        assert client.ping()
    with redis.Redis.from_url(f"unix://{redis_server.socket}", decode_responses=True) as text:  # noqa: SIM117
        with pytest.raises(ConfigError, match="returns bytes"):
            RedisStore(text)


def test_a_child_of_fork_has_connections_of_its_own(store: RedisStore, fork: Callable[[], int]) -> None:
    store.set("a", {"n": 0})
    children = []
    for child in range(4):
        pid = fork()
        if not pid:
            done = False
            try:
                done = all(store.update("a", {f"{child}.{n}": n}) and store.get("a") for n in range(100))
            finally:
                os._exit(0 if done else 1)
        children.append(pid)
    for number in range(100):
        assert store.update("a", {"n": number})
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert len(store.get("a") or {}) == 401


def test_the_row_of_a_session_in_a_listing(store: RedisStore, in_cluster: RedisStore) -> None:
    for each in (store, in_cluster):
        each.set("a", {"x": 1}, owner="ada", ttl=1000)
        row, loaded = row_of(each, "a"), each.load("a")
        assert row is not None
        assert loaded is not None
        assert (row.digest, row.owner, row.size) == (digest("a"), "ada", len(loaded.payload))
        assert 0 <= row.idle <= row.created <= loaded.created
        assert loaded.idle >= row.idle, "to be told of is no use"
        assert loaded.remaining <= row.remaining <= 1000
        each.set("b", {}, ttl=math.inf)
        forever = row_of(each, "b")
        assert forever is not None
        assert (forever.owner, forever.remaining) == (None, math.inf)
        assert row_of(each, "c") is row_of(each, "") is row_of(each, "x" * 257) is None


def test_capabilities(store: RedisStore, in_cluster: RedisStore) -> None:
    assert store.capabilities == {Capability.SEVERAL_HOSTS, Capability.ATOMIC_RENAME}
    assert in_cluster.capabilities == {Capability.SEVERAL_HOSTS}


def test_behaviour_without_the_missing_capabilities(store: RedisStore, redis_server: RedisServer, prefix: str) -> None:
    """The meaning of each missing capability: the contract's tests of it are skipped."""
    calls: list[str] = []
    store.set("a", {"n": 1})
    store.set("b", {"n": 2})
    store.get("a")
    assert store.ids() == ["b", "a"]  # USE_ORDER
    store.touch("a", ttl=60)
    assert store.ids() == list(store.all()) == ["a", "b"]
    store.set("c", {}, ttl=0)  # KEEPS_EXPIRED
    assert (store.length(), store.prune(), "c" in store.ids()) == (2, 0, False)
    for option in ({"max": 3}, {"length": lambda data, sid: 1}, {"stale": True}):  # MAKES_ROOM, STALE
        with pytest.raises(ConfigError, match="is not supported by a store on Redis"):
            RedisStore(redis.Redis(), **option)
    url = f"{redis_server.url}?prefix={prefix}"
    with RedisStore.from_url(
        url, dispose=lambda sid, session, reason: calls.append(reason)
    ) as other:  # DISPOSES_OF_ALL
        other.set("a", {"n": 3})
        store.destroy("b")  # by a client without a dispose
        other.set("d", {}, ttl=0.01)
        wait_for(lambda: "d" not in other, "the end of a life")
        other.destroy("a")
        assert calls == ["set", "destroy"]


def test_sessions_moved_to_another_node_are_found(in_cluster: RedisStore) -> None:
    """A server is asked for sessions that have moved to another one: only these are requested again."""
    ids = [str(number) for number in range(60)]

    def mislead() -> None:
        known: Any = in_cluster._link._client
        for sid in ids[:2]:
            nodes = known.nodes_manager.slots_cache[known.keyslot(in_cluster._engine.key_of(sid))]
            nodes[:] = [next(node for node in known.get_primaries() if node.name != nodes[0].name)]

    for sid in ids:
        in_cluster.set(sid, {}, owner="ada")
    mislead()
    assert sorted(in_cluster.owned_by("ada")) == sorted(ids)
    mislead()
    assert in_cluster.destroy_owned("ada") == 60
    assert in_cluster.ids() == []


@pytest.mark.parametrize(
    "url", ["redis+cluster://127.0.0.1:1", "redis://127.0.0.1:1", "redis+sentinel://127.0.0.1:1/x"]
)
def test_a_refused_connection_is_unavailable(url: str) -> None:
    with RedisStore.from_url(url, lock_timeout=2) as store:
        for call in (lambda: store.get("a"), lambda: store.set("a", {}), store.ids, lambda: store.destroy_owned("ada")):
            with pytest.raises(StoreUnavailable):
                call()


@pytest.mark.parametrize(
    "url", ["redis://localhost", "redis+cluster://localhost", "redis+sentinel://localhost/x", "unix:///x"]
)
def test_an_unknown_url_parameter_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not the URL of a Redis"):
        RedisStore.from_url(f"{url}?nosuch=1")


def test_one_of_two_concurrent_logins_stays(redis_server: RedisServer, prefix: str) -> None:
    url = f"{redis_server.url}?prefix={prefix}"
    with (
        RedisStore.from_url(url, max_per_owner=1) as one,
        RedisStore.from_url(url, max_per_owner=1) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        for number in range(50):
            list(
                pool.map(lambda store, sid: store.set(sid, {}, owner="ada"), (one, other), (f"a{number}", f"b{number}"))
            )
            assert len(one.owned_by("ada")) == 1


def test_prefixes_may_look_like_patterns_and_like_each_other(redis_server: RedisServer, prefix: str) -> None:
    one, other, third = (
        RedisStore(redis_server.client(), prefix=prefix + more) for more in ("", "owner:", "\\*?[a-z]")
    )
    for store in (one, other, third):
        store.set("a", {}, owner="ada")
    for store in (one, other, third):
        assert store.prune() == 0
        assert store.ids() == ["a"]
        assert store.length() == 1
    third.clear()
    assert (one.length(), other.length(), third.length()) == (1, 1, 0)
    for store in (one, other, third):
        store.close()


def test_a_change_of_a_session_about_to_expire_succeeds_or_fails_as_a_whole(
    in_cluster: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each server of a Cluster has a clock: a session may be expired by one clock and alive by another."""
    for sid in "abc":
        in_cluster.set(sid, {}, 3, owner="ada")
    now = in_cluster._link.now
    monkeypatch.setattr(in_cluster._link, "now", lambda: now() + 5 * 10**6)
    assert in_cluster.update("a", {"x": 1}, owner="bob") in (True, False)
    assert in_cluster.rename("b", "d") in (True, False)
    assert in_cluster.touch("c", ttl=60)
    assert in_cluster.get("c") == {}
    assert "b" not in in_cluster


@pytest.mark.parametrize(
    "url", ["redis://:12?secret@localhost", "redis://:12#secret@localhost", "redis://:12/secret@localhost"]
)
def test_a_password_that_is_not_escaped_is_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="escaped") as error:
        RedisStore.from_url(url)
    assert "secret" not in str(error.value)


# -- owner indexes that are damaged, and clocks that jump -------------------------------------------------------------


def test_a_clock_that_goes_back_expires_no_session(redis_server: RedisServer, prefix: str) -> None:
    url, client, hour = f"{redis_server.url}?prefix={prefix}", redis_server.client(), 3600 * 10**6
    with (
        RedisStore.from_url(url, max_per_owner=2) as before,
        RedisStore.from_url(url, max_per_owner=2) as after,
    ):
        # As if the server's clock had been an hour ahead until now.
        now = before._link.now() + hour
        before._link._offset += hour
        client.set(f"{prefix}clock", f"{now} {now}")
        for sid in ("tablet", "phone"):
            before.set(sid, {}, owner="ada", ttl=600)
        after.set("new", {}, owner="ada", ttl=600)
        assert after.owned_by("ada") == after.ids() == ["new", "phone"]
        before.set("newer", {}, owner="ada", ttl=600)  # which has not read the clock yet
        after.set("newest", {}, owner="ada", ttl=600)
        assert "newest" in after.owned_by("ada")
        loaded = after.load("newest")
        assert loaded is not None
        assert 590 < loaded.remaining <= 600
        with RedisStore.from_url(url) as later:
            assert later.destroy_owned("ada") == 2
            later.set("x", {})
            later.clear()
            assert later.ids() == []


@pytest.mark.parametrize("disposes", [False, True], ids=["", "with a dispose"])
@pytest.mark.parametrize("cluster", [False, True], ids=["one server", "a Cluster"])
def test_destroy_owned_is_complete_after_the_clock_went_back(
    store: RedisStore, in_cluster: RedisStore, prefix: str, cluster: bool, disposes: bool
) -> None:
    """A process that has read the clock since then is ahead of a process that has not."""
    looked, hour = in_cluster if cluster else store, 3600 * 10**6
    options: dict[str, Any] = {"dispose": lambda *_: None} if disposes else {}
    client: Any = looked._link._open() and looked._link._client
    ends: list[Callable[[RedisStore], object]] = [lambda each: each.destroy_owned("ada"), RedisStore.clear]
    for end in ends:
        with RedisStore(client, prefix=prefix, **options) as behind:
            now = behind._link.now() + hour
            behind._link._offset += hour
            client.set(f"{prefix}clock", f"{now} {now}")
            looked._link._measured = 0
            looked.set("phone", {}, owner="ada", ttl=600)
            end(behind)
            assert looked.ids() == []


@pytest.mark.parametrize("cluster", [False, True], ids=["one server", "a Cluster"])
def test_clear_removes_earlier_sessions_despite_network_latency(
    store: RedisStore, in_cluster: RedisStore, prefix: str, cluster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network latency must not put a session's time ahead of the server's clock."""
    slow = in_cluster if cluster else store
    client: Any = slow._link._open() and slow._link._client
    ask = slow._link._time

    def ask_slowly(estimated: int) -> int:
        time.sleep(0.5)  # the way there, which no condition tells the end of
        return ask(estimated)

    monkeypatch.setattr(slow._link, "_time", ask_slowly)
    with RedisStore(client, prefix=prefix) as quick:
        assert quick.length() == 0
        slow._link._measured = 0
        slow.set("phone", {}, owner="ada", ttl=600)
        quick.clear()
        assert quick.ids() == []


def test_the_time_never_goes_back(
    store: RedisStore, in_cluster: RedisStore, redis_server: RedisServer, prefix: str
) -> None:
    for each in (store, in_cluster):
        last = 0
        for ahead in (0, 0, 10**9, 10**9, -(10**9), 0, 10**12, 0):
            kept = each._link.read("GET", f"{prefix}clock")
            if kept is not None:
                now, here = map(int, kept.split())
                each._link.write("SET", f"{prefix}clock", f"{now} {here + ahead}")
            each._link._measured = -(10**12)  # long ago
            found = each._link.now()
            assert found > last
            last = found
    redis_server.client().set(f"{prefix}clock", "not a time")
    store._link._measured = 0
    assert store._link.now() > 0


@pytest.mark.parametrize("cluster", [False, True], ids=["one server", "a Cluster"])
def test_logging_out_everywhere_ends_although_others_log_in(
    store: RedisStore, in_cluster: RedisStore, prefix: str, cluster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = in_cluster if cluster else store
    number = itertools.count()

    def log_in(*_: object) -> None:
        other.set(f"later {next(number)}", {}, owner="ada")

    with ThreadPoolExecutor(1) as pool:
        disposing = RedisStore(
            other._link._open() and other._link._client,
            prefix=prefix,
            dispose=lambda *_: pool.submit(log_in).result(),
        )
        for sid in "abc":
            disposing.set(sid, {}, owner="ada")
        # The estimated times do not differ here, so each login is later than the call.
        monkeypatch.setattr("shmstore.redis.operations._CLOCK_TOLERANCE", 0)
        assert disposing.destroy_owned("ada") == 3
        assert sorted(other.owned_by("ada")) == ["later 0", "later 1", "later 2"]
        disposing.close()
    assert other.destroy_owned("ada") == 3


@pytest.mark.parametrize("cluster", [False, True], ids=["one server", "a Cluster"])
def test_an_owner_index_of_a_wrong_type_is_rebuilt(
    store: RedisStore, in_cluster: RedisStore, prefix: str, cluster: bool, caplog: pytest.LogCaptureFixture
) -> None:
    each = in_cluster if cluster else store
    index = f"{prefix}owner:{owner_digest('ada'):016x}"
    calls: list[tuple[Callable[[], object], object, list[str]]] = [
        (lambda: each.set("b", {}, owner="ada"), None, ["b", "a"]),
        (lambda: each.add("b", {}, owner="ada"), True, ["b", "a"]),
        (lambda: each.replace("a", {}, owner="ada"), True, ["a"]),
        (lambda: each.update("c", {}, owner="ada"), True, ["c", "a"]),
        (lambda: each.update("a", {"x": 1}, ttl=10**7), True, ["a"]),
        (lambda: each.rename("c", "d", owner="ada"), True, ["d", "a"]),
        (lambda: each.touch("a", ttl=10**7), True, ["a"]),
        (lambda: each.destroy("a"), 1, []),
        (lambda: each.owned_by("ada"), ["a"], ["a"]),
        (lambda: each.destroy_owned("ada"), 1, []),
        (each.prune, 0, ["a"]),
    ]
    for call, result, owned in calls:
        each.clear()
        each.set("a", {}, owner="ada")
        each.set("c", {})
        each._link.write("DEL", index)
        each._link.write("RPUSH", index, "foreign")
        caplog.clear()
        assert call() == result
        assert sorted(each.owned_by("ada")) == sorted(owned)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert f"{index} held a list, so another program uses the keys" in caplog.text


def test_a_policy_that_may_evict_owner_indexes_is_logged(
    start_redis: StartRedis, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_redis("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    client: Any = server.client()
    with RedisStore.from_url(server.url) as store:
        store.set("a", {})
        assert not caplog.records, "indexes are for owners"
        for _ in range(2):
            store.set("a", {}, owner="ada")
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "maxmemory-policy is allkeys-lru" in caplog.text
        assert "set it to volatile-lru" in caplog.text
    caplog.clear()
    client.config_set("maxmemory-policy", "volatile-lru")
    with RedisStore.from_url(server.url) as store:
        store.set("a", {}, owner="ada")
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.execute_command("ACL", "SETUSER", "default", "-info")
    with RedisStore.from_url(server.url) as store:  # a managed server may not report it
        store.set("a", {}, owner="ada")
        assert store.destroy_owned("ada") == 1
    assert not caplog.records
