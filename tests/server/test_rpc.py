"""The control connection, with clients that are silent, broken, hostile, interrupted or forked."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Run, Start

from shmstore.client import connection, spawn
from shmstore.client.pool import Pool
from shmstore.errors import StoreUnavailable
from shmstore.ipc import peer
from shmstore.ipc.channel import Channel, Disconnected, Unresponsive
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import GREETING
from shmstore.manager import StoreManager, connect
from shmstore.system.clock import deadline_in


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours, limit=1000), Channel(theirs, limit=1000)


@pytest.fixture
def manager(manage: Start) -> StoreManager:
    manager = manage()
    manager.start()
    return manager


@pytest.fixture
def dial(manager: StoreManager) -> Iterator[Callable[[], socket.socket]]:
    """A function that returns raw connections to a server."""
    sockets = []
    files = StoreFiles.of(f"shm://{Path(manager.address).parent}")

    def make(greet: bool = True) -> socket.socket:
        sock = connection.dial(files, 10)
        sockets.append(sock)
        if greet:
            sock.sendall(GREETING)
            assert sock.recv(len(GREETING)) == GREETING
        return sock

    yield make
    for sock in sockets:
        sock.close()


def frame(message: object) -> bytes:
    payload = pickle.dumps(message)
    return struct.pack("!IQ", 1, len(payload)) + payload


# -- channels -----------------------------------------------------------------------------------------------------


def test_a_message_arrives_with_its_number(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send(7, {"a": (1, b"x")})
    number, payload = theirs.recv(deadline_in(5))
    assert (number, theirs.loads(payload)) == (7, {"a": (1, b"x")})


def test_a_message_that_is_too_long_is_refused_before_it_is_read(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours._sock.sendall(struct.pack("!IQ", 1, 6 << 30))
    with pytest.raises(OSError, match="1000 are allowed"):
        theirs.recv(deadline_in(5))


def test_a_missing_answer_times_out(pair: tuple[Channel, Channel]) -> None:
    with pytest.raises(Unresponsive):
        pair[0].request("question", deadline_in(0.05))


def test_an_answer_that_has_arrived_is_read_although_its_time_is_up(pair: tuple[Channel, Channel]) -> None:
    """A process that was stopped meanwhile, or a machine, finds its deadline passed and the answer there."""
    ours, theirs = pair
    theirs.send(1, ("#RETURN", "the answer"))
    assert ours.request("question", lambda: -1.0) == ("#RETURN", "the answer")


def test_an_answer_to_another_call_is_rejected(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.send(99, ("#RETURN", "somebody else's"))
    with pytest.raises(Disconnected, match="came for"):
        ours.request("question", deadline_in(5))


def test_a_request_to_a_closed_peer_was_not_delivered(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(Disconnected) as caught:
        ours.request("question", deadline_in(5))
    assert not caught.value.delivered


def test_a_request_whose_answer_is_lost_may_have_been_delivered(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair

    def hang_up() -> None:
        theirs.recv()
        theirs.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(Disconnected) as caught:
        ours.request("question", deadline_in(5))
    thread.join()
    assert caught.value.delivered


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/nowhere/at/all",)


def test_code_of_another_user_is_not_run(pair: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair
    monkeypatch.setattr(peer, "trusted", lambda uid: False)
    ours.send(1, Bomb())
    with pytest.raises(pickle.UnpicklingError, match="not accepted"):
        theirs.loads(theirs.recv(deadline_in(5))[1])
    ours.send(2, ("#ERROR", StoreUnavailable("plain")))
    assert repr(theirs.loads(theirs.recv(deadline_in(5))[1])[1]) == "StoreUnavailable('plain')"


# -- pools --------------------------------------------------------------------------------------------------------


class Echo:
    """Channels to threads that echo each request after ``delay`` seconds."""

    def __init__(self) -> None:
        self.made = 0
        self.delay = 0.0

    def __call__(self) -> Channel:
        self.made += 1
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._answer, args=(theirs,), daemon=True).start()
        return Channel(ours, limit=1000)

    def _answer(self, sock: socket.socket) -> None:
        channel = Channel(sock, limit=1000)
        try:
            while True:
                number, payload = channel.recv()
                time.sleep(self.delay)
                channel.send(number, ("#RETURN", channel.loads(payload)))
        except (EOFError, OSError):
            channel.close()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def pool(echo: Echo) -> Iterator[Pool]:
    pool = Pool(echo)
    yield pool
    pool.close()


def call(pool: Pool, question: str, seconds: float = 10) -> Any:
    return pool.call("echo", question, deadline=deadline_in(seconds))[1]


def test_sequential_calls_share_a_connection(pool: Pool, echo: Echo) -> None:
    assert [call(pool, str(i)) for i in range(10)] == [str(i) for i in range(10)]
    assert echo.made == 1


def test_concurrent_calls_have_a_connection_each(pool: Pool, echo: Echo) -> None:
    echo.delay = 0.05
    wrong = []

    def ask(me: int) -> None:
        for i in range(5):
            if call(pool, f"{me}/{i}") != f"{me}/{i}":
                wrong.append((me, i))

    threads = [threading.Thread(target=ask, args=(me,)) for me in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert echo.made >= 2


def test_no_later_call_gets_the_answer_of_an_interrupted_call(pool: Pool, echo: Echo) -> None:
    echo.delay = 0.2
    with pytest.raises(Unresponsive):
        call(pool, "alice", 0.01)
    echo.delay = 0
    time.sleep(0.3)  # by now alice's answer would be there
    assert call(pool, "bob") == "bob"


def test_any_exception_in_mid_call_closes_the_connection(pool: Pool) -> None:
    with pytest.raises(KeyboardInterrupt), pool.channel() as channel:
        raise KeyboardInterrupt
    assert channel._sock.fileno() == -1


def test_a_forked_child_opens_its_own_connections_and_keeps_its_parents_open(pool: Pool, echo: Echo) -> None:
    assert call(pool, "before") == "before"
    [idle] = pool._idle
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        ok = not pool._idle and pool._inherited == [idle] and idle._sock.fileno() >= 0
        os.write(writer, b"y" if ok else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"y"
    os.close(reader)
    os.close(writer)
    assert call(pool, "after") == "after"
    assert echo.made == 1


def test_a_call_running_at_a_fork_belongs_to_the_parent(pool: Pool, echo: Echo) -> None:
    with pool.channel() as channel:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                channel._sock.send(b"garbage in my parent's conversation")
                os.write(writer, b"sent")
            except OSError:
                os.write(writer, b"refused")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 9) == b"refused"
        os.close(reader)
        os.close(writer)
        assert channel.request("still mine", deadline_in(5))[1] == "still mine"


def test_a_call_on_a_closed_pool_is_an_error(pool: Pool) -> None:
    call(pool, "x")
    pool.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        call(pool, "x")


def test_a_connection_added_to_a_closed_pool_is_closed(pool: Pool, pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    pool.close()
    pool.adopt(ours)
    with pytest.raises(EOFError):
        theirs.recv(deadline_in(5))


# -- the server's side --------------------------------------------------------------------------------------------


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True


def test_a_client_without_a_greeting_is_disconnected(dial: Callable[..., socket.socket], manager: StoreManager) -> None:
    silent = [dial(greet=False) for _ in range(20)]
    half = dial(greet=False)
    half.sendall(GREETING[:5])
    assert manager.store().ping()
    assert all(is_closed(sock) for sock in [*silent, half])


def test_a_client_that_sends_garbage_is_disconnected_without_an_answer(
    dial: Callable[..., socket.socket], manager: StoreManager
) -> None:
    garbage = dial(greet=False)
    garbage.sendall(b"GET / HTTP/1.1\r\nHost: me\r\n\r\n")
    assert is_closed(garbage)
    assert manager.store().ping()


def test_an_announced_size_of_gigabytes_ends_the_connection(
    dial: Callable[..., socket.socket], manager: StoreManager
) -> None:
    greedy = dial()
    greedy.sendall(struct.pack("!IQ", 1, 6 << 30))
    assert is_closed(greedy)
    assert manager.store().ping()


def test_half_a_message_ends_the_connection(dial: Callable[..., socket.socket]) -> None:
    half = dial()
    half.sendall(struct.pack("!IQ", 1, 100) + b"x" * 10)
    assert is_closed(half)


@pytest.mark.parametrize(
    "request_",
    [
        ("store", "close", (), {}),
        ("store", "_put", (), {}),
        ("store", "__reduce__", (), {}),
        ("store", "__init__", (), {}),
        ("store", "#GETVALUE", (), {}),
        ("store", "__repr__", (), {}),
        ("server", "create", ("Store",), {}),
        ("server", "debug_info", (), {}),
        ("server", "accepter", (), {}),
        (None, "shutdown", (), {}),
        ("0", "shutdown", (), {}),
        "not a request",
        (1, 2),
    ],
)
def test_only_a_stores_own_methods_can_be_called(dial: Callable[..., socket.socket], request_: object) -> None:
    channel = Channel(dial(), limit=100_000)
    kind, result = channel.request(request_, deadline_in(10))
    assert kind == "#ERROR"
    assert isinstance(result, StoreUnavailable)
    assert "Traceback" not in str(result)
    assert channel.request(("store", "ping", (), {}), deadline_in(10)) == ("#RETURN", True)


def test_a_flood_of_connections_does_not_block_existing_clients(
    dial: Callable[..., socket.socket], store_dir: Path
) -> None:
    with connect("shop", directory=store_dir) as store:
        flood = [dial(greet=False) for _ in range(300)]
        assert store.ping()
        with connect("shop", directory=store_dir, in_place=False) as another:
            assert another.ping()
        for sock in flood:
            sock.close()
        assert store.prune() == 0


def test_a_client_beyond_the_connection_limit_starts_no_other_server(
    manager: StoreManager, store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = manager.store().stats().server_pid
    crowd = []
    with pytest.raises(StoreUnavailable, match="cannot take another connection"):
        for _ in range(300):
            crowd.append(connection.connect(manager._files()))
    monkeypatch.setattr(spawn, "start", lambda *_: pytest.fail("it tries to start another"))
    with pytest.raises(StoreUnavailable, match="cannot take another connection"):
        StoreManager("shop", directory=store_dir).start()
    with connect("shop", directory=store_dir) as store:
        store.set("a", {})
        assert store.get("a") == {}
    for channel in crowd:
        channel.close()
    assert manager.store().stats().server_pid == server


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_can_neither_connect_nor_read(manager: StoreManager, store_dir: Path) -> None:
    manager.store().set("a", {"secret": 1})
    os.chmod(store_dir, 0o755)  # up to here the path is accessible; the store's own directory stops them
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            refused = 0
            for name in ("arena", "options", "lock"):
                try:
                    os.open(store_dir / "shop" / name, os.O_RDONLY)
                except PermissionError:
                    refused += 1
            try:
                socket.socket(socket.AF_UNIX).connect(manager.address)
            except PermissionError:
                refused += 1
            try:
                connect("shop", directory=store_dir)
            except StoreUnavailable as exc:
                refused += "belongs to uid 0" in str(exc)
            status = 0 if refused == 5 else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_users_connection_is_refused_by_its_credentials(manager: StoreManager, store_dir: Path) -> None:
    manager.store()
    for path, mode in ((store_dir, 0o755), (store_dir / "shop", 0o755), (store_dir / "shop" / "socket", 0o777)):
        os.chmod(path, mode)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(10)
            sock.connect(manager.address)
            status = 0 if is_closed(sock) else 2
        finally:
            os._exit(status)
    os.waitpid(child, 0)
    os.chmod(store_dir / "shop", 0o700)


# -- gevent -------------------------------------------------------------------------------------------------------

GEVENT = """
{before}
import sys
from shmstore.manager import connect
{after}
import gevent, time
with connect("shop", directory=sys.argv[1], in_place=False) as store:
    ticks = []
    def tick():
        while True:
            gevent.sleep(0.01)
            ticks.append(time.monotonic())
    ticker = gevent.spawn(tick)
    def work(me):
        for i in range(20):
            store.set(f"{{me}}", {{"me": me, "i": i}})
            assert store.get(f"{{me}}") == {{"me": me, "i": i}}
    gevent.joinall([gevent.spawn(work, me) for me in range(20)], raise_error=True)
    assert len(ticks) > 2, "calls block the loop"
    with gevent.Timeout(0.05, False):
        while True:
            store.get("1")
    assert [store.get(f"{{me}}")["me"] for me in range(20)] == list(range(20))
print("fine")
"""

PATCH = "import gevent.monkey; gevent.monkey.patch_all()"


@pytest.mark.parametrize("places", [{"before": PATCH, "after": ""}, {"before": "", "after": PATCH}])
def test_under_gevent_calls_are_cooperative_and_not_mixed_up(
    manager: StoreManager, store_dir: Path, run: Run, places: dict[str, str]
) -> None:
    assert run(GEVENT.format(**places), store_dir).communicate(timeout=300)[0] == "fine\n"


@pytest.mark.parametrize("in_place", [True, False])
def test_an_error_of_a_class_that_no_client_can_import_arrives_as_its_base_class(
    manage: Start, store_dir: Path, in_place: bool
) -> None:
    def length(size: int, sid: str) -> int:
        class TooHeavy(ValueError):
            def __init__(self, size: int) -> None:
                super().__init__(f"{size} is too heavy")

        if sid == "heavy":
            raise TooHeavy(10)
        return 1

    manager = manage(length=length)
    manager.start()
    with connect("shop", directory=store_dir, in_place=in_place) as store:
        store.set("light", {})
        with pytest.raises(ValueError, match=r"^10 is too heavy$"):
            store.set("heavy", {})
        assert store.ids() == ["light"]
