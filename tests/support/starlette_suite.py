"""
Starlette's own tests of its session middleware, run with the middleware of this project.

They are in its source distribution, which is fetched once, and kept beside the environment. As a plugin of pytest, this
module puts our middleware in the place of Starlette's, with Starlette's options translated.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tarfile
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
PLACE: Final = Path(sys.prefix, "starlette")

FAILURES: Final = {
    "test_session_expires": "max_age=-1: a lifetime must be more than 0",
    "test_session_zero_max_age": "max_age=0: the same",
}
"""The tests that fail, and the reasons."""


def fetched() -> Path:
    """Return the unpacked source distribution of the Starlette that is installed."""
    PLACE.mkdir(exist_ok=True)
    name = f"starlette-{version('starlette')}"
    with (PLACE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (PLACE / name / "tests").exists():
            command = [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                "--no-binary=starlette", "--dest", str(PLACE), name.replace("-", "==", 1),
            ]  # fmt: skip
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            assert not done.returncode, f"{name}.tar.gz cannot be fetched: {' '.join(command)}\n{done.stdout}"
            with tarfile.open(PLACE / f"{name}.tar.gz") as archive:
                archive.extractall(PLACE, filter="data")
    return PLACE / name


def run(url: str) -> tuple[set[str], set[str], str]:
    """Run the tests over a store; return the names of those that passed and failed, and what was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "starlette_suite", "-p", "no:cacheprovider", "-p", "no:xdist", "-v",
         "-W", "ignore", "-o", "addopts=", "tests/middleware/test_session.py"],
        cwd=fetched(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), "STORE_URL": url},
    )  # fmt: skip
    found: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set()}
    for name, outcome in re.findall(r"::(\w+)\S* (PASSED|FAILED|ERROR)", done.stdout):
        found[outcome].add(name)
    failed = found["FAILED"] | found["ERROR"]
    return found["PASSED"] - failed, failed, done.stdout


def pytest_configure() -> None:
    """Put our middleware in the place of Starlette's."""
    from starlette.middleware import sessions

    from shmstore import Store
    from shmstore.asgi import SessionMiddleware

    url = os.environ["STORE_URL"]
    store = Store(memory=2**20) if url == "private" else url

    class Ours(SessionMiddleware):
        def __init__(
            self, app: Any, secret_key: str, session_cookie: str = "session", max_age: int | None = 14 * 86400,
            path: str = "/", same_site: str = "lax", https_only: bool = False, domain: str | None = None,
            partitioned: bool = False,
        ) -> None:  # fmt: skip
            super().__init__(
                app, store, ttl=timedelta(days=14) if max_age is None else max_age, permanent=max_age is not None,
                refresh_each_request=False, cookie_name=session_cookie, cookie_path=path, cookie_samesite=same_site,
                cookie_secure=https_only, cookie_domain=domain, cookie_partitioned=partitioned,
            )  # fmt: skip

    sessions.SessionMiddleware = Ours  # type: ignore[assignment, misc]
