"""
The cost of an operation and of a request, in counts that do not depend on the machine or its load.

The ceilings are a little above the current figures. A change that makes something cheaper lowers them; a change that
needs more says why.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from engines import on_each_engine
from flask import Flask, Request, Response, session
from flask.sessions import SessionInterface, SessionMixin
from processes import ROOT, Start
from werkzeug.test import EnvironBuilder

import benchmarks.requests
from benchmarks.operations import session_of
from shmstore import Store
from shmstore.contract import AnyStore
from shmstore.engine import core
from shmstore.flask import StoreSessionInterface

SESSION = session_of(750)
SID = "0" * 43

# Calls of Python and of C functions.
OPERATIONS = {
    "python": {"get": 29, "set": 78, "set, new": 75, "update": 95, "touch": 40, "destroy": 34},
    "c": {"get": 16, "set": 21, "set, new": 21, "update": 58, "touch": 18, "destroy": 13},
}
# Beyond a request without any session. "login" has no session yet, "sign_in" has one, and gets another id.
REQUESTS = {
    "python": {"unused": 11, "read": 100, "write": 168, "login": 179, "sign_in": 263},
    "c": {"unused": 11, "read": 82, "write": 105, "login": 119, "sign_in": 160},
}


class Count:
    """Counts calls by kind while its context is active."""

    def __init__(self) -> None:
        self.calls = 0
        self.decodes = self.encodes = 0  # of msgpack, with any content
        self.named: Counter[str] = Counter()  # those of our own, as package/module:function

    def __enter__(self) -> Count:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        self.calls -= 1  # this one

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.calls += 1
            path = Path(frame.f_code.co_filename)
            if "shmstore" in path.parts[-3:-1]:  # in a package of shmstore, or at its top
                self.named[f"{path.parts[-2]}/{path.stem}:{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            self.calls += 1
            owner = getattr(argument, "__self__", None)
            if type(owner).__module__.startswith("msgspec"):
                self.decodes += argument.__name__ == "decode"
                self.encodes += argument.__name__ == "encode"


def least(action: Callable[[], object], before: Callable[[], object] = lambda: None) -> Count:
    """Return the smallest of several counts, because some runs have additional work."""
    counts = []
    for _ in range(10):
        before()
        with Count() as count:
            action()
        counts.append(count)
    return min(counts, key=lambda each: each.calls)


@pytest.fixture
def shared(manage: Start) -> Iterator[AnyStore]:
    """A shared store as in a worker: a server owns it, and all operations are in place."""
    with manage(memory=2**22, check_period=None).store() as store:
        yield store


def operation(store: Store, name: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return an operation, and its preparation."""

    def put() -> object:
        return store.set(SID, SESSION, math.inf)

    def gone() -> object:
        return store.destroy(SID)

    return {
        "get": (lambda: store.get(SID), put),
        "set": (put, put),
        "set, new": (put, gone),
        "update": (lambda: store.update(SID, {"language": "de"}), put),
        "touch": (lambda: store.touch(SID, None, 3600), put),
        "destroy": (gone, put),
    }[name]


@on_each_engine
@pytest.mark.parametrize("name", OPERATIONS["c"])
def test_an_operation_stays_within_its_number_of_calls(name: str, shared: Store, figure: Callable[[str], None]) -> None:
    calls = least(*operation(shared, name)).calls
    figure(f"{name}: {calls} calls")
    assert calls <= OPERATIONS[shared.stats().engine][name], f"{name} makes {calls} calls"


def test_reading_decodes_once_and_writing_never(shared: Store) -> None:
    assert least(*operation(shared, "get")).decodes == 1
    for name in ("set", "set, new", "touch", "destroy"):
        assert least(*operation(shared, name)).decodes == 0, name


class Visit:
    """Calls an application as a server would."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.cookie = ""

    def __call__(self, path: str) -> None:
        environ = EnvironBuilder(path).get_environ()
        if self.cookie:
            environ["HTTP_COOKIE"] = self.cookie
        assert b"".join(self.app.wsgi_app(environ, self._start))

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        assert status == "200 OK", status
        self.cookie = dict(headers).get("Set-Cookie", self.cookie).partition(";")[0]
        return lambda _: None

    def prepare(self, path: str) -> None:
        """Do what has to be done before a request."""
        if path == "/login":
            self.cookie = ""
        elif path == "/sign_in":
            self.cookie = ""
            self("/browse")


def make_app() -> Flask:
    app = benchmarks.requests.make_app()

    @app.get("/browse")
    def browse() -> str:
        session.update({key: value for key, value in SESSION.items() if key != "_user_id"})
        return "hello"

    @app.get("/sign_in")
    def sign_in() -> str:
        session["_user_id"] = SESSION["_user_id"]
        return "hello"

    return app


class NoSession(SessionInterface):
    def open_session(self, app: Flask, request: Request) -> None:
        return None

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        pass


@pytest.fixture
def visit(shared: Store) -> Visit:
    """A visitor who is logged in."""
    app = make_app()
    app.session_interface = StoreSessionInterface(shared)
    visit = Visit(app)
    visit("/login")
    return visit


def count_request(visit: Visit, path: str) -> Count:
    return least(lambda: visit(path), lambda: visit.prepare(path))


@on_each_engine
@pytest.mark.parametrize("name", REQUESTS["c"])
def test_a_session_stays_within_its_number_of_calls(name: str, visit: Visit, figure: Callable[[str], None]) -> None:
    app = make_app()
    app.session_interface = NoSession()
    plain = Visit(app)
    base = least(lambda: plain("/unused")).calls
    calls = count_request(visit, f"/{name}").calls - base
    figure(f"{name}: {calls} calls")
    assert calls <= REQUESTS[core.engine()][name], f"the session of a request makes {calls} calls"


def test_a_request_that_does_not_access_its_session_reads_nothing(visit: Visit) -> None:
    count = least(lambda: visit("/unused"))
    assert count.decodes == 0
    assert not [name for name in count.named if name.startswith(("engine/", "store/"))]


METHODS = ("load", "swap", "add", "update", "rename", "touch", "__contains__", "lock", "gone")


@on_each_engine
@pytest.mark.parametrize(
    ("path", "decodes", "calls"),
    [
        ("read", 1, {"load": 1}),
        ("write", 1, {"load": 1, "swap": 1}),
        ("login", 0, {"add": 1}),
        ("sign_in", 1, {"load": 1, "swap": 1}),
    ],
)
def test_a_request_decodes_and_encodes_its_session_once_at_most(
    visit: Visit, path: str, decodes: int, calls: dict[str, int]
) -> None:
    """A session is also encoded only once: the bytes that are compared are written."""
    count = count_request(visit, f"/{path}")
    assert {name: times for name in METHODS if (times := count.named[f"client/store_proxy:{name}"])} == calls
    assert (count.decodes, count.encodes) == (decodes, 1)


# -- system calls ----------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
import shmstore, test_steady
from shmstore.flask import StoreSessionInterface
directory, sid, count = sys.argv[1:]
store = shmstore.connect("shop", directory=directory)
session = {"user": 4711, "text": "x" * 700}
app = test_steady.make_app()
app.session_interface = StoreSessionInterface(store)
visit = test_steady.Visit(app)
visit("/login")
calls = {
    "set": lambda: store.set(sid, session, 3600), "get": lambda: store.get(sid),
    "read": lambda: visit("/read"), "write": lambda: visit("/write"),
}
for name, call in calls.items():
    call()
    os.write(1, f"{name}\\n".encode())
    for _ in range(int(count)):
        call()
os.write(1, b"end\\n")
"""


@on_each_engine
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not on PATH")
def test_in_place_there_are_no_system_calls(
    manage: Start, store_dir: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    """Neither in an operation nor in a request; a login makes one, for the bytes of its id."""
    manage(memory=2**22, check_period=None).start()
    out, count = tmp_path / "strace", 200
    process = subprocess.run(  # of its only busy thread: another one could be given work by a system call only
        ["strace", "-o", out, sys.executable, "-c", SCRIPT, store_dir, SID, str(count)],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    if process.returncode and "strace: " in process.stderr:
        pytest.skip(f"strace may not trace here: {process.stderr.strip()[-200:]}")
    assert not process.returncode, process.stderr
    parts = re.findall(r'^write\(1, "(\w+)\\n".*\n((?:(?!write\(1, ).*\n)*)', out.read_text(), re.MULTILINE)
    assert [name for name, _ in parts] == ["set", "get", "read", "write", "end"]
    for name, lines in parts[:-1]:
        each = lines.count("\n") / count
        figure(f"{name}: {each:.3f} system calls")
        assert each < 0.05, f"each {name} makes {each:.3f} system calls:\n{lines}"


# -- imports ---------------------------------------------------------------------------------------------------------

IMPORTERS = {
    "a library": "import shmstore",
    "a Flask application": "import shmstore.flask",
    "a worker": """
from flask import Flask, session
from shmstore.flask import Sessions
app = Flask("worker")
app.config.update(SESSION_STORE=f"shm://{directory}/shop")
app.add_url_rule("/", view_func=lambda: str(session.setdefault("n", 1)))
Sessions(app)
assert app.test_client().get("/").text == "1"
""",
    "a command": """
import shmstore.cli
sys.argv = ["shmstore", "stats", f"{directory}/shop"]
try:
    shmstore.cli.main()
except SystemExit as end:
    assert not end.code
""",
    "a server": "import shmstore.server.main",
}


@pytest.mark.parametrize("name", IMPORTERS)
def test_dill_is_not_imported_before_it_is_needed(name: str, manage: Start, store_dir: Path) -> None:
    """It takes as long to import as all of shmstore, and multiprocess imports it."""
    manage(memory=2**22).start()
    check = "assert not {'dill', 'multiprocess'} & {*sys.modules}"
    code = f"import sys; directory = sys.argv[1]\n{IMPORTERS[name]}\n{check}"
    subprocess.run([sys.executable, "-c", code, store_dir], cwd=ROOT, check=True, timeout=100)
