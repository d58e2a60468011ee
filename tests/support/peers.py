"""
Runs other projects' own tests of sessions over this one, and prints a line for each project: ``make peers``.

The exit status is 1 if a test fails without a documented reason, or if a documented reason does not apply. The reasons
are in the tables ``FAILURES`` of the modules that run the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version

import django_suite
import flask_suites
import starlette_suite
from distributions import Outcome, fetched
from package_trial import interpreter


def outcomes() -> Iterator[tuple[str, Mapping[str, str], Outcome | str]]:
    """Yield each distribution, its documented failures, and what its tests did, or why they were not run."""
    for package, reasons in flask_suites.FAILURES.items():
        distribution = fetched(package, version(package))
        has_tests = (distribution / "tests").exists()
        yield distribution.name, reasons, flask_suites.run(distribution) if has_tests else "has no tests in its sdist"
    for release in ("5.2", "current"):
        distribution = fetched("django", release)
        python = django_suite.python_for(distribution, interpreter)
        ran = django_suite.run(python, distribution, "private") if python else "needs a Python that is not found here"
        yield distribution.name, django_suite.FAILURES, ran
    distribution = fetched("starlette", version("starlette"))
    yield distribution.name, starlette_suite.FAILURES, starlette_suite.run(distribution, "private")


def report(name: str, reasons: Mapping[str, str], outcome: Outcome | str) -> bool:
    """Print what the tests of a distribution did. Return whether that is what is documented."""
    if isinstance(outcome, str):
        print(f"{name:20}  {outcome}", flush=True)
        return True
    explained = [test for test in outcome.failed if test in reasons]
    unexplained = len(outcome.failed) - len(explained)
    outdated = reasons.keys() - explained
    print(
        f"{name:20}  {outcome.passed:3} passed, {unexplained} failed, {len(explained)} failed for a documented reason, "
        f"{outcome.skipped} skipped",
        flush=True,
    )
    for test in sorted({*outcome.failed, *outdated}):
        reason = reasons.get(test, "FAILED")
        print(f"    {test}: {f'DID NOT FAIL, but is documented: {reason}' if test in outdated else reason}")
    good = outcome.passed > 0 and not unexplained and not outdated
    if not good:
        print(outcome.printed, flush=True)
    return good


if __name__ == "__main__":
    verdicts = [report(*each) for each in outcomes()]
    sys.exit(not all(verdicts))
