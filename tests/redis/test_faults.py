"""RedisStore with a server that does not answer, dies, restarts, fails over, or requires authentication."""

from __future__ import annotations

import itertools
import math
import os
import re
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from browsing import make_app, session, visit
from processes import ROOT, wait_for
from redis_servers import RedisCluster, RedisSentinel, RedisServer, StartRedis, on_free_port, patient, short_path
from redis_wire import Wire

from shmstore import RedisStore, StoreTimeout, StoreUnavailable
from shmstore.redis.link import COMMANDS

# Long for a caller, short beside the time limits of these tests.
TIMEOUT = 0.5


def test_a_killed_server_is_unavailable_until_it_restarts(start_redis: StartRedis) -> None:
    server = start_redis()
    with RedisStore.from_url(server.url) as store:
        for turn in range(2):
            store.set("a", {"turn": turn}, owner="ada")
            server.kill()
            for call in (
                lambda: store.get("a"), lambda: store.set("a", {}), lambda: store.update("a", {"x": 1}),
                lambda: store.owned_by("ada"), store.ids, lambda: store.destroy("a"), store.ping,
            ):  # fmt: skip
                with pytest.raises(StoreUnavailable, match="cannot be reached"):
                    call()
            server.start()
            assert store.get("a") is None  # at the first attempt; that server saves nothing
            assert store.owned_by("ada") == []


def test_a_stopped_server_is_waited_for_until_the_timeout(start_redis: StartRedis) -> None:
    server = start_redis()
    with RedisStore.from_url(server.url, lock_timeout=TIMEOUT) as store:
        patient(lambda: store.set("a", {"n": 1}))
        patient(lambda: store.update("a", {"n": 1}))
        os.kill(server.pid, signal.SIGSTOP)
        for call in (lambda: store.get("a"), lambda: store.update("a", {"n": 2}), lambda: store.gone("a")):
            begun = time.monotonic()
            with pytest.raises(StoreTimeout, match="does not answer in time"):
                call()
            assert TIMEOUT * 0.9 <= time.monotonic() - begun < 60  # sent twice it would be a hang, not a delay
        os.kill(server.pid, signal.SIGCONT)
        assert patient(lambda: store.get("a")) in ({"n": 1}, {"n": 2})
        patient(lambda: store.set("a", {"n": 3}))
        assert patient(lambda: store.get("a")) == {"n": 3}


@pytest.mark.parametrize("user", ["", ":wrong@", "nobody:secret@"])
def test_a_wrong_password_is_reported_and_not_shown(start_redis: StartRedis, user: str) -> None:
    server = start_redis("--requirepass", "secret")
    with RedisStore.from_url(f"unix://{user}{server.socket}") as store:
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=r"refuses the login: .*; check user and password") as refused:
                store.set("a", {})
            assert "wrong@" not in str(refused.value)
            assert "secret" not in str(refused.value)
    with RedisStore.from_url(f"unix://:secret@{server.socket}") as store:
        store.set("a", {"x": 1})
        assert store.get("a") == {"x": 1}
        assert "secret" not in repr(store)


def test_a_change_with_a_lost_answer_is_applied_once(
    start_redis: StartRedis, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = start_redis()
    wire = Wire(short_path(tmp_path_factory) / "wire", server.socket)

    def scripts() -> int:
        stats = server.client().info("commandstats")
        assert isinstance(stats, dict)
        return sum(int(each["calls"]) for name, each in stats.items() if name in ("cmdstat_evalsha", "cmdstat_eval"))

    try:
        with RedisStore.from_url(wire.url) as store:
            store._counters.due = math.inf  # counters are sent by themselves else
            store.set("a", {"n": 0})
            assert store.update("a", {"n": 0})
            before = scripts()
            for number in range(1, 6):
                wire.lose = 1
                with pytest.raises(StoreUnavailable):
                    store.update("a", {"n": number})
                assert store.get("a") == {"n": number}
                assert scripts() == before + number
    finally:
        wire.end()


# -- TLS --------------------------------------------------------------------------------------------------------------


class Terminator:
    """A port that speaks TLS and forwards to a server: not every server is built with TLS."""

    def __init__(self, context: ssl.SSLContext, server: Path) -> None:
        self._context, self._server = context, server
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def end(self) -> None:
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=[client], daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            server.connect(str(self._server))
            with self._context.wrap_socket(client, server_side=True) as secure:
                while not self._ended.is_set():
                    ready, _, _ = select.select([secure, server], [], [], 0.1)
                    for here, there in ((secure, server), (server, secure)):
                        if here in ready:
                            if not (data := here.recv(2**16)):  # more than a TLS record holds: no byte is left unread
                                return
                            there.sendall(data)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secure(authority: trustme.CA, redis_server: RedisServer) -> Iterator[Terminator]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    terminator = Terminator(context, redis_server.socket)
    yield terminator
    terminator.end()


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_tls(secure: Terminator, authority: trustme.CA, tmp_path: Path, scheme: str) -> None:
    known, other = tmp_path / "known.pem", tmp_path / "other.pem"
    authority.cert_pem.write_to_path(str(known))
    trustme.CA().cert_pem.write_to_path(str(other))
    url = f"{scheme}://127.0.0.1:{secure.port}/0?prefix={scheme}:&ssl_ca_certs="
    with RedisStore.from_url(url + str(known)) as store:
        store.set("a", {"x": "y" * 100_000}, owner="ada")
        assert store.update("a", {"z": 1})
        assert store.get("a") == {"x": "y" * 100_000, "z": 1}
        assert store.destroy_owned("ada") == 1
    with RedisStore.from_url(url + str(other)) as store, pytest.raises(StoreUnavailable, match="certificate verify"):
        store.get("a")
    plain = f"redis://127.0.0.1:{secure.port}/0"  # a client without TLS gets no answer
    with RedisStore.from_url(plain) as store, pytest.raises(StoreUnavailable):
        store.get("a")


# -- a Cluster --------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """A primary, its replica, and a Sentinel that watches over them."""
    servers: list[RedisServer] = []
    try:
        primary = on_free_port(lambda port: RedisServer(short_path(tmp_path_factory), port=port))
        servers.append(primary)
        follow = ("--replicaof", f"127.0.0.1 {primary.port}")
        servers.append(on_free_port(lambda port: RedisServer(short_path(tmp_path_factory), *follow, port=port)))
        # Before the Sentinel starts, which asks the primary for its replicas at once, and then every ten seconds.
        wait_for(servers[1].replicates, "the replica")
        servers.append(on_free_port(lambda port: RedisSentinel(short_path(tmp_path_factory), primary, port)))
        yield servers
    finally:
        for server in servers:
            server.end()


def test_the_sentinels_name_the_primary_also_after_a_failover(watched: list[RedisServer]) -> None:
    primary, replica, sentinel = watched
    assert isinstance(sentinel, RedisSentinel)
    with RedisStore.from_url(sentinel.url, lock_timeout=2) as store:
        store.set("a", {"n": 1}, owner="ada")
        wait_for(sentinel.knows_replica, "the Sentinel to know the replica", timeout=300)
        wait_for(lambda: replica.client().dbsize() == primary.client().dbsize() > 0, "the replica to have it")
        primary.kill()
        with pytest.raises(StoreUnavailable):
            store.update("a", {"n": 2})
        assert patient(lambda: store.update("a", {"n": 2})) is True  # once the replica has taken over
        assert store.get("a") == {"n": 2}
        assert store.owned_by("ada") == ["a"]
        assert replica.client().info("replication")["role"] == "master"
    with (
        RedisStore.from_url(sentinel.url.replace("shop", "another"), lock_timeout=2) as other,
        pytest.raises(StoreUnavailable),
    ):
        other.get("a")


@pytest.fixture
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    cluster = RedisCluster(short_path(tmp_path_factory), replicas=True)
    yield cluster
    cluster.end()


def test_a_dead_or_stopped_primary_is_replaced_by_its_replica(replicated: RedisCluster) -> None:
    primary, replica = replicated.servers[0], replicated.servers[3]
    with (
        RedisStore.from_url(replicated.url, lock_timeout=2) as store,
        RedisStore.from_url(replicated.url, lock_timeout=2) as other,
    ):
        for number in range(60):
            store.set(str(number), {"n": number}, owner="ada" if number % 2 else None)
        assert other.get("0") == {"n": 0}  # it knows the servers, and has not asked one for the time
        clients = [server.client() for server in (primary, replica)]
        wait_for(lambda: clients[0].dbsize() == clients[1].dbsize() > 0, "the replica to have them all")
        kept = {str(key, "ascii") for key in clients[0].keys("*{*}") if isinstance(key, bytes)}
        assert kept
        lost = next(sid for sid in map(str, range(60)) if store._engine.key_of(sid) in kept)
        begun = time.monotonic()
        primary.kill()
        try:
            store.update(lost, {"n": int(lost)})
        except StoreUnavailable:
            pass
        else:
            assert time.monotonic() - begun > 1, "sooner than a Cluster misses one of its servers"
        # The same store object, as soon as the replica has taken over.
        assert patient(lambda: store.update(lost, {"new": 1})) is True
        assert store.get(lost) == {"n": int(lost), "new": 1}
        assert patient(lambda: sorted(map(int, store.ids()))) == list(range(60))
        patient(lambda: other.set("0", {"n": 0}))

        primary, replica = replicated.servers[1], replicated.servers[4]
        clients = [server.client() for server in (primary, replica)]
        wait_for(lambda: clients[0].dbsize() == clients[1].dbsize() > 0, "the replica to have them all")
        kept = {str(key, "ascii") for key in clients[0].keys("*{*}") if isinstance(key, bytes)}
        lost = next(sid for sid in map(str, range(60)) if store._engine.key_of(sid) in kept)
        os.kill(primary.pid, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(StoreTimeout):
            store.get(lost)
        assert time.monotonic() - begun < 30
        assert patient(lambda: store.update(lost, {"newer": 1})) is True
        assert (store.get(lost) or {})["newer"] == 1
        patient(lambda: store.destroy_owned("ada"))
        assert patient(lambda: sorted(map(int, store.ids()))) == list(range(0, 60, 2))


# -- Flask ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["raise", "anonymous"])
def test_responses_while_the_server_is_down(start_redis: StartRedis, on_error: str) -> None:
    server = start_redis()
    with RedisStore.from_url(server.url) as store:
        app = make_app(store, SESSION_ON_ERROR=on_error)
        app.testing = False  # an error is a 500, as for visitors

        def count() -> str:
            before = str(session.get("n"))
            session["n"] = session.get("n", 0) + 1
            return before

        def nothing() -> str:
            return "no session"

        client = app.test_client()
        assert [visit(client, count).text for _ in range(3)] == ["None", "1", "2"]
        server.kill()
        for _ in range(2):
            answer = visit(client, count)
            if on_error == "raise":
                assert answer.status_code == 500
            else:
                assert (answer.status_code, answer.text) == (200, "None")
            assert visit(client, nothing).text == "no session"
        server.start()
        assert [visit(client, count).text for _ in range(3)] == ["None", "1", "2"]  # that server saves nothing


# -- permissions and limits of a user of the server --------------------------------------------------------------------


@pytest.fixture
def prefix() -> str:
    return f"f{os.getpid()}.{next(_numbers)}:"


_numbers = itertools.count()


def everything(store: RedisStore) -> None:
    """Use every method of a store."""
    store.set("a", {"x": 1, 2: 3}, owner="ada")
    store.set("a", {"x": 2}, owner="bob", ttl=math.inf)
    assert store.add("b", {}, owner="ada")
    assert store.replace("b", {"y": 1}, owner="ada")
    assert store.update("a", {"z": 1}, ["x"])
    assert store.update("a", {2: 1})
    assert store.touch("a", ttl=60)
    assert store.touch("a", {"cookie": {"max_age": 60}})
    assert store.rename("a", "c", {"new": 1}, owner="ada")
    assert store.get("c") == {"z": 1, 2: 1, "new": 1, "cookie": {"max_age": 60}}
    assert store.peek("a") is None
    assert store.load("c") is not None
    assert "c" in store
    assert store.touch("c", ttl=math.inf)
    with store.lock("c"):
        assert store.owned_by("ada")
    assert not store.destroy_if_empty("c")
    assert store.destroy("b", tombstone=True) == 1
    assert store.gone("b")
    assert store.stats().sessions == len(store.ids()) == len(store.all()) == store.length() == 1
    store.prune()
    assert store.destroy_owned("ada") == 1
    store.clear()
    assert store.ping()


SELDOM = {"strlen", "type"}  # for copies, and for an index that another program has overwritten


def acl_of_the_docs() -> list[str]:
    text = (Path(ROOT) / "docs" / "guides" / "several-hosts.md").read_text()
    found = re.search(r"^ACL SETUSER shop (.*)$", text, re.MULTILINE)
    assert found
    return found[1].split()


def test_the_documented_acl_is_sufficient_and_minimal(start_redis: StartRedis) -> None:
    server = start_redis()
    client = server.client()
    client.execute_command("ACL", "SETUSER", "shop", *acl_of_the_docs())
    assert {rule[1:] for rule in acl_of_the_docs() if rule.startswith("+")} == COMMANDS
    with RedisStore.from_url(f"unix://shop:password@{server.socket}") as store:
        everything(store)
    used = {name.removeprefix("cmdstat_") for name, _ in client.info("commandstats").items()}
    assert used >= COMMANDS - SELDOM


@pytest.mark.parametrize("command", sorted(COMMANDS - SELDOM - {"eval"}))
def test_a_forbidden_command_is_named_in_the_error(redis_server: RedisServer, prefix: str, command: str) -> None:
    client = redis_server.client()
    user = f"shop-{prefix.strip(':')}"
    rules = [rule for rule in acl_of_the_docs() if rule[0] != "~" and rule != f"+{command}"]
    try:
        client.execute_command("ACL", "SETUSER", user, *rules, f"~{prefix}*")
        url = f"unix://{user}:password@{redis_server.socket}?prefix={prefix}"
        with RedisStore.from_url(url) as store, pytest.raises(StoreUnavailable) as refused:
            everything(store)
        assert f"does not let this user run {command.upper()}: allow it" in str(refused.value)
        client.execute_command("ACL", "SETUSER", user, f"+{command}", "resetkeys", "~another:*")
        with (
            RedisStore.from_url(url) as store,
            pytest.raises(StoreUnavailable, match="use the keys of the store: allow"),
        ):
            store.get("a")
    finally:
        client.execute_command("ACL", "DELUSER", user)


def test_calls_beyond_max_connections_wait(redis_server: RedisServer, prefix: str) -> None:
    threads, failed = [], []
    with RedisStore.from_url(f"{redis_server.url}?max_connections=2&prefix={prefix}", lock_timeout=60) as store:

        def work(number: int) -> None:
            try:
                for _ in range(50):
                    store.set(str(number), {"n": number})
                    assert store.get(str(number)) == {"n": number}
            except BaseException as exc:
                failed.append(exc)
                raise

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert store._link._client.connection_pool.max_connections == 2
        assert len(store) == 8


def test_a_timeout_for_a_connection_names_the_reason(redis_server: RedisServer, prefix: str) -> None:
    with RedisStore.from_url(f"{redis_server.url}?max_connections=1&prefix={prefix}", lock_timeout=0.05) as store:
        store.set("a", {})
        pool = store._link._client.connection_pool
        taken = pool.get_connection()
        with pytest.raises(StoreTimeout, match=r"all connections were in use for 0\.05 s: raise max_connections"):
            store.get("a")
        pool.release(taken)
        assert store.get("a") == {}
