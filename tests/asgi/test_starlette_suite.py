"""Starlette's own tests of its session middleware pass with the middleware of this project."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import starlette_suite
from distributions import fetched
from redis_servers import RedisServer

pytestmark = pytest.mark.timeout(900)  # the first test fetches the distribution


def check(url: str) -> None:
    outcome = starlette_suite.run(fetched("starlette", version("starlette")), url)
    assert set(outcome.failed) == set(starlette_suite.FAILURES), outcome.printed
    assert outcome.passed >= 22, outcome.printed


def test_a_private_store() -> None:
    check("private")


@pytest.mark.processes("executed")
def test_a_store_of_this_host(store_dir: Path) -> None:
    check(f"shm://{store_dir}/shop")


def test_a_store_on_redis(redis_server: RedisServer) -> None:
    check(f"{redis_server.url}?prefix=starlette-")
