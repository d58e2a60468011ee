"""
Starlette's own tests of its session middleware, run with the middleware of this project.

As a plugin of pytest, this module puts our middleware in the place of Starlette's, with Starlette's options translated.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from distributions import Outcome, run_pytest

FAILURES: Final = {
    "test_session_expires": "max_age=-1: a lifetime must be more than 0",
    "test_session_zero_max_age": "max_age=0: the same",
}
"""The tests that fail, and the reasons."""

TESTS: Final = 22
"""The tests that pass, at least."""


def run(distribution: Path, url: str) -> Outcome:
    """Run the tests over a store."""
    return run_pytest(distribution, "starlette_suite", "tests/middleware/test_session.py", STORE_URL=url)


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
