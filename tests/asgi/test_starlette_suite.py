"""Starlette's own tests of its session middleware pass with the middleware of this project, over each kind of store."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import starlette_suite
from distributions import fetched
from redis_servers import RedisServer
from sampling import some

pytestmark = pytest.mark.timeout(900)  # the first test fetches the distribution


@some("kind", {kind: kind for kind in ("private", "of this host", "on Redis")})
def test_it_passes(kind: str, store_dir: Path, request: pytest.FixtureRequest) -> None:
    match kind:
        case "private":
            url = "private"
        case "of this host":
            url = f"shm://{store_dir}/shop"
        case _:
            server: RedisServer = request.getfixturevalue("redis_server")
            url = f"{server.url}?prefix=starlette-"
    distribution = fetched("starlette", version("starlette"))
    outcome = starlette_suite.run(distribution, url)
    assert set(outcome.failed) == starlette_suite.failures_of(distribution), outcome.printed
    assert outcome.passed >= 12, outcome.printed
