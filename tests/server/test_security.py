"""Protection against other users of the host, hostile links, and clients that know the protocol."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import json
import os
import pickle
import resource
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from engines import on_each_engine
from multiprocess.managers import Server
from other_users import NOBODY, as_nobody, in_child, root_only
from processes import ROOT, Run, Start, alive, wait_for

from shmstore import Store, StoreProxy, StoreUnavailable, connect
from shmstore.client import connection
from shmstore.client.pool import Pool
from shmstore.codec.ids import key_of_id
from shmstore.engine.arena import Arena
from shmstore.engine.header import OPTIONS, SERVER_PID
from shmstore.engine.layout import PAGE, pid_namespace
from shmstore.errors import ConfigError
from shmstore.ipc import options_file
from shmstore.ipc.channel import Channel
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import GREETING, greet
from shmstore.ipc.rpc import SERVER_METHODS, STORE_METHODS
from shmstore.manager import StoreManager
from shmstore.server.server import StoreServer
from shmstore.system.clock import deadline_in

SLOW = 30.0  # seconds that an answer may take on a busy machine


# -- other users --------------------------------------------------------------------------------------------------


def lock(path: Path) -> None:
    """A shared lock would block every start; it needs a descriptor, and others have no permission to open one."""
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


OTHERS: dict[str, Callable[[Path], object]] = {
    "list": os.listdir,
    "lock the directory": lock,
    "enter": os.chdir,
    "look at": lambda path: os.stat(path / "arena"),
    "read the arena": lambda path: os.open(path / "arena", os.O_RDONLY),
    "write the arena": lambda path: os.open(path / "arena", os.O_RDWR),
    "read the options": lambda path: os.open(path / "options", os.O_RDONLY),
    "lock the lock": lambda path: lock(path / "lock"),
    "make": lambda path: os.open(path / "new", os.O_WRONLY | os.O_CREAT),
    "remove": lambda path: os.unlink(path / "socket"),
    "rename": lambda path: os.rename(path, path.with_name("mine")),
    "connect": lambda path: socket.socket(socket.AF_UNIX).connect(str(path / "socket")),
}


@root_only
@pytest.mark.processes("executed")
def test_other_users_can_do_nothing_to_a_store(manage: Start, store_dir: Path) -> None:
    old = os.umask(0)  # the most permissive umask of a starter
    try:
        manager = manage()
        with manager.store() as store:
            store.set("a", {"secret": 1})
            store_dir.chmod(0o755)
            path = store_dir / "shop"
            for name, action in OTHERS.items():
                refusal = as_nobody(partial(action, path))
                assert refusal.startswith(("PermissionError 13", "PermissionError 1 ")), f"{name}: {refusal}"
            assert "belongs to uid 0" in as_nobody(lambda: connect("shop", directory=store_dir))
            assert "belongs to uid 0" in as_nobody(StoreManager("shop", directory=store_dir).start)
            # If the directory was opened by mistake, the files in it are closed too.
            path.chmod(0o777)
            for name in ("read the arena", "write the arena", "read the options", "lock the lock"):
                assert as_nobody(partial(OTHERS[name], path)).startswith("PermissionError 13"), name
            with pytest.raises(StoreUnavailable, match="chmod 700"):
                connect("shop", directory=store_dir)
            path.chmod(0o700)
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.iterdir()}
            assert modes == dict.fromkeys(("arena", "lock", "options", "socket"), 0o600) | {
                "socket": modes["socket"] & 0o700
            }
            assert store.get("a") == {"secret": 1}
    finally:
        os.umask(old)


@root_only
def test_another_user_at_the_socket_gets_no_greeting(
    manage: Start, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with manage() as manager, manager.store() as store:
        path = store_dir / "shop" / "socket"
        for each, mode in ((store_dir, 0o755), (path.parent, 0o777), (path, 0o777)):
            each.chmod(mode)

        def talk() -> list[bytes]:
            heard = []
            for said in (b"", GREETING, GREETING + frame(("server", "shutdown", (), {})), os.urandom(1000)):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(SLOW)
                    sock.connect(str(path))
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        sock.sendall(said)
                    try:
                        heard.append(sock.recv(1000))
                    except ConnectionResetError:  # the request was not even read
                        heard.append(b"")
            return heard

        server = store.stats().server_pid
        assert as_nobody(talk) == repr([b""] * 4)
        assert store.prune() == 0
        path.parent.chmod(0o700)
        assert store.stats().server_pid == server
    log = capfd.readouterr().err
    assert log.count("refused") == 1, "not for each of them"
    assert f"store 'shop': refused connections of other users: 1; the last of uid {NOBODY}" in log
    assert "Traceback" not in log


@root_only
@pytest.mark.processes("executed")
def test_root_kills_no_process_that_another_user_names(manage: Start, store_dir: Path) -> None:
    """A lock file is written by its user. A master that is root and trusts it could kill any process."""
    store_dir.chmod(0o755)
    manager = manage()
    manager.start(user=(NOBODY, NOBODY))
    path = store_dir / "shop" / "lock"
    server = manager._files().server() or 0
    victim = subprocess.Popen(["sleep", "1000"])
    ready, done = os.pipe(), os.pipe()
    liar = os.fork()
    if not liar:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.kill(server, signal.SIGSTOP)
        path.unlink()
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, b"%-10d %-10d\n" % (victim.pid, pid_namespace()))
        os.write(ready[1], b"!")
        os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        files = manager._files()
        assert files.server() == victim.pid
        assert not connection.kill(files)
        manager.detach()
        assert victim.poll() is None
    finally:
        os.write(done[1], b"!")
        os.waitpid(liar, 0)
        victim.kill()
        victim.wait()
        os.kill(server, signal.SIGKILL)


@root_only
@pytest.mark.processes("executed")
def test_root_follows_no_link_of_another_user_when_it_removes(manage: Start, store_dir: Path, tmp_path: Path) -> None:
    parent = store_dir / "theirs"
    parent.mkdir()
    store_dir.chmod(0o755)
    os.chown(parent, NOBODY, NOBODY)
    precious = tmp_path / "options"
    precious.write_text("precious")
    manager = manage(persist=False, directory=parent)
    manager.start(user=(NOBODY, NOBODY))
    (parent / "shop").rename(parent / "away")
    (parent / "shop").symlink_to(tmp_path)
    manager.shutdown()
    assert precious.read_text() == "precious"


@root_only
@pytest.mark.processes("executed")
def test_root_runs_nothing_that_another_user_has_written(manage: Start, store_dir: Path, tmp_path: Path) -> None:
    """A master under --user is root and attaches to the server of a user who may have been taken over."""
    store_dir.chmod(0o755)
    proof = tmp_path / "run by root"
    manager = manage(dispose=lambda *_: None)
    manager.start(user=(NOBODY, NOBODY))
    options = store_dir / "shop" / "options"
    with manager.store() as store:
        options.write_bytes(options_file.pack({"dispose": Bomb(str(proof))}))
        with manager.store() as another:
            another.set("a", {})
            assert callable(another.options.dispose), "one's own"
        store.arena.cells[OPTIONS] += 1  # there are new ones, it says
        store.set("b", {})
        assert store.get("a") == {}
        with pytest.raises(ConfigError, match="not used"):
            options_file.load(str(options))
    assert not proof.exists()


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize(
    "answer",
    [
        Bomb("/nowhere/at/all"), ("#RETURN", Bomb("/nowhere/at/all")), ("#ERROR", Bomb("/nowhere/at/all")),
        ("#ERROR", SystemExit(3)), ("#ERROR", KeyboardInterrupt()), ("#ERROR", OSError(2, "x")), ("#ERROR", "text"),
        ("#PROXY", 1), ("#TRACEBACK", "text"), (), 3, None, "ab", b"", [[]], {"#RETURN": 1}, ("#RETURN",),
        ("#ERROR", 1, 2),
    ],
)  # fmt: skip
def test_a_hostile_server_is_unavailable(answer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shmstore.ipc.peer.trusted", lambda uid: False)
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def serve() -> None:
            channel = Channel(theirs, limit=10_000)
            number, _ = channel.recv(deadline_in(SLOW))
            channel.send(number, answer)

        thread = threading.Thread(target=serve)
        thread.start()
        pool = Pool(lambda: Channel(ours, limit=10_000))
        with pytest.raises(StoreUnavailable):
            pool.call("store", "ping", deadline=deadline_in(SLOW))
        thread.join()


# -- links, and files of others -----------------------------------------------------------------------------------

FILES = "arena", "lock", "options", "socket", "options.new", "socket.new"


def symbolic(path: Path, target: Path) -> None:
    path.symlink_to(target)


def hard(path: Path, target: Path) -> None:
    os.link(target, path)


def dangling(path: Path, target: Path) -> None:
    path.symlink_to(target.with_name("nowhere"))


def fifo(path: Path, target: Path) -> None:
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [symbolic, hard, dangling, fifo])
def test_symbolic_links_in_place_of_files_are_not_followed(
    name: str, make: Callable[[Path, Path], None], manage: Start, store_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shop, target = store_dir / "shop", store_dir / "precious"
    target.write_bytes(b"not for anybody to write into")
    target.chmod(0o600)
    with manage() as first:
        first.store().close()
    wait_for(lambda: first.address and StoreFiles.of("shop", store_dir).server() is None)
    (shop / name).unlink(missing_ok=True)
    make(shop / name, target)
    manager = manage(max=77)
    try:
        with manager.store() as store:
            store.set("a", {"n": 1})
            assert store.get("a") == {"n": 1}
            assert store.prune() == 0
        for each in shop.iterdir():
            assert stat.S_ISREG(each.lstat().st_mode) or each.name == "socket" or each.name == name != "arena"
    except StoreUnavailable as exc:
        refusal = str(exc)
        assert name == "lock"
        assert str(shop / name) in refusal
    manager.shutdown()
    assert target.read_bytes() == b"not for anybody to write into"
    assert target.stat().st_nlink == 1 or name in ("lock", "options.new", "socket.new", "socket")
    assert not target.with_name("nowhere").exists()
    assert "Traceback" not in capfd.readouterr().err
    (shop / name).unlink(missing_ok=True)


def test_options_that_others_can_write_are_not_run(store_dir: Path) -> None:
    options = store_dir / "options"
    options_file.save(str(options), options_file.pack({"max": 3}))
    assert stat.S_IMODE(options.stat().st_mode) == 0o600
    assert options_file.load(str(options)) == {"max": 3}
    options.chmod(0o666)
    with pytest.raises(ConfigError, match="not used"):
        options_file.load(str(options))
    options_file.save(str(options), options_file.pack({"max": 3}))
    assert stat.S_IMODE(options.stat().st_mode) == 0o600
    if os.geteuid() == 0:
        os.chown(options, NOBODY, NOBODY)
        with pytest.raises(ConfigError, match="not used"):
            options_file.load(str(options))
    options.unlink()
    options.symlink_to(store_dir / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be opened"):
        options_file.load(str(options))


# -- the methods that can be called -------------------------------------------------------------------------------


def frame(message: object) -> bytes:
    payload = pickle.dumps(message)
    return struct.pack("!IQ", 1, len(payload)) + payload


Dial = Callable[[], Channel]


@pytest.fixture
def dial(manage: Start, store_dir: Path) -> Iterator[Dial]:
    """A function that returns channels to a server with one session; both must be unchanged at the end."""
    channels = []
    with manage() as manager, manager.store() as store:
        store.set("kept", {"n": 1}, owner="ada")
        server, files = store.stats().server_pid, StoreFiles.of("shop", store_dir)
        options = Path(files.options).read_bytes()

        def make() -> Channel:
            channels.append(greet(connection.dial(files, SLOW), deadline_in(SLOW)))
            return channels[-1]

        yield make
        for channel in channels:
            channel.close()
        assert store.all() == {"kept": {"n": 1}}
        assert store.arena.cells[SERVER_PID] == server == files.server()
        assert Path(files.options).read_bytes() == options
        assert store.prune() == 0


def clean(answer: Any) -> None:
    """An answer to a client names the error, and nothing else about the server."""
    kind, error = answer
    assert kind == "#ERROR"
    assert isinstance(error, Exception)
    text = repr(error) + str(error) + repr(vars(error))
    for word in ("Traceback", 'File "', ROOT, sys.prefix, "site-packages", ".py", "/dev/shm"):
        assert word not in text, text


def attributes() -> list[str]:
    kinds = Store, StoreProxy, StoreServer, Arena, Server, object, type
    names = {name for kind in kinds for name in dir(kind)} | {field for kind in kinds for field in vars(kind)}
    with Store(memory=2**16) as store:
        names |= vars(store).keys() | vars(store.arena).keys()
    names |= {
        "#GETVALUE",
        "__repr__",
        "__str__",
        "files",
        "id_to_obj",
        "_store",
        "mutex",
        "arena.cells",
        "get.__func__",
    }
    return sorted(names)


@pytest.mark.parametrize("ident", ["store", "server"])
def test_only_methods_of_the_store_can_be_called(ident: str, dial: Dial, figure: Callable[[str], None]) -> None:
    channel, allowed = dial(), {"store": STORE_METHODS, "server": SERVER_METHODS}[ident]
    refused = [name for name in attributes() if name not in allowed]
    assert {"shutdown", "create", "debug_info", "incref", "accept_connection", "apply", "__init__"} - allowed <= {
        *refused
    }
    for name in refused:
        answer = channel.request((ident, name, (), {}), deadline_in(SLOW))
        clean(answer)
        assert isinstance(answer[1], StoreUnavailable), name
    figure(f"{len(refused)} names")


# Not public, but needed by a proxy. They can do nothing that public methods cannot: read and remove sessions.
INNER = ("__contains__",)


def test_each_allowed_name_is_a_method_of_the_contract() -> None:
    assert {"get", "set", "stats"} <= STORE_METHODS
    assert not [name for name in STORE_METHODS if name.startswith("_") and name not in INNER]
    assert all(callable(getattr(Store, name)) for name in STORE_METHODS)
    assert all(callable(getattr(StoreServer, name)) for name in SERVER_METHODS)
    assert not STORE_METHODS & {
        "change_options",
        "close",
        "publish_options",
        "lock",
        "over",
        "arena",
        "options",
        "codec",
        "closed",
        "repair",
    }
    assert {"apply", "release", "repair", "shutdown"} == SERVER_METHODS


class Unreadable:
    """A pickle that fails to load, with a path in the message."""

    def __reduce__(self) -> Any:
        return os.listdir, (f"{ROOT}/no such thing",)


def nested(depth: int) -> bytes:
    return b"\x80\x04" + b"(" * depth + b"t" * depth + b"."


REQUESTS: list[object] = [
    None, 0, 2**10_000, -1.5, "store", b"store", [], {}, (), ("store",), ("store", "get"),
    ("store", "get", ("kept",)), ("store", "get", ("kept",), {}, 1), ("store", "get", 3, {}),
    ("store", "get", None, {}), ("store", "get", ("kept",), 3), ("store", "get", ("kept",), None),
    ("store", "get", ("kept",), [1]), ("store", "get", ("kept",), {"no such": 1}),
    ("store", "get", ("kept",), {1: 2}), ("store", "get", (), {}), ("store", "get", ("a", "b", "c"), {}),
    ("store", [], (), {}), ("store", {}, (), {}), ("store", None, (), {}), ("store", 3, (), {}),
    ("store", b"get", ("kept",), {}), ("store", ("get",), ("kept",), {}), ([], "get", ("kept",), {}),
    ({}, "get", ("kept",), {}), (None, "get", ("kept",), {}), (b"store", "get", ("kept",), {}),
    ("store", "get" * 10_000, (), {}), ("s" * 10_000, "get", (), {}),
    ("store", "set", ("a", {}), {"ttl": "x"}), ("store", "set", ("a", 3), {}), ("store", "set", (3, {}), {}),
    ("store", "set", ("a" * 1000, {}), {}), ("store", "set", ("a", {"x": object()}), {}),
    ("store", "set", ("a", {"x": "y" * 60_000}), {"owner": 3}), ("store", "set", ("a", {}), {"ttl": []}),
    ("store", "set", ("a", {"x": "y" * 300_000}), {}), ("store", "set", ("a", {}), {"owner": 300}),
    ("store", "update", ("kept", 3), {}), ("store", "update", ("kept", {"x": object()}), {}),
    ("store", "update", ("kept", {}, 3), {}), ("store", "rename", ("kept", ""), {}),
    ("store", "touch", ("kept", 3), {}), ("store", "touch", ("kept",), {"ttl": "x"}),
    ("store", "destroy_owned", (3,), {}), ("store", "owned_by", ("",), {}),
    ("store", "start_interval", (-1,), {}), ("store", "start_interval", ("x",), {}),
    ("store", "set", ("a", {}), {"ttl": float("nan")}),
    ("server", "apply", (), {}), ("server", "apply", (b"", False), {}), ("server", "apply", (3, True), {}),
    ("server", "apply", (b"shmstore options, x\n", False), {}), ("server", "apply", ("x", False), {}),
    ("server", "release", (1,), {}), ("server", "shutdown", (1,), {}),
]  # fmt: skip

MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no pickle": b"GET / HTTP/1.1\r\n\r\n",
    "half a pickle": pickle.dumps(("store", "get", ("kept",), {}))[:-5],
    "another module": b"cno.such.module\nthing\n.",
    "another attribute": b"cos\nno_such_thing\n.",
    "an attribute of ours": b"cshmstore.server.server\nno_such_thing\n.",
    "fails to load": pickle.dumps(Unreadable()),
    "a persistent id": b"Pkept\n.",
    "an unknown protocol": b"\x80\xff.",
    "deep": nested(100_000),
    "a memo that is not there": b"h\xff.",
    "more than there is": b"\x8e" + (2**40).to_bytes(8, "little") + b"x",
    **{
        f"request {number}": pickle.dumps(request)
        for number, request in enumerate(REQUESTS)
    },
}  # fmt: skip


def test_malformed_requests_are_errors_and_change_nothing(
    dial: Dial, manage: Start, capfd: pytest.CaptureFixture[str], figure: Callable[[str], None]
) -> None:
    bystander = dial()
    closed = 0
    for what, payload in MALFORMED.items():
        channel = dial()
        channel._sock.sendall(struct.pack("!IQ", 1, len(payload)) + payload)
        try:
            number, answer = channel.recv(deadline_in(SLOW))
        except (EOFError, OSError):  # a truncated request counts as the end of the connection
            closed += 1
            assert what in ("nothing", "half a pickle", "more than there is"), what
        else:
            assert number == 1
            try:
                clean(channel.loads(answer))
            except AssertionError as exc:
                raise AssertionError(f"{what}: {exc}") from exc
        channel.close()
        assert bystander.request(("store", "peek", ("kept",), {}), deadline_in(SLOW)) == ("#RETURN", {"n": 1})
    figure(f"{len(MALFORMED)} requests, {closed} of them ended the connection")


# -- secrets that no log may contain ------------------------------------------------------------------------------

BUSY = """
import json, os, signal, socket, sys, time
from flask import Flask, session
from shmstore import ShmStoreError, Store, connect
from shmstore.ipc.directory import StoreFiles
from shmstore.flask import StoreSessionInterface
from shmstore.manager import StoreManager
from shmstore.codec.ids import key_of_id

directory, names = sys.argv[1], json.loads(sys.stdin.readline())
ids, owners, values = names["ids"], names["owners"], iter(names["values"])

class Quoting:
    def __init__(self, reads_only):
        self.reads_only = reads_only
    def dumps(self, value):
        if self.reads_only:
            raise ValueError(f"a line\\n{value!r}: more")
        return value.encode()
    def loads(self, data):
        raise ValueError(f"a line\\n{data.decode()}: more")

def dispose(sid, session, reason):
    raise KeyError(sid, session)

def failing(*call):
    function, *arguments = call
    try:
        function(*arguments)
    except (ShmStoreError, TypeError, ValueError):
        return
    raise AssertionError(f"{function} did not fail")

manager = StoreManager("shop", directory=directory, memory=2**17, max=40, check_period=0.1, dispose=dispose,
                       lock_timeout=0.05)
manager.start()
store, through = manager.store(), connect("shop", directory=directory, in_place=False)
for turn in range(2):
    for each in store, through:
        for number, sid in enumerate(ids):
            owner = owners[number % len(owners)]
            ttl = 0 if number % 10 == 9 else 600
            each.set(sid, {"n": number, "of": owner, "secret": next(values)}, ttl=ttl, owner=owner)
            each.get(sid), each.peek(sid), each.touch(sid), each.load(sid), sid in each, each.gone(sid)
            each.update(sid, {"more": "x" * 1000, "another": next(values)})
        live = [sid for sid in ids if each.peek(sid)][:6]
        for old, new in zip(live, live[1:]):
            each.rename(old, new), each.add(old, {}), each.replace(old, {})
        failing(each.set, live[0], {"x": "y" * 10**6})
        failing(each.set, live[0], {"x": object(), "y": next(values)})
        failing(each.set, live[0], {next(values): object()})
        failing(each.touch, live[0], None, next(values))
        failing(each.set, live[0], 3)
        failing(each.set, live[0], {}, "x")
        failing(each.set, 300 * live[0], {})
        failing(each.rename, live[0], 300 * live[0])
        failing(each.set, live[0], {}, None, [owners[0]])
        each.set(live[1], {}, owner=owners[1])
        with store.lock(live[1]):
            failing(lambda: store.lock(live[1], 0).__enter__())
        store.arena.lock(1)
        failing(each.set, live[2], {})
        store.arena.unlock()
        each.destroy(live[3:]), each.destroy_if_empty(live[0]), each.owned_by(owners[0]), each.destroy_owned(owners[2])
        each.ids(), each.all(), each.length(), each.prune(), each.stats()
    # A record that cannot be read any more.
    store.set(ids[0], {"x": "y" * 300}, owner=owners[0])
    slot = store.arena.find(key_of_id(ids[0]))
    at = store.arena.table.run_head(store.arena.cells[store.arena.table.record + slot] & 2**32 - 1) * 8 + 200
    store.arena.file.memory[at : at + 1] = b"!"
    store.get(ids[0]), through.get(ids[0]), store.all(), store.prune(), through.destroy(ids[0])
    failing(manager.apply, *[]) if False else manager.apply(max=30, dispose=dispose)
    # Clients that are sent away.
    files = StoreFiles.of("shop", directory)
    for what in b"", ids[1].encode() * 5, b"shmstore" + bytes(8) + ids[1].encode():
        with connection.dial(files, 10) as sock:
            sock.sendall(what)
    failing(through._callmethod, "no such method", (ids[1],))
    failing(through._callmethod, next(values), (ids[1],))
    failing(through._callmethod, "set", (ids[1], next(values)))
    # A serializer that quotes what it cannot do; a Flask application that goes on.
    with Store(memory=2**17, serializer=Quoting(True)) as refusing:
        failing(refusing.set, ids[1], {"x": next(values)})
    with Store(memory=2**17, serializer=Quoting(False)) as odd:
        odd.set(ids[1], {"x": next(values)}, owner=owners[1])
        assert odd.get(ids[1]) == {}
        app = Flask("app")
        app.session_interface = StoreSessionInterface(odd)
        app.add_url_rule("/", view_func=lambda: str(len(session)))
        client = app.test_client()
        client.set_cookie("session", ids[1])
        assert client.get("/").text == "0"
    server = files.server()
    os.kill(server, signal.SIGKILL)
    store.set(ids[2], {"n": 2}, owner=owners[2])
    while files.server() in (None, server):
        time.sleep(0.02)
    through.get(ids[2])
print("ready", files.server(), flush=True)
sys.stdin.readline()
store.clear()
through.close()
manager.shutdown()
print("done", flush=True)
"""


def test_sessions_ids_and_owners_are_in_no_log_listing_title_or_environment(
    store_dir: Path, tmp_path: Path, figure: Callable[[str], None], run: Run
) -> None:
    ids = [secrets.token_urlsafe(32) for _ in range(60)]
    owners = [f"owner-{secrets.token_hex(8)}" for _ in range(5)]
    values = [secrets.token_urlsafe(32) for _ in range(600)]
    log = tmp_path / "log"
    with log.open("wb") as err:
        process = run(
            BUSY, store_dir, stderr=err, env=os.environ | {"PYTHONPATH": ROOT, "DEBUG": "shmstore"},
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"ids": ids, "owners": owners, "values": values}) + "\n")
        process.stdin.flush()
        ready = process.stdout.readline().split()
        assert ready[:1] == ["ready"], log.read_text()[-3000:]
        server = int(ready[1])
        assert alive(server)
        seen = []
        for pid in (server, process.pid):
            seen += [
                Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ", "comm", "status", "maps")
            ]
            for thread in Path(f"/proc/{pid}/task").iterdir():
                seen.append((thread / "comm").read_bytes())
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    seen.append(os.fsencode(os.readlink(fd)))
        seen += [os.fsencode(path) for path in store_dir.rglob("*")]
        for name in ("options", "lock"):
            seen.append((store_dir / "shop" / name).read_bytes())
        said, _ = process.communicate("go on\n", timeout=300)
    assert said == "done\n", log.read_text()[-3000:]
    text = log.read_text()
    for what in ("get ", "set ", "evicting", "calls of dispose", "StoreTimeout", "RecordTooLarge", "failed requests",
                 "had died", "Serialization", "unreadable values", "AttributeError"):  # fmt: skip
        assert what in text, what
    assert text.count("[DEBUG]") > 1000
    everything = text.encode() + b"\n".join(seen)
    found = [
        name for name in ids + owners + values for part in (name, name[:16], name[-16:]) if part.encode() in everything
    ]
    lines = [line for line in text.splitlines() if any(name in line for name in found)]
    assert not found, lines[:5]
    figure(f"{len(text.splitlines())} lines of log, {len(seen)} other texts")


# -- timing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unreadable(arena: Arena, *regions: str) -> Iterator[None]:
    """Take the pages that lie within these regions of an arena out of this process' reach: it dies of a look at one."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    begin = ctypes.addressof(ctypes.c_char.from_buffer(arena.file.memory))
    offsets = arena.geometry.offsets()
    ends = [*sorted(offsets.values()), arena.geometry.size]
    for region in regions:
        first = offsets[region]
        size = (ends[ends.index(first) + 1] - first) // PAGE * PAGE
        assert first % PAGE == 0
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + first), ctypes.c_size_t(size), 0) == 0
    yield


def found_without(store: Store, sids: list[str], *regions: str) -> str:
    """Return what a child that cannot read these regions finds; "" if that killed it."""

    def look() -> list[object]:
        store.get("takes a row for the counters of this process")
        with unreadable(store.arena, *regions):
            return [found for sid in sids for found in (store.get(sid), store.peek(sid), sid in store)]

    return in_child(look)


@on_each_engine
def test_the_steps_of_a_lookup_do_not_depend_on_a_shared_prefix_of_the_id() -> None:
    """
    An id is looked for by 128 bits of its BLAKE2b, which is all that is ever compared: a near miss is like any other.

    The hash has no key, and needs none: to learn from its first bits an attacker would have to choose ids whose
    digests share them with the digest of an unknown id of 256 random bits. Nor can a bucket be flooded: a lookup of
    a missing id adds nothing, and sessions are stored under ids that the server has made.
    """
    sid = secrets.token_urlsafe(32)
    others = [sid[:size] + "!" + sid[size + 1 :] for size in range(len(sid))] + [sid[:-1], f"{sid}x", sid[1:]]
    with Store(memory=2**17, check_period=None, recency=100) as store:
        store.set(sid, {"secret": 1})
        buckets, key = store.arena.geometry.buckets, key_of_id(sid)
        assert key is not None
        assert [half.to_bytes(8, "little") in sid.encode() for half in key] == [False, False]
        digests = {other: key_of_id(other) for other in others}
        # By chance one is in the same bucket; then the digests are compared.
        apart = [other for other, digest in digests.items() if digest and digest[0] % buckets != key[0] % buckets]
        assert found_without(store, apart, "slots", "blocks") == repr([None, None, False] * len(apart))
        for region in ("slots", "blocks"):
            assert found_without(store, [sid], region) == "", f"a session is found without its {region}"


@on_each_engine
def test_ids_in_one_bucket_are_distinguished_by_their_digests() -> None:
    with Store(memory=2**17, check_period=None, recency=100) as store:
        sid = secrets.token_urlsafe(32)
        store.set(sid, {"secret": 1})
        buckets, key = store.arena.geometry.buckets, key_of_id(sid)
        assert key is not None
        near = next(
            other
            for other in (f"{sid[:-6]}{number:06}" for number in range(10**6))
            if (digest := key_of_id(other)) and digest[0] % buckets == key[0] % buckets
        )
        assert found_without(store, [near], "blocks") == repr([None, None, False])
        assert found_without(store, [near], "slots") == "", "the digest is compared"
        assert found_without(store, [sid], "blocks") == ""
