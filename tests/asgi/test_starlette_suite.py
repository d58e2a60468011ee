"""Starlette's own tests of its session middleware pass with the middleware of this project."""

from __future__ import annotations

from pathlib import Path

import pytest
import starlette_suite
from redis_servers import RedisServer

pytestmark = pytest.mark.timeout(900)  # the first test fetches the distribution


def check(url: str) -> None:
    passed, failed, printed = starlette_suite.run(url)
    assert failed == set(starlette_suite.FAILURES), printed
    assert len(passed) >= 11, printed


def test_a_private_store() -> None:
    check("private")


@pytest.mark.processes("executed")
def test_a_store_of_this_host(store_dir: Path) -> None:
    check(f"shm://{store_dir}/shop")


def test_a_store_on_redis(redis_server: RedisServer) -> None:
    check(f"{redis_server.url}?prefix=starlette-")
