"""The demo under Gunicorn, and a visitor with a Chromium."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Page, expect
from processes import ROOT

IN_TIME = 30_000  # milliseconds, for actions that take at most two seconds on an idle machine
expect.set_options(timeout=IN_TIME)

DEMO = Path(ROOT, "examples", "demo")
APP = f"""
import os, sys
from importlib.util import module_from_spec, spec_from_file_location
os.environ["FLASK_SESSION_STORE"] = "shm://shop"
sys.path.insert(1, {str(DEMO)!r})
spec = spec_from_file_location("demo", {str(DEMO / "app.py")!r})
demo = module_from_spec(spec)
sys.modules["demo"] = demo
spec.loader.exec_module(demo)
app = demo.app
"""


class Visitor:
    """
    A visitor with a separate browser context.

    Attributes:
        page: The page in the browser.
        problems: Errors that the browser has logged: failed scripts, refused files.
        expected: Words of errors that the test provokes. They may be logged at any time.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.problems: list[str] = []
        self.expected: tuple[str, ...] = ()
        context.on("page", self._watch)
        context.set_default_timeout(IN_TIME)
        self.page: Page = context.new_page()

    def _watch(self, page: Page) -> None:
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def log_in(self, user: str, password: str = "") -> None:
        self.page.goto("/")
        self.page.get_by_label("Your name").fill(user)
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Log in").click()
        self.page.get_by_text(f"Hello {user}.").wait_for()

    def administer(self, query: str = "") -> Page:
        """Log in as admin, and open the admin page."""
        self.log_in("admin", "demo")
        self.page.goto(f"/admin/{query}")
        return self.page

    def sid(self) -> str:
        [cookie] = [cookie for cookie in self.context.cookies() if cookie["name"] == "session"]
        value: str = cookie["value"]
        return value


Visit = Callable[..., Visitor]
