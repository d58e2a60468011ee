"""File operations of servers and workers, interrupted at every line: by a kill, or by an exception.

`python file_faults.py SITUATION ACTION DIRECTORY SEED`: a process of its own, as forking needs one without threads.
ACTION is "kill", "raise", or "second" (try to be a second server); SEED is "1/3" for every third line from the first
one on, else it chooses some of the lines that call the system.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import stat
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_injection import Content, Interrupted, Relentless, Steps, body, content, interrupt, tracing

from shmstore import StoreProxy, connect
from shmstore.client import connection
from shmstore.engine.arena import Arena
from shmstore.engine.header import CLOSED, LIVE, STATE
from shmstore.engine.verify import verify
from shmstore.ipc import options_file
from shmstore.ipc.directory import StoreFiles
from shmstore.options import Options
from shmstore.server.main import start
from shmstore.store.store import Store

SMALL, LARGE = 2**16, 2**17


def options(memory: int = SMALL, **more: Any) -> dict[str, Any]:
    return {"memory": memory, "check_period": None, **more}


def used_by(files: StoreFiles) -> Store:
    """A store opened as in another process of this user."""
    return Store.over(Arena.open(files.arena), Options.of(**options()))


def fill(files: StoreFiles, **more: Any) -> None:
    """Have what a server leaves that was killed, a store with some of everything: made once, then copied."""
    kept = StoreFiles.of(f"kept-{'-'.join(map(str, more.values()))}", os.path.dirname(files.path))
    if not os.path.exists(kept.path):
        given = options_file.pack(options(**more))
        assert in_a_child(lambda: populate(start(kept, given))) == 0
    files.create()
    for entry in os.scandir(kept.path):
        copy = os.link if stat.S_ISSOCK(entry.stat().st_mode) else shutil.copy2
        copy(entry.path, os.path.join(files.path, entry.name))


def populate(server: Any) -> None:
    for number in range(6):
        server._store.set(str(number), body(50 + 100 * number, "x"), ttl=600, owner="ada" if number % 2 else None)
    server._store.set("expired", body(5, "x"), ttl=0)
    server._store.destroy("3")


@dataclass
class Case:
    """A store's directory, the content of the store, the processes that have it open, and the one that moves it."""

    files: StoreFiles
    before: Content = field(default_factory=dict)
    bystander: Store | None = None
    mover: Store | None = None


def everything_is_there(store: Store, expected: Content) -> None:
    verify(store.arena)
    assert store.arena.cells[STATE] == LIVE
    assert content(store) == expected, f"{content(store).keys()} instead of {expected.keys()}"


def goes_on(store: Any, other: Store, expected: Content) -> None:
    """Verify that all sessions are whole, and that each store reads what the other one writes."""
    for each in store, other:
        everything_is_there(each, expected)
    store.set("new", body(200, "n"), ttl=600)
    assert other.get("new") == body(200, "n")
    assert other.destroy("new") == 1
    assert store.get("new") is None
    for each in store, other:
        everything_is_there(each, expected)


def next_server(case: Case, given: dict[str, Any] | None) -> Any:
    """Start a server, which must find all sessions and leave no temporary file."""
    assert case.files.server() is None, "somebody who died keeps the store"
    server = start(case.files, None if given is None else options_file.pack(given))
    assert server is not None
    found = sorted(os.listdir(case.files.path))
    assert found == ["arena", "lock", "options", "socket"], f"{found} in the directory"
    assert case.files.claim(0) is None, "there may be two servers"
    everything_is_there(server._store, case.before)
    return server


# -- the situations ----------------------------------------------------------------------------------------------------


class Situation:
    """An operation on files. This class itself: a server starts in a missing directory."""

    given: dict[str, Any] | None = options()  # of the next server; None: the stored options of the last one

    def prepare(self, files: StoreFiles) -> Case:
        return Case(files)

    def operation(self, case: Case) -> None:
        start(case.files, options_file.pack(options()))

    def survive(self, case: Case) -> None:
        """Check what the process can still do after the exception."""

    def verify(self, case: Case) -> None:
        server = next_server(case, self.given)
        goes_on(server._store, case.bystander or used_by(case.files), case.before)

    def discard(self, case: Case) -> None:
        for store in case.bystander, case.mover:
            if store is not None:
                store.close()
        shutil.rmtree(case.files.path, ignore_errors=True)


class StartAgain(Situation):
    """A server starts after a killed one, beside workers that continue."""

    given: dict[str, Any] | None = None

    def prepare(self, files: StoreFiles) -> Case:
        fill(files)
        store = used_by(files)
        return Case(files, content(store), store)

    def operation(self, case: Case) -> None:
        start(case.files, None)


class Resize(Situation):
    """A server resizes a store that no other process uses."""

    given = options(LARGE)

    def prepare(self, files: StoreFiles) -> Case:
        fill(files)
        with used_by(files) as store:
            return Case(files, content(store))

    def operation(self, case: Case) -> None:
        start(case.files, options_file.pack(self.given or {}))

    def verify(self, case: Case) -> None:
        super().verify(case)
        assert Arena.open(case.files.arena).geometry == Options.of(**options(LARGE)).geometry


class BeginAnew(Situation):
    """The file is not an arena."""

    def prepare(self, files: StoreFiles) -> Case:
        files.create()
        Path(files.arena).write_bytes(b"garbage")
        return Case(files)


class Leave(StartAgain):
    """A server exits."""

    persist = True

    def prepare(self, files: StoreFiles) -> Case:
        fill(files, persist=self.persist)
        store = used_by(files)
        return Case(files, content(store), store)

    def operation(self, case: Case) -> None:
        server: Any = start(case.files, None)
        server.stop_event.set()
        server.serve_forever()


class LeaveForGood(Leave):
    """A server exits and removes its store."""

    persist = False
    given = options()

    def verify(self, case: Case) -> None:
        if not os.path.exists(case.files.arena) or Arena.open(case.files.arena).cells[STATE] == CLOSED:
            case.before = {}
        super().verify(case)


class Move(StartAgain):
    """A worker rebuilds the store in a new file, as it does after damage, while others use it."""

    def prepare(self, files: StoreFiles) -> Case:
        case = super().prepare(files)
        case.mover = used_by(files)
        return case

    def operation(self, case: Case) -> None:
        assert case.mover is not None
        case.mover.move()

    def survive(self, case: Case) -> None:
        assert case.mover is not None
        goes_on(case.mover, used_by(case.files), case.before)

    def verify(self, case: Case) -> None:
        assert case.bystander is not None
        goes_on(case.bystander, used_by(case.files), case.before)
        super().verify(case)


class Attach(StartAgain):
    """A process opens the arena and reads for the first time."""

    def operation(self, case: Case) -> None:
        assert used_by(case.files).get("1") == body(150, "x")

    def verify(self, case: Case) -> None:
        goes_on(used_by(case.files), case.bystander or used_by(case.files), case.before)
        super().verify(case)


class AttachAlone(Attach):
    """The only process that has the arena open."""

    def prepare(self, files: StoreFiles) -> Case:
        fill(files)
        with used_by(files) as store:
            return Case(files, content(store))


class Connect(Situation):
    """A process connects to a running server."""

    running: Case | None = None

    def prepare(self, files: StoreFiles) -> Case:
        if self.running is None:
            fill(files)
            self.lifeline, _ = connection.connect_or_start(files)
            store = used_by(files)
            self.running = Case(files, content(store), store)
        return self.running

    def operation(self, case: Case) -> None:
        with connect(f"shm://{case.files.path}") as store:
            assert store.get("1") == body(150, "x")
            assert store.ping()

    def verify(self, case: Case) -> None:
        assert case.bystander is not None
        assert case.files.server() == self.lifeline.peer.pid
        with connect(f"shm://{case.files.path}") as store:
            assert isinstance(store, StoreProxy)
            goes_on(store._store, case.bystander, case.before)
            assert store.ping()  # the server answers

    def discard(self, case: Case) -> None:
        pass


STARTS = "start", "start again", "resize", "begin anew"
SITUATIONS: dict[str, Situation] = {
    "start": Situation(),
    "start again": StartAgain(),
    "resize": Resize(),
    "begin anew": BeginAnew(),
    "leave": Leave(),
    "leave for good": LeaveForGood(),
    "move": Move(),
    "attach": Attach(),
    "attach alone": AttachAlone(),
    "connect": Connect(),
}


# -- at every line -----------------------------------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS = {"kill": kill, "raise": interrupt}
_COMPLETE, _CUT_SHORT, _WRONG = 0, 3, 1


def in_a_child(function: Callable[[], int | None]) -> int:
    """Return what `function` returns in a child (0 for None), or the negative number of the signal that killed it."""
    child = os.fork()
    if not child:
        try:
            os._exit(function() or 0)
        except BaseException:
            traceback.print_exc()
            os._exit(_WRONG)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def cut_short(situation: Situation, case: Case, steps: Steps, system: bool) -> int:
    try:
        with tracing(steps, system=system):
            situation.operation(case)
    except Interrupted:
        situation.survive(case)
    return _COMPLETE if steps.count < steps.chosen else _CUT_SHORT


def at_every_line(situation: Situation, action: Callable[[], None], files: StoreFiles, seed: str) -> int:
    """Interrupt an operation at its first line, at its second, ... until it completes; return the number of lines."""
    part, _, parts = seed.partition("/")
    system = not parts
    chosen, rnd = 0 if system else int(part) - int(parts), random.Random(seed)
    while True:
        chosen += rnd.randint(1, 8) if system else int(parts)
        case = situation.prepare(files)
        steps = Steps(chosen, action)
        ended = in_a_child(lambda: cut_short(situation, case, steps, system))  # noqa: B023 - called at once
        assert ended in (_COMPLETE, _CUT_SHORT, -signal.SIGKILL), f"line {chosen}: status {ended}"
        assert in_a_child(lambda: situation.verify(case)) == 0, f"cut short at line {chosen}"  # noqa: B023
        situation.discard(case)
        if ended == _COMPLETE:
            return chosen - 1


def nobody_else_at_any_line(situation: Situation, files: StoreFiles) -> int:
    """Try to start a second server before every line of the start of another; return the number of lines."""
    case = situation.prepare(files)
    taken = lines = 0

    def try_to_be_one() -> None:
        nonlocal taken, lines
        lines += 1
        with contextlib.suppress(FileNotFoundError):  # the directory does not exist yet
            lock = files.claim(0)
            if lock is None:
                taken += 1
            else:
                os.close(lock)
                assert not taken, "there may be two servers"

    with tracing(Relentless(0, try_to_be_one)):
        situation.operation(case)
    assert taken > lines / 4
    situation.discard(case)
    return lines


def main() -> None:
    situation, action, seed = SITUATIONS[sys.argv[1]], sys.argv[2], sys.argv[4]
    files = StoreFiles.of("shop", sys.argv[3])
    logging.disable()
    if action == "second":
        lines = nobody_else_at_any_line(situation, files)
    else:
        lines = at_every_line(situation, ACTIONS[action], files, seed)
    print(f"{lines} lines")


if __name__ == "__main__":
    main()
