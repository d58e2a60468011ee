"""
Django's own tests of sessions, run over stores of this project.

They are in its source distribution, which is fetched once, and kept beside the environment. A release that needs a
newer Python than this one is run by another Python found here, in an environment of its own.

Executed, this file runs them: ``python django_suite.py DIRECTORY URL``, with the unpacked distribution and the URL of a
store, or "private".
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = Path(sys.prefix, "django")


def pip(*words: str | Path, python: str | Path = sys.executable) -> None:
    """Run pip. If it fails, say what to do."""
    command = [python, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not done.returncode, (
        f"Django's tests are in its source distribution, which cannot be fetched: check the access to the package "
        f"index, or unpack a django-*.tar.gz into a folder in {PLACE}\n{' '.join(map(str, command))}\n{done.stdout}"
    )


def fetched(release: str) -> Path:
    """Return the unpacked source distribution of a release, such as "5.2"; "current": the newest one."""
    place = PLACE / release
    place.mkdir(parents=True, exist_ok=True)
    with locked(place):
        if not [*place.glob("django-*/tests")]:
            wanted = "django" if release == "current" else f"django=={release}.*"
            pip("download", "--no-deps", "--no-binary=django", "--ignore-requires-python", "--dest", place, wanted)
            with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
                archive.extractall(place, filter="data")
    return next(place.glob("django-*/tests")).parent


def python_for(distribution: Path, find: Callable[[str], str | None]) -> Path | str:
    """
    Return a Python that can run a release, with what it and this package need. Without one, skip the test.

    Args:
        distribution: The unpacked release.
        find: Returns the Python of a version such as "3.12", or None if it is not found here.
    """
    theirs = tomllib.loads((distribution / "pyproject.toml").read_text())["project"]
    oldest = re.search(r"3\.(\d+)", theirs["requires-python"])
    assert oldest
    minor = int(oldest[1])
    if sys.version_info >= (3, minor):
        return sys.executable
    import pytest  # not there if this file is executed

    other = next(filter(None, (find(f"3.{each}") for each in range(minor, minor + 3))), None)
    if other is None:
        pytest.skip(f"{distribution.name} needs Python 3.{minor}, which is not found here")
    environment = distribution.parent / "python"
    with locked(distribution.parent):
        if not (environment / "ready").exists():
            subprocess.run([other, "-m", "venv", environment], check=True)
            ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            packages = [*ours["dependencies"], *ours["optional-dependencies"]["redis"], *theirs["dependencies"]]
            pip("install", *packages, python=environment / "bin" / "python")
            (environment / "ready").touch()
    return environment / "bin" / "python"


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Let one worker of pytest at a time fetch and install."""
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(python: Path | str, distribution: Path, url: str) -> tuple[int, str]:
    """Run the tests over a store; return how many passed, and what was printed."""
    done = subprocess.run(
        [python, __file__, distribution, url], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (distribution, distribution / "tests", ROOT)))},
    )  # fmt: skip
    ran = re.search(r"^Ran (\d+) tests.*\n\nOK$", done.stdout, re.MULTILINE)
    return int(ran[1]) if ran and not done.returncode else 0, done.stdout


def main(distribution: str, url: str) -> None:
    """Run them, in a process that may configure Django."""
    import unittest

    import django
    from django.conf import settings

    import shmstore

    options = {"memory": 2**20} if url.startswith("shm:") else {}
    assert (django.__file__ or "").startswith(distribution), f"{django.__file__} is another Django"
    settings.configure(
        SESSION_ENGINE="shmstore.django",
        SHMSTORE={"STORE": shmstore.Store(memory=2**20)} if url == "private" else {"STORE": url, **options},
        INSTALLED_APPS=["django.contrib.sessions", "sessions_tests", "shmstore.django"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        SECRET_KEY="for tests",
        USE_TZ=False,
    )
    django.setup()
    from django.test import SimpleTestCase
    from django.test.runner import DiscoverRunner
    from sessions_tests import tests  # type: ignore[import-not-found]  # in the distribution

    from shmstore.django import SessionStore

    class OurSessionTests(tests.SessionTestsMixin, SimpleTestCase):  # type: ignore[misc]
        backend = SessionStore

    # Its tests of the middleware use the engine of the settings. One of them looks into the table of the engine "db".
    del tests.SessionMiddlewareTests.test_empty_session_saved
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    suite = unittest.TestSuite([load(OurSessionTests), load(tests.SessionMiddlewareTests)])
    runner = DiscoverRunner(verbosity=1)
    old = runner.setup_databases()
    result = runner.run_suite(suite)
    runner.teardown_databases(old)
    sys.exit(not result.wasSuccessful())


if __name__ == "__main__":
    main(*sys.argv[1:])
