"""A real Chromium, and the demo under a real Gunicorn for it to visit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import path_of_chromium
from demo_visitor import Visit, Visitor
from gunicorns import Gunicorn, StartGunicorn
from playwright.sync_api import Browser, Playwright, sync_playwright

from shmstore import connect
from shmstore.contract import AnyStore


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="session")
def chromium(playwright: Playwright) -> Iterator[Browser]:
    path = path_of_chromium()
    assert path, "these tests need a Chromium: make browser installs one"
    browser = playwright.chromium.launch(executable_path=path)
    yield browser
    browser.close()


@pytest.fixture
def demo(gunicorn: StartGunicorn) -> Gunicorn:
    return gunicorn("--bind", "127.0.0.1:0", "--preload").booted()


@pytest.fixture
def address(demo: Gunicorn) -> str:
    found = re.search(r"http://127\.0\.0\.1:\d+", demo.log.read_text())
    assert found
    return found[0]


@pytest.fixture
def shop(demo: Gunicorn, store_dir: Path) -> Iterator[AnyStore]:
    """Return the store of the demo."""
    with connect("shop", directory=store_dir) as store:
        yield store


@pytest.fixture
def visit(chromium: Browser, address: str) -> Iterator[Visit]:
    """Return a function that opens a browser for a new visitor; at the end, no browser may have logged an error."""
    visitors: list[Visitor] = []

    def open_(**how: Any) -> Visitor:
        visitors.append(Visitor(chromium.new_context(base_url=address, **how)))
        return visitors[-1]

    yield open_
    for visitor in visitors:
        visitor.context.close()
    for visitor in visitors:
        assert [each for each in visitor.problems if not any(word in each for word in visitor.expected)] == []
