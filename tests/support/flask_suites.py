"""
The own tests of Flask and of its extensions, run with the sessions of this project.

As a plugin of pytest, this module gives every application our session interface.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from distributions import Outcome, run_pytest

PACKAGES: Final = Path(sys.prefix, "peers")
"""What only these tests need. `make peers` installs it."""

_UNSIGNED: Final = "is about signed cookies: a session here needs no SECRET_KEY"

FAILURES: Final[Mapping[str, Mapping[str, str]]] = {
    "flask": {
        "test_missing_session": _UNSIGNED,
        "test_session_secret_key_fallbacks": _UNSIGNED,
        "test_session_transactions_no_null_sessions": _UNSIGNED,
        "test_session_using_samesite_attribute": "changed cookie settings reach a browser with the next cookie",
        "test_session_refresh_vary": "a request that does not look at its session sends no cookie, so no Vary",
        "test_bad_environ_raises_bad_request": "fails with Flask's own sessions too: Werkzeug 3.1.9 accepts the host",
    },
    "flask-login": {},
    "flask-wtf": {},
    "flask-session": {},
}
"""By package, the tests that fail, and the reasons."""


def run(distribution: Path) -> Outcome:
    """Run all tests of a distribution over a private store."""
    return run_pytest(distribution, "flask_suites", "tests", PACKAGES)


def pytest_configure() -> None:
    """Give every application our session interface."""
    from flask import Flask

    from shmstore import Store
    from shmstore.flask import StoreSessionInterface

    Flask.session_interface = StoreSessionInterface(Store(memory=2**20))
