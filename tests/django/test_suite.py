"""Django's own tests of a session engine and of its middleware: the LTS and the current release, over each store."""

from __future__ import annotations

from pathlib import Path

import django_suite
import pytest
from distributions import fetched
from package_trial import interpreter
from redis_servers import RedisServer
from sampling import some

TESTS = 76  # in Django 5.2: 65 of the mixin, 11 of the middleware

pytestmark = pytest.mark.timeout(1800)  # the first test fetches the distributions
releases = some("release", {"5.2": "5.2", "current": "current"})


def run(release: str, url: str) -> None:
    distribution = fetched("django", release)
    python = django_suite.python_for(distribution, interpreter)
    if python is None:
        pytest.skip(f"{distribution.name} needs a newer Python, which is not found here")
    outcome = django_suite.run(python, distribution, url)
    assert set(outcome.failed) == set(django_suite.FAILURES), outcome.printed
    assert outcome.passed >= TESTS, outcome.printed


@releases
def test_a_private_store(release: str) -> None:
    run(release, "private")


@releases
def test_a_store_of_this_host(release: str, store_dir: Path) -> None:
    run(release, f"shm://{store_dir}/shop")


@releases
def test_a_store_on_redis(release: str, redis_server: RedisServer) -> None:
    run(release, f"{redis_server.url}?prefix=django-{release}-")
