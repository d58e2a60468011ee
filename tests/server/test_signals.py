"""A signal handler that raises at every point where handlers run: no lock stays held, and the exception propagates."""

from __future__ import annotations

import contextlib
import dis
import gc
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from fault_injection import PACKAGE
from processes import Start
from redis_servers import RedisServer

from shmstore import ConfigError, RedisStore, SerializationError, Store, attach
from shmstore import manager as manager_module
from shmstore.client import connection
from shmstore.codec import serializers
from shmstore.engine import layout
from shmstore.engine.arena import Arena
from shmstore.engine.greenlet_lock import GreenletLock
from shmstore.errors import StoreUnavailable
from shmstore.ipc import options_file
from shmstore.ipc.directory import StoreFiles
from shmstore.options import Options
from shmstore.policy import Policy
from shmstore.session import Session
from shmstore.system.files import identity_of
from shmstore.system.processes import is_running
from shmstore.system.signals import suppressing
from shmstore.transfer import snapshot_file


class Interrupted(BaseException):
    """The exception of a signal handler, like SystemExit in Gunicorn's."""


class Handlers:
    """
    Raises once where CPython runs signal handlers: at the start of a function, after a call into C, at a jump back.

    Nowhere else, so a `finally` that begins with a call into C is certain to make that call.
    """

    def __init__(self, chosen: int, files: tuple[str, ...]) -> None:
        self.chosen, self.files = chosen, files
        self.count = 0

    def _step(self) -> None:
        self.count += 1
        if self.count == self.chosen:
            raise Interrupted

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(self.files):
            self._step()

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        if event == "opcode" and dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("JUMP_BACKWARD"):
            self._step()
        return self.trace


def interrupted_everywhere(section: Callable[[], object], then: Callable[[], object], *names: str) -> None:
    """
    Interrupt a section once at each point where a signal handler may run, and call a function afterwards.

    Args:
        section: The function to interrupt.
        then: A function that must succeed afterwards.
        names: The modules of the package that are interrupted, besides the lock and `contextlib`.
    """
    files = (contextlib.__file__, *(f"{PACKAGE}/{name}.py" for name in ("engine/greenlet_lock", *names)))
    at = 0
    while True:
        at += 1
        handlers = Handlers(at, files)
        before = sys.getprofile(), sys.gettrace()
        try:
            sys.settrace(handlers.trace)
            sys.setprofile(handlers.profile)
            section()
        except Interrupted:
            pass
        finally:
            sys.setprofile(before[0])
            sys.settrace(before[1])
        then()
        if handlers.count < at:
            break
    assert at > 5, "the section was not traced"


# A finalizer may run the handler: Python prints an exception there, and drops it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def check_free(lock: GreenletLock) -> None:
    """Check that no thread holds a lock or waits for it."""
    assert not lock._queue


def work(lock: GreenletLock) -> None:
    ticket = lock.ticket()
    try:
        ticket.acquire()
        len(lock._queue)
    finally:
        ticket.release()


def test_a_greenlet_lock() -> None:
    lock = GreenletLock()
    interrupted_everywhere(lambda: work(lock), lambda: check_free(lock))


def test_reopening_a_rebuilt_store(store_dir: Path) -> None:
    options = Options.of(memory=2**16)
    first = Store.over(Arena.create(store_dir / "arena", options.geometry), options)
    second = Store.over(Arena.open(store_dir / "arena"), options)

    def then() -> None:
        check_free(second._reattaching)
        assert second.arena.file.is_at(store_dir / "arena")
        first.move()

    first.move()
    interrupted_everywhere(lambda: second.arena, then, "engine/mapping", "store/retry", "store/holder", "store/store")
    first.close()
    second.close()


def test_dispose() -> None:
    told: list[str] = []
    with Store(memory=2**18, check_period=None, dispose=lambda sid, session, reason: told.append(reason)) as store:

        def section() -> None:
            store.destroy("a")

        def then() -> None:
            check_free(store._disposal._one_at_a_time)
            before = len(told)
            store.set("a", {})
            store.destroy("a")
            assert len(told) > before, "nothing is taken for told that was not"
            store.set("a", {})

        store.set("a", {})
        interrupted_everywhere(section, then, "store/dispose")


def test_pickling_functions_by_value() -> None:
    modules = {name: sys.modules.get(name) for name in options_file._LOCAL_MODULES}
    sys.modules.update(dict.fromkeys(options_file._LOCAL_MODULES, sys))

    def then() -> None:
        check_free(options_file._hiding)
        assert all(sys.modules.get(name) is sys for name in options_file._LOCAL_MODULES)

    try:
        interrupted_everywhere(lambda: options_file._by_value(1), then, "ipc/options_file")
    finally:
        for name, module in modules.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def test_a_session_lock() -> None:
    with Store(memory=2**18, check_period=None) as store:
        store.set("a" * 43, {"n": 1})

        def section() -> None:
            with Session(lambda: store, "a" * 43, Policy(ttl=60)).lock():
                pass

        def then() -> None:
            with store.lock("a" * 43, 0):
                pass

        interrupted_everywhere(section, then, "engine/named_locks", "store/holder", "store/store", "session")


def test_starting_a_server(store_dir: Path) -> None:
    files = StoreFiles.of("shop", store_dir)
    files.create()

    def section() -> None:
        with files.starting(0):
            pass

    interrupted_everywhere(section, section, "ipc/directory")


def test_calls_to_a_server(manage: Start) -> None:
    """Connections, changed options, and the one store of each process."""
    with manage().store() as store:

        def call() -> None:
            store.ping()

        def then() -> None:
            assert not store._attachment.pool._busy
            call()

        interrupted_everywhere(call, then, "ipc/channel", "client/pool")

        def connect_and_call() -> None:
            store._attachment.pool.close_idle()
            call()

        interrupted_everywhere(
            connect_and_call, then, "ipc/channel", "client/connection", "ipc/handshake", "client/pool"
        )

        def obey() -> None:
            attachment._followed.applied = 0
            assert attachment.refresh_options(attachment.store)

        attachment = store._attachment
        interrupted_everywhere(obey, lambda: check_free(attachment._followed._refreshing), "store/live_options")

        path = attachment.files.path
        try:
            attach._attached[path] = store
            interrupted_everywhere(
                lambda: attach.attach_or_start(f"shm://{path}"), lambda: check_free(attach._attaching), "attach"
            )
        finally:
            del attach._attached[path]


def test_a_redis_store(redis_server: RedisServer) -> None:
    url = f"{redis_server.url}?prefix=signals:"
    told: list[str] = []
    with RedisStore.from_url(url, dispose=lambda sid, session, reason: told.append(reason)) as store:
        store.clear()
        client = redis_server.client()

        def drop() -> None:
            store.destroy("a")

        def then() -> None:
            check_free(store._dispose_lock)
            store.set("a", {})

        then()
        interrupted_everywhere(drop, then, "redis/operations")

        key = f"{store._engine.key_of('a')}lock"

        def lock() -> None:
            with store.lock("a", 0):
                pass

        def free_or_ending() -> None:
            assert not store._locks._held, "nobody renews a lock that nobody holds"
            client.delete(key)

        interrupted_everywhere(lock, free_or_ending, "redis/named_locks", "redis/store")
        store.clear()


# -- the exception of a handler propagates -----------------------------------------------------------------------------


class Late(ValueError):
    """A timeout of an application."""


@pytest.fixture(params=[Late, TimeoutError, RuntimeError, SystemExit])
def raised(request: pytest.FixtureRequest) -> Iterator[type[BaseException]]:
    """Return the exception that the handler of SIGUSR1 raises."""

    class Handler:
        def handle(self, *arguments: Any) -> None:
            raise request.param

    before = signal.signal(signal.SIGUSR1, Handler().handle)
    yield request.param
    signal.signal(signal.SIGUSR1, before)


class Interrupting:
    """An object that is interrupted when it is written or read, by pickle or as a serializer."""

    def __reduce__(self) -> Any:
        return signal.raise_signal, (signal.SIGUSR1,)

    def dumps(self, value: Any) -> bytes:
        if value == "write":
            signal.raise_signal(signal.SIGUSR1)
        return str(value).encode()

    def loads(self, data: bytes) -> Any:
        if data == b"read":
            signal.raise_signal(signal.SIGUSR1)
        return data


class Unwritable(Interrupting):
    def __reduce__(self) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        raise TypeError


class Markup(str):
    """An object that is interrupted when the default serializer encodes it as text with markup."""

    def __html__(self) -> str:
        signal.raise_signal(signal.SIGUSR1)
        return self


def test_an_exception_of_a_handler_inside_a_serializer_propagates(raised: type[BaseException]) -> None:
    with Store(memory=2**18, serializer=Interrupting()) as store:
        store.set("a", {"x": "read"})
        with pytest.raises(raised):
            store.get("a")
        with pytest.raises(raised):
            store.set("b", {"x": "write"})
        assert store.stats().corrupt == 0
    with Store(memory=2**18) as store, pytest.raises(raised):
        store.set("a", {"x": Markup("x")})


def test_an_exception_of_a_handler_while_a_session_is_saved_propagates(raised: type[BaseException]) -> None:
    signals = [signal.SIGUSR1]

    class Once(Interrupting):
        def dumps(self, value: Any) -> bytes:
            if signals:
                signal.raise_signal(signals.pop())
            return super().dumps(value)

    with Store(memory=2**18, serializer=Once()) as store:
        session = Session(lambda: store, None, Policy(ttl=60))
        session["x"] = 1
        with pytest.raises(raised):
            session.save()
        assert len(store) == 0
        assert session.save()


def test_an_exception_of_a_handler_inside_option_functions_propagates(raised: type[BaseException]) -> None:
    with pytest.raises(raised):
        options_file.pack({"length": Unwritable()})
    packed = options_file.pack({"length": Interrupting()})
    with pytest.raises(raised):
        options_file.unpack(packed)


def test_an_exception_of_a_handler_inside_dispose_propagates(raised: type[BaseException]) -> None:
    with Store(memory=2**18, dispose=lambda *_: signal.raise_signal(signal.SIGUSR1)) as store:
        store.set("a", {})
        with pytest.raises(raised):
            store.destroy("a")
        assert store.stats().dispose_errors == 0
        assert store.get("a") == {}


def test_an_exception_of_a_handler_during_a_wait_for_a_server_propagates(
    manage: Start, raised: type[BaseException]
) -> None:
    with manage().store() as store:
        deadline = store._attachment._answer_deadline()

        def interrupted() -> float:
            signal.raise_signal(signal.SIGUSR1)
            return deadline()

        with pytest.raises(raised):
            store._attachment.pool.call("store", "ping", deadline=interrupted)
        assert store.ping()


def test_an_exception_of_a_handler_during_a_wait_for_redis_propagates(
    redis_server: RedisServer, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py converts an OSError, and so a TimeoutError, into errors of its own."""
    with RedisStore.from_url(f"{redis_server.url}?prefix=signals:") as store:
        assert store.get("a") is None
        pool = store._link._open().pool_of("")
        connection = pool.get_connection()
        pool.release(connection)
        parser = connection._parser
        with_hiredis = type(parser).__name__ == "_HiredisParser"
        receiver = type(parser if with_hiredis else getattr(parser, "_buffer", parser))
        name = next(name for name in ("_read_from_socket", "read_from_socket") if hasattr(receiver, name))
        read = getattr(receiver, name)

        # Without hiredis, redis-py receives once before to check whether the connection is alive; if that fails, it
        # opens another one.
        signals = [signal.SIGUSR1] if with_hiredis else [signal.SIGUSR1, signal.SIGCONT]

        class Socket:
            """A socket: the signal comes while it receives the answer."""

            def __init__(self, sock: Any) -> None:
                self._sock = sock

            def __getattr__(self, name: str) -> Any:
                if name.startswith("recv") and signals:
                    signal.raise_signal(signals.pop())
                return getattr(self._sock, name)

        def interrupted(self: Any, *arguments: Any, **more: Any) -> Any:
            self._sock = Socket(self._sock)
            return read(self, *arguments, **more)

        monkeypatch.setattr(receiver, name, interrupted)
        with pytest.raises(raised):
            store.get("a")
        monkeypatch.undo()
        assert store.get("a") is None


def test_an_exception_of_a_handler_while_an_idle_connection_is_checked_propagates(
    redis_server: RedisServer, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisStore.from_url(f"{redis_server.url}?prefix=signals:") as store:
        assert store.get("a") is None
        kept = store._link._open().pool_of("")._kept[-1]
        signals, check = [signal.SIGUSR1], kept.can_read

        def interrupted(*arguments: Any, **more: Any) -> Any:
            if signals:
                signal.raise_signal(signals.pop())
            return check(*arguments, **more)

        monkeypatch.setattr(kept, "can_read", interrupted)
        with pytest.raises(raised):
            store.get("a")
        assert store.get("a") is None


def write_snapshot(where: Path) -> None:
    with snapshot_file.writing(where / "snapshot", "shop"):
        pass


def kill_a_stopped_one(where: Path) -> None:
    files = StoreFiles.of("shop", where)
    files.create()
    lock = files.claim(1)
    assert lock is not None
    try:
        connection.kill_stopped(files)
    finally:
        os.close(lock)


@pytest.mark.parametrize(
    ("call", "attempt"),
    [
        ("os.mkdir", lambda where: StoreFiles.of("shop", where).create()),
        ("os.lstat", lambda where: StoreFiles.of("shop", where).check()),
        ("tempfile.mkstemp", lambda where: Arena.create(where / "arena", Options.of(memory=2**16).geometry)),
        ("os.open", lambda where: Arena.open(where / "arena")),
        ("os.open", lambda where: options_file.read(str(where / "options"))),
        ("os.open", lambda where: options_file.save(str(where / "options"), b"{}")),
        ("os.open", lambda where: manager_module._deadline_while_beating(StoreFiles.of("shop", where), 1)()),
        ("os.open", lambda where: StoreFiles.of("shop", where).server()),
        ("os.stat", lambda where: identity_of(str(where))),
        ("builtins.open", lambda _: is_running(os.getpid())),
        ("builtins.open", lambda _: layout.available()),
        ("builtins.open", kill_a_stopped_one),
        ("shmstore.codec.serializers.ZoneInfo", lambda _: serializers._is_loadable("Europe/Berlin")),
        ("os.open", lambda where: snapshot_file.SnapshotSource(where / "snapshot")),
        ("os.fsync", write_snapshot),
        ("socket.socket.connect", lambda where: connection.connect(StoreFiles.of("shop", where), 1)),
    ],
    ids=[
        "a directory",
        "a look at one",
        "an arena",
        "opening one",
        "options",
        "saving them",
        "a heartbeat",
        "a lock",
        "a look at a file",
        "a look at a process",
        "the free memory",
        "a stopped server",
        "a time zone",
        "a snapshot",
        "writing one",
        "a server",
    ],
)
def test_an_exception_of_a_handler_inside_a_system_call_propagates(
    store_dir: Path,
    raised: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    attempt: Callable[[Path], object],
) -> None:
    """A TimeoutError is an OSError too, and must not be mistaken for an error of the call."""

    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(call, interrupted)
    with pytest.raises(raised):
        attempt(store_dir)


def test_an_exception_that_the_caller_is_handling_is_not_raised_again(raised: type[BaseException]) -> None:
    with Store(memory=2**18) as store:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except raised:
            with pytest.raises(SerializationError):
                store.set("a", {"x": object()})


def test_an_exception_of_a_serializer_is_converted() -> None:
    class Refusing:
        def dumps(self, value: Any) -> bytes:
            raise Late

        loads = dumps

    with Store(memory=2**18, serializer=Refusing()) as store, pytest.raises(SerializationError):
        store.set("a", {"x": 1})
    with pytest.raises(ConfigError):
        options_file.unpack(options_file.pack({"x": 1})[:-5])
    with pytest.raises(StoreUnavailable):
        StoreFiles.of("nowhere", "/nonexistent").check()


def test_a_suppressed_error_keeps_nothing_of_its_callers_alive() -> None:
    """Otherwise a manager that is not used any more would stay connected until the next garbage collection."""

    class Used:
        pass

    def call() -> weakref.ref[Used]:
        used = Used()
        with suppressing(OSError):
            raise OSError
        return weakref.ref(used)

    gc.disable()
    try:
        assert call()() is None
    finally:
        gc.enable()
