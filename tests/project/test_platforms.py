"""
Operating systems that are not here: what must work there works without what they lack.

Each is this machine without the calls and modules that it lacks (`tests/support/other_platform.py`), and without
/dev/shm and /proc if the tests may mount.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import documents
import hard_place
import other_platform
import pytest
from hard_place import UNSHARE
from processes import ROOT
from redis_servers import RedisServer, on_free_port, short_path
from sampling import some

SUITE = Path(other_platform.__file__).with_name("other_platform_suite.py")
SHARED = r"a store that processes share needs CPython on 64-bit Linux[;,] (this is CPython on|and this Python lacks) "
PYTEST = ("pytest", "-q", "-c", os.devnull, "--noconftest", "-W", "error", "-p", "no:cacheprovider")

On = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def place() -> list[str]:
    """Return the start of a command that has neither /dev/shm nor /proc, if one can be made."""
    command = [*UNSHARE, sys.executable, hard_place.__file__, "no-shm-no-proc"]
    try:
        tried = subprocess.run([*command, "true"], capture_output=True)
    except FileNotFoundError:
        return []
    return [] if tried.returncode else command


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server on a port: other platforms may lack unix sockets."""
    server = on_free_port(lambda port: RedisServer(short_path(tmp_path_factory), port=port))
    yield server.url
    server.end()


@pytest.fixture
def on(place: list[str], tmp_path: Path) -> On:
    """Return a function that runs Python on another platform."""

    def run(platform: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*place, sys.executable, "-W", "error", other_platform.__file__, platform, *arguments],
            capture_output=True, text=True, cwd=tmp_path,
            env=os.environ | {
                "PYTHONPATH": ROOT, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"
            } | environment,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("platform", other_platform.PLATFORMS)
def test_everything_can_be_imported(platform: str, on: On) -> None:
    code = """
import importlib, pkgutil, shmstore
for module in pkgutil.walk_packages(shmstore.__path__, "shmstore."):
    if module.name not in ("shmstore.server.main", "shmstore.__main__"):
        importlib.import_module(module.name)
for name in shmstore.__all__:
    getattr(shmstore, name)
print(shmstore.system.platform.LACKING)
"""
    done = on(platform, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(SHARED, done.stdout)


@some("platform", {name: name for name in other_platform.PLATFORMS})
def test_stores_applications_and_commands(platform: str, on: On, redis_url: str) -> None:
    done = on(platform, "-m", *PYTEST, str(SUITE), REDIS_URL=redis_url)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert re.search(r"^[0-9]{3} passed", done.stdout, re.MULTILINE)


@some("platform", {name: name for name in other_platform.PLATFORMS})
def test_the_documented_tests_of_an_application(platform: str, on: On, tmp_path: Path) -> None:
    for block in documents.blocks(Path(ROOT, "docs", "guides", "testing.md")):
        if block.name:
            path = tmp_path / block.name
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text)
    done = on(platform, "-m", *PYTEST, "test_shop.py", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^4 passed", done.stdout, re.MULTILINE)
