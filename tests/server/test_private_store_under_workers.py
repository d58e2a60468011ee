"""A private store under a server of several processes: visitors lose their sessions there, so the log says so."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask, session

from shmstore import Store
from shmstore.flask import Sessions, StoreSessionInterface

_LINE = "each process of this server has a private store"


@pytest.fixture
def store() -> Iterator[Store]:
    with Store(memory=2**18, check_period=None) as store:
        yield store


def make_app() -> Flask:
    app = Flask(__name__)
    app.testing = True

    @app.get("/")
    def count() -> str:
        session["count"] = session.get("count", 0) + 1
        return str(session["count"])

    return app


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize("source", [lambda store: store, lambda store: lambda: store], ids=["given", "opened"])
def test_a_private_store_per_process_is_logged_once(
    source: Callable[[Store], Any], store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    app.session_interface = StoreSessionInterface(source(store))
    client = app.test_client()
    client.get("/")
    assert warnings(caplog) == [], "one process"
    for _ in range(3):
        client.get("/", environ_overrides={"wsgi.multiprocess": True})
    (line,) = warnings(caplog)
    assert line.startswith(_LINE)
    assert "SESSION_STORE = 'shm://NAME'" in line


def test_a_private_store_created_before_the_fork_is_shared(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    app = make_app()
    Sessions(app, store=store)
    client = app.test_client()
    if not (pid := os.fork()):
        answer = client.get("/", environ_overrides={"wsgi.multiprocess": True})
        os._exit(not (answer.text == "1" and warnings(caplog) == []))
    assert os.waitpid(pid, 0)[1] == 0
    assert len(store) == 1
