"""Fixtures that start processes. Processes that a test starts, and their descendants, end with the test."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import sampling
from browsing import Clock, make_app
from flask import Flask
from flask.testing import FlaskClient
from fork_in_c import fork_in_c
from forks import ForkingProcess
from gunicorns import Gunicorn, StartGunicorn
from hypothesis import HealthCheck, settings
from other_users import NOBODY
from processes import HURRIED, ROOT, Run, Start, mark_descendants, servers, wait_for
from redis_servers import RedisCluster, RedisServer, StartRedis, short_path

from shmstore import Store
from shmstore.client import connection, spawn
from shmstore.ipc.directory import DEFAULT, StoreFiles
from shmstore.manager import StoreManager, StoreProxy

# A background job of a shell ignores SIGINT, and every process that the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Collecting thousands of tests creates no garbage, and the garbage collector would take 2 of 6 seconds in each worker.
gc.disable()

# A busy machine does not make a test fail.
settings.register_profile(
    "suite", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], print_blob=True
)
settings.load_profile("suite")

# The tests start hundreds of processes. Without compiled files each of them would compile the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", action="store_true", help="run the tests in random order")
    parser.addoption("--shuffle-seed", type=int, metavar="N", help="run the tests in the order of this seed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        'processes(kind): how `manage` starts servers and `gunicorn` Gunicorns: "executed", as for users, where the '
        'start is what is tested; else they are "forked", see forks.py',
    )
    if config.option.shuffle and config.option.shuffle_seed is None:
        # Chosen here, so that all workers of xdist use the same order.
        config.option.shuffle_seed = random.SystemRandom().randrange(10**6)


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.option.shuffle_seed
    shuffled = "" if seed is None else f", shuffled: --shuffle-seed={seed}"
    return ("all cases" if sampling.FULL else f"some cases: SHMSTORE_SAMPLE={sampling.SEED}") + shuffled


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.shuffle_seed is not None:
        random.Random(config.option.shuffle_seed).shuffle(items)
    else:
        # Tests with a timeout of their own are long. If they started last, one worker would be busy and others idle.
        items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
    for item in items if sampling.FULL else []:  # all cases take long: this limit replaces that of each mark
        own = item.get_closest_marker("timeout")
        limit = pytest.mark.timeout(sampling.LONGEST + 100, **(own.kwargs if own else {}))
        item.add_marker(limit, append=False)


def pytest_collection_finish() -> None:
    gc.freeze()  # collected objects live until the end
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_server_outlives_the_run() -> Iterator[None]:
    """Fail the run if a server started in it does not end by itself."""
    mark_descendants()
    yield
    with contextlib.suppress(AssertionError):
        wait_for(lambda: not servers(), timeout=300)
    left = servers()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    for uid in {os.geteuid(), NOBODY}:  # at the end: another process may be about to make a store in it
        with contextlib.suppress(OSError):  # it has stores, or does not exist
            os.rmdir(f"{DEFAULT}{uid}")
    assert not left, f"these servers outlived the tests: {left}"


@pytest.fixture(scope="session")
def forker(no_server_outlives_the_run: None) -> Iterator[ForkingProcess]:
    """Return the process that forks the processes of tests without the mark ``processes("executed")``."""
    forker = ForkingProcess()
    yield forker
    forker.end()


@pytest.fixture(params=[os.fork, fork_in_c], ids=["Python", "C"])
def fork(request: pytest.FixtureRequest) -> Callable[[], int]:
    """Return a function that forks: with Python's hooks, or without them as uWSGI does."""
    function: Callable[[], int] = request.param
    return function


@pytest.fixture
def forked_servers(forker: ForkingProcess) -> Iterator[None]:
    """Have the servers that this process starts forked, not executed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn, "_execute", forker.server)
        yield


@pytest.fixture
def hurried_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the servers that this process starts check their files often, and leave soon after their last client."""
    monkeypatch.setattr(spawn, "BOOT", HURRIED)


def executed(request: pytest.FixtureRequest) -> bool:
    kind = request.node.get_closest_marker("processes")
    return kind is not None and kind.args == ("executed",)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that records a measured figure of a test, for the report of ``make faults``."""
    return lambda text: request.node.user_properties.append(("figure", text))


@pytest.fixture(autouse=True)
def chosen_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """
    Choose the engine of a test that is marked `engines.on_each_engine`.

    The patch is its own: a test's ``monkeypatch`` must end before the fixtures that the test named first.
    """
    with pytest.MonkeyPatch.context() as patch:
        if name := getattr(request, "param", ""):
            patch.setenv(engines.VARIABLE, name)
        yield


@pytest.fixture
def seed() -> int:
    """Return the seed of a test's random choices; it is shown if the test fails."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return seed


@pytest.fixture
def store_dir() -> Iterator[Path]:
    """Return an empty directory in shared memory for this test's stores; it is removed afterwards with the servers."""
    path = Path(tempfile.mkdtemp(prefix="shmstore-test-", dir="/dev/shm"))
    attached: dict[str, StoreProxy] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shmstore.attach._attached", attached)
        yield path
    for store in attached.values():  # otherwise their managers would restart the servers that are ended below
        store.close()
        if store._manager is not None:
            store._manager.detach()
    wait_for(lambda: removed(path), "removing the stores of this test")


def removed(path: Path) -> bool:
    """Remove stores and end their servers. A server that is exiting or starting may write a file meanwhile."""
    with contextlib.suppress(OSError):
        for lock in path.rglob("lock"):
            owner = lock.stat()
            files = StoreFiles(str(lock.parent), owner.st_uid, owner.st_gid, False)
            if files.server() != os.getpid():  # a start in this process that has failed keeps its lock
                connection.kill(files)
        shutil.rmtree(path)
    # A thread that a write has started, because it found no server, may be about to start one.
    return not path.exists() and "shmstore-rescue" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """
    Return a function that returns what the servers of this test have logged so far.

    ``capfd.readouterr`` empties the file after it has read it: what a server writes in between is lost.
    """
    return lambda: os.pread(2, 2**24, 0).decode(errors="replace")


@pytest.fixture
def manage(request: pytest.FixtureRequest, store_dir: Path) -> Iterator[Start]:
    """Return a function that makes managers of small stores in ``store_dir``, which are shut down in the end."""
    managers = []
    if not executed(request):
        request.getfixturevalue("forked_servers")

    def make(name: str = "shop", **options: Any) -> StoreManager:
        managers.append(StoreManager(name, **{"memory": 2**20, "directory": store_dir, **options}))
        return managers[-1]

    yield make
    for manager in managers:
        manager.shutdown()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Return a function that runs a script in a Python of its own, in a session of its own; killed in the end."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: object, **popen: Any) -> subprocess.Popen[str]:
        script = tmp_path / f"script{len(processes)}.py"
        script.write_text(code)
        process = subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            **{"env": os.environ | {"PYTHONPATH": ROOT}, **popen},
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def gunicorn(request: pytest.FixtureRequest, tmp_path: Path, store_dir: Path) -> Iterator[StartGunicorn]:
    """Return a function that starts a Gunicorn with the application in the test module's ``APP``; killed in the end."""
    started: list[Gunicorn] = []

    def start(*arguments: str, **how: Any) -> Gunicorn:
        place = tmp_path / f"g{len(started)}"
        place.mkdir()
        if not executed(request) and not how.keys() & {"command", "path"}:
            how["forker"] = request.getfixturevalue("forker")
        started.append(Gunicorn(request.module.APP, place, store_dir, *arguments, **how))
        return started[-1]

    yield start
    for one in started:
        one.end_all()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Return a server shared by all tests that do not change it; each uses its own prefix of keys."""
    server = RedisServer(short_path(tmp_path_factory))
    yield server
    server.end()


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Return a Cluster of three servers shared by all tests that do not change it."""
    cluster = RedisCluster(short_path(tmp_path_factory))
    yield cluster
    cluster.end()


@pytest.fixture
def start_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartRedis]:
    """Return a function that starts a server for one test, which may kill it; it ends with the test."""
    started: list[RedisServer] = []

    def start(*options: str, **how: Any) -> RedisServer:
        started.append(RedisServer(short_path(tmp_path_factory), *options, **how))
        return started[-1]

    yield start
    for server in started:
        server.end()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[Store]:
    with Store(memory=2**20, clock=clock, check_period=None, recency=0) as store:
        yield store


@pytest.fixture
def app(store: Store) -> Flask:
    return make_app(store)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()
