"""
Runs other projects' own tests of sessions over this one, and prints a line for each project: ``make peers``.

The exit status is 1 if a test fails without a documented reason, or if a documented reason does not apply. The reasons
are in the tables ``FAILURES`` of the modules that run the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import django_suite
import flask_suites
import starlette_suite
from distributions import Outcome, fetched
from package_trial import interpreter
from processes import mark_descendants, servers, wait_for
from redis_servers import RedisServer

Result = tuple[str, Mapping[str, str], Outcome | str, int]


def suites(stores: Mapping[str, str]) -> Iterator[Callable[[], Result]]:
    """
    Yield functions that run tests of a distribution.

    Each returns the distribution, its documented failures, what its tests did or why they were not run, and how many
    must pass.

    Args:
        stores: The URLs of kinds of stores, with {} for a name.
    """
    for package, reasons in flask_suites.FAILURES.items():
        yield partial(flask, package, reasons)
    for kind, url in stores.items():
        for release in ("5.2", "current"):
            yield partial(django, release, kind, url.format(f"django-{release}"))
        yield partial(starlette, kind, url.format("starlette"))


def flask(package: str, reasons: Mapping[str, str]) -> Result:
    distribution = fetched(package, version(package))
    has_tests = (distribution / "tests").exists()
    return distribution.name, reasons, flask_suites.run(distribution) if has_tests else "has no tests in its sdist", 1


def django(release: str, kind: str, url: str) -> Result:
    distribution = fetched("django", release)
    python = django_suite.python_for(distribution, interpreter)
    ran = django_suite.run(python, distribution, url) if python else "needs a Python that is not found here"
    return f"{distribution.name} {kind}", django_suite.FAILURES, ran, django_suite.TESTS


def starlette(kind: str, url: str) -> Result:
    distribution = fetched("starlette", version("starlette"))
    ran = starlette_suite.run(distribution, url)
    return f"{distribution.name} {kind}", starlette_suite.FAILURES, ran, starlette_suite.TESTS


def report(name: str, reasons: Mapping[str, str], outcome: Outcome | str, least: int = 1) -> bool:
    """Print what the tests of a distribution did. Return whether that is what is documented, and enough have passed."""
    if isinstance(outcome, str):
        print(f"{name:30}  {outcome}", flush=True)
        return True
    explained = [test for test in outcome.failed if test in reasons]
    unexplained = len(outcome.failed) - len(explained)
    outdated = reasons.keys() - explained
    print(
        f"{name:30}  {outcome.passed:3} passed, {unexplained} failed, {len(explained)} failed for a documented reason, "
        f"{outcome.skipped} skipped",
        flush=True,
    )
    for test in sorted({*outcome.failed, *outdated}):
        reason = reasons.get(test, "FAILED")
        print(f"    {test}: {f'DID NOT FAIL, but is documented: {reason}' if test in outdated else reason}")
    if outcome.passed < least:
        print(f"    {least} must pass")
    good = outcome.passed >= least and not unexplained and not outdated
    if not good:
        print(outcome.printed, flush=True)
    return good


def main() -> None:
    mark_descendants()
    with TemporaryDirectory(prefix="shmstore-peers-", dir="/dev/shm") as place:
        redis = RedisServer(Path(place, "redis"))
        stores = {
            "private": "private",
            "of this host": f"shm://{place}/{{}}",
            "on Redis": f"{redis.url}?prefix={{}}-",
        }
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                running = [pool.submit(suite) for suite in suites(stores)]
                verdicts = [report(*each.result()) for each in running]
        finally:
            redis.end()
            wait_for(lambda: not servers(), "the end of the servers")
    sys.exit(not all(verdicts))


if __name__ == "__main__":
    main()
