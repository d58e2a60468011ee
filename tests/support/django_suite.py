"""
Django's own tests of sessions, run over stores of this project.

A release that needs a newer Python than this one is run by another Python found here, in an environment of its own.

Executed, this file runs them: ``python django_suite.py DIRECTORY URL``, with the unpacked distribution and the URL of a
store, or "private".
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from distributions import ROOT, Outcome, locked, pip

FAILURES: Final = {"test_empty_session_saved": 'looks for the session in the table of the engine "db"'}
"""The tests that fail, and the reasons."""

TESTS: Final = 76
"""The tests that pass in Django 5.2: 65 of the mixin, 11 of the middleware."""


def python_for(distribution: Path, find: Callable[[str], str | None]) -> Path | str | None:
    """
    Return a Python that can run a release, with what it and this package need. None: it is not found here.

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
    other = next(filter(None, (find(f"3.{each}") for each in range(minor, minor + 3))), None)
    if other is None:
        return None
    environment = distribution.parent / "python"
    with locked(distribution.parent):
        if not (environment / "ready").exists():
            subprocess.run([other, "-m", "venv", environment], check=True)
            ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            packages = [*ours["dependencies"], *ours["optional-dependencies"]["redis"], *theirs["dependencies"]]
            pip("install", *packages, python=environment / "bin" / "python")
            (environment / "ready").touch()
    return environment / "bin" / "python"


def run(python: Path | str, distribution: Path, url: str) -> Outcome:
    """Run the tests over a store."""
    done = subprocess.run(
        [python, __file__, distribution, url], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (distribution, distribution / "tests", ROOT)))},
    )  # fmt: skip
    found = re.search(r"^OUTCOME (.*)$", done.stdout, re.MULTILINE)
    passed, skipped, failed = json.loads(found[1]) if found else (0, 0, [])
    return Outcome(passed, skipped, failed, done.stdout)


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

    # Its tests of the middleware use the engine of the settings.
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    suite = unittest.TestSuite([load(OurSessionTests), load(tests.SessionMiddlewareTests)])
    runner = DiscoverRunner(verbosity=1)
    old = runner.setup_databases()
    result = runner.run_suite(suite)
    runner.teardown_databases(old)
    failed = {test.id().split()[0].rpartition(".")[2] for test, _ in result.failures + result.errors}
    skipped = len(result.skipped)
    print("OUTCOME", json.dumps([result.testsRun - skipped - len(failed), skipped, sorted(failed)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
