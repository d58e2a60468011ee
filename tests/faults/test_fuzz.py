"""Random bytes: sent to a server, sent by a server, and found in the memory of a store.

SHMSTORE_FUZZ_EXAMPLES is how many of each are tried. What fails is printed with how to try it again.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import resource
import socket
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import ROOT, Start, wait_for

from shmstore import ShmStoreError, Store, connect
from shmstore.client.connection import dial
from shmstore.codec.body import DEFAULT_CODEC, pack, unpack
from shmstore.codec.ids import key_of, key_of_id, owner_digest
from shmstore.engine.frame import OVERHEAD, RESIDUE, body_of, seal
from shmstore.engine.layout import CELL, PAGE
from shmstore.engine.verify import verify
from shmstore.errors import SerializationError
from shmstore.ipc.directory import StoreFiles
from shmstore.ipc.handshake import GREETING, OTHER
from shmstore.ipc.peer import _PlainUnpickler
from shmstore.ipc.rpc import STORE_METHODS
from shmstore.system.clock import boottime_ns

EXAMPLES = int(os.environ.get("SHMSTORE_FUZZ_EXAMPLES") or (5000 if os.environ.get("SHMSTORE_FULL") == "1" else 50))
SLOW = 30.0  # seconds that an answer may take on a busy machine
SPARE = 2**30

budget = settings(
    max_examples=EXAMPLES, deadline=None, database=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
Figure = Callable[[str], None]
Change = tuple[str, float, bytes]

# The position as a share of the whole, and the change: a byte replaced, bytes inserted or removed, the end removed.
changes = st.lists(
    st.tuples(st.sampled_from(["replace", "replace", "flip", "insert", "cut", "end"]), st.floats(0, 1),
              st.binary(min_size=1, max_size=8)), min_size=1, max_size=4,
)  # fmt: skip


def changed(data: bytes, how: list[Change]) -> bytes:
    for kind, where, what in how:
        at = int(where * max(len(data) - 1, 0))
        if kind == "replace":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "flip":
            data = data[:at] + bytes(byte ^ 1 << what[0] % 8 for byte in data[at : at + 1]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + len(what) :]
        else:
            data = data[:at]
    return data


@contextmanager
def room_for_little(pid: int) -> Iterator[None]:
    """A pickle can allocate any amount of memory (its memo): the limit turns that into an error."""
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + SPARE, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_AS, before)


# -- bytes sent to a server ---------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
# The requests must be harmless, because the server may understand and execute them.
methods = st.sampled_from(sorted(STORE_METHODS - {"clear", "start_interval", "stop_interval", "destroy_owned"}))
sids = st.sampled_from(["a", "b", "c"])
requests = st.one_of(
    st.tuples(
        st.just("store"), st.sampled_from(["get", "load", "touch", "gone", "destroy"]), st.tuples(sids), st.just({})
    ),
    st.tuples(st.just("store"), st.sampled_from(["set", "add", "update"]), st.tuples(
        sids, st.dictionaries(st.text(max_size=5), plain, max_size=3)), st.just({})),
    st.tuples(st.just("store"), methods, st.lists(plain, max_size=4).map(tuple), st.dictionaries(
        st.sampled_from(["sid", "session", "ttl", "owner", "set", "delete", "x"]), plain, max_size=2)),
    st.tuples(st.just("server"), st.just("apply"), st.tuples(st.binary(max_size=30), st.booleans()), st.just({})),
    st.tuples(plain, plain, plain, plain),
    plain,
)  # fmt: skip
payloads = requests.map(pickle.dumps)
payloads |= st.builds(changed, payloads, changes) | st.binary(max_size=100)
lengths = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]))


def frame(payload: bytes, number: int = 1, length: int | None = None) -> bytes:
    return struct.pack("!IQ", number, len(payload) if length is None else length) + payload


frames = st.one_of(
    st.builds(frame, payloads),
    st.builds(frame, payloads, st.integers(0, 2**32 - 1), st.none()),
    st.builds(frame, payloads, st.integers(0, 2**32 - 1), lengths),
    st.builds(changed, st.builds(frame, payloads), changes),
)
conversations = st.one_of(
    st.binary(max_size=300),
    st.builds(changed, st.just(GREETING), changes),
    st.builds(lambda said: GREETING + b"".join(said), st.lists(frames, min_size=1, max_size=4)),
    st.builds(lambda said, how: changed(GREETING + b"".join(said), how), st.lists(frames, max_size=3), changes),
)


def answers(sock: socket.socket) -> Iterator[Any]:
    heard = b""
    with contextlib.suppress(ConnectionResetError):  # the server closed without reading everything
        while part := sock.recv(65536):
            heard += part
    if heard.startswith(OTHER):
        assert json.loads(heard[len(OTHER) :])["users"]
        return
    if heard:
        assert heard.startswith(GREETING)
    heard = heard[len(GREETING) :]
    while heard:
        if len(heard) < 12 or len(heard) < 12 + struct.unpack_from("!IQ", heard)[1]:
            return  # truncated by a reset
        _, length = struct.unpack_from("!IQ", heard)
        yield pickle.loads(heard[12 : 12 + length])
        heard = heard[12 + length :]


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.timeout(3600)
def test_any_bytes_sent_to_a_server_leave_other_clients_unaffected(
    manage: Start, store_dir: Path, figure: Figure, capfd: pytest.CaptureFixture[str]
) -> None:
    kinds: dict[str, int] = {}
    files = StoreFiles.of("shop", store_dir)
    with (
        manage(memory=2**20, max=500, check_period=None) as manager,
        manager.store() as store,
        connect("shop", directory=store_dir, in_place=False) as bystander,
    ):
        store.set("kept by me", {"n": 1}, ttl=math.inf, owner="ada")
        assert bystander.ping()
        server, options = store.stats().server_pid, Path(files.options).read_bytes()
        baseline = threads(server)

        @budget
        @example(GREETING + frame(pickle.dumps(("store", "ids", (), {}))))
        @example(GREETING + frame(pickle.dumps(3)))
        @example(GREETING[:8] + bytes(8))
        @given(conversations)
        def converse(said: bytes) -> None:
            with dial(files, SLOW) as sock:
                sock.settimeout(SLOW)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    sock.sendall(said)
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                for kind, result in answers(sock):
                    kinds[kind] = kinds.get(kind, 0) + 1
                    assert kind in ("#RETURN", "#ERROR")
                    if kind == "#ERROR":
                        assert isinstance(result, Exception)
                        for word in ("Traceback", 'File "', ROOT, ".py"):
                            assert word not in f"{result} {result!r}"
            assert bystander.peek("kept by me") == {"n": 1}

        with room_for_little(server):
            converse()
            wait_for(lambda: threads(server) <= baseline, "the end of their threads")
        assert store.stats().server_pid == files.server() == server
        assert bystander.get("kept by me") == {"n": 1}
        assert bystander.owned_by("ada") == ["kept by me"]
        assert Path(files.options).read_bytes() == options
        verify(store.arena)
    assert "Fatal" not in capfd.readouterr().err
    assert kinds.get("#RETURN")
    assert kinds.get("#ERROR")
    figure(f"{EXAMPLES} conversations; answers: {kinds}")


# -- answers of a server of another user --------------------------------------------------------------------------

HARMLESS = (type(None), bool, int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset, Exception)
KNOWN = (ShmStoreError, ValueError, TypeError, AttributeError)
# All of them exist, and are harmless if they are called after all.
names = st.sampled_from([
    ("os", "getpid"), ("posix", "getpid"), ("shmstore.ipc.channel", "Channel"), ("shmstore.errors", "annotations"),
    ("shmstore.errors", "ShmStoreError.__subclasses__"), ("builtins", "ValueError.__init__"), ("builtins", "len"),
    ("builtins", "type"), ("builtins", "getattr"), ("builtins", "object"), ("builtins", "SystemExit"),
    ("builtins", "Exception"), ("builtins", "ValueError"), ("shmstore.errors", "StoreUnavailable"),
])  # fmt: skip
calls = st.builds(
    lambda name, argument: f"c{name[0]}\n{name[1]}\n(".encode() + pickle.dumps(argument)[2:-1] + b"tR.", names, plain
)


class Watched(_PlainUnpickler):
    """Records exceptions other than the known errors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.found: list[object] = []

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if not (isinstance(found, type) and issubclass(found, KNOWN)):
            self.found.append(found)
        return found


def harmless(value: Any) -> bool:
    if isinstance(value, dict):
        return all(harmless(each) for item in value.items() for each in item)
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(harmless, value))
    return type(value) in HARMLESS or isinstance(value, KNOWN) or (
        isinstance(value, type) and issubclass(value, Exception)
    )  # fmt: skip


@pytest.mark.timeout(3600)
def test_any_answer_of_another_users_server_is_data_or_refused() -> None:
    messages = st.one_of(st.one_of(payloads), calls, calls, st.builds(changed, calls, changes))

    @budget
    @given(messages)
    def answer(said: bytes) -> None:
        reader = Watched(io.BytesIO(said))
        try:
            result = reader.load()
        except Exception:
            result = None
        assert not reader.found
        with contextlib.suppress(RecursionError):  # a value that contains itself
            assert harmless(result), result

    with room_for_little(os.getpid()):
        answer()


# -- bytes found in memory ----------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@budget
@example("a", None, DEFAULT_CODEC, b"", [("end", 0.0, b"x"), ("insert", 0.0, bytes(4))])
@given(texts, st.none() | texts, st.just(DEFAULT_CODEC) | texts, st.binary(max_size=200), changes)
def test_a_changed_record_is_detected(
    sid: str, owner: str | None, codec: str, payload: bytes, how: list[Change]
) -> None:
    body = pack(sid, owner, codec, payload)
    record = seal(key_of(sid.encode()), owner_digest(owner), 5, body)
    assert body_of(record) == body
    assert zlib.crc32(record) == RESIDUE
    other = changed(record, how)
    # A reader relies on length and checksum. The checksum alone is right for 4 zero bytes, for example.
    assert other == record or len(other) < OVERHEAD or zlib.crc32(other) != RESIDUE
    with contextlib.suppress(SerializationError):
        found = unpack(changed(body, how))
        found.sid.encode()
        assert not found.owner or found.owner.encode()


def session_of(sid: str) -> dict[str, Any]:
    return {"me": sid, "owner": f"owner of {sid[-1]}", "data": sid * 30, "more": [sid, {"deep": sid}]}


SIDS = [f"session {number}" for number in range(20)]


def loaded(store: Store, sid: str) -> dict[Any, Any] | None:
    found = store.load(sid)
    return None if found is None else store.codec.decode(found.payload)


READS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: all_right({sid: store.get(sid) for sid in SIDS}),
    "peek": lambda store: all_right({sid: store.peek(sid) for sid in SIDS[:5]}),
    "load": lambda store: all_right({sid: loaded(store, sid) for sid in SIDS}),
    "in": lambda store: [sid in store for sid in SIDS],
    "ids": lambda store: known(store.ids()),
    "all": lambda store: all_right(store.all()),
    "length": lambda store: store.length(live=True),
    "owned_by": lambda store: owned("owner of 3", store.owned_by("owner of 3")),
    "gone": lambda store: [store.gone(sid) for sid in SIDS[:5]],
    "stats": lambda store: store.stats(),
    "touch": lambda store: [store.touch(sid) for sid in SIDS[:5]],
    "prune": lambda store: store.prune(),
    "get again": lambda store: all_right({sid: store.get(sid) for sid in SIDS}),
}


def all_right(found: Mapping[str, dict[Any, Any] | None]) -> None:
    for sid, session in found.items():
        assert session is None or session == session_of(sid), f"{sid} is given {session}"


def known(sids: list[str]) -> None:
    assert {*sids} <= {*SIDS}


def owned(owner: str, sids: list[str]) -> None:
    assert all(session_of(sid)["owner"] == owner for sid in sids)


@pytest.mark.timeout(3600)
def test_damaged_memory_never_returns_another_session(figure: Figure) -> None:
    """Bytes, and cells that look right, changed anywhere but in the first pages; all is put back after each example."""
    refused: dict[str, int] = {}
    with Store(memory=2**16, check_period=None, lock_timeout=0.05) as store:
        arena: Any = store.arena

        def fill() -> tuple[Any, bytes]:
            store.clear()
            for sid in SIDS:
                store.set(sid, session_of(sid), ttl=math.inf, owner=session_of(sid)["owner"])
            return store.arena.file.memory, bytes(store.arena.file.memory)

        memory, sound = fill()
        first = arena.geometry.offsets()["slots"]
        assert first >= 2 * PAGE
        used = arena.table.run_head(280) * CELL
        spots = st.lists(
            st.tuples(
                st.integers(first, min(used, len(sound)) - 9),
                st.binary(min_size=1, max_size=8) | st.integers(0, 200).map(lambda n: n.to_bytes(8, "little")),
                st.booleans(),
            ),
            min_size=1, max_size=6,
        )  # fmt: skip

        @budget
        @given(spots)
        def read(damage: list[tuple[int, bytes, bool]]) -> None:
            nonlocal memory, sound
            for at, what, cell in damage:
                start = at // 8 * 8 if cell else at
                memory[start : start + len(what)] = what
            try:
                for name, action in READS.items():
                    try:
                        action(store)
                    except ShmStoreError:
                        refused[name] = refused.get(name, 0) + 1
            finally:
                if store.arena.file.memory is memory:
                    memory[:] = sound
                else:  # it met damage and the store was rebuilt in another file
                    memory, sound = fill()

        read()
        for sid in SIDS:
            assert store.get(sid) == session_of(sid)
        verify(store.arena)
    figure(f"{EXAMPLES} damages; refused: {refused or 0}")


@pytest.mark.timeout(3600)
def test_a_valid_record_with_any_body_is_a_session_or_absent(figure: Figure) -> None:
    """A checksum does not detect this: the body was written this way."""
    body = pack("a", "ada", DEFAULT_CODEC, b"\x81\xa1n\x01")
    bodies = st.binary(max_size=300) | st.builds(changed, st.just(body), changes)
    bodies |= st.builds(lambda payload: body[:8] + payload, st.binary(max_size=50))
    read = 0
    with Store(memory=2**16, check_period=None, recency=0) as store:
        arena = store.arena
        key = key_of_id("a")
        assert key is not None
        store.set("b", {"n": 2})

        @budget
        @given(bodies)
        def publish(written: bytes) -> None:
            nonlocal read
            store.destroy("a")
            record = seal(key, owner_digest("ada"), boottime_ns(), written)
            try:
                arena.lock(1)
                arena.publish(0, key, record, owner_digest("ada"), 2**62, boottime_ns())
            finally:
                arena.unlock()
            session = store.get("a")
            assert session is None or isinstance(session, dict)
            read += session is not None
            assert store.get("b") == store.all()["b"] == {"n": 2}
            store.peek("a"), store.load("a"), "a" in store, store.ids(), store.owned_by("ada")
            for change in (
                lambda: store.update("a", {"m": 1}), lambda: store.touch("a"), lambda: store.destroy_if_empty("a"),
                lambda: store.touch("a", {"cookie": {}}), lambda: store.rename("a", "c"), store.prune,
                lambda: store.destroy_owned("ada"), lambda: store.destroy("c"),
            ):  # fmt: skip
                with contextlib.suppress(ShmStoreError):
                    change()
            assert store.get("b") == {"n": 2}

        publish()
        verify(arena)
    figure(f"{EXAMPLES} bodies, {read} of them a session")
